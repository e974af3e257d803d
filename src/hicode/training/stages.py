"""Stages and presets of the head's training: the paper's three stages, and how long each lasts.

| stage      | frames         | deformation | adding and pruning |
|------------|----------------|-------------|--------------------|
| initialise | the first only | off         | yes                |
| deform     | all            | on          | yes                |
| refine     | all            | on          | no                 |
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from hicode.avatar.deformation import DeformationConfig
from hicode.training.density import DensityConfig
from hicode.training.losses import LossWeights

Preset = Literal["draft", "standard", "paper"]


@dataclass(frozen=True)
class Stage:
    """A stretch of iterations with the same rules."""

    name: str
    iterations: int
    frames: Literal["first", "all"]
    deform: bool
    density: bool


@dataclass(frozen=True)
class LearningRates:
    """Adam's step sizes at the start; positions and network fall by a cosine to 2 %, the rest to 10 %."""

    means: float = 3e-4
    """head units (dm) a step"""
    quats: float = 1e-3
    log_scales: float = 5e-3
    opacity_logits: float = 2e-2
    colors: float = 2.5e-3
    network: float = 2e-3
    pose: float = 5e-4
    """per-frame photometric refinement of the training poses (rad, dm); 0 turns it off"""


@dataclass(frozen=True)
class HeadConfig:
    """Training of Gaussians and deformation (Eqs 7-8, 15-16)."""

    stages: tuple[Stage, ...]
    gaussians: int = 30_000
    """points of the depth-based initialisation; density control may add to it"""
    mouth_gaussians: int = 1_500
    """of them, points on teeth and tongue, which the first frame may not show"""
    initial_opacity: float = 0.5
    """0.1 as 3DGS costs a draft many of its iterations; measured in the training study"""
    rates: LearningRates = field(default_factory=LearningRates)
    deformation: DeformationConfig = field(default_factory=DeformationConfig)
    density: DensityConfig = field(default_factory=DensityConfig)
    loss: LossWeights = field(default_factory=lambda: LossWeights(wing=0.0))
    """λ's of Eq. 15; a weight of 0 costs nothing (the Wing term takes 70 ms a time)"""
    vgg_layers: Literal["cheap", "full"] = "cheap"
    """relu1_2 and relu2_2, or up to relu4_3"""
    vgg_every: int = 2
    """iterations between perceptual terms, each on one 128 px crop; its weight is not multiplied"""
    vgg_start: float = 0.3
    """fraction of the iterations after which the perceptual term begins"""
    wing_every: int = 10
    validation_frames: int = 6
    """last frames of the training part that the head does not learn from: the compositor is judged on them"""
    seed: int = 0
    checkpoint_seconds: float = 60.0
    preload_bytes: int = 1_500_000_000
    """training frames and masks kept decoded in memory up to this; those beyond it are read as needed"""

    @property
    def iterations(self) -> int:
        return sum(s.iterations for s in self.stages)


def _stages(initialise: int, deform: int, refine: int) -> tuple[Stage, ...]:
    return (
        Stage("initialise", initialise, "first", deform=False, density=True),
        Stage("deform", deform, "all", deform=True, density=True),
        Stage("refine", refine, "all", deform=True, density=False),
    )


def head_preset(preset: Preset) -> HeadConfig:
    """draft: a first look in minutes. standard: within half an hour on two cores. paper: the paper's schedule and network, nothing of ours."""
    if preset == "draft":
        return HeadConfig(_stages(200, 300, 1_700), deformation=DeformationConfig(anchors=2048), vgg_every=4)
    if preset == "standard":
        return HeadConfig(_stages(500, 1_000, 6_500), loss=LossWeights())
    config = HeadConfig(
        _stages(3_000, 2_000, 15_000),
        deformation=DeformationConfig(anchors=0, base="none"),
        initial_opacity=0.1,
        mouth_gaussians=0,
        loss=LossWeights(),
        vgg_layers="full",
        vgg_every=1,
        vgg_start=0.0,
        wing_every=1,
    )
    return replace(config, rates=replace(config.rates, pose=0.0))
