"""Pipecat: an avatar as a `FrameProcessor` between speech synthesis and the transport's output.

    Pipeline([..., tts, HicodeAvatar("me.hicode"), transport.output(), ...])

`TTSAudioRawFrame` is taken in and comes out again in pieces of 40 ms with the same `context_id`, each after its
picture. Pictures that have sound carry `sync_with_audio`, so the transport queues both alike. Idle pictures are shown
at once. A picture goes out only when it changed. Frames that follow the sound (texts, `TTSStoppedFrame`) wait until the
sound before them has gone out; those with a time stamp do not. `InterruptionFrame` drops sound, pictures and waiting
frames. If rendering fails, one `ErrorFrame` goes upstream and the voice goes on.

The transport shows pictures that are queued with sound only with `video_out_is_live=False`:

    TransportParams(audio_out_enabled=True, audio_out_sample_rate=24_000, video_out_enabled=True,
                    video_out_is_live=False, video_out_width=512, video_out_height=512, video_out_framerate=25)

Needs `pip install 'hicode[pipecat]'`.
"""

import asyncio
import contextlib
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from pipecat.frames.frames import (
    EndFrame,
    Frame,
    InterruptionFrame,
    OutputImageRawFrame,
    StartFrame,
    SystemFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor, FrameProcessorSetup

from hicode.avatar.avatar import Avatar
from hicode.errors import HicodeError
from hicode.integrations.live_avatar import OUTPUT_RATE_HZ, TICK_S, Failure, LiveAvatar, Tick, UtteranceEnd, pcm
from hicode.session.config import SpeakConfig

DRAIN_S = 5.0
"""Longest wait for the last sound before the pipeline ends, beyond twice the sound's length."""


@dataclass(frozen=True)
class _Waiting:
    """A frame that goes on when `played_s` of an utterance have gone out; inf: after its end."""

    utterance: int
    played_s: float
    frame: Frame


@dataclass(frozen=True)
class _Label:
    """An utterance's number and Pipecat's context."""

    number: int
    context_id: str | None


class HicodeAvatar(FrameProcessor):
    """An avatar that speaks what the synthesis before it says. Sound goes out at `config.output_rate_hz`."""

    def __init__(
        self, avatar: Avatar | Path | str, config: SpeakConfig = SpeakConfig(output_rate_hz=OUTPUT_RATE_HZ), **options
    ):
        super().__init__(**options)
        self._live = LiveAvatar(avatar, config)
        self._error: str | None = None  # of the start: sound passes unchanged
        self._task: asyncio.Task | None = None
        self._label: _Label | None = None  # of the utterance that takes sound now
        self._begun = 0  # utterances
        self._pushed_s = 0.0  # sound of the utterance begun last
        self._pending = 0  # utterances whose end has not come
        self._silent = asyncio.Event()
        self._silent.set()
        self._waiting: deque[_Waiting] = deque()
        self._played_s = 0.0  # sound of the utterance in progress that has gone out

    def can_generate_metrics(self) -> bool:
        """Time to the first picture with sound."""
        return True

    async def setup(self, setup: FrameProcessorSetup) -> None:
        """Load the avatar, beside the set-up of other processors."""
        await super().setup(setup)
        try:
            await self._live.start()
        except HicodeError as error:
            self._error = str(error)

    async def cleanup(self) -> None:
        """End the session."""
        await super().cleanup()
        if self._task is not None:
            task, self._task = self._task, None
            await self.cancel_task(task)
        await self._live.close()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Take sound in; keep what follows it in order; pass all else on."""
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame) and self._error is None:
            await self._take(frame)
        elif isinstance(frame, InterruptionFrame):
            await self._interrupt()
            await self.push_frame(frame, direction)
        elif isinstance(frame, EndFrame):
            await self._speak_to_the_end()
            await self.push_frame(frame, direction)
        elif isinstance(frame, TTSStoppedFrame) and self._label is not None:
            self._end_utterance()
            self._hold(frame)
        elif self._pending and self._follows_sound(frame, direction):
            self._hold(frame)
        else:
            await self.push_frame(frame, direction)
        if isinstance(frame, StartFrame):
            await self._begin()
        elif isinstance(frame, TTSStartedFrame):
            await self.start_ttfb_metrics()

    async def _begin(self) -> None:
        if self._error is not None:
            await self.push_error(f"The avatar cannot be shown, its voice goes on: {self._error}")
        elif self._task is None:
            self._task = self.create_task(self._forward())

    async def _take(self, frame: TTSAudioRawFrame) -> None:
        if self._label is not None and self._label.context_id != frame.context_id:
            self._end_utterance()
        label = self._label or _Label(self._begun + 1, frame.context_id)
        try:
            self._live.push_audio(pcm(frame.audio, frame.num_channels), frame.sample_rate, label)
        except HicodeError as error:
            await self.push_error(f"Sound was left out: {error}")
            return
        if self._label is None:
            self._label, self._begun, self._pushed_s = label, label.number, 0.0
            self._pending += 1
            self._silent.clear()
        self._pushed_s += len(frame.audio) / (2 * frame.num_channels * frame.sample_rate)

    def _end_utterance(self) -> None:
        self._live.end_utterance()
        self._label, self._pushed_s = None, math.inf

    @staticmethod
    def _follows_sound(frame: Frame, direction: FrameDirection) -> bool:
        downstream = direction == FrameDirection.DOWNSTREAM
        return downstream and frame.pts is None and not isinstance(frame, SystemFrame)

    def _hold(self, frame: Frame) -> None:
        self._waiting.append(_Waiting(self._begun, self._pushed_s, frame))

    async def _interrupt(self) -> None:
        self._live.clear()
        waiting, self._waiting = self._waiting, deque()
        self._label, self._pending, self._played_s = None, 0, 0.0
        self._silent.set()
        for held in waiting:
            if not held.frame.interruptible:
                await self.push_frame(held.frame)

    async def _speak_to_the_end(self) -> None:
        if self._label is not None:
            self._end_utterance()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._silent.wait(), 2 * self._live.waiting_s + DRAIN_S)

    async def _forward(self) -> None:
        """Pictures and sound, each when it is due."""
        async for item in self._live:
            if isinstance(item, Failure):
                await self.push_error(item.message)
            elif isinstance(item, Tick):
                await self._show(item)
            elif isinstance(item, UtteranceEnd):
                await self._finish(item)

    async def _show(self, tick: Tick) -> None:
        interruptions = self._live.interruptions
        if tick.image is not None and tick.changed:
            size = (self._live.width, self._live.height)
            image = OutputImageRawFrame(image=tick.image.tobytes(), size=size, format="RGB")
            image.sync_with_audio = tick.audio is not None
            await self.push_frame(image)
        if tick.audio is None or interruptions != self._live.interruptions:
            return
        assert isinstance(tick.label, _Label)
        await self.stop_ttfb_metrics()
        rate_hz = self._live.config.output_rate_hz
        sound = TTSAudioRawFrame(audio=tick.audio.tobytes(), sample_rate=rate_hz, num_channels=1)
        sound.context_id = tick.label.context_id
        await self.push_frame(sound)
        self._played_s += TICK_S
        await self._release(tick.label.number, self._played_s + 1e-6)

    async def _finish(self, end: UtteranceEnd) -> None:
        assert isinstance(end.label, _Label)
        self._pending, self._played_s = self._pending - 1, 0.0
        await self._release(end.label.number, math.inf)
        if not self._pending:
            self._silent.set()

    async def _release(self, utterance: int, played_s: float) -> None:
        """Pass on what waits for no more sound than that."""
        while self._waiting and (self._waiting[0].utterance, self._waiting[0].played_s) <= (utterance, played_s):
            await self.push_frame(self._waiting.popleft().frame)
