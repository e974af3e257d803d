"""The training loop of the head, on a drawn clip: the fitted head model itself, shaded, seen by a small camera."""

from dataclasses import replace

import pytest
import torch
from research.reproduce.ablations import ABLATIONS

from helpers.drawn_head import FRAMES, a_config, draw_clip, drawn_avatar, psnr
from hicode.avatar.avatar import Avatar
from hicode.avatar.config import DeformationConfig
from hicode.errors import TrainingError
from hicode.tracking.head_model import HeadModel
from hicode.training import head as training
from hicode.training.checkpoint import HeadState
from hicode.training.frames import TrainingFrames, TrainingView
from hicode.training.head import frame_at, train_head
from hicode.training.stages import LearningRates


@pytest.fixture(scope="module")
def model():
    return HeadModel.load()


@pytest.fixture(scope="module")
def clip(model):
    return draw_clip(model)


@pytest.mark.slow
def test_training_learns_frames_and_carries_to_unseen_ones(clip, model):
    config = a_config(refine=120)
    before = psnr(clip, HeadState.start(clip, model, config), clip.test[0])
    head = train_head(clip, model, config)
    after = psnr(clip, head, clip.test[0])
    assert after > before + 2 and after > 19, (before, after)  # a wrong sign in any gradient or pose ends far below
    assert len(head.motion) == len(clip.train)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(clip, model, tmp_path):
    """Stopped in the second stage, after the cloud has changed its size. Equal to the bit."""
    config, file = a_config(), tmp_path / "head.safetensors"
    whole = train_head(clip, model, config)
    train_head(clip, model, config, checkpoint=file, stop_at=14)
    resumed = train_head(clip, model, config, checkpoint=file)
    for name, tensor in whole.gaussians.tensors().items():
        assert torch.equal(tensor, resumed.gaussians.tensors()[name]), name
    for name, tensor in whole.deformation.state()[0].items():
        assert torch.equal(tensor, resumed.deformation.state()[0][name]), name
    for name, tensor in whole.motion.tensors().items():
        assert torch.equal(tensor, resumed.motion.tensors()[name]), name


@pytest.mark.parametrize("init_frames, expected", [(1, {0}), (2, {0, 5}), (5, {0, 2, 5})])
def test_the_first_stage_uses_the_initial_frames_and_leaves_the_network_alone(clip, model, init_frames, expected):
    config = a_config(preload_bytes=0, init_frames=init_frames)
    untrained = HeadState.start(clip, model, config).deformation.state_dict()
    clip.shown.clear()
    head = train_head(clip, model, config, stop_at=8)
    assert set(clip.shown) == expected
    for name, tensor in head.deformation.state_dict().items():
        assert torch.equal(tensor, untrained[name]), name


def test_every_training_frame_is_used_once_an_epoch(clip):
    config, frames = a_config(initialise=0), TrainingFrames(clip, 0)
    order = [frame_at(config, i, frames) for i in range(20)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]


def test_a_nan_in_a_loss_term_stops_the_run_and_names_step_and_term(clip, model, monkeypatch):
    target = TrainingView.target
    monkeypatch.setattr(TrainingView, "target", lambda *args: target(*args) * float("nan"))
    with pytest.raises(TrainingError, match=r"Step 0: loss term 'l1' is nan"):
        train_head(clip, model, a_config(), stop_at=2)


def test_a_nan_in_a_gradient_stops_the_run_before_it_reaches_the_tensors(clip, model, monkeypatch):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    deform = training.deform
    monkeypatch.setattr(
        training,
        "deform",
        lambda *args, **options: (lambda g: replace(g, colors=Poison.apply(g.colors)))(deform(*args, **options)),
    )
    with pytest.raises(TrainingError, match=r"Step 0: the gradient of colors is not finite \(loss terms: l1 0\.\d+"):
        train_head(clip, model, a_config(rates=LearningRates(view_dependent_color=0.0)), stop_at=2)


def test_only_the_networks_weights_decay(clip, model):
    """A step without gradients, step size 0.1, decay 0.5: weights shrink by a twentieth, all else stays."""
    state = HeadState.start(clip, model, a_config(rates=LearningRates(network_decay=0.5)))
    before = {k: v.detach().clone() for k, v in state.learned().items()}
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    for name, value in state.learned().items():
        decays = name not in state.params and value.ndim > 1
        torch.testing.assert_close(value, before[name] * (0.95 if decays else 1.0), msg=name)


def test_colours_depend_on_the_view_only_if_they_may(clip, model):
    learned = train_head(clip, model, a_config(), stop_at=22).gaussians.view_dependent_color
    assert learned.shape[1:] == (3, 3) and float(learned.abs().max()) > 0
    without = a_config(rates=LearningRates(view_dependent_color=0.0))
    assert train_head(clip, model, without, stop_at=1).gaussians.view_dependent_color is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ABLATIONS if n != "mesh"])
def test_an_ablated_avatar_trains_saves_and_renders_as_any_other(name, model, tmp_path):
    config = ABLATIONS[name].apply(
        a_config(deformation=DeformationConfig(channels=8, hidden=16, anchors=128, speech_dim=6))
    )
    clip = draw_clip(model)
    if name == "none":
        features = torch.randn(FRAMES, 6, generator=torch.Generator().manual_seed(0))
        clip.track = replace(clip.track, motion=replace(clip.track.motion, speech=features))
    untrained = psnr(clip, HeadState.start(clip, model, config), 3)
    head = train_head(clip, model, config)
    assert psnr(clip, head, 3) > untrained + 1  # 40 iterations: it does learn
    made = drawn_avatar(clip, model, head)
    again = Avatar.load(made.save(tmp_path / "a.hicode"))
    assert torch.equal(*(a.render(a.driving[4], a.driving.T_camera_head[4]).rgb for a in (made, again)))
