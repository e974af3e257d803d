"""Learning speech → motion: on a made-up world where sound does determine the mouth, on clips that give nothing to learn, and the shipped pair."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hicode.errors import AssetError, TrainingError
from hicode.motion import Motion
from hicode.speech.faceformer import Faceformer, FaceformerConfig, SpeechModels, lip_gap
from hicode.tracking.head_model import HeadModel
from hicode.training import adaptation as speech
from hicode.training.adaptation import (
    CLOSED_GAP,
    GENERIC,
    AdaptConfig,
    Metric,
    PretrainConfig,
    SpeechExample,
    Template,
    adapt_example,
    amplitude,
    example_of,
    fit_basis,
    fit_gain,
    load_generic,
    mouth_metrics,
    pretrain,
    save_generic,
    speaking_frames,
    to_coefficients,
)  # fmt: skip

DIM = 8
SHAPE = FaceformerConfig(width=32, components=4, look_ahead=1, look_back=1, dropout=0.0)


@pytest.fixture(scope="module")
def world():
    """Two hidden signals that can be heard and that move a few outputs; a speaker adds a face and an amplitude."""
    try:
        mouth_metrics()
    except AssetError as error:
        pytest.skip(f"the head model's package cannot be had here: {error}")
    rng = np.random.default_rng(0)
    hear = rng.standard_normal((2, DIM))
    expression, landmarks = 0.2 * rng.standard_normal((2, 64)), 0.02 * rng.standard_normal((2, 478, 3))

    def example(speaker: str, frames: int, seed: int, size: float = 1.0) -> SpeechExample:
        rng = np.random.default_rng(seed)
        face = np.random.default_rng(sum(map(ord, speaker)))
        mouth = 0.1 * face.standard_normal((478, 3))
        mouth[14, 1] = mouth[13, 1] - 0.1  # lips apart, further than they move: nobody closes them
        hidden = np.stack(
            [np.convolve(rng.standard_normal(frames + 4), np.ones(5) / 5**0.5, "valid") for _ in range(2)], 1
        )
        features = np.repeat(hidden, 2, 0) @ hear + 0.05 * rng.standard_normal((2 * frames, DIM))
        as_float = lambda x: torch.from_numpy(x).float()
        return SpeechExample(
            speaker,
            as_float(features)[None],
            as_float(0.1 * face.standard_normal(64) + size * np.tanh(hidden) @ expression),
            as_float(mouth + size * np.einsum("tk,klc->tlc", np.tanh(hidden), landmarks)),
            torch.ones(frames, dtype=torch.bool),
        )

    return example


@pytest.fixture(scope="module")
def generic(world) -> SpeechModels:
    examples = [world(name, 150, seed) for seed, name in enumerate("abcd")]
    return pretrain(examples, "embedded", PretrainConfig(steps=100, batch=8, frames=40, learning_rate=5e-3), SHAPE)


def _static_and_error(models: SpeechModels, example: SpeechExample) -> tuple[float, float]:
    truth = example.landmarks
    _, landmarks = models.predict(example.features[0])
    return float((models.landmark_template - truth).square().mean()), float((landmarks - truth).square().mean())


# --- metric and basis --------------------------------------------------------------------------------------------------------------------


def test_the_metric_weighs_the_mouth(world):
    expression, landmarks = mouth_metrics()
    chin, brow = torch.zeros(478, 3), torch.zeros(478, 3)
    chin[152, 1], brow[70, 1] = 1, 1
    assert landmarks(chin.flatten()).norm() > 5 * landmarks(brow.flatten()).norm()
    from hicode.tracking.head_model import HeadModel

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


def test_gain_is_least_squares_drawn_to_one():
    metric, predicted = Metric(torch.ones(4)), torch.randn(200, 4)
    assert fit_gain(predicted, 1.6 * predicted, metric, 0.0) == pytest.approx(1.6, abs=1e-5)
    # eight seconds against a prior of eight: half way
    assert fit_gain(predicted, 1.6 * predicted, metric, 8.0) == pytest.approx(1.3, abs=1e-5)
    assert fit_gain(torch.zeros(10, 4), predicted[:10], metric, 1.0) == pytest.approx(
        0.0, abs=1e3
    )  # finite, whatever it is


# --- pretraining and adapting ------------------------------------------------------------------------------------------------------------


def test_what_is_heard_is_learned_for_unseen_speakers(generic, world):
    unseen = world("z", 120, 99)
    template = Template.of(unseen.expression, unseen.landmarks, unseen.speaking)
    models = SpeechModels(
        generic.expression,
        generic.landmarks,
        "embedded",
        template.expression,
        template.landmarks,
        template.identity_frames,
    )
    static, error = _static_and_error(models, unseen)
    assert error < 0.3 * static


def test_adapting_finds_a_speaker_who_moves_more(generic, world):
    loud = world("loud", 200, 7, size=1.6)
    models, report = adapt_example(loud, generic=generic)
    assert report.gain[1] > 1.15 and report.adapted_mm[1] <= report.generic_mm[1] < report.static_mm[1]
    assert not any(report.fine_tuned)  # eight seconds are below the threshold
    static, error = _static_and_error(models, world("loud", 100, 8, size=1.6))
    assert error < 0.3 * static


def test_who_is_heard_badly_does_not_mumble(generic, world):
    """Sound that says nothing of the mouth: least squares would still it. It moves as much as the speaker does."""
    example = world("loud", 200, 7, size=1.6)
    deaf = replace(example, features=torch.randn(example.features.shape, generator=torch.Generator().manual_seed(0)))
    _, report = adapt_example(deaf, generic=generic)
    assert min(report.gain) > 1.3 and report.adapted_mm == report.generic_mm


def test_fine_tuning_is_kept_only_where_it_helps(generic, world):
    other = world("other", 300, 5)
    # A speaker whose mouth does the opposite: the generic pair is worse than nothing, tuning must help.
    opposite = SpeechExample(
        "other", other.features, *(2 * x.mean(0) - x for x in (other.expression, other.landmarks)), other.speaking
    )
    models, report = adapt_example(opposite, generic=generic, config=AdaptConfig(steps=80, learning_rate=5e-3))
    assert report.fine_tuned[1] and report.adapted_mm[1] < 0.8 * report.generic_mm[1]
    # A rate that destroys: the generic pair stays.
    models, report = adapt_example(other, generic=generic, config=AdaptConfig(steps=5, learning_rate=3.0))
    assert not any(report.fine_tuned) and models.landmarks is generic.landmarks
    assert report.adapted_mm[1] <= report.generic_mm[1]


def test_adapting_leaves_the_generic_pair_alone(generic, world):
    before = generic.landmarks.output.weight.clone()
    adapt_example(world("x", 300, 5), generic=generic, config=AdaptConfig(steps=3))
    assert torch.equal(generic.landmarks.output.weight, before)


class _FakeClip:
    """As much of a `Clip` as adapting reads."""

    def __init__(self, example: SpeechExample, sound: bool | None, test: int = 25):
        t = len(example)
        self.frame_count, self.train, self.test = t, range(t - test), range(t - test, t)
        motion = Motion(example.expression, example.landmarks, torch.eye(4).expand(t, 4, 4))
        self.track = SimpleNamespace(motion=motion)
        self._features, self._sound = example.features[0], sound

    def audio(self):
        if self._sound is None:
            return None
        noise = np.random.default_rng(0).standard_normal(640 * self.frame_count).astype(np.float32)
        return 0.1 * noise if self._sound else 0 * noise

    def speech_features(self, encoder="embedded", window=None):
        return self._features if self._sound is not None else None


@pytest.mark.parametrize("sound", [None, False])
def test_a_clip_without_speech_gets_its_statistics_only(generic, world, sound):
    example = world("mute", 120, 3, size=1.5)
    models = adapt_example(example_of(_FakeClip(example, sound)), generic=generic)[0]
    assert models.expression is generic.expression and models.landmarks is generic.landmarks
    assert models.landmark_gain == pytest.approx(1.5, rel=0.15)  # by how far the mouth moves, whatever it says
    torch.testing.assert_close(models.landmark_template, example.landmarks[:95].mean(0))
    assert models.identity_frames.shape == (20, 478, 3)


def test_the_test_part_is_never_read(generic, world):
    example = world("y", 150, 4)
    poisoned = SpeechExample(
        "y", example.features.clone(), example.expression.clone(), example.landmarks.clone(), example.speaking
    )
    for x in (poisoned.features[0, 250:], poisoned.expression[125:], poisoned.landmarks[125:]):
        x[:] = float("nan")
    a, b = (adapt_example(example_of(_FakeClip(e, True)), generic=generic)[0].state() for e in (example, poisoned))
    assert a[1] == b[1]
    for name, tensor in a[0].items():
        assert torch.equal(tensor, b[0][name]), name


def test_training_free_running_equals_rolling_out(generic, world):
    """The parallel passes that training uses converge to the roll-out that a user sees."""
    model, features = generic.landmarks, world("a", 40, 77).features
    with torch.no_grad():
        memory, style = model.memory(features), model.identity_style(generic.identity_frames)
        previous = torch.zeros(1, 40, 4)
        for _ in range(40):
            previous = speech._preceding(model(memory, previous, style))
        passes = model(memory, previous, style)
        # after t passes t frames are exact; what is left is rounding
        torch.testing.assert_close(passes, model.rollout(memory, style), atol=1e-4, rtol=1e-3)


def test_a_loss_that_is_not_finite_names_its_step(world):
    example = world("n", 60, 1)
    example.landmarks[30] = float("inf")
    with pytest.raises((TrainingError, torch.linalg.LinAlgError, RuntimeError)):
        pretrain([example, world("m", 60, 2)], "embedded", PretrainConfig(steps=2, batch=2, frames=20), SHAPE)


@pytest.mark.parametrize("broken", ["weight", "sound"])
def test_a_nan_while_fine_tuning_names_step_and_tensor(generic, world, broken):
    from copy import deepcopy

    example, model, metric = world("n", 60, 1), deepcopy(generic.expression), mouth_metrics()[0]
    if broken == "weight":
        with torch.no_grad():
            model.output.weight[0] = float("nan")
    else:
        example.features[0, 100] = float("inf")
    target = speech._displacements(example, Template.of(example.expression, example.landmarks, example.speaking))[0]
    named = {"weight": r"output\.weight", "sound": "features"}[broken]
    with pytest.raises(TrainingError, match=rf"Speech step 0: loss term 'motion' is nan .*{named}"):
        speech.fine_tune(model, example, target, metric, AdaptConfig(steps=1))


@pytest.mark.parametrize("name", ["features", "expression", "landmarks"])
def test_a_clip_with_numbers_that_are_none_is_refused_before_adapting(generic, world, name):
    example = world("n", 60, 1)
    getattr(example, name)[0, 5] = float("nan")
    with pytest.raises(TrainingError, match=f"The {name} .* not finite"):
        adapt_example(example, generic=generic)


def test_speaking_is_told_from_silence():
    sound = np.zeros(640 * 50, np.float32)
    sound[640 * 20 : 640 * 30] = 0.1 * np.random.default_rng(0).standard_normal(6400)
    speaking = speaking_frames(sound, 50)
    assert speaking[20:30].all() and not speaking[:16].any() and not speaking[34:].any()
    assert not speaking_frames(np.zeros(6400, np.float32), 10).any()
    assert len(speaking_frames(sound[:100], 0)) == 0


def test_amplitude_is_a_root_mean_square():
    assert amplitude(torch.full((5, 4), 3.0), Metric(torch.full((4,), 0.5))) == pytest.approx(3.0)


# --- files -------------------------------------------------------------------------------------------------------------------------------


def test_generic_files_give_the_pair_back(generic, world, tmp_path):
    save_generic(generic, [{"speaker": "a"}], tmp_path / "pair.safetensors")
    again, features = load_generic(tmp_path / "pair.safetensors"), world("a", 20, 1).features[0]
    # stored in half precision: 2^-11 of values near one, summed over some dozens
    torch.testing.assert_close(again.predict(features)[1], generic.predict(features)[1], atol=5e-3, rtol=1e-2)


def test_the_shipped_pair_is_small_and_moves_the_mouth_with_a_voice():
    assert GENERIC.stat().st_size < 10e6
    models = load_generic()
    assert models.encoder == "embedded" and models.feature_dim == 384
    assert 0 < models.look_ahead <= 10
    from hicode import assets
    from hicode.media.audio import read_audio
    from hicode.speech.encoder import create_encoder

    try:
        encoder, voice = create_encoder("embedded"), assets.path("demo_speech", "beckett.wav")
    except AssetError as error:
        pytest.skip(f"the embedded encoder or the speech sample cannot be had here: {error}")
    sound = read_audio(voice)[: 16000 * 8]
    _, landmarks = models.predict(models.encoder_for().encode(sound))
    gap = lip_gap(landmarks)
    assert gap.isfinite().all() and gap.max() < 0.4  # dm
    loudness = torch.from_numpy(sound.reshape(-1, 640)).square().mean(1).sqrt()
    assert torch.corrcoef(torch.stack([gap, loudness]))[0, 1] > 0.3
    silent = lip_gap(models.predict(encoder.encode(np.zeros(32000, np.float32)))[1])
    assert silent.mean() < gap.mean() and silent[25:].std() < 0.5 * gap.std()


# --- closed forms ------------------------------------------------------------------------------------------------------------------------


def test_the_linear_answer_is_ridge_regression_and_adds_to_what_was():
    """Against numpy's least squares with the ridge as extra rows, on a world of as many features as it keeps."""
    rng = torch.Generator().manual_seed(0)
    model = Faceformer(replace(SHAPE, feature_dim=4, outputs=64, linear_share=0.5, linear_back=1))
    features = torch.randn(1, 120, 4, generator=rng)
    target, voice = torch.randn(60, 4, generator=rng), torch.randn(1, 4, generator=rng)
    # Heard relative to the speaker's voice; how it is answered is relative to the mean voice.
    task = speech._Task(features + voice[:, None], target, None, 0.5, voice)
    speech.fit_linear(model, [task], ridge=2.0)
    with torch.no_grad():
        frames = torch.nn.functional.pad(model.frame_features(features), (0, 0, 1, 1))
        answered = model.linear_answer(frames)[0]
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
    speech.fit_linear(model, [task], ridge=1e9)  # all prior: what was answered stays
    with torch.no_grad():
        torch.testing.assert_close(model.linear_answer(frames)[0], before, atol=1e-4, rtol=1e-3)


