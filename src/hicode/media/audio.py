"""Sound in and out: any file that FFmpeg reads, as mono float samples at one rate, aligned to the video it belongs to.

Samples are float32 "n" in [-1, 1]; sample 0 sounds when the video's first frame shows. Time stamps place the sound: a
track that starts late is padded with silence, one that starts early is cut, gaps inside it become silence.

Channels are mixed for speech (`mix_weights`): dead ones are left out, so they do not halve the level, and one that is
wired the wrong way round is turned, so it does not cancel the others.
"""

from collections.abc import Iterator
from pathlib import Path

import av
import av.error
import av.stream
import numpy as np
from jaxtyping import Float, Float32

from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FEATURE, Resampler
from hicode.errors import InputError
from hicode.files import atomic_path
from hicode.media.video import open_media

# Stamps of a continuous track jitter by rounding (a millisecond in Matroska); what is off by more is a real gap or
# overlap.
_GAP_S = 0.03
_LONGEST_GAP_S = 3600.0
_SILENCE_DB = -60.0

_FULL_SCALE = {"u8": 128.0, "s16": 32768.0, "s32": 2147483648.0, "s64": 9223372036854775808.0, "flt": 1.0, "dbl": 1.0}
# What speech loses least by: the centre channel carries it, the sides carry rooms and music, the subwoofer nothing.
_CHANNEL_WEIGHTS = {"FC": 1.0, "FL": 0.7, "FR": 0.7, "LFE": 0.0, "LFE2": 0.0}
_OTHER_CHANNEL_WEIGHT = 0.35
# Weaker than the strongest channel by so much is dead: its hiss is no sound, and a share of the mix for it only makes
# the others quieter.
_DEAD_DB = -40.0
# Correlated with the strongest channel like this or more negatively: the same sound, wired the wrong way round.
# Speech in a room, recorded by microphones apart, correlates positively or hardly at all.
_INVERTED = -0.7


def read_audio(path: Path | str, rate_hz: int = SAMPLE_RATE_HZ) -> Float32[np.ndarray, "n"] | None:
    """The first sound track of a video or sound file, mono at `rate_hz`; None where the file has none.

    InputError where the file cannot be read, or a sample is not a finite number.
    """
    pieces = stream_audio(path, rate_hz)
    if pieces is None:
        return None
    return np.concatenate([np.zeros(0, np.float32), *pieces])


def stream_audio(path: Path | str, rate_hz: int = SAMPLE_RATE_HZ) -> Iterator[Float32[np.ndarray, "n"]] | None:
    """What `read_audio` gives, in pieces: sound of any length in constant memory."""
    path = Path(path)
    with open_media(path) as container:
        if not container.streams.audio:
            return None
    return _resampled(path, rate_hz)


def _resampled(path: Path, rate_hz: int) -> Iterator[np.ndarray]:
    with open_media(path) as container:
        start_s = _first_frame_s(path) if container.streams.video else None
        resampler = None
        for samples, source_rate_hz in _mono(container, path, start_s, _channel_weights(path)):
            if resampler is None:
                resampler = Resampler(source_rate_hz, rate_hz)
            yield resampler.push(samples)
        if resampler is not None:
            yield resampler.finish()


def mix_weights(
    covariance: Float[np.ndarray, "c c"], layout: Float[np.ndarray, "c"] | None = None
) -> Float32[np.ndarray, "c"]:
    """The share of each channel in a mix that speech survives, from the channels' second moments; magnitudes sum to 1.

    layout: the share by what a channel is (centre, side ...), equal where not given. Channels more than 40 dB weaker
    than the strongest get none, those that are the strongest turned round a negative one.
    """
    power = np.diag(covariance).clip(0)
    weights = np.ones(len(power)) if layout is None else np.asarray(layout, np.float64)
    if not (weights * power).any():
        weights = np.ones(len(power))  # sound in the subwoofer alone, or none at all
    heard = weights**2 * power
    strongest = int(heard.argmax())
    alive = power > power[strongest] * 10 ** (_DEAD_DB / 10)
    if alive.any():
        weights = weights * alive
        correlation = covariance[strongest] / np.sqrt(np.maximum(power * power[strongest], 1e-30))
        weights = np.where(correlation < _INVERTED, -weights, weights)
    return (weights / np.abs(weights).sum()).astype(np.float32)


def read_speech(path: Path | str, rate_hz: int = SAMPLE_RATE_HZ) -> Float32[np.ndarray, "n"]:
    """`read_audio` for sound that is to drive an avatar: InputError where there is none, nothing in it, or only
    silence.
    """
    samples = read_audio(path, rate_hz)
    if samples is None:
        raise InputError(f"{path} has no sound track. Give a file with speech.")
    if len(samples) < rate_hz // 25:
        raise InputError(
            f"{path} holds {len(samples) / rate_hz:.3f} s of sound, less than one frame. Give a file with speech."
        )
    loudest_db = level_db(samples)
    if loudest_db < _SILENCE_DB:
        raise InputError(f"{path} is silent (loudest 20 ms at {loudest_db:.0f} dB). Give a file with speech.")
    return samples


