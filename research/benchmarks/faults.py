"""Faults on purpose: commands are killed, the disk fills up, memory is limited. What stays, and does a rerun mend it?

    python -m research.benchmarks.faults VIDEO SOUND --work FOLDER -o docs/results/faults.json [--kills 50]

Every trial runs a command that goes through all stages (a clip of 2.2 s, a tiny training, 2 s of speech), disturbs it,
runs it again and compares with an undisturbed run: the same files, the same contents. Outcomes lie in
FOLDER/outcomes.jsonl; a run that was stopped goes on there. Needs Linux; as root, for the disk and memory trials.

- kill: SIGKILL at a moment drawn uniformly over the undisturbed run's processor time.
- rename: SIGKILL just before or after a rename, again and again until a run is through.
- disk: a RAM disk of a size drawn uniformly up to what the command needs; then it grows, and the command runs again.
- memory: a control group with a limit; every run must end well or in one line.
"""

import argparse
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from research.reproduce.docs import save_results

TINY = (
    "--head.initialise 15 --head.deform 15 --head.refine 30 --head.gaussians 1500 --head.mouth-gaussians 100 "
    "--head.checkpoint-seconds 1 --refiner True --refiner-training.steps 20 --refiner-training.crop-px 64 "
    "--refiner-training.batch 1 --consent nobody"
).split()
ITERATIONS = 60
DISK_TRIALS, RENAME_RUNS = 8, 60
LONGEST_S = 600  # of the processor; six times as long by the clock, as others may hold the machine
MEMORY_MB = (400, 600, 800, 1000, 1300, 1700)
TICKS = os.sysconf("SC_CLK_TCK")
CGROUP = Path("/sys/fs/cgroup/memory/hicode-faults")


@dataclass(frozen=True)
class World:
    """Inputs of the commands and the folder of all that is made."""

    video: Path
    sound: Path
    work: Path

    def arguments(self, command: str, folder: Path) -> list[str]:
        """The command line that writes into `folder`."""
        if command == "prepare":
            return ["prepare", str(self.video), "-o", f"{folder}/a.clip", "--duration", "2.2", "--size", "128"]
        if command == "train":
            return ["train", f"{self.work}/prepare/a.clip", "-o", f"{folder}/a.hicode", *TINY]
        return ["speak", f"{self.work}/train/a.hicode", str(self.sound), "-o", f"{folder}/a.mp4"]


@dataclass
class Ended:
    """A run: exit status (None: killed), processor seconds, what it printed, processor seconds at each iteration."""

    status: int | None
    cpu_s: float
    printed: str
    iterations_s: np.ndarray


@dataclass
class Outcome:
    """A trial. `problems` is empty where the fault did no harm."""

    fault: str
    command: str
    number: int
    disturbed: bool = True
    refused: bool = False
    repeated_cpu_s: float = 0.0
    lost_s: float | None = None
    problems: list[str] = field(default_factory=list)


# ---- running a command ----


