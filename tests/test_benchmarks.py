"""The gate of the benchmarks: it says what got slower, and nothing else."""

import json
import sys

import pytest

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY))
main = pytest.importorskip("benchmarks.__main__", reason="benchmarks/ is not beside the tests")


@pytest.fixture
def work(monkeypatch, tmp_path):
    """One case whose cost the test sets; a baseline of its own."""
    cost = {"loops": 20_000}

    def busy():
        sum(i * i for i in range(cost["loops"]))

    monkeypatch.setattr(main, "CASES", {"busy": lambda: {"busy loop": busy}, "absent": _absent})
    monkeypatch.setattr(main, "BASELINE", tmp_path / "baseline.json")
    return cost


def _absent():
    raise main.Skipped("nothing here to measure")


def test_the_gate_names_what_got_slower_and_fails(work, capsys):
    assert main.main(["--save"]) == 0
    assert main.main([]) == 0 and "Slower: nothing" in capsys.readouterr().out
    work["loops"] *= 4
    assert main.main([]) == 1 and "Slower: busy loop" in capsys.readouterr().out
    work["loops"] //= 16
    assert main.main([]) == 0


def test_costs_are_compared_in_units_of_the_machines_speed(work):
    main.main(["--save"])
    baseline = json.loads(main.BASELINE.read_text())
    known = baseline["cost"]["busy loop"]
    assert main.slower({"busy loop": {"ms": 10 * known["ms"], "units": known["units"]}}, baseline["cost"]) == []  # a slow machine
    assert main.slower({"busy loop": {"ms": known["ms"], "units": 2 * known["units"]}}, baseline["cost"]) == ["busy loop"]
    assert main.slower({"new": {"ms": 1, "units": 1}}, baseline["cost"]) == []


def test_what_cannot_be_measured_here_is_said(work, capsys):
    main.main([])
    assert "absent: skipped, nothing here to measure" in capsys.readouterr().out


def test_saving_some_keeps_the_others(work):
    main.BASELINE.write_text(json.dumps({"cost": {"other": {"ms": 1, "units": 2}}}))
    main.main(["busy", "--save"])
    assert set(json.loads(main.BASELINE.read_text())["cost"]) == {"other", "busy loop"}


def test_the_committed_baseline_knows_every_part():
    cost = json.loads((REPOSITORY / "benchmarks" / "baseline.json").read_text())["cost"]
    for name in ("raster both", "control 4096 both", "loss L1+SSIM", "loss VGG crop", "step draft", "speak all", "prepare"):
        assert cost[name]["units"] > 0