def test_closures_are_heard_and_their_way_is_the_speakers_own(world):
    """A speaker whose lips meet where one feature is high: found on sound that was not learned from; in noise that is labelled so, closed."""
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
    closure = speech.fit_closure(model, [closing("a", 1), closing("b", 2)], PretrainConfig())
    unseen = closing("c", 3)
    frames = torch.nn.functional.pad(model.frame_features(unseen.features)[0], (0, 0, closure.back, closure.ahead))
    odds, shut = closure.odds(frames), lip_gap(unseen.landmarks) < CLOSED_GAP
    # Little sound, much prior: odds are drawn to a half, but in order.
    assert odds[shut].mean() - odds[~shut].mean() > 0.4 and odds[shut].quantile(0.1) > odds[~shut].quantile(0.9)
    assert float(closure.expression[jaw]) == pytest.approx(float(closure.expression.abs().sum()), rel=1e-3), (
        "only the jaw moved"
    )
    assert float(lip_gap(closure.landmarks)) == pytest.approx(1, abs=1e-4)
    opened = unseen.expression + 0.3 * torch.nn.functional.one_hot(torch.tensor(jaw), 64)
    points = head.landmarks(head.mean) + torch.einsum("te,elc->tlc", opened, head.landmarks(head.expression_basis))
    closure.narrow = None
    closed = closure.command(torch.ones(300), opened, points, 0.01, 0.1)
    shaped = head.landmarks(head.mean) + torch.einsum("te,elc->tlc", closed[0], head.landmarks(head.expression_basis))
    # Expression and landmarks close to the same gap: both heads stay one mouth.
    torch.testing.assert_close(lip_gap(shaped), lip_gap(closed[1]), atol=2e-3, rtol=0)


