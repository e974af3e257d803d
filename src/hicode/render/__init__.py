"""Rasterising 3D Gaussians (HiCoDe, Eqs 3-6): one function, three backends, one contract.

n Gaussians in the head frame, one camera, an image of h x w pixels with centres at +0.5. What every backend computes:

    Sigma' = J V Sigma V^T J^T + 0.3 I   the projected covariance (Eq. 3), dilated so that nothing falls between pixels
    alpha  = min(sigmoid(o) exp(-d^T Sigma'^-1 d / 2), 0.99), or 0 below 1/255   (Eq. 6; d from mean to pixel, px)
    rgb    = sum over depth of alpha T colour + T background, T = product of (1 - alpha) of those in front   (Eq. 5)

A Gaussian that would bring T down to 1e-4 or below ends its pixel and is not blended itself. Deviation from Eq. 6: the
paper omits the inverse of Sigma'. The constants are gsplat's, so that the backends agree.

- `reference` is the specification: dense torch, any float type, any device, memory grows with h x w x n.
- `cpu` is the Numba kernels, float32.
- `cuda` is gsplat, imported only when chosen.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hicode.camera import Camera
from hicode.errors import InputError
from hicode.gaussians import Gaussians

Backend = Literal["auto", "reference", "cpu", "cuda"]


@dataclass(frozen=True, eq=False)
class Rendering:
    """What the camera sees.

    rgb   "h w 3"  background included; not clamped, so colours outside [0, 1] stay
    alpha "h w"    1 - T, how much of each pixel the Gaussians cover
    """

    rgb: Float[Tensor, "h w 3"]
    alpha: Float[Tensor, "h w"]


@dataclass(eq=False)
class RasterStats:
    """What density control reads of one rendering; `rasterize` and its backward fill it in. 0 for unseen Gaussians.

    radii_px     "n"    after the forward: half the longer side of the box in which alpha reaches 1/255, px
    grad_means2d "n 2"  after the backward: gradient of the loss to the projected means, per px
    """

    radii_px: Float[Tensor, "n"] | None = None
    grad_means2d: Float[Tensor, "n 2"] | None = None

    @property
    def visible(self) -> Tensor:
        """Bool "n": whether the Gaussian's box holds a pixel. Hidden behind others counts as visible."""
        assert self.radii_px is not None, "nothing was rendered with these stats yet"
        return self.radii_px > 0


def rasterize(
    gaussians: Gaussians,
    camera: Camera,
    background: Float[Tensor, "3"],
    backend: Backend = "auto",
    stats: RasterStats | None = None,
    wanted: Bool[np.ndarray, "h w"] | None = None,
) -> Rendering:
    """Render Gaussians from one camera over a constant background.

    Differentiable, through rgb and alpha, in the tensors of `gaussians` (activations are applied inside),
    `camera.T_camera_head` and `background`. `camera.K` receives no gradient except from the reference.

    `auto` takes gsplat for CUDA tensors (if installed), the kernels for float32, the reference for other types.
    Pixels that are not `wanted` may be left out by the kernels, which saves time; without gradients only.
    Raises InputError, naming the tensor, where an input holds NaN or infinity, and where the backend cannot run.
    """
    _check(gaussians, camera, background)
    chosen = _choose(gaussians, backend) if backend == "auto" else backend
    part = () if wanted is None or chosen != "cpu" else (wanted,)
    rgb, alpha = _implementation(chosen)(gaussians, camera, background, stats, *part)
    assert not part or not rgb.requires_grad, "a part of the pixels has no gradients"
    return Rendering(rgb, alpha)


def _choose(gaussians: Gaussians, backend: Backend) -> Backend:
    if gaussians.means.dtype != torch.float32:
        return "reference"
    if gaussians.means.is_cuda and find_spec("gsplat") is not None:
        return "cuda"
    return "cpu"


def _implementation(backend: Backend) -> Callable:
    # Imported here: Numba takes half a second to load, and gsplat needs a GPU.
    if backend == "reference":
        from hicode.render.reference import rasterize_reference as implementation
    elif backend == "cpu":
        from hicode.render.cpu import rasterize_cpu as implementation
    elif backend == "cuda":
        from hicode.render.cuda import rasterize_cuda as implementation
    else:
        raise InputError(f"No rasteriser is called {backend!r}. Take auto, reference, cpu or cuda.")
    return implementation


def _check(gaussians: Gaussians, camera: Camera, background: Tensor) -> None:
    n = len(gaussians)
    shapes = {"means": (n, 3), "log_scales": (n, 3), "quats": (n, 4), "opacity_logits": (n,), "colors": (n, 3)}
    # view_dependent_color is not drawn: `Gaussians.seen_at` adds it to the colours.
    named = {f"gaussians.{k}": getattr(gaussians, k) for k in shapes}
    for (name, tensor), shape in zip(named.items(), shapes.values(), strict=True):
        assert tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
    assert camera.K.shape == (3, 3) and camera.T_camera_head.shape == (4, 4), "rasterize takes one camera, not a batch"
    assert background.shape == (3,), f"background has shape {tuple(background.shape)}, not (3,)"
    assert camera.width > 0 and camera.height > 0, (camera.width, camera.height)
    named |= {"camera.K": camera.K, "camera.T_camera_head": camera.T_camera_head, "background": background}
    # NaN and infinity survive a sum: a healthy input costs eight short passes. Overflow of the sum is told apart below.
    if all(math.isfinite(_sum(tensor.detach())) for tensor in named.values()):
        return
    for name, tensor in named.items():
        bad = ~tensor.detach().isfinite()
        if bool(bad.any()):
            where = f", first in row {int(bad.reshape(bad.shape[0], -1).any(1).nonzero()[0])}" if tensor.dim() else ""
            raise InputError(
                f"{name} holds {int(bad.sum())} values that are NaN or infinite{where}. "
                "Find the step that made them: a learning rate too high, or a damaged file."
            )


def _sum(tensor: Tensor) -> float:
    if tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            return float(tensor.numpy().sum())  # torch would wake its threads for this, which costs more than the sum
    return float(tensor.sum())
