"""The default encoder: the first two layers of a Whisper-derived network, rebuilt in torch from an ONNX file.

b windows, w rows of a window, r rows that are read, d = 384 channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hicode import assets
from hicode.speech.encoders.logmel import MEL_HOP, N_FFT, MelPower, log_mel
from hicode.speech.encoders.onnx_weights import onnx_weights
from hicode.speech.encoders.windowed import Window, WindowedEncoder
from hicode.speech.noise import NoiseReducer

# The graph's exporter numbered the matrices of a layer: queries, keys, values, output, and the feed-forward pair.
_LAYER_MATRICES = (17, 25, 32, 75, 79, 88), (92, 100, 107, 148, 152, 161)
_LAYER_VECTORS = {
    "q_bias": "self_attn.q_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "out_bias": "self_attn.out_proj.bias",
    "up_bias": "fc1.bias",
    "down_bias": "fc2.bias",
    "norm1": "self_attn_layer_norm.weight",
    "norm1_bias": "self_attn_layer_norm.bias",
    "norm2": "final_layer_norm.weight",
    "norm2_bias": "final_layer_norm.bias",
}


class EmbeddedEncoder(WindowedEncoder):
    """The input of the third encoder layer (`add_268`) of Smart Turn v3.2, a Whisper-tiny-derived network; 384-d.

    Rebuilt in torch from the graph's weights. onnxruntime would run the int8 graph (features differ: cosine about .97)
    in fixed 8 s windows, which is 40 times the arithmetic. Here convolutions run once over the sound, and the second
    layer only where it is read. Steady noise is subtracted from the mel power first.
    """

    name, variant, dim, margin = "embedded", "steady noise subtracted", 384, 360
    # Correlation of mouth opening with a ridge regression, on unseen speakers: 160 ms of future .68, 80 ms .67,
    # 40 ms .66; 2 s of past .68, 1.5 s .67, 1 s .65. A hop of two frames costs half of what one frame does.
    window = Window(lead=92, hop=4, look=4)
    HEADS = 6

    def __init__(self, window: Window | None = None):
        self.window = window or self.window
        w = onnx_weights(assets.path("speech_encoder"))
        self._power = MelPower()
        prefix = "inner.encoder."
        self._conv1 = (w[prefix + "conv1.weight"], w[prefix + "conv1.bias"])
        self._conv2 = (w[prefix + "conv2.weight"], w[prefix + "conv2.bias"])
        self._positions = w[prefix + "embed_positions.weight"][: self.window.rows]
        self._layers = [self._layer_weights(w, f"{prefix}layers.{i}.", m) for i, m in enumerate(_LAYER_MATRICES)]

    def _layer_weights(self, w: dict[str, Tensor], prefix: str, numbers: tuple[int, ...]) -> dict[str, Tensor]:
        names = ("q", "k", "v", "out", "up", "down")
        layer = {name: w[f"val_{number}"] for name, number in zip(names, numbers, strict=True)}
        layer |= {name: w[prefix + stored] for name, stored in _LAYER_VECTORS.items()}
        # Queries, keys (which have no bias) and values come out of one product.
        layer["qkv"] = torch.cat([layer.pop(name) for name in ("q", "k", "v")], 1)
        q_bias, v_bias = layer.pop("q_bias"), layer.pop("v_bias")
        layer["qkv_bias"] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        _, k, v = layer["qkv"].unflatten(-1, (3, self.HEADS, -1)).unbind(1)
        layer["k_heads"] = k.permute(1, 2, 0).contiguous()  # h c d
        layer["v_heads"] = v.transpose(0, 1).contiguous()  # h d c
        return layer

    def _new_state(self) -> "_DenoisedMel":
        return _DenoisedMel()

    @torch.no_grad()
    def _rows(self, audio: Float[Tensor, "n"], state: Any) -> Float[Tensor, "t c"]:
        # Row t is conv2's output centred on mel frame 2t. Mel frame m is centred on sample 160 (m + 1), the middle of a
        # 20 ms span.
        h = F.gelu(F.conv1d(log_mel(state(self._power(audio)))[None], *self._conv1))
        return F.gelu(F.conv1d(h, *self._conv2, stride=2))[0].T.contiguous()

    @torch.no_grad()
    def _features(self, rows: Float[Tensor, "b w c"]) -> Float[Tensor, "b hop d"]:
        window = self.window
        h = self._layer(rows + self._positions, self._layers[0], slice(None))
        return self._layer(h, self._layers[1], slice(window.lead, window.lead + window.hop))

    def _layer(self, h: Float[Tensor, "b w d"], p: dict[str, Tensor], read: slice) -> Float[Tensor, "b r d"]:
        """One pre-norm transformer layer, computed at the rows `read` only."""
        z = F.layer_norm(h, h.shape[-1:], p["norm1"], p["norm1_bias"])
        attended = self._attend(z, p) if read == slice(None) else self._attend_few(z, p, read)
        h = h[:, read] + F.linear(attended, p["out"].T, p["out_bias"])
        z = F.layer_norm(h, h.shape[-1:], p["norm2"], p["norm2_bias"])
        return h + F.linear(F.gelu(F.linear(z, p["up"].T, p["up_bias"])), p["down"].T, p["down_bias"])

    def _attend(self, z: Float[Tensor, "b w d"], p: dict[str, Tensor]) -> Float[Tensor, "b w d"]:
        """Self-attention of all rows, before the output matrix."""
        q, k, v = (
            x.unflatten(-1, (self.HEADS, -1)).transpose(1, 2)
            for x in F.linear(z, p["qkv"].T, p["qkv_bias"]).chunk(3, -1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _attend_few(self, z: Float[Tensor, "b w d"], p: dict[str, Tensor], read: slice) -> Float[Tensor, "b r d"]:
        """The same for a few rows, without keys and values.

        q . (Wk z) = (Wkᵀ q) . z, and a mean of Wv z is Wv times a mean of z.
        """
        d = z.shape[-1]
        q = F.linear(z[:, read], p["qkv"][:, :d].T, p["qkv_bias"][:d])
        q = q.unflatten(-1, (self.HEADS, -1)).transpose(1, 2)  # b h r c
        queries = (q @ p["k_heads"]).flatten(1, 2)  # b h*r d
        mean = (queries @ z.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ z
        values = mean.unflatten(1, (self.HEADS, -1)) @ p["v_heads"]
        return values.transpose(1, 2).flatten(2) + p["qkv_bias"][2 * d :]


class _DenoisedMel:
    """Mel power of a sound in pieces, without its steady noise.

    Pieces overlap: a row of 20 ms sees some frames of its neighbours.
    """

    OVERLAP = (2 * EmbeddedEncoder.margin - N_FFT) // MEL_HOP + 1  # frames at the end of the last piece

    def __init__(self):
        self._reducer = NoiseReducer()
        self._kept: Tensor | None = None

    def __call__(self, power: Float[Tensor, "80 t"]) -> Float[Tensor, "80 t"]:
        new = power if self._kept is None else power[:, self.OVERLAP :]
        new = torch.from_numpy(self._reducer(new.T.numpy())).T
        power = new if self._kept is None else torch.cat([self._kept, new], 1)
        self._kept = power[:, -self.OVERLAP :].clone()
        return power
