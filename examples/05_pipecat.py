"""A Pipecat pipeline with an avatar after the voice; `pip install 'hicode[pipecat]'`.

    TransportParams(..., **OUTPUT)                      # of your transport
    pipeline = Pipeline(with_avatar([transport.input(), stt, llm, tts], "me.hicode", transport.output()))

Run as it stands, it speaks a sound file into the pipeline and counts what comes out:

    python examples/05_pipecat.py me.hicode hello.wav
"""

import asyncio
import sys

import soundfile
from pipecat.frames.frames import EndFrame, OutputImageRawFrame, TTSAudioRawFrame, TTSStartedFrame, TTSStoppedFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.workers.runner import WorkerRunner

from hicode.integrations.pipecat import HicodeAvatar

# Pictures that are queued with their sound are shown with video_out_is_live=False only.
OUTPUT = dict(audio_out_enabled=True, audio_out_sample_rate=24_000, video_out_enabled=True, video_out_is_live=False)


def with_avatar(before: list, avatar, output: FrameProcessor) -> list:
    """The processors of a pipeline whose voice gets a face."""
    return [*before, HicodeAvatar(avatar), output]


class Counter(FrameProcessor):
    """In the transport's place: counts pictures and sound."""

    pictures, sound = 0, 0

    async def process_frame(self, frame, direction):  # noqa: D102 - Pipecat's
        await super().process_frame(frame, direction)
        self.pictures += isinstance(frame, OutputImageRawFrame)
        self.sound += isinstance(frame, TTSAudioRawFrame)
        await self.push_frame(frame, direction)


async def main(avatar, sound: str) -> Counter:
    """Speak one sound file."""
    samples, rate_hz = soundfile.read(sound, dtype="int16")
    speech = TTSAudioRawFrame(audio=samples.tobytes(), sample_rate=rate_hz, num_channels=1, context_id="hello")
    worker = PipelineWorker(Pipeline(with_avatar([], avatar, counter := Counter())))
    turn = [TTSStartedFrame(context_id="hello"), speech, TTSStoppedFrame(context_id="hello"), EndFrame()]
    await worker.queue_frames(turn)
    runner = WorkerRunner()
    await runner.add_workers(worker)
    await runner.run()
    print(f"{counter.pictures} pictures and {counter.sound} pieces of sound")
    return counter


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
