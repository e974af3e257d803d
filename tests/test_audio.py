"""Sound: rates that agree, and any samples as mono float32 at 16 kHz."""

import numpy as np
import pytest
import torch

from hicode import audio
from hicode.audio import (
    DcBlocker,
    Resampler,
    SpeechInput,
    as_samples,
    checked_sound,
    frame_rms,
    full_scale,
    resample,
    to_float,
    to_mono,
)
from hicode.errors import InputError


def tone(rate_hz: int, seconds: float = 0.5, hz: float = 300.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(rate_hz * seconds)) / rate_hz)).astype(np.float32)


def test_the_rates_agree():
    assert audio.SAMPLES_PER_FRAME * audio.FPS == audio.SAMPLE_RATE_HZ == 16_000
    assert audio.SAMPLES_PER_FEATURE * audio.FEATURES_PER_FRAME == audio.SAMPLES_PER_FRAME == 640


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.int32])
def test_integers_are_scaled_by_their_type(kind):
    info = np.iinfo(kind)
    middle = 128 if kind is np.uint8 else 0
    out = to_float(np.array([info.min, middle, info.max], kind))
    assert out.dtype == np.float32 and out[0] == -1 and out[1] == 0 and 0.99 <= out[2] <= 1


def test_floats_keep_their_values_and_other_types_are_refused():
    assert to_float(np.array([0.25, -2.0])).tolist() == [0.25, -2.0]
    for samples in (np.array([1, 2]), np.array([True]), np.array([1j])):
        with pytest.raises(InputError, match="float32, or int16"):
            to_float(samples)


def test_channels_are_averaged_and_a_transposed_sound_is_refused():
    stereo = np.array([[2, 4], [-32768, 0]], np.int16)
    assert to_mono(stereo).tolist() == [3 / 32768, -0.5]
    for shape in ((2, 16000), (10, 0), (1, 1, 1)):
        with pytest.raises(InputError, match="Transpose"):
            to_mono(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "samples, words",
    [
        (np.array([0.0, np.nan]), "1 samples that are not numbers .first at 1"),
        (np.array([np.inf]), "not numbers"),
        (np.array([3e12]), "full scale"),
        (np.zeros((4, 2)), "one channel"),
    ],
)
def test_unusable_sound_is_refused_in_one_line(samples, words):
    with pytest.raises(InputError, match=words) as refused:
        checked_sound(samples)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 24_000, 44_100, 48_000])
def test_resampling_keeps_a_tone_and_pieces_give_the_same_samples(rate_hz):
    whole = resample(tone(rate_hz), rate_hz)
    assert len(whole) == 8_000
    # Ends aside, where the filter sees silence.
    assert np.abs(whole[500:-500] - tone(16_000)[500:-500]).max() < 2e-3
    stream, sound, parts = Resampler(rate_hz), tone(rate_hz), []
    for start in range(0, len(sound), 377):
        parts.append(stream.push(sound[start : start + 377]))
    np.testing.assert_array_equal(np.concatenate([*parts, stream.finish()]), whole)


def test_equal_rates_pass_samples_at_once():
    stream = Resampler(16_000)
    np.testing.assert_array_equal(stream.push(tone(16_000)), tone(16_000))
    assert len(stream.finish()) == 0


@pytest.mark.parametrize("rate_hz", [0, -1, 1_000, 10**7])
def test_impossible_rates_are_refused(rate_hz):
    with pytest.raises(InputError, match="samples a second"):
        SpeechInput().push(tone(16_000), rate_hz)


def test_input_takes_any_type_rate_and_piece_size():
    sound, stream, parts = (tone(24_000) * 32768).astype(np.int16), SpeechInput(), []
    for start in range(0, len(sound), 1000):
        parts.append(stream.push(sound[start : start + 1000], 24_000))
    got = np.concatenate([*parts, stream.finish()])
    np.testing.assert_array_equal(got, resample(to_float(sound), 24_000))


def test_the_rate_may_change_between_pieces_and_sound_may_follow_the_end():
    stream = SpeechInput()
    got = [stream.push(tone(48_000), 48_000), stream.push(tone(8_000), 8_000), stream.finish()]
    assert sum(map(len, got)) == 16_000
    assert len(stream.finish()) == 0
    assert len(stream.push(tone(16_000), 16_000)) == 8_000


def test_refused_sound_leaves_the_stream_as_it_was():
    stream, sound = SpeechInput(), tone(24_000)
    parts = [stream.push(sound[:5000], 24_000)]
    for bad, rate_hz in ((np.full(5, np.nan), 24_000), (sound, 5)):
        with pytest.raises(InputError):
            stream.push(bad, rate_hz)
    parts += [stream.push(sound[5000:], 24_000), stream.finish()]
    np.testing.assert_array_equal(np.concatenate(parts), resample(sound, 24_000))


def test_a_constant_offset_is_removed_in_pieces_as_at_once():
    sound = tone(16_000) + 0.4
    blocker = DcBlocker()
    pieces = [blocker(sound[i : i + 70]) for i in range(0, len(sound), 70)]
    np.testing.assert_array_equal(np.concatenate(pieces), DcBlocker()(sound))
    assert abs(DcBlocker()(np.full(1000, 0.4, np.float32))).max() < 1e-6
    kept = DcBlocker()(tone(16_000, 1.0, 100.0))[4000:]
    assert np.sqrt((kept**2).mean()) == pytest.approx(0.3 / np.sqrt(2), rel=0.002)  # (1 + (5/100)²)^-½


def test_frame_rms_pads_the_last_frame():
    assert frame_rms(np.ones(960)).tolist() == pytest.approx([1.0, 0.5**0.5])
    assert len(frame_rms(np.zeros(0))) == 0


TONE = tone(16_000)


@pytest.mark.parametrize(
    "sound, rate_hz",
    [
        (TONE, 16_000),
        (TONE.tolist(), 16_000),
        (torch.from_numpy(TONE), 16_000),
        (torch.from_numpy(TONE)[None].requires_grad_(), 16_000),
        (TONE.astype(np.float64)[:, None], 16_000),
        ((24_000, TONE), 24_000),
        ((TONE, np.int64(44_100)), 44_100),
        ((TONE * 32768).astype(np.int16), 16_000),
        (TONE * 32768, 16_000),
        ((TONE * 32768).astype(np.int16).tolist(), 16_000),
    ],
)
def test_python_sounds_are_taken_with_their_scale_and_rate(sound, rate_hz):
    got = as_samples(sound)
    assert got.rate_hz == rate_hz and got.samples.dtype == np.float32
    np.testing.assert_allclose(got.samples, TONE, atol=1e-4)


@pytest.mark.parametrize(
    "sound", [None, {}, "text", b"bytes", ["a"], [[1, 2], [3]], (16_000.5, TONE), (TONE, TONE), object(), (True, TONE)]
)
def test_what_is_no_sound_is_refused_with_a_remedy(sound):
    with pytest.raises(InputError, match="Give") as refused:
        as_samples(sound)
    assert "\n" not in str(refused.value)


def test_too_loud_floats_are_scaled_down():
    assert np.abs(as_samples(TONE * 20).samples).max() == pytest.approx(1.0)
    assert [full_scale(peak) for peak in (0.5, 1.0, 4.0, 300.0, 32_768.0, 40_000.0, 1e9)] == [
        1, 1, 4, 32_768, 32_768, 1 << 23, 1 << 31,
    ]  # fmt: skip
