"""Tasks for the tests of sweeps: light, importable by workers, and they say what they did.

An argument is (folder, name, behaviour). A task appends a line to `folder/begun`, and leaves `folder/name.done` unless
it is there.
"""

import os
import time
from pathlib import Path

from hicode.errors import InputError


def work(argument: tuple[str, str, str]) -> None:
    folder, name, behaviour = Path(argument[0]), *argument[1:]
    if (folder / f"{name}.done").exists():
        return
    with open(folder / "begun", "a") as log:  # short appends are whole
        log.write(f"{name} {os.getpid()}\n")
    if behaviour == "fails":
        raise InputError(f"{name} cannot be done. Give up.")
    if (
        behaviour == "waits to be killed"
        and sum(line.split()[0] == name for line in (folder / "begun").read_text().splitlines()) == 1
    ):
        time.sleep(60)
    time.sleep(float(behaviour) if behaviour.replace(".", "").isdigit() else 0)
    temporary = folder / f"{name}.{os.getpid()}"
    temporary.write_text(name)
    temporary.replace(folder / f"{name}.done")
