"""Whether somebody speaks: one linear score of the speech features that the Faceformers hear anyway, so it costs nothing.

s features at 50 Hz, t frames at 25 fps, d features' size. A score is a logit, that of speech against all other sound: silence, a room, hum, music,
breath. Loudness cannot tell these apart. `hicode pretrain --presence-out` makes the weights (`training/presence.py`), for the embedded encoder.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hicode.errors import FileFormatError
from hicode.files import load_tensors, save_tensors

WEIGHTS = Path(__file__).parent.parent / "weights" / "presence.safetensors"
SCHEMA, VERSION = "hicode-presence", 1


class Presence:
    """weight "d", bias "" of the score; `encoder`: whose features it reads."""

    # Frames beside its own that a frame's score is averaged over. One of coming sound is what the Faceformers wait for too; past ones make sentences
    # begin late (by a frame, for two of them) and are not needed, since the gate holds what is open.
    BACK, AHEAD = 0, 1

    def __init__(self, weight: Float[Tensor, "d"], bias: Float[Tensor, ""], encoder: str = "embedded"):
        self.weight, self.bias, self.encoder = weight, bias, encoder

    @staticmethod
    def load(path: Path | str = WEIGHTS) -> "Presence":
        """The shipped weights, or another file of that kind."""
        tensors, config = load_tensors(path, SCHEMA, VERSION)
        try:
            return Presence(tensors["weight"].float(), tensors["bias"].float(), config["encoder"])
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}. Copy or make it anew.") from error

    def save(self, path: Path | str, learned_from: dict, more: dict | None = None) -> None:
        """`learned_from`: terms by speaker; `more`: what else the file is to say of itself."""
        header = {"encoder": self.encoder, "learned_from": learned_from} | (more or {})
        save_tensors(path, {"weight": self.weight, "bias": self.bias}, SCHEMA, VERSION, header)

    def __call__(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "s"]:
        """The score of each feature by itself."""
        return features @ self.weight + self.bias

    def stream(self) -> "PresenceStream":
        return PresenceStream(self)

    def frames(self, features: Float[Tensor, "s d"]) -> Float[np.ndarray, "t"]:
        """The scores of all ceil(s / 2) frames of a sound."""
        stream = self.stream()
        return np.concatenate([stream.push(features), stream.finish()])


class PresenceStream:
    """Features in pieces of any size, frames' scores out as soon as `AHEAD` frames have followed."""

    def __init__(self, presence: Presence):
        self.presence = presence
        self._rows: list[float] = []  # from `BACK` frames before the next frame on
        self._before = 0  # frames of past in them: fewer at the beginning

    def push(self, features: Float[Tensor, "s d"]) -> Float[np.ndarray, "m"]:
        self._rows += self.presence(features).tolist()
        return self._advance(len(self._rows) // 2 - self._before - self.presence.AHEAD, self.presence.AHEAD)

    def finish(self) -> Float[np.ndarray, "m"]:
        """The remaining frames, averaged over what there is."""
        return self._advance(-(-len(self._rows) // 2) - self._before, self.presence.AHEAD)

    def _advance(self, count: int, ahead: int) -> Float[np.ndarray, "m"]:
        out = []
        for _ in range(max(count, 0)):
            rows = self._rows[: 2 * (self._before + 1 + ahead)]
            out.append(sum(rows) / len(rows))
            if self._before < self.presence.BACK:
                self._before += 1
            else:
                del self._rows[:2]
        return np.array(out, np.float32)
