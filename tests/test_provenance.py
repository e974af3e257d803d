"""Provenance: what every result says of itself."""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hicode import __version__, assets
from hicode.errors import AssetError
from hicode.provenance import plain, provenance


@dataclass(frozen=True)
class Config:
    rate: float = 0.1
    where: Path = Path("a/b")
    stages: tuple[int, ...] = (1, 2)


def test_a_result_says_what_made_it_in_plain_json():
    found = provenance({"head": Config(), "n": np.int64(3), "bad": float("nan")}, seed=7, assets=["face_landmarks"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["version"] == __version__ and found["seed"] == 7
    assert found["config"] == {"head": {"rate": 0.1, "where": "a/b", "stages": [1, 2]}, "n": 3, "bad": None}
    pinned = assets.ASSETS["face_landmarks"].package
    assert found["assets"] == {
        "face_landmarks": {"package": f"pypi mediapipe {pinned.version}", "sha256": pinned.sha256}
    }
    assert "core" in found["machine"] and found["torch"] and found["made"].endswith("+00:00")


def test_the_commit_is_the_checkouts_own():
    root = Path(__file__).resolve().parent.parent
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip("this copy of the repository is no git checkout")
    found = provenance()
    assert head.stdout.startswith(found["commit"]) and len(found["commit"]) == 12
    assert isinstance(found["dirty"], bool)


def test_a_package_inside_another_repository_takes_no_commit_of_it(tmp_path):
    """A .venv in a checkout of something else: that commit says nothing about this code."""
    source = Path(__file__).resolve().parent.parent / "src" / "hicode"
    package = tmp_path / ".venv" / "hicode"
    package.mkdir(parents=True)
    for name in ("__init__", "assets", "errors", "files", "runtime", "provenance"):
        (package / f"{name}.py").write_text((source / f"{name}.py").read_text())
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    try:
        subprocess.run([*git, "init", "-q"], check=True, capture_output=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git cannot make a repository here")
    code = "import hicode.provenance as p; print(p.__file__, p.provenance()['commit'], p.provenance()['dirty'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=package.parent,
        env={"PYTHONPATH": str(package.parent), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    file, commit, dirty = done.stdout.split()
    assert Path(file).parent == package and (commit, dirty) == ("None", "None")


def test_a_file_that_the_user_brought_is_known_by_its_hash_and_not_by_its_place(tmp_path):
    file = tmp_path / "syncnet_v2.model"
    file.write_bytes(b"weights")
    found = provenance(assets=[str(file)])
    assert found["assets"] == {"syncnet_v2.model": {"package": None, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    assert str(tmp_path) not in json.dumps(found)
    with pytest.raises(AssetError, match="neither an asset nor a file"):
        provenance(assets=["no_such_part"])


def test_plain_values_are_what_json_has():
    assert plain({1: (np.float32(0.5), {"b", "a"}, range(2), np.arange(2))}) == {"1": [0.5, ["a", "b"], [0, 1], [0, 1]]}
    assert plain([float("inf"), True, None]) == [None, True, None]
