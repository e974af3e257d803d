"""Depth distortion of the head's Gaussians (not in Eq. 15)."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from hicode.camera import Camera
from hicode.gaussians import Gaussians
from hicode.render import rasterize

SATURATION_DM2 = 0.01  # variance of 1 cm²: hair before a neck is two surfaces, which must not be pulled together
LEAST_ALPHA = 0.3  # pixels that the Gaussians cover less have no reliable depth


def depth_distortion(gaussians: Gaussians, camera: Camera) -> Float[Tensor, ""]:
    """Mean over the pixels of the variance of depth along the ray, weighted by alpha; dm², saturating.

    Seen from one side only, a head is explained as well by Gaussians scattered along the rays as by a surface, and then
    falls apart when it turns. 2DGS (Huang et al. 2024) sums pairwise distances along a ray for the same purpose, which
    needs a kernel. The variance is the mean of squared pairwise distances; it needs one more rendering, with z and z²
    in place of the colours.
    """
    axis = camera.T_camera_head[2].to(gaussians.means.device)
    z = gaussians.means @ axis[:3]
    z = z - z.detach().mean()  # near 0, so that the difference of squares keeps its digits
    moments = replace(gaussians, colors=torch.stack([z, z * z, torch.ones_like(z)], 1))
    first, second, alpha = rasterize(moments, camera, torch.zeros(3, device=z.device)).rgb.unbind(-1)
    variance = torch.where(alpha > LEAST_ALPHA, second - first * first / alpha.clamp_min(LEAST_ALPHA), 0.0)
    return (variance / (1 + variance.detach() / SATURATION_DM2)).mean()
