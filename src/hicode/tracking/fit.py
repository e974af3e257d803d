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

  + Σ_t Σ_i ρ(motion of a surface point from t to t+1 − optical flow)   where `track_flow` measured it

A landmark network errs by a common rigid motion in every frame (its crop jitters by about a pixel), which no smoothing tells from real motion: the
mean face moves 4 px a frame in some clips. So each frame has a *slip*, six numbers added to the pose in the landmark term only; flow, exact to
tenths of a pixel, ties the poses of neighbouring frames, and the landmarks tell where the head is on average. Canonical landmarks are taken
under pose + slip, so the slip reaches neither them nor the expression.

It is minimised by Gauss-Newton. Soft bounds, since with hard ones each step ends where the first of many actions meets its own. Identity and focal length come first, jointly with the poses and expressions of some training frames
(Schur complement); then, with these fixed, all frames of a segment at once (banded normal equations). Training and test frames are separate
segments under the same objective: nothing of a test frame reaches a training frame.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.linalg import solveh_banded
from torch import Tensor

from hicode.camera import Camera
from hicode.errors import InputError
from hicode.geometry import rigid, rotation_from_axis_angle, similarity, smoothstep
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
from hicode.tracking.depth import rasterize_mesh
from hicode.tracking.head_model import HeadModel

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
    pose_smooth: float = 20.0  # on second differences, in noise units of landmark motion
    pose_jump: float = 0.4  # second differences beyond this (noise units) count as motion, not noise (Cauchy)
    slip: float = 0.3  # deviation of the landmarks' common error in a frame, noise units
    flow_noise: float = 0.12  # of one flow vector, noise units; beyond it counts less (Cauchy)
    flow_weight: float = 0.2  # neighbouring flow vectors err alike, so each counts less than one
    identity_ridge: float = 1.0  # times the number of frames
    focal_px: float = 1400.0  # prior for a 512 px wide crop
    focal_spread: float = 0.3  # its standard deviation in log f
    identity_frames: int = 96  # training frames that identity and focal length are fitted to
    identity_steps: int = 10
    offset_rounds: int = 0  # estimates of this person's constant landmark offsets; measured: no steadier poses, so off
    frame_steps: int = 8
    flow_from_step: int = 3  # flow needs the mesh about in place
    window: int = 1000  # frames solved at once; bounds memory
    outline_mm: float = (
        20.0  # landmarks farther from the outline than this keep their place in the picture when poses are exchanged
    )


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


@dataclass(frozen=True)
class Person:
    """What stays the same over a person's clips by one camera: identity of the 3DMM, focal length in px."""

    identity: Float[np.ndarray, "80"]
    focal_px: float


