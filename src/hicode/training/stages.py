"""Stages and presets of the head's training: the paper's three stages, and how long each lasts.

| stage      | frames                          | deformation | adding and pruning |
|------------|---------------------------------|-------------|--------------------|
| initialise | those that points come from;    | off         | yes                |
|            | the paper's: the first only     |             |                    |
| deform     | all                             | on          | yes                |
| refine     | all                             | on          | no                 |
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from hicode.avatar.config import ControlName, DeformationConfig
from hicode.training.density import DensityConfig
from hicode.training.losses import LossWeights

Preset = Literal["draft", "standard", "paper"]
DEFAULT_PRESET: Preset = "draft"


@dataclass(frozen=True)
class Stage:
    """A stretch of iterations with the same rules."""

    name: str
    iterations: int
    frames: Literal["views", "all"]
    """the frames whose depth the points come from (`HeadConfig.views`), or all"""
    deform: bool
    density: bool


@dataclass(frozen=True)
class LearningRates:
    """Adam's step sizes at the start; positions and network fall by a cosine to 2 %, the rest to 10 %."""

    means: float = 6e-4
    """head units (dm) a step"""
    quats: float = 1e-3
    log_scales: float = 5e-3
    opacity_logits: float = 2e-2
    colors: float = 2.5e-3
    view_dependent_color: float = 2.5e-4
    """how each colour changes with the head's rotation (not in the paper), per unit of `Deformation.relative_rotation`; 0: it does not. Four times as much
    at 1,500 iterations learned KatieHill's training turns better and the others worse (docs/log.md); *standard*, longer, takes less, which was not tried otherwise"""
    network: float = 2e-3
    network_decay: float = 0.5
    """of the network's weights (not its biases) an iteration, times its step size (AdamW's); 0: the paper. Without it Radio2's lips were farther
    from their place after 8,000 iterations than after 1,500 (docs/log.md)"""
    pose: float = 5e-4
    """per-frame photometric refinement of the training poses (rad, dm); 0 turns it off"""


