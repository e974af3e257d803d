"""Where a figure comes from: code, configuration, seed, machine, pretrained parts. Every result file has this record.

It names no person, host or folder, because results are published.
"""

import dataclasses
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hicode import __version__, assets
from hicode.errors import AssetError
from hicode.files import sha256_of
from hicode.runtime import cores

_PACKAGES = ("torch", "numpy", "scipy", "numba", "opencv-python-headless", "av")


def provenance(config: dict | None = None, seed: int | None = None, assets: Iterable[str] = ()) -> dict:
    """What made a result, as plain JSON values.

        version   of the package
        commit    of the checkout that the package was imported from; None if there is none
        dirty     whether tracked files of the package differ from that commit; None without a commit
        config    as given, converted by `plain`
        seed      as given
        machine   processor, cores that this process may use, system, memory
        python, torch, packages   versions
        assets    for each name: package, version and sha256 of the pinned archive
        made      UTC, to the second

    `assets` has names of `hicode.assets`, or paths of the user's own files (only the file's name and sha256 are kept).
    Raises AssetError for a name that is neither.
    """
    commit, dirty = _checkout()
    packages = _versions()
    return {
        "version": __version__,
        "commit": commit,
        "dirty": dirty,
        "config": None if config is None else plain(config),
        "seed": seed,
        "machine": _machine(),
        "python": platform.python_version(),
        "torch": packages.get("torch"),
        "packages": packages,
        "assets": dict(_described(name) for name in assets),
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def plain(value: Any) -> Any:
    """The value as JSON types: dataclasses become dicts, sequences lists, paths strings, NaN and infinity None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=str)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if value - value == 0 else None
    return str(value)


@cache
def _checkout() -> tuple[str | None, bool | None]:
    """(commit, dirty) of the git checkout that tracks this package; (None, None) if none does.

    A package inside another checkout (a .venv in a repository) is not tracked there: that commit says nothing about it.
    """
    root = Path(__file__).resolve().parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return (commit[:12], bool(changed)) if commit else (None, None)


@cache
def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@cache
def _machine() -> str:
    parts = [platform.machine(), f"{cores()} core{'s' * (cores() != 1)}", platform.system()]
    name = _processor()
    if name:
        parts.insert(1, name)
    with suppress(ValueError, OSError, AttributeError):  # not on Windows
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    return ", ".join(parts)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() if platform.processor() != platform.machine() else ""


def _described(name: str) -> tuple[str, dict]:
    if name in assets.ASSETS:
        package = assets.ASSETS[name].package
        return name, {"package": f"{package.registry} {package.name} {package.version}", "sha256": package.sha256}
    file = Path(name)
    if not file.is_file():
        raise AssetError(f"{name} is neither an asset nor a file. Assets are: {', '.join(assets.ASSETS)}.")
    return file.name, {"package": None, "sha256": sha256_of(file)}
