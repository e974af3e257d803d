"""A sweep: many independent tasks, run one after the other or on Ray, on one machine or many.

A task is a module's function with one argument that can be pickled. It leaves its result in a shared folder. It may be
called again at any time: it goes on from what is done. So no result is held here. A killed driver loses none, and the
task of a dead worker goes to another worker.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hicode.errors import HicodeError, InputError
from hicode.runtime import cores

ANSWER_SECONDS = 20.0  # a cluster that has not answered by then counts as absent
ATTEMPTS = 3  # times that a task is begun whose worker dies
POLL_SECONDS = 1.0
OBJECT_STORE_BYTES = 100 << 20


@dataclass(frozen=True)
class Task:
    """`work(argument)`, to be called after the tasks named in `after`. `key` names it in reports."""

    key: str
    work: Callable[[Any], None]
    argument: Any
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class SweepConfig:
    """Where tasks run.

    ray      None: here, one after the other, in the order given. "local": processes of this machine. Otherwise a
             cluster's address: "HOST:PORT", "ray://HOST:PORT", or "auto" for the cluster this machine belongs to
    workers  with "local": number of processes; by default as many as there are cores for
    cpus     cores per task, on Ray
    """

    ray: str | None = None
    workers: int | None = None
    cpus: int = 1


def execute(
    tasks: Sequence[Task],
    done: Callable[[str], None] = lambda key: None,
    failed: Callable[[str, str], None] = lambda key, reason: None,
    config: SweepConfig = SweepConfig(),
) -> None:
    """Run every task. `done(key)` or `failed(key, reason)` is called in this process as each ends.

    A task that raises a HicodeError has failed. The tasks that wait for it fail too; the others go on. Any other
    exception is a defect and is raised. Raises InputError if Ray is not installed or the address does not answer.
    """
    seen: set[str] = set()
    for task in tasks:
        assert task.key not in seen, f"two tasks are called {task.key}"
        assert seen.issuperset(task.after), f"{task.key} comes before one that it waits for: {task.after}"
        seen.add(task.key)
    if config.ray is None:
        _serially(tasks, done, failed)
    else:
        _on_ray(tasks, done, failed, config)


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


def _on_ray(tasks: Sequence[Task], done, failed, config: SweepConfig) -> None:
    with _cluster(config) as ray:
        # Retries are for workers that die (killed, out of memory, machine lost). A HicodeError would come again.
        remote = ray.remote(num_cpus=config.cpus, max_retries=ATTEMPTS - 1, retry_exceptions=False)(_call)
        dead, waiting, running, ended = ray.exceptions, list(tasks), {}, {}

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
                except (dead.WorkerCrashedError, dead.NodeDiedError, dead.OutOfMemoryError) as error:
                    died = f"its worker died {ATTEMPTS} times ({type(error).__name__})"
                    why = f"{died}. Look for lack of memory, and run the command again."
                end(task, why)


def _call(work: Callable[[Any], None], argument: Any) -> str | None:
    """What a worker runs. Returns None, or why the task failed."""
    try:
        work(argument)
    except HicodeError as error:
        return str(error)
    return None


@contextmanager
def _cluster(config: SweepConfig) -> Iterator:
    """Ray, connected. At the end a local one stops, a cluster stays."""
    # Ray reports its use to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default Ray's workers run at nice 15. Their frames per second would depend on other work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed. Install it (pip install 'hicode[cluster]'), or leave --ray out to run on this "
            "machine."
        ) from error
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    assert config.ray is not None
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if config.ray == "local":
        slots = (config.workers or max(1, cores() // config.cpus)) * config.cpus
        # Almost nothing is sent through Ray. By default it would reserve a third of the memory.
        ray.init(
            address="local", num_cpus=slots, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet
        )
    else:
        check_address(config.ray)
        ray.init(address=config.ray, **quiet)
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own ends the process, without what is to be said and cleaned
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raise InputError, within 30 seconds, if no Ray cluster answers at the address.

    Ray itself waits for minutes on a silent address. So the port is tried first, then a connection by another process,
    which can be stopped.
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
