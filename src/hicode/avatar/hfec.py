"""Hierarchical facial expression control (HiCoDe, Eqs 9-12).

m points, 478 landmarks, c channels. Everything is in the canonical head frame; the head pose is applied by the camera.
Two deviations from the paper. Eq. 12: the style is a learned affine map of the 3DMM vector; its mean and deviation, two
numbers, cannot tell one expression from another. Eqs 9-10: by default attention is a fixed softmax over distances.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hicode.avatar.config import DeformationConfig
from hicode.avatar.signals import Signals
from hicode.errors import InputError
from hicode.motion import EXPRESSION_DIM, IDENTITY_DIM, N_LANDMARKS

VECTOR_DIM = EXPRESSION_DIM + IDENTITY_DIM


@dataclass(frozen=True, eq=False)
class StaticAttention:
    """Attention that is the same in every frame: weights whose rows sum to 1, one matrix for each share of channels."""

    weights: tuple[Float[Tensor, "m 478"], ...]

    def moments(self, v: Float[Tensor, "478 c"]) -> tuple[Float[Tensor, "m c"], Float[Tensor, "m c"]]:
        """E[v] and E[v²] of the landmarks' values."""
        parts = [
            (weights @ torch.cat([share, share * share], 1)).chunk(2, 1)
            for weights, share in zip(self.weights, v.chunk(len(self.weights), 1), strict=True)
        ]
        first, second = zip(*parts, strict=True)
        return torch.cat(first, 1), torch.cat(second, 1)


@dataclass(frozen=True, eq=False)
class AnchorCache:
    """What a control needs of its m points: functions of the canonical positions.

    positions "m 3" in [-1, 1]^3
    attention fixed weights; or, where attention is learned, the bias "m 478" of its scores, or None
    query     "m c" Q of Eq. 9, where it may be kept (no training)
    """

    positions: Float[Tensor, "m 3"]
    attention: StaticAttention | Float[Tensor, "m 478"] | None = None
    query: Float[Tensor, "m c"] | None = None


@runtime_checkable
class Control(Protocol):
    """A learned control: HFEC, or a row of Table 2 in its place."""

    def __call__(self, points: AnchorCache, signals: Signals) -> Float[Tensor, "m o"]:
        """Offsets of the points: Δl 3, Δr 4, Δs 3 (Eq. 7) and, with `color_offset`, Δc 3."""
        ...


def sinusoidal(x: Float[Tensor, "*b d"], frequencies: int) -> Float[Tensor, "*b e"]:
    """x with sin and cos of x π 2^k, k < frequencies: e = d (1 + 2 frequencies)."""
    octaves = torch.pi * 2.0 ** torch.arange(frequencies, dtype=x.dtype, device=x.device)
    phase = (x[..., None] * octaves).flatten(-2)
    return torch.cat([x, phase.sin(), phase.cos()], -1)


def normalize_over_points(x: Float[Tensor, "n c"], eps: float = 1e-5) -> Float[Tensor, "n c"]:
    """(x - μ(x)) / σ(x) per channel, statistics over the n points."""
    centred = x - x.mean(0, keepdim=True)
    # The floor keeps the root's gradient finite in a constant channel. torch.std_mean along dimension 0 is slower.
    std = centred.square().mean(0, keepdim=True).clamp_min(1e-12).sqrt()
    return centred / (std + eps)


def adain(x: Float[Tensor, "n c"], mean: Float[Tensor, "..."], std: Float[Tensor, "..."]) -> Float[Tensor, "n c"]:
    """Re-normalise features over the n points to a given mean and deviation (Eq. 11).

    `mean` and `std` broadcast against x. Statistics run over points, so the result does not depend on their order.
    """
    return std * normalize_over_points(x) + mean


