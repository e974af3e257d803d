"""LiveKit: an avatar as `VideoGenerator` under `AvatarRunner`, in an agent's own process or as a worker of its own.

    audio = QueueAudioOutput(sample_rate=24_000, wait_playback_start=True)       # in process
    audio = DataStreamAudioReceiver(room, sender_identity=AGENT)                 # worker
    async with LiveKitAvatar(room, audio, "me.hicode"): ...

A picture goes before its sound. A late picture is left out, so that the synchroniser never falls behind. Idle pictures
go on without sound. If rendering fails, one error is logged and the voice goes on.

`playback_finished` comes once a segment: after its last sound was played, or on interruption with the position that
was played. Needs `pip install 'hicode[livekit]'`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from livekit import rtc
from livekit.agents.voice.avatar import AudioReceiver, AudioSegmentEnd, AvatarOptions, AvatarRunner, VideoGenerator

from hicode.audio import FPS
from hicode.avatar.avatar import Avatar
from hicode.errors import HicodeError
from hicode.integrations.live_avatar import OUTPUT_RATE_HZ, Failure, LiveAvatar, Tick, logger, pcm
from hicode.session.config import SpeakConfig

PUSHING_S = 0.5
"""Longest wait, on interruption, for what the runner is pushing at that moment."""


class AvatarVideo(VideoGenerator):
    """The pictures and the sound of a `LiveAvatar` as `AvatarRunner` takes them.

    `synchronizer` is the runner's, once there is one: it holds up to 100 ms, which an interruption drops too.
    """

    def __init__(self, live: LiveAvatar):
        self._live = live
        self.synchronizer: rtc.AVSynchronizer | None = None
        self.unplayed_s = 0.0
        """Sound that the synchroniser held at the last interruption, s."""
        self._asked = asyncio.Event()  # the runner waits for an item: it pushes nothing
        self._clearing = asyncio.Lock()

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Sound of the agent, or the end of its segment. Sound that cannot be used is logged and left out."""
        if isinstance(frame, AudioSegmentEnd):
            self._live.end_utterance()
            return
        try:
            self._live.push_audio(pcm(bytes(frame.data), frame.num_channels), frame.sample_rate)
        except HicodeError as error:
            logger.error("Sound was left out: %s", error)

    async def clear_buffer(self) -> None:
        """Interrupt. Returns when nothing of the segment can be pushed any more, so that its position is final."""
        async with self._clearing:
            self._live.clear()
            self.unplayed_s = await self._drop_queued()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), PUSHING_S)
            self.unplayed_s += await self._drop_queued()

    async def _drop_queued(self) -> float:
        """Empty the synchroniser; the seconds of sound that it held."""
        if self.synchronizer is None:
            return 0.0
        # The runner gives no time stamps, so this is minus what waits to be played.
        queued_s = max(0.0, -self.synchronizer.last_audio_time)
        await self.synchronizer.clear_queue()
        return queued_s

    async def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        """A picture, then its sound; pictures alone in silence; an end after each segment."""
        self._asked.set()
        async for item in self._live:
            interruptions = self._live.interruptions
            async with self._clearing:
                pass  # the runner reports the position of the segment that was interrupted before the next one begins
            if isinstance(item, Failure) or interruptions != self._live.interruptions:
                continue  # a failure was logged where it happened
            self._asked.clear()
            if isinstance(item, Tick):
                if item.image is not None:
                    yield video_frame(item.image)
                if item.audio is not None and interruptions == self._live.interruptions:
                    yield rtc.AudioFrame(item.audio.tobytes(), self._live.config.output_rate_hz, 1, len(item.audio))
            else:
                yield AudioSegmentEnd()
            self._asked.set()


class PlayedAudio(AudioReceiver):
    """An `AudioReceiver` that reports what was played, not what was pushed: the synchroniser's sound is taken off."""

    def __init__(self, inner: AudioReceiver, video: AvatarVideo):
        super().__init__()
        self._inner, self._video = inner, video

    async def start(self) -> None:
        """Begin to receive."""
        await self._inner.start()
        self._inner.on("clear_buffer", self._forward_clear)

    def _forward_clear(self) -> None:
        self.emit("clear_buffer")

    def notify_playback_started(self) -> Coroutine[None, None, None] | None:
        """The first sound of a segment was pushed."""
        return self._inner.notify_playback_started()

    def notify_playback_finished(
        self, playback_position: float, interrupted: bool
    ) -> Coroutine[None, None, None] | None:
        """A segment is over; `playback_position` in s, as pushed."""
        if interrupted:
            playback_position = max(0.0, playback_position - self._video.unplayed_s)
        return self._inner.notify_playback_finished(playback_position, interrupted)

    def __aiter__(self) -> AsyncIterator[rtc.AudioFrame | AudioSegmentEnd]:
        return self._inner.__aiter__()

    async def aclose(self) -> None:
        """End receiving."""
        self._inner.off("clear_buffer", self._forward_clear)
        await self._inner.aclose()


class LiveKitAvatar:
    """An avatar in a room: publishes `avatar_audio` and `avatar_video`, driven by `audio`.

    `start` raises what loading the avatar raises. `runner` is LiveKit's own; it exists once started.
    """

    def __init__(
        self,
        room: rtc.Room,
        audio: AudioReceiver,
        avatar: Avatar | Path | str,
        config: SpeakConfig = SpeakConfig(output_rate_hz=OUTPUT_RATE_HZ),
    ):
        self._room, self._audio = room, audio
        self.live = LiveAvatar(avatar, config)
        self.runner: AvatarRunner | None = None

    async def start(self) -> None:
        """Load the avatar, then publish and speak."""
        await self.live.start()
        video = AvatarVideo(self.live)
        options = AvatarOptions(
            video_width=self.live.width & ~1,
            video_height=self.live.height & ~1,
            video_fps=FPS,
            audio_sample_rate=self.live.config.output_rate_hz,
            audio_channels=1,
        )
        receiver = PlayedAudio(self._audio, video)
        runner = AvatarRunner(self._room, audio_recv=receiver, video_gen=video, options=options)
        self.runner, video.synchronizer = runner, runner.av_sync
        await runner.start()

    async def aclose(self) -> None:
        """Leave nothing behind: no task, no thread."""
        if self.runner is not None:
            await self.runner.aclose()
        await self.live.close()

    async def __aenter__(self) -> "LiveKitAvatar":
        try:
            await self.start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *error) -> None:
        await self.aclose()


def video_frame(image: UInt8[np.ndarray, "h w 3"]) -> rtc.VideoFrame:
    """An RGB picture as I420, which LiveKit encodes without another conversion; an odd last row or column is cut."""
    height, width = (side & ~1 for side in image.shape[:2])
    planes = cv2.cvtColor(np.ascontiguousarray(image[:height, :width]), cv2.COLOR_RGB2YUV_I420)
    return rtc.VideoFrame(width, height, rtc.VideoBufferType.I420, planes.tobytes())
