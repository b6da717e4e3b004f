"""Where, in which precision and in what portions the arithmetic runs."""

import copy
import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Literal, TypeVar

import torch
from torch import nn

from intra.errors import InTraError

__all__ = ["OutOfMemoryError", "autocast", "for_inference", "in_chunks", "is_out_of_memory", "memory_for",
           "pick_device", "uses_bf16"]

Precision = Literal["auto", "fp32", "bf16"]
# Torch has a type of error for GPUs alone; the CPU's allocators, and CUDA's libraries, raise RuntimeError with one of
# these.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad allocation", "alloc_failed",
              "allocation_failed")

# glibc's mallopt (malloc.h), by which the CPU's tensors are allocated on Linux
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, LARGE_BYTES = 2**30, 2**25

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


class OutOfMemoryError(InTraError):
    """The machine's memory does not suffice, not even for the smallest portion."""


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA's GPU if there is one that computes, else the CPU.

    From then on a GPU's convolutions in fp32 keep all bits, and do the same each time; for the CPU, the process keeps
    up to 1 GiB of freed memory for its next tensors. Raises InTraError for a device that does not compute, and for
    "mps".
    """
    if name.partition(":")[0] == "mps":  # pooling to sizes that do not divide, as for a region, is wrong or missing
        raise InTraError(f"device {name!r} cannot be used: torch has not all there that a calibration needs; pass "
                         "--device auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if (error := _failure_of(name)) is not None:
            _log.warning("the GPU cannot be used (%s); going on with the CPU", _first_line(error))
            name = "cpu"
    elif (error := _failure_of(name)) is not None:
        kind = OutOfMemoryError if is_out_of_memory(error) else InTraError
        raise kind(f"device {name!r} cannot be used here ({_first_line(error)}); pass --device auto or cpu") from error
    if name.partition(":")[0] == "cpu":
        _keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: whitening divides small differences by small spreads
    torch.backends.cudnn.deterministic = True
    return torch.device(name)


def _keep_freed_memory() -> None:
    """Lets glibc keep what is freed: by default it gives tensors of some MB back and fetches the next ones anew page by
    page, in one training of four 6,500 pages and a seventh of the time of each step.
    """
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
            mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)  # larger ones are given back still; this is glibc's own most


def _failure_of(name: str) -> Exception | None:
    """Why a device does not sum: a GPU too old for this torch is listed and gives memory, but computes nothing."""
    try:
        float(torch.ones(1, device=name).sum())
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return error
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def uses_bf16(device: torch.device, precision: Precision) -> bool:
    """Whether matrix products run in bf16: asked for, or "auto" on a machine that computes it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        with torch.cuda.device(device):  # not every GPU of a machine need be of one kind
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """A context in which matrix products run in that precision; weights and sums stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if uses_bf16(device, precision) else nullcontext()


def for_inference(model: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """The network itself, or where its matrix products run in bf16 a copy whose matrices are rounded already, which
    `autocast` would do anew at each call.
    """
    if not uses_bf16(device, precision):
        return model
    rounded = copy.deepcopy(model)
    for part in rounded.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.to(torch.bfloat16)
    return rounded


def in_chunks(work: Callable[[int, int], _Result], count: int, size: int) -> Iterator[_Result]:
    """What `work(start, stop)` gives for 0 to `count`, `size` at a time; half as many from where memory runs out.

    Raises OutOfMemoryError if it does not suffice for one.
    """
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            result = work(start, stop)
        except (MemoryError, RuntimeError, OutOfMemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if stop - start == 1:
                raise OutOfMemoryError("the memory does not suffice for one image; close other programs, pass --device "
                                       "cpu, or train with a smaller --image-size") from error
            size = (stop - start) // 2
            _log.warning("out of memory with %d at a time; going on with %d", stop - start, size)
        else:
            yield result
            start = stop
            continue
        torch.cuda.empty_cache()  # only here, behind the except: the error itself holds on to tensors


@contextmanager
def memory_for(what: str, advice: str) -> Iterator[None]:
    """Turns every error that says that there was not enough memory into an OutOfMemoryError of one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"the memory does not suffice for {what}; {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on any device."""
    if isinstance(error, MemoryError | OutOfMemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
