"""LiveKit's own `AvatarRunner` and audio queue over a room that is a stub: nothing needs a server."""

import asyncio
import time

import numpy as np
import pytest

from helpers.fake_avatar import SIZE, FakeAvatar
from helpers.live_avatars import CONFIG, RATE_HZ, FailingAvatar, run, sound

pytest.importorskip("livekit.agents", reason="livekit-agents is not installed: pip install 'hicode[livekit]'")
from livekit import rtc
from livekit.agents.voice.avatar import AudioSegmentEnd, QueueAudioOutput

from hicode.integrations.live_avatar import LiveAvatar
from hicode.integrations.livekit import AvatarVideo, LiveKitAvatar, video_frame


class StubRoom(rtc.EventEmitter):
    """A room that is connected and takes every track."""

    def __init__(self):
        super().__init__()
        self.local_participant, self.published = self, []

    def isconnected(self) -> bool:
        return True

    async def publish_track(self, track, options):
        self.published.append(track.name)
        return self

    async def wait_for_subscription(self) -> None:
        """Somebody watches at once."""


def audio_frames(samples: np.ndarray, size: int = 2400) -> list:
    pieces = [samples[begin : begin + size] for begin in range(0, len(samples), size)]
    return [rtc.AudioFrame(piece.tobytes(), RATE_HZ, 1, len(piece)) for piece in pieces]


def output() -> tuple[QueueAudioOutput, list]:
    """An agent's audio output, and what it was told: ("started",) or ("finished", position, interrupted)."""
    audio, events = QueueAudioOutput(sample_rate=RATE_HZ, wait_playback_start=True), []
    audio.on("playback_started", lambda event: events.append(("started",)))
    audio.on("playback_finished", lambda e: events.append(("finished", round(e.playback_position, 2), e.interrupted)))
    return audio, events


async def say(audio: QueueAudioOutput, samples: np.ndarray) -> None:
    """All at once, as speech synthesis does."""
    for frame in audio_frames(samples):
        await audio.capture_frame(frame)
    audio.flush()


def test_a_segment_is_started_and_finished_once_with_its_length():
    async def scenario():
        room, (audio, events) = StubRoom(), output()
        async with LiveKitAvatar(room, audio, FakeAvatar(), CONFIG):
            for seconds in (1.0, 0.5):
                began = time.monotonic()
                await say(audio, sound(seconds))
                await audio.wait_for_playout()
                assert time.monotonic() - began > 0.9 * seconds
            await asyncio.sleep(0.3)
        return room.published, events

    published, events = run(scenario())
    assert published == ["avatar_audio", "avatar_video"]
    assert events == [("started",), ("finished", 1.0, False), ("started",), ("finished", 0.52, False)]


def test_an_interruption_finishes_once_with_what_was_played_and_the_next_segment_counts_anew():
    async def scenario():
        audio, events = output()
        async with LiveKitAvatar(StubRoom(), audio, FakeAvatar(), CONFIG):
            await say(audio, sound(10.0))
            while not events:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.8)
            audio.clear_buffer()
            began = time.monotonic()
            await audio.wait_for_playout()
            waited_s = time.monotonic() - began
            await say(audio, sound(0.4))
            await audio.wait_for_playout()
            await asyncio.sleep(0.3)
        return events, waited_s

    events, waited_s = run(scenario())
    assert [event[0] for event in events] == ["started", "finished", "started", "finished"]
    _, position, interrupted = events[1]
    assert interrupted and 0 < position < 9  # of ten seconds; how much depends on the machine
    assert waited_s < 5 and events[3] == ("finished", 0.4, False)


def test_ends_and_interruptions_without_sound_report_nothing():
    """As a remote agent sends them: the end of a segment follows its interruption."""

    async def scenario():
        audio, events = output()
        async with LiveKitAvatar(StubRoom(), audio, FakeAvatar(), CONFIG) as avatar:
            audio.clear_buffer()
            audio._data_ch.send_nowait(AudioSegmentEnd())
            await asyncio.sleep(0.2)
            audio.clear_buffer()
            await asyncio.sleep(0.2)
            assert avatar.runner is not None
            while not avatar.runner.av_sync.actual_fps:  # idle pictures go on
                await asyncio.sleep(0.05)
        return events

    assert run(scenario()) == []


def test_a_picture_goes_before_its_sound_and_idle_pictures_have_none():
    async def scenario():
        async with LiveAvatar(FakeAvatar(), CONFIG) as live:
            video, kinds = AvatarVideo(live), []
            for frame in audio_frames(sound(0.4)):
                await video.push_audio(frame)
            await video.push_audio(AudioSegmentEnd())
            async for item in video:
                kinds.append(type(item))
                if isinstance(item, AudioSegmentEnd):
                    return kinds

    kinds = run(scenario())
    sounds = [i for i, kind in enumerate(kinds) if kind is rtc.AudioFrame]
    assert len(sounds) == 10 and kinds.count(rtc.VideoFrame) >= 1
    assert not any(kinds[i - 1] is rtc.AudioFrame and kinds[i + 1] is rtc.AudioFrame and i == 0 for i in sounds)
    assert kinds[sounds[0] - 1] is rtc.VideoFrame and kinds[-1] is AudioSegmentEnd


def test_when_rendering_fails_the_voice_goes_on_and_segments_finish(caplog):
    async def scenario():
        audio, events = output()
        async with LiveKitAvatar(StubRoom(), audio, FailingAvatar(), CONFIG):
            for seconds in (1.0, 0.4):
                await say(audio, sound(seconds))
                await audio.wait_for_playout()
        return events

    assert run(scenario())[1::2] == [("finished", 1.0, False), ("finished", 0.4, False)]
    assert sum("cannot be rendered" in record.message for record in caplog.records) == 1


def test_sound_that_cannot_be_used_is_left_out():
    async def scenario():
        audio, events = output()
        async with LiveKitAvatar(StubRoom(), audio, FakeAvatar(), CONFIG) as avatar:
            bad = rtc.AudioFrame(bytes(20), 10, 1, 10)  # ten samples a second
            audio._data_ch.send_nowait(bad)
            await asyncio.sleep(0.1)
            await say(audio, sound(0.4))
            await audio.wait_for_playout()
            assert avatar.runner is not None
        return events

    assert run(scenario())[-1][0] == "finished"


def test_a_picture_is_i420_with_even_sides():
    frame = video_frame(np.full((SIZE + 1, SIZE + 1, 3), 128, np.uint8))
    assert (frame.width, frame.height, frame.type) == (SIZE, SIZE, rtc.VideoBufferType.I420)
    assert len(frame.data) == SIZE * SIZE * 3 // 2
