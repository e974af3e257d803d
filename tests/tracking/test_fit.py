"""The joint fit against synthetic clips whose truth is known, and on a real one."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from helpers.speaking_head import true_track
from hicode.camera import Camera
from hicode.errors import InputError
from hicode.motion import FACE_OVAL, LIPS, LOWER_LIP_INNER, UPPER_LIP_INNER, FaceTrack
from hicode.tracking.fit import (
    FitConfig,
    Flow,
    Observations,
    fit_person,
    fit_report,
    fit_track,
    refit_expressions,
    track_flow,
)
from hicode.tracking.fit import flow as flow_module
from hicode.tracking.fit import problem as objective
from hicode.tracking.head_model import HeadModel
from hicode.tracking.keyframes import gray_image

FAST = FitConfig(identity_frames=16, identity_steps=6, frame_steps=6)


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return HeadModel.load()


def seen(points: np.ndarray, found: np.ndarray | None = None, flow: Flow | None = None) -> Observations:
    """Landmarks of 512 px frames, all with a face if nothing else is said."""
    return Observations(points, np.ones(len(points), bool) if found is None else found, 512, 512, flow)


def lip_gap_correlation(track: FaceTrack, model: HeadModel) -> float:
    """Of the inner lips' gap over frames, modelled against measured."""
    modelled = model.landmarks(model.vertices(track.identity, track.motion.expression))
    gaps = [(x[:, UPPER_LIP_INNER] - x[:, LOWER_LIP_INNER]).norm(dim=1) for x in (modelled, track.motion.landmarks)]
    return float(torch.corrcoef(torch.stack(gaps))[0, 1])


