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

import torch
import torch.nn.functional as F
from jaxtyping import Float
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
        return self._contextual(F.pad(self.listen(features), (0, 0, 2 * self.config.look_back, 2 * self.config.look_ahead)))

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
        x = self._attended(x, F.scaled_dot_product_attention(self._heads(q), self._heads(k), self._heads(v), attn_mask=bias))
        return self._answer(x, memory)

    def rollout(self, memory: Float[Tensor, "b 2*t w"], style: Float[Tensor, "*b w"]) -> Float[Tensor, "b t k"]:
        """The decoder's answer, free-running: each frame given its own previous one."""
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


class _Context:
    """Frame features as they come, with what lies `back` frames before and `ahead` after the frames that are complete; silence is zeros."""

    def __init__(self, model: Faceformer, back: int, ahead: int):
        self.model, self.back, self.ahead = model, back, ahead
        dim = model.config.feature_dim
        self._half = torch.zeros(1, 0, dim)  # a feature whose frame is not complete
        self._frames = torch.zeros(1, back, dim)

    def push(self, features: Float[Tensor, "1 s d"]) -> None:
        self._half = torch.cat([self._half, features], 1)
        whole = self._half.shape[1] // 2 * 2
        self._frames = torch.cat([self._frames, self.model.frame_features(self._half[:, :whole])], 1)
        self._half = self._half[:, whole:]

    def finish(self) -> None:
        self._frames = F.pad(self._frames, (0, 0, 0, self.ahead))

    @property
    def ready(self) -> int:
        return max(self._frames.shape[1] - self.back - self.ahead, 0)

    def take(self, frames: int) -> Float[Tensor, "1 l+frames+a d"]:
        """The next frames, with their surroundings."""
        taken = self._frames[:, : self.back + frames + self.ahead]
        self._frames = self._frames[:, frames:]
        return taken


class FaceformerStream:
    """Features in pieces of any size, displacements out as soon as `look_ahead` frames of sound have followed."""

    def __init__(self, model: Faceformer, style: Float[Tensor, "w"]):
        self.model, self.style = model, style
        self.state = DecoderState(model, 1)
        c = model.config
        self._heard = torch.zeros(1, 2 * c.look_back, c.width)
        self._context = _Context(model, c.linear_back, c.look_ahead) if c.linear_share else None
        self._finished = False

    @torch.no_grad()
    def push(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "m n"]:
        """Displacements from the template of the frames that became complete."""
        assert not self._finished, "the stream is finished"
        features = features[None]
        if self._context:
            self._context.push(features)
        return self._advance(self.model.listen(features))

    @torch.no_grad()
    def finish(self) -> Float[Tensor, "m n"]:
        """The remaining frames, as if nothing more were heard."""
        assert not self._finished, "the stream is finished"
        self._finished = True
        c = self.model.config
        if self._context:
            self._context.finish()
        return self._advance(torch.zeros(1, 2 * c.look_ahead, c.width))

    def _advance(self, heard: Float[Tensor, "1 s w"]) -> Float[Tensor, "m n"]:
        c = self.model.config
        self._heard = torch.cat([self._heard, heard], 1)
        frames = max(self._heard.shape[1] - 2 * (c.look_back + c.look_ahead), 0) // 2
        if frames == 0:
            return self.model.basis.new_zeros(0, c.outputs)
        memory = self.model._contextual(self._heard[:, : 2 * (frames + c.look_back + c.look_ahead)])
        self._heard = self._heard[:, 2 * frames :]
        coefficients = [self.model.step(memory[:, 2 * i : 2 * i + 2], self.style, self.state) for i in range(frames)]
        coefficients = torch.cat(coefficients)
        if self._context:
            coefficients = torch.lerp(coefficients, self.model.linear_answer(self._context.take(frames))[0], c.linear_share)
        return coefficients @ self.model.basis


