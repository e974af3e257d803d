"""Gauss-Newton for the head fit.

Identity and focal length come first, jointly with the unknowns of some training frames. Then all frames of a segment
are solved at once (banded normal equations). Training and test frames are separate segments under the same objective:
nothing of a test frame reaches a training frame.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import solveh_banded

from hicode.errors import InputError
from hicode.motion import FaceTrack
from hicode.tracking.fit.flow import add_flow_term, place_flow
from hicode.tracking.fit.identity import CHUNK, Person, damp_and_add_prior, fit_identity, step_frames
from hicode.tracking.fit.problem import (
    FRAME_DIM,
    POSE_DIM,
    FitConfig,
    Observations,
    Problem,
    State,
    initial_state,
    linearise,
    segments,
    track_of,
)
from hicode.tracking.head_model import HeadModel

Progress = Callable[[float], None]
_RADIUS_DM = 0.4  # distance of a typical landmark from the origin: turns radians and log-scale into landmark motion
_FIXED = 1e9  # curvature that keeps a pose where it is


def fit_track(
    observed: Observations,
    model: HeadModel,
    train: range | None = None,
    config: FitConfig = FitConfig(),
    person: Person | None = None,
    progress: Progress = lambda done: None,
) -> FaceTrack:
    """Fit a clip.

    `train` (default: all frames) are the frames that identity and focal length may use; a known `person` is taken as
    given. Frames without a face are interpolated and have confidence 0. `progress` gets the fraction done. Raises
    InputError where fewer than two training frames have a face.
    """
    problem = Problem.of(observed, model, config)
    count = len(problem.points)
    train = range(count) if train is None else train
    usable = np.array([t for t in train if problem.found[t]], int)
    if len(usable) < 2:
        raise InputError(
            f"A face was found in {len(usable)} of {len(train)} training frames. Use a clip that shows one throughout."
        )
    state = initial_state(problem, person.focal_px if person else config.focal_px * observed.width / 512)
    if person:
        state.identity = np.asarray(person.identity, np.float64)
    else:
        chosen = usable[np.linspace(0, len(usable) - 1, min(config.identity_frames, len(usable))).round().astype(int)]
        fit_identity(problem, state, np.unique(chosen), lambda done: progress(0.3 * done))
    fit_frames(problem, state, train, lambda done: progress(0.3 + 0.7 * done))
    return track_of(problem, state)


def fit_frames(problem: Problem, state: State, train: range, progress: Progress) -> None:
    """Minimise over the unknowns of all frames, each segment by itself."""
    parts = segments(len(problem.points), train)
    for number, segment in enumerate(parts):
        _fit_segment(problem, state, segment, lambda done, n=number: progress((n + done) / len(parts)))


def _fit_segment(problem: Problem, state: State, segment: Int[np.ndarray, "n"], progress: Progress) -> None:
    """Minimise over consecutive frames. Long segments go in windows whose seams move from step to step."""
    config = problem.config
    for step in range(config.frame_steps):
        use_flow = problem.flow is not None and step >= config.flow_from_step
        if use_flow and step == config.flow_from_step:
            place_flow(problem, state, segment)
        shift = (step % 2) * config.window // 2
        cuts = np.arange(shift, len(segment), config.window)[1 if shift == 0 else 0 :]
        windows = [window for window in np.split(segment, cuts) if len(window)]
        for number, window in enumerate(windows):
            _frame_step(problem, state, segment, window, 0.1 if step < 2 else 1e-3, use_flow)
            progress((step + (number + 1) / len(windows)) / config.frame_steps)


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """Of n consecutive frames, filled in place.

    A "n 70 70", g "n 70"      of each frame
    pose_coupling "n-1 6 6"    of a frame's pose and the next one's, by flow
    next, after_next "n 70"    diagonal couplings to the next frame and to the one after, by smoothness
    """

    A: Float[np.ndarray, "n 70 70"]
    g: Float[np.ndarray, "n 70"]
    pose_coupling: Float[np.ndarray, "n 6 6"]
    next: Float[np.ndarray, "n 70"]
    after_next: Float[np.ndarray, "n 70"]

    @staticmethod
    def zeros(n: int) -> "NormalEquations":
        """The last one or two rows of the couplings stay unused."""
        Q, P = FRAME_DIM, POSE_DIM
        vector = lambda: np.zeros((n, Q))
        return NormalEquations(np.zeros((n, Q, Q)), vector(), np.zeros((n, P, P)), vector(), vector())

    def solve(self) -> Float[np.ndarray, "n 70"]:
        """The step that solves the banded system."""
        n, Q, P = len(self.g), FRAME_DIM, POSE_DIM
        band = np.zeros((2 * Q + 1 if n > 2 else Q + P if n > 1 else Q, n * Q))
        for k in range(Q):
            band[k].reshape(n, Q)[:, : Q - k] = np.diagonal(self.A, -k, 1, 2)
        if n > 1:
            band[Q, : (n - 1) * Q] = self.next[:-1].reshape(-1)
            for i in range(P):
                for j in range(P):
                    band[Q + i - j].reshape(n, Q)[:-1, j] += self.pose_coupling[:-1, j, i]
        if n > 2:
            band[2 * Q, : (n - 2) * Q] = self.after_next[:-2].reshape(-1)
        solution = solveh_banded(band, self.g.reshape(-1), overwrite_ab=True, lower=True, check_finite=False)
        return -solution.reshape(n, Q)


def _smooth_units(problem: Problem, state: State) -> Float[np.ndarray, "70"]:
    """What turns q into landmark motion in noise units (pose) or leaves it (expression)."""
    scale = np.ones(FRAME_DIM)
    scale[[0, 1, 2, 5]] = _RADIUS_DM * 100 / problem.config.noise_mm
    scale[3:5] = 1 / np.median(state.unit_px)
    return scale


def _frame_step(
    problem: Problem, state: State, segment: np.ndarray, window: np.ndarray, damping: float, use_flow: bool
) -> None:
    """One Gauss-Newton step over the frames of `window`; the rest of its segment stays as it is."""
    equations = NormalEquations.zeros(len(window))
    A, g, pose = equations.A, equations.g, np.arange(POSE_DIM)
    scale = _smooth_units(problem, state)
    _add_landmark_term(problem, state, window, equations)
    bias = _eliminate_bias(problem, state, window, equations, scale)
    damp_and_add_prior(problem, state, window, A, g, damping)
    unseen = np.flatnonzero(~problem.found[window])  # a long gap would drift off without this
    A[unseen[:, None], pose, pose] += 1e-2 * scale[:POSE_DIM] ** 2
    if use_flow:
        add_flow_term(problem, state, segment, window, equations)
    _add_smoothness(problem, state, segment, window, equations, scale)
    if state.fixed_poses:
        A[:, pose, pose] += _FIXED * scale[:POSE_DIM] ** 2
        g[:, :POSE_DIM] = 0
    delta = equations.solve()
    state.q[window] = step_frames(state.q[window], delta)
    state.bias[window] -= bias[..., -1] + (bias[..., :-1] @ delta[..., None])[..., 0]


def _add_landmark_term(problem: Problem, state: State, window: np.ndarray, equations: NormalEquations) -> None:
    seen = np.flatnonzero(problem.found[window])
    for start in range(0, len(seen), CHUNK):
        chunk = seen[start : start + CHUNK]
        linear = linearise(problem, state, window[chunk])
        Jt = linear.by_frame.transpose(0, 2, 1)
        equations.A[chunk] = Jt @ linear.by_frame
        equations.g[chunk] = (Jt @ linear.residual.reshape(len(chunk), -1, 1).astype(np.float32))[..., 0]


def _eliminate_bias(
    problem: Problem, state: State, window: np.ndarray, equations: NormalEquations, scale: Float[np.ndarray, "70"]
) -> Float[np.ndarray, "n 6 71"]:
    """Eliminate the landmark bias, which enters the landmark term as the pose does.

    Returns S, with which the step of the bias follows from the frames' step d: -(S[:, -1] + S[:, :-1] d).
    """
    prior = np.diag((scale[:POSE_DIM] / problem.config.landmark_bias) ** 2)
    rows = equations.A[:, :POSE_DIM].copy()
    slope = equations.g[:, :POSE_DIM] + state.bias[window] @ prior
    solved = np.linalg.solve(rows[:, :, :POSE_DIM] + prior, np.concatenate([rows, slope[..., None]], -1))
    equations.A[:] -= rows.transpose(0, 2, 1) @ solved[..., :-1]
    equations.g[:] -= (rows.transpose(0, 2, 1) @ solved[..., -1:])[..., 0]
    return solved


def _add_smoothness(
    problem: Problem,
    state: State,
    segment: np.ndarray,
    window: np.ndarray,
    equations: NormalEquations,
    scale: Float[np.ndarray, "70"],
) -> None:
    """Add all second differences of the segment that touch the window."""
    config, n = problem.config, len(window)
    first, last = window[0] - segment[0], window[-1] - segment[0]
    centres = np.arange(max(first - 1, 1), min(last + 1, len(segment) - 2) + 1)
    if not len(centres):
        return
    q = state.q[segment]
    bend = q[centres - 1] - 2 * q[centres] + q[centres + 1]
    weight = np.full((len(centres), FRAME_DIM), config.expression_smooth)
    size2 = ((bend * scale)[:, :POSE_DIM] ** 2).sum(1, keepdims=True)
    weight[:, :POSE_DIM] = config.pose_smooth * scale[:POSE_DIM] ** 2 / (1 + size2 / config.pose_jump**2)
    diagonal = np.arange(FRAME_DIM)
    taps = ((-1, 1.0), (0, -2.0), (1, 1.0))
    couplings = {1: equations.next, 2: equations.after_next}
    for i, a in taps:
        at = centres + i - first
        inside = (at >= 0) & (at < n)
        np.add.at(equations.g, at[inside], (a * weight * bend)[inside])
        np.add.at(equations.A, (at[inside][:, None], diagonal, diagonal), (a * a * weight)[inside])
        for j, b in taps:
            both = inside & (centres + j - first >= 0) & (centres + j - first < n)
            if j > i:
                np.add.at(couplings[j - i], at[both], (a * b * weight)[both])
