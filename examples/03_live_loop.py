"""A live loop: the avatar idles, speaks, is interrupted in the middle of a sentence, and idles on.

One thread writes sound; the other shows a frame every 40 ms. A frame carries its own 40 ms of sound.

    python examples/03_live_loop.py me.hicode hello.wav
"""

import sys
import threading
import time

import numpy as np
import soundfile

import hicode


def talk(session: "hicode.Session", samples: np.ndarray, rate_hz: int, until_s: float) -> None:
    """The writer: say something, then interrupt it."""
    session.push_audio(samples, rate_hz)  # faster than real time: it is queued
    session.end_utterance()
    time.sleep(until_s)
    print(f"interrupted after {session.clear():.2f} s of speech")


def main(avatar: "hicode.Avatar | str", sound: str, seconds: float = 4.0) -> list[bool]:
    """The reader. Returns for each frame whether the avatar spoke."""
    if isinstance(avatar, str):
        avatar = hicode.Avatar.load(avatar)
    samples, rate_hz = soundfile.read(sound, dtype="float32")
    spoke = []
    with hicode.Session(avatar) as session:
        writer = threading.Thread(target=talk, args=(session, samples, rate_hz, float(seconds) / 2))
        began = time.monotonic()
        for i, frame in enumerate(session.frames()):
            if i == 1:  # the first frame compiles the renderer
                writer.start()
                began = time.monotonic() - 0.04
            spoke.append(frame.speaking)  # show frame.image and play frame.audio here
            if len(spoke) >= 25 * float(seconds):
                break
            time.sleep(max(0.0, began + 0.04 * i - time.monotonic()))
        writer.join()
    print("".join("S" if s else "." for s in spoke))
    return spoke


if __name__ == "__main__":
    main(*sys.argv[1:])
