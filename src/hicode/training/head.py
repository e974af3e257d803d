"""Training of the head: canonical Gaussians and their deformation, from a tracked clip (HiCoDe, "Expression-Controlled 3DGS Head Synthesis").

One loop through the three stages. All randomness is a function of (seed, iteration), so a run resumed from a checkpoint gives what the
uninterrupted run gives. Renders and losses cover the window that the head ever touches, not the whole frame.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.nn import functional as F

from hicode.avatar.deformation import Deformation
from hicode.avatar.rig import Binding, MeshRig, bind
from hicode.camera import Camera
from hicode.errors import InputError
from hicode.files import load_tensors, save_tensors
from hicode.gaussians import Gaussians, gaussians_from_points
from hicode.geometry import rigid, rotation_from_axis_angle
from hicode.motion import Motion
from hicode.preparation.clip import Clip
from hicode.render import RasterStats, rasterize
from hicode.tracking.head_model import HeadModel
from hicode.training.density import GradientStatistics, apply_plan, plan_density
from hicode.training.losses import (
    Box,
    HeadLoss,
    check_finite,
    crop_around,
    depth_distortion,
    random_crop,
)
from hicode.training.stages import HeadConfig, Stage

CHECKPOINT_SCHEMA, CHECKPOINT_VERSION = "hicode-head-checkpoint", 3
VGG_CROP_PX = 128
WINDOW_MARGIN_PX = 12

Log = Callable[[int, dict[str, float]], None]


# ---------------------------------------------------------------------------------------------------------------- training frames


class TrainingFrames:
    """Frames, head masks and mouth boxes of the training part, cut to the window that the head touches; as many as the memory given allows are kept decoded."""

    def __init__(self, clip: Clip, preload_bytes: int, views: int = 1):
        """`views`: as `HeadConfig`'s; `self.views` says which frames (their places) these are."""
        self.clip, self.frames = clip, list(clip.train)
        self.views = [self.frames.index(t) for t in islice(clip.depths(), views)]
        self.window = head_window([clip.head_mask(t) for t in self.frames[:: max(1, len(self.frames) // 100)]])
        x0, y0, x1, y1 = self.window
        self._room = preload_bytes // ((x1 - x0) * (y1 - y0) * 4)  # frames with their masks
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.frames)

    def camera(self, t: int) -> Camera:
        x0, y0, x1, y1 = self.window
        return self.clip.track.camera_at(t).cropped(x0, y0, x1 - x0, y1 - y0)

    def image_and_mask(self, t: int) -> tuple[UInt8[Tensor, "3 h w"], UInt8[Tensor, "h w"]]:
        if t in self._cache:
            return self._cache[t]
        x0, y0, x1, y1 = self.window
        image = torch.from_numpy(np.ascontiguousarray(self.clip.image(t)[y0:y1, x0:x1].transpose(2, 0, 1)))
        mask = torch.from_numpy(np.ascontiguousarray(self.clip.head_mask(t)[y0:y1, x0:x1]))
        if len(self._cache) < self._room:
            self._cache[t] = image, mask
        return image, mask

    def target(self, t: int, background: Float[Tensor, "3"]) -> Float[Tensor, "h w 3"]:
        """The head over a constant colour, on the colour's device: decision 21, so that the cloud learns where the head ends."""
        image, mask = (picture.to(background.device) for picture in self.image_and_mask(t))
        alpha = mask.float() / 255
        over = image.float() * (alpha / 255) + background[:, None, None] * (1 - alpha)
        return over.permute(1, 2, 0)

    def landmarks_px(self, t: int) -> Float[Tensor, "478 2"]:
        return self.clip.track.landmarks_px[t] - torch.tensor(self.window[:2], dtype=torch.float32)

    def mouth_box(self, t: int) -> tuple[int, int, int, int]:
        """In window px, clipped, never empty."""
        x0, y0, x1, y1 = self.window
        a, b, c, d = self.clip.track.mouth_box(t, padding=0.2)
        a, c = np.clip([a - x0, c - x0], 0, x1 - x0)
        b, d = np.clip([b - y0, d - y0], 0, y1 - y0)
        return int(a), int(b), int(max(c, a + 1)), int(max(d, b + 1))


def head_window(masks: list[UInt8[np.ndarray, "h w"]]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 around every mask with a margin. Raises InputError where no mask shows a head."""
    seen = np.max(np.stack(masks), 0) > 0
    if not seen.any():
        raise InputError("No head in any training frame's mask. Prepare the clip again with a video that shows one.")
    h, w = seen.shape
    ys, xs = np.where(seen.any(1))[0], np.where(seen.any(0))[0]
    m = WINDOW_MARGIN_PX
    return max(0, int(xs[0]) - m), max(0, int(ys[0]) - m), min(w, int(xs[-1]) + 1 + m), min(h, int(ys[-1]) + 1 + m)


# ---------------------------------------------------------------------------------------------------------------- the start


def initial_cloud(clip: Clip, model: HeadModel, config: HeadConfig) -> tuple[Gaussians, Deformation]:
    """Depth-based initialisation (Remark on 3DGS Initialization): points on the head as some training frames show it, and a Deformation bound to
    them. Points seen in a frame's expression are carried back to the canonical, neutral one. Table 2's random initialisation has random points instead.
    """
    rng = np.random.default_rng((config.seed, 1))
    track = clip.track
    expression, landmarks = track.motion.expression, track.motion.landmarks
    train = slice(clip.train[0], clip.train[-1] + 1)

    parts = _seen_points(clip, config.views, config.gaussians - config.mouth_gaussians, rng)
    first = parts[0][2]
    vertices = model.vertices(track.identity, expression[first])
    if config.mouth_gaussians:
        parts.append((*_mouth_points(vertices, model, config.mouth_gaussians, rng), first))
    if config.initialisation == "random":
        parts = [(*_random_points(vertices, config.gaussians, rng), first)]
    points, colors = (torch.cat(p) for p in list(zip(*parts))[:2])

    center = vertices.mean(0)
    radius = float((points - center).norm(dim=1).quantile(0.99))
    rig = None
    if config.deformation.rig:
        rest = model.vertices(track.identity)
        neutral = model.landmarks(rest)
        basis = torch.stack([model.landmarks(rest + b) - neutral for b in model.expression_basis])
        rig = MeshRig(model.expression_basis, neutral, basis)
    torch.manual_seed(config.seed)
    deformation = Deformation.create(config.deformation, track.identity, center, radius, rig)
    deformation.fit(track.motion[train])
    if rig is not None:
        at_rest, bindings = [], []
        for seen, _, t in parts:
            deformation.binding = bind(
                seen, model.vertices(track.identity, expression[t]), model.triangles, landmarks[t]
            )
            at_rest.append(seen - deformation.rig_displacement(track.motion[t]))
            bindings.append(deformation.binding)
        points, deformation.binding = torch.cat(at_rest), reduce(Binding.cat, bindings)
    cloud = gaussians_from_points(points, colors, config.initial_opacity, max_scale=0.1)
    return cloud, deformation


_NORMAL_PX = 4.0  # at 512: depth is smoothed over so many pixels before its slope is taken


def _seen_points(clip: Clip, views: int, count: int, rng: np.random.Generator) -> list[tuple[Tensor, Tensor, int]]:
    """(points "n 3" of the head frame, their colours, the frame that shows them) by frame; at most `count`, the first training frame's first.

    Each of the first `views` frames whose depth is known gives the pixels that face its camera more than any other's: a cheek comes from the frame that turns it to
    the camera, where its depth is sure, and no patch of skin comes twice. Pixels are drawn evenly. InputError where the first frame shows no head.
    """
    track, depths = clip.track, dict(islice(clip.depths().items(), views))
    eyes = {t: torch.linalg.inv(track.motion.T_camera_head[t].double())[:3, 3].float() for t in depths}
    found = []
    for t, depth in depths.items():
        camera = track.camera_at(t)
        ys, xs = np.where((clip.head_mask(t) > 127) & np.isfinite(depth))
        if not found and len(ys) < 100:
            raise InputError(
                f"Only {len(ys)} px of the first training frame (frame {t}) show the head. Trim the clip's start."
            )
        pixels = torch.from_numpy(np.stack([xs + 0.5, ys + 0.5], 1).astype(np.float32))
        points = camera.unproject(pixels, torch.from_numpy(depth[ys, xs].astype(np.float32)))
        normals = _normals(depth, camera)[ys, xs]
        facing = {k: (normals * F.normalize(eye - points, dim=1)).sum(1) for k, eye in eyes.items()}
        own = torch.stack(list(facing.values())).amax(0) == facing[t]
        found.append((points[own], clip.image(t)[ys[own], xs[own]], t))
    sizes = [len(points) for points, _, _ in found]
    chosen = np.sort(rng.choice(sum(sizes), min(count, sum(sizes)), replace=False))
    parts = []
    for (points, image, t), end in zip(found, np.cumsum(sizes)):
        rows = chosen[(chosen >= end - len(points)) & (chosen < end)] - (end - len(points))
        parts.append((points[torch.from_numpy(rows)], torch.from_numpy(image[rows].astype(np.float32) / 255), t))
    return parts


def _normals(depth: Float32[np.ndarray, "h w"], camera: Camera) -> Float[Tensor, "h w 3"]:
    """Unit normals of a depth map's surface in the head frame, towards the camera."""
    h, w = depth.shape
    smooth = cv2.GaussianBlur(
        np.where(np.isfinite(depth), depth, np.nanmax(depth)), (0, 0), _NORMAL_PX * max(h, w) / 512
    )
    x, y = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
    pixels = torch.from_numpy(np.stack([x.ravel(), y.ravel()], 1).astype(np.float32))
    surface = camera.unproject(pixels, torch.from_numpy(smooth.ravel().astype(np.float32))).view(h, w, 3)
    down, right = torch.gradient(surface, dim=(0, 1))
    normal = F.normalize(torch.linalg.cross(down, right), dim=-1)
    eye = torch.linalg.inv(camera.T_camera_head.double())[:3, 3].float()
    return normal * ((eye - surface) * normal).sum(-1, keepdim=True).sign()


def _random_points(vertices: Tensor, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Points anywhere in the head model's bounding box, of any colour: Table 2's "random initialisation", as 3DGS without a point cloud."""
    low, high = vertices.amin(0), vertices.amax(0)
    points = low + (high - low) * torch.from_numpy(rng.random((count, 3), np.float32))
    return points, torch.from_numpy(rng.random((count, 3), np.float32))


def _mouth_points(vertices: Tensor, model: HeadModel, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Points spread over teeth and tongue by area, dark red until training colours them: the first frame may not show them."""
    triangles = model.triangles[model.part("upper_teeth", "lower_teeth", "tongue")].long()
    corners = vertices[triangles]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1).double().numpy()
    pick = rng.choice(len(triangles), count, p=area / area.sum())
    weights = torch.from_numpy(rng.dirichlet([1, 1, 1], count).astype(np.float32))
    points = (corners[pick] * weights[..., None]).sum(1)
    return points, torch.tensor([0.35, 0.2, 0.2]).expand(count, 3).clone()


# ---------------------------------------------------------------------------------------------------------------- state and loop


@dataclass(eq=False)
class FrameTable:
    """Numbers of each training frame, a row of any shape, with Adam's moments by row: a dense optimiser would keep moving rows that an iteration did not see."""

    values: Float[Tensor, "t ..."]
    first: Float[Tensor, "t ..."]
    second: Float[Tensor, "t ..."]
    visits: Float[Tensor, "t"]

    @staticmethod
    def zeros(rows: int, *shape: int) -> "FrameTable":
        return FrameTable(*(torch.zeros(rows, *shape) for _ in range(3)), torch.zeros(rows))

    def step(self, k: int, grad: Tensor, rate: float) -> None:
        """Of row k alone."""
        self.visits[k] += 1
        first, second, count = self.first[k], self.second[k], float(self.visits[k])
        first.mul_(0.7).add_(grad, alpha=0.3)
        second.mul_(0.9).addcmul_(grad, grad, value=0.1)
        self.values[k] -= rate * (first / (1 - 0.7**count)) / ((second / (1 - 0.9**count)).sqrt() + 1e-12)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {f"frames.{name}.{k}": v for k, v in vars(self).items()}

    @staticmethod
    def of(tensors: dict[str, Tensor], name: str) -> "FrameTable":
        return FrameTable(*(tensors[f"frames.{name}.{k}"] for k in ("values", "first", "second", "visits")))


@dataclass(eq=False)
class HeadState:
    """All that training changes; what a checkpoint holds. What it finds of each frame stays on the CPU, a row at a time is used; the rest lies on `device`.

    pose    rows "6"    how each training frame's head stands to its tracked pose (rad, dm; in the head frame)
    """

    params: dict[str, Tensor]
    deformation: Deformation
    optimizer: torch.optim.Optimizer
    pose: FrameTable
    statistics: GradientStatistics
    iteration: int = 0

    def gaussians(self) -> Gaussians:
        return Gaussians(**self.params)

    @property
    def device(self) -> torch.device:
        return self.params["means"].device


def start(clip: Clip, model: HeadModel, config: HeadConfig, device: torch.device | str = "cpu") -> HeadState:
    """A state before its first iteration."""
    cloud, deformation = initial_cloud(clip, model, config)
    deformation = deformation.to(device)
    if config.rates.view_dependent_color:
        cloud = replace(cloud, view_dependent_color=torch.zeros(len(cloud), 3, 3))
    params = {k: torch.nn.Parameter(v.to(device)) for k, v in cloud.tensors().items()}
    return HeadState(
        params,
        deformation,
        _optimizer(params, deformation, config),
        FrameTable.zeros(len(clip.train), 6),
        GradientStatistics.zeros(len(cloud), device),
    )


def _optimizer(params: dict[str, Tensor], deformation: Deformation, config: HeadConfig) -> torch.optim.Adam:
    groups = [{"params": [p], "name": k, "lr": getattr(config.rates, k)} for k, p in params.items()]
    network = list(deformation.parameters())
    decay = {"weight_decay": config.rates.network_decay, "decoupled_weight_decay": True}
    groups.append(
        {"params": [p for p in network if p.ndim > 1], "name": "network", "lr": config.rates.network, **decay}
    )
    groups.append({"params": [p for p in network if p.ndim <= 1], "name": "network", "lr": config.rates.network})
    return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15, fused=True)


def train_head(
    clip: Clip,
    model: HeadModel,
    config: HeadConfig,
    checkpoint: Path | None = None,
    log: Log = lambda iteration, scalars: None,
    preview: Callable[[int, HeadState], None] = lambda iteration, state: None,
    preview_every: int = 1000,
    stop_at: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Gaussians, Deformation, Motion]:
    """Train to the end of the last stage; returns the cloud, its deformation, and the motion of the training part, refined in the frames that were learned from.

    With `checkpoint`, state is written there every `config.checkpoint_seconds` and on interruption, and training goes on from what is found.
    `log(iteration, scalars)` is called each iteration. `stop_at` ends early (tests). Raises TrainingError at a NaN, naming step and tensor.
    """
    frames = TrainingFrames(clip, config.preload_bytes, config.views)
    state = start(clip, model, config, device)
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(checkpoint, state, config)
    loss = HeadLoss(config.loss, config.vgg_layers, device)
    last_saved = time.monotonic()
    end = config.iterations if stop_at is None else min(stop_at, config.iterations)
    try:
        while state.iteration < end:
            scalars = _iterate(state, frames, config, loss)
            log(state.iteration, scalars)
            if state.iteration % preview_every == 0 or state.iteration == end:
                preview(state.iteration, state)
            if checkpoint is not None and time.monotonic() - last_saved > config.checkpoint_seconds:
                save_checkpoint(checkpoint, state)
                last_saved = time.monotonic()
    except KeyboardInterrupt:
        if checkpoint is not None:
            save_checkpoint(checkpoint, state)
        raise
    if checkpoint is not None:
        save_checkpoint(checkpoint, state)
    return _finished(state, frames)


def _finished(state: HeadState, frames: TrainingFrames) -> tuple[Gaussians, Deformation, Motion]:
    state.deformation.requires_grad_(False)
    return state.gaussians().map(lambda v: v.detach().clone()), state.deformation, _refined(state, frames)


def _iterate(state: HeadState, frames: TrainingFrames, config: HeadConfig, head_loss: HeadLoss) -> dict[str, float]:
    """One iteration: render a frame, compare, step; then density control if it is due."""
    stage, within = stage_at(config, state.iteration)
    if stage.deform and (within == 0 or (stage.name == "refine" and within == stage.iterations // 2)):
        state.deformation.place_anchors(state.params["means"])
    k = (
        frames.views[within % len(frames.views)]
        if stage.frames == "views"
        else _shuffled_frame(config, state.iteration, len(frames))
    )
    t = frames.frames[k]
    chance = torch.Generator().manual_seed(config.seed * 1_000_003 + state.iteration)
    background = torch.rand(3, generator=chance).to(state.device)
    progress = _set_rates(state, config, stage)

    pose = _pose(state, frames, k)
    if refining := stage.deform and config.rates.pose > 0:
        pose = pose.detach().requires_grad_(True)
    moved = deform(state.gaussians(), state.deformation, frames.clip.track.motion, t, learned=stage.deform)
    stats = RasterStats() if stage.density else None
    rendering = rasterize(moved, frames.camera(t).with_pose(pose), background, stats=stats)

    crop = landmarks = None
    if state.iteration % config.vgg_every == 0 and progress >= config.vgg_start:
        crop = _perceptual_crop(frames, t, chance)
    if stage.deform and state.iteration % config.wing_every == 0:
        landmarks = frames.landmarks_px(t)
    loss, terms = head_loss(
        rendering.rgb, frames.target(t, background), frames.mouth_box(t), vgg_box=crop, landmarks_px=landmarks
    )
    if config.loss.depth_distortion and state.iteration % config.spread_every == 0:
        spread = depth_distortion(moved, frames.camera(t).with_pose(pose.detach()))
        loss = loss + config.spread_every * config.loss.depth_distortion * spread
        terms["depth_distortion"] = spread.detach()
    check_finite(state.iteration, terms, state.params | dict(state.deformation.named_parameters()))
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    pace = 0.05 + 0.95 * _cosine(progress)
    if refining:
        _refine_pose(state, frames, k, pose.grad, config.rates.pose * pace)
    state.optimizer.step()
    state.iteration += 1
    if stage.density:
        state.statistics.add(stats.grad_means2d, stats.visible, rendering.rgb.shape[1], rendering.rgb.shape[0])
        _control_density(state, config, stage)
    return {
        "loss": float(loss.detach()),
        "gaussians": len(state.params["means"]),
        **{k: float(v) for k, v in terms.items()},
    }


def deform(
    gaussians: Gaussians,
    deformation: Deformation,
    motion: Motion,
    t: int,
    learned: bool = True,
) -> Gaussians:
    """Eqs 7-8 at frame t of a motion; without `learned`, only the rig moves the cloud (the initialisation stage)."""
    frame = motion[t].to(gaussians.means.device)
    if learned:
        return deformation.deform(gaussians, frame)
    return gaussians.deformed(deformation.rig_displacement(frame), 0.0, 0.0)


def stage_at(config: HeadConfig, iteration: int) -> tuple[Stage, int]:
    """The stage an iteration belongs to, and how far into it."""
    for stage in config.stages:
        if iteration < stage.iterations:
            return stage, iteration
        iteration -= stage.iterations
    raise AssertionError(f"iteration beyond the last stage by {iteration}")


def _shuffled_frame(config: HeadConfig, iteration: int, n: int) -> int:
    """Every frame once an epoch, in an order that (seed, epoch) fixes."""
    epoch, place = divmod(iteration, n)
    return int(np.random.default_rng((config.seed, 3, epoch)).permutation(n)[place])


def _set_rates(state: HeadState, config: HeadConfig, stage: Stage) -> float:
    """Cosine from the end of the first stage on; returns the overall progress in [0, 1]."""
    first = config.stages[0].iterations
    progress = max(0.0, (state.iteration - first) / max(1, config.iterations - first))
    cosine = _cosine(progress)
    for group in state.optimizer.param_groups:
        base = getattr(config.rates, group["name"])
        floor = 0.02 if group["name"] in ("means", "network") else 0.1
        group["lr"] = base * (floor + (1 - floor) * cosine)
        if group["name"] == "network" and not stage.deform:
            group["lr"] = 0.0
    return progress


def _cosine(progress: float) -> float:
    """From 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _pose(state: HeadState, frames: TrainingFrames, k: int) -> Float[Tensor, "4 4"]:
    """Tracked pose with the refinement of training frame k applied in the head frame."""
    delta = state.pose.values[k]
    return frames.clip.track.motion.T_camera_head[frames.frames[k]] @ rigid(
        rotation_from_axis_angle(delta[:3]), delta[3:]
    )


def _refined(state: HeadState, frames: TrainingFrames) -> Motion:
    """The training part's motion with what was found of each frame; frames that were not learned from stay as tracked."""
    tracked = frames.clip.track.motion[frames.frames[0] : frames.frames[-1] + 1]
    poses = torch.stack([_pose(state, frames, k) for k in range(len(frames))])
    return replace(tracked, T_camera_head=poses)


def _refine_pose(state: HeadState, frames: TrainingFrames, k: int, grad: Float[Tensor, "4 4"], rate: float) -> None:
    """A step of row k of the pose table, from the gradient of the pose that it gave."""
    delta = state.pose.values[k].clone().requires_grad_(True)
    tracked = frames.clip.track.motion.T_camera_head[frames.frames[k]]
    (tracked @ rigid(rotation_from_axis_angle(delta[:3]), delta[3:])).backward(grad)
    state.pose.step(k, delta.grad, rate)


def _control_density(state: HeadState, config: HeadConfig, stage: Stage) -> None:
    """Grow and prune when a round is due; binding, anchors and statistics follow the cloud."""
    density = config.density
    if state.iteration < density.start or state.iteration % density.every:
        return
    with torch.no_grad():
        plan = plan_density(state.params, state.statistics, density, float(state.deformation.normalization.radius))
        state.statistics = GradientStatistics.zeros(len(plan.source), state.device)
        if not plan.changes:
            return
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.iteration)
        state.params = apply_plan(plan, state.params, state.optimizer, generator)
    if state.deformation.binding is not None:
        state.deformation.binding = state.deformation.binding.select(plan.source)
    if stage.deform:
        state.deformation.place_anchors(state.params["means"])


def _perceptual_crop(frames: TrainingFrames, t: int, chance: torch.Generator) -> Box:
    """Where the perceptual term looks: the mouth two times in five (the paper's mouth term), else anywhere on the head."""
    mask = frames.image_and_mask(t)[1].numpy()
    if float(torch.rand((), generator=chance)) < 0.4:
        x0, y0, x1, y1 = frames.mouth_box(t)
        return crop_around(((x0 + x1) / 2, (y0 + y1) / 2), VGG_CROP_PX, *mask.shape)
    return random_crop(mask, VGG_CROP_PX, chance)


# ---------------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, state: HeadState) -> None:
    tensors = {f"params.{k}": v for k, v in state.params.items()}
    deformation, config = state.deformation.state()
    tensors |= {f"deformation.{k}": v for k, v in deformation.items()}
    tensors |= state.pose.tensors("pose")
    tensors |= {"statistics.total": state.statistics.total, "statistics.count": state.statistics.count}
    for g, group in enumerate(state.optimizer.param_groups):
        for p, parameter in enumerate(group["params"]):
            for key, value in state.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{g}.{p}.{key}"] = value
    save_tensors(
        path, tensors, CHECKPOINT_SCHEMA, CHECKPOINT_VERSION, {"iteration": state.iteration, "deformation": config}
    )


def load_checkpoint(path: Path, state: HeadState, config: HeadConfig) -> None:
    """Put a checkpoint into a freshly started state of the same configuration. Raises FileFormatError."""
    tensors, header = load_tensors(path, CHECKPOINT_SCHEMA, CHECKPOINT_VERSION)
    tensors = {k: v if k.startswith("frames.") else v.to(state.device) for k, v in tensors.items()}
    state.params = {k: torch.nn.Parameter(tensors[f"params.{k}"]) for k in state.params}
    part = {k.removeprefix("deformation."): v for k, v in tensors.items() if k.startswith("deformation.")}
    state.deformation = Deformation.from_state(part, header["deformation"]).to(state.device)
    state.optimizer = _optimizer(state.params, state.deformation, config)
    for g, group in enumerate(state.optimizer.param_groups):
        for p, parameter in enumerate(group["params"]):
            prefix = f"optimizer.{g}.{p}."
            if moments := {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}:
                state.optimizer.state[parameter] = moments
    state.pose = FrameTable.of(tensors, "pose")
    state.statistics = GradientStatistics(tensors["statistics.total"], tensors["statistics.count"])
    state.iteration = header["iteration"]
