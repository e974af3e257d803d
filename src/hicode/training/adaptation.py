"""Learning speech → motion: generic Faceformers from many speakers, adapted to one subject (PAPER-DECISIONS 12, 14, 15; Eqs 13-14).

t frames, n outputs (64 expression parameters, or 478 x 3 landmark coordinates), k components. A *displacement* is motion minus the speaker's
template, the mean over the frames in which they speak. Speech says nothing of brows, gaze or pose, so errors are measured in a *metric* that
weighs an output by how much of mouth and jaw it moves (Deviation from Eqs 13-14, which weigh all alike).

The generic pair ships with the package; `hicode pretrain` made it, and the file says from which clips. Adapting never looks at a clip's
test part, and validates as a user sees it: free-running, on the last part of the training part.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hicode.errors import TrainingError
from hicode.files import load_tensors, save_tensors
from hicode.motion import EXPRESSION_DIM, N_LANDMARKS
from hicode.speech.encoder import Window
from hicode.speech.faceformer import IDENTITY_FRAMES, Faceformer, FaceformerConfig, LipClosure, SpeechModels, lip_gap
from hicode.training.losses import check_finite

SCHEMA, VERSION = "hicode-speech", 1
GENERIC = Path(__file__).parent.parent / "weights" / "speech.safetensors"

# Lips count as closed below this gap, dm: 2 % of a usual face's eye distance, EVALUATION.md's closure.
CLOSED_GAP = 0.016
# Speakers whose names begin so are synthetic: their looks are a rule's opinion, so they weigh less and do not shape the basis.
SYNTHETIC = "espeak-"

# What outputs that speech does not drive weigh against the mouth's: enough that they are defined, too little to be learned from.
_REST_WEIGHT = 0.02


# --- what an error weighs ----------------------------------------------------------------------------------------------------------------


class Metric:
    """A linear map in whose image plain squares are the errors that count. Diagonal ("n") or symmetric ("n n")."""

    def __init__(self, root: Float[Tensor, "n"] | Float[Tensor, "n n"]):
        self.root = root
        self._inverse = 1 / root if root.dim() == 1 else torch.linalg.inv(root)

    def __call__(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return x * self.root if self.root.dim() == 1 else x @ self.root

    def inverse(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return x * self._inverse if self.root.dim() == 1 else x @ self._inverse


@cache
def mouth_metrics() -> tuple[Metric, Metric]:
    """(of the 64 expression parameters, of the 1434 landmark coordinates): squares in dm², per landmark at the mouth."""
    from hicode.tracking.head_model import HeadModel

    head = HeadModel.load()
    weight = (head.mouth_landmark_weight.clamp(min=_REST_WEIGHT) / head.mouth_landmark_weight.sum()).double()
    moved = head.landmarks(head.expression_basis).double()  # "64 478 3" by a unit of each action
    gram = torch.einsum("alc,blc,l->ab", moved, moved, weight)
    # Actions that move no landmark (the tongue) must not be weightless, or the map would have no inverse.
    gram = gram + 1e-3 * gram.diagonal().mean() * torch.eye(EXPRESSION_DIM, dtype=torch.float64)
    value, vector = torch.linalg.eigh(gram)
    return Metric(((vector * value.sqrt()) @ vector.T).float()), Metric(weight.sqrt().repeat_interleave(3).float())


def fit_basis(displacements: list[Float[Tensor, "t n"]], components: int, metric: Metric) -> Float[Tensor, "k n"]:
    """Principal movements in the metric, each as large as its standard deviation; every speaker counts alike."""
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


# --- what is learned from ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SpeechExample:
    """One recording of one speaker, sound and picture in sync.

    features    "v 2*t d"  of the sound; v variants (other loudness, other window phase) of which training draws one
    expression  "t 64"
    landmarks   "t 478 3"  canonical
    speaking    "t"        where there is sound
    """

    speaker: str
    features: Float[Tensor, "v s d"]
    expression: Float[Tensor, "t 64"]
    landmarks: Float[Tensor, "t 478 3"]
    speaking: Bool[Tensor, "t"]

    def __len__(self) -> int:
        return len(self.expression)

    def __getitem__(self, frames: slice) -> "SpeechExample":
        start, stop, step = frames.indices(len(self))
        assert step == 1, frames
        return replace(
            self,
            features=self.features[:, 2 * start : 2 * stop],
            expression=self.expression[frames],
            landmarks=self.landmarks[frames],
            speaking=self.speaking[frames],
        )


def speaking_frames(samples: Float[np.ndarray, "n"], frames: int) -> Bool[Tensor, "t"]:
    """Where a frame or one within 120 ms of it is louder than 8 % of the loudest."""
    padded = np.zeros(frames * 640, np.float32)
    padded[: min(len(samples), len(padded))] = samples[: len(padded)]
    rms = np.sqrt((padded.reshape(frames, 640) ** 2).mean(1) + 1e-12)
    active = rms > max(0.08 * np.percentile(rms, 95), 1e-3) if frames else np.zeros(0, bool)
    return torch.from_numpy(np.convolve(active, np.ones(7), "same") > 0 if frames else active)


@dataclass(frozen=True, eq=False)
class Template:
    """What is a speaker's own before any learning, from the frames in which they speak (all of them where they never do)."""

    expression: Float[Tensor, "64"]
    landmarks: Float[Tensor, "478 3"]
    identity_frames: Float[Tensor, "20 478 3"]

    @staticmethod
    def of(
        expression: Float[Tensor, "t 64"],
        landmarks: Float[Tensor, "t 478 3"],
        speaking: Bool[Tensor, "t"],
        seed: int = 0,
    ) -> "Template":
        used = speaking if speaking.sum() >= 12 else torch.ones_like(speaking)
        chosen = np.random.default_rng(seed).choice(
            len(landmarks), IDENTITY_FRAMES, replace=len(landmarks) < IDENTITY_FRAMES
        )
        return Template(expression[used].mean(0), landmarks[used].mean(0), landmarks[np.sort(chosen)].clone())


