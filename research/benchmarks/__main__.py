"""What each part costs, against the committed baseline. Run it in the root of the repository.

    python -m research.benchmarks                    measure everything; exit status 1 if something became slower
    python -m research.benchmarks raster speak       only cases whose names begin so
    python -m research.benchmarks --tolerance 4      the same for a busy machine, as the slow tests run it
    python -m research.benchmarks --save             measure and write research/benchmarks/baseline.json
    python -m research.benchmarks.scale              how time and memory grow, as plots

Everything runs on one thread. Figures are processor time, so other work on the machine disturbs them little. The cost
in *units* is compared: a unit is the time of a fixed piece of arithmetic and memory traffic, run between measurements.
So a baseline of another machine with similar caches serves as well. What seems slower is measured a second time.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hicode.avatar.blend import compose
from hicode.avatar.deformation import DeformationConfig
from hicode.avatar.fast import FrameDeformer
from hicode.avatar.refiner import Compositor
from hicode.errors import HicodeError
from hicode.render import rasterize
from hicode.runtime import share_cores, tune_allocator
from hicode.training import head as training
from hicode.training.losses import HeadLoss, PerceptualLoss, photometric
from hicode.training.stages import HeadConfig, head_preset
from research.benchmarks import scene

BASELINE = Path(__file__).with_name("baseline.json")
CLIPS = Path(__file__).resolve().parents[3] / "shared" / "data" / "hdtf"
N, SIZE = 35_000, 512
SLOWER = 1.25  # times the baseline's cost, or --tolerance; runs on a shared machine differ by up to 15 %

# A case: what is timed, by name. A function that returns figures (ms by name) has timed itself.
Timed = dict[str, Callable[[], "dict[str, float] | None"]]


class Skipped(Exception):
    """Something that the case needs is not here."""


def raster() -> Timed:
    """Forward, and forward with backward, of a cloud on the head's surface and of the same with Gaussians twice as
    large.
    """
    clip = scene.drawn_clip(SIZE)
    cloud, _ = scene.drawn_cloud(N, clip, HeadConfig())
    camera, background = clip.track.camera_at(0), torch.ones(3)
    gradient = torch.randn(3, SIZE, SIZE).permute(1, 2, 0)
    cases: Timed = {}
    for name, larger in (("", 0.0), (" large", float(np.log(2)))):
        still = replace(cloud, log_scales=cloud.log_scales + larger)
        leaves = still.map(lambda v: v.clone().requires_grad_())

        def both(leaves=leaves):
            torch.autograd.grad(rasterize(leaves, camera, background).rgb, list(leaves.tensors().values()), gradient)

        cases |= {
            f"raster{name} forward": lambda still=still: _none(rasterize(still, camera, background)),
            f"raster{name} both": both,
        }
    return cases


def control() -> Timed:
    """The deformation of all Gaussians, its control evaluated on all of them (0) or on anchors; and as speaking does
    it.
    """
    clip = scene.drawn_clip(SIZE)
    motion = clip.track.motion
    cases: Timed = {}
    for anchors in (0, 2048, 4096):
        cloud, deformation = scene.drawn_cloud(N, clip, HeadConfig(deformation=DeformationConfig(anchors=anchors)))
        parameters, signals = list(deformation.parameters()), motion[1]
        gradient = [torch.randn(N, k) for k in (3, 4, 3, 3)]

        def forward(cloud=cloud, deformation=deformation, signals=signals):
            with torch.no_grad():
                deformation(cloud.means, signals)

        def both(cloud=cloud, deformation=deformation, signals=signals, parameters=parameters, gradient=gradient):
            torch.autograd.grad(deformation(cloud.means, signals), parameters, gradient)

        cases |= {f"control {anchors} forward": forward, f"control {anchors} both": both}
    cloud, deformation = scene.drawn_cloud(N, clip, HeadConfig())
    deformer = FrameDeformer(deformation.requires_grad_(False), cloud)
    return cases | {"control 4096 speaking": lambda: _none(deformer(motion[1]))}


def loss() -> Timed:
    """The fused L1 and SSIM loss on a whole picture, and the perceptual loss on a crop; both with backward."""
    rendered = torch.rand(3, SIZE, SIZE).permute(1, 2, 0).requires_grad_()
    target = torch.rand(3, SIZE, SIZE).permute(1, 2, 0)
    crop, other = (torch.rand(128, 128, 3, requires_grad=True) for _ in range(2))
    perceptual = PerceptualLoss("cheap")
    return {
        "loss L1+SSIM": lambda: _none(torch.autograd.grad(photometric(rendered, target)[0], rendered)),
        "loss VGG crop": lambda: _none(torch.autograd.grad(perceptual(crop, other.detach()), crop)),
    }


def step() -> Timed:
    """An iteration of the draft's training: deform, rasterise, compare, backward, step; the perceptual term in one of
    four.
    """
    state, frames, config = scene.training_state(N, SIZE, head_preset("draft"))
    head_loss = HeadLoss(config.loss, config.vgg_layers)

    def four():
        started = time.process_time()
        for _ in training.train_steps(state, frames, config, head_loss, state.iteration + config.vgg_every):
            pass
        return {"step draft": 1e3 * (time.process_time() - started) / config.vgg_every}

    return {"step draft": four}


def speak() -> Timed:
    """Two seconds of sound to an encoded video: ms a frame of each part, and of all of them."""
    from hicode.session.speak import speak as write

    avatar = scene.drawn_avatar(N, SIZE, head_preset("standard"))
    sound = scene.speechlike(2.0)

    def spoken():
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            seconds = write(avatar, sound, Path(folder) / "out.mp4", progress=False).timings
            total = time.process_time() - started
        parts = ("features", "faceformers", "driving", "deform", "rasterise", "composite", "encode")
        return {f"speak {p}": 1e3 * getattr(seconds, p) / seconds.frames for p in parts} | {
            "speak all": 1e3 * total / seconds.frames
        }

    return {"speak": spoken}


def composition() -> Timed:
    """A rendered head into its frame, with and without the generator."""
    avatar = scene.drawn_avatar(N, SIZE, head_preset("draft"), encoder="logmel")
    rendering, frame, mask = (
        avatar.render(avatar.driving[0], avatar.driving.T_camera_head[0]),
        avatar.driving_frame(0),
        avatar.driving_mask(0),
    )

    def with_generator(generator: Compositor | None):
        return lambda: _none(compose(rendering.rgb, rendering.alpha, frame, mask, avatar.background_plate, generator))

    return {"composition plain": with_generator(None), "composition generator": with_generator(avatar.compositor)}


def prepare() -> Timed:
    """The first two seconds of a real clip (../shared/data/hdtf): ms a frame, all steps."""
    from hicode.preparation.pipeline import PrepareConfig
    from hicode.preparation.pipeline import prepare as make

    clips = sorted(CLIPS.glob("*.mp4"))
    if not clips:
        raise Skipped(f"no real clip in {CLIPS}")

    def once():
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            clip = make(clips[0], Path(folder) / "clip", PrepareConfig(duration=2.0), progress=False)
            return {"prepare": 1e3 * (time.process_time() - started) / len(clip)}

    return {"prepare": once}


CASES = {case.__name__: case for case in (raster, control, loss, step, composition, speak, prepare)}
# Long ones, by the beginning of their name: how often they are repeated instead.
REPEATS = {"control 0": 5, "speak": 3, "step": 5, "prepare": 1}


def _none(_) -> None:
    return None


class Unit:
    """The machine's speed: time of a matrix product and of a copy larger than the caches, in ms of processor time,
    geometric mean.
    """

    def __init__(self):
        self._a, self._source, self._target = (
            torch.randn(512, 512),
            np.ones(1 << 22, np.float32),
            np.ones(1 << 22, np.float32),
        )
        self.seen: list[float] = []

    def run(self) -> float:
        a, b = _ms(lambda: _none(self._a @ self._a)), _ms(lambda: np.copyto(self._target, self._source))
        self.seen.append((a * b) ** 0.5)
        return self.seen[-1]


def _ms(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return 1e3 * (time.process_time() - started)


def measure(timed: Timed, repeats: int, unit: Unit) -> dict[str, dict[str, float]]:
    """{name: {"ms": median, "units": median over the median unit of the same minute}}"""
    found: dict[str, list[float]] = {}
    units = []
    for name, work in timed.items():
        count = next((r for begin, r in REPEATS.items() if name.startswith(begin)), repeats)
        for k in range(count + (count > 1)):
            units.append(unit.run())
            started = time.process_time()
            figures = work()
            figures = {name: 1e3 * (time.process_time() - started)} if figures is None else figures
            if k or count == 1:  # the first one compiles, and warms the caches
                for key, ms in figures.items():
                    found.setdefault(key, []).append(ms)
    one = float(np.median(units))
    return {
        key: {"ms": round(float(np.median(ms)), 3), "units": round(float(np.median(ms)) / one, 3)}
        for key, ms in found.items()
    }


def machine() -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=BASELINE.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def slower(found: dict, baseline: dict, tolerance: float = SLOWER) -> list[str]:
    """Names that cost more than the baseline allows. What it does not know is not compared."""
    limit = lambda name: tolerance * baseline[name]["units"] if name in baseline else float("inf")
    return [name for name, cost in found.items() if cost["units"] > limit(name)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="*", help=f"cases to run: {' '.join(CASES)}")
    parser.add_argument(
        "--save", action="store_true", help="write the baseline (of the cases that ran) instead of comparing with it"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of the short ones")
    parser.add_argument("--tolerance", type=float, default=SLOWER, help="times the baseline's cost that is no fault")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only if name not in CASES]
    if unknown:
        parser.error(f"no case is called {unknown[0]}; there are {' '.join(CASES)}")
    share_cores()
    tune_allocator()
    torch.set_num_threads(1)
    load, unit = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"), Unit()
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"cost": {}}
    print(f"{machine()}; one thread; load {load:.1f} at the start; {N} Gaussians, {SIZE} x {SIZE}; processor time")
    found, late = {}, []
    for name, case in CASES.items():
        if options.only and name not in options.only:
            continue
        try:
            timed = case()
        except (Skipped, HicodeError) as reason:
            print(f"{name}: skipped, {reason}")
            continue
        cost = measure(timed, options.repeats, unit)
        if not options.save and (again := slower(cost, baseline["cost"], options.tolerance)):
            second = measure(timed, options.repeats, unit)
            cost |= {k: min(cost[k], second[k], key=lambda c: c["units"]) for k in again}
        for key, c in cost.items():
            known = baseline["cost"].get(key)
            ratio = (
                f"{c['units'] / known['units']:6.2f} x baseline ({known['ms']:.2f} ms there)"
                if known and not options.save
                else ""
            )
            print(f"{key:24} {c['ms']:9.2f} ms {c['units']:9.2f} units {ratio}", flush=True)
        late += slower(cost, baseline["cost"], options.tolerance)
        found |= cost
    if options.save:
        about = {
            "machine": machine(),
            "commit": commit(),
            "load_at_start": round(load, 1),
            "unit_ms": round(float(np.median(unit.seen)), 3),
        }
        BASELINE.write_text(json.dumps(about | {"cost": baseline["cost"] | found}, indent=1) + "\n")
        print(f"Written to {BASELINE.name}.")
        return 0
    if not baseline["cost"]:
        print("No baseline yet: run with --save.")
        return 0
    print(
        f"Baseline: {baseline['machine']}, commit {baseline['commit']}; a unit was {baseline['unit_ms']} ms there, "
        f"here {np.median(unit.seen):.3f}"
    )
    print("Slower: " + (", ".join(late) if late else "nothing"))
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
