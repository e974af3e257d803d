"""Training of the head: canonical Gaussians and their deformation, from a tracked clip (Eqs 7-8, 15-16).

One loop through the paper's three stages. All random numbers are functions of (seed, iteration), so a run that resumes
from a checkpoint gives the result of an uninterrupted one. Renderings and losses cover the window around the head only.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from hicode.avatar.deformation import Deformation
from hicode.gaussians import Gaussians
from hicode.motion import Motion
from hicode.preparation.clip import Clip
from hicode.render import RasterStats, rasterize
from hicode.tracking.head_model import HeadModel
from hicode.training.checkpoint import HeadState
from hicode.training.density import GradientStatistics, apply_plan, plan_density
from hicode.training.frames import TrainingFrames, TrainingView
from hicode.training.losses import (
    Box,
    HeadLoss,
    check_finite,
    check_gradients,
    crop_around,
    depth_distortion,
    random_crop,
)
from hicode.training.stages import HeadConfig, Stage

MOUTH_CROPS = 0.4  # share of the crops on the mouth, Eq. 16's mouth term; the others are anywhere on the head

Log = Callable[[HeadState, dict[str, float]], None]
"""Called after each iteration with the state and the iteration's scalars."""


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """Canonical Gaussians, their deformation, and the motion of the training part with refined poses."""

    gaussians: Gaussians
    deformation: Deformation
    motion: Motion

    @staticmethod
    def of(state: HeadState, clip: Clip, goes_on: bool = False) -> "TrainedHead":
        """The head as it is at an iteration. Where training goes on, the deformation is a copy."""
        poses = [state.pose.apply(k, clip.track.motion.T_camera_head[t]) for k, t in enumerate(clip.train)]
        motion = replace(clip.track.motion[clip.train[0] : clip.train[-1] + 1], T_camera_head=torch.stack(poses))
        deformation = copy.deepcopy(state.deformation) if goes_on else state.deformation
        deformation.requires_grad_(False)
        return TrainedHead(state.gaussians().map(lambda v: v.detach().clone()), deformation, motion)


def train_head(
    clip: Clip,
    model: HeadModel,
    config: HeadConfig,
    checkpoint: Path | None = None,
    log: Log = lambda state, scalars: None,
    stop_at: int | None = None,
    device: torch.device | str = "cpu",
) -> TrainedHead:
    """Train through all stages.

    `checkpoint` is written every `config.checkpoint_seconds`, when training is interrupted and at the end; if the file
    exists, training continues from it. `stop_at` ends before an iteration. Raises TrainingError at a NaN.
    """
    frames = TrainingFrames(clip, config.preload_bytes)
    state = HeadState.start(clip, model, config, device)
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint, config)
    loss = HeadLoss(config.loss, config.vgg_layers, device)
    end = config.iterations if stop_at is None else min(stop_at, config.iterations)
    saved_s = time.monotonic()
    try:
        while state.iteration < end:
            scalars = train_step(state, frames, config, loss)
            log(state, scalars)
            if checkpoint is not None and time.monotonic() - saved_s > config.checkpoint_seconds:
                state.save(checkpoint)
                saved_s = time.monotonic()
    except KeyboardInterrupt:
        if checkpoint is not None:
            state.save(checkpoint)
        raise
    if checkpoint is not None:
        state.save(checkpoint)
    return TrainedHead.of(state, clip)


