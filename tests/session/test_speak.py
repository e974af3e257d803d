"""`speak`: the video and its sound, bad sounds, output at the source's size, what of the head is shown."""

import numpy as np
import pytest
import torch

from helpers.fake_avatar import DRIVING, SIZE, FakeAvatar, expressions, source_video, speechlike
from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from hicode.avatar.driving import resting_mouth
from hicode.errors import FileFormatError, HicodeError, InputError, OutputError
from hicode.motion import ping_pong
from hicode.session.config import SpeakConfig, VideoConfig
from hicode.session.speak import speak, synthesize
from hicode.trust.machine_key import config_folder
from hicode.trust.marks import MarkConfig
from hicode.trust.verify import verify

ORIGINAL = VideoConfig(original_size=True)
UNMARKED = MarkConfig(mark="none", reason="a test that compares pixels")


def bad_sounds() -> dict[str, tuple[np.ndarray, int, str]]:
    """name: (samples "n" or "n c", rate, WAV subtype) of sound as bad microphones and wrong exports make it."""
    voice = speechlike(0.6)
    wide = np.repeat(voice, 6)
    quiet = np.zeros_like(voice)
    return {
        "clipped": ((20 * voice).clip(-1, 1), 16000, "PCM_16"),
        "with an offset": (0.5 + voice, 16000, "FLOAT"),
        "an offset alone": (np.full(9600, 0.5, np.float32), 16000, "FLOAT"),
        "of 8 kHz": (voice[::2], 8000, "PCM_16"),
        "of 96 kHz": (wide, 96000, "PCM_24"),
        "of 6 channels": (np.stack([quiet, quiet, voice, quiet, quiet, quiet], 1), 16000, "PCM_16"),
        "with a dead channel": (np.stack([quiet, voice], 1), 16000, "PCM_16"),
        "with a channel turned round": (np.stack([voice, -voice], 1), 16000, "PCM_16"),
        "beyond full scale": (300 * voice, 16000, "FLOAT"),
        "in numbers of 16 bits": (32768 * voice, 16000, "FLOAT"),
        "of one sample": (voice[1000:1001], 16000, "FLOAT"),
        "of a hundred samples": (voice[1000:1100], 16000, "PCM_32"),
        "of unsigned bytes": (voice, 16000, "PCM_U8"),
    }


