"""Landmarks that go with the skin.

The landmark network finds a landmark anew in every frame, by what faces look like from there: as a head turns, its nose and brows slide over the skin by
two to four px, for seconds, and what is bound to them slides along. Here the skin says where it went: windows about the landmarks of some keyframes
are matched to every frame (as the rigid points are, `hicode.tracking.rigid_pose`), and each landmark gets the one trajectory that agrees with its matches
and, on average, with the network. Keyframes are training frames; a test frame is matched to them as any other is.

t frames, k keyframes, l = 478 landmarks. Corrections are displacements in the head frame (dm).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from scipy.ndimage import gaussian_filter1d

from hicode.geometry import smoothstep
from hicode.motion import FACE_OVAL, LEFT_EYE_RING, LIPS, N_LANDMARKS, RIGHT_EYE_RING, FaceTrack
from hicode.tracking.depth import head_depth
from hicode.tracking.head_model import HeadModel
from hicode.tracking.rigid_pose import Skull, angle_between, gray_image, project, smooth_surface, through_surface

IRISES = np.arange(468, N_LANDMARKS)


@dataclass(frozen=True)
class SkinConfig:
    """How skin is followed. Lengths in px of the crop, or mm on the head."""

    nearest: int = 4  # keyframes that each frame is matched to
    pose_deg: float = 6.0  # keyframes are near by pose ...
    expression: float = 1.5  # ... and by expression: what counts as much in it as `pose_deg`
    structure_frames: int = 160  # training frames that the keyframes' own corrections are found from
    window_px: int = 25
    return_px: float = 0.7  # a match that is tracked back must return to within this
    most_px: float = 6.0  # matches further than this from the network's landmark are wrong
    noise_px: float = 1.0  # of a match; beyond it they count less and less
    network: float = 0.007  # how much one look of the network counts beside one match: its errors last for seconds
    reach_mm: float = 12.0  # how far a landmark's correction speaks for its neighbours
    wide_mm: float = (
        30.0  # the same for lips and lids, which change too much to be matched: they go with the skin round about
    )
    outline_mm: float = 20.0  # corrections fade to nothing over so much before the face's outline, a silhouette, which goes with the skull
    rounds: int = 6
    smooth_frames: float = 1.5  # corrections are smoothed over time: the network's shake is dealt with before, and a match has one of its own


@dataclass(frozen=True)
class SkinReport:
    """matches a landmark and frame; mean length of the corrections (px)."""

    matches: float
    moved_px: float


def follow_skin(
    image: Callable[[int], np.ndarray],
    mask: Callable[[int], np.ndarray],
    track: FaceTrack,
    skull: Skull,
    model: HeadModel,
    train: range,
    config: SkinConfig = SkinConfig(),
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[FaceTrack, SkinReport]:
    """The track with canonical landmarks that stay on the skin. Poses, expressions and `landmarks_px`, where the network saw them, are kept.

    `image(t)` is RGB uint8, `mask(t)` the head mask; frames are read one by one. Frames without a face are left alone.
    """
    view = View(track, train)
    keys = np.unique(skull.keyframe.numpy())
    pictures = [gray_image(image(int(k))) for k in keys]
    surfaces = [smooth_surface(head_depth(model, track, int(k), mask(int(k)))) for k in keys]
    matchable = np.ones(N_LANDMARKS, bool)
    matchable[np.concatenate([LIPS, LEFT_EYE_RING, RIGHT_EYE_RING, IRISES])] = False

    def matches(t: int) -> Float[np.ndarray, "k l 3"]:
        """How far from the network's landmark each keyframe's match has it; NaN where there is none."""
        out = np.full((len(keys), N_LANDMARKS, 3), np.nan, np.float32)
        gray = gray_image(image(t))
        for j in view.nearest(t, keys, config):
            out[j, matchable] = _match(view, int(keys[j]), pictures[j], surfaces[j], t, gray, matchable, config)
        return out

    corrections, trust, found = trajectories(matches, keys, N_LANDMARKS, track, train, view, config, progress)
    seen = track.confidence.numpy() > 0
    usual = track.motion.landmarks[structure_frames(keys, track, train, config)].mean(0).numpy()
    corrections = _spread(corrections, trust, usual, ~matchable, config)
    corrections[~seen] = 0
    moved = torch.from_numpy(corrections)
    report = SkinReport(
        found / max(1, int(seen.sum()) * int(matchable.sum())),
        float(moved[torch.from_numpy(seen)].norm(dim=-1).mean()) * view.px_per_dm,
    )
    return replace(track, motion=replace(track.motion, landmarks=track.motion.landmarks + moved)), report


class View:
    """A track in numpy, in pictures of `scale` times the crop's size."""

    def __init__(self, track: FaceTrack, train: range, scale: float = 1.0):
        self.poses = track.motion.T_camera_head.double().numpy()
        self.landmarks = track.motion.landmarks.double().numpy()
        self.expression = track.motion.expression.double().numpy()
        self.focal, self.centre = scale * float(track.camera.K[0, 0]), scale * track.camera.K[:2, 2].double().numpy()
        self.px_per_dm = self.focal / float(self.poses[train.start : train.stop, 2, 3].mean())

    def pixels(self, t: int, pose: int | None = None) -> Float[np.ndarray, "l 2"]:
        """The landmarks of frame t as the camera of frame `pose` (t's own) sees them."""
        return project(self.poses[t if pose is None else pose], self.landmarks[t], self.focal, self.centre)

    def nearest(self, t: int, keys: Int[np.ndarray, "k"], config: SkinConfig) -> Int[np.ndarray, "n"]:
        """Which keyframes look most like frame t, itself left out."""
        angle = np.degrees([angle_between(self.poses[t], self.poses[k]) for k in keys]) / config.pose_deg
        face = np.linalg.norm(self.expression[t] - self.expression[keys], axis=1) / config.expression
        return np.argsort(np.where(keys == t, np.inf, angle + face))[: min(config.nearest, len(keys) - int(t in keys))]


