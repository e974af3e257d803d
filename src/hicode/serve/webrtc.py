"""WebRTC: picture, sound, microphone and messages of a conversation in one connection (aiortc).

One pump hands a tick's picture and sound to both tracks at the same moment: browsers align lips by the time of sending.
"""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable
from fractions import Fraction

import aiortc.codecs
import av
import numpy as np
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.codecs.vpx import Vp8Encoder
from aiortc.mediastreams import MediaStreamError

from hicode.audio import SAMPLE_RATE_HZ, VIDEO_SAMPLE_RATE_HZ
from hicode.errors import InputError
from hicode.serve.conversation import Conversation
from hicode.serve.live import TICK_SAMPLES, LiveTick

QUEUED_PICTURES, QUEUED_PACKETS = 4, 20
MAX_MESSAGE = 20_000
PACKET = 960  # samples of 20 ms
CONNECT_S = 15.0
MOST_SAME = 10  # ticks whose picture is the one before: they are not sent, but for one now and then
VP8_OPTIONS = {
    "deadline": "realtime", "cpu-used": "-12", "lag-in-frames": "0", "noise-sensitivity": "0", "static-thresh": "1",
    "undershoot-pct": "100", "overshoot-pct": "15", "partitions": "0",
}  # fmt: skip


def prefer_local_rates() -> None:
    """Let VP8 begin at 1.5 Mbit/s: aiortc's 0.5 Mbit/s is for far networks."""
    from aiortc.codecs import vpx

    vpx.MIN_BITRATE = vpx.DEFAULT_BITRATE = 1_500_000
    vpx.MAX_BITRATE = 2_500_000


def use_loopback_without_network() -> None:
    """Offer 127.0.0.1 where the machine has no other address; aioice leaves it out."""
    import aioice.ice as ice

    addresses = ice.get_host_addresses
    if not getattr(addresses, "hicode", False):

        def with_loopback(use_ipv4: bool, use_ipv6: bool) -> list[str]:
            return addresses(use_ipv4, use_ipv6) or ["127.0.0.1"]

        with_loopback.hicode = True  # type: ignore[attr-defined]
        ice.get_host_addresses = with_loopback


class FastVp8(Vp8Encoder):
    """aiortc's encoder in 60 % of its time: without the denoiser, which our pictures do not need, and with less search.

    Its codec is made here; the rest of `encode` takes it as its own.
    """

    def encode(self, frame: av.VideoFrame, force_keyframe: bool = False) -> tuple[list[bytes], int]:  # pyright: ignore
        """Packets of one frame, and its time stamp."""
        rate, codec = self.target_bitrate, self.codec
        if codec is None or codec.width != frame.width or abs(rate / (codec.bit_rate or 1) - 1) > 0.1:
            codec = av.CodecContext.create("libvpx", "w")
            codec.width, codec.height, codec.pix_fmt = frame.width, frame.height, "yuv420p"
            codec.bit_rate, codec.gop_size, codec.qmin, codec.qmax = rate, 3000, 2, 56
            codec.thread_count, codec.options = (
                1,
                VP8_OPTIONS | dict.fromkeys(("minrate", "maxrate", "bufsize"), f"{rate}"),
            )
            self.codec = codec
        return super().encode(frame, force_keyframe)


def use_fast_vp8() -> None:
    """Let aiortc encode with `FastVp8`."""
    aiortc.codecs.Vp8Encoder = FastVp8  # pyright: ignore[reportPrivateImportUsage]


class _Track(MediaStreamTrack):
    """Frames that the pump hands over; the oldest goes where the connection is slow."""

    def __init__(self, kind: str, queued: int):
        self.kind = kind
        super().__init__()
        self._frames: asyncio.Queue = asyncio.Queue(queued)

    def put(self, frame) -> None:
        """The next frame."""
        if self._frames.full():
            self._frames.get_nowait()
        self._frames.put_nowait(frame)

    async def recv(self):
        """As aiortc asks for it."""
        if self.readyState != "live":
            raise MediaStreamError
        return await self._frames.get()


