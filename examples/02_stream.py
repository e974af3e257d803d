"""Sound comes in chunks, as speech synthesis gives it; frames come while the sound is still coming.

python examples/02_stream.py me.hicode hello.wav
"""

import sys
import time
from collections.abc import Iterator

import numpy as np
import soundfile

import hicode

CHUNK_S = 0.1


def chunks(sound: str) -> Iterator[np.ndarray]:
    """A file a tenth of a second at a time. In its place: what your speech synthesis yields."""
    with soundfile.SoundFile(sound) as file:
        yield from file.blocks(round(CHUNK_S * file.samplerate), dtype="float32")


def main(avatar: "hicode.Avatar | str", sound: str) -> int:
    """Render all frames; returns how many."""
    count = 0
    rate_hz = soundfile.info(sound).samplerate
    with hicode.open(avatar) as speaker:
        began = time.perf_counter()
        for frame in speaker.render(chunks(sound), rate_hz):
            if count == 0:
                print(f"first frame after {1000 * (time.perf_counter() - began):.0f} ms: {frame.image.shape}")
            count += 1  # show frame.image and play frame.audio, 40 ms of it, here
        print(f"{count} frames, {count / (time.perf_counter() - began):.1f} a second")
    return count


if __name__ == "__main__":
    main(*sys.argv[1:])
