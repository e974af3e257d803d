"""Sound in and out: any file that FFmpeg reads, as mono float samples at one rate, aligned to the video it belongs to.

Samples are float32 "n" in [-1, 1]. Time stamps place the sound on the file's continuous clock: a track that starts late
is padded with silence, one that starts early is cut, gaps inside it become silence.

Of several tracks the one that a player would take is read, but none that is silent while another is not. Channels are
mixed for speech (`mix_weights`): dead ones are left out, so they do not halve the level, and one that is wired the
wrong way round is turned, so it does not cancel the others.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import av.container
import av.error
import av.stream
import numpy as np
from jaxtyping import Float, Float32

from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FEATURE, Resampler, full_scale
from hicode.errors import InputError
from hicode.files import atomic_path
from hicode.media.source import joined_parts, open_media
from hicode.media.timeline import Timeline, cut_off, packets

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
# A WAV's length from here on means that its writer did not know it.
_STREAMED_BYTES = 0x7FFF0000
# Kinds of file whose header states the bytes of sound, and what may follow them: names, pictures, marks.
_WITH_LENGTH, _OTHER_CHUNKS_BYTES = ("wav", "w64", "aiff", "caf"), 16_384
# Tracks for other purposes than to be heard first.
_SECONDARY = (
    av.stream.Disposition.comment
    | av.stream.Disposition.hearing_impaired
    | av.stream.Disposition.visual_impaired
    | av.stream.Disposition.karaoke
)


def read_audio(path: Path | str, rate_hz: int = SAMPLE_RATE_HZ) -> Float32[np.ndarray, "n"] | None:
    """The sound of a video or sound file, mono at `rate_hz`; None where the file has none that can be decoded.

    Sample 0 sounds when the video's first frame shows. Raises InputError where the file cannot be read, or a sample is
    not a finite number.
    """
    pieces = stream_audio(path, rate_hz)
    if pieces is None:
        return None
    return np.concatenate([np.zeros(0, np.float32), *pieces])


def stream_audio(
    path: Path | str, rate_hz: int = SAMPLE_RATE_HZ, whole: bool = False
) -> Iterator[Float32[np.ndarray, "n"]] | None:
    """What `read_audio` gives, in pieces: sound of any length in constant memory.

    whole: begin with the sound, also where it begins before the pictures.
    """
    path = Path(path)
    with open_media(path) as container:
        track = choose_sound(container, path)
    return None if track is None else _resampled(path, rate_hz, track, whole)


def _resampled(path: Path, rate_hz: int, track: int, whole: bool) -> Iterator[np.ndarray]:
    for part in joined_parts(path):
        with open_media(path, part) as container:
            mixing = _mixing(path, track, part)
            start_s = _first_frame_s(path) if container.streams.video else None
            resampler = None
            for samples, source_rate_hz in _mono(container, path, _Start(start_s, whole), mixing, track):
                if resampler is None:
                    resampler = Resampler(source_rate_hz, rate_hz)
                yield resampler.push(samples)
            if resampler is not None:
                yield resampler.finish()


def choose_sound(container: av.container.InputContainer, path: Path) -> int | None:
    """Index in the file of the sound track to read: the default one, but none that is silent while another is not.

    None where no track can be decoded.
    """
    default = av.stream.Disposition.default
    tracks = [s for s in container.streams.audio if s.codec_context is not None]
    tracks.sort(key=lambda s: (bool(s.disposition & _SECONDARY), not s.disposition & default))
    order = [s.index for s in tracks]
    if len(order) < 2:
        return order[0] if order else None
    return next((index for index in order if _has_sound(path, index)), order[0])


def _has_sound(path: Path, track: int) -> bool:
    return any(level_db(piece) > _SILENCE_DB for frame in _frames(path, track) for piece in _channels(frame))


def _frames(path: Path, track: int, part: tuple[int, int] | None = None) -> Iterator[av.AudioFrame]:
    """What decodes of a track; damage is said, where it matters, by the pass that reads the sound."""
    with open_media(path, part) as container:
        for packet in container.demux(container.streams[track]):
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                continue
            yield from (frame for frame in frames if isinstance(frame, av.AudioFrame))


def sound_notes(path: Path | str) -> list[str]:
    """What is unusual about a file's sound: sentences for the user."""
    path, notes = Path(path), []
    with open_media(path) as container:
        tracks = container.streams.audio
        track = choose_sound(container, path)
        unknown = [i for i, s in enumerate(tracks, 1) if s.codec_context is None]
        number = 1 + next((i for i, s in enumerate(tracks) if s.index == track), 0)
    for i in unknown:
        notes.append(f"Sound track {i} is of a kind that has no decoder here: it is left out.")
    if track is None:
        return notes
    if len(tracks) > 1:
        notes.append(f"{len(tracks)} sound tracks: number {number} is used.")
    parts = joined_parts(path)
    if len(parts) > 1:
        notes.append(f"{len(parts)} files are joined in this one.")
    else:
        notes += _length_notes(path)
    mixing = _mixing(path, track, parts[0])
    if mixing.full_scale != 1:
        notes.append(f"Samples go up to {mixing.peak:.3g}, where 1 is full scale: divided by {mixing.full_scale:.4g}.")
    return notes


