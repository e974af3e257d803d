"""Pipecat's own pipeline and output transport around the avatar: nothing needs a network."""

import asyncio
from itertools import pairwise

import numpy as np
import pytest

from helpers.fake_avatar import SIZE, FakeAvatar
from helpers.live_avatars import CONFIG, RATE_HZ, FailingAvatar, run, sound

pytest.importorskip("pipecat", reason="pipecat-ai is not installed: pip install 'hicode[pipecat]'")
from pipecat.frames.frames import (
    ErrorFrame,
    InterruptionFrame,
    OutputImageRawFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
)
from pipecat.tests.utils import SleepFrame, run_test

from hicode.integrations.pipecat import HicodeAvatar

START_S = 60.0  # a busy machine


def speech(seconds: float, context_id: str = "turn", pieces: int = 4) -> list:
    """What a synthesis sends."""
    audio = [
        TTSAudioRawFrame(audio=piece.tobytes(), sample_rate=RATE_HZ, num_channels=1, context_id=context_id)
        for piece in np.array_split(sound(seconds), pieces)
    ]
    return [TTSStartedFrame(context_id=context_id), *audio, TTSStoppedFrame(context_id=context_id)]


def through(frames: list, avatar=None) -> tuple[list, list]:
    """What comes out downstream and upstream."""
    processor = HicodeAvatar(avatar or FakeAvatar(), CONFIG)
    down, up = run(run_test(processor, frames_to_send=frames, start_timeout=START_S), 100)
    return list(down), list(up)


def audio_of(frames: list) -> list:
    return [frame for frame in frames if isinstance(frame, TTSAudioRawFrame)]


def test_sound_comes_out_whole_in_40_ms_each_after_its_picture_before_the_stop():
    down, up = through(speech(1.0))
    audio = audio_of(down)
    assert [len(frame.audio) for frame in audio] == 25 * [2 * RATE_HZ // 25]
    assert b"".join(frame.audio for frame in audio) == sound(1.0).tobytes()
    assert {(frame.context_id, frame.sample_rate, frame.num_channels) for frame in audio} == {("turn", RATE_HZ, 1)}
    shown = [frame for frame in down if isinstance(frame, OutputImageRawFrame)]
    assert all(frame.size == (SIZE, SIZE) and len(frame.image) == 3 * SIZE * SIZE for frame in shown)
    assert all(before.image != after.image for before, after in pairwise(shown))
    synced = [i for i, frame in enumerate(down) if isinstance(frame, OutputImageRawFrame) and frame.sync_with_audio]
    assert synced and all(isinstance(down[i + 1], TTSAudioRawFrame) for i in synced)
    kinds = [type(frame) for frame in down if not isinstance(frame, OutputImageRawFrame)]
    assert kinds[0] is TTSStartedFrame and kinds[-1] is TTSStoppedFrame
    assert not [frame for frame in up if isinstance(frame, ErrorFrame)]


def test_turns_stay_in_order_with_their_contexts():
    down, _ = through(speech(0.4, "a") + speech(0.4, "b"))
    order = [
        (type(frame).__name__, frame.context_id)
        for frame in down
        if isinstance(frame, (TTSStartedFrame, TTSStoppedFrame, TTSAudioRawFrame))
    ]
    expected = []
    for context in "ab":
        expected += [("TTSStartedFrame", context), *10 * [("TTSAudioRawFrame", context)], ("TTSStoppedFrame", context)]
    assert order == expected


def test_text_goes_on_when_the_sound_before_it_has_gone_out():
    started, *audio, stopped = speech(0.8, pieces=2)
    text = TTSTextFrame("half", aggregated_by="word")
    down, _ = through([started, audio[0], text, audio[1], stopped])
    before = down[: down.index(text)]
    assert len(audio_of(before)) == 10


def test_an_interruption_drops_the_rest_and_the_stop_and_the_next_turn_is_whole():
    frames = [*speech(5.0, "long"), SleepFrame(0.6), InterruptionFrame(), *speech(0.4, "next")]
    down, _ = through(frames)
    cut = next(i for i, frame in enumerate(down) if isinstance(frame, InterruptionFrame))
    assert len(audio_of(down[:cut])) < 100
    after = [frame for frame in down[cut:] if isinstance(frame, (TTSAudioRawFrame, TTSStoppedFrame))]
    assert {frame.context_id for frame in after} == {"next"}
    assert b"".join(frame.audio for frame in audio_of(after)) == sound(0.4).tobytes()


def test_when_rendering_fails_one_error_goes_up_and_the_voice_goes_on():
    down, up = through(speech(1.0, "a") + speech(0.4, "b"), FailingAvatar())
    assert len([frame for frame in up if isinstance(frame, ErrorFrame)]) == 1
    voice = b"".join(frame.audio for frame in audio_of(down))
    assert voice == sound(1.0).tobytes() + sound(0.4).tobytes()
    assert len([frame for frame in down if isinstance(frame, TTSStoppedFrame)]) == 2


def test_an_avatar_that_cannot_be_loaded_is_one_error_and_sound_passes(tmp_path):
    (tmp_path / "bad.hicode").write_bytes(b"not an avatar")
    frames = speech(0.4)
    down, up = through(frames, tmp_path / "bad.hicode")
    assert [type(frame) for frame in down] == [type(frame) for frame in frames]
    assert len([frame for frame in up if isinstance(frame, ErrorFrame)]) == 1


def test_the_transport_shows_pictures_that_are_queued_with_sound():
    """`video_out_is_live=False`, as the adapter's page says: with True, such pictures never appear."""
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.transports.base_output import BaseOutputTransport
    from pipecat.transports.base_transport import TransportParams

    class Screen(BaseOutputTransport):
        def __init__(self, params):
            super().__init__(params)
            self.pictures, self.samples = set(), 0

        async def start(self, frame):
            await super().start(frame)
            await self.set_transport_ready(frame)

        async def write_audio_frame(self, frame) -> bool:
            self.samples += len(frame.audio) // 2
            await asyncio.sleep(len(frame.audio) / 2 / RATE_HZ)
            return True

        async def write_video_frame(self, frame) -> bool:
            self.pictures.add(frame.image)
            return True

    screen = Screen(
        TransportParams(
            audio_out_enabled=True,
            audio_out_sample_rate=RATE_HZ,
            video_out_enabled=True,
            video_out_is_live=False,
            video_out_width=SIZE,
            video_out_height=SIZE,
            video_out_framerate=25,
        )
    )
    pipeline = Pipeline([HicodeAvatar(FakeAvatar(), CONFIG), screen])
    run(run_test(pipeline, frames_to_send=[*speech(1.0), SleepFrame(0.5)], start_timeout=START_S), 100)
    assert screen.samples >= RATE_HZ and len(screen.pictures) > 5
