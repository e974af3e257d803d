"""Deformation: Eqs 7-12 and the carrier."""

from dataclasses import replace

import pytest
import torch

from helpers.deformations import SMALL, G, a_deformation, a_head, signals
from hicode.avatar.deformation import (
    Anchors,
    Carrier,
    CrossAttention,
    Deformation,
    DeformationConfig,
    HierarchicalControl,
    Mix,
    _MixRows,
    adain,
    bind,
    choose_anchors,
    landmark_attention,
    normalize_over_points,
    sinusoidal,
)
from hicode.errors import InputError
from hicode.training.stages import ABLATIONS, head_preset

HEARD = torch.randn(12, generator=G(20))


@pytest.mark.parametrize("coarse", ["adain", "literal", "addition", "attention", "concat", "audio", "none"])
@pytest.mark.parametrize("fine", ["adain", "addition", "attention", "concat", "none"])
def test_untrained_deformation_is_the_identity(fine, coarse):
    deformation = a_deformation(trained=False, base="none", fine=fine, coarse=coarse, speech_dim=12)
    for delta in deformation(a_head(), *signals(), HEARD):
        assert torch.count_nonzero(delta) == 0


def test_attention_matches_a_loop_over_points():
    q, k, v = (
        torch.randn(5, 4, generator=G(), dtype=torch.float64),
        *torch.randn(2, 7, 4, generator=G(1), dtype=torch.float64),
    )
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
    k = torch.eye(4)[:2] * 50
    mean, std = landmark_attention(q, k, torch.randn(2, 4, generator=G()) * 100)
    (mean.sum() + std.sum()).backward()
    assert torch.isfinite(std).all() and torch.isfinite(q.grad).all()


def test_a_constant_channel_normalises_to_zero_with_finite_gradients():
    x = torch.randn(50, 3, generator=G()) * torch.tensor([1.0, 0.0, 1.0]) + 2
    x.requires_grad_()
    y = normalize_over_points(x)
    y.square().sum().backward()
    assert not y[:, 1].any() and torch.isfinite(x.grad).all()
    std, mean = torch.std_mean(x, dim=0, correction=0)
    torch.testing.assert_close(y, (x - mean) / (std + 1e-5))


def test_adain_gives_the_asked_statistics():
    x = torch.randn(500, 6, generator=G(), dtype=torch.float64) * 3 + 1
    mean, std = (
        torch.randn(6, generator=G(1), dtype=torch.float64),
        torch.rand(6, generator=G(2), dtype=torch.float64) + 0.5,
    )
    y = adain(x, mean, std)
    # 1e-4: the guard against division by zero shrinks the deviation by 1e-5 relative to σ(x) ≥ 1
    assert torch.allclose(y.mean(0), mean, atol=1e-9) and torch.allclose(y.std(0, correction=0), std, atol=1e-4)


def test_deformation_does_not_depend_on_the_order_of_points():
    deformation, points = a_deformation(base="none"), a_head()
    order = torch.randperm(len(points), generator=G(9))
    for a, b in zip(deformation(points, *signals()), deformation(points[order], *signals())):
        assert torch.allclose(a[order], b, atol=1e-5)  # float32 sums in another order


def test_literal_style_is_blind_to_which_expression_it_is():
    """Why Eq. 12 as printed is not the default: any permutation of the 3DMM vector gives the same motion."""
    points, (expression, landmarks) = a_head(), signals()
    shuffled = expression[torch.randperm(64, generator=G(7))]
    same = lambda d: torch.allclose(d(points, expression, landmarks)[0], d(points, shuffled, landmarks)[0], atol=1e-6)
    assert same(a_deformation(base="none", coarse="literal"))
    assert not same(a_deformation(base="none", coarse="adain"))


@pytest.mark.parametrize("missing", ["fine", "coarse"])
def test_ablated_control_does_not_see_its_signal(missing):
    deformation, points, (expression, landmarks) = a_deformation(base="none", **{missing: "none"}), a_head(), signals()
    other = signals(11)
    changed = (expression, other[1]) if missing == "fine" else (other[0], landmarks)
    assert torch.equal(deformation(points, expression, landmarks)[0], deformation(points, *changed)[0])


