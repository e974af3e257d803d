"""Audio-video offset: how many frames the mouth is later than the sound.

Sound and mouth are turned into the same DIRECTIONS numbers a frame: the mouth by filters over seven frames of four
measures (opening, width, lip height, jaw), the sound by the ridge regression that predicts them from six frames of
speech features. The filters are those that sound predicts best, so they see how a mouth moves, not only how it stands:
what makes two seconds tell one lag from the next. The lag at which both correlate best is the offset. It ships with
weights learned from speakers that are in no evaluation clip (docs/weights.md says which), so it also serves as
a score; it is not SyncNet, and is never called AVConf. Every score has a control: the same features rotated in time.
`python -m benchmarks.sync` measures it on speakers that it has not seen.

Lags are in frames, positive where the mouth is later than the sound. k = DIRECTIONS.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.errors import InputError
from hicode.files import load_tensors, save_tensors
from hicode.motion import LEFT_EYE_OUTER, MOUTH_CORNERS_INNER, RIGHT_EYE_OUTER

MAX_LAG_FRAMES = 10
PRINCIPAL = 96
CONTEXT_FRAMES = range(-2, 4)  # frames of features that predict a frame: lips move before they are heard
MOUTH_FRAMES = range(-3, 4)  # frames of mouth that a filter sees
DIRECTIONS = 8
WINDOW_FRAMES = 50
# Margins of clips of 9 speakers that the fit had not seen, with their sound (21 stretches of 8 s) and with another
# speaker's (336): with their own .34 and more, with others' .10 in the median, .22 at 99 %, .26 at most. Chance falls
# with the length: its 99 % are .49, .36, .33, .26, .22 at 2, 3, 4, 6, 8 s, or CHANCE / √frames. Their own sound's
# offset was within a frame in every stretch of every length, whatever its margin.
RELIABLE_MARGIN = 0.25
CHANCE_MARGIN = 3.3

_WEIGHTS = Path(__file__).parent.parent / "weights" / "sync.safetensors"
_SCHEMA, _VERSION = "hicode-sync", 2


@dataclass(frozen=True)
class SyncResult:
    """offset_frames: positive where the mouth is later than the sound, to a fraction of a frame. margin: correlation at
    the best lag minus its median over all lags. correlation: at the best lag. frames: of the clip. reliable: whether an
    offset so estimated should be believed, which takes a larger margin of a shorter clip."""

    offset_frames: float
    margin: float
    correlation: float
    frames: int

    @property
    def reliable(self) -> bool:
        return self.margin >= max(RELIABLE_MARGIN, CHANCE_MARGIN / max(self.frames, 1) ** 0.5)


@dataclass(frozen=True, eq=False)
class SyncModel:
    """Standardised features in context, and standardised mouth measures in context, → k numbers each. `learned_from`
    names the training clips."""

    encoder: str
    mean: Float[Tensor, "c"]
    std: Float[Tensor, "c"]
    weight: Float[Tensor, "c k"]
    mouth: Float[Tensor, "m k"]
    learned_from: tuple[str, ...]

    def hear(self, features: Float[Tensor, "2*t d"]) -> Float[Tensor, "t k"]:
        return ((in_context(features) - self.mean) / self.std) @ self.weight

    def see(self, landmarks: Float[Tensor, "t 478 3"]) -> Float[Tensor, "t k"]:
        """Landmarks in any unit, posed or not. Measures are standardised over the clip; one that does not move is 0."""
        return _beside(_standardised(mouth_measures(landmarks)), MOUTH_FRAMES) @ self.mouth

    def save(self, path: Path | str = _WEIGHTS) -> None:
        tensors = {"mean": self.mean, "std": self.std, "weight": self.weight, "mouth": self.mouth}
        config = {"encoder": self.encoder, "learned_from": list(self.learned_from)}
        save_tensors(path, {k: v.half() for k, v in tensors.items()}, _SCHEMA, _VERSION, config)

    @staticmethod
    @cache
    def load(path: Path | str = _WEIGHTS) -> "SyncModel":
        """The shipped weights, or another file of that kind."""
        tensors, config = load_tensors(path, _SCHEMA, _VERSION)
        return SyncModel(
            config["encoder"], **{k: v.float() for k, v in tensors.items()}, learned_from=tuple(config["learned_from"])
        )


def mouth_measures(landmarks: Float[Tensor, "t 478 3"]) -> Float[Tensor, "t 4"]:
    """Opening, width, lip height and jaw drop over the distance of the outer eye corners; distances in space, so scale
    and pose drop out."""

    def distance(a: int, b: int) -> Tensor:
        return (landmarks[:, a] - landmarks[:, b]).norm(dim=-1)

    opening = (distance(13, 14) + distance(82, 87) + distance(312, 317)) / 3
    measures = [opening, distance(*MOUTH_CORNERS_INNER), distance(0, 17), distance(1, 152)]
    return torch.stack(measures, 1) / distance(RIGHT_EYE_OUTER, LEFT_EYE_OUTER)[:, None].clamp(min=1e-6)


def in_context(features: Float[Tensor, "2*t d"]) -> Float[Tensor, "t c"]:
    """The mean of each frame's two features beside its neighbours'; the ends repeat."""
    return _beside(features.unflatten(0, (-1, 2)).mean(1), CONTEXT_FRAMES)


def _beside(x: Float[Tensor, "t d"], around: range) -> Float[Tensor, "t c"]:
    index = torch.arange(len(x))[:, None] + torch.tensor(around)
    return x[index.clamp(0, len(x) - 1)].flatten(1)


def fit_sync(
    pairs: list[tuple[Float[Tensor, "2*t d"], Float[Tensor, "t 478 3"]]],
    encoder: str,
    learned_from: tuple[str, ...],
    anchor: int | None = None,
    ridge: float = 3.0,
) -> tuple[SyncModel, list[SyncResult]]:
    """Filters over clips (a pair each, best one a speaker), and each clip's offset, found together in four rounds from
    none.

    In each round a clip's offset and margin come from a model of the other clips, so a clip cannot vouch for itself. Offsets are
    only relative: the clip number `anchor` is in sync by definition; without one, the median clip is. A clip weighs as
    the square root of its length, since speakers teach more than minutes do. Features are reduced to their PRINCIPAL
    strongest directions, which costs no accuracy and makes each of the many small regressions cheap; the model folds
    the reduction in.
    """
    frames = torch.cat([f.unflatten(0, (-1, 2)).mean(1) for f, _ in pairs]).double()
    mean, std = frames.mean(0), frames.std(0) + 1e-3
    _, vectors = torch.linalg.eigh(torch.cov(((frames - mean) / std).T).reshape(len(mean), len(mean)))
    directions = vectors[:, -min(PRINCIPAL, frames.shape[1]) :]  # "d p"
    inputs = [in_context(((f.double() - mean) / std) @ directions) for f, _ in pairs]
    targets = [_beside(_standardised(mouth_measures(points)).double(), MOUTH_FRAMES) for _, points in pairs]
    offsets, curves = [0.0] * len(pairs), [torch.zeros(2 * MAX_LAG_FRAMES + 1)] * len(pairs)
    for _ in range(4 if len(pairs) > 1 else 0):
        moments = [_Moments.of(*_lagged(x, y, round(offset))) for x, y, offset in zip(inputs, targets, offsets)]
        curves = []
        for k, (x, y) in enumerate(zip(inputs, targets)):
            weight, mouth = _solve(moments[:k] + moments[k + 1 :], ridge)
            curves.append(lag_curve(x @ weight, y @ mouth))
        found = [_peak(curve) for curve in curves]
        # Unrounded: an anchor at half a frame would move everyone by a whole one, or not, as chance has it.
        zero = found[anchor] if anchor is not None else float(np.median(found))
        offsets = [offset - zero for offset in found]
    weight, mouth = _solve(
        [_Moments.of(*_lagged(x, y, round(offset))) for x, y, offset in zip(inputs, targets, offsets)], ridge
    )
    n = len(CONTEXT_FRAMES)
    weight = torch.einsum("dp,cpk->cdk", directions, weight.unflatten(0, (n, -1))).flatten(0, 1)
    model = SyncModel(
        encoder, mean.repeat(n).float(), std.repeat(n).float(), weight.float(), mouth.float(), learned_from
    )
    found = [
        SyncResult(offset, float(c.max() - c.median()), float(c.max()), len(y))
        for offset, c, y in zip(offsets, curves, targets)
    ]
    return model, found


class _Moments(NamedTuple):
    """What regression needs to know of a clip of sound x and mouth y; both are centred already. Sums over frames times
    `weight`."""

    xx: Float[Tensor, "c c"]
    xy: Float[Tensor, "c m"]
    yy: Float[Tensor, "m m"]
    weight: float
    frames: int

    @staticmethod
    def of(x: Float[Tensor, "t c"], y: Float[Tensor, "t m"]) -> "_Moments":
        weight = len(x) ** -0.5
        return _Moments(weight * x.T @ x, weight * x.T @ y, weight * y.T @ y, weight, len(x))


def _solve(moments: list[_Moments], strength: float) -> tuple[Float[Tensor, "c k"], Float[Tensor, "m k"]]:
    """Ridge regression of the mouth on the sound, then the k directions of mouth of which it predicts the largest share
    (unit variance each)."""
    frames = sum(m.frames for m in moments)
    scale = frames / sum(m.weight * m.frames for m in moments)
    xx, xy, yy = (scale * sum(m[i] for m in moments) for i in range(3))
    weight = torch.linalg.solve(xx + strength * frames**0.5 * torch.eye(len(xx), dtype=xx.dtype), xy)
    explained = weight.T @ xy
    # A hundredth of the mean variance keeps directions that hardly move, mere jitter of the tracker, from being chosen.
    floor = 0.01 * yy.diagonal().mean() + 1e-9
    inverse = torch.linalg.inv(torch.linalg.cholesky(yy + floor * torch.eye(len(yy), dtype=yy.dtype)))
    _, vectors = torch.linalg.eigh(inverse @ (explained + explained.T) @ inverse.T)
    mouth = frames**0.5 * inverse.T @ vectors[:, -DIRECTIONS:]
    return weight @ mouth, mouth


def _standardised(x: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
    """Mean 0, deviation 1 over time; 0 where nothing but rounding moves."""
    x = x - x.mean(0)
    deviation = x.square().mean(0).sqrt()
    return torch.where(deviation > 1e-5, x / deviation.clamp(min=1e-5), 0.0)


def _lagged(sound: Tensor, mouth: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """The overlap of both when the mouth is `lag` frames later."""
    n = min(len(sound), len(mouth))
    return sound[max(0, -lag) : n - max(0, lag)], mouth[max(0, lag) : n - max(0, -lag)]


def _correlation(heard: Float[Tensor, "*w t k"], seen: Float[Tensor, "*w t k"]) -> Float[Tensor, "*w"]:
    """One correlation of all k numbers over time, so that the better predicted count for more; 0 where either is
    still."""
    a, b = heard - heard.mean(-2, keepdim=True), seen - seen.mean(-2, keepdim=True)
    moves = (a.square().mean((-2, -1)) > 1e-8) & (b.square().mean((-2, -1)) > 1e-8)
    scale = (a.square().sum((-2, -1)) * b.square().sum((-2, -1))).sqrt().clamp(min=1e-9)
    return torch.where(moves, (a * b).sum((-2, -1)) / scale, 0.0)


def lag_curve(heard: Float[Tensor, "t k"], seen: Float[Tensor, "t k"]) -> Float[Tensor, "21"]:
    """Correlation at lags -10 … 10 (positive: mouth later); 0 where nothing moves."""
    return torch.stack([_correlation(*_lagged(heard, seen, lag)) for lag in range(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1)])


def window_scores(
    heard: Float[Tensor, "t k"], seen: Float[Tensor, "t k"], window: int = WINDOW_FRAMES, step: int = 10
) -> tuple[list[int], Float[Tensor, "w 21"]]:
    """First frames of windows of mouth, every `step`, and their correlation with the sound at lags -10 … 10.

    A score reads `window` frames of each and no others (but what the encoder itself hears about them): filters that
    would reach beyond are left out. Windows for which the sound of some lag is missing are too: none in clips under
    window + 20 frames.
    """
    n = min(len(heard), len(seen))
    starts = list(range(MAX_LAG_FRAMES, n - window - MAX_LAG_FRAMES + 1, step))
    index = torch.tensor(starts, dtype=torch.long)[:, None] + torch.arange(window)[_inner(window)]
    lags = range(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1)
    return starts, torch.stack([_correlation(heard[index - lag], seen[index]) for lag in lags], 1)


def _inner(window: int) -> slice:
    """The frames of a window whose filters, of mouth and of sound, lie within it."""
    return slice(-min(MOUTH_FRAMES[0], CONTEXT_FRAMES[0]), window - max(MOUTH_FRAMES[-1], CONTEXT_FRAMES[-1]))


def estimate_offset(
    features: Float[Tensor, "2*t d"], landmarks: Float[Tensor, "t 478 3"], model: SyncModel | None = None
) -> SyncResult:
    """How much later the mouth is than the sound, from features of the model's encoder and landmarks in any unit, posed
    or not.

    Clips under two seconds, silent ones and still ones give offset 0 with margin 0: nothing to go by.
    """
    model = model or SyncModel.load()
    frames = min(len(features) // 2, len(landmarks))
    if frames < 50:
        return SyncResult(0.0, 0.0, 0.0, frames)
    return _result(lag_curve(model.hear(features[: 2 * frames]), model.see(landmarks[:frames])), frames)


def windowed_offsets(
    features: Float[Tensor, "2*t d"],
    landmarks: Float[Tensor, "t 478 3"],
    model: SyncModel | None = None,
    window: int = WINDOW_FRAMES,
    step: int = 10,
) -> list[tuple[int, SyncResult]]:
    """Offset and margin of each window of two seconds, with the frame where it begins: drift, a cut, a stretch of
    another voice show here.

    Two seconds are little: few windows are `reliable` one by one, though their offsets are nearly all right. Empty for
    clips too short for one (`window_scores`).
    """
    model = model or SyncModel.load()
    starts, curves = window_scores(model.hear(features), model.see(landmarks), window, step)
    return [(start, _result(curve, window)) for start, curve in zip(starts, curves)]


def _result(curve: Float[Tensor, "21"], frames: int) -> SyncResult:
    curve = curve.double()
    correlation = float(curve.max())
    if correlation <= 0:
        return SyncResult(0.0, 0.0, correlation, frames)
    return SyncResult(_peak(curve), correlation - float(curve.median()), correlation, frames)


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
    """`estimate_offset` with the sound rotated by a third to two thirds of the clip: what chance gives on it, the
    sound's own rhythm kept."""
    frames = min(len(features) // 2, len(landmarks))
    turn = 2 * int(np.random.default_rng(seed).integers(frames // 3, max(2 * frames // 3, frames // 3 + 1)))
    return estimate_offset(features[: 2 * frames].roll(turn, 0), landmarks[:frames], model)


def sync_auc(
    features: Float[Tensor, "2*t d"],
    landmarks: Float[Tensor, "t 478 3"],
    others: list[Float[Tensor, "2*s d"]] | None = None,
    offset_frames: int = 0,
    window: int = WINDOW_FRAMES,
    model: SyncModel | None = None,
) -> tuple[float, float]:
    """How surely windows of two seconds tell the right sound from (the same shifted by 5 … 10 frames, other sounds):
    areas under the ROC curve.

    NaN where there is nothing to compare. Raises InputError where `offset_frames` is beyond the lags that are looked
    at.
    """
    if abs(offset_frames) > MAX_LAG_FRAMES:
        raise InputError(f"An offset of {offset_frames} frames is beyond ±{MAX_LAG_FRAMES}. Correct the sound first.")
    model = model or SyncModel.load()
    seen = model.see(landmarks)
    starts, curves = window_scores(model.hear(features), seen, window)
    lags = torch.arange(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1)
    right, shifted = curves[:, lags == offset_frames], curves[:, (lags - offset_frames).abs() >= 5]
    mismatched = [mismatched_scores(model.hear(sound), seen, starts, window) for sound in others or []]
    return area_under_curve(right, shifted), area_under_curve(
        right, torch.cat(mismatched) if mismatched else torch.zeros(0)
    )


def mismatched_scores(
    heard: Float[Tensor, "s k"], seen: Float[Tensor, "t k"], starts: list[int], window: int = WINDOW_FRAMES
) -> Float[Tensor, "v"]:
    """Correlations of windows of mouth with another recording's sound: from the same places, modulo its length (none
    where it is too short)."""
    places = len(heard) - window + 1
    if places < 1 or not starts:
        return torch.zeros(0)
    inside = torch.arange(window)[_inner(window)]
    at = torch.tensor(starts)[:, None]
    return _correlation(heard[at % places + inside], seen[at + inside])


def area_under_curve(right: Float[Tensor, "*a"], wrong: Float[Tensor, "*b"]) -> float:
    """The chance that a right score lies above a wrong one, ties counting half; NaN where either is empty."""
    right, wrong = right.flatten().double(), wrong.flatten().double().sort().values
    if not len(right) or not len(wrong):
        return float("nan")
    below, upto = torch.searchsorted(wrong, right), torch.searchsorted(wrong, right, right=True)
    return float((below + upto).double().mean() / (2 * len(wrong)))