def level_db(samples: Float32[np.ndarray, "n"], window: int = SAMPLES_PER_FEATURE) -> float:
    """Level of the loudest window in dB below full scale, each about its own mean, since an offset is no sound; -120
    for digital silence.
    """
    if len(samples) == 0:
        return -120.0
    padded = np.pad(samples, (0, -len(samples) % window), mode="edge").reshape(-1, window)
    return float(10 * np.log10(max(padded.astype(np.float64).var(1).max(), 1e-12)))


def write_audio(path: Path | str, samples: Float32[np.ndarray, "n"], rate_hz: int) -> None:
    """A 16-bit mono WAV file, whole or not at all."""
    import soundfile

    with atomic_path(path) as temporary:
        soundfile.write(str(temporary), np.clip(samples, -1, 1), rate_hz, subtype="PCM_16", format="WAV")


def _first_frame_s(path: Path) -> float | None:
    """Presentation time of the first picture; None where the pictures are only cover art, or do not decode."""
    with open_media(path) as container:
        for stream in container.streams.video:
            if stream.disposition & av.stream.Disposition.attached_pic:
                continue
            try:
                return next((f.time for f in container.decode(stream)), None)
            except av.error.FFmpegError:
                return None
    return None


def _channel_weights(path: Path) -> np.ndarray | None:
    """`mix_weights` of the whole first track, heard once through; None where it has one channel."""
    with open_media(path) as container:
        stream = container.streams.audio[0]
        if stream.codec_context.channels == 1:
            return None
        moments, layout = None, None
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                continue  # said, where it matters, by the pass that reads the sound
            for frame in frames:
                data = _channels(frame).astype(np.float64)
                if not np.isfinite(data).all():
                    continue
                if moments is None:
                    moments, layout = np.zeros((len(data), len(data))), _layout_weights(frame)
                if len(data) == len(moments):
                    data = data - data.mean(1, keepdims=True)
                    moments += data @ data.T
    return None if moments is None else mix_weights(moments, layout)


def _mono(container, path: Path, start_s: float | None, weights: np.ndarray | None) -> Iterator[tuple[np.ndarray, int]]:
    """(samples, source rate), continuous from `start_s` (without one, from the track's own start)."""
    stream = container.streams.audio[0]
    cursor = 0
    rate_hz = None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue  # the time stamps of what follows turn it into silence of the right length
        except av.error.FFmpegError as error:
            raise InputError(
                f"The sound of {path} cannot be decoded ({error.strerror}). Export it again as WAV or MP4."
            ) from error
        for frame in frames:
            if rate_hz is None:
                rate_hz = frame.sample_rate
                if start_s is None:
                    start_s = frame.time or 0.0
                tolerance = 0
            elif frame.sample_rate != rate_hz:
                raise InputError(
                    f"The sound of {path} changes from {rate_hz} to {frame.sample_rate} Hz midway. Export it again "
                    "at one rate."
                )
            samples = _to_mono(frame, weights)
            if not np.isfinite(samples).all():
                at = cursor / rate_hz
                raise InputError(
                    f"The sound of {path} has samples that are not numbers (NaN or infinite) at {at:.2f} s. Export "
                    "it again."
                )
            gap = 0 if frame.time is None else round((frame.time - start_s) * rate_hz) - cursor
            if abs(gap) <= tolerance:
                gap = 0
            if gap > _LONGEST_GAP_S * rate_hz:
                raise InputError(
                    f"The sound of {path} jumps by {gap / rate_hz:.0f} s: its time stamps are broken. Export it again."
                )
            tolerance = round(_GAP_S * rate_hz)
            if gap > 0:
                yield np.zeros(gap, np.float32), rate_hz
            elif gap < 0:
                samples = samples[-gap:]
            cursor += max(gap, 0) + len(samples)
            if len(samples):
                yield samples, rate_hz


def _to_mono(frame: av.AudioFrame, weights: np.ndarray | None) -> Float32[np.ndarray, "n"]:
    data = _channels(frame)
    if len(data) == 1:
        return np.ascontiguousarray(data[0])
    if weights is None or len(weights) != len(data):  # a track that changes its channels midway
        layout = _layout_weights(frame)
        weights = mix_weights(np.eye(len(data)), layout)
    return weights @ data


def _channels(frame: av.AudioFrame) -> Float32[np.ndarray, "c n"]:
    kind = frame.format.name.removesuffix("p")
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    if kind == "u8":
        data = data.astype(np.float32) - 128
    return data.astype(np.float32) / np.float32(_FULL_SCALE[kind])


def _layout_weights(frame: av.AudioFrame) -> np.ndarray:
    return np.array([_CHANNEL_WEIGHTS.get(c.name, _OTHER_CHANNEL_WEIGHT) for c in frame.layout.channels], np.float32)
