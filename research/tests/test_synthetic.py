"""Synthetic speech: phones and their shapes, times that agree with the sound, mouths that close where they must and
rest where they should.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from research.pretrain import espeak as espeak_module
from research.pretrain.espeak import VARIANTS, Espeak, installed, sentences
from research.pretrain.languages import closure_rates, closures_due, landmark_gap, lines, measure_languages
from research.pretrain.phones import (
    CLASSES,
    SILENCE,
    Phone,
    frame_classes,
    letters_of,
    lip_shapes,
    shapes_in_time,
    unknown_letters,
)
from research.pretrain.synthetic import NEGATIVES, CorpusConfig, Speaker, corpus, negative, spoken, unspoken
from research.pretrain.visemes import SHAPES, Style, as_tracked, still, viseme_expression

from hicode.audio import SAMPLE_RATE_HZ
from hicode.errors import InputError
from hicode.motion import LOWER_LIP_INNER, UPPER_LIP_INNER
from hicode.speech.sync import mouth_measures
from hicode.tracking.head_model import HeadModel

needs_espeak = pytest.mark.skipif(
    not installed(), reason="espeakng-loader is not installed (pip install 'hicode[research]')"
)
CLOSED_DM = 0.015  # 1.5 mm: what training counts as closed lips


def shape_names(ipa: str) -> list[str]:
    return [CLASSES[kind] for kind, _ in lip_shapes(ipa)]


def said(ipas: str, each_s: float = 0.12, start_s: float = 0.4) -> tuple[Phone, ...]:
    return tuple(Phone(start_s + i * each_s, start_s + (i + 1) * each_s, ipa) for i, ipa in enumerate(ipas.split()))


def face(expression: torch.Tensor) -> torch.Tensor:
    head = HeadModel.load()
    return head.landmarks(head.mean) + torch.einsum("te,elc->tlc", expression, head.landmarks(head.expression_basis))


def lip_gap(landmarks: torch.Tensor) -> np.ndarray:
    return (landmarks[:, UPPER_LIP_INNER] - landmarks[:, LOWER_LIP_INNER]).norm(dim=-1).numpy()


def no_features(samples, frames: int) -> torch.Tensor:
    return torch.zeros(1, 2 * frames, 1)


# --- phones -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ipa, shapes",
    [
        ("", ["silence"]),
        ("ˈ", ["silence"]),
        ("m̩", ["bilabial"]),
        ("ˈɑ̃", ["open"]),
        ("uː", ["rounded_close"]),
        ("tʃ", ["postalveolar"]),
        ("dz", ["sibilant"]),
        ("tɕʰ", ["postalveolar", "other"]),
        ("pf", ["bilabial", "labiodental"]),
        ("pʲ", ["bilabial", "spread"]),
        ("bʰ", ["bilabial", "other"]),
        ("ph", ["bilabial", "other"]),
        ("kʷ", ["velar", "rounded_close"]),
        ("aɪ", ["open", "spread"]),
        ("ç", ["velar"]),
        ("ɑu˥˩", ["open", "rounded_close"]),
        ("onɡ", ["rounded_open", "alveolar", "velar"]),
        ("ə5", ["neutral"]),
        ("s.", ["sibilant"]),
        ("β", ["labiodental"]),
    ],
)
def test_letters_marks_and_clusters_have_their_shapes(ipa, shapes):
    assert shape_names(ipa) == shapes
    assert sum(share for _, share in lip_shapes(ipa)) == pytest.approx(1)


def test_an_unknown_letter_is_neutral_and_told():
    assert shape_names("ꙮ") == ["neutral"] and unknown_letters("aꙮ") == ["ꙮ"]
    assert unknown_letters("ˈt͡ʃaɪ̯ç") == []


def test_every_shape_has_a_target():
    assert tuple(SHAPES) == CLASSES


def test_shapes_tile_time_without_a_hole_and_frames_read_their_middle():
    phones = (Phone(0.10, 0.20, "p"), Phone(0.30, 0.42, "aɪ"))
    shapes = shapes_in_time(phones, 0.6)
    assert shapes[0][0] == 0 and shapes[-1][1] == pytest.approx(0.6)
    assert all(a[1] == pytest.approx(b[0]) for a, b in pairwise(shapes))
    for i, kind in enumerate(frame_classes(phones, 15)):
        middle = (i + 0.5) / 25
        assert kind == next(k for start, end, k in shapes if start <= middle < end)
    with pytest.raises(InputError, match="Sort the phones"):
        shapes_in_time(phones[::-1], 1.0)


# --- motion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ipas", ["a p a b a m a", "u p u m o b o", "i m i p e", "a p f a m v a", "ə p l ʃ b s m w"])
@pytest.mark.parametrize("phase_s", [0.0, 0.013, 0.027])
def test_lips_meet_at_every_bilabial_longer_than_50_ms_between_any_vowels_at_any_phase(ipas, phase_s):
    phones = said(ipas, each_s=0.06, start_s=0.4 + phase_s)
    for style in [still(Style()), Style(amplitude=1.6, wander=0.02, seed=3), Style(width=-0.3, jaw=0.6)]:
        gap = lip_gap(face(viseme_expression(phones, 40, style)))
        for first, end in closures_due(phones, 40):
            assert gap[first:end].min() < CLOSED_DM, (ipas, style)


def test_shapes_look_as_they_are_called():
    """Orders that phonetics gives; sizes are calibrated elsewhere."""

    def held(ipa: str) -> torch.Tensor:
        points = face(viseme_expression((Phone(0.3, 0.9, ipa),), 30, still(Style())))
        return points[15]

    opening, width, _, jaw = (
        {ipa: float(mouth_measures(held(ipa)[None])[0, k]) for ipa in "pfaiueos"} for k in range(4)
    )
    assert opening["a"] > opening["e"] > opening["i"] > opening["u"] > opening["f"] > opening["p"]
    assert width["i"] > width["a"] > width["o"] > width["u"] and width["i"] > width["u"] * 1.1
    assert jaw["a"] > jaw["e"] > jaw["i"] and jaw["a"] > jaw["o"] > jaw["s"]
    rest, f = face(torch.zeros(1, 64))[0], held("f")
    # f: the lower lip goes up and in to where the edge of the upper teeth is, the upper lip clears it.
    assert f[LOWER_LIP_INNER, 1] > held("s")[LOWER_LIP_INNER, 1] and f[LOWER_LIP_INNER, 2] < rest[LOWER_LIP_INNER, 2]


def test_rounding_goes_through_a_closure_and_begins_before_its_vowel():
    width = {v: mouth_measures(face(viseme_expression(said(f"{v} b {v}"), 30, still(Style()))))[:, 1] for v in "ui"}
    middle_of_b = int((0.4 + 0.18) * 25)
    assert width["u"][middle_of_b] < width["i"][middle_of_b] - 0.03
    after_s = said("s s u u")
    width_s = mouth_measures(face(viseme_expression(after_s, 30, still(Style()))))[:, 1].numpy()
    start_of_u = int(0.64 * 25)
    assert width_s[start_of_u - 1] < width_s[start_of_u - 3] - 0.005, "lips round while s still sounds"


def test_the_mouth_rests_before_after_and_in_a_pause_and_without_phones():
    phones = (*said("a l a"), *said("a l a", start_s=1.6))
    gap = lip_gap(face(viseme_expression(phones, 75, Style(wander=0.02, seed=1))))
    for start, end in ((0.0, 0.15), (1.05, 1.30), (2.3, 3.0)):
        assert gap[int(start * 25) : int(end * 25)].max() < CLOSED_DM
    assert lip_gap(face(viseme_expression((), 25, Style(seed=2)))).max() < CLOSED_DM


def test_expression_stays_in_the_range_in_which_actions_mean_something():
    head = HeadModel.load()
    for seed in range(5):
        style = Style.sample(np.random.default_rng(seed))
        x = viseme_expression(said("a p u b i f o m w ʃ e"), 60, style)
        assert torch.isfinite(x).all()
        assert (x >= head.expression_low - 1e-6).all() and (x <= head.expression_high + 1e-6).all()


def test_only_actions_that_speech_drives_are_used():
    assert not viseme_expression(said("a p u b i f"), 40)[:, ~HeadModel.load().mouth_expression].any()


def test_the_frame_rate_changes_the_sampling_and_not_the_curve():
    phones = said("a p u b i f")
    slow, fast = (viseme_expression(phones, int(1.6 * fps), still(Style()), fps=fps) for fps in (25.0, 75.0))
    assert torch.allclose(slow, fast[1::3], atol=1e-6)  # the middle of a third's frame is the middle of the whole one's


def test_as_tracked_keeps_the_mouth_and_minimises_the_fit_s_objective():
    """The oracle is scipy's bounded minimiser on single frames."""
    from research.pretrain.visemes import _tracker
    from scipy.optimize import minimize

    from hicode.tracking.fit import FitConfig

    x = viseme_expression(said("a p u b i f o m"), 45, Style.sample(np.random.default_rng(1)))
    y = as_tracked(x)
    before, after = face(x), face(y)
    assert 100 * (before - after).norm(dim=-1).max() < 1.5, "mm: the fit's own noise is 1.2"
    assert 100 * np.abs(lip_gap(before) - lip_gap(after)).max() < 0.15
    tracker, ridge = _tracker(), FitConfig().expression_ridge
    assert not y[:, ~tracker.mouth].any()
    seen, sparse = tracker.seen.double().numpy(), tracker.sparse.double().numpy()
    for t in (12, 17, 24):
        aim = x[t, tracker.mouth].double().numpy() @ seen - sparse

        def objective(e, aim=aim):
            return 0.5 * e @ seen @ e + 0.5 * ridge * e @ e - aim @ e, seen @ e + ridge * e - aim

        ours = y[t, tracker.mouth].double().numpy()
        bounds = list(zip(tracker.low.tolist(), tracker.high.tolist()))
        best = minimize(
            objective, ours, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14}
        )
        assert objective(ours)[0] - best.fun < 2e-3 * abs(best.fun)


