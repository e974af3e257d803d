"""Configuration of the head's training: the paper's three stages and the presets.

| stage      | frames                              | deformation | adding and pruning |
|------------|-------------------------------------|-------------|--------------------|
| initialise | those that give the initial points  | off         | on                 |
| deform     | all                                 | on          | on                 |
| refine     | all                                 | on          | off                |
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from hicode.avatar.config import DeformationConfig
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

    means: float = 6e-4  # dm per step.
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

    initialise: int = 400  # Iterations of the first stage.
    deform: int = 600  # Iterations of the second stage.
    refine: int = 3_000  # Iterations of the third stage.
    gaussians: int = 30_000  # Initial number of Gaussians; density control may add more.
    initialisation: Literal["depth", "random"] = "depth"
    """Points from depth maps, or random points of random colour in the head's bounding box (Table 2)."""
    init_frames: int = 5
    """Largest number of training frames that give initial points. 1: the first frame alone (the paper). More help with
    long hair and large head rotations."""
    mouth_gaussians: int = 1_500
    """How many of the Gaussians start on teeth and tongue, which the initial frames may not show."""
    initial_opacity: float = 0.5  # 0.1 as in 3DGS costs short trainings many iterations.
    rates: LearningRates = field(default_factory=LearningRates)
    deformation: DeformationConfig = field(default_factory=DeformationConfig)
    density: DensityConfig = field(default_factory=DensityConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    vgg_layers: Depth = "cheap"  # relu1_2 and relu2_2, or (full) up to relu4_3.
    vgg_crop_px: int = 128  # Side of that crop.
    vgg_every: int = 2
    """One in so many iterations has a perceptual term, on one crop. The weight is not multiplied by it."""
    vgg_start: float = 0.3  # Fraction of the iterations before the first perceptual term.
    wing_every: int = 10  # One in so many iterations has a Wing term. The weight is not multiplied by it.
    distortion_every: int = 8  # One in so many iterations has a depth distortion term. The weight is multiplied by it.
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
