"""Fewer pictures, evenly and in time, where the machine is too slow for all."""

from helpers.fake_avatar import FakeAvatar, speechlike
from hicode.session.config import SpeakConfig
from hicode.session.picture_rate import MOST_LATE, WINDOW, PictureRate
from hicode.session.session import Session


def test_the_rate_falls_when_many_are_late_and_rises_after_calm_windows():
    rate = PictureRate()
    for _ in range(MOST_LATE):
        rate.shown(late=True)
    assert rate.every == 1
    rate.shown(late=True)
    assert rate.every == 2
    assert [rate.own_picture() for _ in range(6)].count(True) == 3
    windows = 0
    while rate.every == 2 and windows < 100:
        for _ in range(WINDOW):
            rate.shown(late=False)
        windows += 1
    assert windows == 8, "twice as many as at first"
    for _ in range(100):
        rate.shown(late=True)
    assert rate.every == 3


def test_a_few_late_frames_now_and_then_change_nothing():
    rate = PictureRate()
    for k in range(40 * WINDOW):
        rate.shown(late=k % WINDOW < MOST_LATE)
    assert rate.every == 1


def test_at_half_the_rate_two_frames_share_a_picture_and_no_sound_is_lost():
    shown = {}
    for every in (1, 2):
        with Session(FakeAvatar(), SpeakConfig(level=0.05)) as session:
            session._rate.every = every
            session.push_audio(speechlike(1.0))
            session.end_utterance()
            frames = []
            while len(frames) < 25 and (frame := session.frame_within(30.0)) is not None:
                frames += [frame] if frame.speaking else []
        shown[every] = frames
    pictures = {every: len({id(frame.image) for frame in frames}) for every, frames in shown.items()}
    assert pictures[1] == 25 and pictures[2] <= 14
    assert all((a.audio == b.audio).all() for a, b in zip(shown[1], shown[2]))
