"""Learning a Faceformer: the metric, the basis, and what is solved in closed form."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.speech_world import DIM
from hicode.errors import AssetError
from hicode.speech.faceformer import Faceformer, FaceformerConfig
from hicode.speech.lip_closure import lip_gap
from hicode.tracking.head_model import HeadModel
from hicode.training.adaptation import SpeechExample, closure_of
from hicode.training.faceformer import (
    CLOSED_GAP,
    Metric,
    SpeechTask,
    amplitude,
    fit_basis,
    fit_linear,
    mouth_metrics,
    to_coefficients,
)

SHAPE = FaceformerConfig(width=32, components=4, look_ahead=1, look_back=1, dropout=0.0)


@pytest.fixture(scope="module", autouse=True)
def head_model():
    try:
        mouth_metrics()
    except AssetError as error:
        pytest.skip(f"the head model's package cannot be had here: {error}")


def test_the_metric_weighs_the_mouth():
    expression, landmarks = mouth_metrics()
    chin, brow = torch.zeros(478, 3), torch.zeros(478, 3)
    chin[152, 1], brow[70, 1] = 1, 1
    assert landmarks(chin.flatten()).norm() > 5 * landmarks(brow.flatten()).norm()
    names = HeadModel.load().expression_names
    jaw, blink = (expression(torch.eye(64)[names.index(n)]).norm() for n in ("jawOpen", "eyeBlinkLeft"))
    assert jaw > 5 * blink


def test_basis_has_unit_coefficients_and_gives_movements_back():
    torch.manual_seed(0)
    metric = Metric(torch.rand(10) + 0.5)
    moved = torch.randn(400, 3) @ torch.randn(3, 10)
    basis = fit_basis([moved[:100], moved[100:]], 3, metric)
    coefficients = to_coefficients(moved, basis, metric)
    torch.testing.assert_close(coefficients @ basis, moved, atol=1e-3, rtol=1e-3)
    # each half has weight one half in the basis, so the average of their mean squares is one
    power = (coefficients[:100].square().mean(0) + coefficients[100:].square().mean(0)) / 2
    torch.testing.assert_close(power, torch.ones(3), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "root", [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[2.0, 0.5, 0], [0.5, 1.0, 0], [0, 0, 3.0]])]
)
def test_a_metric_undoes_itself(root):
    metric, x = Metric(root), torch.randn(5, 3)
    torch.testing.assert_close(metric.inverse(metric(x)), x)


def test_amplitude_is_a_root_mean_square():
    assert amplitude(torch.full((5, 4), 3.0), Metric(torch.full((4,), 0.5))) == pytest.approx(3.0)


# --- closed forms ---


def test_the_linear_prediction_is_ridge_regression_and_adds_to_what_was():
    """Against numpy's least squares with the ridge as extra rows, on a world of as many features as it keeps."""
    rng = torch.Generator().manual_seed(0)
    model = Faceformer(replace(SHAPE, feature_dim=4, outputs=64, linear_share=0.5, linear_back=1))
    features = torch.randn(1, 120, 4, generator=rng)
    target, voice = torch.randn(60, 4, generator=rng), torch.randn(1, 4, generator=rng)
    # Heard relative to the speaker's voice; how it is answered is relative to the mean voice.
    task = SpeechTask(features + voice[:, None], target, None, 0.5, voice)
    fit_linear(model, [task], ridge=2.0)
    with torch.no_grad():
        frames = torch.nn.functional.pad(model.frame_features(features), (0, 0, 1, 1))
        answered = model.linear_prediction(frames)[0]
        rows = torch.cat([frames[0].unfold(0, 3, 1).flatten(1), torch.ones(60, 1)], 1).double().numpy()
    root = 0.5**0.5
    prior = np.sqrt(2.0 * (0.5 * 60) ** 0.5) * np.eye(rows.shape[1])
    solved = np.linalg.lstsq(
        np.concatenate([root * rows, prior]),
        np.concatenate([root * target.numpy(), np.zeros((len(prior), 4))]),
        rcond=None,
    )[0]
    np.testing.assert_allclose(answered.numpy(), rows @ solved, atol=1e-5)
    before = answered.clone()
    fit_linear(model, [task], ridge=1e9)  # all prior: what was answered stays
    with torch.no_grad():
        torch.testing.assert_close(model.linear_prediction(frames)[0], before, atol=1e-4, rtol=1e-3)


def test_closures_are_learned_from_a_speaker_and_close_both_heads():
    """A speaker whose lips meet where one feature is high: found on sound that was not learned from; in noise that is
    labelled so, closed.
    """
    head = HeadModel.load()
    jaw = head.expression_names.index("jawOpen")

    def closing(name: str, seed: int) -> SpeechExample:
        rng = np.random.default_rng(seed)
        shut = np.convolve(rng.random(300) < 0.04, np.ones(4), "same") > 0
        expression = torch.zeros(300, 64)
        expression[:, jaw] = torch.from_numpy(np.where(shut, 0.0, 0.25 + 0.1 * rng.random(300))).float()
        landmarks = head.landmarks(head.mean) + torch.einsum(
            "te,elc->tlc", expression, head.landmarks(head.expression_basis)
        )
        features = rng.standard_normal((600, DIM))
        features[:, 2] += np.repeat(6.0 * shut, 2)
        return SpeechExample(
            name, torch.from_numpy(features).float()[None], expression, landmarks, torch.ones(300, dtype=torch.bool)
        )

    model = Faceformer(replace(SHAPE, feature_dim=DIM, outputs=64, linear_share=0.5))
    closure = closure_of(model, closing("a", 1))
    assert closure is not None
    unseen = closing("c", 3)
    frames = torch.nn.functional.pad(
        model.frame_features(unseen.features)[0], (0, 0, closure.config.back, closure.config.ahead)
    )
    odds, shut = closure.probability(frames), lip_gap(unseen.landmarks) < CLOSED_GAP
    # Little sound, much prior: odds are drawn to a half, but in order.
    assert odds[shut].mean() - odds[~shut].mean() > 0.4 and odds[shut].quantile(0.1) > odds[~shut].quantile(0.9)
    assert float(closure.expression[jaw]) == pytest.approx(float(closure.expression.abs().sum()), rel=1e-3), (
        "only the jaw moved"
    )
    assert float(lip_gap(closure.landmarks)) == pytest.approx(1, abs=1e-4)
    opened = unseen.expression + 0.3 * torch.nn.functional.one_hot(torch.tensor(jaw), 64)
    points = head.landmarks(head.mean) + torch.einsum("te,elc->tlc", opened, head.landmarks(head.expression_basis))
    closure.config = replace(closure.config, gap_shares=None)
    closed = closure.close(torch.ones(300), opened, points, 0.01, 0.1)
    shaped = head.landmarks(head.mean) + torch.einsum("te,elc->tlc", closed[0], head.landmarks(head.expression_basis))
    # Expression and landmarks close to the same gap: both heads stay one mouth.
    torch.testing.assert_close(lip_gap(shaped), lip_gap(closed[1]), atol=2e-3, rtol=0)
