"""FilmGrain: the fine detail that a recording has anew in every frame (sensor noise, compression, the skin's passing gloss).

Gaussians know what a subject's frames have in common, so a render is smoother than the frame around it, however long it trains: ten neighbouring true
frames, registered and averaged, are as smooth (EdMarkey: LPIPS .071 from a true frame; one neighbour alone .019). No network can know the next frame's
grain either; but any of the recording's own will do for the eye, and for LPIPS. So the avatar keeps a few *fields*: what training frames had over their
renders, high-passed. A spoken frame takes one, laid on the head by an affine map of the landmarks and shaken by a few pixels so that none repeats.

The idea is film grain synthesis as video codecs have it (AV1's film grain tables): send the picture without, add grain of the same kind when showing.
Here grain is not modelled but kept, since it is no noise alone: it is stronger in hair, beard and pores than on a cheek.

    fields       k images "h w", grey: 128 + GAIN (frame - render), fine detail alone, 128 outside the head and on the lips
    landmarks_px "k 478 2" where the landmarks lay in the frame that a field came from
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from hicode.media.images import Images
from hicode.motion import LIPS

GAIN = 2.0  # levels of a field per grey level: +-63 of them, to half a level
NEAREST = 6  # fields whose head stood most alike; one of them is taken
SHAKE_PX = 4 / 512  # how far a field is moved at random, of the image's larger side
LIPS_MARGIN = 0.3  # of the lips' extent: lips move under a field, and another frame's would show as a ghost


@dataclass(frozen=True, eq=False)
class FilmGrainLayer:
    """One frame's grain. field "h w": as in `FilmGrain`; scale: a field's level in [0, 1]; lips: centre x, y and half extents of an ellipse without grain."""

    field: UInt8[np.ndarray, "h w"]
    scale: float
    lips: Float32[np.ndarray, "4"]


@dataclass(eq=False)
class FilmGrain:
    """A subject's grain, and how much of it a spoken frame gets (`strength`: 1 is as recorded)."""

    fields: Images
    landmarks_px: Float[Tensor, "k 478 2"]
    strength: float

    def __post_init__(self):
        self._decoded: list[np.ndarray] | None = None
        points = _steady(self.landmarks_px.numpy())
        self._shapes = np.stack([_normalised(p) for p in points])

    def layer(self, landmarks_px: Float[np.ndarray, "478 2"], index: int) -> FilmGrainLayer:
        """The grain of output frame `index`, whose landmarks project to `landmarks_px`. The same arguments give the same grain."""
        if self._decoded is None:
            self._decoded = [self.fields[k] for k in range(len(self.fields))]
        chance = np.random.default_rng((index & 0xFFFFFFFF, 7))
        points = _steady(landmarks_px)
        order = np.argsort(((self._shapes - _normalised(points)) ** 2).sum((1, 2)), kind="stable")
        k = int(order[chance.integers(min(NEAREST, len(order)))])
        field = self._decoded[k]
        h, w = field.shape
        # From this frame's pixels to the field's.
        there, _, _, _ = np.linalg.lstsq(
            np.c_[points, np.ones(len(points))], _steady(self.landmarks_px[k].numpy()), rcond=None
        )
        matrix = np.ascontiguousarray(there.T)
        matrix[:, 2] += chance.uniform(-1, 1, 2) * SHAKE_PX * max(h, w)
        # The nearest pixel: interpolation would take the finest grain away, and twice to eight times as long.
        flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
        laid = cv2.warpAffine(field, matrix, (w, h), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=128)
        return FilmGrainLayer(laid, self.strength / (255 * GAIN), lips_ellipse(landmarks_px))

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON-able config), the inverse of `from_state`."""
        return {
            "data": self.fields.data,
            "offsets": self.fields.offsets,
            "landmarks_px": self.landmarks_px.contiguous(),
        }, {"strength": self.strength}

    @staticmethod
    def from_state(tensors: dict[str, Tensor], config: dict) -> "FilmGrain":
        return FilmGrain(
            Images(tensors["data"], tensors["offsets"]), tensors["landmarks_px"], float(config["strength"])
        )

    @staticmethod
    def of(
        fields: list[Float32[np.ndarray, "h w"]], landmarks_px: Float[Tensor, "k 478 2"], strength: float
    ) -> "FilmGrain":
        """From fine detail in grey levels."""
        coded = (np.clip(128 + GAIN * f + 0.5, 0, 255).astype(np.uint8) for f in fields)
        return FilmGrain(Images.encode(coded, ".jpg"), torch.as_tensor(landmarks_px, dtype=torch.float32), strength)


def lips_ellipse(landmarks_px: Float[np.ndarray, "478 2"]) -> Float32[np.ndarray, "4"]:
    """Centre x, y and half extents, px, of the ellipse about the lips that grain leaves out."""
    low, high = landmarks_px[LIPS].min(0), landmarks_px[LIPS].max(0)
    half = (high - low) / 2
    return np.concatenate([(low + high) / 2, half * (1 + LIPS_MARGIN) + LIPS_MARGIN * half.max() / 2]).astype(
        np.float32
    )


_STEADY = np.setdiff1d(np.arange(478), LIPS)


def _steady(points: np.ndarray) -> np.ndarray:
    """All landmarks but the lips', which speak."""
    return np.asarray(points, np.float64)[..., _STEADY, :]


def _normalised(points: np.ndarray) -> np.ndarray:
    """Shape alone: without place and size, so that what is left tells how the head was turned."""
    centred = points - points.mean(0)
    return centred / np.sqrt((centred**2).sum(1).mean())
