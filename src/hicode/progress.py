"""Progress with the remaining time: a live bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

_QUIET_S = 10.0

Report = Callable[[int, int], None]
"""Called with (done, total)."""


@contextmanager
def progress_bar(label: str, show: bool = True) -> Iterator[Report]:
    """A function to call with (done, total). Writes to standard error, so that results can be piped.

    with progress_bar("Landmarks") as report:
        report(i + 1, len(frames))
    """
    if not show:
        yield lambda done, total: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(label, console)
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description:<28}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def say_notes(name: object, notes: Iterable[str]) -> None:
    """Write what is unusual about an input to standard error, a line each."""
    for note in notes:
        print(f"{name}: {note}", file=sys.stderr)


def _lines(label: str, console) -> Report:
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _QUIET_S and 0 < done < total:
            last = now
            remaining_s = (now - started) * (total - done) / done
            console.print(f"{label}: {done} of {total}, {remaining_s:.0f} s left", highlight=False, soft_wrap=True)

    return report
