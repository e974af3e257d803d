"""Threads: pieces of work are done once, and frame threads keep torch to themselves."""

import numpy as np
import pytest
import torch
from numba import njit

from hicode.threads import frame_pool, run_on_threads, take


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@njit(nogil=True)
def _mark(counter, done):
    piece = take(counter)
    while piece < done.shape[0]:
        done[piece] += 1
        piece = take(counter)


def test_each_piece_is_done_once(threads):
    done = np.zeros(1000, np.int64)
    run_on_threads(_mark, len(done), done)
    assert (done == 1).all()


def test_a_frame_thread_runs_torch_alone_and_the_caller_keeps_its_threads(threads):
    pool = frame_pool()
    x = torch.randn(500, 500)  # large enough that torch would take more threads, and ask how many there are

    def work(_):
        _ = x @ x
        return torch.get_num_threads()

    assert list(pool.map(work, range(20))) == [1] * 20
    assert torch.get_num_threads() == threads


def test_all_sessions_of_a_process_share_one_pool_of_frame_threads(threads):
    assert frame_pool() is frame_pool()
