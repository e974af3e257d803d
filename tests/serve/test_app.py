"""Routes: what strangers, other pages and wrong requests get. No browser, no renderer."""

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("aiortc", reason="the extra serve is not installed")

import numpy as np
from starlette.testclient import TestClient

from hicode.errors import InputError
from hicode.serve.app import ServeConfig, create_app, decode_sound
from hicode.serve.live import Machine
from hicode.serve.voice import checked_text

TOKEN = "the-token"
ORIGIN = "http://localhost:8025"


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A browser that has the link; no renderer is started."""
    monkeypatch.setattr(Machine, "prepare", lambda self: None)
    (tmp_path / "bad.hicode").write_text("not an avatar")
    (tmp_path.parent / "secret.hicode").write_text("outside")
    with TestClient(create_app(tmp_path, ServeConfig(), token=TOKEN), base_url=ORIGIN) as client:
        client.get(f"/?token={TOKEN}")
        yield client


def one_sentence(answer, status: int, words: str) -> None:
    message = answer.json()["error"]
    assert answer.status_code == status and words in message and "\n" not in message
    assert "Traceback" not in answer.text and len(message) < 300


def test_the_link_sets_the_token_and_shows_the_page(client):
    page = client.get("/")
    assert page.status_code == 200 and "<title>hicode</title>" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text  # nothing from outside
    for name in ("main.js", "talk.js", "style.css"):
        assert client.get(f"/web/{name}").status_code == 200


@pytest.mark.parametrize("path", ["/", "/api/avatars", "/api/jobs", "/web/main.js", "/?token=wrong"])
def test_without_the_token_nothing_is_shown(client, path):
    client.cookies.clear()
    one_sentence(client.get(path), 401, "token")
    assert client.get("/healthz").json() == {"ok": True, "sessions": 0}


def test_another_host_name_and_another_origin_are_refused(client):
    one_sentence(client.get("/api/avatars", headers={"host": "evil.example:8025"}), 421, "host name")
    one_sentence(client.get("/api/avatars", headers={"origin": "http://evil.example"}), 403, "site")
    one_sentence(client.get("/api/avatars", headers={"origin": "null"}), 403, "site")
    assert client.get("/api/avatars", headers={"origin": ORIGIN}).status_code == 200


def test_metrics_are_prometheus_text(client):
    text = client.get("/metrics").text
    assert "# TYPE hicode_sessions gauge\nhicode_sessions 0\n" in text


def test_an_avatar_that_cannot_be_read_says_why_in_the_gallery(client):
    (entry,) = client.get("/api/avatars").json()
    assert entry["name"] == "bad" and "bad.hicode" in entry["problem"] and str(client.app.state) not in entry["problem"]


@pytest.mark.parametrize("name", ["..%2Fsecret", "%2e%2e%2fsecret", "a%00b", "-x", "x" * 65, "CON", "a%5Cb", "bad%20"])
@pytest.mark.parametrize("method", ["DELETE", "PATCH"])
def test_names_cannot_leave_the_folder(client, name, method, tmp_path):
    answer = client.request(method, f"/api/avatars/{name}", json={"name": "x"})
    assert answer.status_code in (400, 404, 405)
    assert (tmp_path.parent / "secret.hicode").exists() and (tmp_path / "bad.hicode").exists()


def test_renaming_takes_no_name_outside_or_in_use(client, tmp_path):
    for bad in ("../out", "", None, 3, "bad", "a/b"):
        assert client.patch("/api/avatars/bad", json={"name": bad}).status_code == 400
    assert client.patch("/api/avatars/bad", json={"name": "Better one"}).status_code == 200
    assert (tmp_path / "Better one.hicode").exists()
    assert client.delete("/api/avatars/Better one").status_code == 200 and not list(tmp_path.glob("*.hicode"))


ROUTES = [
    ("POST", "/api/offer"), ("POST", "/api/jobs"), ("PATCH", "/api/avatars/bad"), ("POST", "/api/jobs/x/start"),
    ("POST", "/api/jobs/x/cancel"), ("PUT", "/api/jobs/x/video?offset=0"), ("GET", "/api/jobs/x/events"),
    ("POST", "/api/sessions/x/sound"), ("GET", "/api/sessions/x/clip"), ("PUT", "/api/jobs/x/video?offset=-1"),
    ("POST", "/api/jobs/x/nonsense"), ("POST", "/api/jobs/x/finish"), ("POST", "/api/look"),
]  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"\x00\xff" * 50, b"[]", b"{}", b'{"sdp": 3, "avatar": {}}', b"[" * 100_000])
@pytest.mark.parametrize("method, path", ROUTES)
def test_garbage_is_one_sentence(client, method, path, body):
    answer = client.request(method, path, content=body)
    assert answer.status_code in (400, 404) and "Traceback" not in answer.text
    assert answer.json()["error"].endswith(".")


def test_too_large_requests_are_refused(client):
    one_sentence(client.post("/api/offer", content=b"x" * 400_000), 400, "too large")
    one_sentence(client.post("/api/jobs", json={"name": "a", "filename": "a.mp4", "size": 2_000_000_000}), 400, "1 GB")


def test_an_upload_in_pieces_breaks_off_and_goes_on(client, tmp_path):
    job = client.post("/api/jobs", json={"name": "Ada", "filename": "talk.mp4", "size": 10}).json()
    assert job["status"] == "uploading"
    assert client.put("/api/jobs/Ada/video?offset=0", content=b"01234").json()["done"] == 5
    assert client.put("/api/jobs/Ada/video?offset=0", content=b"01234").json()["done"] == 5  # sent again
    one_sentence(client.put("/api/jobs/Ada/video?offset=5", content=b"567890"), 400, "does not fit")
    one_sentence(client.post("/api/jobs/Ada/start", json={"consent": "she agreed"}), 400, "uploading")
    assert client.put("/api/jobs/Ada/video?offset=5", content=b"56789").json()["status"] == "ready"
    assert (tmp_path / ".jobs/Ada/video.mp4").read_bytes() == b"0123456789"
    one_sentence(client.post("/api/jobs/Ada/start", json={"consent": "  "}), 400, "Consent is missing")
    one_sentence(client.post("/api/jobs", json={"name": "Ada", "filename": "a.mp4", "size": 3}), 400, "already")
    assert client.post("/api/jobs/Ada/delete", json={}).status_code == 200 and not (tmp_path / ".jobs/Ada").exists()


def test_a_recording_is_stored_as_it_comes_and_used_as_far_as_it_came(client, tmp_path):
    job = client.post("/api/jobs", json={"name": "Ada", "filename": "camera.webm", "size": None}).json()
    assert job["status"] == "uploading" and job["total"] == 0
    one_sentence(client.post("/api/jobs/Ada/finish", json={}), 400, "Nothing was recorded")
    for offset, piece in ((0, b"01234"), (5, b"56"), (5, b"56")):
        assert client.put(f"/api/jobs/Ada/video?offset={offset}", content=piece).json()["status"] == "uploading"
    assert client.post("/api/jobs/Ada/finish", json={}).json()["status"] == "ready"
    assert (tmp_path / ".jobs/Ada/video.webm").read_bytes() == b"0123456"
    one_sentence(client.post("/api/jobs/Ada/finish", json={}), 400, "complete already")


def test_jobs_that_ran_are_paused_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(Machine, "prepare", lambda self: None)
    (tmp_path / ".jobs/Ada").mkdir(parents=True)
    (tmp_path / ".jobs/Ada/job.json").write_text('{"name": "Ada", "video": "video.mp4", "status": "running"}')
    (tmp_path / ".jobs/broken").mkdir()
    (tmp_path / ".jobs/broken/job.json").write_text("{")
    app = create_app(tmp_path, ServeConfig(), token=TOKEN)
    assert [(job.name, job.status) for job in app.state.server.jobs.all()] == [("Ada", "paused")]


@pytest.mark.parametrize("text, words", [("x" * 100_000, "100,000 characters"), (" \n", "nothing"), (None, "missing")])
def test_text_that_cannot_be_said_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        checked_text(text)


def test_text_keeps_its_words():
    assert checked_text("  Hello\x00\n there, Ä! ") == "Hello there, Ä!"


@pytest.mark.parametrize("rate_hz", [8_000, 96_000])
def test_sound_of_odd_rates_is_decoded(tmp_path, rate_hz):
    import soundfile

    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(rate_hz) / rate_hz)
    soundfile.write(str(tmp_path / "a.wav"), tone, rate_hz)
    samples = decode_sound((tmp_path / "a.wav").read_bytes())
    assert samples.dtype == np.int16 and abs(len(samples) - 24_000) < 100 and samples.max() > 8000


def test_a_file_that_is_no_sound_is_refused():
    with pytest.raises(InputError, match="The file"):
        decode_sound(b"no sound at all" * 100)
