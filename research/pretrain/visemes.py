"""Phones → facial motion: targets of facial actions, blended by dominance (Cohen & Massaro 1993); lips that meet.

t frames at 25 fps; frame i is the moment (i + 0.5) / 25 s. Each lip shape (`phones.CLASSES`) has target values of eight
*channels*, symmetric groups of the 3DMM's actions, and a dominance. Dominance falls exponentially before and after the
sound; more slowly before, as lips move ahead of the sound. A frame is the mean of the targets, weighted by dominance.

A mean never quite closes a mouth. So near p, b, m, f, v and in pauses the gap between the inner lips, which is linear
in the expression, is set to its target: `mouthClose` (the inverse of the jaw's opening of the lips) removes the excess.
This holds for any identity, whatever its gap at rest.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.motion import EXPRESSION_DIM, FACE_OVAL, LIPS, LOWER_LIP_INNER, UPPER_LIP_INNER
from hicode.tracking.fit import FitConfig
from hicode.tracking.head_model import HeadModel
from research.pretrain.phones import BILABIAL, CLASSES, SILENCE, Phone, shapes_in_time

# A channel moves these actions together by these intensities.
CHANNELS: dict[str, dict[str, float]] = {
    "jaw": {"jawOpen": 1.0},
    "pucker": {"mouthPucker": 1.0},
    "funnel": {"mouthFunnel": 1.0},
    "lower": {"mouthLowerDownLeft": 1.0, "mouthLowerDownRight": 1.0},
    "upper": {"mouthUpperUpLeft": 1.0, "mouthUpperUpRight": 1.0},
    "stretch": {"mouthStretchLeft": 0.7, "mouthStretchRight": 0.7, "mouthSmileLeft": 0.3, "mouthSmileRight": 0.3},
    "tuck": {"mouthRollLower": 1.0},  # the lower lip in and up, as for f
    "press": {"mouthRollLower": 1.0, "mouthRollUpper": 0.5},
}
_NAMES = tuple(CHANNELS)


@dataclass(frozen=True)
class Shape:
    """What a class of sounds wants of the mouth.

    target     channel → intensity; a channel that is not named is wanted at 0
    dominance  how much it counts against its neighbours
    free       channels that it leaves to its neighbours: a b between two u's is rounded
    before_s   time constants of the dominance ahead of the sound and after it
    after_s
    """

    target: dict[str, float]
    dominance: float
    free: tuple[str, ...] = ()
    before_s: float = 0.080
    after_s: float = 0.060
    gap_dm: float | None = None


# Gaps of the inner lips in dm: lips that touch; the lower lip at the upper teeth; lips drawn together for u and r.
CLOSED_GAP, TEETH_GAP, ROUND_GAP = 0.006, 0.020, 0.050

SHAPES: dict[str, Shape] = {
    "silence": Shape({}, 1.0, (), 0.100, 0.100),
    "bilabial": Shape({"jaw": 0.13, "press": 0.10}, 1.3, ("pucker", "funnel", "stretch"), 0.055, 0.045, CLOSED_GAP),
    "labiodental": Shape(
        {"jaw": 0.13, "tuck": 0.35, "upper": 0.25}, 1.3, ("pucker", "stretch"), 0.060, 0.050, TEETH_GAP
    ),
    "dental": Shape({"jaw": 0.15, "lower": 0.25, "upper": 0.05}, 0.7, ("pucker", "stretch"), 0.065, 0.055),
    "alveolar": Shape({"jaw": 0.15, "lower": 0.20, "upper": 0.05}, 0.5, ("pucker", "funnel", "stretch"), 0.060, 0.050),
    "sibilant": Shape({"jaw": 0.10, "lower": 0.25, "upper": 0.15, "stretch": 0.15}, 0.9, ("pucker",), 0.065, 0.060),
    "postalveolar": Shape({"jaw": 0.11, "pucker": 0.40, "funnel": 0.30, "lower": 0.15}, 1.2, (), 0.080, 0.065),
    "velar": Shape({"jaw": 0.21, "lower": 0.15, "upper": 0.05}, 0.4, ("pucker", "funnel", "stretch"), 0.060, 0.055),
    "r": Shape({"jaw": 0.12, "pucker": 0.35, "funnel": 0.05}, 0.8, (), 0.075, 0.060, ROUND_GAP),
    "rounded_close": Shape({"jaw": 0.11, "pucker": 0.65, "funnel": 0.06}, 1.3, (), 0.090, 0.075, ROUND_GAP),
    "rounded_open": Shape({"jaw": 0.27, "pucker": 0.40, "funnel": 0.15}, 1.1, (), 0.080, 0.070),
    "open": Shape({"jaw": 0.40, "lower": 0.25, "upper": 0.10, "stretch": 0.05}, 1.1, (), 0.070, 0.070),
    "mid": Shape({"jaw": 0.28, "lower": 0.25, "upper": 0.15, "stretch": 0.25}, 1.0, (), 0.070, 0.065),
    "spread": Shape({"jaw": 0.17, "lower": 0.30, "upper": 0.20, "stretch": 0.50}, 1.0, (), 0.070, 0.070),
    "neutral": Shape({"jaw": 0.21, "lower": 0.20, "upper": 0.05, "stretch": 0.05}, 0.6, ("pucker",), 0.060, 0.060),
    "other": Shape({"jaw": 0.20, "lower": 0.10}, 0.15, ("pucker", "funnel", "stretch"), 0.060, 0.050),
}
assert tuple(SHAPES) == CLASSES

# A channel that a shape leaves free still has a little of its dominance, so that a lone sound is defined.
_FREE = 0.06
_SHARPNESS = 1.3  # of the fall-off: 1 is Cohen and Massaro's, 2 a Gaussian
_JAW_SLOWNESS = 1.4  # the jaw is heavier than the lips: its time constants are longer
# Delay of the lips' blend against the sounds; the jaw has none. On 36 sentences of GRID's s1 with phones from word
# times, width correlates best with the tracked one at this delay (.38, .34 without), the jaw without it (.74, .72 with
# it). The opening hardly depends on it (.70).
_LAG_S = 0.030
_INNER = 0.25  # of a sound's time, at either end, that already belongs to the transition

_HELD = 0.62  # of a stop's time the lips stay together: the rest is the burst and what follows it
_SHORTEST_HOLD_S = 0.062  # a frame is 0.04 s: at least one has its moment inside, whatever the phase
_CLOSING_S, _PARTING_S = 0.075, 0.055
_REST_S = 0.16  # in which the lips come to rest after speech and part before it
_SHORTEST_REST_S = 0.22  # shorter pauses do not close the mouth


@dataclass(frozen=True)
class Style:
    """How one speaker articulates.

    amplitude   of everything but closures
    jaw         share of the opening that the jaw does, the lips the rest: 1 is usual
    rounding    of pucker and funnel; spreading: of stretch
    width       constant stretch (positive) or pucker (negative) of this face while speaking
    lead_s      by which the whole face goes ahead, beyond coarticulation
    wander      intensity of slow motion that has nothing to do with the sound, lips held together stay so
    seed        of the wandering
    """

    amplitude: float = 1.0
    jaw: float = 1.0
    rounding: float = 1.0
    spreading: float = 1.0
    width: float = 0.0
    lead_s: float = 0.0
    wander: float = 0.012
    seed: int = 0

    @staticmethod
    def sample(rng: np.random.Generator) -> "Style":
        """A speaker at random: amplitudes spread by a fourth, as real ones do."""
        return Style(
            amplitude=float(np.exp(rng.normal(0, 0.22))),
            jaw=float(np.exp(rng.normal(0, 0.15))),
            rounding=float(np.exp(rng.normal(0, 0.20))),
            spreading=float(np.exp(rng.normal(0, 0.20))),
            width=float(rng.normal(0, 0.12)),
            lead_s=float(rng.uniform(-0.01, 0.01)),
            wander=float(rng.uniform(0.005, 0.02)),
            seed=int(rng.integers(2**31)),
        )


class _Lips:
    """The inner lips as linear functions of the expression, and the actions that control them.

    up, ahead  "64"  how much higher and farther forward the upper lip is than the lower one, per unit of each action,
               dm
    """

    def __init__(self, head: HeadModel):
        self.names = head.expression_names
        moved = head.landmarks(head.expression_basis).double().numpy()
        apart = moved[:, UPPER_LIP_INNER] - moved[:, LOWER_LIP_INNER]
        self.up, self.ahead = apart[:, 1], apart[:, 2]
        rest = head.landmarks(head.mean).double().numpy()
        _, self.rest_up, self.rest_ahead = rest[UPPER_LIP_INNER] - rest[LOWER_LIP_INNER]
        self.mix = np.zeros((len(_NAMES), EXPRESSION_DIM))
        for k, channel in enumerate(_NAMES):
            for action, intensity in CHANNELS[channel].items():
                self.mix[k, self.names.index(action)] = intensity

    def set_gap(self, expression: np.ndarray, gap: np.ndarray, wanted: np.ndarray) -> None:
        """In place: closes with mouthClose, opens by giving it back and, where there is none, with the jaw."""
        close, jaw = self.names.index("mouthClose"), self.names.index("jawOpen")
        amount = expression[:, close] + (wanted - gap) / self.up[close]
        expression[:, close] = amount.clip(0)
        expression[:, jaw] += amount.clip(max=0) * self.up[close] / self.up[jaw]

    def level(self, expression: np.ndarray, strength: np.ndarray) -> None:
        """In place: rolls in the lip that is ahead of the other, or lips that meet would pass one behind the other."""
        ahead = self.rest_ahead + expression @ self.ahead
        for action, amount in (("mouthRollUpper", ahead.clip(0)), ("mouthRollLower", ahead.clip(max=0))):
            k = self.names.index(action)
            expression[:, k] = (expression[:, k] - strength * amount / self.ahead[k]).clip(0, 1)


# The weights of the fit (`tracking.fit.FitConfig`), without robustness and temporal smoothness: visemes are smooth.
_FIT = FitConfig()
_GAP_ROWS = 30.0  # weight of the lips' gap, of one landmark coordinate's: what was closed stays closed
_PENALTY, _ITERATIONS = 40.0, 80  # of the alternating method; more change no intensity by .005


class _Tracker:
    """The quadratic form of the fit to the mean head's landmarks in the mouth's m actions, and of its prior."""

    def __init__(self, head: HeadModel):
        self.mouth = head.mouth_expression
        # "m 478 3" in noise units
        moved = head.landmarks(head.expression_basis)[self.mouth].double() / (_FIT.noise_mm / 100)
        weight = torch.ones(moved.shape[1], dtype=torch.float64)
        weight[LIPS], weight[FACE_OVAL] = _FIT.lips_weight, _FIT.oval_weight
        axes = torch.tensor([1.0, 1.0, _FIT.depth_weight], dtype=torch.float64)
        seen = torch.einsum("alc,blc,l,c->ab", moved, moved, weight, axes)
        apart = moved[:, UPPER_LIP_INNER, 1:] - moved[:, LOWER_LIP_INNER, 1:]
        seen += _GAP_ROWS * apart @ apart.T
        low = head.expression_low[self.mouth]
        self.seen, self.low, self.high = seen.float(), low, head.expression_high[self.mouth]
        self.sparse = torch.where(low < 0, 0.0, _FIT.expression_sparse / 2)
        eye = torch.eye(len(seen), dtype=torch.float64)
        self.solve = torch.linalg.inv(seen + (_FIT.expression_ridge + _PENALTY) * eye).float()


@cache
def _tracker() -> _Tracker:
    return _Tracker(HeadModel.load())


def as_tracked(expression: Float[Tensor, "t 64"]) -> Float[Tensor, "t 64"]:
    """The expression that tracking would report of this motion.

    Many mixtures of 64 actions give one mouth. A rig closes a mouth by `mouthClose` against an open jaw; the fit
    prefers few and small actions, and avatars learn from fits. This minimises the fit's objective over the mouth's
    actions within their range, by ADMM (Boyd et al. 2011). Landmarks move by fractions of a millimetre, the gap by
    hundredths.
    """
    tracker = _tracker()
    aim = expression[:, tracker.mouth] @ tracker.seen - tracker.sparse
    inside = expression[:, tracker.mouth].clamp(tracker.low, tracker.high)
    excess = torch.zeros_like(inside)
    for _ in range(_ITERATIONS):
        free = (aim + _PENALTY * (inside - excess)) @ tracker.solve
        inside = (free + excess).clamp(tracker.low, tracker.high)
        excess = excess + free - inside
    out = expression.clone()
    out[:, tracker.mouth] = inside
    return out


@cache
def _lips() -> _Lips:
    return _Lips(HeadModel.load())


def rest_gap(landmarks: Float[Tensor, "478 3"]) -> float:
    """Height between the inner lips of a head at rest, dm; negative where they interpenetrate."""
    return float(landmarks[UPPER_LIP_INNER, 1] - landmarks[LOWER_LIP_INNER, 1])


def viseme_expression(
    phones: tuple[Phone, ...], frames: int, style: Style = Style(), rest_gap_dm: float | None = None, fps: float = 25.0
) -> Float[Tensor, "t 64"]:
    """Expression of a mouth that says `phones`, in the 3DMM's actions (0 rest, 1 full). No phones: a mouth at rest.

    `rest_gap_dm` is `rest_gap` of the head; the mean head's if not given. Each p, b, m longer than _SHORTEST_HOLD_S / 2
    has a frame with closed lips. Before, after and in pauses the lips rest closed.
    """
    lips = _lips()
    rest = lips.rest_up if rest_gap_dm is None else rest_gap_dm
    time = (np.arange(frames) + 0.5) / fps
    shapes = shapes_in_time(phones, frames / fps)
    speech = _activity(shapes, time)

    channels = _blend(shapes, time + style.lead_s)
    gains = dict.fromkeys(_NAMES, style.amplitude)
    gains["jaw"] *= style.jaw
    gains["lower"] *= 2 - min(style.jaw, 1.6)
    gains["upper"] *= 2 - min(style.jaw, 1.6)
    gains["pucker"] *= style.rounding
    gains["funnel"] *= style.rounding
    gains["stretch"] *= style.spreading
    channels = channels * np.array([gains[c] for c in _NAMES])
    channels[:, _NAMES.index("stretch")] += max(style.width, 0.0) * speech
    channels[:, _NAMES.index("pucker")] += max(-style.width, 0.0) * speech
    channels += style.wander * _slow_noise(frames, len(_NAMES), fps, style.seed) * (0.25 + 0.75 * speech[:, None])
    commands = _commands(shapes, time)
    # A lip that is still tucked in for an f, or already, would pass behind the other.
    channels[:, _NAMES.index("tuck")] *= 1 - commands[-1][0]
    expression = channels.clip(0, 1) @ lips.mix
    for levelled in (False, True):
        gap = rest + expression @ lips.up
        wanted = gap
        for strength, goal in commands:
            wanted = wanted + strength * np.minimum(goal - wanted, 0)  # only ever closes
        lips.set_gap(expression, gap, np.maximum(wanted, CLOSED_GAP))
        if not levelled:
            lips.level(expression, commands[-1][0])
    return torch.from_numpy(expression).float()


def _activity(shapes: list[tuple[float, float, int]], time: np.ndarray) -> np.ndarray:
    """1 in speech, 0 in pauses with a resting mouth, smooth between: the mouth opens before the sound and rests after
    it.
    """
    out = np.ones(len(time))
    for k, (start, end, kind) in enumerate(shapes):
        if kind != SILENCE or (end - start < _SHORTEST_REST_S and 0 < k < len(shapes) - 1):
            continue
        after = 1.0 if k == 0 else _smooth((time - start) / _REST_S)
        before = 1.0 if k == len(shapes) - 1 else _smooth((end - time) / _REST_S)
        inside = (time >= start) & (time < end)
        out = np.where(inside, 1 - np.minimum(after, before), out)
    return out


def _smooth(x: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, a cosine between."""
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(x, 0, 1))


