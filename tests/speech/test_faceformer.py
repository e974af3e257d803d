"""Faceformers: decoding in a stream equals decoding at once, for any length; untrained they are still; files give them
back.
"""

from dataclasses import replace

import pytest
import torch

from hicode.errors import FileFormatError
from hicode.speech.encoders import EncoderSpec, Window
from hicode.speech.faceformer import Faceformer, FaceformerConfig, periodic_positions
from hicode.speech.lip_closure import ClosureConfig, LipClosure, lip_gap
from hicode.speech.speech_model import SpeechModels, Subject

ENCODER = EncoderSpec("test", 12, Window(8, 2, 2))
CONFIG = FaceformerConfig(feature_dim=12, outputs=64, components=8, width=16, window=30, look_ahead=3, look_back=2)


def _model(config: FaceformerConfig = CONFIG, seed: int = 0) -> Faceformer:
    """A model whose output is not zero any more."""
    torch.manual_seed(seed)
    model = Faceformer(config).eval()
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model


def _pair(trained: bool = True) -> SpeechModels:
    landmarks = FaceformerConfig(
        feature_dim=12, outputs=1434, components=8, width=16, window=30, look_ahead=5, look_back=2, style_components=3
    )
    make = _model if trained else lambda c: Faceformer(c).eval()
    models = make(CONFIG), make(landmarks)
    torch.manual_seed(1)
    models[1].style_basis.normal_()
    if trained:
        torch.nn.init.normal_(models[1].style.weight)
    subject = Subject(torch.randn(64), torch.randn(478, 3), torch.randn(20, 478, 3), 1.1, 0.9)
    return SpeechModels(*models, ENCODER, subject)


def test_an_untrained_model_says_the_template():
    pair = _pair(trained=False)
    expression, landmarks = pair.predict(torch.randn(20, 12))
    assert torch.equal(expression, pair.subject.expression.expand(10, 64))
    assert torch.equal(landmarks, pair.subject.landmarks.expand(10, 478, 3))


def test_cached_decoding_equals_uncached():
    """The roll-out, fed back into the parallel form, reproduces itself: over more frames than the window holds."""
    model = _model()
    with torch.no_grad():
        memory = model.memory(torch.randn(2, 160, 12))
        style = model.identity_style(None)
        rolled = model.rollout(memory, style)
        previous = torch.cat([torch.zeros(2, 1, 8), rolled[:, :-1]], 1)
        at_once = model(memory, previous, style)
    # float32 sums in another order
    torch.testing.assert_close(rolled, at_once, atol=1e-5, rtol=1e-4)


