"""A call over WebRTC between two peers of this process, with a renderer that is a script."""

import asyncio
import gc
import json
import multiprocessing
import os
import threading
from typing import Any, cast

import pytest

pytest.importorskip("aiortc", reason="the extra serve is not installed")

import numpy as np
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription

from helpers.scripted_renderer import scripted_renderer
from hicode.errors import InputError
from hicode.serve.conversation import Conversation, Parts
from hicode.serve.live import LiveSession, Machine
from hicode.serve.webrtc import Connection, use_loopback_without_network


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
        conversation = Conversation(session, cast("Parts", None), self.folder)
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
        await asyncio.wait_for(self.ended.wait(), 15)
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


@pytest.mark.parametrize(
    "sdp", [None, 3, "", "v=0", "v=0\r\n" + "x" * 300_000, "v=0\r\no=- 1 2 IN IP4 0.0.0.0\r\nm=\r\n"]
)
def test_what_is_no_offer_is_refused_and_nothing_stays(tmp_path, sdp):
    async def story(machine):
        session = await LiveSession.open(machine, "any")
        conversation = Conversation(session, cast("Parts", None), tmp_path)
        connection = Connection(conversation, (), lambda: None)
        with pytest.raises(InputError, match="offer"):
            await connection.answer(sdp)
        await connection.close()
        assert not machine.sessions

    run(story, tmp_path)
