"""Losses of the head's training (Eqs 15-16): the weighted sum, its weights, and the check for NaN.

A rendering I and its target are "h w 3" in [0, 1], both over the same background colour.

    L = w_l1 L1 + w_ssim (1 - SSIM) + w_vgg L_vgg + w_wing L_wing + w_dist L_dist

`photometric` has L1 and SSIM, `perceptual` L_vgg, `landmark` L_wing, `depth` L_dist (not in the paper).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hicode.errors import InputError, TrainingError
from hicode.training.losses.depth import depth_distortion
from hicode.training.losses.landmark import WingLandmarks
from hicode.training.losses.perceptual import Depth, PerceptualLoss, crop_around, fast_dtype, random_crop
from hicode.training.losses.photometric import Box, mouth_weight, photometric

__all__ = [
    "Box",
    "HeadLoss",
    "LossWeights",
    "PerceptualLoss",
    "WingLandmarks",
    "check_finite",
    "check_gradients",
    "crop_around",
    "depth_distortion",
    "fast_dtype",
    "mouth_weight",
    "photometric",
    "random_crop",
]


@dataclass(frozen=True)
class LossWeights:
    """The weights of Eqs 15-16; the paper gives no values. A term of weight 0 costs no time."""

    l1: float = 0.8  # Mean absolute error over the image; as 3DGS.
    ssim: float = 0.2  # 1 - SSIM over the image; as 3DGS.
    mouth: float = 0.4  # Mean absolute error over the mouth box, as a multiple of `l1`.
    vgg: float = 0.03  # Difference of VGG16 features on a crop; sharpens.
    wing: float = 0.0
    """Wing loss of the 478 landmarks, px. Errors of 1 px give about 8, so 0.0005 is 0.004, next to an L1 of 0.02. Takes
    70 ms each time."""
    depth_distortion: float = 3.0
    """Variance of depth along the rays, dm²; not in the paper. Without it, skin that training frames show at a grazing
    angle looks mottled when the head turns further."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise InputError(f"The loss weight {name} is {value}. Give a number of 0 or more.")


class HeadLoss:
    """Eq. 15 but for the depth distortion: loads the networks that the weights need, and sums the terms."""

    def __init__(self, weights: LossWeights, vgg: Depth = "cheap", device: torch.device | str = "cpu"):
        self.weights = weights
        self.perceptual = PerceptualLoss(vgg, device=device) if weights.vgg else None
        self.landmarks = None
        if weights.wing:
            from hicode.tracking.landmarks import FaceLandmarker

            self.landmarks = WingLandmarks(FaceLandmarker().requires_grad_(False).to(device))

    def __call__(
        self,
        rendered: Float[Tensor, "h w 3"],
        target: Float[Tensor, "h w 3"],
        mouth_box: Box | None = None,
        vgg_box: Box | None = None,
        landmarks_px: Float[Tensor, "478 2"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The weighted sum; and its terms (l1, ssim, vgg, wing) before weighting, without gradient.

        mouth_box     where the L1 term is weighted by `LossWeights.mouth`
        vgg_box       the crop for L_VGG; None: not computed
        landmarks_px  the target's, which set the region of L_WING; None: not computed
        """
        w, (height, width, _) = self.weights, rendered.shape
        weight = None
        if mouth_box is not None and w.mouth > 0:
            weight = mouth_weight(height, width, mouth_box, w.mouth).to(rendered.device)
        scale = w.l1 + w.ssim
        loss, terms = photometric(rendered, target, weight, w.ssim / scale if scale > 0 else 0.0)
        loss = scale * loss
        if self.perceptual is not None and vgg_box is not None:
            term = self.perceptual(rendered, target, vgg_box)
            loss, terms["vgg"] = loss + w.vgg * term, term.detach()
        if self.landmarks is not None and landmarks_px is not None:
            term = self.landmarks(rendered, target, landmarks_px)
            loss, terms["wing"] = loss + w.wing * term, term.detach()
        return loss, terms


def check_finite(step: int, terms: Mapping[str, Tensor], tensors: Mapping[str, Tensor], of: str = "Step") -> None:
    """Raise TrainingError if a loss term is not finite; names the step, the term, and the tensors that are not finite.

    The tensors are searched only if a term is bad, their gradients too. `of` names the loop, e.g. "Speech step".
    """
    bad = [name for name, value in terms.items() if not bool(torch.isfinite(value).all())]
    if not bad:
        return
    broken = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    for name, value in tensors.items():
        if value.grad is not None and not bool(torch.isfinite(value.grad).all()):
            broken.append(f"gradient of {name}")
    where = "every parameter is finite"
    if broken:
        where = f"not finite: {', '.join(broken[:4])}{' …' if len(broken) > 4 else ''}"
    raise TrainingError(
        f"{of} {step}: loss term {bad[0]!r} is {float(terms[bad[0]].detach().flatten()[0]):g} ({where}). "
        "Resume from the last checkpoint with a lower learning rate, or report this clip."
    )


def check_gradients(step: int, terms: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
    """Raise TrainingError if a gradient is not finite; names the step, the tensors, and the loss terms' values.

    Without it the optimiser would write the NaN into the tensors, and only the next rendering would fail.
    """
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if not found or bool(torch.stack([gradient.sum() for gradient in found.values()]).sum().isfinite()):
        return
    broken = [name for name, gradient in found.items() if not bool(gradient.isfinite().all())]
    if broken:
        values = ", ".join(f"{name} {float(term):.4g}" for name, term in terms.items())
        raise TrainingError(
            f"Step {step}: the gradient of {', '.join(broken[:4])}{' …' if len(broken) > 4 else ''} is not finite "
            f"(loss terms: {values}). Resume from the last checkpoint with a lower learning rate, or report this clip."
        )
