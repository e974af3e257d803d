"""What the machine gives: allocator, threads, device, memory."""

import os
import sys
from importlib.util import find_spec
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


def resolve_device(device: Device) -> Literal["cpu", "cuda"]:
    """Where training and synthesis run. Raises InputError where CUDA is asked for and torch or gsplat cannot give it.

    `auto` is the CPU even where there is a GPU: the CUDA path is tested against a stand-in (tests/test_cuda.py), no real GPU has run it yet.
    """
    if device != "cuda":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise InputError("No CUDA device is visible to torch. Leave --device out, or install a CUDA build of torch.")
    if find_spec("gsplat") is None:
        raise InputError("--device cuda needs gsplat, which is not installed. pip install 'hicode[cuda]', or leave --device out.")
    return "cuda"


def peak_memory_mb() -> float:
    """Largest resident size of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
