"""Loudness of speech: the level of a whole sound, and its estimate while the sound comes."""

import numpy as np
import pytest

from hicode.speech.loudness import MIN_LEVEL, LoudnessEstimator, level_of_frames, speech_level


def syllables(seconds: float, level: float) -> np.ndarray:
    t = np.arange(round(16000 * seconds)) / 16000
    noise = np.random.default_rng(0).standard_normal(len(t))
    return (level * np.clip(np.sin(2 * np.pi * 3 * t), 0, 1) * noise).astype(np.float32)


def test_pauses_and_offsets_do_not_count():
    sound = syllables(2, 0.1)
    padded = np.concatenate([np.zeros(32000, np.float32), sound])
    assert speech_level(padded) == pytest.approx(speech_level(sound), rel=0.15)
    assert speech_level(sound + np.float32(0.3)) == pytest.approx(speech_level(sound), rel=1e-2)


def test_silence_has_the_least_level():
    assert speech_level(np.zeros(1000, np.float32)) == speech_level(np.zeros(0, np.float32)) == MIN_LEVEL
    assert level_of_frames(np.zeros(0)) == MIN_LEVEL


def test_the_estimate_reaches_the_level_of_the_speech():
    rms = np.full(50 * 20, 0.01)
    estimator = LoudnessEstimator()
    assert estimator.level == pytest.approx(LoudnessEstimator.PRIOR_LEVEL)
    rms[::5] = 1e-4  # gaps, so that the floor stays low
    assert estimator.update(rms) == pytest.approx(0.01, rel=0.05)


def test_a_hum_says_nothing_about_the_voice():
    estimator = LoudnessEstimator()
    before = estimator.level
    estimator.update(np.full(500, 0.02))
    # Only until the floor has risen to the hum does it count, a few frames.
    assert estimator.level == pytest.approx(before, rel=0.1)
