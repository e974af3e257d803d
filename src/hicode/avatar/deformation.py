"""Deformation of canonical Gaussians by facial motion (HiCoDe, Eqs 7-12).

n Gaussians, m anchors, 478 landmarks, c channels. Everything is in the canonical head frame; the head pose is applied by the camera.

Two layers, each a function of the frame's 64 expression parameters and 478 pose-free landmarks:

- *carrier* (our addition, `base="mesh"`): every Gaussian is bound to the 3DMM's surface and rides on it, plus the landmarks' residual against
  the 3DMM spread by fixed weights. It has no trained parts, so it costs nothing in the backward pass.
- *hierarchical control* (the paper's, Eqs 9-12): landmark attention gives a mean and deviation for a first AdaIN, the 3DMM parameters for a
  second, and a small MLP with zero-initialised output turns the result into offsets (Eq. 7). Untrained, it is the identity.

Table 2's ablations are settings of the same control: what each level is made of (`fine`, `coarse`); `hicode.training.stages.ABLATIONS` lists them.

The control is a smooth field over canonical space, a function of position alone within a frame. It is evaluated on m anchors chosen among the
Gaussians and interpolated (`anchors=0` evaluates it on every Gaussian, as the paper does).
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hicode.errors import InputError
from hicode.gaussians import Gaussians
from hicode.motion import EXPRESSION_DIM, IDENTITY_DIM, N_LANDMARKS

TURN_UNIT = 0.1  # sine of a common turn of the head: what colours see is about 1
STYLE_TOKENS = 8  # what the 3DMM vector becomes for a cross-attention block to attend to


@dataclass(frozen=True)
class DeformationConfig:
    """How the canonical Gaussians move."""

    channels: int = 64
    """c: width of the embeddings that attention and AdaIN work in"""
    hidden: int = 64
    """width of the small MLPs"""
    position_frequencies: int = 5
    """octaves of the sinusoidal embedding of Gaussian positions. Deformable-3D-Gaussians' ten, the paper's, let neighbours 1 mm apart move on their own:
    on unseen frames lips are some 10 % farther from their place (docs/log.md)"""
    landmark_frequencies: int = 2
    """octaves of the sinusoidal embedding of landmarks; the paper's: 10. The finest of ten tells tenths of a millimetre apart, which are noise: lips of unseen
    frames are as near to their place with two, or nearer (docs/log.md)"""
    anchors: int = 4096
    """points on which the control is evaluated before interpolation; 0: every Gaussian (the paper)"""
    base: Literal["mesh", "none"] = "mesh"
    """carrier under the control: the 3DMM surface with the landmarks' residual, or nothing (the paper)"""
    fine: Literal["adain", "addition", "attention", "concat", "none"] = "adain"
    """landmarks enter by attention and the first AdaIN (Eqs 9-11). Table 2: by adding what attention gives, by a cross-attention block in the AdaIN's
    place, by an encoding of all of them concatenated to each point's features, or not at all"""
    coarse: Literal["adain", "literal", "addition", "attention", "concat", "audio", "none"] = "adain"
    """the 3DMM vector enters by a second AdaIN whose style is a learned affine map of it. "literal": its mean and deviation, two numbers (Eq. 12 as
    printed). Table 2: added, by a cross-attention block, concatenated, or not at all; "audio": speech features take the vector's place in the AdaIN"""
    speech_dim: int = 768
    """width of a frame's speech features (two rows of the embedded encoder's 384); read with `coarse="audio"` only"""
    shade: bool = True
    """whether the control also shifts colours (not in Eq. 7): a mouth darkens as it opens, skin folds shade; off: the paper"""
    attention: Literal["nearness", "learned"] = "nearness"
    """what a point attends to landmarks by: its distance to each under the mean face, or (the paper) the products of queries and keys too. What these learned came to nothing
    beside the distance (docs/log.md), and weights that stand still cost a quarter of an iteration less"""
    attention_reaches: tuple[float, ...] = (0.15,)
    """head units (dm): landmarks count by their nearness to a point, exp(-d² / 2 reach²), each reach for an equal share of the channels. Without it trained controls do not
    care where the landmarks are; a second, finer one pays in short trainings (docs/log.md). Learned attention takes one, or, by the query alone (the paper), none"""
    expression_reach: float = 1.5
    """the second AdaIN hears each principal component of the training clip's expressions bent towards this many of its deviations; 0: as it is (the
    paper). A clip of seconds shows what a few mixtures of the 64 parameters do, and an affine style goes on beyond them in a straight line"""
    max_offset: float = 0.1
    """head units (dm): Δl per unit of network output, so that the output layer learns at the pace of the others"""


