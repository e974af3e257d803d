"""What people give that cannot work: one line that names the thing, the finding and the remedy, exit status 2, and
nothing half-written.
"""

import errno
import os
import shutil

import cv2
import numpy as np
import pytest
import soundfile
import torch

from helpers.clips import write_clip
from helpers.terminal import the_one_line
from helpers.videos import portrait, speech_like, swaying, write_video
from hicode import assets, cli, runtime
from hicode.avatar.avatar import VERSION
from hicode.files import save_tensors
from hicode.preparation import crop, pipeline, steps

REMEDIES = (
    "Give", "Check", "Name", "Copy", "copy", "Export", "export", "Film", "Trim", "Choose", "Make", "Free", "Use",
    "Did you mean", "See hicode", "Go on", "Update", "run hicode", "Train", "There are", "Leave",
    "Change", "Repair", "The usual", "make it anew",
)  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Files good and bad, made once."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("This is not a video.\n" * 100)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20000))
    (folder / "folder.mp4").mkdir()
    (folder / "pictures").mkdir()
    cv2.imwrite(str(folder / "pictures/000000.png"), portrait(64))
    cv2.imwrite(str(folder / "picture.png"), portrait(64))
    cv2.imwrite(str(folder / "picture.jpg"), portrait(64))
    grey = [np.full((96, 128, 3), 120, np.uint8)] * 60
    whole = write_video(folder / "no face.mp4", grey)
    write_video(folder / "short.mp4", grey[:25])
    noisy = np.random.default_rng(0).integers(0, 255, (100, 96, 128, 3), dtype=np.uint8)
    data = write_video(folder / "whole.mp4", noisy).read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "headless.mp4").write_bytes(whole.read_bytes()[400:])
    face, gone = list(swaying(80, portrait(128))), np.full((128, 128, 3), 90, np.uint8)
    write_video(folder / "face.mp4", face[:60], speech_like(2.4))
    write_video(folder / "still.mp4", face[:1] * 60, speech_like(2.4))
    write_video(folder / "face for a moment.mp4", face[:20] + [gone] * 60)
    write_video(folder / "face often.mp4", face[:55] + [gone] * 25)
    write_video(folder / "lamp off.mp4", face[:40] + [(0.4 * frame).astype(np.uint8) for frame in face[40:]])
    soundfile.write(str(folder / "speech.wav"), speech_like(2), 16000)
    soundfile.write(str(folder / "zero.wav"), np.zeros(0), 16000)
    soundfile.write(str(folder / "silent.wav"), np.zeros(32000), 16000)
    soundfile.write(str(folder / "nan.wav"), np.full(32000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(str(folder / "inf.wav"), np.full(32000, np.inf), 16000, subtype="FLOAT")
    soundfile.write(str(folder / "offset.wav"), np.full(32000, 0.5), 16000)
    soundfile.write(str(folder / "one.wav"), np.full(1, 0.5), 16000)
    (folder / "cut.wav").write_bytes((folder / "speech.wav").read_bytes()[:30])
    (folder / "text.wav").write_text("not a sound")
    (folder / "empty.wav").touch()
    write_clip(folder / "good.clip", t=40, size=32)
    write_clip(folder / "unfinished.clip", t=30, complete=False)
    write_clip(folder / "newer.clip", t=30, version=99)
    write_clip(folder / "frameless.clip", t=30)
    shutil.rmtree(folder / "frameless.clip/frames")
    write_clip(folder / "mangled.clip", t=30)
    (folder / "mangled.clip/clip.json").write_text('{"schema": "hicode-clip", "ver')
    (folder / "text.hicode").write_text("not an avatar")
    (folder / "empty.hicode").touch()
    save_tensors(folder / "foreign.hicode", {"a": torch.zeros(3)}, "something-else", 1)
    save_tensors(folder / "newer.hicode", {"a": torch.zeros(3)}, "hicode-avatar", 999)
    save_tensors(folder / "partless.hicode", {"a": torch.zeros(3)}, "hicode-avatar", VERSION)
    save_tensors(folder / "cut.hicode", {"a": torch.zeros(3000)}, "hicode-avatar", VERSION)
    (folder / "cut.hicode").write_bytes((folder / "cut.hicode").read_bytes()[:-100])
    os.mkfifo(folder / "pipe.hicode")
    torch.save({"gaussians": torch.zeros(3)}, folder / "pickle.hicode")
    return folder


# name: (arguments, words of the one line). {s} is the shelf, {o} an output that must not exist afterwards.
CASES = {
    # videos
    "no such video": ("prepare {s}/absent.mp4 -o {o}", "absent.mp4 does not exist"),
    "a folder as video": ("prepare {s}/folder.mp4 -o {o}", "is a folder"),
    "a folder of pictures as video": ("prepare {s}/pictures -o {o}", "folder of pictures"),
    "a device as video": ("prepare /dev/null -o {o}", "is a device"),
    "an empty video": ("prepare {s}/empty.mp4 -o {o}", "is empty"),
    "a text as video": ("prepare {s}/text.mp4 -o {o}", "text.mp4 is not a readable video"),
    "noise as video": ("prepare {s}/noise.mp4 -o {o}", "is not a readable video"),
    "a picture as video": ("prepare {s}/picture.png -o {o}", "is a picture"),
    "a photo as video": ("prepare {s}/picture.jpg -o {o}", "is a picture"),
    "a sound as video": ("prepare {s}/speech.wav -o {o}", "no moving pictures"),
    "a video cut in the middle": ("prepare {s}/cut.mp4 -o {o}", "cut off"),
    "a video without its beginning": ("prepare {s}/headless.mp4 -o {o}", "headless.mp4"),
    "a video of one second": ("prepare {s}/short.mp4 -o {o}", "at least 2 s"),
    "a start past the end": ("prepare {s}/face.mp4 -o {o} --start 60", "--start 60"),
    "no face": ("prepare {s}/no\\ face.mp4 -o {o}", "No face"),
    "a face for a moment": ("prepare {s}/face\\ for\\ a\\ moment.mp4 -o {o}", "A face in only"),
    "a face in too few frames": ("prepare {s}/face\\ often.mp4 -o {o} --size 128", "--max-missing"),
    "a picture made a video": ("prepare {s}/still.mp4 -o {o} --size 128", "can be learned from"),
    "a lamp that goes off": ("prepare {s}/lamp\\ off.mp4 -o {o} --size 128", "--max-light 2."),
    # options
    "a factor below one": ("prepare {s}/face.mp4 -o {o} --max-light 0.5", "factor from 1 on"),
    "an unknown option": ("prepare {s}/face.mp4 -o {o} --szie 256", "Did you mean --size?"),
    "an unknown command": ("preprae {s}/face.mp4 -o {o}", "Did you mean prepare?"),
    "an unknown flag for a command": ("--verbos", "--verbos"),
    "no output named": ("prepare {s}/face.mp4", "Missing: -o"),
    "one file too many": ("prepare {s}/face.mp4 {s}/face.mp4 -o {o}", "Not understood"),
    "a word for a number": ("prepare {s}/face.mp4 -o {o} --size big", "--size"),
    "an odd size": ("prepare {s}/face.mp4 -o {o} --size 500", "multiple of 16"),
    "a share over one": ("prepare {s}/face.mp4 -o {o} --max-missing 40", "share of frames"),
    "an unknown encoder": ("prepare {s}/face.mp4 -o {o} --encoder hubret", "Did you mean hubert?"),
    "an unknown preset": ("train {s}/good.clip -o {o} --preset drafft", "Did you mean draft?"),
    "an unknown device": ("train {s}/good.clip -o {o} --device gpu", "'gpu'"),
    "an unknown asset": ("assets pull face_landmark", "No asset is called"),
    # places
    "a file where the clip should go": ("prepare {s}/face.mp4 -o {s}/text.wav", "is a file"),
    "a full folder where the clip should go": ("prepare {s}/face.mp4 -o {s}", "other things"),
    "a clip under a file": ("prepare {s}/face.mp4 -o {s}/text.wav/c", "Cannot write"),
    "a clip over another video's": ("prepare {s}/face.mp4 -o {s}/good.clip", "another video"),
    "a clip over a damaged one": ("prepare {s}/face.mp4 -o {s}/mangled.clip", "not readable JSON"),
    "an avatar in place of a folder": ("train {s}/good.clip -o {s}", "is a folder"),
    "an avatar under a file": ("train {s}/good.clip -o {s}/text.wav/a.hicode", "Cannot write"),
    "a video of an unknown kind": ("speak {s}/partless.hicode {s}/speech.wav -o {o}.xyz", ".mp4"),
    "a video under a file": ("speak {s}/partless.hicode {s}/speech.wav -o {s}/text.wav/a.mp4", "Cannot write"),
    "a video in the avatar's place": ("speak {s}/whole.mp4 {s}/speech.wav -o {s}/whole.mp4", "is also the input"),
    "a name of 300 letters": ("speak {s}/partless.hicode {s}/speech.wav -o {o}" + 300 * "y" + ".mp4", "too long"),
    "a made video of an unknown kind": ("make {s}/face.mp4 {s}/speech.wav -o {o}.avi", ".mp4"),
    "a report under a file": ("evaluate {s}/partless.hicode {s}/good.clip --json {s}/text.wav/r.json", "Cannot write"),
    # clips
    "no such clip": ("train {s}/absent.clip -o {o}", "does not exist"),
    "a video as clip": ("train {s}/face.mp4 -o {o}", "not a clip folder"),
    "a folder that is no clip": ("train {s}/folder.mp4 -o {o}", "no clip.json"),
    "an unfinished clip": ("train {s}/unfinished.clip -o {o}", "not finished"),
    "a clip from the future": ("train {s}/newer.clip -o {o}", "version 99"),
    "a clip without frames": ("train {s}/frameless.clip -o {o}", "lacks frames"),
    "a damaged clip": ("train {s}/mangled.clip -o {o}", "not readable JSON"),
    # speech weights
    "no folder to learn speech from": ("pretrain {s}/absent -o {o}.safetensors --cache {o}", "absent is not there"),
    "a video as folder to learn speech from": ("pretrain {s}/face.mp4 -o {o}.safetensors --cache {o}", "not a folder"),
    "a folder without videos": ("pretrain {s}/folder.mp4 -o {o}.safetensors --cache {o}", "No video in"),
    "weights of an unknown kind": ("pretrain {s} -o {o}.pth --cache {o}", ".safetensors"),
    "a manifest that is none": ("pretrain {s} -o {o}.safetensors --cache {o} --sources {s}/text.wav", "is not TOML"),
    "a sync model without an anchor": (
        "pretrain {s} -o {o}.safetensors --cache {o} --sync-out {o}.sync",
        "names an anchor",
    ),
    "less than no steps": ("pretrain {s} -o {o}.safetensors --cache {o} --steps 0", "steps is 0"),
    "a corpus under a file": ("pretrain {s} -o {o}.safetensors --cache {s}/text.wav/c", "Cannot write"),
    "no such speech weights": ("train {s}/good.clip -o {o} --speech-weights {s}/absent.safetensors", "does not exist"),
    "foreign speech weights": (
        "train {s}/good.clip -o {o} --speech-weights {s}/foreign.hicode",
        "is not a hicode-speech file",
    ),
    "foreign speech weights to make with": (
        "make {s}/face.mp4 {s}/speech.wav -o {o}.mp4 --speech-weights {s}/foreign.hicode",
        "is not a hicode-speech file",
    ),
    # avatars
    "no such avatar": ("speak {s}/absent.hicode {s}/speech.wav -o {o}.mp4", "does not exist"),
    "a text as avatar": ("speak {s}/text.hicode {s}/speech.wav -o {o}.mp4", "text.hicode is damaged or not"),
    "an empty avatar": ("speak {s}/empty.hicode {s}/speech.wav -o {o}.mp4", "empty.hicode"),
    "another program's file as avatar": ("speak {s}/foreign.hicode {s}/speech.wav -o {o}.mp4", "something-else"),
    "an avatar from the future": ("speak {s}/newer.hicode {s}/speech.wav -o {o}.mp4", "Update hicode"),
    "an avatar with parts missing": ("speak {s}/partless.hicode {s}/speech.wav -o {o}.mp4", "parts missing"),
    "an avatar cut off": ("speak {s}/cut.hicode {s}/speech.wav -o {o}.mp4", "damaged"),
    "a pickle as avatar": ("speak {s}/pickle.hicode {s}/speech.wav -o {o}.mp4", "damaged or not"),
    "a pipe as avatar": ("speak {s}/pipe.hicode {s}/speech.wav -o {o}.mp4", "is a pipe"),
    "a clip as avatar": ("speak {s}/good.clip {s}/speech.wav -o {o}.mp4", "is a folder"),
    "an avatar measured on no clip": ("evaluate {s}/partless.hicode {s}/absent.clip", "hicode"),
    # sounds; `make` listens before it begins the long work
    "no such sound": ("make {s}/face.mp4 {s}/absent.wav -o {o}.mp4", "does not exist"),
    "a device as sound": ("make {s}/face.mp4 /dev/null -o {o}.mp4", "is a device"),
    "an empty sound": ("make {s}/face.mp4 {s}/empty.wav -o {o}.mp4", "is empty"),
    "a sound of no length": ("make {s}/face.mp4 {s}/zero.wav -o {o}.mp4", "zero.wav"),
    "a silent sound": ("make {s}/face.mp4 {s}/silent.wav -o {o}.mp4", "is silent"),
    "a sound of NaN": ("make {s}/face.mp4 {s}/nan.wav -o {o}.mp4", "not numbers"),
    "an infinite sound": ("make {s}/face.mp4 {s}/inf.wav -o {o}.mp4", "not numbers"),
    "a sound that is an offset": ("make {s}/face.mp4 {s}/offset.wav -o {o}.mp4", "is silent"),
    "a sound of one sample": ("make {s}/face.mp4 {s}/one.wav -o {o}.mp4", "one.wav"),
    "a sound cut off in its header": ("make {s}/face.mp4 {s}/cut.wav -o {o}.mp4", "cut.wav"),
    "a text as sound": ("make {s}/face.mp4 {s}/text.wav -o {o}.mp4", "not a readable"),
    "a video without sound as sound": ("make {s}/face.mp4 {s}/no\\ face.mp4 -o {o}.mp4", "no sound track"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line(shelf, tmp_path, capfd, name):
    arguments, finding = CASES[name]
    out = tmp_path / "out"
    before = sorted(shelf.rglob("*"))
    assert run(arguments, shelf, out) == 2
    line = the_one_line(capfd)
    assert finding in line
    assert any(word in line for word in REMEDIES), f"no remedy: {line}"
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], "something half-written stays"
    assert sorted(shelf.rglob("*")) == before, "the inputs were touched"


def run(arguments: str, shelf, out) -> int:
    import shlex

    return cli.main([a.replace("{s}", str(shelf)).replace("{o}", str(out)) for a in shlex.split(arguments)])


def test_a_disk_that_is_too_full_is_found_before_the_work(shelf, tmp_path, capfd, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda *_: usage)
    assert run("prepare {s}/face.mp4 -o {o}", shelf, tmp_path / "out") == 2
    assert "MB free" in the_one_line(capfd) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("module, writer", [(crop, "write_png"), (steps, "write_json"), (pipeline, "save_tensors")])
def test_a_disk_that_fills_up_is_said_and_nothing_stays(shelf, tmp_path, capfd, monkeypatch, module, writer):
    def full(file, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(module, writer, full)
    assert run("prepare {s}/face.mp4 -o {o} --size 128", shelf, tmp_path / "out") == 2
    line = the_one_line(capfd)
    assert "No space left" in line and "Free some space" in line and not (tmp_path / "out").exists()


def test_an_interrupted_command_says_how_to_go_on(shelf, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(pipeline._Preparation, "write_frames", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("prepare {s}/face.mp4 -o {o}", shelf, tmp_path / "out") == 130
    assert f"to go on: hicode prepare {shelf}/face.mp4 -o {tmp_path}/out" in capfd.readouterr().err
    assert (tmp_path / "out" / "clip.json").exists()


def test_cuda_where_there_is_none_is_said(shelf, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("speak {s}/partless.hicode {s}/speech.wav -o {o}.mp4 --device cuda", shelf, tmp_path / "out") == 2
    assert "No CUDA device" in the_one_line(capfd)


def test_cuda_without_gsplat_is_said_before_the_work(shelf, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    assert run("train {s}/good.clip -o {o} --device cuda", shelf, tmp_path / "out") == 2
    line = the_one_line(capfd)
    assert "needs gsplat" in line and "leave --device out" in line and not list(tmp_path.iterdir())


def test_parts_that_cannot_be_fetched_are_said(shelf, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HICODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets.sys, "executable", "/bin/false")
    assert run("prepare {s}/face.mp4 -o {o}", shelf, tmp_path / "out") == 2
    assert "Check the network" in the_one_line(capfd) and not (tmp_path / "out").exists()


def test_a_defect_of_ours_is_a_traceback(monkeypatch):
    """Only what the user can mend becomes a line: an assertion must stay visible."""
    monkeypatch.setitem(cli.COMMANDS, "doctor", (lambda argv: _broken, ""))
    with pytest.raises(AssertionError):
        cli.main(["doctor"])


def _broken() -> None:
    """Fail."""
    raise AssertionError("broken")


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_explains_itself(command, capsys):
    if command == "serve":
        pytest.importorskip("aiortc", reason="hicode serve needs hicode[serve]")
    assert cli.main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"hicode {command}" in said and "Args:" not in said


def test_without_a_command_the_commands_are_listed(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"hicode {name}" in said for name in cli.COMMANDS)


def test_doctor_finds_this_machine_fit(capsys):
    assert cli.main(["doctor"]) == 0
    assert "bad" not in capsys.readouterr().out


def test_assets_list_shows_source_and_licence(capsys):
    assert cli.main(["assets", "list"]) == 0
    said = capsys.readouterr().out
    for asset in assets.ASSETS.values():
        assert asset.package.name in said and asset.package.licence in said
