"""Fit the head model to a clip's landmarks: one identity and focal length, a pose and an expression per frame, coherent in time.

t frames, l = 478 landmarks. A frame's unknowns are q = (r, u, v, s, e): axis-angle r of the head's rotation, image position (u, v) in px of the
head's origin from the principal point, s = log(depth / focal) and the expression e "64". A landmark x of the head frame projects to

    X = F exp(r) x + T,  F = diag(1, -1, -1),  T = (u σ, v σ, f σ),  σ = exp(s),  pixel = f X_xy / X_z + centre

so (u, v, s) keep their meaning when the focal length f changes: only perspective does. The objective, in units of the landmark noise
(`noise_mm` seen at the head's depth):

    Σ_t Σ_l w_l Huber(|pixel − measured|) + weak depth term        data, at the frames with a face
  + Σ_t Σ_d ρ(second difference of pose)                           robust: dropped frames and real jerks are jumps, not noise
  + Σ_t    |second difference of expression|²                      light
  + Σ_t    ridge |e|² + sparse Σ e + bound |e outside its range|²  actions are few, one-sided and bounded
  + t ridge |identity|² + prior on log f

It is minimised by Gauss-Newton. Soft bounds, since with hard ones each step ends where the first of many actions meets its own. Identity and focal length come first, jointly with the poses and expressions of some training frames
(Schur complement); then, with these fixed, all frames of a segment at once (banded normal equations). Training and test frames are separate
segments under the same objective: nothing of a test frame reaches a training frame.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.linalg import solveh_banded
from torch import Tensor

from hicode.camera import Camera
from hicode.errors import InputError
from hicode.face.model import HeadModel
from hicode.geometry import rigid, rotation_from_axis_angle, similarity
from hicode.motion import (
    EXPRESSION_DIM,
    FACE_OVAL,
    IDENTITY_DIM,
    LEFT_EYE_RING,
    LIPS,
    LOWER_LIP_INNER,
    N_LANDMARKS,
    RIGHT_EYE_RING,
    UPPER_LIP_INNER,
    FaceTrack,
    Motion,
)

POSE_DIM = 6
_Q = POSE_DIM + EXPRESSION_DIM
_FLIP = np.array([1.0, -1.0, -1.0])  # head axes (y up, z towards the camera) to camera axes
_RADIUS_DM = 0.4  # how far a typical landmark is from the origin: turns radians and log-scale into landmark motion


@dataclass(frozen=True)
class FitConfig:
    """How the fit weighs its terms. Lengths in mm on the head; weights are relative to one landmark coordinate at `noise_mm`."""

    noise_mm: float = 1.2  # landmark noise, the unit of every residual
    huber: float = 3.0  # in noise units: residuals beyond grow linearly
    lips_weight: float = 2.0
    eyes_weight: float = 1.5
    oval_weight: float = 0.4  # the outline slides along the silhouette
    depth_weight: float = 0.02  # MediaPipe's z is a guess
    expression_ridge: float = 5.0
    expression_sparse: float = 4.0
    expression_bound: float = 300.0
    expression_smooth: float = 6.0  # on second differences
    pose_smooth: float = 2000.0  # on second differences, in noise units of landmark motion
    pose_jump: float = 0.12  # second differences beyond this (noise units) count as motion, not noise (Cauchy)
    identity_ridge: float = 1.0  # times the number of frames
    focal_px: float = 1400.0  # prior for a 512 px wide crop
    focal_spread: float = 0.3  # its standard deviation in log f
    identity_frames: int = 96  # training frames that identity and focal length are fitted to
    identity_steps: int = 10
    offset_rounds: int = 2  # estimates of the constant landmark offsets of this person; 0 switches them off
    frame_steps: int = 8
    window: int = 1000  # frames solved at once; bounds memory


@dataclass(frozen=True)
class FitReport:
    """How well a track explains its landmarks, over the frames with a face."""

    error_px: float  # mean distance of model and measured landmarks
    lips_px: float
    jitter_deg: float  # mean length of the second difference of the rotation
    jitter_px: float  # the same of the head's image position
    lip_gap_correlation: float  # inner-lip gap, model against measured (pose removed)
    focal_px: float
    identity_rms: float  # of the coefficients; far above 1 means an implausible head
    missing: int  # frames without a face


def fit_track(
    points_px: Float[Tensor, "t 478 3"] | np.ndarray,
    found: Bool[Tensor, "t"] | np.ndarray,
    width: int,
    height: int,
    model: HeadModel,
    train: slice | range | None = None,
    progress: Callable[[float], None] | None = None,
    config: FitConfig = FitConfig(),
) -> FaceTrack:
    """Fit a clip. Landmarks in px (pixel centres at +0.5; z in px, smaller is nearer), `found` where a face was seen.

    `train` (a slice or range from frame 0; default all) are the frames that identity, focal length and landmark offsets may see. Frames
    without a face are interpolated and carry confidence 0. `progress` is called with the fraction done. Raises InputError
    where fewer than two training frames have a face.
    """
    points = np.asarray(points_px, np.float64)
    found = np.asarray(found, bool) & np.isfinite(points).all((1, 2))
    points = np.where(found[:, None, None], points, 0.0)
    count = len(points)
    assert points.shape == (count, N_LANDMARKS, 3), points.shape
    span = range(count) if train is None else range(count)[train] if isinstance(train, slice) else train
    in_train = np.zeros(count, bool)
    in_train[span.start : span.stop] = True
    usable = np.flatnonzero(found & in_train)
    if len(usable) < 2:
        raise InputError(f"A face was found in {len(usable)} of {in_train.sum()} training frames. Use a clip that shows one throughout.")

    problem = _Problem.of(points, found, width, height, model, config)
    state = _initial_state(problem, config.focal_px * width / 512)

    chosen = usable[np.linspace(0, len(usable) - 1, min(config.identity_frames, len(usable))).round().astype(int)]
    _fit_identity(problem, state, np.unique(chosen), lambda x: progress and progress(0.3 * x))

    edges = np.flatnonzero(np.diff(in_train)) + 1
    segments = np.split(np.arange(count), edges)
    for number, segment in enumerate(segments):
        _fit_segment(problem, state, segment, lambda x, n=number: progress and progress(0.3 + 0.7 * (n + x) / len(segments)))
    return _track(problem, state)


def fit_report(track: FaceTrack, model: HeadModel) -> FitReport:
    """Figures of a finished track."""
    seen = track.confidence > 0
    vertices_free = _landmark_basis(model)
    rest = vertices_free.rest + np.tensordot(track.identity.numpy(), vertices_free.identity, 1)
    expression = track.motion.expression.numpy()
    shape = rest + np.tensordot(expression, vertices_free.expression, 1)
    camera = replace(track.camera, T_camera_head=track.motion.T_camera_head, K=track.camera.K.expand(len(track), 3, 3))
    pixels, _ = camera.project(torch.from_numpy(shape).float())
    error = (pixels - track.landmarks_px).norm(dim=-1)[seen]
    origin, _ = camera.project(torch.zeros(len(track), 1, 3))
    turn = np.stack([_log_rotation(R) for R in track.motion.T_camera_head[:, :3, :3].double().numpy() * _FLIP[:, None]])

    def jitter(x: np.ndarray) -> float:
        return float(np.linalg.norm(x[2:] - 2 * x[1:-1] + x[:-2], axis=1).mean()) if len(x) > 2 else 0.0

    gap = track.motion.landmarks[:, UPPER_LIP_INNER] - track.motion.landmarks[:, LOWER_LIP_INNER]
    model_gap = np.linalg.norm(shape[:, UPPER_LIP_INNER] - shape[:, LOWER_LIP_INNER], axis=1)[seen.numpy()]
    measured_gap = gap.norm(dim=1).numpy()[seen.numpy()]
    varies = len(model_gap) > 2 and model_gap.std() > 0 and measured_gap.std() > 0
    return FitReport(
        error_px=float(error.mean()),
        lips_px=float(error[:, LIPS].mean()),
        jitter_deg=float(np.degrees(jitter(turn))),
        jitter_px=jitter(origin[:, 0].numpy()),
        lip_gap_correlation=float(np.corrcoef(model_gap, measured_gap)[0, 1]) if varies else 0.0,
        focal_px=float(track.camera.K[0, 0]),
        identity_rms=float(track.identity.square().mean().sqrt()),
        missing=int((~seen).sum()),
    )


# ---- the problem and its state ----


@dataclass(frozen=True)
class _Basis:
    """The head model at its landmarks: rest "l 3", identity "80 l 3", expression "64 l 3"."""

    rest: np.ndarray
    identity: np.ndarray
    expression: np.ndarray


def _landmark_basis(model: HeadModel) -> _Basis:
    return _Basis(*(model.landmarks(x).double().numpy() for x in (model.mean, model.identity_basis, model.expression_basis)))


@dataclass(frozen=True)
class _Problem:
    points: np.ndarray  # "t l 3" px, x and y from the image's centre
    found: np.ndarray
    basis: _Basis
    low: np.ndarray
    high: np.ndarray
    sparse: np.ndarray  # "64": slope of the sparsity term, zero for two-sided actions
    weight: np.ndarray  # "l"
    model: HeadModel
    width: int
    height: int
    config: FitConfig

    @staticmethod
    def of(points: np.ndarray, found: np.ndarray, width: int, height: int, model: HeadModel, config: FitConfig) -> "_Problem":
        weight = np.ones(N_LANDMARKS)
        weight[LIPS] = config.lips_weight
        weight[np.concatenate([RIGHT_EYE_RING, LEFT_EYE_RING])] = config.eyes_weight
        weight[FACE_OVAL] = config.oval_weight
        low, high = model.expression_low.double().numpy(), model.expression_high.double().numpy()
        sparse = np.where(low < 0, 0.0, config.expression_sparse)
        centred = points - [width / 2, height / 2, 0]
        return _Problem(centred, found, _landmark_basis(model), low, high, sparse, weight, model, width, height, config)


@dataclass
class _State:
    q: np.ndarray  # "t 70": r, u, v, s, e
    identity: np.ndarray  # "80"
    focal: float
    offset: np.ndarray  # "l 3" dm: this person's landmarks against the model's
    unit_px: np.ndarray  # "t": one noise unit in px at the head's depth


def _initial_state(problem: _Problem, focal: float) -> _State:
    """Weak-perspective pose of each frame from the mean head; frames without a face take their neighbours'."""
    count = len(problem.points)
    q = np.zeros((count, _Q))
    rest = torch.from_numpy(problem.basis.rest[:468])
    seen = np.flatnonzero(problem.found)
    for t in seen:
        s, R, shift = similarity(rest, torch.from_numpy(problem.points[t, :468] * _FLIP))
        q[t, :3] = _log_rotation(R.numpy())
        q[t, 3:5] = shift.numpy()[:2] * _FLIP[:2]
        q[t, 5] = -np.log(s)
    for d in range(POSE_DIM):
        q[:, d] = np.interp(np.arange(count), seen, q[seen, d])
    unit_px = problem.config.noise_mm * 0.01 / np.exp(q[:, 5])
    return _State(q, np.zeros(IDENTITY_DIM), focal, np.zeros((N_LANDMARKS, 3)), unit_px)


