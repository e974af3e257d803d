"""The live pictures carry the watermark, after the codecs that pages receive them by."""

from collections.abc import Iterator
from types import SimpleNamespace

import av
import numpy as np
import pytest

from helpers.trust_pictures import pictures
from hicode.trust.watermark import Payload, Watermark, detect

pytest.importorskip("aiortc", reason="hicode serve needs hicode[serve]")

SIZE, PAYLOAD = 384, Payload(0x89ABCDEF)


def streamed() -> list[np.ndarray]:
    """As the renderer puts them into the shared memory, yuv420p."""
    from hicode.serve.renderer import TickLoop

    memory = np.zeros((SIZE * 3 // 2, SIZE), np.uint8)
    loop = SimpleNamespace(
        _last=None, _free=[], _size=(SIZE, SIZE), _watermark=Watermark(PAYLOAD), slot=lambda number: memory
    )
    out = []
    for picture in pictures(20, SIZE):
        loop._free = [0]
        assert TickLoop._slot(loop, picture) == 0  # pyright: ignore[reportArgumentType]
        out.append(memory.copy())
    return out


def by_vp8(frames: list[np.ndarray]) -> Iterator[np.ndarray]:
    """aiortc's encoder at the live session's rate, without the network's packets."""
    from aiortc.codecs import vpx

    from hicode.serve.webrtc import prefer_local_rates

    prefer_local_rates()
    encoder, decoder = vpx.Vp8Encoder(), av.CodecContext.create("libvpx", "r")
    encoder.target_bitrate = vpx.DEFAULT_BITRATE
    for number, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="yuv420p")
        picture.pts, picture.time_base = 3600 * number, vpx.VIDEO_TIME_BASE
        payloads, _ = encoder.encode(picture)
        for shown in decoder.decode(av.Packet(b"".join(map(vpx.vp8_depayload, payloads)))):
            yield shown.to_ndarray(format="rgb24")


def by_h264(frames: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The WebSocket's encoder."""
    from hicode.serve.socket import Encoder

    encoder, decoder = Encoder(SIZE, SIZE), av.CodecContext.create("h264", "r")
    for frame in frames:
        unit, _ = encoder.encode(frame)
        for shown in decoder.decode(av.Packet(unit)):
            yield shown.to_ndarray(format="rgb24")


@pytest.mark.parametrize("codec", [by_vp8, by_h264])
def test_the_mark_is_found_in_what_a_page_receives(codec):
    received = list(codec(streamed()))
    assert len(received) >= 15
    found = detect(received)
    assert found.payload == PAYLOAD and found.false_alarm_rate < 1e-20