def turn_error_deg(a: FaceTrack, b: FaceTrack) -> np.ndarray:
    relative = a.motion.T_camera_head[:, :3, :3].transpose(1, 2) @ b.motion.T_camera_head[:, :3, :3]
    return np.degrees(np.arccos(((relative.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).numpy()))


def test_the_jacobian_is_the_finite_difference_of_the_residuals(model):
    """Huber and weights are constants of a step, so at small residuals (weight 1) the derivative is exact."""
    _, points = true_track(model, 3)
    problem = objective.Problem.of(seen(points), model, replace(FitConfig(), huber=1e6))
    state = objective.initial_state(problem, 1200.0)
    rng = np.random.default_rng(1)
    state.q[:, 6:] = rng.uniform(0, 0.3, (3, 64))
    state.bias = rng.normal(0, 0.01, (3, 6))
    state.identity = rng.normal(0, 0.3, 80)
    frames = np.arange(3)
    at = objective.linearise(problem, state, frames)
    step = 1e-5
    for d in (0, 1, 2, 3, 4, 5, 6, 30, 69):
        unit = np.zeros_like(state.q)
        unit[:, d] = step
        low, high = (
            objective.linearise(problem, replace(state, q=state.q + s * unit), frames).residual for s in (-1, 1)
        )
        numeric = ((high - low) / (2 * step)).reshape(3, -1)
        # float32 Jacobian
        np.testing.assert_allclose(at.by_frame[:, :, d], numeric, atol=2e-3 * max(1, np.abs(numeric).max()))
    low, high = (
        objective.linearise(problem, replace(state, focal=state.focal * np.exp(s * step)), frames).residual
        for s in (-1, 1)
    )
    np.testing.assert_allclose(at.by_focal, (high - low) / (2 * step), atol=1e-3 * np.abs(at.by_focal).max())


def test_a_person_fitted_once_serves_a_clip_as_if_it_were_fitted_with_it(model):
    _, points = true_track(model, 16)
    person = fit_person(points, 512, 512, model, FAST)
    known, own = (
        fit_track(seen(points[:8]), model, config=FAST, person=person),
        fit_track(seen(points), model, config=FAST),
    )
    np.testing.assert_array_equal(known.identity, np.float32(person.identity))
    assert float(known.camera.K[0, 0]) == pytest.approx(person.focal_px)
    # The clip's own fit starts its frames from the identity's fit, so both end near each other, not in the same place.
    assert (known.motion.landmarks - own.motion.landmarks[:8]).norm(dim=-1).mean() < 0.01  # dm: 1 mm


def test_the_flow_jacobian_is_the_finite_difference_of_the_projection():
    rng = np.random.default_rng(0)
    x, q = rng.normal(0, 0.5, (2, 7, 3)), np.array([[0.1, -0.3, 0.2, 30, -20, -5.2], [0.4, 0.1, -0.1, 0, 5, -5.0]])
    _, jacobian = flow_module.project_with_jacobian(x, q, 1300.0)
    for d in range(6):
        unit = np.eye(6)[d] * 1e-6
        numeric = (
            flow_module.project_with_jacobian(x, q + unit, 1300.0)[0]
            - flow_module.project_with_jacobian(x, q - unit, 1300.0)[0]
        ) / 2e-6
        np.testing.assert_allclose(jacobian[..., d], numeric, rtol=1e-5, atol=1e-4)


def test_a_synthetic_clip_is_explained_to_a_fraction_of_a_pixel(model):
    truth, points = true_track(model)
    track = fit_track(seen(points), model, config=FAST)
    report = fit_report(track, model)
    assert report.error_px < 0.5 and report.lips_px < 0.5  # the priors pull a little
    assert turn_error_deg(track, truth).max() < 1.0  # identity, focal length and pose trade off against each other
    assert lip_gap_correlation(track, model) > 0.98
    jaw = model.expression_names.index("jawOpen")
    assert np.corrcoef(track.motion.expression[:, jaw], truth.motion.expression[:, jaw])[0, 1] > 0.9
    low, high = model.expression_low - 0.1, model.expression_high + 0.1
    assert ((track.motion.expression >= low) & (track.motion.expression <= high)).all()  # the bounds are soft


def test_canonical_landmarks_reproject_to_the_measured_pixels_of_a_clean_clip(model):
    """Under pose and slip exactly; without the slip, which is small on a clean clip, nearly."""
    _, points = true_track(model)
    track = fit_track(seen(points), model, config=FAST)
    camera = Camera(track.camera.K.expand(30, 3, 3), track.motion.T_camera_head, 512, 512)
    pixels, _ = camera.project(track.motion.landmarks)
    assert (pixels - track.landmarks_px).norm(dim=-1).mean() < 0.5
    assert torch.equal(track.landmarks_px, torch.from_numpy(points[..., :2]).float())


def test_under_other_poses_the_face_stays_where_it_is_seen_and_its_outline_goes_with_the_skull(model):
    """For some frames the rigid head's pose is 1 mm (1.7 px) aside and 4 mm further away than the landmarks say."""
    truth, points = true_track(model)
    poses = truth.motion.T_camera_head.clone()
    poses[10:20, 0, 3] += 0.01
    poses[10:20, 2, 3] += 0.04  # half a per cent of the distance: of no consequence to the eye
    # what the landmark network adds and the first track had taken out
    shaken = points + 0.6 * np.random.default_rng(0).normal(size=(30, 1, 3))
    track = refit_expressions(truth, poses, seen(shaken), model, range(24), FAST)
    torch.testing.assert_close(track.motion.T_camera_head, poses, atol=1e-5, rtol=0)
    camera = replace(track.camera, T_camera_head=poses, K=track.camera.K.expand(30, 3, 3))
    off = (camera.project(track.motion.landmarks)[0] - truth.landmarks_px).norm(dim=-1)
    assert off[:, LIPS].max() < 0.02  # float32 pixels
    aside = (track.motion.landmarks - truth.motion.landmarks)[10:20].norm(dim=-1).mean(0)
    # less half a per cent of its 15 mm from the axis; and not the 4 mm
    assert aside[LIPS].mean() == pytest.approx(0.01, rel=0.15)
    assert aside[FACE_OVAL].mean() < 0.004  # the slip's prior and the smooth expressions keep some of it
    gap = lambda t: (t.motion.landmarks[:, 13] - t.motion.landmarks[:, 14]).norm(dim=1)
    assert torch.corrcoef(torch.stack([gap(track), gap(truth)]))[0, 1] > 0.999


def test_flow_takes_the_landmark_networks_jitter_out_of_the_pose(model):
    """Every frame's landmarks shift and turn together by about a pixel; exact flow knows better."""
    truth, points = true_track(model, 40)
    rng = np.random.default_rng(3)
    noisy = points.copy()
    for t in range(40):
        about = noisy[t, :, :2] - 256
        angle, scale = rng.normal(0, 0.004), 1 + rng.normal(0, 0.004)
        turned = about @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * scale
        noisy[t, :, :2] = turned + 256 + rng.normal(0, 1.0, 2)
    still = [151, 9, 8, 168, 6, 197, 195, 5, 4, 50, 280, 205, 425, 101, 330, 36, 266, 234, 454, 116, 345]
    rigid_points = points[:, still, :2]
    # the synthetic face speaks, but these points hardly move with it
    flow = Flow(rigid_points[:-1], rigid_points[1:], np.ones((39, len(still)), bool))

    def wobble(track: FaceTrack) -> float:
        camera = Camera(track.camera.K.expand(40, 3, 3), track.motion.T_camera_head, 512, 512)
        origin = camera.project(torch.zeros(40, 1, 3))[0][:, 0]
        expected = Camera(truth.camera.K.expand(40, 3, 3), truth.motion.T_camera_head, 512, 512).project(
            torch.zeros(40, 1, 3)
        )[0][:, 0]
        return float((origin - expected).diff(dim=0).norm(dim=1).mean())

    without = wobble(fit_track(seen(noisy), model, config=replace(FAST, pose_smooth=0.0, landmark_bias=1e-3)))
    with_flow = wobble(fit_track(seen(noisy, flow=flow), model, config=FAST))
    assert without > 1.0 and with_flow < 0.35 * without, (without, with_flow)


def test_test_frames_reach_neither_identity_nor_training_poses(model):
    _, points = true_track(model)
    other = points.copy()
    other[24:, :, :2] += np.random.default_rng(0).normal(0, 5, (6, 478, 2)) + 30
    flow = Flow(points[:-1, :40, :2], points[1:, :40, :2], np.ones((29, 40), bool))
    a, b = (fit_track(seen(p, flow=flow), model, train=range(24), config=FAST) for p in (points, other))
    assert torch.equal(a.identity, b.identity) and torch.equal(a.camera.K, b.camera.K)
    for key in ("expression", "landmarks", "T_camera_head"):
        assert torch.equal(getattr(a.motion, key)[:24], getattr(b.motion, key)[:24]), key
    assert not torch.equal(a.motion.T_camera_head[24:], b.motion.T_camera_head[24:])


def test_frames_without_a_face_are_interpolated_and_marked(model):
    truth, points = true_track(model)
    found = np.ones(30, bool)
    found[[0, 10, 11, 12, 29]] = False
    points[~found] = np.nan
    track = fit_track(seen(points, found), model, config=FAST)
    assert track.confidence.tolist() == found.astype(float).tolist()
    assert torch.isfinite(track.landmarks_px).all() and torch.isfinite(track.motion.landmarks).all()
    assert (track.landmarks_px - truth.landmarks_px).norm(dim=-1)[~found].mean() < 6  # the head moves some 3 px a frame


def test_windows_change_nothing_but_memory(model):
    _, points = true_track(model)
    whole = fit_track(seen(points), model, config=replace(FAST, frame_steps=10))
    cut = fit_track(seen(points), model, config=replace(FAST, frame_steps=10, window=8))
    assert turn_error_deg(whole, cut).max() < 0.05
    assert (whole.motion.expression - cut.motion.expression).abs().max() < 0.05


def test_a_real_jump_of_the_head_survives(model):
    """Dropped frames make clips jump: smoothing must not smear that."""
    _, points = true_track(model)
    points[15:, :, 0] += 8.0
    track = fit_track(seen(points), model, config=FAST)
    camera = Camera(track.camera.K.expand(30, 3, 3), track.motion.T_camera_head, 512, 512)
    modelled = camera.project(model.landmarks(model.vertices(track.identity, track.motion.expression)))[0]
    error = (modelled - track.landmarks_px).norm(dim=-1).mean(1)
    assert error[13:17].max() < 2.0


def test_a_clip_almost_without_a_face_is_refused(model):
    _, points = true_track(model, 6)
    found = np.zeros(6, bool)
    found[2] = True
    with pytest.raises(InputError, match="1 of 5 training frames"):
        fit_track(seen(points, found), model, train=range(5))


def test_optical_flow_follows_a_moving_face_to_a_tenth_of_a_pixel(model):
    _, points = true_track(model, 4)
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.uniform(0, 255, (512, 512)).astype(np.float32), (0, 0), 2.0)
    texture = np.repeat(cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)[..., None], 3, 2)
    step = np.array([3.3, -1.7])
    frames = [
        cv2.warpAffine(
            texture,
            np.array([[1, 0, step[0] * t], [0, 1, step[1] * t]]),
            (512, 512),
            flags=cv2.INTER_CUBIC,
            borderMode=cv2.BORDER_REFLECT,
        )
        .clip(0, 255)
        .astype(np.uint8)
        for t in range(4)
    ]
    points = np.stack([points[0] + [*(step * t), 0] for t in range(4)])
    flow = track_flow((gray_image(frame) for frame in frames), points, np.array([True, True, True, False]))
    assert flow.valid[:2].sum(1).min() > 30 and not flow.valid[2].any()
    error = (flow.end_px - flow.start_px - step)[flow.valid]
    assert np.median(np.linalg.norm(error, axis=1)) < 0.1


@pytest.mark.clip
def test_a_real_clip_is_fitted_to_two_pixels(model, markey):
    from hicode.media.video import read_video
    from hicode.tracking.face_tracker import track_faces
    from hicode.tracking.landmarks import FaceLandmarker

    frames = [frame for frame, _ in zip(read_video(markey), range(40), strict=False)]
    found = track_faces(frames, FaceLandmarker())
    flow = track_flow((gray_image(frame) for frame in frames), found.points_px, found.found)
    track = fit_track(Observations(found.points_px, found.found, 512, 512, flow), model, train=range(32))
    report = fit_report(track, model)
    assert report.error_px < 2.5 and report.lips_px < 2.5 and lip_gap_correlation(track, model) > 0.95
    assert 600 < report.focal_px < 4000 and track.identity.square().mean().sqrt() < 1.5