def sinusoidal(x: Float[Tensor, "*b d"], frequencies: int) -> Float[Tensor, "*b e"]:
    """x with sin and cos of x π 2^k, k < frequencies: e = d (1 + 2 frequencies)."""
    octaves = torch.pi * 2.0 ** torch.arange(frequencies, dtype=x.dtype, device=x.device)
    phase = (x[..., None] * octaves).flatten(-2)
    return torch.cat([x, phase.sin(), phase.cos()], -1)


def normalize_over_points(x: Float[Tensor, "n c"], eps: float = 1e-5) -> Float[Tensor, "n c"]:
    """(x - μ(x)) / σ(x) per channel, statistics over the n points."""
    centred = x - x.mean(0, keepdim=True)
    # torch's own std_mean takes twice as long along the first dimension. The floor keeps the root's gradient finite in a channel that is constant.
    std = centred.square().mean(0, keepdim=True).clamp_min(1e-12).sqrt()
    return centred / (std + eps)


def adain(x: Float[Tensor, "n c"], mean: Float[Tensor, "*n c"], std: Float[Tensor, "*n c"]) -> Float[Tensor, "n c"]:
    """Re-normalise features over the n points to a given mean and deviation (Eq. 11).

    Statistics run over points, so the result does not depend on their order.
    """
    return std * normalize_over_points(x) + mean


