"""The refinement of training poses: a row per frame, with its own count of steps."""

import torch

from hicode.training.checkpoint import PoseRefinement


def test_a_step_changes_its_row_alone_and_each_row_has_its_own_count():
    """Adam's first steps have the length of the rate, whatever the gradient."""
    poses = PoseRefinement.zeros(3)
    gradient = torch.zeros(4, 4)
    gradient[:2, 3] = torch.tensor([4.0, -0.5])  # of the translation
    for k, expected in ((1, [-0.1, 0.1]), (1, [-0.2, 0.2]), (2, [-0.1, 0.1])):
        poses.step(k, torch.eye(4), gradient, 0.1)
        torch.testing.assert_close(poses.delta[k, 3:5], torch.tensor(expected))
    assert not poses.delta[0].any() and poses.visits.tolist() == [0, 2, 1]


def test_a_refinement_moves_the_head_in_its_own_frame():
    poses = PoseRefinement.zeros(1)
    poses.delta[0, 3] = 0.5
    tracked = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    tracked[:3, 3] = torch.tensor([0.1, 0.2, 9.0])
    refined = poses.apply(0, tracked)
    torch.testing.assert_close(refined[:3, 3], torch.tensor([0.6, 0.2, 9.0]))
