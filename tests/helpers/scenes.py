"""Small clouds of Gaussians, a camera, and a stand-in for gsplat."""

from dataclasses import replace

import torch

from hicode.camera import Camera
from hicode.gaussians import Gaussians
from hicode.geometry import rotation_from_axis_angle
from hicode.render.reference import blend, project


def head_camera(
    width: int, height: int, distance: float = 5.0, focal_px: float | None = None, dtype=torch.float32
) -> Camera:
    """A camera before the head, turned a little, its principal point off the centre."""
    T = torch.eye(4, dtype=dtype)
    T[:3, :3] = torch.diag(torch.tensor([1.0, -1, -1], dtype=dtype)) @ rotation_from_axis_angle(
        torch.tensor([0.1, -0.2, 0.05], dtype=dtype)
    )
    T[:3, 3] = torch.tensor([0.1, -0.05, distance], dtype=dtype)
    camera = Camera.pinhole(focal_px or 1.2 * width, width, height)
    K = camera.K.to(dtype) + torch.tensor([[0.0, 0, 0.7], [0, 0, -1.3], [0, 0, 0]], dtype=dtype)
    return replace(camera, K=K, T_camera_head=T)


def cloud(n: int, seed: int = 0, log_scale: float = -1.8, dtype=torch.float32) -> Gaussians:
    """Gaussians around the origin, of all shapes and opacities."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    return Gaussians(
        normal(n, 3),
        log_scale + 0.6 * normal(n, 3),
        normal(n, 4),
        2 * normal(n),
        torch.rand(n, 3, generator=r, dtype=torch.float64),
    ).map(lambda t: t.to(dtype))


def stand_in(
    means,
    quats,
    scales,
    opacities,
    colors,
    viewmats,
    Ks,
    width,
    height,
    near_plane=0.01,
    far_plane=1e10,
    radius_clip=0.0,
    eps2d=0.3,
    sh_degree=None,
    packed=True,
    tile_size=16,
    backgrounds=None,
    render_mode="RGB",
    sparse_grad=False,
    absgrad=False,
    rasterize_mode="classic",
    channel_chunk=32,
    distributed=False,
    camera_model="pinhole",
    segmented=False,
    covars=None,
):
    """gsplat 1.5's `rasterization`, by our reference: takes activated scales, opacities and one camera in a batch."""
    assert (near_plane, eps2d, packed, render_mode, camera_model) == (0.01, 0.3, False, "RGB", "pinhole")
    assert viewmats.shape == (1, 4, 4) and Ks.shape == (1, 3, 3) and backgrounds.shape == (1, 3)
    g = Gaussians(means, scales.log(), quats, torch.logit(opacities), colors)
    means2d, inverse, depth, radii, seen = project(g, Camera(Ks[0], viewmats[0], width, height))
    means2d = means2d[None]
    rgb, alpha = blend(means2d[0], inverse, depth, seen, opacities, colors, backgrounds[0], width, height)
    radii = radii.ceil().int()
    return rgb[None], alpha[None, ..., None], {"means2d": means2d, "radii": torch.stack([radii, radii], -1)[None]}
