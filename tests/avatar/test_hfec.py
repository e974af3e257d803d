"""Eqs 9-12 against loops, invariants and finite differences; what the control sees of a frame."""

from dataclasses import replace

import pytest
import torch

from helpers.deformations import SMALL, G, a_deformation, a_frame, a_head, a_motion
from hicode.avatar.config import DeformationConfig
from hicode.avatar.hfec import (
    HFEC,
    AnchorCache,
    StaticAttention,
    adain,
    landmark_attention,
    mean_and_deviation,
    nearness,
    normalize_over_points,
    sinusoidal,
)
from hicode.avatar.signals import Normalization, Signals
from hicode.errors import InputError


def test_attention_matches_a_loop_over_points():
    q = torch.randn(5, 4, generator=G(), dtype=torch.float64)
    k, v = torch.randn(2, 7, 4, generator=G(1), dtype=torch.float64)
    mean, std = landmark_attention(q, k, v)
    for i in range(5):
        score = torch.tensor([float(q[i] @ k[j]) / 2 for j in range(7)], dtype=torch.float64)  # 2 = √c
        a = score.exp() / score.exp().sum()
        m = sum(a[j] * v[j] for j in range(7))
        var = sum(a[j] * (v[j] - m) ** 2 for j in range(7))
        assert torch.allclose(mean[i], m) and torch.allclose(std[i], (var + 1e-5).sqrt())


def test_attention_deviation_survives_sharp_attention():
    """One landmark takes all: the variance is 0 up to rounding, its root and gradient must stay finite."""
    q = torch.full((3, 4), 50.0, requires_grad=True)
    mean, std = landmark_attention(q, torch.eye(4)[:2] * 50, torch.randn(2, 4, generator=G()) * 100)
    (mean.sum() + std.sum()).backward()
    assert torch.isfinite(std).all() and q.grad is not None and torch.isfinite(q.grad).all()


def test_a_constant_channel_normalises_to_zero_with_finite_gradients():
    x = (torch.randn(50, 3, generator=G()) * torch.tensor([1.0, 0.0, 1.0]) + 2).requires_grad_()
    y = normalize_over_points(x)
    y.square().sum().backward()
    assert not y[:, 1].any() and x.grad is not None and torch.isfinite(x.grad).all()
    std, mean = torch.std_mean(x, dim=0, correction=0)
    torch.testing.assert_close(y, (x - mean) / (std + 1e-5))


def test_adain_gives_the_asked_statistics():
    x = torch.randn(500, 6, generator=G(), dtype=torch.float64) * 3 + 1
    mean = torch.randn(6, generator=G(1), dtype=torch.float64)
    std = torch.rand(6, generator=G(2), dtype=torch.float64) + 0.5
    y = adain(x, mean, std)
    # 1e-4: the guard against division by zero shrinks the deviation by 1e-5 relative to σ(x) ≥ 1
    assert torch.allclose(y.mean(0), mean, atol=1e-9) and torch.allclose(y.std(0, correction=0), std, atol=1e-4)


def test_the_control_does_not_depend_on_the_order_of_points():
    deformation, points = a_deformation(rig=False), a_head()
    order = torch.randperm(len(points), generator=G(9))
    for a, b in zip(deformation(points, a_frame()), deformation(points[order], a_frame()), strict=True):
        assert torch.allclose(a[order], b, atol=1e-5)  # float32 sums in another order


def test_control_gradients_match_finite_differences():
    control = HFEC(DeformationConfig(**SMALL)).double()
    torch.nn.init.normal_(control.offsets[-1].weight, std=0.3, generator=G(2))
    points = a_head(6).double()
    weights = torch.softmax(nearness(points, a_head(478, 1).double(), 0.3), -1)
    cache = AnchorCache(points, StaticAttention((weights,)))
    vector = torch.randn(144, generator=G(3), dtype=torch.float64).requires_grad_()
    landmarks = torch.randn(478, 3, generator=G(4), dtype=torch.float64).requires_grad_()
    f = lambda v, l: control(cache, Signals(v, v, l, l))
    assert torch.autograd.gradcheck(f, (vector, landmarks), fast_mode=True, atol=1e-4)


def test_sinusoidal_has_the_stated_width():
    assert sinusoidal(torch.zeros(4, 3), 10).shape == (4, 63)