def _length_notes(path: Path) -> list[str]:
    """What a file lacks at its end, or has after it, by its header. Nothing is decoded."""
    with open_media(path) as container:
        clock, read_bytes, kind = Timeline(), 0, container.format.name
        for packet in packets(container, clock):
            read_bytes = max(read_bytes, (packet.pos or 0) + packet.size)
        missing = cut_off(container, clock.reached_s)
    size = path.stat().st_size
    if kind == "wav":
        with path.open("rb") as f:
            head, riff_bytes = struct.unpack("<4sI", f.read(8))
        if head == b"RIFF" and size < riff_bytes < _STREAMED_BYTES and size < 0.99 * riff_bytes:
            missing = clock.reached_s, clock.reached_s * riff_bytes / size
    if missing:
        return [f"It is cut off: {missing[0]:.1f} of its {missing[1]:.1f} s of sound are there."]
    rest = size - read_bytes
    if kind in _WITH_LENGTH and rest > max(_OTHER_CHUNKS_BYTES, 0.05 * size):
        return [f"{rest / 1e3:.0f} kB follow after the end that its header states: they are not read."]
    return []


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
    """The whole sound of a file that is to drive an avatar.

    Raises InputError where there is none, nothing in it, or only silence.
    """
    pieces = stream_speech(path, rate_hz)
    samples = np.concatenate([np.zeros(0, np.float32), *pieces])
    if len(samples) < rate_hz // 25:
        raise InputError(
            f"{path} holds {len(samples) / rate_hz:.3f} s of sound, less than one frame. Give some speech."
        )
    loudest_db = level_db(samples)
    if loudest_db < _SILENCE_DB:
        raise InputError(f"{path} is silent (loudest 20 ms at {loudest_db:.0f} dB). Give a file with speech.")
    return samples


def stream_speech(path: Path | str, rate_hz: int = SAMPLE_RATE_HZ) -> Iterator[Float32[np.ndarray, "n"]]:
    """`read_speech` in pieces, its level not checked."""
    pieces = stream_audio(path, rate_hz, whole=True)
    if pieces is not None:
        return pieces
    with open_media(path) as container:
        present = bool(container.streams.audio)
    if present:
        raise InputError(f"The sound of {path} is of a kind that has no decoder here. Export it as WAV or MP3.")
    raise InputError(f"{path} has no sound track. Give a file with speech.")


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


@dataclass(frozen=True, eq=False)
class _Mixing:
    """How a track's channels become one.

    weights     of the channels, None for one channel
    peak        the largest absolute sample of a float track, else 1
    full_scale  what samples are divided by
    """

    weights: np.ndarray | None = None
    peak: float = 1.0
    full_scale: float = 1.0


def _mixing(path: Path, track: int, part: tuple[int, int] | None = None) -> _Mixing:
    """Decode the whole track where it has several channels, or float samples, which have no fixed full scale."""
    with open_media(path, part) as container:
        context = next(s for s in container.streams.audio if s.index == track).codec_context
        is_float = context.name.startswith("pcm_f")
        if context.channels == 1 and not is_float:
            return _Mixing()
    moments, layout, peak = None, None, 0.0
    for frame in _frames(path, track, part):
        data = _channels(frame).astype(np.float64)
        if not np.isfinite(data).all():
            continue  # refused by the pass that reads the sound
        if is_float:
            peak = max(peak, float(np.abs(data).max(initial=0)))
        if moments is None:
            moments, layout = np.zeros((len(data), len(data))), _layout_weights(frame)
        if len(data) == len(moments):
            data = data - data.mean(1, keepdims=True)
            moments += data @ data.T
    weights = None if moments is None or len(moments) == 1 else mix_weights(moments, layout)
    return _Mixing(weights, peak, full_scale(peak)) if is_float else _Mixing(weights)


@dataclass(frozen=True)
class _Start:
    """When sample 0 sounds: with the first picture, or `whole`: with whatever begins first."""

    picture_s: float | None
    whole: bool

    def second(self, sound_s: float) -> float:
        if self.picture_s is None:
            return sound_s
        return min(self.picture_s, sound_s) if self.whole else self.picture_s


def _mono(container, path: Path, start: _Start, mixing: _Mixing, track: int) -> Iterator[tuple[np.ndarray, int]]:
    """(samples, source rate), continuous from `start`."""
    cursor, rate_hz, start_s, tolerance = 0, None, 0.0, 0
    for packet in packets(container):
        if packet.stream.index != track:
            continue
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue  # the time stamps of what follows turn it into silence of the right length
        except av.error.FFmpegError as error:
            raise InputError(
                f"The sound of {path} cannot be decoded ({error.strerror}). Export it again as WAV or MP3."
            ) from error
        for frame in frames:
            if rate_hz is None:
                rate_hz, start_s = frame.sample_rate, start.second(frame.time or 0.0)
            elif frame.sample_rate != rate_hz:
                raise InputError(
                    f"The sound of {path} changes from {rate_hz} to {frame.sample_rate} Hz midway. Export it again "
                    "at one rate."
                )
            samples = _to_mono(frame, mixing)
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


def _to_mono(frame: av.AudioFrame, mixing: _Mixing) -> Float32[np.ndarray, "n"]:
    data, weights = _channels(frame), mixing.weights
    if mixing.full_scale != 1:
        data = data / np.float32(mixing.full_scale)
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