# --- training a Faceformer ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainConfig:
    """How a generic Faceformer is trained."""

    steps: int = 300
    batch: int = 16  # sequences
    frames: int = 80  # of each
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    velocity_weight: float = 1.0  # of differences of successive frames
    # In standard deviations, fresh each feature, and half as much for whole sequences. Large: of .2, .4, .7 and 1 unseen speakers' mouths
    # came out better each time, as they did with 300 steps instead of 800.
    feature_noise: float = 1.0
    longest_speaker_s: float = (
        40.0  # a speaker with more speech than this counts as one with this much: variety beats minutes
    )
    synthetic_weight: float = 0.3  # of all synthetic speakers together, of the real ones'
    linear_share: float = 0.5  # of the linear answer
    linear_ridge: float = 50.0
    closure_synthetic_weight: float = 0.05  # of a synthetic frame where closures are learned, of a real one
    # Lips are commanded to close from the first odds on, wholly from the second; wholly where they are apart by less than the first share of the
    # speaker's usual gap, not at all beyond the second.
    closure_odds: tuple[float, float] = (0.2, 0.5)
    closure_narrow: tuple[float, float] = (0.4, 0.9)
    passes: int = 2  # times the model's own output is fed back before the pass that learns
    style_dropout: float = 0.5  # sequences that are told nothing of the speaker
    seed: int = 0


@dataclass(frozen=True, eq=False)
class _Task:
    """Inputs and targets of one Faceformer on one example."""

    features: Float[Tensor, "v s d"]
    target: Float[Tensor, "t k"]
    style: Float[Tensor, "s"] | None
    share: float = 1.0  # how often a frame of it is drawn
    voice: Float[Tensor, "v d"] | None = (
        None  # what the speaker's mean features are beside the mean voice's; it is taken out
    )

    def heard(self, variant: int) -> Float[Tensor, "s d"]:
        return self.features[variant] if self.voice is None else self.features[variant] - self.voice[variant]


