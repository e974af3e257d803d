"""Audio-video offset: how many frames the mouth is later than the sound.

A ridge regression predicts four mouth measures (opening, width, lip height, jaw) from speech features; the lag at which prediction and picture
correlate best is the offset. It ships with weights learned from speakers that are in no evaluation clip (tools/pretrain_speech.py says which),
so it also serves as a score; it is not SyncNet, and is never called AVConf. Every score has a control: the same features rotated in time.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.files import load_tensors, save_tensors
from hicode.motion import LEFT_EYE_OUTER, MOUTH_CORNERS_INNER, RIGHT_EYE_OUTER

MAX_LAG_FRAMES = 10
PRINCIPAL = 96
CONTEXT_FRAMES = range(-2, 4)  # frames of features that predict a frame: lips move before they are heard
# Sound and picture of different speakers, 8 s long, 56 pairs: margins of .11 in the median, .21 at 95 %, .23 at most; of the same: .40 at least.
RELIABLE_MARGIN = 0.25

_WEIGHTS = Path(__file__).parent.parent / "weights" / "sync.safetensors"
_SCHEMA, _VERSION = "hicode-sync", 1


@dataclass(frozen=True)
class SyncResult:
    """offset_frames: positive where the mouth is later than the sound, to a fraction of a frame. margin: correlation at the best lag minus its
    median over all lags. correlation: at the best lag. reliable: whether an offset so estimated should be believed."""

    offset_frames: float
    margin: float
    correlation: float

    @property
    def reliable(self) -> bool:
        return self.margin >= RELIABLE_MARGIN


@dataclass(frozen=True)
class SyncModel:
    """Standardised features in context → standardised mouth measures. `learned_from` names the training clips."""

    encoder: str
    mean: Float[Tensor, "c"]
    std: Float[Tensor, "c"]
    weight: Float[Tensor, "c 4"]
    learned_from: tuple[str, ...]

    def predict(self, features: Float[Tensor, "2*t d"]) -> Float[Tensor, "t 4"]:
        return ((in_context(features) - self.mean) / self.std) @ self.weight

    def save(self, path: Path | str = _WEIGHTS) -> None:
        tensors = {"mean": self.mean, "std": self.std, "weight": self.weight}
        config = {"encoder": self.encoder, "learned_from": list(self.learned_from)}
        save_tensors(path, {k: v.half() for k, v in tensors.items()}, _SCHEMA, _VERSION, config)

    @staticmethod
    @cache
    def load(path: Path | str = _WEIGHTS) -> "SyncModel":
        """The shipped weights, or another file of that kind."""
        tensors, config = load_tensors(path, _SCHEMA, _VERSION)
        return SyncModel(config["encoder"], **{k: v.float() for k, v in tensors.items()}, learned_from=tuple(config["learned_from"]))


def mouth_measures(landmarks: Float[Tensor, "t 478 3"]) -> Float[Tensor, "t 4"]:
    """Opening, width, lip height and jaw drop over the distance of the outer eye corners; distances in space, so scale and pose drop out."""

    def distance(a: int, b: int) -> Tensor:
        return (landmarks[:, a] - landmarks[:, b]).norm(dim=-1)

    opening = (distance(13, 14) + distance(82, 87) + distance(312, 317)) / 3
    measures = [opening, distance(*MOUTH_CORNERS_INNER), distance(0, 17), distance(1, 152)]
    return torch.stack(measures, 1) / distance(RIGHT_EYE_OUTER, LEFT_EYE_OUTER)[:, None].clamp(min=1e-6)


def in_context(features: Float[Tensor, "2*t d"]) -> Float[Tensor, "t c"]:
    """The mean of each frame's two features beside its neighbours'; the ends repeat."""
    frames = features.unflatten(0, (-1, 2)).mean(1)
    index = torch.arange(len(frames))[:, None] + torch.tensor(CONTEXT_FRAMES)
    return frames[index.clamp(0, len(frames) - 1)].flatten(1)


def fit_sync(
    pairs: list[tuple[Float[Tensor, "2*t d"], Float[Tensor, "t 478 3"]]],
    encoder: str,
    learned_from: tuple[str, ...],
    anchor: int | None = None,
    ridge: float = 3.0,
) -> tuple[SyncModel, list[float]]:
    """Ridge regression over clips, their measures standardised each, and each clip's offset, found together in four rounds from none.

    In each round a clip's offset comes from a model of the other clips, so a clip cannot vouch for itself. Offsets are only relative: the clip
    number `anchor` is in sync by definition; without one, the median clip is. Features are reduced to their PRINCIPAL strongest directions, which
    costs no accuracy and makes each of the many small regressions cheap; the model folds the reduction in.
    """
    frames = torch.cat([f.unflatten(0, (-1, 2)).mean(1) for f, _ in pairs]).double()
    mean, std = frames.mean(0), frames.std(0) + 1e-3
    _, vectors = torch.linalg.eigh(torch.cov(((frames - mean) / std).T))
    directions = vectors[:, -min(PRINCIPAL, frames.shape[1]) :]  # "d p"
    inputs = [in_context(((f.double() - mean) / std) @ directions) for f, _ in pairs]
    targets = [_standardised(mouth_measures(points)).double() for _, points in pairs]
    offsets = [0.0] * len(pairs)
    for _ in range(4 if len(pairs) > 1 else 0):
        moved = [_lagged(x, y, round(offset)) for x, y, offset in zip(inputs, targets, offsets)]
        statistics = [(x.T @ x, x.T @ y, len(x)) for x, y in moved]
        found = []
        for k, (x, y) in enumerate(zip(inputs, targets)):
            weight = _ridge(statistics[:k] + statistics[k + 1 :], ridge)
            found.append(_peak(lag_curve(x @ weight, y)))
        zero = round(found[anchor]) if anchor is not None else round(float(np.median(found)))
        offsets = [offset - zero for offset in found]
    moved = [_lagged(x, y, round(offset)) for x, y, offset in zip(inputs, targets, offsets)]
    weight = _ridge([(x.T @ x, x.T @ y, len(x)) for x, y in moved], ridge).unflatten(0, (len(CONTEXT_FRAMES), -1))
    n = len(CONTEXT_FRAMES)
    model = SyncModel(
        encoder, mean.repeat(n).float(), std.repeat(n).float(), torch.einsum("dp,cpm->cdm", directions, weight).flatten(0, 1).float(), learned_from
    )
    return model, offsets


def _ridge(statistics: list[tuple[Tensor, Tensor, int]], strength: float) -> Float[Tensor, "c 4"]:
    """Weights from each clip's (XᵀX, Xᵀy, frames); inputs and targets are centred already."""
    gram, moment = sum(s[0] for s in statistics), sum(s[1] for s in statistics)
    penalty = strength * sum(s[2] for s in statistics) ** 0.5
    return torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), moment)


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.std(0) + 1e-6)


