"""The server of `hicode serve` whose pictures carry a stamp that a page can read: for `research.benchmarks.live`.

    python -m research.benchmarks.live_server FOLDER [OPTIONS OF TRAINING]

A stamp is a row of squares at the bottom left, white for 1: the tick's number (12 bits), interruptions before it
(4 bits), whether the picture is of speech, whether the tick's sound is loud.
"""

import contextlib
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from hicode.serve.live import Machine
from hicode.serve.renderer import Refusal, Tick, TickLoop, run_renderer

CELL = 16  # px
BITS = 18
LOUD = 3000  # RMS of int16


class StampedLoop(TickLoop):
    """Stamps each new picture as it is sent."""

    def send(self, message: Tick | Refusal) -> None:
        """To the parent, stamped."""
        if isinstance(message, Tick) and message.slot is not None:
            audio = np.frombuffer(message.audio or b"", np.int16).astype(np.float32)
            loud = len(audio) > 0 and float(np.sqrt(np.mean(audio**2))) > LOUD
            bits = [message.number >> k & 1 for k in range(12)] + [message.generation >> k & 1 for k in range(4)]
            bits += [message.audio is not None, loud]
            picture = self.slot(message.slot)
            height = picture.shape[0] * 2 // 3
            for k, bit in enumerate(bits):
                picture[height - CELL : height, k * CELL : (k + 1) * CELL] = 235 if bit else 16
        super().send(message)


def stamped_renderer(connection: Connection) -> None:
    """Main function of the renderer process."""
    run_renderer(connection, StampedLoop)


def main(folder: str, *training: str) -> None:
    """Serve until interrupted."""
    import hicode.serve.app as app
    from hicode.serve import jobs

    class StampedMachine(Machine):
        def __init__(self, max_sessions: int, **limits: float):
            super().__init__(max_sessions, stamped_renderer, **limits)

    if training:
        jobs.TRAINING = training
    app.Machine = StampedMachine  # pyright: ignore[reportAttributeAccessIssue] - the server is not told of stamps
    config = app.ServeConfig(port=0, open_browser=False)
    with contextlib.suppress(KeyboardInterrupt):
        app.serve(Path(folder), config, lambda text: print(os.getpid(), text, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
