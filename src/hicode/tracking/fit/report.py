"""How well a track explains its landmarks."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from hicode.geometry import axis_angle_from_rotation
from hicode.motion import LIPS, LOWER_LIP_INNER, UPPER_LIP_INNER, FaceTrack
from hicode.tracking.fit.problem import FLIP, LandmarkBasis
from hicode.tracking.head_model import HeadModel


@dataclass(frozen=True)
class FitReport:
    """Figures over the frames with a face.

    error_px, lips_px    mean distance of modelled and measured landmarks, of all and of the lips
    jitter_deg, _px      mean length of the second difference of the rotation, and of the head's image position
    lip_gap_correlation  of the inner-lip gap, modelled against measured, pose removed
    identity_rms         of the coefficients; far above 1 means an implausible head
    missing              frames without a face
    """

    error_px: float
    lips_px: float
    jitter_deg: float
    jitter_px: float
    lip_gap_correlation: float
    focal_px: float
    identity_rms: float
    missing: int


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

    gap = track.motion.landmarks[:, UPPER_LIP_INNER] - track.motion.landmarks[:, LOWER_LIP_INNER]
    modelled = np.linalg.norm(shape[:, UPPER_LIP_INNER] - shape[:, LOWER_LIP_INNER], axis=1)[seen.numpy()]
    measured = gap.norm(dim=1).numpy()[seen.numpy()]
    varies = len(modelled) > 2 and modelled.std() > 0 and measured.std() > 0
    return FitReport(
        error_px=float(error.mean()),
        lips_px=float(error[:, LIPS].mean()),
        jitter_deg=float(np.degrees(_jitter(axis_angle))),
        jitter_px=_jitter(origin[:, 0].numpy()),
        lip_gap_correlation=float(np.corrcoef(modelled, measured)[0, 1]) if varies else 0.0,
        focal_px=float(track.camera.K[0, 0]),
        identity_rms=float(track.identity.square().mean().sqrt()),
        missing=int((~seen).sum()),
    )


def _jitter(x: Float[np.ndarray, "t d"]) -> float:
    return float(np.linalg.norm(x[2:] - 2 * x[1:-1] + x[:-2], axis=1).mean()) if len(x) > 2 else 0.0