class Connection:
    """One peer connection and its conversation."""

    def __init__(self, conversation: Conversation, ice_servers: tuple[str, ...], closed: Callable[[], None]):
        servers = [RTCIceServer(urls=url) for url in ice_servers]
        self._peer = RTCPeerConnection(RTCConfiguration(iceServers=servers))
        self.conversation, self._closed = conversation, closed
        self._video, self._audio = _Track("video", QUEUED_PICTURES), _Track("audio", QUEUED_PACKETS)
        self._tasks: list[asyncio.Task] = []
        self._channel: RTCDataChannel | None = None
        self._ended = False
        self._rest: deque[av.AudioFrame] = deque()  # sound of the last tick that is not sent yet
        self._same = MOST_SAME  # ticks since a picture was sent
        self._peer.on("track", self._on_track)
        self._peer.on("datachannel", self._on_channel)
        self._peer.on("connectionstatechange", self._on_state)

    async def answer(self, sdp: object) -> str:
        """The answer to the page's offer. InputError where that is none."""
        if not isinstance(sdp, str) or not sdp.startswith("v=0") or len(sdp) > 200_000:
            raise InputError("This is no WebRTC offer. Reload the page.")
        try:
            await self._peer.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
            self._peer.addTrack(self._audio)
            self._peer.addTrack(self._video)
            await self._peer.setLocalDescription(await self._peer.createAnswer())
        except Exception as error:  # aiortc raises whatever its parser meets
            raise InputError("This WebRTC offer cannot be answered. Use a current browser.") from error
        self._tasks.append(asyncio.create_task(self._pump()))
        self._tasks.append(asyncio.create_task(self._give_up()))
        return self._peer.localDescription.sdp

    async def _give_up(self) -> None:
        await asyncio.sleep(CONNECT_S)
        if self._peer.connectionState != "connected":
            await self.close()

    async def _pump(self) -> None:
        """Ticks to both tracks, until the session ends."""
        session = self.conversation.session
        async for tick in session.ticks():
            self._put(tick)
            self.conversation.shown(tick)
            await asyncio.sleep(0)  # both senders take it before the next
        self._tell({"type": "error", "message": session.error or "The conversation has ended.", "ended": True})
        await asyncio.sleep(0.5)
        asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self.close()))

    def _put(self, tick: LiveTick) -> None:
        self._same = self._same + 1 if tick.repeated else MOST_SAME
        if self._same >= MOST_SAME:
            self._same = 0
            picture = av.VideoFrame.from_ndarray(tick.picture, format="yuv420p")
            picture.pts, picture.time_base = tick.number * 3600, Fraction(1, 90_000)
            self._video.put(picture)
        self._put_rest()
        for begin in range(0, TICK_SAMPLES, PACKET):
            samples = np.ascontiguousarray(tick.audio[None, begin : begin + PACKET])
            sound = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            sound.sample_rate = VIDEO_SAMPLE_RATE_HZ
            sound.pts, sound.time_base = tick.number * TICK_SAMPLES + begin, Fraction(1, VIDEO_SAMPLE_RATE_HZ)
            self._rest.append(sound)
        self._audio.put(self._rest.popleft())
        asyncio.get_running_loop().call_later(PACKET / VIDEO_SAMPLE_RATE_HZ, self._put_rest)

    def _put_rest(self) -> None:
        """The tick's second packet, 20 ms after the first: the browser's buffer grows with what comes in bursts."""
        while self._rest:
            self._audio.put(self._rest.popleft())

    def _on_track(self, track: MediaStreamTrack) -> None:
        if track.kind == "audio":
            self._tasks.append(asyncio.create_task(self._listen(track)))

    async def _listen(self, track: MediaStreamTrack) -> None:
        """The microphone."""
        resampler = av.AudioResampler("s16", "mono", SAMPLE_RATE_HZ)
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                for piece in resampler.resample(frame):  # pyright: ignore[reportArgumentType] - an audio track's
                    self.conversation.hear(piece.to_ndarray().reshape(-1).astype(np.float32) / 32768)

    def _on_channel(self, channel: RTCDataChannel) -> None:
        self._channel = channel
        channel.on("message", self._on_message)
        self.conversation.connect(self._tell)

    def _on_message(self, data) -> None:
        try:
            message = json.loads(data) if isinstance(data, str) and len(data) <= MAX_MESSAGE else None
        except ValueError:
            message = None
        self.conversation.receive(message)

    def _tell(self, message: dict) -> None:
        if self._channel is not None and self._channel.readyState == "open":
            self._channel.send(json.dumps(message))

    async def _on_state(self) -> None:
        if self._peer.connectionState in ("failed", "closed"):
            await self.close()

    async def close(self) -> None:
        """End connection and conversation."""
        if not self._ended:
            self._closed()
            await (await self.release()).close()

    async def release(self) -> Conversation:
        """End the connection alone: its conversation goes on elsewhere."""
        self._ended = True
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        await self._peer.close()
        return self.conversation
