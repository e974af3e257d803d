"""Speech to motion: two Faceformers (Fan et al. 2022), to 64 expression parameters and to 478 landmarks.

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
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hicode.errors import FileFormatError
from hicode.motion import EXPRESSION_DIM, N_LANDMARKS

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
    look_ahead: int = 4  # frames of coming sound a frame may hear
    look_back: int = 4  # frames of past sound the convolution adds to those that self-attention remembers
    style_components: int = 0  # principal faces that 20 identity frames are projected on; 0: no style input
    dropout: float = 0.1


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
        return self._contextual(F.pad(self.listen(features), (0, 0, 2 * self.config.look_back, 2 * self.config.look_ahead)))

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
        x = self._attended(x, F.scaled_dot_product_attention(self._heads(q), self._heads(k), self._heads(v), attn_mask=bias))
        return self._answer(x, memory)

    def rollout(self, memory: Float[Tensor, "b 2*t w"], style: Float[Tensor, "*b w"]) -> Float[Tensor, "b t k"]:
        """Free-running: each frame given the model's own previous one. What a user gets, and what validation must use."""
        state = DecoderState(self, memory.shape[0], memory.device)
        frames = [self.step(memory[:, 2 * i : 2 * i + 2], style, state) for i in range(memory.shape[1] // 2)]
        return torch.stack(frames, 1) if frames else memory.new_zeros(memory.shape[0], 0, self.config.components)

    def step(self, memory: Float[Tensor, "b 2 w"], style: Float[Tensor, "*b w"], state: "DecoderState") -> Float[Tensor, "b k"]:
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
        keys, values = (z.unflatten(1, (-1, 2)).unflatten(-1, (self.config.heads, -1)) for z in self.cross_kv(memory).chunk(2, -1))
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


class FaceformerStream:
    """Features in pieces of any size, displacements out as soon as `look_ahead` frames of sound have followed."""

    def __init__(self, model: Faceformer, style: Float[Tensor, "w"]):
        self.model, self.style = model, style
        self.state = DecoderState(model, 1)
        c = model.config
        self._heard = torch.zeros(1, 2 * c.look_back, c.width)
        self._finished = False

    @torch.no_grad()
    def push(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "m n"]:
        """Displacements from the template of the frames that became complete."""
        assert not self._finished, "the stream is finished"
        return self._advance(self.model.listen(features[None]))

    @torch.no_grad()
    def finish(self) -> Float[Tensor, "m n"]:
        """The remaining frames, as if nothing more were heard."""
        assert not self._finished, "the stream is finished"
        self._finished = True
        return self._advance(torch.zeros(1, 2 * self.model.config.look_ahead, self.model.config.width))

    def _advance(self, heard: Float[Tensor, "1 s w"]) -> Float[Tensor, "m n"]:
        c = self.model.config
        self._heard = torch.cat([self._heard, heard], 1)
        frames = max(self._heard.shape[1] - 2 * (c.look_back + c.look_ahead), 0) // 2
        if frames == 0:
            return self.model.basis.new_zeros(0, c.outputs)
        memory = self.model._contextual(self._heard[:, : 2 * (frames + c.look_back + c.look_ahead)])
        self._heard = self._heard[:, 2 * frames :]
        coefficients = [self.model.step(memory[:, 2 * i : 2 * i + 2], self.style, self.state) for i in range(frames)]
        return torch.cat(coefficients) @ self.model.basis


class SpeechModels:
    """The pair that makes a person speak: generic Faceformers, and what is the subject's own.

    encoder              name of the speech encoder whose features they take
    expression_template  "64"        the subject's mean over training frames
    landmark_template    "478 3"     likewise, head units
    identity_frames      "20 478 3"  frames of the training part, drawn with a fixed seed
    expression_gain, landmark_gain   how much larger than the average speaker's the subject's movements are
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
    ):
        assert expression.config.outputs == EXPRESSION_DIM and landmarks.config.outputs == 3 * N_LANDMARKS
        assert expression.config.feature_dim == landmarks.config.feature_dim
        self.expression, self.landmarks, self.encoder = expression.eval(), landmarks.eval(), encoder
        self.expression_template, self.landmark_template = expression_template, landmark_template
        self.identity_frames = identity_frames
        self.expression_gain, self.landmark_gain = expression_gain, landmark_gain

    @property
    def feature_dim(self) -> int:
        return self.expression.config.feature_dim

    @property
    def look_ahead(self) -> int:
        """Frames of sound that must follow a frame before it is known, beside the encoder's own latency."""
        return max(self.expression.config.look_ahead, self.landmarks.config.look_ahead)

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
        }
        return tensors, config

    @staticmethod
    def from_state(tensors: dict[str, Tensor], config: dict) -> "SpeechModels":
        """The inverse of `state`. Half-precision tensors are read as float32. Raises FileFormatError where something is missing."""
        try:
            models = []
            for part in ("expression", "landmarks"):
                model = Faceformer(FaceformerConfig(**config[part]))
                model.load_state_dict({k.removeprefix(part + "."): v.float() for k, v in tensors.items() if k.startswith(part + ".")})
                models.append(model)
            names = ("expression_template", "landmark_template", "identity_frames")
            own = [tensors[name].float() for name in names]
            return SpeechModels(*models, config["encoder"], *own, config["expression_gain"], config["landmark_gain"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise FileFormatError(f"The speech models are damaged or from another version ({error!s:.200}). Train the avatar anew.") from error


class SpeechStream:
    """Features in, motion out: both Faceformers side by side, in step."""

    def __init__(self, models: SpeechModels):
        self.models = models
        style = models.landmarks.identity_style(models.identity_frames).detach()
        self._expression = FaceformerStream(models.expression, models.expression.identity_style(None).detach())
        self._landmarks = FaceformerStream(models.landmarks, style)
        self._waiting = (torch.zeros(0, EXPRESSION_DIM), torch.zeros(0, 3 * N_LANDMARKS))
        self._last: Tensor | None = None
        self._received = 0

    def push(self, features: Float[Tensor, "s d"]) -> tuple[Float[Tensor, "m 64"], Float[Tensor, "m 478 3"]]:
        """Motion of the frames that became complete."""
        dim = self.models.feature_dim
        assert features.shape[-1] == dim, f"features have {features.shape[-1]} dimensions, the speech models take {dim} ({self.models.encoder})"
        self._received += len(features)
        if len(features):
            self._last = features[-1:]
        return self._together(self._expression.push(features), self._landmarks.push(features))

    def finish(self) -> tuple[Float[Tensor, "m 64"], Float[Tensor, "m 478 3"]]:
        """The remaining frames; a last half frame is filled up by repeating its feature."""
        expression, landmarks = [], []
        if self._received % 2:
            expression.append(self._expression.push(self._last))
            landmarks.append(self._landmarks.push(self._last))
        expression.append(self._expression.finish())
        landmarks.append(self._landmarks.finish())
        return self._together(torch.cat(expression), torch.cat(landmarks))

    def _together(self, expression: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        expression = torch.cat([self._waiting[0], expression])
        landmarks = torch.cat([self._waiting[1], landmarks])
        ready = min(len(expression), len(landmarks))
        self._waiting = expression[ready:], landmarks[ready:]
        m = self.models
        return (
            m.expression_template + m.expression_gain * expression[:ready],
            m.landmark_template + m.landmark_gain * landmarks[:ready].unflatten(1, (N_LANDMARKS, 3)),
        )
