"""Sessions: sound to frames in any chunks and threads, utterances, interruption, idling; rest in silence."""

import threading
import time
import tracemalloc
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.fake_avatar import DRIVING, FakeAvatar, expressions, motion_of, speech_models, speechlike
from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, resample
from hicode.avatar.blend import dilate_mask
from hicode.avatar.driving import resting_mouth
from hicode.errors import InputError, ResourceError
from hicode.motion import ping_pong
from hicode.session.config import SpeakConfig
from hicode.session.motion_source import DrivingTrack
from hicode.session.session import Frame, Session
from hicode.session.speak import READ_AHEAD, drained, synthesize
from hicode.speech.encoders import create_encoder, default_spec
from hicode.speech.loudness import speech_level
from hicode.speech.speech_model import SpeechModels

SECOND = SAMPLE_RATE_HZ


def same_images(a: list[Frame], b: list[Frame]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(np.array_equal(x.image, y.image) for x, y in zip(a, b, strict=True))


def take(session: Session, count: int) -> list[Frame]:
    return list(islice(session.frames(), count))


# --- sound to frames


@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("chunk", [37, 640, 1000, 7001, 10**6])
def test_streaming_equals_offline_bit_for_bit(chunk, still):
    """With all that lies between sound and head: level, features, Faceformers, gate (there is a pause), idling."""
    audio = np.concatenate([speechlike(0.5), np.zeros(9000, np.float32), speechlike(0.3, 1)])
    offline = list(synthesize(FakeAvatar(), audio, SpeakConfig(still=still)))
    live = []
    with Session(FakeAvatar(), SpeakConfig(still=still, level=speech_level(audio))) as session:
        for begin in range(0, len(audio), chunk):
            session.push_audio(audio[begin : begin + chunk])
            live += session.drain()
        early = len(live)
        session.end_utterance()
        live += session.drain()
    assert len(live) == -(-len(audio) // SAMPLES_PER_FRAME) and same_images(live, offline)
    assert [f.driving_frame for f in live] == [f.driving_frame for f in offline]
    for a, b in zip(live, offline, strict=True):
        assert all(torch.equal(a.motion.tensors()[k], v) for k, v in b.motion.tensors().items())
    if chunk <= 1000:  # frames come as soon as the look-ahead allows
        assert early >= len(offline) - round(session.latency_s * 25) - 2


def test_a_frame_carries_its_time_and_its_sound():
    audio = speechlike(0.5)[:-100]
    frames = list(synthesize(FakeAvatar(), audio))
    assert [f.pts_s for f in frames] == [i / 25 for i in range(13)] and all(f.speaking for f in frames)
    sound = np.concatenate([f.audio for f in frames])
    assert np.abs(sound[: len(audio)] / 32768 - audio).max() <= 0.5 / 32768 and not sound[len(audio) :].any()


@pytest.mark.parametrize("rate_hz", [24_000, 16_000, 48_000])
def test_the_frames_sound_is_at_the_rate_asked_for(rate_hz):
    """24 kHz pushed in odd pieces: unchanged at that rate, resampled and in place at another."""
    pushed = resample(speechlike(1.3), 16_000, 24_000)
    with Session(FakeAvatar(), SpeakConfig(output_rate_hz=rate_hz)) as session:
        for begin in range(0, len(pushed), 777):
            session.push_audio(pushed[begin : begin + 777], 24_000)
        session.end_utterance()
        sound = np.concatenate([f.audio for f in session.drain()]) / 32768
    expected = resample(pushed, 24_000, rate_hz)
    n = min(len(expected), len(sound))
    assert len(sound) == 33 * rate_hz // 25 and np.abs(sound[:n] - expected[:n]).max() < 1e-4


@pytest.mark.parametrize("kind", ["int16", "24 kHz", "8 kHz", "44.1 kHz", "stereo"])
def test_any_type_and_rate_gives_the_same_lips(kind):
    audio = speechlike(1.2)
    audio = resample(resample(audio, 16_000, 6_000), 6_000, 16_000)  # nothing above 3 kHz: 8 kHz has all of it
    rate_hz = {"24 kHz": 24_000, "8 kHz": 8_000, "44.1 kHz": 44_100}.get(kind, 16_000)
    sound = resample(audio, 16_000, rate_hz)
    if kind == "int16":
        sound = np.round(32768 * sound).astype(np.int16)
    if kind == "stereo":
        sound = np.stack([sound, sound], 1)
    with Session(FakeAvatar(), SpeakConfig(level=speech_level(audio))) as session:
        for begin in range(0, len(sound), 555):
            session.push_audio(sound[begin : begin + 555], rate_hz)
        session.end_utterance()
        lips = expressions(list(session.drain()))
    expected = expressions(list(synthesize(FakeAvatar(), audio)))
    spread = expected.std(0).max()
    assert spread > 0.2
    # Log-mel energies of empty bands follow the resampler's floor; the mouth hardly does.
    torch.testing.assert_close(lips, expected, atol=0.1 * float(spread), rtol=0)


def embedded_speech() -> SpeechModels:
    from hicode.errors import AssetError
    from hicode.training.adaptation import load_generic

    try:
        create_encoder("embedded")
    except AssetError as error:
        pytest.skip(f"the embedded encoder's package cannot be had here: {error}")
    return load_generic()


@pytest.mark.parametrize("models", [speech_models, embedded_speech])
@pytest.mark.parametrize("rest", [True, False])
def test_the_stated_latency_is_the_measured_one(models, rest):
    """Sound comes 2.5 ms at a time: the latest frame is complete within the stated time, and just within it."""
    session, step, late, frames = Session(FakeAvatar(speech=models()), SpeakConfig(level=0.1, rest=rest)), 40, [], 0
    for received in range(step, 24000, step):
        session.push_audio(np.full(step, 0.1, np.float32))
        for _ in session.drain():
            frames += 1
            late.append(received - SAMPLES_PER_FRAME * frames)
    session.close()
    assert session.latency_s * SAMPLE_RATE_HZ - step < max(late) <= session.latency_s * SAMPLE_RATE_HZ


@pytest.mark.parametrize("samples", [1, 319, 640, 641, 1279, 1281, 12345])
def test_a_sound_of_any_length_gives_a_frame_for_every_40_ms(samples):
    audio = np.full(samples, 0.1, np.float32)
    assert len(list(synthesize(FakeAvatar(), audio))) == -(-samples // SAMPLES_PER_FRAME)


def test_frames_depend_on_the_sound():
    a, b = (list(synthesize(FakeAvatar(), speechlike(1.0, seed))) for seed in (1, 2))
    assert not same_images(a, b)


def test_silence_shows_the_resting_mouth():
    avatar = FakeAvatar()
    audio = np.concatenate([speechlike(1.0), np.zeros(2 * SECOND, np.float32)])
    expression, landmarks = resting_mouth(avatar.driving, avatar)
    motion = list(synthesize(avatar, audio))[-5].motion
    mouth = avatar.mouth_expression
    torch.testing.assert_close(motion.expression[0, mouth], expression[mouth])
    torch.testing.assert_close(motion.landmarks[0, 477], landmarks[477])


def test_the_driving_track_runs_back_and_forth_from_the_start_asked_for():
    frames = [f.driving_frame for f in synthesize(FakeAvatar(), speechlike(2.4), SpeakConfig(start=5))]
    assert frames == ping_pong(DRIVING, 5, 60).tolist()
    assert np.abs(np.diff(frames)).max() == 1


def test_head_pose_is_the_driving_frames_own():
    avatar = FakeAvatar()
    for frame in synthesize(avatar, speechlike(1.5)):
        assert torch.equal(frame.motion.T_camera_head[0], avatar.driving.T_camera_head[frame.driving_frame])


def test_another_driving_track_gives_pose_and_pictures_but_not_the_resting_mouth():
    avatar, other = FakeAvatar(), motion_of(30, 9)
    track = DrivingTrack(other, lambda t: np.full((64, 64, 3), 200, np.uint8), avatar.driving_mask)
    silence = np.zeros(SECOND, np.float32)
    frames = list(synthesize(avatar, silence, SpeakConfig(level=0.1), track))
    assert [f.driving_frame for f in frames] == list(range(25)) and (frames[7].image[0] == 200).all()
    assert all(torch.equal(f.motion.T_camera_head[0], other.T_camera_head[f.driving_frame]) for f in frames)
    rest, _ = resting_mouth(avatar.driving, avatar)
    torch.testing.assert_close(frames[7].motion.expression[0, :40], rest[:40])
    with pytest.raises(InputError, match="own driving frames can be held"):
        Session(avatar, SpeakConfig(still=True), track)


def test_frames_not_asked_for_are_not_lost_and_not_rendered():
    avatar = FakeAvatar()
    with Session(avatar) as session:
        session.push_audio(speechlike(1.0))
        session.end_utterance()
        assert avatar.rendered == 0
        assert len(list(session.drain())) == 25 == avatar.rendered


def test_pushing_never_waits_for_rendering():
    """The renderer is stuck; sound, the utterance's end and an interruption are taken all the same."""
    stuck = threading.Event()

    class Slow(FakeAvatar):
        def driving_frame(self, t):
            stuck.wait(120)
            return super().driving_frame(t)

    with Session(Slow()) as session:
        reader = threading.Thread(target=lambda: next(session.frames()))
        reader.start()
        for _ in range(50):
            session.push_audio(speechlike(1.0))
        session.end_utterance()
        session.clear()
        assert reader.is_alive()  # nothing above waited for it
        stuck.set()
        reader.join()


def test_sound_beyond_the_bound_is_refused_and_nothing_of_it_is_taken():
    with Session(FakeAvatar(), SpeakConfig(max_waiting_s=2.0)) as session:
        session.push_audio(speechlike(1.5))
        with pytest.raises(ResourceError, match=r"2\.5 s of sound would wait .*; 2 s may.*max_waiting_s"):
            session.push_audio(speechlike(1.0))
        assert session.waiting_s == pytest.approx(1.5)
        frames = list(session.drain())
        session.push_audio(speechlike(1.0))
        session.end_utterance()
        assert len(frames) > 20 and len(frames + list(session.drain())) == 63


@pytest.mark.slow
def test_memory_does_not_grow_with_the_sound():
    """Three minutes against one, the sound made on the way. Faceformers are left out, for time."""

    class Speechless:
        """Two features in, one frame of rest out."""

        encoder, look_ahead = default_spec("logmel"), 0

        def stream(self):
            return self

        def push(self, features):
            return torch.zeros(len(features) // 2, 64), torch.zeros(len(features) // 2, 478, 3)

    class Unrendered(FakeAvatar):
        def compose(self, *_, **__):
            self.shown.clear()
            return self.background_plate

    avatar = Unrendered(speech=Speechless())
    session, second, kept = Session(avatar, encoder=create_encoder("logmel")), speechlike(1.0), []
    tracemalloc.start()
    try:
        for s in range(180):
            session.push_audio(second)
            assert 20 <= sum(1 for _ in session.drain()) <= 26
            if s in (59, 179):
                kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        session.close()
    # A frame's motion is 12 kB, a second's sound 64 kB: anything kept of each of 3000 frames shows.
    assert kept[1] - kept[0] < 300_000


def test_waiting_motion_stays_bounded():
    """A long sound is pushed a little at a time: only that much motion, and what is being rendered, waits."""
    session, most = Session(FakeAvatar(), SpeakConfig(level=0.1)), 0
    frames = 0
    for _ in drained(session, iter([speechlike(30)])):
        most, frames = max(most, len(session._planned) + len(session._mouths)), frames + 1
    # At the sound's end, the look-ahead of the encoder and the Faceformers comes at once.
    assert frames == 750 and most <= session.ahead + READ_AHEAD / SAMPLES_PER_FRAME + round(25 * session.latency_s)


def test_pixels_outside_the_dilated_mask_are_the_driving_frames():
    avatar = FakeAvatar()
    outside = dilate_mask(avatar.driving_mask(0)) == 0
    for frame in synthesize(avatar, speechlike(0.5)):
        assert np.array_equal(frame.image[outside], avatar.driving_frame(frame.driving_frame)[outside])


@pytest.mark.parametrize("db", [-40, -26, -6])
def test_loudness_does_not_change_the_motion(db):
    """Offline from the first frame on; live once the level is known, after four seconds of speech."""
    speech = speechlike(6.0)
    speech /= speech_level(speech)
    usual = expressions(list(synthesize(FakeAvatar(), 0.05 * speech)))
    loud = np.float32(10 ** (db / 20)) * speech
    # Log-mel energies have a floor, 80 dB down: of these sounds no frame comes near it but between the syllables.
    torch.testing.assert_close(expressions(list(synthesize(FakeAvatar(), loud))), usual, atol=0.02, rtol=0)
    with Session(FakeAvatar()) as session:
        session.push_audio(loud)
        session.end_utterance()
        live = expressions(list(session.drain()))
    assert (live - usual)[100:].abs().mean() < 0.15 * (usual - usual.mean(0)).abs().mean()


# --- utterances, interruption, idling


def test_an_utterance_does_not_depend_on_those_before():
    """Between them the driving track goes on; the lips of the second are those that it has alone."""
    first, second = speechlike(0.7), speechlike(0.9, 1)
    config = SpeakConfig(level=0.05)
    with Session(FakeAvatar(), config) as session:
        session.push_audio(first)
        session.end_utterance()
        session.end_utterance()  # nothing was said since
        before = list(session.drain())
        session.push_audio(second)
        session.end_utterance()
        after = list(session.drain())
    assert len(before) == 18 and len(after) == 23
    assert same_images(before, list(synthesize(FakeAvatar(), first, config)))
    alone = list(synthesize(FakeAvatar(), second, replace(config, start=18)))
    assert torch.equal(expressions(after), expressions(alone))
    assert [f.driving_frame for f in after] == [f.driving_frame for f in alone]
    assert [f.pts_s for f in before + after] == [i / 25 for i in range(41)]


def test_a_session_idles_for_ever_with_the_mouth_at_rest_and_renders_each_idle_frame_once():
    avatar = FakeAvatar()
    rest, _ = resting_mouth(avatar.driving, avatar)
    with Session(avatar, SpeakConfig(blinks=False)) as session:
        frames = take(session, 200)
    assert [f.driving_frame for f in frames] == ping_pong(DRIVING, 0, 200).tolist()
    assert not any(f.speaking or f.audio.any() for f in frames)
    assert all(torch.equal(f.motion.expression[0, :40], rest[:40]) for f in frames)
    assert avatar.rendered <= DRIVING + session.ahead
    for frame in frames:  # the same picture each time, and that of speech in silence but for the grain
        assert np.array_equal(frame.image, frames[frame.driving_frame].image)


def test_idle_frames_are_kept_within_a_bound(monkeypatch):
    monkeypatch.setattr("hicode.session.idle_frames.MAX_BYTES", 4000)
    avatar = FakeAvatar()
    with Session(avatar, SpeakConfig(blinks=False)) as session:
        frames = take(session, 60)
    assert DRIVING + session.ahead < avatar.rendered <= 60 + session.ahead
    assert np.array_equal(frames[0].image, frames[38].image)  # kept or not, it is the same


def test_speech_begins_and_ends_within_idling():
    speech = speechlike(0.8)
    with Session(FakeAvatar(), SpeakConfig(level=0.05, blinks=False)) as session:
        idle = take(session, 7)
        session.push_audio(speech)
        session.end_utterance()
        frames = take(session, 40)
    speaking = [f.speaking for f in frames]
    assert not any(f.speaking for f in idle) and speaking == [True] * 20 + [False] * 20
    assert [f.driving_frame for f in idle + frames] == ping_pong(DRIVING, 0, 47).tolist()
    alone = list(synthesize(FakeAvatar(), speech, SpeakConfig(level=0.05, blinks=False, start=7)))
    assert torch.equal(expressions(frames[:20]), expressions(alone))


def test_an_utterance_that_starves_idles_and_goes_on():
    speech = speechlike(1.0)
    with Session(FakeAvatar(), SpeakConfig(level=0.05, rest=False)) as session:
        session.push_audio(speech[:8000])
        frames = take(session, 20)
        session.push_audio(speech[8000:])
        session.end_utterance()
        frames += take(session, 20)
    spoken = [f for f in frames if f.speaking]
    assert len(spoken) == 25 and [f.speaking for f in frames].index(False) < 13
    alone = list(synthesize(FakeAvatar(), speech, SpeakConfig(level=0.05, rest=False)))
    assert torch.equal(expressions(spoken)[:, :40], expressions(alone)[:, :40])  # the mouth's
    assert np.array_equal(np.concatenate([f.audio for f in spoken]), np.concatenate([f.audio for f in alone]))


@pytest.mark.parametrize("still", [False, True])
def test_an_interruption_rests_the_mouth_within_two_frames_and_the_pose_goes_on(still):
    config = SpeakConfig(level=0.05, still=still, rest=False, seed=3)
    avatar = FakeAvatar()
    rest, _ = resting_mouth(avatar.driving, avatar)
    with Session(avatar, config) as session:
        session.push_audio(speechlike(3.0))
        session.end_utterance()
        session.push_audio(speechlike(1.0))
        spoken = take(session, 10)
        assert session.clear() == pytest.approx(0.4) and session.waiting_s == 0
        assert session.clear() == 0
        after = take(session, 15)
        session.push_audio(speechlike(0.4, 2))
        session.end_utterance()
        again = take(session, 10)
    assert all(f.speaking for f in spoken) and not any(f.speaking for f in after)
    assert all(f.speaking for f in again)
    last, half = spoken[-1].motion.expression[0, :8], after[0].motion.expression[0, :8]
    torch.testing.assert_close(half, (last + rest[:8]) / 2)
    for frame in after[1:]:
        torch.testing.assert_close(frame.motion.expression[0, :8], rest[:8])
    # Pose, eyes and driving frame of all 35 are those of a session that was never interrupted.
    with Session(FakeAvatar(), config) as session:
        calm = take(session, 35)
    for frame, other in zip(spoken + after + again, calm, strict=True):
        assert frame.driving_frame == other.driving_frame and frame.pts_s == other.pts_s
        assert torch.equal(frame.motion.T_camera_head, other.motion.T_camera_head)
        assert torch.equal(frame.motion.expression[:, 40:], other.motion.expression[:, 40:])


def test_what_was_said_before_an_interruption_is_forgotten():
    config = SpeakConfig(level=0.05)
    with Session(FakeAvatar(), config) as session:
        session.push_audio(speechlike(0.513, 1))  # in the middle of a frame
        list(session.drain())
        session.clear()
        session.push_audio(speechlike(0.6))
        session.end_utterance()
        lips = expressions(list(session.drain()))[:, :40]
    assert torch.equal(lips, expressions(list(synthesize(FakeAvatar(), speechlike(0.6), config)))[:, :40])


# --- threads


def live(session: Session, audio: np.ndarray) -> list[Frame]:
    """Pushed by one thread in small chunks, taken by another."""

    def write():
        for begin in range(0, len(audio), 1600):
            session.push_audio(audio[begin : begin + 1600])
            time.sleep(0.001)
        session.end_utterance()

    writer, frames, total = threading.Thread(target=write), [], -(-len(audio) // SAMPLES_PER_FRAME)
    writer.start()
    while len(frames) < total:
        frames += session.drain()
        time.sleep(0.0005)
    writer.join()
    return frames


def test_a_writer_and_a_reader_in_threads_of_their_own_give_the_same_frames():
    audio, config = speechlike(2.0), SpeakConfig(level=0.05)
    with Session(FakeAvatar(), config) as session:
        assert same_images(live(session, audio), list(synthesize(FakeAvatar(), audio, config)))


def test_two_sessions_of_one_avatar_in_parallel_give_the_same_frames_as_alone():
    avatar, config = FakeAvatar(), SpeakConfig(level=0.05)
    sounds, out = [speechlike(1.5, 1), speechlike(1.5, 2)], {}

    def talk(k: int) -> None:
        with Session(avatar, config) as session:
            out[k] = live(session, sounds[k])

    threads = [threading.Thread(target=talk, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, sound in enumerate(sounds):
        assert same_images(out[k], list(synthesize(avatar, sound, config)))


def test_interruptions_while_frames_are_taken_lose_and_double_nothing():
    """Driving frames and time stamps run on without a gap, whatever the writer does."""
    stop = threading.Event()
    with Session(FakeAvatar(), SpeakConfig(level=0.05)) as session:

        def write():
            rng = np.random.default_rng(0)
            while not stop.is_set():
                session.push_audio(speechlike(0.3))
                if rng.random() < 0.3:
                    session.end_utterance()
                if rng.random() < 0.3:
                    assert session.clear() < 10
                time.sleep(0.005)

        writer = threading.Thread(target=write)
        writer.start()
        frames = take(session, 120)
        stop.set()
        writer.join()
    assert [f.driving_frame for f in frames] == ping_pong(DRIVING, 0, 120).tolist()
    assert [f.pts_s for f in frames] == [i / 25 for i in range(120)]
    assert any(f.speaking for f in frames)


def test_a_second_reader_is_refused():
    entered, leave = threading.Event(), threading.Event()

    class Slow(FakeAvatar):
        def driving_frame(self, t):
            entered.set()
            leave.wait(20)
            return super().driving_frame(t)

    with Session(Slow()) as session:
        reader = threading.Thread(target=lambda: take(session, 1))
        reader.start()
        entered.wait(20)
        with pytest.raises(InputError, match="one reader"):
            next(session.frames())
        leave.set()
        reader.join()


def test_a_closed_session_leaves_no_thread_ends_its_frames_and_takes_no_sound():
    list(synthesize(FakeAvatar(), speechlike(0.2)))  # the pool that all sessions share
    before = threading.active_count()
    for _ in range(5):
        session = Session(FakeAvatar())
        session.push_audio(speechlike(1.0))
        take(session, 3)
        session.close()
        session.close()
        assert take(session, 3) == [] and list(session.drain()) == []
        for refused in (lambda: session.push_audio(speechlike(0.1)), session.end_utterance):  # noqa: B023
            with pytest.raises(InputError, match="closed"):
                refused()
    assert threading.active_count() == before


def test_frames_are_rendered_on_as_many_threads_as_torch_uses_and_come_in_order():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        avatar = FakeAvatar()
        three = list(synthesize(avatar, speechlike(1.0)))
        assert torch.get_num_threads() == 3 and 1 < len({thread for _, thread in avatar.shown}) <= 3
        torch.set_num_threads(1)
        one = list(synthesize(FakeAvatar(), speechlike(1.0)))
    finally:
        torch.set_num_threads(threads)
    assert len(one) == 25 and same_images(one, three)


def test_a_frame_that_fails_raises_where_it_is_asked_for():
    class Failing(FakeAvatar):
        def driving_frame(self, t):
            if t == 5:
                raise ValueError("frame 5 is damaged")
            return super().driving_frame(t)

    frames = synthesize(Failing(), speechlike(1.0))
    assert len([next(frames) for _ in range(5)]) == 5
    with pytest.raises(ValueError, match="frame 5"):
        next(frames)


# --- what cannot be used


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    "audio, message",
    [
        (np.zeros(0, np.float32), "empty"),
        (np.array([0.1, np.nan, 0.2], np.float32), r"1 samples that are not numbers \(first at 1\)"),
        (np.full((100, 2), 0.1, np.float32), "one channel"),
    ],
)
def test_unusable_sound_is_refused_with_its_reason(audio, message):
    with pytest.raises(InputError, match=message):
        list(synthesize(FakeAvatar(), audio))


def test_a_session_refuses_nan_and_goes_on():
    with Session(FakeAvatar()) as session:
        for bad, rate_hz in ((np.array([np.inf], np.float32), 16_000), (np.zeros(10, np.float32), 0)):
            with pytest.raises(InputError, match=r"not numbers|0 samples a second"):
                session.push_audio(bad, rate_hz)
        session.push_audio(speechlike(1.0))
        session.end_utterance()
        assert len(list(session.drain())) == 25


def test_an_avatar_without_speech_says_so():
    with pytest.raises(InputError, match="no speech models"):
        Session(FakeAvatar(speech=None))


def test_another_encoder_than_the_avatars_is_refused():
    with pytest.raises(InputError, match="logmel encoder, not other"):
        Session(FakeAvatar(), encoder=SimpleNamespace(name="other", spec=default_spec("embedded")))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"region": "hair"}, "Choose face or head"),
        ({"level": 0.0}, "not positive"),
        ({"output_rate_hz": 16_001}, "multiple of 25"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SpeakConfig(**options)
