"""Keyframes: training frames that show the head from different sides, to which other frames are matched.

t frames, k keyframes. A keyframe's surface lets a frame be drawn as the keyframe's camera would see it. Without that, a
window that turns away is matched with a bias towards no turn at all: a degree of pose on a drawn head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8
from scipy.ndimage import distance_transform_edt

from hicode.camera import Camera
from hicode.motion import FaceTrack
from hicode.tracking.depth import head_depth
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
    def of(t: int, pictures: Pictures, track: FaceTrack, model: HeadModel) -> "Keyframe":
        """Frame t with its depth by a track."""
        mask = pictures.head_mask(t)
        depth = head_depth(model, track, t, mask)
        return Keyframe(t, gray_image(pictures.image(t)), mask, depth, smooth_surface(depth))


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


def warp_to_keyframe(
    surface: Float32[np.ndarray, "h4 w4"], gray: UInt8[np.ndarray, "h w"], camera: Camera, keyframe_camera: Camera
) -> tuple[Float32[np.ndarray, "h w 2"], UInt8[np.ndarray, "h w"]]:
    """(where in the frame each pixel of the keyframe lies, the frame drawn as the keyframe's camera would see it).

    The map goes through the keyframe's surface and both poses. Cameras are in double precision.
    """
    h, w = gray.shape
    rows, columns = surface.shape
    across, down = ((np.arange(n) + 0.5) * size / n for n, size in ((columns, w), (rows, h)))
    grid = torch.from_numpy(np.stack(np.meshgrid(across, down), -1).reshape(-1, 2))
    points = keyframe_camera.unproject(grid, torch.from_numpy(surface.reshape(-1).astype(np.float64)))
    where = (camera.project(points)[0].numpy() - 0.5).astype(np.float32).reshape(rows, columns, 2)
    where = cv2.resize(where, (w, h), interpolation=cv2.INTER_LINEAR)
    across, down = where[..., 0], where[..., 1]
    return where, cv2.remap(gray, across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
