"""`hicode.open`: any kind of sound to frames, and interruption by closing the iterator."""

from itertools import islice

import numpy as np
import pytest
import soundfile

import hicode
from helpers.fake_avatar import FakeAvatar, speechlike
from hicode.errors import InputError
from hicode.session.config import SpeakConfig
from hicode.trust.marks import MarkConfig

UNMARKED = SpeakConfig(mark=MarkConfig(mark="none", reason="a test"))


@pytest.mark.parametrize("kind", ["file", "samples", "bytes", "chunks", "chunks of bytes"])
def test_any_kind_of_sound_gives_the_same_frames(kind, tmp_path):
    pcm = np.round(20000 * speechlike(1.0)).astype(np.int16)
    soundfile.write(tmp_path / "hello.wav", pcm, 16_000)
    pieces = [pcm[begin : begin + 700] for begin in range(0, len(pcm), 700)]
    sounds = {"file": tmp_path / "hello.wav", "samples": pcm, "bytes": pcm.tobytes(), "chunks": iter(pieces)}
    sounds["chunks of bytes"] = (piece.tobytes() for piece in pieces)
    with hicode.open(FakeAvatar(), UNMARKED) as avatar:
        frames = list(avatar.render(sounds[kind]))
    with hicode.open(FakeAvatar(), UNMARKED) as avatar:
        expected = list(avatar.render(pcm))
    assert len(frames) == 25
    assert np.array_equal(np.concatenate([f.audio for f in frames]), pcm)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(frames, expected, strict=True))


def test_frames_come_while_chunks_are_still_coming():
    given = []

    def chunks():
        for piece in np.array_split(speechlike(4.0), 40):
            given.append(len(piece))
            yield piece

    with hicode.open(FakeAvatar(), UNMARKED) as avatar:
        next(avatar.render(chunks()))
    assert len(given) < 15


def test_closing_the_iterator_interrupts_and_the_head_moves_on():
    with hicode.open(FakeAvatar(), UNMARKED) as avatar:
        rendering = avatar.render(speechlike(4.0))
        first = list(islice(rendering, 5))
        rendering.close()
        assert avatar.session.waiting_s == 0
        second = list(avatar.render(speechlike(0.4, seed=1)))
    assert len(second) == 10 and second[0].driving_frame == first[-1].driving_frame + 1


def test_another_sound_interrupts_the_one_before():
    with hicode.open(FakeAvatar(), UNMARKED) as avatar:
        first = avatar.render(speechlike(4.0))
        next(first)
        assert len(list(avatar.render(speechlike(0.4)))) == 10
        assert list(first) == []


def test_frames_are_marked_unless_a_reason_is_given():
    with hicode.open(FakeAvatar()) as avatar, hicode.open(FakeAvatar(), UNMARKED) as plain:
        marked, unmarked = (next(a.render(speechlike(0.5))).image for a in (avatar, plain))
    assert not np.array_equal(marked, unmarked)


def test_sound_that_cannot_be_used_is_one_line(tmp_path):
    with hicode.open(FakeAvatar(), UNMARKED) as avatar:
        with pytest.raises(InputError, match="sound file, not samples"):
            next(avatar.render(b"RIFF0000WAVE"))
        with pytest.raises(InputError, match="16-bit"):
            next(avatar.render(b"abc"))
        with pytest.raises(InputError, match="samples a second"):
            next(avatar.render(np.zeros(100, np.float32), 7))
        assert len(list(avatar.render(speechlike(0.4)))) == 10