# What each row of Table 2 may know of a frame: (3DMM vector, landmarks, speech features).
KNOWS = {
    "without-3dmm": (False, True, False), "without-landmarks": (True, False, False), "none": (False, False, True),
    "addition": (True, True, False), "attention": (True, True, False), "random-init": (True, True, False),
    "without-hfec": (True, True, False), "full": (True, True, False), "literal": (True, True, False), "mesh": (True, True, False),
}  # fmt: skip


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_knows_what_its_row_says_and_nothing_else(name):
    """Through the whole deformation, carrier included: a row "without" a signal must not move a hair when that signal changes."""
    config = ABLATIONS[name].apply(head_preset("draft")).deformation
    options = {k: getattr(config, k) for k in ("base", "fine", "coarse")}
    deformation, points, (expression, landmarks) = a_deformation(speech_dim=12, **options), a_head(), signals()
    if config.base == "mesh":
        deformation.binding = bind(
            points, torch.randn(12, 3, generator=G(4)), torch.randint(0, 12, (9, 3), generator=G(5)), landmarks
        )
    here = torch.cat(deformation(points, expression, landmarks, HEARD), 1)
    others = [
        (expression + 1, landmarks, HEARD),
        (expression, landmarks + 0.1, HEARD),
        (expression, landmarks, HEARD.flip(0)),
    ]
    changes = tuple(not torch.equal(here, torch.cat(deformation(points, *other), 1)) for other in others)
    assert changes == KNOWS[name]


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_the_control_and_not_the_budget(name):
    base = replace(head_preset("standard"), seed=3)
    config = ABLATIONS[name].apply(base)
    same = replace(config, deformation=base.deformation, initialisation=base.initialisation, rates=base.rates)
    assert same == base
    assert config.rates == (base.rates if name == "mesh" else replace(base.rates, turn_colors=0.0))
    ours = {k: getattr(base.deformation, k) for k in ("shade", "attention", "attention_reaches", "expression_reach")}
    assert replace(config.deformation, fine="adain", coarse="adain", base="mesh", **ours) == base.deformation
    assert {k: getattr(config.deformation, k) for k in ours} == (
        ours if name == "mesh" else dict.fromkeys(ours, 0) | {"attention": "learned", "attention_reaches": ()}
    )


def test_cross_attention_is_a_residual_block():
    """With its output layer at zero nothing is attended to: what remains is the normalised input."""
    block = CrossAttention(8)
    torch.nn.init.zeros_(block.out.weight), torch.nn.init.zeros_(block.out.bias)
    x = torch.randn(5, 8, generator=G())
    y = block(x, *torch.randn(2, 7, 8, generator=G(1)))
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))


def test_an_avatar_moved_by_speech_features_says_so_where_there_are_none():
    deformation = a_deformation(base="none", fine="none", coarse="audio", speech_dim=12)
    with pytest.raises(InputError, match="speech features"):
        deformation(a_head(), *signals())


