"""The optical-flow term of the fit: points of the rigid upper face, tracked from each frame to the next.

t frames, k points of each frame.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor

from hicode.camera import pinhole_jacobian
from hicode.motion import EYE_REGIONS, RIGID_FACE
from hicode.render.mesh import rasterize_mesh
from hicode.tracking.fit.problem import POSE_DIM, Problem, State, rotations, translations

if TYPE_CHECKING:
    from hicode.tracking.fit.solver import NormalEquations

Image = UInt8[np.ndarray, "h w"]


@dataclass(frozen=True)
class FlowConfig:
    """How points of the upper face are tracked."""

    points: int = 100  # points of a frame, at most
    window_px: int = 24  # side of the Lucas-Kanade window
    return_px: float = 0.3  # a point that is tracked back must return to within this


@dataclass(frozen=True, eq=False)
class Flow:
    """Where points of the upper face went from each frame to the next: px, pixel centres at +0.5."""

    start_px: Float[np.ndarray, "s k 2"]
    end_px: Float[np.ndarray, "s k 2"]
    valid: Bool[np.ndarray, "s k"]


def track_flow(
    frames: Iterable[Image],
    points_px: Float[np.ndarray, "t 478 3"] | Float[Tensor, "t 478 3"],
    found: Bool[np.ndarray, "t"] | Bool[Tensor, "t"],
    config: FlowConfig = FlowConfig(),
) -> Flow:
    """Lucas-Kanade tracks of corners of the upper face between neighbouring frames (grey), kept where they track back.

    One pass with two frames in memory. Pairs with a frame that has no face stay empty.
    """
    points, found = np.asarray(points_px, np.float32), np.asarray(found, bool)
    count = max(len(points) - 1, 0)
    start, end = np.zeros((count, config.points, 2)), np.zeros((count, config.points, 2))
    valid = np.zeros((count, config.points), bool)
    before = None
    for t, now in enumerate(frames):
        if before is not None and t <= count and found[t - 1] and found[t]:
            mask = _rigid_face_mask(points[t - 1, :, :2] - 0.5, before.shape)
            corners = cv2.goodFeaturesToTrack(before, config.points, 0.003, 5, mask=mask)
            if corners is not None:
                moved = np.median(points[t, :468, :2] - points[t - 1, :468, :2], axis=0)
                k = len(corners)
                search = Search(config.window_px, config.return_px)
                there, good = track_points(before, now, corners, corners + moved, search)
                start[t - 1, :k], end[t - 1, :k] = corners[:, 0] + 0.5, there[:, 0] + 0.5
                valid[t - 1, :k] = good
        before = now
    return Flow(start, end, valid)


@dataclass(frozen=True)
class Search:
    """Lucas-Kanade: side of its window (whole SIMD lanes: 16 takes half of 15's time), how near a point must return."""

    window_px: int
    return_px: float


def track_points(
    before: UInt8[np.ndarray, "h w"],
    after: UInt8[np.ndarray, "h w"],
    start: Float32[np.ndarray, "k 1 2"],
    guess: Float32[np.ndarray, "k 1 2"],
    search: Search,
) -> tuple[Float32[np.ndarray, "k 1 2"], Bool[np.ndarray, "k"]]:
    """Lucas-Kanade in pyramids: (places in `after` of points of `before`, whether tracking back returns).

    Tracking back starts at the end of a search, so it needs the full pictures alone.
    """
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 10, 0.02)
    options = {"winSize": (search.window_px, search.window_px), "criteria": stop}
    options["flags"] = cv2.OPTFLOW_USE_INITIAL_FLOW
    there, ok, _ = cv2.calcOpticalFlowPyrLK(before, after, start, guess.copy(), maxLevel=2, **options)
    back, ok_back, _ = cv2.calcOpticalFlowPyrLK(after, before, there, start.copy(), maxLevel=0, **options)
    returned = np.linalg.norm(back - start, axis=2)[:, 0] < search.return_px
    return there, (ok[:, 0] > 0) & (ok_back[:, 0] > 0) & returned


