"""What a conversation does with texts, sound and interruptions: with a session, a voice and an ear that are scripts."""

import asyncio
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from hicode.errors import ResourceError
from hicode.serve.conversation import Conversation, Parts
from hicode.serve.live import SILENCE, LiveTick

PICTURE = np.zeros((96, 64), np.uint8)


class Session:
    """Keeps what it is given."""

    def __init__(self):
        self.did: list[str] = []
        self.speaking, self.notice, self.hello, self.full, self.waiting_s = False, None, None, False, 0.0

    def admit_speaker(self):
        if self.full:
            raise ResourceError("Somebody else speaks.")

    def push(self, samples, rate_hz):
        self.did.append(f"push {len(samples)} at {rate_hz}")

    def end_utterance(self):
        self.did.append("end")

    def clear(self):
        self.did.append("clear")

    async def close(self):
        self.did.append("close")


class Tape:
    """Records nothing."""

    def add(self, tick):
        return False

    def close(self):
        pass


class Voice:
    rate_hz = 24_000

    def speak(self, text):
        yield np.zeros(len(text), np.int16)


class Ear:
    def transcribe(self, samples):
        return f"{len(samples) / 16_000:.1f} s"


def talk(story, tmp_path: Path, reply=None) -> tuple[list[str], list[dict]]:
    """Run a story of a conversation; what its session did, and what the page was told."""
    session, told = Session(), []

    async def whole():
        more = () if reply is None else (reply,)
        conversation = Conversation(
            cast("Any", session),
            Parts(lambda _: Voice(), lambda _: Ear(), {"en": "English", "de": "German"}),
            tmp_path,
            *more,
        )
        conversation.recorder = cast("Any", Tape())
        conversation.connect(told.append)
        await story(conversation, session)
        for _ in range(3000):
            if not conversation._tasks:
                break
            await asyncio.sleep(0.01)
        await conversation.close()

    asyncio.run(asyncio.wait_for(whole(), 60))
    return session.did, told


def tick(number: int, speaking: bool) -> LiveTick:
    return LiveTick(number, 0.0, PICTURE, SILENCE, speaking, False)


def test_a_text_is_said_with_a_caption(tmp_path):
    async def story(conversation, session):
        conversation.receive({"type": "say", "text": " Hello  there. "})

    did, told = talk(story, tmp_path)
    assert did == ["push 12 at 24000", "end", "close"]
    assert told[0]["type"] == "ready" and told[0]["chat"] is False and told[1] == {"type": "state", "state": "idle"}
    assert told[2] == {"type": "caption", "who": "avatar", "text": "Hello there."}


def test_a_long_text_is_voiced_as_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Voice, "speak", lambda self, text: iter(3 * [np.zeros(5, np.int16)]))

    async def story(conversation, session):
        session.waiting_s = 100.0
        conversation.receive({"type": "say", "text": "Much to say."})
        await asyncio.sleep(0.3)
        assert not session.did, "nothing is voiced while much waits"
        session.waiting_s = 0.0

    did, _ = talk(story, tmp_path)
    assert did == [*3 * ["push 5 at 24000"], "end", "close"]


def test_a_question_is_answered_by_sentences_and_remembered(tmp_path):
    asked = []

    def reply(messages):
        asked.append([message["content"] for message in messages])
        yield from ("One.", "Two!")

    async def story(conversation, session):
        for text in ("First?", "Second?"):
            conversation.receive({"type": "say", "text": text, "ask": True})
            while conversation._tasks:
                await asyncio.sleep(0.01)

    did, told = talk(story, tmp_path, reply)
    assert asked == [["First?"], ["First?", "One. Two!", "Second?"]]
    assert did == 2 * ["clear", "push 4 at 24000", "push 4 at 24000", "end"] + ["close"]
    assert told[0]["type"] == "ready" and told[0]["chat"] is True


