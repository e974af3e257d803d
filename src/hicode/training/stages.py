"""Configuration of the head's training: the paper's three stages, the presets, and the ablations of Table 2.

| stage      | frames                              | deformation | adding and pruning |
|------------|-------------------------------------|-------------|--------------------|
| initialise | those that give the initial points  | off         | on                 |
| deform     | all                                 | on          | on                 |
| refine     | all                                 | on          | off                |
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from hicode.avatar.config import ControlName, DeformationConfig
from hicode.training.density import DensityConfig
from hicode.training.losses import LossWeights
from hicode.training.losses.perceptual import Depth

Preset = Literal["draft", "standard", "paper"]
DEFAULT_PRESET: Preset = "draft"


@dataclass(frozen=True)
class Stage:
    """Iterations with the same rules; the table above has the rules."""

    name: Literal["initialise", "deform", "refine"]
    iterations: int

    @property
    def deform(self) -> bool:
        """Whether the learned deformation is on, and all frames are used."""
        return self.name != "initialise"

    @property
    def density(self) -> bool:
        """Whether Gaussians are added and pruned."""
        return self.name != "refine"


@dataclass(frozen=True)
class LearningRates:
    """Adam's initial step sizes. Means and network decay by a cosine to 2 %, the rest to 10 %."""

    means: float = 6e-4
    """dm per step."""
    quats: float = 1e-3
    log_scales: float = 5e-3
    opacity_logits: float = 2e-2
    colors: float = 2.5e-3
    view_dependent_color: float = 2.5e-4
    """View-dependent colour (not in the paper). 0: colours do not depend on the view."""
    network: float = 2e-3
    network_decay: float = 0.5
    """Weight decay of the network's weights, not of its biases (AdamW). 0: as the paper. Without it, long training
    overfits the training frames."""
    pose: float = 5e-4
    """Photometric refinement of each training frame's head pose, rad and dm (not in the paper). 0: poses stay as
    tracked."""


