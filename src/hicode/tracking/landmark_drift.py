"""Landmarks that stay on the skin.

The landmark network finds a landmark anew in every frame. As a head turns, its nose and brows slide over the skin by
two to four px, for seconds, and what is bound to them slides along. Here windows about the landmarks of some keyframes
are matched to every frame, and each landmark gets the one trajectory that agrees with its matches and, on average, with
the network. Keyframes are training frames; a test frame is matched to them as any other is.

t frames, k keyframes, l = 478 landmarks, s structure frames. Corrections are displacements in the head frame (dm).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, UInt8
from scipy.ndimage import gaussian_filter1d

from hicode.camera import Camera
from hicode.geometry import smoothstep
from hicode.motion import FACE_OVAL, IRISES, LEFT_EYE_RING, LIPS, N_LANDMARKS, RIGHT_EYE_RING, FaceTrack
from hicode.threads import map_frames
from hicode.tracking.fit.flow import Search
from hicode.tracking.head_model import HeadModel
from hicode.tracking.keyframes import GrayPictures, Keyframe, Pictures, View, angle_between, match_points, spread_over
from hicode.tracking.rigid_pose import RigidPoints

Progress = Callable[[float], None]


@dataclass(frozen=True)
class DriftConfig:
    """How landmarks are matched and smoothed. Lengths in px of the crop, or mm on the head."""

    points: int = 160
    """Landmarks that are matched, spread over the face: windows of neighbours overlap, so the others add little."""
    nearest: int = 3  # keyframes that each frame is matched to
    pose_deg: float = 6.0  # unit of distance between poses when keyframes are chosen
    expression: float = 1.5  # unit of distance between expressions when keyframes are chosen
    structure_frames: int = 160  # training frames from which the keyframes' own corrections are found
    window_px: int = 24  # side of the Lucas-Kanade window
    return_px: float = 0.7  # a match that is tracked back must return to within this
    most_px: float = 6.0  # matches further than this from the network's landmark are wrong
    noise_px: float = 1.0  # deviation of a match; larger residuals count less and less
    network: float = 0.007
    """Weight of the network's landmark in one frame against one match: its errors last for seconds."""
    reach_mm: float = 12.0  # how far a landmark's correction counts for its neighbours
    wide_mm: float = 30.0
    """The same for lips and lids, which change too much to be matched: they follow the skin around them."""
    outline_mm: float = 20.0
    """Corrections fade to zero over this distance before the face's outline, which is a silhouette."""
    rounds: int = 6  # rounds of reweighting
    smooth_frames: float = 1.5  # deviation of the smoothing over time: matches have a jitter of their own


@dataclass(frozen=True)
class DriftReport:
    """matches of a landmark and frame; mean length of the corrections (px)."""

    matches: float
    moved_px: float


def correct_landmark_drift(
    pictures: Pictures | GrayPictures,
    track: FaceTrack,
    rigid_points: RigidPoints,
    model: HeadModel,
    train: range,
    config: DriftConfig = DriftConfig(),
    progress: Progress = lambda done: None,
) -> tuple[FaceTrack, DriftReport]:
    """The track with canonical landmarks that stay on the skin.

    Poses, expressions and `landmarks_px` (where the network detected them) are kept. Frames are read one by one; those
    without a face are left alone.
    """
    view = _View.of(track, train)
    gray_pictures = GrayPictures.of(pictures)
    keyframes = [Keyframe.of(int(k), gray_pictures, track, model) for k in np.unique(rigid_points.keyframe.numpy())]
    keys = np.array([keyframe.t for keyframe in keyframes], int)
    steady = np.ones(N_LANDMARKS, bool)
    steady[np.concatenate([LIPS, LEFT_EYE_RING, RIGHT_EYE_RING, IRISES])] = False
    matchable = _spread_out(model.landmarks(model.mean).numpy(), steady, config.points)

    def matches(t: int) -> Float32[np.ndarray, "k l 3"]:
        """How far from the network's landmark each keyframe's match is; NaN where there is none."""
        out = np.full((len(keys), N_LANDMARKS, 3), np.nan, np.float32)
        gray = gray_pictures.gray(t)
        for j in view.nearest(t, keys, config):
            out[j, matchable] = _match(view, keyframes[j], t, gray, matchable, config)
        return out

    structure = _structure_frames(keys, track, train, config)
    found = _trajectories(matches, keys, structure, view, config, progress)
    mean = track.motion.landmarks[torch.from_numpy(structure)].mean(0).numpy()
    share = steady.sum() / matchable.sum()  # each matched landmark stands for so many
    corrections = _spread(found.moved, found.trust * share, mean, ~steady, config)
    corrections[~view.seen] = 0
    moved = torch.from_numpy(corrections)
    report = DriftReport(
        found.count / max(1, int(view.seen.sum()) * int(matchable.sum())),
        float(moved[torch.from_numpy(view.seen)].norm(dim=-1).mean()) * view.px_per_dm,
    )
    return replace(track, motion=replace(track.motion, landmarks=track.motion.landmarks + moved)), report


