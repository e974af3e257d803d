"""Chat: what the avatar answers, from any service with OpenAI's chat completions; without one it says the words again.

The key comes from the environment variable HICODE_CHAT_KEY, so that it is in no process list and never in the page.
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from hicode.errors import InputError, ResourceError

Message = dict[str, str]
Reply = Callable[[list[Message]], Iterator[str]]
"""The answer to a conversation, in pieces that can be spoken; runs on a thread of its own."""
KEY = "HICODE_CHAT_KEY"
REMEMBERED = 20  # messages
TIMEOUT_S = 30.0
MAX_ANSWER = 4_000  # characters
INSTRUCTION = "You are a talking head. Answer in one to three short spoken sentences, without lists, marks or emoji."
_SENTENCE = re.compile(r"(.+?[.!?…][\"')\]]*)\s+", re.DOTALL)


def echo(messages: list[Message]) -> Iterator[str]:
    """The last words themselves."""
    yield messages[-1]["content"]


class Chat:
    """A chat service. `url`: its base, as "http://localhost:11434/v1"; `model`: as the service names it."""

    def __init__(self, url: str, model: str):
        if not re.match(r"https?://[^/]", url):
            raise InputError(f"{url!r} is no address of a chat service. Give one like http://localhost:11434/v1.")
        self._url, self._model = url.rstrip("/") + "/chat/completions", model

    def __call__(self, messages: list[Message]) -> Iterator[str]:
        """The answer, a sentence at a time, as it comes. ResourceError where the service fails."""
        waiting, length = "", 0
        for piece in self._pieces(messages):
            waiting, length = waiting + piece, length + len(piece)
            while (found := _SENTENCE.match(waiting)) is not None:
                yield found[1].strip()
                waiting = waiting[found.end() :]
            if length > MAX_ANSWER:
                break
        if waiting.strip():
            yield waiting.strip()

    def _pieces(self, messages: list[Message]) -> Iterator[str]:
        history = [{"role": "system", "content": INSTRUCTION}, *messages[-REMEMBERED:]]
        body = json.dumps({"model": self._model, "messages": history, "stream": True}).encode()
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        if key := os.environ.get(KEY):
            headers["authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                for line in answer:
                    if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                        choice = json.loads(data)["choices"][:1]
                        yield from (c["delta"].get("content") or "" for c in choice)
        except urllib.error.HTTPError as error:
            error.close()
            raise ResourceError(
                f"The chat service refused the question ({error.code}). Check --chat-url, --chat-model and {KEY}."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ResourceError("The chat service does not answer. Check --chat-url, or start the service.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResourceError(
                "The chat service's answer cannot be read. Is --chat-url an OpenAI-like one?"
            ) from error
