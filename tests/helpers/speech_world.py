"""A made-up world in which sound determines the mouth: two hidden signals are in the sound and move a few outputs."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from research.pretrain.generic import PretrainConfig, pretrain

from hicode.errors import AssetError
from hicode.motion import EXPRESSION_DIM
from hicode.speech.encoders import EncoderSpec, Window
from hicode.speech.faceformer import FaceformerConfig
from hicode.speech.speech_model import SpeechModels
from hicode.training.adaptation import SpeechExample
from hicode.training.faceformer import mouth_metrics

DIM = 8
ENCODER = EncoderSpec("made up", DIM, Window(4, 4, 0))
SHAPE = FaceformerConfig(width=32, components=4, look_ahead=1, look_back=1, dropout=0.0)


def speech_world() -> Callable[..., SpeechExample]:
    """Examples of it by (speaker, frames, seed, size): a speaker adds a face and an amplitude."""
    rng = np.random.default_rng(0)
    hear = rng.standard_normal((2, DIM))
    expression, landmarks = 0.2 * rng.standard_normal((2, EXPRESSION_DIM)), 0.02 * rng.standard_normal((2, 478, 3))

    def example(speaker: str, frames: int, seed: int, size: float = 1.0) -> SpeechExample:
        rng = np.random.default_rng(seed)
        face = np.random.default_rng(sum(map(ord, speaker)))
        mouth = 0.1 * face.standard_normal((478, 3))
        mouth[14, 1] = mouth[13, 1] - 0.1  # lips apart, further than they move: nobody closes them
        hidden = np.stack(
            [np.convolve(rng.standard_normal(frames + 4), np.ones(5) / 5**0.5, "valid") for _ in range(2)], 1
        )
        features = np.repeat(hidden, 2, 0) @ hear + 0.05 * rng.standard_normal((2 * frames, DIM))
        as_float = lambda x: torch.from_numpy(x).float()
        return SpeechExample(
            speaker,
            as_float(features)[None],
            as_float(0.1 * face.standard_normal(EXPRESSION_DIM) + size * np.tanh(hidden) @ expression),
            as_float(mouth + size * np.einsum("tk,klc->tlc", np.tanh(hidden), landmarks)),
            torch.ones(frames, dtype=torch.bool),
        )

    return example


@pytest.fixture(scope="session")
def world() -> Callable[..., SpeechExample]:
    try:
        mouth_metrics()
    except AssetError as error:
        pytest.skip(f"the head model's package cannot be had here: {error}")
    return speech_world()


def pretrained(world: Callable[..., SpeechExample], steps: int) -> SpeechModels:
    """Generic models of four speakers of the world."""
    examples = [world(name, 150, seed) for seed, name in enumerate("abcd")]
    return pretrain(examples, ENCODER, PretrainConfig(steps=steps, batch=8, frames=40, learning_rate=5e-3), SHAPE)


@pytest.fixture(scope="session")
def generic(world) -> SpeechModels:
    return pretrained(world, 100)


def static_and_error(models: SpeechModels, example: SpeechExample) -> tuple[float, float]:
    """Mean squared errors of the landmarks: of a face that does not move, and of the prediction."""
    truth = example.landmarks
    _, landmarks = models.predict(example.features[0])
    return float((models.subject.landmarks - truth).square().mean()), float((landmarks - truth).square().mean())
