"""Everybody in a folder: what is missing is done, failures stop nobody. `prepare` and `train` are stubs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hicode import learn as learning
from hicode.errors import InputError
from hicode.files import write_json
from hicode.learn import LearnConfig, learn
from hicode.preparation.clip import SCHEMA, VERSION
from hicode.training.avatar import TrainConfig


def stub_prepare(video, out, config, progress):
    """A clip with a capture report; a video that says `bad` is refused, one that says `defect` raises anything."""
    says = Path(video).read_text()
    with (Path(out).parent / "prepared").open("a") as log:
        log.write(Path(video).stem + "\n")
    if says == "bad":
        raise InputError("No face in it. Film one.")
    if says == "defect":
        raise IndexError("off by one")
    item = {"name": "face", "value": "90 px", "advice": "Come nearer." if says == "far" else ""}
    Path(out).mkdir(exist_ok=True)
    write_json(Path(out) / "clip.json", {"schema": SCHEMA, "version": VERSION, "report": {"items": [item]}})
    return SimpleNamespace(path=Path(out))


def stub_train(clip, out, config):
    """An avatar that is its clip's name; a run whose seed is 7 waits in the second one until it is killed."""
    if config.seed == 7 and any(out.parent.glob("*.hicode")):
        time.sleep(60)
    out.write_text(f"{clip.path.name} {config.seed}")


def use_stubs(setattr):
    setattr(learning, "prepare", stub_prepare)
    setattr(learning, "train", stub_train)


@pytest.fixture
def people(tmp_path, monkeypatch):
    """A folder of three videos; the names of the prepared ones so far."""
    use_stubs(monkeypatch.setattr)
    folder, out = tmp_path / "videos", tmp_path / "avatars"
    folder.mkdir()
    for name, says in (("anna", "fine"), ("bert", "far"), ("carl", "well")):
        (folder / f"{name}.mp4").write_text(says)
    log = out / "clips/prepared"
    return folder, out, lambda: log.read_text().split() if log.exists() else []


def test_everybody_is_learned_once(people, capsys):
    folder, out, prepared = people
    found = learn(folder, out)["people"]
    assert [found[name]["done"] for name in ("anna", "bert", "carl")] == [True] * 3
    assert "Come nearer." in capsys.readouterr().err
    assert found == json.loads((out / "learned.json").read_text())["people"] == learn(folder, out)["people"]
    assert prepared() == ["anna", "bert", "carl"]


def test_a_rerun_does_what_changed(people):
    folder, out, prepared = people
    learn(folder, out)
    (folder / "bert.mp4").write_text("other content")
    (out / "carl.hicode").write_text("damaged")
    learn(folder, out)
    assert prepared()[3:] == ["bert", "carl"]
    learn(folder, out, LearnConfig(train=TrainConfig(seed=1)))
    assert prepared()[5:] == ["anna", "bert", "carl"]


def test_failures_are_listed_and_stop_nobody(people):
    folder, out, prepared = people
    (folder / "anna.mp4").write_text("bad")
    (folder / "bert.mp4").write_text("defect")
    with pytest.raises(InputError, match="2 of 3 videos failed, first anna: No face in it"):
        learn(folder, out)
    found = json.loads((out / "learned.json").read_text())["people"]
    assert "IndexError: off by one" in found["bert"]["failed"] and found["carl"]["done"]
    (folder / "anna.mp4").write_text("fine")
    with pytest.raises(InputError, match="1 of 3 videos failed, first bert"):
        learn(folder, out)
    assert prepared()[3:] == ["anna", "bert"]


def test_one_content_is_learned_once(people, capsys):
    folder, out, prepared = people
    (folder / "doris.mp4").write_text("fine")
    learn(folder, out)
    assert prepared() == ["anna", "bert", "carl"] and "doris.mp4 has the content of anna.mp4" in capsys.readouterr().out


def test_a_killed_driver_goes_on(people, monkeypatch):
    folder, out, prepared = people
    code = (
        "import test_learn; test_learn.use_stubs(setattr)\nfrom hicode.learn import *\n"
        f"learn({str(folder)!r}, {str(out)!r}, LearnConfig(train=TrainConfig(seed=7)), progress=False)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    driver = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    end = time.monotonic() + 60
    while prepared() != ["anna", "bert"]:
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    record = {file: file.stat().st_mtime_ns for file in out.glob("clips/anna-*.json")}
    assert len(record) == 1 and not (out / "bert.hicode").exists()
    monkeypatch.setattr(learning, "train", lambda clip, out, config: out.write_text(clip.path.name))
    learn(folder, out, LearnConfig(train=TrainConfig(seed=7)), progress=False)
    assert prepared() == ["anna", "bert", "bert", "carl"] and record == {f: f.stat().st_mtime_ns for f in record}


@pytest.mark.parametrize("names, says", [((), "holds no video"), (("a.mp4", "a.mov"), "two videos called a")])
def test_folders_that_cannot_be_learned(tmp_path, names, says):
    for name in names:
        (tmp_path / name).write_text(name)
    with pytest.raises(InputError, match=says):
        learn(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="is no folder"):
        learn(tmp_path / "none", tmp_path / "out")
