"""The server of `hicode serve`: routes, the checks that guard them, metrics.

Only this machine may connect unless another address is named. A token in the start link becomes a cookie; `Host` and
`Origin` are checked, so that no other page of the browser can reach the server.
"""

import asyncio
import contextlib
import hmac
import json
import math
import os
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from hicode.errors import HicodeError, InputError, ResourceError
from hicode.files import temporary_folder
from hicode.serve.chat import Chat, Reply, echo
from hicode.serve.conversation import Conversation, Parts
from hicode.serve.guide import Guide
from hicode.serve.hearing import EmbeddedHearing, ServiceHearing
from hicode.serve.jobs import CHUNK, Jobs
from hicode.serve.library import Library
from hicode.serve.live import LiveSession, Machine
from hicode.serve.service import Service
from hicode.serve.voice import EmbeddedVoice, EspeakVoice, ServiceVoice, languages

WEB = Path(__file__).parent / "web"
MAX_JSON, MAX_SOUND, MAX_PICTURE = 300_000, 20_000_000, 2_000_000
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; media-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class ServeConfig:
    """Where the server listens, and whom it serves."""

    host: str = "127.0.0.1"
    """Address to listen on. Others than 127.0.0.1 let other machines in: put a TLS proxy before it."""
    port: int = 8025  # Port to listen on; 0: any that is free.
    allowed_hosts: tuple[str, ...] = ()  # Names under which a proxy serves the page.
    max_sessions: int = 4  # Conversations that may be open at once.
    max_minutes: float = 60.0  # A conversation ends after so long; 0: never.
    max_mb: float = 4000.0  # A conversation whose renderer takes more memory ends (Linux); 0: never.
    chat_url: str | None = None
    """An OpenAI-like chat service that answers, as http://localhost:11434/v1; its key: HICODE_CHAT_KEY. Default: the
    avatar says what it hears."""
    chat_model: str = "default"  # Model of that service.
    language: str = "en"
    """Language that is typed and spoken at first: en, or one of `espeak-ng --voices` where espeak-ng is installed."""
    speech_url: str | None = None
    """An OpenAI-like service for voice and hearing, as http://localhost:8880/v1; its key: HICODE_SPEECH_KEY. Default:
    both run here."""
    speech_models: tuple[str, str, str] = ("tts-1", "alloy", "whisper-1")
    """Of that service: the model of the voice, the voice's name, the model of hearing."""
    ice_servers: tuple[str, ...] = ()
    """STUN or TURN servers for other networks (stun:HOST, turn:HOST). None is asked unless named here."""
    open_browser: bool = True  # Open the page in the browser.


@dataclass
class Server:
    """What the routes share."""

    config: ServeConfig
    library: Library
    machine: Machine
    jobs: Jobs
    parts: Parts
    token: str
    reply: Reply = echo
    guide: Guide = field(default_factory=Guide)
    connections: dict = field(default_factory=dict)
    recordings: Path = Path()
    stopping: bool = False

    def forget(self, identity: str) -> None:
        """A conversation is over. The next one need not wait for imports."""
        self.connections.pop(identity, None)
        if not self.stopping:
            self.machine.prepare()

    @property
    def cookie(self) -> str:
        """Name of the token's cookie. Cookies do not know ports, so two servers need two names."""
        return f"hicode-{self.config.port}"

    @property
    def hosts(self) -> set[str]:
        """Allowed values of the Host header."""
        names = {"127.0.0.1", "localhost", "[::1]", self.config.host}
        return {f"{name}:{self.config.port}" for name in names} | set(self.config.allowed_hosts)


# ------------------------------------------------------------------------------------------------------------- checks


