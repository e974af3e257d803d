"""The wheel holds what a user runs, and nothing of the research."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """Names of the files in the wheel."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(REPOSITORY / name, copy / name)
    for name in ("src", "research"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(copy)], cwd=copy, check=True, capture_output=True)
    with zipfile.ZipFile(next(copy.glob("*.whl"))) as archive:
        return archive.namelist()


def test_every_source_and_every_weight_is_in_it(wheel):
    package = REPOSITORY / "src"
    kinds = {".py", ".typed", ".json", ".safetensors", ".js", ".html", ".css", ".svg"}
    needed = {
        p.relative_to(package).as_posix() for p in package.rglob("*") if p.suffix in kinds or p.name == "py.typed"
    }
    assert needed == {name for name in wheel if name.startswith("hicode/")}


def test_types_weights_and_tracking_data_are_among_them(wheel):
    assert {"hicode/py.typed", "hicode/weights/speech.safetensors", "hicode/tracking/landmark_map.safetensors"} <= set(
        wheel
    )


def test_it_holds_the_package_and_its_metadata_alone(wheel):
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"hicode"}
    assert not any("research" in name or "tests" in name for name in wheel)
