"""Training of the head: canonical Gaussians and their deformation, from a tracked clip (Eqs 7-8, 15-16).

One loop through the paper's three stages. All random numbers are functions of (seed, iteration), so a run that resumes
from a checkpoint gives the result of an uninterrupted one. Renderings and losses cover the window around the head only.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.avatar.deformation import Deformation
from hicode.gaussians import Gaussians
from hicode.motion import Motion
from hicode.preparation.clip import Clip
from hicode.render import RasterStats, rasterize
from hicode.threads import side_by_side
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
    exists, training continues from it. After an interruption between the two steps of a pair, the second's gradients
    are found anew, from what the first left. `stop_at` ends before an iteration. Raises TrainingError at a NaN.
    """
    frames = TrainingFrames(clip, config.preload_bytes)
    state = HeadState.start(clip, model, config, device)
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint, config)
    loss = HeadLoss(config.loss, config.vgg_layers, device)
    end = config.iterations if stop_at is None else min(stop_at, config.iterations)
    saved_s = time.monotonic()
    try:
        for scalars in train_steps(state, frames, config, loss, end):
            log(state, scalars)
            # Not between the two steps of a pair: the second one's gradients are not in the file.
            due_s = saved_s + config.checkpoint_seconds
            if checkpoint is not None and state.iteration % 2 == 0 and time.monotonic() > due_s:
                state.save(checkpoint)
                saved_s = time.monotonic()
    except KeyboardInterrupt:
        if checkpoint is not None:
            state.save(checkpoint)
        raise
    if checkpoint is not None:
        state.save(checkpoint)
    return TrainedHead.of(state, clip)


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of an iteration's loss: by the learned tensors (None: not touched) and by the pose of training frame t.

    `stats` are the rendering's, where density control needs them.
    """

    t: int
    tensors: Mapping[str, Tensor | None]
    pose: Float[Tensor, "4 4"] | None
    stats: RasterStats | None
    loss: float
    terms: dict[str, Tensor]


def train_steps(
    state: HeadState, frames: TrainingFrames, config: HeadConfig, head_loss: HeadLoss, end: int
) -> Iterator[dict[str, float]]:
    """All iterations until `end`; after each one its scalars to log.

    The gradients of iterations 2 k and 2 k + 1 are found at once, both from what iteration 2 k - 1 left. Then come two
    steps. So two cores compute whole frames and never wait for each other within one. It is done so on one core too:
    the result does not depend on their number.
    """
    while (first := state.iteration) < end:
        if places_anchors(config, first):
            state.deformation.place_anchors(state.params["means"])
        both = first % 2 == 0 and first + 1 < end and not _changes_cloud(config, first)
        if state.deformation.anchors is not None:
            state.deformation.anchor_cache(state.params["means"])  # once, before two threads ask for it
        find = partial(gradients, state, frames, config, head_loss)
        pair = range(first, first + 1 + both)
        for found in side_by_side(find, pair) if state.device.type == "cpu" else [find(k) for k in pair]:
            yield train_step(state, found, frames, config)


def places_anchors(config: HeadConfig, iteration: int) -> bool:
    """Whether anchors are chosen before an iteration, for where the Gaussians are by then."""
    stage, index = config.stage_at(iteration)
    return stage.deform and (index == 0 or (stage.name == "refine" and index == stage.iterations // 2))


def _changes_cloud(config: HeadConfig, iteration: int) -> bool:
    """Whether Gaussians or anchors may be others after an iteration."""
    return places_anchors(config, iteration + 1) or (iteration + 1) % config.density.every == 0


def due(iteration: int, every: int) -> bool:
    """Whether a term of one in `every` iterations is due. Both of a pair have it, or neither waits for the other."""
    return iteration // 2 % every == 0


def gradients(
    state: HeadState, frames: TrainingFrames, config: HeadConfig, head_loss: HeadLoss, iteration: int
) -> Gradients:
    """Render the frame of an iteration, compare, and differentiate; changes nothing. TrainingError at a NaN."""
    (stage, _), progress = config.stage_at(iteration), progress_at(config, iteration)
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
    background = torch.rand(3, generator=rng).to(state.device)
    t = frame_at(config, iteration, frames)

    pose = state.pose.apply(t - frames.frames[0], frames.clip.track.motion.T_camera_head[t])
    if refine_pose := stage.deform and config.rates.pose > 0:
        pose = pose.detach().requires_grad_(True)
    view = frames.view(t)
    camera = view.camera.with_pose(pose)
    deformed = deform(state.gaussians(), state.deformation, frames.clip.track.motion, t, learned=stage.deform)
    stats = RasterStats() if stage.density else None
    rgb = rasterize(deformed, camera, background, stats=stats).rgb

    vgg_due = due(iteration, config.vgg_every) and progress >= config.vgg_start
    wing_due = stage.deform and due(iteration, config.wing_every)
    loss, terms = head_loss(
        rgb,
        view.target(background),
        mouth_box=view.mouth_box,
        vgg_box=perceptual_crop(view, config.vgg_crop_px, rng) if vgg_due else None,
        landmarks_px=view.landmarks_px if wing_due else None,
    )
    if config.loss.depth_distortion and due(iteration, config.distortion_every):
        distortion = depth_distortion(deformed, camera.with_pose(pose.detach()))
        loss = loss + config.distortion_every * config.loss.depth_distortion * distortion
        terms["depth_distortion"] = distortion.detach()

    learned = state.learned()
    check_finite(iteration, terms, learned)
    found = torch.autograd.grad(loss, [*learned.values(), *([pose] if refine_pose else [])], allow_unused=True)
    tensors = dict(zip(learned, found, strict=False))
    check_gradients(iteration, terms, tensors)
    return Gradients(t, tensors, found[-1] if refine_pose else None, stats, float(loss.detach()), terms)


def train_step(state: HeadState, found: Gradients, frames: TrainingFrames, config: HeadConfig) -> dict[str, float]:
    """The iteration's step, and density control where it is due. Returns the scalars to log."""
    stage, _ = config.stage_at(state.iteration)
    progress = set_learning_rates(state, config, stage)
    for name, tensor in state.learned().items():
        tensor.grad = found.tensors[name]
    state.optimizer.step()
    if found.pose is not None:
        tracked_pose, rate = frames.clip.track.motion.T_camera_head[found.t], config.rates.pose
        k, rate = found.t - frames.frames[0], rate * (0.05 + 0.95 * cosine(progress))
        state.pose.step(k, tracked_pose, found.pose, rate)
    state.iteration += 1
    if found.stats is not None:
        x0, y0, x1, y1 = frames.window
        assert found.stats.grad_means2d is not None
        state.statistics.add(found.stats.grad_means2d, found.stats.visible, x1 - x0, y1 - y0)
        control_density(state, config, stage)
    scalars = {"loss": found.loss, "gaussians": float(len(state.params["means"]))}
    return scalars | {name: float(term) for name, term in found.terms.items()}


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
    """Cosine decay after the first stage. Returns `progress_at`."""
    progress = progress_at(config, state.iteration)
    for group in state.optimizer.param_groups:
        floor = 0.02 if group["name"] in ("means", "network") else 0.1
        group["lr"] = getattr(config.rates, group["name"]) * (floor + (1 - floor) * cosine(progress))
        if group["name"] == "network" and not stage.deform:
            group["lr"] = 0.0
    return progress


def progress_at(config: HeadConfig, iteration: int) -> float:
    """The share of the iterations after the first stage that are done."""
    return max(0.0, (iteration - config.initialise) / max(1, config.iterations - config.initialise))


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
