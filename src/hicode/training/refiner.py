"""Training of the refiner (Eqs 17-18), after pix2pix (Isola et al. 2017).

The generator adds a residual to the plain composite. The discriminator is conditional: it sees the generator's input
next to the real or the composed image. b crops of p px; images are floats in [0, 1]; "11" are the layers of
`hicode.avatar.blend`.

Deviation from Eq. 18: the adversarial term is least-squares, because log(1 - D) saturates.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from hicode.avatar.blend import ALPHA, FILL, INPUT_CHANNELS, RGB, WEIGHT, blend_region, plain_composite
from hicode.avatar.refiner import Compositor, CompositorConfig
from hicode.errors import TrainingError
from hicode.files import load_tensors, save_tensors
from hicode.perceptual import Features
from hicode.training.checkpoint import load_optimizer, optimizer_tensors
from hicode.training.frames import RenderedFrame
from hicode.training.losses import check_finite, fast_dtype

SCHEMA, VERSION = "hicode-refiner-training", 1
CHECKPOINT_EVERY = 200


@dataclass(frozen=True)
class RefinerTraining:
    """How the refiner is trained. The paper gives no weights."""

    steps: int = 4_000
    crop_px: int = 128
    batch: int = 3  # Crops per step, all of one training frame.
    mouth_share: float = 0.4  # Share of the crops on the lower half of the head. The others are on its border.
    recon: float = 10.0  # λ4: squared error.
    vgg: float = 0.1  # λ5: difference of VGG16 features.
    matching: float = 0.5  # Feature matching.
    adversarial: float = 0.02
    adversarial_start: float = 0.3  # Fraction of the steps before the adversarial term.
    learning_rate: float = 1e-3  # Of both networks; decays by a cosine to 5 %.
    seed: int = 0
    generator: CompositorConfig = field(default_factory=CompositorConfig)


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit per patch of 34 px, given the generator's input."""

    def __init__(self, filters: int = 24):
        super().__init__()
        c, norm = filters, nn.utils.parametrizations.spectral_norm
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(INPUT_CHANNELS + 3, c, 4, 2, 1),
                norm(nn.Conv2d(c, 2 * c, 4, 2, 1)),
                norm(nn.Conv2d(2 * c, 4 * c, 3, 1, 1)),
                nn.Conv2d(4 * c, 1, 3, 1, 1),
            ]
        )

    def forward(
        self, condition: Float[Tensor, "b 11 h w"], images: Float[Tensor, "b 3 h w"]
    ) -> list[Float[Tensor, "b _ _ _"]]:
        """The output of every layer. The last is the verdict: 1 for real, 0 for composed."""
        x, out = 2 * torch.cat([condition, images], 1) - 1, []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
            out.append(x)
        return [*out, self.layers[-1](x)]


def train_refiner(
    render: Callable[[int], RenderedFrame],
    frames: int,
    plate: UInt8[np.ndarray, "h w 3"],
    config: RefinerTraining,
    checkpoint: Path | None = None,
    log: Callable[[int, dict[str, float]], None] = lambda step, terms: None,
    device: torch.device | str = "cpu",
) -> Compositor:
    """Train on `frames` training frames; `render(k)` gives the k-th with the head rendered, `plate` the background.

    Continues from `checkpoint` if it has the same configuration. `log` gets each step and its loss terms. Raises
    TrainingError at a NaN, and if no frame shows the head.
    """
    trainer = RefinerTrainer(config, device)
    if checkpoint is not None and checkpoint.exists():
        trainer.load(checkpoint)
    vgg = Features("vgg16", ("relu1_2", "relu2_2"), dtype=fast_dtype()).to(device)
    while trainer.step < config.steps:
        rng = np.random.default_rng([config.seed, trainer.step])
        crops = draw_crops(render, frames, plate, config, rng)
        terms = trainer.train_step(torch.from_numpy(crops).to(device).permute(0, 3, 1, 2), vgg)
        log(trainer.step, terms)
        if checkpoint is not None and (trainer.step % CHECKPOINT_EVERY == 0 or trainer.step == config.steps):
            trainer.save(checkpoint)
    return trainer.generator.for_inference()


