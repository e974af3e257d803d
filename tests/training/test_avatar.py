"""Training of a whole avatar: each part is kept as long as its inputs are the same, and is learned again otherwise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.drawn_head import clip_on_disk, draw_clip, short
from hicode.avatar.avatar import Avatar
from hicode.avatar.refiner import CompositorConfig
from hicode.files import load_tensors, read_json, save_tensors, write_json
from hicode.media.audio import write_audio
from hicode.preparation.clip import Clip
from hicode.tracking.head_model import HeadModel
from hicode.training import avatar as training
from hicode.training import head, refiner
from hicode.training.adaptation import GENERIC, VERSION, example_of
from hicode.training.avatar import TrainConfig, train
from hicode.training.refiner import RefinerTraining
from hicode.training.run_folder import pictures_digest
from hicode.training.stages import head_preset

ALL, NOTHING, SPEECH = (10, 4, 1), (0, 0, 0), (0, 0, 1)  # iterations of head and refiner, adaptations of speech
TINY = TrainConfig(
    head=short(),
    refiner=True,
    refiner_training=RefinerTraining(steps=4, crop_px=48, batch=1, generator=CompositorConfig(filters=4)),
    progress=False,
)


@pytest.fixture
def folder(tmp_path):
    """A drawn clip on disk, with noise as sound: no two parts of it are equal."""
    path = clip_on_disk(tmp_path / "c", draw_clip(HeadModel.load()))
    samples = 0.1 * np.random.default_rng(0).standard_normal(640 * Clip.open(path).frame_count)
    write_audio(path / "audio.wav", samples.astype(np.float32), 16000)
    return path


@pytest.fixture
def learn(folder, tmp_path, monkeypatch):
    """Train, and count the work of each part."""
    done = {"head": 0, "refiner": 0, "speech": 0}

    def count(module, name, part):
        original = getattr(module, name)

        def call(*args, **kwargs):
            done[part] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    count(head, "train_step", "head")
    count(refiner.RefinerTrainer, "train_step", "refiner")
    count(training, "learn_speech_models", "speech")

    def run(**changes):
        done.update(dict.fromkeys(done, 0))
        avatar = train(folder, tmp_path / "a.hicode", replace(TINY, **changes))
        return tuple(done.values()), avatar

    return run


def change(folder: Path, **fields) -> None:
    write_json(folder / "clip.json", read_json(folder / "clip.json") | fields)


@pytest.mark.slow
def test_sound_moved_by_another_offset_costs_speech_alone(folder, learn):
    done, first = learn()
    assert done == ALL
    speech = folder.parent / "runs" / "a" / "speech.safetensors"
    before = load_tensors(speech, "hicode-speech", VERSION)[1]["made_of"]
    change(folder, audio_offset_frames=-3.0)
    done, second = learn()
    assert done == SPEECH
    for name, tensor in first.gaussians.tensors().items():
        assert torch.equal(tensor, second.gaussians.tensors()[name]), name
    assert load_tensors(speech, "hicode-speech", VERSION)[1]["made_of"] != before
    assert learn()[0] == NOTHING


@pytest.mark.slow
def test_other_speech_weights_cost_speech_alone(learn, tmp_path):
    learn()
    tensors, header = load_tensors(GENERIC, "hicode-speech", VERSION)
    own = tmp_path / "own.safetensors"
    save_tensors(own, tensors, "hicode-speech", VERSION, header | {"learned_from": "others"})
    assert [learn(speech_weights=weights)[0] for weights in (own, own, None)] == [SPEECH, NOTHING, SPEECH]


@pytest.mark.slow
def test_a_first_look_comes_before_the_end_and_an_interrupted_run_leaves_its_avatar(learn, tmp_path, monkeypatch):
    """Both talk as any avatar; the run goes on from them to the avatar of an uninterrupted run."""
    saved, save, step = [], Avatar.save, head.train_step
    monkeypatch.setattr(training, "FIRST_LOOK_S", 0.0)
    monkeypatch.setattr(
        Avatar, "save", lambda self, file: (saved.append(self.info.get("iterations")), save(self, file))
    )

    def stop_at_8(state, *rest):
        if state.iteration == 8:
            raise KeyboardInterrupt
        return step(state, *rest)

    monkeypatch.setattr(head, "train_step", stop_at_8)
    with pytest.raises(KeyboardInterrupt):
        learn()
    coarse = Avatar.load(tmp_path / "a.hicode")
    assert saved[-1] == coarse.info["iterations"] == 8 and 0 < saved[0] < 8 and coarse.speech is not None
    assert torch.isfinite(coarse.render(coarse.driving[0], coarse.driving.T_camera_head[0]).rgb).all()
    monkeypatch.setattr(head, "train_step", step)
    _, finished = learn()
    assert "iterations" not in finished.info and saved[-1] is None
    _, again = learn(run=tmp_path / "other")
    assert torch.equal(again.gaussians.means, finished.gaussians.means)


@pytest.mark.slow
def test_another_seed_is_another_run_and_the_file_says_how_it_was_made(learn, tmp_path):
    learn()
    done, avatar = learn(seed=1, refiner=None)
    assert done == (10, 0, 1) and avatar.compositor is None and avatar.film_grain is not None
    info = Avatar.load(tmp_path / "a.hicode").info
    assert (info["preset"], info["seed"], info["config"]["seed"]) == ("draft", 1, 1)
    assert info["provenance"]["assets"].keys() >= set(training.PARTS) and set(info["seconds"]) >= {"speech", "head"}


def test_the_paper_has_a_refiner_and_no_film_grain_and_the_others_the_reverse():
    assert TrainConfig(preset="paper").refiner_config() == RefinerTraining()
    assert TrainConfig(preset="draft").refiner_config() is None
    assert TrainConfig(preset="draft", refiner=True, seed=3).refiner_config() == RefinerTraining(seed=3)
    assert TrainConfig(preset="paper", refiner=False).refiner_config() is None
    assert TrainConfig(preset="paper", seed=2).head_config() == replace(head_preset("paper"), seed=2)


def test_frames_with_defects_are_neither_learned_from_nor_driven_by(folder, learn, monkeypatch):
    """By head, refiner, background plate, film grain and speech; the longest part between them drives."""
    change(folder, defects=[{"kind": "frozen", "first": 6, "end": 12}, {"kind": "dark", "first": 22, "end": 25}])
    read, image = set(), Clip.image

    def reading(clip, t):
        read.add(t)
        return image(clip, t)

    monkeypatch.setattr(Clip, "image", reading)
    monkeypatch.setattr(training, "preview_image", lambda clip, state: np.zeros((4, 4, 3), np.uint8))
    _, avatar = learn()
    assert read == set(range(6)) | set(range(12, 22)), "the training part has 25 frames"
    assert len(avatar.driving) == 10 and avatar.source["first_frame"] == 12
    assert example_of(Clip.open(folder), avatar.speech.encoder).speaking[6:12].sum() == 0


def test_other_defects_make_another_run(folder):
    before = pictures_digest(Clip.open(folder))
    change(folder, defects=[{"kind": "frozen", "first": 6, "end": 12}])
    assert pictures_digest(Clip.open(folder)) != before
