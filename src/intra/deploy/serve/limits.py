"""How much the server takes, so that no client can exhaust it."""

from dataclasses import dataclass

from intra.errors import InTraError

__all__ = ["MIB", "Limits"]

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may use. Raises InTraError for one that is not positive."""

    body_bytes: int = 32 * MIB  # of one upload
    pixels: int = 32_000_000  # of one photo, decoded; takes about 1 GB while it is inspected
    waiting: int = 64  # photos in the queue; more clients are told to come back
    received_bytes: int = 256 * MIB  # of all bodies as they were sent, from the first byte to the verdict
    upload_s: float = 30.0  # for the body of one request
    answer_s: float = 120.0  # from the end of the upload to the verdict
    store_bytes: int = 256 * MIB  # of pictures that are kept for their links; the oldest are forgotten
    connections: int = 500
    header_s: float = 10.0  # for the head of a request, also of the next one on the same connection
    stalled_s: float = 20.0  # a client that takes nothing of its answer for so long is dropped

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise InTraError(f"limit {name} is {value}; it must be above 0")
