"""The head as a rigid body: poses by bundle adjustment over points on forehead, ears and hair.

Landmarks lie on the front of the face, where a nod, a change of expression and a constant error of the network look
alike. Ears and hair lie far from that surface, so their motion separates rotation from translation. Their depth is
unknown at first, but the poses of many frames determine it. So points are tracked from some training frames, the
keyframes, to all frames, and `hicode.tracking.bundle` finds poses and depths together. The landmark fit's poses and its
mesh's depth are the priors: they fix what points cannot tell (the size of the head).

The head frame itself is free by a fixed motion G: T_t G and G⁻¹ X show the same, and the priors settle it on average.
Where the mesh has hair and ears at a wrong depth, the frame follows them: on real clips the face is then 3-5 mm off its
place, which is 2-4 px in a wide turn. So the frame then moves, by one translation for the clip, to where the landmarks,
fixed in it, are seen where they were detected.

Structure (the keyframes' poses and depths) comes from training frames alone. Every other frame is posed by itself
against it, so nothing of a test frame reaches a training frame.

t frames, k keyframes, p points. Lengths in dm.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from hicode.motion import LIPS, FaceTrack
from hicode.threads import map_frames
from hicode.tracking.bundle import (
    Bundle,
    BundleConfig,
    Match,
    Pinhole,
    PointSet,
    Structure,
    adjust,
    head_points,
    resect,
    residual,
)
from hicode.tracking.fit.flow import Search, cut_out_eyes
from hicode.tracking.head_model import HeadModel
from hicode.tracking.keyframes import (
    GrayPictures,
    Keyframe,
    Pictures,
    View,
    angle_between,
    choose_keyframes,
    match_points,
    spread_over,
)


@dataclass(frozen=True)
class RigidPoseConfig:
    """How the poses of the rigid head are found. Lengths in mm on the head or px of the crop."""

    keyframes: int = 16  # at most so many; fewer where the head turns little
    spacing_deg: float = 3.0  # keyframes turn at least this far from each other
    nearest: int = 4  # keyframes that each frame is matched to; half of them until the last round
    points: int = 240  # points of a keyframe, at most
    structure_frames: int = 160  # training frames from which the structure is found
    rounds: int = 2  # matches are made again from the poses of the round before
    least_points: int = 40  # frames with fewer matches keep the landmark fit's pose
    window_px: int = 16  # side of the Lucas-Kanade window
    return_px: float = 0.4  # a match that is tracked back must return to within this
    landmark_px: float = 4.0  # residuals of landmarks beyond this count less when the head frame's origin is found
    bundle: BundleConfig = field(default_factory=BundleConfig)  # the bundle adjustment


@dataclass(frozen=True)
class RigidPoseReport:
    """What the adjustment found.

    residual_px          median over matches
    rotated_deg, moved_mm  mean change of the poses
    origin_mm            how far the head frame's origin moved to have the face where the landmarks are
    unmatched            frames left as they were
    """

    keyframes: int
    points: int
    matches_per_frame: float
    residual_px: float
    rotated_deg: float
    moved_mm: float
    origin_mm: float
    unmatched: int


@dataclass(frozen=True, eq=False)
class RigidPoints:
    """Rigid points of the head frame.

    points "p 3" dm · sigma "p" dm, deviation of each along the ray of its keyframe · keyframe "p" its frame number
    """

    points: Float[Tensor, "p 3"]
    sigma: Float[Tensor, "p"]
    keyframe: Int[Tensor, "p"]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {"points": self.points, "sigma": self.sigma, "keyframe": self.keyframe}


@dataclass(frozen=True, eq=False)
class RigidPoses:
    """Poses of all frames, the points they come from, and a report."""

    poses: Float[Tensor, "t 4 4"]
    points: RigidPoints
    report: RigidPoseReport


def refine_rigid_pose(
    pictures: Pictures | GrayPictures,
    track: FaceTrack,
    model: HeadModel,
    train: range,
    config: RigidPoseConfig = RigidPoseConfig(),
    progress: Callable[[float], None] = lambda done: None,
) -> RigidPoses:
    """Poses of the rigid head, starting from a landmark fit.

    Frames are read one by one. Memory holds the keyframes' pictures and the matches of `structure_frames`, whatever the
    clip's length.
    """
    search = _Search.start(GrayPictures.of(pictures), track, model, train, config)
    structure, frames = None, search.structure_frames
    matches: dict[int, list[Match]] = {}
    depths = [points.depth for points in search.points]
    total, done = config.rounds * (len(frames) + len(track)), 0
    for round_ in range(config.rounds):
        match = partial(search.match, last=round_ == config.rounds - 1)
        for t, found in zip(frames.tolist(), map_frames(match, frames.tolist()), strict=True):
            matches[t] = found
            done += 1
            progress(done / total)
        bundle = Bundle(search.camera, search.points, frames, dict(matches), search.prior[frames])
        structure = adjust(bundle, search.poses[frames], depths, config.bundle)
        search.poses[frames], depths = structure.poses, structure.depths
    assert structure is not None, config.rounds
    quality = _pose_all(search, structure, matches, lambda part: progress((done + part * (total - done)) / total))
    origin = face_origin(search.poses, track, frames[quality.matched[frames]], config.landmark_px)
    search.poses[quality.matched, :3, 3] += search.poses[quality.matched, :3, :3] @ origin
    points = [x - origin for x in quality.placed]
    return _result(search, structure, quality, points, float(np.linalg.norm(origin)))


@dataclass(frozen=True, eq=False)
class _Search:
    """What matching needs: priors and current poses ("t 4 4", replaced in place), keyframes with their points."""

    pictures: GrayPictures
    track: FaceTrack
    config: RigidPoseConfig
    camera: Pinhole
    prior: Float[np.ndarray, "t 4 4"]
    poses: Float[np.ndarray, "t 4 4"]
    seen: np.ndarray
    keyframes: list[Keyframe]
    points: list[PointSet]
    structure_frames: Int[np.ndarray, "m"]

    @staticmethod
    def start(
        pictures: GrayPictures, track: FaceTrack, model: HeadModel, train: range, config: RigidPoseConfig
    ) -> "_Search":
        prior = track.motion.T_camera_head.double().numpy()
        seen = track.confidence.numpy() > 0
        chosen = spread_over(np.array([t for t in train if seen[t]]), config.structure_frames)
        keys = choose_keyframes(prior, chosen, config.keyframes, config.spacing_deg, least=3)
        keyframes = [Keyframe.of(int(t), pictures, track, model) for t in keys]
        points = [_corner_points(keyframe, track, config) for keyframe in keyframes]
        frames = np.unique(np.concatenate([chosen, keys]))
        return _Search(pictures, track, config, pinhole_of(track), prior, prior.copy(), seen, keyframes, points, frames)

    def match(self, t: int, last: bool = True) -> list[Match]:
        """Matches of frame t to the keyframes nearest by the prior poses, itself left out."""
        angles = [np.inf if k.t == t else angle_between(self.prior[t], self.prior[k.t]) for k in self.keyframes]
        nearest = [
            n
            for n in np.argsort(angles)[: self.config.nearest if last else self.config.nearest // 2]
            if self.keyframes[n].t != t
        ]
        matches = [self._match_to(int(n), t, self.pictures.gray(t)) for n in nearest]
        return [match for match in matches if len(match.rows)]

    def _match_to(self, key: int, t: int, gray: UInt8[np.ndarray, "h w"]) -> Match:
        """Lucas-Kanade from a keyframe to the frame drawn into its view; kept where tracking back returns."""
        keyframe, points = self.keyframes[key], self.points[key]
        if not len(points.pixels):
            return Match(key, np.zeros(0, int), np.zeros((0, 2)))
        view = View.between(self.track.camera, self.poses[t], self.poses[keyframe.t])
        search = Search(self.config.window_px, self.config.return_px)
        at, good = match_points(keyframe, gray, view, points.pixels, points.pixels, search)
        return Match(key, np.flatnonzero(good), at[good])


def pinhole_of(track: FaceTrack) -> Pinhole:
    """The track's focal length and principal point."""
    return Pinhole(float(track.camera.K[0, 0]), track.camera.K[:2, 2].double().numpy())


