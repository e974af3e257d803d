"""How time and memory grow with Gaussians, resolution and clip length; draws docs/scale.png (needs matplotlib).

    python -m research.benchmarks.scale              measure what scale.json lacks (some minutes for all), draw
    python -m research.benchmarks.scale --fresh      measure everything anew

Gaussians (at 512 px) and resolution (with 35,000 Gaussians): processor time on one thread of a rendering, of a training
iteration (draft) and of a spoken frame (deform, rasterise, compose), and the peak memory of a process that trains or
speaks. Clip length: what training holds of its frames after one pass, next to the budget `HeadConfig.preload_bytes`,
and what a loaded avatar holds of its driving track. Each point has its own process, so that memory is not shared.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

HERE = Path(__file__).resolve().parent
RESULTS, PICTURE = HERE / "scale.json", HERE.parents[1] / "docs" / "scale.png"
N, SIZE = 35_000, 512
POINTS = {
    "gaussians": (10_000, 35_000, 100_000, 200_000),
    "resolution": (256, 512, 768, 1024),
    "clip": (5, 20, 60, 150, 300),
}
UNITS = {
    "gaussians": f"Gaussians (at {SIZE} px)",
    "resolution": f"side of the picture, px ({N:,} Gaussians)",
    "clip": "clip, s",
}


def median_ms(work: Callable[[], object], repeats: int = 6) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - started))
    return sorted(times[1:])[repeats // 2]  # the first one compiles


def training_point(n: int, size: int) -> dict:
    import torch

    from hicode.render import rasterize
    from hicode.runtime import peak_memory_mb
    from hicode.training import head as training
    from hicode.training.losses import HeadLoss
    from hicode.training.stages import head_preset
    from research.benchmarks import scene

    state, frames, config = scene.training_state(n, size, head_preset("draft"))
    loss = HeadLoss(config.loss, config.vgg_layers)
    still, camera = state.gaussians().map(lambda v: v.detach()), scene.drawn_clip(size).track.camera_at(0)
    rendering = median_ms(lambda: rasterize(still, camera, torch.zeros(3)))

    def four():
        for _ in training.train_steps(state, frames, config, loss, state.iteration + config.vgg_every):
            pass

    return {
        "rasterise": rendering,
        "training iteration": median_ms(four, 3) / config.vgg_every,
        "training MB": peak_memory_mb(),
    }


def speaking_point(n: int, size: int) -> dict:
    from hicode.runtime import peak_memory_mb
    from hicode.training.stages import head_preset
    from research.benchmarks import scene

    avatar = scene.drawn_avatar(n, size, head_preset("standard"), encoder="logmel")
    frame, mask = avatar.driving_frame(1), avatar.driving_mask(1)
    return {
        "spoken frame": median_ms(lambda: avatar.synthesize_frame(avatar.driving, 1, frame, mask)),
        "speaking MB": peak_memory_mb(),
    }


def clip_point(seconds: int) -> dict:
    from hicode.avatar.avatar import MAX_DRIVING_FRAMES
    from hicode.media.images import Images
    from hicode.preparation.clip import Clip
    from hicode.training.frames import TrainingFrames
    from hicode.training.stages import HeadConfig
    from research.benchmarks import scene

    short, count = scene.drawn_clip(SIZE), 25 * seconds
    pick = lambda read: lambda t: read(t % len(short.train))
    clip = SimpleNamespace(
        train=range(count),
        track=short.track,
        image=pick(short.image),
        head_mask=pick(short.head_mask),
        depths=short.depths,
    )
    frames = TrainingFrames(cast(Clip, clip), HeadConfig().preload_bytes)
    for t in frames.frames:
        frames.image_and_mask(t)
    held = sum(part.nbytes for pair in frames._cache.values() for part in pair) / 1e6
    kept = range(min(count, MAX_DRIVING_FRAMES))
    track = (
        Images.encode((clip.image(t) for t in kept[:25]), ".jpg"),
        Images.encode((clip.head_mask(t) for t in kept[:25]), ".png"),
    )
    driving = sum(len(images.data) for images in track) * len(kept) / 25
    return {"training frames MB": held, "driving track MB": driving / 1e6}


def one(kind: str, value: int, part: str) -> dict:
    from hicode.runtime import share_cores, tune_allocator

    share_cores()
    tune_allocator()
    import torch

    torch.set_num_threads(1)
    if kind == "clip":
        return clip_point(value)
    n, size = (value, SIZE) if kind == "gaussians" else (N, value)
    return training_point(n, size) if part == "training" else speaking_point(n, size)


def measure(results: dict[str, dict[str, dict]]) -> None:
    """Adds the points that are missing in {kind: {value: figures}}, and writes each down when it is known."""
    for kind, values in POINTS.items():
        for value in values:
            if str(value) in results.setdefault(kind, {}):
                continue
            figures = {}
            for part in ("frames",) if kind == "clip" else ("training", "speaking"):
                command = [sys.executable, "-m", "research.benchmarks.scale", "--point", kind, str(value), part]
                done = subprocess.run(
                    command,
                    cwd=HERE.parent,
                    capture_output=True,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    check=False,
                )
                if done.returncode:
                    sys.exit(f"{kind} {value} {part} failed:\n{done.stderr[-2000:]}")
                figures |= {k: round(v, 1) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
            results[kind][str(value)] = figures
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{kind} {value}: " + ", ".join(f"{k} {v:.0f}" for k, v in figures.items()), flush=True)


def draw(results: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from hicode.training.stages import HeadConfig

    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5))
    for column, kind in enumerate(results):
        values = [int(v) for v in results[kind]]
        rows = list(results[kind].values())
        for axis, memory in ((axes[0, column], False), (axes[1, column], True)):
            for name in (k for k in rows[0] if k.endswith("MB") == memory):
                axis.plot(values, [row[name] for row in rows], "o-", label=name.removesuffix(" MB"))
            axis.set(
                xscale="log",
                xlabel=UNITS[kind],
                xticks=values,
                xticklabels=[f"{v // 1000} k" if v >= 10_000 else str(v) for v in values],
            )
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0, column].set(yscale="log", ylabel="processor ms, one thread")
        axes[1, column].set(ylim=(0, None), ylabel="peak memory of the process, MB")
    budget = HeadConfig().preload_bytes / 1e6
    axes[1, 2].axhline(budget, color="grey", linestyle="--", label=f"budget of decoded frames, {budget:.0f} MB")
    axes[1, 2].set(ylabel="held in memory, MB", ylim=(0, 1.3 * budget))
    axes[0, 2].axis("off")
    for axis in (*axes[0, :2], *axes[1]):
        axis.legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=90)
    print(f"Drawn to {PICTURE.relative_to(HERE.parent)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--fresh", action="store_true", help="measure all points, also those that benchmarks/scale.json holds"
    )
    parser.add_argument("--point", nargs=3, metavar=("KIND", "VALUE", "PART"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        kind, value, part = options.point
        print(json.dumps(one(kind, int(value), part)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.fresh else {}
    measure(results)
    draw(results)


if __name__ == "__main__":
    main()