class Guard:
    """ASGI middleware: Host, Origin and token of every request; safe headers on every answer."""

    def __init__(self, app, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope, receive, send) -> None:
        """Pass a request on, or answer it with its reason."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(HTTPConnection(scope))
        if scope["type"] == "websocket":
            if refusal is None:
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})  # before it is open: 403
            return

        async def send_safely(message) -> None:
            if message["type"] == "http.response.start":
                known = {key for key, _ in message["headers"]}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in known]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await (self._app if refusal is None else refusal)(scope, receive, send_safely)

    def _refusal(self, request: HTTPConnection) -> Response | None:
        server, path = self._server, request.url.path
        if Headers(scope=request.scope).get("host", "") not in server.hosts:
            return _error("This server does not answer to this host name. Use the link that hicode serve prints.", 421)
        origin = request.headers.get("origin")
        if origin is not None and origin.split("://")[-1] not in server.hosts:
            return _error("Another site may not use this server.", 403)
        if path in ("/healthz", "/metrics"):
            return None
        if path == "/" and "token" in request.query_params:
            if not _same(request.query_params["token"], server.token):
                return _error("The link's token is wrong. Use the link that hicode serve prints.", 401)
            answer = RedirectResponse("/", 303)
            answer.set_cookie(server.cookie, server.token, httponly=True, samesite="lax")
            return answer
        given = request.cookies.get(server.cookie) or request.headers.get("authorization", "").removeprefix("Bearer ")
        if not _same(given, server.token):
            return _error("The token is missing or wrong. Use the link that hicode serve prints.", 401)
        return None


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": message}, status)


async def _on_hicode_error(request: Request, error: Exception) -> Response:
    return _error(str(error), 503 if isinstance(error, ResourceError) else 400)


async def _on_any_error(request: Request, error: Exception) -> Response:
    return _error("The server met an error of its own. Its terminal says more.", 500)


async def _body(request: Request, most: int) -> bytes:
    """The body; InputError where it is too large."""
    out = bytearray()
    async for piece in request.stream():
        out += piece
        if len(out) > most:
            raise InputError(f"This is too large: {most / 1e6:.1f} MB may be sent at once.")
    return bytes(out)


async def _json(request: Request) -> dict:
    try:
        value = json.loads(await _body(request, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise InputError("The request is no JSON. Reload the page.") from error
    if not isinstance(value, dict):
        raise InputError("The request is no JSON object. Reload the page.")
    return value


# ------------------------------------------------------------------------------------------------------------- routes


def _server(request: Request) -> Server:
    return request.app.state.server


async def _page(request: Request) -> Response:
    return FileResponse(WEB / "index.html")


async def _health(request: Request) -> Response:
    return JSONResponse({"ok": True, "sessions": len(_server(request).machine.sessions)})


async def _metrics(request: Request) -> Response:
    machine = _server(request).machine
    c = machine.counters
    rows = [
        ("sessions", "gauge", "Conversations that are open", len(machine.sessions)),
        ("speakers", "gauge", "Avatars that speak", machine.speakers),
        ("renderer_fps", "gauge", "Frames a second that were measured", round(machine.fps, 2)),
        ("sessions_total", "counter", "Conversations", c.sessions),
        ("sessions_failed_total", "counter", "Conversations that ended in an error", c.failed),
        ("refused_total", "counter", "Conversations or speakers that were refused", c.refused),
        ("frames_total", "counter", "Frames that were sent", c.ticks),
        ("frames_repeated_total", "counter", "Frames whose own picture was late", c.repeated),
        ("frames_dropped_total", "counter", "Frames that a slow reader lost", c.dropped),
        ("late_seconds_total", "counter", "Lateness of all frames", round(c.late_s, 4)),
    ]
    lines = [
        f"# HELP hicode_{n} {text}\n# TYPE hicode_{n} {kind}\nhicode_{n} {value}\n" for n, kind, text, value in rows
    ]
    return PlainTextResponse("".join(lines), media_type="text/plain; version=0.0.4")


async def _avatars(request: Request) -> Response:
    entries = await asyncio.to_thread(_server(request).library.entries)
    return JSONResponse([entry.to_dict() for entry in entries])


async def _thumbnail(request: Request) -> Response:
    data = await asyncio.to_thread(_server(request).library.thumbnail, request.path_params["name"])
    return Response(data, media_type="image/webp")


async def _change_avatar(request: Request) -> Response:
    library, name = _server(request).library, request.path_params["name"]
    if request.method == "DELETE":
        library.delete(name)
    else:
        library.rename(name, (await _json(request)).get("name"))
    return JSONResponse({"ok": True})


async def _offer(request: Request) -> Response:
    """A WebRTC offer: opens a conversation."""
    from hicode.serve.webrtc import Connection

    server, body = _server(request), await _json(request)
    conversation, identity = await _begin(server, body.get("avatar"))
    connection = Connection(conversation, server.config.ice_servers, lambda: server.forget(identity))
    try:
        answer = await connection.answer(body.get("sdp"))
    except BaseException:
        await connection.close()
        raise
    server.connections[identity] = connection
    return JSONResponse({"sdp": answer, "session": identity})


async def _begin(server: Server, avatar: object) -> tuple[Conversation, str]:
    """A conversation with an avatar, and its name."""
    session = await LiveSession.open(server.machine, server.library.path(avatar))
    return Conversation(session, server.parts, server.recordings, server.reply), secrets.token_urlsafe(12)


async def _live(socket: WebSocket) -> None:
    """A conversation over a WebSocket: a new one, or one whose WebRTC did not connect."""
    from hicode.serve.socket import SocketConnection
    from hicode.serve.webrtc import Connection

    server: Server = socket.app.state.server
    await socket.accept()
    try:
        before = server.connections.get(identity := socket.query_params.get("session", ""))
        if isinstance(before, Connection):
            conversation = await before.release()
        else:
            conversation, identity = await _begin(server, socket.query_params.get("avatar"))
    except HicodeError as error:
        await socket.send_json({"type": "error", "message": str(error), "ended": True})
        await socket.close()
        return
    connection = SocketConnection(conversation, socket, lambda: server.forget(identity))
    server.connections[identity] = connection
    await socket.send_json({"type": "session", "session": identity})
    await connection.run()


def _conversation(request: Request) -> Conversation:
    connection = _server(request).connections.get(request.path_params["session"])
    if connection is None:
        raise InputError("There is no such conversation. Begin another one.")
    return connection.conversation


async def _sound(request: Request) -> Response:
    """A sound file to speak."""
    conversation = _conversation(request)
    data = await _body(request, MAX_SOUND)
    samples = await asyncio.to_thread(decode_sound, data)
    conversation.play(samples, 24_000)
    return JSONResponse({"seconds": round(len(samples) / 24_000, 2)})


def decode_sound(data: bytes) -> np.ndarray:
    """The sound of a file's bytes, int16 at 24 kHz. InputError where it is none."""
    from hicode.media.audio import read_speech
    from hicode.media.source import as_file

    with as_file(data) as file:
        try:
            samples = read_speech(file, 24_000)
        except HicodeError as error:
            raise InputError(str(error).replace(str(file), "The file")) from error
    return np.clip(np.round(samples * 32767), -32768, 32767).astype(np.int16)


