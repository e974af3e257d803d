"""Film grain: the fine detail that a recording has anew in every frame (sensor noise, compression, the skin's gloss).

Gaussians learn what a subject's frames have in common, so a render is smoother than the frame around it. No network can
predict the next frame's grain, but any of the recording's own will do for the eye and for LPIPS. The avatar keeps a few
fields: what training frames had over their renders, high-passed. A spoken frame takes one, mapped by an affine fit of
the landmarks and shifted by a few pixels, so that none repeats. Video codecs do the same with a noise model (AV1); here
the grain is kept as recorded, since it is stronger in hair, beard and pores than on a cheek.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from hicode.media.images import Images
from hicode.motion import LIPS

GAIN = 2.0  # levels of a field per grey level: ±63 grey levels, in steps of a half
NEAREST = 6  # fields of the most similar head poses, of which one is taken
SHAKE_PX = 4 / 512  # largest random shift of a field, of the image's larger side
LIPS_MARGIN = 0.3  # of the lips' extent: lips move, and those of the field's frame would show as a ghost


@dataclass(frozen=True, eq=False)
class FilmGrainLayer:
    """One frame's film grain: `field` (128 is none) times `scale`, left out in the ellipse `lips`.

    lips "4" centre x, y and half extents, px
    """

    field: UInt8[np.ndarray, "h w"]
    scale: float
    lips: Float32[np.ndarray, "4"]


@dataclass(eq=False)
class FilmGrain:
    """A subject's film grain.

    fields       k images "h w": 128 + GAIN (frame - render), fine detail alone; 128 outside the head and on the lips
    landmarks_px "k 478 2" of the frame that each field came from
    strength     1: as recorded
    """

    fields: Images
    landmarks_px: Float[Tensor, "k 478 2"]
    strength: float

    def __post_init__(self):
        self._decoded: list[np.ndarray] | None = None
        points = _steady(self.landmarks_px.numpy())
        self._shapes = np.stack([_normalised(p) for p in points])

    def layer(self, landmarks_px: Float[np.ndarray, "478 2"], index: int) -> FilmGrainLayer:
        """The film grain of output frame `index` with these landmarks; deterministic."""
        if self._decoded is None:
            self._decoded = [self.fields[k] for k in range(len(self.fields))]
        chance = np.random.default_rng((index & 0xFFFFFFFF, 7))
        points = _steady(landmarks_px)
        order = np.argsort(((self._shapes - _normalised(points)) ** 2).sum((1, 2)), kind="stable")
        k = int(order[chance.integers(min(NEAREST, len(order)))])
        field = self._decoded[k]
        h, w = field.shape
        # From this frame's pixels to the field's.
        there, *_ = np.linalg.lstsq(
            np.c_[points, np.ones(len(points))], _steady(self.landmarks_px[k].numpy()), rcond=None
        )
        matrix = np.ascontiguousarray(there.T)
        matrix[:, 2] += chance.uniform(-1, 1, 2) * SHAKE_PX * max(h, w)
        # The nearest pixel: interpolation would remove the finest grain.
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
        """The inverse of `state`."""
        return FilmGrain(
            Images(tensors["data"], tensors["offsets"]), tensors["landmarks_px"], float(config["strength"])
        )

    @staticmethod
    def of(
        fields: list[Float32[np.ndarray, "h w"]], landmarks_px: Float[Tensor, "k 478 2"], strength: float
    ) -> "FilmGrain":
        """Encode fine detail in grey levels."""
        coded = (np.clip(128 + GAIN * f + 0.5, 0, 255).astype(np.uint8) for f in fields)
        return FilmGrain(Images.encode(coded, ".jpg"), torch.as_tensor(landmarks_px, dtype=torch.float32), strength)


def lips_ellipse(landmarks_px: Float[np.ndarray, "478 2"]) -> Float32[np.ndarray, "4"]:
    """Centre x, y and half extents, px, of the ellipse around the lips that film grain leaves out."""
    low, high = landmarks_px[LIPS].min(0), landmarks_px[LIPS].max(0)
    half = (high - low) / 2
    return np.concatenate([(low + high) / 2, half * (1 + LIPS_MARGIN) + LIPS_MARGIN * half.max() / 2]).astype(
        np.float32
    )


_STEADY = np.setdiff1d(np.arange(478), LIPS)


def _steady(points: np.ndarray) -> np.ndarray:
    """All landmarks but the lips', which move with speech."""
    return np.asarray(points, np.float64)[..., _STEADY, :]


def _normalised(points: np.ndarray) -> np.ndarray:
    """Without position and size: what remains depends on the head's rotation."""
    centred = points - points.mean(0)
    return centred / np.sqrt((centred**2).sum(1).mean())