def mean_and_deviation(
    mean: Float[Tensor, "n c"], second: Float[Tensor, "n c"]
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Eq. 10 from E[v] and E[v²]. Sharp attention and rounding may make the variance negative: it is floored."""
    return mean, ((second - mean * mean).clamp_min(0) + 1e-5).sqrt()


def landmark_attention(
    q: Float[Tensor, "n c"], k: Float[Tensor, "l c"], v: Float[Tensor, "l c"], bias: Float[Tensor, "n l"] | None = None
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Attention-weighted mean and deviation of the landmarks' values (Eqs 9-10).

    Scores are scaled by 1/√c, which the paper leaves out, and shifted by `bias`.
    """
    q = q * q.shape[1] ** -0.5
    attention = torch.softmax(q @ k.T if bias is None else torch.addmm(bias, q, k.T), -1)
    return mean_and_deviation(*(attention @ torch.cat([v, v * v], 1)).chunk(2, 1))


@torch.no_grad()
def nearness(points: Float[Tensor, "m 3"], landmarks: Float[Tensor, "478 3"], reach: float) -> Float[Tensor, "m 478"]:
    """Attention scores -d² / 2 reach² of distances d, shifted so that each point's nearest landmark has 0.

    Not below -40: a weight of 1e-18 adds nothing, but smaller ones are subnormal floats, which a CPU multiplies at a
    seventh of its speed.
    """
    squared = torch.cdist(points, landmarks).square()
    return ((squared.amin(1, keepdim=True) - squared) / (2 * reach * reach)).clamp_min(-40)


def output_layer(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts at zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def offset_mlp(config: DeformationConfig, inputs: int) -> nn.Sequential:
    """Features to offsets. It starts at zero: an untrained control is the identity."""
    h, outputs = config.hidden, 13 if config.color_offset else 10
    return nn.Sequential(nn.Linear(inputs, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), output_layer(h, outputs))


class PointQuery(nn.Module):
    """Q of Eq. 9: an MLP of the sinusoidal embedding of each point."""

    def __init__(self, config: DeformationConfig):
        super().__init__()
        self.frequencies = config.position_frequencies
        width = 3 * (1 + 2 * config.position_frequencies)
        self.mlp = nn.Sequential(nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.channels))

    def forward(self, points: AnchorCache) -> Float[Tensor, "m c"]:
        """Q, from the cache where it holds it."""
        if points.query is not None:
            return points.query
        return self.mlp(sinusoidal(points.positions, self.frequencies))


class LandmarkAttention(nn.Module):
    """Eqs 9-10: mean and deviation of the landmarks' values, as each point attends to them."""

    def __init__(self, config: DeformationConfig):
        super().__init__()
        c, reaches = config.channels, len(config.attention_reaches)
        self.static = config.attention == "nearness"
        if self.static and (not reaches or c % reaches):
            raise InputError(
                f"{reaches} attention_reaches cannot share {c} channels. "
                "Give as many as divide them, or learned attention."
            )
        if not self.static and reaches > 1:
            raise InputError(f"Learned attention takes one of attention_reaches or none, not {reaches}.")
        self.frequencies = config.landmark_frequencies
        # Inputs: embedded position, displacement from the mean (small, so normalised on its own), learned index code.
        width = c if self.static else 2 * c
        self.key_value = nn.Sequential(
            nn.Linear(3 * (2 + 2 * self.frequencies), config.hidden), nn.ReLU(), nn.Linear(config.hidden, width)
        )
        self.landmark_code = nn.Parameter(0.1 * torch.randn(N_LANDMARKS, width))

    def keys_values(self, signals: Signals) -> tuple[Float[Tensor, "478 c"] | None, Float[Tensor, "478 c"]]:
        """K and V of Eq. 9; no K for static attention."""
        embedded = torch.cat([sinusoidal(signals.landmarks, self.frequencies), signals.displacement], -1)
        kv = self.landmark_code + self.key_value(embedded)
        if self.static:
            return None, kv
        k, v = kv.chunk(2, 1)
        return k, v

    def forward(
        self, q: Float[Tensor, "m c"], points: AnchorCache, signals: Signals
    ) -> tuple[Float[Tensor, "m c"], Float[Tensor, "m c"]]:
        """Eq. 10's (mean, deviation)."""
        k, v = self.keys_values(signals)
        if isinstance(points.attention, StaticAttention):
            return mean_and_deviation(*points.attention.moments(v))
        assert k is not None, "learned attention has keys"
        return landmark_attention(q, k, v, points.attention)


class Style(nn.Module):
    """Eq. 12: a signal's affine map to the deviation and mean of an AdaIN. It starts as a plain normalisation."""

    def __init__(self, inputs: int, channels: int, std: float = 0.02):
        super().__init__()
        self.affine = nn.Linear(inputs, 2 * channels)
        nn.init.normal_(self.affine.weight, std=std)
        with torch.no_grad():
            self.affine.bias[:channels] = 1.0
            self.affine.bias[channels:] = 0.0

    def forward(self, signal: Float[Tensor, "s"]) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:
        """(mean, deviation)."""
        std, mean = self.affine(signal).chunk(2)
        return mean, std


class HFEC(nn.Module):
    """Eqs 9-12 and the MLP to the offsets of Eq. 7."""

    def __init__(self, config: DeformationConfig):
        super().__init__()
        self.query = PointQuery(config)
        self.attention = LandmarkAttention(config)
        self.style = Style(VECTOR_DIM, config.channels)
        self.offsets = offset_mlp(config, config.channels)

    def forward(self, points: AnchorCache, signals: Signals) -> Float[Tensor, "m o"]:
        """See `Control`."""
        q = self.query(points)  # Eq. 9
        y = adain(q, *self.attention(q, points, signals))  # Eqs 9-11: fine, by the landmarks
        y = adain(y, *self.style(signals.vector))  # Eq. 12: coarse, by the 3DMM parameters
        return self.offsets(y)  # Eq. 7
