"""Keyframes: training frames that show the head from different sides, to which other frames are matched.

t frames, k keyframes. A keyframe's surface lets a frame be drawn as the keyframe's camera would see it. Without that, a
window that turns away is matched with a bias towards no turn at all: a degree of pose on a drawn head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from scipy.ndimage import distance_transform_edt

from hicode.camera import Camera
from hicode.motion import FaceTrack
from hicode.tracking.depth import head_depth
from hicode.tracking.fit.flow import Search, track_points
from hicode.tracking.head_model import HeadModel

_STRIDE = 4  # the surface is smooth, so it is kept at a quarter of the size


@runtime_checkable
class Pictures(Protocol):
    """Frames and head masks of a clip, read one by one."""

    def image(self, t: int) -> UInt8[np.ndarray, "h w 3"]:
        """Frame t, RGB."""
        ...

    def head_mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """The head in frame t: 0 … 255, soft."""
        ...


class GrayPictures:
    """Pictures that keep the first `most` grey frames that are read: later passes over them decode nothing."""

    def __init__(self, pictures: Pictures, most: int = 512):
        self._pictures, self._most = pictures, most
        self._kept: dict[int, UInt8[np.ndarray, "h w"]] = {}

    @staticmethod
    def of(pictures: "Pictures | GrayPictures") -> "GrayPictures":
        """The pictures themselves where they are kept in grey already."""
        return pictures if isinstance(pictures, GrayPictures) else GrayPictures(pictures)

    def image(self, t: int) -> UInt8[np.ndarray, "h w 3"]:
        """Frame t, RGB."""
        return self._pictures.image(t)

    def head_mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """The head in frame t: 0 … 255, soft."""
        return self._pictures.head_mask(t)

    def gray(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """Frame t in grey; any thread may ask."""
        gray = self._kept.get(t)
        if gray is None:
            gray = gray_image(self._pictures.image(t))
            if len(self._kept) < self._most:
                self._kept[t] = gray
        return gray


@dataclass(frozen=True, eq=False)
class View:
    """From a keyframe's camera to a frame's: K "3 3" of both cameras, T "4 4" = T_frame T_keyframe⁻¹."""

    K: Float[np.ndarray, "3 3"]
    T: Float[np.ndarray, "4 4"]

    @staticmethod
    def between(camera: Camera, frame: Float[np.ndarray, "4 4"], keyframe: Float[np.ndarray, "4 4"]) -> "View":
        """Of two poses under one camera."""
        return View(camera.K.double().numpy(), frame @ np.linalg.inv(keyframe))

    def project(self, pixels: Float[np.ndarray, "*b 2"], depth: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b 2"]:
        """Where the frame shows what the keyframe shows at `pixels` with its depth."""
        centre, focal = self.K[:2, 2], np.diag(self.K)[:2]
        ray = np.concatenate([(pixels - centre) / focal, np.ones_like(pixels[..., :1])], -1)
        seen = (ray * depth[..., None]) @ self.T[:3, :3].T + self.T[:3, 3]
        return focal * seen[..., :2] / seen[..., 2:] + centre


@dataclass(frozen=True, eq=False)
class Keyframe:
    """Frame t in grey, its head mask, and the head's depth (dm) by the mesh of a track, NaN off the head.

    `surface` is that depth at a quarter of the size, continued smoothly outside the head.
    """

    t: int
    gray: UInt8[np.ndarray, "h w"]
    mask: UInt8[np.ndarray, "h w"]
    depth: Float32[np.ndarray, "h w"]
    surface: Float32[np.ndarray, "h4 w4"]

    @staticmethod
    def of(t: int, pictures: GrayPictures, track: FaceTrack, model: HeadModel) -> "Keyframe":
        """Frame t with its depth by a track."""
        mask = pictures.head_mask(t)
        depth = head_depth(model, track, t, mask)
        return Keyframe(t, pictures.gray(t), mask, depth, smooth_surface(depth))


def gray_image(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """RGB to grey."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def angle_between(a: Float[np.ndarray, "4 4"], b: Float[np.ndarray, "4 4"]) -> float:
    """Angle between the rotations of two poses, rad."""
    return float(np.arccos(np.clip((np.trace(a[:3, :3].T @ b[:3, :3]) - 1) / 2, -1, 1)))