def test_attention_is_the_published_one_within_the_window():
    """Against torch's own transformer decoder layer with the same weights, its bias and its alignment mask."""
    model = _model(
        FaceformerConfig(feature_dim=12, outputs=64, components=8, width=16, window=1000, period=5, dropout=0.0)
    )
    layer = torch.nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, activation="relu", batch_first=True).eval()
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(model.self_qkv.weight)
        layer.self_attn.in_proj_bias.copy_(model.self_qkv.bias)
        layer.multihead_attn.in_proj_weight.copy_(torch.cat([model.cross_q.weight, model.cross_kv.weight]))
        layer.multihead_attn.in_proj_bias.copy_(torch.cat([model.cross_q.bias, model.cross_kv.bias]))
        pairs = [
            (layer.self_attn.out_proj, model.self_out),
            (layer.multihead_attn.out_proj, model.cross_out),
            (layer.linear1, model.up),
            (layer.linear2, model.down),
            (layer.norm1, model.norm1),
            (layer.norm2, model.norm2),
            (layer.norm3, model.norm3),
        ]
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        t = 23
        memory, previous = torch.randn(1, 2 * t, 16), torch.randn(1, t, 8)
        i, j = torch.arange(t)[:, None], torch.arange(t)
        bias = torch.stack([-s * ((i - j) // 5) for s in (1 / 4, 1 / 16, 1 / 64, 1 / 256)]).masked_fill(
            j > i, float("-inf")
        )
        alignment = torch.full((t, 2 * t), float("-inf")).masked_fill(torch.arange(2 * t) // 2 == i, 0.0)
        tokens = model.project_previous(previous) + model.start + periodic_positions(5, 16)[torch.arange(t) % 5]
        expected = model.output(layer(tokens, memory, tgt_mask=bias, memory_mask=alignment))
        torch.testing.assert_close(model(memory, previous, model.start), expected, atol=1e-5, rtol=1e-4)


def test_a_stream_in_any_pieces_equals_the_whole():
    pair, features = _pair(), torch.randn(120, 12)
    whole = pair.predict(features)
    stream, parts, at = pair.stream(), [], 0
    for size in (1, 1, 7, 0, 40, 3, 68):
        parts.append(stream.push(features[at : at + size]))
        at += size
    parts.append(stream.finish())
    for k in (0, 1):
        torch.testing.assert_close(torch.cat([p[k] for p in parts]), whole[k], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("features,frames", [(0, 0), (1, 1), (2, 1), (3, 2), (50, 25)])
def test_any_length_of_sound_gives_its_frames(features, frames):
    expression, landmarks = _pair().predict(torch.randn(features, 12))
    assert expression.shape == (frames, 64) and landmarks.shape == (frames, 478, 3)


def test_memory_of_a_stream_does_not_grow():
    pair = _pair()
    stream = pair.stream()
    for _ in range(60):  # 600 frames: where the reference implementation ends
        expression, landmarks = stream.push(torch.randn(20, 12))
        assert expression.isfinite().all() and landmarks.isfinite().all()
    for part in (stream._expression, stream._landmarks):
        assert part._decoder._keys.shape[1] == part._decoder._values.shape[1] == 2 * CONFIG.window
        assert len(part._encoded) <= 2 * (part.config.look_back + part.config.look_ahead + 1)
        assert part._encoded.base is None


def test_a_frame_hears_its_look_ahead_and_no_further():
    model, features = _model(), torch.randn(1, 80, 12, requires_grad=True)
    out = model.rollout(model.memory(features), model.identity_style(None))
    frame = 20
    heard = torch.autograd.grad(out[0, frame].sum(), features)[0][0].abs().sum(1)
    last = 2 * (frame + CONFIG.look_ahead) + 1
    assert heard[last] > 0 and torch.equal(heard[last + 1 :], torch.zeros(80 - last - 1))


def test_the_stream_is_late_by_its_look_ahead():
    pair = _pair()
    assert pair.look_ahead == 5
    assert len(pair.stream().push(torch.randn(50, 12))[0]) == 25 - 5


def test_gain_scales_the_movement_about_the_template():
    pair, features = _pair(), torch.randn(30, 12)
    before = pair.predict(features)[0] - pair.subject.expression
    pair.subject = replace(pair.subject, expression_gain=2 * pair.subject.expression_gain)
    torch.testing.assert_close(pair.predict(features)[0] - pair.subject.expression, 2 * before, atol=1e-5, rtol=1e-4)


def test_identity_frames_in_any_order_are_the_same_style():
    pair = _pair()
    frames = pair.subject.identity_frames
    a, b = (pair.landmarks.identity_style(f) for f in (frames, frames.flip(0)))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(a, pair.landmarks.identity_style(frames + 1))


def test_state_gives_the_same_pair_back():
    pair, features = _pair(), torch.randn(30, 12)
    again = SpeechModels.from_state(*pair.state())
    for a, b in zip(pair.predict(features), again.predict(features)):
        assert torch.equal(a, b)


def test_damaged_state_is_refused():
    tensors, config = _pair().state()
    tensors.pop("expression.output.weight")
    with pytest.raises(FileFormatError, match="speech models are damaged"):
        SpeechModels.from_state(tensors, config)


# --- the linear answer and the closure --------------------------------------------------------------------------------


def _closing_pair() -> SpeechModels:
    """A pair that is half linear, and closes its lips at times."""
    pair, made = _pair(), []
    for k, model in enumerate((pair.expression, pair.landmarks)):
        other = _model(replace(model.config, linear_share=0.5, linear_back=2), seed=3 + k)
        with torch.no_grad():
            other.linear.weight.normal_(std=0.3)
            if k:
                other.style_basis.copy_(model.style_basis)
        made.append(other)
    closure = LipClosure(ClosureConfig(12, back=3, ahead=2, probability=(0.3, 0.8), gap_shares=(0.5, 3.0)))
    closure.weight.normal_(std=0.3)
    closure.landmarks[13, 1], closure.landmarks[14, 1], closure.landmarks[17, 1] = 0.3, -0.7, -0.6
    closure.expression[5] = 0.4
    return SpeechModels(*made, ENCODER, replace(pair.subject, closed_gap=0.01), closure)


def test_with_linear_answer_and_closure_pieces_still_equal_the_whole():
    pair, features = _closing_pair(), torch.randn(161, 12)
    expression, landmarks = pair.predict(features)
    assert len(expression) == 81
    stream, parts = pair.stream(), []
    for piece in (*features.split(7), None):
        parts.append(stream.finish() if piece is None else stream.push(piece))
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), expression, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), landmarks, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 4, 5, 700])
def test_a_stream_says_what_the_models_say(size):
    """Numpy's folded weights against the torch modules, over more than eight windows: 250 frames. What is not a model's
    own, the closure and the subject's gains, is applied by hand. Tolerance: 1e-4 of the motion's spread, since every
    frame's rounding enters the next one.
    """
    pair, features = _closing_pair(), torch.randn(500, 12)
    for model in (pair.expression, pair.landmarks):
        # biases and gains begin as zeros and ones, which would hide what forgets them
        for name, value in model.named_parameters():
            if "bias" in name or "norm" in name:
                torch.nn.init.normal_(value, mean=float(value.detach().mean()), std=0.2)
        model.feature_mean.normal_()
        model.feature_std.uniform_(0.5, 2)
    with torch.no_grad():
        frames = torch.nn.functional.pad(
            pair.expression.frame_features(features[None])[0],
            (0, 0, pair.closure.config.back, pair.closure.config.ahead),
        )
        expression, landmarks = (
            (model.predict(features[None], model.identity_style(faces)) @ model.basis)[0]
            for model, faces in ((pair.expression, None), (pair.landmarks, pair.subject.identity_frames))
        )
        expected = pair.closure.close(
            pair.closure.probability(frames),
            pair.subject.expression + pair.subject.expression_gain * expression,
            pair.subject.landmarks + pair.subject.landmark_gain * landmarks.unflatten(1, (478, 3)),
            pair.subject.closed_gap,
            pair.subject.usual_gap,
        )
        stream = pair.stream()
        parts = [*(stream.push(piece) for piece in features.split(size)), stream.finish()]
    for k, moved in enumerate((expression, landmarks)):
        torch.testing.assert_close(
            torch.cat([p[k] for p in parts]), expected[k], atol=1e-4 * float(moved.std()), rtol=0
        )


