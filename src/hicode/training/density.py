"""Density control: adding and pruning Gaussians (Kerbl et al. 2023; stages 1-2 of the paper).

Functions over parameters and optimiser state; n Gaussians before, k after. Every change is one `Plan`: the old row that
each new row copies, and which rows start with zero optimiser moments. Parameters, Adam's moments and bindings all
follow the same plan, so they stay consistent.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim import Optimizer

from hicode.geometry import rotation_from_quat


@dataclass(frozen=True)
class DensityConfig:
    """When and how the number of Gaussians changes."""

    every: int = 100  # Iterations between two rounds.
    start: int = 200  # First iteration that may change the cloud. Gradients of positions are unreliable before.
    grad_threshold: float = 2e-4
    """Mean screen-space gradient (normalised device coordinates, as 3DGS) above which a Gaussian is cloned or split."""
    split_scale: float = 0.01  # Fraction of the head's radius. Larger Gaussians are split, smaller ones cloned.
    prune_opacity: float = 0.005  # Gaussians of lower opacity are removed.
    prune_scale: float = 0.2  # Fraction of the head's radius. Larger Gaussians are removed.
    growth: float = 0.05  # Largest fraction of the cloud that a round adds.
    budget: int = 45_000  # Largest number of Gaussians. If places are short, the largest gradients get them.


@dataclass(frozen=True, eq=False)
class Plan:
    """New rows as copies of old ones: row j copies old row `source[j]`; `fresh` rows get zero optimiser moments."""

    source: Int[Tensor, "k"]
    fresh: Bool[Tensor, "k"]
    cloned: int = 0
    split: int = 0
    pruned: int = 0

    @property
    def changes(self) -> bool:
        """Whether the plan adds or removes any Gaussian."""
        return self.cloned + self.split + self.pruned > 0


@dataclass(eq=False)
class GradientStatistics:
    """Mean screen-space gradient norm of each Gaussian, over the renderings in which it is visible."""

    total: Float[Tensor, "n"]
    count: Float[Tensor, "n"]

    @staticmethod
    def zeros(n: int, device: torch.device | str = "cpu") -> "GradientStatistics":
        """No renderings yet."""
        return GradientStatistics(torch.zeros(n, device=device), torch.zeros(n, device=device))

    def add(self, grad_means2d: Float[Tensor, "n 2"], visible: Bool[Tensor, "n"], width: int, height: int) -> None:
        """Add one rendering. `grad_means2d` is per px; stored per normalised device coordinate, as in 3DGS."""
        half_size = grad_means2d.new_tensor([width / 2, height / 2])
        self.total += (grad_means2d * half_size).norm(dim=1) * visible
        self.count += visible

    def mean(self) -> Float[Tensor, "n"]:
        """0 for a Gaussian that was never visible."""
        return self.total / self.count.clamp_min(1)


def plan_density(
    params: Mapping[str, Tensor], statistics: GradientStatistics, config: DensityConfig, radius: float
) -> Plan:
    """Clone small Gaussians with a large gradient, split large ones, prune transparent and huge ones.

    `radius` is the head's; the lengths of `config` are fractions of it.
    """
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
    plan: Plan, params: Mapping[str, Tensor], optimizer: Optimizer, generator: torch.Generator
) -> dict[str, torch.nn.Parameter]:
    """New parameters by the plan; the optimiser's groups and moments are replaced in place.

    The two halves of a split are drawn from the parent's Gaussian, and are smaller by 1.6. `params` must be the
    optimiser's tensors, one per group, each group named (`group["name"]`).
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
            scales = params["log_scales"].detach()[parents].exp()
            offset = torch.randn(n_halves, 3, generator=generator).to(value) * scales
            value[-n_halves:] += (rotation @ offset[..., None]).squeeze(-1)
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
