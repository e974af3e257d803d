"""Steady noise is taken off a sound that has much of it, and nothing of one that has little."""

import numpy as np
import pytest
import torch

from hicode.errors import AssetError
from hicode.speech.encoders import create_encoder
from hicode.speech.loudness import speech_level
from hicode.speech.noise import NoiseReducer


def _power(frames: int, seed: int = 0) -> np.ndarray:
    """Of steady noise: what a band of a few bins has, an exponential's mean; all bands together as loud as a voice."""
    return NoiseReducer.SPEECH / 80 * np.random.default_rng(seed).gamma(4.0, 0.25, (frames, 80)).astype(np.float32)


def _voice(frames: int, level: float) -> np.ndarray:
    """Syllables, three a second, a thousand times weaker between them."""
    envelope = np.clip(np.sin(2 * np.pi * 3 * np.arange(frames) / 100), 0.001, 1)
    return (NoiseReducer.SPEECH / 80 * level * envelope[:, None] * np.ones(80)).astype(np.float32)


def test_pieces_of_any_size_are_one_sound():
    power, rng = _power(500), np.random.default_rng(1)
    power[100:150] = 0
    whole, noise, parts, at = NoiseReducer()(power), NoiseReducer(), [], 0
    while at < len(power):
        size = int(rng.integers(1, 60))
        parts.append(noise(power[at : at + size]))
        at += size
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("level", [0.3, 1.0, 1e3])
def test_steady_noise_goes_and_what_stands_out_of_it_stays(level):
    power = level * _power(600)
    power[400:420] += 100 * level * NoiseReducer.SPEECH / 80  # 20 dB above it, for .2 s
    left = NoiseReducer()(power)
    assert left[200:400].mean() < 0.4 * power[200:400].mean()  # at least 4 dB of what is not peaks
    assert (left[400:420] / power[400:420]).min() > 0.95
    assert (left >= NoiseReducer.FLOOR * power * 0.999).all() and (left <= power).all()


def test_a_voice_in_a_quiet_room_keeps_its_room_and_in_a_loud_one_loses_it():
    """25 and 7 dB of noise under the same syllables (their mean is a third of their peak); from the third second on."""
    for level, taken in ((0.001, False), (0.06, True)):
        power = _voice(800, 1.0) + level * _power(800)
        between = _voice(800, 1.0)[:, 0] < 0.002 * NoiseReducer.SPEECH / 80
        between[:200] = False
        left = NoiseReducer()(power)[between].mean() / power[between].mean()
        assert (left < 0.6) if taken else (left > 0.999), (level, left)


def test_noise_that_becomes_louder_is_followed_within_seconds():
    power = np.concatenate([_power(300), 30 * _power(600, 1)])
    left = NoiseReducer()(power)
    assert left[310:330].mean() > 0.5 * power[310:330].mean()  # it might be speech
    assert left[-200:].mean() < 0.4 * power[-200:].mean()  # 15 dB at 8 dB a second


def test_a_faint_room_before_anybody_speaks_is_left_alone():
    power = 1e-3 * _power(400)
    np.testing.assert_array_equal(NoiseReducer()(power), power)


def test_digital_silence_stays_and_says_nothing_of_the_noise():
    power = np.concatenate([np.zeros((200, 80), np.float32), _power(300)])
    left = NoiseReducer()(power)
    assert not left[:200].any()
    np.testing.assert_array_equal(left[200:], NoiseReducer()(power[200:]))


def test_a_noisy_stream_in_any_pieces_equals_the_whole():
    """What is remembered of the noise goes over from piece to piece, as it does from block to block of a long sound."""
    try:
        encoder = create_encoder("embedded")
    except AssetError as error:
        pytest.skip(f"the embedded encoder's package cannot be had here: {error}")
    rng = np.random.default_rng(0)
    t = np.arange(6 * 16000) / 16000
    voice = np.clip(np.sin(2 * np.pi * 3 * t), 0, 1) * np.sin(2 * np.pi * (150 + 10 * t) * t)
    sound = (0.1 * voice + 0.02 * rng.standard_normal(len(t))).astype(np.float32)
    level = speech_level(sound)
    whole, stream, parts, at = encoder.encode(sound, level), encoder.stream(level), [], 0
    while at < len(sound):
        size = int(rng.integers(1, 9000))
        parts.append(stream.push(sound[at : at + size]))
        at += size
    # Batches of another size round differently, and a rounding can turn a step of the noise that is followed.
    torch.testing.assert_close(torch.cat([*parts, stream.finish()]), whole, atol=2e-3, rtol=1e-3)
