"""Closing the lips where the sound says so.

A regression to the mean hardly ever closes a mouth: after averaging, a p, b or m leaves a narrow gap. `LipClosure`
predicts for each frame how probable closed lips are, and where that is high it draws the gap shut. t frames at 25 fps,
d feature dimensions; gaps in dm (1 unit = 10 cm).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hicode.geometry import smoothstep
from hicode.motion import EXPRESSION_DIM, LOWER_LIP_INNER, N_LANDMARKS, UPPER_LIP_INNER

# dm. A floor of a speaker's usual gap, for those who hardly open the mouth.
MIN_USUAL_GAP = 0.02


def lip_gap(landmarks: Float[Tensor, "*t 478 3"]) -> Float[Tensor, "*t"]:
    """Height between the inner lips in the frontal plane, dm.

    Not their distance in space: lips that touch lie at different depths, and a landmark's depth is uncertain.
    """
    return landmarks[..., UPPER_LIP_INNER, 1] - landmarks[..., LOWER_LIP_INNER, 1]


@dataclass(frozen=True)
class ClosureConfig:
    """When lips are closed. A file records it."""

    feature_dim: int
    back: int  # frames of past sound that a frame's probability depends on
    ahead: int  # frames of coming sound
    probability: tuple[float, float] = (0.2, 0.5)  # no closure below the first, full closure from the second on
    gap_shares: tuple[float, float] | None = (0.4, 0.9)
    """of the usual gap: full closure where the Faceformers' gap is below the first, none above the second; None: any
    gap

    Faceformers and closure read the same sound with different errors. A mouth wrongly shut in an open vowel is visible.
    """


class LipClosure(nn.Module):
    """A logistic regression on the features around a frame, and the motion that closes the lips.

    expression  "64"     change per dm of gap, learned from tracked speech
    landmarks   "478 3"  the same through the head model, so that both heads stay one mouth: it moves the inner lips
                         apart by one dm a unit, in the frontal plane
    """

    def __init__(self, config: ClosureConfig):
        super().__init__()
        self.config = config
        self.weight: Tensor
        self.bias: Tensor
        self.expression: Tensor
        self.landmarks: Tensor
        self.register_buffer("weight", torch.zeros(1, config.feature_dim, config.back + 1 + config.ahead))
        self.register_buffer("bias", torch.zeros(1))
        self.register_buffer("expression", torch.zeros(EXPRESSION_DIM))
        self.register_buffer("landmarks", torch.zeros(N_LANDMARKS, 3))

    def probability(self, frames: Float[Tensor, "s d"]) -> Float[Tensor, "t"]:
        """Of closed lips in t frames, from `Faceformer.frame_features` with `back` frames before and `ahead` after."""
        return torch.sigmoid(F.conv1d(frames.T[None], self.weight, self.bias)[0, 0])

    def close(
        self,
        probability: Float[Tensor, "t"],
        expression: Float[Tensor, "t 64"],
        landmarks: Float[Tensor, "t 478 3"],
        closed_gap: float,
        usual_gap: float,
    ) -> tuple[Float[Tensor, "t 64"], Float[Tensor, "t 478 3"]]:
        """The motion with its gap drawn towards `closed_gap` where the lips are closed. Nothing ever opens.

        usual_gap  of the speaker's mean face, dm
        """
        low, high = self.config.probability
        x = ((probability - low) / (high - low)).clamp(0, 1)
        gap = lip_gap(landmarks)
        if self.config.gap_shares:
            full, none = (share * max(usual_gap, MIN_USUAL_GAP) for share in self.config.gap_shares)
            x = x * ((none - gap) / (none - full)).clamp(0, 1)
        change = (smoothstep(x) * (closed_gap - gap)).clamp(max=0)
        return expression + change[:, None] * self.expression, landmarks + change[:, None, None] * self.landmarks
