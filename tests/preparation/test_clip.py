"""Clips on disk: what is written is what is read, lazily and within bounds; damaged ones are refused with their name
and the remedy.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from helpers.clips import SIZE, some_track, write_clip
from hicode.errors import FileFormatError
from hicode.files import write_json
from hicode.preparation.clip import CACHE_BYTES, SCHEMA, VERSION, Clip, load_track, save_track, shift_audio, split


@pytest.mark.parametrize("t, test", [(50, 25), (200, 25), (275, 25), (500, 46), (1500, 137), (10, 10)])
def test_the_last_eleventh_but_at_least_a_second_is_held_out(t, test):
    first, last = split(t)
    assert list(first) + list(last) == list(range(t)) and len(last) == test


def test_pictures_come_back_exactly(tmp_path):
    path, frames = write_clip(tmp_path / "c")
    clip = Clip.open(path)
    for t in (0, 59, 17, 0):
        assert np.array_equal(clip.image(t), frames[t])
        assert np.array_equal(clip.head_mask(t), frames[t, :, :, 0])
        assert np.array_equal(clip[t].person_mask, frames[t, :, :, 1])
    assert len(clip) == 60 and clip[3].camera.T_camera_head.shape == (4, 4)


def test_writing_into_a_picture_does_not_change_the_clip(tmp_path):
    path, frames = write_clip(tmp_path / "c", t=30)
    clip = Clip.open(path)
    for t in (0, 5):
        clip.image(t)[:] = 0
        assert np.array_equal(clip.image(t), frames[t])


def test_memory_stays_within_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("hicode.preparation.clip.CACHE_BYTES", 10 * SIZE * SIZE * 3)
    path, _ = write_clip(tmp_path / "c")
    clip = Clip.open(path)
    for t in range(60):
        clip.image(t)
    assert clip._pictures._recent_bytes <= 10 * SIZE * SIZE * 3
    assert CACHE_BYTES <= 1 << 28


def test_track_round_trip(tmp_path):
    track = some_track(7)
    save_track(tmp_path / "t.safetensors", track)
    back = load_track(tmp_path / "t.safetensors")
    assert torch.equal(back.motion.expression, track.motion.expression) and torch.equal(
        back.landmarks_px, track.landmarks_px
    )
    assert torch.equal(back.camera.K, track.camera.K) and (back.camera.width, back.motion.fps) == (SIZE, 25.0)


def test_the_offset_moves_the_sound_onto_the_picture():
    """The picture leads by two frames: what sounds at frame 12 belongs to frame 10."""
    samples = np.zeros(640 * 20, np.float32)
    samples[640 * 12] = 1
    assert np.argmax(shift_audio(samples, -2.0, 20)) == 640 * 10
    assert np.argmax(shift_audio(samples, 3.0, 20)) == 640 * 15
    assert len(shift_audio(samples, -2.0, 25)) == 640 * 25 and len(shift_audio(samples[:100], 0.5, 4)) == 640 * 4


def test_features_are_made_once_two_a_frame(tmp_path):
    path, _ = write_clip(tmp_path / "c")
    features = Clip.open(path).speech_features("logmel")
    stored = (path / "audio.logmel.safetensors").stat().st_mtime_ns
    assert len(features) == 120 and torch.isfinite(features).all()
    assert torch.equal(Clip.open(path).speech_features("logmel"), features)
    assert (path / "audio.logmel.safetensors").stat().st_mtime_ns == stored


def test_a_silent_clip_has_neither_sound_nor_features(tmp_path):
    clip = Clip.open(write_clip(tmp_path / "c", sound=False)[0])
    assert clip.audio() is None and clip.speech_features() is None


def _truncate(path):
    path.write_bytes(path.read_bytes()[:100])


# What is done to a good clip, and a word of the finding.
DAMAGE = {
    "gone": (shutil.rmtree, "does not exist"),
    "no clip.json": (lambda p: (p / "clip.json").unlink(), "no clip.json"),
    "clip.json cut": (lambda p: _truncate(p / "clip.json"), "not readable JSON"),
    "another schema": (lambda p: write_json(p / "clip.json", {"schema": "other"}), "not a hicode-clip"),
    "newer": (lambda p: write_json(p / "clip.json", {"schema": SCHEMA, "version": 99}), "Update hicode"),
    "unfinished": (
        lambda p: write_json(p / "clip.json", {"schema": SCHEMA, "version": VERSION, "complete": False}),
        "not finished",
    ),
    "a field missing": (
        lambda p: write_json(p / "clip.json", {"schema": SCHEMA, "version": VERSION, "complete": True}),
        "fps",
    ),
    "no track": (lambda p: (p / "track.safetensors").unlink(), "lacks track"),
    "last frame missing": (lambda p: (p / "frames/000059.png").unlink(), "lacks frames"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_clip_is_refused_with_name_and_remedy(tmp_path, name):
    path, _ = write_clip(tmp_path / "c")
    break_it, finding = DAMAGE[name]
    break_it(path)
    with pytest.raises(FileFormatError, match=finding) as caught:
        Clip.open(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in ("hicode prepare", "Update", "Make", "make it anew", "Give"))


@pytest.mark.parametrize("file, use", [
    ("frames/000003.png", lambda c: c.image(3)),
    ("masks/head/000003.png", lambda c: c.head_mask(3)),
    ("track.safetensors", lambda c: c.track),
    ("depth.safetensors", lambda c: c.depths()),
    ("audio.wav", lambda c: c.audio()),
])  # fmt: skip
def test_a_damaged_part_is_named_when_it_is_read(tmp_path, file, use):
    path, _ = write_clip(tmp_path / "c")
    _truncate(path / file) if file != "audio.wav" else (path / file).write_bytes(b"RIFF")
    with pytest.raises(FileFormatError, match=file.split("/")[-1].replace(".", r"\.")):
        use(Clip.open(path))


def test_clip_json_is_plain_json(tmp_path):
    path, _ = write_clip(tmp_path / "c", t=30)
    assert json.loads((path / "clip.json").read_text())["schema"] == "hicode-clip"
