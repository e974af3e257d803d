"""A renderer process without an avatar: a picture that brightens, sound as it was pushed. It starts at once."""

import time
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import cast

import numpy as np

from hicode.serve.renderer import TICK_S, Hello, Push, Tick

SIZE = 64


def scripted_renderer(connection: Connection) -> None:
    """Main function of the process. Sound is taken to be at 48 kHz. The source "bad" ends it at once."""
    try:
        source = connection.recv()
    except EOFError:  # nobody needed it
        return
    if str(source).endswith("bad.hicode"):
        return
    picture = SIZE * SIZE * 3 // 2
    memory = SharedMemory(create=True, size=2 * picture)
    connection.send(Hello(SIZE, SIZE, memory.name, 0.1, 30.0, cast("object", None)))  # type: ignore[arg-type]
    started, number, generation, sound = time.monotonic(), 0, 0, b""
    try:
        while True:
            while connection.poll(max(0.0, started + number * TICK_S - time.monotonic())):
                command = connection.recv()
                if isinstance(command, Push):
                    sound += command.samples
                elif command == "clear":
                    sound, generation = b"", generation + 1
                elif command == "close":
                    return
            slot = number % 2
            np.ndarray(picture, np.uint8, memory.buf, slot * picture)[:] = 60 + 3 * number % 120
            audio, sound = sound[:3840].ljust(3840, b"\0") if sound else None, sound[3840:]
            connection.send(Tick(number, started + (number + 2) * TICK_S, slot, audio, generation, False))
            number += 1
    except (EOFError, OSError):
        pass
    finally:
        memory.unlink()
        memory.close()