async def _clip(request: Request) -> Response:
    """The MP4 of what was said last."""
    path = _conversation(request).recorder.path
    if path is None:
        return _error("Nothing was said yet. Let the avatar speak first.", 404)
    return FileResponse(path, media_type="video/mp4", filename="avatar.mp4")


async def _look(request: Request) -> Response:
    """A picture of the camera: what is wrong with it."""
    data = await _body(request, MAX_PICTURE)
    return JSONResponse(await asyncio.to_thread(_server(request).guide.look, data))


async def _all_jobs(request: Request) -> Response:
    jobs = _server(request).jobs
    if request.method == "GET":
        return JSONResponse([asdict(job) for job in jobs.all()])
    body = await _json(request)
    return JSONResponse(asdict(await jobs.begin(body.get("name"), body.get("filename"), body.get("size"))))


async def _job(request: Request) -> Response:
    jobs, name, action = _server(request).jobs, request.path_params["name"], request.path_params["action"]
    if action == "video" and request.method == "PUT":
        offset = request.query_params.get("offset", "")
        if not offset.isdecimal() or len(offset) > 12:
            raise InputError("The piece of the video has no offset. Reload the page.")
        return JSONResponse(asdict(await jobs.add(name, int(offset), await _body(request, CHUNK))))
    if action == "finish" and request.method == "POST":
        return JSONResponse(asdict(await jobs.finish(name)))
    if action == "start" and request.method == "POST":
        return JSONResponse(asdict(await jobs.start(name, (await _json(request)).get("consent"))))
    if action == "cancel" and request.method == "POST":
        return JSONResponse(asdict(await jobs.cancel(name)))
    if action == "delete" and request.method == "POST":
        await jobs.delete(name)
        return JSONResponse({"ok": True})
    if action == "events" and request.method == "GET":
        jobs.get(name)
        return StreamingResponse(_events(jobs, name), media_type="text/event-stream")
    return _error("There is no such page.", 404)


