"""Shared fixtures. Tests that need a real clip find it at ../shared/data and skip, saying so, where it is absent."""

import os
import tempfile
from pathlib import Path

import pytest
from jaxtyping import config as shape_checks

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY.parent / "shared" / "data"

# Waiting OpenMP threads sleep: on two busy cores spinning ones cost three times the time. Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Keys and logs of the tests never lie among the user's own.
os.environ["HICODE_CONFIG"] = tempfile.mkdtemp(prefix="hicode-config-")


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


@pytest.fixture(autouse=True)
def _shapes_unchecked_where_wrong_ones_are_the_point(request):
    """Tests of what a function itself says to wrong shapes (`@pytest.mark.wrong_shapes`) run without the checks."""
    wrong = request.node.get_closest_marker("wrong_shapes") is not None
    shape_checks.update("jaxtyping_disable", wrong)
    yield
    shape_checks.update("jaxtyping_disable", False)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched):
    """Name a test whose worker died at once: a run that does not reach its end prints no summary."""
    print(f"\nThe process that ran {crashitem} died.", flush=True)
