"""WebSocket: the same conversation where WebRTC cannot connect. H.264 pictures for WebCodecs, PCM sound, messages.

    to the page    one binary message a tick, or JSON
    from the page  microphone as binary int16 at 16 kHz, or JSON

A tick is: number (uint32), flags (uint8: 1 key frame, 2 sound follows the picture), length of the picture (uint32), all
little-endian; the picture (H.264 Annex B, empty: the last one again); 40 ms of int16 at 48 kHz. What a slow connection
cannot take is dropped before it is encoded.
"""

import asyncio
import contextlib
import json
import struct
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from hicode.audio import FPS
from hicode.serve.conversation import Conversation
from hicode.serve.live import LiveTick

HEADER = struct.Struct("<IBI")
MAX_MESSAGE = 20_000
MAX_SOUND = 64_000  # bytes of one message: 2 s
KEY_EVERY = 50  # frames
SEND_S = 10.0
"""A page that takes nothing for so long is gone."""


class Encoder:
    """Pictures to H.264 access units that any WebCodecs decoder takes ("avc1.42E01F")."""

    def __init__(self, height: int, width: int):
        options = {"preset": "superfast", "tune": "zerolatency", "crf": "23", "profile": "baseline", "threads": "1"}
        options |= {"x264-params": f"keyint={KEY_EVERY}:min-keyint={KEY_EVERY}:scenecut=0:repeat-headers=1:annexb=1"}
        codec = av.CodecContext.create("libx264", "w")
        codec.height, codec.width, codec.pix_fmt = height, width, "yuv420p"  # pyright: ignore
        codec.framerate, codec.time_base, codec.options = Fraction(round(FPS)), Fraction(1, round(FPS)), options  # pyright: ignore
        self._codec, self._count = codec, 0

    def encode(self, picture: np.ndarray) -> tuple[bytes, bool]:
        """The access unit, and whether it is a key frame. yuv420p, h·3/2 rows."""
        frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
        frame.pts, self._count = self._count, self._count + 1
        packets = self._codec.encode(frame)  # pyright: ignore[reportAttributeAccessIssue] - a video codec's
        return b"".join(bytes(packet) for packet in packets), any(packet.is_keyframe for packet in packets)


class SocketConnection:
    """One page over one WebSocket, and its conversation."""

    def __init__(self, conversation: Conversation, socket: WebSocket, closed: Callable[[], None]):
        self.conversation, self._socket, self._closed = conversation, socket, closed
        self._outbox: asyncio.Queue[dict] = asyncio.Queue(200)
        self._encoder: Encoder | None = None
        self._task: asyncio.Task | None = None
        self._ending: asyncio.Task | None = None

    async def run(self) -> None:
        """Serve it until the page or the session ends."""
        self._task = asyncio.current_task()
        self.conversation.connect(self._tell)
        work = [asyncio.create_task(part()) for part in (self._pump, self._write, self._read)]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (error := task.exception()) is not None and not isinstance(error, (WebSocketDisconnect, OSError)):
                    raise error
        finally:
            self._ending = asyncio.create_task(self._end(work))
            await asyncio.shield(self._ending)  # a server that stops cancels this task, and nothing may stay

    async def _end(self, work: list[asyncio.Task]) -> None:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        self._closed()
        await self.conversation.close()
        with contextlib.suppress(Exception):  # the page has gone
            if self._socket.application_state is WebSocketState.CONNECTED:
                await self._socket.close()

    async def close(self) -> None:
        """End connection and conversation."""
        task = self._task
        if task is not None and not task.done() and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait([task])
        if self._ending is not None:
            await self._ending

    def _tell(self, message: dict) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # a page that reads nothing
            self._outbox.put_nowait(message)

    async def _write(self) -> None:
        while True:
            message = await self._outbox.get()
            await asyncio.wait_for(self._socket.send_text(json.dumps(message)), SEND_S)
            if message.get("ended"):
                return

    async def _pump(self) -> None:
        """Ticks, until the session ends."""
        session = self.conversation.session
        last = None
        async for tick in session.ticks():
            data = await asyncio.to_thread(self._packed, tick, tick.picture is last)
            last = tick.picture
            await asyncio.wait_for(self._socket.send_bytes(data), SEND_S)
            self.conversation.shown(tick)
        self._tell({"type": "error", "message": session.error or "The conversation has ended.", "ended": True})
        await asyncio.sleep(1)  # `_write` ends first

    def _packed(self, tick: LiveTick, same: bool) -> bytes:
        picture, key = b"", False
        if not same:
            if self._encoder is None:
                self._encoder = Encoder(tick.picture.shape[0] * 2 // 3, tick.picture.shape[1])
            picture, key = self._encoder.encode(tick.picture)
        sound = tick.audio.tobytes() if tick.speaking else b""
        return HEADER.pack(tick.number, key + 2 * bool(sound), len(picture)) + picture + sound

    async def _read(self) -> None:
        """Messages and microphone."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data, text = message.get("bytes"), message.get("text")
            if data is not None:
                if len(data) <= MAX_SOUND and len(data) % 2 == 0:
                    self.conversation.hear(np.frombuffer(data, "<i2").astype(np.float32) / 32768)
                continue
            try:
                value = json.loads(text) if text is not None and len(text) <= MAX_MESSAGE else None
            except (ValueError, RecursionError):
                value = None
            self.conversation.receive(value)
