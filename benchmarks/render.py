"""How fast the rasteriser is: a head-like cloud at 512 x 512, forward and forward + backward, beside the committed baseline.

    python benchmarks/render.py                 measure, compare with benchmarks/render_baseline.json
    python benchmarks/render.py --save          measure and write that file (on a quiet machine)

The scene is an ellipsoid's shell that fills about 45 % of the image, its Gaussians flattened along the normal: `light`, `mid` and `heavy`
differ in their size on the image. Figures are medians in ms, of wall-clock time and of processor time (all threads together). On a busy
machine wall-clock time measures the neighbours: there, now or when the baseline was taken, processor time is what is compared.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from hicode.camera import Camera
from hicode.gaussians import Gaussians
from hicode.render import rasterize
from hicode.runtime import tune_allocator

BASELINE = Path(__file__).with_name("render_baseline.json")
SIZES_PX = {"light": (0.33, 2.0), "mid": (0.7, 4.0), "heavy": (1.0, 6.0)}  # standard deviations on the image, log-uniform
SLOWER = 1.2  # a ratio above this is called slower: medians repeat to about 10 % on a quiet machine
BUSY = 1.0  # load average at the start above which wall-clock time is not compared


def head_scene(n: int, kind: str, size: int = 512, seed: int = 0) -> tuple[Gaussians, Camera]:
    """n Gaussians (head units) on an ellipsoid's shell before a camera of `size` x `size` px."""
    r = np.random.default_rng(seed)
    distance, focal_px = 9.0, 2.6 * size
    unit = distance / (2.6 * 512)  # one pixel at 512 px, in head units
    axes = np.array([170, 221, 190]) * unit
    direction = r.normal(size=(n, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    means = direction * axes * (1 - 0.06 * r.random((n, 1)) ** 2)
    low, high = SIZES_PX[kind]
    scales = np.exp(r.uniform(np.log(low), np.log(high), (n, 1)) + r.uniform(-0.5, 0.5, (n, 3)))
    scales[:, 2] *= 0.3
    scales = np.clip(scales, 0.1, high) * unit
    normal = direction / axes
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    quats = np.concatenate([1 + normal[:, 2:], np.cross([[0.0, 0.0, 1.0]], normal)], 1)  # turns z onto the normal
    opacities = r.uniform(0.1, 0.99, n)

    def tensor(x):
        return torch.tensor(np.ascontiguousarray(x), dtype=torch.float32)

    T = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    T[2, 3] = distance
    logits = tensor(np.log(opacities / (1 - opacities)))
    gaussians = Gaussians(tensor(means), tensor(np.log(scales)), tensor(quats), logits, tensor(r.random((n, 3))))
    return gaussians, Camera.pinhole(focal_px, size, size, T)


def measure(kind: str, n: int, repeats: int) -> dict[str, dict[str, float]]:
    """Medians in ms, {name: {wall, processor}}."""
    gaussians, camera = head_scene(n, kind)
    leaves = gaussians.map(lambda t: t.requires_grad_())
    background = torch.ones(3)
    gradient = torch.randn(3, camera.height, camera.width).permute(1, 2, 0)

    def clocks() -> np.ndarray:
        return 1e3 * np.array([time.perf_counter(), time.process_time()])

    times = []
    for _ in range(repeats + 3):
        start = clocks()
        out = rasterize(leaves, camera, background, backend="cpu")
        middle = clocks()
        torch.autograd.grad(out.rgb, list(leaves.tensors().values()), gradient)
        times.append([middle - start, clocks() - start])
    (forward, forward_cpu), (both, both_cpu) = np.median(times[3:], 0)  # the first ones compile, and warm the caches
    return {
        f"{kind} forward": {"wall": float(forward), "processor": float(forward_cpu)},
        f"{kind} forward+backward": {"wall": float(both), "processor": float(both_cpu)},
    }


def machine() -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--threads", type=int, default=None, help="threads to use; torch's own number by default")
    parser.add_argument("--repeats", type=int, default=40, help="timed renderings a scene")
    parser.add_argument("-n", type=int, default=35_000, help="Gaussians")
    options = parser.parse_args()
    tune_allocator()
    if options.threads:
        torch.set_num_threads(options.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    found = {}
    for kind in SIZES_PX:
        found |= measure(kind, options.n, options.repeats)
    result = {"machine": machine(), "load_at_start": round(load, 1), "gaussians": options.n, "size": 512, "median_ms": found}
    print(f"{result['machine']}; load {load:.1f} at the start; {options.n} Gaussians, 512 x 512; medians of {options.repeats}")
    if options.save:
        result["median_ms"] = {name: {k: round(v, 2) for k, v in ms.items()} for name, ms in found.items()}
        BASELINE.write_text(json.dumps(result, indent=1) + "\n")
    if not BASELINE.exists():
        print(json.dumps(found, indent=1) + "\nNo baseline yet: run with --save on a quiet machine.")
        return
    baseline = json.loads(BASELINE.read_text())
    busy = max(load, baseline["load_at_start"]) > BUSY
    clock, slower = "processor" if busy else "wall", []
    for name, ms in found.items():
        ratio = ms[clock] / baseline["median_ms"][name][clock]
        print(f"{name:24} wall {ms['wall']:8.2f} ms   processor {ms['processor']:8.2f} ms   {ratio:5.2f} x baseline ({clock})")
        if ratio > SLOWER:
            slower.append(name)
    print(f"Baseline: {baseline['machine']}; load {baseline['load_at_start']} at its start; {baseline['gaussians']} Gaussians")
    same = baseline["machine"] == result["machine"] and baseline["gaussians"] == options.n
    print("Slower: " + (", ".join(slower) if slower else "nothing") + ("" if same else " (another set-up: ratios say little)"))
    if busy:
        print("This machine is busy, or was when the baseline was taken: wall-clock figures are rough.")


if __name__ == "__main__":
    main()