@dataclass(frozen=True)
class HeadConfig:
    """Training of the Gaussians and their deformation (Eqs 7-8, 15-16)."""

    initialise: int = 400
    """Iterations of the first stage."""
    deform: int = 600
    """Iterations of the second stage."""
    refine: int = 3_000
    """Iterations of the third stage."""
    coarse: int = 0
    """Iterations at the start that see frames at half of their size. No perceptual term is computed there."""
    gaussians: int = 30_000
    """Initial number of Gaussians; density control may add more."""
    initialisation: Literal["depth", "random"] = "depth"
    """Points from depth maps, or random points of random colour in the head's bounding box (Table 2)."""
    init_frames: int = 5
    """Largest number of training frames that give initial points. 1: the first frame alone (the paper). More help with
    long hair and large head rotations."""
    mouth_gaussians: int = 1_500
    """How many of the Gaussians start on teeth and tongue, which the initial frames may not show."""
    initial_opacity: float = 0.5
    """0.1 as in 3DGS costs short trainings many iterations."""
    rates: LearningRates = field(default_factory=LearningRates)
    deformation: DeformationConfig = field(default_factory=DeformationConfig)
    density: DensityConfig = field(default_factory=DensityConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    vgg_layers: Depth = "cheap"
    """relu1_2 and relu2_2, or (full) up to relu4_3."""
    vgg_crop_px: int = 128
    """Side of that crop."""
    vgg_every: int = 2
    """Iterations between two perceptual terms, each on one crop. The weight is not multiplied by it."""
    vgg_start: float = 0.3
    """Fraction of the iterations before the first perceptual term."""
    wing_every: int = 10
    """Iterations between two Wing terms. The weight is not multiplied by it."""
    distortion_every: int = 4
    """Iterations between two depth distortion terms. The weight is multiplied by it."""
    seed: int = 0
    checkpoint_seconds: float = 60.0
    preload_bytes: int = 1_500_000_000
    """Memory for decoded training frames and masks. Frames beyond it are read from disk each time."""

    @property
    def stages(self) -> tuple[Stage, Stage, Stage]:
        """The three stages in order."""
        return Stage("initialise", self.initialise), Stage("deform", self.deform), Stage("refine", self.refine)

    @property
    def iterations(self) -> int:
        """Iterations of all stages."""
        return self.initialise + self.deform + self.refine

    def stage_at(self, iteration: int) -> tuple[Stage, int]:
        """The stage of an iteration, and the iteration's index within it."""
        for stage in self.stages:
            if iteration < stage.iterations:
                return stage, iteration
            iteration -= stage.iterations
        raise AssertionError(f"iteration beyond the last stage by {iteration}")

    def scaled(self, factor: float) -> "HeadConfig":
        """The same configuration with `factor` times the iterations, at least one per stage."""
        lengths = {stage.name: max(1, round(stage.iterations * factor)) for stage in self.stages}
        return replace(self, **lengths)


PRODUCT_NETWORK = DeformationConfig(anchors=2048, attention_reaches=(0.05, 0.15))
PAPER_NETWORK = DeformationConfig(
    anchors=0,
    rig=False,
    color_offset=False,
    position_frequencies=10,
    landmark_frequencies=10,
    attention="learned",
    attention_reaches=(),
    expression_reach=0.0,
    position_gradient=True,
)


def head_preset(preset: Preset) -> HeadConfig:
    """draft: a first result in minutes. standard: twice as long. paper: the paper's schedule, network and losses."""
    if preset == "draft":
        return HeadConfig(initialise=200, deform=300, refine=1_300, deformation=PRODUCT_NETWORK, vgg_every=4)
    if preset == "standard":
        return HeadConfig(deformation=PRODUCT_NETWORK, rates=LearningRates(view_dependent_color=1.2e-4))
    return HeadConfig(
        initialise=3_000,
        deform=2_000,
        refine=15_000,
        init_frames=1,
        mouth_gaussians=0,
        initial_opacity=0.1,
        rates=LearningRates(view_dependent_color=0.0, network_decay=0.0, pose=0.0),
        deformation=PAPER_NETWORK,
        loss=LossWeights(wing=0.0005, depth_distortion=0.0),
        vgg_layers="full",
        vgg_every=1,
        vgg_start=0.0,
        wing_every=1,
    )


@dataclass(frozen=True)
class Ablation:
    """A row of Table 2: what it changes in a head's configuration. Budget, losses and seed stay."""

    title: str
    """As printed in the paper's table."""
    what: str
    control: ControlName = "hfec"
    rig: bool = False
    """Above the mesh rig."""
    paper: bool = True
    """Eqs 7-12 alone: no colour terms, no clamp of expressions."""
    attention: Literal["nearness", "learned"] = "learned"
    initialisation: Literal["depth", "random"] = "depth"

    def apply(self, config: HeadConfig) -> HeadConfig:
        """`config` with this row's control."""
        network, rates = replace(config.deformation, control=self.control, rig=self.rig), config.rates
        if self.attention == "learned":
            network = replace(network, attention="learned", attention_reaches=())
        if self.paper:
            network = replace(network, color_offset=False, expression_reach=0.0)
            rates = replace(rates, view_dependent_color=0.0)
        return replace(config, deformation=network, initialisation=self.initialisation, rates=rates)


# The paper's rows in its order, then ours. The paper's rows have no rig: it moves every Gaussian by 3DMM and landmarks,
# so above it no row would be without either.
ABLATIONS: dict[str, Ablation] = {
    "without-3dmm": Ablation("w/o 3DMM", "landmarks alone: no second AdaIN", "landmarks"),
    "without-landmarks": Ablation(
        "w/o Landmarks", "3DMM parameters alone: no landmark attention, no first AdaIN", "expression"
    ),
    "none": Ablation("None", "speech features give the style of one AdaIN", "speech"),
    "addition": Ablation(
        "w/ Addition", "adds attended landmark values and an affine map of the 3DMM parameters", "addition"
    ),
    "attention": Ablation(
        "w/ Attention", "cross-attention to the landmarks, then to 8 tokens of the 3DMM parameters", "attention"
    ),
    "random-init": Ablation(
        "w/ Random Init.", "as full, from random points in the head's bounding box", initialisation="random"
    ),
    "without-hfec": Ablation(
        "w/o HFEC", "encodings of landmarks and 3DMM parameters, concatenated to each point's features", "concatenation"
    ),
    "full": Ablation("Ours (full)", "Eqs 9-12 with learned attention and a learned style in Eq. 12; no rig"),
    "literal": Ablation(
        "Eq. 12 as printed", "as full; mean and deviation of the 3DMM parameters are the style", "literal"
    ),
    "rig": Ablation(
        "rig alone", "mesh rig without a learned control; view-dependent colour", "none", True, False, "nearness"
    ),
    "hfec": Ablation(
        "HFEC alone", "Eqs 9-12 with static attention and colour terms; no rig", paper=False, attention="nearness"
    ),
    "learned-attention": Ablation(
        "rig + HFEC, learned attention", "the paper's attention above the rig, with colour terms", rig=True, paper=False
    ),
    "mesh": Ablation(
        "rig + HFEC", "static attention above the rig, with colour terms: the product", "hfec", True, False, "nearness"
    ),
}
