"""Shared fixtures of the research tests."""

from pathlib import Path

import pytest

from helpers.speech_world import generic, world

__all__ = ["data_dir", "generic", "world"]

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real clips."""
    if not DATA.exists():
        pytest.skip("real clips are not here (../shared/data): this check needs one")
    return DATA
