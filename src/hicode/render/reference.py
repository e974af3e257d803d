"""The rasteriser's specification in plain torch (Eqs 3-6): every Gaussian against every pixel, gradients by autograd.

n Gaussians, p pixels. Any float type and device. Slow, and memory grows with p x n: for tests, small images, float64.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hicode.camera import Camera
from hicode.gaussians import Gaussians
from hicode.geometry import rotation_from_quat, transform

DILATION_PX2 = 0.3  # added to the projected variances, so that no Gaussian falls between two pixels
ALPHA_MIN = 1 / 255  # what an 8-bit image cannot show is not blended
ALPHA_MAX = 0.99  # keeps 1 / (1 - alpha) tame in the gradient
TRANSMITTANCE_MIN = 1e-4  # a pixel is finished before it gets this dark
NEAR = 0.01  # head units: nearer Gaussians, and those behind the camera, are not seen
FIELD_MARGIN = 0.3  # J is clamped at this fraction of the field's half width outside the image


def project(
    gaussians: Gaussians, camera: Camera
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 3"], Float[Tensor, "n"], Float[Tensor, "n"], Bool[Tensor, "n"]]:
    """Means (px), inverse of Sigma' (xx, xy, yy), depth, radius (px), whether each can touch a pixel (Eqs 3-4)."""
    V = camera.T_camera_head[:3, :3]
    p = transform(camera.T_camera_head, gaussians.means)
    seen = p[:, 2] >= NEAR
    # gradients of what is not seen stay zero, not NaN
    x, y, z = torch.where(seen[:, None], p, torch.ones_like(p)).unbind(-1)
    fx, fy, cx, cy = camera.K[0, 0], camera.K[1, 1], camera.K[0, 2], camera.K[1, 2]
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)

    RS = rotation_from_quat(gaussians.quats) * gaussians.scales[:, None, :]
    margin_x, margin_y = FIELD_MARGIN * camera.width / 2, FIELD_MARGIN * camera.height / 2
    jx = (x / z).clamp(-(cx + margin_x) / fx, (camera.width - cx + margin_x) / fx)
    jy = (y / z).clamp(-(cy + margin_y) / fy, (camera.height - cy + margin_y) / fy)
    o = torch.zeros_like(z)
    J = torch.stack([fx / z, o, -fx * jx / z, o, fy / z, -fy * jy / z], -1).reshape(-1, 2, 3)
    M = J @ V @ RS
    cov = M @ M.transpose(1, 2)
    a, b, c = cov[:, 0, 0] + DILATION_PX2, cov[:, 0, 1], cov[:, 1, 1] + DILATION_PX2
    determinant = a * c - b * b
    inverse = torch.stack([c, -b, a], -1) / determinant[:, None]

    # Where alpha can reach 1/255: d^T inverse d <= 2 ln(255 opacity), an ellipse whose box has these half sides.
    reach = 2 * torch.log(gaussians.opacities / ALPHA_MIN).clamp_min(0)
    half_x, half_y = (reach * a).sqrt().detach(), (reach * c).sqrt().detach()
    u, v = means2d.detach().unbind(-1)
    first_x, last_x = (u - half_x - 0.5).ceil().clamp_min(0), (u + half_x - 0.5).floor().clamp_max(camera.width - 1)
    first_y, last_y = (v - half_y - 0.5).ceil().clamp_min(0), (v + half_y - 0.5).floor().clamp_max(camera.height - 1)
    seen = seen & (reach > 0) & (first_x <= last_x) & (first_y <= last_y)
    radii = torch.where(seen, torch.maximum(half_x, half_y), torch.zeros_like(z))
    return means2d, inverse, z, radii, seen


def blend(  # noqa: PLR0913 (the projection's parts)
    means2d: Float[Tensor, "n 2"],
    inverse: Float[Tensor, "n 3"],
    depth: Float[Tensor, "n"],
    seen: Bool[Tensor, "n"],
    opacities: Float[Tensor, "n"],
    colors: Float[Tensor, "n 3"],
    background: Float[Tensor, "3"],
    width: int,
    height: int,
) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w"]]:
    """(rgb, alpha) of projected Gaussians, near before far, equal depths in index order (Eqs 5-6)."""
    order = torch.argsort(depth, stable=True)
    order = order[seen[order]]
    means2d, inverse, opacities, colors = means2d[order], inverse[order], opacities[order], colors[order]
    columns = torch.arange(width, dtype=means2d.dtype, device=means2d.device) + 0.5
    rows = torch.arange(height, dtype=means2d.dtype, device=means2d.device) + 0.5
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).reshape(-1, 1, 2)
    rgb, alpha = [], []
    # bounds the memory of one pass where no gradient is kept
    for some in pixels.split(max(1, 2**22 // max(1, len(order)))):
        dx, dy = (some - means2d).unbind(-1)
        power = -0.5 * (inverse[:, 0] * dx * dx + inverse[:, 2] * dy * dy) - inverse[:, 1] * dx * dy
        a = (opacities * power.exp()).clamp_max(ALPHA_MAX)
        a = torch.where(a >= ALPHA_MIN, a, 0)
        # the pixel is finished from the first that fails
        a = torch.where(torch.cumprod(1 - a, 1) > TRANSMITTANCE_MIN, a, 0)
        T = torch.cat([a.new_ones(len(a), 1), torch.cumprod(1 - a, 1)], 1)
        in_front, left = T[:, :-1], T[:, -1]
        rgb.append((a * in_front) @ colors + left[:, None] * background)
        alpha.append(1 - left)
    return torch.cat(rgb).reshape(height, width, 3), torch.cat(alpha).reshape(height, width)


def rasterize_reference(
    gaussians: Gaussians, camera: Camera, background: Float[Tensor, "3"], stats=None
) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w"]]:
    """(rgb, alpha) as `hicode.render.rasterize` says."""
    dtype, device = gaussians.means.dtype, gaussians.means.device
    background, K, T = (x.to(dtype=dtype, device=device) for x in (background, camera.K, camera.T_camera_head))
    means2d, inverse, depth, radii, seen = project(gaussians, Camera(K, T, camera.width, camera.height))
    if stats is not None:
        stats.radii_px = radii.detach()
        if means2d.requires_grad:
            means2d.register_hook(lambda grad: setattr(stats, "grad_means2d", grad))
    opacities, colors = gaussians.opacities, gaussians.colors
    return blend(means2d, inverse, depth, seen, opacities, colors, background, camera.width, camera.height)
