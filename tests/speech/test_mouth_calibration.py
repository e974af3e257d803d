"""Maps of opening, width and jaw: what they change, and what they leave."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.fake_avatar import speech_models
from hicode.speech.mouth_calibration import MouthCalibration, mouth_lengths
from hicode.speech.speech_model import SpeechModels

KNOTS = torch.linspace(-0.5, 0.5, 11)


def some_maps(target: torch.Tensor, seed: int = 0) -> MouthCalibration:
    """Of all three lengths to `target`, with directions that change each length alone."""
    generator = torch.Generator().manual_seed(seed)
    landmarks = torch.randn(3, 478, 3, generator=generator)
    landmarks = torch.linalg.solve(mouth_lengths(landmarks), landmarks.flatten(1)).unflatten(1, (478, 3))
    return MouthCalibration(
        KNOTS.expand(3, -1).clone(), target.expand(3, -1).clone(), torch.randn(3, 64, generator=generator), landmarks
    )


def test_lengths_are_linear():
    a, b = torch.randn(2, 5, 478, 3)
    torch.testing.assert_close(mouth_lengths(a + 2 * b), mouth_lengths(a) + 2 * mouth_lengths(b))


def test_a_map_to_itself_changes_nothing():
    expression, landmarks = torch.randn(4, 64), 0.1 * torch.randn(4, 478, 3, generator=torch.Generator().manual_seed(1))
    changed = some_maps(KNOTS)(expression, landmarks)
    torch.testing.assert_close(changed[0], expression, atol=1e-4, rtol=0)
    torch.testing.assert_close(changed[1], landmarks, atol=1e-4, rtol=0)


def test_lengths_become_what_the_maps_say_each_by_itself():
    maps = some_maps(2 * KNOTS)
    landmarks = 0.1 * torch.randn(6, 478, 3, generator=torch.Generator().manual_seed(1))
    predicted = mouth_lengths(landmarks)
    assert (predicted.abs() < 0.5).all(), "within the knots"
    shown = mouth_lengths(maps(torch.zeros(6, 64), landmarks)[1])
    torch.testing.assert_close(shown, 2 * predicted, atol=1e-4, rtol=1e-4)


def test_beyond_the_knots_a_map_stays():
    far = torch.tensor([[-2.0] * 3, [3.0] * 3])
    torch.testing.assert_close(some_maps(2 * KNOTS).lengths(far), torch.tensor([[-1.0] * 3, [1.0] * 3]))


def test_knots_that_do_not_ascend_are_an_error():
    with pytest.raises(AssertionError, match="ascend"):
        some_maps(-KNOTS)


def test_a_calibrated_stream_equals_the_whole_and_a_file_keeps_it():
    plain = speech_models()
    models = replace(plain, calibration=some_maps(0.2 + 2 * KNOTS))
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((60, models.encoder.dim)).astype(np.float32))
    whole, stream = models.predict(features), models.stream()
    pieces = [stream.push(features[:7]), stream.push(features[7:40]), stream.push(features[40:]), stream.finish()]
    torch.testing.assert_close(torch.cat([p.landmarks for p in pieces]), whole.landmarks, atol=1e-5, rtol=1e-5)
    read = SpeechModels.from_state(*models.state()).predict(features)
    torch.testing.assert_close(read.landmarks, whole.landmarks)
    assert not torch.allclose(whole.landmarks, plain.predict(features).landmarks, atol=1e-3)