def fit_track(
    points_px: Float[Tensor, "t 478 3"] | np.ndarray,
    found: Bool[Tensor, "t"] | np.ndarray,
    width: int,
    height: int,
    model: HeadModel,
    train: slice | range | None = None,
    progress: Callable[[float], None] | None = None,
    config: FitConfig = FitConfig(),
    flow: "Flow | None" = None,
    person: Person | None = None,
) -> FaceTrack:
    """Fit a clip. Landmarks in px (pixel centres at +0.5; z in px, smaller is nearer), `found` where a face was seen.

    `train` (a slice or range from frame 0; default all) are the frames that identity, focal length and landmark offsets may see. Frames
    without a face are interpolated and carry confidence 0. `flow` (of the same frames, see `track_flow`) steadies the poses several times over.
    A known `person` (`fit_person`) is taken as given. `progress` is called with the fraction done. Raises InputError
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
        raise InputError(
            f"A face was found in {len(usable)} of {in_train.sum()} training frames. Use a clip that shows one throughout."
        )

    assert flow is None or len(flow.start_px) == count - 1, (len(flow.start_px), count)
    problem = _Problem.of(points, found, width, height, model, config, flow)
    state = _initial_state(problem, person.focal_px if person else config.focal_px * width / 512)
    if person:
        state.identity = np.asarray(person.identity, np.float64)
    else:
        chosen = usable[np.linspace(0, len(usable) - 1, min(config.identity_frames, len(usable))).round().astype(int)]
        _fit_identity(problem, state, np.unique(chosen), lambda x: progress and progress(0.3 * x))

    edges = np.flatnonzero(np.diff(in_train)) + 1
    segments = np.split(np.arange(count), edges)
    for number, segment in enumerate(segments):
        _fit_segment(
            problem, state, segment, lambda x, n=number: progress and progress(0.3 + 0.7 * (n + x) / len(segments))
        )
    return _track(problem, state)


def refit_expressions(
    track: FaceTrack,
    poses: Float[Tensor, "t 4 4"],
    points_px: Float[Tensor, "t 478 3"] | np.ndarray,
    found: Bool[Tensor, "t"] | np.ndarray,
    model: HeadModel,
    train: range,
    config: FitConfig = FitConfig(),
    progress: Callable[[float], None] | None = None,
) -> FaceTrack:
    """The track with other poses (`hicode.tracking.rigid_pose`), which stay as they are: expressions, slips and canonical landmarks are found anew under them.

    Slips are larger here than in `fit_track`, a px or two for seconds: not the network's shake, but the face against the skull. Lips rendered without it
    would be beside where they are seen. So landmarks inside the face are seen where `track`'s are, from which flow has already taken out
    the shake. Those on the outline lose the slip: they lie on a silhouette, and ears, hair and neck, which follow the skull better, hang on them.

    Identity and focal length are the track's. Training and test frames are separate segments, as in `fit_track`.
    """
    found = np.asarray(found, bool) & np.isfinite(np.asarray(points_px)).all((1, 2))
    points = np.where(found[:, None, None], np.asarray(points_px, np.float64), 0.0)
    problem = _Problem.of(points, found, track.camera.width, track.camera.height, model, config)
    state = _initial_state(problem, float(track.camera.K[0, 0]))
    state.identity = track.identity.double().numpy()
    poses = poses.double().numpy()
    state.q[:, :3] = [_log_rotation(_FLIP[:, None] * T[:3, :3]) for T in poses]
    depth_scale = poses[:, 2, 3] / state.focal
    state.q[:, 3:5] = poses[:, :2, 3] / depth_scale[:, None]
    state.q[:, 5] = np.log(depth_scale)
    state.q[:, POSE_DIM:] = track.motion.expression.double().numpy()
    state.unit_px = config.noise_mm * 0.01 / depth_scale
    state.held = True
    edges = [t for t in (train.start, train.stop) if 0 < t < len(points)]
    segments = np.split(np.arange(len(points)), edges)
    for number, segment in enumerate(segments):
        _fit_segment(problem, state, segment, lambda x, n=number: progress and progress((n + x) / len(segments)))
    anew = _track(problem, state)
    view = lambda motion: Camera(
        track.camera.K.expand(len(track), 3, 3), motion.T_camera_head, problem.width, problem.height
    )
    seen = view(track.motion).project(track.motion.landmarks)[0]
    # The depth is the new one: poses of the two differ by millimetres along the ray, which nobody sees and which would shake the landmarks.
    seated = view(anew.motion).unproject(seen, view(anew.motion).project(anew.motion.landmarks)[1])
    inside = _inside_face(problem, state.identity, config.outline_mm * 0.01)
    return replace(
        anew, motion=replace(anew.motion, landmarks=torch.lerp(anew.motion.landmarks, seated, inside[:, None]))
    )


def _inside_face(problem: "_Problem", identity: np.ndarray, reach: float) -> Float[Tensor, "478"]:
    """0 on the face's outline, 1 from `reach` (dm) inside it on."""
    rest = torch.from_numpy(problem.basis.rest + np.tensordot(identity, problem.basis.identity, 1)).float()
    return smoothstep(torch.cdist(rest, rest[torch.from_numpy(FACE_OVAL)]).amin(1) / reach)


def fit_person(
    points_px: Float[np.ndarray, "t 478 3"], width: int, height: int, model: HeadModel, config: FitConfig = FitConfig()
) -> Person:
    """Identity and focal length that frames with a face agree on; they may come from several clips by one camera, in any order."""
    state = _person_state(points_px, width, height, model, config)
    return Person(state.identity, state.focal)


def person_offsets(
    points_px: Float[np.ndarray, "t 478 3"], width: int, height: int, model: HeadModel, config: FitConfig = FitConfig()
) -> tuple[Float[np.ndarray, "478 3"], Float[Tensor, "80"]]:
    """(constant offset (dm, head frame) of each landmark from where the model has it, identity) for some frames of one person."""
    state = _person_state(points_px, width, height, model, config)
    return state.offset, torch.from_numpy(state.identity).float()


