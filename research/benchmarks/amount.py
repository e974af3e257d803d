"""How much the mouth moves, on people that the shipped weights have not seen, by the strength of the calibration.

    python -m research.benchmarks.amount --cache CORPUS --json docs/results/amount.json

CORPUS is what `hicode pretrain` made; give one of people whom the weights did not learn from. Mean face, amplitude and
calibration come from the first half of each person's clip, figures from the second; speakers of several clips are left
out. Predictions are those of the speech models, before rendering. Deviations are over the truth's, lengths in % of the
eye distance.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from hicode.evaluation.lips import CLOSED
from hicode.evaluation.motion_statistics import concordance
from hicode.motion import LIPS
from hicode.training.adaptation import SpeechExample, learn_speech_models, load_generic
from hicode.training.calibration import CalibrationConfig, calibrate
from research.benchmarks.lips import correlations, eyes, frontal
from research.pretrain.corpus import load_examples
from research.reproduce.docs import save_results

STRENGTHS = {
    "as predicted": (0.0, 0.0, 0.0),
    ".5, .75, .75": (0.5, 0.75, 0.75),
    "shipped: .5, .85, .75": CalibrationConfig().strength,
    "whole": (1.0, 1.0, 1.0),
}
COLUMNS = (
    "opening r",
    "width r",
    "jaw r",
    "opening CCC",
    "width CCC",
    "opening",
    "width",
    "jaw",
    "closed",
    "speed",
    "error",
)


def figures(landmarks: Tensor, truth: SpeechExample) -> dict[str, float]:
    """Of one clip's spoken landmarks "t 478 3"."""
    spoken, measured = frontal(landmarks), frontal(truth.landmarks)
    r, deviation = correlations(spoken, measured), spoken.std(0) / measured.std(0)
    ccc = [concordance(spoken[:, k].numpy(), measured[:, k].numpy()) or 0.0 for k in (0, 1)]
    closed = [float((x[:, 0] < CLOSED).float().mean()) for x in (spoken, measured)]
    speeds = [float(x[:, LIPS].diff(dim=0).norm(dim=-1).mean()) for x in (landmarks, truth.landmarks)]
    wrong = (landmarks - truth.landmarks)[:, LIPS].norm(dim=-1).mean()
    values = (r[0], r[1], r[3], *ccc, deviation[0], deviation[1], deviation[3], 100 * (closed[0] - closed[1]))
    return dict(zip(COLUMNS, map(float, (*values, speeds[0] / speeds[1], 100 * wrong / eyes(truth.landmarks)))))


def row(name: str, people: list[dict[str, float]]) -> list[str]:
    """Mean and standard deviation over people."""
    cells = []
    for column in COLUMNS:
        values = np.array([p[column] for p in people])
        digits = 1 if column == "closed" else 2
        cells.append(f"{np.nanmean(values):.{digits}f} ± {np.nanstd(values):.{digits}f}")
    return [name, *cells]


def main(cache: Path, json: Path | None = None) -> int:
    """Print the table; with --json, write it."""
    torch.set_num_threads(1)
    generic, found = load_generic(), {name: [] for name in (*STRENGTHS, "still mouth", "truth")}
    alone = (clips[0] for clips in load_examples(cache).values() if len(clips) == 1)  # not sentences of one speaker
    for whole in (e for e in alone if e.speaking.sum() > 50):
        half = len(whole) // 2
        learned, truth = whole[:half], whole[half : len(whole)]
        models, _ = learn_speech_models(learned, generic.encoder, generic)
        for name, strength in STRENGTHS.items():
            maps = calibrate(models, learned, generic, CalibrationConfig(strength))
            spoken = replace(models, calibration=maps).predict(whole.features[0]).landmarks[half:]
            found[name].append(figures(spoken, truth))
        found["still mouth"].append(figures(models.subject.landmarks.expand_as(truth.landmarks), truth))
        found["truth"].append(figures(truth.landmarks, truth))
    rows = [row(name, people) for name, people in found.items()]
    for line in rows:
        print(line)
    if json:
        save_results(json, ("", *COLUMNS), rows, "python -m research.benchmarks.amount --cache CORPUS")
    return 0


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