def landmark_attention(
    q: Float[Tensor, "n c"], k: Float[Tensor, "l c"], v: Float[Tensor, "l c"], near: Float[Tensor, "n l"] | None = None
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Mean and deviation of the landmarks' values as each point attends to them (Eqs 9-10).

    Softmax over the landmarks, scores scaled by 1/√c (the paper leaves the scale out) and shifted by `near` (`Standing.attention`).
    """
    q = q * q.shape[1] ** -0.5
    attention = torch.softmax(q @ k.T if near is None else torch.addmm(near, q, k.T), -1)
    return mean_and_deviation(*(attention @ torch.cat([v, v * v], 1)).chunk(2, 1))


def mean_and_deviation(
    mean: Float[Tensor, "n c"], second: Float[Tensor, "n c"]
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Of E[v] and E[v²] (Eq. 10). The root is that of max(variance, 0) + 1e-5: rounding makes the variance negative where attention is sharp."""
    return mean, ((second - mean * mean).clamp_min(0) + 1e-5).sqrt()


@dataclass(frozen=True, eq=False)
class StillAttention:
    """Attention that no frame changes: for each share of the channels weights "m 478" whose rows sum to 1."""

    parts: tuple[Float[Tensor, "m 478"], ...]

    def moments(self, v: Float[Tensor, "478 c"]) -> tuple[Float[Tensor, "m c"], Float[Tensor, "m c"]]:
        """E[v] and E[v²] of the landmarks' values."""
        found = []
        for weights, share in zip(self.parts, v.chunk(len(self.parts), 1), strict=True):
            found.append((weights @ torch.cat([share, share * share], 1)).chunk(2, 1))
        return tuple(torch.cat(moment, 1) for moment in zip(*found))


@dataclass(frozen=True, eq=False)
class Standing:
    """What the control needs of its points beside their query: a function of canonical positions alone, in which nothing learns."""

    attention: StillAttention | Float[Tensor, "m 478"] | None
    """its weights where they stand still, else what nearness adds to its scores, if anything"""


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer that starts as nothing."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class CrossAttention(nn.Module):
    """A transformer's cross-attention block, one head: LayerNorm(x + W_o softmax(W_q x Kᵀ / √c) V). Stands in for an AdaIN in Table 2's "attention"."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.out, self.norm = (
            nn.Linear(channels, channels),
            nn.Linear(channels, channels),
            nn.LayerNorm(channels),
        )

    def forward(
        self, x: Float[Tensor, "n c"], k: Float[Tensor, "l c"], v: Float[Tensor, "l c"]
    ) -> Float[Tensor, "n c"]:
        attention = torch.softmax((self.query(x) * x.shape[1] ** -0.5) @ k.T, -1)
        return self.norm(x + self.out(attention @ v))


class HierarchicalControl(nn.Module):
    """Eqs 9-12 and the MLP to offsets. Inputs: canonical points, landmarks, expression, identity; outputs Δ "n o", o = 10 (means 3, quats 4, log-scales 3) or, with `shade`, 13 (colours 3)."""

    def __init__(self, config: DeformationConfig, center: Tensor, radius: float):
        """`center` "3" and `radius` (head units) map the head into [-1, 1]^3 for the sinusoidal embeddings."""
        super().__init__()
        self.config = config
        c, h = config.channels, config.hidden
        reaches = len(config.attention_reaches)
        if self.stands_still and (not reaches or c % reaches):
            raise InputError(
                f"Attention by nearness cannot divide {c} channels among {reaches} attention_reaches. Give as many as divide them, or learned attention."
            )
        if config.attention == "learned" and reaches > 1:
            raise InputError(f"Learned attention takes one of attention_reaches or none, not {reaches}.")
        self.register_buffer("center", center.clone().float())
        self.register_buffer("radius", torch.tensor(float(radius)))
        self.register_buffer("expression_mean", torch.zeros(EXPRESSION_DIM))
        self.register_buffer("expression_std", torch.ones(EXPRESSION_DIM))
        if config.expression_reach:
            self.register_buffer("expression_components", torch.eye(EXPRESSION_DIM))
            self.register_buffer("component_std", torch.ones(EXPRESSION_DIM))
        self.register_buffer("landmark_mean", torch.zeros(N_LANDMARKS, 3))
        self.register_buffer("landmark_std", torch.tensor(0.02))
        self.query = nn.Sequential(nn.Linear(3 * (1 + 2 * config.position_frequencies), h), nn.ReLU(), nn.Linear(h, c))
        if config.fine in ("adain", "addition", "attention"):
            # A landmark's value, and its key where attention learns, come from its position, its displacement from the mean (small: normalised on its own) and its index.
            width = c if self.stands_still else 2 * c
            self.key_value = nn.Sequential(
                nn.Linear(3 * (2 + 2 * config.landmark_frequencies), h), nn.ReLU(), nn.Linear(h, width)
            )
            self.landmark_code = nn.Parameter(0.1 * torch.randn(N_LANDMARKS, width))
        if config.fine == "attention":
            self.fine_attention = CrossAttention(c)
        if config.fine == "concat":
            self.landmark_encoder = nn.Sequential(nn.Linear(3 * N_LANDMARKS, h), nn.ReLU(), nn.Linear(h, c))
        if config.coarse in ("adain", "audio"):
            self.style = nn.Linear(
                config.speech_dim if config.coarse == "audio" else EXPRESSION_DIM + IDENTITY_DIM, 2 * c
            )
            nn.init.normal_(self.style.weight, std=0.02 if config.coarse == "adain" else 0.01)
            with torch.no_grad():
                self.style.bias[:c] = 1.0  # deviation 1, mean 0: the second AdaIN starts as a plain normalisation
                self.style.bias[c:] = 0.0
        if config.coarse == "audio":
            self.register_buffer("speech_mean", torch.zeros(config.speech_dim))
            self.register_buffer("speech_std", torch.ones(config.speech_dim))
        if config.coarse in ("addition", "concat"):
            self.shift = nn.Linear(EXPRESSION_DIM + IDENTITY_DIM, c)
        if config.coarse == "attention":
            self.tokens = nn.Linear(EXPRESSION_DIM + IDENTITY_DIM, 2 * c * STYLE_TOKENS)
            self.coarse_attention = CrossAttention(c)
        self.register_buffer("turn_mean", torch.eye(3))
        features = c * (1 + (config.fine == "concat") + (config.coarse == "concat"))
        self.head = nn.Sequential(
            nn.Linear(features, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), _zero_linear(h, 13 if config.shade else 10)
        )

    def set_statistics(
        self,
        expression: Float[Tensor, "t 64"],
        landmarks: Float[Tensor, "t 478 3"],
        speech: Float[Tensor, "t s"] | None = None,
        turn: Float[Tensor, "t 3 3"] | None = None,
    ) -> None:
        """Normalisation of the control signals, from training frames only."""
        if turn is not None:
            u, _, v = torch.linalg.svd(turn.mean(0))  # the rotation nearest to the mean
            self.turn_mean.copy_(u @ v)
        if self.config.coarse == "audio":
            assert speech is not None and speech.shape[1] == self.config.speech_dim, (
                "the motion carries no speech features of this width"
            )
            self.speech_mean.copy_(speech.mean(0))
            self.speech_std.copy_(speech.std(0, correction=0) + 1e-3)
        self.expression_mean.copy_(expression.mean(0))
        self.expression_std.copy_(
            expression.std(0, correction=0) + 0.02
        )  # floor: an action that never moves must not be amplified
        if hasattr(self, "expression_components"):
            normalized = ((expression - self.expression_mean) / self.expression_std).double()
            variance, components = torch.linalg.eigh(normalized.T @ normalized / len(normalized))
            self.expression_components.copy_(components.T)
            self.component_std.copy_(variance.clamp_min(0).sqrt())
        self.landmark_mean.copy_(landmarks.mean(0))
        self.landmark_std.copy_((landmarks - landmarks.mean(0)).std(correction=0).clamp_min(1e-3))

    @property
    def stands_still(self) -> bool:
        """Whether attention is by nearness alone. A cross-attention block in its place always learns."""
        return self.config.attention == "nearness" and self.config.fine in ("adain", "addition")

    def turned(self, turn: Float[Tensor, "3 3"] | None) -> Float[Tensor, "3"] | None:
        """How far a head's rotation is from the clip's mean one: sine times axis, over TURN_UNIT. None without a rotation."""
        if turn is None:
            return None
        away = self.turn_mean.T @ turn
        return torch.stack([away[2, 1] - away[1, 2], away[0, 2] - away[2, 0], away[1, 0] - away[0, 1]]) / (
            2 * TURN_UNIT
        )

    @torch.no_grad()
    def standing(self, points: Float[Tensor, "m 3"]) -> Standing:
        """What callers may keep while the points stand still."""
        squared = torch.cdist(points, self.landmark_mean).square()
        nearest = squared.amin(1, keepdim=True)
        attention = None
        if self.config.fine in ("adain", "addition"):
            scores = [(nearest - squared) / (2 * reach * reach) for reach in self.config.attention_reaches]
            if self.stands_still:
                attention = StillAttention(tuple(torch.softmax(score, -1) for score in scores))
            elif scores:
                attention = scores[0]
        return Standing(attention)

    def heard(self, expression: Float[Tensor, "64"]) -> Float[Tensor, "64"]:
        """An expression as the style hears it: normalised and, with `expression_reach`, no farther from the mean than the training clip went."""
        normalized = (expression - self.expression_mean) / self.expression_std
        if not self.config.expression_reach:
            return normalized
        limit = self.config.expression_reach * self.component_std
        part = normalized[None] @ self.expression_components.T
        return ((limit * torch.tanh(part / limit.clamp_min(1e-6))) @ self.expression_components)[0]

    def keys_values(
        self, landmarks: Float[Tensor, "478 3"]
    ) -> tuple[Float[Tensor, "478 c"] | None, Float[Tensor, "478 c"]]:
        """K and V of the landmark attention (Eq. 9); no K where attention stands still."""
        position = (landmarks - self.center) / self.radius
        displacement = (landmarks - self.landmark_mean) / self.landmark_std
        kv = self.landmark_code + self.key_value(
            torch.cat([sinusoidal(position, self.config.landmark_frequencies), displacement], -1)
        )
        return (None, kv) if self.stands_still else kv.chunk(2, 1)

    def attended(
        self,
        q: Float[Tensor, "m c"],
        landmarks: Float[Tensor, "478 3"],
        attention: StillAttention | Float[Tensor, "m 478"] | None,
    ) -> tuple[Float[Tensor, "m c"], Float[Tensor, "m c"]]:
        """Mean and deviation of the landmarks' values as each point attends to them (Eqs 9-10)."""
        k, v = self.keys_values(landmarks)
        if self.stands_still:
            return mean_and_deviation(*attention.moments(v))
        return landmark_attention(q, k, v, attention)

    def embed(self, points: Float[Tensor, "m 3"]) -> Float[Tensor, "m c"]:
        """Q: depends only on canonical positions, so callers may keep it while these stand still."""
        return self.query(sinusoidal((points - self.center) / self.radius, self.config.position_frequencies))

    def forward(
        self,
        points: Float[Tensor, "m 3"],
        landmarks: Float[Tensor, "478 3"],
        expression: Float[Tensor, "64"],
        identity: Float[Tensor, "80"],
        query: Float[Tensor, "m c"] | None = None,
        speech: Float[Tensor, "s"] | None = None,
        standing: Standing | None = None,
    ) -> Float[Tensor, "m o"]:
        """`query` and `standing` are `embed` and `standing` of the points, where the caller has kept them."""
        q = self.embed(points) if query is None else query
        standing = standing or self.standing(points)
        c, fine, coarse = self.config.channels, self.config.fine, self.config.coarse
        if fine == "adain":
            y = adain(q, *self.attended(q, landmarks, standing.attention))
        elif fine == "addition":
            y = q + self.attended(q, landmarks, standing.attention)[0]
        elif fine == "attention":
            y = self.fine_attention(q, *self.keys_values(landmarks))
        else:
            y = q
        beside = []  # concatenated to each point's features, the same for all points
        if fine == "concat":
            displacement = (landmarks - self.landmark_mean) / self.landmark_std
            beside.append(self.landmark_encoder(displacement.flatten()))
        normalized = torch.cat([self.heard(expression), identity])
        if coarse == "adain":
            # Deviation from Eq. 12: the style is a learned affine map of the 3DMM vector, not its mean and deviation: two numbers
            # cannot tell one expression from another (measured in a study: LMD 2.64 px literal, 1.74 learned).
            std, mean = self.style(normalized).split(c)
            y = adain(y, mean, std)
        elif coarse == "literal":
            vector = torch.cat([expression, identity])
            y = adain(y, vector.mean(), vector.std(correction=0))
        elif coarse == "audio":
            std, mean = self.style((speech - self.speech_mean) / self.speech_std).split(c)
            y = adain(y, mean, std)
        elif coarse == "addition":
            y = y + self.shift(normalized)
        elif coarse == "attention":
            y = self.coarse_attention(y, *self.tokens(normalized).view(2, STYLE_TOKENS, c))
        elif coarse == "concat":
            beside.append(self.shift(normalized))
        return self.head(torch.cat([y, *(b.expand(len(q), c) for b in beside)], 1) if beside else y)


@dataclass(frozen=True, eq=False)
class Mix:
    """Which rows of a table each of n results is made of, and by what weights."""

    index: Int[Tensor, "n k"]
    weight: Float[Tensor, "n k"]

    @cached_property
    def transposed(self):
        """The adjoint as a sparse matrix, of as many rows as are named."""
        from scipy.sparse import csr_matrix

        n, k = self.index.shape
        of = np.repeat(np.arange(n), k)
        return csr_matrix(
            (self.weight.numpy().ravel(), (self.index.numpy().ravel(), of)),
            shape=(int(self.index.max()) + 1, n),
            dtype=np.float32,
        )


NEAREST_LANDMARKS = 8  # that a Gaussian rides on


@dataclass(frozen=True, eq=False)
class Binding:
    """How each Gaussian rides on the face: fixed when it is made, inherited by its offspring.

    vertices  "n 3"  mesh vertices of the nearest triangle · weights  "n 3"  their barycentric weights times a fall-off with distance
    landmarks "n 8"  nearest landmarks · landmark_weights "n 8"  weights of their residual
    """

    vertices: Int[Tensor, "n 3"]
    weights: Float[Tensor, "n 3"]
    landmarks: Int[Tensor, "n 8"]
    landmark_weights: Float[Tensor, "n 8"]

    def tensors(self) -> dict[str, Tensor]:
        return {k: getattr(self, k) for k in ("vertices", "weights", "landmarks", "landmark_weights")}

    def select(self, index: Tensor) -> "Binding":
        return Binding(**{k: v[index] for k, v in self.tensors().items()})

    def cat(self, other: "Binding") -> "Binding":
        return Binding(**{k: torch.cat([v, getattr(other, k)]) for k, v in self.tensors().items()})


def bind(
    points: Float[Tensor, "n 3"],
    vertices: Float[Tensor, "v 3"],
    triangles: Int[Tensor, "f 3"],
    landmarks: Float[Tensor, "478 3"],
    reach: float = 0.25,
) -> Binding:
    """Bind points to a mesh and landmarks in the same expression as the points.

    The nearest surface point is found among samples of each triangle (15 per triangle: finer than the mesh's curvature). The carrier fades with
    exp(-(distance / reach)^2): hair far from the face stays put. `reach` in head units (0.25 = 25 mm).
    """
    from scipy.spatial import cKDTree

    xyz = points.detach().cpu().numpy()
    corners = vertices.detach().cpu().numpy()[triangles.cpu().numpy()]
    steps = np.array([(i / 4, j / 4, 1 - (i + j) / 4) for i in range(5) for j in range(5 - i)], np.float32)
    samples = np.einsum("sb,fbc->fsc", steps, corners).reshape(-1, 3)
    distance, nearest = cKDTree(samples).query(xyz)
    fall_off = np.exp(-((distance / reach) ** 2))[:, None]
    barycentric = steps[nearest % len(steps)] * fall_off

    lm_distance, lm_index = cKDTree(landmarks.detach().cpu().numpy()).query(xyz, k=NEAREST_LANDMARKS)
    # Kernel width follows the local landmark spacing (the 4th neighbour), so that lips do not pull on the nose.
    kernel = np.exp(-((lm_distance / (0.5 * lm_distance[:, 3:4] + 0.03)) ** 2))
    kernel = kernel / np.maximum(kernel.sum(1, keepdims=True), 1e-6) * np.exp(-((lm_distance[:, :1] / reach) ** 2))
    return Binding(
        triangles.cpu()[torch.from_numpy(nearest // len(steps))].long(),
        torch.from_numpy(barycentric.astype(np.float32)),
        torch.from_numpy(lm_index.astype(np.int64)),
        torch.from_numpy(kernel.astype(np.float32)),
    )


class Carrier(nn.Module):
    """The carrier of `base="mesh"`: where the 3DMM surface and the landmarks take each bound Gaussian. Linear in the motion, nothing trained."""

    def __init__(
        self,
        expression_basis: Float[Tensor, "64 v 3"],
        landmark_neutral: Float[Tensor, "478 3"],
        landmark_basis: Float[Tensor, "64 478 3"],
    ):
        super().__init__()
        self.register_buffer("expression_basis", expression_basis.clone())
        self.register_buffer("landmark_neutral", landmark_neutral.clone())
        self.register_buffer("landmark_basis", landmark_basis.clone())
        self.register_buffer("residual_mean", torch.zeros(N_LANDMARKS, 3))

    def residual(
        self, expression: Float[Tensor, "*b 64"], landmarks: Float[Tensor, "*b 478 3"]
    ) -> Float[Tensor, "*b 478 3"]:
        """What the landmarks say beyond the 3DMM."""
        model = self.landmark_neutral + torch.tensordot(expression, self.landmark_basis, 1)
        return landmarks - model

    def set_statistics(self, expression: Float[Tensor, "t 64"], landmarks: Float[Tensor, "t 478 3"]) -> None:
        """The constant part of the residual is shape, not motion: it is learned by the canonical positions and taken out here."""
        self.residual_mean.copy_(self.residual(expression, landmarks).mean(0))

    def beside_the_mesh(
        self, expression: Float[Tensor, "64"], landmarks: Float[Tensor, "478 3"]
    ) -> Float[Tensor, "478 3"]:
        """The landmarks' residual, displacements that `Binding.landmarks` tells of."""
        return self.residual(expression, landmarks) - self.residual_mean

    @torch.no_grad()
    def forward(
        self, binding: Binding, expression: Float[Tensor, "64"], landmarks: Float[Tensor, "478 3"]
    ) -> Float[Tensor, "n 3"]:
        on_mesh = torch.tensordot(expression, self.expression_basis, 1)
        return _weighted_rows(on_mesh, binding.vertices, binding.weights) + _weighted_rows(
            self.beside_the_mesh(expression, landmarks), binding.landmarks, binding.landmark_weights
        )


def _weighted_rows(
    table: Float[Tensor, "m c"], index: Int[Tensor, "n k"], weight: Float[Tensor, "n k"]
) -> Float[Tensor, "n c"]:
    """out[i] = Σ_k weight[i, k] table[index[i, k]] for a table without gradient."""
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


class _MixRows(torch.autograd.Function):
    """`_weighted_rows` of a `Mix`, differentiable in the table. torch's own backward of it takes 15 ms at 35,000 x 4; a transposed sparse product takes 1."""

    @staticmethod
    def forward(ctx, table, mix):
        ctx.mix, ctx.rows = mix, len(table)
        return _weighted_rows(table, mix.index, mix.weight)

    @staticmethod
    def backward(ctx, grad):
        mix, back = ctx.mix, grad.new_zeros(ctx.rows, grad.shape[1])
        if grad.device.type == "cpu":
            found = mix.transposed @ grad.contiguous().numpy()
            back[: len(found)] = torch.from_numpy(found)
            return back, None
        spread = (mix.weight[..., None] * grad[:, None]).flatten(0, 1)
        return back.index_add_(0, mix.index.flatten(), spread), None


@dataclass(frozen=True, eq=False)
class Anchors:
    """Points that stand for the cloud in the control, and how each Gaussian interpolates between its 4 nearest."""

    points: Float[Tensor, "m 3"]
    index: Int[Tensor, "n 4"]
    weight: Float[Tensor, "n 4"]

    @cached_property
    def mix(self) -> Mix:
        return Mix(self.index, self.weight)


def choose_anchors(means: Float[Tensor, "n 3"], importance: Float[Tensor, "n"], count: int) -> Anchors:
    """Farthest-point sampling of the cloud under a metric stretched by `importance` (2 = twice as dense), then 4-nearest interpolation weights.

    Deterministic. Cost O(n count), compiled: 0.2 s for 35,000 x 4,096.
    """
    from scipy.spatial import cKDTree

    xyz = means.detach().cpu().numpy().astype(np.float32)
    chosen = _farthest_points(xyz, importance.cpu().numpy().astype(np.float32), min(count, len(xyz)))
    points = xyz[chosen]
    k = min(4, len(points))
    distance, index = cKDTree(points).query(xyz, k=k)
    distance, index = distance.reshape(len(xyz), k), index.reshape(len(xyz), k)
    # Inverse squared distance, softened by the farthest of the four so that the field is smooth across anchor cells.
    weight = 1 / (distance**2 + 0.05 * distance[:, -1:] ** 2 + 1e-12)
    weight = weight / weight.sum(1, keepdims=True)
    if k < 4:
        index = np.pad(index, ((0, 0), (0, 4 - k)))
        weight = np.pad(weight, ((0, 0), (0, 4 - k)))
    tensors = points, index.astype(np.int64), weight.astype(np.float32)
    return Anchors(*(torch.from_numpy(t).to(means.device) for t in tensors))


def _farthest_points(xyz: np.ndarray, importance: np.ndarray, count: int) -> np.ndarray:
    from numba import njit

    global _farthest_points_compiled
    if _farthest_points_compiled is None:

        @njit(cache=True, fastmath=True)
        def kernel(xyz, importance, count):
            n = xyz.shape[0]
            best = np.full(n, np.float32(1e30))
            chosen = np.empty(count, np.int64)
            current = 0
            for j in range(count):
                chosen[j] = current
                x, y, z = xyz[current, 0], xyz[current, 1], xyz[current, 2]
                far, far_value = 0, np.float32(-1)
                for i in range(n):
                    dx, dy, dz = xyz[i, 0] - x, xyz[i, 1] - y, xyz[i, 2] - z
                    d = dx * dx + dy * dy + dz * dz
                    best[i] = min(best[i], d)
                    value = best[i] * importance[i]
                    if value > far_value:
                        far, far_value = i, value
                current = far
            return chosen

        _farthest_points_compiled = kernel
    return _farthest_points_compiled(xyz, importance * importance, count)


_farthest_points_compiled = None


class Deformation(nn.Module):
    """F_Δ of Eq. 7 for one person: carrier plus hierarchical control. Holds what depends on the cloud (binding, anchors) beside what is trained."""

    def __init__(
        self,
        config: DeformationConfig,
        identity: Float[Tensor, "80"],
        center: Tensor,
        radius: float,
        carrier: Carrier | None,
    ):
        super().__init__()
        assert (carrier is not None) == (config.base == "mesh"), "the mesh base needs a carrier, and only it does"
        self.config = config
        self.register_buffer("identity", identity.clone().float())
        self.control = HierarchicalControl(config, center, radius)
        self.carrier = carrier
        self.binding: Binding | None = None
        self.anchors: Anchors | None = None
        self._query: Tensor | None = None
        self._standing: Standing | None = None

    def _apply(self, fn, recurse=True):
        """What `.to(device)` does, to binding and anchors too."""
        if self.binding is not None:
            self.binding = Binding(**{k: fn(v) for k, v in self.binding.tensors().items()})
        if self.anchors is not None:
            self.anchors = Anchors(fn(self.anchors.points), fn(self.anchors.index), fn(self.anchors.weight))
        self._query = self._standing = None
        return super()._apply(fn, recurse)

    def set_statistics(
        self,
        expression: Float[Tensor, "t 64"],
        landmarks: Float[Tensor, "t 478 3"],
        speech: Float[Tensor, "t s"] | None = None,
        turn: Float[Tensor, "t 3 3"] | None = None,
    ) -> None:
        self._standing = None
        self.control.set_statistics(expression, landmarks, speech, turn)
        if self.carrier is not None:
            self.carrier.set_statistics(expression, landmarks)

    def place_anchors(self, means: Float[Tensor, "n 3"]) -> None:
        """Choose anchors for the cloud as it stands; call again after points were added, removed, or moved far."""
        self._query = self._standing = None
        if not self.config.anchors or len(means) <= self.config.anchors:
            self.anchors = None
            return
        self.anchors = choose_anchors(means, self._importance(means), self.config.anchors)

    def _importance(self, means: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        """Three times denser where the landmarks move most (lips, eyelids), fading over 30 mm; the face twice as dense as hair."""
        from scipy.spatial import cKDTree

        landmarks = self.control.landmark_mean.cpu().numpy()
        spread = self.landmark_motion.cpu().numpy() if hasattr(self, "landmark_motion") else np.ones(len(landmarks))
        distance, index = cKDTree(landmarks).query(means.detach().cpu().numpy(), k=4)
        near = np.exp(-((distance[:, 0] / 0.3) ** 2))
        busy = spread[index].mean(1) / max(spread.max(), 1e-6)
        return torch.from_numpy((1 + near * (1 + 2 * busy)).astype(np.float32))

    def standing(self, points: Float[Tensor, "m 3"]) -> Standing:
        """`HierarchicalControl.standing` of the points that the control is evaluated on; of anchors, which stand still, it is kept."""
        if self._standing is not None:
            return self._standing
        standing = self.control.standing(points)
        if self.anchors is not None:
            self._standing = standing
        return standing

    def carry(
        self,
        expression: Float[Tensor, "64"],
        landmarks: Float[Tensor, "478 3"],
    ) -> Tensor | float:
        """Displacement by the carrier, "n 3", or 0 without one."""
        return self.carrier(self.binding, expression, landmarks) if self.carrier is not None else 0.0

    def forward(
        self,
        means: Float[Tensor, "n 3"],
        expression: Float[Tensor, "64"],
        landmarks: Float[Tensor, "478 3"],
        speech: Float[Tensor, "s"] | None = None,
    ) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 4"], Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
        """(Δl, Δr, Δs) of Eq. 7 for canonical positions `means`, and the shift of colours (zeros without `shade`). `speech`, a frame's features, is
        needed (InputError) and read with `coarse="audio"` only.

        Gradients reach the network, not the canonical positions through their embedding: with anchors fixed points stand for them, and without
        anchors the embedding's gradient only fights the photometric one.
        """
        if self.config.coarse == "audio" and speech is None:
            raise InputError(
                "This avatar is moved by speech features (the ablation None), and the motion carries none. Speak, or use a clip with sound."
            )
        points = self.anchors.points if self.anchors is not None else means.detach()
        query = self._query
        if query is None and not torch.is_grad_enabled():
            query = self._query = self.control.embed(points)
        elif torch.is_grad_enabled():
            query = self._query = None
        delta = self.control(points, landmarks, expression, self.identity, query, speech, self.standing(points))
        if self.anchors is not None:
            delta = _MixRows.apply(delta, self.anchors.mix)
        d_means = delta[:, :3] * self.config.max_offset + self.carry(expression, landmarks)
        return d_means, delta[:, 3:7], delta[:, 7:10], delta[:, 10:] if self.config.shade else torch.zeros_like(means)

    def moved(
        self,
        gaussians: Gaussians,
        expression: Float[Tensor, "64"],
        landmarks: Float[Tensor, "478 3"],
        speech: Float[Tensor, "s"] | None = None,
        turn: Float[Tensor, "3 3"] | None = None,
    ) -> Gaussians:
        """The cloud at one frame: Eqs 7-8, and its colours at the head's turn (`turn`, its rotation to the camera)."""
        offsets = self(gaussians.means, expression, landmarks, speech)
        return gaussians.deformed(*offsets).turned(self.control.turned(turn))

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, config) from which `from_state` makes the same deformation."""
        tensors = {f"net.{k}": v for k, v in self.state_dict().items()}
        if self.binding is not None:
            tensors |= {f"binding.{k}": v for k, v in self.binding.tensors().items()}
        if self.anchors is not None:
            tensors |= {
                "anchors.points": self.anchors.points,
                "anchors.index": self.anchors.index,
                "anchors.weight": self.anchors.weight,
            }
        return tensors, asdict(self.config)

    @staticmethod
    def from_state(tensors: dict[str, Tensor], config: dict) -> "Deformation":
        cfg = DeformationConfig(**config | {"attention_reaches": tuple(config["attention_reaches"])})
        net = {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")}
        carrier = None
        if cfg.base == "mesh":
            carrier = Carrier(
                *(net[f"carrier.{k}"] for k in ("expression_basis", "landmark_neutral", "landmark_basis"))
            )
        deformation = Deformation(cfg, net["identity"], net["control.center"], float(net["control.radius"]), carrier)
        if "landmark_motion" in net:
            deformation.register_buffer("landmark_motion", net["landmark_motion"].clone())
        deformation.load_state_dict(net)
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if binding := part("binding."):
            deformation.binding = Binding(**binding)
        if anchors := part("anchors."):
            deformation.anchors = Anchors(**anchors)
        return deformation
