"""The controls of Table 2 that stand in HFEC's place: one class a row, each a `Control`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hicode.avatar.config import ControlName, DeformationConfig
from hicode.avatar.hfec import VECTOR_DIM, AnchorCache, LandmarkAttention, PointQuery, Style, adain, offset_mlp
from hicode.avatar.signals import Signals
from hicode.errors import InputError
from hicode.motion import N_LANDMARKS

STYLE_TOKENS = 8  # that the 3DMM vector becomes for a cross-attention block to attend to


class _Ablation(nn.Module):
    """A control that makes its own features of the query Q; the MLPs before and after are HFEC's."""

    def __init__(self, config: DeformationConfig, features: int = 1):
        """`features`: width of the features, in channels."""
        super().__init__()
        self.query = PointQuery(config)
        self.offsets = offset_mlp(config, features * config.channels)

    def forward(self, points: AnchorCache, signals: Signals) -> Float[Tensor, "m o"]:
        """See `Control`."""
        return self.offsets(self._features(self.query(points), points, signals))

    def _features(self, q: Float[Tensor, "m c"], points: AnchorCache, signals: Signals) -> Float[Tensor, "m f"]:
        raise NotImplementedError


class LandmarksOnly(_Ablation):
    """Row "w/o 3DMM": no second AdaIN."""

    def __init__(self, config: DeformationConfig):
        super().__init__(config)
        self.attention = LandmarkAttention(config)

    def _features(self, q: Float[Tensor, "m c"], points: AnchorCache, signals: Signals) -> Float[Tensor, "m c"]:
        return adain(q, *self.attention(q, points, signals))


class LiteralStyle(LandmarksOnly):
    """Eq. 12 as printed: the second AdaIN takes mean and deviation of the 3DMM vector."""

    def _features(self, q: Float[Tensor, "m c"], points: AnchorCache, signals: Signals) -> Float[Tensor, "m c"]:
        vector = signals.raw_vector
        return adain(super()._features(q, points, signals), vector.mean(), vector.std(correction=0))


class ExpressionOnly(_Ablation):
    """Row "w/o Landmarks": no attention, no first AdaIN."""

    def __init__(self, config: DeformationConfig):
        super().__init__(config)
        self.style = Style(VECTOR_DIM, config.channels)

    def _features(self, q: Float[Tensor, "m c"], points: AnchorCache, signals: Signals) -> Float[Tensor, "m c"]:
        return adain(q, *self.style(signals.vector))


class SpeechOnly(_Ablation):
    """Row "None": speech features give the style of one AdaIN."""

    def __init__(self, config: DeformationConfig):
        super().__init__(config)
        self.style = Style(config.speech_dim, config.channels, std=0.01)

    def _features(self, q: Float[Tensor, "m c"], points: AnchorCache, signals: Signals) -> Float[Tensor, "m c"]:
        if signals.speech is None:
            raise InputError(
                "Speech features move this avatar (the ablation None), and the motion carries none. "
                "Speak, or use a clip with sound."
            )
        return adain(q, *self.style(signals.speech))


class Addition(_Ablation):
    """Row "w/ Addition": attended landmark values and an affine map of the 3DMM vector are added."""

    def __init__(self, config: DeformationConfig):
        super().__init__(config)
        self.attention = LandmarkAttention(config)
        self.shift = nn.Linear(VECTOR_DIM, config.channels)

    def _features(self, q: Float[Tensor, "m c"], points: AnchorCache, signals: Signals) -> Float[Tensor, "m c"]:
        return q + self.attention(q, points, signals)[0] + self.shift(signals.vector)


class CrossAttention(nn.Module):
    """A transformer's cross-attention block, one head: LayerNorm(x + W_o softmax(W_q x Kᵀ / √c) V)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, x: Float[Tensor, "n c"], k: Float[Tensor, "l c"], v: Float[Tensor, "l c"]
    ) -> Float[Tensor, "n c"]:
        """`x` attends to keys and values of l tokens."""
        attention = torch.softmax((self.query(x) * x.shape[1] ** -0.5) @ k.T, -1)
        return self.norm(x + self.out(attention @ v))


class AttentionBlocks(_Ablation):
    """Row "w/ Attention": a cross-attention block over the landmarks, then one over tokens of the 3DMM vector."""

    def __init__(self, config: DeformationConfig):
        super().__init__(config)
        if config.attention != "learned":
            raise InputError('The control "attention" needs learned attention. Set attention to "learned".')
        c = config.channels
        self.landmarks = LandmarkAttention(config)
        self.fine, self.coarse = CrossAttention(c), CrossAttention(c)
        self.tokens = nn.Linear(VECTOR_DIM, 2 * c * STYLE_TOKENS)

    def _features(self, q: Float[Tensor, "m c"], points: AnchorCache, signals: Signals) -> Float[Tensor, "m c"]:
        k, v = self.landmarks.keys_values(signals)
        token_k, token_v = self.tokens(signals.vector).view(2, STYLE_TOKENS, -1)
        return self.coarse(self.fine(q, k, v), token_k, token_v)


class Concatenation(_Ablation):
    """Row "w/o HFEC": encodings of all landmarks and of the 3DMM vector stand next to each point's features."""

    def __init__(self, config: DeformationConfig):
        super().__init__(config, features=3)
        c, h = config.channels, config.hidden
        self.encoder = nn.Sequential(nn.Linear(3 * N_LANDMARKS, h), nn.ReLU(), nn.Linear(h, c))
        self.shift = nn.Linear(VECTOR_DIM, c)

    def _features(self, q: Float[Tensor, "m c"], points: AnchorCache, signals: Signals) -> Float[Tensor, "m f"]:
        common = torch.cat([self.encoder(signals.displacement.flatten()), self.shift(signals.vector)])
        return torch.cat([q, common.expand(len(q), -1)], 1)


CONTROLS: dict[ControlName, type[nn.Module]] = {
    "literal": LiteralStyle, "landmarks": LandmarksOnly, "expression": ExpressionOnly, "speech": SpeechOnly,
    "addition": Addition, "attention": AttentionBlocks, "concatenation": Concatenation,
}  # fmt: skip
