"""The refiner: a light U-Net that corrects the plain composite (HiCoDe, Eqs 17-18). Preset *paper* trains it.

It sees [rgb, alpha, frame with the hidden region zeroed, fill, weight]; fill and the two masks are additions to the
paper's pair of images. Its last layer starts at zero: untrained, it changes nothing.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from hicode.avatar.blend import INPUT_CHANNELS, STRIDE


@dataclass(frozen=True)
class CompositorConfig:
    """The generator's size."""

    filters: int = 16  # channels at half resolution; they double at each of three further levels


class Compositor(nn.Module):
    """The generator of Eq. 18: a U-Net with additive skips and no normalisation, so a crop's result is the whole's.

    Additive rather than concatenated skips: half the cost at full width.
    """

    def __init__(self, config: CompositorConfig = CompositorConfig()):
        super().__init__()
        self.config = config
        c = config.filters
        self.down0 = nn.Conv2d(INPUT_CHANNELS, c, 4, 2, 1)
        self.down1 = nn.Conv2d(c, 2 * c, 4, 2, 1)
        self.down2 = nn.Conv2d(2 * c, 4 * c, 4, 2, 1)
        self.down3 = nn.Conv2d(4 * c, 8 * c, 4, 2, 1)
        self.bottom = nn.Conv2d(8 * c, 8 * c, 3, 1, 1)
        self.lift2, self.up2 = nn.Conv2d(8 * c, 4 * c, 1), nn.Conv2d(4 * c, 4 * c, 3, 1, 1)
        self.lift1, self.up1 = nn.Conv2d(4 * c, 2 * c, 1), nn.Conv2d(2 * c, 2 * c, 3, 1, 1)
        self.lift0, self.up0 = nn.Conv2d(2 * c, c, 1), nn.Conv2d(c, c, 3, 1, 1)
        self.out = nn.Conv2d(c, 12, 3, 1, 1)  # four sub-pixels of RGB
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, a=0.2)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Float[Tensor, "b 11 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The residual to add to the plain composite; any height and width."""
        h, w = x.shape[-2:]
        x = F.pad(x, (0, -w % STRIDE, 0, -h % STRIDE))
        e0 = _leaky(self.down0(x))
        e1 = _leaky(self.down1(e0))
        e2 = _leaky(self.down2(e1))
        e3 = _leaky(self.down3(e2))
        d = e3 + _leaky(self.bottom(e3))
        d = _leaky(self.up2(_enlarged(self.lift2(d)) + e2))
        d = _leaky(self.up1(_enlarged(self.lift1(d)) + e1))
        d = _leaky(self.up0(_enlarged(self.lift0(d)) + e0))
        return F.pixel_shuffle(self.out(d), 2)[..., :h, :w]

    @torch.inference_mode()
    def residual(self, layers: Float32[np.ndarray, "h w 11"]) -> Float32[np.ndarray, "h w 3"]:
        """Of one image (`PlainComposite.layers`)."""
        x = torch.from_numpy(layers).permute(2, 0, 1)[None].to(next(self.parameters()).device)
        return np.ascontiguousarray(self(x)[0].permute(1, 2, 0).cpu().numpy())

    def for_inference(self) -> "Compositor":
        """Frozen, channels last (a quarter faster on the CPU)."""
        self.eval().requires_grad_(False)
        return self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (torch's stub lacks it)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON-able config), the inverse of `from_state`."""
        return {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, asdict(self.config)

    @staticmethod
    def from_state(tensors: dict[str, Tensor], config: dict) -> "Compositor":
        """The inverse of `state`."""
        compositor = Compositor(CompositorConfig(**config))
        compositor.load_state_dict(tensors)
        return compositor.for_inference()


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)
