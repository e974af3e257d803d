"""Motion: what moves a head. One type with two producers, tracking a video and predicting from speech.

The 478 landmarks are MediaPipe's, in the canonical head frame: the pose is taken out, so speech can predict them.
"""

from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.camera import Camera

EXPRESSION_DIM = 64
IDENTITY_DIM = 80
N_LANDMARKS = 478

# MediaPipe's landmark indices. LIPS lists the outer ring, then the inner one. Left and right are the subject's.
LIPS_OUTER = np.array([61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185])
LIPS_INNER = np.array([78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191])
LIPS = np.concatenate([LIPS_OUTER, LIPS_INNER])
FACE_OVAL = np.array([
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
    152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
])  # fmt: skip
RIGHT_EYE_OUTER, LEFT_EYE_OUTER = 33, 263
RIGHT_EYE_RING = np.array([33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246])
LEFT_EYE_RING = np.array([263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466])
RIGHT_IRIS, LEFT_IRIS = np.arange(468, 473), np.arange(473, 478)
UPPER_LIP_INNER, LOWER_LIP_INNER = 13, 14
MOUTH_CORNERS_INNER = (78, 308)
FOREHEAD_TOP, CHIN, NOSE_TIP, PHILTRUM = 10, 152, 1, 164
IRISES = np.arange(468, N_LANDMARKS)
# The lower half of the face oval, ear to ear along jaw and chin, from the subject's right to the left.
JAW = np.array([234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 361, 323, 454])
JAW_CORNERS = (132, 361)  # at the height of the mouth
# The outline of the face above the mouth. Inside it, all but EYE_REGIONS (eyes and brows) moves with the skull.
RIGID_FACE = np.array([
    10, 109, 67, 103, 54, 127, 234, 93, 50, 205, 98, 97, 2, 326, 327, 425, 280, 323, 454, 356, 284, 332, 297, 338,
])  # fmt: skip
EYE_REGIONS = (
    np.array([70, 63, 105, 66, 107, 133, 155, 145, 163, 33, 130, 46]),
    np.array([300, 293, 334, 296, 336, 362, 382, 374, 390, 263, 359, 276]),
)


@dataclass(frozen=True, eq=False)
class MotionFrame:
    """One frame's control signals.

    expression "64" · landmarks "478 3" canonical, pose-free (head units) · head_rotation "3 3" from head to camera ·
    speech "s" the sound's features, where they move an avatar directly (an ablation)
    """

    expression: Float[Tensor, "64"]
    landmarks: Float[Tensor, "478 3"]
    head_rotation: Float[Tensor, "3 3"]
    speech: Float[Tensor, "s"] | None = None

    def to(self, device: torch.device | str) -> "MotionFrame":
        """A copy on a device."""
        speech = None if self.speech is None else self.speech.to(device)
        return MotionFrame(self.expression.to(device), self.landmarks.to(device), self.head_rotation.to(device), speech)


@dataclass(frozen=True, eq=False)
class Motion:
    """t frames of control signals. `motion[3]` is a `MotionFrame`, `motion[2:5]` a `Motion`.

    expression "t 64" · landmarks "t 478 3" canonical, pose-free (head units) · T_camera_head "t 4 4" · fps ·
    speech "t s" the sound's features of each frame, where they move an avatar directly (an ablation)
    """

    expression: Float[Tensor, "t 64"]
    landmarks: Float[Tensor, "t 478 3"]
    T_camera_head: Float[Tensor, "t 4 4"]
    fps: float = 25.0
    speech: Float[Tensor, "t s"] | None = None

    def __post_init__(self):
        t = self.expression.shape[0]
        assert self.expression.shape == (t, EXPRESSION_DIM), self.expression.shape
        assert self.landmarks.shape == (t, N_LANDMARKS, 3), self.landmarks.shape
        assert self.T_camera_head.shape == (t, 4, 4), self.T_camera_head.shape
        assert self.speech is None or len(self.speech) == t, (len(self.speech), t)

    def __len__(self) -> int:
        return self.expression.shape[0]

    @overload
    def __getitem__(self, frames: int | np.integer) -> MotionFrame: ...

    @overload
    def __getitem__(self, frames: slice | Tensor | np.ndarray) -> "Motion": ...

    def __getitem__(self, frames: int | np.integer | slice | Tensor | np.ndarray) -> "MotionFrame | Motion":
        speech = None if self.speech is None else self.speech[frames]
        expression, landmarks, poses = self.expression[frames], self.landmarks[frames], self.T_camera_head[frames]
        if isinstance(frames, (int, np.integer)):
            return MotionFrame(expression, landmarks, poses[:3, :3], speech)
        return replace(self, expression=expression, landmarks=landmarks, T_camera_head=poses, speech=speech)

    def tensors(self) -> dict[str, Tensor]:
        """All that are there, by name."""
        out = {"expression": self.expression, "landmarks": self.landmarks, "T_camera_head": self.T_camera_head}
        return out if self.speech is None else out | {"speech": self.speech}


@dataclass(frozen=True, eq=False)
class FaceTrack:
    """A tracked clip: its motion, one identity and camera, and the measured landmarks.

    identity     "80"       of the 3DMM, from training frames only
    landmarks_px "t 478 2"  as detected, in crop pixels (continuous, pixel centres at +0.5)
    confidence   "t"        face presence in [0, 1]; 0 where the frame had no face and the values are interpolated
    """

    motion: Motion
    identity: Float[Tensor, "80"]
    camera: Camera
    landmarks_px: Float[Tensor, "t 478 2"]
    confidence: Float[Tensor, "t"]

    def __len__(self) -> int:
        return len(self.motion)

    def camera_at(self, t: int) -> Camera:
        """The camera with the head pose of frame t."""
        return self.camera.with_pose(self.motion.T_camera_head[t])

    def mouth_box(self, t: int, padding: float = 0.35) -> tuple[int, int, int, int]:
        """`mouth_box` of the frame's landmarks."""
        return mouth_box(self.landmarks_px[t].numpy(), self.camera.width, self.camera.height, padding)


def mouth_box(
    points: Float[np.ndarray, "478 c"], width: int, height: int, padding: float = 0.35
) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 in px around the lips, padded by a fraction of their width, clipped to the image, never empty."""
    lips = np.asarray(points)[LIPS, :2]
    low, high = lips.min(0), lips.max(0)
    pad = padding * float(high[0] - low[0])
    x0 = int(np.clip(np.floor(float(low[0]) - pad), 0, width - 2))
    y0 = int(np.clip(np.floor(float(low[1]) - pad), 0, height - 2))
    x1 = int(np.clip(np.ceil(float(high[0]) + pad), x0 + 1, width))
    y1 = int(np.clip(np.ceil(float(high[1]) + pad), y0 + 1, height))
    return x0, y0, x1, y1


def ping_pong(length: int, start: int, count: int) -> np.ndarray:
    """`count` frame indices that run back and forth through `length` frames from `start`: … 2 1 0 1 2 …"""
    if length <= 1:
        return np.zeros(count, np.int64)
    period = 2 * (length - 1)
    phase = (start + np.arange(count)) % period
    return np.where(phase < length, phase, period - phase)