@dataclass(frozen=True)
class HeadConfig:
    """Training of Gaussians and deformation (Eqs 7-8, 15-16)."""

    stages: tuple[Stage, ...]
    gaussians: int = 30_000
    """points of the depth-based initialisation; density control may add to it"""
    initialisation: Literal["depth", "random"] = "depth"
    """points from depth, or (Table 2) anywhere in the head's bounding box, of any colour"""
    views: int = 5
    """most frames that points come from, each what it shows best; 1: the first training frame alone (the paper). Long hair and wide turns want them"""
    mouth_gaussians: int = 1_500
    """of them, points on teeth and tongue, which the first frame may not show"""
    initial_opacity: float = 0.5
    """0.1 as 3DGS costs a draft many of its iterations; measured in the training study"""
    rates: LearningRates = field(default_factory=LearningRates)
    deformation: DeformationConfig = field(default_factory=DeformationConfig)
    density: DensityConfig = field(default_factory=DensityConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    """λ's of Eq. 15; a weight of 0 costs nothing (the Wing term takes 70 ms a time)"""
    vgg_layers: Literal["cheap", "full"] = "cheap"
    """relu1_2 and relu2_2, or up to relu4_3"""
    vgg_every: int = 2
    """iterations between perceptual terms, each on one 128 px crop; its weight is not multiplied"""
    vgg_start: float = 0.3
    """fraction of the iterations after which the perceptual term begins"""
    wing_every: int = 10
    spread_every: int = 4
    """iterations between two depth distortion terms; the weight is multiplied by it"""
    seed: int = 0
    checkpoint_seconds: float = 60.0
    preload_bytes: int = 1_500_000_000
    """training frames and masks kept decoded in memory up to this; those beyond it are read as needed"""

    @property
    def iterations(self) -> int:
        return sum(s.iterations for s in self.stages)


@dataclass(frozen=True)
class Ablation:
    """A row of Table 2: what it changes of a head's configuration."""

    title: str
    """as the paper's table has it"""
    what: str
    control: ControlName = "hfec"
    rig: bool = False
    paper: bool = True
    """Whether Eqs 7-12 alone: learned attention, no colour terms, no clamp of expressions."""
    initialisation: Literal["depth", "random"] = "depth"

    def apply(self, config: HeadConfig) -> HeadConfig:
        """`config` with this row's control; budgets, losses and seed stay."""
        changed, rates = replace(config.deformation, control=self.control, rig=self.rig), config.rates
        if self.paper:
            changed = replace(
                changed, color_offset=False, attention="learned", attention_reaches=(), expression_reach=0.0
            )
            rates = replace(rates, view_dependent_color=0.0)
        return replace(config, deformation=changed, initialisation=self.initialisation, rates=rates)


# Table 2 in the paper's order, then ours. The paper's rows have no rig: it takes 3DMM and landmarks to every Gaussian by
# itself, so with it no row would be without either.
ABLATIONS: dict[str, Ablation] = {
    "without-3dmm": Ablation("w/o 3DMM", "landmarks alone: no second AdaIN", "landmarks"),
    "without-landmarks": Ablation(
        "w/o Landmarks", "the 3DMM vector alone: no landmark attention, no first AdaIN", "expression"
    ),
    "none": Ablation("None", "neither: the frame's speech features give the style of one AdaIN", "speech"),
    "addition": Ablation(
        "w/ Addition", "attended landmark values and an affine map of the 3DMM vector are added", "addition"
    ),
    "attention": Ablation(
        "w/ Attention", "cross-attention over the landmarks, then over 8 tokens of the 3DMM vector", "attention"
    ),
    "random-init": Ablation(
        "w/ Random Init.", "as full, from random points in the head's bounding box", initialisation="random"
    ),
    "without-hfec": Ablation(
        "w/o HFEC", "encodings of landmarks and 3DMM vector concatenated to each point's features", "concatenation"
    ),
    "full": Ablation("Ours (full)", "Eqs 9-12 with learned attention and a learned style in Eq. 12; no rig"),
    "literal": Ablation("Eq. 12 as printed", "as full; mean and deviation of the 3DMM vector are the style", "literal"),
    "rig": Ablation("Rig alone", "the mesh rig without a learned control; view-dependent colour", "none", True, False),
    "hfec": Ablation("HFEC alone", "Eqs 9-12 with static attention and colour terms; no rig", paper=False),
    "mesh": Ablation("hicode", "HFEC over the mesh rig, with colour terms: what ships", rig=True, paper=False),
}


def _stages(initialise: int, deform: int, refine: int) -> tuple[Stage, ...]:
    return (
        Stage("initialise", initialise, "views", deform=False, density=True),
        Stage("deform", deform, "all", deform=True, density=True),
        Stage("refine", refine, "all", deform=True, density=False),
    )


def head_preset(preset: Preset) -> HeadConfig:
    """draft: a first look in minutes. standard: within half an hour on two cores. paper: the paper's schedule and network, nothing of ours."""
    if preset == "draft":
        return HeadConfig(
            _stages(200, 300, 1_300),
            deformation=DeformationConfig(anchors=2048, attention_reaches=(0.05, 0.15)),
            vgg_every=4,
        )
    if preset == "standard":
        return HeadConfig(
            _stages(500, 1_000, 11_000),
            rates=LearningRates(view_dependent_color=6e-5),
            loss=LossWeights(wing=0.0005),
        )
    config = HeadConfig(
        _stages(3_000, 2_000, 15_000),
        deformation=DeformationConfig(
            anchors=0,
            rig=False,
            color_offset=False,
            position_frequencies=10,
            landmark_frequencies=10,
            attention="learned",
            attention_reaches=(),
            expression_reach=0.0,
            position_gradient=True,
        ),
        initial_opacity=0.1,
        views=1,
        mouth_gaussians=0,
        loss=LossWeights(wing=0.0005, depth_distortion=0.0),
        vgg_layers="full",
        vgg_every=1,
        vgg_start=0.0,
        wing_every=1,
    )
    return replace(config, rates=replace(config.rates, pose=0.0, view_dependent_color=0.0, network_decay=0.0))
