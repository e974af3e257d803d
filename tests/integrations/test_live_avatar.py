"""The clocked session that the adapters share, over a fake avatar."""

import asyncio
import time

import numpy as np
import pytest

from helpers.fake_avatar import SIZE, FakeAvatar
from helpers.live_avatars import CONFIG, RATE_HZ, FailingAvatar, run, sound
from hicode.errors import InputError, ResourceError
from hicode.integrations.live_avatar import TICK_S, Failure, LiveAvatar, Tick, UtteranceEnd


async def collect(live: LiveAvatar, until) -> list:
    """Items up to the first for which `until` holds."""
    items = []
    async for item in live:
        items.append(item)
        if until(item):
            break
    return items


def spoken(items) -> np.ndarray:
    return np.concatenate(
        [np.zeros(0, np.int16)] + [i.audio for i in items if isinstance(i, Tick) and i.audio is not None]
    )


def ended(item) -> bool:
    return isinstance(item, UtteranceEnd)


def test_every_sample_leaves_once_in_real_time_and_the_end_comes_after_the_last_tick():
    async def scenario():
        async with LiveAvatar(FakeAvatar(), CONFIG) as live:
            assert (live.width, live.height) == (SIZE, SIZE)
            await collect(live, lambda item: isinstance(item, Tick))
            began = time.monotonic()
            pushed = sound(1.0)
            for begin in range(0, len(pushed), 1000):
                live.push_audio(pushed[begin : begin + 1000], RATE_HZ, "first")
            live.end_utterance()
            items = await collect(live, ended)
            return pushed, items, time.monotonic() - began

    pushed, items, took_s = run(scenario())
    assert np.array_equal(spoken(items), pushed)
    assert items[-1] == UtteranceEnd("first", pytest.approx(1.0))
    assert took_s > 0.9  # never faster than it is played
    assert all(item.label == "first" for item in items[:-1] if item.audio is not None)
    assert all(item.image.shape == (SIZE, SIZE, 3) for item in items[:-1] if item.image is not None)


def test_idle_ticks_go_on_without_sound():
    async def scenario():
        async with LiveAvatar(FakeAvatar(), CONFIG) as live:
            began, count = time.monotonic(), 0
            async for item in live:
                assert item.audio is None and (item.image is not None or count)  # a late tick has no picture
                count += 1
                if count == 15:
                    return time.monotonic() - began

    assert run(scenario()) >= 14 * TICK_S - 0.1


def test_utterances_end_once_each_and_in_order():
    async def scenario():
        async with LiveAvatar(FakeAvatar(), CONFIG) as live:
            for label in "abc":
                live.push_audio(sound(0.3), RATE_HZ, label)  # a new label ends the one before
            live.end_utterance()
            return await collect(live, lambda item: ended(item) and item.label == "c")

    items = run(scenario())
    assert [item.label for item in items if ended(item)] == ["a", "b", "c"]
    labels = [item.label for item in items if isinstance(item, Tick) and item.audio is not None]
    assert labels == sorted(labels) and {labels.count(label) for label in "abc"} == {8}


def test_an_interruption_drops_everything_at_once_and_tells_what_was_taken():
    async def scenario():
        async with LiveAvatar(FakeAvatar(), CONFIG) as live:
            live.push_audio(sound(20.0), RATE_HZ, "long")
            taken = []
            async for item in live:
                taken.append(item)
                if len(spoken(taken)) >= 0.2 * RATE_HZ:
                    break
            heard_s = len(spoken(taken)) / RATE_HZ
            assert live.clear() == pytest.approx(heard_s)
            assert live.waiting_s == 0
            live.push_audio(sound(0.2, seed=1), RATE_HZ, "next")
            live.end_utterance()
            return await collect(live, ended)

    items = run(scenario())
    assert items[-1].label == "next" and np.array_equal(spoken(items), sound(0.2, seed=1))


def test_a_failure_is_told_once_and_the_voice_goes_on():
    async def scenario():
        async with LiveAvatar(FailingAvatar(), CONFIG) as live:
            live.push_audio(sound(2.0), RATE_HZ, "a")
            live.end_utterance()
            items = await collect(live, ended)
            live.push_audio(sound(0.5), RATE_HZ, "b")
            live.end_utterance()
            return items, await collect(live, ended)

    first, second = run(scenario())
    assert sum(isinstance(item, Failure) for item in first + second) == 1
    assert "no more pictures" in next(item for item in first if isinstance(item, Failure)).message
    assert np.array_equal(spoken(first), sound(2.0))
    voice = spoken(second)
    assert np.array_equal(voice[: len(sound(0.5))], sound(0.5)) and second[-1].seconds == pytest.approx(0.52)


def test_a_consumer_who_takes_nothing_stops_the_clock():
    async def scenario():
        async with LiveAvatar(FakeAvatar(), CONFIG) as live:
            live.push_audio(sound(1.0), RATE_HZ)
            live.end_utterance()
            await asyncio.sleep(2.0)
            return await collect(live, ended)

    items = run(scenario())
    assert np.array_equal(spoken(items), sound(1.0))


def test_sound_that_cannot_be_used_is_refused_and_the_rest_goes_on():
    async def scenario():
        async with LiveAvatar(FakeAvatar(), CONFIG) as live:
            with pytest.raises(InputError):
                live.push_audio(sound(0.1), 7)
            with pytest.raises(ResourceError, match="max_waiting_s"):
                live.push_audio(np.zeros(700 * RATE_HZ, np.int16), RATE_HZ)
            live.push_audio(sound(0.0), RATE_HZ, "nothing")
            live.push_audio(sound(0.2), RATE_HZ, "good")
            live.end_utterance()
            return await collect(live, lambda item: ended(item) and item.label == "good")

    assert next(item for item in run(scenario()) if ended(item)) == UtteranceEnd("nothing", 0.0)


def test_an_avatar_that_cannot_speak_is_refused_at_the_start():
    async def scenario():
        async with LiveAvatar(FakeAvatar(speech=None), CONFIG):
            pass

    with pytest.raises(InputError, match="no speech models"):
        run(scenario())