@pytest.mark.parametrize("name", bad_sounds())
def test_bad_sound_is_spoken_or_refused_in_one_line(tmp_path, name):
    import soundfile

    samples, rate, subtype = bad_sounds()[name]
    soundfile.write(tmp_path / "bad.wav", samples, rate, subtype=subtype)
    avatar = FakeAvatar()
    if name in ("an offset alone", "of one sample"):  # which is nothing but an offset
        with pytest.raises(InputError, match=r"bad.wav is silent.*Give a file with speech") as caught:
            speak(avatar, tmp_path / "bad.wav", tmp_path / "out.mp4", progress=False)
        assert "\n" not in str(caught.value)
        return
    spoken = speak(avatar, tmp_path / "bad.wav", tmp_path / "out.mp4", progress=False)
    assert spoken.frames == -(-len(samples) * 16000 // rate // 640) and len(avatar.shown) == spoken.frames
    assert all(m.expression.isfinite().all() and m.landmarks.isfinite().all() for m, _ in avatar.shown)


@pytest.mark.parametrize(
    "name",
    ["with an offset", "with a dead channel", "with a channel turned round", "beyond full scale", "of 6 channels"],
)
def test_bad_sound_moves_the_mouth_as_good_sound_does(tmp_path, name):
    import soundfile

    from hicode.media.audio import read_audio

    samples, rate, subtype = bad_sounds()[name]
    soundfile.write(tmp_path / "bad.wav", samples, rate, subtype=subtype)
    bad, good = (
        expressions(list(synthesize(FakeAvatar(), sound)))
        for sound in (read_audio(tmp_path / "bad.wav"), speechlike(0.6))
    )
    # A few parts in a thousand: 16-bit samples, and the high-pass's beginning.
    torch.testing.assert_close(bad, good, atol=0.03, rtol=0)
    assert good.std(0).max() > 0.3  # there is something to compare


def test_silence_of_any_kind_is_a_still_closed_mouth():
    """Digital silence, an offset, and a converter's last bit, as samples; a file of them is refused."""
    rest, _ = resting_mouth(FakeAvatar().driving, FakeAvatar())
    bit = np.random.default_rng(0).choice([0, 1 / 32768], 16000).astype(np.float32)
    for sound in (np.zeros(16000, np.float32), np.full(16000, 0.5, np.float32), bit):
        spoken = expressions(list(synthesize(FakeAvatar(), sound)))[:, FakeAvatar().mouth_expression]
        torch.testing.assert_close(spoken, rest[FakeAvatar().mouth_expression].expand_as(spoken))


@pytest.fixture
def wav(tmp_path):
    from hicode.media.audio import write_audio

    path = tmp_path / "speech.wav"
    write_audio(path, speechlike(1.3), SAMPLE_RATE_HZ)
    return path


def test_speak_writes_a_video_with_its_sound(tmp_path, wav):
    from hicode.media.audio import read_audio
    from hicode.media.video import probe, read_video

    out = tmp_path / "out.mp4"
    spoken = speak(FakeAvatar(), wav, out, progress=False)
    frames = list(read_video(out))
    info = probe(out)
    assert (info.width, info.height, info.codec) == (SIZE, SIZE, "h264") and info.fps == 25
    assert spoken.frames == len(frames) == 33 and spoken.timings.frames == 33
    original, sound = read_audio(wav), read_audio(out)
    assert abs(len(sound) - len(original)) <= 1024 + SAMPLES_PER_FRAME  # an AAC packet of padding
    n = min(len(sound), len(original))
    correlation = np.correlate(sound[:n] ** 2, np.pad(original[:n] ** 2, 640), "valid")
    assert abs(int(correlation.argmax()) - 640) <= SAMPLES_PER_FRAME  # in sync to one frame
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "speech.wav"]  # no temporary file stays


def test_speak_takes_samples_and_other_rates_and_channels(tmp_path):
    import soundfile

    stereo = tmp_path / "stereo.flac"
    soundfile.write(stereo, np.stack([np.repeat(speechlike(0.5), 3)] * 2, 1), 3 * SAMPLE_RATE_HZ)
    assert speak(FakeAvatar(), stereo, tmp_path / "a.mp4", progress=False).frames == 13
    assert speak(FakeAvatar(), speechlike(0.5), tmp_path / "b.mp4", progress=False).frames == 13
    assert speak(FakeAvatar(), np.float32([0.5, -0.5]), tmp_path / "c.mp4", progress=False).frames == 1


