"""What was said, as a file."""

import time
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np

from hicode.serve.live import SILENCE, LiveTick
from hicode.serve.recording import GAP, QUEUED, Recorder

PICTURE = np.full((96, 64), 128, np.uint8)
SESSION = cast("Any", SimpleNamespace(hello=None))
LOUD = np.full(1920, 8000, np.int16)


def tick(number: int, speaking: bool) -> LiveTick:
    return LiveTick(number, 0.0, PICTURE, LOUD if speaking else SILENCE, speaking, False)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_utterance_is_one_file_and_the_next_replaces_it(tmp_path):
    recorder = Recorder(tmp_path, SESSION)
    for utterance in range(2):
        before = recorder.path
        for number in range(20):
            assert not recorder.add(tick(number, True))
        for number in range(20, 22 + GAP):
            recorder.add(tick(number, False))
        wait_for(lambda before=before: recorder.path not in (None, before))
        wait_for(lambda: recorder.add(tick(99, False)))  # told once
        assert not recorder.add(tick(99, False)) and len(list(tmp_path.glob("*.mp4"))) == 1, utterance
    assert recorder.path is not None
    with av.open(str(recorder.path)) as container:
        assert len(list(container.decode(video=0))) == 21 + GAP
    recorder.close()
    assert not list(tmp_path.iterdir())


def test_a_recording_that_the_encoder_cannot_follow_is_given_up(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path, SESSION)
    monkeypatch.setattr(recorder, "_record", lambda ticks, number: None)  # takes nothing
    for number in range(QUEUED + 2):
        recorder.add(tick(number, True))
    assert recorder._queue is None or recorder._queue.qsize() <= QUEUED
    recorder.close()
    assert recorder.path is None


def test_closing_while_it_records_leaves_nothing(tmp_path):
    recorder = Recorder(tmp_path, SESSION)
    for number in range(10):
        recorder.add(tick(number, True))
    recorder.close()
    assert not list(tmp_path.iterdir()) and recorder.path is None
