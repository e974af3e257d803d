"""The command line is the config tree: each value has a flag, and the flag reaches the work."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import hicode.training.avatar
from hicode import cli
from hicode.training.stages import DEFAULT_PRESET, head_preset


@pytest.fixture
def trained(monkeypatch):
    """What `train` was called with."""
    calls = []
    monkeypatch.setattr(hicode.training.avatar, "train", lambda clip, out, config: calls.append((clip, out, config)))
    return calls


def test_a_value_of_the_tree_reaches_training(trained):
    assert cli.main("train me.clip -o me.hicode --head.rates.means 5e-4 --head.deformation.channels 8".split()) == 0
    clip, out, config = trained[0]
    assert (clip, out) == (Path("me.clip"), Path("me.hicode"))
    head, expected = config.head_config(), head_preset(DEFAULT_PRESET)
    assert head.rates.means == 5e-4 and head.deformation.channels == 8
    assert head.rates.colors == expected.rates.colors and head.stages == expected.stages


@pytest.mark.parametrize("preset", ["draft", "standard", "paper"])
@pytest.mark.parametrize("form", ["--preset {}", "--preset={}"])
def test_a_preset_gives_the_defaults_of_the_other_flags(preset, form, trained):
    assert cli.main(["train", "a.clip", "-o", "a.hicode", *form.format(preset).split(), "--head.gaussians", "77"]) == 0
    config = trained[0][2]
    assert config.preset == preset and config.head_config().gaussians == 77
    assert config.head_config().stages == head_preset(preset).stages


def test_train_and_make_have_one_default_preset(trained, monkeypatch):
    import hicode.demo

    made = []
    monkeypatch.setattr(hicode.demo, "make", lambda video, audio, out, config: made.append(config))
    assert cli.main("train a.clip -o a.hicode".split()) == 0
    assert cli.main("make a.mp4 a.wav -o b.mp4 --duration 8 --speak.region head --head.gaussians 9".split()) == 0
    assert trained[0][2].preset == made[0].train.preset == DEFAULT_PRESET
    assert made[0].prepare.duration == 8 and made[0].speak.region == "head" and made[0].train.head.gaussians == 9


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("prepare", ["--size", "--max-missing"]),
        ("train", ["--head.rates.means", "--head.density.budget", "--head.loss.ssim", "--preset", "--seed"]),
        ("speak", ["--region", "--no-rest", "--still", "--seed", "--original-size", "--device"]),
        ("evaluate", ["--json", "--html", "--region", "--syncnet", "--resize"]),
        ("make", ["--duration", "--preset", "--head.rates.means", "--speak.region", "--work"]),
        ("reproduce", ["--preset", "--seeds", "--rows", "--iterations-scale", "--ray", "--check"]),
        ("pretrain", ["--cache", "--sources", "--sync-out", "--voice-activity-out", "--steps"]),
    ],
)
def test_help_names_the_flags(command, flags, capsys):
    assert cli.main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert not [flag for flag in flags if flag not in said]


def test_the_next_step_is_said(trained, capsys, monkeypatch):
    monkeypatch.setattr(hicode.training.avatar, "train", lambda *_: SimpleNamespace())
    assert cli.main("train a.clip -o a.hicode".split()) == 0
    assert "hicode speak a.hicode" in capsys.readouterr().out
