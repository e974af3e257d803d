"""Shared fixtures of the research tests."""

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real clips."""
    if not DATA.exists():
        pytest.skip("real clips are not here (../shared/data): this check needs one")
    return DATA
