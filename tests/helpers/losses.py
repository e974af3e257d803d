"""Image pairs and a landmark network whose result is known, for the tests of losses."""

import torch


def images(h, w, seed=0, noise=0.2):
    """A smooth pair, planar in memory as the rasteriser returns it, with areas that agree exactly."""
    g = torch.Generator().manual_seed(seed)
    target = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 6, generator=g), (h, w), mode="bicubic").clamp(0, 1)[0]
    rendered = (target + noise * torch.randn(3, h, w, generator=g)).clamp(-0.2, 1.2)
    rendered[:, : h // 4] = target[:, : h // 4]
    return rendered.permute(1, 2, 0), target.permute(1, 2, 0)


class BrightnessLandmarker:
    """478 points that follow the image's mean brightness, in place of `FaceLandmarker`."""

    def __init__(self, presence=1.0):
        self.presence = presence

    def requires_grad_(self, _):
        return self

    def to(self, _):
        return self

    def landmarks(self, images, rois):
        assert rois.shape == (1, 4)
        level = images.mean()
        return (100 + 10 * level).expand(1, 478, 3), torch.full((1,), self.presence)
