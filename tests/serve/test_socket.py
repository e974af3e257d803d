"""A conversation over a WebSocket, with a renderer and a voice that are scripts."""

import functools
import json
import time

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("aiortc", reason="the extra serve is not installed")

import av
import numpy as np
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from helpers.scripted_renderer import scripted_renderer
from hicode.serve import app as server
from hicode.serve.app import ServeConfig, create_app
from hicode.serve.conversation import Parts
from hicode.serve.live import Machine
from hicode.serve.socket import HEADER, Encoder

TOKEN, ORIGIN = "the-token", "http://localhost:8025"


class Tape:
    """Records nothing."""

    def __init__(self, folder, session):
        pass

    def add(self, tick):
        return False

    def close(self):
        pass


class Voice:
    rate_hz = 48_000

    def speak(self, text):
        yield np.full(5 * 48_000, 1000, np.int16)


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setattr("hicode.serve.conversation.Recorder", Tape)
    monkeypatch.setattr(server, "Machine", functools.partial(Machine, renderer=scripted_renderer))
    (tmp_path / "Any.hicode").write_text("the script reads nothing")
    app = create_app(tmp_path, ServeConfig(), Parts(lambda language: Voice(), lambda language: None), token=TOKEN)  # type: ignore[arg-type]
    with TestClient(app, base_url=ORIGIN) as client:
        client.get(f"/?token={TOKEN}")
        yield client


def connect(client, query: str, headers: dict = {}):  # noqa: B006 - only read
    known = {"host": "localhost:8025", "authorization": f"Bearer {TOKEN}"}
    return client.websocket_connect(f"/api/live?{query}", headers=known | headers)


def ticks(socket, count: int) -> list[tuple[int, bytes, np.ndarray]]:
    """The next ticks (number, picture, sound), past the messages between them."""
    out, deadline = [], time.monotonic() + 60
    while len(out) < count:
        assert time.monotonic() < deadline
        message = socket.receive()
        if message["type"] == "websocket.close":
            raise WebSocketDisconnect
        if (data := message.get("bytes")) is not None:
            number, flags, length = HEADER.unpack_from(data)
            body = data[HEADER.size :]
            out.append((number, body[:length], np.frombuffer(body[length:], np.int16)))
            assert bool(flags & 2) == (len(body) > length)
    return out


def messages(socket, kind: str) -> dict:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        text = socket.receive().get("text")
        if text is not None and (message := json.loads(text))["type"] == kind:
            return message
    raise AssertionError(f"no message {kind}")


def test_pictures_and_sound_come_together_until_an_interruption(client):
    with connect(client, "avatar=Any") as socket:
        assert messages(socket, "session")["session"] in client.app.state.server.connections
        first = ticks(socket, 5)
        decoder = av.CodecContext.create("h264", "r")
        decoded = [frame for _, picture, _ in first for frame in decoder.decode(av.Packet(picture))]
        assert len(decoded) >= 4 and (decoded[0].width, decoded[0].height) == (64, 64)
        socket.send_json({"type": "say", "text": "Hello."})
        spoken = ticks(socket, 40)
        loud = [sound for _, _, sound in spoken if len(sound)]
        assert len(loud) > 20 and all(len(sound) == 1920 and (sound == 1000).all() for sound in loud)
        numbers = [number for number, _, _ in first + spoken]
        assert numbers == sorted(set(numbers))
        socket.send_json({"type": "interrupt"})
        messages(socket, "interrupted")
        assert not any(len(sound) for _, _, sound in ticks(socket, 12)[6:])
    deadline = time.monotonic() + 60
    machine = client.app.state.server.machine
    while machine.sessions and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not client.app.state.server.connections and not machine.sessions


def test_a_conversation_whose_webrtc_does_not_connect_goes_on_here(client):
    from aiortc import RTCPeerConnection

    async def offer():
        peer = RTCPeerConnection()
        peer.addTransceiver("audio")
        peer.addTransceiver("video", direction="recvonly")
        peer.createDataChannel("messages")
        await peer.setLocalDescription(await peer.createOffer())
        return peer.localDescription.sdp, await peer.close()

    sdp, _ = client.portal.call(offer)
    session = client.post("/api/offer", json={"avatar": "Any", "sdp": sdp}).json()["session"]
    (before,) = client.app.state.server.machine.sessions
    with connect(client, f"session={session}") as socket:
        assert messages(socket, "session")["session"] == session and len(ticks(socket, 3)) == 3
        assert client.app.state.server.machine.sessions == {before}


def test_a_renderer_that_dies_ends_it_with_a_sentence(client):
    with connect(client, "avatar=Any") as socket:
        ticks(socket, 2)
        (session,) = client.app.state.server.machine.sessions
        session._process.kill()
        error = messages(socket, "error")
        assert error["ended"] and error["message"].startswith("The renderer has stopped")


@pytest.mark.parametrize("query", ["", "avatar=None", "session=nonsense", "avatar=../secret"])
def test_what_is_not_there_is_one_sentence(client, query):
    with connect(client, f"{query}") as socket:
        error = socket.receive_json()
        assert error["type"] == "error" and error["ended"] and error["message"].endswith(".")


def test_garbage_is_answered_and_the_conversation_goes_on(client):
    with connect(client, "avatar=Any") as socket:
        for garbage in ("no json", "[" * 5000, "3", '{"type": 3}', "x" * 30_000):
            socket.send_text(garbage)
            assert messages(socket, "error")["message"].endswith(".")
        for garbage in (b"", b"\0", b"\0" * 70_000):
            socket.send_bytes(garbage)
        assert len(ticks(socket, 3)) == 3


@pytest.mark.parametrize(
    "headers", [{"origin": "http://evil.example"}, {"host": "evil.example"}, {"authorization": "Bearer wrong"}]
)
def test_strangers_are_refused(client, headers):
    with pytest.raises(WebSocketDisconnect), connect(client, "avatar=Any", headers):
        pass
    assert not client.app.state.server.machine.sessions


def test_every_picture_is_decodable_at_once_and_key_frames_come_again():
    encoder = Encoder(64, 64)
    keys = [encoder.encode(np.full((96, 64), 60 + t, np.uint8))[1] for t in range(120)]
    assert [t for t, key in enumerate(keys) if key] == [0, 50, 100]