def draw_crops(
    render: Callable[[int], RenderedFrame],
    frames: int,
    plate: UInt8[np.ndarray, "h w 3"],
    config: RefinerTraining,
    rng: np.random.Generator,
) -> Float[np.ndarray, "b p p 14"]:
    """Crops of one random frame: the generator's 11 input layers and the true image."""
    for k in rng.permutation(frames):
        frame = render(int(k))
        region = blend_region(frame.head_mask)
        if region is not None:
            break
    else:
        raise TrainingError("No training frame has a head mask. Prepare the clip again.")
    composite = plain_composite(frame.rgb, frame.alpha, frame.image, plate, region)
    layers = np.concatenate([composite.layers, frame.image[region.window].astype(np.float32) / 255], -1)
    p = config.crop_px
    border, head = np.argwhere((region.weight > 0) & (region.weight < 1)), np.argwhere(region.weight >= 1)
    if layers.shape[0] < p or layers.shape[1] < p:  # a head smaller than a crop
        grow = [(0, max(0, p - side)) for side in layers.shape[:2]]
        layers = np.pad(layers, (*grow, (0, 0)), mode="edge")
    lower = head[head[:, 0] > np.median(head[:, 0])]
    crops = []
    for _ in range(config.batch):
        centres = lower if len(lower) and rng.random() < config.mouth_share else border
        row, column = centres[rng.integers(len(centres))]
        y0 = int(np.clip(row - p // 2, 0, layers.shape[0] - p))
        x0 = int(np.clip(column - p // 2, 0, layers.shape[1] - p))
        crop = layers[y0 : y0 + p, x0 : x0 + p]
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.stack(crops).astype(np.float32)


class RefinerTrainer:
    """Generator, discriminator, their optimisers, and the number of steps done."""

    def __init__(self, config: RefinerTraining, device: torch.device | str = "cpu"):
        torch.manual_seed(config.seed)
        self.config, self.step = config, 0
        self.generator, self.discriminator = Compositor(config.generator).to(device), Discriminator().to(device)
        for network in self.networks().values():
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - missing in torch's stub
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), config.learning_rate, (0.5, 0.99))
            for name, network in self.networks().items()
        }

    def networks(self) -> dict[str, nn.Module]:
        """Both networks by name."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    def train_step(self, crops: Float[Tensor, "b 14 p p"], vgg: Features) -> dict[str, float]:
        """One step of the discriminator, then one of the generator (Eqs 17-18). Returns the loss terms."""
        config = self.config
        rate = config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * self.step / config.steps)))
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = rate
        x, target = crops[:, :INPUT_CHANNELS], crops[:, INPUT_CHANNELS:]
        rgb, alpha, fill, weight = x[:, RGB], x[:, ALPHA], x[:, FILL], x[:, WEIGHT]
        output = fill + weight * (rgb + (1 - alpha) * fill + self.generator(x) - fill)
        output = torch.where(weight > 0, output, target)  # outside, composition keeps the frame

        real, fake = self.discriminator(x, target), self.discriminator(x, output.detach())
        verdict = (real[-1] - 1).square().mean() + fake[-1].square().mean()
        self._descend("discriminator", {"discriminator": verdict})

        with torch.no_grad():
            expected, real = vgg(target), self.discriminator(x, target)
        self.discriminator.requires_grad_(False)
        fake = self.discriminator(x, output)
        terms = {
            "recon": config.recon * (output - target).square().mean(),
            "vgg": config.vgg * _mean_differences(vgg(output), expected),
            "matching": config.matching * _mean_differences(fake[:-1], real[:-1]),
        }
        if self.step >= config.adversarial_start * config.steps:
            terms["adversarial"] = config.adversarial * (fake[-1] - 1).square().mean()
        self._descend("generator", terms)
        self.discriminator.requires_grad_(True)
        self.step += 1
        return {name: term.item() for name, term in terms.items()} | {"discriminator": verdict.item()}

    def _descend(self, name: str, terms: dict[str, Tensor]) -> None:
        tensors = {f"{k}.{n}": p for k, network in self.networks().items() for n, p in network.named_parameters()}
        check_finite(self.step, terms, tensors, "Refiner step")
        self.optimizers[name].zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizers[name].step()

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically."""
        tensors: dict[str, Tensor] = {}
        for name, network in self.networks().items():
            tensors |= {f"{name}.{k}": v for k, v in network.state_dict().items()}
            tensors |= optimizer_tensors(self.optimizers[name], f"adam.{name}")
        save_tensors(path, tensors, SCHEMA, VERSION, {"step": self.step, "training": asdict(self.config)})

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; one of another configuration is ignored."""
        tensors, header = load_tensors(path, SCHEMA, VERSION)
        if header["training"] != asdict(self.config):
            return
        self.step = header["step"]
        for name, network in self.networks().items():
            prefix = f"{name}."
            network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            load_optimizer(self.optimizers[name], tensors, f"adam.{name}")


def _mean_differences(a: list[Tensor], b: list[Tensor]) -> Float[Tensor, ""]:
    """Mean absolute difference, summed over layers."""
    return torch.stack([(x.float() - y.float()).abs().mean() for x, y in zip(a, b, strict=True)]).sum()
