"""Density control: what a plan keeps, adds and removes, and that optimiser state goes with it."""

import torch

from hicode.gaussians import gaussians_from_points
from hicode.training.density import DensityConfig, GradientStatistics, apply_plan, plan_density

G = lambda s=0: torch.Generator().manual_seed(s)
CONFIG = DensityConfig(growth=1.0, budget=1000, split_scale=0.05, prune_scale=0.5)


def a_cloud(n=40):
    cloud = gaussians_from_points(
        torch.randn(n, 3, generator=G()), torch.rand(n, 3, generator=G(1)), opacity=0.5, max_scale=0.01
    )
    params = {k: torch.nn.Parameter(v) for k, v in cloud.tensors().items()}
    optimizer = torch.optim.Adam([{"params": [p], "name": k, "lr": 1e-2} for k, p in params.items()])
    sum((p * torch.randn(p.shape, generator=G(2))).sum() for p in params.values()).backward()
    optimizer.step()  # fills the moments
    return params, optimizer


def steep(n, which, value=1.0):
    statistics = GradientStatistics.zeros(n)
    statistics.total[which] = value
    statistics.count += 1
    return statistics


def test_nothing_steep_nothing_faint_changes_nothing():
    params, _ = a_cloud()
    plan = plan_density(params, GradientStatistics.zeros(40), CONFIG, radius=1.0)
    assert not plan.changes and torch.equal(plan.source, torch.arange(40))


def test_small_steep_gaussians_are_cloned_in_place():
    params, optimizer = a_cloud()
    plan = plan_density(params, steep(40, [3, 7]), CONFIG, radius=1.0)
    new = apply_plan(plan, params, optimizer, G())
    assert (plan.cloned, plan.split, plan.pruned) == (2, 0, 0)
    assert torch.equal(new["means"][:40], params["means"]) and torch.equal(new["means"][40:], params["means"][[3, 7]])


def test_large_steep_gaussians_are_split_into_two_smaller_ones():
    params, optimizer = a_cloud()
    with torch.no_grad():
        params["log_scales"][5] = torch.log(torch.tensor(0.1))
    plan = plan_density(params, steep(40, [5]), CONFIG, radius=1.0)
    new = apply_plan(plan, params, optimizer, G())
    assert plan.split == 1 and len(new["means"]) == 41
    assert torch.allclose(new["log_scales"][-2:].exp(), torch.full((2, 3), 0.1 / 1.6), rtol=1e-5)
    assert (new["means"][-2:] - params["means"][5]).norm(dim=1).max() < 5 * 0.1  # drawn from the parent's own Gaussian
    assert not (new["means"] == params["means"][5]).all(1).any()  # the parent is gone


def test_faint_and_huge_gaussians_go():
    params, optimizer = a_cloud()
    with torch.no_grad():
        params["opacity_logits"][1] = -9.0
        params["log_scales"][2, 0] = 0.0
    plan = plan_density(params, GradientStatistics.zeros(40), CONFIG, radius=1.0)
    new = apply_plan(plan, params, optimizer, G())
    assert plan.pruned == 2 and len(new["colors"]) == 38 and not {1, 2} & set(plan.source.tolist())


def test_splitting_preserves_optimizer_state():
    """Kept rows keep Adam's moments, new rows start without; the optimiser goes on with the new parameters."""
    params, optimizer = a_cloud()
    moments = {k: optimizer.state[p]["exp_avg"].clone() for k, p in params.items()}
    plan = plan_density(params, steep(40, [0, 9]), CONFIG, radius=1.0)
    new = apply_plan(plan, params, optimizer, G())
    for name, parameter in new.items():
        moved = optimizer.state[parameter]["exp_avg"]
        assert torch.equal(moved[~plan.fresh], moments[name][plan.source[~plan.fresh]])
        assert torch.count_nonzero(moved[plan.fresh]) == 0
    new["means"].sum().backward()
    before = new["means"].detach().clone()
    optimizer.step()
    assert not torch.equal(before, new["means"])


def test_budget_and_growth_bound_the_cloud_and_the_steepest_win():
    params, _ = a_cloud()
    statistics = steep(40, list(range(40)))
    statistics.total = torch.arange(40.0)
    plan = plan_density(params, statistics, DensityConfig(growth=1.0, budget=43), radius=1.0)
    assert len(plan.source) == 43 and set(plan.source[-3:].tolist()) <= {37, 38, 39}
    assert len(plan_density(params, statistics, DensityConfig(growth=0.05, budget=1000), 1.0).source) == 42


def test_gradient_statistics_are_the_mean_over_renders_that_saw_the_gaussian():
    statistics = GradientStatistics.zeros(2)
    statistics.add(torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([True, False]), width=4, height=2)
    statistics.add(torch.tensor([[0.0, 2], [9, 9]]), torch.tensor([True, False]), width=4, height=2)
    assert statistics.mean().tolist() == [2.0, 0.0]  # px to normalised coordinates: x by 2, y by 1
