"""Faceformer: speech features to motion (Fan et al. 2022; HiCoDe, Eqs 13-14).

b sequences, t frames at 25 fps, 2t features at 50 Hz, d feature dimensions, w width (the paper's D), k coefficients,
n outputs (64 expression parameters, or 478 x 3 landmark coordinates flattened).

The input of frame i is the prediction for frame i - 1. Causal self-attention looks back over a window of frames.
Cross-attention reads the sound of frame i alone, features 2i and 2i + 1. Decoding keeps keys and values of the window:
any length takes constant memory and gives the same numbers as decoding without a cache.

Differences from the published Faceformer:

- A convolution lets a feature see `look_back` frames of past and `look_ahead` frames of coming sound, since lips move
  before the sound. `look_ahead` is the model's latency. The alignment mask is as published.
- Self-attention stops at `window` frames. The published bias never quite does.
- Outputs are k coefficients of a fixed PCA basis instead of n free numbers: there are 1434 landmark coordinates and
only
  minutes of speech to learn from.
- The 20 identity frames share one linear map, since their order is random, after projection on the principal faces of
  the training speakers.
- The prediction is the mean of the decoder's and of a ridge regression's from the features around a frame. With few
  training speakers the two err differently, and their mean is nearer to unseen speakers than either.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hicode.audio import FEATURES_PER_FRAME
from hicode.motion import EXPRESSION_DIM


@dataclass(frozen=True)
class FaceformerConfig:
    """The shape of one Faceformer; a file records it."""

    feature_dim: int = 384  # d, of the speech encoder
    outputs: int = EXPRESSION_DIM  # n
    components: int = 32  # k, coefficients of the output basis
    width: int = 64  # w; the feed-forward layer is twice as wide
    heads: int = 4
    period: int = 25  # frames, of positions and of the attention bias: one second
    window: int = 100  # frames that self-attention sees, its own included
    look_ahead: int = 1  # frames of coming sound that a frame sees
    look_back: int = 4  # frames of past sound that the convolution sees
    style_components: int = 0  # principal faces that the identity frames are projected on; 0: no style input
    dropout: float = 0.1
    linear_share: float = 0.0  # weight of the linear prediction in the output; 0: there is none
    linear_back: int = 3  # frames of past sound that the linear prediction sees


class Faceformer(nn.Module):
    """One post-norm decoder layer between speech features and a basis of motion.

    Untrained, it predicts no displacement.
    """

    def __init__(self, config: FaceformerConfig):
        super().__init__()
        self.config = c = config
        assert c.width % c.heads == 0 and c.width % 2 == 0, c
        self.feature_mean: Tensor
        self.feature_std: Tensor
        self.basis: Tensor
        self.amplitude: Tensor
        self.register_buffer("feature_mean", torch.zeros(c.feature_dim))
        self.register_buffer("feature_std", torch.ones(c.feature_dim))
        self.register_buffer("basis", torch.eye(c.components, c.outputs))
        # RMS displacement of the speaker that the model imitates, in training's metric. Gains are relative to it.
        self.register_buffer("amplitude", torch.ones(()))
        if c.style_components:
            self.style_mean: Tensor
            self.style_basis: Tensor
            self.register_buffer("style_mean", torch.zeros(c.outputs))
            self.register_buffer("style_basis", torch.zeros(c.style_components, c.outputs))
            self.style = nn.Linear(c.style_components, c.width, bias=False)
            nn.init.zeros_(self.style.weight)
        self.start = nn.Parameter(torch.zeros(c.width))
        self.project_input = nn.Linear(c.feature_dim, c.width)
        self.input_norm = nn.LayerNorm(c.width)
        self.context = nn.Conv1d(c.width, c.width, FEATURES_PER_FRAME * (c.look_back + c.look_ahead) + 1)
        self.context_norm = nn.LayerNorm(c.width)
        self.project_previous = nn.Linear(c.components, c.width)
        self.self_qkv, self.self_out = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.cross_q, self.cross_kv, self.cross_out = (nn.Linear(c.width, m * c.width) for m in (1, 2, 1))
        self.up, self.down = nn.Linear(c.width, 2 * c.width), nn.Linear(2 * c.width, c.width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c.width), nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.output = nn.Linear(c.width, c.components)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.dropout = nn.Dropout(c.dropout)
        if c.linear_share:
            # Solved in closed form (training.faceformer.fit_linear), not by descent.
            self.linear = nn.Conv1d(c.feature_dim, c.components, c.linear_back + 1 + c.look_ahead).requires_grad_(False)
            assert self.linear.bias is not None
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        self.positions: Tensor
        self.slopes: Tensor
        self.register_buffer("positions", periodic_positions(c.period, c.width), persistent=False)
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, c.heads + 1) / c.heads), persistent=False)

    # --- sound ---

    def encode(self, features: Float[Tensor, "b s d"]) -> Float[Tensor, "b s w"]:
        """Each feature by itself, standardised and projected."""
        x = (features - self.feature_mean) / self.feature_std
        return self.input_norm(F.gelu(self.project_input(x)))

    def memory(self, features: Float[Tensor, "b s d"]) -> Float[Tensor, "b s w"]:
        """What cross-attention reads: every feature in its context. Zeros stand in for sound before and after."""
        past, future = FEATURES_PER_FRAME * self.config.look_back, FEATURES_PER_FRAME * self.config.look_ahead
        encoded = F.pad(self.encode(features), (0, 0, past, future))
        mixed = F.gelu(self.context(encoded.transpose(1, 2)).transpose(1, 2))
        return self.context_norm(encoded[:, past : encoded.shape[1] - future] + self.dropout(mixed))

    def frame_features(self, features: Float[Tensor, "b s d"]) -> Float[Tensor, "b t d"]:
        """Standardised, the mean of a frame's two: input of the linear prediction and of the lip closure."""
        standardised = (features - self.feature_mean) / self.feature_std
        return standardised.unflatten(1, (-1, FEATURES_PER_FRAME)).mean(2)

    def linear_prediction(self, frames: Float[Tensor, "b s d"]) -> Float[Tensor, "b t k"]:
        """Coefficients of t frames, from `frame_features` with linear_back more before and look_ahead more after."""
        return self.linear(frames.transpose(1, 2)).transpose(1, 2)

    def predict(self, features: Float[Tensor, "b s d"], style: Float[Tensor, "*b w"]) -> Float[Tensor, "b t k"]:
        """Coefficients of a whole sound, free-running: the same as a drained stream gives."""
        decoded = self.rollout(self.memory(features), style)
        if not self.config.linear_share:
            return decoded
        frames = F.pad(self.frame_features(features), (0, 0, self.config.linear_back, self.config.look_ahead))
        return torch.lerp(decoded, self.linear_prediction(frames), self.config.linear_share)

    # --- speaker ---

    def identity_style(self, frames: Float[Tensor, "*b 20 478 3"] | None) -> Float[Tensor, "*b w"]:
        """The style embedding of a speaker: from identity frames if the model has a style input, else learned."""
        if not self.config.style_components or frames is None:
            return self.start
        return self.start + self.style(self.project_identity(frames))

    def project_identity(self, frames: Float[Tensor, "*b 20 478 3"]) -> Float[Tensor, "*b s"]:
        """Coefficients of the training speakers' principal faces, averaged over the frames."""
        return ((frames.flatten(-2) - self.style_mean) @ self.style_basis.T).mean(-2)

    # --- motion ---

    def forward(
        self, memory: Float[Tensor, "b s w"], previous: Float[Tensor, "b t k"], style: Float[Tensor, "*b w"]
    ) -> Float[Tensor, "b t k"]:
        """All frames at once, given the one before each: `previous[:, i]` is frame i - 1's, zero at the beginning."""
        t = previous.shape[1]
        frame = torch.arange(t, device=previous.device)
        distance = frame[:, None] - frame
        bias = -self.slopes[:, None, None] * (distance // self.config.period)
        bias = bias.masked_fill((distance < 0) | (distance >= self.config.window), float("-inf"))
        x = self._token(previous, frame, style)
        q, k, v = (self._heads(z) for z in self.self_qkv(x).chunk(3, -1))
        x = self._residual(x, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        return self._decode(x, memory)

    def rollout(self, memory: Float[Tensor, "b s w"], style: Float[Tensor, "*b w"]) -> Float[Tensor, "b t k"]:
        """The decoder free-running: each frame is given the decoder's own previous one."""
        state = DecoderState(self, memory.shape[0], memory.device)
        frames = [self.step(memory[:, i : i + 2], style, state) for i in range(0, memory.shape[1] - 1, 2)]
        return torch.stack(frames, 1) if frames else memory.new_zeros(memory.shape[0], 0, self.config.components)

    def step(
        self, memory: Float[Tensor, "b 2 w"], style: Float[Tensor, "*b w"], state: "DecoderState"
    ) -> Float[Tensor, "b k"]:
        """The next frame; `state` advances."""
        frame = torch.tensor([state.frame % self.config.period])
        x = self._token(state.previous[:, None], frame, style)
        q, k, v = (self._heads(z) for z in self.self_qkv(x).chunk(3, -1))
        state.append(k, v)
        age = torch.arange(state.keys.shape[2] - 1, -1, -1)
        bias = -self.slopes[:, None, None] * (age // self.config.period)
        x = self._residual(x, F.scaled_dot_product_attention(q, state.keys, state.values, attn_mask=bias))
        state.previous = self._decode(x, memory)[:, 0]
        return state.previous

    def _token(self, previous: Tensor, frame: Tensor, style: Tensor) -> Float[Tensor, "b t w"]:
        style = style if style.dim() == 1 else style[:, None]
        return self.project_previous(previous) + style + self.positions[frame % self.config.period]

    def _residual(self, x: Tensor, heads: Float[Tensor, "b h t c"]) -> Float[Tensor, "b t w"]:
        return self.norm1(x + self.dropout(self.self_out(heads.transpose(1, 2).flatten(2))))

    def _decode(self, x: Float[Tensor, "b t w"], memory: Float[Tensor, "b s w"]) -> Float[Tensor, "b t k"]:
        """Cross-attention under the alignment mask, as attention over two rows; feed-forward; output."""
        keys, values = (
            z.unflatten(1, (-1, FEATURES_PER_FRAME)).unflatten(-1, (self.config.heads, -1))
            for z in self.cross_kv(memory).chunk(2, -1)
        )
        q = self.cross_q(x).unflatten(-1, (self.config.heads, -1))
        scores = torch.einsum("bthc,btshc->btsh", q, keys) / q.shape[-1] ** 0.5
        attended = torch.einsum("btsh,btshc->bthc", scores.softmax(2), values).flatten(2)
        x = self.norm2(x + self.dropout(self.cross_out(attended)))
        x = self.norm3(x + self.dropout(self.down(self.dropout(F.relu(self.up(x))))))
        return self.output(x)

    def _heads(self, x: Float[Tensor, "b t w"]) -> Float[Tensor, "b h t c"]:
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)


class DecoderState:
    """Cache of free-running decoding: the last frame's coefficients, and keys and values of the window."""

    def __init__(self, model: Faceformer, batch: int, device: torch.device | str = "cpu"):
        c = model.config
        self.frame, self.window = 0, c.window
        self.previous = torch.zeros(batch, c.components, device=device)
        self.keys = torch.zeros(batch, c.heads, 0, c.width // c.heads, device=device)
        self.values = self.keys

    def append(self, key: Float[Tensor, "b h 1 c"], value: Float[Tensor, "b h 1 c"]) -> None:
        """One more frame; the oldest goes where the window is full."""
        keep = max(self.keys.shape[2] - self.window + 1, 0)
        self.keys = torch.cat([self.keys[:, :, keep:], key], 2)
        self.values = torch.cat([self.values[:, :, keep:], value], 2)
        self.frame += 1


def periodic_positions(period: int, width: int) -> Float[Tensor, "period width"]:
    """Sinusoidal positions of one period (Vaswani et al. 2017), which repeats: positions stay within training's."""
    frame = torch.arange(period)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([torch.sin(frame * frequency), torch.cos(frame * frequency)], -1).flatten(1)
