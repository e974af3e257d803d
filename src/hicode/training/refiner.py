"""Training of the compositor (Eqs 17-18) on renders that are as wrong as those it will meet.

The renderer knows its training frames by heart; on frames it has not seen it is off by a pixel or two. A generator trained on training
renders as they are learns nothing that carries over, so each crop's render is *misaligned* at random first: shifted, turned and bent by a
smooth flow of `misalignment_px`, and part of the renders come from perturbed motion.

What the generator can know decides what it is asked for. At the border it sees the true frame: there the target stays, and it learns to
join. Deep inside nothing tells where the truth lies, and asking for it teaches blur: there the target moves with the render (`follow`),
and it learns to sharpen. Shapes: crops of p px, batches of b; images are floats in [0, 1].

Deviation from Eq. 18: the adversarial term is least-squares (log(1 - D) saturates), and the discriminator's features also see the masks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hicode.avatar.blend import ALPHA, FILL, INPUT_CHANNELS, RGB, WEIGHT, blend_region, plain_composite
from hicode.avatar.refiner import Compositor, CompositorConfig
from hicode.errors import TrainingError
from hicode.files import load_tensors, save_tensors
from hicode.perceptual import Features
from hicode.training.losses import check_finite, fast_dtype


class Samples(Protocol):
    """The renders to learn from. What a call gives depends on its arguments only."""

    def __len__(self) -> int:
        """Training frames."""

    def __call__(self, k: int, perturbation: int | None = None):
        """Frame k rendered over black: (rgb "h w 3", alpha "h w", frame uint8 "h w 3", head mask uint8 "h w"), rgb and alpha in [0, 1].

        With a seed, from motion perturbed by it as tracking errs (some 0.3-1 degree, 1-2 px); with None, as tracked.
        """


_SCHEMA, _VERSION = "hicode-compositor-training", 1
_INTERIOR_PX = 24  # depth below the feather at which the target follows the render fully
_EMA = 0.98  # weights averaged over some 50 steps: adversarial training wanders


@dataclass(frozen=True)
class CompositorTraining:
    """How the compositor trains.

    steps:            optimiser steps
    renders:          renders drawn once and cut into crops; each costs one rendering and about 2 MB
    crop_px, batch:   size and number of the crops of a step
    mouth_share:      part of the crops centred on the lower head; the others lie on the seam
    perturbed:        part of the renders made from perturbed motion
    misalignment_px:  mean length of the random flow
    follow:           how far the target inside goes along with the render: 1 wholly, 0 not at all
    recon, vgg, matching, adversarial: weights of Eqs 17-18's terms (the paper gives none)
    vgg_layers:       VGG16 layers compared
    adversarial_from: fraction of the steps before the adversarial term counts
    learning_rate:    of both networks, falling by a cosine to 5 %
    checkpoint_every: steps between checkpoints
    """

    steps: int = 4000
    renders: int = 300
    crop_px: int = 128
    batch: int = 3
    mouth_share: float = 0.4
    perturbed: float = 0.5
    misalignment_px: float = 1.5
    follow: float = 1.0
    recon: float = 10.0
    vgg: float = 0.1
    matching: float = 0.5
    adversarial: float = 0.02
    vgg_layers: tuple[str, ...] = ("relu1_2", "relu2_2")
    adversarial_from: float = 0.3
    learning_rate: float = 1e-3
    checkpoint_every: int = 200
    seed: int = 0
    generator: CompositorConfig = field(default_factory=CompositorConfig)


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one verdict per patch of 34 px, and the activations of each layer for feature matching."""

    def __init__(self, filters: int = 24):
        super().__init__()
        c = filters
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, c, 4, 2, 1),
                nn.utils.parametrizations.spectral_norm(nn.Conv2d(c, 2 * c, 4, 2, 1)),
                nn.utils.parametrizations.spectral_norm(nn.Conv2d(2 * c, 4 * c, 3, 1, 1)),
                nn.Conv2d(4 * c, 1, 3, 1, 1),
            ]
        )

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c y x"]]:
        """Every layer's output; the last is the verdict, 1 for real."""
        x, out = 2 * images - 1, []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
            out.append(x)
        return [*out, self.layers[-1](x)]


def train_compositor(
    samples: Samples,
    plate: np.ndarray,
    config: CompositorTraining = CompositorTraining(),
    progress: bool = False,
    checkpoint: Path | None = None,
    log: Callable[[int, dict[str, float]], None] | None = None,
    device: torch.device | str = "cpu",
) -> Compositor:
    """The trained generator.

    plate       "h w 3" the background behind the head
    progress    a bar on the terminal
    checkpoint  a file to resume from and to save to (every `checkpoint_every` steps): the result is that of an uninterrupted run
    log         called with a step and its loss terms
    device      of the two networks and the perceptual features; the result stays there

    Deterministic by `config.seed` for the same number of threads. Raises TrainingError on a NaN.
    """
    torch.manual_seed(config.seed)  # the networks' first weights; every later draw has a generator of its own
    trainer = _Trainer(config, device)
    if checkpoint is not None and Path(checkpoint).exists():
        trainer.restore(checkpoint)
    with _bar(config.steps, progress) as advance:
        if trainer.step < config.steps:
            pool = _draw_pool(samples, range(len(samples)), plate, config)
            vgg = Features("vgg16", config.vgg_layers, dtype=fast_dtype()).to(device)
            while trainer.step < config.steps:
                terms = trainer.train_step(pool, vgg)
                if log is not None:
                    log(trainer.step, terms)
                advance(trainer.step)
                if checkpoint is not None and (
                    trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps
                ):
                    trainer.save(checkpoint)
    trainer._check({"weights": sum(p.sum() for p in trainer.averaged.parameters())})  # of the last step
    return trainer.averaged.for_inference()


