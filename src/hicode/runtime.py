"""What the machine gives: allocator, threads, device, memory."""

import os
import sys
from typing import Literal

from hicode.errors import InputError

Device = Literal["auto", "cpu", "cuda"]

# glibc's mallopt parameters (malloc.h)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune_allocator() -> bool:
    """Keep freed memory for the next tensor instead of handing it back to the kernel; True where it took effect (glibc).

    torch frees and takes tensors of megabytes all the time; by default glibc maps each anew and the kernel zeroes its pages: up to half of
    an element-wise operation's time (measured: a landmark fit fell from 136 s to 5 s).
    """
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30) and libc.mallopt(_M_TOP_PAD, 1 << 26))
    except (OSError, AttributeError):
        return False


def share_cores() -> None:
    """Let OpenMP's waiting threads sleep instead of spin, unless the user's environment says otherwise. Call before torch is imported.

    A spinning thread takes the core that another process, or our own kernels' threads, would work on: with two cores and other work on them a
    training iteration took 436 ms spinning and 151 ms sleeping.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_device(device: Device) -> Literal["cpu"]:
    """The device that commands run on. Raises InputError where CUDA is asked for: so far only `rasterize(..., backend="cuda")` runs there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("No CUDA device is visible to torch. Leave --device out, or install a CUDA build of torch.")
    if device == "cuda":
        raise InputError("Commands do not run on CUDA yet, only the rasteriser does (rasterize(..., backend='cuda')). Leave --device out.")
    return "cpu"


def peak_memory_mb() -> float:
    """Largest resident size of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
