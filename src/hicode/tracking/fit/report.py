"""How well a track explains its landmarks."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from hicode.geometry import axis_angle_from_rotation
from hicode.motion import LIPS, FaceTrack
from hicode.tracking.fit.problem import FLIP, LandmarkBasis
from hicode.tracking.head_model import HeadModel


@dataclass(frozen=True)
class FitReport:
    """Figures over the frames with a face.

    error_px, lips_px  mean distance of modelled and measured landmarks, of all and of the lips
    jitter_deg, _px    mean length of the second difference of the rotation, and of the head's image position
    """

    error_px: float
    lips_px: float
    jitter_deg: float
    jitter_px: float
    focal_px: float


def fit_report(track: FaceTrack, model: HeadModel) -> FitReport:
    """Figures of a finished track."""
    seen = track.confidence > 0
    basis = LandmarkBasis.of(model)
    expression = track.motion.expression.numpy()
    shape = basis.neutral(track.identity.numpy()) + np.tensordot(expression, basis.expression, 1)
    camera = track.camera.expand(track.motion.T_camera_head)
    pixels, _ = camera.project(torch.from_numpy(shape).float())
    error = (pixels - track.landmarks_px).norm(dim=-1)[seen]
    origin, _ = camera.project(torch.zeros(len(track), 1, 3))
    rotation = torch.from_numpy(FLIP)[:, None] * track.motion.T_camera_head[:, :3, :3].double()
    axis_angle = axis_angle_from_rotation(rotation).numpy()

    return FitReport(
        error_px=float(error.mean()),
        lips_px=float(error[:, LIPS].mean()),
        jitter_deg=float(np.degrees(_jitter(axis_angle))),
        jitter_px=_jitter(origin[:, 0].numpy()),
        focal_px=float(track.camera.K[0, 0]),
    )


def _jitter(x: Float[np.ndarray, "t d"]) -> float:
    return float(np.linalg.norm(x[2:] - 2 * x[1:-1] + x[:-2], axis=1).mean()) if len(x) > 2 else 0.0
