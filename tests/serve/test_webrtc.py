"""A call over WebRTC between two peers of this process, with a renderer that is a script."""

import asyncio
import gc
import json
import multiprocessing
import os
import threading
from fractions import Fraction
from typing import Any, cast

import pytest

pytest.importorskip("aiortc", reason="the extra serve is not installed")

import av
import numpy as np
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.codecs.vpx import vp8_depayload

from helpers.scripted_renderer import scripted_renderer
from hicode.errors import InputError
from hicode.serve.conversation import Conversation, Parts
from hicode.serve.live import SILENCE, LiveSession, LiveTick, Machine
from hicode.serve.webrtc import CONNECT_S, MOST_SAME, Connection, FastVp8, use_loopback_without_network

SILENT = Parts(lambda _: cast("Any", None), lambda _: cast("Any", None))


class Tape:
    """Records nothing."""

    def add(self, tick):
        return False

    def close(self):
        pass


class Caller:
    """The page's side."""

    def __init__(self, machine: Machine, folder):
        self.machine, self.folder = machine, folder
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.tracks: dict[str, Any] = {}
        self.messages: list[dict] = []
        self.ended = asyncio.Event()

    async def begin(self) -> None:
        session = self.session = await LiveSession.open(self.machine, "any")
        conversation = Conversation(session, SILENT, self.folder)
        conversation.recorder = cast("Any", Tape())
        connection = Connection(conversation, (), self.ended.set)
        self.peer.on("track", lambda track: self.tracks.update({track.kind: track}))
        self.peer.addTransceiver("audio", direction="recvonly")
        self.peer.addTransceiver("video", direction="recvonly")
        self.channel = self.peer.createDataChannel("messages")
        self.channel.on("message", lambda data: self.messages.append(json.loads(data)))
        await self.peer.setLocalDescription(await self.peer.createOffer())
        answer = await connection.answer(self.peer.localDescription.sdp)
        await self.peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))

    async def leave(self) -> None:
        await self.peer.close()
        await asyncio.wait_for(self.ended.wait(), 2 * CONNECT_S)  # the first call is dropped before it connects
        while self.machine.sessions:
            await asyncio.sleep(0.05)


def run(story, tmp_path) -> None:
    use_loopback_without_network()

    async def whole():
        machine = Machine(renderer=scripted_renderer)
        try:
            await asyncio.wait_for(story(machine), 60)
        finally:
            await machine.close()

    asyncio.run(whole())


def test_picture_and_sound_carry_the_time_of_one_clock(tmp_path):
    async def story(machine):
        caller = Caller(machine, tmp_path)
        await caller.begin()
        pictures = [await caller.tracks["video"].recv() for _ in range(5)]
        assert (pictures[0].width, pictures[0].height) == (64, 64)
        steps = np.diff([picture.pts for picture in pictures])
        assert (steps > 0).all() and (steps % 3600 == 0).all()  # 40 ms of 90 kHz
        tone = 8000 * np.sin(2 * np.pi * 400 * np.arange(96_000) / 48_000)
        caller.session.push(tone.astype(np.int16), 48_000)
        loud = 0
        while loud <= 20:
            frame = await caller.tracks["audio"].recv()
            loud += abs(frame.to_ndarray()).max() > 2000
        assert {"type": "state", "state": "speaking"} in caller.messages
        caller.channel.send(json.dumps({"type": "interrupt"}))
        while {"type": "interrupted"} not in caller.messages:
            await asyncio.sleep(0.05)
        await caller.leave()

    run(story, tmp_path)


@pytest.mark.slow
def test_calls_that_are_dropped_leave_no_thread_file_or_process(tmp_path):
    def held() -> tuple[int, int, int]:
        gc.collect()
        files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        return threading.active_count(), files, len(multiprocessing.active_children())

    async def story(machine):
        counts = []
        for k in range(4):
            caller = Caller(machine, tmp_path)
            await caller.begin()
            for _ in range(k):
                await caller.tracks["video"].recv()
            await caller.leave()
            await asyncio.sleep(0.2)
            counts.append(held())
        threads, files, processes = zip(*counts)
        assert max(files) <= files[0] + 1 and max(processes) == 0, counts
        assert max(threads) <= min(threads) + 8, counts  # the event loop's pool grows to its limit

    run(story, tmp_path)


def test_a_repeated_picture_is_sent_now_and_then_and_sound_in_even_packets(tmp_path):
    async def story(machine):
        connection = Connection(cast("Any", None), (), lambda: None)
        pictures, sounds = [], []
        connection._video.put, connection._audio.put = pictures.append, sounds.append
        for number in range(1 + MOST_SAME):
            connection._put(LiveTick(number, 0.0, np.zeros((96, 64), np.uint8), SILENCE, False, number > 0))
        assert [frame.pts // 3600 for frame in pictures] == [0, MOST_SAME]
        assert len(sounds) == 2 * MOST_SAME + 1
        await asyncio.sleep(0.05)
        assert [frame.pts for frame in sounds] == list(range(0, 2 * 960 * (MOST_SAME + 1), 960))
        await connection._peer.close()

    run(story, tmp_path)


def test_the_encoder_gives_a_key_frame_when_asked_and_follows_the_rate():
    encoder, keys = FastVp8(), []
    for k in range(4):
        frame = av.VideoFrame.from_ndarray(np.full((96, 64), 100 + k, np.uint8), format="yuv420p")
        frame.pts, frame.time_base = 3600 * k, Fraction(1, 90_000)
        encoder.target_bitrate = 500_000 if k < 3 else 1_000_000
        packets, stamp = encoder.encode(frame, force_keyframe=k == 2)
        assert stamp == 3600 * k
        keys.append(not vp8_depayload(packets[0])[0] & 1)
    assert keys == [True, False, True, True]


@pytest.mark.parametrize(
    "sdp", [None, 3, "", "v=0", "v=0\r\n" + "x" * 300_000, "v=0\r\no=- 1 2 IN IP4 0.0.0.0\r\nm=\r\n"]
)
def test_what_is_no_offer_is_refused_and_nothing_stays(tmp_path, sdp):
    async def story(machine):
        session = await LiveSession.open(machine, "any")
        conversation = Conversation(session, SILENT, tmp_path)
        connection = Connection(conversation, (), lambda: None)
        with pytest.raises(InputError, match="offer"):
            await connection.answer(sdp)
        await connection.close()
        assert not machine.sessions

    run(story, tmp_path)
