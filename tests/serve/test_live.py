"""A live session: punctual ticks from a process of its own, interruption, admission, dead renderers."""

import asyncio
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest

from helpers.fake_avatar import FakeAvatar, speechlike
from helpers.scripted_renderer import scripted_renderer
from hicode.errors import InputError, ResourceError
from hicode.serve import live
from hicode.serve.live import LiveSession, Machine
from hicode.serve.renderer import Tick
from hicode.session.config import SpeakConfig
from hicode.session.session import Session

FAKE = "helpers.fake_avatar:FakeAvatar"


def sound(seconds: float) -> np.ndarray:
    return (speechlike(seconds) * 32767).astype(np.int16)


MEMORY: list[str] = []  # of the sessions of a test: other programs have shared memory too


@pytest.fixture(autouse=True)
def remember_memory(monkeypatch):
    MEMORY.clear()
    attach = live.SharedMemory

    def remembered(name: str):
        MEMORY.append(name)
        return attach(name)

    monkeypatch.setattr(live, "SharedMemory", remembered)


def nothing_stays() -> bool:
    left = {name.lstrip("/") for name in MEMORY} & set(os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else ())
    return bool(MEMORY) and not left and not multiprocessing.active_children()


def run(story, machine: Machine | None = None) -> None:
    """Run a coroutine function of a machine; the machine is closed afterwards."""
    machine = machine or Machine()

    async def whole():
        try:
            await asyncio.wait_for(story(machine), 80)
        finally:
            await machine.close()

    asyncio.run(whole())


async def take(session: LiveSession, count: int) -> list:
    out = []
    async for tick in session.ticks():
        out.append(tick)
        if len(out) == count:
            break
    return out