@dataclass(frozen=True, eq=False)
class _Quality:
    """Points of each keyframe in the head frame; which frames were posed, their median residuals and match counts."""

    placed: list[Float[np.ndarray, "_ 3"]]
    matched: np.ndarray
    residuals: list[float]
    counts: list[int]


def _pose_all(
    search: _Search, structure: Structure, matches: dict[int, list[Match]], progress: Callable[[float], None]
) -> _Quality:
    """Pose every frame outside the structure against it, in place."""
    config, poses = search.config, search.poses
    placed = [
        head_points(points, depth, poses[points.t], search.camera)[0]
        for points, depth in zip(search.points, structure.depths, strict=True)
    ]
    quality = _Quality(placed, np.zeros(len(poses), bool), [], [])

    def pose(t: int) -> tuple[float, int] | None:
        """(median residual, matches) of frame t once it is posed; None where there is too little to hold on to."""
        known = matches.get(t)
        points, pixels = np.zeros((0, 3)), np.zeros((0, 2))
        for more in reversed(range(config.rounds if known is None else 1)):
            found = (search.match(t, last=not more) if known is None else known) if search.seen[t] else []
            if sum(len(m.rows) for m in found) < config.least_points:
                return None
            points = np.concatenate([placed[m.key][m.rows] for m in found])
            pixels = np.concatenate([m.pixels for m in found])
            if known is None:
                poses[t] = resect(search.prior[t], poses[t], points, pixels, search.camera, config.bundle)
        error = residual(poses[t], points, pixels, search.camera)[0]
        return float(np.median(np.linalg.norm(error, axis=1))), len(points)

    for t, posed in enumerate(map_frames(pose, range(len(poses)))):
        if posed is not None:
            quality.matched[t] = True
            quality.residuals.append(posed[0])
            quality.counts.append(posed[1])
        progress((t + 1) / len(poses))
    return quality


