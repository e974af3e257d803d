"""Training frames: their window, and the memory that they take."""

import numpy as np
import pytest

from helpers.drawn_head import draw_clip
from hicode.errors import InputError
from hicode.tracking.head_model import HeadModel
from hicode.training.frames import TrainingFrames, head_window


def test_decoded_frames_stay_within_the_memory_given():
    clip = draw_clip(HeadModel.load())
    x0, y0, x1, y1 = TrainingFrames(clip, 0).window
    each = (x1 - x0) * (y1 - y0) * 4
    for given, kept in ((0, 0), (3 * each, 3), (3 * each + 1, 3), (10**9, len(clip.train))):
        frames = TrainingFrames(clip, given)
        for _ in range(2):
            images = [frames.image_and_mask(t)[0] for t in frames.frames]
        used = sum(part.nbytes for pair in frames._cache.values() for part in pair)
        assert used == kept * each <= given
        for image, t in zip(images, frames.frames, strict=True):
            assert np.array_equal(image, clip.image(t)[y0:y1, x0:x1].transpose(2, 0, 1))


def test_the_window_contains_every_mask_with_a_margin_and_needs_one():
    first, second = np.zeros((100, 100), np.uint8), np.zeros((100, 100), np.uint8)
    first[40:50, 5:30], second[60:70, 30:60] = 255, 9
    assert head_window([first, second]) == (0, 28, 72, 82)
    with pytest.raises(InputError, match="No head in any training frame"):
        head_window([np.zeros((100, 100), np.uint8)])
