"""The invisible mark measured on real clips: bit errors after what platforms do, PSNR, false alarms, time.

    python -m research.benchmarks.watermark marked CLIP... -o docs/results/watermark.json
    python -m research.benchmarks.watermark unmarked CLIP... -o docs/results/watermark-unmarked.json

`marked` marks the first 100 frames of each clip, changes them, and looks for the mark. `unmarked` looks for the mark in
windows of clips that do not carry it: position, size, scale and time are drawn at random. It stops at either limit and
says how many windows it saw. Each round through the clips is a line in the file of `--work`; a run that was stopped
goes on there.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np

from hicode.media.video import VideoWriter, read_video
from hicode.trust.watermark import FALSE_ALARM_RATE, Detection, Payload, Watermark, detect
from research.reproduce.docs import save_results

FRAMES = 100
PAYLOAD = Payload(0x89ABCDEF)
FACE = slice(110, 366), slice(130, 386)  # of the 512 px crop
Frames = Sequence[np.ndarray]


def encoded(frames: Frames, crf: int, fps: float = 25.0, preset: str = "veryfast") -> Frames:
    """The frames after H.264."""
    height, width = frames[0].shape[:2]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        with VideoWriter(path, width, height, fps=fps, crf=crf, preset=preset) as video:
            for frame in frames:
                video.write(frame)
        return list(read_video(path, fps))


def resized(frames: Frames, factor: float) -> Frames:
    """The frames scaled, to even sizes."""
    size = tuple(2 * round(side * factor / 2) for side in frames[0].shape[1::-1])
    return [cv2.resize(f, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC) for f in frames]


def at_30_fps(frames: Frames) -> Frames:
    """As a phone's gallery exports: every sixth picture shown twice, 720 px, a fast preset at CRF 26."""
    repeated = [frames[t * 25 // 30] for t in range(len(frames) * 30 // 25)]
    return encoded(resized(repeated, 720 / frames[0].shape[0]), 26, 30.0, "ultrafast")


CHANGES: dict[str, Callable[[Frames], Frames]] = {
    "none": lambda f: f,
    "CRF 28": lambda f: encoded(f, 28),
    ".75x": lambda f: resized(f, 0.75),
    ".75x, CRF 28": lambda f: encoded(resized(f, 0.75), 28),
    "CRF 17, then .75x, CRF 28": lambda f: encoded(resized(encoded(f, 17), 0.75), 28),
    "CRF 17, then .5x, CRF 23": lambda f: encoded(resized(encoded(f, 17), 0.5), 23),
    "face crop": lambda f: [a[FACE] for a in f],
    "CRF 17, then face crop, CRF 28": lambda f: encoded([a[FACE] for a in encoded(f, 17)], 28),
    "CRF 17, then phone, 30 fps": lambda f: at_30_fps(encoded(f, 17)),
    "CRF 17, then mirrored, 1.5x, CRF 28": lambda f: encoded(resized([a[:, ::-1] for a in encoded(f, 17)], 1.5), 28),
}


def bit_errors(found: Detection) -> int:
    """Wrong bits of the 48; all of them where no payload was read."""
    if found.payload is None:
        return 48
    return sum((a ^ b).bit_count() for a, b in zip(found.payload.symbols(), PAYLOAD.symbols(), strict=True))


def marked(clips: list[Path]) -> dict:
    """PSNR, bit errors and false-alarm rates for each clip and change; ms a frame."""
    rows, psnr_db, embed_ms, detect_s = [], {}, [], []
    watermark = Watermark(PAYLOAD)
    for number, path in enumerate(clips):
        frames = list(islice(read_video(path), FRAMES))
        watermark.embed(frames[0])  # compile
        started = time.process_time()
        with_mark = [watermark.embed(f) for f in frames]
        embed_ms.append(1e3 * (time.process_time() - started) / len(frames))
        errors = [((a.astype(float) - b) ** 2).mean() for a, b in zip(frames, with_mark, strict=True)]
        psnr_db[f"clip {number + 1}"] = round(10 * math.log10(255**2 / float(np.mean(errors))), 2)
        for name, change in CHANGES.items():
            changed = change(with_mark)
            started = time.process_time()
            found = detect(changed)
            detect_s.append(time.process_time() - started)
            row = {"clip": number + 1, "change": name, "frames": found.frames, "bit_errors": bit_errors(found)}
            rows.append(row | {"false_alarm_rate": found.false_alarm_rate, "coherence": round(found.coherence, 3)})
            print(row, f"{found.false_alarm_rate:.1e}", flush=True)
    measured = {"PSNR, dB": psnr_db, "embed, ms a frame": min(embed_ms), "detect, s": float(np.median(detect_s))}
    return measured | {"rows": rows}


def marked_table(measured: dict) -> list[list[str]]:
    """Rows for the docs: change, wrong bits of each clip, the worst false-alarm rate."""
    out = []
    for name in CHANGES:
        rows = [row for row in measured["rows"] if row["change"] == name]
        worst = max(row["false_alarm_rate"] for row in rows)
        out.append([name, ", ".join(str(row["bit_errors"]) for row in rows), f"{worst:.0e}"])
    out.append(["PSNR of the mark, dB", ", ".join(f"{v:.1f}" for v in measured["PSNR, dB"].values()), "–"])
    out.append(["embedding, ms of a core a frame", f"{measured['embed, ms a frame']:.2f}", "–"])
    out.append(["detection in 100 frames, s of a core", f"{measured['detect, s']:.1f}", "–"])
    return out


def unmarked(clips: list[Path], windows: int, minutes: float, work: Path) -> dict:
    """How many of the windows have a mark reported, and the lowest of their false-alarm rates."""
    rounds = [json.loads(line) for line in work.read_text().splitlines()] if work.exists() else []
    started = time.monotonic()
    while sum(r["windows"] for r in rounds) < windows and time.monotonic() - started < 60 * minutes:
        rounds.append(_unmarked_round(clips, len(rounds)))
        with work.open("a") as f:
            f.write(json.dumps(rounds[-1]) + "\n")
        print(rounds[-1], sum(r["windows"] for r in rounds), flush=True)
    return {
        "clips": max(r["clips"] for r in rounds),
        "windows": sum(r["windows"] for r in rounds),
        "alarms": sum(r["alarms"] for r in rounds),
        "threshold": FALSE_ALARM_RATE,
        "lowest rate": min(r["lowest"] for r in rounds),
        "highest score": max(r["highest"] for r in rounds),
    }


def _unmarked_round(clips: list[Path], number: int) -> dict:
    """Five windows of each clip."""
    rng = np.random.default_rng(number)
    found = {"round": number, "clips": len(clips), "windows": 0, "alarms": 0, "lowest": 1.0, "highest": 0.0}
    for path in clips:
        frames = list(islice(read_video(path, max_size=512), 25))
        height, width = frames[0].shape[:2]
        for _ in range(5):
            side = min(int(rng.integers(128, 257)), height, width)
            y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
            first, scale = int(rng.integers(len(frames))), float(rng.uniform(0.75, 1.3))
            shown = [f[y : y + side, x : x + side] for f in frames[first : first + 3]]
            detection = detect(resized(shown, scale))
            found["windows"] += 1
            found["alarms"] += detection.present
            found["lowest"] = min(found["lowest"], detection.false_alarm_rate)
            found["highest"] = max(found["highest"], detection.score)
    return found


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def main() -> None:
    """Run one part and write it into the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["marked", "unmarked"])
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="rounds so far; next to the results if not given")
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    command = f"python -m research.benchmarks.watermark {options.part} CLIPS"
    if options.part == "marked":
        columns = ("change", "wrong bits of 48, each clip", "false-alarm rate, worst clip")
        save_results(options.out, columns, marked_table(marked(options.clips)), command)
    else:
        work = options.work or options.out.with_suffix(".jsonl")
        found = unmarked(options.clips, options.windows, options.minutes, work)
        save_results(options.out, tuple(found), [[_text(value) for value in found.values()]], command)


if __name__ == "__main__":
    main()
