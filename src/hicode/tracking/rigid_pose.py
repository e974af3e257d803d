"""The head as a rigid body: poses by bundle adjustment over points on forehead, ears and hair.

Landmarks lie on the front of the face, where a nod, a change of expression and a constant error of the network look alike. Ears and hair lie
far from that surface, so their motion tells rotation from translation; where they are in depth is not known beforehand, but the poses of many
frames tell it. So points are tracked from some training frames, the *keyframes*, to all frames, and what explains their motion is found at once:

    Σ ρ(π(T_t X) − measured)  +  Σ_t |ξ_t / σ_pose|²  +  Σ_p ((d_p − d_p⁰) / σ_depth)²,      X = T_k⁻¹ (d_p ray_p)

t frames, k keyframes, p points. T "4 4" takes head to camera; a twist ξ = (w, v) "6" moves it to T exp(ξ), w in rad and v in dm about the head's
own axes. A point is a pixel of its keyframe and a depth d along that ray; ρ is Cauchy's, which lets swinging hair and moving skin go. ξ = 0 and
d⁰ are the landmark fit's poses and the depth of its mesh: they fix what points cannot know (how large the head is).

The head frame itself is free by a fixed motion G: T_t G and G⁻¹ X show the same, and the priors settle it by means: where the mesh has hair and ears
too near or too far on the whole, the frame goes with them, and the face, some 3-5 mm off its place on real clips, is carried 2-4 px aside in a wide
turn. So the frame then moves, by one translation for the clip, to where the landmarks, held fast in it, are seen where they were detected.

Structure (keyframes' poses and depths) comes from training frames alone; every other frame is then posed by itself against it, so nothing of a
test frame reaches a training frame. Depths are eliminated by Schur's complement (Triggs et al. 2000, "Bundle Adjustment").
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from hicode.geometry import rigid, rotation_from_axis_angle
from hicode.motion import LIPS, FaceTrack
from hicode.tracking.depth import head_depth
from hicode.tracking.fit import MOVING
from hicode.tracking.head_model import HeadModel


@dataclass(frozen=True)
class SkullConfig:
    """How the rigid head is found. Lengths in mm on the head or px of the crop."""

    keyframes: int = 16  # at most; fewer where the head turns little
    spacing_deg: float = 3.0  # keyframes are no nearer to each other than this
    nearest: int = 4  # keyframes that each frame is matched to
    points: int = 350  # per keyframe
    structure_frames: int = 160  # training frames that the structure is found from
    noise_px: float = 0.6  # of a match; beyond it matches count less and less
    rotation_deg: float = 1.5  # how far the landmark fit's poses may be off
    translation_mm: float = 3.0
    depth_mm: float = 12.0  # the same of its depths
    rounds: int = 2  # matches are made again from the poses that they gave
    steps: int = 12
    least_points: int = 40  # frames with fewer matches keep the landmark fit's pose


@dataclass(frozen=True)
class SkullReport:
    """What the adjustment found."""

    keyframes: int
    points: int
    matches_per_frame: float
    residual_px: float  # median over matches
    turned_deg: float  # mean change of the poses
    moved_mm: float
    origin_mm: float  # how far the head frame's origin went to have the face where the landmarks are
    unmatched: int  # frames left as they were


@dataclass(frozen=True)
class Skull:
    """Rigid points of the head frame.

    points "p 3" dm · sigma "p" dm, deviation of each along the ray of its keyframe · keyframe "p" the frame that it was chosen in
    """

    points: Float[Tensor, "p 3"]
    sigma: Float[Tensor, "p"]
    keyframe: Int[Tensor, "p"]

    def tensors(self) -> dict[str, Tensor]:
        return {"points": self.points, "sigma": self.sigma, "keyframe": self.keyframe}


def align_skull(
    image: Callable[[int], np.ndarray],
    mask: Callable[[int], np.ndarray],
    track: FaceTrack,
    model: HeadModel,
    train: range,
    config: SkullConfig = SkullConfig(),
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[Float[Tensor, "t 4 4"], Skull, SkullReport]:
    """Poses of all frames, the rigid points, and a report.

    `image(t)` is RGB uint8, `mask(t)` the head mask; frames are read one by one. Memory holds the keyframes' pictures and the matches of
    `structure_frames`, whatever the clip's length.
    """
    tracked = track.motion.T_camera_head.double().numpy()
    seen = track.confidence.numpy() > 0
    usable = np.array([t for t in train if seen[t]])
    chosen = usable[
        np.unique(np.linspace(0, len(usable) - 1, min(config.structure_frames, len(usable))).round().astype(int))
    ]
    keys = choose_keyframes(tracked, chosen, config.keyframes, config.spacing_deg, least=3)
    structure = np.unique(np.concatenate([chosen, keys]))
    focal = float(track.camera.K[0, 0])
    centre = track.camera.K[:2, 2].double().numpy()
    views = [_keyframe(image(t), mask(t), track, model, int(t), config) for t in keys]

    out = tracked.copy()

    def matches(t: int, gray: np.ndarray) -> list["_Match"]:
        near = np.argsort([angle_between(tracked[t], tracked[k.t]) if k.t != t else np.inf for k in views])[
            : config.nearest
        ]
        own = [_match(views[n], n, gray, out[t], out[views[n].t], focal, centre) for n in near if views[n].t != t]
        return [m for m in own if len(m.rows)]

    done, work = 0, config.rounds * (len(structure) + len(track))
    depths = [view.depth for view in views]
    for _ in range(config.rounds):
        found: dict[int, list[_Match]] = {}
        for t in structure:
            found[int(t)] = matches(int(t), gray_image(image(t)))
            done += 1
            progress(done / work)
        out[structure], depths, sigma = _adjust(
            views, structure, found, tracked, out[structure], depths, focal, centre, config
        )

    placed = [_head_points(view, d, out[view.t], focal, centre)[0] for view, d in zip(views, depths)]
    residuals, counts, matched = [], [], np.zeros(len(track), bool)
    for t in range(len(track)):
        gray = None if t in found or not seen[t] else gray_image(image(t))
        for _ in range(1 if t in found else config.rounds):
            own = [] if not seen[t] else found[t] if t in found else matches(t, gray)
            x = np.concatenate([placed[m.key][m.rows] for m in own]) if own else np.zeros((0, 3))
            px = np.concatenate([m.pixels for m in own]) if own else np.zeros((0, 2))
            if t not in found and len(x) >= config.least_points:
                out[t] = _resect(tracked[t], out[t], x, px, focal, centre, config)
        if len(x) >= config.least_points:
            matched[t] = True
            residuals.append(np.median(np.linalg.norm(project(out[t], x, focal, centre) - px, axis=1)))
            counts.append(len(x))
        progress((done + config.rounds * (t + 1)) / work)
    origin = face_origin(out, track, structure[matched[structure]])
    out[matched, :3, 3] += out[matched, :3, :3] @ origin
    placed = [x - origin for x in placed]
    delta = np.linalg.inv(tracked) @ out
    turned = np.degrees([angle_between(np.eye(4), d) for d in delta])
    report = SkullReport(
        len(views),
        sum(len(v.pixels) for v in views),
        float(np.mean(counts)) if counts else 0.0,
        float(np.median(residuals)) if residuals else float("nan"),
        float(turned.mean()),
        float(np.linalg.norm(delta[:, :3, 3], axis=1).mean() * 100),
        float(np.linalg.norm(origin) * 100),
        int((~matched).sum()),
    )
    owner = np.concatenate([np.full(len(v.pixels), v.t) for v in views])
    skull = Skull(
        torch.from_numpy(np.concatenate(placed)).float(),
        torch.from_numpy(np.concatenate(sigma)).float(),
        torch.from_numpy(owner),
    )
    return torch.from_numpy(out).float(), skull, report


_LANDMARK_PX = 4.0  # residuals of landmarks beyond this count less


def face_origin(
    poses: Float[np.ndarray, "t 4 4"], track: FaceTrack, frames: Int[np.ndarray, "m"]
) -> Float[np.ndarray, "3"]:
    """The translation in the head frame (dm) after which the track's landmarks, under `poses`, are seen where they were detected, over all of `frames`.

    Gauss-Newton with Huber's weights: size in the image and parallax of turns tell it. Zero without frames.
    """
    origin = np.zeros(3)
    if not len(frames):
        return origin
    focal, centre = float(track.camera.K[0, 0]), track.camera.K[:2, 2].double().numpy()
    for _ in range(6):
        A, g = np.zeros((3, 3)), np.zeros(3)
        for t in frames:
            x = track.motion.landmarks[t].double().numpy() + origin
            r, by_x, _ = _residual(poses[t], x, track.landmarks_px[t].double().numpy(), focal, centre)
            weight = 1 / np.maximum(1.0, np.linalg.norm(r, axis=1) / _LANDMARK_PX)
            A += np.einsum("pai,paj,p->ij", by_x, by_x, weight)
            g += np.einsum("pai,pa,p->i", by_x, r, weight)
        origin -= np.linalg.solve(A, g)
    return origin


def choose_keyframes(
    poses: Float[np.ndarray, "t 4 4"], frames: Int[np.ndarray, "m"], most: int, spacing_deg: float, least: int = 1
) -> Int[np.ndarray, "k"]:
    """The first of `frames` and those that turn farthest from the ones already chosen, down to `spacing_deg` (`least` whatever they turn) or up to `most`."""
    chosen = [int(frames[0])]
    nearest = np.array([angle_between(poses[t], poses[chosen[0]]) for t in frames])
    while len(chosen) < min(most, len(frames)) and (len(chosen) < least or nearest.max() > np.radians(spacing_deg)):
        chosen.append(int(frames[nearest.argmax()]))
        nearest = np.minimum(nearest, [angle_between(poses[t], poses[chosen[-1]]) for t in frames])
    return np.array(chosen)


# Points of keyframes that turn further than this away from a frame may lie on what it does not show. At 8 degrees half of a speaker's points went
# unheard: depth was 12 mm off at hair on one side of the head (docs/results.md).
_NEAR_DEG = 25.0
_BLUR_PX = 8.0  # how far a point's depth speaks for its neighbours
_LEAST_SIGMA_DM = 0.02
_MESH_SIGMA_DM = (
    0.08  # of the mesh's depth where points say otherwise: about the mean correction found on real heads (5-10 mm)
)
_WILD_DM = 0.4  # points further than this from the mesh are mismatches


def corrected_depth(
    depth: Float32[np.ndarray, "h w"], skull: Skull, track: FaceTrack, t: int
) -> Float32[np.ndarray, "h w"]:
    """The mesh's depth of frame t drawn towards the rigid points near it: ears and hair, which the mesh does not have, get their place."""
    poses = track.motion.T_camera_head.double().numpy()
    keys = skull.keyframe.numpy()
    near = np.isin(keys, [k for k in np.unique(keys) if angle_between(poses[k], poses[t]) < np.radians(_NEAR_DEG)])
    pixels, z = track.camera_at(t).project(skull.points[torch.from_numpy(near)])
    column, row = pixels.numpy().astype(int).T
    height, width = depth.shape
    seen = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row, z, sigma = column[seen], row[seen], z.numpy()[seen], skull.sigma.numpy()[near][seen]
    change = z - depth[row, column]
    good = np.abs(change) < _WILD_DM  # false for NaN, off the head
    weight = 1 / (sigma[good] ** 2 + _LEAST_SIGMA_DM**2)
    total, weights = np.zeros(depth.shape, np.float32), np.zeros(depth.shape, np.float32)
    np.add.at(total, (row[good], column[good]), weight * change[good])
    np.add.at(weights, (row[good], column[good]), weight)
    spread = 2 * np.pi * _BLUR_PX**2  # a point keeps its weight at its own place
    blurred = [cv2.GaussianBlur(x, (0, 0), _BLUR_PX) * spread for x in (total, weights)]
    return (depth + blurred[0] / (blurred[1] + _MESH_SIGMA_DM**-2)).astype(np.float32)