def _person_state(points_px: np.ndarray, width: int, height: int, model: HeadModel, config: FitConfig) -> "_State":
    points = np.asarray(points_px, np.float64)
    problem = _Problem.of(points, np.ones(len(points), bool), width, height, model, config)
    state = _initial_state(problem, config.focal_px * width / 512)
    _fit_identity(problem, state, np.arange(len(points)), lambda done: None)
    return state


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
    return _Basis(
        *(model.landmarks(x).double().numpy() for x in (model.mean, model.identity_basis, model.expression_basis))
    )


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
    flow: "Flow | None"

    @staticmethod
    def of(
        points: np.ndarray,
        found: np.ndarray,
        width: int,
        height: int,
        model: HeadModel,
        config: FitConfig,
        flow: "Flow | None" = None,
    ) -> "_Problem":
        weight = np.ones(N_LANDMARKS)
        weight[LIPS] = config.lips_weight
        weight[np.concatenate([RIGHT_EYE_RING, LEFT_EYE_RING])] = config.eyes_weight
        weight[FACE_OVAL] = config.oval_weight
        low, high = model.expression_low.double().numpy(), model.expression_high.double().numpy()
        sparse = np.where(low < 0, 0.0, config.expression_sparse)
        centred = points - [width / 2, height / 2, 0]
        return _Problem(
            centred, found, _landmark_basis(model), low, high, sparse, weight, model, width, height, config, flow
        )


@dataclass
class _State:
    q: np.ndarray  # "t 70": r, u, v, s, e
    identity: np.ndarray  # "80"
    focal: float
    offset: np.ndarray  # "l 3" dm: this person's landmarks against the model's
    unit_px: np.ndarray  # "t": one noise unit in px at the head's depth
    slip: np.ndarray  # "t 6": the landmarks' common error, added to the pose in their term
    held: bool = False  # poses stay as they are
    flow_depth: np.ndarray | None = field(
        default=None
    )  # "t-1 k": depth of flow points over the head's, NaN off the head


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
    return _State(q, np.zeros(IDENTITY_DIM), focal, np.zeros((N_LANDMARKS, 3)), unit_px, np.zeros((count, POSE_DIM)))


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
    q, f = state.q[frames].copy(), state.focal
    q[:, :POSE_DIM] += state.slip[frames]
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
    modes = np.concatenate([np.broadcast_to(np.eye(3), (N_LANDMARKS, 3, 3)), _skew(rest), rest[..., None]], -1).reshape(
        -1, 7
    )
    state.offset = offset - (modes @ np.linalg.lstsq(modes, offset.reshape(-1), rcond=None)[0]).reshape(-1, 3)


# ---- poses and expressions: all frames of a segment ----


def _fit_segment(problem: _Problem, state: _State, segment: np.ndarray, progress: Callable[[float], None]) -> None:
    """Minimise over the q of consecutive frames. Long segments go in windows whose seams move from step to step."""
    config = problem.config
    for step in range(config.frame_steps):
        if problem.flow is not None and step == config.flow_from_step:
            _place_flow(problem, state, segment)
        use_flow = problem.flow is not None and step >= config.flow_from_step
        shift = (step % 2) * config.window // 2
        cuts = np.arange(shift, len(segment), config.window)[1 if shift == 0 else 0 :]
        windows = [w for w in np.split(segment, cuts) if len(w)]
        for number, window in enumerate(windows):
            _frame_step(problem, state, segment, window, damping=0.1 if step < 2 else 1e-3, use_flow=use_flow)
            progress((step + (number + 1) / len(windows)) / config.frame_steps)


def _smooth_units(problem: _Problem, state: _State) -> np.ndarray:
    """ "70": what turns q into landmark motion in noise units (pose) or leaves it (expression)."""
    scale = np.ones(_Q)
    scale[[0, 1, 2, 5]] = _RADIUS_DM * 100 / problem.config.noise_mm
    scale[3:5] = 1 / np.median(state.unit_px)
    return scale


