"""An avatar speaks a sound file; the result is an MP4 with the sound.

python examples/01_speak.py me.hicode hello.wav out.mp4
"""

import sys
from pathlib import Path

import hicode


def main(avatar: "hicode.Avatar | str", sound: str, out: str = "out.mp4") -> Path:
    """Write the video and say how fast that was."""
    result = hicode.speak(avatar, sound, out, progress=False)
    print(result)
    return result.path


if __name__ == "__main__":
    main(*sys.argv[1:])