def test_a_stream_keeps_the_weights_that_it_began_with():
    pair, features = _closing_pair(), torch.randn(40, 12)
    stream, expected = pair.stream(), pair.predict(features)[0]
    with torch.no_grad():
        for value in (*pair.expression.parameters(), pair.expression.basis):
            value.zero_()
    assert torch.equal(torch.cat([stream.push(features)[0], stream.finish()[0]]), expected)


def test_a_whole_sound_is_the_mean_of_both_answers():
    model = _model(replace(CONFIG, linear_share=0.5, linear_back=2))
    with torch.no_grad():
        model.linear.weight.normal_()
        model.linear.bias.normal_()
        model.feature_mean.normal_()
        features, style = torch.randn(1, 24, 12), model.identity_style(None)
        frames = (features - model.feature_mean).unflatten(1, (12, 2)).mean(2)[0]
        padded = torch.cat([torch.zeros(2, 12), frames, torch.zeros(3, 12)])  # silence is zeros
        by_hand = (
            torch.stack([torch.einsum("wd,kdw->k", padded[i : i + 6], model.linear.weight) for i in range(12)])
            + model.linear.bias
        )
        decoded = model.rollout(model.memory(features), style)[0]
        torch.testing.assert_close(model.predict(features, style)[0], (by_hand + decoded) / 2, atol=1e-5, rtol=1e-4)