def _frame_step(
    problem: _Problem, state: _State, segment: np.ndarray, window: np.ndarray, damping: float, use_flow: bool
) -> None:
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
    scale = _smooth_units(problem, state)
    # the slip enters the landmark term as the pose does; it is eliminated here and found again below
    slip_prior = np.diag((scale[:POSE_DIM] / config.slip) ** 2)
    slip_row = A[:, :POSE_DIM].copy()
    slip_slope = g[:, :POSE_DIM] + state.slip[window] @ slip_prior
    solved = np.linalg.solve(
        slip_row[:, :, :POSE_DIM] + slip_prior, np.concatenate([slip_row, slip_slope[..., None]], -1)
    )
    A -= slip_row.transpose(0, 2, 1) @ solved[..., :-1]
    g -= (slip_row.transpose(0, 2, 1) @ solved[..., -1:])[..., 0]

    A[:, diagonal, diagonal] *= 1 + damping
    curvature, slope = _expression_prior(problem, state.q[window, POSE_DIM:])
    A[:, diagonal[POSE_DIM:], diagonal[POSE_DIM:]] += curvature
    g[:, POSE_DIM:] += slope
    blind = np.flatnonzero(~problem.found[window])  # held to the interpolated pose, or a long gap would fly off
    A[blind[:, None], diagonal[:POSE_DIM], diagonal[:POSE_DIM]] += 1e-2 * scale[:POSE_DIM] ** 2

    coupling = np.zeros((max(n - 1, 0), POSE_DIM, POSE_DIM))  # of the pose of a frame and of the next, by flow
    if use_flow:
        _add_flow(problem, state, segment, window, A, g, coupling)

    # second differences: all of the segment's that touch the window; frames outside the window stay as they are
    first, last = window[0] - segment[0], window[-1] - segment[0]
    one, two = (
        np.zeros((max(n - 1, 0), _Q)),
        np.zeros((max(n - 2, 0), _Q)),
    )  # couplings to the next frame and the one after
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

    if state.held:
        A[:, diagonal[:POSE_DIM], diagonal[:POSE_DIM]] += 1e9 * scale[:POSE_DIM] ** 2
        g[:, :POSE_DIM] = 0
    band = np.zeros((2 * _Q + 1 if n > 2 else _Q + POSE_DIM if n > 1 else _Q, n * _Q))
    for k in range(_Q):
        band[k].reshape(n, _Q)[:, : _Q - k] = np.diagonal(A, -k, 1, 2)
    if n > 1:
        band[_Q, : (n - 1) * _Q] = one.reshape(-1)
        for i in range(POSE_DIM):
            for j in range(POSE_DIM):
                band[_Q + i - j].reshape(n, _Q)[:-1, j] += coupling[:, j, i]
    if n > 2:
        band[2 * _Q, : (n - 2) * _Q] = two.reshape(-1)
    delta = -solveh_banded(band, g.reshape(-1), overwrite_ab=True, lower=True, check_finite=False).reshape(n, _Q)
    state.q[window] = _step(state.q[window], delta)
    state.slip[window] -= solved[..., -1] + (solved[..., :-1] @ delta[..., None])[..., 0]


# ---- optical flow ----


@dataclass(frozen=True)
class Flow:
    """Where points of the upper face went from each frame to the next: start_px, end_px "t-1 k 2" (pixel centres at +0.5), valid "t-1 k"."""

    start_px: Float[np.ndarray, "t-1 k 2"]
    end_px: Float[np.ndarray, "t-1 k 2"]
    valid: Bool[np.ndarray, "t-1 k"]


# The face above the mouth, whose motion is the head's but for brows and lids, which are cut out.
_STILL = [10, 109, 67, 103, 54, 127, 234, 93, 50, 205, 98, 97, 2, 326, 327, 425, 280, 323, 454, 356, 284, 332, 297, 338]
MOVING = (
    [70, 63, 105, 66, 107, 133, 155, 145, 163, 33, 130, 46],
    [300, 293, 334, 296, 336, 362, 382, 374, 390, 263, 359, 276],
)


def track_flow(
    frames: Iterable[np.ndarray],
    points_px: Float[np.ndarray, "t 478 3"],
    found: Bool[np.ndarray, "t"],
    points: int = 100,
) -> Flow:
    """Lucas-Kanade tracks of up to `points` corners of the upper face between neighbouring frames (uint8 RGB), kept where tracking back returns.

    One pass, two frames in memory, some 10 ms a frame. Pairs with a frame that has no face stay empty.
    """
    points_px, found = np.asarray(points_px, np.float32), np.asarray(found, bool)
    count = max(len(points_px) - 1, 0)
    start, end = np.zeros((count, points, 2)), np.zeros((count, points, 2))
    valid = np.zeros((count, points), bool)
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 20, 0.01)
    search = {"winSize": (21, 21), "maxLevel": 2, "criteria": stop}
    before = None
    for t, frame in enumerate(frames):
        now = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        if before is not None and t <= count and found[t - 1] and found[t]:
            face = points_px[t - 1, :, :2] - 0.5  # OpenCV puts pixel centres at whole numbers
            corners = cv2.goodFeaturesToTrack(before, points, 0.003, 5, mask=_still_mask(face, before.shape))
            if corners is not None:
                guess = corners + np.median(points_px[t, :468, :2] - points_px[t - 1, :468, :2], axis=0)
                there, ok, _ = cv2.calcOpticalFlowPyrLK(
                    before, now, corners, guess, flags=cv2.OPTFLOW_USE_INITIAL_FLOW, **search
                )
                back, ok_back, _ = cv2.calcOpticalFlowPyrLK(
                    now, before, there, corners.copy(), flags=cv2.OPTFLOW_USE_INITIAL_FLOW, **search
                )
                k = len(corners)
                start[t - 1, :k], end[t - 1, :k] = corners[:, 0] + 0.5, there[:, 0] + 0.5
                valid[t - 1, :k] = (
                    (ok[:, 0] > 0) & (ok_back[:, 0] > 0) & (np.linalg.norm(back - corners, axis=2)[:, 0] < 0.3)
                )
        before = now
    return Flow(start, end, valid)


