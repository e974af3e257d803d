"""The tool that makes the landmark map: what it finds on landmarks whose truth is known."""

import numpy as np
import pytest
from research.tools.landmark_map import person_offsets

from helpers.speaking_head import true_track
from hicode.tracking.fit import FitConfig
from hicode.tracking.head_model import HeadModel


@pytest.mark.slow
def test_a_constant_offset_of_a_landmark_is_found():
    model = HeadModel.load()
    _, points = true_track(model)
    points[:, 50, 1] += 4.0  # px down: 4 / 175 dm at this size
    fast = FitConfig(identity_frames=16, identity_steps=6, frame_steps=6)
    offset, _ = person_offsets(points, 512, 512, model, fast)
    assert -0.03 < offset[50, 1] < -0.01 and np.abs(np.delete(offset, 50, 0)).mean() < 0.004
