"""Learning film grain: what a recording's frames have more than their renderings."""

import cv2
import numpy as np
import torch

from helpers.grainy_head import LANDMARKS, MASK, SIZE, noisy, smooth
from hicode.avatar.blend import compose
from hicode.motion import LIPS
from hicode.training.film_grain import STRENGTH, fine_detail, learn_film_grain
from hicode.training.frames import RenderedFrame


def grainy(k: int, deviation: float = 6.0) -> RenderedFrame:
    """A rendering that lacks the frame's grain, and is otherwise right."""
    alpha = torch.from_numpy(MASK / np.float32(255))
    rgb = alpha[..., None] * torch.from_numpy(smooth(2) / np.float32(255))
    return RenderedFrame(rgb, alpha, noisy(smooth(2), deviation, k), MASK, LANDMARKS)


def test_fine_detail_is_the_recordings_and_not_the_trackers_error():
    render = smooth()
    frame = noisy(np.roll(render, 1, 1), 6.0, 0)  # a pixel beside the render, with grain
    found = fine_detail(frame, render, MASK, LANDMARKS)
    inside = cv2.erode(MASK, np.ones((25, 25))) > 0
    inside &= np.hypot(*(np.mgrid[:SIZE, :SIZE] - [[[0.65 * SIZE]], [[SIZE / 2]]])) > 30  # beyond the lips
    assert 4.0 < found[inside].std() < 7.0, "white noise of 6 levels, less what is not fine"
    without = fine_detail(np.roll(render, 1, 1), render, MASK, LANDMARKS)
    assert without[inside].std() < 1.0, "a shifted picture alone has next to none"
    assert not found[MASK == 0].any(), "none outside the head"
    x, y = LANDMARKS[LIPS].mean(0).round().astype(int)
    assert not found[y - 2 : y + 3, x - 4 : x + 5].any(), "none on the lips"


def test_the_film_grain_of_a_recording_is_as_strong_as_configured():
    grain = learn_film_grain(grainy, 12, smooth(2))
    assert grain.strength == STRENGTH and len(grain.fields) == 12
    frame = grainy(100)
    plain, out = (
        compose(frame.rgb, frame.alpha, frame.image, MASK, smooth(2), None, layer)
        for layer in (None, grain.layer(LANDMARKS, 0))
    )
    added = (out.astype(float) - plain)[cv2.erode(MASK, np.ones((41, 41))) > 0]
    assert 0.3 * 6 < added.std() < 6 * STRENGTH  # what is not fine detail is missing


def test_what_stands_out_of_the_grain_is_no_grain():
    """An earring in a field would be a ghost on the cheek of every frame that the field is laid on."""
    render, frame = smooth(2), noisy(smooth(2), 3.0, 1)
    earring = np.zeros((SIZE, SIZE), np.uint8)
    y, x = np.argwhere(cv2.erode(MASK, np.ones((41, 41))) > 0)[0]
    cv2.circle(earring, (int(x), int(y)), 3, 1, -1)
    wearing = np.where(earring[..., None] > 0, 255, frame).astype(np.uint8)
    plain, field = (fine_detail(f, render, MASK, LANDMARKS) for f in (frame, wearing))
    usual = np.abs(plain[MASK > 0]).std()
    assert np.abs(wearing.astype(int) - frame)[earring > 0].mean() > 50 and np.abs(field).max() < 6 * usual
