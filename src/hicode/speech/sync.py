"""Audio-video offset: how many frames the mouth is later than the sound.

Sound and mouth are mapped to the same k = DIRECTIONS numbers a frame. The mouth: filters over seven frames of four
measures (opening, width, lip height, jaw). The sound: a ridge regression of those from six frames of speech features.
The filters are the ones that sound predicts best. The lag at which both correlate best is the offset. The weights that
ship were learned from speakers in no evaluation clip, so the correlation is also a score; it is not SyncNet, and is
never called AVConf. Every score has a control: the same features rotated in time.

Lags are in frames, positive where the mouth is later than the sound.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hicode.audio import FEATURES_PER_FRAME
from hicode.errors import InputError
from hicode.files import load_tensors, save_tensors
from hicode.motion import LEFT_EYE_OUTER, MOUTH_CORNERS_INNER, RIGHT_EYE_OUTER

MAX_LAG_FRAMES = 10
CONTEXT_FRAMES = range(-2, 4)  # frames of features that predict a frame: lips move before the sound
MOUTH_FRAMES = range(-3, 4)  # frames of mouth that a filter sees
DIRECTIONS = 8
WINDOW_FRAMES = 50
# Margins on 9 speakers that the fit had not seen: with their own sound .34 and more (21 stretches of 8 s), with another
# speaker's .10 in the median, .22 at 99 %, .26 at most (336). Chance falls with length: 99 % of foreign margins are
# below .49, .36, .33, .26, .22 at 2, 3, 4, 6, 8 s, which is CHANCE_MARGIN / √frames. The own sound's offset was right
# within a frame in every stretch of every length.
RELIABLE_MARGIN = 0.25
CHANCE_MARGIN = 3.3

SCHEMA, VERSION = "hicode-sync", 2
WEIGHTS = Path(__file__).parent.parent / "weights" / "sync.safetensors"


@dataclass(frozen=True)
class SyncResult:
    """An estimated offset.

    offset_frames  positive where the mouth is later than the sound, to a fraction of a frame
    margin         correlation at the best lag minus the median over all lags
    correlation    at the best lag
    frames         of the clip
    """

    offset_frames: float
    margin: float
    correlation: float
    frames: int

    @property
    def reliable(self) -> bool:
        """Whether to trust the offset. A shorter clip needs a larger margin."""
        return self.margin >= max(RELIABLE_MARGIN, CHANCE_MARGIN / max(self.frames, 1) ** 0.5)


@dataclass(frozen=True, eq=False)
class SyncModel:
    """Maps of features in context and of mouth measures in context to k numbers each.

    encoder       name of the encoder whose features it takes
    learned_from  names of the training clips
    """

    encoder: str
    mean: Float[Tensor, "c"]
    std: Float[Tensor, "c"]
    weight: Float[Tensor, "c k"]
    mouth: Float[Tensor, "m k"]
    learned_from: tuple[str, ...]

    def embed_sound(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "t k"]:
        """Of t frames, from two features a frame."""
        return ((in_context(features) - self.mean) / self.std) @ self.weight

    def embed_mouth(self, landmarks: Float[Tensor, "t 478 3"]) -> Float[Tensor, "t k"]:
        """Landmarks in any unit, posed or not. Measures are standardised over the clip; one that is still is 0."""
        return stacked(standardised(mouth_measures(landmarks)), MOUTH_FRAMES) @ self.mouth

    def save(self, path: Path | str) -> None:
        """Write it in half precision."""
        tensors = {"mean": self.mean, "std": self.std, "weight": self.weight, "mouth": self.mouth}
        config = {"encoder": self.encoder, "learned_from": list(self.learned_from)}
        save_tensors(path, {k: v.half() for k, v in tensors.items()}, SCHEMA, VERSION, config)

    @staticmethod
    @cache
    def load(path: Path | str = WEIGHTS) -> "SyncModel":
        """The shipped weights, or another file that `save` wrote."""
        tensors, config = load_tensors(path, SCHEMA, VERSION)
        parts = {k: v.float() for k, v in tensors.items()}
        return SyncModel(config["encoder"], **parts, learned_from=tuple(config["learned_from"]))


# --- inputs ---


def mouth_measures(landmarks: Float[Tensor, "t 478 3"]) -> Float[Tensor, "t 4"]:
    """Opening, width, lip height and jaw drop over the distance of the outer eye corners.

    Distances are in space, so scale and pose drop out.
    """

    def distance(a: int, b: int) -> Tensor:
        return (landmarks[:, a] - landmarks[:, b]).norm(dim=-1)

    opening = (distance(13, 14) + distance(82, 87) + distance(312, 317)) / 3
    measures = [opening, distance(*MOUTH_CORNERS_INNER), distance(0, 17), distance(1, 152)]
    return torch.stack(measures, 1) / distance(RIGHT_EYE_OUTER, LEFT_EYE_OUTER)[:, None].clamp(min=1e-6)


def in_context(features: Float[Tensor, "s d"]) -> Float[Tensor, "t c"]:
    """The mean of each frame's two features next to its neighbours'; the ends repeat."""
    return stacked(features.unflatten(0, (-1, FEATURES_PER_FRAME)).mean(1), CONTEXT_FRAMES)


def stacked(x: Float[Tensor, "t d"], offsets: range) -> Float[Tensor, "t c"]:
    """The rows at these offsets from each row, side by side; the ends repeat."""
    index = torch.arange(len(x))[:, None] + torch.tensor(offsets)
    return x[index.clamp(0, len(x) - 1)].flatten(1)


def standardised(x: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
    """Mean 0, deviation 1 over time; 0 where nothing but rounding moves."""
    x = x - x.mean(0)
    deviation = x.square().mean(0).sqrt()
    return torch.where(deviation > 1e-5, x / deviation.clamp(min=1e-5), 0.0)


# --- lags ---


def lagged(sound: Float[Tensor, "s a"], mouth: Float[Tensor, "t b"], lag: int) -> tuple[Tensor, Tensor]:
    """The overlap of both if the mouth is `lag` frames later."""
    n = min(len(sound), len(mouth))
    return sound[max(0, -lag) : n - max(0, lag)], mouth[max(0, lag) : n - max(0, -lag)]


def correlation(sound: Float[Tensor, "*w t k"], mouth: Float[Tensor, "*w t k"]) -> Float[Tensor, "*w"]:
    """One correlation of all k numbers over time, so that well predicted ones count for more; 0 where one is still."""
    a, b = sound - sound.mean(-2, keepdim=True), mouth - mouth.mean(-2, keepdim=True)
    moves = (a.square().mean((-2, -1)) > 1e-8) & (b.square().mean((-2, -1)) > 1e-8)
    scale = (a.square().sum((-2, -1)) * b.square().sum((-2, -1))).sqrt().clamp(min=1e-9)
    return torch.where(moves, (a * b).sum((-2, -1)) / scale, 0.0)


def lag_curve(sound: Float[Tensor, "s k"], mouth: Float[Tensor, "t k"]) -> Float[Tensor, "21"]:
    """Correlation at lags -10 … 10 (positive: mouth later); 0 where nothing moves."""
    lags = range(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1)
    return torch.stack([correlation(*lagged(sound, mouth, lag)) for lag in lags])


def peak_lag(curve: Float[Tensor, "21"]) -> float:
    """The lag of the highest correlation, to a fraction: the top of the parabola through it and its neighbours."""
    best = int(curve.argmax())
    fraction = 0.0
    if 0 < best < len(curve) - 1:
        before, top, after = curve[best - 1 : best + 2].tolist()
        bend = before - 2 * top + after
        fraction = 0.5 * (before - after) / bend if bend < 0 else 0.0
    return best - MAX_LAG_FRAMES + fraction


def _result(curve: Float[Tensor, "21"], frames: int) -> SyncResult:
    curve = curve.double()
    best = float(curve.max())
    if best <= 0:
        return SyncResult(0.0, 0.0, best, frames)
    return SyncResult(peak_lag(curve), best - float(curve.median()), best, frames)


def estimate_offset(
    features: Float[Tensor, "s d"], landmarks: Float[Tensor, "t 478 3"], model: SyncModel | None = None
) -> SyncResult:
    """Offset of a clip, from features of the model's encoder and landmarks in any unit, posed or not.

    Clips under two seconds, silent ones and still ones give offset 0 with margin 0.
    """
    model = model or SyncModel.load()
    frames = min(len(features) // FEATURES_PER_FRAME, len(landmarks))
    if frames < WINDOW_FRAMES:
        return SyncResult(0.0, 0.0, 0.0, frames)
    sound = model.embed_sound(features[: FEATURES_PER_FRAME * frames])
    return _result(lag_curve(sound, model.embed_mouth(landmarks[:frames])), frames)


def shuffled_control(
    features: Float[Tensor, "s d"], landmarks: Float[Tensor, "t 478 3"], model: SyncModel | None = None, seed: int = 0
) -> SyncResult:
    """`estimate_offset` with the sound rotated by a third to two thirds of the clip: chance, with the same rhythm."""
    frames = min(len(features) // FEATURES_PER_FRAME, len(landmarks))
    shift = int(np.random.default_rng(seed).integers(frames // 3, max(2 * frames // 3, frames // 3 + 1)))
    rotated = features[: FEATURES_PER_FRAME * frames].roll(FEATURES_PER_FRAME * shift, 0)
    return estimate_offset(rotated, landmarks[:frames], model)


# --- windows ---


def window_scores(
    sound: Float[Tensor, "s k"], mouth: Float[Tensor, "t k"], window: int = WINDOW_FRAMES, step: int = 10
) -> tuple[list[int], Float[Tensor, "w 21"]]:
    """First frames of windows of mouth, every `step`, and their correlation with the sound at lags -10 … 10.

    A score depends on `window` frames of each and no others: filters that reach beyond are left out. So are windows for
    which the sound of some lag is missing: clips under window + 20 frames have none.
    """
    n = min(len(sound), len(mouth))
    starts = list(range(MAX_LAG_FRAMES, n - window - MAX_LAG_FRAMES + 1, step))
    index = torch.tensor(starts, dtype=torch.long)[:, None] + torch.arange(window)[_inner(window)]
    lags = range(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1)
    return starts, torch.stack([correlation(sound[index - lag], mouth[index]) for lag in lags], 1)


def _inner(window: int) -> slice:
    """The frames of a window whose filters, of mouth and of sound, lie within it."""
    return slice(-min(MOUTH_FRAMES[0], CONTEXT_FRAMES[0]), window - max(MOUTH_FRAMES[-1], CONTEXT_FRAMES[-1]))


def windowed_offsets(
    features: Float[Tensor, "s d"], landmarks: Float[Tensor, "t 478 3"], model: SyncModel | None = None, step: int = 10
) -> list[tuple[int, SyncResult]]:
    """First frame and offset of each window of two seconds: drift, a cut, a stretch of another voice show here.

    Few windows are `reliable` one by one, though nearly all offsets are right. Clips too short for one give none.
    """
    model = model or SyncModel.load()
    starts, curves = window_scores(model.embed_sound(features), model.embed_mouth(landmarks), step=step)
    return [(start, _result(curve, WINDOW_FRAMES)) for start, curve in zip(starts, curves, strict=True)]


def sync_auc(
    features: Float[Tensor, "s d"],
    landmarks: Float[Tensor, "t 478 3"],
    others: list[Float[Tensor, "_ d"]] | None = None,
    offset_frames: int = 0,
    model: SyncModel | None = None,
) -> tuple[float, float]:
    """How well windows of two seconds tell the right sound from wrong ones: areas under the ROC curve.

    Wrong sounds are the same shifted by 5 … 10 frames, and `others`. NaN where there is nothing to compare. Raises
    InputError for an `offset_frames` beyond the lags.
    """
    if abs(offset_frames) > MAX_LAG_FRAMES:
        raise InputError(f"An offset of {offset_frames} frames is beyond ±{MAX_LAG_FRAMES}. Correct the sound first.")
    model = model or SyncModel.load()
    mouth = model.embed_mouth(landmarks)
    starts, curves = window_scores(model.embed_sound(features), mouth)
    lags = torch.arange(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1)
    right, shifted = curves[:, lags == offset_frames], curves[:, (lags - offset_frames).abs() >= 5]
    mismatched = [mismatched_scores(model.embed_sound(sound), mouth, starts) for sound in others or []]
    return area_under_curve(right, shifted), area_under_curve(right, torch.cat([torch.zeros(0), *mismatched]))


def mismatched_scores(
    sound: Float[Tensor, "s k"], mouth: Float[Tensor, "t k"], starts: list[int], window: int = WINDOW_FRAMES
) -> Float[Tensor, "v"]:
    """Correlations of windows of mouth with another recording's sound at the same places, modulo its length.

    None where that sound is too short.
    """
    places = len(sound) - window + 1
    if places < 1 or not starts:
        return torch.zeros(0)
    inside = torch.arange(window)[_inner(window)]
    at = torch.tensor(starts)[:, None]
    return correlation(sound[at % places + inside], mouth[at + inside])


def area_under_curve(right: Shaped[Tensor, "*a"], wrong: Shaped[Tensor, "*b"]) -> float:
    """The chance that a right score lies above a wrong one, ties counting half; NaN where either is empty."""
    right, wrong = right.flatten().double(), wrong.flatten().double().sort().values
    if not len(right) or not len(wrong):
        return float("nan")
    below, upto = torch.searchsorted(wrong, right), torch.searchsorted(wrong, right, right=True)
    return float((below + upto).double().mean() / (2 * len(wrong)))
