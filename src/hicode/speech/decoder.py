"""Streaming inference of a Faceformer in numpy, with folded weights.

s features at 50 Hz, t or m frames at 25 fps, w width, k coefficients, n outputs, h heads. For a network this narrow, a
frame costs mostly the overhead of its operations; `Faceformer.predict` says in torch what comes out.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.lib.stride_tricks import as_strided
from torch import Tensor, nn

from hicode.audio import FEATURES_PER_FRAME
from hicode.speech.faceformer import Faceformer


class FaceformerStream:
    """Features in pieces of any size; displacements out once `look_ahead` frames of sound have followed.

    Weights are those that the model had when the stream began.
    """

    BATCH = 500  # features; bounds the memory in between

    def __init__(self, model: Faceformer, style: Float[Tensor, "w"]):
        c = self.config = model.config
        self._decoder = Decoder(model, style)
        w = _weights(model)
        project = w["project_input.weight"] / w["feature_std"]
        self._project = np.ascontiguousarray(project.T)
        self._project_bias = w["project_input.bias"] - project @ w["feature_mean"]
        self._input_norm = w["input_norm.weight"], w["input_norm.bias"]
        self._mix = np.ascontiguousarray(w["context.weight"].transpose(2, 1, 0).reshape(-1, c.width))
        self._mix_bias = w["context.bias"]
        self._context_norm = w["context_norm.weight"], w["context_norm.bias"]
        self._basis = w["basis"]
        self._encoded = np.zeros((FEATURES_PER_FRAME * c.look_back, c.width), np.float32)
        self._linear = None
        if c.linear_share:
            assert model.linear.bias is not None
            self._linear = FrameConvolution(
                model, model.linear.weight, model.linear.bias, back=c.linear_back, ahead=c.look_ahead
            )
        self._finished = False

    def push(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "m n"]:
        """Displacements from the template of the frames that became complete."""
        assert not self._finished, "the stream is finished"
        x = to_array(features)
        out = [self._encode(x[start : start + self.BATCH]) for start in range(0, max(len(x), 1), self.BATCH)]
        return torch.from_numpy(np.concatenate(out))

    def finish(self) -> Float[Tensor, "m n"]:
        """The remaining frames, as if silence followed."""
        assert not self._finished, "the stream is finished"
        self._finished = True
        if self._linear:
            self._linear.finish()
        silence = np.zeros((FEATURES_PER_FRAME * self.config.look_ahead, self.config.width), np.float32)
        return torch.from_numpy(self._advance(silence))

    def _encode(self, features: Float[np.ndarray, "s d"]) -> Float[np.ndarray, "m n"]:
        if self._linear:
            self._linear.push(features)
        return self._advance(_norm(_gelu(features @ self._project + self._project_bias), *self._input_norm))

    def _advance(self, encoded: Float[np.ndarray, "s w"]) -> Float[np.ndarray, "m n"]:
        c = self.config
        past, around = FEATURES_PER_FRAME * c.look_back, FEATURES_PER_FRAME * (c.look_back + c.look_ahead)
        encoded = np.concatenate([self._encoded, encoded])
        frames = max(len(encoded) - around, 0) // FEATURES_PER_FRAME
        rows = FEATURES_PER_FRAME * frames
        self._encoded = encoded[rows:].copy()  # a view would keep all of a long piece
        if frames == 0:
            return np.zeros((0, c.outputs), np.float32)
        # Row i is rows i to i + around side by side, so that the convolution is one product.
        context = as_strided(encoded, (rows, (around + 1) * c.width), (c.width * 4, 4), writeable=False)
        mixed = _gelu(context @ self._mix + self._mix_bias)
        memory = _norm(encoded[past : past + rows] + mixed, *self._context_norm)
        coefficients = self._decoder.frames(memory)
        if self._linear:
            coefficients += np.float32(c.linear_share) * (self._linear.take(frames) - coefficients)
        return coefficients @ self._basis


class Decoder:
    """`Faceformer.step` for one sequence.

    Attention over a frame's two memory rows m0, m1 depends on their difference alone, since a softmax of two scores is
    a sigmoid of their difference:

        out = Wo (Wv m1 + bv) + bo + sum over heads of sigmoid((Wq x + bq) . Wk (m0 - m1) / sqrt(c)) Wo Wv (m0 - m1)

    `frames` computes for all frames at once a query vector, an offset and a direction for each head; `_step` is left
    with two small products. Keys and values lie in a ring buffer that is written twice, so that the window is one
    slice.
    """

    def __init__(self, model: Faceformer, style: Float[Tensor, "w"]):
        c = model.config
        self.config, self.frame = c, 0
        w = _weights(model)
        size = c.width // c.heads
        # The output, and what it adds to the next frame's input, in one product. Before the first frame it is zero.
        self._output = np.concatenate([w["output.weight"], w["project_previous.weight"] @ w["output.weight"]])
        self._output_bias = np.concatenate([w["output.bias"], w["project_previous.weight"] @ w["output.bias"]])
        self._previous = np.zeros(c.width, np.float32)
        self._tokens = model.positions.cpu().numpy() + to_array(style) + w["project_previous.bias"]
        scale = np.repeat(np.array([size**-0.5, 1, 1], np.float32), c.width)
        self._qkv, self._qkv_bias = w["self_qkv.weight"] * scale[:, None], w["self_qkv.bias"] * scale
        self._self_out, self._self_out_bias = w["self_out.weight"], w["self_out.bias"]
        self._norms = [(w[f"norm{i}.weight"], w[f"norm{i}.bias"]) for i in (1, 2, 3)]
        self._up, self._up_bias = w["up.weight"], w["up.bias"]
        self._down, self._down_bias = w["down.weight"], w["down.bias"]
        self._fold_cross_attention(w)
        age = np.arange(c.window - 1, -1, -1)
        self._bias = (-model.slopes.cpu().numpy()[:, None] * (age // c.period)).astype(np.float32)
        self._keys = np.zeros((c.heads, 2 * c.window, size), np.float32)
        self._values = np.zeros_like(self._keys)

    def _fold_cross_attention(self, w: dict[str, np.ndarray]) -> None:
        c = self.config
        size = c.width // c.heads
        heads = (c.heads, size, c.width)
        q, q_bias = w["cross_q.weight"].reshape(heads), w["cross_q.bias"].reshape(heads[:2])
        k, v = w["cross_kv.weight"].reshape(2, *heads)
        out = w["cross_out.weight"].reshape(c.width, *heads[:2]).transpose(1, 0, 2)
        v_bias = w["cross_kv.bias"][c.width :]  # the keys' bias has no effect: it is the same in both rows
        queries = np.einsum("hcx,hcm->hxm", q, k).reshape(-1, c.width), np.einsum("hc,hcm->hm", q_bias, k)
        self._queries = np.ascontiguousarray(np.concatenate(queries).T) * np.float32(size**-0.5)
        self._directions = np.ascontiguousarray((out @ v).reshape(-1, c.width).T)
        self._offset = np.ascontiguousarray((w["cross_out.weight"] @ w["cross_kv.weight"][c.width :]).T)
        self._offset_bias = w["cross_out.weight"] @ v_bias + w["cross_out.bias"]

    def frames(self, memory: Float[np.ndarray, "s w"]) -> Float[np.ndarray, "t k"]:
        """Coefficients of the next frames; two memory rows a frame."""
        c, t = self.config, len(memory) // FEATURES_PER_FRAME
        difference, second = memory[0::2] - memory[1::2], memory[1::2]
        products = difference @ self._queries
        queries = products[:, : c.heads * c.width].reshape(t, c.heads, c.width)
        constants = products[:, c.heads * c.width :]
        directions = (difference @ self._directions).reshape(t, c.heads, c.width)
        offsets = second @ self._offset + self._offset_bias
        out = np.empty((t, c.components), np.float32)
        for i in range(t):
            x = self._attend(self._previous + self._tokens[self.frame % c.period])
            weight = 0.5 + 0.5 * np.tanh(0.5 * (queries[i] @ x + constants[i]))  # a sigmoid that cannot overflow
            x = _norm(x + offsets[i] + weight @ directions[i], *self._norms[1])
            hidden = self._up @ x + self._up_bias
            x = _norm(x + self._down @ np.maximum(hidden, 0, out=hidden) + self._down_bias, *self._norms[2])
            output = self._output @ x + self._output_bias
            out[i], self._previous = output[: c.components], output[c.components :]
            self.frame += 1
        return out

    def _attend(self, x: Float[np.ndarray, "w"]) -> Float[np.ndarray, "w"]:
        """Self-attention over the window, which this frame enters."""
        c = self.config
        q, key, value = (self._qkv @ x + self._qkv_bias).reshape(3, c.heads, -1)
        at, count = self.frame % c.window, min(self.frame + 1, c.window)
        for ring, new in ((self._keys, key), (self._values, value)):
            ring[:, at] = new
            ring[:, at + c.window] = new
        end = at + 1 if count <= at + 1 else at + 1 + c.window
        scores = (self._keys[:, end - count : end] @ q[:, :, None])[:, :, 0] + self._bias[:, c.window - count :]
        scores -= np.maximum.reduce(scores, 1, keepdims=True)
        np.exp(scores, out=scores)
        heads = (scores[:, None] @ self._values[:, end - count : end])[:, 0] / np.add.reduce(scores, 1, keepdims=True)
        return _norm(x + self._self_out @ heads.reshape(-1) + self._self_out_bias, *self._norms[0])


class FrameConvolution:
    """A convolution over a model's frame features that come in pieces: `back` frames of past, `ahead` of future.

    Sound before and after is zeros.
    """

    def __init__(
        self, model: Faceformer, weight: Float[Tensor, "k d l"], bias: Float[Tensor, "k"], back: int, ahead: int
    ):
        self.back, self.ahead = back, ahead
        self._mean, self._std, self._bias = (to_array(x).copy() for x in (model.feature_mean, model.feature_std, bias))
        self._taps = to_array(weight).transpose(2, 1, 0).copy()
        self._half = np.zeros((0, len(self._mean)), np.float32)  # a feature whose frame is not complete
        self._frames = np.zeros((back, len(self._mean)), np.float32)

    def push(self, features: Float[np.ndarray, "s d"]) -> None:
        """More sound."""
        self._half = np.concatenate([self._half, features])
        whole = len(self._half) // 2 * 2
        frames = ((self._half[0:whole:2] + self._half[1:whole:2]) * np.float32(0.5) - self._mean) / self._std
        self._frames, self._half = np.concatenate([self._frames, frames]), self._half[whole:]

    def finish(self) -> None:
        """Silence follows."""
        self._frames = np.pad(self._frames, ((0, self.ahead), (0, 0)))

    @property
    def ready(self) -> int:
        """Frames that can be taken."""
        return max(len(self._frames) - self.back - self.ahead, 0)

    def take(self, count: int) -> Float[np.ndarray, "count k"]:
        """The convolution at the next `count` frames, which are then removed."""
        out = sum(self._frames[i : i + count] @ tap for i, tap in enumerate(self._taps)) + self._bias
        self._frames = self._frames[count:]
        return out


def to_array(x: Tensor) -> np.ndarray:
    """The tensor's own memory if it is float32 in main memory, else a copy."""
    return x.detach().cpu().float().numpy()


def _weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Copies: training may continue while a stream lasts."""
    return {name: to_array(value).copy() for name, value in model.state_dict().items()}


def _norm(
    x: Float[np.ndarray, "*n w"], gain: Float[np.ndarray, "w"], bias: Float[np.ndarray, "w"]
) -> Float[np.ndarray, "*n w"]:
    """Layer normalisation with torch's epsilon."""
    x = x - np.add.reduce(x, -1, keepdims=True) / np.float32(x.shape[-1])
    variance = np.add.reduce(x * x, -1, keepdims=True) / np.float32(x.shape[-1])
    return x * (gain / np.sqrt(variance + np.float32(1e-5))) + bias


def _gelu(x: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n w"]:
    return F.gelu(torch.from_numpy(x)).numpy()
