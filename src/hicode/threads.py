"""Threads: one small pool of Python threads that all compiled kernels share, and pools for work in whole frames.

Kernels that hold no lock take pieces of work from a counter until none is left, so a busy core costs little. Numba's
parallel loops are not used: they bring a second OpenMP runtime, whose waiting threads and torch's spin against each
other.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
_shared: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by the number of threads, and the number of torch's in each
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
    return _shared_pool(torch.get_num_threads(), 1)


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of each of a few items, all at once, each on its share of torch's threads; what it raises is raised."""
    threads = torch.get_num_threads()
    if threads < len(items) or len(items) < 2:
        return [work(item) for item in items]
    return list(_shared_pool(len(items), threads // len(items)).map(work, items))


def _shared_pool(count: int, each: int) -> ThreadPoolExecutor:
    with _lock:
        if (count, each) not in _shared:
            _shared[count, each] = _make_pool(count, each)
        return _shared[count, each]


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


def _make_pool(count: int, each: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, on each of which torch uses `each`."""
    pool, own = ThreadPoolExecutor(count, thread_name_prefix="hicode-frame"), torch.get_num_threads()
    together = threading.Barrier(count)

    def limit() -> None:
        torch.get_num_threads()  # a thread takes the inherited number when it first asks, whatever was set before
        torch.set_num_threads(each)
        together.wait()  # so that each thread is told once

    for started in [pool.submit(limit) for _ in range(count)]:
        started.result()
    # The number is each thread's own, but threads to come inherit the one that was set last.
    torch.set_num_threads(own)
    return pool


def _forget() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()
    _shared.clear()


# a forked child has the pool's bookkeeping but none of its threads, and would wait for ever
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
