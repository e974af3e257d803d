"""The weighted sum and the check for NaN."""

import pytest
import torch

from helpers.losses import BrightnessLandmarker, images
from hicode import assets
from hicode.errors import InputError, TrainingError
from hicode.training.losses import HeadLoss, LossWeights, check_finite


def test_head_loss_is_the_weighted_sum_of_its_terms(monkeypatch):
    if not assets.is_cached("perceptual"):
        pytest.skip("the asset `perceptual` is not in the cache: `hicode assets pull perceptual`")
    monkeypatch.setattr("hicode.tracking.landmarks.FaceLandmarker", BrightnessLandmarker)
    rendered, target = images(64, 64)
    where = {"mouth_box": (20, 20, 52, 52), "vgg_box": (0, 0, 32, 32), "landmarks_px": torch.full((478, 2), 102.0)}
    loss, terms = HeadLoss(LossWeights(l1=0.7, ssim=0.4, vgg=0.05, wing=0.01, mouth=0.5))(rendered, target, **where)
    expected = 0.7 * terms["l1"] + 0.4 * (1 - terms["ssim"]) + 0.05 * terms["vgg"] + 0.01 * terms["wing"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(float(term) > 0 and not term.requires_grad for term in terms.values())
    assert set(HeadLoss(LossWeights(vgg=0.0))(rendered, target, **where)[1]) == {"l1", "ssim"}


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused(value):
    with pytest.raises(InputError, match="loss weight vgg is"):
        LossWeights(vgg=value)


def test_the_nan_guard_names_step_term_and_tensor():
    means = torch.zeros(3, requires_grad=True)
    check_finite(1, {"l1": torch.tensor(0.3)}, {"means": torch.tensor([float("nan")])})  # only terms trigger it
    means.grad = torch.tensor([0.0, float("inf"), 0.0])
    with pytest.raises(TrainingError, match=r"Step 12: loss term 'vgg' is nan .*quats, gradient of means"):
        check_finite(
            12,
            {"l1": torch.tensor(0.1), "vgg": torch.tensor(float("nan"))},
            {"means": means, "quats": torch.tensor([float("nan")])},
        )
