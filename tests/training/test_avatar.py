"""A run's folder: each part of training is kept for as long as what it reads is the same, and learned anew when that changes."""

import shutil

import numpy as np
import pytest
import torch

from helpers.drawn_head import clip_on_disk, draw_clip, short
from hicode.avatar.refiner import CompositorConfig
from hicode.errors import FileFormatError
from hicode.files import load_tensors, read_json, save_tensors, write_json
from hicode.media.audio import write_audio
from hicode.preparation.clip import Clip, load_track, read_png, save_track, write_png
from hicode.tracking.head_model import HeadModel
from hicode.training import avatar as run
from hicode.training import head as head
from hicode.training import refiner as compositor
from hicode.training.adaptation import GENERIC
from hicode.training.refiner import CompositorTraining


@pytest.fixture(scope="module")
def model():
    return HeadModel.load()


@pytest.fixture(scope="module")
def clip(model):
    return draw_clip(model)


ALL, NOTHING, SPEECH = (10, 4, 1), (0, 0, 0), (0, 0, 1)  # iterations of the head, steps of the compositor, adaptations


@pytest.fixture
def folder(tmp_path, clip):
    """A drawn clip on disk with a sound that is not the same at any two times."""
    path = clip_on_disk(tmp_path / "c", clip)
    frames = Clip.open(path).frame_count
    write_audio(
        path / "audio.wav", (0.1 * np.random.default_rng(0).standard_normal(640 * frames)).astype(np.float32), 16000
    )
    return path


@pytest.fixture
def learn(folder, tmp_path, monkeypatch):
    """Train, tiny, and say how much work each part did."""
    done = {"head": 0, "compositor": 0, "speech": 0}

    def counted(module, name, part):
        original = getattr(module, name)

        def call(*args, **kwargs):
            done[part] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(head, "_iterate", "head")
    counted(compositor._Trainer, "train_step", "compositor")
    counted(run, "adapt_example", "speech")
    tiny = CompositorTraining(steps=4, renders=4, crop_px=48, batch=1, generator=CompositorConfig(filters=4))
    monkeypatch.setattr(run, "CompositorTraining", lambda seed: tiny)

    def train(**options):
        done.update(dict.fromkeys(done, 0))
        avatar = run.train(folder, tmp_path / "a.hicode", head=short(), compose=True, progress=False, **options)
        return tuple(done.values()), avatar

    return train


def change(folder, **fields) -> None:
    write_json(folder / "clip.json", read_json(folder / "clip.json") | fields)


def aside(folder) -> list[str]:
    return [p.name for p in (folder.parent / "runs").iterdir() if p.name != "a"]


def test_sound_moved_by_another_offset_costs_speech_alone(folder, learn):
    done, first = learn()
    assert done == ALL
    kept = folder.parent / "speech.before.safetensors"
    shutil.copyfile(folder.parent / "runs" / "a" / "speech.safetensors", kept)
    change(folder, audio_offset_frames=-3.0)
    done, second = learn()
    assert done == SPEECH and aside(folder) == []
    for name, tensor in first.gaussians.tensors().items():
        assert torch.equal(tensor, second.gaussians.tensors()[name]), name
    heard = [
        load_tensors(file, "hicode-speech", 1)[1]["made_of"]
        for file in (kept, folder.parent / "runs" / "a" / "speech.safetensors")
    ]
    assert heard[0] != heard[1], "it heard the sound where it is now"
    assert learn()[0] == NOTHING


def test_what_no_part_reads_costs_nothing(folder, learn):
    learn()
    frames = Clip.open(folder).frame_count
    change(
        folder,
        report={"items": ["written anew"]},
        steps=read_json(folder / "clip.json")["steps"] | {"report": {"seconds": 7}},
    )
    write_png(folder / "masks/person/000000.png", np.zeros((96, 96), np.uint8))
    write_png(folder / f"frames/{frames - 1:06d}.png", np.zeros((96, 96, 3), np.uint8))  # of the test part
    assert learn()[0] == NOTHING


def turned_track(folder):
    track = load_track(folder / "track.safetensors")
    track.motion.expression[3] += 0.01
    save_track(folder / "track.safetensors", track)


def another_mask(folder):
    mask = read_png(folder / "masks/head/000004.png", grey=True)
    write_png(folder / "masks/head/000004.png", 255 - mask)


def another_frame(folder):
    write_png(folder / "frames/000004.png", 255 - read_png(folder / "frames/000004.png", grey=False))


def another_depth(folder):
    tensors, _ = load_tensors(folder / "depth.safetensors", "hicode-depth", 2)
    save_tensors(folder / "depth.safetensors", tensors | {"depth": tensors["depth"] + 0.1}, "hicode-depth", 2)


def another_split(folder):
    test = read_json(folder / "clip.json")["test"]
    change(folder, train=[0, test[0] - 1], test=[test[0] - 1, test[1]])


@pytest.mark.parametrize("changed", [turned_track, another_mask, another_frame, another_depth, another_split])
def test_other_pictures_or_another_track_are_another_run(changed, folder, clip, capsys):
    """By the folder alone: training from the start is what an empty folder means."""
    place = folder.parent / "runs" / "a"
    opened = lambda: run._open_run(place, Clip.open(folder), short(), "draft", 0)
    opened()
    (place / "head.safetensors").write_bytes(b"trained")
    opened()
    assert (place / "head.safetensors").exists() and capsys.readouterr().out == ""
    changed(folder)
    opened()
    (kept,) = aside(folder)
    assert (
        not (place / "head.safetensors").exists()
        and (place.parent / kept / "head.safetensors").read_bytes() == b"trained"
    )
    line = capsys.readouterr().out
    assert "held another run (other pictures, masks, split, track or depth)" in line and kept in line


def test_a_changed_track_restarts_every_part(folder, learn):
    learn()
    turned_track(folder)
    assert learn()[0] == ALL and len(aside(folder)) == 1


def test_other_settings_are_named(folder, capsys):
    for preset, seed in (("draft", 0), ("draft", 1), ("standard", 1)):
        run._open_run(folder.parent / "runs" / "a", Clip.open(folder), short(), preset, seed)
    first, second = capsys.readouterr().out.splitlines()
    assert "(other seed)" in first and "(other preset)" in second


def test_other_speech_weights_cost_speech_alone(folder, learn, tmp_path):
    learn()
    tensors, header = load_tensors(GENERIC, "hicode-speech", 1)
    own = tmp_path / "own.safetensors"
    save_tensors(own, tensors, "hicode-speech", 1, header | {"learned_from": "others"})
    assert [learn(speech_weights=weights)[0] for weights in (own, own, None)] == [SPEECH, NOTHING, SPEECH]


def test_a_missing_picture_is_named(folder):
    (folder / "masks/head/000004.png").unlink()
    with pytest.raises(FileFormatError, match="000004.png is missing or damaged"):
        run._open_run(folder.parent / "runs" / "a", Clip.open(folder), short(), "draft", 0)