def test_control_gradients_match_finite_differences():
    control = HierarchicalControl(DeformationConfig(**SMALL), torch.zeros(3), 1.0).double()
    torch.nn.init.normal_(control.head[-1].weight, std=0.3, generator=G(2))
    points = a_head(6).double()
    expression, landmarks = (x.double() for x in signals())
    f = lambda e, l: control(points, l, e, torch.zeros(80, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        f, (expression.requires_grad_(), landmarks[:, :].requires_grad_()), fast_mode=True, atol=1e-4
    )


def test_sinusoidal_has_the_stated_width():
    assert sinusoidal(torch.zeros(4, 3), 10).shape == (4, 63)


# --- anchors


def test_anchors_reproduce_a_smooth_field():
    points = a_head(4000)
    anchors = choose_anchors(points, torch.ones(4000), 600)
    field = lambda p: torch.stack([(3 * p[:, 0]).sin(), p[:, 1] * p[:, 2]], 1)
    interpolated = (field(anchors.points)[anchors.index] * anchors.weight[..., None]).sum(1)
    assert (interpolated - field(points)).abs().mean() < 0.03  # field's range is 2, anchor spacing about 0.14


def test_anchors_are_denser_where_asked():
    points = a_head(4000)
    importance = torch.where(points[:, 2] > 0, 3.0, 1.0)
    chosen = choose_anchors(points, importance, 500).points
    ratio = float((chosen[:, 2] > 0).sum() / (chosen[:, 2] <= 0).sum())
    assert 5 < ratio < 12  # spacing a third, so about nine times as many on a surface


@pytest.mark.parametrize("rows", [40, 55])  # all of them named, and some that no point is made of
def test_interpolation_gradient_is_the_adjoint(rows):
    index, weight = torch.randint(40, (200, 4), generator=G()), torch.rand(200, 4, generator=G(2))
    table = torch.randn(rows, 10, generator=G(), requires_grad=True)
    weights = torch.randn(200, 10, generator=G(1))
    (_MixRows.apply(table, Mix(index, weight)) * weights).sum().backward()
    reference = table.detach().clone().requires_grad_(True)
    ((reference[index] * weight[..., None]).sum(1) * weights).sum().backward()
    assert torch.allclose(table.grad, reference.grad, atol=1e-5)


def test_as_many_anchors_as_points_is_the_plain_evaluation():
    points = a_head(200)
    plain, anchored = a_deformation(base="none"), a_deformation(base="none", anchors=64)
    anchored.place_anchors(points[:50])
    assert anchored.anchors is None  # fewer points than anchors: nothing to interpolate
    anchored.place_anchors(points)
    assert isinstance(anchored.anchors, Anchors)
    assert plain(points, *signals())[0].shape == anchored(points, *signals())[0].shape == (200, 3)


# --- carrier


def a_bound_triangle():
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    triangles = torch.tensor([[0, 1, 2]])
    landmarks = torch.rand(478, 3, generator=G()) + 5  # far away: they do not pull
    return vertices, triangles, landmarks


def test_points_on_the_surface_ride_with_it():
    vertices, triangles, landmarks = a_bound_triangle()
    basis = torch.zeros(64, 3, 3)
    basis[2] = torch.tensor([[0.0, 0, 0.1], [0, 0, 0.2], [0, 0, 0.3]])
    carrier = Carrier(basis, landmarks, torch.zeros(64, 478, 3))
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 3.0]])
    binding = bind(points, vertices, triangles, landmarks)
    expression = torch.zeros(64)
    expression[2] = 2.0
    moved = carrier(binding, expression, landmarks)
    assert torch.allclose(moved[:, 2], torch.tensor([0.2, 0.4, 0.5, 0.0]), atol=1e-4)


def test_carrier_follows_landmarks_beyond_the_model_and_forgets_their_mean():
    landmarks = torch.rand(478, 3, generator=G())
    carrier = Carrier(torch.zeros(64, 3, 3), landmarks - 0.01, torch.zeros(64, 478, 3))
    carrier.set_statistics(torch.zeros(4, 64), landmarks.expand(4, 478, 3))
    vertices = torch.tensor([[9.0, 9, 9], [10, 9, 9], [9, 10, 9]])
    binding = bind(landmarks[:20], vertices, torch.tensor([[0, 1, 2]]), landmarks)
    assert carrier(binding, torch.zeros(64), landmarks).abs().max() < 1e-6  # a constant residual is shape, not motion
    moved = carrier(binding, torch.zeros(64), landmarks + torch.tensor([0.0, 0.03, 0]))
    assert torch.allclose(moved, torch.tensor([0.0, 0.03, 0]).expand(20, 3), atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ABLATIONS if n != "mesh"])
def test_ablated_state_round_trips_bit_for_bit(name):
    config = ABLATIONS[name].apply(head_preset("draft")).deformation
    deformation = a_deformation(base="none", fine=config.fine, coarse=config.coarse, speech_dim=12)
    deformation.set_statistics(
        *torch.randn(2, 5, 64, generator=G())[:1],
        torch.randn(5, 478, 3, generator=G(1)),
        torch.randn(5, 12, generator=G(2)),
    )
    again = Deformation.from_state(*deformation.state())
    for a, b in zip(deformation(a_head(), *signals(), HEARD), again(a_head(), *signals(), HEARD)):
        assert torch.equal(a, b)


def test_state_round_trips_bit_for_bit():
    deformation = a_deformation(base="mesh", anchors=64)
    points = a_head()
    deformation.register_buffer("landmark_motion", torch.rand(478))
    triangles = torch.randint(0, 12, (9, 3), generator=G(5))
    deformation.binding = bind(points, torch.randn(12, 3, generator=G(4)), triangles, 9 + signals()[1])
    deformation.place_anchors(points)
    again = Deformation.from_state(*deformation.state())
    for a, b in zip(deformation(points, *signals()), again(points, *signals()), strict=True):
        assert torch.equal(a, b)