def test_landmarks_count_by_their_nearness():
    """Whatever queries and keys say, a landmark several reaches farther than the nearest has no weight; a point far
    from all attends to its nearest."""
    landmarks = torch.rand(478, 3, generator=G(1))
    points = torch.cat([torch.rand(20, 3, generator=G(2)), torch.full((1, 3), 9.0)])
    near = nearness(points, landmarks, 0.1)
    distance = torch.cdist(points, landmarks)
    expected = (distance.amin(1, keepdim=True) ** 2 - distance**2) / 0.02
    torch.testing.assert_close(near, expected.clamp_min(-40), atol=2e-3, rtol=1e-3)
    assert float(near.min()) == -40 and float(near.softmax(1).min()) > torch.finfo(torch.float32).tiny
    q, k = torch.randn(21, 8, generator=G(3)), torch.randn(478, 8, generator=G(4))
    for i in (0, 20):
        v = torch.zeros(478, 8)
        v[distance[i].argsort()[60:], 0] = 1.0
        assert float(landmark_attention(q, k, v, near)[0][i, 0]) < 0.2 < float(landmark_attention(q, k, v)[0][i, 0])


def test_static_attention_is_learned_attention_with_scores_of_zero():
    """Each reach for its share of the channels."""
    points, landmarks, q = a_head(40), a_head(478, 1), torch.randn(40, 8, generator=G(3))
    v = torch.randn(478, 8, generator=G(5))
    scores = [nearness(points, landmarks, reach) for reach in (0.1, 0.4)]
    mean, std = mean_and_deviation(*StaticAttention(tuple(torch.softmax(s, -1) for s in scores)).moments(v))
    for score, share in zip(scores, (slice(0, 4), slice(4, 8)), strict=True):
        for got, expected in zip((mean, std), landmark_attention(q, torch.zeros_like(v), v, score), strict=True):
            torch.testing.assert_close(got[:, share], expected[:, share], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_reaches": ()},
        {"attention_reaches": (0.1, 0.2, 0.3)},
        {"attention": "learned", "attention_reaches": (0.1, 0.2)},
    ],
)
def test_reaches_must_suit_attention(options):
    with pytest.raises(InputError, match="attention_reaches"):
        HFEC(DeformationConfig(**SMALL | options))


# --- the signals


def a_normalization(reach: float) -> Normalization:
    return Normalization(torch.zeros(80), torch.zeros(3), 1.0, reach, 0)


def test_a_clamped_expression_stays_within_the_training_range():
    """Training frames lie in 3 directions: small motions pass, large ones saturate, other directions are dropped."""
    directions = torch.linalg.qr(torch.randn(64, 3, generator=G(1)))[0].T
    motion = a_motion(400)
    parts = torch.randn(400, 3, generator=G(2)) * torch.tensor([2.0, 1.0, 0.5])
    normalization = a_normalization(1.5)
    normalization.fit(replace(motion, expression=10 * parts @ directions))
    n = normalization
    assert float(n.component_std[:-3].max()) < 1e-3 < float(n.component_std[-3:].min())
    raw = lambda x: n.expression_mean + n.expression_std * x
    for i in (-1, -2, -3):
        axis, std = n.expression_components[i], n.component_std[i]
        torch.testing.assert_close(n.clamp_expression(raw(0.05 * std * axis)), 0.05 * std * axis, rtol=2e-3, atol=1e-4)
        for far in (3.0, 30.0):
            assert 1.4 * std < float(n.clamp_expression(raw(far * std * axis)) @ axis) <= 1.5 * std * (1 + 1e-5)
    assert float(n.clamp_expression(raw(5 * n.expression_components[0])).norm()) < 1e-2
    free = a_normalization(0.0)
    free.fit(motion)
    torch.testing.assert_close(
        free.clamp_expression(free.expression_mean + 9 * free.expression_std), torch.full((64,), 9.0)
    )


def test_signals_are_normalised_over_the_training_frames():
    motion, normalization = a_motion(50), a_normalization(0.0)
    normalization.fit(motion)
    signals = [normalization(motion[t]) for t in range(50)]
    displacement = torch.stack([s.displacement for s in signals])
    assert displacement.mean(0).abs().max() < 1e-5 and float(displacement.std(correction=0)) == pytest.approx(
        1, rel=1e-3
    )
    assert torch.stack([s.vector[:64] for s in signals]).mean(0).abs().max() < 1e-5
