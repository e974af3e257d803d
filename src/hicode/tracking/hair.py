"""Hair that goes where it was seen to go.

The rigid points say how a skull moves, the landmarks how a face does; hair swings beside both, by one to three px on frames that turn beyond the training ones,
and what its depth is guessed wrong by looks like a swing that goes with the turn. Here points on the head outside the face are followed: every frame is drawn
into the view of some keyframes (through their surface and both poses), dense optical flow says what is left between the two pictures, and each point gets the
one trajectory that its matches agree on, as landmarks do (`hicode.tracking.landmark_drift`). The carrier takes Gaussians along (`hicode.avatar.deformation`).

t frames, k keyframes, p points. Displacements are against the skull, in the head frame (dm). Keyframes are training frames; test frames are matched to
them as any others are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from scipy.spatial import cKDTree
from torch import Tensor

from hicode.motion import FaceTrack
from hicode.tracking.depth import head_depth
from hicode.tracking.head_model import HeadModel
from hicode.tracking.landmark_drift import SkinConfig, View, trajectories
from hicode.tracking.rigid_pose import Skull, corrected_depth, gray_image, project, smooth_surface, through_surface

SCALE = 0.5  # pictures are matched at half size: a quarter of the time, and flow is smoothed over more than it loses


@dataclass(frozen=True)
class HairConfig(SkinConfig):
    """How hair is followed; px are those of the pictures at half size."""

    return_px: float = 0.5  # flow there and back must return to within this
    most_px: float = 10.0
    noise_px: float = 0.6
    network: float = 0.01  # how much the skull counts beside one match
    reach_mm: float = 10.0
    smooth_frames: float = 1.0
    step_px: int = 6  # points are taken from every so many px of the views whose depth is known
    apart_mm: float = 8.0  # and are so far apart
    face_mm: float = 15.0  # and so far from every landmark
    smooth_px: float = 3.0  # flow is averaged about so many px, where there and back agree
    seen: float = 0.35  # a point is matched where so much of its surroundings is
    hidden_mm: float = 25.0  # and where the keyframe's surface is within this of it


@dataclass(frozen=True)
class HairReport:
    """points; matches a point and frame; mean length of what they move (px of the crop)."""

    points: int
    matches: float
    moved_px: float


def follow_hair(
    image: Callable[[int], np.ndarray],
    mask: Callable[[int], np.ndarray],
    depths: dict[int, Float32[np.ndarray, "h w"]],
    track: FaceTrack,
    skull: Skull,
    model: HeadModel,
    train: range,
    config: HairConfig = HairConfig(),
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[Float[Tensor, "p 3"], Float[Tensor, "t p 3"], HairReport]:
    """Points on the head outside the face, and how far each is from its place on the skull in every frame; over the training frames that is nothing on average.

    `image(t)` is RGB uint8, `mask(t)` the head mask; frames are read one by one. `depths` are those of the views that a head starts from. Frames without a
    face move nothing. A head without hair, or without rigid points, has no points.
    """
    view = View(track, train, SCALE)
    seen = track.confidence.numpy() > 0
    keys = np.unique(skull.keyframe.numpy())
    points = _points(mask, depths, track, train, config)
    p = len(points)
    if not p or not len(keys) or not seen[train.start : train.stop].any():
        return torch.zeros(0, 3), torch.zeros(len(track), 0, 3), HairReport(0, 0.0, 0.0)
    keyframes = [_Keyframe.of(int(k), image, mask, points, view, track, skull, model, config) for k in keys]

    def matches(t: int) -> Float32[np.ndarray, "k p 3"]:
        out = np.full((len(keys), p, 3), np.nan, np.float32)
        gray, head = _halved(gray_image(image(t))), _halved(mask(t))
        for j in view.nearest(t, keys, config):
            out[j] = _match(view, keyframes[j], t, gray, head, config)
        return out

    moved, trust, found = trajectories(matches, keys, p, track, train, view, config, progress)
    blend = _neighbours(points, trust, config).astype(np.float32)
    for t in range(len(track)):  # in place: clips may be long
        moved[t] = blend @ moved[t]
    learned = np.array([t for t in train if seen[t]])
    moved[seen] -= sum(moved[t] for t in learned) / np.float32(len(learned))
    report = HairReport(
        p, found / (int(seen.sum()) * p), float(np.linalg.norm(moved[seen], axis=-1).mean()) * view.px_per_dm / SCALE
    )
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(moved), report


def _points(
    mask: Callable[[int], np.ndarray], depths: dict[int, np.ndarray], track: FaceTrack, train: range, config: HairConfig
) -> Float[np.ndarray, "p 3"]:
    """Places on the head, on the skull's frame, as the views show them: on a grid, well inside the mask, none near the face or one another."""
    face = cKDTree(track.motion.landmarks[train.start : train.stop].mean(0).numpy())
    points = np.zeros((0, 3))
    step = round(config.step_px / SCALE)
    for t, depth in depths.items():
        inside = cv2.erode((mask(t) > 200).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        rows, columns = np.mgrid[step // 2 : depth.shape[0] : step, step // 2 : depth.shape[1] : step].reshape(2, -1)
        good = inside[rows, columns] & np.isfinite(depth[rows, columns])
        pixels = torch.from_numpy(np.stack([columns[good] + 0.5, rows[good] + 0.5], 1).astype(np.float32))
        at = (
            track.camera_at(t)
            .unproject(pixels, torch.from_numpy(depth[rows[good], columns[good]].astype(np.float32)))
            .double()
            .numpy()
        )
        new = face.query(at)[0] > 0.01 * config.face_mm if len(at) else np.zeros(0, bool)
        if len(points) and len(at):
            new &= cKDTree(points).query(at)[0] > 0.01 * config.apart_mm
        points = np.concatenate([points, at[new]])
    return points


@dataclass(frozen=True)
class _Keyframe:
    """At half size: picture, head mask and surface, where the points fall ("p 2" px), and which of them are to be seen."""

    t: int
    gray: UInt8[np.ndarray, "h w"]
    head: Bool[np.ndarray, "h w"]
    surface: Float32[np.ndarray, "h4 w4"]
    pixels: Float[np.ndarray, "p 2"]
    visible: Bool[np.ndarray, "p"]

    @staticmethod
    def of(
        t: int,
        image: Callable,
        mask: Callable,
        points: np.ndarray,
        view: View,
        track: FaceTrack,
        skull: Skull,
        model: HeadModel,
        config: HairConfig,
    ) -> "_Keyframe":
        gray, head = _halved(gray_image(image(t))), _halved(mask(t)) > 127
        surface = smooth_surface(corrected_depth(head_depth(model, track, t, mask(t)), skull, track, t))
        pixels = project(view.poses[t], points, view.focal, view.centre)
        depth = points @ view.poses[t][2, :3] + view.poses[t][2, 3]
        shown = _at(cv2.resize(surface, gray.shape[::-1]), pixels)
        visible = (np.abs(shown - depth) < 0.01 * config.hidden_mm) & (_at(head.astype(np.float32), pixels) > 0.5)
        return _Keyframe(t, gray, head, surface, pixels, visible)


def _match(
    view: View, key: _Keyframe, t: int, gray: np.ndarray, head: np.ndarray, config: HairConfig
) -> Float[np.ndarray, "p 3"]:
    """How far frame t has the points from where the skull takes the keyframe's, across the rays of t; NaN where it cannot be told."""
    where, drawn = through_surface(key.surface, gray, view.poses[t], view.poses[key.t], view.focal, view.centre)
    h, w = gray.shape
    here = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.float32)
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    there = here + search.calc(key.gray, drawn, None)
    back = cv2.remap(search.calc(drawn, key.gray, None), there, None, cv2.INTER_LINEAR)
    off = cv2.remap(where, there, None, cv2.INTER_LINEAR) - where
    good = np.linalg.norm(there - here + back, axis=-1) < config.return_px
    good &= (
        key.head
        & (cv2.remap(head, where + off, None, cv2.INTER_LINEAR) > 127)
        & (np.linalg.norm(off, axis=-1) < config.most_px)
    )
    weight = good.astype(np.float32)
    near = cv2.GaussianBlur(weight, (0, 0), config.smooth_px)
    mean = cv2.GaussianBlur(off * weight[..., None], (0, 0), config.smooth_px) / np.maximum(near, 1e-3)[..., None]
    sure = key.visible & (_at(near, key.pixels) > config.seen)
    shift = (
        np.concatenate([_at(mean, key.pixels) / view.px_per_dm, np.zeros((len(sure), 1))], 1) @ view.poses[t][:3, :3]
    )
    return np.where(sure[:, None], shift, np.nan)


def _neighbours(points: np.ndarray, trust: Float[np.ndarray, "p"], config: HairConfig) -> Float[np.ndarray, "p p"]:
    """Which share of its neighbours' displacements each point takes, by nearness and by how well these are matched; less in all where none is."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    kernel = np.exp(-((distance / (0.01 * config.reach_mm)) ** 2)) * trust
    total = kernel.sum(1, keepdims=True)
    return kernel / np.maximum(total, 1e-9) * (total / (total + 0.5))


def _halved(picture: np.ndarray) -> np.ndarray:
    return cv2.resize(picture, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_AREA)


def _at(values: np.ndarray, pixels: Float[np.ndarray, "p 2"]) -> np.ndarray:
    """Bilinear; 0 outside."""
    place = (pixels - 0.5).astype(np.float32)[None]
    return cv2.remap(
        np.ascontiguousarray(values, np.float32),
        place,
        None,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=0,
    )[0]
