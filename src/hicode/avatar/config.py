"""Settings of the deformation. Lengths are head units: 1 unit = 10 cm."""

from dataclasses import dataclass
from typing import Literal

ControlName = Literal[
    "hfec", "literal", "landmarks", "expression", "speech", "addition", "attention", "concatenation", "none"
]


@dataclass(frozen=True)
class DeformationConfig:
    """How the canonical Gaussians move."""

    control: ControlName = "hfec"
    """The learned control: Eqs 9-12, a row of Table 2 (in a clone: `research.reproduce.controls`), or none."""
    rig: bool = True
    """Whether Gaussians also ride on the 3DMM's mesh and on the landmarks (`hicode.avatar.rig`). Off: the paper."""
    channels: int = 64  # c: channels of the features that attention and AdaIN work on.
    hidden: int = 64  # Width of the small MLPs.
    position_frequencies: int = 5
    """Octaves of the sinusoidal embedding of Gaussian positions; the paper's base uses 10. Ten let neighbours 1 mm
    apart move independently, and lips of unseen frames lie 10 % farther off."""
    landmark_frequencies: int = 2
    """Octaves of the sinusoidal embedding of landmarks; the paper: 10. The finest of ten resolves .1 mm: noise."""
    anchors: int = 4096  # Points on which the control is evaluated before interpolation. 0: every Gaussian (the paper).
    speech_dim: int = 768  # Width of a frame's speech features; read by the control "speech" only.
    color_offset: bool = True
    """Whether the control also shifts colours (not in Eq. 7): a mouth darkens as it opens. Off: the paper."""
    attention: Literal["nearness", "learned"] = "nearness"
    """By distance to the mean landmarks (a fixed softmax), or learned: query-key attention, as the paper."""
    attention_reaches: tuple[float, ...] = (0.15,)
    """Standard deviations of the nearness kernel exp(-d² / 2 reach²). With "nearness" each serves an equal share of the
    channels. "learned" attention takes one, as a bias of its scores, or none (the paper)."""
    expression_reach: float = 1.5
    """Soft clamp of each PCA coefficient of the expression, in deviations of the training clip. 0: none (the paper).
    A short clip shows few mixtures of the 64 parameters; beyond them an affine style extrapolates."""
    max_offset: float = 0.1  # Δl per unit of network output, so that the output layer learns at the pace of the others.
    position_gradient: bool = False
    """Whether the loss reaches canonical positions through their query too. On: the paper. Only without anchors."""
