"""Threads: one small pool of Python threads that all compiled kernels share, and pools for work in whole frames.

Kernels that hold no lock take pieces of work from a counter until none is left, so a busy core costs little. Numba's
parallel loops are not used: they bring a second OpenMP runtime, whose waiting threads and torch's spin against each
other.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

Item = TypeVar("Item")
Result = TypeVar("Result")

_pool: ThreadPoolExecutor | None = None
_frames: tuple[int, ThreadPoolExecutor] | None = None  # threads, pool
_lock = threading.Lock()


@intrinsic
def take(typing, counter):
    """counter[0], which grows by one: the next piece of work, given to exactly one thread."""

    def build(context, builder, sig, args):
        pointer = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), build


def run_on_threads(kernel, pieces: int, *arguments) -> None:
    """Run `kernel(counter, *arguments)`, compiled with nogil, on as many threads as torch uses.

    Each takes pieces from the counter until none is left.
    """
    global _pool
    helpers = min(torch.get_num_threads(), pieces) - 1
    counter = np.zeros(1, np.int64)
    if helpers <= 0:
        kernel(counter, *arguments)
        return
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(thread_name_prefix="hicode")
    waiting = [_pool.submit(kernel, counter, *arguments) for _ in range(helpers)]
    kernel(counter, *arguments)
    for helper in waiting:
        helper.result()


def frame_pool() -> ThreadPoolExecutor:
    """The pool for work whose pieces are whole frames: as many threads as torch uses here, one pool for the process.

    A frame a thread keeps all cores busy. A frame on all threads leaves them waiting for each other in every small
    step, so each of the pool's threads runs torch and kernels alone. Nobody shuts the pool down. After
    `torch.set_num_threads` with another number, the next call makes another pool.
    """
    global _frames
    count = torch.get_num_threads()
    with _lock:
        if _frames is None or _frames[0] != count:
            if _frames is not None:
                _frames[1].shutdown(wait=False)
            _frames = count, _make_frame_pool(count)
        return _frames[1]


def map_frames(work: Callable[[Item], Result], frames: Iterable[Item]) -> Iterator[Result]:
    """`work` of each frame, in order, on the frame pool; so few frames ahead of the reader that memory stays small.

    Several frames are worked on at once, so `work` keeps no state. What it raises is raised here.
    """
    pool, waiting = frame_pool(), deque[Future[Result]]()
    most = 2 * torch.get_num_threads()
    try:
        for frame in frames:
            waiting.append(pool.submit(work, frame))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _make_frame_pool(count: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(count, thread_name_prefix="hicode-frame")
    together = threading.Barrier(count)

    def alone() -> None:
        torch.get_num_threads()  # a thread takes the inherited number when it first asks, whatever was set before
        torch.set_num_threads(1)
        together.wait()  # so that each thread is told once

    for started in [pool.submit(alone) for _ in range(count)]:
        started.result()
    # The number is each thread's own, but threads to come inherit the one that was set last.
    torch.set_num_threads(count)
    return pool


def _forget() -> None:
    global _pool, _frames, _lock
    _pool, _frames, _lock = None, None, threading.Lock()


if hasattr(
    os, "register_at_fork"
):  # a forked child has the pool's bookkeeping but none of its threads, and would wait for ever
    os.register_at_fork(after_in_child=_forget)
