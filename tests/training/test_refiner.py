"""Training of the refiner, on renderings with one known fault."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from hicode import assets
from hicode.avatar.blend import compose
from hicode.avatar.refiner import CompositorConfig
from hicode.errors import TrainingError
from hicode.perceptual import Features
from hicode.training.frames import RenderedFrame
from hicode.training.refiner import Discriminator, RefinerTrainer, RefinerTraining, draw_crops, train_refiner

SMALL = {"crop_px": 64, "batch": 2, "generator": CompositorConfig(filters=8)}
PLATE = np.full((128, 128, 3), 90, np.uint8)
MASK = cv2.circle(np.zeros((128, 128), np.uint8), (64, 64), 40, 255, -1)


def dark(k: int) -> RenderedFrame:
    """A smooth frame whose rendering is darker than it, by the same amount everywhere."""
    coarse = np.random.default_rng(k).uniform(80, 200, (6, 6, 3)).astype(np.float32)
    image = cv2.resize(coarse, (128, 128), interpolation=cv2.INTER_CUBIC).clip(60, 220).astype(np.uint8)
    alpha = torch.from_numpy(MASK / np.float32(255))
    rgb = (torch.from_numpy(image / np.float32(255)) - 0.12) * alpha[..., None]
    return RenderedFrame(rgb, alpha, image, MASK, np.zeros((478, 2)))


@pytest.fixture(autouse=True)
def weights():
    if not assets.is_cached("perceptual"):
        pytest.skip("the asset `perceptual` is not in the cache: `hicode assets pull perceptual`")


@pytest.mark.slow
def test_training_repairs_what_all_renderings_share():
    generator = train_refiner(dark, 12, PLATE, RefinerTraining(steps=60, **SMALL))
    frame, inside = dark(20), cv2.erode(MASK, np.ones((9, 9))) > 0
    psnr = []
    for network in (None, generator):
        out = compose(frame.rgb, frame.alpha, frame.image, MASK, PLATE, network)
        psnr.append(-10 * np.log10((((out / 255.0 - frame.image / 255.0)[inside]) ** 2).mean()))
    assert psnr[1] > psnr[0] + 3, psnr  # a constant darkness of 0.12 is the easiest thing to learn


@pytest.mark.slow
def test_resumed_training_equals_an_uninterrupted_run(tmp_path, monkeypatch):
    monkeypatch.setattr("hicode.training.refiner.CHECKPOINT_EVERY", 4)
    config, file = RefinerTraining(steps=8, **SMALL), tmp_path / "refiner.safetensors"

    def stop(step, terms):
        if step == 6:
            raise KeyboardInterrupt

    whole = train_refiner(dark, 12, PLATE, config)
    with pytest.raises(KeyboardInterrupt):
        train_refiner(dark, 12, PLATE, config, file, stop)
    resumed = train_refiner(dark, 12, PLATE, config, file)
    for a, b in zip(whole.state()[0].values(), resumed.state()[0].values(), strict=True):
        assert torch.equal(a, b)  # every draw depends on its step alone


def test_the_discriminator_judges_an_image_by_its_condition():
    network, image = Discriminator(), torch.rand(1, 3, 64, 64)
    verdicts = [network(torch.rand(1, 11, 64, 64), image)[-1] for _ in range(2)]
    assert not torch.allclose(*verdicts)


def test_a_weight_that_is_not_finite_stops_the_step_and_is_named():
    trainer = RefinerTrainer(RefinerTraining(**SMALL))
    trainer.step = 7
    with torch.no_grad():
        trainer.generator.down1.weight[0] = float("nan")
    crops = torch.from_numpy(draw_crops(dark, 4, PLATE, trainer.config, np.random.default_rng(0)))
    with pytest.raises(TrainingError, match=r"Refiner step 7: .*'discriminator' is nan .*generator\.down1\.weight"):
        trainer.train_step(crops.permute(0, 3, 1, 2), Features("vgg16", ("relu1_2",)))


def test_crops_cover_border_and_mouth_of_heads_of_any_size():
    for radius in (8, 40):
        mask = cv2.circle(np.zeros((128, 128), np.uint8), (64, 64), radius, 255, -1)
        render = lambda k, mask=mask: replace(dark(k), head_mask=mask)
        crops = draw_crops(render, 4, PLATE, RefinerTraining(**SMALL), np.random.default_rng(0))
        assert crops.shape == (2, 64, 64, 14) and (crops[..., 10] > 0).any()


def test_frames_without_a_head_are_refused():
    empty = lambda k: replace(dark(k), head_mask=np.zeros_like(MASK))
    with pytest.raises(TrainingError, match="No training frame has a head mask"):
        draw_crops(empty, 4, PLATE, RefinerTraining(**SMALL), np.random.default_rng(0))
