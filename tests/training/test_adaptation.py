"""A person's speech models: adapted from generic ones, from a clip alone, and from clips without anything to learn."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.speech_world import ENCODER, static_and_error
from hicode.errors import AssetError, TrainingError
from hicode.motion import Motion
from hicode.speech.lip_closure import lip_gap
from hicode.speech.speech_model import SpeechModels
from hicode.training import adaptation
from hicode.training.adaptation import (
    GENERIC,
    AdaptConfig,
    SpeechExample,
    example_of,
    fit_gain,
    learn_speech_models,
    load_generic,
    speaking_frames,
)
from hicode.training.faceformer import Metric, mouth_metrics, shifted

OTHER = replace(ENCODER, name="another")  # no generic models are of this encoder


def test_gain_is_least_squares_drawn_to_one():
    metric, predicted = Metric(torch.ones(4)), torch.randn(200, 4)
    assert fit_gain(predicted, 1.6 * predicted, metric, 0.0) == pytest.approx(1.6, abs=1e-5)
    # eight seconds against a prior of eight: half way
    assert fit_gain(predicted, 1.6 * predicted, metric, 8.0) == pytest.approx(1.3, abs=1e-5)
    # finite, whatever it is
    assert fit_gain(torch.zeros(10, 4), predicted[:10], metric, 1.0) == pytest.approx(0.0, abs=1e3)


def test_adapting_finds_a_speaker_who_moves_more(generic, world):
    loud = world("loud", 200, 7, size=1.6)
    models, report = learn_speech_models(loud, ENCODER, generic)
    assert report.gain[1] > 1.15 and report.final_mm[1] <= report.start_mm[1] < report.still_mm[1]
    assert not any(report.fine_tuned)  # eight seconds are below the threshold
    static, error = static_and_error(models, world("loud", 100, 8, size=1.6))
    assert error < 0.3 * static


def test_who_is_heard_badly_does_not_mumble(generic, world):
    """Sound that says nothing of the mouth: least squares would still it. It moves as much as the speaker does."""
    example = world("loud", 200, 7, size=1.6)
    deaf = replace(example, features=torch.randn(example.features.shape, generator=torch.Generator().manual_seed(0)))
    _, report = learn_speech_models(deaf, ENCODER, generic)
    assert min(report.gain) > 1.3 and report.final_mm == report.start_mm


def test_fine_tuning_is_kept_only_where_it_helps(generic, world):
    other = world("other", 300, 5)
    # A speaker whose mouth does the opposite: the generic pair is worse than nothing, tuning must help.
    opposite = SpeechExample(
        "other", other.features, *(2 * x.mean(0) - x for x in (other.expression, other.landmarks)), other.speaking
    )
    models, report = learn_speech_models(opposite, ENCODER, generic, AdaptConfig(steps=80, learning_rate=5e-3))
    assert report.fine_tuned[1] and report.final_mm[1] < 0.8 * report.start_mm[1]
    # A rate that destroys: the generic pair stays.
    models, report = learn_speech_models(other, ENCODER, generic, AdaptConfig(steps=5, learning_rate=3.0))
    assert not any(report.fine_tuned) and models.landmarks is generic.landmarks
    assert report.final_mm[1] <= report.start_mm[1]


def test_adapting_leaves_the_generic_pair_alone(generic, world):
    before = generic.landmarks.output.weight.clone()
    learn_speech_models(world("x", 300, 5), ENCODER, generic, AdaptConfig(steps=3))
    assert torch.equal(generic.landmarks.output.weight, before)


class _FakeClip:
    """As much of a `Clip` as adapting reads."""

    def __init__(self, example: SpeechExample, sound: bool | None, test: int = 25):
        t = len(example)
        self.frame_count, self.train, self.test = t, range(t - test), range(t - test, t)
        self.usable = np.ones(t, bool)
        motion = Motion(example.expression, example.landmarks, torch.eye(4).expand(t, 4, 4))
        self.track = SimpleNamespace(motion=motion)
        self._features, self._sound = example.features[0], sound

    def audio(self):
        if self._sound is None:
            return None
        noise = np.random.default_rng(0).standard_normal(640 * self.frame_count).astype(np.float32)
        return 0.1 * noise if self._sound else 0 * noise

    def speech_features(self, encoder):
        return self._features if self._sound is not None else None


@pytest.mark.parametrize("sound", [None, False])
def test_a_clip_without_speech_gets_its_statistics_only(generic, world, sound):
    example = world("mute", 120, 3, size=1.5)
    models, _ = learn_speech_models(example_of(_FakeClip(example, sound), ENCODER), ENCODER, generic)
    assert models.expression is generic.expression and models.landmarks is generic.landmarks
    assert models.subject.landmark_gain == pytest.approx(1.5, rel=0.15)  # by how far the mouth moves, whatever it says
    torch.testing.assert_close(models.subject.landmarks, example.landmarks[:95].mean(0))
    assert models.subject.identity_frames.shape == (20, 478, 3)


def test_the_test_part_is_never_read(generic, world):
    example = world("y", 150, 4)
    poisoned = SpeechExample(
        "y", example.features.clone(), example.expression.clone(), example.landmarks.clone(), example.speaking
    )
    for x in (poisoned.features[0, 250:], poisoned.expression[125:], poisoned.landmarks[125:]):
        x[:] = float("nan")
    a, b = (
        learn_speech_models(example_of(_FakeClip(e, True), ENCODER), ENCODER, generic)[0].state()
        for e in (example, poisoned)
    )
    assert a[1] == b[1]
    for name, tensor in a[0].items():
        assert torch.equal(tensor, b[0][name]), name


def test_training_free_running_equals_rolling_out(generic, world):
    """The parallel passes that training uses converge to the roll-out that a user sees."""
    model, features = generic.landmarks, world("a", 40, 77).features
    with torch.no_grad():
        memory, style = model.memory(features), model.identity_style(generic.subject.identity_frames)
        previous = torch.zeros(1, 40, 4)
        for _ in range(40):
            previous = shifted(model(memory, previous, style))
        passes = model(memory, previous, style)
        # after t passes t frames are exact; what is left is rounding
        torch.testing.assert_close(passes, model.rollout(memory, style), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("broken", ["weight", "sound"])
def test_a_nan_while_fine_tuning_names_step_and_tensor(generic, world, broken):
    from copy import deepcopy

    example, model, metric = world("n", 60, 1), deepcopy(generic.expression), mouth_metrics()[0]
    if broken == "weight":
        with torch.no_grad():
            model.output.weight[0] = float("nan")
    else:
        example.features[0, 100] = float("inf")
    target = example.displacements(example.subject)[0]
    named = {"weight": r"output\.weight", "sound": "features"}[broken]
    with pytest.raises(TrainingError, match=rf"Speech step 0: loss term 'motion' is nan .*{named}"):
        adaptation.fine_tune(model, model.config, example, target, metric, AdaptConfig(steps=1))


@pytest.mark.parametrize("name", ["features", "expression", "landmarks"])
def test_a_clip_with_numbers_that_are_none_is_refused_before_adapting(generic, world, name):
    example = world("n", 60, 1)
    getattr(example, name)[0, 5] = float("nan")
    with pytest.raises(TrainingError, match=f"The {name} .* not finite"):
        learn_speech_models(example, ENCODER, generic)


def test_speaking_is_told_from_silence():
    sound = np.zeros(640 * 50, np.float32)
    sound[640 * 20 : 640 * 30] = 0.1 * np.random.default_rng(0).standard_normal(6400)
    speaking = speaking_frames(sound, 50)
    assert speaking[20:30].all() and not speaking[:16].any() and not speaking[34:].any()
    assert not speaking_frames(np.zeros(6400, np.float32), 10).any()
    assert len(speaking_frames(sound[:100], 0)) == 0


def test_the_shipped_pair_is_small_and_moves_the_mouth_with_a_voice():
    assert GENERIC.stat().st_size < 10e6
    models = load_generic()
    assert models.encoder.name == "embedded" and models.encoder.dim == 384
    assert 0 < models.look_ahead <= 10
    from hicode import assets
    from hicode.media.audio import read_audio
    from hicode.speech.encoders import create_encoder

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


# --- from the clip alone ---


@pytest.mark.slow
def test_without_generic_models_speech_is_learned_from_the_clip_alone(generic, world):
    example, unseen = world("alone", 900, 5), world("alone", 200, 6)
    models, report = learn_speech_models(example, OTHER, generic, AdaptConfig(alone_steps=40))
    assert models.encoder == OTHER and models.encoder != generic.encoder
    assert report.final_mm[1] <= report.start_mm[1] < report.still_mm[1]
    static, error = static_and_error(models, unseen)
    assert error < 0.3 * static


def test_a_short_clip_alone_is_learned_in_closed_form(generic, world):
    models, report = learn_speech_models(world("short", 120, 5), OTHER, generic)
    assert not any(report.fine_tuned) and models.closure is None  # nobody closes their lips here
    static, error = static_and_error(models, world("short", 100, 6))
    assert error < 0.6 * static


def test_models_learned_alone_survive_their_file_and_stream(generic, world):
    models, _ = learn_speech_models(world("alone", 300, 5), OTHER, generic, AdaptConfig(alone_steps=3))
    again, features = SpeechModels.from_state(*models.state()), world("alone", 40, 7).features[0]
    expected = models.predict(features)
    stream = again.stream()
    parts = [*(stream.push(piece) for piece in features.split(7)), stream.finish()]
    torch.testing.assert_close(torch.cat([p.landmarks for p in parts]), expected.landmarks, atol=1e-5, rtol=1e-4)


def test_a_silent_clip_of_another_encoder_gets_the_generic_models(generic, world):
    example = example_of(_FakeClip(world("mute", 120, 3), None), OTHER)
    models, _ = learn_speech_models(example, OTHER, generic)
    assert models.encoder == generic.encoder and models.expression is generic.expression
