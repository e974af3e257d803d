"""Files as people have them: odd names, several tracks, clocks that jump, samples of another scale."""

import os
import struct
import threading

import av
import numpy as np
import pytest
import soundfile

from helpers.media_files import click, encode, grey, levels, onset_s, tone, write_tracks
from hicode.errors import InputError
from hicode.media.audio import level_db, read_audio, read_speech, sound_notes, stream_audio
from hicode.media.source import as_file, joined_parts
from hicode.media.timeline import Timeline
from hicode.media.video import VideoWriter, probe, read_pictures, read_video

RISING = np.linspace(40, 200, 50)  # grey levels of two seconds


def wav_bytes(samples: np.ndarray, rate_hz: int = 16_000, is_float: bool = False) -> bytes:
    kind, data = (3, samples.astype("<f4")) if is_float else (1, np.round(samples * 32767).astype("<i2"))
    width, data = data.itemsize, data.tobytes()
    form = struct.pack("<HHIIHH", kind, 1, rate_hz, rate_hz * width, width, 8 * width)
    return struct.pack("<4sI4s4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16) + form + struct.pack(
        "<4sI", b"data", len(data)
    ) + data  # fmt: skip


# ---- names and pipes ----


@pytest.mark.parametrize("name", ["take1:2", "2024-01-05T12:30:00", "100%d é 中 'q'", "-x"])
def test_any_name_is_read_and_written(tmp_path, name):
    write_tracks(tmp_path / "a.mp4", RISING[:10])
    os.rename(tmp_path / "a.mp4", tmp_path / f"{name}.mp4")
    assert len(levels(tmp_path / f"{name}.mp4")) == 10
    (tmp_path / f"{name}.wav").write_bytes(wav_bytes(tone(1, 16_000)))
    assert len(read_audio(tmp_path / f"{name}.wav")) == 16_000
    with VideoWriter(tmp_path / f"{name} out.mp4", 64, 48) as video:
        video.write(grey(90))
    assert probe(tmp_path / f"{name} out.mp4").width == 64


def test_a_pipe_is_read_once_to_its_end(tmp_path):
    pipe, data = tmp_path / "pipe", wav_bytes(tone(1, 16_000))
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(data), daemon=True)
    writer.start()
    with as_file(pipe) as file:
        assert len(read_speech(file)) == len(read_speech(file)) == 16_000
    writer.join(5)
    assert not file.exists()


def test_bytes_and_file_objects_are_read(tmp_path):
    data = wav_bytes(tone(1, 16_000))
    (tmp_path / "a.wav").write_bytes(data)
    for source in (data, bytearray(data), (tmp_path / "a.wav").open("rb")):
        with as_file(source) as file:
            assert len(read_speech(file)) == 16_000


def test_devices_and_text_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "a.wav").write_text("text")
    for source, words in (("/dev/null", "device"), (b"", "empty"), ((tmp_path / "a.wav").open(), "binary mode")):
        with pytest.raises(InputError, match=words), as_file(source):
            pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe"):
        read_audio(tmp_path / "pipe")


@pytest.mark.parametrize(
    "name, text",
    [("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nother.mp4\n#EXT-X-ENDLIST\n"),
     ("a.txt", "ffconcat version 1.0\nfile other.mp4\n"), ("a.ans", "a text that would be drawn\n" * 9)],
)  # fmt: skip
def test_a_file_that_names_another_file_does_not_open_it(tmp_path, name, text):
    write_tracks(tmp_path / "other.mp4", RISING, [tone(2)])
    (tmp_path / name).write_text(text)
    for read in (probe, read_audio):
        with pytest.raises(InputError, match="not a readable"):
            read(tmp_path / name)


# ---- tracks ----


def test_a_longer_side_track_does_not_count(tmp_path):
    path = write_tracks(tmp_path / "music.mkv", RISING, [tone(2), tone(6)], defaults=[True, False])
    assert len(list(read_video(path))) == 50
    assert probe(path).duration_s == pytest.approx(2, abs=0.05)
    assert len(read_audio(path)) == pytest.approx(32_000, abs=800)
    assert any("2 sound tracks: number 1" in note for note in sound_notes(path))


