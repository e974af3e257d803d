"""Fits how much a person's mouth moves (`MouthCalibration`): by their tracked motion, then by what their head shows.

A head that learned from a quiet mouth opens it less than it is told. So the opening is matched where a viewer sees it:
landmarks are found in rendered frames, and the command is mapped until their distribution is the recording's.
t frames, k quantiles, q mouth lengths, dm.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hicode.audio import FPS
from hicode.avatar.driving import merge_motion
from hicode.motion import LEFT_EYE_OUTER, N_LANDMARKS, RIGHT_EYE_OUTER
from hicode.speech.mouth_calibration import MouthCalibration, mouth_lengths
from hicode.speech.speech_model import MIN_SPEECH_FRAMES, SpeechModels, Subject
from hicode.speech.sync import mouth_measures
from hicode.tracking.landmarks import FaceLandmarker, rois_from_landmarks

if TYPE_CHECKING:
    from hicode.avatar.avatar import Avatar
    from hicode.preparation.clip import Clip
    from hicode.training.adaptation import SpeechExample

SHARES = torch.tensor([0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
_LEAST_STEP = 1e-5  # dm between knots
# Motions drawn where there is no sound, in standard deviations of what the models know, at their usual loss.
FRAMES_DRAWN, DRAWN = 250, 0.8
WIDEST = 0.98  # quantile of the tracked openings that commands may reach
CLOSED = 0.02  # of the outer-eye distance: lips nearer than that are closed


@dataclass(frozen=True)
class CalibrationConfig:
    """How the maps are fitted."""

    strength: tuple[float, float, float] = (0.5, 0.85, 0.75)
    """of opening, width and jaw. 0: as predicted; 1: the person's own distribution"""
    prior_s: float = 1.5  # seconds of speech that the prior over people weighs
    rendered_frames: int = 32  # to find how far the lips part for a command
    most_raised: float = 0.06  # of the outer-eye distance: how much a command of the opening is raised at most
    seed: int = 0


def mouth_directions(models: SpeechModels) -> tuple[Float[Tensor, "q 64"], Float[Tensor, "q 478 3"]]:
    """How expression and landmarks change with each length: the regression over the motions that the models know."""
    from hicode.tracking.head_model import HeadModel

    head = HeadModel.load()
    moved = head.landmarks(head.expression_basis) * head.mouth_landmark_weight[:, None]  # "64 478 3" by each action
    basis = torch.where(head.mouth_expression, models.expression.basis.detach(), 0.0)
    lengths = mouth_lengths(moved).T.double()  # "q 64"
    known = (basis.T @ basis).double()
    # Of every action a little, so that the three can be told apart whatever the models know.
    known = known + 1e-3 * known.diagonal().mean() * torch.diag(head.mouth_expression.double())
    expression = torch.linalg.solve(lengths @ known @ lengths.T, lengths @ known).float()
    return expression, torch.tensordot(expression, moved, 1)


def quantiles(lengths: Float[Tensor, "t q"]) -> Float[Tensor, "q k"]:
    """Of each length at `SHARES`, strictly ascending."""
    steps = _LEAST_STEP * torch.arange(len(SHARES))
    return torch.quantile(lengths, SHARES, dim=0).T.contiguous().cummax(1).values + steps


def calibrate(
    models: SpeechModels,
    example: "SpeechExample",
    generic: SpeechModels,
    config: CalibrationConfig = CalibrationConfig(),
) -> MouthCalibration | None:
    """The person's maps, from predicted and tracked motion of the frames in which they speak.

    Where the clip has little speech, the prior over people, `generic.people`, stands in. None without either.
    """
    used, speech_s, known = example.speaking, float(example.speaking.sum()) / FPS, []
    if used.sum() >= MIN_SPEECH_FRAMES:
        predicted = replace(models, calibration=None).predict(example.features[0]).landmarks
        known.append((speech_s, *(quantiles(mouth_lengths(x[used])) for x in (predicted, example.landmarks))))
    if generic.people is not None:
        known.append((config.prior_s, *of_person(generic.people, generic.subject, models.subject)))
    if not known:
        return None
    weights, sources, targets = zip(*known, strict=True)
    share = torch.tensor(weights) / sum(weights)
    source, target = (torch.einsum("w,wqk->qk", share, torch.stack(parts)) for parts in (sources, targets))
    target = torch.lerp(source, target, torch.tensor(config.strength)[:, None])
    return MouthCalibration(source, target, *mouth_directions(models))


def of_person(
    prior: MouthCalibration, mean: Subject, person: Subject
) -> tuple[Float[Tensor, "q k"], Float[Tensor, "q k"]]:
    """The prior's quantiles about a person's mean face. What people show of the opening does not depend on it."""
    usual, own = mouth_lengths(mean.landmarks)[:, None], mouth_lengths(person.landmarks)[:, None]
    target = prior.target + own - usual
    target[0] = prior.target[0]
    source = own + person.landmark_gain * (prior.source - usual)
    source[0] = source[0].clamp(min=person.closed_gap) + _LEAST_STEP * torch.arange(len(SHARES))  # lips do not overlap
    return source, target