def test_a_sure_closure_closes_and_nothing_ever_opens():
    closure = _closing_pair().closure
    closure.config = replace(closure.config, gap_shares=None)
    landmarks = 0.1 * torch.randn(40, 478, 3)
    expression, gap = torch.zeros(40, 64), lip_gap(landmarks)
    moved, shut = closure.close(torch.ones(40), expression, landmarks, 0.01, 0.1)
    torch.testing.assert_close(lip_gap(shut), gap.clamp(max=0.01))
    torch.testing.assert_close(moved[:, 5], 0.4 * (0.01 - gap).clamp(max=0))  # both heads by the same amount
    half = closure.close(
        torch.full((40,), (closure.config.probability[0] + closure.config.probability[1]) / 2),
        expression,
        landmarks,
        0.01,
        0.1,
    )[1]
    torch.testing.assert_close(lip_gap(half), torch.where(gap > 0.01, (gap + 0.01) / 2, gap))
    same = closure.close(torch.full((40,), closure.config.probability[0]), expression, landmarks, 0.01, 0.1)
    assert torch.equal(same[0], expression) and torch.equal(same[1], landmarks)


def test_only_lips_that_are_nearly_closed_are_told_to_close():
    """Half the usual gap and less: closed; three times: as it was; between, in between. Where hardly anything is usual,
    a floor stands in for it.
    """
    closure = _closing_pair().closure
    landmarks = torch.zeros(4, 478, 3)
    landmarks[:, 13, 1] = torch.tensor([0.02, 0.05, 0.175, 0.31])
    moved = closure.close(torch.ones(4), torch.zeros(4, 64), landmarks, 0.01, 0.1)[1]
    torch.testing.assert_close(lip_gap(moved), torch.tensor([0.01, 0.01, 0.0925, 0.31]))
    moved = closure.close(torch.ones(4), torch.zeros(4, 64), landmarks, 0.01, -0.1)[1]
    torch.testing.assert_close(lip_gap(moved)[2:], torch.tensor([0.175, 0.31]))
    assert lip_gap(moved).isfinite().all()


def test_the_gap_is_what_is_seen_from_the_front():
    points = torch.zeros(1, 478, 3)
    points[0, 13], points[0, 14] = torch.tensor([0.02, 0.05, 0.3]), torch.tensor([0.0, 0.02, 0.1])
    assert abs(float(lip_gap(points)) - 0.03) < 1e-7


def test_state_keeps_closure_encoder_and_subject():
    pair = _closing_pair()
    again, features = SpeechModels.from_state(*pair.state()), torch.randn(40, 12)
    for a, b in zip(pair.predict(features), again.predict(features), strict=True):
        assert torch.equal(a, b)
    assert again.encoder == ENCODER and again.subject.closed_gap == 0.01 and again.look_ahead == pair.look_ahead
    assert again.closure.config == pair.closure.config


def test_models_of_another_feature_size_than_the_encoders_are_refused():
    tensors, config = _pair().state()
    config["encoder"]["dim"] = 13
    with pytest.raises(FileFormatError, match="speech models are damaged"):
        SpeechModels.from_state(tensors, config)