def _rigid_face_mask(face: Float[np.ndarray, "478 2"], shape: tuple[int, ...]) -> UInt8[np.ndarray, "h w"]:
    """255 on the face above the mouth, without eyes and brows. OpenCV puts pixel centres at whole numbers."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillConvexPoly(mask, cv2.convexHull(face[RIGID_FACE]).round().astype(np.int32), 255)
    return cut_out_eyes(mask, face)


def cut_out_eyes(mask: UInt8[np.ndarray, "h w"], face: Float[np.ndarray, "478 2"]) -> UInt8[np.ndarray, "h w"]:
    """Eyes and brows, with a margin, set to 0 in place."""
    for part in EYE_REGIONS:
        hull = cv2.convexHull(face[part].astype(np.float32)).round().astype(np.int32)
        cv2.fillConvexPoly(mask, hull, 0)
        cv2.polylines(mask, [hull], True, 0, 5)
    return mask


def place_flow(problem: Problem, state: State, segment: np.ndarray) -> None:
    """Set the depth of every flow point over the head's depth, from the mesh as fitted; NaN off the head."""
    flow, model = problem.flow, problem.model
    assert flow is not None
    if state.flow_depth is None:
        state.flow_depth = np.full(flow.valid.shape, np.nan)
    triangles = model.triangles.numpy()
    identity = torch.from_numpy(state.identity).float()
    for t in segment[:-1]:
        if not flow.valid[t].any():
            continue
        vertices = model.vertices(identity, torch.from_numpy(state.q[t, POSE_DIM:]).float()).double().numpy()
        rotation, _ = rotations(state.q[t : t + 1, :3])
        points = vertices @ rotation[0].T + translations(state.q[t : t + 1], state.focal)
        pixels = pinhole_jacobian(points, state.focal)[0] + problem.centre
        raster = rasterize_mesh(pixels / 2, points[:, 2], triangles, problem.width // 2, problem.height // 2)
        column, row = np.clip((flow.start_px[t] / 2).astype(int), 0, np.array(raster.depth.shape[::-1]) - 1).T
        depth = raster.depth[row, column] / (state.focal * np.exp(state.q[t, 5]))
        state.flow_depth[t] = np.where(flow.valid[t] & np.isfinite(depth), depth, np.nan)


def project_with_jacobian(
    points: Float[np.ndarray, "t k 3"], q: Float[np.ndarray, "t 6"], focal: float
) -> tuple[Float[np.ndarray, "t k 2"], Float[np.ndarray, "t k 2 6"]]:
    """Pixels (from the image's centre) of head-frame points under poses, and their derivatives by the pose."""
    rotation, right = rotations(q[:, :3])
    depth_scale, shift = np.exp(q[:, 5]), translations(q, focal)[:, None]
    pixel, by_camera = pinhole_jacobian(points @ rotation.transpose(0, 2, 1) + shift, focal)
    jacobian = np.empty((*points.shape[:2], 2, POSE_DIM))
    jacobian[..., :3] = np.cross(points[:, :, None], by_camera @ rotation[:, None]) @ right[:, None]
    jacobian[..., 3:5] = by_camera[..., :2] * depth_scale[:, None, None, None]
    jacobian[..., 5] = (by_camera @ shift[..., None])[..., 0]
    return pixel, jacobian


def add_flow_term(
    problem: Problem, state: State, segment: np.ndarray, window: np.ndarray, equations: "NormalEquations"
) -> None:
    """Add the flow term to the window's normal equations.

    The point seen at `start` lies on the head at the mesh's depth. Fixed in the head frame, it should be seen at `end`
    one frame later. Pairs reach one frame beyond the window, which stays as it is.
    """
    config, flow, focal = problem.config, problem.flow, state.focal
    first = np.arange(max(window[0] - 1, segment[0]), min(window[-1], segment[-1] - 1) + 1)
    if not len(first):
        return
    assert flow is not None and state.flow_depth is not None
    here, there = state.q[first, :POSE_DIM], state.q[first + 1, :POSE_DIM]
    ratio = state.flow_depth[first]
    valid = np.isfinite(ratio)
    z = np.where(valid, ratio, 1.0)[..., None] * (focal * np.exp(here[:, 5]))[:, None, None]
    ray = np.concatenate([(flow.start_px[first] - problem.centre) / focal, np.ones_like(z)], -1)
    points = (ray * z - translations(here, focal)[:, None]) @ rotations(here[:, :3])[0]
    _, by_here = project_with_jacobian(points, here, focal)
    seen, by_there = project_with_jacobian(points, there, focal)
    noise = (config.flow_noise * state.unit_px[first])[:, None]
    residual = (seen - (flow.end_px[first] - problem.centre)) / noise[..., None]
    weight = np.where(valid, config.flow_weight / (1 + (residual**2).sum(-1)), 0.0) / noise
    J = np.concatenate([-by_here, by_there], -1)  # "t k 2 12"
    Jw = (J * weight[..., None, None]).reshape(len(first), -1, 2 * POSE_DIM).transpose(0, 2, 1)
    H = Jw @ (J / noise[..., None, None]).reshape(len(first), -1, 2 * POSE_DIM)
    slope = (Jw @ residual.reshape(len(first), -1, 1))[..., 0]

    at, P = first - window[0], POSE_DIM
    inside, next_inside = at >= 0, at + 1 < len(window)
    both = inside & next_inside
    equations.A[at[inside], :P, :P] += H[inside, :P, :P]
    equations.g[at[inside], :P] += slope[inside, :P]
    equations.A[at[next_inside] + 1, :P, :P] += H[next_inside, P:, P:]
    equations.g[at[next_inside] + 1, :P] += slope[next_inside, P:]
    equations.pose_coupling[at[both]] += H[both, :P, P:]
