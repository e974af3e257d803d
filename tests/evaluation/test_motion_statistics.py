"""How a face moves: on curves and landmarks whose motion is known."""

import numpy as np
import pytest

from hicode.evaluation.lips import opening
from hicode.evaluation.motion_statistics import (
    BROWS,
    RIGID,
    amplitude_ratio,
    closed_share,
    concordance,
    head_motion,
    in_one_pose,
    loudness_distance,
    motion_statistics,
    pair_dynamics,
    score,
    silent_stability,
    speed,
    width,
)
from hicode.motion import LEFT_EYE_OUTER, LIPS, LOWER_LIP_INNER, MOUTH_CORNERS_INNER, RIGHT_EYE_OUTER, UPPER_LIP_INNER

T, EYES = 100, 80.0
TIME = np.arange(T) / 25


def face(gap=0.1, wide=0.5, t=T) -> np.ndarray:
    """Landmarks px of a head that is held, eyes 80 px apart: opening and width (over the eyes) as given."""
    points = np.repeat(np.random.default_rng(0).uniform(100, 300, (1, 478, 3)), t, 0)
    points[:, RIGHT_EYE_OUTER, :2], points[:, LEFT_EYE_OUTER, :2] = (160, 180), (160 + EYES, 180)
    points[:, UPPER_LIP_INNER, :2] = (200, 260)
    points[:, LOWER_LIP_INNER, 0], points[:, LOWER_LIP_INNER, 1] = 200, 260 + EYES * np.broadcast_to(gap, t)
    right, left = MOUTH_CORNERS_INNER
    points[:, right, :2], points[:, left, 1] = (180, 265), 265
    points[:, left, 0] = 180 + EYES * np.broadcast_to(wide, t)
    return points


WAVE = 0.1 + 0.05 * np.sin(2 * np.pi * 3 * TIME)


def turned(points: np.ndarray, degrees: np.ndarray, shift=(0, 0), scale=1.0) -> np.ndarray:
    """Turned in the image about the origin, scaled and shifted, frame by frame."""
    a = np.radians(np.broadcast_to(degrees, len(points)))
    c, s = np.cos(a)[:, None], np.sin(a)[:, None]
    x, y = points[..., 0], points[..., 1]
    k = np.broadcast_to(scale, len(points))[:, None]
    return np.stack([k * (c * x - s * y) + shift[0], k * (s * x + c * y) + shift[1], k * points[..., 2]], -1)


def test_opening_and_width_are_over_the_eyes():
    points = face(WAVE, 0.4)
    np.testing.assert_allclose(opening(points), WAVE, atol=1e-6)
    np.testing.assert_allclose(width(points), 0.4, atol=1e-6)


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
def test_the_amplitude_ratio_is_the_gain_of_the_curve(gain):
    assert amplitude_ratio(gain * WAVE, WAVE) == pytest.approx(gain)
    assert amplitude_ratio(gain * WAVE + 3, WAVE) == pytest.approx(gain)


def test_concordance_is_lins():
    assert concordance(WAVE, WAVE) == pytest.approx(1)
    assert concordance(0.2 - WAVE, WAVE) == pytest.approx(-1)
    assert concordance(np.full(T, 0.1), WAVE) == pytest.approx(0, abs=1e-9)
    # By hand: half of the amplitude 2 r s t / (s² + t²) = .8, and a mean that is one deviation off 2 / 3.
    half = WAVE.mean() + 0.5 * (WAVE - WAVE.mean())
    assert concordance(half, WAVE) == pytest.approx(0.8)
    assert concordance(WAVE + WAVE.std(), WAVE) == pytest.approx(2 / 3)


def test_what_only_one_has_is_left_out_and_too_little_is_none():
    gaps = WAVE.copy()
    gaps[:20] = np.nan
    assert concordance(gaps, WAVE) == pytest.approx(1) and amplitude_ratio(gaps, WAVE) == pytest.approx(1)
    gaps[5:] = np.nan
    assert concordance(gaps, WAVE) is None and amplitude_ratio(gaps, WAVE) is None
    assert closed_share(np.full(3, np.nan)) is None and amplitude_ratio(WAVE, np.full(T, 0.1)) is None


def test_closed_share_counts_openings_below_two_percent():
    assert closed_share(np.array([0.0, 0.019, 0.021, 0.3, np.nan])) == 0.5


def test_one_pose_takes_shift_turn_and_scale_out():
    rng = np.random.default_rng(1)
    still = face(WAVE)
    moved = turned(still, 20 * rng.standard_normal(T), (30, -12), 1 + 0.2 * rng.random(T))
    np.testing.assert_allclose(in_one_pose(moved), in_one_pose(still), atol=1e-6)
    still[7] = np.nan
    assert np.isnan(in_one_pose(still)[7]).all() and np.isfinite(in_one_pose(still)[8]).all()


