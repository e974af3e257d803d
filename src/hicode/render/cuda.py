"""The rasteriser on CUDA: gsplat, given our conventions.

gsplat (Apache-2.0) follows this package's rules (`hicode.render`) but for two differences in old versions: some clip
alpha at 0.999, and those before 1.5 cut every Gaussian at three standard deviations instead of at alpha = 1/255.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hicode.camera import Camera
from hicode.errors import InputError
from hicode.gaussians import Gaussians
from hicode.render.reference import DILATION_PX2, NEAR


def rasterize_cuda(
    gaussians: Gaussians, camera: Camera, background: Float[Tensor, "3"], stats=None
) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w"]]:
    """(rgb, alpha) of `hicode.render.rasterize`, on the Gaussians' device. InputError where gsplat is not installed."""
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise InputError(
            f"backend='cuda' needs gsplat ({error}). pip install 'hicode[cuda]', or take backend='cpu'."
        ) from error
    device = gaussians.means.device
    if len(gaussians.means) == 0:  # gsplat 1.5 divides by their number
        if stats is not None:
            stats.radii_px, stats.grad_means2d = torch.zeros(0, device=device), torch.zeros(0, 2, device=device)
        # Zeros that hang on what a caller may ask gradients of.
        nothing = (
            sum(v.sum() for v in gaussians.tensors().values())
            + 0 * camera.T_camera_head.to(device, torch.float32).sum()
        )
        alpha = torch.zeros(camera.height, camera.width, device=device) + nothing
        return alpha[..., None] + background.to(device, torch.float32), alpha
    rgb, alpha, meta = rasterization(
        means=gaussians.means,
        quats=gaussians.quats,
        scales=gaussians.scales,
        opacities=gaussians.opacities,
        colors=gaussians.colors,
        viewmats=camera.T_camera_head.to(device, torch.float32)[None],
        Ks=camera.K.detach().to(device, torch.float32)[None],
        width=camera.width,
        height=camera.height,
        near_plane=NEAR,
        eps2d=DILATION_PX2,
        packed=False,  # so that radii and means keep one row a Gaussian
        backgrounds=background.to(device, torch.float32)[None],
    )
    if stats is not None:
        radii = meta["radii"][0].to(torch.float32)
        stats.radii_px = radii.amax(-1) * (radii > 0).all(-1) if radii.dim() == 2 else radii  # (x, y) since gsplat 1.5
        if meta["means2d"].requires_grad:
            meta["means2d"].register_hook(lambda grad: setattr(stats, "grad_means2d", grad[0]))
    return rgb[0], alpha[0, ..., 0]
