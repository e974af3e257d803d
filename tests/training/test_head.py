"""Training of the head on a drawn clip: the fitted head model itself, shaded, seen by a small camera."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.drawn_head import FRAMES, SIZE, a_config, draw_clip, psnr
from hicode.avatar.avatar import Avatar
from hicode.avatar.deformation import DeformationConfig
from hicode.errors import FileFormatError, TrainingError
from hicode.media.images import Images
from hicode.tracking.head_model import HeadModel
from hicode.training import head as training
from hicode.training.stages import ABLATIONS, LearningRates, Stage, head_preset


@pytest.fixture(scope="module")
def model():
    return HeadModel.load()


@pytest.fixture(scope="module")
def clip(model):
    return draw_clip(model)


def test_training_learns_frames_and_carries_to_unseen_ones(clip, model):
    config = a_config(stages=(*a_config().stages[:2], Stage("refine", 120, "all", True, False)))
    start = training.start(clip, model, config)
    gaussians, deformation, motion = training.train_head(clip, model, config)
    before = psnr(clip, start.gaussians(), start.deformation, clip.test[0])
    after = psnr(clip, gaussians, deformation, clip.test[0])
    assert after > before + 2 and after > 19, (before, after)  # a wrong sign in any gradient or pose ends far below
    assert len(motion) == len(clip.train)


def test_a_resumed_run_is_the_uninterrupted_one(clip, model, tmp_path):
    """Stopped amid the second stage, after the cloud has changed its size; the checkpoint must hold all that matters, to the bit."""
    config, file = a_config(), tmp_path / "head.safetensors"
    whole = training.train_head(clip, model, config)
    training.train_head(clip, model, config, checkpoint=file, stop_at=14)
    resumed = training.train_head(clip, model, config, checkpoint=file)
    for name, tensor in whole[0].tensors().items():
        assert torch.equal(tensor, resumed[0].tensors()[name]), name
    for name, tensor in whole[1].state()[0].items():
        assert torch.equal(tensor, resumed[1].state()[0][name]), name
    for name, tensor in whole[2].tensors().items():
        assert torch.equal(tensor, resumed[2].tensors()[name]), name


@pytest.mark.parametrize("views, expected", [(1, {0}), (2, {0, 5}), (5, {0, 2, 5})])
def test_the_first_stage_sees_the_frames_that_points_come_from_and_leaves_the_network_alone(
    clip, model, views, expected
):
    seen = []
    clip_ = SimpleNamespace(**(vars(clip) | {"image": lambda t: seen.append(t) or clip.image(t)}))
    config = a_config(preload_bytes=0, views=views)
    untrained = training.start(clip, model, config).deformation.control.state_dict()
    _, deformation, _ = training.train_head(clip_, model, config, stop_at=8)
    assert set(seen) == expected
    for name, tensor in deformation.control.state_dict().items():
        assert torch.equal(tensor, untrained[name]), name


def test_every_training_frame_is_seen_once_an_epoch():
    order = [training._shuffled_frame(a_config(), i, 10) for i in range(20)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]


def test_decoded_frames_stay_within_the_memory_given(clip):
    x0, y0, x1, y1 = training.TrainingFrames(clip, 0).window
    each = (x1 - x0) * (y1 - y0) * 4
    for given, kept in ((0, 0), (3 * each, 3), (3 * each + 1, 3), (10**9, len(clip.train))):
        frames = training.TrainingFrames(clip, given)
        for _ in range(2):
            shown = [frames.image_and_mask(t)[0] for t in frames.frames]
        held = sum(part.nbytes for pair in frames._cache.values() for part in pair)
        assert held == kept * each <= given
        assert all(
            np.array_equal(a, clip.image(t)[y0:y1, x0:x1].transpose(2, 0, 1))
            for a, t in zip(shown, frames.frames, strict=True)
        )


def test_points_start_where_the_first_frame_shows_the_head(clip, model):
    gaussians, deformation = training.initial_cloud(clip, model, a_config(views=1))
    moved = training.deform(gaussians, deformation, clip.track.motion, 0, learned=False)
    px, _ = clip.track.camera_at(0).project(moved.means[:-60])  # the last 60 are teeth and tongue
    inside = clip.head_mask(0)[px[:, 1].long().clamp(0, SIZE - 1), px[:, 0].long().clamp(0, SIZE - 1)] > 0
    assert inside.all()
    assert len(gaussians) == 900


def test_points_of_several_frames_lie_where_each_shows_the_head(clip, model):
    """Carried into a frame's expression, its points lie on its depth map, in front of its pixels of their colour; every patch comes from the frame that
    looks at it: points of the head's left side from the one that turns it to the camera.
    """
    config, depths = a_config(), clip.depths()
    gaussians, deformation = training.initial_cloud(clip, model, config)
    moved_by = lambda t: training.deform(gaussians, deformation, clip.track.motion, t, learned=False).means
    off, colour = [], []
    for t, depth in depths.items():
        px, z = clip.track.camera_at(t).project(moved_by(t)[:-60])
        column, row = px.long().clamp(0, SIZE - 1).T.numpy()
        off.append(np.nan_to_num(np.abs(z.numpy() - depth[row, column]), nan=9.0))
        colour.append(np.abs(gaussians.colors[:-60].numpy() - clip.image(t)[row, column] / 255).max(1))
    owner = np.argmin(off, 0)
    counts = np.bincount(owner, minlength=3)
    assert len(gaussians) == 900 and (counts > 30).all(), counts
    assert np.min(off, 0).max() < 1e-3  # dm: carried there and back, in float32
    assert np.take_along_axis(np.stack(colour), owner[None], 0).max() < 1e-6
    yaw = clip.track.motion.T_camera_head[
        list(depths), 2, 0
    ]  # of the head's x axis in depth: the more negative, the more its left side is turned to us
    side = [gaussians.means[:-60][owner == k, 0].mean() for k in range(3)]
    assert side[int(yaw.argmin())] > side[int(yaw.argmax())] + 0.1, (side, yaw)


def test_a_nan_stops_the_run_and_names_step_and_term(clip, model, monkeypatch):
    monkeypatch.setattr(
        training.TrainingFrames,
        "target",
        lambda self, t, background: torch.full((96, 96, 3), float("nan"))[
            : self.window[3] - self.window[1], : self.window[2] - self.window[0]
        ],
    )
    with pytest.raises(TrainingError, match=r"[Ss]tep 0.*l1"):
        training.train_head(clip, model, a_config(), stop_at=2)


@pytest.mark.parametrize("preset", ["draft", "standard", "paper"])
def test_presets_are_the_papers_three_stages(preset):
    names = [(s.name, s.frames, s.deform, s.density) for s in head_preset(preset).stages]
    assert names == [
        ("initialise", "views", False, True),
        ("deform", "all", True, True),
        ("refine", "all", True, False),
    ]


def test_the_paper_preset_is_the_papers_schedule_and_network():
    config = head_preset("paper")
    assert [s.iterations for s in config.stages] == [3000, 2000, 15000]
    assert config.deformation.anchors == 0 and config.deformation.base == "none" and config.initial_opacity == 0.1


# --- the avatar file


@pytest.fixture(scope="module")
def avatar(clip, model):
    gaussians, deformation, driving = training.train_head(clip, model, a_config())
    return Avatar(
        gaussians, deformation, clip.track.camera, driving,
        Images.encode((clip.image(t) for t in range(10)), ".jpg"), Images.encode((clip.head_mask(t) for t in range(10)), ".png"),
        np.full((SIZE, SIZE, 3), 90, np.uint8), model.mouth_expression, model.mouth_landmark_weight, source={"name": "drawn"},
    )  # fmt: skip


def test_an_avatar_reads_back_as_it_was(avatar, tmp_path):
    again = Avatar.load(avatar.save(tmp_path / "a.hicode"))
    frame, mask = avatar.driving_frame(3), avatar.driving_mask(3)
    assert np.array_equal(frame, again.driving_frame(3)) and np.array_equal(mask, again.driving_mask(3))
    for t in (0, 7):
        assert np.array_equal(
            avatar.synthesize_frame(avatar.driving, t, frame, mask),
            again.synthesize_frame(again.driving, t, frame, mask),
        )
    assert again.source == {"name": "drawn"} and again.speech is None and again.compositor is None


def test_a_part_of_the_picture_renders_as_the_whole_does(avatar):
    x0, y0, x1, y1 = box = (20, 24, 60, 70)
    cloud, pose = avatar.deform(avatar.driving[3]), avatar.driving.T_camera_head[3]
    whole, part = avatar.rasterize(cloud, pose), avatar.rasterize(cloud, pose, within=box)
    torch.testing.assert_close(part.rgb[y0:y1, x0:x1], whole.rgb[y0:y1, x0:x1], atol=1e-4, rtol=0)
    torch.testing.assert_close(part.alpha[y0:y1, x0:x1], whole.alpha[y0:y1, x0:x1], atol=1e-4, rtol=0)
    assert part.alpha.shape == whole.alpha.shape and float(part.alpha[y0:y1, x0:x1].max()) > 0.5
    assert float(part.alpha.sum()) == pytest.approx(float(part.alpha[y0:y1, x0:x1].sum()), rel=1e-5)


def test_only_the_networks_weights_decay(clip, model):
    """An iteration without gradients, step size 0.1, decay 0.5: weights shrink by a twentieth, biases and the cloud stay."""
    state = training.start(clip, model, a_config(rates=LearningRates(network_decay=0.5)))
    before = {k: v.detach().clone() for k, v in state.deformation.control.named_parameters()} | {
        k: v.detach().clone() for k, v in state.params.items()
    }
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    for name, value in state.deformation.control.named_parameters():
        torch.testing.assert_close(value, before[name] * (0.95 if value.ndim > 1 else 1.0))
    for name, value in state.params.items():
        assert torch.equal(value, before[name]), name


def test_a_frame_table_steps_the_row_it_is_told_to_and_each_by_its_own_count():
    table = training.FrameTable.zeros(3, 2)
    table.step(1, torch.tensor([4.0, -0.5]), 0.1)
    torch.testing.assert_close(
        table.values, torch.tensor([[0.0, 0.0], [-0.1, 0.1], [0.0, 0.0]])
    )  # Adam's first step is its rate whatever the gradient
    table.step(1, torch.tensor([4.0, -0.5]), 0.1)
    table.step(2, torch.tensor([1.0, 1.0]), 0.1)
    torch.testing.assert_close(table.values, torch.tensor([[0.0, 0.0], [-0.2, 0.2], [-0.1, -0.1]]))
    again = training.FrameTable.of(table.tensors("x"), "x")
    assert all(torch.equal(a, b) for a, b in zip(vars(table).values(), vars(again).values(), strict=True))


def test_colours_learn_to_turn_only_where_they_may(clip, model):
    learned, _, _ = training.train_head(clip, model, a_config())
    assert (
        learned.view_dependent_color.shape == (len(learned), 3, 3)
        and float(learned.view_dependent_color.abs().max()) > 0
    )
    still, _, _ = training.train_head(clip, model, a_config(rates=LearningRates(view_dependent_color=0.0)))
    assert still.view_dependent_color is None


@pytest.mark.parametrize("name", [n for n in ABLATIONS if n != "mesh"])
def test_an_ablated_avatar_trains_saves_and_renders_as_any_other(name, clip, model, tmp_path):
    config = ABLATIONS[name].apply(
        a_config(deformation=DeformationConfig(channels=8, hidden=16, anchors=128, speech_dim=6))
    )
    clip = SimpleNamespace(**vars(clip))
    if name == "none":
        heard = torch.randn(FRAMES, 6, generator=torch.Generator().manual_seed(0))
        clip.track = replace(clip.track, motion=replace(clip.track.motion, speech=heard))
    begun = training.start(clip, model, config)
    gaussians, deformation, driving = training.train_head(clip, model, config)
    assert (
        psnr(clip, gaussians, deformation, 3) > psnr(clip, begun.gaussians(), begun.deformation, 3) + 1
    )  # 40 iterations: it does learn
    made = Avatar(
        gaussians, deformation, clip.track.camera, driving,
        Images.encode((clip.image(t) for t in range(10)), ".jpg"), Images.encode((clip.head_mask(t) for t in range(10)), ".png"),
        np.full((SIZE, SIZE, 3), 90, np.uint8), model.mouth_expression, model.mouth_landmark_weight,
    )  # fmt: skip
    again = Avatar.load(made.save(tmp_path / "a.hicode"))
    assert again.audio_driven == (name == "none")
    images = [a.render(a.driving[4], a.driving.T_camera_head[4]).rgb for a in (made, again)]
    assert torch.equal(*images)


def test_random_points_fill_the_heads_box_and_know_no_colour(clip, model):
    gaussians, _ = training.initial_cloud(
        clip, model, a_config(initialisation="random", deformation=DeformationConfig(base="none"))
    )
    vertices = model.vertices(clip.track.identity, clip.track.motion.expression[0])
    low, high = vertices.amin(0), vertices.amax(0)
    assert len(gaussians) == 900 and (gaussians.means >= low).all() and (gaussians.means <= high).all()
    spread = gaussians.means.std(0) / (high - low)
    assert torch.allclose(spread, torch.full((3,), 12**-0.5), atol=0.02)  # uniform: 1/√12 of the side; 900 draws
    assert gaussians.colors.std() > 0.2  # uniform colours: 0.29


def test_masks_are_kept_exactly_and_frames_nearly(avatar, clip):
    assert np.array_equal(avatar.driving_mask(4), clip.head_mask(4))
    error = np.abs(avatar.driving_frame(4).astype(int) - clip.image(4)).mean()
    assert error < 3  # JPEG 95 on a small, busy drawing


def test_a_damaged_or_foreign_avatar_is_refused_with_its_name(avatar, tmp_path):
    file = avatar.save(tmp_path / "a.hicode")
    data = file.read_bytes()
    (tmp_path / "cut.hicode").write_bytes(data[: len(data) // 2])
    (tmp_path / "not.hicode").write_bytes(b"hello")
    for name in ("cut.hicode", "not.hicode", "missing.hicode"):
        with pytest.raises(FileFormatError, match=name):
            Avatar.load(tmp_path / name)
