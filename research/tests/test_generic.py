"""Generic Faceformers: what is heard is learned for unseen speakers, whatever their voices."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from research.pretrain.generic import PretrainConfig, mean_voices, pretrain, save_generic, speaker_shares, without_drift

from helpers.speech_world import DIM, ENCODER, SHAPE, static_and_error
from hicode.errors import TrainingError
from hicode.speech.speech_model import Subject
from hicode.training.adaptation import load_generic


def test_whose_voice_it_is_is_not_taken_for_what_it_says(world):
    """Speakers whose voices differ by far more than what they say, and who all close their mouths where another voice
    is open: within each of them the sound decides, and what was learned holds for a voice near the mean. In the same
    sound as it is, nothing of the kind is found.
    """
    rng = np.random.default_rng(0)
    offsets = torch.from_numpy(10 * rng.standard_normal((6, DIM))).float()
    offsets -= offsets.mean(0)
    people = [world(f"p{k}", 150, k) for k in range(6)]
    people = [replace(e, features=e.features + o) for e, o in zip(people, offsets)]
    config = PretrainConfig(steps=60, batch=8, frames=40, learning_rate=5e-3)
    models, unseen = pretrain(people, ENCODER, config, SHAPE), world("z", 120, 99)
    subject = Subject.of(unseen.expression, unseen.landmarks, unseen.speaking)
    pair = replace(models, subject=subject, closure=None)
    static, error = static_and_error(pair, unseen)
    assert error < 0.4 * static
    voices = mean_voices(people)
    torch.testing.assert_close(
        models.landmarks.feature_mean, torch.stack([voices[e.speaker][0] for e in people]).mean(0)
    )


def test_a_synthetic_speaker_weighs_less_and_leaves_the_basis_alone(world):
    people = [world(name, 150, seed) for seed, name in enumerate("abc")]
    imagined = [replace(world(f"espeak-{k}", 300, 10 + k, size=5.0), speaker=f"espeak-{k}") for k in range(2)]
    share = speaker_shares(people + imagined, PretrainConfig(longest_speaker_s=1e9, synthetic_weight=0.3))
    real = sum(share[e.speaker] * len(e) for e in people)
    assert sum(share[e.speaker] * len(e) for e in imagined) == pytest.approx(0.3 * real)
    config = PretrainConfig(steps=2, batch=4, frames=30)
    with_them, without = (pretrain(people + imagined, ENCODER, config, SHAPE), pretrain(people, ENCODER, config, SHAPE))
    assert torch.allclose(with_them.landmarks.basis, without.landmarks.basis)
    assert float(with_them.landmarks.amplitude) == pytest.approx(float(without.landmarks.amplitude))
    torch.testing.assert_close(with_them.subject.landmarks, without.subject.landmarks)


def test_slow_motion_is_taken_away_and_articulation_stays():
    second = torch.arange(250)[:, None] / 25
    mood, articulation = 0.3 + 0.2 * second, torch.sin(2 * torch.pi * 4 * second)
    left = without_drift(mood + articulation)
    inside = slice(110, 140)
    assert (left - articulation)[inside].abs().max() < 0.05
    assert left.mean().abs() < 0.02


def test_a_loss_that_is_not_finite_names_its_step(world):
    example = world("n", 60, 1)
    example.landmarks[30] = float("inf")
    with pytest.raises((TrainingError, torch.linalg.LinAlgError, RuntimeError)):
        pretrain([example, world("m", 60, 2)], ENCODER, PretrainConfig(steps=2, batch=2, frames=20), SHAPE)


def test_generic_files_give_the_pair_back(generic, world, tmp_path):
    save_generic(generic, [{"speaker": "a"}], tmp_path / "pair.safetensors")
    again, features = load_generic(tmp_path / "pair.safetensors"), world("a", 20, 1).features[0]
    # stored in half precision: 2^-11 of values near one, summed over some dozens
    torch.testing.assert_close(again.predict(features)[1], generic.predict(features)[1], atol=5e-3, rtol=1e-2)


def test_what_is_heard_is_learned_for_unseen_speakers(generic, world):
    unseen = world("z", 120, 99)
    subject = Subject.of(unseen.expression, unseen.landmarks, unseen.speaking)
    models = replace(generic, subject=subject, closure=None)
    static, error = static_and_error(models, unseen)
    assert error < 0.3 * static