def _log_rotation(R: np.ndarray) -> np.ndarray:
    """Axis-angle of a rotation matrix (angles below pi)."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_matrix(R).as_rotvec()


def _skew(r: np.ndarray) -> np.ndarray:
    z = np.zeros(r.shape[:-1])
    x, y, w = r[..., 0], r[..., 1], r[..., 2]
    return np.stack([z, -w, y, w, z, -x, -y, x, z], -1).reshape(*r.shape[:-1], 3, 3)


def _exp_and_jacobian(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp(r) "t 3 3" and J "t 3 3" with exp(r + d) ≈ exp(r) exp(J d)."""
    K = _skew(r)
    K2 = K @ K
    angle = np.maximum(np.linalg.norm(r, axis=-1), 1e-6)[:, None, None]
    sine, versine = np.sin(angle) / angle, (1 - np.cos(angle)) / angle**2
    rest = (1 - sine) / angle**2
    return np.eye(3) + sine * K + versine * K2, np.eye(3) - versine * K + rest * K2


# ---- linearisation ----


@dataclass
class _Linear:
    """Weighted residuals "t l 3" (two image axes and depth, noise units) of some frames and their derivatives."""

    residual: np.ndarray
    by_frame: np.ndarray  # "t 3l 70"
    by_shape: np.ndarray  # "t l 3 3": by the landmark's place in the head frame
    by_focal: np.ndarray  # "t l 3": by log f
    error_px: np.ndarray  # "t l"