@contextmanager
def _one_thread():
    """Sums this small are no faster on two threads, and far slower where something else wants the second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train_faceformer(
    model: Faceformer,
    tasks: list[_Task],
    metric: Metric,
    config: PretrainConfig,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Train in place, free-running: the model's own output, found by a few parallel passes, is what precedes each frame.

    Passes converge to the roll-out from the first frame on, far sooner than their number because sound decides most of a frame; back-propagation
    goes through the last one only. Raises TrainingError where the loss is not finite.
    """
    generator, rng = torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)
    importance = metric(model.basis).square().sum(1)
    importance = importance / importance.sum()
    optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    warm = max(config.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # a short warm-up, then a cosine to nothing
        optimiser, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
    )
    share = np.array([len(task.target) * task.share for task in tasks], np.float64)
    share /= share.sum()
    frames = min(config.frames, max(len(task.target) for task in tasks))
    model.train()
    for step in range(config.steps):
        batch = [_crop(tasks[i], frames, rng) for i in rng.choice(len(tasks), config.batch, p=share)]
        features, target, weight = (torch.stack([b[k] for b in batch]) for k in range(3))
        noise = torch.randn(features.shape, generator=generator) + 0.5 * torch.randn(
            len(batch), 1, features.shape[2], generator=generator
        )
        style = model.start
        if model.config.style_components:
            told = torch.rand(len(batch), 1, generator=generator) >= config.style_dropout
            style = model.start + model.style(torch.stack([b[3] for b in batch])) * told
        memory = model.memory(features + config.feature_noise * noise * model.feature_std)
        previous = torch.zeros_like(target)
        model.eval()
        with torch.no_grad():
            for _ in range(config.passes):
                previous = _preceding(model(memory, previous, style))
        model.train()
        predicted = model(memory, previous, style)
        error = (predicted - target) * importance.sqrt()
        motion_error = weight[..., None] * error.square()
        loss = (
            motion_error.sum(-1).mean()
            + config.velocity_weight * (error[:, 1:] - error[:, :-1]).square().sum(-1).mean()
        )
        heard = {"features": features, "motion": target}
        check_finite(step, {"motion": loss.detach()}, heard | dict(model.named_parameters()), "Speech step")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if progress:
            progress((step + 1) / config.steps)
    model.eval()


def _preceding(coefficients: Float[Tensor, "b t k"]) -> Float[Tensor, "b t k"]:
    return torch.cat([torch.zeros_like(coefficients[:, :1]), coefficients[:, :-1]], 1)