class Gated(FakeAvatar):
    """An avatar whose pictures are made while the gate is open."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def compose(self, *arguments):
        self.gate.wait(60)
        return super().compose(*arguments)


# --- a reader with a clock


def test_a_reader_with_a_clock_gets_all_sound_in_time_though_pictures_are_late():
    speech, config = speechlike(1.0), SpeakConfig(level=0.05)
    avatar = Gated()
    with Session(avatar, config) as session:
        session.frame_within(0.01)  # the first picture is waited for
        session.push_audio(speech)
        session.end_utterance()
        while not session._planned:
            session.frame_within(0.01)
        avatar.gate.clear()
        frames = [session.frame_within(0.02) for _ in range(24)]
        avatar.gate.set()
    spoken = [frame for frame in frames if frame is not None and frame.speaking]
    assert len(spoken) >= 23 and any(frame.late for frame in spoken)  # one that waits has no late frames
    with Session(FakeAvatar(), config) as session:
        session.push_audio(speech)
        session.end_utterance()
        whole = np.concatenate([frame.audio for frame in session.drain()])
    got = np.concatenate([frame.audio for frame in spoken])
    assert any(np.array_equal(got, whole[k : k + len(got)]) for k in range(0, len(whole), 640))


def test_an_idle_frame_that_is_late_is_shown_the_next_time():
    avatar, driving, late = Gated(), [], 0
    with Session(avatar, SpeakConfig(blinks=False)) as session:
        for i in range(200):
            avatar.gate.set() if (i + 1) % 3 else avatar.gate.clear()  # the first picture is always waited for
            frame = session.frame_within(0.03)
            late += frame is not None and frame.late
            driving += [] if frame is None or frame.late else [frame.driving_frame]
            if late and len(driving) > 3:
                break
        avatar.gate.set()
    assert driving == list(range(len(driving))) and len(driving) > 3 and late


# --- a session of the server, with a renderer that is a script


def scripted() -> Machine:
    return Machine(renderer=scripted_renderer)


def test_ticks_are_punctual_sound_is_whole_and_an_interruption_is_quiet_at_once():
    async def story(machine: Machine):
        session = await LiveSession.open(machine, "any")
        session.push(np.full(2 * 48_000, 1000, np.int16), 48_000)
        ticks = await take(session, 30)
        first = next(k for k, tick in enumerate(ticks) if tick.speaking)
        assert all(tick.speaking and (tick.audio == 1000).all() for tick in ticks[first:])
        assert [tick.number for tick in ticks] == list(range(ticks[0].number, ticks[0].number + 30))
        np.testing.assert_allclose(np.diff([tick.due_s for tick in ticks]), 0.04, atol=1e-6)
        assert session.speaking
        await asyncio.sleep(0.1)  # ticks wait for the listener
        session.clear()
        assert not session.speaking
        quiet = await take(session, 12)
        assert not any(tick.speaking or tick.audio.any() for tick in quiet)
        session.push(np.full(48_000, 1000, np.int16), 48_000)
        assert any(tick.speaking for tick in await take(session, 12))

    run(story, scripted())


def test_pictures_after_an_interruption_do_not_wait_for_their_time():
    async def story(machine: Machine):
        session = await LiveSession.open(machine, "any")
        before, rest, talking = (np.full((96, 64), k, np.uint8) for k in range(3))
        session._generation = 1
        session._arrived.clear()
        session._arrived.append((Tick(8, 0.0, 0, None, 0, False), before))
        assert session._newest(None) is None, "of the time before it"
        session._arrived.append((Tick(9, 0.0, 0, None, 1, False), rest))
        session._arrived.append((Tick(10, 0.0, 0, b"", 1, False), talking))
        assert session._newest(None) is rest, "the next words come in time with their sound"
        session._arrived.clear()

    run(story, scripted())


def test_a_pacer_that_meets_an_error_ends_the_session_with_a_sentence(monkeypatch):
    async def story(machine: Machine):
        session = await LiveSession.open(machine, "any")
        await take(session, 2)
        monkeypatch.setattr("hicode.serve.live.LiveTick", None)
        await asyncio.wait_for(take(session, 10_000), 20)
        assert session.error and session.error.endswith("Begin another one.")

    run(story, scripted())


def test_a_renderer_that_does_not_answer_is_an_error_and_blocks_nobody(monkeypatch):
    monkeypatch.setattr("hicode.serve.live.SILENT_S", 2.0)

    async def story(machine: Machine):
        session, other = await LiveSession.open(machine, "any"), await LiveSession.open(machine, "any")
        await take(session, 2)
        os.kill(session._process.pid, signal.SIGSTOP)
        for _ in range(40):  # far more than the pipe holds
            session.push(np.zeros(2 * 48_000, np.int16), 48_000)
        assert len(await take(other, 5)) == 5
        await asyncio.wait_for(take(session, 10_000), 20)
        assert session.error and "does not answer" in session.error

    run(story, scripted())
    assert not multiprocessing.active_children()


def test_a_renderer_that_dies_is_an_error_of_one_session_and_nothing_stays():
    async def story(machine: Machine):
        session, other = await LiveSession.open(machine, "any"), await LiveSession.open(machine, "any")
        session._process.kill()
        await asyncio.wait_for(take(session, 10_000), 20)
        assert session.error and "renderer has stopped" in session.error
        assert len(await take(other, 5)) == 5
        await session.close()
        with pytest.raises(InputError, match="renderer has stopped"):
            await LiveSession.open(machine, "bad.hicode")
        assert len(await take(await LiveSession.open(machine, "any"), 5)) == 5

    run(story, scripted())
    assert nothing_stays()


@pytest.mark.parametrize("limit, words", [({"max_s": 0.5}, "minutes"), ({"max_mb": 1.0}, "memory")])
def test_a_conversation_beyond_its_limits_ends_with_a_sentence(limit, words):
    async def story(machine: Machine):
        session = await LiveSession.open(machine, "any")
        await asyncio.wait_for(take(session, 10_000), 20)
        assert session.error and words in session.error

    run(story, Machine(renderer=scripted_renderer, **limit))


def test_a_slow_listener_loses_the_oldest_ticks_and_no_queue_grows():
    async def story(machine: Machine):
        session = await LiveSession.open(machine, "any")
        await take(session, 2)
        for _ in range(100):  # a busy machine may be late itself
            await asyncio.sleep(0.1)
            if machine.counters.dropped > 5 and len(session._arrived) <= 4:
                break
        assert len(session._queue) <= 5 and len(session._arrived) <= 4 and machine.counters.dropped > 5

    run(story, scripted())


# --- a session of the server


@pytest.mark.slow  # starts processes that load torch
def test_a_session_speaks_is_interrupted_and_leaves_nothing():
    async def story(machine: Machine):
        session = await LiveSession.open(machine, FAKE)
        idle = await take(session, 10)
        assert not any(tick.speaking or tick.audio.any() for tick in idle)
        session.push(sound(2.0), 16_000)
        session.end_utterance()
        assert session.speaking
        ticks = await take(session, 40)
        assert any(tick.speaking for tick in ticks)
        numbers = [tick.number for tick in idle + ticks]
        assert numbers == sorted(set(numbers))
        session.clear()
        after = await take(session, 12)
        assert not any(tick.speaking for tick in after)
        assert not session.speaking
        await session.close()
        await session.close()
        with pytest.raises(InputError, match="ended"):
            session.push(sound(0.1), 16_000)

    run(story)
    assert nothing_stays()


@pytest.mark.slow
def test_a_killed_renderer_is_an_error_and_a_new_session_works():
    async def story(machine: Machine):
        session = await LiveSession.open(machine, FAKE)
        await take(session, 3)
        session._process.kill()
        await asyncio.wait_for(take(session, 10_000), 20)
        assert session.error and "renderer has stopped" in session.error
        await session.close()
        another = await LiveSession.open(machine, FAKE)
        assert len(await take(another, 5)) == 5

    run(story)


@pytest.mark.slow
def test_an_avatar_that_cannot_be_used_is_one_sentence(tmp_path):
    bad = tmp_path / "bad.hicode"
    bad.write_text("not an avatar")

    async def story(machine: Machine):
        with pytest.raises(InputError, match=r"bad\.hicode"):
            await LiveSession.open(machine, bad)
        assert not machine.sessions

    run(story)


def test_a_second_speaker_is_refused_where_the_machine_cannot():
    class Speaker:
        def __init__(self, speaking):
            self.speaking = speaking

    machine = Machine(max_sessions=2)
    machine.fps = 30.0
    machine.sessions = {Speaker(True), Speaker(False)}  # type: ignore[assignment]
    with pytest.raises(ResourceError, match="30 frames a second, enough for 1"):
        machine.admit_speaker(Speaker(False))  # type: ignore[arg-type]
    machine.fps = 60.0
    machine.admit_speaker(Speaker(False))  # type: ignore[arg-type]
    with pytest.raises(ResourceError, match="2 conversations are open"):
        machine.admit_session()
    assert machine.counters.refused == 2
