"""Voices and hearing: the program espeak-ng (a script stands in for it), and a service on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from hicode.errors import InputError, ResourceError
from hicode.serve.hearing import ServiceHearing
from hicode.serve.service import Service
from hicode.serve.voice import EspeakVoice, ServiceVoice, languages

SCRIPT = """#!/bin/sh
if [ "$1" = --voices ]; then
  echo "Pty Language       Age/Gender VoiceName          File                 Other Languages"
  echo " 5  de              --/M      German             gmw/de"
  echo " 2  en-gb           --/M      English_(GB)       gmw/en               (en 2)"
  echo " 5  fr-be           --/M      French_(Belgium)   roa/fr-BE            (fr 8)"
  exit
fi
echo "$@" > "$0.arguments"
cat > "$0.text"
head -c 44 /dev/zero
cat "$0.sound"
"""


@pytest.fixture
def espeak(tmp_path, monkeypatch):
    program = tmp_path / "espeak-ng"
    program.write_text(SCRIPT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    languages.cache_clear()
    yield program
    languages.cache_clear()


def test_another_language_is_spoken_by_espeak(espeak):
    assert languages() == {"en": "English", "fr-be": "French (Belgium)", "de": "German"}
    samples = np.arange(15_000, dtype="<i2")
    (espeak.parent / "espeak-ng.sound").write_bytes(samples.tobytes())
    voice = EspeakVoice("de")
    pieces = list(voice.speak("-Grüße"))
    assert len(pieces) == 3 and np.array_equal(np.concatenate(pieces), samples)
    assert "-v de" in (espeak.parent / "espeak-ng.arguments").read_text()
    assert (espeak.parent / "espeak-ng.text").read_text() == "-Grüße"  # never an option of the program
    speaking = voice.speak("Hallo")
    next(speaking)
    speaking.close()  # an interruption: the program is gone


def test_a_language_without_a_voice_is_one_sentence(espeak, monkeypatch):
    with pytest.raises(InputError, match="no voice for the language 'tlh'"):
        EspeakVoice("tlh")
    monkeypatch.setenv("PATH", str(espeak.parent / "nowhere"))
    languages.cache_clear()
    assert languages() == {"en": "English"}


@pytest.fixture
def service():
    """A service that answers with `service.answer`, or with `service.status`; and the client's side of it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            server.asked.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(server.status)
            self.end_headers()
            self.wfile.write(server.answer)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer, server.status = [], b"", 200
    server.client = Service(f"http://127.0.0.1:{server.server_port}/v1", "speech", "--speech-url", "HICODE_SPEECH_KEY")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_service_speaks(service):
    samples = np.arange(10_001, dtype="<i2")
    service.answer = samples.tobytes()
    voice = ServiceVoice(service.client, "tts-1", "alloy")
    assert np.array_equal(np.concatenate(list(voice.speak("Olá"))), samples)
    ((path, body),) = service.asked
    assert path == "/v1/audio/speech"
    assert json.loads(body) == {"model": "tts-1", "voice": "alloy", "response_format": "pcm", "input": "Olá"}
    service.answer = b"RIFF" + bytes(100)
    with pytest.raises(ResourceError, match="speech service's answer cannot be read"):
        list(voice.speak("Olá"))
    service.status = 401
    with pytest.raises(ResourceError, match=r"refused the request \(401\).*HICODE_SPEECH_KEY"):
        list(voice.speak("Olá"))


def test_a_service_hears(service):
    service.answer = json.dumps({"text": " Olá. "}).encode()
    hearing = ServiceHearing(service.client, "whisper-1", "pt-br")
    assert hearing.transcribe(np.full(1600, 0.5, np.float32)) == "Olá."
    ((path, body),) = service.asked
    assert path == "/v1/audio/transcriptions"
    assert b'name="model"\r\n\r\nwhisper-1' in body and b'name="language"\r\n\r\npt\r\n' in body
    assert b"RIFF" in body and body.count(b"\xff\x3f") == 1600
    service.answer = b"[]"
    with pytest.raises(ResourceError, match="cannot be read"):
        hearing.transcribe(np.zeros(1600, np.float32))
