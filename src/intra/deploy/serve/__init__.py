"""Inspection over HTTP: an API and one page for people. Needs the extra `[serve]`, and says so where it is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from intra.errors import InTraError

if TYPE_CHECKING:
    from intra.deploy.serve.limits import Limits

__all__ = ["serve"]

_EXTRA = {"fastapi", "h11", "multipart", "pydantic", "python_multipart", "starlette", "uvicorn"}


def serve(
    run: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: "Limits | None" = None,
    device: str = "auto",
    threshold: float | None = None,
    false_reject_rate: float | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves a run's model until SIGINT or SIGTERM, then answers what is under way, and returns.

    Args:
        port: 0 takes any free one.
        token: every request must carry it; needed for any host but a loopback one.
        threshold, false_reject_rate: as in `Detector.load`.
        on_ready: gets the address as soon as the server answers.

    Raises:
        InTraError: the extra is missing, the model cannot be loaded, the port is in use, or a host that others can
            reach was given without a token.
    """
    try:
        from intra.deploy.serve.server import run_server
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        raise InTraError(f"serving needs {error.name}, which is not installed; run: pip install 'intra-ad[serve]'"
                         ) from error
    run_server(run, host=host, port=port, token=token, limits=limits, device=device, threshold=threshold,
               false_reject_rate=false_reject_rate, on_ready=on_ready)
