"""Learning a Faceformer: what an error weighs, training by descent, and what is solved in closed form.

t frames, n outputs (64 expression parameters, or 478 x 3 landmark coordinates), k coefficients of a model's basis, d
feature dimensions. A displacement is motion minus the speaker's mean face. Speech says nothing of brows, gaze or pose,
so errors are measured in a metric that weighs an output by how much of mouth and jaw it moves (a deviation from Eqs
13-14, which weigh all alike). A velocity term is added to the loss.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hicode.motion import EXPRESSION_DIM
from hicode.speech.faceformer import Faceformer
from hicode.speech.lip_closure import LipClosure, lip_gap
from hicode.speech.speech_model import MIN_SPEECH_FRAMES
from hicode.training.losses import check_finite

# dm. Lips count as closed below this gap, 2 % of a usual face's distance of the eyes.
CLOSED_GAP = 0.016
# Weight of outputs that speech does not drive, against the mouth's: they are defined, and hardly learned from.
_REST_WEIGHT = 0.02
# Principal directions of features that the linear prediction and the closure see: more did not help unseen speakers.
PRINCIPAL, PRINCIPAL_CLOSURE = 220, 160

# --- metric and basis ---


class Metric:
    """A linear map after which plain squares are the errors that count. Diagonal ("n") or symmetric ("n n")."""

    def __init__(self, root: Float[Tensor, "n"] | Float[Tensor, "n n"]):
        self.root = root
        self._inverse = 1 / root if root.dim() == 1 else torch.linalg.inv(root)

    def __call__(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """The map."""
        return x * self.root if self.root.dim() == 1 else x @ self.root

    def inverse(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """Its inverse."""
        return x * self._inverse if self.root.dim() == 1 else x @ self._inverse


@cache
def mouth_metrics() -> tuple[Metric, Metric]:
    """Metrics of the expression and of the landmarks; squares are dm² per landmark at the mouth."""
    from hicode.tracking.head_model import HeadModel

    head = HeadModel.load()
    weight = (head.mouth_landmark_weight.clamp(min=_REST_WEIGHT) / head.mouth_landmark_weight.sum()).double()
    moved = head.landmarks(head.expression_basis).double()  # "64 478 3" by a unit of each action
    gram = torch.einsum("alc,blc,l->ab", moved, moved, weight)
    # Actions that move no landmark (the tongue) need some weight, or the map would have no inverse.
    gram = gram + 1e-3 * gram.diagonal().mean() * torch.eye(EXPRESSION_DIM, dtype=torch.float64)
    value, vector = torch.linalg.eigh(gram)
    return Metric(((vector * value.sqrt()) @ vector.T).float()), Metric(weight.sqrt().repeat_interleave(3).float())


def fit_basis(displacements: list[Float[Tensor, "_ n"]], components: int, metric: Metric) -> Float[Tensor, "k n"]:
    """Principal movements in the metric, each scaled to its standard deviation. Speakers (entries) count alike."""
    weighted = torch.cat([metric(d) / len(d) ** 0.5 for d in displacements]) / len(displacements) ** 0.5
    value, vector = torch.linalg.eigh((weighted.T @ weighted).double())
    value, vector = value[-components:].flip(0).clamp(min=1e-12), vector[:, -components:].flip(1)
    return metric.inverse((vector * value.sqrt()).T.float())


def to_coefficients(
    displacement: Float[Tensor, "*b n"], basis: Float[Tensor, "k n"], metric: Metric
) -> Float[Tensor, "*b k"]:
    """The coefficients whose sum of basis movements is nearest in the metric."""
    rows = metric(basis)
    return metric(displacement) @ rows.T / rows.square().sum(1)


def amplitude(displacement: Float[Tensor, "t n"], metric: Metric) -> float:
    """Root mean square of a displacement in the metric."""
    return float(metric(displacement).square().sum(-1).mean().sqrt())


# --- descent ---


@dataclass(frozen=True)
class FaceformerTraining:
    """How a Faceformer is trained by descent."""

    steps: int = 300
    batch: int = 16  # sequences
    frames: int = 80  # of each sequence
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    velocity_weight: float = 1.0  # of differences of successive frames
    feature_noise: float = 1.0
    """in standard deviations, per feature, and half as much per sequence. Unseen speakers improve up to 1"""
    linear_ridge: float = 50.0
    passes: int = 2  # times the model's own output is fed back before the pass that learns
    style_dropout: float = 0.5  # share of sequences without the speaker's style
    seed: int = 0


@dataclass(frozen=True, eq=False)
class SpeechTask:
    """Inputs and targets of one Faceformer on one example.

    features  "v 2*t d"  of v variants of the sound, of which training draws one
    target    "t k"
    style     "c"        projected identity frames, None: no style
    share     how often a frame is drawn
    voice     "v d"      the speaker's mean features minus the mean voice's, subtracted; None: nothing
    """

    features: Float[Tensor, "v s d"]
    target: Float[Tensor, "t k"]
    style: Float[Tensor, "c"] | None = None
    share: float = 1.0
    voice: Float[Tensor, "v d"] | None = None

    def variant(self, index: int) -> Float[Tensor, "s d"]:
        """Features of one variant of the sound."""
        return self.features[index] if self.voice is None else self.features[index] - self.voice[index]


@dataclass(frozen=True, eq=False)
class _Batch:
    features: Float[Tensor, "b s d"]
    target: Float[Tensor, "b t k"]
    weight: Float[Tensor, "b t"]  # 0 where an example ended before
    style: Float[Tensor, "b c"] | None

    @staticmethod
    def draw(
        tasks: list[SpeechTask], share: Float[np.ndarray, "m"], config: FaceformerTraining, rng: np.random.Generator
    ) -> "_Batch":
        """Random stretches of random examples."""
        frames = min(config.frames, max(len(task.target) for task in tasks))
        drawn = [_crop(tasks[i], frames, rng) for i in rng.choice(len(tasks), config.batch, p=share)]
        features, target, weight, style = zip(*drawn, strict=True)
        styles = None if style[0] is None else torch.stack(style)
        return _Batch(torch.stack(features), torch.stack(target), torch.stack(weight), styles)


def _crop(task: SpeechTask, frames: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A random stretch; a short example repeats its end with weight 0."""
    length = len(task.target)
    start = int(rng.integers(0, max(length - frames, 0) + 1))
    index = torch.arange(start, start + frames)
    weight = (index < length).float()
    index = index.clamp(max=length - 1)
    features = task.variant(int(rng.integers(len(task.features)))).unflatten(0, (-1, 2))[index].flatten(0, 1)
    return features, task.target[index], weight, task.style


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small are no faster on two threads, and far slower where the second core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train_faceformer(
    model: Faceformer,
    tasks: list[SpeechTask],
    metric: Metric,
    config: FaceformerTraining,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Train in place, free-running: what precedes each frame is the model's own output, from a few parallel passes.

    Passes converge to the roll-out from the first frame on, soon, because sound decides most of a frame. Gradients go
    through the last pass only. Raises TrainingError where the loss is not finite.
    """
    generator, rng = torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)
    importance = metric(model.basis).square().sum(1)
    importance = (importance / importance.sum()).sqrt()
    optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    warm = max(config.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # a short warm-up, then a cosine to zero
        optimiser, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
    )
    share = np.array([len(task.target) * task.share for task in tasks], np.float64)
    share /= share.sum()
    model.train()
    for step in range(config.steps):
        batch = _Batch.draw(tasks, share, config, rng)
        error = (_free_running(model, batch, config, generator) - batch.target) * importance
        motion = (batch.weight[..., None] * error.square()).sum(-1).mean()
        loss = motion + config.velocity_weight * error.diff(dim=1).square().sum(-1).mean()
        inputs = {"features": batch.features, "motion": batch.target}
        check_finite(step, {"motion": loss.detach()}, inputs | dict(model.named_parameters()), "Speech step")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if progress:
            progress((step + 1) / config.steps)
    model.eval()


def _free_running(
    model: Faceformer, batch: _Batch, config: FaceformerTraining, generator: torch.Generator
) -> Float[Tensor, "b t k"]:
    """Prediction from noisy features, after passes that approach the roll-out."""
    shape = batch.features.shape
    noise = torch.randn(shape, generator=generator)
    noise = noise + 0.5 * torch.randn(shape[0], 1, shape[2], generator=generator)
    style = model.start
    if model.config.style_components:
        assert batch.style is not None
        kept = torch.rand(shape[0], 1, generator=generator) >= config.style_dropout
        style = model.start + model.style(batch.style) * kept
    memory = model.memory(batch.features + config.feature_noise * noise * model.feature_std)
    previous = torch.zeros_like(batch.target)
    model.eval()
    with torch.no_grad():
        for _ in range(config.passes):
            previous = shifted(model(memory, previous, style))
    model.train()
    return model(memory, previous, style)


def shifted(coefficients: Float[Tensor, "b t k"]) -> Float[Tensor, "b t k"]:
    """What precedes each frame: zero, then the coefficients without the last."""
    return torch.cat([torch.zeros_like(coefficients[:, :1]), coefficients[:, :-1]], 1)


@torch.no_grad()
def predict_displacement(
    model: Faceformer, features: Float[Tensor, "s d"], identity_frames: Float[Tensor, "20 478 3"] | None = None
) -> Float[Tensor, "t n"]:
    """Free-running prediction of one sound, without mean face and gain."""
    return model.predict(features[None], model.identity_style(identity_frames))[0] @ model.basis


# --- closed forms ---


class FeatureContext:
    """A frame's features and its neighbours', reduced to their principal directions."""

    def __init__(self, model: Faceformer, features: list[Float[Tensor, "_ d"]], back: int, ahead: int, principal: int):
        self.model, self.back, self.ahead = model, back, ahead
        rows = torch.cat([self._frames(f) for f in features])
        _, vectors = torch.linalg.eigh(torch.cov(rows.T))
        self.directions = vectors[:, -min(principal, vectors.shape[1]) :]  # "d p"

    def _frames(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "t d"]:
        return self.model.frame_features(features[None])[0].double()

    def __call__(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "t c"]:
        """Each frame's `back + 1 + ahead` neighbours, zeros outside the sound, and a one."""
        rows = F.pad(self._frames(features) @ self.directions, (0, 0, self.back, self.ahead))
        context = rows.unfold(0, self.back + 1 + self.ahead, 1).flatten(1)
        return torch.cat([context, torch.ones(len(context), 1, dtype=context.dtype)], 1)

    def kernel(self, weight: Float[Tensor, "c k"]) -> tuple[Float[Tensor, "k d l"], Float[Tensor, "k"]]:
        """The convolution over frame features, and its bias, that a linear map of the context is."""
        inner = weight[:-1].unflatten(0, (self.directions.shape[1], -1))  # "p l k"
        return torch.einsum("dp,plk->kdl", self.directions, inner).float(), weight[-1].float()


@torch.no_grad()
def fit_linear(model: Faceformer, tasks: list[SpeechTask], ridge: float) -> None:
    """Add to the linear prediction a ridge regression of what it leaves unexplained; tasks weigh as in training."""
    c = model.config
    context = FeatureContext(model, [t.variant(0) for t in tasks], c.linear_back, c.look_ahead, PRINCIPAL)
    gram = moment = total = torch.zeros((), dtype=torch.float64)
    for i, task in enumerate(tasks):
        count = len(task.features)
        # Every variant of the sound; of speakers with plenty of it, one of each recording's in turn.
        variants = range(count) if task.share >= 0.25 else [i % count]
        for features in map(task.variant, variants):
            x, weight = context(features), task.share / len(variants)
            gram = gram + weight * (x.T @ x)
            frames = F.pad(model.frame_features(features[None]), (0, 0, c.linear_back, c.look_ahead))
            moment = moment + weight * (x.T @ (task.target - model.linear_prediction(frames)[0]).double())
            total = total + weight * len(x)
    solved = torch.linalg.solve(gram + ridge * total.sqrt() * torch.eye(len(gram), dtype=gram.dtype), moment)
    weight, bias = context.kernel(solved)
    model.linear.weight.data += weight
    assert model.linear.bias is not None
    model.linear.bias.data += bias


@dataclass(frozen=True, eq=False)
class ClosureRows:
    """Labelled sound: features "s d" of t frames, which of them show closed lips, and the weight of a frame."""

    features: Float[Tensor, "s d"]
    closed: Bool[Tensor, "t"]
    weight: float


@torch.no_grad()
def fit_closure(
    model: Faceformer,
    closure: LipClosure,
    sounds: list[ClosureRows],
    directions: list[Float[Tensor, "_ d"]],
    ridge: float = 30.0,
) -> None:
    """Set the closure's weights by logistic regression: Newton's method with a ridge prior.

    directions  sounds whose principal directions of features are used
    """
    c = closure.config
    context = FeatureContext(model, directions, c.back, c.ahead, PRINCIPAL_CLOSURE)
    rows = [context(sound.features).float() for sound in sounds]
    total = float(sum(sound.weight * len(sound.closed) for sound in sounds))
    solved = torch.zeros(rows[0].shape[1], dtype=torch.float64)
    prior = 0.25 * ridge * total**0.5 * torch.eye(len(solved), dtype=torch.float64)
    for _ in range(6):  # converges to 1e-3
        gram, moment = prior.clone(), torch.zeros_like(solved)
        for features, sound in zip(rows, sounds, strict=True):
            x, closed = features.double(), sound.closed.double()
            probability = torch.sigmoid(x @ solved)
            curvature = (probability * (1 - probability)).clamp(min=1e-3) * sound.weight
            gram += (x * curvature[:, None]).T @ x
            moment += x.T @ (curvature * (x @ solved) + sound.weight * (closed - probability))
        solved = torch.linalg.solve(gram, moment)
    weight, bias = context.kernel(solved[:, None])
    closure.weight.copy_(weight)
    closure.bias.copy_(bias)


def closed_gap(landmarks: Float[Tensor, "t 478 3"], speaking: Bool[Tensor, "t"]) -> float:
    """What tracking shows of closed lips, dm: the third percentile of the gap in speech, at most CLOSED_GAP."""
    used = speaking if speaking.sum() >= MIN_SPEECH_FRAMES else torch.ones_like(speaking)
    return float(lip_gap(landmarks)[used].quantile(0.03).clamp(0.0, CLOSED_GAP))


def closing_moment(
    expression: Float[Tensor, "t 64"], gap: Float[Tensor, "t"], speaking: Bool[Tensor, "t"]
) -> Float[Tensor, "64"]:
    """Covariance of expression and lip gap, summed over the frames of speech whose gap is small."""
    if speaking.sum() < MIN_SPEECH_FRAMES:
        return torch.zeros(EXPRESSION_DIM)
    used = speaking & (gap <= gap[speaking].quantile(0.6))
    if used.sum() < MIN_SPEECH_FRAMES:
        return torch.zeros(EXPRESSION_DIM)
    centred = gap[used] - gap[used].mean()
    return (centred[:, None] * (expression[used] - expression[used].mean(0))).sum(0)


def set_closing_motion(closure: LipClosure, moment: Float[Tensor, "64"]) -> None:
    """Set how the lips close: the regression of expression on gap, and landmarks by the head model.

    In the mouth's actions only. Many mixtures of them close a mouth; this one is what tracking shows of people.
    """
    from hicode.tracking.head_model import HeadModel

    head = HeadModel.load()
    moved = head.landmarks(head.expression_basis) * head.mouth_landmark_weight[:, None]
    expression = torch.where(head.mouth_expression, moment, 0.0)
    landmarks = torch.einsum("e,elc->lc", expression, moved)
    opened = float(lip_gap(landmarks))
    if opened <= 1e-9:  # nobody moves the lips: the jaw alone
        jaw = head.expression_names.index("jawOpen")
        expression, landmarks = torch.eye(EXPRESSION_DIM)[jaw], moved[jaw]
        opened = float(lip_gap(landmarks))
    closure.expression.copy_(expression / opened)
    closure.landmarks.copy_(landmarks / opened)
