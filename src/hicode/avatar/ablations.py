"""The controls of Table 2 that stand in HFEC's place: one class a row, each a `Control`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hicode.avatar.config import ControlName, DeformationConfig
from hicode.avatar.hfec import (
    HFEC,
    VECTOR_DIM,
    AnchorCache,
    LandmarkAttention,
    PointQuery,
    Style,
    adain,
    offset_mlp,
)
from hicode.avatar.signals import Signals
from hicode.errors import InputError
from hicode.motion import N_LANDMARKS

STYLE_TOKENS = 8  # that the 3DMM vector becomes for a cross-attention block to attend to


class LiteralStyle(nn.Module):
    """Eq. 12 as printed: the second AdaIN takes mean and deviation of the 3DMM vector."""

    def __init__(self, config: DeformationConfig):
        super().__init__()
        self.query, self.attention = PointQuery(config), LandmarkAttention(config)
        self.offsets = offset_mlp(config, config.channels)

    def forward(self, points: AnchorCache, signals: Signals) -> Float[Tensor, "m o"]:
        q = self.query(points)
        y = adain(q, *self.attention(q, points, signals))
        vector = signals.raw_vector
        return self.offsets(adain(y, vector.mean(), vector.std(correction=0)))


class LandmarksOnly(nn.Module):
    """ "w/o 3DMM": no second AdaIN."""

    def __init__(self, config: DeformationConfig):
        super().__init__()
        self.query, self.attention = PointQuery(config), LandmarkAttention(config)
        self.offsets = offset_mlp(config, config.channels)

    def forward(self, points: AnchorCache, signals: Signals) -> Float[Tensor, "m o"]:
        q = self.query(points)
        return self.offsets(adain(q, *self.attention(q, points, signals)))


class ExpressionOnly(nn.Module):
    """ "w/o Landmarks": no attention, no first AdaIN."""

    def __init__(self, config: DeformationConfig):
        super().__init__()
        self.query, self.style = PointQuery(config), Style(VECTOR_DIM, config.channels)
        self.offsets = offset_mlp(config, config.channels)

    def forward(self, points: AnchorCache, signals: Signals) -> Float[Tensor, "m o"]:
        return self.offsets(adain(self.query(points), *self.style(signals.vector)))


class SpeechOnly(nn.Module):
    """ "None": speech features give the style of one AdaIN."""

    def __init__(self, config: DeformationConfig):
        super().__init__()
        self.query, self.style = PointQuery(config), Style(config.speech_dim, config.channels, std=0.01)
        self.offsets = offset_mlp(config, config.channels)

    def forward(self, points: AnchorCache, signals: Signals) -> Float[Tensor, "m o"]:
        if signals.speech is None:
            raise InputError(
                "Speech features move this avatar (the ablation None), and the motion carries none. "
                "Speak, or use a clip with sound."
            )
        return self.offsets(adain(self.query(points), *self.style(signals.speech)))


class Addition(nn.Module):
    """ "w/ Addition": attended landmark values and an affine map of the 3DMM vector are added."""

    def __init__(self, config: DeformationConfig):
        super().__init__()
        self.query, self.attention = PointQuery(config), LandmarkAttention(config)
        self.shift = nn.Linear(VECTOR_DIM, config.channels)
        self.offsets = offset_mlp(config, config.channels)

    def forward(self, points: AnchorCache, signals: Signals) -> Float[Tensor, "m o"]:
        q = self.query(points)
        return self.offsets(q + self.attention(q, points, signals)[0] + self.shift(signals.vector))


class CrossAttention(nn.Module):
    """A transformer's cross-attention block, one head: LayerNorm(x + W_o softmax(W_q x Kᵀ / √c) V)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, x: Float[Tensor, "n c"], k: Float[Tensor, "l c"], v: Float[Tensor, "l c"]
    ) -> Float[Tensor, "n c"]:
        attention = torch.softmax((self.query(x) * x.shape[1] ** -0.5) @ k.T, -1)
        return self.norm(x + self.out(attention @ v))


class AttentionBlocks(nn.Module):
    """ "w/ Attention": a cross-attention block over the landmarks, then one over tokens of the 3DMM vector."""

    def __init__(self, config: DeformationConfig):
        super().__init__()
        c = config.channels
        self.query, self.landmarks = PointQuery(config), LandmarkAttention(config)
        self.fine, self.coarse = CrossAttention(c), CrossAttention(c)
        self.tokens = nn.Linear(VECTOR_DIM, 2 * c * STYLE_TOKENS)
        self.offsets = offset_mlp(config, c)

    def forward(self, points: AnchorCache, signals: Signals) -> Float[Tensor, "m o"]:
        k, v = self.landmarks.keys_values(signals)
        assert k is not None, "attention blocks need learned attention"
        y = self.fine(self.query(points), k, v)
        k, v = self.tokens(signals.vector).view(2, STYLE_TOKENS, -1)
        return self.offsets(self.coarse(y, k, v))


class Concatenation(nn.Module):
    """ "w/o HFEC": encodings of all landmarks and of the 3DMM vector stand next to each point's features."""

    def __init__(self, config: DeformationConfig):
        super().__init__()
        c, h = config.channels, config.hidden
        self.query = PointQuery(config)
        self.encoder = nn.Sequential(nn.Linear(3 * N_LANDMARKS, h), nn.ReLU(), nn.Linear(h, c))
        self.shift = nn.Linear(VECTOR_DIM, c)
        self.offsets = offset_mlp(config, 3 * c)

    def forward(self, points: AnchorCache, signals: Signals) -> Float[Tensor, "m o"]:
        q = self.query(points)
        common = torch.cat([self.encoder(signals.displacement.flatten()), self.shift(signals.vector)])
        return self.offsets(torch.cat([q, common.expand(len(q), -1)], 1))


CONTROLS: dict[ControlName, type[nn.Module]] = {
    "hfec": HFEC,
    "literal": LiteralStyle,
    "landmarks": LandmarksOnly,
    "expression": ExpressionOnly,
    "speech": SpeechOnly,
    "addition": Addition,
    "attention": AttentionBlocks,
    "concatenation": Concatenation,
}


def create_control(config: DeformationConfig) -> nn.Module | None:
    """The control of that name, a `Control`; None for "none"."""
    if config.control == "none":
        return None
    if config.control == "attention" and config.attention != "learned":
        raise InputError('The control "attention" needs learned attention. Set attention to "learned".')
    return CONTROLS[config.control](config)
