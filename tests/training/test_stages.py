"""Presets and ablations."""

from dataclasses import replace

import pytest
from research.reproduce.ablations import ABLATIONS

from hicode.training.stages import HeadConfig, head_preset


@pytest.mark.parametrize("preset", ["draft", "standard", "paper"])
def test_presets_are_the_papers_three_stages(preset):
    config = head_preset(preset)
    rules = [(s.name, s.deform, s.density) for s in config.stages]
    assert rules == [("initialise", False, True), ("deform", True, True), ("refine", True, False)]
    assert sum(s.iterations for s in config.stages) == config.iterations


def test_an_iteration_belongs_to_one_stage():
    config = HeadConfig(initialise=2, deform=1, refine=3)
    places = [(stage.name, index) for stage, index in map(config.stage_at, range(6))]
    assert places == [("initialise", 0), ("initialise", 1), ("deform", 0), ("refine", 0), ("refine", 1), ("refine", 2)]
    assert config.scaled(0.1).iterations == 3, "no stage vanishes"


def test_the_paper_preset_is_the_papers_schedule_network_and_loss():
    config = head_preset("paper")
    assert [s.iterations for s in config.stages] == [3000, 2000, 15000]
    network, rates = config.deformation, config.rates
    assert network.anchors == 0 and not network.rig and network.attention == "learned" and not network.color_offset
    assert network.attention_reaches == () and network.expression_reach == 0 and network.position_gradient
    assert rates.pose == rates.view_dependent_color == rates.network_decay == config.loss.depth_distortion == 0
    assert config.init_frames == 1 and config.mouth_gaussians == 0 and config.loss.wing > 0


def test_ablations_differ_in_control_alone():
    base = head_preset("draft")
    for name, ablation in ABLATIONS.items():
        changed = ablation.apply(base)
        assert (changed.stages, changed.loss, changed.density, changed.seed) == (
            base.stages, base.loss, base.density, base.seed
        ), name  # fmt: skip
    assert ABLATIONS["mesh"].apply(base) == base, "the product"
    rig = ABLATIONS["rig"].apply(base)
    assert rig.deformation.control == "none" and rig.deformation.rig and rig.rates.view_dependent_color > 0
    learned = ABLATIONS["learned-attention"].apply(base)
    assert learned.deformation == replace(base.deformation, attention="learned", attention_reaches=())
    full = ABLATIONS["full"].apply(base)
    assert not full.deformation.rig and full.rates.view_dependent_color == 0 and not full.deformation.color_offset
