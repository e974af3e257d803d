"""The gate of the benchmarks: it says what got slower, and nothing else."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY))
main = pytest.importorskip("research.benchmarks.__main__", reason="benchmarks/ is not beside the tests")


@pytest.fixture
def work(monkeypatch, tmp_path):
    """One case whose cost the test sets, in ms, on a machine of even speed; a baseline of its own."""
    cost = {"ms": 1.0, "unit": 2.0}

    def even_unit(unit):
        unit.seen.append(cost["unit"])
        return cost["unit"]

    monkeypatch.setattr(main.Unit, "run", even_unit)
    monkeypatch.setattr(main, "CASES", {"busy": lambda: {"busy": lambda: {"busy loop": cost["ms"]}}, "absent": _absent})
    monkeypatch.setattr(main, "BASELINE", tmp_path / "baseline.json")
    return cost


def _absent():
    raise main.Skipped("nothing here to measure")


def test_the_gate_names_what_got_slower_and_fails(work, capsys):
    assert main.main(["--save"]) == 0
    assert main.main([]) == 0 and "Slower: nothing" in capsys.readouterr().out
    work["ms"] *= 1.3
    assert main.main([]) == 1 and "Slower: busy loop" in capsys.readouterr().out
    work["unit"] *= 1.3  # the machine itself is slower
    assert main.main([]) == 0
    work["ms"] /= 4
    assert main.main([]) == 0


def test_what_seems_slower_is_measured_twice(work, monkeypatch):
    main.main(["--save"])
    costs = iter([5.0] * 16 + [1.0] * 16)
    monkeypatch.setattr(main, "CASES", {"busy": lambda: {"busy": lambda: {"busy loop": next(costs)}}})
    assert main.main([]) == 0


def test_time_without_figures_is_processor_time(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(main.time, "process_time", lambda: next(clock) / 1000)
    monkeypatch.setattr(main.Unit, "run", lambda unit: 0.5)
    found = main.measure({"nothing": lambda: None}, 3, main.Unit())
    assert found == {"nothing": {"ms": 1.0, "units": 2.0}}


def test_costs_are_compared_in_units_of_the_machines_speed(work):
    main.main(["--save"])
    baseline = json.loads(main.BASELINE.read_text())
    known = baseline["cost"]["busy loop"]
    # a slow machine
    assert main.slower({"busy loop": {"ms": 10 * known["ms"], "units": known["units"]}}, baseline["cost"]) == []
    assert main.slower({"busy loop": {"ms": known["ms"], "units": 2 * known["units"]}}, baseline["cost"]) == [
        "busy loop"
    ]
    assert main.slower({"new": {"ms": 1, "units": 1}}, baseline["cost"]) == []


def test_what_cannot_be_measured_here_is_said(work, capsys):
    main.main([])
    assert "absent: skipped, nothing here to measure" in capsys.readouterr().out


def test_saving_some_keeps_the_others(work):
    main.BASELINE.write_text(json.dumps({"cost": {"other": {"ms": 1, "units": 2}}}))
    main.main(["busy", "--save"])
    assert set(json.loads(main.BASELINE.read_text())["cost"]) == {"other", "busy loop"}


def test_the_committed_baseline_knows_every_part():
    cost = json.loads((REPOSITORY / "research" / "benchmarks" / "baseline.json").read_text())["cost"]
    for name in (
        "raster both",
        "control 4096 both",
        "loss L1+SSIM",
        "loss VGG crop",
        "step draft",
        "speak all",
        "prepare",
    ):
        assert cost[name]["units"] > 0


@pytest.mark.slow
def test_no_part_costs_far_more_than_the_baseline(capsys):
    """The gate itself, on the parts that take seconds. A busy machine has other caches: only gross faults count."""
    late = main.main(["raster", "loss", "step", "speak", "--repeats", "3", "--tolerance", "4"])
    assert late == 0, capsys.readouterr().out


# --- lips and sheets --------------------------------------------------------------------------------------------------


def _speech(frames: int, seed: int):
    import torch

    from hicode.tracking.head_model import HeadModel
    from hicode.training.adaptation import SpeechExample

    head, rng = HeadModel.load(), np.random.default_rng(seed)
    expression = torch.zeros(frames, 64)
    expression[:, head.expression_names.index("jawOpen")] = torch.from_numpy(0.2 + 0.2 * rng.random(frames)).float()
    expression[:, head.expression_names.index("mouthPucker")] = torch.from_numpy(0.3 * rng.random(frames)).float()
    landmarks = head.landmarks(head.mean) + torch.einsum(
        "te,elc->tlc", expression, head.landmarks(head.expression_basis)
    )
    return head, SpeechExample(
        "a", torch.zeros(1, 2 * frames, 4), expression, landmarks, torch.arange(frames) % 40 < 30
    )


def test_lips_rate_the_truth_perfect_and_a_still_mouth_as_nothing():
    from research.benchmarks import lips

    head, example = _speech(120, 0)
    template = lips.template_of([example])
    truth = lips.figures(example.expression, example.landmarks, example, template, head)
    assert all(abs(truth[k] - 1) < 1e-5 for k in ("opening", "width", "jaw", "x opening", "amplitude"))
    assert truth["error"] == 0 and truth["less"] == 100 and truth["all 478"] == 0 and truth["apart"] < 1e-4
    assert (truth["closed"], truth["falsely"]) == (100, 0)
    still = template.expression.expand(120, 64), template.landmarks.expand(120, 478, 3)
    nothing = lips.figures(*still, example, template, head)
    assert abs(nothing["less"]) < 1e-6 and nothing["amplitude"] < 1e-5 and abs(nothing["expression less"]) < 1e-4
    backwards = lips.figures(
        2 * template.expression - example.expression,
        2 * template.landmarks - example.landmarks,
        example,
        template,
        head,
    )
    assert backwards["opening"] < -0.99 and backwards["less"] < -99


def test_truth_and_a_still_mouth_ask_no_features_and_score_all_or_nothing():
    from research.benchmarks import lips
    from research.pretrain.corpus import Taken

    clips = [replace(_speech(60, seed)[1], speaker=name) for seed, name in enumerate("abbb")]
    taken = [Taken(e.speaker, str(i), "own", 60, 60, False, 0.0, 1.0) for i, e in enumerate(clips)]
    data = lips.Data(taken, clips, {}, {})
    nobody = lambda i: pytest.fail("features were asked")
    truth, still = (lips.score(data, None, nobody, shown) for shown in ("truth", "still"))
    assert list(truth.speakers) == ["a"] and list(truth.many) == ["b"]
    for scores in (truth.speakers["a"], truth.many["b"]):
        assert scores["opening"] == pytest.approx(1) and scores["less"] == 100
    for scores in (still.speakers["a"], still.many["b"]):
        assert scores["opening"] == scores["width"] == scores["jaw"] == 0 and abs(scores["amplitude"]) < 1e-5


def test_weights_are_scored_about_the_speakers_own_face_and_closures_where_words_are_aligned(tmp_path):
    import torch
    from research.benchmarks import lips
    from research.pretrain.corpus import Taken

    from hicode.errors import AssetError
    from hicode.training.adaptation import load_generic

    try:
        clip = replace(_speech(60, 0)[1], features=torch.zeros(1, 120, 384))
    except AssetError as error:
        pytest.skip(str(error))
    words = tmp_path / "a.align"
    words.write_text("0 10000 sil\n10000 30000 bin\n30000 60000 sil\n")
    data = lips.Data([Taken("a", "a", "own", 60, 60, False, 0.0, 1.0)], [clip], {}, {0: words})
    scores = lips.score(data, load_generic(), lambda i: clip.features[0])
    still = lips.score(data, None, lambda i: clip.features[0], "still")
    assert scores.due is not None and scores.due[2] == 1
    # Nothing is said: near the person's own mean face, whoever the weights learned from.
    assert scores.speakers["a"]["error"] < 3 * still.speakers["a"]["error"]


def test_silent_lips_are_slower_than_speaking_ones():
    from research.benchmarks import lips

    speaking = np.repeat([True, False], 20)
    assert lips.quiet(np.where(speaking, np.arange(40) % 2, 0.0) * 1.0, speaking) < 0.1
    assert np.isnan(lips.quiet(np.zeros(3), speaking[:3]))


def test_lip_shapes_are_recognised_from_what_tells_them():
    import torch
    from research.benchmarks.sheets import Shapes
    from research.pretrain.phones import CLASSES

    rng = torch.Generator().manual_seed(0)
    classes = torch.randint(len(CLASSES), (40,), generator=rng).repeat_interleave(10)
    features = torch.randn(800, 24, generator=rng) + 4 * torch.nn.functional.one_hot(classes, 24).repeat_interleave(
        2, 0
    )
    shapes = Shapes([features[:600]], [classes[:300]])
    assert (shapes(features[600:]) == classes[300:]).double().mean() > 0.85
