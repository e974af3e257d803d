"""Initial Gaussians from depth maps (Remark on 3DGS Initialization), and a deformation bound to them.

n points. A depth map gives points in its own frame's expression; they are moved to the canonical, neutral one.
"""

from dataclasses import dataclass
from functools import reduce
from itertools import islice

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from hicode.avatar.deformation import Deformation
from hicode.avatar.rig import Binding, MeshRig, bind
from hicode.camera import Camera
from hicode.errors import InputError
from hicode.gaussians import Gaussians, gaussians_from_points
from hicode.preparation.clip import Clip
from hicode.tracking.head_model import HeadModel
from hicode.training.stages import HeadConfig

LEAST_HEAD_PX = 100
NORMAL_SIGMA_PX = 4.0  # at 512 px: a depth map is smoothed so much before its slope is computed
MOUTH_COLOR = 0.35, 0.2, 0.2  # of teeth and tongue before training


@dataclass(frozen=True, eq=False)
class FramePoints:
    """Points in the head frame, as training frame t shows them, and their colours."""

    points: Float[Tensor, "n 3"]
    colors: Float[Tensor, "n 3"]
    t: int


def initial_head(clip: Clip, model: HeadModel, config: HeadConfig) -> tuple[Gaussians, Deformation]:
    """Initial Gaussians in canonical space, and their untrained deformation.

    Raises InputError if the first training frame hardly shows the head.
    """
    rng = np.random.default_rng((config.seed, 1))
    track, motion = clip.track, clip.track.motion
    parts = depth_points(clip, config.init_frames, config.gaussians - config.mouth_gaussians, rng)
    first = parts[0].t
    vertices = model.vertices(track.identity, motion.expression[first])
    if config.mouth_gaussians:
        parts.append(mouth_points(vertices, first, model, config.mouth_gaussians, rng))
    if config.initialisation == "random":
        parts = [random_points(vertices, first, config.gaussians, rng)]
    points, colors = torch.cat([part.points for part in parts]), torch.cat([part.colors for part in parts])

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
    deformation.fit(motion[clip.train[0] : clip.train[-1] + 1])
    if rig is not None:
        canonical, bindings = [], []
        for part in parts:
            frame = motion[part.t]
            posed = model.vertices(track.identity, frame.expression)
            deformation.binding = bind(part.points, posed, model.triangles, frame.landmarks)
            canonical.append(part.points - deformation.rig_displacement(frame))
            bindings.append(deformation.binding)
        points, deformation.binding = torch.cat(canonical), reduce(Binding.cat, bindings)
    return gaussians_from_points(points, colors, config.initial_opacity, max_scale=0.1), deformation


def depth_points(clip: Clip, frames: int, count: int, rng: np.random.Generator) -> list[FramePoints]:
    """At most `count` points from the first `frames` depth maps, drawn evenly from the pixels.

    A frame gives only those pixels that face its camera more than any other's. So a cheek comes from the frame that
    turns it to the camera, where depth is reliable, and no patch of skin comes twice.
    """
    track, depths = clip.track, dict(islice(clip.depths().items(), frames))
    eyes = {t: torch.linalg.inv(track.motion.T_camera_head[t].double())[:3, 3].float() for t in depths}
    candidates = []
    for t, depth in depths.items():
        camera = track.camera_at(t)
        ys, xs = np.where((clip.head_mask(t) > 127) & np.isfinite(depth))
        if not candidates and len(ys) < LEAST_HEAD_PX:
            raise InputError(
                f"Only {len(ys)} px of the first training frame ({t}) show the head. Trim the clip's start."
            )
        pixels = torch.from_numpy(np.stack([xs + 0.5, ys + 0.5], 1).astype(np.float32))
        points = camera.unproject(pixels, torch.from_numpy(depth[ys, xs].astype(np.float32)))
        normals = depth_normals(depth, camera)[ys, xs]
        facing = {k: (normals * F.normalize(eye - points, dim=1)).sum(1) for k, eye in eyes.items()}
        best = torch.stack(list(facing.values())).amax(0) == facing[t]
        colors = torch.from_numpy(clip.image(t)[ys, xs])[best].float() / 255
        candidates.append(FramePoints(points[best], colors, t))
    sizes = [len(part.points) for part in candidates]
    chosen = np.sort(rng.choice(sum(sizes), min(count, sum(sizes)), replace=False))
    parts = []
    for part, end in zip(candidates, np.cumsum(sizes), strict=True):
        begin = end - len(part.points)
        rows = torch.from_numpy(chosen[(chosen >= begin) & (chosen < end)] - begin)
        parts.append(FramePoints(part.points[rows], part.colors[rows], part.t))
    return parts


def depth_normals(depth: Float32[np.ndarray, "h w"], camera: Camera) -> Float[Tensor, "h w 3"]:
    """Unit normals of a depth map's surface, in the head frame, towards the camera."""
    h, w = depth.shape
    filled = np.where(np.isfinite(depth), depth, np.nanmax(depth))
    smooth = cv2.GaussianBlur(filled, (0, 0), NORMAL_SIGMA_PX * max(h, w) / 512)
    x, y = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
    pixels = torch.from_numpy(np.stack([x.ravel(), y.ravel()], 1).astype(np.float32))
    surface = camera.unproject(pixels, torch.from_numpy(smooth.ravel().astype(np.float32))).view(h, w, 3)
    down, right = torch.gradient(surface, dim=(0, 1))
    normal = F.normalize(torch.linalg.cross(down, right), dim=-1)
    eye = torch.linalg.inv(camera.T_camera_head.double())[:3, 3].float()
    return normal * ((eye - surface) * normal).sum(-1, keepdim=True).sign()


def random_points(vertices: Float[Tensor, "v 3"], t: int, count: int, rng: np.random.Generator) -> FramePoints:
    """Random points of random colour in the head model's bounding box (Table 2's random initialisation)."""
    low, high = vertices.amin(0), vertices.amax(0)
    points = low + (high - low) * torch.from_numpy(rng.random((count, 3), np.float32))
    return FramePoints(points, torch.from_numpy(rng.random((count, 3), np.float32)), t)


def mouth_points(
    vertices: Float[Tensor, "v 3"], t: int, model: HeadModel, count: int, rng: np.random.Generator
) -> FramePoints:
    """Points on teeth and tongue, uniform by area: the initial frames may not show them."""
    triangles = model.triangles[model.part("upper_teeth", "lower_teeth", "tongue")].long()
    corners = vertices[triangles]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1).double().numpy()
    pick = rng.choice(len(triangles), count, p=area / area.sum())
    weights = torch.from_numpy(rng.dirichlet([1, 1, 1], count).astype(np.float32))
    points = (corners[pick] * weights[..., None]).sum(1)
    return FramePoints(points, torch.tensor(MOUTH_COLOR).expand(count, 3).clone(), t)