def calibrate_rendering(
    avatar: "Avatar", clip: "Clip", example: "SpeechExample", config: CalibrationConfig = CalibrationConfig()
) -> MouthCalibration:
    """The avatar's maps with that of the opening matched in rendered frames.

    What the recording shows is where landmarks were detected in its frames. Without speech it is what the maps aim at:
    the prior over people.
    """
    models = avatar.speech
    assert models is not None and models.calibration is not None, "calibrate comes first"
    maps, unit = models.calibration, float(_eye_distance(models.subject.landmarks[None]))
    wanted = aim = maps.target[0] / unit
    if example.speaking.sum() >= MIN_SPEECH_FRAMES:
        train = slice(clip.train.start, clip.train.stop)
        seen = _opening(clip.track.landmarks_px[train])[example.speaking].quantile(SHARES)
        tracked = quantiles(mouth_lengths(example.landmarks[example.speaking]))[0] / unit
        wanted = torch.from_numpy(np.interp(aim.numpy(), tracked.numpy(), seen.numpy())).float()
    expression, landmarks = _spoken(models, example, config)
    told = mouth_lengths(landmarks)[:, 0] / unit
    picked = told.argsort()[torch.linspace(0, len(told) - 1, min(config.rendered_frames, len(told))).long()]
    shown = _opening(_rendered_points(avatar, expression[picked], landmarks[picked]))
    dead, slope = response(told[picked], shown)
    # Lips that are to be shut need no help; from the threshold of a closed mouth on, the dead zone is passed.
    commands = wanted / slope + dead * (wanted / CLOSED).clamp(0, 1)
    # Wider than its person was seen, a head shows torn teeth.
    widest = float(mouth_lengths(example.landmarks)[:, 0].quantile(WIDEST)) / unit + dead
    commands = torch.minimum(commands, aim + config.most_raised).clamp(max=widest).cummax(0).values
    ascending = unit * commands + _LEAST_STEP * torch.arange(len(SHARES))
    return replace(maps, target=torch.cat([ascending[None], maps.target[1:]]))


def response(told: Float[Tensor, "m"], shown: Float[Tensor, "m"]) -> tuple[float, float]:
    """(dead zone, slope) of a head: shown = slope (told - dead zone), or 0. Least absolute error, on a grid."""
    dead, slope = torch.meshgrid(torch.linspace(0, 0.05, 21), torch.linspace(0.8, 1.3, 11), indexing="ij")
    error = (slope[..., None] * (told - dead[..., None]).clamp(min=0) - shown).abs().mean(-1)
    at = int((error + 0.01 * (dead + 0.02 * (slope - 1).abs())).argmin())  # of equal ones, the head that obeys
    return float(dead.flatten()[at]), float(slope.flatten()[at])


def _spoken(
    models: SpeechModels, example: "SpeechExample", config: CalibrationConfig
) -> tuple[Float[Tensor, "t 64"], Float[Tensor, "t 478 3"]]:
    """Mouths as the person speaks: to the clip's sound; without any, drawn from the motions that the models know."""
    if example.speaking.sum() >= MIN_SPEECH_FRAMES:
        motion = models.predict(example.features[0])
        return motion.expression[example.speaking], motion.landmarks[example.speaking]
    pair, subject = (models.expression, models.landmarks), models.subject
    generator = torch.Generator().manual_seed(config.seed)
    draws = DRAWN * torch.randn(FRAMES_DRAWN, len(pair[0].basis), generator=generator)
    expression, landmarks = (draws @ model.basis.detach() for model in pair)
    expression = subject.expression + subject.expression_gain * expression
    landmarks = subject.landmarks + subject.landmark_gain * landmarks.unflatten(1, (N_LANDMARKS, 3))
    assert models.calibration is not None
    return models.calibration(expression, landmarks)


@torch.inference_mode()
def _rendered_points(
    avatar: "Avatar", expression: Float[Tensor, "m 64"], landmarks: Float[Tensor, "m 478 3"]
) -> Float[Tensor, "m 478 2"]:
    """Landmarks found in the avatar's pictures of m mouths, each over another of its driving frames, px."""
    landmarker, driving, points = FaceLandmarker(), avatar.driving, []
    for i, t in enumerate(np.linspace(0, len(driving) - 1, len(landmarks)).astype(int)):
        own = driving[t : t + 1]
        motion = merge_motion(own, expression[i : i + 1], landmarks[i : i + 1], avatar)
        picture = avatar.synthesize_frame(motion, 0, avatar.driving_frame(t), avatar.driving_mask(t), own)
        image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        known = torch.from_numpy(avatar.landmarks_px(motion, 0))
        roi = rois_from_landmarks(F.pad(known, (0, 1))[None])
        points.append(landmarker.landmarks(image, roi)[0][0, :, :2])
    return torch.stack(points)


def _opening(points: Float[Tensor, "t 478 2"]) -> Float[Tensor, "t"]:
    """Of the lips in pictures, over the outer-eye distance."""
    return mouth_measures(F.pad(points, (0, 1)))[:, 0]


def _eye_distance(landmarks: Float[Tensor, "t 478 3"]) -> Float[Tensor, ""]:
    return (landmarks[:, LEFT_EYE_OUTER] - landmarks[:, RIGHT_EYE_OUTER]).norm(dim=-1).mean()
