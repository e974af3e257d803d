"""The amount of motion: a person's own distribution, a prior where there is no speech, a head that obeys badly."""

from dataclasses import replace

import pytest
import torch
from research.pretrain.generic import save_generic

from helpers.speech_world import ENCODER, pretrained
from hicode.speech.mouth_calibration import mouth_lengths
from hicode.training.adaptation import AdaptConfig, learn_speech_models, load_generic
from hicode.training.calibration import SHARES, CalibrationConfig, mouth_directions, quantiles, response


@pytest.fixture(scope="module")
def generic(world):
    return pretrained(world, 30)


def _adapted(example, generic, strength: float, prior_s: float = 0.0):
    config = AdaptConfig(calibration=CalibrationConfig((strength, strength, strength), prior_s))
    return learn_speech_models(example, ENCODER, generic, config)[0]


def test_directions_change_one_length_each(generic):
    _, landmarks = mouth_directions(generic)
    torch.testing.assert_close(mouth_lengths(landmarks), torch.eye(3), atol=1e-4, rtol=0)


def test_a_person_moves_as_much_as_their_clip_shows(generic, world):
    example = world("e", 200, 9, size=1.5)
    wanted = quantiles(mouth_lengths(example.landmarks))
    errors = []
    for strength in (0.0, 1.0):
        spoken = _adapted(example, generic, strength).predict(example.features[0]).landmarks
        errors.append(float((quantiles(mouth_lengths(spoken)) - wanted).abs().mean()))
    assert errors[1] < 0.1 * errors[0], errors


def test_closed_lips_stay_the_narrowest(generic, world):
    """Maps are monotone: the order of openings, and so which frames are closed, is the sound's."""
    example = world("e", 200, 9)
    plain, whole = (
        mouth_lengths(_adapted(example, generic, s).predict(example.features[0]).landmarks)[:, 0] for s in (0.0, 1.0)
    )
    assert (whole[plain.argsort()].diff() > -1e-5).all()


def test_without_speech_people_stand_in(generic, world):
    quiet = world("quiet", 150, 3, size=0.05)
    quiet = replace(quiet, speaking=torch.zeros(150, dtype=torch.bool))
    models = _adapted(quiet, generic, 1.0, prior_s=1.5)
    assert models.calibration is not None and generic.people is not None
    width = lambda maps: maps.target[1, -1] - maps.target[1, 0]
    torch.testing.assert_close(width(models.calibration), width(generic.people), atol=1e-3, rtol=1e-3)
    assert _adapted(quiet, replace(generic, people=None), 1.0).calibration is None


def test_weights_keep_the_prior(generic, tmp_path):
    save_generic(generic, [], tmp_path / "g.safetensors")
    read = load_generic(tmp_path / "g.safetensors")
    assert read.people is not None and generic.people is not None
    torch.testing.assert_close(read.people.target, generic.people.target)
    assert read.people.source.shape == (3, len(SHARES))


@pytest.mark.parametrize(("dead", "slope"), [(0.0, 1.0), (0.03, 0.9), (0.015, 1.1)])
def test_a_heads_dead_zone_is_found(dead, slope):
    told = torch.linspace(0, 0.15, 32)
    noise = 0.003 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    found = response(told, slope * (told - dead).clamp(min=0) + noise)
    assert found == pytest.approx((dead, slope), abs=0.06) and found[0] == pytest.approx(dead, abs=0.006)