def _result(
    search: _Search, structure: Structure, quality: _Quality, points: list[np.ndarray], origin_dm: float
) -> RigidPoses:
    delta = np.linalg.inv(search.prior) @ search.poses
    report = RigidPoseReport(
        keyframes=len(search.points),
        points=sum(map(len, points)),
        matches_per_frame=float(np.mean(quality.counts)) if quality.counts else 0.0,
        residual_px=float(np.median(quality.residuals)) if quality.residuals else float("nan"),
        rotated_deg=float(np.degrees([angle_between(np.eye(4), d) for d in delta]).mean()),
        moved_mm=float(np.linalg.norm(delta[:, :3, 3], axis=1).mean() * 100),
        origin_mm=origin_dm * 100,
        unmatched=int((~quality.matched).sum()),
    )
    owner = np.concatenate([np.full(len(x), p.t) for x, p in zip(points, search.points, strict=True)])
    rigid_points = RigidPoints(
        torch.from_numpy(np.concatenate(points)).float(),
        torch.from_numpy(np.concatenate(structure.sigma)).float(),
        torch.from_numpy(owner),
    )
    return RigidPoses(torch.from_numpy(search.poses).float(), rigid_points, report)


def face_origin(
    poses: Float[np.ndarray, "t 4 4"], track: FaceTrack, frames: Int[np.ndarray, "m"], landmark_px: float = 4.0
) -> Float[np.ndarray, "3"]:
    """The translation in the head frame (dm) after which landmarks are seen, under `poses`, where they were detected.

    Gauss-Newton over `frames` with Huber's weights from `landmark_px` on; size in the image and parallax of turns
    determine it. Zero without frames.
    """
    origin, camera = np.zeros(3), pinhole_of(track)
    if not len(frames):
        return origin
    for _ in range(6):
        A, g = np.zeros((3, 3)), np.zeros(3)
        for t in frames:
            points = track.motion.landmarks[t].double().numpy() + origin
            r, by_point, _ = residual(poses[t], points, track.landmarks_px[t].double().numpy(), camera)
            weight = 1 / np.maximum(1.0, np.linalg.norm(r, axis=1) / landmark_px)
            A += np.einsum("pai,paj,p->ij", by_point, by_point, weight)
            g += np.einsum("pai,pa,p->i", by_point, r, weight)
        origin -= np.linalg.solve(A, g)
    return origin


# ---- points ----


