"""A run's folder stays as long as what the head reads is the same; another run's folder is renamed."""

import numpy as np
import pytest

from helpers.drawn_head import clip_on_disk, draw_clip
from hicode.errors import FileFormatError
from hicode.files import load_tensors, read_json, save_tensors, write_json
from hicode.preparation.clip import Clip, load_track, read_png, save_track, write_png
from hicode.tracking.head_model import HeadModel
from hicode.training.run_folder import open_run

SETTINGS = {"preset": "draft", "seed": 0, "config": {"gaussians": 100}}


@pytest.fixture
def folder(tmp_path):
    """A drawn clip on disk."""
    return clip_on_disk(tmp_path / "c", draw_clip(HeadModel.load()))


def other_track(folder):
    track = load_track(folder / "track.safetensors")
    track.motion.expression[3] += 0.01
    save_track(folder / "track.safetensors", track)


def other_mask(folder):
    mask = read_png(folder / "masks/head/000004.png", grey=True)
    write_png(folder / "masks/head/000004.png", 255 - mask)


def other_frame(folder):
    write_png(folder / "frames/000004.png", 255 - read_png(folder / "frames/000004.png", grey=False))


def other_depth(folder):
    tensors, _ = load_tensors(folder / "depth.safetensors", "hicode-depth", 2)
    save_tensors(folder / "depth.safetensors", tensors | {"depth": tensors["depth"] + 0.1}, "hicode-depth", 2)


def other_split(folder):
    test = read_json(folder / "clip.json")["test"]
    split = {"train": [0, test[0] - 1], "test": [test[0] - 1, test[1]]}
    write_json(folder / "clip.json", read_json(folder / "clip.json") | split)


@pytest.mark.parametrize("change", [other_track, other_mask, other_frame, other_depth, other_split])
def test_other_pictures_or_another_track_are_another_run(change, folder, capsys):
    place = folder.parent / "runs" / "a"
    open_run(place, Clip.open(folder), SETTINGS)
    (place / "head.safetensors").write_bytes(b"trained")
    open_run(place, Clip.open(folder), SETTINGS)
    assert (place / "head.safetensors").exists() and capsys.readouterr().out == ""
    change(folder)
    open_run(place, Clip.open(folder), SETTINGS)
    (renamed,) = (p for p in place.parent.iterdir() if p != place)
    assert not (place / "head.safetensors").exists()
    assert (renamed / "head.safetensors").read_bytes() == b"trained"
    line = capsys.readouterr().out
    assert "held another run (other pictures, masks, split, track or depth)" in line and renamed.name in line


def test_other_settings_are_named(folder, capsys):
    clip = Clip.open(folder)
    for settings in (SETTINGS, SETTINGS | {"seed": 1}, SETTINGS | {"seed": 1, "preset": "paper", "config": {}}):
        open_run(folder.parent / "a", clip, settings)
    first, second = capsys.readouterr().out.splitlines()
    assert "(other seed)" in first and "(other preset, configuration)" in second


@pytest.mark.parametrize("content, reason", [("{", "damaged"), ('{"schema": "hicode-run"}', "another version")])
def test_a_folder_that_is_not_understood_is_renamed(content, reason, folder, capsys):
    place = folder.parent / "a"
    place.mkdir()
    (place / "config.json").write_text(content)
    open_run(place, Clip.open(folder), SETTINGS)
    assert reason in capsys.readouterr().out and read_json(place / "config.json")["preset"] == "draft"


def test_a_missing_picture_is_named(folder):
    (folder / "masks/head/000004.png").unlink()
    with pytest.raises(FileFormatError, match=r"000004\.png is missing or damaged"):
        open_run(folder.parent / "a", Clip.open(folder), SETTINGS)


def test_what_the_head_does_not_read_changes_nothing(folder, capsys):
    place, frames = folder.parent / "a", Clip.open(folder).frame_count
    open_run(place, Clip.open(folder), SETTINGS)
    write_json(folder / "clip.json", read_json(folder / "clip.json") | {"audio_offset_frames": -3.0, "report": {}})
    write_png(folder / "masks/person/000000.png", np.zeros((96, 96), np.uint8))
    write_png(folder / f"frames/{frames - 1:06d}.png", np.zeros((96, 96, 3), np.uint8))  # of the test part
    open_run(place, Clip.open(folder), SETTINGS)
    assert capsys.readouterr().out == ""
