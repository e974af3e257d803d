"""How well the sync measure tells right from wrong, on speakers that it has not seen in training.

    python -m research.benchmarks.sync --cache CORPUS                      truth and shuffled sound (a minute)
    python -m research.benchmarks.sync --cache CORPUS --data VIDEOS        also reversed sound, noise, log-mel, energy
    python -m research.benchmarks.sync --cache CORPUS --markdown table.md  write the table

Each speaker in turn is left out: the measure is fitted again to all others, offsets included. Windows are two seconds
of mouth and of sound. The offset of a clip comes from its other half (for a speaker of many short clips, from every
second clip), so no window judges itself. A right score is a window's at that offset. A wrong one is 5 frames or more
from it (shifted), or with another speaker's sound (mismatched).

Rows: the truth; the same measure with sound rotated within the clip, reversed, or white noise; and the measure fitted
to log-mel energies, and to loudness alone. Controls are treated alike on both sides: reversed sound is compared with
other people's reversed sound. Exit status 1 if the truth misses its limits: areas of .99, 97 % of windows within a
frame.
"""

import argparse
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hicode.audio import SAMPLES_PER_FEATURE
from hicode.errors import HicodeError
from hicode.files import load_tensors
from hicode.preparation.clip import shift_audio
from hicode.runtime import tune_allocator
from hicode.speech.encoders import create_encoder, match_frames
from hicode.speech.loudness import speech_level
from hicode.speech.sync import (
    MAX_LAG_FRAMES,
    WINDOW_FRAMES,
    SyncModel,
    area_under_curve,
    estimate_offset,
    mismatched_scores,
    window_scores,
    windowed_offsets,
)  # fmt: skip
from research.pretrain.build import sound_of
from research.pretrain.sync_fit import fit_sync

AREA, WITHIN = 0.99, 0.97
STEP = 5


@dataclass(frozen=True)
class Recording:
    """name: the clip's file without its ending. offset_frames: by which its sound was moved when the corpus was
    built."""

    name: str
    features: Tensor
    landmarks: Tensor
    offset_frames: float


Corpus = dict[str, list[Recording]]


@dataclass(frozen=True)
class Scores:
    """Of w windows: right [w], shifted, mismatched; nearest and error [w], frames between a window's offset and its
    clip's, to the nearest frame and to a fraction; margin [w]."""

    right: Tensor
    shifted: Tensor
    mismatched: Tensor
    nearest: Tensor
    error: Tensor
    margin: Tensor

    @staticmethod
    def joined(parts: "list[Scores]") -> "Scores":
        return Scores(*(torch.cat([getattr(p, k) for p in parts]) for k in Scores.__dataclass_fields__))

    def figures(self) -> tuple[float, ...]:
        """Windows, area (shifted), area (mismatched), shares within one frame (to the nearest, to a fraction), median
        margin."""
        areas = area_under_curve(self.right, self.shifted), area_under_curve(self.right, self.mismatched)
        within = [float((x.abs() <= 1).float().mean()) for x in (self.nearest, self.error)]
        return len(self.right), *areas, *within, float(self.margin.median())


def load_corpus(folder: Path, skip: tuple[str, ...], most: int) -> Corpus:
    """At most `most` clips of each speaker, drawn with seed 0."""
    paths = sorted((folder / "examples").glob("*.safetensors"))
    if not paths:
        raise SystemExit(
            f"{folder / 'examples'} holds no examples. Make them: hicode pretrain FOLDER -o WEIGHTS.safetensors "
            f"--cache {folder}"
        )
    corpus: Corpus = {}
    for path in (paths[i] for i in np.random.default_rng(0).permutation(len(paths))):
        speaker, name = path.stem.split("~", 1)
        known = corpus.setdefault(speaker, [])
        if len(known) == most or any(fnmatch.fnmatch(speaker, pattern) for pattern in skip):
            continue
        tensors, config = load_tensors(path, "corpus-example", 1)
        known.append(
            Recording(name, tensors["features"][0].float(), tensors["landmarks"].float(), config["offset_frames"])
        )
    return {speaker: sorted(clips, key=lambda c: c.name) for speaker, clips in sorted(corpus.items()) if clips}


