"""Speech features: 50 a second, feature j describing the sound of [20 j, 20 (j + 1)) ms, so video frame i at 25 fps owns features 2i and 2i + 1.

Three encoders of one shape (`AudioEncoder`):

    embedded  the first two layers of a Whisper-derived encoder, 384-d, from a package (the default; see `hicode.assets`)
    hubert    HuBERT (the paper's), from a local folder or a model hub, through transformers
    logmel    log-mel energies, 160-d, no learning: a baseline

An encoder slides a window over the sound and reads only its inner rows, because what a transformer says of a moment depends on where in the
window it stands. The window is the same for a file and for a stream, so both give the same features, in constant memory for any length:
`lead` rows of past, `hop` rows that are read, `look` rows of future. Loudness is normalised by one level for the whole sound, or by a running
estimate where the sound is not known in advance.
"""

import math
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hicode import assets
from hicode.audio import FEATURE_RATE_HZ, SAMPLE_RATE_HZ, SAMPLES_PER_FEATURE, DcBlocker, checked_sound, frame_rms
from hicode.errors import InputError
from hicode.speech.loudness import LoudnessEstimator, speech_level
from hicode.speech.noise import SteadyNoise

EncoderName = Literal["embedded", "hubert", "logmel"]


class Window(NamedTuple):
    """Rows of 20 ms: of past, read at once, and of future. `lead` and `look` are multiples of `hop`, since rows come in hops."""

    lead: int
    hop: int
    look: int

    @property
    def rows(self) -> int:
        return self.lead + self.hop + self.look


class AudioEncoder(Protocol):
    """What turns 16 kHz mono sound into features; files record `name`, `variant`, `dim` and `rate_hz`, and consumers check them.
    `window` and `margin` (samples that a row sees beyond its own 20 ms on either side) say when a feature is known; `variant`, what else than the
    name and the window made it: another is another encoder."""

    name: str
    variant: str | None
    dim: int
    rate_hz: int
    window: Window
    margin: int

    def encode(self, samples: Float[np.ndarray, "n"], level: float | None = None) -> Float[Tensor, "t d"]:
        """All ceil(n / 320) features of a sound. `level`: its speech RMS, measured where not given."""

    def stream(self, level: float | None = None) -> "EncoderStream":
        """An incremental encoding; with the same `level`, the same features as `encode`."""


def create_encoder(
    name: EncoderName = "embedded", path: str | Path | None = None, window: Window | None = None
) -> AudioEncoder:
    """The encoder of that name. `path`: HuBERT's local folder or hub name (default facebook/hubert-base-ls960). `window`: of the embedded one,
    where it is to be another than its own: features are only worth something to models that learned from the same window."""
    if name == "embedded":
        return EmbeddedEncoder(window)
    if name == "hubert":
        return HubertEncoder(path or "facebook/hubert-base-ls960")
    if name == "logmel":
        return LogMelEncoder()
    raise _unknown(name)


def _unknown(name: str) -> InputError:
    return InputError(f"No speech encoder is called {name!r}. There are: embedded, hubert, logmel.")


def usual_window(name: EncoderName) -> Window:
    """The window of an encoder by that name, without loading it."""
    encoders = {"embedded": EmbeddedEncoder, "hubert": HubertEncoder, "logmel": LogMelEncoder}
    if name not in encoders:
        raise _unknown(name)
    return encoders[name].window


def usual_variant(name: EncoderName) -> str | None:
    """The variant of an encoder by that name, likewise."""
    return EmbeddedEncoder.variant if name == "embedded" else None


def match_frames(features: Float[Tensor, "t d"], frames: int) -> Float[Tensor, "2*frames d"]:
    """Exactly two features a video frame: cut, or the last one repeated, where sound and picture end apart."""
    assert len(features) > 0 or frames == 0, "no features to repeat"
    return features[torch.arange(2 * frames).clamp(max=len(features) - 1)]