def _spread_out(places: Float[np.ndarray, "l 3"], among: Bool[np.ndarray, "l"], most: int) -> Bool[np.ndarray, "l"]:
    """At most `most` places, each next one the farthest from those chosen."""
    chosen = np.zeros(len(places), bool)
    distance = np.where(among, np.inf, -1.0)
    while chosen.sum() < min(most, among.sum()):
        i = int(distance.argmax())
        chosen[i] = True
        distance = np.minimum(distance, np.linalg.norm(places - places[i], axis=1))
        distance[i] = -1.0
    return chosen


# ---- matches ----


@dataclass(frozen=True, eq=False)
class _View:
    """A track in double precision, and which part of it trains."""

    camera: Camera
    poses: Float[np.ndarray, "t 4 4"]
    landmarks: Float[np.ndarray, "t 478 3"]
    expression: Float[np.ndarray, "t 64"]
    seen: Bool[np.ndarray, "t"]
    train: range
    px_per_dm: float

    @staticmethod
    def of(track: FaceTrack, train: range) -> "_View":
        motion = track.motion
        poses = motion.T_camera_head.double().numpy()
        px_per_dm = float(track.camera.K[0, 0]) / float(poses[train.start : train.stop, 2, 3].mean())
        landmarks, expression = motion.landmarks.double().numpy(), motion.expression.double().numpy()
        return _View(
            track.camera.double(), poses, landmarks, expression, track.confidence.numpy() > 0, train, px_per_dm
        )

    def camera_at(self, t: int) -> Camera:
        return self.camera.with_pose(torch.from_numpy(self.poses[t]))

    def pixels(self, t: int, pose: int) -> Float[np.ndarray, "l 2"]:
        """The landmarks of frame t as the camera of frame `pose` sees them."""
        return self.camera_at(pose).project(torch.from_numpy(self.landmarks[t]))[0].numpy()

    def nearest(self, t: int, keys: Int[np.ndarray, "k"], config: DriftConfig) -> Int[np.ndarray, "n"]:
        """Which keyframes are most like frame t in pose and expression, itself left out."""
        angle = np.degrees([angle_between(self.poses[t], self.poses[k]) for k in keys]) / config.pose_deg
        face = np.linalg.norm(self.expression[t] - self.expression[keys], axis=1) / config.expression
        order = np.argsort(np.where(keys == t, np.inf, angle + face))
        return order[: min(config.nearest, len(keys) - int(t in keys))]


def _structure_frames(
    keys: Int[np.ndarray, "k"], track: FaceTrack, train: range, config: DriftConfig
) -> Int[np.ndarray, "s"]:
    """Training frames with a face from which the keyframes' corrections are found; keyframes are among them."""
    frames = np.array([t for t in train if track.confidence[t] > 0], int)
    return np.unique(np.concatenate([spread_over(frames, config.structure_frames), keys]))


