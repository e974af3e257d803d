"""Learning the sync model: which mouth filters sound predicts best, over clips whose offsets are found together."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.speech.sync import (
    CONTEXT_FRAMES,
    DIRECTIONS,
    MAX_LAG_FRAMES,
    MOUTH_FRAMES,
    SyncModel,
    SyncResult,
    in_context,
    lag_curve,
    lagged,
    mouth_measures,
    peak_lag,
    stacked,
    standardised,
)

PRINCIPAL = 96  # strongest directions of features that are kept: no less accurate, and each regression is small
ROUNDS = 4


def fit_sync(
    pairs: list[tuple[Float[Tensor, "_ d"], Float[Tensor, "_t 478 3"]]],
    encoder: str,
    learned_from: tuple[str, ...],
    anchor: int | None = None,
    ridge: float = 3.0,
) -> tuple[SyncModel, list[SyncResult]]:
    """The model of all clips, and each clip's offset, found together from none.

    A pair is features and landmarks of a clip, best one a speaker. In each round the offset and margin of a clip come
    from a model of the other clips, so that no clip vouches for itself. Offsets are relative: clip `anchor` is in sync
    by definition; without one, the median clip is. A clip weighs as the square root of its length, since speakers teach
    more than minutes do.
    """
    frames = torch.cat([f.unflatten(0, (-1, 2)).mean(1) for f, _ in pairs]).double()
    mean, std = frames.mean(0), frames.std(0) + 1e-3
    _, vectors = torch.linalg.eigh(torch.cov(((frames - mean) / std).T).reshape(len(mean), len(mean)))
    directions = vectors[:, -min(PRINCIPAL, frames.shape[1]) :]  # "d p"
    inputs = [in_context(((f.double() - mean) / std) @ directions) for f, _ in pairs]
    targets = [stacked(standardised(mouth_measures(points)).double(), MOUTH_FRAMES) for _, points in pairs]
    offsets, curves = [0.0] * len(pairs), [torch.zeros(2 * MAX_LAG_FRAMES + 1)] * len(pairs)
    for _ in range(ROUNDS if len(pairs) > 1 else 0):
        moments = _moments(inputs, targets, offsets)
        curves = []
        for k, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            weight, mouth = _solve(moments[:k] + moments[k + 1 :], ridge)
            curves.append(lag_curve(x @ weight, y @ mouth))
        peaks = [peak_lag(curve) for curve in curves]
        # Not rounded: an anchor at half a frame would move everyone by a whole one, or not, by chance.
        zero = peaks[anchor] if anchor is not None else float(np.median(peaks))
        offsets = [peak - zero for peak in peaks]
    weight, mouth = _solve(_moments(inputs, targets, offsets), ridge)
    n = len(CONTEXT_FRAMES)
    weight = torch.einsum("dp,cpk->cdk", directions, weight.unflatten(0, (n, -1))).flatten(0, 1)
    model = SyncModel(
        encoder, mean.repeat(n).float(), std.repeat(n).float(), weight.float(), mouth.float(), learned_from
    )
    return model, [
        SyncResult(offset, float(curve.max() - curve.median()), float(curve.max()), len(y))
        for offset, curve, y in zip(offsets, curves, targets, strict=True)
    ]


class _Moments(NamedTuple):
    """Second moments of a clip's sound x and mouth y, both centred: sums over frames times `weight`."""

    xx: Float[Tensor, "c c"]
    xy: Float[Tensor, "c m"]
    yy: Float[Tensor, "m m"]
    weight: float
    frames: int


def _moments(inputs: list[Tensor], targets: list[Tensor], offsets: list[float]) -> list[_Moments]:
    out = []
    for x, y, offset in zip(inputs, targets, offsets, strict=True):
        a, b = lagged(x, y, round(offset))
        weight = len(a) ** -0.5
        out.append(_Moments(weight * a.T @ a, weight * a.T @ b, weight * b.T @ b, weight, len(a)))
    return out


def _solve(moments: list[_Moments], strength: float) -> tuple[Float[Tensor, "c k"], Float[Tensor, "m k"]]:
    """Ridge regression of the mouth on the sound, then the k mouth directions that it predicts best (unit variance)."""
    frames = sum(m.frames for m in moments)
    scale = frames / sum(m.weight * m.frames for m in moments)
    xx = scale * torch.stack([m.xx for m in moments]).sum(0)
    xy = scale * torch.stack([m.xy for m in moments]).sum(0)
    yy = scale * torch.stack([m.yy for m in moments]).sum(0)
    weight = torch.linalg.solve(xx + strength * frames**0.5 * torch.eye(len(xx), dtype=xx.dtype), xy)
    explained = weight.T @ xy
    # A hundredth of the mean variance keeps directions that hardly move, the tracker's jitter, from being chosen.
    floor = 0.01 * yy.diagonal().mean() + 1e-9
    inverse = torch.linalg.inv(torch.linalg.cholesky(yy + floor * torch.eye(len(yy), dtype=yy.dtype)))
    _, vectors = torch.linalg.eigh(inverse @ (explained + explained.T) @ inverse.T)
    mouth = frames**0.5 * inverse.T @ vectors[:, -DIRECTIONS:]
    return weight @ mouth, mouth