def run(arguments: list[str], folder: Path, kill_at_s: float | None = None, rename: tuple[int, bool] | None = None):
    """Run a command in a fork of this process, which has all modules imported.

    `kill_at_s`: processor seconds after which it is killed. `rename`: it kills itself at the n-th one, before or after.
    """
    shared = mmap.mmap(-1, 8 * (ITERATIONS + 1))
    times = np.frombuffer(shared, np.float64)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _child(arguments, folder, times, rename)
    started_s, status, cpu_s = time.monotonic(), None, 0.0
    waited_s = lambda: time.monotonic() - started_s
    while True:
        done, code, usage = os.wait4(child, os.WNOHANG)
        if done:
            status = None if os.WIFSIGNALED(code) else os.waitstatus_to_exitcode(code)
            cpu_s = usage.ru_utime + usage.ru_stime
            break
        with open(f"/proc/{child}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
        spent_s = (int(fields[11]) + int(fields[12])) / TICKS
        if (kill_at_s is not None and spent_s >= kill_at_s) or max(spent_s, waited_s() / 6) > LONGEST_S:
            os.kill(child, signal.SIGKILL)
            kill_at_s = None
        time.sleep(0.004)
    return Ended(status, cpu_s, (folder.parent / "printed.txt").read_text(), times.copy())


def _child(arguments: list[str], folder: Path, times: np.ndarray, rename: tuple[int, bool] | None) -> None:
    """The command, in the forked process; never returns."""
    from hicode import cli

    status = 99
    try:
        _confine(folder)
        printed = os.open(folder.parent / "printed.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        _clock_iterations(times)
        if rename is not None:
            _die_at_rename(*rename)
        status = cli.main(arguments)
    except BaseException as error:
        print(f"TRACEBACK {type(error).__name__}: {error}", flush=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _confine(folder: Path) -> None:
    """Temporary files and the signing key go into the trial's folder too."""
    import tempfile

    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"], os.environ["HICODE_CONFIG"] = str(folder / "tmp"), str(folder / "config")
    tempfile.tempdir = None


def _clock_iterations(times: np.ndarray) -> None:
    from hicode.training import head

    step = head.train_step

    def clocked(state, *rest):
        scalars = step(state, *rest)
        times[state.iteration] = time.process_time()
        return scalars

    head.train_step = clocked


def _die_at_rename(number: int, before: bool) -> None:
    count = 0

    def dying(rename: Callable) -> Callable:
        def renamed(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*args, **kwargs)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        return renamed

    os.replace, os.rename = dying(os.replace), dying(os.rename)


# ---- what a run left ----


def names(folder: Path) -> list[str]:
    """Files and folders below, without the numbers of TensorBoard's."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    return sorted({"tensorboard" if "tensorboard" in name else name for name in found})


def contents(command: str, folder: Path) -> dict[str, str]:
    """Hashes of the results, without what differs between equal runs (dates, durations, signatures)."""
    if command == "prepare":
        clip = folder / "a.clip"
        files = sorted(p for p in clip.rglob("*") if p.is_file() and p.name != "clip.json")
        found = {str(p.relative_to(clip)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        state = json.loads((clip / "clip.json").read_text())
        for record in (state, *state["steps"].values()):
            record.pop("checksum" if record is state else "seconds")
        return found | {"clip.json": json.dumps(state, sort_keys=True)}
    if command == "train":
        from hicode.avatar.avatar import SCHEMA, VERSION, Avatar
        from hicode.files import load_tensors

        Avatar.load(folder / "a.hicode")
        tensors, _ = load_tensors(folder / "a.hicode", SCHEMA, VERSION)
        return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}
    import av

    with av.open(f"file:{folder}/a.mp4") as video:
        digest = hashlib.sha256()
        for packet in video.demux():
            digest.update(bytes(packet))
    return {"packets": digest.hexdigest()}


def result_of(command: str, folder: Path) -> Path:
    """The file by which a finished run is known."""
    return folder / {"prepare": "a.clip/clip.json", "train": "a.hicode", "speak": "a.mp4"}[command]


class Reference:
    """The undisturbed run of a command."""

    def __init__(self, world: World, command: str):
        self.command, self.world, self.folder = command, world, world.work / command
        file = world.work / f"{command}.json"
        if not file.exists():
            for _ in range(2):  # the first one compiles
                shutil.rmtree(self.folder, ignore_errors=True)
                ended = run(world.arguments(command, self.folder), self.folder)
                assert ended.status == 0, ended.printed
            again = run(world.arguments(command, self.folder), self.folder)
            assert again.status == 0, again.printed
            file.write_text(json.dumps({"cpu_s": ended.cpu_s, "again_cpu_s": again.cpu_s}))
        figures = json.loads(file.read_text())
        self.cpu_s: float = figures["cpu_s"]
        self.again_cpu_s: float = figures["again_cpu_s"]  # of a run that finds everything done
        self.names, self.contents = names(self.folder), contents(command, self.folder)

    def compare(self, folder: Path) -> list[str]:
        """How a folder differs from the undisturbed one."""
        there = names(folder)
        problems = [f"left: {name}" for name in there if name not in self.names]
        problems += [f"missing: {name}" for name in self.names if name not in there]
        try:
            found = contents(self.command, folder)
        except Exception as error:
            return [*problems, f"does not load: {error}"]
        return problems + [f"differs: {k}" for k in self.contents if found.get(k) != self.contents[k]][:3]

    def finish(self, outcome: Outcome, folder: Path, first: Ended) -> Outcome:
        """Run again after a fault, and note what is wrong then."""
        result = result_of(self.command, folder)
        if self.command != "prepare" and result.exists() and first.status != 0:
            outcome.problems += [f"half: {p}" for p in self.compare(folder) if not p.startswith(("left", "missing"))]
        second = run(self.world.arguments(self.command, folder), folder)
        if second.status != 0:
            outcome.problems.append(f"next run: {second.printed.strip().splitlines()[-1:]}")
        else:
            outcome.problems += self.compare(folder)
        repeated = first.cpu_s + second.cpu_s - self.cpu_s - (self.again_cpu_s if self.command == "prepare" else 0)
        outcome.repeated_cpu_s = round(max(repeated, 0.0), 2)
        return outcome


# ---- faults ----


def kill_trial(reference: Reference, number: int, seed: int) -> Outcome:
    """Killed at a random moment."""
    folder = fresh(reference.world.work / "trial")
    outcome = Outcome("kill", reference.command, number)
    moment_s = random.Random(f"{seed} {reference.command} {number}").uniform(0, reference.cpu_s)
    first = run(reference.world.arguments(reference.command, folder), folder, moment_s)
    outcome.disturbed = first.status is None
    if reference.command == "train":
        outcome.lost_s = lost_seconds(first, folder / "runs/a/head.safetensors")
    return reference.finish(outcome, folder, first)


def lost_seconds(killed: Ended, checkpoint: Path) -> float | None:
    """Processor seconds of head training that the checkpoint lacks; None where the head was not in training."""
    from hicode.files import load_tensors
    from hicode.training.checkpoint import SCHEMA, VERSION

    done = int(np.count_nonzero(killed.iterations_s))
    if done == 0 or done == ITERATIONS or killed.status is not None:
        return None
    kept = load_tensors(checkpoint, SCHEMA, VERSION)[1]["iteration"] if checkpoint.exists() else 0
    since = killed.iterations_s[kept] if kept else killed.iterations_s[1]
    return round(killed.cpu_s - float(since), 2)


def rename_trial(reference: Reference, number: int, seed: int) -> Outcome:
    """Killed at renames until a run is through; counted as one trial with `number` kills."""
    folder, draw = fresh(reference.world.work / "trial"), random.Random(f"{seed} rename {reference.command}")
    outcome, cpu_s = Outcome("rename", reference.command, 0), 0.0
    for _ in range(RENAME_RUNS):
        rename = draw.randint(1, 4), draw.random() < 0.5
        ended = run(reference.world.arguments(reference.command, folder), folder, rename=rename)
        cpu_s += ended.cpu_s
        if ended.status is not None:
            break
        outcome.number += 1
    ended.cpu_s = cpu_s
    if ended.status not in (0, None):
        outcome.problems.append(f"a run: {ended.printed.strip().splitlines()[-1:]}")
    return reference.finish(outcome, folder, ended)


def disk_trial(reference: Reference, number: int, seed: int) -> Outcome:
    """A disk that is too small, then large enough."""
    need = sum(p.stat().st_size for p in reference.folder.rglob("*") if p.is_file())
    size = random.Random(f"{seed} disk {reference.command} {number}").uniform(0.01, 1.1) * need
    outcome = Outcome("disk", reference.command, number)
    with ram_disk(fresh(reference.world.work / "disk"), round(size)) as disk:
        folder = disk / "trial"
        first = run(reference.world.arguments(reference.command, folder), folder)
        outcome.disturbed = first.status != 0
        outcome.refused = one_line(first, outcome)
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        return reference.finish(outcome, folder, first)


def memory_trial(reference: Reference, megabytes: int, seed: int) -> Outcome:
    """A control group with so much memory: honoured, or refused in one line."""
    folder = fresh(reference.world.work / "trial")
    outcome = Outcome("memory", reference.command, megabytes)
    CGROUP.mkdir(exist_ok=True)
    (CGROUP / "memory.limit_in_bytes").write_text(str(megabytes << 20))
    (folder / "tmp").mkdir(parents=True)
    environment = os.environ | {"HICODE_CONFIG": str(folder / "config"), "TMPDIR": str(folder / "tmp")}
    enter = lambda: (CGROUP / "tasks").write_text(str(os.getpid()))
    command = [sys.executable, "-m", "hicode", *reference.world.arguments(reference.command, folder)]
    done = subprocess.run(
        command, preexec_fn=enter, env=environment, capture_output=True, text=True, timeout=6 * LONGEST_S
    )
    status = None if done.returncode < 0 else done.returncode
    first = Ended(status, 0.0, done.stdout + done.stderr, np.zeros(0))
    outcome.disturbed = status != 0
    outcome.refused = one_line(first, outcome)
    if status == 0:
        outcome.problems += reference.compare(folder)
    return outcome


def one_line(ended: Ended, outcome: Outcome) -> bool:
    """Whether the run ended in one line of ours; anything else but success is noted as a problem."""
    said = [line for line in ended.printed.splitlines() if line.startswith("hicode: ")]
    if ended.status == 2 and len(said) == 1 and "TRACEBACK" not in ended.printed:
        return True
    if ended.status != 0:
        outcome.problems.append(f"status {ended.status}: {ended.printed.strip().splitlines()[-1:]}")
    return False


@contextmanager
def ram_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of that size."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size_bytes, 8192)}", "tmpfs", str(folder)], check=True)
    (folder / "printed.txt").touch()
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fresh(folder: Path) -> Path:
    """The path of a folder that is not there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


# ---- the table ----


def trials(kills: int) -> list[tuple[str, str, int]]:
    """(fault, command, number), the commands in turn."""
    commands = ("prepare", "train", "speak")
    plan = [("rename", command, 0) for command in commands]
    plan += [("memory", command, size) for size in MEMORY_MB for command in commands]
    for number in range(max(kills, DISK_TRIALS)):
        plan += [("disk", command, number) for command in commands if number < DISK_TRIALS]
        plan += [("kill", command, number) for command in commands if number < kills]
    return plan


def table(outcomes: list[dict]) -> list[list[str]]:
    """Rows for the docs: each fault and command."""
    rows = []
    for fault, command in dict.fromkeys((o["fault"], o["command"]) for o in outcomes):
        mine = [o for o in outcomes if (o["fault"], o["command"]) == (fault, command)]
        hit = [o for o in mine if o["disturbed"]]
        count = sum(o["number"] for o in mine) if fault == "rename" else len(hit)
        repeated = [o["repeated_cpu_s"] for o in hit] if fault == "kill" else []
        lost = [o["lost_s"] for o in hit if o["lost_s"] is not None]
        seconds = f"{np.median(repeated):.1f}, {max(repeated):.1f}" if repeated else "–"
        checkpoint = f"{max(lost):.1f}" if lost else "–"
        bad = Counter(problem.split(":")[0] for o in mine for problem in o["problems"])
        refused = str(sum(o["refused"] for o in mine)) if fault in ("disk", "memory") else "–"
        problems = ", ".join(f"{n} {what}" for what, n in bad.items()) or "none"
        rows.append([fault, command, str(len(mine)), str(count), refused, seconds, checkpoint, problems])
    return rows


COLUMNS = (
    "fault", "command", "trials", "disturbed", "refused in one line", "work done twice: median, most (s of a core)",
    "head training lost, most (s; checkpoints each 1 s)", "damage, differences, leftovers after the next run",
)  # fmt: skip


def main() -> None:
    """Run the trials that are not yet done, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("sound", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6)
    options = parser.parse_args()
    import hicode.preparation.pipeline, hicode.session.speak, hicode.training.avatar, torch.utils.tensorboard  # noqa: E401, F401, I001

    started = time.monotonic()
    world = World(options.video.resolve(), options.sound.resolve(), options.work.resolve())
    world.work.mkdir(parents=True, exist_ok=True)
    log = world.work / "outcomes.jsonl"
    outcomes = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {tuple(o["trial"]) for o in outcomes}
    references = {command: Reference(world, command) for command in ("prepare", "train", "speak")}
    run_trial = {"kill": kill_trial, "rename": rename_trial, "disk": disk_trial, "memory": memory_trial}
    for trial in trials(options.kills):
        if trial in done or time.monotonic() - started > 60 * options.minutes:
            continue
        fault, command, number = trial
        outcome = asdict(run_trial[fault](references[command], number, options.seed)) | {"trial": trial}
        outcomes.append(outcome)
        with log.open("a") as f:
            f.write(json.dumps(outcome) + "\n")
        print(
            trial, outcome["disturbed"], outcome["refused"], outcome["repeated_cpu_s"], outcome["problems"], flush=True
        )
    save_results(options.out, COLUMNS, table(outcomes), "python -m research.benchmarks.faults VIDEO SOUND")


if __name__ == "__main__":
    main()
