"""3D Gaussians (Eqs 1-2): the canonical head as n oriented, coloured Gaussians in the head frame (1 unit = 10 cm)."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gaussians:
    """The parameters as optimised; `scales`, `opacities` are what a renderer reads.

    means "n 3" · log_scales "n 3" · quats "n 4" (wxyz, not normalised) · opacity_logits "n" ·
    colors "n 3" (RGB in [0, 1], SH degree 0) ·
    view_dependent_color "n 3 3": change of each colour with the head's rotation, or None (`seen_at`)
    """

    means: Float[Tensor, "n 3"]
    log_scales: Float[Tensor, "n 3"]
    quats: Float[Tensor, "n 4"]
    opacity_logits: Float[Tensor, "n"]
    colors: Float[Tensor, "n 3"]
    view_dependent_color: Float[Tensor, "n 3 3"] | None = None

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def scales(self) -> Float[Tensor, "n 3"]:
        """Standard deviations along the axes."""
        return self.log_scales.exp()

    @property
    def opacities(self) -> Float[Tensor, "n"]:
        """In [0, 1]."""
        return self.opacity_logits.sigmoid()

    def tensors(self) -> dict[str, Tensor]:
        """All that are there, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def map(self, function) -> "Gaussians":
        """A new cloud with `function` applied to each tensor (to, detach, index ...)."""
        return replace(self, **{k: function(v) for k, v in self.tensors().items()})

    def deformed(
        self, d_means: Tensor, d_quats: Tensor, d_log_scales: Tensor, d_colors: Tensor | float = 0.0
    ) -> "Gaussians":
        """Eq. 8: add offsets of location, raw quaternion, log-scale and (not in the paper) colour. Opacity stays."""
        return replace(
            self,
            means=self.means + d_means,
            quats=self.quats + d_quats,
            log_scales=self.log_scales + d_log_scales,
            colors=self.colors + d_colors,
        )

    def seen_at(self, rotation: Float[Tensor, "3"]) -> "Gaussians":
        """The colours of a head at a relative rotation (`Deformation.relative_rotation`).

        `view_dependent_color` is the linear (SH degree 1) part: light stays in place when the head turns.
        """
        if self.view_dependent_color is None:
            return self
        colors = self.colors + self.view_dependent_color @ rotation
        return replace(self, colors=colors, view_dependent_color=None)


def gaussians_from_points(
    points: Float[Tensor, "n 3"], colors: Float[Tensor, "n 3"], opacity: float = 0.1, max_scale: float = 0.1
) -> Gaussians:
    """Isotropic Gaussians at given points, as 3DGS starts them: scale is the mean distance to the 3 nearest neighbours.

    `opacity` in (0, 1); `max_scale` (head units) caps the scale of isolated points.
    """
    from scipy.spatial import KDTree

    xyz = points.detach().cpu().numpy().astype(np.float64)
    n = len(xyz)
    assert n > 0, "no points to start from"
    neighbours = min(4, n)
    distance = KDTree(xyz).query(xyz, k=neighbours)[0].reshape(n, neighbours)[:, 1:]
    mean_distance = distance.mean(1) if neighbours > 1 else np.full(n, max_scale)
    log_scale = torch.from_numpy(np.log(np.clip(mean_distance, 1e-4, max_scale))).to(points.dtype)
    quats = torch.zeros(n, 4, dtype=points.dtype)
    quats[:, 0] = 1
    logit = torch.logit(torch.tensor(opacity, dtype=points.dtype))
    return Gaussians(points.clone(), log_scale[:, None].repeat(1, 3), quats, logit.repeat(n), colors.clone())