async def _events(jobs: Jobs, name: str):
    seen = None
    while (job := await jobs.changed(name, seen)) is not None:
        seen = job
        yield f"data: {json.dumps(asdict(job))}\n\n"


# ---------------------------------------------------------------------------------------------------------- the server


def _machine(config: ServeConfig) -> Machine:
    max_s, max_mb = 60 * config.max_minutes or math.inf, config.max_mb or math.inf
    return Machine(config.max_sessions, max_s=max_s, max_mb=max_mb)


def _parts(config: ServeConfig) -> Parts:
    """Voice and hearing as the settings name them. InputError where a language has no voice."""
    if config.speech_url:
        service = Service(config.speech_url, "speech", "--speech-url", "HICODE_SPEECH_KEY")
        voice_model, name, hearing_model = config.speech_models
        return Parts(
            lambda language: ServiceVoice(service, voice_model, name),
            lambda language: ServiceHearing(service, hearing_model),
        )
    voice = lambda language: EmbeddedVoice() if language == "en" else EspeakVoice(language)
    if config.language != "en":
        voice(config.language)
    return Parts(voice, EmbeddedHearing, languages(), config.language)


def create_app(folder: Path, config: ServeConfig, parts: Parts | None = None, token: str | None = None) -> Starlette:
    """The application over a folder of avatars. Its `state.server` holds what the routes share."""
    library = Library(folder)
    server = Server(
        config, library, _machine(config), Jobs(library),
        parts or _parts(config), token or secrets.token_urlsafe(24),
        Chat(config.chat_url, config.chat_model) if config.chat_url else echo,
    )  # fmt: skip

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        with temporary_folder() as server.recordings:
            server.machine.prepare()
            voice = asyncio.create_task(asyncio.to_thread(server.parts.prepare))
            yield
            server.stopping = True
            await voice
            for connection in list(server.connections.values()):
                await connection.close()
            await server.machine.close()
            await server.jobs.close()

    routes = [
        Route("/", _page),
        Route("/healthz", _health),
        Route("/metrics", _metrics),
        Route("/api/avatars", _avatars),
        Route("/api/avatars/{name}", _change_avatar, methods=["PATCH", "DELETE"]),
        Route("/api/avatars/{name}/thumbnail", _thumbnail),
        Route("/api/offer", _offer, methods=["POST"]),
        WebSocketRoute("/api/live", _live),
        Route("/api/sessions/{session}/sound", _sound, methods=["POST"]),
        Route("/api/sessions/{session}/clip", _clip),
        Route("/api/look", _look, methods=["POST"]),
        Route("/api/jobs", _all_jobs, methods=["GET", "POST"]),
        Route("/api/jobs/{name}/{action}", _job, methods=["GET", "POST", "PUT"]),
        Mount("/web", StaticFiles(directory=WEB)),
    ]
    handlers: dict = {HicodeError: _on_hicode_error, Exception: _on_any_error}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.state.server = server
    app.add_middleware(Guard, server=server)
    return app


def serve(folder: Path, config: ServeConfig, announce: Callable[[str], None] = print) -> None:
    """Run the server until it is stopped. InputError where the address cannot be used."""
    import uvicorn

    from hicode.serve.webrtc import prefer_local_rates, use_fast_vp8, use_loopback_without_network

    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime, below the voice, keeps a device's identity
    if sys.platform == "win32":
        raise InputError("hicode serve does not run on Windows yet. Use Linux, macOS or WSL.")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise InputError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror}). Choose another --port."
        ) from error
    config = replace(config, port=listener.getsockname()[1])
    if not config.ice_servers:
        prefer_local_rates()
    use_fast_vp8()
    use_loopback_without_network()
    app = create_app(folder, config)
    link = f"http://{'localhost' if config.host == '127.0.0.1' else config.host}:{config.port}/"
    link += f"?token={app.state.server.token}"
    announce(f"Open {link}\nWhoever has this link can use the server. Ctrl-C ends it.")
    if config.open_browser:
        import webbrowser

        webbrowser.open(link)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run([listener])
