"""Video and sound, in and out. Every clip is synthesised here; times are read off the pictures (a grey level that rises
with time).
"""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from helpers.media_files import click, encode, grey, levels, onset_s
from hicode.errors import InputError, OutputError
from hicode.media.audio import level_db, mix_weights, read_audio, read_speech, write_audio
from hicode.media.video import VideoWriter, probe, read_video


@pytest.mark.parametrize("source_fps", [12, 24, 24000 / 1001, 25, 30, 30000 / 1001, 50, 60])
def test_any_frame_rate_becomes_25_by_nearest_presentation_time(tmp_path, source_fps):
    times = np.arange(int(3 * source_fps)) / source_fps
    path = encode(tmp_path / "v.mp4", [grey(int(20 + 60 * t)) for t in times], times)
    got = levels(path)
    assert abs(len(got) - 3 * 25) <= 1
    # The level tells the time (60 a second): nearest frame is at most half a source frame off; 2 levels of codec and
    # YUV rounding.
    error = (got - 20) / 60 - np.arange(len(got)) / 25
    assert np.abs(error).max() <= 0.5 / source_fps + 2.5 / 60
    assert abs(error.mean()) < 1.5 / 60, "a mean error is drift or a shift"


def test_a_25_fps_video_gives_each_frame_once(tmp_path):
    frames = [grey(10 + 5 * i) for i in range(40)]
    path = encode(tmp_path / "v.mp4", frames, np.arange(40) / 25)
    assert np.abs(levels(path) - [10 + 5 * i for i in range(40)]).max() <= 1.5  # neighbours are 5 apart


def test_variable_frame_rate_keeps_its_clock(tmp_path):
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.01, 0.12, 60))
    times -= times[0]
    path = encode(tmp_path / "v.mkv", [grey(int(20 + 50 * t)) for t in times], times)
    got = levels(path)
    nearest = times[np.abs(times[None] - (np.arange(len(got)) / 25)[:, None]).argmin(1)]
    assert np.abs(got - (20 + 50 * nearest)).max() <= 3
    assert abs(len(got) / 25 - times[-1]) < 0.15


def test_a_late_first_frame_is_time_zero_for_picture_and_sound(tmp_path):
    times = 1.0 + np.arange(50) / 25
    sound = click(3.0, 1.6, 48000)[None]
    path = encode(
        tmp_path / "v.mkv",
        [grey(200 if t >= 1.6 else 40) for t in times],
        times,
        audio=(sound, 48000, "mono", "pcm_f32le"),
    )
    assert np.argmax(levels(path) > 120) == 15
    assert onset_s(read_audio(path)) == pytest.approx(0.6, abs=0.003)


def test_sound_that_starts_late_is_padded(tmp_path):
    path = encode(
        tmp_path / "v.mkv", [grey(50)] * 50, np.arange(50) / 25,
        audio=(click(1.0, 0.2, 44100)[None], 44100, "mono", "pcm_f32le"), start_audio_s=0.5,
    )  # fmt: skip
    assert onset_s(read_audio(path)) == pytest.approx(0.7, abs=0.003)