def _lagged(sound: Tensor, mouth: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """The overlap of both when the mouth is `lag` frames later."""
    n = min(len(sound), len(mouth))
    return sound[max(0, -lag) : n - max(0, lag)], mouth[max(0, lag) : n - max(0, -lag)]


def lag_curve(predicted: Float[Tensor, "t 4"], measured: Float[Tensor, "t 4"]) -> Float[Tensor, "21"]:
    """Mean correlation of the four measures at lags -10 … 10 (positive: mouth later); 0 where nothing moves."""
    out = []
    for lag in range(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1):
        a, b = _lagged(predicted, measured, lag)
        a, b = a - a.mean(0), b - b.mean(0)
        moves = (a.square().mean(0) > 1e-8) & (b.square().mean(0) > 1e-10)  # rounding of a still mouth correlates with anything
        scale = (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-9)
        out.append(torch.where(moves, (a * b).sum(0) / scale, 0.0).mean())
    return torch.stack(out)


def estimate_offset(features: Float[Tensor, "2*t d"], landmarks: Float[Tensor, "t 478 3"], model: SyncModel | None = None) -> SyncResult:
    """How much later the mouth is than the sound, from features of the model's encoder and landmarks in any unit, posed or not.

    Clips under two seconds, silent ones and still ones give offset 0 with margin 0: nothing to go by.
    """
    model = model or SyncModel.load()
    frames = min(len(features) // 2, len(landmarks))
    if frames < 50:
        return SyncResult(0.0, 0.0, 0.0)
    curve = lag_curve(model.predict(features[: 2 * frames]), mouth_measures(landmarks[:frames])).double()
    correlation = float(curve.max())
    if correlation <= 0:
        return SyncResult(0.0, 0.0, correlation)
    return SyncResult(_peak(curve), correlation - float(curve.median()), correlation)


def _peak(curve: Float[Tensor, "21"]) -> float:
    """The lag of the highest correlation, to a fraction: the top of the parabola through it and its neighbours."""
    best = int(curve.argmax())
    fraction = 0.0
    if 0 < best < len(curve) - 1:
        left, top, right = curve[best - 1 : best + 2].tolist()
        bend = left - 2 * top + right
        fraction = 0.5 * (left - right) / bend if bend < 0 else 0.0
    return best - MAX_LAG_FRAMES + fraction


def shuffled_control(
    features: Float[Tensor, "2*t d"], landmarks: Float[Tensor, "t 478 3"], model: SyncModel | None = None, seed: int = 0
) -> SyncResult:
    """`estimate_offset` with the sound rotated by a third to two thirds of the clip: what chance gives on it, the sound's own rhythm kept."""
    frames = min(len(features) // 2, len(landmarks))
    turn = 2 * int(np.random.default_rng(seed).integers(frames // 3, max(2 * frames // 3, frames // 3 + 1)))
    return estimate_offset(features[: 2 * frames].roll(turn, 0), landmarks[:frames], model)


def sync_auc(
    features: Float[Tensor, "2*t d"],
    landmarks: Float[Tensor, "t 478 3"],
    others: list[Float[Tensor, "2*s d"]] | None = None,
    offset_frames: int = 0,
    window: int = 50,
    model: SyncModel | None = None,
) -> tuple[float, float]:
    """How surely windows of two seconds tell the right sound from (the same shifted by 5 … 10 frames, other sounds): areas under the ROC curve.

    NaN where there is nothing to compare.
    """
    model = model or SyncModel.load()
    measured = mouth_measures(landmarks)
    predicted = model.predict(features)
    n = min(len(predicted), len(measured))
    starts = range(MAX_LAG_FRAMES, n - window - MAX_LAG_FRAMES + 1, 10)

    def score(sound: Tensor, sound_at: int, mouth_at: int) -> float:
        a, b = sound[sound_at : sound_at + window], measured[mouth_at : mouth_at + window]
        a, b = a - a.mean(0), b - b.mean(0)
        return float(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-6)).mean())

    right = [score(predicted, s - offset_frames, s) for s in starts if 0 <= s - offset_frames <= n - window]
    lags = [lag for lag in range(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1) if abs(lag - offset_frames) >= 5]
    shifted = [score(predicted, s - lag, s) for s in starts for lag in lags]
    foreign = [model.predict(o) for o in others or []]
    mismatched = [score(p, s, s) for p in foreign for s in starts if s + window <= len(p)]
    return _auc(right, shifted), _auc(right, mismatched)


def _auc(right: list[float], wrong: list[float]) -> float:
    if not right or not wrong:
        return float("nan")
    a, b = np.array(right)[:, None], np.array(wrong)
    return float(((a > b) + 0.5 * (a == b)).mean())
