"""The invisible mark: a spread-spectrum watermark in the luma of every frame, and its blind detector.

The mark is a picture of `TILE_PX` squared that repeats over the frame. It is a sum of plane waves of equal strength,
all at whole frequencies (v, u) of the tile, so it has no seams:

    tile(y, x) = sum_k cos(2 pi (v_k y + u_k x) / TILE_PX + phase_k)

Some of the waves always have the same phases: they find the mark and its alignment. The other waves are in `SYMBOLS`
groups. Each group carries 12 bits: its phases are one of 4,096 random codewords. The 48 bits are version, avatar id
and a check (CRC-12).

Local contrast masks the mark: its gain rises with the standard deviation of the 8 px block. The mark is constant over
time. A video encoder then codes it once where the picture stands still, and the detector adds frames up before it
searches.

Detection. Each frame is high-pass filtered and divided by its local variance; the mean over frames is A. For each
scale of a grid, X_k is A's Fourier sum at wave k of the scaled tile. Only its phase is used. For each shift (dy, dx):

    score = sum_k cos(arg X_k - phase_k + 2 pi (v_k dy + u_k dx) / TILE_PX) / sqrt(n / 2)

False-alarm rate. The phases of the key are independent and uniform, so for any picture without the mark E exp(t cos)
= I_0(t) <= exp(t^2/4), and by Chernoff P(score >= z) <= exp(-z^2 / 2). The stated rate is this bound times the number
of all alignments and payloads that are compared. It holds over the choice of the key. The key is fixed and public:
whoever has this code can remove the mark, or forge it.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from typing import no_type_check

import cv2
import numba
import numpy as np
import scipy.fft
from jaxtyping import Complex, Float, Int, UInt8

from hicode.errors import InputError

TILE_PX = 128
LOW, HIGH = 7.0, 19.0
"""Radii of the waves in periods a tile: 7 to 18 px long. Shorter waves do not survive H.264 with resizing; longer ones
show as blotches."""
SYMBOLS, SYMBOL_BITS = 4, 12
FALSE_ALARM_RATE = 1e-9
"""A mark is reported only below this rate, the whole search included."""
PAYLOAD_CONFIDENCE = 0.95
"""A payload is reported only from this probability on."""
GAIN_MIN, GAIN_MAX, GAIN_STD = 0.75, 2.5, 5.5
"""Standard deviation of the mark in grey levels: GAIN_MIN + std / GAIN_STD, at most GAIN_MAX (40.2 dB); std is that of
an 8 px block's luma."""
BLOCK_PX = 8
SCALE_MIN, SCALE_MAX = 0.4, 1.75
WINDOW_PX = 640
"""The search sees at most a square window of this size; the alignment is then refined on the whole frame."""
_CANDIDATES, _ALTERNATIVES = 6, 4
_KEY = b"hicode watermark 1"
_CRC12 = 0x80F


# -------------------------------------------------------------------------------------------------------------- payload


@dataclass(frozen=True)
class Payload:
    """What the mark says: which avatar, and the version of this coding (1 to 15)."""

    avatar_id: int
    version: int = 1

    def __post_init__(self):
        assert 0 <= self.avatar_id < 2**32, self.avatar_id
        assert 0 <= self.version < 16, self.version

    @staticmethod
    def of_hash(sha256_hex: str) -> "Payload":
        """The avatar's id is the first 32 bits of its hash."""
        return Payload(int(sha256_hex[:8], 16))

    def symbols(self) -> tuple[int, ...]:
        """Version (4 bits), avatar id (32), CRC-12, in symbols of 12 bits."""
        word = self.version << 32 | self.avatar_id
        word = word << 12 | _crc12(word)
        return tuple(word >> SYMBOL_BITS * i & (1 << SYMBOL_BITS) - 1 for i in reversed(range(SYMBOLS)))

    @staticmethod
    def from_symbols(symbols: Iterable[int]) -> "Payload | None":
        """None where the check does not fit."""
        word = 0
        for symbol in symbols:
            word = word << SYMBOL_BITS | symbol
        word, check = word >> 12, word & 0xFFF
        return Payload(word & 0xFFFFFFFF, word >> 32) if _crc12(word) == check else None


