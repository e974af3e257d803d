"""A signing key of the tests' own: nobody's configuration is touched."""

import pytest


@pytest.fixture(autouse=True)
def own_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HICODE_CONFIG", str(tmp_path / "config"))
    return tmp_path / "config"