class LipClosure(nn.Module):
    """How surely the lips are closed, by a logistic regression on the features about a frame, and the command that closes them.

    expression  "64"     what closing changes, per dm of gap: how people close, from tracked speech. Moves the inner lips (13, 14) apart by one
    landmarks   "478 3"  dm a unit, in the frontal plane; the landmarks' is the expression's through the head model, so that both stay one mouth

    A command is absent below the odds `from_odds` and full from `to_odds` on.
    """

    from_odds: float = 0.25
    to_odds: float = 0.55

    def __init__(self, feature_dim: int, back: int, ahead: int):
        super().__init__()
        self.back, self.ahead = back, ahead
        self.register_buffer("weight", torch.zeros(1, feature_dim, back + 1 + ahead))
        self.register_buffer("bias", torch.zeros(1))
        self.register_buffer("expression", torch.zeros(EXPRESSION_DIM))
        self.register_buffer("landmarks", torch.zeros(N_LANDMARKS, 3))

    def odds(self, frames: Float[Tensor, "l+t+a d"]) -> Float[Tensor, "t"]:
        """Probability of closed lips in t frames, from `Faceformer.frame_features` with `back` frames before and `ahead` after them."""
        return torch.sigmoid(F.conv1d(frames.T[None], self.weight, self.bias)[0, 0])

    def command(
        self, odds: Float[Tensor, "t"], expression: Float[Tensor, "t 64"], landmarks: Float[Tensor, "t 478 3"], closed_gap: float
    ) -> tuple[Float[Tensor, "t 64"], Float[Tensor, "t 478 3"]]:
        """The same motion with its gap drawn to `closed_gap` (dm) where the lips are to be closed; nothing ever opens."""
        x = ((odds - self.from_odds) / (self.to_odds - self.from_odds)).clamp(0, 1)
        gap = lip_gap(landmarks)
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
            config |= {"closure": {"back": self.closure.back, "ahead": self.closure.ahead}, "closed_gap": float(self.closed_gap)}
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
            closure = None
            if "closure" in config:
                closure = LipClosure(models[0].config.feature_dim, **config["closure"])
                closure.load_state_dict({k.removeprefix("closure."): v.float() for k, v in tensors.items() if k.startswith("closure.")})
            # Files from before say nothing of the window: there was but one.
            window = Window(*config["window"]) if config.get("window") else Window(88, 4, 8) if config["encoder"] == "embedded" else None
            names = ("expression_template", "landmark_template", "identity_frames")
            own = [tensors[name].float() for name in names]
            gains = config["expression_gain"], config["landmark_gain"]
            return SpeechModels(*models, config["encoder"], *own, *gains, closure, config.get("closed_gap", 0.006), window)
        except (KeyError, TypeError, RuntimeError) as error:
            raise FileFormatError(f"The speech models are damaged or from another version ({error!s:.200}). Train the avatar anew.") from error


class SpeechStream:
    """Features in, motion out: both Faceformers side by side, in step."""

    def __init__(self, models: SpeechModels):
        self.models = models
        style = models.landmarks.identity_style(models.identity_frames).detach()
        self._expression = FaceformerStream(models.expression, models.expression.identity_style(None).detach())
        self._landmarks = FaceformerStream(models.landmarks, style)
        self._closure = _Context(models.expression, models.closure.back, models.closure.ahead) if models.closure else None
        self._waiting = (torch.zeros(0, EXPRESSION_DIM), torch.zeros(0, 3 * N_LANDMARKS), torch.zeros(0))
        self._last: Tensor | None = None
        self._received = 0

    def push(self, features: Float[Tensor, "s d"]) -> tuple[Float[Tensor, "m 64"], Float[Tensor, "m 478 3"]]:
        """Motion of the frames that became complete."""
        dim = self.models.feature_dim
        assert features.shape[-1] == dim, f"features have {features.shape[-1]} dimensions, the speech models take {dim} ({self.models.encoder})"
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
            self._closure.push(features[None])
        return self._closed()

    @torch.no_grad()
    def _closed(self) -> Float[Tensor, "m"]:
        if not self._closure or not self._closure.ready:
            return torch.zeros(0)
        return self.models.closure.odds(self._closure.take(self._closure.ready)[0])

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
        return m.closure.command(odds, expression, landmarks, m.closed_gap)
