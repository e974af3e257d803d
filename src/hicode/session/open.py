"""`hicode.open`: an avatar as an object that turns sound into frames.

with hicode.open("me.hicode") as avatar:
    for frame in avatar.render("hello.wav"):
        show(frame.image)
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from hicode.audio import SAMPLE_RATE_HZ
from hicode.avatar.avatar import Avatar
from hicode.errors import InputError
from hicode.media.audio import stream_audio
from hicode.session.config import SpeakConfig
from hicode.session.session import Frame, Session
from hicode.session.speak import READ_AHEAD, video_record
from hicode.trust.marks import FrameMarker

Chunk = Shaped[np.ndarray, "n *c"] | bytes
Sound = Path | str | Chunk | Iterable[Chunk]
CONTAINERS = (b"RIFF", b"OggS", b"fLaC", b"ID3")


class Speaker:
    """An avatar with its session. Head pose and gaze go on from one sound to the next."""

    def __init__(self, avatar: Avatar, config: SpeakConfig = SpeakConfig()):
        self.session = Session(avatar, config)
        self._marker = FrameMarker(config.mark, video_record(avatar))
        self._rendering: Iterator[Frame] | None = None

    def render(self, audio: Sound, rate_hz: int = SAMPLE_RATE_HZ) -> Iterator[Frame]:
        """The frames of a sound, 25 a second, marked as `config.mark` says.

        `audio`: a sound or video file; samples, float32 or int16; bytes of 16-bit mono samples; or an iterable of such
        chunks, whose frames come as soon as their sound allows. `rate_hz` is that of samples and bytes.

        Closing the iterator interrupts, and so does another `render`. Raises InputError for sound that cannot be used.
        """
        self._interrupt()
        if isinstance(audio, (str, Path)):
            pieces = stream_audio(audio)
            if pieces is None:
                raise InputError(f"{audio} has no sound track. Give a file with speech.")
            self._rendering = self._frames(pieces, SAMPLE_RATE_HZ, self.session.ahead)
        elif isinstance(audio, (np.ndarray, bytes)):
            self._rendering = self._frames([audio], rate_hz, self.session.ahead)
        else:
            self._rendering = self._frames(audio, rate_hz, 0)
        return self._rendering

    def _frames(self, chunks: Iterable[Chunk], rate_hz: int, keep: int) -> Iterator[Frame]:
        ended = False
        try:
            for chunk in chunks:
                samples = _samples(chunk)
                step = max(1, READ_AHEAD * rate_hz // SAMPLE_RATE_HZ)
                for begin in range(0, len(samples), step):
                    self.session.push_audio(samples[begin : begin + step], rate_hz)
                    yield from map(self._marked, self.session.drain(keep=keep))
            self.session.end_utterance()
            yield from map(self._marked, self.session.drain())
            ended = True
        finally:
            if not ended:
                self.session.clear()

    def _marked(self, frame: Frame) -> Frame:
        return replace(frame, image=self._marker(frame.image))

    def _interrupt(self) -> None:
        rendering, self._rendering = self._rendering, None
        if rendering is not None:
            rendering.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator

    def close(self) -> None:
        """End the session."""
        self._interrupt()
        self.session.close()

    def __enter__(self) -> "Speaker":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def open(avatar: Avatar | Path | str, config: SpeakConfig = SpeakConfig()) -> Speaker:
    """Open an avatar, or its file, for speaking. Raises what `Avatar.load` and `Session` raise."""
    return Speaker(Avatar.load(avatar) if isinstance(avatar, (str, Path)) else avatar, config)


def _samples(chunk: Chunk) -> np.ndarray:
    if not isinstance(chunk, bytes):
        return np.asarray(chunk)
    if chunk.startswith(CONTAINERS):
        raise InputError("These bytes are a sound file, not samples. Give the file's path.")
    if len(chunk) % 2:
        raise InputError(f"{len(chunk)} bytes are no whole number of 16-bit samples. Cut chunks between samples.")
    return np.frombuffer(chunk, np.int16)