def _match(
    view: _View,
    keyframe: Keyframe,
    t: int,
    gray: UInt8[np.ndarray, "h w"],
    which: Bool[np.ndarray, "l"],
    config: DriftConfig,
) -> Float[np.ndarray, "n 3"]:
    """Lucas-Kanade from some landmarks of a keyframe to frame t drawn into its view, from the network's landmark on."""
    between = View.between(view.camera, view.poses[t], view.poses[keyframe.t])
    start, guess = (view.pixels(frame, keyframe.t)[which] for frame in (keyframe.t, t))
    at, good = match_points(keyframe, gray, between, start, guess, Search(config.window_px, config.return_px))
    off = at - view.pixels(t, t)[which]
    good &= np.linalg.norm(off, axis=1) < config.most_px
    across = np.concatenate([off / view.px_per_dm, np.zeros((len(off), 1))], 1)  # across the ray
    return np.where(good[:, None], across @ view.poses[t][:3, :3], np.nan)


# ---- trajectories ----


@dataclass(frozen=True, eq=False)
class _Trajectories:
    """Displacements (dm), the mean weight of each point's matches in a training frame, and the count of matches."""

    moved: Float32[np.ndarray, "t n 3"]
    trust: Float[np.ndarray, "n"]
    count: int


def _trajectories(
    matches: Callable[[int], Float32[np.ndarray, "k n 3"]],
    keys: Int[np.ndarray, "k"],
    structure: Int[np.ndarray, "s"],
    view: _View,
    config: DriftConfig,
    progress: Progress,
) -> _Trajectories:
    """One trajectory for each point from its matches to keyframes.

    `matches(t)`: how far each keyframe has the points of frame t from where they are expected, NaN without a match. It
    is called once for each frame. Trajectories are smooth within each segment: no training frame depends on a test
    frame. Nothing moves in frames without a face.
    """
    frames, seen, train = len(view.poses), view.seen, view.train
    steps = len(structure) + frames
    at_structure = np.empty((len(structure), len(keys), N_LANDMARKS, 3), np.float32)
    for row, found in enumerate(map_frames(matches, structure.tolist())):
        at_structure[row] = found
        progress((row + 1) / steps)
    anchors = solve_keyframes(at_structure, np.searchsorted(structure, keys), view.px_per_dm, config)

    moved, trust, count = np.zeros((frames, N_LANDMARKS, 3), np.float32), np.zeros(N_LANDMARKS), 0
    row_of = {int(t): row for row, t in enumerate(structure)}

    def match(t: int) -> Float32[np.ndarray, "k n 3"] | None:
        return (at_structure[row_of[t]] if t in row_of else matches(t)) if seen[t] else None

    for t, found in enumerate(map_frames(match, range(frames))):
        if found is not None:
            moved[t], weights = solve_frame(found, anchors, view.px_per_dm, config)
            trust += weights.sum(0) if t in train else 0
            count += int(np.isfinite(found[..., 0]).sum())
        progress((len(structure) + t + 1) / steps)
    for segment in np.split(np.arange(frames), [t for t in (train.start, train.stop) if 0 < t < frames]):
        moved[segment] = smoothed(moved[segment], seen[segment], config.smooth_frames)
    moved[~seen] = 0
    return _Trajectories(moved, trust / max(1, int(seen[train.start : train.stop].sum())), count)


def _weights(residual: Float[np.ndarray, "*b 3"], px_per_dm: float, config: DriftConfig) -> Float[np.ndarray, "*b"]:
    """Geman-McClure's of a residual; 0 where there is no match."""
    size = np.linalg.norm(residual, axis=-1) * px_per_dm / config.noise_px
    return np.nan_to_num(1 / (1 + size * size) ** 2)


