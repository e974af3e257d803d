"""The command line: chooses a command, and says a mistake in one line.

Exit status: 0 done; 2 something the user can mend, said in one line on standard error; 130 interrupted; `hicode verify`
has more. A traceback is a defect of hicode. `hicode --help` is instant. What concerns the whole process (allocator,
threads) is set here, and nowhere in the library.
"""

import difflib
import errno
import io
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hicode import __version__
from hicode.arguments import parse
from hicode.commands import COMMANDS
from hicode.errors import HicodeError, InputError
from hicode.runtime import find_compile_cache, share_cores, tune_allocator

EXIT_USER, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 130, 143
# What a path or a device does to a program, whatever the program does.
_OF_PLACES = {
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE,
    errno.ENXIO, errno.ENODEV, errno.ESTALE,
}  # fmt: skip
# What a stopped command keeps; the others keep nothing.
_KEPT = {
    "prepare": "Finished steps are kept",
    "train": "The avatar so far and the last checkpoint are kept",
    "make": "What is finished is kept",
    "learn": "What is finished is kept",
    "demo": "What is finished is kept",
    "pretrain": "What is finished is kept",
}


class Terminated(KeyboardInterrupt):
    """Asked to end by a signal: cleaned up as after Ctrl-C."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    share_cores()
    tune_allocator()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the console cannot print fails no finished work
    try:
        with _stoppable(), find_compile_cache():
            return _run(argv)
    except HicodeError as error:
        return _complain(str(error))
    except KeyboardInterrupt as stop:
        print(f"\nhicode: stopped. {_how_to_go_on(argv)}", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads the output any more
        return 0
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _complain(f"Disk full{place}. Free some space, or write elsewhere.")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return _complain(f"No permission{place}. Change its rights, or write elsewhere with -o.")
        if error.errno in _OF_PLACES:
            return _complain(f"{error.strerror}{place}. Check the path, or choose another one.")
        raise
    except (MemoryError, RuntimeError) as error:
        # torch raises a plain RuntimeError for the CPU's memory, and a subclass of it for a GPU's.
        if isinstance(error, RuntimeError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        return _complain("Not enough memory. Close other programs, or use a shorter video (--duration 60).")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let the signals that ask a program to end do what Ctrl-C does. Ignored ones (nohup) stay ignored."""

    def stop(*_) -> None:
        raise Terminated

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {}
    try:
        for number in (getattr(signal, name) for name in names):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how_to_go_on(argv: list[str]) -> str:
    again = shlex.join(["hicode", *argv])
    kept = _KEPT.get(argv[0]) if argv else None
    return f"{kept}; to go on: {again}" if kept else f"Nothing is kept; to begin again: {again}"


def _complain(message: str) -> int:
    print(f"hicode: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"hicode {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(COMMANDS)}."
        kind = "option" if name.startswith("-") else "command"
        raise InputError(f"No {kind} is called {name!r}. {hint} See hicode --help.")
    call = parse(COMMANDS[name][0](argv[1:]), argv[1:], name)
    return 0 if call is None else call() or 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  hicode {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    title = f"hicode {__version__}: a talking head learned from a short video"
    return f"{title}\n\n{commands}\n\nOptions of a command: hicode COMMAND --help"
