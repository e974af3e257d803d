"""The perceptual part of the head's loss, L_VGG (Eq. 16), and the crops that it is computed on.

Images are "h w 3" in [0, 1]. A box is (x0, y0, x1, y1) in px, the end exclusive.
"""

from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hicode.perceptual import LPIPS_LAYERS, Features
from hicode.training.losses.photometric import Box

Depth = Literal["cheap", "full"]


@cache
def fast_dtype() -> torch.dtype:
    """bfloat16 if this CPU multiplies it faster, else float32.

    AMX tiles are 2-6 times as fast as float32, AMD's AVX-512 vectors 1.7 times. Without them bfloat16 is slower, on
    Intel's AVX-512 too (1.4 times float32's time).
    """
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    fast = "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in flags)
    return torch.bfloat16 if fast else torch.float32


class PerceptualLoss:
    """L_VGG (Eq. 16): mean absolute difference of VGG16 features, summed over layers.

    The paper says "first four layers". `depth` "full" reads this as the four blocks up to relu4_3; "cheap" takes
    relu1_2 and relu2_2, at a third to a quarter of the cost.
    """

    def __init__(self, depth: Depth = "cheap", dtype: torch.dtype | None = None, device: torch.device | str = "cpu"):
        layers = LPIPS_LAYERS["vgg16"][: {"cheap": 2, "full": 4}[depth]]
        on_cpu = torch.device(device).type == "cpu"
        self.dtype = dtype or (fast_dtype() if on_cpu else torch.bfloat16)
        self.features = Features("vgg16", layers, dtype=self.dtype).to(device)

    def __call__(
        self, rendered: Float[Tensor, "h w 3"], target: Float[Tensor, "h w 3"], box: Box | None = None
    ) -> Float[Tensor, ""]:
        """The loss on one box (default: the whole image). The gradient goes to `rendered` alone."""
        if box is not None:
            x0, y0, x1, y1 = box
            rendered, target = rendered[y0:y1, x0:x1], target[y0:y1, x0:x1]
        with torch.no_grad():
            expected = self.features(target.permute(2, 0, 1)[None])
        actual = self.features(rendered.permute(2, 0, 1)[None])
        return torch.stack([_MeanAbsolute.apply(a, b) for a, b in zip(actual, expected, strict=True)]).sum()


class _MeanAbsolute(torch.autograd.Function):
    """mean |a - b| in float32. The gradient has a's layout: torch's own is NCHW, and all that follows it is slow."""

    @staticmethod
    def forward(ctx, a, b):
        difference = a.float() - b.float()
        mean = difference.abs().mean()
        ctx.gradient = difference.sign_().div_(difference.numel()).to(a.dtype)  # in place: fresh pages cost as much
        return mean

    @staticmethod
    def backward(ctx, d_mean):
        return ctx.gradient * d_mean.to(ctx.gradient.dtype), None


def crop_around(center: tuple[float, float], size: int, height: int, width: int) -> Box:
    """A square of `size` px around (x, y), moved inside the image; smaller if the image is smaller."""
    w, h = min(size, width), min(size, height)
    x0 = min(max(round(center[0] - w / 2), 0), width - w)
    y0 = min(max(round(center[1] - h / 2), 0), height - h)
    return x0, y0, x0 + w, y0 + h


def random_crop(mask: Shaped[np.ndarray, "h w"], size: int, generator: torch.Generator) -> Box:
    """A square around a random pixel of a mask (above one half; uint8 or float in [0, 1]).

    Takes the middle of the image if the mask is empty.
    """
    height, width = mask.shape
    rows, columns = np.nonzero(mask[::8, ::8] > (127 if mask.dtype == np.uint8 else 0.5))
    if len(rows) == 0:
        rows, columns = np.array([height // 16]), np.array([width // 16])
    pick = int(torch.randint(len(rows), (), generator=generator))
    return crop_around((columns[pick] * 8 + 4.0, rows[pick] * 8 + 4.0), size, height, width)
