"""Voice activity: whether somebody speaks, and how much of the mouth's motion is speech's.

`VoiceActivity` is one linear score of the speech features that the Faceformers read anyway, so it is almost free. A
score is a logit: speech against all other sound (silence, a room, hum, music, breath), which loudness cannot tell
apart. `VadGate` turns loudness and scores into a weight in [0, 1] a frame. s features at 50 Hz, t frames at 25 fps, d
the features' size. `hicode pretrain` learns the weights that ship, for the embedded encoder.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hicode.audio import FEATURES_PER_FRAME, FPS
from hicode.errors import FileFormatError
from hicode.files import load_tensors, save_tensors
from hicode.geometry import smoothstep
from hicode.speech.loudness import LoudnessEstimator

WEIGHTS = Path(__file__).parent.parent / "weights" / "voice_activity.safetensors"
SCHEMA, VERSION = "hicode-voice-activity", 1


@dataclass(frozen=True, eq=False)
class VoiceActivity:
    """A linear score of speech features.

    weight   "d"
    bias     ""
    encoder  name of the encoder whose features it reads
    """

    weight: Float[Tensor, "d"]
    bias: Float[Tensor, ""]
    encoder: str = "embedded"

    # Frames of coming sound that a frame's score is averaged over. The Faceformers wait for one too. Past frames are
    # left out: with two of them, sentences begin a frame late.
    AHEAD = 1

    @staticmethod
    def load(path: Path | str = WEIGHTS) -> "VoiceActivity":
        """The shipped weights, or another file that `save` wrote. Raises FileFormatError for any other."""
        tensors, config = load_tensors(path, SCHEMA, VERSION)
        try:
            return VoiceActivity(tensors["weight"].float(), tensors["bias"].float(), config["encoder"])
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}. Copy or make it anew.") from error

    def save(self, path: Path | str, learned_from: dict, more: dict | None = None) -> None:
        """Write one file. `learned_from`: licence terms by speaker; `more`: further entries of its header."""
        header = {"encoder": self.encoder, "learned_from": learned_from} | (more or {})
        save_tensors(path, {"weight": self.weight, "bias": self.bias}, SCHEMA, VERSION, header)

    def __call__(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "s"]:
        """The score of each feature by itself."""
        return features @ self.weight + self.bias

    def stream(self) -> "VoiceActivityStream":
        """Frame scores of a sound that is still coming."""
        return VoiceActivityStream(self)

    def frames(self, features: Float[Tensor, "s d"]) -> Float[np.ndarray, "t"]:
        """The scores of all ceil(s / 2) frames of a sound."""
        stream = self.stream()
        return np.concatenate([stream.push(features), stream.finish()])


class VoiceActivityStream:
    """Features in pieces of any size; a frame's score once `AHEAD` frames have followed."""

    def __init__(self, model: VoiceActivity):
        self.model = model
        self._scores: list[float] = []  # of features, from the next frame on

    def push(self, features: Float[Tensor, "s d"]) -> Float[np.ndarray, "m"]:
        """The frames that became complete."""
        self._scores += self.model(features).tolist()
        return self._advance(len(self._scores) // FEATURES_PER_FRAME - self.model.AHEAD)

    def finish(self) -> Float[np.ndarray, "m"]:
        """The remaining frames, averaged over the features that there are."""
        return self._advance(-(-len(self._scores) // FEATURES_PER_FRAME))

    def _advance(self, count: int) -> Float[np.ndarray, "m"]:
        out = []
        for _ in range(max(count, 0)):
            scores = self._scores[: FEATURES_PER_FRAME * (1 + self.model.AHEAD)]
            out.append(sum(scores) / len(scores))
            del self._scores[:FEATURES_PER_FRAME]
        return np.array(out, np.float32)


@dataclass(frozen=True)
class VadConfig:
    """When the lips rest. Levels are a frame's RMS in dB against the speech level."""

    closed_db: float = -34.0  # by loudness alone: at and below it the mouth rests
    open_db: float = -24.0  # by loudness alone: at and above it speech has the mouth wholly
    scored_closed_db: float = -46.0
    """with scores: only what is nearly inaudible is silence, so that soft parts of sentences keep their lips"""
    scored_open_db: float = -38.0
    closed_score: float = -3.0
    """A false rest looks worse than lips that stir in noise: closed only at a probability of 5 % or less"""
    open_score: float = -1.0
    look_ahead: int = 3  # frames by which the mouth opens before the sound: lips move first
    attack: int = 2  # frames from rest to speech
    release: int = 6  # frames from speech to rest
    hold: int = 4
    """frames of silence before the release begins, so that the closure of a p, b or m is not taken for one"""


class VadGate:
    """How much of each frame's mouth is speech's, in [0, 1]: levels in, weights out `look_ahead` frames later.

    level   RMS of the speech; estimated as the sound comes if None
    loudness  what estimates an unknown level from 40 ms frames, if it has heard the speaker before
    scored  whether voice-activity scores come with the levels; then a frame's weight waits for both
    """

    def __init__(
        self,
        level: float | None = None,
        config: VadConfig = VadConfig(),
        scored: bool = False,
        loudness: LoudnessEstimator | None = None,
    ):
        assert level is None or level > 0, level
        self.config, self.scored = config, scored
        self._level, self._estimator = level, LoudnessEstimator(FPS) if loudness is None else loudness
        self._closed_db, self._open_db = config.closed_db, config.open_db
        if scored:
            self._closed_db, self._open_db = config.scored_closed_db, config.scored_open_db
        self._loud: list[float] = []  # of frames whose weight is not out
        self._voiced: list[float] = []
        self._open, self._quiet_frames = 0.0, 0

    def push(self, rms: Float[np.ndarray, "k"], scores: Float[np.ndarray, "j"] | None = None) -> Float[np.ndarray, "m"]:
        """RMS and scores of the next frames, which need not be the same frames; the weights that became complete."""
        c = self.config
        for value in np.asarray(rms, np.float64):
            level = self._estimator.level if self._level is None else self._level
            db = 20 * np.log10(max(value, 1e-9) / level)
            self._loud.append(_ramp(db, self._closed_db, self._open_db))
            if self._level is None:
                self._estimator.update(np.array([value]))
        self._voiced += [_ramp(score, c.closed_score, c.open_score) for score in (() if scores is None else scores)]
        ready = max(0, len(self._loud) - c.look_ahead)
        if self.scored:
            ready = min(ready, len(self._voiced))
        weights = [self._next(self._target(i)) for i in range(ready)]
        self._loud, self._voiced = self._loud[ready:], self._voiced[ready:]
        return np.array(weights, np.float32)

    def finish(self) -> Float[np.ndarray, "m"]:
        """The remaining weights, as if silence followed."""
        return self.push(np.zeros(self.config.look_ahead))

    def _target(self, i: int) -> float:
        loud = max(self._loud[i : i + self.config.look_ahead + 1])
        return min(loud, self._voiced[i]) if self.scored else loud

    def _next(self, target: float) -> float:
        c = self.config
        if target >= self._open:
            self._open, self._quiet_frames = min(target, self._open + 1 / c.attack), 0
        else:
            self._quiet_frames += 1
            if self._quiet_frames > c.hold:
                self._open = max(target, self._open - 1 / c.release)
        return float(smoothstep(self._open))


def _ramp(value: float, low: float, high: float) -> float:
    return float(np.clip((value - low) / (high - low), 0, 1))