def test_whose_voice_it_is_is_not_taken_for_what_it_says(world):
    """Speakers whose voices differ by far more than what they say, and who all close their mouths where another voice is open: within each of
    them the sound decides, and what was learned holds for a voice near the mean. In the same sound as it is, nothing of the kind is found."""
    rng = np.random.default_rng(0)
    offsets = torch.from_numpy(10 * rng.standard_normal((6, DIM))).float()
    offsets -= offsets.mean(0)
    people = [world(f"p{k}", 150, k) for k in range(6)]
    people = [replace(e, features=e.features + o) for e, o in zip(people, offsets)]
    config = PretrainConfig(steps=60, batch=8, frames=40, learning_rate=5e-3)
    models, unseen = pretrain(people, "embedded", config, SHAPE), world("z", 120, 99)
    template = Template.of(unseen.expression, unseen.landmarks, unseen.speaking)
    pair = SpeechModels(
        models.expression,
        models.landmarks,
        "embedded",
        template.expression,
        template.landmarks,
        template.identity_frames,
    )
    static, error = _static_and_error(pair, unseen)
    assert error < 0.4 * static
    voices = speech._voices(people)
    torch.testing.assert_close(
        models.landmarks.feature_mean, torch.stack([voices[e.speaker][0] for e in people]).mean(0)
    )


def test_a_synthetic_speaker_weighs_less_and_leaves_the_basis_alone(world):
    people = [world(name, 150, seed) for seed, name in enumerate("abc")]
    imagined = [replace(world(f"espeak-{k}", 300, 10 + k, size=5.0), speaker=f"espeak-{k}") for k in range(2)]
    share = speech._shares(people + imagined, PretrainConfig(longest_speaker_s=1e9, synthetic_weight=0.3))
    real = sum(share[e.speaker] * len(e) for e in people)
    assert sum(share[e.speaker] * len(e) for e in imagined) == pytest.approx(0.3 * real)
    config = PretrainConfig(steps=2, batch=4, frames=30)
    with_them, without = (
        pretrain(people + imagined, "embedded", config, SHAPE),
        pretrain(people, "embedded", config, SHAPE),
    )
    assert torch.allclose(with_them.landmarks.basis, without.landmarks.basis)
    assert float(with_them.landmarks.amplitude) == pytest.approx(float(without.landmarks.amplitude))
    torch.testing.assert_close(with_them.landmark_template, without.landmark_template)