def _corner_points(keyframe: Keyframe, track: FaceTrack, config: RigidPoseConfig) -> PointSet:
    """Corners of the rigid region that have a depth."""
    allowed = _rigid_region(keyframe.mask, keyframe.depth, track, keyframe.t)
    corners = cv2.goodFeaturesToTrack(keyframe.gray, config.points, 0.001, 5, mask=allowed)
    pixels = np.zeros((0, 2)) if corners is None else corners[:, 0].astype(np.float64)
    at = pixels.round().astype(int)
    z = keyframe.depth[at[:, 1], at[:, 0]] if len(at) else np.zeros(0)
    good = np.isfinite(z)
    return PointSet(keyframe.t, pixels[good] + 0.5, z[good].astype(np.float64))


def _rigid_region(
    mask: UInt8[np.ndarray, "h w"], depth: Float32[np.ndarray, "h w"], track: FaceTrack, t: int
) -> UInt8[np.ndarray, "h w"]:
    """255 where the head moves as one: its mask without the edge, eyes, brows, and all below the upper lip."""
    allowed = cv2.erode((mask > 200).astype(np.uint8) * 255, np.ones((7, 7), np.uint8))
    face = track.landmarks_px[t].numpy() - 0.5
    cut_out_eyes(allowed, face)
    # Below the mouth's upper edge along the head's own vertical lie jaw, neck and loose hair.
    camera = track.camera_at(t)
    rows, columns = np.nonzero((np.asarray(allowed) > 0) & np.isfinite(depth))
    pixels = torch.from_numpy(np.stack([columns + 0.5, rows + 0.5], 1).astype(np.float32))
    heights = camera.unproject(pixels, torch.from_numpy(depth[rows, columns]))[:, 1].numpy()
    lips = float(track.motion.landmarks[t, torch.from_numpy(LIPS), 1].max())
    low = heights < lips + 0.05
    allowed[rows[low], columns[low]] = 0
    lips_px = cv2.convexHull(face[LIPS].astype(np.float32)).round().astype(np.int32)
    cv2.polylines(allowed, [lips_px], True, 0, 15)
    return allowed


# ---- depth ----


@dataclass(frozen=True)
class DepthConfig:
    """How rigid points correct the mesh's depth, and for which frames depth is stored."""

    views: int = 5  # frames whose depth is stored, at most
    spacing_deg: float = 6.0  # these frames turn at least this far from each other
    near_deg: float = 25.0
    """Points of keyframes that turn further than this from a frame may lie on what it does not show."""
    blur_px: float = 8.0  # how far a point's depth counts for its neighbours
    least_sigma_mm: float = 2.0  # smallest deviation of a point's depth
    mesh_sigma_mm: float = 8.0  # deviation of the mesh's depth: about the mean correction on real heads (5-10 mm)
    mismatch_mm: float = 40.0  # points further than this from the mesh are mismatches


def corrected_depth(
    depth: Float32[np.ndarray, "h w"],
    rigid_points: RigidPoints,
    track: FaceTrack,
    t: int,
    config: DepthConfig = DepthConfig(),
) -> Float32[np.ndarray, "h w"]:
    """The mesh's depth of frame t, corrected by the rigid points near it: it has neither ears nor hair of its own."""
    poses = track.motion.T_camera_head.double().numpy()
    keys = rigid_points.keyframe.numpy()
    near_rad = np.radians(config.near_deg)
    near = np.isin(keys, [k for k in np.unique(keys) if angle_between(poses[k], poses[t]) < near_rad])
    pixels, z = track.camera_at(t).project(rigid_points.points[torch.from_numpy(near)])
    column, row = pixels.numpy().astype(int).T
    height, width = depth.shape
    seen = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row, z = column[seen], row[seen], z.numpy()[seen]
    sigma = rigid_points.sigma.numpy()[near][seen]
    change = z - depth[row, column]
    good = np.abs(change) < 0.01 * config.mismatch_mm  # false for NaN, off the head
    weight = 1 / (sigma[good] ** 2 + (0.01 * config.least_sigma_mm) ** 2)
    total, weights = np.zeros(depth.shape, np.float32), np.zeros(depth.shape, np.float32)
    np.add.at(total, (row[good], column[good]), weight * change[good])
    np.add.at(weights, (row[good], column[good]), weight)
    spread = 2 * np.pi * config.blur_px**2  # a point keeps its weight at its own place
    total, weights = (cv2.GaussianBlur(x, (0, 0), config.blur_px) * spread for x in (total, weights))
    return (depth + total / (weights + (0.01 * config.mesh_sigma_mm) ** -2)).astype(np.float32)