def solve_keyframes(
    matches: Float[np.ndarray, "s k l 3"], key_rows: Int[np.ndarray, "k"], px_per_dm: float, config: DriftConfig
) -> Float[np.ndarray, "k l 3"]:
    """The keyframes' own corrections c: a match e of keyframe j in frame t says c_t - c_j = e, the network says c = 0.

    Frames that are no keyframes are linked to keyframes alone, so each is eliminated by itself: k unknowns for each
    landmark and axis remain, whatever the clip's length.
    """
    s, k, n, _ = matches.shape
    c = np.zeros((s, n, 3))
    valid = np.isfinite(matches[..., 0])
    e = np.nan_to_num(matches).astype(np.float64)
    free = np.ones(s, bool)
    free[key_rows] = False
    diagonal = np.arange(k)
    for _ in range(config.rounds):
        residual = np.where(valid[..., None], c[:, None] - c[key_rows][None] - e, np.nan)
        w = _weights(residual, px_per_dm, config)  # s k l
        A, b = np.zeros((n, k, k)), np.zeros((n, k, 3))
        A[:, diagonal, diagonal] += config.network
        for i, row in enumerate(key_rows):  # keyframes seen in keyframes
            A[:, i, i] += w[row].sum(0)
            A[:, diagonal, diagonal] += w[row].T
            A[:, i, :] -= w[row].T
            A[:, :, i] -= w[row].T
            b[:, i] += (w[row][..., None] * e[row]).sum(0)
            b -= (w[row][..., None] * e[row]).transpose(1, 0, 2)
        # Other frames are eliminated: c_t = Σ w (c_j + e) / (Σ w + network).
        wf, ef = w[free], e[free]
        total = wf.sum(1) + config.network  # s l
        mean = (wf[..., None] * ef).sum(1) / total[..., None]
        A[:, diagonal, diagonal] += wf.sum(0).T
        A -= np.einsum("sil,sjl->lij", wf / total[:, None], wf)
        b += (wf[..., None] * (mean[:, None] - ef)).sum(0).transpose(1, 0, 2)
        c[key_rows] = np.linalg.solve(A, b).transpose(1, 0, 2)
        c[free] = (wf[..., None] * (c[key_rows][None] + ef)).sum(1) / total[..., None]
    return c[key_rows]


def solve_frame(
    matches: Float[np.ndarray, "k l 3"], anchors: Float[np.ndarray, "k l 3"], px_per_dm: float, config: DriftConfig
) -> tuple[Float[np.ndarray, "l 3"], Float[np.ndarray, "k l"]]:
    """(a frame's corrections from its matches and the keyframes' corrections, the final weight of each match)."""
    targets = anchors + matches
    c, w = np.zeros(targets.shape[1:]), np.zeros(targets.shape[:2])
    matched = np.isfinite(targets[..., 0]).any(0)
    with np.errstate(all="ignore"):
        c[matched] = np.nanmedian(targets[:, matched], 0)
    for _ in range(config.rounds):
        w = _weights(targets - c, px_per_dm, config)
        c = (w[..., None] * np.nan_to_num(targets)).sum(0) / (w.sum(0) + config.network)[:, None]
    return c, w


def smoothed(
    values: Float32[np.ndarray, "t n 3"], seen: Bool[np.ndarray, "t"], sigma: float
) -> Float32[np.ndarray, "t n 3"]:
    """Gaussian mean over time, frames without a face left out."""
    weight = gaussian_filter1d(seen.astype(np.float32), sigma, mode="constant")
    total = gaussian_filter1d(values * seen[:, None, None], sigma, axis=0, mode="constant")
    total /= np.maximum(weight, 1e-9)[:, None, None]
    return total


def _spread(
    corrections: Float32[np.ndarray, "t l 3"],
    trust: Float[np.ndarray, "l"],
    places: Float[np.ndarray, "l 3"],
    unmatched: Bool[np.ndarray, "l"],
    config: DriftConfig,
) -> Float32[np.ndarray, "t l 3"]:
    """Smooth over the face: each landmark takes the mean of its neighbours and itself, weighted by trust.

    Far from all that is trusted, the wider neighbourhood counts.
    """
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    inside = smoothstep(distance[:, FACE_OVAL].min(1) / (config.outline_mm * 0.01))
    trust = trust * (inside > 0.2) * ~unmatched

    def kernel(reach_mm: float) -> tuple[np.ndarray, np.ndarray]:
        weight = np.exp(-((distance / (reach_mm * 0.01)) ** 2)) * trust
        total = weight.sum(1)
        return weight / np.maximum(total, 1e-9)[:, None], total

    near, total = kernel(config.reach_mm)
    wide, _ = kernel(config.wide_mm)
    share = (total / (total + 1.0))[:, None]
    share[unmatched] = 0
    # All of it is linear: one matrix serves every frame.
    blend = (inside[:, None] * (share * near + (1 - share) * wide)).astype(np.float32)
    return np.matmul(blend, corrections)