def set_display_matrix(path, a, b, c, d):
    """Write the rotation flag as phones do: into the track header of the MP4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    matrix = at + (40 if data[at] == 0 else 52)
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


# (a, b, c, d) of the display matrix, and the numpy operation that makes the same upright picture.
ORIENTATIONS = {
    "upright": ((1, 0, 0, 1), lambda x: x),
    "quarter clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "upside down": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "quarter counter-clockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "mirrored, turned": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_phone_rotation_is_applied(tmp_path, name):
    matrix, upright = ORIENTATIONS[name]
    image = np.zeros((48, 64, 3), np.uint8)
    image[:16, :16] = 220  # a corner, and a bar to break the symmetry
    image[40:, 24:40] = 120
    path = encode(tmp_path / "v.mp4", [image] * 5, np.arange(5) / 25)
    set_display_matrix(path, *matrix)
    got = next(read_video(path))
    expected = upright(image)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).mean() < 4
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    assert info.mirrored == name.startswith("mirrored")


def test_4k_is_reduced_while_decoding(tmp_path):
    rng = np.random.default_rng(0)
    # 3840x2160, grey
    image = np.kron(rng.integers(30, 220, (27, 48, 1)).repeat(3, 2), np.ones((80, 80, 1))).astype(np.uint8)
    path = encode(tmp_path / "v.mp4", [image] * 2, [0, 0.04], options={"preset": "ultrafast"})
    got = next(read_video(path, max_size=960))
    assert got.shape == (540, 960, 3)
    assert np.abs(got[10::20, 10::20].astype(int) - image[40::80, 40::80]).mean() < 4  # the middles of the blocks


def test_ten_bit_equals_eight_bit(tmp_path):
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(30, 220, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    eight = next(read_video(encode(tmp_path / "a.mkv", [image] * 3, np.arange(3) / 25, "ffv1", "yuv444p")))
    ten = next(read_video(encode(tmp_path / "b.mkv", [image] * 3, np.arange(3) / 25, "ffv1", "yuv444p10le")))
    assert np.abs(eight.astype(int) - image).max() <= 3  # 8-bit YUV rounds
    assert np.abs(ten.astype(int) - image).max() <= 2


@pytest.mark.parametrize("matrix, kr, kb", [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (9, 0.2627, 0.0593)])
@pytest.mark.parametrize("full", [False, True])
def test_colour_matrix_and_range_as_tagged(tmp_path, matrix, kr, kb, full):
    """Against the definition: Y' = kr R + (1 - kr - kb) G + kb B, Cb = (B - Y') / (2 (1 - kb)), Cr likewise."""
    r, g, b = 0.8, 0.3, 0.25
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    codes = [y * 255, 128 + u * 255, 128 + v * 255] if full else [16 + y * 219, 128 + u * 224, 128 + v * 224]
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame = av.VideoFrame(32, 32, "yuv444p")
        for plane, code in zip(frame.planes, codes):
            plane.update(bytes([round(code)]) * plane.buffer_size)
        frame.colorspace, frame.color_range, frame.pts = matrix, 2 if full else 1, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    got = next(read_video(tmp_path / "v.mkv"))[16, 16]
    assert np.abs(got - np.array([r, g, b]) * 255).max() <= 2.5  # codes are rounded to integers


def test_non_square_pixels_become_square(tmp_path):
    path = encode(tmp_path / "v.mkv", [grey(90)] * 3, np.arange(3) / 25, aspect=Fraction(3, 2))
    assert next(read_video(path)).shape == (48, 96, 3)
    assert (probe(path).width, probe(path).height) == (96, 48)


@pytest.mark.parametrize("layout, channels", [("mono", 1), ("stereo", 2), ("5.1", 6)])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000, 96000])
def test_any_channels_and_rate_become_16_khz_mono(tmp_path, layout, channels, rate):
    t = np.arange(rate) / rate
    tone = (0.4 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    path = encode(
        tmp_path / "v.mkv",
        [grey(50)] * 25,
        np.arange(25) / 25,
        audio=(np.tile(tone, (channels, 1)), rate, layout, "pcm_f32le"),
    )
    got = read_audio(path)
    assert len(got) == pytest.approx(16000, abs=2)
    middle = slice(2000, 14000)  # the resampler's ends ring
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(got[middle] - expected[middle]).max() < 0.01


def test_gaps_in_the_sound_become_silence(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        sound = container.add_stream("pcm_f32le", rate=16000, layout="mono")
        for start in (0, 32000):
            frame = av.AudioFrame.from_ndarray(click(1.0, 0.5, 16000)[None], format="flt", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), start
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    got = read_audio(tmp_path / "a.mkv")
    assert len(got) == pytest.approx(48000, abs=4)
    assert onset_s(got) == pytest.approx(0.5, abs=0.003) and onset_s(got[16000:]) == pytest.approx(1.5, abs=0.003)


def test_a_video_without_sound_has_none(tmp_path):
    path = encode(tmp_path / "v.mp4", [grey(50)] * 5, np.arange(5) / 25)
    assert read_audio(path) is None and not probe(path).has_audio


def test_written_video_keeps_pictures_and_sound_in_sync(tmp_path):
    flash, rate = 30, 16000
    sound = click(3.0, flash / 25, rate)
    with VideoWriter(tmp_path / "out.mp4", 64, 48, audio=sound) as video:
        for i in range(75):
            video.write(grey(220 if i >= flash else 30))
    got = levels(tmp_path / "out.mp4")
    assert len(got) == 75 and np.argmax(got > 120) == flash
    # a frame is 0.04 s; AAC smears onsets
    assert onset_s(read_audio(tmp_path / "out.mp4")) == pytest.approx(flash / 25, abs=0.01)
    info = probe(tmp_path / "out.mp4")
    assert (info.codec, info.pixel_format, info.fps) == ("h264", "yuv420p", 25.0)


def test_sound_in_pieces_equals_sound_at_once(tmp_path):
    sound = np.random.default_rng(0).uniform(-0.3, 0.3, 16000 * 2 + 123).astype(np.float32)
    for name, audio in (("once", sound), ("pieces", iter(np.array_split(sound, 17)))):
        with VideoWriter(tmp_path / f"{name}.mp4", 16, 16, audio=audio) as video:
            for _ in range(51):
                video.write(grey(60, 16, 16))
    assert np.array_equal(read_audio(tmp_path / "once.mp4"), read_audio(tmp_path / "pieces.mp4"))


def test_colours_survive_writing_and_reading(tmp_path):
    rng = np.random.default_rng(1)
    image = np.kron(rng.integers(30, 220, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    with VideoWriter(tmp_path / "out.mp4", 64, 64, crf=1) as video:
        video.write(image)
    got = next(read_video(tmp_path / "out.mp4"))
    assert np.abs(got[8::16, 8::16].astype(int) - image[8::16, 8::16]).max() <= 6  # 8-bit limited-range YUV and crf 1


def test_odd_sizes_grow_by_one(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", 33, 17) as video:
        video.write(grey(70, 33, 17))
    assert next(read_video(tmp_path / "out.mp4")).shape == (18, 34, 3)


def test_the_index_comes_first_so_that_players_can_start(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", 64, 48) as video:
        video.write(grey(70))
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_an_exception_leaves_no_video(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "out.mp4", 64, 48) as video:
        video.write(grey(70))
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []


def test_writing_into_nowhere_is_said(tmp_path):
    with pytest.raises(OutputError, match="mp4"):
        VideoWriter(tmp_path / "out.txt", 64, 48)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"), VideoWriter(tmp_path / "file" / "out.mp4", 64, 48):
        pass


def test_wav_round_trip(tmp_path):
    sound = click(1.0, 0.3, 16000)
    write_audio(tmp_path / "a.wav", sound, 16000)
    assert np.abs(read_audio(tmp_path / "a.wav") - sound).max() <= 1 / 32768


@pytest.mark.parametrize("samples, finding", [
    (np.zeros(0, np.float32), "less than one frame"),
    (np.zeros(32000, np.float32), "silent"),
    (np.full(32000, np.nan, np.float32), "not numbers"),
])  # fmt: skip
def test_sound_that_cannot_drive_is_refused(tmp_path, samples, finding):
    soundfile.write(str(tmp_path / "a.wav"), samples, 16000, subtype="FLOAT")
    with pytest.raises(InputError, match=finding):
        read_speech(tmp_path / "a.wav")


def test_a_cut_off_video_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    with VideoWriter(tmp_path / "whole.mp4", 64, 48) as video:
        for _ in range(100):
            video.write(rng.integers(0, 255, (48, 64, 3)).astype(np.uint8))
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cut off"):
        list(read_video(tmp_path / "cut.mp4"))


def test_level():
    assert level_db(np.zeros(1000, np.float32)) == -120
    square = np.where(np.arange(1000) % 20 < 10, 0.1, -0.1).astype(np.float32)
    assert level_db(square) == pytest.approx(-20, abs=0.01)
    assert (
        level_db(0.3 + square) == pytest.approx(-20, abs=0.01) and level_db(np.full(1000, 0.1, np.float32)) == -120
    ), "an offset is no sound"


# --- channels and sample formats --------------------------------------------------------------------------------------


def voice(seconds: float = 2.0, rate: int = 48000, seed: int = 0) -> np.ndarray:
    """Noise in syllables, RMS .1 while it sounds."""
    n = round(seconds * rate)
    return 0.1 * np.random.default_rng(seed).standard_normal(n) * (np.sin(2 * np.pi * 3 * np.arange(n) / rate) > 0)


def wav_of(path, channels, rate: int = 48000):
    soundfile.write(str(path), np.stack(channels, 1), rate, subtype="FLOAT", format="WAV")
    return path


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_channel_does_not_halve_the_level(tmp_path, dead):
    """Dead means hiss 46 dB below the voice, as an unplugged microphone has it."""
    live, hiss = voice(), 0.0005 * np.random.default_rng(1).standard_normal(96000)
    pair = [hiss, live] if dead == 0 else [live, hiss]
    alone = read_audio(wav_of(tmp_path / "mono.wav", [live]))
    np.testing.assert_array_equal(read_audio(wav_of(tmp_path / "stereo.wav", pair)), alone)


def test_a_channel_wired_the_wrong_way_round_does_not_cancel_the_other(tmp_path):
    live = voice()
    alone = read_audio(wav_of(tmp_path / "mono.wav", [live]))
    mixed = read_audio(wav_of(tmp_path / "stereo.wav", [live, -0.8 * live]))
    gain = (mixed @ alone) / (alone @ alone)
    assert abs(gain) == pytest.approx(0.9, abs=0.01)  # the mean of 1 and .8
    np.testing.assert_allclose(mixed, gain * alone, atol=1e-4)


def test_two_microphones_in_a_room_are_averaged(tmp_path):
    """Sounds that have nothing to do with each other keep their signs."""
    a, b = voice(seed=1), voice(seed=2)
    expected = read_audio(wav_of(tmp_path / "mono.wav", [(a + b) / 2]))
    np.testing.assert_allclose(read_audio(wav_of(tmp_path / "stereo.wav", [a, b])), expected, atol=1e-5)


def test_of_surround_sound_the_centre_speaks_and_the_subwoofer_does_not():
    layout = np.array([0.7, 0.7, 1.0, 0.0, 0.35, 0.35])  # FL FR FC LFE and sides
    rumble = np.diag([1e-9, 1e-9, 0.01, 1.0, 1e-9, 1e-9])
    np.testing.assert_array_equal(mix_weights(rumble, layout), [0, 0, 1, 0, 0, 0])
    everything = mix_weights(np.eye(6), layout)
    assert everything.argmax() == 2 and everything[3] == 0 and everything.sum() == pytest.approx(1)
    np.testing.assert_array_equal(mix_weights(np.diag([0, 0, 0, 1.0, 0, 0]), layout), [0, 0, 0, 1, 0, 0])
    assert np.isfinite(mix_weights(np.zeros((6, 6)), layout)).all()