def _linearise(problem: _Problem, state: _State, frames: np.ndarray) -> _Linear:
    """Residuals and Jacobian at the frames (all with a face), single precision, robust weights folded in."""
    config, basis = problem.config, problem.basis
    q, f = state.q[frames], state.focal
    rest = basis.rest + state.offset + np.tensordot(state.identity, basis.identity, 1)
    x = rest + (q[:, POSE_DIM:] @ basis.expression.reshape(EXPRESSION_DIM, -1)).reshape(len(frames), N_LANDMARKS, 3)
    R, J = _exp_and_jacobian(q[:, :3])
    depth_scale = np.exp(q[:, 5])
    T = np.stack([q[:, 3] * depth_scale, q[:, 4] * depth_scale, f * depth_scale], 1)
    FR = _FLIP[:, None] * R
    turned = x @ FR.transpose(0, 2, 1)
    X = turned + T[:, None]
    Z = np.maximum(X[..., 2], 0.1 * T[:, None, 2])
    unit = state.unit_px[frames][:, None]

    pixel = f * X[..., :2] / Z[..., None]
    residual = np.empty((len(frames), N_LANDMARKS, 3))
    residual[..., :2] = (pixel - problem.points[frames, :, :2]) / unit[..., None]
    error_px = np.linalg.norm(residual[..., :2], axis=-1) * unit
    residual[..., 2] = (turned[..., 2] / depth_scale[:, None] - problem.points[frames, :, 2]) / unit

    # derivative of (pixel, depth) by X, then by the landmark's place and by the pose
    by_X = np.zeros((len(frames), N_LANDMARKS, 3, 3), np.float32)
    by_X[..., 0, 0] = by_X[..., 1, 1] = f / Z / unit
    by_X[..., :2, 2] = -pixel / Z[..., None] / unit[..., None]
    by_X[..., 2, 2] = 1 / depth_scale[:, None] / unit
    by_shape = by_X @ FR.astype(np.float32)[:, None]

    jacobian = np.empty((len(frames), N_LANDMARKS, 3, _Q), np.float32)
    jacobian[..., :3] = np.cross(x.astype(np.float32)[:, :, None], by_shape) @ J.astype(np.float32)[:, None]
    jacobian[..., 3] = by_X[..., 0] * depth_scale[:, None, None]
    jacobian[..., 4] = by_X[..., 1] * depth_scale[:, None, None]
    jacobian[..., :2, 5] = (by_X[..., :2, :] @ T.astype(np.float32)[:, None, :, None])[..., 0]
    jacobian[..., 2, 5] = -turned[..., 2] / depth_scale[:, None] / unit
    jacobian[..., 2, 3:5] = 0
    expression = basis.expression.transpose(1, 2, 0).astype(np.float32)  # "l 3 64"
    np.multiply(by_shape[..., 0, None], expression[:, None, 0], out=jacobian[..., POSE_DIM:])
    for axis in (1, 2):
        jacobian[..., POSE_DIM:] += by_shape[..., axis, None] * expression[:, None, axis]

    by_focal = np.zeros((len(frames), N_LANDMARKS, 3))
    by_focal[..., :2] = pixel * (turned[..., 2] / Z)[..., None] / unit[..., None]

    # MediaPipe's z has a free origin in each frame: take the mean out of it
    for value in (residual, jacobian, by_shape, by_focal):
        value[:, :, 2] -= value[:, :, 2].mean(1, keepdims=True)
    length = np.linalg.norm(residual[..., :2], axis=-1)
    robust = problem.weight / np.maximum(1.0, length / config.huber)
    depth_robust = problem.weight * config.depth_weight / np.maximum(1.0, np.abs(residual[..., 2]) / (3 * config.huber))
    root = np.sqrt(np.stack([robust, robust, depth_robust], -1))
    residual *= root
    by_focal *= root
    root = root.astype(np.float32)
    jacobian *= root[..., None]
    by_shape *= root[..., None]
    return _Linear(residual, jacobian.reshape(len(frames), -1, _Q), by_shape, by_focal, error_px)


