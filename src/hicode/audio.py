"""Sound: the rates that everything agrees on, and any samples as mono float32 at 16 kHz.

n samples, c channels. Full scale is 1.
Video frame i at 25 fps owns samples 640 i … 640 (i + 1) and speech features 2i and 2i + 1.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Shaped

from hicode.errors import InputError

SAMPLE_RATE_HZ = 16_000
FPS = 25.0
FEATURE_RATE_HZ = 50
SAMPLES_PER_FRAME = round(SAMPLE_RATE_HZ / FPS)
SAMPLES_PER_FEATURE = SAMPLE_RATE_HZ // FEATURE_RATE_HZ
FEATURES_PER_FRAME = SAMPLES_PER_FRAME // SAMPLES_PER_FEATURE
VIDEO_SAMPLE_RATE_HZ = 48_000
"""of the sound in a video that is written from a file"""

MAX_CHANNELS = 32
LOUDEST_FLOAT = 256.0
"""Float samples up to here are loud sound (48 dB above full scale); beyond, they are integers of some width."""
SAMPLE_RATES_HZ = (4_000, 384_000)


def to_float(samples: Shaped[np.ndarray, "*n"]) -> Float32[np.ndarray, "*n"]:
    """Samples of any audio type as float32. Integers are scaled by their type's full scale; uint8 is centred on 128.

    Raises InputError for other types: 64-bit integers have no agreed full scale.
    """
    samples = np.asarray(samples)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype in (np.int8, np.int16, np.int32):
        return samples.astype(np.float32) / np.float32(-float(np.iinfo(samples.dtype).min))
    if np.issubdtype(samples.dtype, np.floating) or samples.size == 0:
        return samples.astype(np.float32, copy=False)
    raise InputError(f"The sound has samples of type {samples.dtype}. Give float32, or int16 at its full scale.")


def full_scale(peak: float) -> float:
    """What float samples with this largest absolute value are to be divided by, so that full scale is 1.

    Up to 1 they are as they should be. Up to 256 they are too loud, and are scaled to 1. Beyond, they are integers
    that were converted without scaling: of 16, 24 or 32 bits. Raises InputError for values beyond any full scale.
    """
    if peak <= 1:
        return 1.0
    if peak <= LOUDEST_FLOAT:
        return peak
    scale = next((float(1 << bits) for bits in (15, 23, 31) if peak <= 1 << bits), None)
    if scale is None:
        raise InputError(f"The sound has samples of {peak:.0e}, where 1 is full scale. Repair the file.")
    return scale


@dataclass(frozen=True, eq=False)
class Samples:
    """A whole sound: mono float32 within full scale, at its own rate."""

    samples: Float32[np.ndarray, "n"]
    rate_hz: int


def as_samples(sound: object) -> Samples:
    """A whole sound that Python code gives: an array, a tensor, a list of numbers, or one of them with its rate.

    (rate, samples) and (samples, rate) are both taken; without a rate it is 16 kHz. Channels may be either axis.
    Floats beyond full scale are scaled (`full_scale`). Raises InputError, with the remedy, for anything else.
    """
    rate_hz, values = SAMPLE_RATE_HZ, sound
    if isinstance(sound, tuple) and len(sound) == 2:
        first_is_rate = isinstance(sound[0], (int, np.integer)) and not isinstance(sound[0], bool)
        rate_hz, values = sound if first_is_rate else sound[::-1]
        if not isinstance(rate_hz, (int, np.integer)):
            raise InputError(
                f"A {type(rate_hz).__name__} is no sample rate. Give (rate in Hz, samples), the rate an int."
            )
    array = _as_array(values)
    if array.ndim == 2 and array.shape[0] <= MAX_CHANNELS < array.shape[1]:
        array = array.T  # channels first, as torchaudio has them
    samples = to_mono(array)
    peak = float(np.abs(samples[np.isfinite(samples)]).max(initial=0))
    if np.issubdtype(array.dtype, np.floating):
        samples = samples / np.float32(full_scale(peak))
    Resampler(int(rate_hz))  # refuses rates that cannot be
    return Samples(checked_sound(samples), int(rate_hz))


def _as_array(values: object) -> np.ndarray:
    if isinstance(values, (str, bytes, dict, set)) or values is None:
        array = np.zeros(1, object)
    elif type(values).__module__.split(".")[0] == "torch":
        array = _from_tensor(values)
    else:
        try:
            array = np.asarray(values)
        except (TypeError, ValueError, RuntimeError):  # rows of different lengths, or no array at all
            array = np.zeros(1, object)
    if isinstance(values, (list, tuple)) and np.issubdtype(array.dtype, np.integer):
        array = array.astype(np.float64)  # Python's integers have no type to scale by: `full_scale` decides
    if array.dtype == object or not np.issubdtype(array.dtype, np.number):
        raise InputError(f"A {type(values).__name__} is no sound. Give a path, an array, or (rate, samples).")
    return array


def _from_tensor(values: object) -> np.ndarray:
    import torch

    tensor = torch.as_tensor(values).detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def to_mono(samples: Shaped[np.ndarray, "n *c"]) -> Float32[np.ndarray, "n"]:
    """Float samples, channels averaged. Channels are the second axis. Raises InputError for other shapes."""
    samples = np.asarray(samples)
    if samples.ndim == 1:
        return to_float(samples)
    if samples.ndim != 2 or not 0 < samples.shape[1] <= MAX_CHANNELS:
        raise InputError(f"The sound has shape {samples.shape}, not (samples,) or (samples, channels). Transpose it.")
    return to_float(samples).mean(1)


def checked_sound(samples: Shaped[np.ndarray, "*n"]) -> Float32[np.ndarray, "n"]:
    """Mono float32. Raises InputError for several channels, NaN, infinity, or values beyond any full scale."""
    samples = to_float(samples)
    if samples.ndim != 1:
        raise InputError(f"The sound has shape {samples.shape}, expected one channel. Mix it down to mono.")
    finite = np.isfinite(samples)
    if not finite.all():
        raise InputError(
            f"The sound has {int((~finite).sum())} samples that are not numbers (first at {np.argmin(finite)}). "
            "Repair the file."
        )
    if len(samples) and np.abs(samples).max() > LOUDEST_FLOAT:
        raise InputError(
            f"The sound has samples of {np.abs(samples).max():.0e}, where 1 is full scale. Divide integers that became "
            "floats by their full scale (16 bits: 32768), or give them as int16."
        )
    return samples


def resample(
    samples: Float[np.ndarray, "n"], rate_hz: int, target_hz: int = SAMPLE_RATE_HZ
) -> Float32[np.ndarray, "m"]:
    """All samples at another rate. The same samples as `Resampler` gives in pieces."""
    resampler = Resampler(rate_hz, target_hz)
    return np.concatenate([resampler.push(samples), resampler.finish()])


class Resampler:
    """Changes the rate of sound that comes in pieces of any size (soxr, high quality).

    Output lags input by at most 41 ms from 22 kHz up, by 120 ms at 8 kHz. At equal rates, samples pass unchanged.
    """

    def __init__(self, rate_hz: int, target_hz: int = SAMPLE_RATE_HZ):
        import soxr

        low, high = SAMPLE_RATES_HZ
        if not low <= rate_hz <= high:
            raise InputError(f"The sound has {rate_hz} samples a second; {low} to {high} can be used. Check the rate.")
        self.rate_hz, self.target_hz = rate_hz, target_hz
        self._stream = (
            None if rate_hz == target_hz else soxr.ResampleStream(rate_hz, target_hz, 1, dtype="float32", quality="HQ")
        )

    def push(self, samples: Float[np.ndarray, "n"]) -> Float32[np.ndarray, "m"]:
        """The samples that became complete."""
        samples = np.ascontiguousarray(samples, np.float32)
        return samples if self._stream is None else self._stream.resample_chunk(samples, last=False)

    def finish(self) -> Float32[np.ndarray, "m"]:
        """The remaining samples. After it, nothing may be pushed."""
        empty = np.zeros(0, np.float32)
        return empty if self._stream is None else self._stream.resample_chunk(empty, last=True)


class SpeechInput:
    """Sound of any type, rate, channel count and piece size, to checked mono float32 at one rate (16 kHz).

    The rate may change between pieces. After `finish`, new sound may follow.
    """

    def __init__(self, target_hz: int = SAMPLE_RATE_HZ):
        self._target_hz = target_hz
        self._resampler: Resampler | None = None

    def push(self, samples: Shaped[np.ndarray, "n *c"], sample_rate_hz: int) -> Float32[np.ndarray, "m"]:
        """The samples that became complete. Raises InputError for sound that cannot be used; then nothing was taken."""
        samples = checked_sound(to_mono(samples))
        if self._resampler is not None and self._resampler.rate_hz == sample_rate_hz:
            return self._resampler.push(samples)
        following = Resampler(sample_rate_hz, self._target_hz)
        remaining, self._resampler = self.finish(), following
        return np.concatenate([remaining, following.push(samples)])

    def finish(self) -> Float32[np.ndarray, "m"]:
        """The remaining samples of what was pushed."""
        resampler, self._resampler = self._resampler, None
        return np.zeros(0, np.float32) if resampler is None else resampler.finish()


class DcBlocker:
    """Removes a constant offset from sound that comes in pieces of any size: a first-order high-pass at 5 Hz.

    An offset would count as loudness and leak into the lowest bands. At 100 Hz the filter costs .01 dB and 3 degrees
    of phase. The past is taken to equal the first sample, so a sound with an offset does not begin with a step.
    """

    CORNER_HZ = 5.0

    def __init__(self, rate_hz: int = SAMPLE_RATE_HZ):
        self._pole = 1 - 2 * math.pi * self.CORNER_HZ / rate_hz
        self._state: np.ndarray | None = None

    def __call__(self, samples: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """The filtered piece."""
        from scipy.signal import lfilter

        if len(samples) == 0:
            return samples
        if self._state is None:
            self._state = np.array([-float(samples[0])])
        out, self._state = lfilter([1.0, -1.0], [1.0, -self._pole], np.asarray(samples, np.float64), zi=self._state)
        return out.astype(np.float32)


def frame_rms(samples: Float[np.ndarray, "n"], samples_per_frame: int = SAMPLES_PER_FRAME) -> Float[np.ndarray, "t"]:
    """RMS of each frame's sound. The last frame is padded with silence."""
    padded = np.pad(samples, (0, -len(samples) % samples_per_frame)).reshape(-1, samples_per_frame)
    return np.sqrt((padded.astype(np.float64) ** 2).mean(1))
