"""A reader with a clock, on a machine that is too slow for a picture a frame."""

from concurrent.futures import Future
from typing import Any, cast

import numpy as np

from helpers.fake_avatar import FakeAvatar, speechlike
from hicode.session.config import SpeakConfig
from hicode.session.session import Session


class SlowPool:
    """A render pool whose work is done by hand, in order."""

    def __init__(self):
        self.waiting = []

    def submit(self, work, *arguments) -> Future:
        self.waiting.append((future := Future(), work, arguments))
        return future

    def work(self) -> None:
        while self.waiting:
            future, work, arguments = self.waiting.pop(0)
            if future.set_running_or_notify_cancel():
                future.set_result(work(*arguments))
                return


def spoken(session: Session, every: int) -> list:
    """A second of speech; the pool finishes one picture every so many frames."""
    pool = SlowPool()
    session._pool = cast("Any", pool)
    first = session._idle()
    pool.work()
    session._image = first.image.result()
    session.push_audio(speechlike(1.0))
    session.end_utterance()
    frames, asked = [], 0
    while len(frames) < 25:
        if asked % every == 0:
            pool.work()
        frame, asked = session.frame_within(0.0), asked + 1
        assert frame is not None
        frames += [frame] if frame.speaking else []
        assert asked < 100
    return frames


def test_a_slow_pool_costs_pictures_but_no_sound():
    shown = {}
    for every in (1, 2, 3):
        with Session(FakeAvatar(), SpeakConfig(level=0.05)) as session:
            shown[every] = spoken(session, every)
    with Session(FakeAvatar(), SpeakConfig(level=0.05)) as session:
        session.push_audio(speechlike(1.0))
        session.end_utterance()
        expected = list(session.drain())
    for every, frames in shown.items():
        assert all(np.array_equal(a.audio, b.audio) for a, b in zip(frames, expected, strict=True))
        pictures = len({id(frame.image) for frame in frames})
        assert 25 // every - 3 <= pictures <= 25 // every + 3, (every, pictures)
