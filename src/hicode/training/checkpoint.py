"""The state of the head's training, and its checkpoint file.

n Gaussians, t training frames.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from hicode.avatar.deformation import Deformation
from hicode.files import load_tensors, save_tensors
from hicode.gaussians import Gaussians
from hicode.geometry import rigid, rotation_from_axis_angle
from hicode.preparation.clip import Clip
from hicode.tracking.head_model import HeadModel
from hicode.training.density import GradientStatistics
from hicode.training.initialisation import initial_head
from hicode.training.stages import HeadConfig

SCHEMA, VERSION = "hicode-head-checkpoint", 4
BETAS = 0.7, 0.9  # of the pose refinement: a frame is seen some hundred times at most


@dataclass(eq=False)
class PoseRefinement:
    """Photometric refinement of the head pose of each training frame (not in the paper).

    delta  "t 6"  axis-angle (rad) and translation (dm) in the head frame, applied before the tracked pose
    first, second "t 6", visits "t"  Adam's moments and step counts. A dense optimiser would move all rows each step.
    """

    delta: Float[Tensor, "t 6"]
    first: Float[Tensor, "t 6"]
    second: Float[Tensor, "t 6"]
    visits: Float[Tensor, "t"]

    @staticmethod
    def zeros(frames: int) -> "PoseRefinement":
        """All poses as tracked."""
        zeros = (torch.zeros(frames, 6) for _ in range(3))
        return PoseRefinement(*zeros, visits=torch.zeros(frames))

    def apply(self, k: int, T_camera_head: Float[Tensor, "4 4"]) -> Float[Tensor, "4 4"]:
        """The tracked pose of the k-th training frame, refined."""
        return _refined(T_camera_head, self.delta[k])

    def step(self, k: int, T_camera_head: Float[Tensor, "4 4"], grad: Float[Tensor, "4 4"], rate: float) -> None:
        """An Adam step of row k, from the loss's gradient by the refined pose."""
        delta = self.delta[k].clone().requires_grad_(True)
        _refined(T_camera_head, delta).backward(grad)
        assert delta.grad is not None
        self.visits[k] += 1
        first, second, count = self.first[k], self.second[k], float(self.visits[k])
        first.mul_(BETAS[0]).add_(delta.grad, alpha=1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(delta.grad, delta.grad, value=1 - BETAS[1])
        scale = (second / (1 - BETAS[1] ** count)).sqrt() + 1e-12
        self.delta[k] -= rate * (first / (1 - BETAS[0] ** count)) / scale


def _refined(T_camera_head: Float[Tensor, "4 4"], delta: Float[Tensor, "6"]) -> Float[Tensor, "4 4"]:
    return T_camera_head @ rigid(rotation_from_axis_angle(delta[:3]), delta[3:])


@dataclass(eq=False)
class HeadState:
    """All that training changes. The pose refinement is on the CPU; the rest is on `device`."""

    params: dict[str, torch.nn.Parameter]
    deformation: Deformation
    optimizer: torch.optim.Optimizer
    pose: PoseRefinement
    statistics: GradientStatistics
    iteration: int = 0

    @staticmethod
    def start(clip: Clip, model: HeadModel, config: HeadConfig, device: torch.device | str = "cpu") -> "HeadState":
        """The state before the first iteration."""
        cloud, deformation = initial_head(clip, model, config)
        deformation = deformation.to(device)
        if config.rates.view_dependent_color:
            cloud = replace(cloud, view_dependent_color=torch.zeros(len(cloud), 3, 3))
        params = {k: torch.nn.Parameter(v.to(device)) for k, v in cloud.tensors().items()}
        optimizer = head_optimizer(params, deformation, config)
        statistics = GradientStatistics.zeros(len(cloud), device)
        return HeadState(params, deformation, optimizer, PoseRefinement.zeros(len(clip.train)), statistics)

    def gaussians(self) -> Gaussians:
        """The canonical Gaussians; gradients flow to `params`."""
        return Gaussians(**self.params)

    def learned(self) -> dict[str, Tensor]:
        """Every tensor that the optimiser changes, by name."""
        return {**self.params, **dict(self.deformation.named_parameters())}

    @property
    def device(self) -> torch.device:
        """Where Gaussians and network are."""
        return self.params["means"].device

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically."""
        tensors: dict[str, Tensor] = {f"params.{k}": v for k, v in self.params.items()}
        deformation, config = self.deformation.state()
        tensors |= {f"deformation.{k}": v for k, v in deformation.items()}
        tensors |= {f"pose.{k}": v for k, v in vars(self.pose).items()}
        tensors |= {f"statistics.{k}": v for k, v in vars(self.statistics).items()}
        tensors |= optimizer_tensors(self.optimizer, "optimizer")
        save_tensors(path, tensors, SCHEMA, VERSION, {"iteration": self.iteration, "deformation": config})

    def load(self, path: Path, config: HeadConfig) -> None:
        """Read a checkpoint into a fresh state of the same configuration. Raises FileFormatError."""
        tensors, header = load_tensors(path, SCHEMA, VERSION)
        self.pose = PoseRefinement(**_part(tensors, "pose."))
        tensors = {k: v.to(self.device) for k, v in tensors.items()}
        # The order of `params` is that of the optimiser's groups, by which its moments are stored.
        self.params = {k: torch.nn.Parameter(tensors[f"params.{k}"]) for k in self.params}
        deformation = Deformation.from_state(_part(tensors, "deformation."), header["deformation"])
        self.deformation = deformation.to(self.device)
        self.optimizer = head_optimizer(self.params, self.deformation, config)
        load_optimizer(self.optimizer, tensors, "optimizer")
        self.statistics = GradientStatistics(**_part(tensors, "statistics."))
        self.iteration = header["iteration"]


def head_optimizer(
    params: dict[str, torch.nn.Parameter], deformation: Deformation, config: HeadConfig
) -> torch.optim.Adam:
    """Adam with one named group per tensor of the Gaussians, and two for the network (weights decay, biases do not)."""
    rates = config.rates
    groups: list[dict] = [{"params": [p], "name": k, "lr": getattr(rates, k)} for k, p in params.items()]
    network = list(deformation.parameters())
    decay = {"weight_decay": rates.network_decay, "decoupled_weight_decay": True}
    groups.append({"params": [p for p in network if p.ndim > 1], "name": "network", "lr": rates.network, **decay})
    groups.append({"params": [p for p in network if p.ndim <= 1], "name": "network", "lr": rates.network})
    return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimiser's moments, named by group, index in the group, and moment."""
    tensors = {}
    for g, group in enumerate(optimizer.param_groups):
        for p, parameter in enumerate(group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{prefix}.{g}.{p}.{key}"] = value
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Inverse of `optimizer_tensors`, into an optimiser with the same groups."""
    for g, group in enumerate(optimizer.param_groups):
        for p, parameter in enumerate(group["params"]):
            if moments := _part(tensors, f"{prefix}.{g}.{p}."):
                optimizer.state[parameter] = moments


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