class EncoderStream:
    """Sound in pieces of any size, features out as soon as their window is complete (hop + look rows after the sound)."""

    def __init__(self, encoder: "_WindowedEncoder", level: float | None):
        self.encoder, self.level = encoder, level
        self._running = LoudnessEstimator()
        # Not yet turned into rows; starts `margin` before the next row. Silence comes before the beginning.
        self._samples = np.zeros(encoder.window.lead * SAMPLES_PER_FEATURE + encoder.margin, np.float32)
        self._rows: Tensor | None = None
        self._memory = encoder._begin()
        self._blocker = DcBlocker()
        self._received, self._emitted, self._finished = 0, 0, False

    def push(self, samples: Float[np.ndarray, "n"]) -> Float[Tensor, "k d"]:
        """The features that became complete. Raises InputError where the sound is not finite or not mono."""
        assert not self._finished, "the stream is finished"
        samples = checked_sound(samples)
        self._received += len(samples)
        return self._advance(self._blocker(samples))

    def finish(self) -> Float[Tensor, "k d"]:
        """The remaining features, as if silence followed. In all, ceil(n / 320) have come out."""
        assert not self._finished, "the stream is finished"
        self._finished = True
        total = -(-self._received // SAMPLES_PER_FEATURE)
        window, emitted = self.encoder.window, self._emitted
        wanted = -(-total // window.hop) * window.hop + window.look  # rows that the last window needs
        silence = wanted * SAMPLES_PER_FEATURE + self.encoder.margin - self._received
        return self._advance(np.zeros(silence, np.float32))[: total - emitted]

    def _advance(self, samples: np.ndarray) -> Tensor:
        encoder, window = self.encoder, self.encoder.window
        self._samples = np.concatenate([self._samples, samples])
        block = window.hop * SAMPLES_PER_FEATURE
        outputs = []
        while len(self._samples) >= block + 2 * encoder.margin:
            # With a known level many blocks go at once; a running level is held for one block, whatever the pieces' sizes.
            blocks = (len(self._samples) - 2 * encoder.margin) // block
            blocks = min(blocks, encoder.batch) if self.level is not None else 1
            n = blocks * block
            level = self.level
            if level is None:
                level = self._running.update(
                    frame_rms(self._samples[encoder.margin : encoder.margin + n], SAMPLES_PER_FEATURE)
                )
            audio = torch.from_numpy(self._samples[: n + 2 * encoder.margin]) / level
            self._samples = self._samples[n:]
            rows = encoder._local(audio, self._memory)
            self._rows = rows if self._rows is None else torch.cat([self._rows, rows])
            windows = (len(self._rows) - window.rows) // window.hop + 1
            if windows > 0:
                outputs.append(
                    encoder._contextual(
                        self._rows.unfold(0, window.rows, window.hop)[:windows].transpose(1, 2)
                    ).flatten(0, 1)
                )
                self._rows = self._rows[windows * window.hop :]
        out = torch.cat(outputs) if outputs else torch.zeros(0, encoder.dim)
        self._emitted += len(out)
        return out


class _WindowedEncoder:
    """Sliding-window encoding out of two pieces: `_local` turns sound into one row per 20 ms, `_contextual` turns windows of rows into features.
    What `_local` must remember of a sound from piece to piece, if anything, `_begin` makes.

    margin  samples that a row sees beyond its own 20 ms on either side
    batch   windows that are worked on at once
    """

    name: str
    variant: str | None = None
    dim: int
    rate_hz = FEATURE_RATE_HZ
    window: Window
    margin = 0
    batch = 16

    def _begin(self) -> "_Hearing | None":
        return None

    def _local(self, audio: Float[Tensor, "n"], memory: "_Hearing | None") -> Float[Tensor, "t c"]:
        """(n - 2 margin) / 320 rows, of a sound that goes on where the last piece ended, 2 margin before its end."""
        raise NotImplementedError

    def _contextual(self, rows: Float[Tensor, "b w c"]) -> Float[Tensor, "b hop d"]:
        raise NotImplementedError

    def stream(self, level: float | None = None) -> EncoderStream:
        return EncoderStream(self, level)

    def encode(self, samples: Float[np.ndarray, "n"], level: float | None = None) -> Float[Tensor, "t d"]:
        samples = checked_sound(samples)
        stream = self.stream(speech_level(samples) if level is None else level)
        piece = 60 * SAMPLE_RATE_HZ  # bounds the memory in between
        parts = [stream.push(samples[start : start + piece]) for start in range(0, len(samples), piece)]
        return torch.cat([*parts, stream.finish()])


# --- log-mel -----------------------------------------------------------------------------------------------------------------------------

N_FFT, MEL_HOP, N_MELS = 400, 160, 80
# log10 of mel power at RMS 1 peaks near 2 in loud vowels; Whisper clamps 8 decades under the maximum. A fixed reference instead of the
# window's maximum keeps a moment's value independent of its neighbours.
LOG_MEL_REFERENCE, LOG_MEL_DECADES = 2.0, 8.0


def mel_filters(n_mels: int = N_MELS, n_fft: int = N_FFT, rate_hz: int = SAMPLE_RATE_HZ) -> Float[np.ndarray, "m f"]:
    """Triangular filters on Slaney's mel scale (linear to 1 kHz, then 27 steps per factor 6.4), each of unit area in Hz."""
    step = math.log(6.4) / 27

    def to_mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / step

    mels = np.linspace(0, to_mel(rate_hz / 2), n_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * step))
    hz = np.linspace(0, rate_hz / 2, n_fft // 2 + 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangle = np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clip(0)
    return triangle * (2 / (high - low))


class _MelPower:
    """Power in Whisper's 80 mel bands (25 ms Hann windows every 10 ms)."""

    def __init__(self):
        self.filters = torch.from_numpy(mel_filters()).float()
        self.hann = torch.hann_window(N_FFT)

    def __call__(self, audio: Float[Tensor, "n"]) -> Float[Tensor, "80 t"]:
        """Frames lie wholly inside the audio: t = (n - 400) / 160 + 1, the first centred on sample 200."""
        return self.filters @ torch.fft.rfft(audio.unfold(0, N_FFT, MEL_HOP) * self.hann).abs().square().T


def log_mel(power: Float[Tensor, "80 t"]) -> Float[Tensor, "80 t"]:
    """Scaled to about [-.5, 1.5], against a fixed reference."""
    return (power.clamp(min=10 ** (LOG_MEL_REFERENCE - LOG_MEL_DECADES)).log10() + 4) / 4


class LogMelEncoder(_WindowedEncoder):
    """Two log-mel frames a feature, 160-d."""

    name, dim, window, margin = "logmel", 2 * N_MELS, Window(4, 4, 0), 120

    def __init__(self):
        self._power = _MelPower()

    def _local(self, audio: Tensor, memory: None = None) -> Tensor:
        # Frames centred 80 and 240 samples into each row: the margin is 200 - 80.
        frames = log_mel(self._power(audio)).T
        return frames.reshape(-1, self.dim)

    def _contextual(self, rows: Tensor) -> Tensor:
        return rows[:, self.window.lead : self.window.lead + self.window.hop]


# --- embedded ----------------------------------------------------------------------------------------------------------------------------


class EmbeddedEncoder(_WindowedEncoder):
    """The input of the third encoder layer (`add_268`) of Smart Turn v3.2, a Whisper-tiny-derived network; 384-d.

    Rebuilt in torch from the graph's weights: onnxruntime would run the int8 graph (whose features differ: cosine about .97) with a fixed
    8 s window, 40 times the arithmetic. Here convolutions run once over the sound, and the second layer only where it is read. Steady noise is
    taken off the mel power before (`speech/noise.py`).
    """

    name, variant, dim, margin = "embedded", "less steady noise", 384, 360
    # Of ridge regressions to unseen speakers' mouths (opening's correlation; docs/log.md): 160 ms of future .68, 80 ms .67, 40 ms .66; 2 s of past
    # .68, 1.5 s .67, 1 s .65. A hop of two frames costs half of what one frame does.
    window = Window(lead=92, hop=4, look=4)
    HEADS = 6

    def __init__(self, window: Window | None = None):
        self.window = window or self.window
        w = _onnx_weights(assets.path("speech_encoder"))
        self._power = _MelPower()
        prefix = "inner.encoder."
        self._conv1 = (w[prefix + "conv1.weight"], w[prefix + "conv1.bias"])
        self._conv2 = (w[prefix + "conv2.weight"], w[prefix + "conv2.bias"])
        self._positions = w[prefix + "embed_positions.weight"][: self.window.rows]
        self._layers = []
        # The graph's exporter numbered the matrices; queries, keys, values, output, and the feed-forward pair.
        for index, numbers in enumerate([(17, 25, 32, 75, 79, 88), (92, 100, 107, 148, 152, 161)]):
            matrices = dict(zip(("q", "k", "v", "out", "up", "down"), (w[f"val_{n}"] for n in numbers)))
            p = f"{prefix}layers.{index}."
            vectors = {
                "q_bias": "self_attn.q_proj.bias", "v_bias": "self_attn.v_proj.bias", "out_bias": "self_attn.out_proj.bias",
                "up_bias": "fc1.bias", "down_bias": "fc2.bias",
                "norm1": "self_attn_layer_norm.weight", "norm1_bias": "self_attn_layer_norm.bias",
                "norm2": "final_layer_norm.weight", "norm2_bias": "final_layer_norm.bias",
            }  # fmt: skip
            layer = matrices | {k: w[p + v] for k, v in vectors.items()}
            # Queries, keys (which have no bias) and values come out of one product.
            layer["qkv"] = torch.cat([layer.pop(name) for name in ("q", "k", "v")], 1)
            layer["qkv_bias"] = torch.cat([layer["q_bias"], torch.zeros_like(layer.pop("q_bias")), layer.pop("v_bias")])
            _, k, v = layer["qkv"].unflatten(-1, (3, self.HEADS, -1)).unbind(1)
            layer["k_heads"], layer["v_heads"] = (
                k.permute(1, 2, 0).contiguous(),
                v.transpose(0, 1).contiguous(),
            )  # h c d, h d c
            self._layers.append(layer)

    def _begin(self) -> "_Hearing":
        return _Hearing()

    @torch.no_grad()
    def _local(self, audio: Tensor, memory: "_Hearing") -> Tensor:
        # Row t is conv2's output centred on mel frame 2t; mel frame m is centred on sample 160 (m + 1), the middle of a 20 ms span.
        h = F.gelu(F.conv1d(log_mel(memory(self._power(audio)))[None], *self._conv1))
        return F.gelu(F.conv1d(h, *self._conv2, stride=2))[0].T.contiguous()

    @torch.no_grad()
    def _contextual(self, rows: Tensor) -> Tensor:
        window = self.window
        h = rows + self._positions
        h = self._layer(h, self._layers[0], slice(None))
        return self._layer(h, self._layers[1], slice(window.lead, window.lead + window.hop))

    def _layer(self, h: Float[Tensor, "b w d"], p: dict[str, Tensor], read: slice) -> Float[Tensor, "b r d"]:
        """One pre-norm transformer layer, computed at the rows `read` only."""

        z = F.layer_norm(h, h.shape[-1:], p["norm1"], p["norm1_bias"])
        attended = self._attend(z, p) if read == slice(None) else self._attend_few(z, p, read)
        h = h[:, read] + F.linear(attended, p["out"].T, p["out_bias"])
        z = F.layer_norm(h, h.shape[-1:], p["norm2"], p["norm2_bias"])
        return h + F.linear(F.gelu(F.linear(z, p["up"].T, p["up_bias"])), p["down"].T, p["down_bias"])

    def _attend(self, z: Float[Tensor, "b w d"], p: dict[str, Tensor]) -> Float[Tensor, "b w d"]:
        """Self-attention of all rows, before the output's matrix."""
        q, k, v = (
            x.unflatten(-1, (self.HEADS, -1)).transpose(1, 2)
            for x in F.linear(z, p["qkv"].T, p["qkv_bias"]).chunk(3, -1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _attend_few(self, z: Float[Tensor, "b w d"], p: dict[str, Tensor], read: slice) -> Float[Tensor, "b r d"]:
        """The same of a few rows, without keys and values: q . (Wk z) = (Wk^T q) . z, and a mean of Wv z is Wv times a mean of z."""
        d = z.shape[-1]
        q = (
            F.linear(z[:, read], p["qkv"][:, :d].T, p["qkv_bias"][:d]).unflatten(-1, (self.HEADS, -1)).transpose(1, 2)
        )  # b h r c
        asked = (q @ p["k_heads"]).flatten(1, 2)  # b h*r d
        mean = (asked @ z.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ z
        values = mean.unflatten(1, (self.HEADS, -1)) @ p["v_heads"]
        return values.transpose(1, 2).flatten(2) + p["qkv_bias"][2 * d :]


class _Hearing:
    """Mel power of a sound in pieces without its steady noise. Pieces overlap: a row of 20 ms sees some frames of its neighbours'."""

    OVERLAP = (2 * EmbeddedEncoder.margin - N_FFT) // MEL_HOP + 1  # frames that the last piece has ended with

    def __init__(self):
        self._noise, self._kept = SteadyNoise(), None

    def __call__(self, power: Float[Tensor, "80 t"]) -> Float[Tensor, "80 t"]:
        new = power if self._kept is None else power[:, self.OVERLAP :]
        new = torch.from_numpy(self._noise(new.T.numpy())).T
        power = new if self._kept is None else torch.cat([self._kept, new], 1)
        self._kept = power[:, -self.OVERLAP :].clone()
        return power


def _onnx_weights(path: Path) -> dict[str, Tensor]:
    """Float weights of an ONNX graph by name, quantised ones dequantised (their `_quantized` suffix dropped).

    Reads the protobuf wire format directly; field numbers are those of onnx.proto. It saves a dependency on the `onnx` package.
    """
    model = memoryview(path.read_bytes())
    graph = next(value for number, value in _protobuf(model) if number == 7)  # ModelProto.graph
    raw: dict[str, np.ndarray] = {}
    axes: dict[str, int] = {}
    for number, value in _protobuf(graph):
        if number == 5:  # GraphProto.initializer: TensorProto
            name, array = _onnx_tensor(value)
            raw[name] = array
        elif number == 1:  # GraphProto.node: NodeProto
            fields = list(_protobuf(value))
            if bytes(next(v for n, v in fields if n == 4)) == b"DequantizeLinear":
                first_input = bytes(next(v for n, v in fields if n == 1)).decode()
                for attribute in (dict(_protobuf(v)) for n, v in fields if n == 5):
                    if bytes(attribute[1]) == b"axis":
                        axes[first_input] = attribute[3]
    weights = {}
    for name, array in raw.items():
        if array.dtype == np.float32:
            weights.setdefault(name, torch.from_numpy(array.copy()))
        elif name.endswith("_quantized"):
            stem = name.removesuffix("_quantized")
            scale = raw[f"{stem}_scale"] if f"{stem}_scale" in raw else raw[f"{name}_scale"]
            zero = raw.get(f"{stem}_zero_point", raw.get(f"{name}_zero_point", np.zeros(1)))
            shape = [1] * array.ndim
            if scale.size > 1:
                shape[axes.get(name, 1)] = scale.size
            value = (
                array.astype(np.float32) - zero.astype(np.float32).reshape(shape if zero.size > 1 else -1)
            ) * scale.reshape(shape)
            # "conv1.weight_quantized" has its scale under "conv1.weight_scale"
            weights[stem] = torch.from_numpy(value.astype(np.float32))
    return weights


def _onnx_tensor(value: memoryview) -> tuple[str, np.ndarray]:
    dtypes = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64}
    shape, kind, name, data, numbers = [], 0, "", b"", []
    for number, field in _protobuf(value):
        if number == 1:  # dims, one by one or packed
            shape += [field] if isinstance(field, int) else list(_varints(field))
        elif number == 2:
            kind = field
        elif number == 8:
            name = bytes(field).decode()
        elif number == 5:  # int32_data, for small integers
            numbers += [field] if isinstance(field, int) else list(_varints(field))
        elif number in (4, 9):  # float_data and raw_data are laid out alike
            data = bytes(data) + bytes(field)
    assert kind in dtypes, f"tensor {name} has ONNX type {kind}"
    array = np.frombuffer(data, dtypes[kind]) if data else np.array(numbers).astype(dtypes[kind])
    return name, array.reshape(shape)


def _protobuf(message: memoryview):
    """(field number, value) pairs; nested messages and strings stay bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            size = {1: 8, 5: 4}[wire]
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _varints(message: memoryview):
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


# --- HuBERT ------------------------------------------------------------------------------------------------------------------------------


class HubertEncoder(_WindowedEncoder):
    """The last hidden layer of a HuBERT model (Hsu et al. 2021), 768-d for the base model, in 8 s windows of which 2 s are read."""

    name = "hubert"
    window = Window(lead=200, hop=100, look=100)
    batch = 2

    def __init__(self, path: str | Path):
        try:
            from transformers import HubertModel
        except ImportError as error:
            raise InputError(
                "The hubert encoder needs transformers: pip install 'hicode[hubert]', or use --encoder embedded."
            ) from error
        try:
            self._model = HubertModel.from_pretrained(str(path)).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"No HuBERT model at {path} ({reason}). Give a local folder, or use --encoder embedded."
            ) from error
        self.dim = self._model.config.hidden_size

    def _local(self, audio: Tensor, memory: None = None) -> Tensor:
        return audio.reshape(-1, SAMPLES_PER_FEATURE)

    @torch.no_grad()
    def _contextual(self, rows: Tensor) -> Tensor:
        # A row's receptive field is 400 samples: 40 more at each end of the window centre every row on its own 20 ms.
        audio = F.pad(rows.flatten(1), (40, 40))
        hidden = self._model(audio).last_hidden_state
        assert hidden.shape[1] == self.window.rows, hidden.shape
        return hidden[:, self.window.lead : self.window.lead + self.window.hop]
