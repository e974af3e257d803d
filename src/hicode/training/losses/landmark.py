"""The landmark part of the head's loss, L_WING (Eq. 16).

Images are "h w 3" in [0, 1]; landmarks are in px.
"""

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from hicode.tracking.landmarks import FaceLandmarker

WIDTH_PX, CURVATURE_PX = 10.0, 2.0  # w and ε of the Wing loss


def wing(error_px: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Wing loss of each error (Feng et al. 2018): w ln(1 + |x| / ε) below w, |x| - C above; C makes it continuous."""
    size = error_px.abs()
    joint = WIDTH_PX - WIDTH_PX * math.log1p(WIDTH_PX / CURVATURE_PX)
    return torch.where(size < WIDTH_PX, WIDTH_PX * torch.log1p(size / CURVATURE_PX), size - joint)


class WingLandmarks:
    """L_WING (Eq. 16): Wing loss between the landmarks that the detector sees in the rendering and in the target.

    The gradient runs through the landmark network. Both images use the same region, from the target's known landmarks:
    regions 1 px apart change the landmarks by 0.6 px, where Wing is steepest. With one region equal images give 0.

    The network was trained on photographs, so its gradient is unreliable on a bad rendering. The loss is therefore
    scaled by the face presence that the network reports (detached). Keep its weight small.
    """

    def __init__(self, landmarker: "FaceLandmarker"):
        self.landmarker = landmarker

    def __call__(
        self, rendered: Float[Tensor, "h w 3"], target: Float[Tensor, "h w 3"], landmarks_px: Float[Tensor, "478 2"]
    ) -> Float[Tensor, ""]:
        """Mean over the landmarks of wing(x) + wing(y). `landmarks_px`, tracked in the target, set the region only."""
        from hicode.tracking.landmarks import rois_from_landmarks

        roi = rois_from_landmarks(landmarks_px.to(rendered)[None])
        with torch.no_grad():
            expected, _ = self.landmarker.landmarks(target.permute(2, 0, 1)[None], roi)
        actual, presence = self.landmarker.landmarks(rendered.clamp(0, 1).permute(2, 0, 1)[None], roi)
        return wing(actual[0, :, :2] - expected[0, :, :2]).sum(-1).mean() * presence[0].detach()