def _crc12(word: int) -> int:
    """CRC of 36 bits, polynomial x^12 + x^11 + x^3 + x^2 + x + 1."""
    remainder = word << 12
    for bit in reversed(range(12, 48)):
        if remainder >> bit & 1:
            remainder ^= (1 << 12 | _CRC12) << bit - 12
    return remainder


# ------------------------------------------------------------------------------------------------------------------ key


@dataclass(frozen=True, eq=False)
class _Key:
    """The waves (v, u), the phases of those that are always the same, and the codebook of those that carry symbols.

    Waves `sync` and `data[s]` are indices into v and u. All phasors are unit complex numbers.
    """

    v: Int[np.ndarray, "k"]
    u: Int[np.ndarray, "k"]
    sync: Int[np.ndarray, "n"]
    data: Int[np.ndarray, "s m"]
    sync_phasors: Complex[np.ndarray, "n"]
    codebook: Complex[np.ndarray, "s c m"]


@cache
def _key() -> _Key:
    """The same on every machine and in every version: all that is random comes from SHAKE-256."""
    v, u = np.mgrid[-TILE_PX // 2 : TILE_PX // 2, 0 : TILE_PX // 2]
    radius = np.hypot(v, u)
    use = (radius >= LOW) & (radius < HIGH) & ((u > 0) | (v > 0))  # the other half are complex conjugates
    v, u = v[use], u[use]
    order = np.argsort(np.frombuffer(_random(b"order", 8 * len(v)), "<u8"), kind="stable")
    per_symbol = round(0.58 * len(v)) // SYMBOLS
    data = order[: SYMBOLS * per_symbol].reshape(SYMBOLS, per_symbol)
    sync = order[SYMBOLS * per_symbol :]
    codebook = _phasors(b"codebook", SYMBOLS * (1 << SYMBOL_BITS) * per_symbol)
    return _Key(v, u, sync, data, _phasors(b"sync", len(sync)), codebook.reshape(SYMBOLS, -1, per_symbol))


def _random(name: bytes, count: int) -> bytes:
    return hashlib.shake_256(_KEY + b" " + name).digest(count)


def _phasors(name: bytes, count: int) -> Complex[np.ndarray, "n"]:
    turn = np.exp(2j * np.pi * np.arange(256) / 256).astype(np.complex64)
    return turn[np.frombuffer(_random(name, count), np.uint8)]


def tile(payload: Payload) -> Float[np.ndarray, "p p"]:
    """One period of the mark, of standard deviation 1."""
    key = _key()
    spectrum = np.zeros((TILE_PX, TILE_PX), np.complex128)

    def put(waves: np.ndarray, phasors: np.ndarray) -> None:
        spectrum[key.v[waves], key.u[waves]] = phasors
        spectrum[-key.v[waves], -key.u[waves]] = phasors.conj()

    put(key.sync, key.sync_phasors)
    for waves, codewords, symbol in zip(key.data, key.codebook, payload.symbols(), strict=True):
        put(waves, codewords[symbol])
    pattern = np.fft.ifft2(spectrum).real
    return (pattern / pattern.std()).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------- embed


class Watermark:
    """Marks frames of any size for one payload. May be shared between threads."""

    def __init__(self, payload: Payload):
        self.payload = payload
        self._tile = tile(payload)
        self._rows: dict[tuple[int, int], Float[np.ndarray, "p wc"]] = {}

    def embed(self, frame: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
        """A marked copy of an RGB frame, or of a luma plane "h w 1". All channels change by the same amount."""
        h, w, c = frame.shape
        if (w, c) not in self._rows:
            wide = np.tile(self._tile, (1, -(-w // TILE_PX)))[:, :w]
            self._rows[w, c] = np.ascontiguousarray(np.repeat(wide, c, axis=1))
        out = np.array(frame, order="C")
        _add(out.reshape(h, w * c), self._rows[w, c], _gains(out))
        return out

    def embed_reference(self, frame: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
        """The same in plain NumPy, to read and to test against."""
        h, w, c = frame.shape
        sampled = frame[..., c // 2].astype(np.float64)  # green stands for luma
        gains = np.empty((-(-h // BLOCK_PX), -(-w // BLOCK_PX)))
        for i in range(len(gains)):
            for j in range(gains.shape[1]):
                block = sampled[i * BLOCK_PX : (i + 1) * BLOCK_PX : 2, j * BLOCK_PX : (j + 1) * BLOCK_PX]
                gains[i, j] = min(GAIN_MIN + block.std() / GAIN_STD, GAIN_MAX)

        def interpolated(gains: np.ndarray, length: int) -> np.ndarray:
            at = np.clip((np.arange(length) + 0.5) / BLOCK_PX - 0.5, 0, len(gains) - 1)
            first = np.floor(at).astype(int)
            second = np.minimum(first + 1, len(gains) - 1)
            weight = (at - first)[:, None]
            return (1 - weight) * gains[first] + weight * gains[second]

        gain = interpolated(interpolated(gains, h).T, w).T
        mark = self._tile[np.ix_(np.arange(h) % TILE_PX, np.arange(w) % TILE_PX)]
        return np.clip(np.floor(frame + (gain * mark)[..., None] + 0.5), 0, 255).astype(np.uint8)


@numba.njit(cache=True, nogil=True, fastmath=True, boundscheck=False)
@no_type_check  # Numba must compile the function itself, not a checked wrapper
def _gains(frame):
    """Gains of all block rows, interpolated along x and repeated for each channel: "rows w*c"."""
    h, w, c = frame.shape
    rows, columns = (h + BLOCK_PX - 1) // BLOCK_PX, (w + BLOCK_PX - 1) // BLOCK_PX
    out, gains = np.empty((rows, w * c), np.float32), np.empty(columns, np.float32)
    for i in range(rows):
        for j in range(columns):
            count, total, squares = 0, 0, 0
            for y in range(i * BLOCK_PX, min((i + 1) * BLOCK_PX, h), 2):
                for x in range(j * BLOCK_PX, min((j + 1) * BLOCK_PX, w)):
                    value = np.int32(frame[y, x, c // 2])
                    count += 1
                    total += value
                    squares += value * value
            variance = max(squares * count - total * total, 0) / (count * count)
            gains[j] = min(GAIN_MIN + math.sqrt(variance) / GAIN_STD, GAIN_MAX)
        for x in range(w):
            at = min(max((x + np.float32(0.5)) / BLOCK_PX - np.float32(0.5), np.float32(0)), np.float32(columns - 1))
            j = int(at)
            gain = gains[j] + np.float32(at - j) * (gains[min(j + 1, columns - 1)] - gains[j])
            for k in range(c):
                out[i, c * x + k] = gain
    return out


@numba.njit(cache=True, nogil=True, fastmath=True, boundscheck=False)
@no_type_check
def _add(frame, mark, gains):
    """frame "h w*c" += gain * mark, in place. One plain loop over a row, so that LLVM vectorises it."""
    rows = len(gains)
    for y in range(len(frame)):
        at = min(max((y + np.float32(0.5)) / BLOCK_PX - np.float32(0.5), np.float32(0)), np.float32(rows - 1))
        i = int(at)
        weight, top, bottom = np.float32(at - i), gains[i], gains[min(i + 1, rows - 1)]
        line, pattern = frame[y], mark[y % TILE_PX]
        for x in range(frame.shape[1]):
            change = (top[x] + weight * (bottom[x] - top[x])) * pattern[x] + np.float32(0.5)
            line[x] = np.uint8(np.int32(min(max(np.float32(line[x]) + change, np.float32(0)), np.float32(255))))


# --------------------------------------------------------------------------------------------------------------- detect


@dataclass(frozen=True)
class Alignment:
    """Where the tile lies: its size in the picture is `TILE_PX` times the scales, one tile's corner is at the offset.

    `mirrored`: left and right are exchanged; the offset is then that of the mirrored picture.
    """

    scale_y: float
    scale_x: float
    offset_y_px: float = 0.0
    offset_x_px: float = 0.0
    mirrored: bool = False


@dataclass(frozen=True)
class Detection:
    """What the detector says of a picture.

    `false_alarm_rate` is the probability that a picture without the mark gives such evidence anywhere in the search.
    `present` is true where it is at most FALSE_ALARM_RATE. `payload` is None where the mark is absent or its bits are
    not certain enough; `payload_confidence` is the probability that all are right, given that the mark is there.
    `score` counts the standard deviations of the always equal waves, `coherence` is the mean cosine of all waves (1:
    undisturbed).
    """

    present: bool
    payload: Payload | None
    payload_confidence: float
    false_alarm_rate: float
    score: float
    coherence: float
    alignment: Alignment
    frames: int


class Accumulator:
    """The mean of whitened frames, all of one size. Frames may be added from several parts of a video."""

    def __init__(self):
        self.frames = 0
        self._sum: np.ndarray | None = None

    def add(self, frame: UInt8[np.ndarray, "h w *c"]) -> None:
        """One frame, RGB or luma. InputError where it is too small, or not of the size of the frames before."""
        h, w = frame.shape[:2]
        if min(h, w) < TILE_PX * SCALE_MIN * 1.5:
            raise InputError(f"A picture of {w}x{h} is too small to look for a mark. Give one of at least 80 pixels.")
        luma = (
            cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) if frame.ndim == 3 and frame.shape[2] == 3 else frame.reshape(h, w)
        )
        white = whitened(luma)
        if self._sum is None:
            self._sum = np.zeros_like(white)
        if self._sum.shape != white.shape:
            raise InputError(f"The video changes its size to {w}x{h}. Give parts of one size.")
        self._sum += white
        self.frames += 1

    def picture(self) -> Float[np.ndarray, "h w"]:
        """InputError where there is no frame."""
        if self._sum is None:
            raise InputError("There is no frame to look for a mark in. Give a video with pictures.")
        return self._sum / self.frames


def whitened(luma: UInt8[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """High-pass, over local variance: what is close to the best linear detector for a weak mark in strong content."""
    y = luma.astype(np.float32)
    high = y - cv2.GaussianBlur(y, (0, 0), 4)
    h, w = y.shape
    energy = cv2.resize(high * high, (max(w // 4, 1), max(h // 4, 1)), interpolation=cv2.INTER_AREA)
    variance = cv2.resize(cv2.GaussianBlur(energy, (0, 0), 2), (w, h), interpolation=cv2.INTER_LINEAR)
    return high / (variance + 16)


def detect(frames: Iterable[UInt8[np.ndarray, "h w *c"]]) -> Detection:
    """Look for the mark in frames (RGB or luma) of one size, at any shift, at scales SCALE_MIN to SCALE_MAX, mirrored
    or not."""
    accumulator = Accumulator()
    for frame in frames:
        accumulator.add(frame)
    return replace(detect_in(accumulator.picture()), frames=accumulator.frames)


def detect_in(picture: Float[np.ndarray, "h w"]) -> Detection:
    """`detect` in the mean of whitened frames."""
    searches = [(window, _scales(window)) for window in _windows(*picture.shape)]
    compared = 2 * TILE_PX**2 * sum(len(scales) for _, scales in searches) * (1 + len(_FINE) ** 2)
    best = None
    for window, scales in searches:
        found = [candidate for scale in scales for candidate in _aligned(picture[window], scale, scale)]
        step = min(scales[1] / scales[0] - 1, 2 * _STEP_PX / max(picture.shape))
        for alignment in _distinct(found, scales[1] / scales[0]):
            detection = _decoded(picture, _refined(picture, alignment, step), compared)
            if best is None or detection.false_alarm_rate < best.false_alarm_rate:
                best = detection
        if best is not None and best.present and best.payload is not None:
            break
    assert best is not None, picture.shape
    return best


_STEP_PX = 5.5
"""Two scales that lie one step apart move the far edge of a picture by this many pixels: the waves' sums lose a fifth
half-way."""
_FINE = np.arange(-2, 3) / 2
"""Steps of the refined search, for each axis by itself: a resized picture's sides are rounded to even numbers."""


def _windows(h: int, w: int) -> Iterator[tuple[slice, slice]]:
    """Square windows of at most WINDOW_PX, the middle one first; then a grid without overlap."""

    def spans(length: int) -> list[slice]:
        size = min(length, WINDOW_PX)
        starts = np.linspace(0, length - size, math.ceil(length / size)).astype(int)
        middle = (length - size) // 2
        return [slice(middle, middle + size)] + [slice(int(s), int(s) + size) for s in starts if s != middle]

    rows, columns = spans(h), spans(w)
    return ((y, x) for y in rows for x in columns)


def _scales(window: tuple[slice, slice]) -> Float[np.ndarray, "s"]:
    size = max(side.stop - side.start for side in window)
    count = math.ceil(math.log(SCALE_MAX / SCALE_MIN) / math.log1p(_STEP_PX / size))
    return np.geomspace(SCALE_MIN, SCALE_MAX, count + 1)


@lru_cache(64)
def _waves(length: int, first: int, last: int, period_px: float) -> Complex[np.ndarray, "f n"]:
    """exp(-2 pi i f y / period) for whole f from first to last. Not to be written to: several scales share it."""
    turns = np.outer(np.arange(first, last + 1), np.arange(length) / period_px)
    angle = (2 * np.pi * (turns % 1.0)).astype(np.float32)  # sines of single precision are vectorised
    return np.cos(angle) - np.complex64(1j) * np.sin(angle)


def _row_sums(picture: Float[np.ndarray, "h w"], scale_x: float) -> Complex[np.ndarray, "h u"]:
    waves = _waves(picture.shape[1], 0, int(HIGH), TILE_PX * scale_x).T
    return picture @ np.real(waves) + 1j * (picture @ np.imag(waves))


def _phases(rows: Complex[np.ndarray, "h u"], scale_y: float, mirrored: bool) -> Complex[np.ndarray, "k"]:
    """X_k / |X_k| of all waves of the key."""
    key, top = _key(), int(HIGH)
    sums = _waves(len(rows), -top, top, TILE_PX * scale_y) @ rows
    x = sums[top - key.v, key.u].conj() if mirrored else sums[top + key.v, key.u]
    return x / np.maximum(np.abs(x), 1e-20)


def _best_shift(phases: Complex[np.ndarray, "k"]) -> tuple[float, int, int]:
    """(score, dy, dx) of the best of all whole shifts of the tile, by one inverse FFT."""
    key = _key()
    product = phases[key.sync] * key.sync_phasors.conj()
    v, u = key.v[key.sync], key.u[key.sync]
    spectrum = np.zeros((TILE_PX, TILE_PX // 2 + 1), np.complex64)
    spectrum[v, u] = product
    edge = u == 0
    spectrum[-v[edge], 0] = product[edge].conj()
    scores = np.asarray(scipy.fft.irfft2(spectrum, (TILE_PX, TILE_PX), norm="forward")) / 2
    dy, dx = divmod(int(scores.argmax()), TILE_PX)
    return float(scores[dy, dx]) / math.sqrt(len(v) / 2), dy, dx


def _aligned(picture: Float[np.ndarray, "h w"], scale_y: float, scale_x: float) -> list[tuple[float, Alignment]]:
    """(score, alignment) at these scales, as it is and mirrored."""
    rows = _row_sums(picture, scale_x)
    out = []
    for mirrored in (False, True):
        score, dy, dx = _best_shift(_phases(rows, scale_y, mirrored))
        out.append((score, Alignment(scale_y, scale_x, dy * scale_y, dx * scale_x, mirrored)))
    return out


def _distinct(found: list[tuple[float, Alignment]], ratio: float) -> list[Alignment]:
    """The best candidates; of those that are closer than two steps of scale only the best."""
    out: list[Alignment] = []
    for _, candidate in sorted(found, key=lambda c: -c[0]):
        apart = [
            abs(math.log(candidate.scale_y / a.scale_y)) > 2 * math.log(ratio) or candidate.mirrored != a.mirrored
            for a in out
        ]
        if all(apart):
            out.append(candidate)
        if len(out) == _CANDIDATES:
            break
    return out


def _refined(picture: Float[np.ndarray, "h w"], start: Alignment, step: float) -> Alignment:
    """The best alignment on the whole picture with each scale within one step of the start's."""
    best, best_score = start, -math.inf
    for scale_x in start.scale_x * (1 + step * _FINE):
        rows = _row_sums(picture, scale_x)
        for scale_y in start.scale_y * (1 + step * _FINE):
            score, dy, dx = _best_shift(_phases(rows, scale_y, start.mirrored))
            if score > best_score:
                best = Alignment(float(scale_y), float(scale_x), dy * scale_y, dx * scale_x, start.mirrored)
                best_score = score
    return best


def _decoded(picture: Float[np.ndarray, "h w"], alignment: Alignment, compared: int) -> Detection:
    """The evidence at one alignment, out of `compared` that might have been chosen."""
    key = _key()
    phases = _phases(_row_sums(picture, alignment.scale_x), alignment.scale_y, alignment.mirrored)
    shift = key.v * alignment.offset_y_px / alignment.scale_y + key.u * alignment.offset_x_px / alignment.scale_x
    phases = phases * np.exp(2j * np.pi * shift / TILE_PX)
    sync = np.real(phases[key.sync] * key.sync_phasors.conj())
    sums = np.real(key.codebook @ phases[key.data].conj()[..., None])[..., 0]  # symbols x codewords
    total, count = float(sync.sum() + sums.max(-1).sum()), len(key.v)
    log_rates = (-(float(sync.sum()) ** 2) / len(sync), -(total**2) / count + SYMBOLS * SYMBOL_BITS * math.log(2))
    rate = math.exp(min(0.0, math.log(2 * compared) + min(log_rates)))  # twice: two tests
    # Given the mark, a wave's phase error has von Mises' distribution; its concentration comes from the known waves.
    mean = min(max(float(sync.mean()), 0.0), 0.999)
    concentration = mean * (2 - mean**2) / (1 - mean**2)
    odds = np.exp(concentration * (sums - sums.max(-1, keepdims=True)))
    present = total > 0 and rate <= FALSE_ALARM_RATE
    payload, confidence = _most_probable(odds / odds.sum(-1, keepdims=True)) if present else (None, 0.0)
    score = float(sync.sum()) / math.sqrt(len(sync) / 2)
    return Detection(present, payload, confidence, rate, score, total / count, alignment, 0)


def _most_probable(symbols: Float[np.ndarray, "s c"]) -> tuple[Payload | None, float]:
    """(payload, probability) from the symbols' own probabilities and the check; None below PAYLOAD_CONFIDENCE.

    Of all words only one in 4,096 passes the check, so a word that does is that much more probable.
    """
    likely = np.argsort(symbols, axis=-1)[:, : -_ALTERNATIVES - 1 : -1]
    listed, passing = 0.0, {}
    for word in product(range(_ALTERNATIVES), repeat=SYMBOLS):
        codewords = [int(likely[s, i]) for s, i in enumerate(word)]
        probability = math.prod(float(symbols[s, c]) for s, c in enumerate(codewords))
        listed += probability
        if probability > 1e-6 and (payload := Payload.from_symbols(codewords)) is not None:
            passing[payload] = probability
    if not passing:
        return None, 0.0
    best = max(passing, key=lambda p: passing[p])
    confidence = passing[best] / (sum(passing.values()) + max(1 - listed, 0.0) / 4096)
    return (best, confidence) if confidence >= PAYLOAD_CONFIDENCE else (None, confidence)