def structure_frames(
    keys: Int[np.ndarray, "k"], track: FaceTrack, train: range, config: SkinConfig
) -> Int[np.ndarray, "s"]:
    """Training frames with a face, spread over the part, from which the keyframes' own displacements are found; the keyframes are among them."""
    frames = np.array([t for t in train if track.confidence[t] > 0], int)
    chosen = (
        frames[np.linspace(0, len(frames) - 1, min(config.structure_frames, len(frames))).round().astype(int)]
        if len(frames)
        else frames
    )
    return np.unique(np.concatenate([chosen, keys]))


def trajectories(
    matches: Callable[[int], Float[np.ndarray, "k n 3"]],
    keys: Int[np.ndarray, "k"],
    n: int,
    track: FaceTrack,
    train: range,
    view: View,
    config: SkinConfig,
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[Float32[np.ndarray, "t n 3"], Float[np.ndarray, "n"], int]:
    """One trajectory for each of n points from their matches to keyframes: displacements (dm), how well each is matched in a training frame, matches in all.

    `matches(t)`: how far each keyframe has the points of frame t from where they are expected, NaN where there is no match; each frame is asked for once.
    Smooth over time within the training part and beside it: no training frame depends on a test frame. Nothing moves in frames without a face.
    """
    seen = track.confidence.numpy() > 0
    structure = structure_frames(keys, track, train, config)
    steps = len(structure) + len(track)
    at_structure = np.empty((len(structure), len(keys), n, 3), np.float32)
    for row, t in enumerate(structure):
        at_structure[row] = matches(int(t))
        progress((row + 1) / steps)
    anchors = solve_keyframes(at_structure, np.searchsorted(structure, keys), view.px_per_dm, config)

    moved = np.zeros((len(track), n, 3), np.float32)
    trust = np.zeros(n)
    row_of = {int(t): row for row, t in enumerate(structure)}
    found = 0
    for t in range(len(track)):
        if seen[t]:
            e = at_structure[row_of[t]] if t in row_of else matches(t)
            moved[t], weights = solve_frame(e, anchors, view.px_per_dm, config)
            trust += weights.sum(0) if t in train else 0
            found += int(np.isfinite(e[..., 0]).sum())
        progress((len(structure) + t + 1) / steps)
    for segment in np.split(np.arange(len(track)), [t for t in (train.start, train.stop) if 0 < t < len(track)]):
        moved[segment] = smoothed(moved[segment], seen[segment], config.smooth_frames)
    moved[~seen] = 0
    return moved, trust / max(1, int(seen[train.start : train.stop].sum())), found


def _match(
    view: View,
    key: int,
    picture: np.ndarray,
    surface: np.ndarray,
    t: int,
    gray: np.ndarray,
    which: Bool[np.ndarray, "l"],
    config: SkinConfig,
) -> Float[np.ndarray, "n 3"]:
    """Lucas-Kanade from some landmarks of a keyframe to frame t, drawn as the keyframe's camera would see it; from the network's landmark there on."""
    where, drawn = through_surface(surface, gray, view.poses[t], view.poses[key], view.focal, view.centre)
    start = (view.pixels(key)[which] - 0.5).astype(np.float32)[:, None]
    guess = (view.pixels(t, key)[which] - 0.5).astype(np.float32)[:, None]
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 20, 0.01)
    search = {
        "winSize": (config.window_px, config.window_px),
        "maxLevel": 2,
        "criteria": criteria,
        "flags": cv2.OPTFLOW_USE_INITIAL_FLOW,
    }
    there, ok, _ = cv2.calcOpticalFlowPyrLK(picture, drawn, start, guess.copy(), **search)
    back, ok_back, _ = cv2.calcOpticalFlowPyrLK(drawn, picture, there, start.copy(), **search)
    at = (
        cv2.remap(where, there[:, :, 0], there[:, :, 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[
            :, 0
        ].astype(np.float64)
        + 0.5
    )
    off = at - view.pixels(t)[which]
    good = (ok[:, 0] > 0) & (ok_back[:, 0] > 0) & (np.linalg.norm(back - start, axis=2)[:, 0] < config.return_px)
    good &= np.linalg.norm(off, axis=1) < config.most_px
    shift = (
        np.concatenate([off / view.px_per_dm, np.zeros((len(off), 1))], 1) @ view.poses[t][:3, :3]
    )  # across the ray, in the head frame
    return np.where(good[:, None], shift, np.nan)


def _weights(residual: Float[np.ndarray, "*b 3"], px_per_dm: float, config: SkinConfig) -> Float[np.ndarray, "*b"]:
    """Geman-McClure's of a residual; 0 where there is no match."""
    size = np.linalg.norm(residual, axis=-1) * px_per_dm / config.noise_px
    return np.nan_to_num(1 / (1 + size * size) ** 2)


def solve_keyframes(
    matches: Float[np.ndarray, "s k l 3"], key_rows: Int[np.ndarray, "k"], px_per_dm: float, config: SkinConfig
) -> Float[np.ndarray, "k l 3"]:
    """The keyframes' own corrections c: a match of keyframe j in frame t says that c_t - c_j is so much, the network that c is none.

    Frames that are no keyframes touch keyframes alone, so each is eliminated by itself: k unknowns a landmark and axis remain, whatever the clip's length.
    """
    s, k, n, _ = matches.shape
    c = np.zeros((s, n, 3))
    some = np.isfinite(matches[..., 0])
    e = np.nan_to_num(matches).astype(np.float64)
    own = np.full(s, -1)
    own[key_rows] = np.arange(k)
    free = own < 0
    for _ in range(config.rounds):
        residual = np.where(some[..., None], c[:, None] - c[key_rows][None] - e, np.nan)
        w = _weights(residual, px_per_dm, config)  # s k l
        A = np.zeros((n, k, k))
        b = np.zeros((n, k, 3))
        A[:, np.arange(k), np.arange(k)] += config.network
        # keyframes seen in keyframes
        for row in key_rows:
            i = own[row]
            A[:, i, i] += w[row].sum(0)
            A[:, np.arange(k), np.arange(k)] += w[row].T
            A[:, i, :] -= w[row].T
            A[:, :, i] -= w[row].T
            b[:, i] += (w[row][..., None] * e[row]).sum(0)
            b -= (w[row][..., None] * e[row]).transpose(1, 0, 2)
        # other frames, eliminated: c_t = Σ w (c_j + e) / (Σ w + network)
        wf, ef = w[free], e[free]
        total = wf.sum(1) + config.network  # s l
        mean = (wf[..., None] * ef).sum(1) / total[..., None]
        A[:, np.arange(k), np.arange(k)] += wf.sum(0).T
        A -= np.einsum("sil,sjl->lij", wf / total[:, None], wf)
        b += (wf[..., None] * (mean[:, None] - ef)).sum(0).transpose(1, 0, 2)
        c[key_rows] = np.linalg.solve(A, b).transpose(1, 0, 2)
        c[free] = (wf[..., None] * (c[key_rows][None] + ef)).sum(1) / total[..., None]
    return c[key_rows]


def solve_frame(
    matches: Float[np.ndarray, "k l 3"], anchors: Float[np.ndarray, "k l 3"], px_per_dm: float, config: SkinConfig
) -> tuple[Float[np.ndarray, "l 3"], Float[np.ndarray, "k l"]]:
    """A frame's corrections from its matches and the keyframes' corrections, and what each match counted in the end."""
    wanted = anchors + matches
    c = np.zeros(wanted.shape[1:])
    usual = np.isfinite(wanted[..., 0]).any(0)
    with np.errstate(all="ignore"):
        c[usual] = np.nanmedian(wanted[:, usual], 0)
    for _ in range(config.rounds):
        w = _weights(wanted - c, px_per_dm, config)
        c = (w[..., None] * np.nan_to_num(wanted)).sum(0) / (w.sum(0) + config.network)[:, None]
    return c, w


def smoothed(
    values: Float32[np.ndarray, "t n 3"], seen: Bool[np.ndarray, "t"], sigma: float
) -> Float32[np.ndarray, "t n 3"]:
    """Over time, frames without a face left out."""
    weight = gaussian_filter1d(seen.astype(np.float32), sigma, mode="constant")
    total = gaussian_filter1d(values * seen[:, None, None], sigma, axis=0, mode="constant")
    total /= np.maximum(weight, 1e-9)[:, None, None]
    return total


def _spread(
    corrections: Float32[np.ndarray, "t l 3"],
    trust: Float[np.ndarray, "l"],
    at: Float[np.ndarray, "l 3"],
    unmatched: Bool[np.ndarray, "l"],
    config: SkinConfig,
) -> Float32[np.ndarray, "t l 3"]:
    """Smooth over the face: each landmark takes what its neighbours, and it, are trusted to say; far from all that is trusted, what is said farther off."""
    distance = np.linalg.norm(at[:, None] - at[None], axis=-1)
    inside = smoothstep(distance[:, FACE_OVAL].min(1) / (config.outline_mm * 0.01))
    trust = trust * (inside > 0.2) * ~unmatched

    def kernel(reach_mm: float) -> tuple[np.ndarray, np.ndarray]:
        weight = np.exp(-((distance / (reach_mm * 0.01)) ** 2)) * trust
        total = weight.sum(1)
        return weight / np.maximum(total, 1e-9)[:, None], total

    near, sure = kernel(config.reach_mm)
    wide, _ = kernel(config.wide_mm)
    own = (sure / (sure + 1.0))[:, None]
    own[unmatched] = 0
    blend = (inside[:, None] * (own * near + (1 - own) * wide)).astype(
        np.float32
    )  # all of it is linear: one matrix serves every frame
    return np.matmul(blend, corrections)