def choose_keyframes(
    poses: Float[np.ndarray, "t 4 4"],
    frames: Int[np.ndarray, "m"] | Sequence[int],
    most: int,
    spacing_deg: float,
    least: int = 1,
) -> Int[np.ndarray, "k"]:
    """The first of `frames`, then each time the one that turns farthest from those chosen.

    Ends at `most`, or, once there are `least`, where none turns farther than `spacing_deg`.
    """
    chosen = [int(frames[0])]
    nearest = np.array([angle_between(poses[t], poses[chosen[0]]) for t in frames])
    while len(chosen) < min(most, len(frames)) and (len(chosen) < least or nearest.max() > np.radians(spacing_deg)):
        chosen.append(int(frames[int(nearest.argmax())]))
        nearest = np.minimum(nearest, [angle_between(poses[t], poses[chosen[-1]]) for t in frames])
    return np.array(chosen)


def spread_over(frames: Int[np.ndarray, "n"], most: int) -> Int[np.ndarray, "m"]:
    """At most `most` of the frames, evenly spread; first and last are among them."""
    if not len(frames):
        return frames
    return frames[np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))]


def smooth_surface(depth: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h4 w4"]:
    """A depth map at a quarter of its size, continued smoothly outside the head (where it is NaN)."""
    h, w = depth.shape
    small = (-(-w // _STRIDE), -(-h // _STRIDE))
    weight = cv2.resize(np.isfinite(depth).astype(np.float32), small, interpolation=cv2.INTER_AREA)
    mean = cv2.resize(np.nan_to_num(depth), small, interpolation=cv2.INTER_AREA)
    nearest = np.asarray(distance_transform_edt(weight <= 0.5, return_distances=False, return_indices=True))
    return cv2.GaussianBlur((mean / np.maximum(weight, 1e-6))[tuple(nearest)], (0, 0), 1.0)


def match_points(
    keyframe: Keyframe,
    gray: UInt8[np.ndarray, "h w"],
    view: View,
    start: Float[np.ndarray, "n 2"],
    guess: Float[np.ndarray, "n 2"],
    search: Search,
) -> tuple[Float[np.ndarray, "n 2"], Bool[np.ndarray, "n"]]:
    """Lucas-Kanade from pixels `start` of a keyframe to a frame drawn into its view, from `guess` (in that view) on.

    (pixels in the frame, whether they are matches: tracked back they return, and they lie inside both pictures). Only
    the surroundings of the points are drawn.
    """
    h, w = gray.shape
    x0, y0, x1, y1 = box = _surroundings(np.concatenate([start, guess]), 2 * search.window_px, w, h)
    where = _pixels_in_frame(keyframe.surface, view, box)
    columns, rows = cv2.split(where)
    drawn = cv2.remap(gray, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    corner = np.array([x0, y0]) + 0.5
    start32, guess32 = ((points - corner).astype(np.float32)[:, None] for points in (start, guess))
    there, good = track_points(keyframe.gray[y0:y1, x0:x1], drawn, start32, guess32, search)
    columns, rows = cv2.split(there)
    at = cv2.remap(where, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0]
    good &= ((at > 2) & (at < [w - 3, h - 3])).all(1)
    good &= ((there[:, 0] > 0) & (there[:, 0] < [x1 - x0 - 1, y1 - y0 - 1])).all(1)
    return at.astype(np.float64) + 0.5, good


def _surroundings(points: Float[np.ndarray, "n 2"], margin_px: int, w: int, h: int) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of a box around points inside a picture, in whole cells of the surface."""
    low = np.clip(points.min(0) - margin_px, 0, [w, h]) // _STRIDE * _STRIDE
    high = np.clip(-(-(points.max(0) + margin_px) // _STRIDE) * _STRIDE, low + _STRIDE, [w, h])
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _pixels_in_frame(
    surface: Float32[np.ndarray, "h4 w4"], view: View, box: tuple[int, int, int, int]
) -> Float32[np.ndarray, "h w 2"]:
    """Where in a frame (by index) each pixel of a box of the keyframe lies: through its surface and both poses."""
    x0, y0, x1, y1 = box
    cells = surface[y0 // _STRIDE : -(-y1 // _STRIDE), x0 // _STRIDE : -(-x1 // _STRIDE)]
    down, across = ((np.arange(n) + 0.5) * _STRIDE + first for n, first in zip(cells.shape, (y0, x0), strict=True))
    where = view.project(np.stack(np.meshgrid(across, down), -1), cells.astype(np.float64)) - 0.5
    return cv2.resize(where.astype(np.float32), (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