@pytest.mark.parametrize(
    "audio, out, error, message",
    [
        ("missing.wav", "out.mp4", InputError, "does not exist"),
        ("silent.wav", "out.mp4", InputError, "silent"),
        ("empty.wav", "out.mp4", InputError, "no sound at all"),
        ("text.wav", "out.mp4", InputError, "text.wav"),
        ("speech.wav", "out.avi", OutputError, "does not end in .mp4"),
        ("speech.wav", ".", OutputError, "does not end in .mp4"),
        ("speech.wav", "file.txt/out.mp4", OutputError, "Cannot write"),
        ("own.mp4", "own.mp4", OutputError, "also the input"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, wav, audio, out, error, message):
    from hicode.media.audio import write_audio

    write_audio(tmp_path / "silent.wav", np.zeros(16000, np.float32), 16000)
    write_audio(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "file.txt").write_text("in the way")
    (tmp_path / "own.mp4").write_bytes(wav.read_bytes())
    before = {p.name for p in tmp_path.iterdir()}
    avatar = FakeAvatar()
    with pytest.raises(error, match=message) as caught:
        speak(avatar, tmp_path / audio, tmp_path / out, progress=False)
    assert "\n" not in str(caught.value) and isinstance(caught.value, HicodeError)
    assert {p.name for p in tmp_path.iterdir()} == before and avatar.rendered == 0


def test_an_avatar_that_is_none_is_refused(tmp_path, wav):
    with pytest.raises(FileFormatError):
        speak(wav, wav, tmp_path / "out.mp4", progress=False)


def test_an_interrupted_video_leaves_nothing(tmp_path, wav):
    class Failing(FakeAvatar):
        def driving_frame(self, t):
            if t == 9:
                raise KeyboardInterrupt
            return super().driving_frame(t)

    with pytest.raises(KeyboardInterrupt):
        speak(Failing(), wav, tmp_path / "out.mp4", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["speech.wav"]


@pytest.mark.parametrize("side", [SIZE, 100, 40])
def test_original_size_pastes_the_head_into_the_sources_frames(tmp_path, wav, side):
    from hicode.media.video import probe, read_video

    source_video(tmp_path / "source.mp4")
    avatar = FakeAvatar(source={"path": str(tmp_path / "source.mp4"), "crop_box": [30, 10, side]})
    config = SpeakConfig(mark=UNMARKED)
    spoken = speak(avatar, wav, tmp_path / "out.mp4", config, ORIGINAL, progress=False)
    info = probe(tmp_path / "out.mp4")
    assert (info.width, info.height) == (160, 120) and spoken.frames == 33
    scale = side / SIZE
    head = (30 + round(32 * scale), 10 + round(30 * scale))
    heads = []
    for i, (frame, t) in enumerate(zip(read_video(tmp_path / "out.mp4"), ping_pong(DRIVING, 0, 33), strict=True)):
        # H.264 on flat grey is off by a level or two; a frame's grey differs from its neighbours' by three.
        assert abs(int(frame[5, 5, 0]) - (100 + 3 * t)) <= 2 and abs(int(frame[110, 150, 1]) - (100 + 3 * t)) <= 2, i
        heads.append(np.abs(frame[head[1], head[0]].astype(int) - (100 + 3 * t)).max())
    # The head's colour may pass through its surroundings' for a frame or two.
    assert np.median(heads) > 4


def test_original_size_takes_no_more_of_the_crop_than_what_is_new_in_it(tmp_path, wav):
    from hicode.media.video import read_video

    source_video(tmp_path / "source.mp4")
    greys = {}
    for region in ("face", "head"):
        avatar = FakeAvatar(source={"path": str(tmp_path / "source.mp4"), "crop_box": [30, 10, 100]})
        speak(avatar, wav, tmp_path / "out.mp4", SpeakConfig(region=region, mark=UNMARKED), ORIGINAL, progress=False)
        frames = zip(read_video(tmp_path / "out.mp4"), ping_pong(DRIVING, 0, 33), strict=True)
        greys[region] = np.array(
            [int(frame[10 + round(1.5625 * 18), 30 + round(1.5625 * 32), 0]) - (100 + 3 * t) for frame, t in frames]
        )  # above the face, on the head
    assert np.abs(greys["face"]).max() <= 3, "the crop's hair is the source's, resized: it must not be pasted"
    assert np.median(np.abs(greys["head"])) > 4


def test_original_size_needs_the_source(tmp_path, wav):
    gone = FakeAvatar(source={"path": str(tmp_path / "gone.mp4"), "crop_box": [0, 0, 64]})
    with pytest.raises(InputError, match=r"is gone. Name its new place"):
        speak(gone, wav, tmp_path / "out.mp4", video=ORIGINAL, progress=False)
    with pytest.raises(InputError, match="does not say where that is"):
        speak(FakeAvatar(), wav, tmp_path / "out.mp4", video=ORIGINAL, progress=False)


def test_a_source_that_is_another_video_is_refused(tmp_path, wav):
    source_video(tmp_path / "small.mp4", width=64, height=48)
    avatar = FakeAvatar(source={"path": str(tmp_path / "gone.mp4"), "crop_box": [30, 10, 100]})
    with pytest.raises(InputError, match="is 64x48, too small"):
        speak(avatar, wav, tmp_path / "out.mp4", video=VideoConfig(True, tmp_path / "small.mp4"), progress=False)
    source_video(tmp_path / "short.mp4", count=5)
    with pytest.raises(InputError, match="ends before driving frame 5"):
        speak(avatar, wav, tmp_path / "out.mp4", video=VideoConfig(True, tmp_path / "short.mp4"), progress=False)
    assert not (tmp_path / "out.mp4").exists()


def test_only_the_face_goes_into_a_played_frame_the_whole_head_where_asked_for():
    sound, top = speechlike(0.4), np.s_[17:21, 28:36]  # of the head, above the face that `face_mask` has
    frame = FakeAvatar().driving_frame(0)
    face, head, still = (
        next(synthesize(FakeAvatar(), sound, SpeakConfig(**options))).image
        for options in ({}, {"region": "head"}, {"still": True, "start": 0, "region": "face"})
    )
    assert np.array_equal(face[top], frame[top]) and not np.array_equal(face[30:40, 28:36], frame[30:40, 28:36])
    assert (head[top] != frame[top]).any(-1).all()
    assert (still[top] != frame[top]).any(-1).all()  # its head moves in the frame


def test_grain_goes_by_the_frame_and_stands_still_with_a_held_one():
    """The fake writes the number that grain goes by into a pixel."""
    played = [int(f.image[30, 32, 0]) for f in synthesize(FakeAvatar(), speechlike(0.5))]
    assert played == list(range(len(played))) and len(played) > 10
    config = SpeakConfig(still=True, start=2)
    held = [int(f.image[30, 32, 0]) for f in synthesize(FakeAvatar(), speechlike(0.5), config)]
    assert set(held) == {0}


def test_grain_is_left_out_where_asked_for():
    avatar = FakeAvatar(film_grain="grain")
    for grain in (True, False):
        avatar.grains.clear()
        for _ in synthesize(avatar, speechlike(0.2), SpeakConfig(film_grain=grain)):
            pass
        assert set(avatar.grains) == {"grain" if grain else None}
    assert avatar.film_grain == "grain"


def test_a_spoken_video_is_marked_and_signed_and_verify_names_its_avatar(tmp_path, wav):
    # The mark is looked for at the size of a source video: 64 px are too small a picture for it.
    source_video(tmp_path / "source.mp4", width=256, height=192)
    avatar = FakeAvatar(source={"path": str(tmp_path / "source.mp4"), "crop_box": [30, 10, 100], "sha256": 64 * "b"})
    out = tmp_path / "out.mp4"
    speak(avatar, wav, out, video=ORIGINAL, progress=False)
    found = verify(out)
    assert found.verdict == "synthetic" and found.agreement and found.manifest.state == "ours"
    assert found.manifest.avatar_sha256 == avatar.sha256 and found.watermark.avatar_id == avatar.sha256[:8]
    assert found.manifest.consent == "not stated" and found.aigc is not None


def test_a_video_without_marks_needs_a_reason_which_is_logged(tmp_path, wav):
    avatar = FakeAvatar(sha256=64 * "c")
    with pytest.raises(InputError, match="--reason"):
        MarkConfig(mark="none")
    out = tmp_path / "out.mp4"
    speak(avatar, wav, out, SpeakConfig(mark=UNMARKED), progress=False)
    log = (config_folder() / "log" / "cccccccc.jsonl").read_text(encoding="utf-8")
    assert "a test that compares pixels" in log and "out.mp4" in log
    assert b"c2pa" not in out.read_bytes()


def test_the_frames_of_a_session_carry_no_mark():
    # `evaluate` and `synthesize` measure what the renderer makes.
    sound = speechlike(0.2)
    plain = [f.image for f in synthesize(FakeAvatar(), sound, SpeakConfig(mark=UNMARKED))]
    assert all(np.array_equal(a, f.image) for a, f in zip(plain, synthesize(FakeAvatar(), sound), strict=True))