def test_an_interruption_ends_an_answer_and_the_state_is_told_anew(tmp_path):
    def reply(messages):
        yield "One."
        conversations[0]._loop.call_soon_threadsafe(conversations[0].interrupt)
        conversations[0]._loop.call_soon_threadsafe(lambda: None)
        yield "Two."
        yield "Three."

    conversations = []

    async def story(conversation, session):
        conversations.append(conversation)
        conversation.shown(tick(0, True))
        conversation.receive({"type": "say", "text": "Tell me.", "ask": True})
        while conversation._tasks:
            await asyncio.sleep(0.01)
        conversation.shown(tick(1, True))

    did, told = talk(story, tmp_path, reply)
    assert "end" not in did and did.count("clear") == 2 and sum(d.startswith("push") for d in did) <= 2
    states = [message["state"] for message in told if message["type"] == "state"]
    assert states == ["idle", "speaking", "speaking"] and {"type": "interrupted"} in told


def test_speech_into_the_microphone_interrupts_and_is_answered(tmp_path):
    loud = (0.3 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)

    async def story(conversation, session):
        session.speaking = True
        conversation.receive({"type": "listen", "on": True})
        conversation.hear(np.zeros(16_000, np.float32))
        conversation.hear(loud)
        assert session.did == ["clear"]
        session.speaking = False
        conversation.shown(tick(0, False))
        conversation.hear(np.zeros(16_000, np.float32))

    did, told = talk(story, tmp_path)
    texts = [(message["who"], message["text"]) for message in told if message["type"] == "caption"]
    assert [who for who, _ in texts] == ["you", "avatar"] and texts[0][1] == texts[1][1] and "end" in did
    assert {"type": "state", "state": "listening"} in told


def test_push_to_talk_hears_only_while_the_key_is_down(tmp_path):
    async def story(conversation, session):
        conversation.hear(np.ones(16_000, np.float32))
        conversation.receive({"type": "talk", "down": True})
        conversation.hear(np.zeros(8_000, np.float32))
        conversation.receive({"type": "talk", "down": False})

    _, told = talk(story, tmp_path)
    assert {"type": "caption", "who": "you", "text": "0.5 s"} in told


@pytest.mark.parametrize("message", [None, [], {"type": "nonsense"}, {"type": "say"}, {"type": "say", "text": "?!"}])
def test_messages_that_make_no_sense_are_one_sentence(tmp_path, message):
    async def story(conversation, session):
        conversation.receive(message)

    did, told = talk(story, tmp_path)
    assert did == ["close"] and told[-1]["type"] == "error" and told[-1]["message"].endswith(".")


def test_a_machine_without_room_says_so_and_the_conversation_goes_on(tmp_path):
    async def story(conversation, session):
        session.full = True
        conversation.receive({"type": "say", "text": "Hello."})
        session.full = False
        conversation.receive({"type": "say", "text": "Hello."})

    did, told = talk(story, tmp_path)
    assert {"type": "error", "message": "Somebody else speaks."} in told and did[-2:] == ["end", "close"]


def test_a_language_is_chosen_among_those_that_can_be_spoken(tmp_path):
    chosen = []

    class Speaker(Voice):
        def __init__(self, language):
            chosen.append(language)

    async def story(conversation, session):
        conversation._parts = Parts(Speaker, lambda _: Ear(), {"en": "English", "de": "German"})
        conversation.receive({"type": "language", "language": "de"})
        conversation.receive({"type": "language", "language": ["de"]})
        conversation.receive({"type": "say", "text": "Guten Tag"})

    did, told = talk(story, tmp_path)
    assert chosen == ["de"] and "push 9 at 24000" in did
    assert [m["message"] for m in told if m["type"] == "error"] == [
        "This language cannot be spoken here. Choose another."
    ]
    assert told[0]["languages"] == [["en", "English"], ["de", "German"]] or told[0]["languages"] == [
        ("en", "English"),
        ("de", "German"),
    ]


def test_a_text_is_said_to_its_end_by_one_voice(tmp_path):
    class Speaker:
        def __init__(self, language):
            self.language, self.rate_hz = language, 24_000 if language == "en" else 22_050

        def speak(self, text):
            for _ in range(3):
                yield np.zeros(10, np.int16)

    async def story(conversation, session):
        conversation._parts = Parts(Speaker, lambda _: Ear(), {"en": "English", "de": "German"})
        session.push = lambda samples, rate_hz: (
            session.did.append(f"push at {rate_hz}"),
            conversation.receive({"type": "language", "language": "de"}),
        )
        conversation.receive({"type": "say", "text": "Hello there"})

    did, _ = talk(story, tmp_path)
    assert did[:4] == 3 * ["push at 24000"] + ["end"]
