"""Where and in which precision the arithmetic runs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from intra.errors import InTraError

__all__ = ["autocast", "pick_device", "uses_bf16"]

Precision = Literal["auto", "fp32", "bf16"]


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the first GPU, or the CPU. Raises InTraError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InTraError(f"device {name!r} cannot be used here ({reason}); pass --device auto or cpu") from error
    return device


def uses_bf16(device: torch.device, precision: Precision) -> bool:
    """Whether matrix products run in bf16: asked for, or "auto" on a machine that computes it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """A context in which matrix products run in that precision; weights and sums stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if uses_bf16(device, precision) else nullcontext()