def train_step(state: HeadState, frames: TrainingFrames, config: HeadConfig, head_loss: HeadLoss) -> dict[str, float]:
    """One iteration: render a frame, compare, step, and control the density. Returns the scalars to log."""
    stage, index = config.stage_at(state.iteration)
    progress = set_learning_rates(state, config, stage)
    if stage.deform and (index == 0 or (stage.name == "refine" and index == stage.iterations // 2)):
        state.deformation.place_anchors(state.params["means"])
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + state.iteration)
    background = torch.rand(3, generator=rng).to(state.device)
    t = frame_at(config, state.iteration, frames)
    k = t - frames.frames[0]

    tracked_pose = frames.clip.track.motion.T_camera_head[t]
    pose = state.pose.apply(k, tracked_pose)
    if refine_pose := stage.deform and config.rates.pose > 0:
        pose = pose.detach().requires_grad_(True)
    view = frames.view(t, 2 if state.iteration < config.coarse else 1)
    camera = view.camera.with_pose(pose)
    deformed = deform(state.gaussians(), state.deformation, frames.clip.track.motion, t, learned=stage.deform)
    stats = RasterStats() if stage.density else None
    rgb = rasterize(deformed, camera, background, stats=stats).rgb

    vgg_due = state.iteration % config.vgg_every == 0 and progress >= config.vgg_start and view.shrink == 1
    wing_due = stage.deform and state.iteration % config.wing_every == 0
    loss, terms = head_loss(
        rgb,
        view.target(background),
        mouth_box=view.mouth_box,
        vgg_box=perceptual_crop(view, config.vgg_crop_px, rng) if vgg_due else None,
        landmarks_px=view.landmarks_px if wing_due else None,
    )
    if config.loss.depth_distortion and state.iteration % config.distortion_every == 0:
        distortion = depth_distortion(deformed, camera.with_pose(pose.detach()))
        loss = loss + config.distortion_every * config.loss.depth_distortion * distortion
        terms["depth_distortion"] = distortion.detach()

    check_finite(state.iteration, terms, state.learned())
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    check_gradients(state.iteration, terms, state.learned())
    state.optimizer.step()
    if refine_pose:
        assert pose.grad is not None
        state.pose.step(k, tracked_pose, pose.grad, config.rates.pose * (0.05 + 0.95 * cosine(progress)))
    state.iteration += 1
    if stats is not None:
        assert stats.grad_means2d is not None
        state.statistics.add(stats.grad_means2d, stats.visible, rgb.shape[1], rgb.shape[0])
        control_density(state, config, stage)
    scalars = {"loss": float(loss.detach()), "gaussians": float(len(state.params["means"]))}
    return scalars | {name: float(term) for name, term in terms.items()}


def deform(gaussians: Gaussians, deformation: Deformation, motion: Motion, t: int, learned: bool = True) -> Gaussians:
    """Eqs 7-8 at frame t of a motion. Without `learned`, only the rig moves the Gaussians (the first stage)."""
    frame = motion[t].to(gaussians.means.device)
    if learned:
        return deformation.deform(gaussians, frame)
    return replace(gaussians, means=gaussians.means + deformation.rig_displacement(frame))


def frame_at(config: HeadConfig, iteration: int, frames: TrainingFrames) -> int:
    """The clip's frame index for an iteration.

    The first stage cycles through the frames that gave the initial points. Later stages take every frame that is
    learned from once an epoch, in an order that depends on (seed, epoch).
    """
    stage, index = config.stage_at(iteration)
    if not stage.deform:
        initial = frames.depth_frames[: config.init_frames]
        return initial[index % len(initial)]
    epoch, place = divmod(iteration, len(frames.learned))
    order = np.random.default_rng((config.seed, 3, epoch)).permutation(len(frames.learned))
    return frames.learned[int(order[place])]


def set_learning_rates(state: HeadState, config: HeadConfig, stage: Stage) -> float:
    """Cosine decay after the first stage. Returns the progress after the first stage, in [0, 1]."""
    progress = max(0.0, (state.iteration - config.initialise) / max(1, config.iterations - config.initialise))
    for group in state.optimizer.param_groups:
        floor = 0.02 if group["name"] in ("means", "network") else 0.1
        group["lr"] = getattr(config.rates, group["name"]) * (floor + (1 - floor) * cosine(progress))
        if group["name"] == "network" and not stage.deform:
            group["lr"] = 0.0
    return progress


def cosine(progress: float) -> float:
    """Half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def control_density(state: HeadState, config: HeadConfig, stage: Stage) -> None:
    """Add and prune Gaussians if a round is due. Binding, anchors and statistics follow."""
    density = config.density
    if state.iteration < density.start or state.iteration % density.every:
        return
    with torch.no_grad():
        plan = plan_density(state.params, state.statistics, density, float(state.deformation.normalization.radius))
        state.statistics = GradientStatistics.zeros(len(plan.source), state.device)
        if not plan.changes:
            return
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + state.iteration)
        state.params = apply_plan(plan, state.params, state.optimizer, rng)
    if state.deformation.binding is not None:
        state.deformation.binding = state.deformation.binding.select(plan.source)
    if stage.deform:
        state.deformation.place_anchors(state.params["means"])


def perceptual_crop(view: TrainingView, size_px: int, rng: torch.Generator) -> Box:
    """A square crop for L_VGG, on the mouth or anywhere on the head."""
    mask = view.mask.numpy()
    if float(torch.rand((), generator=rng)) < MOUTH_CROPS:
        x0, y0, x1, y1 = view.mouth_box
        return crop_around(((x0 + x1) / 2, (y0 + y1) / 2), size_px, *mask.shape)
    return random_crop(mask, size_px, rng)
