"""Control signals as the networks see them: normalised by statistics of the training frames."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hicode.motion import EXPRESSION_DIM, N_LANDMARKS, Motion, MotionFrame


@dataclass(frozen=True, eq=False)
class Signals:
    """A frame's control signals.

    vector       "144"   3DMM parameters: normalised, clamped expression (64) and identity (80)
    raw_vector   "144"   the same as tracked, for Eq. 12 as printed
    landmarks    "478 3" in [-1, 1]^3
    displacement "478 3" from the mean landmarks, in standard deviations
    speech       "s"     speech features, normalised; None where the motion has none
    """

    vector: Float[Tensor, "144"]
    raw_vector: Float[Tensor, "144"]
    landmarks: Float[Tensor, "478 3"]
    displacement: Float[Tensor, "478 3"]
    speech: Float[Tensor, "s"] | None = None


class Normalization(nn.Module):
    """Maps canonical points and motion frames to the networks' inputs. No parameters; buffers are set once by `fit`."""

    identity: Float[Tensor, "80"]
    center: Float[Tensor, "3"]
    radius: Float[Tensor, ""]
    expression_mean: Float[Tensor, "64"]
    expression_std: Float[Tensor, "64"]
    expression_components: Float[Tensor, "64 64"]
    component_std: Float[Tensor, "64"]
    landmark_mean: Float[Tensor, "478 3"]
    landmark_std: Float[Tensor, ""]
    landmark_motion: Float[Tensor, "478"]
    rotation_mean: Float[Tensor, "3 3"]
    speech_mean: Float[Tensor, "s"]
    speech_std: Float[Tensor, "s"]

    def __init__(
        self,
        identity: Float[Tensor, "80"],
        center: Float[Tensor, "3"],
        radius: float,
        expression_reach: float,
        speech_dim: int,
    ):
        """`center` and `radius` (head units) map the head into [-1, 1]^3."""
        super().__init__()
        self.expression_reach = expression_reach
        buffers = {
            "identity": identity.clone().float(),
            "center": center.clone().float(),
            "radius": torch.tensor(float(radius)),
            "expression_mean": torch.zeros(EXPRESSION_DIM),
            "expression_std": torch.ones(EXPRESSION_DIM),
            "expression_components": torch.eye(EXPRESSION_DIM),
            "component_std": torch.ones(EXPRESSION_DIM),
            "landmark_mean": torch.zeros(N_LANDMARKS, 3),
            "landmark_std": torch.tensor(0.02),
            "landmark_motion": torch.ones(N_LANDMARKS),
            "rotation_mean": torch.eye(3),
            "speech_mean": torch.zeros(speech_dim),
            "speech_std": torch.ones(speech_dim),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def fit(self, motion: Motion) -> None:
        """Statistics of training frames."""
        expression, landmarks = motion.expression, motion.landmarks
        self.expression_mean.copy_(expression.mean(0))
        # The floor keeps an action that never moves from being amplified.
        self.expression_std.copy_(expression.std(0, correction=0) + 0.02)
        normalized = ((expression - self.expression_mean) / self.expression_std).double()
        variance, components = torch.linalg.eigh(normalized.T @ normalized / len(normalized))
        self.expression_components.copy_(components.T)
        self.component_std.copy_(variance.clamp_min(0).sqrt())
        self.landmark_mean.copy_(landmarks.mean(0))
        self.landmark_std.copy_((landmarks - landmarks.mean(0)).std(correction=0).clamp_min(1e-3))
        if len(motion) > 1:
            self.landmark_motion.copy_(landmarks.std(0).norm(dim=1))
        u, _, v = torch.linalg.svd(motion.T_camera_head[:, :3, :3].mean(0))
        self.rotation_mean.copy_(u @ v)  # the rotation nearest to the mean
        if motion.speech is not None and len(self.speech_mean):
            self.speech_mean.copy_(motion.speech.mean(0))
            self.speech_std.copy_(motion.speech.std(0, correction=0) + 1e-3)

    def forward(self, frame: MotionFrame) -> Signals:
        """A frame's signals, normalised."""
        speech = None
        if frame.speech is not None and len(frame.speech) == len(self.speech_mean):
            speech = (frame.speech - self.speech_mean) / self.speech_std
        return Signals(
            torch.cat([self.clamp_expression(frame.expression), self.identity]),
            torch.cat([frame.expression, self.identity]),
            self.positions(frame.landmarks),
            (frame.landmarks - self.landmark_mean) / self.landmark_std,
            speech,
        )

    def positions(self, points: Float[Tensor, "m 3"]) -> Float[Tensor, "m 3"]:
        """Canonical points in [-1, 1]^3."""
        return (points - self.center) / self.radius

    def clamp_expression(self, expression: Float[Tensor, "64"]) -> Float[Tensor, "64"]:
        """Normalise; with `expression_reach`, soft-clamp each PCA coefficient to the range seen in training."""
        normalized = (expression - self.expression_mean) / self.expression_std
        if not self.expression_reach:
            return normalized
        limit = self.expression_reach * self.component_std
        part = normalized[None] @ self.expression_components.T
        return ((limit * torch.tanh(part / limit.clamp_min(1e-6))) @ self.expression_components)[0]