def with_sound(corpus: Corpus, data: Path, encode: Callable[[np.ndarray], Tensor]) -> Corpus:
    """The same recordings with features made of their sound by `encode`. Clips whose file is not under `data` are left
    out."""
    files = {
        p.stem: p
        for p in sorted(data.rglob("*"))
        if p.suffix.lower() in (".mp4", ".mkv", ".mov", ".avi", ".webm", ".mpg")
    }
    out: Corpus = {}
    for speaker, clips in corpus.items():
        for clip in (c for c in clips if c.name in files):
            frames = len(clip.landmarks)
            samples = shift_audio(sound_of(files[clip.name]), clip.offset_frames, frames)
            features = match_frames(encode(samples), frames)
            out.setdefault(speaker, []).append(Recording(clip.name, features, clip.landmarks, clip.offset_frames))
    return out


def rotated(corpus: Corpus, quarters: int) -> Corpus:
    """Each clip with its own sound from so many quarters of a clip away; of a speaker of many short clips, with another
    clip's sound."""
    out: Corpus = {}
    for speaker, clips in corpus.items():
        sounds = [c.features for c in clips[quarters:] + clips[:quarters]]
        if len(clips) == 1:
            sounds = [clips[0].features.roll(2 * (quarters * len(clips[0].landmarks) // 4), 0)]
        out[speaker] = [
            Recording(c.name, match_frames(s, len(c.landmarks)), c.landmarks, c.offset_frames)
            for c, s in zip(clips, sounds)
        ]
    return out


def loudness(samples: np.ndarray) -> Tensor:
    """Decibels of each 20 ms."""
    frames = np.pad(samples, (0, -len(samples) % SAMPLES_PER_FEATURE)).reshape(-1, SAMPLES_PER_FEATURE)
    return torch.from_numpy(20 * np.log10(np.sqrt((frames.astype(np.float64) ** 2).mean(1)) + 1e-4)).float()[:, None]


def reversed_halves(samples: np.ndarray) -> np.ndarray:
    """The sound of each half backwards. Of a clip reversed as a whole both halves would agree on an offset: if sound
    predicts mouth well, the first half's mouth matches the second half's played backwards exactly where the second's
    matches the first's.
    """
    middle = len(samples) // (4 * SAMPLES_PER_FEATURE) * 2 * SAMPLES_PER_FEATURE
    return np.concatenate([samples[:middle][::-1], samples[middle:][::-1]])


def together(clips: list[Recording]) -> tuple[Tensor, Tensor]:
    return torch.cat([c.features for c in clips]), torch.cat([c.landmarks for c in clips])


def models(corpus: Corpus, not_learned: tuple[str, ...]) -> dict[str, SyncModel]:
    """For each speaker a model of the others, without those that may only be scored."""
    out = {}
    for speaker in corpus:
        names = tuple(s for s in corpus if s != speaker and s not in not_learned)
        out[speaker] = fit_sync([together(corpus[s]) for s in names], "any", names)[0]
    return out


def judged(clips: list[Recording], model: SyncModel) -> list[tuple[Recording, range, float]]:
    """What is scored of one speaker: (clip, its frames, their offset by the other clips or frames)."""
    if len(clips) > 1:
        offsets = [estimate_offset(*together(clips[1 - parity :: 2]), model).offset_frames for parity in (0, 1)]
        return [(c, range(len(c.landmarks)), offsets[k % 2]) for k, c in enumerate(clips)]
    clip, end = clips[0], len(clips[0].landmarks)
    middle = end // 2
    if middle < WINDOW_FRAMES:
        return []
    before = estimate_offset(clip.features[: 2 * middle], clip.landmarks[:middle], model).offset_frames
    after = estimate_offset(clip.features[2 * middle :], clip.landmarks[middle:], model).offset_frames
    return [(clip, range(middle), after), (clip, range(middle, end), before)]


def score(clips: list[Recording], others: list[Tensor], model: SyncModel) -> Scores | None:
    """Of one speaker, by a model that has not seen them; None where no window fits into half a clip."""
    lags = torch.arange(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1)
    foreign, parts = [model.embed_sound(o) for o in others], []
    for clip, frames, offset in judged(clips, model):
        seen = model.embed_mouth(clip.landmarks)
        starts, curves = window_scores(model.embed_sound(clip.features), seen, step=STEP)
        kept = [k for k, s in enumerate(starts) if frames.start <= s and s + WINDOW_FRAMES <= frames.stop]
        if not kept:
            continue
        results = windowed_offsets(clip.features, clip.landmarks, model, step=STEP)
        results = [results[k][1] for k in kept]
        curves, starts, at = curves[kept], [starts[k] for k in kept], round(offset)
        parts.append(
            Scores(
                right=curves[:, lags == at].flatten(),
                shifted=curves[:, (lags - at).abs() >= 5].flatten(),
                mismatched=torch.cat([mismatched_scores(f, seen, starts) for f in foreign]),
                nearest=(lags[curves.argmax(1)] - at).float(),
                error=torch.tensor([r.offset_frames - offset if r.margin > 0 else float("inf") for r in results]),
                margin=torch.tensor([r.margin for r in results]),
            )
        )
    return Scores.joined(parts) if parts else None


def scores(corpus: Corpus, judges: dict[str, SyncModel]) -> dict[str, Scores]:
    sounds = {speaker: together(clips)[0] for speaker, clips in corpus.items()}
    found = {s: score(clips, [f for o, f in sounds.items() if o != s], judges[s]) for s, clips in corpus.items()}
    return {s: x for s, x in found.items() if x is not None}


COLUMNS = (
    "row",
    "windows",
    "AUC shifted",
    "AUC mismatched",
    "nearest frame within ±1, %",
    "within ±1.0 frame, %",
    "median margin",
)


def line(name: str, found: Scores) -> tuple[str, ...]:
    windows, shifted, mismatched, nearest, within, margin = found.figures()
    return (
        name,
        f"{windows}",
        f"{shifted:.4f}",
        f"{mismatched:.4f}",
        f"{100 * nearest:.1f}",
        f"{100 * within:.1f}",
        f"{margin:.2f}",
    )


def measure(corpus: Corpus, data: Path | None, not_learned: tuple[str, ...]) -> tuple[list[tuple[str, ...]], Scores]:
    """The table's lines, and the ground truth's pooled scores."""
    judges = models(corpus, not_learned)
    truth = scores(corpus, judges)
    pooled = Scores.joined(list(truth.values()))
    lines = [line("ground truth, all speakers", pooled), *(line(f"· {s}", x) for s, x in truth.items())]
    print_lines(lines)

    def add(name: str, changed: list[Corpus], by: dict[str, SyncModel]) -> None:
        lines.append(line(name, Scores.joined([x for c in changed for x in scores(c, by).values()])))
        print_lines(lines[-1:])

    add("shuffled: sound from elsewhere in the clip", [rotated(corpus, quarters) for quarters in (1, 2, 3)], judges)
    if data is not None:
        encode, mel = (create_encoder(name).encode for name in ("embedded", "logmel"))
        rng = np.random.default_rng(0)

        def noise(samples: np.ndarray) -> Tensor:
            return encode((speech_level(samples) * rng.standard_normal(len(samples))).astype(np.float32))

        add("reversed sound", [with_sound(corpus, data, lambda samples: encode(reversed_halves(samples)))], judges)
        add("white noise", [with_sound(corpus, data, noise)], judges)
        for name, features in (("log-mel energies, fitted alike", mel), ("loudness alone, fitted alike", loudness)):
            changed = with_sound(corpus, data, features)
            add(name, [changed], models(changed, not_learned))
    return lines, pooled


def print_lines(lines: list[tuple[str, ...]]) -> None:
    for cells in lines:
        print(
            f"{cells[0]:44s}"
            + "".join(f"{c:>{max(len(h), 8) + 2}s}" for c, h in zip(cells[1:], COLUMNS[1:], strict=True)),
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the corpus of hicode pretrain")
    parser.add_argument("--data", type=Path, help="folder of the corpus's clips, for the rows that need their sound")
    parser.add_argument(
        "--not-learned", nargs="*", default=["german"], help="speakers that are scored only: their terms allow no more"
    )
    parser.add_argument(
        "--skip",
        nargs="*",
        default=["synth*"],
        help="speakers (patterns) to leave out altogether, such as synthesised ones",
    )
    parser.add_argument("--clips", type=int, default=60, help="at most so many of each speaker")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(1)  # small matrices
    try:
        corpus = load_corpus(options.cache, tuple(options.skip), options.clips)
        print_lines([COLUMNS])
        lines, pooled = measure(corpus, options.data, tuple(options.not_learned))
    except HicodeError as error:
        raise SystemExit(str(error)) from None
    if options.markdown:
        rows = [COLUMNS, ("---",) * len(COLUMNS), *lines]
        options.markdown.write_text("".join("| " + " | ".join(cells) + " |\n" for cells in rows))
    _, shifted, mismatched, nearest, _, _ = pooled.figures()
    passed = min(shifted, mismatched) >= AREA and nearest >= WITHIN
    print(
        "passed" if passed else "missed",
        f"areas {shifted:.4f}, {mismatched:.4f} (≥ {AREA}), within a frame {nearest:.3f} (≥ {WITHIN})",
    )
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
