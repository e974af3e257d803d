"""The avatar repeats what you say, in FastRTC's page; `pip install fastrtc` (it brings Gradio, 1.1 GB in all).

python examples/06_fastrtc.py me.hicode
"""

import asyncio
import sys

import numpy as np
from fastrtc import AsyncAudioVideoStreamHandler, Stream

from hicode.integrations.live_avatar import LiveAvatar, Tick

RATE_HZ = 24_000


class Echo(AsyncAudioVideoStreamHandler):
    """One listener. In the place of `receive`, push the sound of your own voice."""

    def __init__(self, avatar):
        super().__init__("mono", output_sample_rate=RATE_HZ, input_sample_rate=RATE_HZ, fps=25)
        self.avatar = avatar
        self.pictures, self.sound = asyncio.Queue(2), asyncio.Queue(2)

    def copy(self):
        """A handler for each connection."""
        return Echo(self.avatar)

    async def start_up(self):
        """Begin to render."""
        self.live = LiveAvatar(self.avatar)
        await self.live.start()
        self.task = asyncio.create_task(self._forward())

    async def _forward(self):
        async for item in self.live:
            if isinstance(item, Tick):
                silence = np.zeros(RATE_HZ // 25, np.int16)
                if item.image is not None:
                    await self.pictures.put(item.image[..., ::-1])
                await self.sound.put((RATE_HZ, (silence if item.audio is None else item.audio)[None]))

    async def receive(self, frame):  # noqa: D102 - FastRTC's names
        self.live.push_audio(frame[1].reshape(-1), frame[0])

    async def emit(self):  # noqa: D102
        return await self.sound.get()

    async def video_receive(self, frame): ...  # noqa: D102 - the user's camera is not needed

    async def video_emit(self):  # noqa: D102
        return await self.pictures.get()

    async def shutdown(self):  # noqa: D102
        self.task.cancel()
        await self.live.close()


if __name__ == "__main__":
    Stream(Echo(sys.argv[1]), modality="audio-video", mode="send-receive").ui.launch()
