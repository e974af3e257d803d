"""The mesh rig: Gaussians ride on the 3DMM's surface and on the landmarks (our addition to the paper).

Each Gaussian is bound to the nearest triangle and to 8 landmarks. Its displacement is linear in the motion: the mesh's,
plus the landmarks' residual against the mesh. Nothing is trained.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hicode.motion import N_LANDMARKS, Motion, MotionFrame

NEAREST_LANDMARKS = 8
REACH = 0.25  # head units (25 mm): the rig fades with exp(-(distance / REACH)²), so hair far from the face stays put


@dataclass(frozen=True, eq=False)
class Binding:
    """What each Gaussian rides on. Fixed when it is made, inherited by the Gaussians that density control adds.

    vertices  "n 3"  of the nearest triangle;  weights "n 3"  barycentric, times the fade
    landmarks "n 8"  nearest landmarks;  landmark_weights "n 8"  of their residuals
    """

    vertices: Int[Tensor, "n 3"]
    weights: Float[Tensor, "n 3"]
    landmarks: Int[Tensor, "n 8"]
    landmark_weights: Float[Tensor, "n 8"]

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {k: getattr(self, k) for k in ("vertices", "weights", "landmarks", "landmark_weights")}

    def select(self, index: Int[Tensor, "m"]) -> "Binding":
        """Of m of the Gaussians."""
        return Binding(**{k: v[index] for k, v in self.tensors().items()})

    def cat(self, other: "Binding") -> "Binding":
        """Of these Gaussians, then the others."""
        return Binding(**{k: torch.cat([v, getattr(other, k)]) for k, v in self.tensors().items()})


def bind(
    points: Float[Tensor, "n 3"],
    vertices: Float[Tensor, "v 3"],
    triangles: Int[Tensor, "f 3"],
    landmarks: Float[Tensor, "478 3"],
) -> Binding:
    """Bind points to a mesh and landmarks of the same expression.

    The nearest surface point is found among 15 samples of each triangle, finer than the mesh's curvature.
    """
    from scipy.spatial import KDTree

    xyz = points.detach().cpu().numpy()
    corners = vertices.detach().cpu().numpy()[triangles.cpu().numpy()]
    steps = np.array([(i / 4, j / 4, 1 - (i + j) / 4) for i in range(5) for j in range(5 - i)], np.float32)
    samples = np.einsum("sb,fbc->fsc", steps, corners).reshape(-1, 3)
    distance, nearest = KDTree(samples).query(xyz)
    fade = np.exp(-((distance / REACH) ** 2))[:, None]
    barycentric = steps[nearest % len(steps)] * fade

    distance, index = KDTree(landmarks.detach().cpu().numpy()).query(xyz, k=NEAREST_LANDMARKS)
    # The kernel's width follows the local spacing of landmarks (the 4th neighbour), so that lips do not pull the nose.
    kernel = np.exp(-((distance / (0.5 * distance[:, 3:4] + 0.03)) ** 2))
    kernel = kernel / np.maximum(kernel.sum(1, keepdims=True), 1e-6) * np.exp(-((distance[:, :1] / REACH) ** 2))
    return Binding(
        triangles.cpu()[torch.from_numpy(nearest // len(steps))].long(),
        torch.from_numpy(barycentric.astype(np.float32)),
        torch.from_numpy(index.astype(np.int64)),
        torch.from_numpy(kernel.astype(np.float32)),
    )


class MeshRig(nn.Module):
    """The 3DMM's expression basis at vertices and landmarks, and the mean residual of the training frames."""

    expression_basis: Float[Tensor, "64 v 3"]
    landmark_neutral: Float[Tensor, "478 3"]
    landmark_basis: Float[Tensor, "64 478 3"]
    residual_mean: Float[Tensor, "478 3"]

    def __init__(
        self,
        expression_basis: Float[Tensor, "64 v 3"],
        landmark_neutral: Float[Tensor, "478 3"],
        landmark_basis: Float[Tensor, "64 478 3"],
    ):
        super().__init__()
        self.register_buffer("expression_basis", expression_basis.clone())
        self.register_buffer("landmark_neutral", landmark_neutral.clone())
        self.register_buffer("landmark_basis", landmark_basis.clone())
        self.register_buffer("residual_mean", torch.zeros(N_LANDMARKS, 3))

    def fit(self, motion: Motion) -> None:
        """The residual's mean is shape, not motion: canonical positions learn it, so it is taken out here."""
        self.residual_mean.zero_()
        self.residual_mean.copy_(self.landmark_residual(motion.expression, motion.landmarks).mean(0))

    def landmark_residual(
        self, expression: Float[Tensor, "*b 64"], landmarks: Float[Tensor, "*b 478 3"]
    ) -> Float[Tensor, "*b 478 3"]:
        """Landmarks minus those of the 3DMM, minus the mean of that."""
        model = self.landmark_neutral + torch.tensordot(expression, self.landmark_basis, 1)
        return landmarks - model - self.residual_mean

    @torch.no_grad()
    def forward(self, binding: Binding, frame: MotionFrame) -> Float[Tensor, "n 3"]:
        """Displacement of each bound Gaussian."""
        vertices = torch.tensordot(frame.expression, self.expression_basis, 1)
        residual = self.landmark_residual(frame.expression, frame.landmarks)
        return weighted_rows(vertices, binding.vertices, binding.weights) + weighted_rows(
            residual, binding.landmarks, binding.landmark_weights
        )


def weighted_rows(
    table: Float[Tensor, "m c"], index: Int[Tensor, "n k"], weight: Float[Tensor, "n k"]
) -> Float[Tensor, "n c"]:
    """out[i] = Σ_k weight[i, k] table[index[i, k]], for a table without gradient."""
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")