_CHUNK = 16  # frames linearised at once: some 20 MB


def _expression_prior(problem: _Problem, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(curvature "t 64", gradient "t 64") of ridge, sparsity (linear, since those actions are one-sided) and soft bounds."""
    config = problem.config
    outside = e - np.clip(e, problem.low, problem.high)
    curvature = config.expression_ridge + config.expression_bound * (outside != 0)
    return curvature, config.expression_ridge * e + problem.sparse / 2 + config.expression_bound * outside


def _step(q: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """q + delta, turning at most a quarter radian and not leaping in size or expression."""
    delta[:, :3] = np.clip(delta[:, :3], -0.25, 0.25)
    delta[:, 5:] = np.clip(delta[:, 5:], -0.25, 0.25)
    return q + delta


# ---- identity, focal length, offsets: some training frames ----


def _fit_identity(problem: _Problem, state: _State, frames: np.ndarray, progress: Callable[[float], None]) -> None:
    """Joint Gauss-Newton over identity, log f and the frames' own unknowns, which the Schur complement eliminates; then the offsets."""
    steps = problem.config.identity_steps
    for step in range(steps):
        _identity_step(problem, state, frames, damping=0.1 if step < 3 else 1e-3)
        progress(step / (steps + 2 * problem.config.offset_rounds))
    for round_ in range(problem.config.offset_rounds):
        _update_offset(problem, state, frames)
        for _ in range(2):
            _identity_step(problem, state, frames, damping=1e-3, shape=False)
        progress((steps + 2 * round_) / (steps + 2 * problem.config.offset_rounds))
    progress(1.0)


def _identity_step(problem: _Problem, state: _State, frames: np.ndarray, damping: float, shape: bool = True) -> None:
    config, basis = problem.config, problem.basis
    k = IDENTITY_DIM + 1
    identity_basis = basis.identity.transpose(1, 2, 0).astype(np.float32)
    n = len(frames)
    C = np.zeros((k, k))
    h = np.zeros(k)
    C[:-1, :-1] = np.eye(IDENTITY_DIM) * config.identity_ridge * n
    h[:-1] = config.identity_ridge * n * state.identity
    focal_prior = n / config.focal_spread**2  # one frame's residuals are not independent, nor are the frames
    C[-1, -1] = focal_prior
    h[-1] = focal_prior * (np.log(state.focal) - np.log(config.focal_px * problem.width / 512))
    eliminated = []
    for start in range(0, n, _CHUNK):
        own = frames[start : start + _CHUNK]
        linear = _linearise(problem, state, own)
        G = np.empty((len(own), N_LANDMARKS, 3, k), np.float32)
        np.multiply(linear.by_shape[..., 0, None], identity_basis[:, None, 0], out=G[..., :-1])
        for axis in (1, 2):
            G[..., :-1] += linear.by_shape[..., axis, None] * identity_basis[:, None, axis]
        G[..., -1] = linear.by_focal
        G = G.reshape(len(own), -1, k)
        r = linear.residual.reshape(len(own), -1, 1).astype(np.float32)
        Jt = linear.by_frame.transpose(0, 2, 1)
        A, B = (Jt @ linear.by_frame).astype(np.float64), (Jt @ G).astype(np.float64)
        g = (Jt @ r)[..., 0].astype(np.float64)
        curvature, slope = _expression_prior(problem, state.q[own, POSE_DIM:])
        diagonal = np.arange(_Q)
        A[:, diagonal, diagonal] *= 1 + damping
        A[:, diagonal[POSE_DIM:], diagonal[POSE_DIM:]] += curvature
        g[:, POSE_DIM:] += slope
        Gt = G.transpose(0, 2, 1)
        C += (Gt @ G).sum(0)
        h += (Gt @ r).sum(0)[:, 0]
        solved = np.linalg.solve(A, np.concatenate([B, g[..., None]], -1))
        eliminated.append((own, solved))
        C -= (B.transpose(0, 2, 1) @ solved[..., :-1]).sum(0)
        h -= (B.transpose(0, 2, 1) @ solved[..., -1:]).sum(0)[:, 0]
    move = -np.linalg.solve(C, h) if shape else np.zeros(k)
    move[-1] = np.clip(move[-1], -0.2, 0.2)
    for own, solved in eliminated:
        state.q[own] = _step(state.q[own], -(solved[..., -1] + solved[..., :-1] @ move))
    state.identity += move[:-1]
    state.focal *= float(np.exp(move[-1]))


def _update_offset(problem: _Problem, state: _State, frames: np.ndarray) -> None:
    """The constant offset of each landmark that these frames agree on, without its rigid part (which is pose)."""
    A = np.zeros((N_LANDMARKS, 3, 3))
    g = np.zeros((N_LANDMARKS, 3))
    for start in range(0, len(frames), _CHUNK):
        linear = _linearise(problem, state, frames[start : start + _CHUNK])
        image = linear.by_shape[:, :, :2].astype(np.float64)
        A += np.einsum("tlij,tlik->ljk", image, image)
        g += np.einsum("tlij,tli->lj", image, linear.residual[:, :, :2])
    ridge = 0.05 * np.trace(A, axis1=1, axis2=2)[:, None, None] / 3 * np.eye(3)
    offset = state.offset - np.linalg.solve(A + ridge, g[..., None])[..., 0]
    rest = problem.basis.rest
    modes = np.concatenate([np.broadcast_to(np.eye(3), (N_LANDMARKS, 3, 3)), _skew(rest), rest[..., None]], -1).reshape(-1, 7)
    state.offset = offset - (modes @ np.linalg.lstsq(modes, offset.reshape(-1), rcond=None)[0]).reshape(-1, 3)


# ---- poses and expressions: all frames of a segment ----


def _fit_segment(problem: _Problem, state: _State, segment: np.ndarray, progress: Callable[[float], None]) -> None:
    """Minimise over the q of consecutive frames. Long segments go in windows whose seams move from step to step."""
    config = problem.config
    for step in range(config.frame_steps):
        shift = (step % 2) * config.window // 2
        cuts = np.arange(shift, len(segment), config.window)[1 if shift == 0 else 0 :]
        windows = [w for w in np.split(segment, cuts) if len(w)]
        for number, window in enumerate(windows):
            _frame_step(problem, state, segment, window, damping=0.1 if step < 2 else 1e-3)
            progress((step + (number + 1) / len(windows)) / config.frame_steps)


def _smooth_units(problem: _Problem, state: _State) -> np.ndarray:
    """ "70": what turns q into landmark motion in noise units (pose) or leaves it (expression)."""
    scale = np.ones(_Q)
    scale[[0, 1, 2, 5]] = _RADIUS_DM * 100 / problem.config.noise_mm
    scale[3:5] = 1 / np.median(state.unit_px)
    return scale


def _frame_step(problem: _Problem, state: _State, segment: np.ndarray, window: np.ndarray, damping: float) -> None:
    config = problem.config
    n = len(window)
    A = np.zeros((n, _Q, _Q))
    g = np.zeros((n, _Q))
    seen = np.flatnonzero(problem.found[window])
    for start in range(0, len(seen), _CHUNK):
        own = seen[start : start + _CHUNK]
        linear = _linearise(problem, state, window[own])
        Jt = linear.by_frame.transpose(0, 2, 1)
        A[own] = Jt @ linear.by_frame
        g[own] = (Jt @ linear.residual.reshape(len(own), -1, 1).astype(np.float32))[..., 0]
    diagonal = np.arange(_Q)
    A[:, diagonal, diagonal] *= 1 + damping
    curvature, slope = _expression_prior(problem, state.q[window, POSE_DIM:])
    A[:, diagonal[POSE_DIM:], diagonal[POSE_DIM:]] += curvature
    g[:, POSE_DIM:] += slope
    blind = np.flatnonzero(~problem.found[window])  # held to the interpolated pose, or a long gap would fly off
    A[blind[:, None], diagonal[:POSE_DIM], diagonal[:POSE_DIM]] += 1e-2 * _smooth_units(problem, state)[:POSE_DIM] ** 2

    # second differences: all of the segment's that touch the window; frames outside the window stay as they are
    scale = _smooth_units(problem, state)
    first, last = window[0] - segment[0], window[-1] - segment[0]
    one, two = np.zeros((max(n - 1, 0), _Q)), np.zeros((max(n - 2, 0), _Q))  # couplings to the next frame and the one after
    centres = np.arange(max(first - 1, 1), min(last + 1, len(segment) - 2) + 1)
    if len(centres):
        q = state.q[segment]
        bend = q[centres - 1] - 2 * q[centres] + q[centres + 1]
        weight = np.full((len(centres), _Q), config.expression_smooth)
        size2 = ((bend * scale)[:, :POSE_DIM] ** 2).sum(1, keepdims=True)
        weight[:, :POSE_DIM] = config.pose_smooth * scale[:POSE_DIM] ** 2 / (1 + size2 / config.pose_jump**2)
        taps = ((-1, 1.0), (0, -2.0), (1, 1.0))
        for i, a in taps:
            at = centres + i - first
            inside = (at >= 0) & (at < n)
            np.add.at(g, at[inside], (a * weight * bend)[inside])
            np.add.at(A, (at[inside][:, None], diagonal, diagonal), (a * a * weight)[inside])
            for j, b in taps:
                to = centres + j - first
                both = inside & (to >= 0) & (to < n)
                if j - i == 1:
                    np.add.at(one, at[both], (a * b * weight)[both])
                elif j - i == 2:
                    np.add.at(two, at[both], (a * b * weight)[both])

    band = np.zeros((2 * _Q + 1 if n > 2 else _Q + 1 if n > 1 else _Q, n * _Q))
    for k in range(_Q):
        band[k].reshape(n, _Q)[:, : _Q - k] = np.diagonal(A, -k, 1, 2)
    if n > 1:
        band[_Q, : (n - 1) * _Q] = one.reshape(-1)
    if n > 2:
        band[2 * _Q, : (n - 2) * _Q] = two.reshape(-1)
    delta = -solveh_banded(band, g.reshape(-1), overwrite_ab=True, lower=True, check_finite=False).reshape(n, _Q)
    state.q[window] = _step(state.q[window], delta)


# ---- the result ----


def _track(problem: _Problem, state: _State) -> FaceTrack:
    """Poses, and landmarks in the head frame: the measured pixels at the fitted depth, so they keep what the model cannot say."""
    q = torch.from_numpy(state.q)
    camera = Camera.pinhole(state.focal, problem.width, problem.height)
    flip = torch.from_numpy(_FLIP)
    depth_scale = q[:, 5].exp()
    shift = torch.stack([q[:, 3] * depth_scale, q[:, 4] * depth_scale, state.focal * depth_scale], 1)
    poses = rigid(flip[:, None] * rotation_from_axis_angle(q[:, :3]), shift)
    expression = q[:, POSE_DIM:]

    rest = problem.basis.rest + state.offset + np.tensordot(state.identity, problem.basis.identity, 1)
    shape = torch.from_numpy(rest) + torch.tensordot(expression, torch.from_numpy(problem.basis.expression), 1)
    views = Camera(camera.K.double().expand(len(q), 3, 3), poses, problem.width, problem.height)
    modelled, depth = views.project(shape)
    measured = torch.from_numpy(problem.points[..., :2] + [problem.width / 2, problem.height / 2])
    seen = torch.from_numpy(problem.found)
    pixels = torch.where(seen[:, None, None], measured, modelled)
    landmarks = views.unproject(pixels, depth)
    motion = Motion(expression.float(), landmarks.float(), poses.float())
    return FaceTrack(motion, torch.from_numpy(state.identity).float(), camera, pixels.float(), seen.float())