def _crop(task: _Task, frames: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A random stretch; short examples repeat their end, which then weighs nothing."""
    length = len(task.target)
    start = int(rng.integers(0, max(length - frames, 0) + 1))
    index = torch.arange(start, start + frames)
    weight = (index < length).float()
    index = index.clamp(max=length - 1)
    return (
        task.heard(int(rng.integers(len(task.features)))).unflatten(0, (-1, 2))[index].flatten(0, 1),
        task.target[index],
        weight,
        task.style,
    )


# --- the generic pair --------------------------------------------------------------------------------------------------------------------


def amplitude(displacement: Float[Tensor, "t n"], metric: Metric) -> float:
    """Root mean square of a displacement in the metric."""
    return float(metric(displacement).square().sum(-1).mean().sqrt())


def pretrain(
    examples: list[SpeechExample],
    encoder: str,
    config: PretrainConfig = PretrainConfig(),
    shape: FaceformerConfig | None = None,
    progress: Callable[[float], None] | None = None,
    window: Window | None = None,
) -> SpeechModels:
    """A generic pair from recordings of several speakers; its templates are the real speakers' mean.

    Learned *within* speakers: features are taken relative to the speaker's own mean, as displacements are. Whose voice it is says nothing of how
    lips move about a speaker's template, yet with a dozen speakers it passes for a cause (docs/log.md has what that cost). What was learned is
    relative to the mean voice, the models' `feature_mean`, so nothing needs to be known of a new one.

    `window` is of the encoder that made the features. `shape` is the expression model's; the landmark model differs in its outputs and its style input only.
    """
    shape = replace(shape or FaceformerConfig(), linear_share=config.linear_share)
    speakers = sorted({e.speaker for e in examples})
    people = [s for s in speakers if not s.startswith(SYNTHETIC)]
    template = {}
    for s in speakers:
        own = [e for e in examples if e.speaker == s]
        template[s] = Template.of(
            *(torch.cat([getattr(e, k) for e in own]) for k in ("expression", "landmarks", "speaking"))
        )
    metrics = mouth_metrics()
    heard = _voices(examples)
    features = torch.cat([e.features[0] - heard[e.speaker][0] for e in examples if e.speaker in people])
    share = _shares(examples, config)
    dim = features.shape[1]
    styles = min(6, len(people) - 1)
    shapes = (
        replace(shape, feature_dim=dim, outputs=EXPRESSION_DIM, style_components=0),
        replace(shape, feature_dim=dim, outputs=3 * N_LANDMARKS, style_components=styles),
    )
    models = []
    for part, (model_shape, metric) in enumerate(zip(shapes, metrics)):
        torch.manual_seed(config.seed)
        model = Faceformer(model_shape)
        model.feature_mean.copy_(torch.stack([heard[s][0] for s in people]).mean(0))  # every voice counts alike
        model.feature_std.copy_(features.std(0) + 1e-3)

        moved = [_displacements(e, template[e.speaker])[part] for e in examples]
        # Everyone is scaled to the typical speaker's amplitude, which is easily measured for a new one: how much somebody moves is no secret
        # of their sound.
        own = {
            s: amplitude(torch.cat([d[e.speaking] for d, e in zip(moved, examples) if e.speaker == s]), metric)
            for s in speakers
        }
        model.amplitude.fill_(float(np.median([own[s] for s in people])))
        moved = [d * (float(model.amplitude) / max(own[e.speaker], 1e-6)) for d, e in zip(moved, examples)]
        by_speaker = [torch.cat([d[e.speaking] for d, e in zip(moved, examples) if e.speaker == s]) for s in people]
        model.basis.copy_(fit_basis(by_speaker, model_shape.components, metric))
        style = {s: None for s in speakers}
        if styles:
            _fit_style(model, [template[s].identity_frames for s in people])
            style = {s: model.project_identity(template[s].identity_frames) for s in speakers} if part else style
        tasks = [
            _Task(
                e.features,
                to_coefficients(d, model.basis, metric),
                style[e.speaker],
                share[e.speaker],
                heard[e.speaker] - model.feature_mean,
            )
            for e, d in zip(examples, moved)
        ]
        train_faceformer(model, tasks, metric, config, (lambda x, p=part: progress((p + x) / 2)) if progress else None)
        if config.linear_share:
            fit_linear(model, tasks, config.linear_ridge)
        models.append(model)
    mean = Template(
        torch.stack([template[s].expression for s in people]).mean(0),
        torch.stack([template[s].landmarks for s in people]).mean(0),
        torch.stack([template[s].identity_frames for s in people]).mean(0),
    )
    closure = fit_closure(models[0], examples, config) if config.linear_share else None
    return SpeechModels(
        *models, encoder, mean.expression, mean.landmarks, mean.identity_frames, closure=closure, window=window
    )


def _voices(examples: list[SpeechExample]) -> dict[str, Float[Tensor, "v d"]]:
    """Each speaker's mean features, of every variant, over the frames in which they speak (all of them where they never do)."""
    out = {}
    for s in {e.speaker for e in examples}:
        own = [e for e in examples if e.speaker == s]
        spoken = [e.features[:, e.speaking.repeat_interleave(2)] for e in own]
        rows = torch.cat(spoken if any(x.shape[1] for x in spoken) else [e.features for e in own], 1)
        out[s] = rows.mean(1)
    return out


def _shares(examples: list[SpeechExample], config: PretrainConfig) -> dict[str, float]:
    """How much a frame of each speaker counts: long ones are drawn less often, synthetic ones together `synthetic_weight` of the real."""
    frames: dict[str, int] = {}
    for e in examples:
        frames[e.speaker] = frames.get(e.speaker, 0) + len(e)
    share = {s: min(1.0, 25 * config.longest_speaker_s / n) for s, n in frames.items()}
    real, synthetic = (
        sum(share[s] * n for s, n in frames.items() if s.startswith(SYNTHETIC) == k) for k in (False, True)
    )
    return {
        s: x * (config.synthetic_weight * real / synthetic if s.startswith(SYNTHETIC) and real else 1.0)
        for s, x in share.items()
    }


# --- closed forms ------------------------------------------------------------------------------------------------------------------------

# Directions of features that the linear answer hears, and the closure: more did not help unseen speakers.
PRINCIPAL, PRINCIPAL_CLOSURE = 220, 160


class _Directions:
    """Principal directions of standardised frame features, and a frame's surroundings in them."""

    def __init__(self, model: Faceformer, features: list[Float[Tensor, "s d"]], back: int, ahead: int, principal: int):
        self.model, self.back, self.ahead = model, back, ahead
        rows = torch.cat([self._frames(f) for f in features])
        _, vectors = torch.linalg.eigh(torch.cov(rows.T))
        self.vectors = vectors[:, -min(principal, vectors.shape[1]) :]  # "d p"

    def _frames(self, features: Float[Tensor, "s d"]) -> Float[Tensor, "t d"]:
        return self.model.frame_features(features[None])[0].double()

    def __call__(self, features: Float[Tensor, "2*t d"]) -> Float[Tensor, "t c"]:
        """Every frame's `back + 1 + ahead` neighbours, zeros outside the sound, and a one."""
        rows = torch.nn.functional.pad(self._frames(features) @ self.vectors, (0, 0, self.back, self.ahead))
        context = rows.unfold(0, self.back + 1 + self.ahead, 1).flatten(1)  # "t p*c": p major
        return torch.cat([context, torch.ones(len(context), 1, dtype=context.dtype)], 1)

    def kernel(self, weight: Float[Tensor, "c k"]) -> tuple[Float[Tensor, "k d w"], Float[Tensor, "k"]]:
        """The convolution over frame features that does the same."""
        inner = weight[:-1].unflatten(0, (self.vectors.shape[1], -1))  # "p w k"
        return torch.einsum("dp,pwk->kdw", self.vectors, inner).float(), weight[-1].float()


@torch.no_grad()
def fit_linear(model: Faceformer, tasks: list["_Task"], ridge: float) -> None:
    """The model's linear answer: ridge regression of the coefficients, speakers weighed as in training; what it answered before is the prior."""
    c = model.config
    hear = _Directions(model, [t.heard(0) for t in tasks], c.linear_back, c.look_ahead, PRINCIPAL)
    gram = moment = total = 0
    for k, task in enumerate(tasks):
        count = len(task.features)
        # Every variant of the sound; of speakers with more than enough of it, one of each recording's in turn.
        variants = range(count) if task.share >= 0.25 else [k % count]
        for features in map(task.heard, variants):
            x, weight = hear(features), task.share / len(variants)
            gram = gram + weight * (x.T @ x)
            heard = torch.nn.functional.pad(model.frame_features(features[None]), (0, 0, c.linear_back, c.look_ahead))
            moment = moment + weight * (x.T @ (task.target - model.linear_answer(heard)[0]).double())
            total = total + weight * len(x)
    solved = torch.linalg.solve(gram + ridge * total**0.5 * torch.eye(len(gram), dtype=gram.dtype), moment)
    weight, bias = hear.kernel(solved)
    model.linear.weight.data += weight
    model.linear.bias.data += bias


def fit_closure(
    model: Faceformer, examples: list[SpeechExample], config: PretrainConfig, ridge: float = 30.0
) -> LipClosure:
    """When lips are closed, by a logistic regression (Newton's method, ridge prior) on what `model` hears; and how people close them.

    A real frame is closed where its gap is within .8 mm of the speaker's least (their third percentile), or under CLOSED_GAP; a synthetic one, where
    phones or a pause say so. What is no speech is closed throughout: noise does not open a mouth.
    """
    c = model.config
    closure = LipClosure(c.feature_dim, c.linear_back, c.look_ahead, *config.closure_odds, config.closure_narrow)
    hear = _Directions(model, [e.features[0] for e in examples], c.linear_back, c.look_ahead, PRINCIPAL_CLOSURE)
    share = {s: min(x, 1.0) for s, x in _shares(examples, replace(config, synthetic_weight=0.0)).items()}
    rows, closed, weights = [], [], []
    for e in examples:
        gap = lip_gap(e.landmarks)
        real = not e.speaker.startswith(SYNTHETIC)
        least = closed_gap(e) + 0.008 if real else 0.0
        heard = e.features[[0, -1]] if len(e.features) > 1 else e.features  # as it is, and as it is farthest from that
        weight = (share[e.speaker] if real else config.closure_synthetic_weight) / len(heard)
        for features in heard:
            rows.append(hear(features).float())
            closed.append((gap < max(least, CLOSED_GAP)).double())
            weights.append(torch.full((len(e),), weight, dtype=torch.float64))
    solved = torch.zeros(rows[0].shape[1], dtype=torch.float64)
    prior = 0.25 * ridge * float(sum(w.sum() for w in weights)) ** 0.5 * torch.eye(len(solved), dtype=torch.float64)
    for _ in range(6):  # Newton: converged to 1e-3 by then
        gram, moment = prior.clone(), torch.zeros_like(solved)
        for x, y, w in zip(rows, closed, weights):
            x = x.double()
            odds = torch.sigmoid(x @ solved)
            bend = (odds * (1 - odds)).clamp(min=1e-3) * w
            gram += (x * bend[:, None]).T @ x
            moment += x.T @ (bend * (x @ solved) + w * (y - odds))
        solved = torch.linalg.solve(gram, moment)
    weight, bias = hear.kernel(solved[:, None])
    closure.weight.copy_(weight)
    closure.bias.copy_(bias)
    direction = closing_direction(
        [e for e in examples if not e.speaker.startswith(SYNTHETIC)], config.longest_speaker_s
    )
    closure.expression.copy_(direction[0])
    closure.landmarks.copy_(direction[1])
    return closure


def closed_gap(example: SpeechExample) -> float:
    """What tracking sees of a speaker's closed lips, dm: the third percentile of the gap where they speak, at most CLOSED_GAP."""
    used = example.speaking if example.speaking.sum() >= 12 else torch.ones_like(example.speaking)
    return float(lip_gap(example.landmarks)[used].quantile(0.03).clamp(0.0, CLOSED_GAP))


def closing_direction(
    examples: list[SpeechExample], longest_s: float
) -> tuple[Float[Tensor, "64"], Float[Tensor, "478 3"]]:
    """Expression, and landmarks by the head model, per dm of lip gap: the regression of people's expressions on their gap while it is small.

    In the mouth's actions only. Among the many that close a mouth it is the mixture that tracking sees, so avatars have learned from it.
    """
    from hicode.tracking.head_model import HeadModel

    head = HeadModel.load()
    moment = torch.zeros(EXPRESSION_DIM)
    for e in examples:
        gap = lip_gap(e.landmarks)
        used = e.speaking & (gap <= gap[e.speaking].quantile(0.6)) if e.speaking.sum() >= 12 else e.speaking
        if used.sum() < 12:
            continue
        centred = gap[used] - gap[used].mean()
        moment += min(1.0, 25 * longest_s / len(e)) * (
            centred[:, None] * (e.expression[used] - e.expression[used].mean(0))
        ).sum(0)
    expression = torch.where(head.mouth_expression, moment, 0.0)
    landmarks = (
        torch.einsum("e,elc->lc", expression, head.landmarks(head.expression_basis))
        * head.mouth_landmark_weight[:, None]
    )
    opened = float(lip_gap(landmarks))
    if opened <= 1e-9:  # nobody moves their lips: then the jaw's own action
        expression = torch.zeros(EXPRESSION_DIM)
        expression[head.expression_names.index("jawOpen")] = 1.0
        landmarks = (
            head.landmarks(head.expression_basis[head.expression_names.index("jawOpen")][None])[0]
            * head.mouth_landmark_weight[:, None]
        )
        opened = float(lip_gap(landmarks))
    return expression / opened, landmarks / opened


def _fit_style(model: Faceformer, faces: list[Float[Tensor, "20 478 3"]]) -> None:
    """Principal faces of the speakers, scaled so that a speaker's coefficients have unit variance."""
    if not model.config.style_components:
        return
    means = torch.stack([f.mean(0).flatten() for f in faces])
    model.style_mean.copy_(means.mean(0))
    _, s, vt = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    k = model.config.style_components
    model.style_basis.copy_(vt[:k] / (s[:k, None] / (len(faces) - 1) ** 0.5).clamp(min=1e-6))


def _displacements(example: SpeechExample, template: Template) -> tuple[Float[Tensor, "t 64"], Float[Tensor, "t 1434"]]:
    return example.expression - template.expression, (example.landmarks - template.landmarks).flatten(1)


def save_generic(models: SpeechModels, learned_from: list[dict], path: Path | str = GENERIC) -> None:
    """Write the pair in half precision. `learned_from`: one entry a clip, with its terms."""
    tensors, config = models.state()
    save_tensors(
        path, {k: v.half() for k, v in tensors.items()}, SCHEMA, VERSION, config | {"learned_from": learned_from}
    )


def load_generic(path: Path | str = GENERIC) -> SpeechModels:
    """The shipped pair, which speaks with the mean of its speakers' faces. Raises FileFormatError where the file is damaged."""
    tensors, config = load_tensors(path, SCHEMA, VERSION)
    return SpeechModels.from_state(tensors, config)


# --- adapting to one subject -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptConfig:
    """How the generic pair becomes the subject's."""

    encoder: str = "embedded"
    fine_tune_from_s: float = 10.0  # below this much training speech only template and gain are adapted
    steps: int = 120
    learning_rate: float = 5e-4
    validation: float = 0.15  # of the training part, its end
    gain_prior_s: float = 4.0  # seconds of speech that a gain of one weighs
    seed: int = 0


@dataclass(frozen=True)
class AdaptReport:
    """What adapting did. Errors are root mean squares of the mouth in mm, free-running, on the validation part: (expression, landmarks)."""

    speech_s: float
    gain: tuple[float, float]
    static_mm: tuple[float, float]
    generic_mm: tuple[float, float]
    adapted_mm: tuple[float, float]
    fine_tuned: tuple[bool, bool]


def example_of(clip, encoder: str = "embedded", window: Window | None = None) -> SpeechExample:
    """The training part of a clip. A clip without sound, or with silence, gives features of no length."""
    train = slice(clip.train.start, clip.train.stop)
    motion = clip.track.motion[train]
    samples = clip.audio()
    if samples is None:
        speaking = torch.zeros(len(motion), dtype=torch.bool)
    else:
        speaking = speaking_frames(samples[: 640 * clip.train.stop], clip.train.stop)[train]
    features = clip.speech_features(encoder, window) if speaking.any() else None
    features = torch.zeros(0, 0) if features is None else features[2 * train.start : 2 * train.stop]
    return SpeechExample("subject", features[None], motion.expression, motion.landmarks, speaking)


def adapt_example(
    example: SpeechExample,
    progress: Callable[[float], None] | None = None,
    config: AdaptConfig = AdaptConfig(),
    generic: SpeechModels | None = None,
) -> tuple[SpeechModels, AdaptReport]:
    """The subject's template and gain; above `fine_tune_from_s` also weights, kept only where the validation part says they are better."""
    for name in ("features", "expression", "landmarks"):
        bad = ~getattr(example, name).isfinite()
        if bool(bad.any()):
            raise TrainingError(
                f"The {name} that speech is to be learned from hold {int(bad.sum())} values that are not finite. Prepare the clip again: hicode prepare."
            )
    generic = generic or load_generic()
    template = Template.of(example.expression, example.landmarks, example.speaking, config.seed)
    own = (template.expression, template.landmarks, template.identity_frames)
    speech_s = float(example.speaking.sum()) / 25
    if speech_s == 0:
        pair, nothing = (generic.expression, generic.landmarks), (float("nan"),) * 2
        moved = _displacements(example, template)
        gains = tuple(usual_gain(m, d, example.speaking, metric) for m, d, metric in zip(pair, moved, mouth_metrics()))
        return _own(generic, *pair, *own, *gains, example), AdaptReport(
            0.0, gains, nothing, nothing, nothing, (False, False)
        )
    assert generic.encoder == config.encoder and generic.feature_dim == example.features.shape[-1], (
        generic.encoder,
        config.encoder,
    )

    parts = []
    for k in (0, 1):
        parts.append(
            _adapt_part(
                k, generic, example, template, speech_s, config, lambda x, k=k: progress and progress((k + x) / 2)
            )
        )
        if progress:
            progress((k + 1) / 2)
    models, gains, *errors = zip(*parts)
    report = AdaptReport(
        speech_s, gains, *errors, (models[0] is not generic.expression, models[1] is not generic.landmarks)
    )
    return _own(generic, *models, *own, *gains, example), report


def _own(
    generic: SpeechModels, expression, landmarks, template, face, frames, expression_gain, landmark_gain, example
) -> SpeechModels:
    return SpeechModels(
        expression, landmarks, generic.encoder, template, face, frames, expression_gain, landmark_gain,
        generic.closure, closed_gap(example), generic.window,
    )  # fmt: skip


def _adapt_part(
    part: int,
    generic: SpeechModels,
    example: SpeechExample,
    template: Template,
    speech_s: float,
    config: AdaptConfig,
    progress,
) -> tuple[Faceformer, float, float, float, float]:
    """(model, gain, error of a still mouth, of the generic model, of what was chosen) for expression (0) or landmarks (1)."""
    model = (generic.expression, generic.landmarks)[part]
    metric = mouth_metrics()[part]
    target = _displacements(example, template)[part]
    faces = template.identity_frames if part else None
    cut = len(example) - min(max(25, round(config.validation * len(example))), len(example) // 2)

    def error_mm(displacement: Tensor) -> float:
        return 100 * amplitude(displacement[cut:] - target[cut:], metric)

    predicted = predict_displacement(model, example.features[0], faces)
    usual = usual_gain(model, target[:cut], example.speaking[:cut], metric)
    # Least squares make who is heard badly mumble, for an error that hardly falls: never less than the speaker's usual amplitude.
    gain = max(fit_gain(predicted[:cut], target[:cut], metric, config.gain_prior_s, usual), usual)
    candidates = [(error_mm(usual * predicted), usual, model), (error_mm(gain * predicted), gain, model)]
    if speech_s >= config.fine_tune_from_s:
        tuned = fine_tune(model, example[:cut], target[:cut], metric, config, progress)
        predicted = predict_displacement(tuned, example.features[0], faces)
        gain = fit_gain(predicted[:cut], target[:cut], metric, config.gain_prior_s, usual)
        candidates.append((error_mm(gain * predicted), gain, tuned))
    best = min(candidates, key=lambda c: c[0])
    return best[2], best[1], error_mm(torch.zeros_like(target)), candidates[0][0], best[0]


def usual_gain(model: Faceformer, target: Float[Tensor, "t n"], speaking: Bool[Tensor, "t"], metric: Metric) -> float:
    """How much more than the generic model's speaker this one moves, whatever they say; within a factor of two."""
    used = speaking if speaking.sum() >= 12 else torch.ones_like(speaking)
    return float(np.clip(amplitude(target[used], metric) / float(model.amplitude), 0.5, 2.0))


def fit_gain(
    predicted: Float[Tensor, "t n"],
    target: Float[Tensor, "t n"],
    metric: Metric,
    prior_s: float,
    prior_gain: float = 1.0,
) -> float:
    """The factor on a prediction that is nearest the target in the metric, drawn to `prior_gain` as if `prior_s` seconds had said so."""
    p, y = metric(predicted), metric(target)
    prior = 25 * prior_s * float(p.square().sum(-1).mean())
    return float(((p * y).sum() + prior * prior_gain) / (p.square().sum() + prior).clamp(min=1e-12))


def fine_tune(
    model: Faceformer,
    example: SpeechExample,
    target: Float[Tensor, "t n"],
    metric: Metric,
    config: AdaptConfig,
    progress: Callable[[float], None] | None = None,
) -> Faceformer:
    """A copy trained on one subject for a few steps at a low rate; how few is what keeps it near the generic one."""
    copy = Faceformer(model.config)
    copy.load_state_dict(model.state_dict())
    projected = None
    if model.config.style_components:
        projected = copy.project_identity(
            Template.of(example.expression, example.landmarks, example.speaking, config.seed).identity_frames
        )
    task = _Task(example.features, to_coefficients(target, copy.basis, metric), projected)
    schedule = PretrainConfig(
        steps=config.steps, batch=8, learning_rate=config.learning_rate, style_dropout=0.0, seed=config.seed
    )
    train_faceformer(copy, [task], metric, schedule, progress)
    if model.config.linear_share:
        fit_linear(copy, [task], schedule.linear_ridge)
    return copy


@torch.no_grad()
def predict_displacement(
    model: Faceformer, features: Float[Tensor, "2*t d"], identity_frames: Float[Tensor, "20 478 3"] | None = None
) -> Float[Tensor, "t n"]:
    """Free-running prediction of one sound, without template and gain."""
    return model.predict(features[None], model.identity_style(identity_frames))[0] @ model.basis
