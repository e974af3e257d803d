"""A small head model and deformations of a few hundred Gaussians."""

import torch

from hicode.avatar.deformation import (
    Carrier,
    Deformation,
    DeformationConfig,
)

G = lambda seed=0: torch.Generator().manual_seed(seed)


SMALL = dict(channels=8, hidden=16, position_frequencies=3, landmark_frequencies=3)


def a_head(n=300, seed=0):
    points = torch.randn(n, 3, generator=G(seed))
    return points / points.norm(dim=1, keepdim=True)


def a_deformation(trained=True, **options):
    config = DeformationConfig(**(SMALL | {"anchors": 0} | options))
    carrier = None
    if config.base == "mesh":
        carrier = Carrier(*(torch.randn(*s, generator=G(5)) * 0.02 for s in ((64, 12, 3), (478, 3), (64, 478, 3))))
    torch.manual_seed(0)
    deformation = Deformation(config, torch.randn(80, generator=G(1)), torch.zeros(3), 1.0, carrier)
    if trained:
        torch.nn.init.normal_(deformation.control.head[-1].weight, std=0.3, generator=G(2))
    return deformation


def signals(seed=3):
    return torch.randn(64, generator=G(seed)), torch.randn(478, 3, generator=G(seed + 1)) * 0.5
