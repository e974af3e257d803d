"""Sliding-window encoding, of a file and of a stream alike.

What a transformer says of a moment depends on where in its window the moment stands. So an encoder slides a window over
the sound and reads only the inner rows: `lead` rows of past, `hop` rows that are read, `look` rows of future. A row is
20 ms of sound. The window is the same for a file and for a stream: both give the same features, in constant memory.
Loudness is normalised by one level for the whole sound, or by a running estimate where the sound is still coming.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FEATURE, DcBlocker, checked_sound, frame_rms
from hicode.speech.loudness import LoudnessEstimator, speech_level


class Window(NamedTuple):
    """Rows of past, read at once, and of future. `lead` and `look` are multiples of `hop`."""

    lead: int
    hop: int
    look: int

    @property
    def rows(self) -> int:
        """All of them."""
        return self.lead + self.hop + self.look


@dataclass(frozen=True)
class EncoderSpec:
    """What made features, as clips and avatars record it. Features of equal specs are interchangeable.

    variant  what, besides name and window, decides the features: for HuBERT, a hash of its weights
    weights  folder that the weights were read from; where they lie does not matter for equality
    """

    name: str
    dim: int
    window: Window
    variant: str | None = None
    weights: str | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`."""
        return self.__dict__ | {"window": list(self.window)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "EncoderSpec":
        """Raises KeyError or TypeError where something is missing."""
        parts: dict[str, Any] = value | {"window": Window(*value["window"])}
        return EncoderSpec(**parts)


class WindowedEncoder:
    """Encoding in two stages, which a subclass gives.

    `_rows` turns sound into one row per 20 ms; `_features` turns windows of rows into features. `_new_state` makes what
    `_rows` keeps of a sound from piece to piece, if anything.

    margin  samples that a row sees beyond its own 20 ms on either side
    batch   windows that are computed at once
    """

    name: str
    variant: str | None = None
    weights: str | None = None
    dim: int
    window: Window
    margin = 0
    batch = 16

    @property
    def spec(self) -> EncoderSpec:
        """What a file records of the encoder."""
        return EncoderSpec(self.name, self.dim, self.window, self.variant, self.weights)

    def stream(self, level: float | None = None, loudness: LoudnessEstimator | None = None) -> "EncoderStream":
        """An incremental encoding; with the same `level`, the same features as `encode`.

        `loudness`: what estimates an unknown level, if it has heard the speaker before.
        """
        return EncoderStream(self, level, loudness)

    def encode(self, samples: Float[np.ndarray, "n"], level: float | None = None) -> Float[Tensor, "t d"]:
        """All ceil(n / 320) features of a sound. `level`: its speech RMS, measured if None."""
        samples = checked_sound(samples)
        stream = self.stream(speech_level(samples) if level is None else level)
        piece = 60 * SAMPLE_RATE_HZ  # bounds the memory in between
        parts = [stream.push(samples[start : start + piece]) for start in range(0, len(samples), piece)]
        return torch.cat([*parts, stream.finish()])

    def _new_state(self) -> Any:
        return None

    def _rows(self, audio: Float[Tensor, "n"], state: Any) -> Float[Tensor, "t c"]:
        """(n - 2 margin) / 320 rows of a sound that continues 2 margin before the end of the last piece."""
        raise NotImplementedError

    def _features(self, rows: Float[Tensor, "b w c"]) -> Float[Tensor, "b hop d"]:
        raise NotImplementedError


class EncoderStream:
    """Sound in pieces of any size; features out once their window is complete, hop + look rows after the sound."""

    def __init__(self, encoder: WindowedEncoder, level: float | None, loudness: LoudnessEstimator | None = None):
        self.encoder, self.level = encoder, level
        self._estimator = LoudnessEstimator() if loudness is None else loudness
        # Not yet turned into rows; starts `margin` before the next row. Silence precedes the sound.
        self._samples = np.zeros(encoder.window.lead * SAMPLES_PER_FEATURE + encoder.margin, np.float32)
        self._rows: Tensor | None = None
        self._state = encoder._new_state()
        self._blocker = DcBlocker()
        self._received, self._emitted, self._finished = 0, 0, False

    def push(self, samples: Float[np.ndarray, "n"]) -> Float[Tensor, "k d"]:
        """The features that became complete. Raises InputError where the sound is not finite or not mono."""
        assert not self._finished, "the stream is finished"
        samples = checked_sound(samples)
        self._received += len(samples)
        return self._advance(self._blocker(samples))

    def finish(self) -> Float[Tensor, "k d"]:
        """The remaining features, as if silence followed. In all, ceil(n / 320) have come out."""
        assert not self._finished, "the stream is finished"
        self._finished = True
        total = -(-self._received // SAMPLES_PER_FEATURE)
        window, emitted = self.encoder.window, self._emitted
        needed_rows = -(-total // window.hop) * window.hop + window.look
        silence = needed_rows * SAMPLES_PER_FEATURE + self.encoder.margin - self._received
        return self._advance(np.zeros(silence, np.float32))[: total - emitted]

    def _advance(self, samples: Float[np.ndarray, "n"]) -> Float[Tensor, "k d"]:
        encoder, window = self.encoder, self.encoder.window
        self._samples = np.concatenate([self._samples, samples])
        outputs = []
        while (audio := self._next_audio()) is not None:
            rows = encoder._rows(audio, self._state)
            self._rows = rows if self._rows is None else torch.cat([self._rows, rows])
            windows = (len(self._rows) - window.rows) // window.hop + 1
            if windows > 0:
                stacked = self._rows.unfold(0, window.rows, window.hop)[:windows].transpose(1, 2)
                outputs.append(encoder._features(stacked).flatten(0, 1))
                self._rows = self._rows[windows * window.hop :]
        out = torch.cat(outputs) if outputs else torch.zeros(0, encoder.dim)
        self._emitted += len(out)
        return out

    def _next_audio(self) -> Float[Tensor, "n"] | None:
        """The next blocks of hop rows with their margins, at level 1; None if they are not complete.

        With a given level many blocks go at once. An estimated level holds for one block, whatever the pieces' sizes.
        """
        encoder = self.encoder
        block = encoder.window.hop * SAMPLES_PER_FEATURE
        blocks = (len(self._samples) - 2 * encoder.margin) // block
        if blocks < 1:
            return None
        n = min(blocks, encoder.batch if self.level is not None else 1) * block
        level = self.level
        if level is None:
            inner = self._samples[encoder.margin : encoder.margin + n]
            level = self._estimator.update(frame_rms(inner, SAMPLES_PER_FEATURE))
        audio = torch.from_numpy(self._samples[: n + 2 * encoder.margin]) / level
        self._samples = self._samples[n:]
        return audio
