"""Density control: adding and pruning Gaussians, as functions over parameters and optimiser state (Kerbl et al. 2023; stages 1-2 of the paper).

n Gaussians before, k after. Every change is one `Plan`: which old row each new row comes from, and which rows start with fresh optimiser
moments. Whatever is kept per Gaussian (parameters, Adam's moments, bindings) is carried by the same plan, so they cannot come apart.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim import Optimizer

from hicode.geometry import rotation_from_quat


@dataclass(frozen=True)
class DensityConfig:
    """When and how the cloud grows and shrinks."""

    every: int = 100
    """iterations between two rounds"""
    start: int = 200
    """first iteration that may change the cloud: positional gradients mean little before"""
    grad_threshold: float = 2e-4
    """mean screen-space gradient (normalised device coordinates, as 3DGS) above which a Gaussian is cloned or split"""
    split_scale: float = 0.01
    """of the head's radius: larger Gaussians are split, smaller ones cloned"""
    prune_opacity: float = 0.005
    """Gaussians fainter than this go"""
    prune_scale: float = 0.2
    """of the head's radius: Gaussians larger than this go"""
    growth: float = 0.05
    """at most this fraction of the cloud is added a round"""
    budget: int = 45_000
    """never more Gaussians than this: the steepest gradients win the last places"""


@dataclass(frozen=True)
class Plan:
    """New rows as copies of old ones: `source[j]` is the old row of new row j; `fresh` rows lose their optimiser moments."""

    source: Int[Tensor, "k"]
    fresh: Bool[Tensor, "k"]
    cloned: int = 0
    split: int = 0
    pruned: int = 0

    @property
    def changes(self) -> bool:
        return self.cloned + self.split + self.pruned > 0


@dataclass
class GradientStatistics:
    """Running mean of each Gaussian's screen-space gradient norm over the renders that saw it."""

    total: Float[Tensor, "n"]
    count: Float[Tensor, "n"]

    @staticmethod
    def zeros(n: int, device: torch.device | str = "cpu") -> "GradientStatistics":
        return GradientStatistics(torch.zeros(n, device=device), torch.zeros(n, device=device))

    def add(self, grad_means2d: Float[Tensor, "n 2"], visible: Bool[Tensor, "n"], width: int, height: int) -> None:
        """`grad_means2d` in loss per px; stored in loss per normalised device coordinate, so that thresholds do not depend on resolution."""
        half_size = grad_means2d.new_tensor([width / 2, height / 2])
        self.total += (grad_means2d * half_size).norm(dim=1) * visible
        self.count += visible

    def mean(self) -> Float[Tensor, "n"]:
        return self.total / self.count.clamp_min(1)


def plan_density(
    params: dict[str, Tensor], statistics: GradientStatistics, config: DensityConfig, radius: float
) -> Plan:
    """Which Gaussians to clone (small, steep gradient), split (large, steep) and prune (faint or huge). Lengths against the head's radius."""
    n = len(params["means"])
    opacity = params["opacity_logits"].sigmoid()
    size = params["log_scales"].exp().amax(1)
    prune = (opacity < config.prune_opacity) | (size > config.prune_scale * radius)
    gradient = statistics.mean().masked_fill(prune, 0)

    room = config.budget - (n - int(prune.sum()))
    places = max(0, min(room, int(config.growth * n), int((gradient > config.grad_threshold).sum())))
    chosen = torch.zeros_like(prune)
    chosen[gradient.topk(places).indices] = True
    large = size > config.split_scale * radius
    split = chosen & large
    clone = chosen & ~large

    keep = torch.where(~prune & ~split)[0]
    halves = torch.where(split)[0]
    copies = torch.where(clone)[0]
    source = torch.cat([keep, copies, halves, halves])
    fresh = torch.ones_like(source, dtype=torch.bool)
    fresh[: len(keep)] = False
    return Plan(source, fresh, len(copies), len(halves), int(prune.sum()))


def apply_plan(
    plan: Plan, params: dict[str, Tensor], optimizer: Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    """New parameters by the plan; Adam's moments follow. Halves of a split are drawn from the parent's own Gaussian and shrunk by 1.6.

    `params` must be the optimiser's own tensors, one a group, each group named (`group["name"]`); the new ones take their places.
    """
    n_halves = 2 * plan.split
    new = {}
    for group in optimizer.param_groups:
        name = group.get("name")
        if name not in params:
            continue
        (old,) = group["params"]
        value = old.detach()[plan.source]
        if n_halves and name == "means":
            parents = plan.source[-n_halves:]
            rotation = rotation_from_quat(params["quats"].detach()[parents])
            spread = (
                torch.randn(n_halves, 3, generator=generator).to(value) * params["log_scales"].detach()[parents].exp()
            )
            value[-n_halves:] += (rotation @ spread[..., None]).squeeze(-1)
        if n_halves and name == "log_scales":
            value[-n_halves:] -= torch.log(torch.tensor(1.6))
        new[name] = torch.nn.Parameter(value)
        state = optimizer.state.pop(old, {})
        for key, moment in state.items():
            if torch.is_tensor(moment) and moment.shape == old.shape:
                moved = moment[plan.source]
                moved[plan.fresh] = 0
                state[key] = moved
        if state:
            optimizer.state[new[name]] = state
        group["params"] = [new[name]]
    return new
