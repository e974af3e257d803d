"""Speech encoders: 50 features a second from 16 kHz mono sound.

Feature j describes samples 320 j … 320 (j + 1), so video frame i at 25 fps owns features 2i and 2i + 1.

    embedded  the first two layers of a Whisper-derived encoder, 384-d, from a package: the default
    hubert    HuBERT, the paper's encoder, from a local folder of weights, through transformers
    logmel    log-mel energies, 160-d, no learning: a baseline

Another encoder is a class with `AudioEncoder`'s members and a line in `create_encoder`.
"""

from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.audio import FEATURES_PER_FRAME
from hicode.errors import InputError
from hicode.speech.encoders.embedded import EmbeddedEncoder
from hicode.speech.encoders.hubert import HubertEncoder
from hicode.speech.encoders.logmel import LogMelEncoder
from hicode.speech.encoders.windowed import EncoderSpec, EncoderStream, Window
from hicode.speech.loudness import LoudnessEstimator

__all__ = [
    "AudioEncoder",
    "EncoderName",
    "EncoderSpec",
    "EncoderStream",
    "Window",
    "create_encoder",
    "default_spec",
    "encoder_of",
    "match_frames",
]

EncoderName = Literal["embedded", "hubert", "logmel"]


@runtime_checkable
class AudioEncoder(Protocol):
    """Turns 16 kHz mono sound into features, at once or as it comes.

    A feature is complete `window` and `margin` (samples) after its sound.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def variant(self) -> str | None: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def window(self) -> Window: ...  # noqa: D102
    @property
    def margin(self) -> int: ...  # noqa: D102

    @property
    def spec(self) -> EncoderSpec:
        """What files record of the encoder, and consumers of features check."""
        ...

    def encode(self, samples: Float[np.ndarray, "n"], level: float | None = None) -> Float[Tensor, "t d"]:
        """All ceil(n / 320) features of a sound. `level`: its speech RMS, measured if None."""
        ...

    def stream(self, level: float | None = None, loudness: LoudnessEstimator | None = None) -> EncoderStream:
        """An incremental encoding; with the same `level`, the same features as `encode`.

        `loudness`: what estimates an unknown level, if it has heard the speaker before.
        """
        ...


def create_encoder(
    name: str = "embedded", weights: str | Path | None = None, window: Window | None = None
) -> AudioEncoder:
    """The encoder of that name.

    weights  HuBERT's local folder
    window   another window than its own, for the embedded encoder: models must have learned from the same window

    Raises InputError for an unknown name or missing weights, AssetError where a package cannot be had.
    """
    if name == "embedded":
        return EmbeddedEncoder(window)
    if name == "hubert":
        if weights is None:
            raise InputError("The hubert encoder needs its weights. Name their folder with --encoder-weights.")
        return HubertEncoder(weights)
    if name == "logmel":
        return LogMelEncoder()
    raise InputError(f"No speech encoder is called {name!r}. There are: embedded, hubert, logmel.")


def default_spec(name: str) -> EncoderSpec:
    """The spec of an encoder that needs no weights of the user's, without loading it."""
    encoders = {"embedded": EmbeddedEncoder, "logmel": LogMelEncoder}
    if name not in encoders:
        raise InputError(f"The features of the {name!r} encoder need its weights. Prepare the clip with that encoder.")
    encoder = encoders[name]
    return EncoderSpec(encoder.name, encoder.dim, encoder.window, encoder.variant)


def encoder_of(spec: EncoderSpec, weights: str | Path | None = None) -> AudioEncoder:
    """The encoder that made features of this spec. `weights`: where its weights lie now.

    Raises InputError where they are gone, or are others.
    """
    weights = weights or spec.weights
    encoder = create_encoder(spec.name, weights, spec.window if spec.name == "embedded" else None)
    if encoder.spec != spec:
        if weights is not None:
            raise InputError(f"The {spec.name} weights at {weights} are not those of this avatar or clip. Name those.")
        raise InputError(f"The {spec.name} encoder changed since this avatar or clip was made. Make it anew.")
    return encoder


def match_frames(features: Float[Tensor, "t d"], frames: int) -> Float[Tensor, "m d"]:
    """Exactly two features a video frame: cut, or the last one repeated, where sound and picture end apart."""
    assert len(features) > 0 or frames == 0, "no features to repeat"
    return features[torch.arange(FEATURES_PER_FRAME * frames).clamp(max=len(features) - 1)]
