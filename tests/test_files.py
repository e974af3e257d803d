"""Files: whole or not at all, and only ours are read."""

import errno
import json
import os
import sys

import numpy as np
import pytest
import torch

from hicode.errors import FileFormatError, OutputError
from hicode.files import (
    atomic_path,
    check_free_space,
    check_writable,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)


def test_a_file_appears_whole_and_keeps_its_suffix(tmp_path):
    with atomic_path(tmp_path / "deep" / "a.mp4") as temporary:
        assert temporary.suffix == ".mp4" and not (tmp_path / "deep" / "a.mp4").exists()
        temporary.write_text("whole")
    assert (tmp_path / "deep" / "a.mp4").read_text() == "whole"
    assert os.listdir(tmp_path / "deep") == ["a.mp4"]


def test_a_failure_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "number, finding", [(errno.ENOSPC, "Disk full"), (errno.EROFS, "no permission"), (errno.EIO, "Cannot write")]
)
def test_what_the_system_refuses_is_said_in_one_line(tmp_path, number, finding):
    with pytest.raises(OutputError, match=finding) as caught, atomic_path(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "a") in str(caught.value) and os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_under_tensors_is_said(tmp_path, monkeypatch):
    """The library raises an error of its own, with the system's number in words."""
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OutputError, match="Disk full while writing"):
        save_tensors(tmp_path / "a", {"a": torch.rand(2)}, "thing", 1)
    assert os.listdir(tmp_path) == []


def test_unwritable_places_are_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "a.mp4")
    with pytest.raises(OutputError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match="Cannot write"):
        check_writable(tmp_path / "file" / "a.mp4")


def test_too_little_space_is_said(tmp_path):
    check_free_space(tmp_path, 1)
    with pytest.raises(OutputError, match="MB are needed"):
        check_free_space(tmp_path, 1 << 60)


def test_tensors_round_trip_with_their_config(tmp_path):
    tensors = {"a": torch.rand(3, 4), "b": np.arange(5), "half": torch.rand(2).half(), "view": torch.rand(4, 4).T}
    save_tensors(tmp_path / "a.safetensors", tensors, "thing", 1, {"x": [1, "two"]})
    back, config = load_tensors(tmp_path / "a.safetensors", "thing", 1)
    assert config == {"x": [1, "two"]}
    for name, value in tensors.items():
        assert torch.equal(back[name], torch.as_tensor(value)) and back[name].dtype == torch.as_tensor(value).dtype


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_tensors_in_a_file_whose_name_is_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode("声".encode("gbk"))
    save_tensors(path, {"a": torch.arange(3)}, "test", 1)
    assert torch.equal(load_tensors(path, "test", 1)[0]["a"], torch.arange(3)) and len(list(tmp_path.iterdir())) == 1


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    base = torch.arange(6.0)
    save_tensors(tmp_path / "a", {"all": base, "part": base[2:4]}, "thing", 1)
    assert torch.equal(load_tensors(tmp_path / "a", "thing", 1)[0]["part"], base[2:4])


def damaged(path):
    save_tensors(path, {"a": torch.rand(1000)}, "thing", 2)
    path.write_bytes(path.read_bytes()[:-500])


# How the file is made, and a word of the finding.
BAD = {
    "absent": (lambda p: None, "does not exist"),
    "a folder": (lambda p: p.mkdir(), "is a folder"),
    "empty": (lambda p: p.write_bytes(b""), "damaged or not"),
    "text": (lambda p: p.write_text("hello"), "damaged or not"),
    "a pickle": (lambda p: torch.save({"a": torch.rand(3)}, p), "damaged or not"),
    "cut off": (damaged, "checksum differs"),
    "another schema": (lambda p: save_tensors(p, {"a": torch.rand(1)}, "other", 1), "not a thing file"),
    "newer": (lambda p: save_tensors(p, {"a": torch.rand(1)}, "thing", 3), "Update hicode"),
    "older": (lambda p: save_tensors(p, {"a": torch.rand(1)}, "thing", 1), "without an upgrade"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused_with_name_and_reason(tmp_path, name):
    make, finding = BAD[name]
    make(tmp_path / "x")
    with pytest.raises(FileFormatError, match=finding) as caught:
        load_tensors(tmp_path / "x", "thing", 2)
    assert str(tmp_path / "x") in str(caught.value)


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert read_json(tmp_path / "a.json") == {"x": 1}


@pytest.mark.parametrize("text", ["{", "\udcff", "[1,"])
def test_broken_json_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text, errors="surrogateescape")
    with pytest.raises(FileFormatError, match="not readable JSON"):
        read_json(tmp_path / "a.json")


def test_json_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([1, 2]))
    with pytest.raises(FileFormatError, match="not a thing"):
        read_json(tmp_path / "a.json", "thing", 1)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.zeros(2, dtype=torch.bool)}
    for k in range(8):  # the library's own order of three entries is the same by chance in one of six
        save_tensors(tmp_path / str(k), tensors, "s", 1, {"é": "ü\n\\"})
    assert len({(tmp_path / str(k)).read_bytes() for k in range(8)}) == 1
    loaded, config = load_tensors(tmp_path / "0", "s", 1)
    assert (
        config == {"é": "ü\n\\"} and torch.equal(loaded["b"], tensors["b"]) and torch.equal(loaded["a"], tensors["a"])
    )


def test_a_file_gets_the_permissions_of_the_umask_and_the_umask_stays(tmp_path):
    import os

    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
