"""Shared fixtures. Tests that need a real clip find it at ../shared/data and skip, saying so, where it is absent."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY.parent / "shared" / "data"

# One thread is enough for small problems and keeps timings of neighbours honest; kernels that must agree on 1 and 2 threads set their own.
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real clips."""
    if not DATA.exists():
        pytest.skip("real clips are not here (../shared/data): this check needs one")
    return DATA


@pytest.fixture(scope="session")
def markey(data_dir) -> Path:
    """An 8 s HDTF clip: 512x512, 25 fps, with sound."""
    clip = data_dir / "hdtf" / "WDA_EdMarkey0_000.mp4"
    if not clip.exists():
        pytest.skip(f"{clip.name} is not in ../shared/data/hdtf")
    return clip
