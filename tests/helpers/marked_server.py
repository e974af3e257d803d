"""`hicode serve` whose renderer sends pictures large enough for the mark: python -m helpers.marked_server FOLDER."""

import contextlib
import itertools
import sys
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from helpers.trust_pictures import pictures
from hicode.serve.live import Machine
from hicode.serve.renderer import SLOTS, TICK_S, Hello, TickLoop
from hicode.trust.watermark import Payload, Watermark

SIZE, PAYLOAD = 384, Payload(0x89ABCDEF)


def marked_renderer(connection: Connection) -> None:
    """Main function of the process: the renderer's own loop and marks, on pictures that move."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
        shown = itertools.cycle(pictures(50, SIZE))

        def frame_within(_: float) -> Any:
            time.sleep(TICK_S / 4)
            return SimpleNamespace(image=next(shown), audio=np.zeros(0, np.int16), speaking=False, late=False)

        plate = np.zeros((SIZE, SIZE, 3), np.uint8)
        session = SimpleNamespace(avatar=SimpleNamespace(background_plate=plate), frame_within=frame_within)
        session.push_audio = session.end_utterance = session.clear = session.close = lambda *_: None
        memory = SharedMemory(create=True, size=SLOTS * SIZE * SIZE * 3 // 2)
        try:
            connection.send(Hello(SIZE, SIZE, memory.name, 0.1, 30.0, cast(Any, None)))
            loop = TickLoop(connection, cast(Any, session), memory, Watermark(PAYLOAD))
            threading.Thread(target=loop.read_commands, daemon=True).start()
            loop.run()
        finally:
            memory.close()
            memory.unlink()


def main(folder: str) -> None:
    """Serve until interrupted."""
    import hicode.serve.app as app

    class MarkedMachine(Machine):
        def __init__(self, max_sessions: int, **limits: float):
            super().__init__(max_sessions, marked_renderer, **limits)

    app.Machine = MarkedMachine  # pyright: ignore[reportAttributeAccessIssue]
    with contextlib.suppress(KeyboardInterrupt):
        app.serve(Path(folder), app.ServeConfig(port=0, open_browser=False))


if __name__ == "__main__":
    main(sys.argv[1])
