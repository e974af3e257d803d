"""Speech to motion: two Faceformers (Fan et al. 2022), to 64 expression parameters and to 478 landmarks, and a closure that both obey.

b sequences, t frames at 25 fps, 2t features at 50 Hz, d features, w width (D), k components, n outputs (64, or 478 x 3 flattened).

Frame i's input is what was predicted for frame i - 1; causal self-attention looks back over a window of frames, cross-attention looks at the
sound of frame i alone, features 2i and 2i + 1. Decoding keeps keys and values, so t frames cost O(t), and because the window belongs to the
model the cache is bounded: any length in constant memory, with the same numbers as a decoding without a cache.

What differs from the paper's Faceformer, and why (docs/equations.md lists it):
- A learned convolution lets a feature see `look_ahead` frames of coming sound and `look_back` frames of past sound, since lips move before
  they are heard; `look_ahead` is the model's latency. The alignment mask itself is as published.
- Self-attention stops at `window` frames. The published bias never quite does: its gentlest head still weighs e^(-1/256) a period.
- Outputs are k coefficients of a fixed basis, which holds the units and the mouth's importance, instead of n free numbers: there are 1434
  landmark coordinates and minutes of speech to learn from.
- The 20 identity frames share one linear map (their order is random) after a projection on the principal faces of the training speakers.
- What leaves is the mean of the decoder's answer and a linear one, a ridge regression from the features about a frame: of few speakers each
  learns something else wrong, and their mean is nearer to unseen speakers than either (docs/results.md).

A regression to the mean hardly ever closes a mouth: what is left of a p, b or m after averaging is a narrow gap. So `LipClosure` says, frame by
frame, how surely the lips are closed, and where it is sure it commands the gap between them.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.lib.stride_tricks import as_strided
from torch import Tensor, nn

from hicode.errors import FileFormatError
from hicode.motion import EXPRESSION_DIM, LOWER_LIP_INNER, N_LANDMARKS, UPPER_LIP_INNER
from hicode.speech.encoder import AudioEncoder, Window, create_encoder

IDENTITY_FRAMES = 20


@dataclass(frozen=True)
class FaceformerConfig:
    """The shape of one Faceformer; a file records it."""

    feature_dim: int = 384  # d, of the speech encoder
    outputs: int = EXPRESSION_DIM  # n
    components: int = 32  # k, coefficients of the output basis
    width: int = 64  # D; the feed-forward layer is twice as wide
    heads: int = 4
    period: int = 25  # frames, of positions and of the bias: one second
    window: int = 100  # frames that self-attention looks back, its own included
    look_ahead: int = 1  # frames of coming sound a frame may hear
    look_back: int = 4  # frames of past sound the convolution adds to those that self-attention remembers
    style_components: int = 0  # principal faces that 20 identity frames are projected on; 0: no style input
    dropout: float = 0.1
    linear_share: float = 0.0  # of what leaves, the linear answer's; 0: there is none
    linear_back: int = 3  # frames of past sound that it hears


class Faceformer(nn.Module):
    """One post-norm decoder layer between a sound and a basis of motion. Untrained, it predicts no displacement at all."""

    def __init__(self, config: FaceformerConfig):
        super().__init__()
        self.config = c = config
        assert c.width % c.heads == 0 and c.width % 2 == 0, c
        self.register_buffer("feature_mean", torch.zeros(c.feature_dim))
        self.register_buffer("feature_std", torch.ones(c.feature_dim))
        self.register_buffer("basis", torch.eye(c.components, c.outputs))
        # How far the speaker moves whom this model imitates, in training's metric: what another speaker's gain is relative to.
        self.register_buffer("amplitude", torch.ones(()))
        if c.style_components:
            self.register_buffer("style_mean", torch.zeros(c.outputs))
            self.register_buffer("style_basis", torch.zeros(c.style_components, c.outputs))
            self.style = nn.Linear(c.style_components, c.width, bias=False)
            nn.init.zeros_(self.style.weight)
        self.start = nn.Parameter(torch.zeros(c.width))
        self.hear = nn.Linear(c.feature_dim, c.width)
        self.hear_norm = nn.LayerNorm(c.width)
        self.context = nn.Conv1d(c.width, c.width, 2 * (c.look_back + c.look_ahead) + 1)
        self.context_norm = nn.LayerNorm(c.width)
        self.remember = nn.Linear(c.components, c.width)
        self.self_qkv, self.self_out = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.cross_q, self.cross_kv, self.cross_out = (nn.Linear(c.width, m * c.width) for m in (1, 2, 1))
        self.up, self.down = nn.Linear(c.width, 2 * c.width), nn.Linear(2 * c.width, c.width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c.width), nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.output = nn.Linear(c.width, c.components)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.dropout = nn.Dropout(c.dropout)
        if c.linear_share:
            # Found in closed form (training.speech.fit_linear), not by descent.
            self.linear = nn.Conv1d(c.feature_dim, c.components, c.linear_back + 1 + c.look_ahead).requires_grad_(False)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        self.register_buffer("positions", periodic_positions(c.period, c.width), persistent=False)
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, c.heads + 1) / c.heads), persistent=False)

    # --- sound ---

    def listen(self, features: Float[Tensor, "b s d"]) -> Float[Tensor, "b s w"]:
        """Each feature on its own, projected. A second step, `_contextual`, mixes neighbours."""
        x = (features - self.feature_mean) / self.feature_std
        return self.hear_norm(F.gelu(self.hear(x)))

    def _contextual(self, heard: Float[Tensor, "b s+r w"]) -> Float[Tensor, "b s w"]:
        """Rows with 2 look_back rows of past and 2 look_ahead rows of future around them; nothing was heard outside the sound: zeros."""
        past, future = 2 * self.config.look_back, 2 * self.config.look_ahead
        mixed = F.gelu(self.context(heard.transpose(1, 2)).transpose(1, 2))
        return self.context_norm(heard[:, past : heard.shape[1] - future] + self.dropout(mixed))

    def memory(self, features: Float[Tensor, "b 2*t d"]) -> Float[Tensor, "b 2*t w"]:
        """What cross-attention reads: every feature in its context."""
        return self._contextual(
            F.pad(self.listen(features), (0, 0, 2 * self.config.look_back, 2 * self.config.look_ahead))
        )

    def frame_features(self, features: Float[Tensor, "b 2*t d"]) -> Float[Tensor, "b t d"]:
        """Standardised, the mean of a frame's two: what the linear answer hears."""
        return ((features - self.feature_mean) / self.feature_std).unflatten(1, (-1, 2)).mean(2)

    def linear_answer(self, frames: Float[Tensor, "b l+t+a d"]) -> Float[Tensor, "b t k"]:
        """Coefficients of t frames from `frame_features` with linear_back frames before them and look_ahead after them; zeros outside the sound."""
        return self.linear(frames.transpose(1, 2)).transpose(1, 2)

    def predict(self, features: Float[Tensor, "b 2*t d"], style: Float[Tensor, "*b w"]) -> Float[Tensor, "b t k"]:
        """What a whole sound moves, free-running: what a stream gives, drained."""
        decoded = self.rollout(self.memory(features), style)
        if not self.config.linear_share:
            return decoded
        frames = F.pad(self.frame_features(features), (0, 0, self.config.linear_back, self.config.look_ahead))
        return torch.lerp(decoded, self.linear_answer(frames), self.config.linear_share)

    def identity_style(self, frames: Float[Tensor, "*b 20 478 3"] | None) -> Float[Tensor, "*b w"]:
        """What every frame's input is told of the speaker: from identity frames where the model has a style input, else a learned start."""
        if not self.config.style_components or frames is None:
            return self.start
        return self.start + self.style(self.project_identity(frames))

    def project_identity(self, frames: Float[Tensor, "*b 20 478 3"]) -> Float[Tensor, "*b s"]:
        """Coefficients of the training speakers' principal faces, averaged over the frames."""
        return ((frames.flatten(-2) - self.style_mean) @ self.style_basis.T).mean(-2)

    # --- motion ---

    def forward(
        self, memory: Float[Tensor, "b 2*t w"], previous: Float[Tensor, "b t k"], style: Float[Tensor, "*b w"]
    ) -> Float[Tensor, "b t k"]:
        """All frames at once, given what precedes each of them: `previous[:, i]` is frame i - 1's coefficients, zero at the beginning."""
        t = previous.shape[1]
        frame = torch.arange(t, device=previous.device)
        distance = frame[:, None] - frame
        bias = -self.slopes[:, None, None] * (distance // self.config.period)
        bias = bias.masked_fill((distance < 0) | (distance >= self.config.window), float("-inf"))
        x = self._token(previous, frame, style)
        q, k, v = self.self_qkv(x).chunk(3, -1)
        x = self._attended(
            x, F.scaled_dot_product_attention(self._heads(q), self._heads(k), self._heads(v), attn_mask=bias)
        )
        return self._answer(x, memory)

    def rollout(self, memory: Float[Tensor, "b 2*t w"], style: Float[Tensor, "*b w"]) -> Float[Tensor, "b t k"]:
        """The decoder's answer, free-running: each frame given its own previous one."""
        state = DecoderState(self, memory.shape[0], memory.device)
        frames = [self.step(memory[:, 2 * i : 2 * i + 2], style, state) for i in range(memory.shape[1] // 2)]
        return torch.stack(frames, 1) if frames else memory.new_zeros(memory.shape[0], 0, self.config.components)

    def step(
        self, memory: Float[Tensor, "b 2 w"], style: Float[Tensor, "*b w"], state: "DecoderState"
    ) -> Float[Tensor, "b k"]:
        """The next frame; `state` moves on."""
        frame = torch.tensor([state.frame % self.config.period])
        x = self._token(state.previous[:, None], frame, style)
        q, k, v = (self._heads(z) for z in self.self_qkv(x).chunk(3, -1))
        state.remember(k, v)
        age = torch.arange(state.keys.shape[2] - 1, -1, -1)
        bias = -self.slopes[:, None, None] * (age // self.config.period)
        x = self._attended(x, F.scaled_dot_product_attention(q, state.keys, state.values, attn_mask=bias))
        state.previous = self._answer(x, memory)[:, 0]
        return state.previous

    def _token(self, previous: Tensor, frame: Tensor, style: Tensor) -> Float[Tensor, "b t w"]:
        style = style if style.dim() == 1 else style[:, None]
        return self.remember(previous) + style + self.positions[frame % self.config.period]

    def _attended(self, x: Tensor, heads: Float[Tensor, "b h t c"]) -> Tensor:
        return self.norm1(x + self.dropout(self.self_out(heads.transpose(1, 2).flatten(2))))

    def _answer(self, x: Float[Tensor, "b t w"], memory: Float[Tensor, "b 2*t w"]) -> Float[Tensor, "b t k"]:
        """Cross-attention under the alignment mask, as an attention over two rows; feed-forward; output."""
        keys, values = (
            z.unflatten(1, (-1, 2)).unflatten(-1, (self.config.heads, -1)) for z in self.cross_kv(memory).chunk(2, -1)
        )
        q = self.cross_q(x).unflatten(-1, (self.config.heads, -1))
        scores = torch.einsum("bthc,btshc->btsh", q, keys) / q.shape[-1] ** 0.5
        heard = torch.einsum("btsh,btshc->bthc", scores.softmax(2), values).flatten(2)
        x = self.norm2(x + self.dropout(self.cross_out(heard)))
        x = self.norm3(x + self.dropout(self.down(self.dropout(F.relu(self.up(x))))))
        return self.output(x)

    def _heads(self, x: Float[Tensor, "b t w"]) -> Float[Tensor, "b h t c"]:
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)


class DecoderState:
    """What free-running decoding remembers: the last frame's coefficients, and keys and values of the window."""

    def __init__(self, model: Faceformer, batch: int, device: torch.device | str = "cpu"):
        c = model.config
        self.frame, self.window = 0, c.window
        self.previous = torch.zeros(batch, c.components, device=device)
        self.keys = torch.zeros(batch, c.heads, 0, c.width // c.heads, device=device)
        self.values = self.keys

    def remember(self, key: Float[Tensor, "b h 1 c"], value: Float[Tensor, "b h 1 c"]) -> None:
        keep = max(self.keys.shape[2] - self.window + 1, 0)
        self.keys = torch.cat([self.keys[:, :, keep:], key], 2)
        self.values = torch.cat([self.values[:, :, keep:], value], 2)
        self.frame += 1


def periodic_positions(period: int, width: int) -> Float[Tensor, "period width"]:
    """Sinusoidal positions of one period (Vaswani et al. 2017), which repeats: positions never leave what was trained."""
    frame = torch.arange(period)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([torch.sin(frame * frequency), torch.cos(frame * frequency)], -1).flatten(1)


class _Decoding:
    """`Faceformer.step` for one sequence in plain numpy, weights folded: a frame of so narrow a network is the overhead of its operations.

    Attention over the two rows m0, m1 of a frame's sound depends on their difference alone: softmax of two is a sigmoid of the difference of scores, and

        out = Wo (Wv m1 + bv) + bo + sum over heads h of sigmoid((Wq_h x + bq_h) . Wk_h (m0 - m1) / sqrt(c)) Wo_h Wv_h (m0 - m1)

    so `frames` makes, of all frames at once, a vector that x is multiplied with, an offset and a direction for each head, and `step` is left with
    two small products. Keys and values of the window lie in a ring that is written twice, so that the window is always one piece, oldest first.
    """

    def __init__(self, model: Faceformer, style: Float[Tensor, "w"]):
        c = model.config
        self.config, self.frame = c, 0
        w = _weights(model)
        size = c.width // c.heads
        heads = (c.heads, size, c.width)
        # What is said next to what it adds to the next frame's input: one product. Before the first frame, nothing was said.
        self._say = np.concatenate([w["output.weight"], w["remember.weight"] @ w["output.weight"]])
        self._say_bias = np.concatenate([w["output.bias"], w["remember.weight"] @ w["output.bias"]])
        self._said = np.zeros(c.width, np.float32)
        self._tokens = model.positions.cpu().numpy() + _array(style) + w["remember.bias"]
        share = np.repeat(np.float32([size**-0.5, 1, 1]), c.width)
        self._qkv, self._qkv_bias = w["self_qkv.weight"] * share[:, None], w["self_qkv.bias"] * share
        self._self_out, self._self_out_bias = w["self_out.weight"], w["self_out.bias"]
        self._norms = [(w[f"norm{i}.weight"], w[f"norm{i}.bias"]) for i in (1, 2, 3)]
        self._up, self._up_bias, self._down, self._down_bias = (
            w["up.weight"],
            w["up.bias"],
            w["down.weight"],
            w["down.bias"],
        )

        q, q_bias = w["cross_q.weight"].reshape(heads), w["cross_q.bias"].reshape(heads[:2])
        k, v = w["cross_kv.weight"].reshape(2, *heads)
        out = w["cross_out.weight"].reshape(c.width, *heads[:2]).transpose(1, 0, 2)
        v_bias = w["cross_kv.bias"][c.width :]  # the keys' takes no part: it is the same in both
        questions = np.einsum("hcx,hcm->hxm", q, k).reshape(-1, c.width), np.einsum("hc,hcm->hm", q_bias, k)
        self._ask = np.ascontiguousarray(np.concatenate(questions).T) * np.float32(size**-0.5)
        self._directions = np.ascontiguousarray((out @ v).reshape(-1, c.width).T)
        self._offset = np.ascontiguousarray((w["cross_out.weight"] @ w["cross_kv.weight"][c.width :]).T)
        self._offset_bias = w["cross_out.weight"] @ v_bias + w["cross_out.bias"]

        age = np.arange(c.window - 1, -1, -1)
        self._bias = (-model.slopes.cpu().numpy()[:, None] * (age // c.period)).astype(np.float32)
        self._keys = np.zeros((c.heads, 2 * c.window, size), np.float32)
        self._values = np.zeros_like(self._keys)

    def frames(self, memory: Float[np.ndarray, "2*t w"]) -> Float[np.ndarray, "t k"]:
        """Coefficients of the next frames."""
        c, t = self.config, len(memory) // 2
        difference, second = memory[0::2] - memory[1::2], memory[1::2]
        asked = difference @ self._ask
        questions = asked[:, : c.heads * c.width].reshape(t, c.heads, c.width)
        constants = asked[:, c.heads * c.width :]
        directions = (difference @ self._directions).reshape(t, c.heads, c.width)
        offsets = second @ self._offset + self._offset_bias
        out = np.empty((t, c.components), np.float32)
        for i in range(t):
            x = self._attend(self._said + self._tokens[self.frame % c.period])
            share = 0.5 + 0.5 * np.tanh(0.5 * (questions[i] @ x + constants[i]))  # a sigmoid that does not overflow
            x = _norm(x + offsets[i] + share @ directions[i], *self._norms[1])
            hidden = self._up @ x + self._up_bias
            x = _norm(x + self._down @ np.maximum(hidden, 0, out=hidden) + self._down_bias, *self._norms[2])
            said = self._say @ x + self._say_bias
            out[i], self._said = said[: c.components], said[c.components :]
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


def _array(x: Tensor) -> np.ndarray:
    """The tensor's own memory, where it is float32 in main memory."""
    return x.detach().cpu().float().numpy()


def _weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Copies: training may go on while a stream lasts."""
    return {name: _array(value).copy() for name, value in model.state_dict().items()}


def _norm(
    x: Float[np.ndarray, "*n w"], gain: Float[np.ndarray, "w"], bias: Float[np.ndarray, "w"]
) -> Float[np.ndarray, "*n w"]:
    """Layer normalisation with torch's epsilon."""
    x = x - np.add.reduce(x, -1, keepdims=True) / np.float32(x.shape[-1])
    variance = np.add.reduce(x * x, -1, keepdims=True) / np.float32(x.shape[-1])
    return x * (gain / np.sqrt(variance + np.float32(1e-5))) + bias


def _gelu(x: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n w"]:
    return F.gelu(torch.from_numpy(x)).numpy()


class _Context:
    """Frame features as they come, with what lies `back` frames before and `ahead` after the frames that are complete; silence is zeros.

    `answer` is a convolution over them, one matrix a frame of its reach."""

    def __init__(
        self, model: Faceformer, weight: Float[Tensor, "k d l+1+a"], bias: Float[Tensor, "k"], back: int, ahead: int
    ):
        self.back, self.ahead = back, ahead
        self._mean, self._std, self._bias = (_array(x).copy() for x in (model.feature_mean, model.feature_std, bias))
        self._weight = _array(weight).transpose(2, 1, 0).copy()
        self._half = np.zeros((0, len(self._mean)), np.float32)  # a feature whose frame is not complete
        self._frames = np.zeros((back, len(self._mean)), np.float32)

    def push(self, features: Float[np.ndarray, "s d"]) -> None:
        self._half = np.concatenate([self._half, features])
        whole = len(self._half) // 2 * 2
        frames = ((self._half[0:whole:2] + self._half[1:whole:2]) * np.float32(0.5) - self._mean) / self._std
        self._frames, self._half = np.concatenate([self._frames, frames]), self._half[whole:]

    def finish(self) -> None:
        self._frames = np.pad(self._frames, ((0, self.ahead), (0, 0)))

    @property
    def ready(self) -> int:
        return max(len(self._frames) - self.back - self.ahead, 0)

    def answer(self, frames: int) -> Float[np.ndarray, "frames k"]:
        """What the convolution says of the next frames, which are then taken."""
        out = sum(self._frames[i : i + frames] @ tap for i, tap in enumerate(self._weight)) + self._bias
        self._frames = self._frames[frames:]
        return out


class FaceformerStream:
    """Features in pieces of any size, displacements out as soon as `look_ahead` frames of sound have followed.

    In numpy, from the model's weights as they are when the stream begins; `Faceformer.predict` says in torch what comes out."""

    AT_ONCE = 500  # features: bounds the memory in between

    def __init__(self, model: Faceformer, style: Float[Tensor, "w"]):
        c = self.config = model.config
        self._decoding = _Decoding(model, style)
        w = _weights(model)
        hear = w["hear.weight"] / w["feature_std"]
        self._hear, self._hear_bias = np.ascontiguousarray(hear.T), w["hear.bias"] - hear @ w["feature_mean"]
        self._hear_norm = w["hear_norm.weight"], w["hear_norm.bias"]
        self._mix, self._mix_bias = (
            np.ascontiguousarray(w["context.weight"].transpose(2, 1, 0).reshape(-1, c.width)),
            w["context.bias"],
        )
        self._mix_norm = w["context_norm.weight"], w["context_norm.bias"]
        self._basis = w["basis"]
        self._heard = np.zeros((2 * c.look_back, c.width), np.float32)
        self._linear = (
            _Context(model, model.linear.weight, model.linear.bias, c.linear_back, c.look_ahead)
            if c.linear_share
            else None
        )
        self._finished = False

    def push(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "m n"]:
        """Displacements from the template of the frames that became complete."""
        assert not self._finished, "the stream is finished"
        features = _array(features)
        out = [self._listen(features[at : at + self.AT_ONCE]) for at in range(0, max(len(features), 1), self.AT_ONCE)]
        return torch.from_numpy(np.concatenate(out))

    def finish(self) -> Float[Tensor, "m n"]:
        """The remaining frames, as if nothing more were heard."""
        assert not self._finished, "the stream is finished"
        self._finished = True
        if self._linear:
            self._linear.finish()
        return torch.from_numpy(self._advance(np.zeros((2 * self.config.look_ahead, self.config.width), np.float32)))

    def _listen(self, features: Float[np.ndarray, "s d"]) -> Float[np.ndarray, "m n"]:
        if self._linear:
            self._linear.push(features)
        return self._advance(_norm(_gelu(features @ self._hear + self._hear_bias), *self._hear_norm))

    def _advance(self, heard: Float[np.ndarray, "s w"]) -> Float[np.ndarray, "m n"]:
        c = self.config
        around = 2 * (c.look_back + c.look_ahead)
        heard = np.concatenate([self._heard, heard])
        frames = max(len(heard) - around, 0) // 2
        self._heard = heard[2 * frames :].copy()  # a view would keep all of a long piece
        if frames == 0:
            return np.zeros((0, c.outputs), np.float32)
        # Row i is rows i to i + around side by side, so that the context's convolution is one product.
        rows = as_strided(heard, (2 * frames, (around + 1) * c.width), (c.width * 4, 4), writeable=False)
        mixed = _gelu(rows @ self._mix + self._mix_bias)
        coefficients = self._decoding.frames(_norm(heard[2 * c.look_back :][: 2 * frames] + mixed, *self._mix_norm))
        if self._linear:
            coefficients += np.float32(c.linear_share) * (self._linear.answer(frames) - coefficients)
        return coefficients @ self._basis


class LipClosure(nn.Module):
    """How surely the lips are closed, by a logistic regression on the features about a frame, and the command that closes them.

    expression  "64"     what closing changes, per dm of gap: how people close, from tracked speech. Moves the inner lips (13, 14) apart by one
    landmarks   "478 3"  dm a unit, in the frontal plane; the landmarks' is the expression's through the head model, so that both stay one mouth

    A command is absent below the odds `from_odds` and full from `to_odds` on; and of lips that the Faceformers hold apart: full where their gap is
    under the first of `narrow`, absent from the second on, shares of the speaker's usual gap (None: whatever it is). Both look for closures in the
    same sound with different errors, and a mouth that is wrongly shut in an open vowel is what is seen. A file records all three; files from before
    have these defaults.
    """

    LEAST_USUAL_GAP = 0.02  # dm, so that `narrow` means something to who hardly opens the mouth

    def __init__(
        self,
        feature_dim: int,
        back: int,
        ahead: int,
        from_odds: float = 0.25,
        to_odds: float = 0.55,
        narrow: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.back, self.ahead, self.from_odds, self.to_odds = back, ahead, from_odds, to_odds
        self.narrow = tuple(narrow) if narrow else None
        self.register_buffer("weight", torch.zeros(1, feature_dim, back + 1 + ahead))
        self.register_buffer("bias", torch.zeros(1))
        self.register_buffer("expression", torch.zeros(EXPRESSION_DIM))
        self.register_buffer("landmarks", torch.zeros(N_LANDMARKS, 3))

    @property
    def config(self) -> dict:
        """What a file records beside the tensors."""
        return {
            "back": self.back,
            "ahead": self.ahead,
            "from_odds": self.from_odds,
            "to_odds": self.to_odds,
            "narrow": self.narrow,
        }

    def odds(self, frames: Float[Tensor, "l+t+a d"]) -> Float[Tensor, "t"]:
        """Probability of closed lips in t frames, from `Faceformer.frame_features` with `back` frames before and `ahead` after them."""
        return torch.sigmoid(F.conv1d(frames.T[None], self.weight, self.bias)[0, 0])

    def command(
        self,
        odds: Float[Tensor, "t"],
        expression: Float[Tensor, "t 64"],
        landmarks: Float[Tensor, "t 478 3"],
        closed_gap: float,
        usual_gap: float,
    ) -> tuple[Float[Tensor, "t 64"], Float[Tensor, "t 478 3"]]:
        """The same motion with its gap drawn to `closed_gap` (dm) where the lips are to be closed; nothing ever opens. `usual_gap`: the speaker's, dm."""
        x = ((odds - self.from_odds) / (self.to_odds - self.from_odds)).clamp(0, 1)
        gap = lip_gap(landmarks)
        if self.narrow:
            full, none = (share * max(usual_gap, self.LEAST_USUAL_GAP) for share in self.narrow)
            x = x * ((none - gap) / (none - full)).clamp(0, 1)
        change = (x * x * (3 - 2 * x) * (closed_gap - gap)).clamp(max=0)
        return expression + change[:, None] * self.expression, landmarks + change[:, None, None] * self.landmarks


def lip_gap(landmarks: Float[Tensor, "*t 478 3"]) -> Float[Tensor, "*t"]:
    """Height between the inner lips in the frontal plane, dm. Not their distance in space: upper and lower lip lie at different depths even when
    they touch (.02-.03 of the eyes' distance in real tracks), and the depth of a landmark is half a guess."""
    return landmarks[..., UPPER_LIP_INNER, 1] - landmarks[..., LOWER_LIP_INNER, 1]


class SpeechModels:
    """The pair that makes a person speak: generic Faceformers, and what is the subject's own.

    encoder              name of the speech encoder whose features they take
    expression_template  "64"        the subject's mean over training frames
    landmark_template    "478 3"     likewise, head units
    identity_frames      "20 478 3"  frames of the training part, drawn with a fixed seed
    expression_gain, landmark_gain   how much larger than the average speaker's the subject's movements are
    closure              when lips close, None in avatars from before; closed_gap: what tracking sees of the subject's closed lips, dm
    window               of the encoder whose features the pair learned from, None: the encoder's only one
    """

    def __init__(
        self,
        expression: Faceformer,
        landmarks: Faceformer,
        encoder: str,
        expression_template: Float[Tensor, "64"],
        landmark_template: Float[Tensor, "478 3"],
        identity_frames: Float[Tensor, "20 478 3"],
        expression_gain: float = 1.0,
        landmark_gain: float = 1.0,
        closure: LipClosure | None = None,
        closed_gap: float = 0.006,
        window: Window | None = None,
    ):
        assert expression.config.outputs == EXPRESSION_DIM and landmarks.config.outputs == 3 * N_LANDMARKS
        assert expression.config.feature_dim == landmarks.config.feature_dim
        self.expression, self.landmarks, self.encoder = expression.eval(), landmarks.eval(), encoder
        self.expression_template, self.landmark_template = expression_template, landmark_template
        self.identity_frames = identity_frames
        self.expression_gain, self.landmark_gain = expression_gain, landmark_gain
        self.closure, self.closed_gap, self.window = closure, closed_gap, window

    @property
    def feature_dim(self) -> int:
        return self.expression.config.feature_dim

    @property
    def look_ahead(self) -> int:
        """Frames of sound that must follow a frame before it is known, beside the encoder's own latency."""
        ahead = self.closure.ahead if self.closure else 0
        return max(self.expression.config.look_ahead, self.landmarks.config.look_ahead, ahead)

    @property
    def usual_gap(self) -> float:
        """Between the lips of the subject's mean face, dm."""
        return float(lip_gap(self.landmark_template))

    def encoder_for(self, path: str | Path | None = None) -> AudioEncoder:
        """The encoder whose features the pair takes, in the window that it learned from."""
        return create_encoder(self.encoder, path, self.window)

    def predict(self, features: Float[Tensor, "2*t d"]) -> tuple[Float[Tensor, "t 64"], Float[Tensor, "t 478 3"]]:
        """Expression and canonical landmarks of every frame of a sound: the stream, drained."""
        stream = self.stream()
        parts = stream.push(features), stream.finish()
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def stream(self) -> "SpeechStream":
        return SpeechStream(self)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON-able config), from which `from_state` makes the same pair."""
        tensors = {f"expression.{k}": v for k, v in self.expression.state_dict().items()}
        tensors |= {f"landmarks.{k}": v for k, v in self.landmarks.state_dict().items()}
        tensors |= {
            "expression_template": self.expression_template,
            "landmark_template": self.landmark_template,
            "identity_frames": self.identity_frames,
        }
        config = {
            "encoder": self.encoder,
            "expression": asdict(self.expression.config),
            "landmarks": asdict(self.landmarks.config),
            "expression_gain": float(self.expression_gain),
            "landmark_gain": float(self.landmark_gain),
            "window": list(self.window) if self.window else None,
        }
        if self.closure is not None:
            tensors |= {f"closure.{k}": v for k, v in self.closure.state_dict().items()}
            config |= {"closure": self.closure.config, "closed_gap": float(self.closed_gap)}
        return tensors, config

    @staticmethod
    def from_state(tensors: dict[str, Tensor], config: dict) -> "SpeechModels":
        """The inverse of `state`. Half-precision tensors are read as float32. Raises FileFormatError where something is missing."""
        try:
            models = []
            for part in ("expression", "landmarks"):
                model = Faceformer(FaceformerConfig(**config[part]))
                model.load_state_dict(
                    {k.removeprefix(part + "."): v.float() for k, v in tensors.items() if k.startswith(part + ".")}
                )
                models.append(model)
            closure = None
            if "closure" in config:
                closure = LipClosure(models[0].config.feature_dim, **config["closure"])
                closure.load_state_dict(
                    {k.removeprefix("closure."): v.float() for k, v in tensors.items() if k.startswith("closure.")}
                )
            window = Window(*config["window"]) if config["window"] else None
            names = ("expression_template", "landmark_template", "identity_frames")
            own = [tensors[name].float() for name in names]
            gains = config["expression_gain"], config["landmark_gain"]
            return SpeechModels(
                *models, config["encoder"], *own, *gains, closure, config.get("closed_gap", 0.006), window
            )
        except (KeyError, TypeError, RuntimeError) as error:
            raise FileFormatError(
                f"The speech models are damaged or from another version ({error!s:.200}). Train the avatar anew."
            ) from error


class SpeechStream:
    """Features in, motion out: both Faceformers side by side, in step."""

    def __init__(self, models: SpeechModels):
        self.models = models
        style = models.landmarks.identity_style(models.identity_frames).detach()
        self._expression = FaceformerStream(models.expression, models.expression.identity_style(None).detach())
        self._landmarks = FaceformerStream(models.landmarks, style)
        closure = models.closure
        self._closure = (
            _Context(models.expression, closure.weight, closure.bias, closure.back, closure.ahead) if closure else None
        )
        self._waiting = (torch.zeros(0, EXPRESSION_DIM), torch.zeros(0, 3 * N_LANDMARKS), torch.zeros(0))
        self._last: Tensor | None = None
        self._received = 0

    def push(self, features: Float[Tensor, "s d"]) -> tuple[Float[Tensor, "m 64"], Float[Tensor, "m 478 3"]]:
        """Motion of the frames that became complete."""
        dim = self.models.feature_dim
        assert features.shape[-1] == dim, (
            f"features have {features.shape[-1]} dimensions, the speech models take {dim} ({self.models.encoder})"
        )
        self._received += len(features)
        if len(features):
            self._last = features[-1:]
        return self._together(self._expression.push(features), self._landmarks.push(features), self._hear(features))

    def finish(self) -> tuple[Float[Tensor, "m 64"], Float[Tensor, "m 478 3"]]:
        """The remaining frames; a last half frame is filled up by repeating its feature."""
        expression, landmarks, odds = [], [], []
        if self._received % 2:
            expression.append(self._expression.push(self._last))
            landmarks.append(self._landmarks.push(self._last))
            odds.append(self._hear(self._last))
        expression.append(self._expression.finish())
        landmarks.append(self._landmarks.finish())
        if self._closure:
            self._closure.finish()
        odds.append(self._closed())
        return self._together(torch.cat(expression), torch.cat(landmarks), torch.cat(odds))

    def _hear(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "m"]:
        if self._closure:
            self._closure.push(_array(features))
        return self._closed()

    def _closed(self) -> Float[Tensor, "m"]:
        if not self._closure or not self._closure.ready:
            return torch.zeros(0)
        return torch.from_numpy(self._closure.answer(self._closure.ready)[:, 0]).sigmoid()

    def _together(self, expression: Tensor, landmarks: Tensor, odds: Tensor) -> tuple[Tensor, Tensor]:
        coming = [torch.cat(pair) for pair in zip(self._waiting, (expression, landmarks, odds))]
        ready = min(len(x) for x in (coming if self._closure else coming[:2]))
        self._waiting = tuple(x[ready:] for x in coming)
        expression, landmarks, odds = (x[:ready] for x in coming)
        m = self.models
        expression = m.expression_template + m.expression_gain * expression
        landmarks = m.landmark_template + m.landmark_gain * landmarks.unflatten(1, (N_LANDMARKS, 3))
        if m.closure is None:
            return expression, landmarks
        return m.closure.command(odds, expression, landmarks, m.closed_gap, m.usual_gap)