def _still_mask(face: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    cv2.fillConvexPoly(mask, cv2.convexHull(face[_STILL]).round().astype(np.int32), 255)
    for part in MOVING:
        hull = cv2.convexHull(face[part]).round().astype(np.int32)
        cv2.fillConvexPoly(mask, hull, 0)
        cv2.polylines(mask, [hull], True, 0, 5)
    return mask


def _place_flow(problem: _Problem, state: _State, segment: np.ndarray) -> None:
    """Depth of every flow point over the head's depth, from the mesh as fitted so far; NaN beside the head."""
    flow, model = problem.flow, problem.model
    if state.flow_depth is None:
        state.flow_depth = np.full(flow.valid.shape, np.nan)
    triangles = model.triangles.numpy()
    identity = torch.from_numpy(state.identity).float()
    for t in segment[:-1]:
        if not flow.valid[t].any():
            continue
        vertices = model.vertices(identity, torch.from_numpy(state.q[t, POSE_DIM:]).float()).double().numpy()
        R = _exp_and_jacobian(state.q[t : t + 1, :3])[0][0]
        depth_scale = np.exp(state.q[t, 5])
        X = vertices @ (_FLIP[:, None] * R).T
        X += np.array([state.q[t, 3], state.q[t, 4], state.focal]) * depth_scale
        pixels = state.focal * X[:, :2] / X[:, 2:] + [problem.width / 2, problem.height / 2]
        raster = rasterize_mesh(pixels, X[:, 2], triangles, problem.width, problem.height)
        column, row = np.clip(flow.start_px[t].astype(int), 0, [problem.width - 1, problem.height - 1]).T
        depth = raster.depth[row, column] / (state.focal * depth_scale)
        state.flow_depth[t] = np.where(flow.valid[t] & np.isfinite(depth), depth, np.nan)


def _project_with_jacobian(
    x: np.ndarray, q: np.ndarray, focal: float
) -> tuple[Float[np.ndarray, "t k 2"], Float[np.ndarray, "t k 2 6"]]:
    """Pixels (from the image's centre) of head-frame points "t k 3" under poses "t 6", and their derivatives by the pose."""
    R, J = _exp_and_jacobian(q[:, :3])
    depth_scale = np.exp(q[:, 5])[:, None]
    T = np.stack([q[:, 3:4] * depth_scale, q[:, 4:5] * depth_scale, focal * depth_scale], -1)
    FR = _FLIP[:, None] * R
    X = x @ FR.transpose(0, 2, 1) + T
    pixel = focal * X[..., :2] / X[..., 2:]
    by_X = np.zeros((*x.shape[:2], 2, 3))
    by_X[..., 0, 0] = by_X[..., 1, 1] = focal / X[..., 2]
    by_X[..., 2] = -pixel / X[..., 2:]
    jacobian = np.empty((*x.shape[:2], 2, POSE_DIM))
    jacobian[..., :3] = np.cross(x[:, :, None], by_X @ FR[:, None]) @ J[:, None]
    jacobian[..., 3:5] = by_X[..., :2] * depth_scale[..., None, None]
    jacobian[..., 5] = (by_X @ T[..., None])[..., 0]
    return pixel, jacobian


def _add_flow(
    problem: _Problem,
    state: _State,
    segment: np.ndarray,
    window: np.ndarray,
    A: np.ndarray,
    g: np.ndarray,
    coupling: np.ndarray,
) -> None:
    """Add the flow term's normal equations; pairs reach one frame beyond the window, which stays as it is.

    The point seen at `start` lies on the head at the mesh's depth; held fast in the head frame, it should be seen at `end` one frame later.
    """
    config, flow, focal = problem.config, problem.flow, state.focal
    first = np.arange(max(window[0] - 1, segment[0]), min(window[-1], segment[-1] - 1) + 1)
    if not len(first):
        return
    centre = np.array([problem.width / 2, problem.height / 2])
    here, there = state.q[first, :POSE_DIM], state.q[first + 1, :POSE_DIM]
    ratio = state.flow_depth[first]
    valid = np.isfinite(ratio)
    z = np.where(valid, ratio, 1.0)[..., None] * (focal * np.exp(here[:, 5]))[:, None, None]
    start = flow.start_px[first] - centre
    R, _ = _exp_and_jacobian(here[:, :3])
    T = np.stack([here[:, 3], here[:, 4], np.full(len(here), focal)], 1) * np.exp(here[:, 5:])
    x = (np.concatenate([start / focal, np.ones_like(z)], -1) * z - T[:, None]) @ (_FLIP[:, None] * R)
    _, by_here = _project_with_jacobian(x, here, focal)
    seen, by_there = _project_with_jacobian(x, there, focal)
    noise = (config.flow_noise * state.unit_px[first])[:, None]
    residual = (seen - (flow.end_px[first] - centre)) / noise[..., None]
    weight = np.where(valid, config.flow_weight / (1 + (residual**2).sum(-1)), 0.0) / noise
    J = np.concatenate([-by_here, by_there], -1)  # "t k 2 12"
    Jw = (J * weight[..., None, None]).reshape(len(first), -1, 2 * POSE_DIM).transpose(0, 2, 1)
    H = Jw @ (J / noise[..., None, None]).reshape(len(first), -1, 2 * POSE_DIM)
    slope = (Jw @ residual.reshape(len(first), -1, 1))[..., 0]
    at = first - window[0]
    P = POSE_DIM
    inside, next_inside = at >= 0, at + 1 < len(window)
    A[at[inside], :P, :P] += H[inside, :P, :P]
    g[at[inside], :P] += slope[inside, :P]
    A[at[next_inside] + 1, :P, :P] += H[next_inside, P:, P:]
    g[at[next_inside] + 1, :P] += slope[next_inside, P:]
    both = inside & next_inside
    coupling[at[both]] += H[both, :P, P:]


# ---- the result ----


def _track(problem: _Problem, state: _State) -> FaceTrack:
    """Poses, and landmarks in the head frame: the measured pixels at the fitted depth, so they keep what the model cannot say."""
    camera = Camera.pinhole(state.focal, problem.width, problem.height)
    flip = torch.from_numpy(_FLIP)
    rest = torch.from_numpy(problem.basis.rest + state.offset + np.tensordot(state.identity, problem.basis.identity, 1))
    basis, centre = torch.from_numpy(problem.basis.expression), torch.tensor([problem.width / 2, problem.height / 2])

    def poses_of(q: np.ndarray) -> Tensor:
        q = torch.from_numpy(q)
        shift = torch.stack([q[:, 3], q[:, 4], torch.full_like(q[:, 3], state.focal)], 1) * q[:, 5:].exp()
        return rigid(flip[:, None] * rotation_from_axis_angle(q[:, :3]), shift)

    def landmarks_of(frames: slice) -> tuple[Tensor, Tensor]:
        """In px and in the head frame."""
        shape = rest + torch.tensordot(torch.from_numpy(state.q[frames, POSE_DIM:]), basis, 1)
        K = camera.K.double().expand(len(shape), 3, 3)
        views = Camera(K, poses_of(state.q[frames, :POSE_DIM] + state.slip[frames]), problem.width, problem.height)
        modelled, depth = views.project(shape)
        measured = torch.from_numpy(problem.points[frames, :, :2]) + centre
        pixels = torch.where(seen[frames, None, None], measured, modelled)
        return pixels.float(), views.unproject(pixels, depth).float()

    seen = torch.from_numpy(problem.found)
    chunks = [
        slice(start, start + 1000) for start in range(0, len(seen), 1000)
    ]  # a long clip's doubles would be gigabytes
    pixels, landmarks = (torch.cat(parts) for parts in zip(*map(landmarks_of, chunks), strict=True))
    motion = Motion(torch.from_numpy(state.q[:, POSE_DIM:]).float(), landmarks, poses_of(state.q[:, :POSE_DIM]).float())
    return FaceTrack(motion, torch.from_numpy(state.identity).float(), camera, pixels, seen.float())