@pytest.mark.parametrize("defaults", [[False, True], [True, False]])
def test_of_several_sound_tracks_one_with_sound_is_read(tmp_path, defaults):
    path = write_tracks(tmp_path / "a.mkv", RISING, [np.zeros(96_000, np.float32), tone(2)], defaults=defaults)
    assert level_db(read_audio(path)) > -20
    assert any("number 2 is used" in note for note in sound_notes(path))


def test_of_several_sound_tracks_the_default_one_is_read(tmp_path):
    path = write_tracks(tmp_path / "a.mkv", RISING, [tone(2), tone(2, level=0.03)], defaults=[False, True])
    assert level_db(read_audio(path)) < -30


def test_longer_subtitles_do_not_count(tmp_path):
    (tmp_path / "a.srt").write_text(
        "1\n00:00:00,000 --> 00:00:01,000\nHello\n\n2\n00:00:20,000 --> 00:00:30,000\nHello\n"
    )
    source = write_tracks(tmp_path / "a.mp4", RISING)
    with (
        av.open(str(source)) as pictures,
        av.open(str(tmp_path / "a.srt")) as titles,
        av.open(str(tmp_path / "b.mkv"), "w") as made,
    ):
        inputs = (pictures.streams.video[0], titles.streams.subtitles[0])
        streams = [made.add_stream_from_template(stream) for stream in inputs]
        for packet in (p for file in (pictures, titles) for p in file.demux() if p.dts is not None):
            packet.stream = streams[packet.stream.type == "subtitle"]
            made.mux(packet)
    assert len(levels(tmp_path / "b.mkv")) == 50 and probe(tmp_path / "b.mkv").duration_s == pytest.approx(2, abs=0.05)


def test_sound_of_an_unknown_kind_is_left_out_and_said(tmp_path):
    path = write_tracks(tmp_path / "a.mp4", RISING, [tone(2)])
    data = bytearray(path.read_bytes())
    at = data.index(b"mp4a", data.index(b"stsd", data.index(b"soun")))
    data[at : at + 4] = b"apac"
    esds = data.index(b"esds", at)
    data[esds : esds + 4] = b"free"
    path.write_bytes(data)
    assert read_audio(path) is None and not probe(path).has_audio and len(levels(path)) == 50
    assert any("no decoder" in note for note in sound_notes(path))
    with pytest.raises(InputError, match="no decoder"):
        read_speech(path)


