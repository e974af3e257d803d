"""Chat with a service that speaks OpenAI's protocol, on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hicode.errors import InputError, ResourceError
from hicode.serve.chat import KEY, Chat, echo

HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
def service():
    """A service that answers with `service.pieces`, or with `service.status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            server.asked.append((self.path, json.loads(body), self.headers.get("authorization")))
            self.send_response(server.status)
            self.end_headers()
            for piece in server.pieces:
                line = (
                    piece
                    if isinstance(piece, bytes)
                    else json.dumps({"choices": [{"delta": {"content": piece}}]}).encode()
                )
                self.wfile.write(b"data: " + line + b"\n\n")

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.pieces, server.status = [], [], 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def chat(service) -> Chat:
    return Chat(f"http://127.0.0.1:{service.server_port}/v1/", "small")


def test_an_answer_comes_by_sentences_and_the_key_goes_in_the_header(service, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    service.pieces = ["Good mor", "ning! I am", " fine.", " And you?", b"[DONE]"]
    assert list(chat(service)(HELLO)) == ["Good morning!", "I am fine.", "And you?"]
    ((path, body, key),) = service.asked
    assert path == "/v1/chat/completions" and body["model"] == "small" and body["stream"] is True
    assert body["messages"][0]["role"] == "system" and body["messages"][1:] == HELLO and key == "Bearer secret"


def test_a_long_answer_is_cut_and_a_long_history_too(service):
    service.pieces = ["A sentence. "] * 1000
    assert 100 < len(list(chat(service)(50 * HELLO))) < 500
    assert len(service.asked[0][1]["messages"]) == 21


@pytest.mark.parametrize("pieces", [[b"no json"], [b"{}"], [b'{"choices": [3]}']])
def test_an_answer_of_another_kind_is_one_sentence(service, pieces):
    service.pieces = pieces
    with pytest.raises(ResourceError, match="cannot be read"):
        list(chat(service)(HELLO))


def test_a_refusal_and_a_missing_service_are_one_sentence(service):
    service.status = 401
    with pytest.raises(ResourceError, match=r"refused the request \(401\)"):
        list(chat(service)(HELLO))
    with pytest.raises(ResourceError, match="does not answer"):
        list(Chat("http://127.0.0.1:9/v1", "small")(HELLO))
    with pytest.raises(InputError, match="no address"):
        Chat("localhost:11434", "small")


def test_without_a_service_the_words_come_back():
    assert list(echo(HELLO)) == ["Hello?"]
