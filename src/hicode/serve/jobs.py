"""Learning an avatar as a job: `hicode prepare`, then `hicode train`, each a process; its state lies on disk.

A job is a folder `.jobs/NAME` next to the avatars: the video, the clip, the run, and `job.json`. A server that starts
again marks the jobs that were running as paused. To resume is to run the same commands again: they continue.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from hicode.errors import HicodeError, InputError, ResourceError
from hicode.serve.library import SUFFIX, Library, checked_name

MAX_UPLOAD = 1_000_000_000
CHUNK = 16_000_000
TRAINING = ("--preset", "draft")
"""Options of `hicode train`."""
FIRST_LOOK = "A first look is ready: it talks already, coarsely. See Talk; learning goes on."
MAX_CONSENT = 500  # characters, as hicode.trust.consent has it
KINDS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi")
_PROGRESS = re.compile(r"(?P<stage>[^:]+): (?P<done>\d+) of (?P<total>\d+)(?:, (?P<left>\d+) s left)?")

Status = Literal["uploading", "ready", "running", "paused", "failed", "done"]


@dataclass(frozen=True)
class Job:
    """What the page shows. `left_s`: time left in this stage."""

    name: str
    video: str
    status: Status
    stage: str = ""
    done: int = 0
    total: int = 0
    left_s: int | None = None
    message: str = ""
    consent: str = ""
    report: list[dict] = field(default_factory=list)


class _Stopped(Exception):
    """A command was cancelled, and can be resumed."""


class Jobs:
    """All jobs of one library; one runs at a time."""

    def __init__(self, library: Library):
        self._library, self._folder = library, library.folder / ".jobs"
        self._jobs: dict[str, Job] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task | None = None
        self._changed = asyncio.Condition()
        for file in self._folder.glob("*/job.json"):
            try:
                job = Job(**json.loads(file.read_text()))
            except (ValueError, TypeError):
                continue
            self._jobs[job.name] = replace(job, status="paused") if job.status == "running" else job

    def all(self) -> list[Job]:
        """By name."""
        return [self._jobs[name] for name in sorted(self._jobs)]

    def get(self, name: object) -> Job:
        """InputError where there is none."""
        if not isinstance(name, str) or name not in self._jobs:
            raise InputError("There is no such job. Reload the page.")
        return self._jobs[name]

    async def changed(self, name: str, seen: Job | None) -> Job | None:
        """The job when it is another than `seen`; None when it was deleted."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._jobs.get(name) != seen or name not in self._jobs)
        return self._jobs.get(name)

    async def _set(self, job: Job) -> None:
        self._jobs[job.name] = job
        file = self._folder / job.name / "job.json"
        file.with_suffix(".new").write_text(json.dumps(asdict(job)))
        file.with_suffix(".new").replace(file)
        async with self._changed:
            self._changed.notify_all()

    # ---- upload ----

    async def begin(self, name: object, filename: object, size: object) -> Job:
        """A new job that waits for its video. InputError where name, kind or size cannot be used.

        `size` None: a recording, whose size nobody knows; `finish` ends it.
        """
        name = checked_name(name)
        kind = Path(filename).suffix.lower() if isinstance(filename, str) else ""
        if kind not in KINDS:
            raise InputError(f"{kind or 'This file'} is no kind of video that is read here. Give {', '.join(KINDS)}.")
        if size is not None and (not isinstance(size, int) or not 0 < size <= MAX_UPLOAD):
            raise InputError(f"A video may have {MAX_UPLOAD / 1e9:.0f} GB here. Trim it, or use hicode prepare.")
        if (self._library.folder / (name + SUFFIX)).exists() or name in self._jobs:
            raise InputError(f"There is an avatar or a job {name!r} already. Choose another name.")
        if shutil.disk_usage(self._library.folder).free < 3 * (size or 0) + 500_000_000:
            raise ResourceError("The disk has too little room for this video. Free some space.")
        (self._folder / name).mkdir(parents=True, exist_ok=True)
        job = Job(name, f"video{kind}", "uploading", total=size or 0)
        await self._set(job)
        return job

    async def add(self, name: object, offset: int, data: bytes) -> Job:
        """The next piece of the video, at an offset; pieces may come again. `done` says how much is there."""
        job = self.get(name)
        if job.status != "uploading":
            raise InputError("This video is complete already. Reload the page.")
        if offset != job.done:
            return job
        if not data or job.done + len(data) > (job.total or MAX_UPLOAD):
            raise InputError("This piece does not fit the video. Upload it anew.")
        with (self._folder / job.name / f"{job.video}.part").open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(data)
            file.truncate()
        job = replace(job, done=job.done + len(data))
        if job.done == job.total:
            return await self.finish(name, job)
        await self._set(job)
        return job

    async def finish(self, name: object, job: Job | None = None) -> Job:
        """All of the video is there. InputError where nothing of it is."""
        job = job or self.get(name)
        if job.status != "uploading" or not job.done or (job.total and job.done < job.total):
            raise InputError("Nothing was recorded yet, or the video is complete already. Reload the page.")
        (self._folder / job.name / f"{job.video}.part").rename(self._folder / job.name / job.video)
        job = replace(job, status="ready", total=job.done)
        await self._set(job)
        return job

    # ---- work ----

    async def start(self, name: object, consent: object) -> Job:
        """Begin or resume. InputError without consent, ResourceError where another job runs."""
        job = self.get(name)
        statement = " ".join(consent.split()) if isinstance(consent, str) else ""
        statement = statement or job.consent
        if not statement or len(statement) > MAX_CONSENT:
            raise InputError("Consent is missing. Say who is in the video and that they agreed.")
        if job.status in ("uploading", "running", "done"):
            raise InputError(f"This job is {job.status}. Reload the page.")
        if self._task is not None and not self._task.done():
            raise ResourceError("Another avatar is being learned. Wait until it is done, or cancel it.")
        job = replace(job, status="running", stage="Starting", message="", consent=statement, done=0, total=0)
        await self._set(job)
        self._task = asyncio.create_task(self._run(job))
        return job

    async def cancel(self, name: object) -> Job:
        """Stop; what is finished is kept."""
        job = self.get(name)
        if job.status == "running" and self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)
            if self._task is not None:
                await asyncio.wait([self._task], timeout=20)
        return self.get(name)

    async def delete(self, name: object) -> None:
        """Stop it, and remove its folder. The avatar stays."""
        job = await self.cancel(name)
        del self._jobs[job.name]
        await asyncio.to_thread(shutil.rmtree, self._folder / job.name, True)
        async with self._changed:
            self._changed.notify_all()

    async def _run(self, job: Job) -> None:
        folder = self._folder / job.name
        clip, avatar = folder / "clip", self._library.folder / (job.name + SUFFIX)
        prepare = ["prepare", str(folder / job.video), "-o", str(clip)]
        train = ["train", str(clip), "-o", str(avatar), *TRAINING, "--run", str(folder / "run")]
        try:
            await self._command(job.name, prepare)
            await self._set(replace(self._jobs[job.name], report=_report(clip)))
            await self._command(job.name, [*train, f"--consent={job.consent}"])
            await self._set(replace(self._jobs[job.name], status="done", stage="", left_s=None, message=""))
        except asyncio.CancelledError:
            raise
        except HicodeError as error:
            message = str(error).replace(str(folder / job.video), "the video")
            await self._set(replace(self._jobs[job.name], status="failed", message=message, left_s=None))
        except _Stopped:
            await self._set(replace(self._jobs[job.name], status="paused", left_s=None))

    async def _command(self, name: str, arguments: list[str]) -> None:
        """Run a command of the command line. InputError with its one line where it fails, _Stopped if stopped."""
        environment = os.environ | {"COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hicode", *arguments,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, env=environment, start_new_session=True,
        )  # fmt: skip
        assert process.stderr is not None
        last, told_s = "", 0.0
        try:
            async for raw in process.stderr:
                line = raw.decode(errors="replace").strip()
                last = line.removeprefix("hicode: ") or last
                if (found := _PROGRESS.fullmatch(line)) and time.monotonic() - told_s > 0.5:
                    told_s = time.monotonic()
                    left = found["left"]
                    await self._set(replace(
                        self._jobs[name], stage=found["stage"].strip(), done=int(found["done"]),
                        total=int(found["total"]), left_s=int(left) if left else None,
                        message=FIRST_LOOK if (self._library.folder / (name + SUFFIX)).exists() else "",
                    ))  # fmt: skip
            status = await process.wait()
        except asyncio.CancelledError:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
            raise
        if status in (130, -signal.SIGINT):
            raise _Stopped
        if status != 0:
            raise InputError(last if status == 2 else "Learning stopped unexpectedly. Resume it, or run hicode doctor.")

    async def close(self) -> None:
        """Stop what runs; it can be resumed."""
        if self._task is not None and not self._task.done():
            if self._process is not None and self._process.returncode is None:
                self._process.send_signal(signal.SIGINT)
            await asyncio.wait([self._task], timeout=10)
            self._task.cancel()


def _report(clip: Path) -> list[dict]:
    """The capture report's lines."""
    try:
        return json.loads((clip / "clip.json").read_text())["report"]["items"]
    except (OSError, ValueError, KeyError):
        return []