def test_faces_of_sampled_speakers_have_lips_that_meet():
    head = HeadModel.load()
    for seed in range(8):
        speaker = Speaker.sample("s", "en", np.random.default_rng(seed))
        rest = speaker.rest(head)
        gap = float((rest[UPPER_LIP_INNER] - rest[LOWER_LIP_INNER]).norm())
        assert gap < CLOSED_DM
        assert speaker.identity.norm() > 3, "it is still somebody"


# --- sounds that are no speech ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NEGATIVES)
def test_a_negative_sounds_and_the_mouth_rests(kind):
    rng = np.random.default_rng(5)
    speaker = Speaker.sample("s", "en", rng)
    made = unspoken(kind, 2.0, speaker, no_features, rng)
    assert made.negative and len(made.samples) == 32000 and np.abs(made.samples).max() <= 1
    rms = float(np.sqrt((made.samples**2).mean()))
    assert rms < 1e-3 if kind == "silence" else rms > 3e-3
    assert lip_gap(made.example.landmarks).max() < CLOSED_DM
    assert not made.example.speaking.any() and (made.classes == SILENCE).all() and not made.phones


def test_negatives_are_seeded_and_differ():
    for kind in NEGATIVES:
        a, b, c = (negative(kind, 16000, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert np.array_equal(a, b) and not np.array_equal(a, c)


# --- closure by language ----------------------------------------------------------------------------------------------


def test_closure_rates_count_by_language():
    phones = said("a p a b a", each_s=0.2)
    shut, kinds = np.full(50, 0.1), frame_classes(phones, 50)
    shut[kinds == CLASSES.index("bilabial")] = 0.0
    rates = closure_rates([shut, np.full(50, 0.1), np.zeros(50)], [phones] * 3, ["good", "never", "always"])
    assert rates["good"].closure.recall == 1 and rates["good"].closure.elsewhere == 0
    assert rates["never"].closure.recall == 0 and rates["never"].open_vowel == pytest.approx(0.1)
    assert rates["always"].closure.recall == 1 and rates["always"].closure.elsewhere == 1, (
        "a mouth that never opens pays"
    )
    assert closure_rates([np.full(10, 0.1)], [()], ["x"])["x"].closure.recall is None
    with pytest.raises(InputError, match="one of each"):
        closure_rates([shut], [phones], [])


# --- espeak-ng --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthesiser():
    if not installed():
        pytest.skip("espeakng-loader is not installed (pip install 'hicode[research]')")
    with Espeak() as running:
        yield running


@pytest.fixture(scope="module")
def everything(synthesiser):
    """Each language's sentences, each by another voice."""
    return {
        language: [
            synthesiser.say(text, f"{language}+{VARIANTS[i % len(VARIANTS)]}") for i, text in enumerate(texts[:12])
        ]
        for language, texts in sentences().items()
    }


def test_there_are_sentences_of_twelve_languages_and_more():
    texts = sentences()
    assert len(texts) >= 12 and len(texts["en"]) >= 60 and min(map(len, texts.values())) >= 8
    assert len({t for ts in texts.values() for t in ts}) == sum(map(len, texts.values())), "none twice"


@needs_espeak
def test_less_than_one_letter_in_a_hundred_is_unknown_in_every_language(everything):
    for language, utterances in everything.items():
        letters = [c for u in utterances for p in u.phones for c in letters_of(p.ipa)]
        unknown = [c for u in utterances for p in u.phones for c in unknown_letters(p.ipa)]
        assert len(letters) > 100 and len(unknown) < 0.01 * len(letters), (language, set(unknown))


@needs_espeak
def test_phones_follow_each_other_and_last_as_long_as_the_sound(everything):
    for utterances in everything.values():
        for u in utterances:
            assert all(
                a.end_s == pytest.approx(b.start_s, abs=1e-9) and a.end_s >= a.start_s for a, b in pairwise(u.phones)
            )
            # The resampler rounds to a sample; espeak-ng may begin with a few ms before the first phone.
            assert u.phones[0].start_s < 0.1 and u.phones[-1].end_s == pytest.approx(
                len(u.samples) / SAMPLE_RATE_HZ, abs=2e-3
            )


@needs_espeak
def test_stops_are_quiet_while_held_and_open_vowels_loud(everything):
    """The oracle of the timing: a phone a frame off would put half a vowel into a stop."""
    held, vowels = [], []
    for utterances in everything.values():
        for u in utterances:
            level = np.sqrt((u.samples**2).mean())
            for p in u.phones:
                end = p.start_s + 0.5 * (p.end_s - p.start_s)
                part = u.samples[int(p.start_s * SAMPLE_RATE_HZ) : int(end * SAMPLE_RATE_HZ)]
                if len(part) > 240 and (p.ipa in ("p", "t", "k") or "a" in letters_of(p.ipa)[:1]):
                    (held if p.ipa in ("p", "t", "k") else vowels).append(np.sqrt((part**2).mean()) / level)
    assert len(held) > 200 and len(vowels) > 200
    assert np.median(held) < 0.1 and np.percentile(held, 90) < 0.35 and np.median(vowels) > 1.0


@needs_espeak
def test_every_p_b_m_of_every_language_closes_the_lips_of_the_truth(everything):
    rng = np.random.default_rng(0)
    examples = []
    for language, utterances in everything.items():
        for u in utterances[:4]:
            examples.append(spoken(u, Speaker.sample(language, language, rng), no_features, rng))
    gaps = [lip_gap(e.example.landmarks) for e in examples]
    rates = closure_rates(gaps, [e.phones for e in examples], [e.language for e in examples], closed=CLOSED_DM)
    assert set(rates) == set(sentences())
    for language, rate in rates.items():
        assert rate.closure.due >= 4 and rate.closure.recall == 1, (language, rate)
        # An f is a gap of 2 mm in the middle: a quiet speaker's is taken for closed now and then.
        assert rate.closure.elsewhere < 0.05 and rate.open_vowel > 4 * rate.bilabial


@needs_espeak
def test_languages_are_measured_of_anything_that_gives_a_gap():
    lengths = []

    def agape(samples):
        lengths.append(len(samples))
        return np.full(len(samples) // 640, 0.1)

    rates = measure_languages(agape, per_language=2, languages=("en", "cmn"))
    assert set(rates) == {"en", "cmn"} and len(lengths) == 4 and all(n % 640 == 0 for n in lengths)
    assert all(
        r.closure.recall == 0 and r.closure.elsewhere == 0 and r.open_vowel == pytest.approx(0.1)
        for r in rates.values()
    )
    assert len(lines(rates)) == 4
    held = face(viseme_expression((Phone(0.0, 0.4, "a"),), 10, still(Style())))
    height = float(held[5, 13, 1] - held[5, 14, 1])
    assert landmark_gap(held)[5] == pytest.approx(height / 0.814, rel=1e-2)  # the mean head's eyes are 8.1 cm apart


@needs_espeak
def test_a_corpus_is_seeded_keeps_its_shapes_and_speaks_several_languages():
    config = CorpusConfig(minutes=0.5, speakers=4, negatives=0.3, seed=3)
    a, b = (corpus(no_features, config) for _ in range(2))
    assert len(a) == len(b) and all(np.array_equal(x.samples, y.samples) for x, y in zip(a, b))
    assert all(torch.equal(x.example.landmarks, y.example.landmarks) for x, y in zip(a, b))
    assert {e.language for e in a if not e.negative} > {"en"} and any(e.negative for e in a)
    assert len({e.example.speaker for e in a}) == 4
    for e in a:
        frames = len(e.example)
        assert len(e.samples) == 640 * frames == 640 * len(e.classes) and e.example.landmarks.shape == (frames, 478, 3)
        assert e.example.features.shape == (1, 2 * frames, 1) and np.abs(e.samples).max() <= 1
    other = corpus(no_features, CorpusConfig(minutes=0.1, speakers=1, seed=4))
    assert other[0].example.speaker != a[0].example.speaker or not np.array_equal(other[0].samples, a[0].samples)


@needs_espeak
def test_what_cannot_be_said_is_told_in_one_line(synthesiser):
    for text, voice, options, message in [
        ("  ", "en", {}, "at least one word"),
        ("hello", "xx", {}, "no voice 'xx'"),
        ("hello", "en+nobody", {}, "no variant 'nobody'"),
        ("hello", "en", {"words_per_minute": 5000}, "does not exist"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            synthesiser.say(text, voice, **options)
        assert "\n" not in str(error.value)
    assert len(synthesiser.say("It goes on after a mistake.", "en").samples) > SAMPLE_RATE_HZ
    with pytest.raises(InputError, match="no sentences in tlh"):
        corpus(no_features, CorpusConfig(languages=("tlh",)))


@needs_espeak
def test_a_synthesiser_that_dies_is_told_in_one_line():
    with Espeak() as running:
        running._child.kill()
        running._child.wait()
        with pytest.raises(InputError, match="synthesiser stopped") as error:
            running.say("hello", "en")
        assert "\n" not in str(error.value)


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(espeak_module, "installed", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'hicode\[research\]'"):
        Espeak()


@needs_espeak
def test_the_library_is_never_loaded_in_this_process(synthesiser):
    import sys
    from pathlib import Path

    synthesiser.say("hello", "en")
    assert "espeakng_loader" not in sys.modules
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert "espeak" not in maps.read_text()
