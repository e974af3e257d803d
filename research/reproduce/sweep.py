"""A sweep: many independent tasks, run one after the other or on Ray, on one machine or many.

A task is a function of a module, called with one argument that can be pickled, that leaves its result in a shared folder and may be called
again at any time: it finds what is done and goes on from there. So nothing here holds a result: a driver that is killed loses none, and a
worker that dies has its task given to another.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hicode.errors import HicodeError, InputError
from hicode.runtime import cores

ANSWER_SECONDS = 20.0  # a cluster that has not answered by then counts as absent
POLL_SECONDS = 1.0
OBJECT_STORE_BYTES = 100 << 20


@dataclass(frozen=True)
class Task:
    """`work(argument)`, once the tasks with the keys in `after` are done. `key` names it in what is reported."""

    key: str
    work: Callable[[Any], None]
    argument: Any
    after: tuple[str, ...] = ()


def execute(
    tasks: Sequence[Task],
    done: Callable[[str], None] = lambda key: None,
    failed: Callable[[str, str], None] = lambda key, why: None,
    *,
    ray: str | None = None,
    workers: int | None = None,
    cpus: int = 1,
    attempts: int = 3,
) -> None:
    """Run every task; `done(key)` and `failed(key, why)` are called as they end, in this process.

    ray       None: one after the other, here, in the order given. "local": on processes of this machine. Else a cluster's address ("HOST:PORT",
              "ray://HOST:PORT", or "auto" for the one that this machine belongs to)
    workers   with "local": processes; as many as there are cores for if not given
    cpus      cores that a task is given by Ray
    attempts  how often a task is begun whose worker dies

    A task that raises a HicodeError has failed, and what comes after it fails with it; the others go on. Any other exception is a defect and is
    raised. InputError where Ray is not installed or the address does not answer.
    """
    seen: set[str] = set()
    for task in tasks:
        assert task.key not in seen, f"two tasks are called {task.key}"
        assert seen.issuperset(task.after), f"{task.key} comes before one that it waits for: {task.after}"
        seen.add(task.key)
    if ray is None:
        _serially(tasks, done, failed)
    else:
        _on_ray(tasks, done, failed, ray, workers, cpus, attempts)


def _serially(tasks: Sequence[Task], done, failed) -> None:
    ended: dict[str, str | None] = {}  # None: done; else why not
    for task in tasks:
        why = next((ended[k] for k in task.after if ended[k] is not None), None)
        if why is None:
            try:
                task.work(task.argument)
            except HicodeError as error:
                why = str(error)
        ended[task.key] = why
        done(task.key) if why is None else failed(task.key, why)


def _on_ray(tasks: Sequence[Task], done, failed, address: str, workers: int | None, cpus: int, attempts: int) -> None:
    with _cluster(address, workers, cpus) as ray:
        # The retries are for workers that die (killed, out of memory, machine lost). A HicodeError would come again, so it is not retried.
        remote = ray.remote(num_cpus=cpus, max_retries=attempts - 1, retry_exceptions=False)(_call)
        waiting, running, ended = list(tasks), {}, {}

        def end(task: Task, why: str | None) -> None:
            ended[task.key] = why
            done(task.key) if why is None else failed(task.key, why)

        while waiting or running:
            still = []
            for task in waiting:
                if not all(k in ended for k in task.after):
                    still.append(task)
                elif (why := next((ended[k] for k in task.after if ended[k] is not None), None)) is not None:
                    end(task, why)
                else:
                    running[remote.options(name=task.key).remote(task.work, task.argument)] = task
            waiting = still
            if not running:
                continue
            ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            for reference in ready:
                task = running.pop(reference)
                try:
                    why = ray.get(reference)
                except (
                    ray.exceptions.WorkerCrashedError,
                    ray.exceptions.NodeDiedError,
                    ray.exceptions.OutOfMemoryError,
                ) as error:
                    why = f"its worker died {attempts} times ({type(error).__name__}). Look for lack of memory, and run the command again."
                end(task, why)


def _call(work: Callable[[Any], None], argument: Any) -> str | None:
    """What a worker does: None, or why the task failed."""
    try:
        work(argument)
    except HicodeError as error:
        return str(error)
    return None


@contextmanager
def _cluster(address: str, workers: int | None, cpus: int) -> Iterator:
    """Ray, connected. Left as it was found: a local one ends, a cluster stays."""
    # Ray reports its use to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its workers step back behind everything else on the machine (nice 15): their frames a second would be those of an idle moment.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed. Install it (pip install 'hicode[cluster]'), or leave --ray out to run on this machine."
        ) from error
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        slots = (workers or max(1, cores() // cpus)) * cpus
        # Next to nothing is sent through Ray: its usual third of the memory is better left to the cells.
        ray.init(
            address="local", num_cpus=slots, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet
        )
    else:
        check_address(address)
        ray.init(address=address, **quiet)
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """InputError, within 30 seconds, where no Ray cluster answers at the address.

    Ray itself waits for minutes on a silent address. So the port is tried first, then a connection by another process, which can be ended.
    """
    place = address.removeprefix("ray://")
    remedy = "Check it (ray status), or use --ray local."
    if address != "auto":
        host, _, port = place.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"{address!r} is no cluster address. Give HOST:PORT, ray://HOST:PORT, auto or local.")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise InputError(f"No Ray cluster answers at {address} ({error}). {remedy}") from error
    probe = f"import ray; ray.init(address={address!r}, log_to_driver=False, logging_level='ERROR')"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"No Ray cluster answers at {address} within {ANSWER_SECONDS:.0f} s. {remedy}") from error
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"The Ray cluster at {address} cannot be joined: {said[:200]} {remedy}")