# ---- points and their matches ----


@dataclass(frozen=True)
class _Keyframe:
    t: int
    gray: np.ndarray
    pixels: np.ndarray  # "p 2", pixel centres at +0.5
    depth: np.ndarray  # "p" dm, by the landmark fit's mesh
    surface: np.ndarray  # "h/4 w/4" dm, the same everywhere, smoothly continued beside the head


@dataclass(frozen=True)
class _Match:
    """Rows of keyframe `key`'s points and where a frame shows them."""

    key: int
    rows: np.ndarray
    pixels: np.ndarray


def gray_image(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _keyframe(
    image: np.ndarray, mask: np.ndarray, track: FaceTrack, model: HeadModel, t: int, config: SkullConfig
) -> _Keyframe:
    gray = gray_image(image)
    depth = head_depth(model, track, t, mask)
    allowed = _rigid_region(mask, depth, track, t)
    corners = cv2.goodFeaturesToTrack(gray, config.points, 0.001, 5, mask=allowed)
    pixels = np.zeros((0, 2)) if corners is None else corners[:, 0].astype(np.float64)
    at = pixels.round().astype(int)
    z = depth[at[:, 1], at[:, 0]] if len(at) else np.zeros(0)
    good = np.isfinite(z)
    return _Keyframe(t, gray, pixels[good] + 0.5, z[good].astype(np.float64), smooth_surface(depth))


def smooth_surface(depth: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h4 w4"]:
    """A depth map at a quarter of its size, smoothly continued beside the head (where it is NaN)."""
    h, w = depth.shape
    known = np.isfinite(depth).astype(np.float32)
    small = (-(-w // _STRIDE), -(-h // _STRIDE))
    weight = cv2.resize(known, small, interpolation=cv2.INTER_AREA)
    mean = cv2.resize(np.nan_to_num(depth), small, interpolation=cv2.INTER_AREA)
    nearest = distance_transform_edt(weight <= 0.5, return_distances=False, return_indices=True)
    return cv2.GaussianBlur((mean / np.maximum(weight, 1e-6))[tuple(nearest)], (0, 0), 1.0)


def _rigid_region(mask: np.ndarray, depth: np.ndarray, track: FaceTrack, t: int) -> np.ndarray:
    """255 where the head moves as one: its mask without the edge, eyes, brows, and all that lies below the upper lip."""
    allowed = cv2.erode((mask > 200).astype(np.uint8) * 255, np.ones((7, 7), np.uint8))
    face = track.landmarks_px[t].numpy() - 0.5
    for part in MOVING:
        hull = cv2.convexHull(face[part].astype(np.float32)).round().astype(np.int32)
        cv2.fillConvexPoly(allowed, hull, 0)
        cv2.polylines(allowed, [hull], True, 0, 5)
    # below the mouth's upper edge along the head's own vertical: jaw, neck, loose hair
    camera = track.camera_at(t)
    rows, columns = np.nonzero(allowed & np.isfinite(depth).astype(np.uint8) * 255)
    pixels = torch.from_numpy(np.stack([columns + 0.5, rows + 0.5], 1).astype(np.float32))
    heights = camera.unproject(pixels, torch.from_numpy(depth[rows, columns]))[:, 1].numpy()
    lips = float(track.motion.landmarks[t, torch.from_numpy(LIPS), 1].max())
    low = heights < lips + 0.05
    allowed[rows[low], columns[low]] = 0
    lips_px = cv2.convexHull(face[LIPS].astype(np.float32)).round().astype(np.int32)
    cv2.polylines(allowed, [lips_px], True, 0, 15)
    return allowed


_STRIDE = 4  # the warp is smooth, so it is computed on every fourth pixel
_SEARCH = {"winSize": (15, 15), "maxLevel": 2, "criteria": (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 20, 0.01)}


def _match(
    view: _Keyframe, key: int, gray: np.ndarray, pose: np.ndarray, pose_k: np.ndarray, focal: float, centre: np.ndarray
) -> _Match:
    """Lucas-Kanade from the keyframe to the frame as the keyframe's camera would see it; kept where tracking back returns.

    The frame is first drawn into the keyframe's view, through the mesh and both poses. Without that, a window that turns away or leans is matched
    with a bias towards no turn at all: a degree of pose on a drawn head.
    """
    if not len(view.pixels):
        return _Match(key, np.zeros(0, int), np.zeros((0, 2)))
    h, w = gray.shape
    where, drawn = through_surface(view.surface, gray, pose, pose_k, focal, centre)
    start = (view.pixels - 0.5).astype(np.float32)[:, None]
    flags = cv2.OPTFLOW_USE_INITIAL_FLOW
    there, ok, _ = cv2.calcOpticalFlowPyrLK(view.gray, drawn, start, start.copy(), flags=flags, **_SEARCH)
    back, ok_back, _ = cv2.calcOpticalFlowPyrLK(drawn, view.gray, there, start.copy(), flags=flags, **_SEARCH)
    at = cv2.remap(where, there[:, :, 0], there[:, :, 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0]
    inside = ((at > 2) & (at < [w - 3, h - 3])).all(1) & ((there[:, 0] > 0) & (there[:, 0] < [w - 1, h - 1])).all(1)
    good = (ok[:, 0] > 0) & (ok_back[:, 0] > 0) & inside & (np.linalg.norm(back - start, axis=2)[:, 0] < 0.4)
    rows = np.flatnonzero(good)
    return _Match(key, rows, at[rows].astype(np.float64) + 0.5)


def through_surface(
    surface: Float32[np.ndarray, "h4 w4"],
    gray: UInt8[np.ndarray, "h w"],
    pose: np.ndarray,
    pose_k: np.ndarray,
    focal: float,
    centre: np.ndarray,
) -> tuple[Float32[np.ndarray, "h w 2"], UInt8[np.ndarray, "h w"]]:
    """A frame drawn as the camera of a keyframe would see it, through the keyframe's surface and both poses; and where in the frame each pixel lies."""
    h, w = gray.shape
    rows, columns = surface.shape
    across, down = ((np.arange(n) + 0.5) * size / n for n, size in ((columns, w), (rows, h)))
    grid = np.stack(np.meshgrid(across, down), -1).reshape(-1, 2)
    ray = np.concatenate([(grid - centre) / focal, np.ones((len(grid), 1))], 1)
    x = (ray * surface.reshape(-1, 1) - pose_k[:3, 3]) @ pose_k[:3, :3]
    where = (project(pose, x, focal, centre) - 0.5).astype(np.float32).reshape(rows, columns, 2)
    where = cv2.resize(where, (w, h), interpolation=cv2.INTER_LINEAR)
    return where, cv2.remap(gray, where, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


# ---- geometry ----


def angle_between(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.arccos(np.clip((np.trace(a[:3, :3].T @ b[:3, :3]) - 1) / 2, -1, 1)))


def _head_points(
    view: _Keyframe, depth: np.ndarray, pose: np.ndarray, focal: float, centre: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(points in the head frame "p 3", their derivative by depth "p 3")."""
    ray = np.concatenate([(view.pixels - centre) / focal, np.ones((len(view.pixels), 1))], 1)
    return (ray * depth[:, None] - pose[:3, 3]) @ pose[:3, :3], ray @ pose[:3, :3]


def project(pose: np.ndarray, x: np.ndarray, focal: float, centre: np.ndarray) -> np.ndarray:
    y = x @ pose[:3, :3].T + pose[:3, 3]
    return focal * y[:, :2] / y[:, 2:] + centre


def _residual(
    pose: np.ndarray, x: np.ndarray, pixels: np.ndarray, focal: float, centre: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(residual "p 2", derivative by the head point "p 2 3", by the pose's twist "p 2 6")."""
    y = x @ pose[:3, :3].T + pose[:3, 3]
    px = focal * y[:, :2] / y[:, 2:]
    by_y = np.zeros((len(x), 2, 3))
    by_y[:, 0, 0] = by_y[:, 1, 1] = focal / y[:, 2]
    by_y[..., 2] = -px / y[:, 2:]
    by_x = by_y @ pose[:3, :3]
    return px + centre - pixels, by_x, np.concatenate([np.cross(x[:, None], by_x), by_x], -1)


def _moved(pose: np.ndarray, twist: np.ndarray) -> np.ndarray:
    """pose exp(twist), to first order in v and exactly in w."""
    twist = torch.from_numpy(twist)
    return pose @ rigid(rotation_from_axis_angle(twist[..., :3]), twist[..., 3:]).numpy()


def _twist(tracked: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """The twist that leads from `tracked` to `pose` "*b 4 4"."""
    from scipy.spatial.transform import Rotation

    delta = np.linalg.inv(tracked) @ pose
    return np.concatenate([Rotation.from_matrix(delta[..., :3, :3]).as_rotvec(), delta[..., :3, 3]], -1)


def _pose_precision(config: SkullConfig) -> np.ndarray:
    return np.repeat([np.radians(config.rotation_deg), config.translation_mm * 0.01], 3) ** -2.0


# ---- structure and poses at once ----


def _adjust(
    views: list[_Keyframe],
    frames: np.ndarray,
    found: dict[int, list[_Match]],
    tracked: np.ndarray,
    poses: np.ndarray,
    depths: list[np.ndarray],
    focal: float,
    centre: np.ndarray,
    config: SkullConfig,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """(poses of `frames` "m 4 4", depths of each keyframe's points, deviations of these depths): Gauss-Newton with the depths eliminated.

    It starts from `poses` and `depths`; the priors are the tracked poses and the keyframes' own depths.
    """
    m = len(frames)
    place = {int(t): i for i, t in enumerate(frames)}
    key_place = [place[v.t] for v in views]
    depths = list(depths)
    precision = _pose_precision(config)
    depth_precision = (config.depth_mm * 0.01) ** -2.0
    sigma = [np.zeros(len(d)) for d in depths]
    for step in range(config.steps):
        twist = _twist(tracked[frames], poses)
        H = np.zeros((m, m, 6, 6))
        g = np.zeros((m, 6))
        H[np.arange(m), np.arange(m)] += np.diag(precision)
        g += precision * twist
        couplings, by_depth, slope = [], [], []
        for k, view in enumerate(views):
            couplings.append(np.zeros((len(view.pixels), m, 6)))
            by_depth.append(np.full(len(view.pixels), depth_precision))
            slope.append(depth_precision * (depths[k] - view.depth))
        points = [_head_points(v, d, poses[key_place[k]], focal, centre) for k, (v, d) in enumerate(zip(views, depths))]
        for t, own in found.items():
            i = place[t]
            for match in own:
                k, rows = match.key, match.rows
                j = key_place[k]
                x, along = points[k][0][rows], points[k][1][rows]
                r, by_x, by_pose = _residual(poses[i], x, match.pixels, focal, centre)
                weight = 1 / (config.noise_px**2 + (r**2).sum(1))
                d = (by_x @ along[..., None])[..., 0]
                weighted = by_pose * weight[:, None, None]
                block = np.einsum("pai,paj->ij", weighted, by_pose)
                step_g = np.einsum("pai,pa->i", weighted, r)
                H[i, i] += block
                H[j, j] += block
                H[i, j] -= block
                H[j, i] -= block
                g[i] += step_g
                g[j] -= step_g
                cross = np.einsum("pai,pa->pi", weighted, d)
                couplings[k][rows, i] += cross
                couplings[k][rows, j] -= cross
                by_depth[k][rows] += weight * (d**2).sum(1)
                slope[k][rows] += weight * (d * r).sum(1)
        S = H.transpose(0, 2, 1, 3).reshape(6 * m, 6 * m)
        s = g.reshape(-1)
        for E, hd, gd in zip(couplings, by_depth, slope):
            E = E.reshape(len(E), -1)
            S -= (E / hd[:, None]).T @ E
            s -= E.T @ (gd / hd)
        S[np.arange(6 * m), np.arange(6 * m)] *= 1 + 1e-6
        delta = -np.linalg.solve(S, s)
        for k, (E, hd, gd) in enumerate(zip(couplings, by_depth, slope)):
            change = -(gd + E.reshape(len(E), -1) @ delta) / hd
            depths[k] = depths[k] + np.clip(change, -0.2, 0.2)
            sigma[k] = hd**-0.5
        poses = _moved(poses, delta.reshape(m, 6))
        if np.abs(delta).max() < 1e-5:
            break
    return poses, depths, sigma


def _resect(
    tracked: np.ndarray,
    pose: np.ndarray,
    x: np.ndarray,
    pixels: np.ndarray,
    focal: float,
    centre: np.ndarray,
    config: SkullConfig,
) -> np.ndarray:
    """The pose, from `pose` on, that shows known points where they are seen, held to the tracked one as in the adjustment."""
    precision = _pose_precision(config)
    for _ in range(config.steps):
        r, _, by_pose = _residual(pose, x, pixels, focal, centre)
        weight = 1 / (config.noise_px**2 + (r**2).sum(1))
        weighted = by_pose * weight[:, None, None]
        A = np.einsum("pai,paj->ij", weighted, by_pose) + np.diag(precision)
        delta = -np.linalg.solve(A, np.einsum("pai,pa->i", weighted, r) + precision * _twist(tracked, pose))
        pose = _moved(pose, delta)
        if np.abs(delta).max() < 1e-6:
            break
    return pose