def test_pair_dynamics_is_the_mean_deviation_of_distances():
    """Two points that part by a wave of 8 px, a tenth of the eyes: the deviation is that of the wave."""
    points = face()
    a, b = BROWS[:2]
    points[:, a, :2] = (200, 120)
    points[:, b, 0], points[:, b, 1] = 230 + 8 * np.sin(2 * np.pi * TIME), 120
    assert pair_dynamics(points, BROWS[:2]) == pytest.approx(10 * np.std(np.sin(2 * np.pi * TIME)), rel=1e-6)
    assert pair_dynamics(face(), LIPS) == pytest.approx(0, abs=1e-9)
    assert pair_dynamics(face()[:5], LIPS) is None


def test_speed_is_how_far_points_travel_in_a_frame_and_a_moving_head_has_none():
    points = face()
    points[:, LIPS, 1] += 4 * (np.arange(T) % 2)[:, None]  # 4 px of 80 in each step
    assert speed(points, LIPS) == pytest.approx(5)
    assert speed(turned(face(), np.linspace(0, 30, T), (3, 4)), LIPS) == pytest.approx(0, abs=1e-6)


def test_head_motion_sees_the_head_and_not_the_mouth():
    assert head_motion(face(WAVE)) == pytest.approx(0, abs=1e-6)
    # Roll alone: deviation times variance of the difference, the centre held in place.
    roll = 5 * np.sin(2 * np.pi * TIME)
    centred = face() - face()[:, RIGID].mean(1, keepdims=True)
    expected = np.sqrt(roll.std() * np.diff(roll).var())
    assert head_motion(turned(centred, roll)) == pytest.approx(expected, rel=1e-6)
    # Translation alone: 8 px of 80 is 10 %.
    shift = 8 * np.sin(2 * np.pi * TIME)
    moved = face()
    moved[..., 0] += shift[:, None]
    assert head_motion(moved) == pytest.approx(10 * np.std(shift / 8), rel=1e-6)
    # A turn at a constant rate has no variance of the difference.
    assert head_motion(turned(centred, np.linspace(0, 10, T))) == pytest.approx(0, abs=1e-3)
    assert head_motion(np.full((20, 478, 3), np.nan)) is None


def test_stability_counts_silences_of_a_third_of_a_second():
    gap = np.where(np.arange(T) % 2, 0.05, 0.03)
    silent = np.zeros(T, bool)
    silent[10:17] = True  # seven frames: .28 s
    assert silent_stability(gap, silent) is None
    silent[40:60] = True
    assert silent_stability(gap, silent) == pytest.approx(1.0)  # half of 2 %
    assert silent_stability(np.full(T, 0.04), silent) == pytest.approx(0)


def test_loudness_distance_is_of_scaled_curves():
    rms = 3 * WAVE + 7
    assert loudness_distance(WAVE, rms) == pytest.approx(0, abs=1e-9)
    assert loudness_distance(WAVE.max() - WAVE, rms) > 0.5
    assert loudness_distance(np.full(T, 0.1), rms) is None


def test_a_score_is_one_at_the_truths_value():
    assert score(2.0, 2.0) == 1 and score(1.0, 2.0) == 0.5 and score(3.0, 2.0) == 0.5 and score(5.0, 2.0) == -0.5
    assert score(None, 2.0) is None and score(2.0, 0.0) is None


def test_a_mumbling_video_shows_in_every_measure():
    """Half of the opening's amplitude, never closed, the head held where the truth's nods."""
    wave = 0.05 + 0.05 * np.sin(2 * np.pi * 3 * TIME)
    truth = face(wave, 0.5 + 0.02 * np.sin(2 * np.pi * TIME))
    truth[..., 1] += 6 * np.sin(2 * np.pi * TIME)[:, None]
    mumbling = face(0.07 + 0.025 * np.sin(2 * np.pi * 3 * TIME), 0.5)
    silent = np.arange(T) >= 80
    found = motion_statistics(mumbling, truth, wave, silent)
    assert found.opening_amplitude == pytest.approx(0.5) and 0.3 < found.opening_ccc < 0.8
    assert found.width_amplitude == pytest.approx(0, abs=1e-9)
    assert found.closed_share == 0 and found.closed_share_ratio == 0
    assert found.lip_loudness == pytest.approx(0, abs=1e-6)
    assert 0 < found.scores["lip_dynamics"] < 0.7 and found.scores["head_motion"] < 0.1
    assert found.scores["silent_lip_stability"] == pytest.approx(0.5, abs=0.02)
    same = motion_statistics(truth, truth, np.roll(wave, 2), silent)
    assert same.opening_ccc == pytest.approx(1) and same.closed_share_ratio == 1
    assert all(value == pytest.approx(1) for name, value in same.scores.items() if name != "brow_dynamics")
    assert same.scores["brow_dynamics"] is None  # brows that do not move have no share to score


def test_without_sound_what_needs_it_is_none():
    found = motion_statistics(face(WAVE), face(WAVE))
    assert found.lip_loudness is None and found.silent_lip_stability is None
    assert found.scores["lip_loudness"] is None and found.lip_dynamics is not None
