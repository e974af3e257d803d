"""The rows of Table 2: what each changes in the configuration of a head. Their controls: `controls`."""

from dataclasses import dataclass, replace
from typing import Literal

from hicode.avatar.config import ControlName
from hicode.training.stages import HeadConfig


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
