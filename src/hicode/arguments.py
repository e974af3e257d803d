"""A command's arguments, parsed by tyro from the signature of its function. A mistake is said in one line."""

import contextlib
import difflib
import functools
import inspect
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence

import tyro

from hicode.errors import InputError


def parse(function: Callable, argv: Sequence[str], command: str) -> Callable[[], int | None] | None:
    """Bind the arguments to the function and return it, ready to be called. None if the user asked for help.

    Raises InputError if the arguments are wrong.
    """
    description = inspect.cleandoc(function.__doc__ or "").split("\n\nArgs:")[0]
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages), _unwrapped(argv):
            return tyro.cli(
                _binder(function),
                args=argv,
                prog=f"hicode {command}",
                description=description,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise InputError(_one_line(messages.getvalue(), command)) from None


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of an option, read before the other arguments are parsed: it decides their defaults."""
    for i, argument in enumerate(argv):
        if argument == name and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def _binder(function: Callable) -> Callable:
    """A function that does nothing but bind its arguments: the work itself then runs outside of the parser."""

    @functools.wraps(function)
    def bind(*args, **kwargs):
        return functools.partial(function, *args, **kwargs)

    bind.__signature__ = inspect.signature(function).replace(return_annotation=object)  # pyright: ignore[reportAttributeAccessIssue]
    return bind


@contextlib.contextmanager
def _unwrapped(argv: Sequence[str]) -> Iterator[None]:
    """tyro wraps its messages to the terminal. A message that becomes one line must not be wrapped."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(argv):
        os.environ["COLUMNS"] = "2000"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def _one_line(box: str, command: str) -> str:
    """tyro's message in its box as one sentence, with a suggestion."""
    lines = [line.strip("│ ").rstrip() for line in box.splitlines() if not set(line) & set("╭╰─")]
    details = [line for line in lines if line.startswith("-") or line.split(" ")[0].isupper()]
    finding, suggestion = lines[0] if lines else "The options could not be understood", ""
    if finding.startswith("Missing from"):
        finding = f"Missing: {' and '.join(line.split(',')[0].split(' (')[0] for line in details)}"
    elif finding.startswith("Unrecognized options"):
        finding = finding.replace("Unrecognized options", "Not understood")
        near = next((line.split()[0].rstrip(",") for line in details if line.startswith("--")), None)
        suggestion = f" Did you mean {near}?" if near else ""
    elif finding.startswith("invalid choice"):
        given, *choices = re.findall(r"'([^']*)'", re.sub(r"for argument '[^']*'", "", finding))
        near = difflib.get_close_matches(given, choices, 1)
        suggestion = f" Did you mean {near[0]}?" if near else ""
    return f"{finding[0].upper()}{finding[1:].rstrip('.')}.{suggestion} See hicode {command} --help."