def _blend(shapes: list[tuple[float, float, int]], time: np.ndarray) -> Float[np.ndarray, "t 8"]:
    above, below = np.zeros((len(time), len(_NAMES))), np.full((len(time), len(_NAMES)), 1e-6)
    for start, end, kind in shapes:
        shape = SHAPES[CLASSES[kind]]
        margin = _INNER * (end - start)
        lips, jaw = (
            np.where(
                t < start + margin, (start + margin - t) / shape.before_s, (t - end + margin) / shape.after_s
            ).clip(0)
            for t in (time - _LAG_S, time)
        )
        strength = shape.dominance * (min(1.0, (end - start) / _SHORTEST_REST_S) if kind == SILENCE else 1.0)
        for c, channel in enumerate(_NAMES):
            reach = jaw / _JAW_SLOWNESS if channel == "jaw" else lips
            share = strength * (_FREE if channel in shape.free else 1.0) * np.exp(-(reach**_SHARPNESS))
            above[:, c] += share * shape.target.get(channel, 0.0)
            below[:, c] += share
    return above / below


def _commands(shapes: list[tuple[float, float, int]], time: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """(strength "t", gap in dm at most) of what lips must do, the widest gaps first: nothing undoes a closure."""
    by_gap: dict[float, np.ndarray] = {CLOSED_GAP: 1 - _activity(shapes, time)}
    for start, end, kind in shapes:
        gap = SHAPES[CLASSES[kind]].gap_dm
        if gap is None:
            continue
        if kind == BILABIAL:
            hold_s = max(_HELD * (end - start), _SHORTEST_HOLD_S)
            middle = start + _HELD * (end - start) / 2
            start, end = middle - hold_s / 2, middle + hold_s / 2
        else:
            start, end = start + 0.15 * (end - start), end - 0.15 * (end - start)
        by_gap[gap] = np.maximum(by_gap.get(gap, 0.0), _hold(start, end, time))
    return [(by_gap[gap], gap) for gap in sorted(by_gap, reverse=True)]


def _hold(start: float, end: float, time: np.ndarray) -> np.ndarray:
    return _smooth(np.minimum((time - start + _CLOSING_S) / _CLOSING_S, (end + _PARTING_S - time) / _PARTING_S))


def _slow_noise(frames: int, channels: int, fps: float, seed: int) -> Float[np.ndarray, "t c"]:
    """Noise of unit variance below about 2 Hz."""
    rng = np.random.default_rng(seed)
    width = max(int(0.25 * fps), 1)
    white = rng.standard_normal((frames + 4 * width, channels))
    kernel = np.hanning(2 * width + 1)
    kernel /= np.linalg.norm(kernel)
    return np.stack([np.convolve(c, kernel, "same") for c in white.T], 1)[2 * width : 2 * width + frames]


def still(style: Style) -> Style:
    """The same speaker without the wandering: for figures and tests."""
    return replace(style, wander=0.0)
