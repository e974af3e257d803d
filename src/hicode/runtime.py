"""What the machine gives: allocator, threads, device, memory."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from hicode.errors import InputError, OutputError, ResourceError

Device = Literal["auto", "cpu", "cuda"]

# glibc's mallopt parameters (malloc.h)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune_allocator() -> bool:
    """Keep freed memory for the next tensor instead of returning it to the kernel; True where it took effect (glibc).

    It acts on the whole process and cannot be undone, so the command line calls it and the library does not. torch
    frees and takes tensors of megabytes all the time. By default glibc maps each anew and the kernel zeroes its pages:
    up to half of an element-wise operation's time (measured: a landmark fit fell from 136 s to 5 s).
    """
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(
            libc.mallopt(_M_MMAP_MAX, 0)
            and libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
            and libc.mallopt(_M_TOP_PAD, 1 << 26)
        )
    except (OSError, AttributeError):
        return False


def share_cores() -> None:
    """Let OpenMP's waiting threads sleep instead of spin, unless the user's environment says otherwise.

    It sets an environment variable before torch is imported, so the command line calls it and the library does not. A
    spinning thread takes the core that another process, or this package's kernels, could use: on two busy cores a
    training iteration took 436 ms spinning and 151 ms sleeping.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def find_compile_cache() -> Iterator[Path | None]:
    """Give Numba a folder for compiled code where it would find none; None where it finds one itself.

    Without a folder, Numba refuses to compile. It looks beside the package and in the user's cache; in a container of
    another user neither may be writable. It sets an environment variable before Numba is imported, so the command line
    calls it and the library does not. The temporary folder lasts as long as the context: other users cannot put code
    there. Raises OutputError where there is no place for temporary files either.
    """
    package = Path(__file__).parent
    beside = package / "__pycache__"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    kept = cache.is_absolute() and can_write(cache / "numba")  # a user without a home folder has a relative one
    if "NUMBA_CACHE_DIR" in os.environ or can_write(beside) or kept:
        yield None
        return
    from hicode.files import temporary_folder

    with ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder())
        except OSError as error:
            raise OutputError(
                "There is no folder for temporary files that can be written. Set TMPDIR to one with 100 MB."
            ) from error
        os.environ["NUMBA_CACHE_DIR"] = str(folder)
        try:
            yield folder
        finally:
            del os.environ["NUMBA_CACHE_DIR"]


def find_research() -> None:
    """Make `research` importable: it stands next to the package in a clone, and is in no wheel. Raises InputError."""
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "research" / "__init__.py").exists():
        raise InputError("This needs a clone of the repository. Clone it and run ./run there.")
    if str(clone) not in sys.path:
        sys.path.append(str(clone))


def can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which may be still to be made."""
    while not folder.exists():
        if folder == folder.parent:
            return False
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_device(device: Device) -> Literal["cpu", "cuda"]:
    """Where training and synthesis run. Raises InputError where CUDA is asked for and torch or gsplat cannot give it.

    `auto` is the CPU even where there is a GPU: gsplat compiles itself for minutes at its first use.
    """
    if device != "cuda":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise InputError("No CUDA device is visible to torch. Leave --device out, or install a CUDA build of torch.")
    if find_spec("gsplat") is None:
        raise InputError(
            "--device cuda needs gsplat, which is not installed. pip install 'hicode[cuda]', or leave --device out."
        )
    return "cuda"


def available_memory() -> float:
    """Bytes that this process may still allocate: what is free, and what its control groups (containers) allow.

    Infinite where that cannot be read. On systems other than Linux it takes psutil, if that is installed.
    """
    if not sys.platform.startswith("linux"):
        try:
            import psutil
        except ImportError:
            return math.inf
        return float(psutil.virtual_memory().available)
    free = math.inf
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    return min(free, _room_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _room_in_groups(own: Path, root: Path) -> float:
    """Limit minus use, the least over this process's control group and its parents (version 2, then 1).

    A file cache counts as free.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return math.inf
    room = math.inf
    for _, controllers, path in lines:
        if controllers not in ("", "memory"):
            continue
        base, names = root, ("memory.max", "memory.current", "inactive_file")
        if controllers == "memory":
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                limit, used = (int((group / name).read_text()) for name in names[:2])
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                room = min(room, float(limit - used + int(statistics.get(names[2], 0))))
            except (OSError, ValueError):  # no such group here, or no limit ("max")
                pass
            if group == base:
                break
    return room


def require_memory(need_bytes: float, doing: str, remedy: str) -> None:
    """Raise ResourceError where `doing` needs more than is left: before the work, not in the middle of it."""
    free = available_memory()
    if need_bytes > free:
        raise ResourceError(f"{doing} needs about {_gb(need_bytes)} of memory, {_gb(free)} are free. {remedy}")


def require_memory_for_frames(frames: int, fps: float, fixed_bytes: float, frame_bytes: float, doing: str) -> None:
    """`require_memory` for work on a clip; the remedy says how many seconds of it would do."""
    fitting_s = (available_memory() - fixed_bytes) / frame_bytes / fps
    less = f", or use less of the video (--duration {fitting_s:.0f})" if fitting_s >= 10 else ""
    require_memory(fixed_bytes + frame_bytes * frames, doing, f"Close other programs{less}.")


def forecast(doing: str, core_seconds: float, need_bytes: float) -> str:
    """What work will take here, said before it starts: time on this machine's cores if they are free, and memory.

    Four cores are used at most, and a second one adds less than the first.
    """
    count = cores()
    seconds = core_seconds / (1.0 if count == 1 else 0.8 * min(count, 4))
    time = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f"{doing} takes about {time} on {count} core{'s' * (count > 1)}, and {_gb(need_bytes)} of memory."


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB"


def peak_memory_mb() -> float:
    """Largest resident size of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