def test_dropped_transparency_is_said(tmp_path):
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgba"
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 4), 128, np.uint8), format="rgba")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with av.open(str(tmp_path / "a.webm"), "w") as container:  # the alpha of VP8 and VP9 lies in a layer of its own
        stream = container.add_stream("libvpx", rate=25, options={"auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuva420p"
        frame = av.VideoFrame(32, 32, "yuva420p")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert any("Transparency" in note for note in probe(tmp_path / "a.webm").notes)
    assert any("Transparency" in note for note in probe(tmp_path / "a.mov").notes)


# ---- clocks ----


@pytest.mark.parametrize("piece_s, pieces", [(2.0, 2), (1.0, 4)])
def test_joined_transport_streams_give_all_of_picture_and_sound(tmp_path, piece_s, pieces):
    data, count = b"", round(25 * piece_s)
    for k in range(pieces):
        at_s = (0.4 if k == 0 else 0.6) * piece_s
        flash = [200 if i / 25 >= at_s else 40 for i in range(count)]
        piece = write_tracks(tmp_path / "a.ts", flash, [click(piece_s, at_s, 48_000)], file_format="mpegts")
        data += piece.read_bytes()
    path, whole_s = tmp_path / "joined.ts", pieces * piece_s
    path.write_bytes(data)
    pictures, sound = levels(path), read_audio(path)
    assert len(pictures) == pytest.approx(25 * whole_s, abs=2) and len(sound) == pytest.approx(
        16_000 * whole_s, abs=2400
    )
    for k in range(1, pieces):
        first = k * count + 5
        flash_s = (first + int(np.argmax(pictures[first:] > 120))) / 25
        assert flash_s == pytest.approx((k + 0.6) * piece_s, abs=0.05)
        assert first / 25 + onset_s(sound[640 * first :]) == pytest.approx(flash_s, abs=0.1)
    info = probe(path)
    assert sum("clock jumps" in note for note in info.notes) == pieces - 1
    assert info.duration_s == pytest.approx(whole_s, abs=0.15)


@pytest.mark.parametrize("stamp", ["pts", "dts"])
def test_one_damaged_time_stamp_moves_nothing(tmp_path, stamp):
    path = tmp_path / "a.ts"
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(grey(int(level)), format="rgb24") for level in RISING]
        for packet in (p for frame in [*frames, None] for p in stream.encode(frame)):
            container.mux(packet)
    data = bytearray(path.read_bytes())
    at = [i for i in range(0, len(data), 188) if data[i + 1] & 0x40 and data.find(b"\0\0\1\xe0", i, i + 188) > 0][20]
    at = data.find(b"\0\0\1\xe0", at)
    assert data[at + 7] == 0xC0, "both stamps are there"
    data[at + (10 if stamp == "pts" else 15)] ^= 0x10  # 2^26 / 90000 s
    path.write_bytes(data)
    got, info = levels(path), probe(path)
    assert len(got) == 50 and np.abs(got - RISING).max() < 8
    assert info.duration_s == pytest.approx(2, abs=0.05) and not info.notes


def test_pictures_without_any_time_stamp_have_a_length(tmp_path):
    path = tmp_path / "a.h264"
    write_tracks(path, RISING, file_format="h264")
    assert probe(path).duration_s == pytest.approx(2, abs=0.05) and len(levels(path)) == 50


def test_a_clock_that_jumps_by_hours_is_continuous(tmp_path):
    path = tmp_path / "jump.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i, level in enumerate(RISING):
            frame = av.VideoFrame.from_ndarray(grey(int(level)), format="rgb24")
            frame.pts = i
            for packet in stream.encode(frame):
                if i >= 30:
                    packet.pts += 25 * 47_721
                    packet.dts += 25 * 47_721
                container.mux(packet)
    got = levels(path)
    assert len(got) == 50 and np.abs(got - RISING).max() < 3
    info = probe(path)
    assert info.duration_s == pytest.approx(2, abs=0.05) and "47721" in " ".join(info.notes)


def test_tracks_share_the_shifts_of_a_jump():
    clock = Timeline()
    for i in range(10):
        assert clock.shift_s(0, float(i), 1.0) == clock.shift_s(1, i - 0.1, 1.0) == 0
    assert clock.shift_s(0, 5000.0, 1.0) == clock.shift_s(1, 4999.9, 1.0) == 10 - 5000
    assert len(clock.jumps) == 1 and clock.shift_s(0, 5001.0, 1.0) == 10 - 5000


def test_a_pause_of_one_track_is_no_jump():
    clock = Timeline()
    clock.shift_s(0, 0.0, 0.04)
    assert all(clock.shift_s(1, float(i), 1.0) == 0 for i in range(30))
    assert clock.shift_s(0, 29.0, 0.04) == 0 and not clock.jumps


def test_a_recording_without_a_length_has_one(tmp_path):
    path = write_tracks(tmp_path / "a.webm", RISING, [tone(2)], file_format="webm", options={"live": "1"})
    with av.open(str(path)) as container:
        assert not container.duration
    assert probe(path).duration_s == pytest.approx(2, abs=0.1)


def test_a_driving_sound_is_whole_where_its_pictures_begin_later(tmp_path):
    path = write_tracks(tmp_path / "late.mkv", RISING, [click(3.0, 0.5, 48_000)], video_start_s=1.0)
    assert onset_s(read_speech(path)) == pytest.approx(0.5, abs=0.03)
    assert len(read_audio(path)) == pytest.approx(32_000, abs=800), "the sound of a clip begins with its pictures"


@pytest.mark.parametrize("kind", ["wav", "streamed wav", "aiff", "caf", "w64", "flac"])
def test_sounds_joined_in_one_file_are_all_read_and_said(tmp_path, kind):
    data = b""
    for seconds, rate_hz in ((1, 16_000), (2, 24_000)):
        piece = wav_bytes(tone(seconds, rate_hz), rate_hz)
        if kind == "streamed wav":
            piece = piece[:4] + b"\xff" * 4 + piece[8:40] + b"\xff" * 4 + piece[44:]
        elif kind != "wav":
            soundfile.write(str(tmp_path / f"a.{kind}"), tone(seconds, rate_hz), rate_hz)
            piece = (tmp_path / f"a.{kind}").read_bytes()
        data += piece
    path = tmp_path / "two"
    path.write_bytes(data)
    assert len(joined_parts(path)) == 2 and len(read_audio(path)) == pytest.approx(48_000, abs=2)
    assert any("2 files are joined" in note for note in sound_notes(path))


@pytest.mark.parametrize("kind", ["mp4", "fragmented mp4", "flv"])
def test_videos_joined_in_one_file_are_said(tmp_path, kind):
    options = {"movflags": "frag_keyframe+empty_moov"} if kind == "fragmented mp4" else None
    data = 2 * write_tracks(tmp_path / f"a.{kind[-3:]}", RISING, options=options).read_bytes()
    path = tmp_path / "two"
    path.write_bytes(data)
    info = probe(path)
    assert len(joined_parts(path)) == 2 and [note for note in info.notes if "joined" not in note] == []
    assert len(info.notes) == 1 and len(levels(path)) == pytest.approx(25 * info.duration_s, abs=1.5)


@pytest.mark.parametrize("length", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_streamed_wav_of_a_wrong_length_is_read_whole(tmp_path, length):
    data = bytearray(wav_bytes(tone(1, 16_000)))
    data[40:44], data[4:8] = struct.pack("<I", length), struct.pack("<I", min(length + 36, 0xFFFFFFFF))
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read_audio(tmp_path / "a.wav")) == 16_000


def test_a_wav_that_is_longer_than_it_states_is_said(tmp_path):
    data = bytearray(wav_bytes(tone(3, 16_000)))
    data[40:44], data[4:8] = struct.pack("<I", 32_000), struct.pack("<I", 32_036)
    (tmp_path / "a.wav").write_bytes(data)
    assert any("64 kB follow" in note for note in sound_notes(tmp_path / "a.wav"))


@pytest.mark.parametrize("kind", ["wav", "flac", "avi"])
def test_what_is_cut_off_is_said(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "avi":
        noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
        encode(path, [noise] * 75, np.arange(75) / 25, "mjpeg", "yuvj420p")
    else:
        soundfile.write(str(path), tone(3, 16_000) + 0.1 * np.random.default_rng(0).normal(size=48_000), 16_000)
    assert not any("cut off" in note for note in sound_notes(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if kind == "avi":
        with pytest.raises(InputError, match="cut off"):
            levels(path)
    else:
        assert any("cut off" in note for note in sound_notes(path))


# ---- samples ----


@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("scale, peak", [(1.0, 0.3), (20.0, 1.0), (32_768.0, 0.3), (float(1 << 23), 0.3)])
def test_samples_of_any_scale_come_within_full_scale(tmp_path, subtype, scale, peak):
    if subtype == "PCM_24" and scale > 1:
        pytest.skip("integers have one scale")
    soundfile.write(str(tmp_path / "a.wav"), tone(1) * scale, 48_000, subtype=subtype)
    got = read_audio(tmp_path / "a.wav")
    assert np.abs(got[500:-500]).max() == pytest.approx(peak, rel=0.01)
    assert bool(sound_notes(tmp_path / "a.wav")) == (scale > 1)


def test_float_samples_beyond_any_scale_are_refused(tmp_path):
    soundfile.write(str(tmp_path / "a.wav"), tone(1) * 1e15, 48_000, subtype="FLOAT")
    with pytest.raises(InputError, match="full scale"):
        list(stream_audio(tmp_path / "a.wav"))


# ---- damage ----


def test_damaged_pictures_are_marked_until_the_next_whole_one(tmp_path):
    """Packets of one half second are overwritten, as on a bad line."""
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(0, 255, (18, 24, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    path = tmp_path / "a.ts"
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "12", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 192, 144, "yuv420p"
        for i in range(75):
            frame = av.VideoFrame.from_ndarray(np.roll(scene, 3 * i, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    first, last = len(data) // 188 // 3, len(data) // 188 // 2
    for packet in range(first, last):
        if rng.random() < 0.3:
            data[188 * packet + 20 : 188 * packet + 180 : 9] = rng.bytes(18)
    path.write_bytes(data)
    damaged = np.array([picture.damaged for picture in read_pictures(path)])
    assert 5 <= damaged.sum() <= 50 and not damaged[:15].any() and not damaged[-15:].any()


def test_a_folder_of_pictures_is_refused_with_the_way_to_a_video(tmp_path):
    (tmp_path / "000000.png").touch()
    with pytest.raises(InputError, match="ffmpeg -framerate"):
        probe(tmp_path)