def test_colours_shift_with_the_motion_and_only_with_shade():
    shifts = [a_deformation(base="none", shade=shade)(a_head(), *signals())[3] for shade in (True, False)]
    assert shifts[0].abs().max() > 0.01 and torch.count_nonzero(shifts[1]) == 0


def a_listener(deviations, **options):
    """A control whose training clip moved along the first expressions of a random rotation by these deviations."""
    control = a_deformation(base="none", **options).control
    turned = torch.linalg.qr(torch.randn(64, 64, generator=G(7))).Q
    part = torch.randn(4000, len(deviations), generator=G(8)) * torch.tensor(deviations)
    control.set_statistics(
        part @ turned[: len(deviations)] * (control.expression_std + 0.02), torch.randn(4000, 478, 3, generator=G(9))
    )
    return control


def test_an_expression_is_heard_no_farther_than_the_training_clip_went():
    control = a_listener([2.0, 1.0, 0.5], expression_reach=1.5)
    std, directions = control.component_std[-3:], control.expression_components[-3:]
    assert float(control.component_std[:-3].max()) < 1e-3
    say = lambda part: (
        control.heard(control.expression_mean + control.expression_std * (part @ directions)) @ directions.T
    )
    torch.testing.assert_close(say(0.05 * std), 0.05 * std, rtol=2e-3, atol=1e-6)  # small motions are heard as they are
    for far in (3.0, 30.0):
        assert (say(far * std) <= 1.5 * std * (1 + 1e-5)).all() and (say(far * std) > 1.4 * std).all()
    unknown = control.expression_components[0] * 5
    assert float(control.heard(control.expression_mean + control.expression_std * unknown).norm()) < 1e-2, (
        "no training frame moved so"
    )


def test_landmarks_count_by_their_nearness():
    """Whatever queries and keys say, a landmark several reaches farther off than the nearest is not heard; a point far from all hears its nearest."""
    control = a_deformation(base="none", attention="learned", attention_reaches=(0.1,)).control
    control.landmark_mean.copy_(torch.rand(478, 3, generator=G(1)))
    points = torch.cat([torch.rand(20, 3, generator=G(2)), torch.full((1, 3), 9.0)])
    near = control.standing(points).attention
    distance = torch.cdist(points, control.landmark_mean)
    torch.testing.assert_close(near, (distance.amin(1, keepdim=True) ** 2 - distance**2) / 0.02, atol=2e-3, rtol=1e-3)
    q, k = torch.randn(21, 8, generator=G(3)), torch.randn(478, 8, generator=G(4))
    for i in (0, 20):
        v = torch.zeros(478, 8)
        v[distance[i].argsort()[60:], 0] = 1.0
        assert float(landmark_attention(q, k, v, near)[0][i, 0]) < 0.2 < float(landmark_attention(q, k, v)[0][i, 0])
    assert (
        a_deformation(base="none", attention="learned", attention_reaches=()).control.standing(points).attention is None
    )


def test_attention_by_nearness_is_learned_attention_whose_scores_are_nothing():
    """Each reach for its share of the channels."""
    still = a_deformation(base="none", attention_reaches=(0.1, 0.4)).control
    q, points, landmarks = torch.randn(40, 8, generator=G(3)), a_head(40), signals()[1]
    _, v = still.keys_values(landmarks)
    mean, std = still.attended(q, landmarks, still.standing(points).attention)
    for reach, share in ((0.1, slice(0, 4)), (0.4, slice(4, 8))):
        scores = (
            a_deformation(base="none", attention="learned", attention_reaches=(reach,))
            .control.standing(points)
            .attention
        )
        for got, expected in zip((mean, std), landmark_attention(q, torch.zeros_like(v), v, scores), strict=True):
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
        a_deformation(base="none", **options)


def test_nearness_is_kept_while_anchors_stand_and_made_anew_when_they_move():
    deformation = a_deformation(base="none", anchors=40)
    points = a_head()
    deformation.place_anchors(points)
    direct = lambda: deformation.control(deformation.anchors.points, *reversed(signals()), deformation.identity)
    assert torch.allclose(
        _MixRows.apply(direct(), deformation.anchors.mix)[:, :3] * deformation.config.max_offset,
        deformation(points, *signals())[0],
        atol=1e-6,
    )
    deformation.place_anchors(points * 0.5)
    assert torch.allclose(
        _MixRows.apply(direct(), deformation.anchors.mix)[:, :3] * deformation.config.max_offset,
        deformation(points * 0.5, *signals())[0],
        atol=1e-6,
    )
