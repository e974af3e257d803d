"""Initial points of a drawn clip."""

import numpy as np
import pytest
import torch

from helpers.drawn_head import SIZE, a_config, draw_clip
from hicode.avatar.config import DeformationConfig
from hicode.errors import InputError
from hicode.tracking.head_model import HeadModel
from hicode.training.head import deform
from hicode.training.initialisation import initial_head


@pytest.fixture(scope="module")
def model():
    return HeadModel.load()


@pytest.fixture(scope="module")
def clip(model):
    return draw_clip(model)


def test_points_start_where_the_first_frame_shows_the_head(clip, model):
    gaussians, deformation = initial_head(clip, model, a_config(init_frames=1))
    moved = deform(gaussians, deformation, clip.track.motion, 0, learned=False)
    px, _ = clip.track.camera_at(0).project(moved.means[:-60])  # the last 60 are teeth and tongue
    inside = clip.head_mask(0)[px[:, 1].long().clamp(0, SIZE - 1), px[:, 0].long().clamp(0, SIZE - 1)] > 0
    assert inside.all()
    assert len(gaussians) == 900


def test_points_of_several_frames_lie_where_each_shows_the_head(clip, model):
    """Moved into a frame's expression, its points lie on its depth map and have the colours of its pixels.

    Every patch comes from the frame that faces it: points on the head's left from the frame that shows the left side.
    """
    depths = clip.depths()
    gaussians, deformation = initial_head(clip, model, a_config())
    off, color = [], []
    for t, depth in depths.items():
        moved = deform(gaussians, deformation, clip.track.motion, t, learned=False).means
        px, z = clip.track.camera_at(t).project(moved[:-60])
        column, row = px.long().clamp(0, SIZE - 1).T.numpy()
        off.append(np.nan_to_num(np.abs(z.numpy() - depth[row, column]), nan=9.0))
        color.append(np.abs(gaussians.colors[:-60].numpy() - clip.image(t)[row, column] / 255).max(1))
    owner = np.argmin(off, 0)
    counts = np.bincount(owner, minlength=3)
    assert len(gaussians) == 900 and (counts > 30).all(), counts
    assert np.min(off, 0).max() < 1e-3  # dm: moved there and back, in float32
    assert np.take_along_axis(np.stack(color), owner[None], 0).max() < 1e-6
    # depth of the head's x axis: the more negative, the more the left side faces the camera
    yaw = clip.track.motion.T_camera_head[list(depths), 2, 0]
    side = [gaussians.means[:-60][owner == k, 0].mean() for k in range(3)]
    assert side[int(yaw.argmin())] > side[int(yaw.argmax())] + 0.1, (side, yaw)


def test_random_points_fill_the_heads_box_with_random_colours(clip, model):
    config = a_config(initialisation="random", deformation=DeformationConfig(rig=False))
    gaussians, _ = initial_head(clip, model, config)
    vertices = model.vertices(clip.track.identity, clip.track.motion.expression[0])
    low, high = vertices.amin(0), vertices.amax(0)
    assert len(gaussians) == 900 and (gaussians.means >= low).all() and (gaussians.means <= high).all()
    spread = gaussians.means.std(0) / (high - low)
    assert torch.allclose(spread, torch.full((3,), 12**-0.5), atol=0.02)  # uniform: 1/√12 of the side; 900 draws
    assert gaussians.colors.std() > 0.2  # uniform colours: 0.29


def test_a_first_frame_without_a_head_is_refused(model):
    clip = draw_clip(model)
    clip.masks[0] = np.zeros((SIZE, SIZE), np.uint8)
    with pytest.raises(InputError, match="Only 0 px of the first training frame"):
        initial_head(clip, model, a_config())
