"""The amount of mouth motion: monotone maps from predicted to the person's own opening, width and jaw drop.

Least squares predict too little motion, and how much is lost differs from person to person. A map of quantiles gives a
person's own distribution back without changing when the mouth moves. It works frame by frame, so a stream needs no
look-ahead for it. t frames, k knots, q mouth lengths; lengths in dm (1 unit = 10 cm).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.motion import EXPRESSION_DIM, MOUTH_CORNERS_INNER, N_LANDMARKS

# Pairs of inner-lip landmarks, upper and lower, whose mean height is the opening.
_UPPER, _LOWER = (13, 82, 312), (14, 87, 317)
_NOSE_TIP, _CHIN = 1, 152


def mouth_lengths(landmarks: Float[Tensor, "*b 478 3"]) -> Float[Tensor, "*b 3"]:
    """Opening, width and jaw drop in the frontal plane. Linear in the landmarks."""
    right, left = MOUTH_CORNERS_INNER
    opening = landmarks[..., _UPPER, 1].mean(-1) - landmarks[..., _LOWER, 1].mean(-1)
    width = landmarks[..., left, 0] - landmarks[..., right, 0]
    return torch.stack([opening, width, landmarks[..., _NOSE_TIP, 1] - landmarks[..., _CHIN, 1]], -1)


@dataclass(frozen=True, eq=False)
class MouthCalibration:
    """Piecewise linear maps of the three lengths, and how a face changes them.

    source, target  "3 k"        a predicted length, ascending, and the one shown for it, ascending
    expression      "3 64"       change per dm of each length
    landmarks       "3 478 3"    the same through the head model, so that both heads stay one mouth: each row changes
                                 its own length by one and the others by nothing
    """

    source: Float[Tensor, "3 k"]
    target: Float[Tensor, "3 k"]
    expression: Float[Tensor, "3 64"]
    landmarks: Float[Tensor, "3 478 3"]

    def __post_init__(self):
        assert self.source.shape == self.target.shape, (self.source.shape, self.target.shape)
        assert self.expression.shape == (3, EXPRESSION_DIM) and self.landmarks.shape == (3, N_LANDMARKS, 3)
        assert (self.source.diff(dim=1) > 0).all() and (self.target.diff(dim=1) >= 0).all(), "knots do not ascend"

    def lengths(self, predicted: Float[Tensor, "t 3"]) -> Float[Tensor, "t 3"]:
        """The maps. Beyond the outer knots they stay: nobody is asked for what they never did."""
        triples = zip(predicted.T.numpy(), self.source.numpy(), self.target.numpy(), strict=True)
        return torch.from_numpy(np.stack([np.interp(*triple) for triple in triples], 1).astype(np.float32))

    def __call__(
        self, expression: Float[Tensor, "t 64"], landmarks: Float[Tensor, "t 478 3"]
    ) -> tuple[Float[Tensor, "t 64"], Float[Tensor, "t 478 3"]]:
        """The motion with the lengths of its landmarks mapped."""
        predicted = mouth_lengths(landmarks)
        change = self.lengths(predicted) - predicted
        return expression + change @ self.expression, landmarks + torch.tensordot(change, self.landmarks, 1)