@contextmanager
def _bar(total: int, visible: bool) -> Iterator[Callable[[int], None]]:
    if not visible:
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("train compositor"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


# --- the pool of renders and its crops ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _PoolItem:
    """A render inside its seam's box, as uint8 to save memory: layers "14 h w" (rgb, alpha, surround, fill, weight, target).

    depth "h w": 0 at the border, 1 deep inside. seam, lower "n 2": where crops may be centred (row, column).
    """

    layers: np.ndarray
    depth: np.ndarray
    seam: np.ndarray
    lower: np.ndarray


def _draw_pool(
    samples: Samples, frames: Sequence[int], plate: np.ndarray, config: CompositorTraining
) -> list[_PoolItem]:
    rng = np.random.default_rng([config.seed, 1])
    order = np.concatenate([rng.permutation(frames) for _ in range(-(-config.renders // len(frames)))])[
        : config.renders
    ]
    pool = []
    for t in order:
        seed = int(rng.integers(1 << 31))
        item = _pool_item(samples, int(t), seed if rng.random() < config.perturbed else None, plate)
        if item is not None:
            pool.append(item)
    if not pool:
        raise TrainingError(
            "No training frame has a head mask, so there is nothing to compose. Prepare the clip again."
        )
    return pool


def _pool_item(samples: Samples, t: int, seed: int | None, plate: np.ndarray) -> _PoolItem | None:
    rgb, alpha, frame, mask = samples(t, seed)
    seam = blend_region(mask)
    if seam is None:
        return None
    composite = plain_composite(rgb, alpha, frame, plate, seam)
    layers = np.concatenate([composite.layers, frame[seam.window].astype(np.float32) / 255], -1)
    if not np.isfinite(layers).all():
        raise TrainingError(f"The render of frame {t} is not finite. The Gaussians diverged: train them again.")
    inner = cv2.distanceTransform((seam.weight >= 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
    rim = np.argwhere((seam.weight > 0) & (inner < 6))
    head = np.argwhere(seam.weight >= 1)
    lower = head[head[:, 0] > np.median(head[:, 0])] if len(head) else rim
    packed = np.ascontiguousarray((np.clip(layers, 0, 1) * 255 + 0.5).astype(np.uint8))
    depth = (np.clip(inner / _INTERIOR_PX, 0, 1) * 255).astype(np.uint8)
    return _PoolItem(packed, depth, rim, lower if len(lower) else rim)


def _crop(item: _PoolItem, config: CompositorTraining, rng: np.random.Generator) -> np.ndarray:
    """One crop "p p 14", its render misaligned and its target gone along inside."""
    p = config.crop_px
    centres = item.lower if rng.random() < config.mouth_share else item.seam
    row, column = centres[rng.integers(len(centres))]
    h, w = item.depth.shape
    y0 = int(np.clip(row - p // 2, 0, max(0, h - p)))
    x0 = int(np.clip(column - p // 2, 0, max(0, w - p)))
    window = np.s_[y0 : y0 + p, x0 : x0 + p]
    layers = item.layers[window].astype(np.float32) / 255
    depth = item.depth[window].astype(np.float32) / 255
    if layers.shape[:2] != (p, p):  # heads smaller than a crop
        grow = ((0, p - layers.shape[0]), (0, p - layers.shape[1]))
        layers, depth = np.pad(layers, (*grow, (0, 0)), mode="edge"), np.pad(depth, grow, mode="edge")
    flow = random_flow(p, config.misalignment_px, rng)
    layers[..., :4] = _warped(layers[..., :4], flow)
    layers[..., INPUT_CHANNELS:] = _warped(layers[..., INPUT_CHANNELS:], flow * (config.follow * depth)[..., None])
    if rng.random() < 0.5:
        layers = layers[:, ::-1]
    return np.ascontiguousarray(layers)


def random_flow(size: int, mean_px: float, rng: np.random.Generator) -> Float[np.ndarray, "size size 2"]:
    """A smooth random displacement (dx, dy) in px: a common shift and a bend, of mean length about `mean_px` (varied by half each time)."""
    bend = rng.standard_normal((4, 4, 2)).astype(np.float32) + rng.standard_normal(2).astype(np.float32)
    flow = cv2.resize(bend, (size, size), interpolation=cv2.INTER_CUBIC)
    length = np.sqrt((flow**2).sum(-1)).mean()
    return flow * np.float32(mean_px * rng.uniform(0.5, 1.5) / max(length, 1e-6))


def _warped(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    h, w = image.shape[:2]
    x, y = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    return cv2.remap(
        np.ascontiguousarray(image),
        x + flow[..., 0],
        y + flow[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )


# --- steps -------------------------------------------------------------------------------------------------------------------------------


class _Trainer:
    """Both networks, their optimisers, the averaged generator, and the step they stand at."""

    def __init__(self, config: CompositorTraining, device: torch.device | str = "cpu"):
        self.config, self.device = config, torch.device(device)
        self.step = 0
        self.generator, self.averaged, self.discriminator = (
            Compositor(config.generator),
            Compositor(config.generator),
            Discriminator(),
        )
        self.averaged.load_state_dict(self.generator.state_dict())
        self.averaged.requires_grad_(False)
        for network in (self.generator, self.averaged, self.discriminator):
            network.to(self.device)
        for network in (self.generator, self.discriminator):
            network.to(memory_format=torch.channels_last)
        betas = (0.5, 0.99)
        self.optimisers = {
            "generator": torch.optim.Adam(self.generator.parameters(), config.learning_rate, betas),
            "discriminator": torch.optim.Adam(self.discriminator.parameters(), config.learning_rate, betas),
        }

    def train_step(self, pool: list[_PoolItem], vgg: Features) -> dict[str, float]:
        config = self.config
        rng = np.random.default_rng([config.seed, 2, self.step])
        rate = config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * self.step / config.steps)))
        for optimiser in self.optimisers.values():
            optimiser.param_groups[0]["lr"] = rate
        crops = np.stack([_crop(pool[rng.integers(len(pool))], config, rng) for _ in range(config.batch)])
        layers = torch.from_numpy(crops).to(self.device).permute(0, 3, 1, 2)
        x, target = layers[:, :INPUT_CHANNELS], layers[:, INPUT_CHANNELS:]
        rgb, alpha, fill, weight = x[:, RGB], x[:, ALPHA], x[:, FILL], x[:, WEIGHT]
        output = fill + weight * (rgb + (1 - alpha) * fill + self.generator(x) - fill)
        output = torch.where(weight > 0, output, target)  # outside, composition leaves the frame alone

        real = self.discriminator(target)
        fake = self.discriminator(output.detach())
        d_loss = (real[-1] - 1).square().mean() + fake[-1].square().mean()
        self._check({"discriminator": d_loss})
        self._descend("discriminator", d_loss)

        with torch.no_grad():
            real_features, real = vgg(target), self.discriminator(target)
        self.discriminator.requires_grad_(False)
        fake = self.discriminator(output)
        terms = {
            "recon": config.recon * (output - target).square().mean(),
            "vgg": config.vgg * sum((a.float() - b.float()).abs().mean() for a, b in zip(vgg(output), real_features)),
            "matching": config.matching * sum((a - b).abs().mean() for a, b in zip(fake[:-1], real[:-1])),
        }
        if self.step >= config.adversarial_from * config.steps:
            terms["adversarial"] = config.adversarial * (fake[-1] - 1).square().mean()
        self._check(terms)
        self._descend("generator", sum(terms.values()))
        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            keep = min(_EMA, self.step / (self.step + 10))  # the first steps' zeros are forgotten soon
            for mean, value in zip(self.averaged.parameters(), self.generator.parameters()):
                mean.lerp_(value, 1 - keep)
        self.step += 1
        return {k: v.item() for k, v in terms.items()} | {"discriminator": d_loss.item()}

    def _check(self, terms: dict[str, Tensor]) -> None:
        networks = {"generator": self.generator, "discriminator": self.discriminator, "averaged": self.averaged}
        tensors = {f"{k}.{name}": p for k, network in networks.items() for name, p in network.named_parameters()}
        check_finite(self.step, terms, tensors, "Compositor step")

    def _descend(self, name: str, loss: Tensor) -> None:
        self.optimisers[name].zero_grad()
        loss.backward()
        self.optimisers[name].step()

    def save(self, path: Path) -> None:
        tensors = {}
        for name in ("generator", "averaged", "discriminator"):
            tensors |= {f"{name}.{k}": v for k, v in getattr(self, name).state_dict().items()}
        for name, optimiser in self.optimisers.items():
            for i, moments in optimiser.state_dict()["state"].items():
                tensors |= {f"adam.{name}.{i}.{k}": v for k, v in moments.items()}
        save_tensors(path, tensors, _SCHEMA, _VERSION, {"step": self.step, "training": _jsonable(self.config)})

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of the same settings; another one's is left aside."""
        tensors, header = load_tensors(path, _SCHEMA, _VERSION)
        if header["training"] != _jsonable(self.config):
            return
        self.step = header["step"]
        for name in ("generator", "averaged", "discriminator"):
            prefix = f"{name}."
            getattr(self, name).load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        for name, optimiser in self.optimisers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"adam.{name}."):
                    _, _, i, moment = key.split(".")
                    state.setdefault(int(i), {})[moment] = value
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _jsonable(config: CompositorTraining) -> dict:
    return asdict(config) | {"vgg_layers": list(config.vgg_layers)}
