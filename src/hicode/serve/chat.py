"""Chat: what the avatar answers, from any service with OpenAI's chat completions; without one, the words again."""

import json
import re
from collections.abc import Callable, Iterator

from hicode.serve.service import Service

Message = dict[str, str]
Reply = Callable[[list[Message]], Iterator[str]]
"""The answer to a conversation, in pieces that can be spoken; runs on a thread of its own."""
KEY = "HICODE_CHAT_KEY"
REMEMBERED = 20  # messages
MAX_ANSWER = 4_000  # characters
INSTRUCTION = (
    "You are a talking head. Answer in the language you are spoken to, in one to three short spoken sentences, without "
    "lists, marks or emoji."
)
_SENTENCE = re.compile(r"(.+?[.!?…][\"')\]]*)\s+", re.DOTALL)


def echo(messages: list[Message]) -> Iterator[str]:
    """The last words themselves."""
    yield messages[-1]["content"]


class Chat:
    """A chat service. `url`: its base, as "http://localhost:11434/v1"; `model`: as the service names it."""

    def __init__(self, url: str, model: str):
        self._service, self._model = Service(url, "chat", "--chat-url", KEY), model

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
        body = {"model": self._model, "messages": history, "stream": True}
        with self._service.ask("/chat/completions", body) as answer:
            for line in answer:
                if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                    choice = json.loads(data)["choices"][:1]
                    yield from (c["delta"].get("content") or "" for c in choice)
