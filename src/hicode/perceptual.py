"""Features of two image classifiers, VGG16 and AlexNet, and LPIPS, a distance learned on them (Zhang et al. 2018).

Images are "b 3 h w", RGB in [0, 1], float32. ImageNet's normalisation happens inside. Layers have their usual names:
`relu1_2` is the second convolution of VGG16's first block, after its ReLU; AlexNet has `relu1` ... `relu5`. Every
parameter is frozen.

The weights are the asset `perceptual`: numpy arrays in pickles. A pickle may run any code, so an unpickler that accepts
only numpy arrays reads them, once. Later runs read a safetensors copy in the cache.
"""

import io
import pickle
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hicode import assets
from hicode.errors import AssetError, FileFormatError
from hicode.files import load_tensors, save_tensors

Network = Literal["vgg16", "alexnet"]

# (layer, channels in, channels out, kernel, stride, padding), or ("pool", kernel, stride): max pooling.
_VGG16 = [
    ("relu1_1", 3, 64, 3, 1, 1), ("relu1_2", 64, 64, 3, 1, 1), ("pool", 2, 2),
    ("relu2_1", 64, 128, 3, 1, 1), ("relu2_2", 128, 128, 3, 1, 1), ("pool", 2, 2),
    ("relu3_1", 128, 256, 3, 1, 1), ("relu3_2", 256, 256, 3, 1, 1), ("relu3_3", 256, 256, 3, 1, 1), ("pool", 2, 2),
    ("relu4_1", 256, 512, 3, 1, 1), ("relu4_2", 512, 512, 3, 1, 1), ("relu4_3", 512, 512, 3, 1, 1), ("pool", 2, 2),
    ("relu5_1", 512, 512, 3, 1, 1), ("relu5_2", 512, 512, 3, 1, 1), ("relu5_3", 512, 512, 3, 1, 1),
]  # fmt: skip
_ALEXNET = [
    ("relu1", 3, 64, 11, 4, 2), ("pool", 3, 2), ("relu2", 64, 192, 5, 1, 2), ("pool", 3, 2),
    ("relu3", 192, 384, 3, 1, 1), ("relu4", 384, 256, 3, 1, 1), ("relu5", 256, 256, 3, 1, 1),
]  # fmt: skip
_LAYERS = {"vgg16": _VGG16, "alexnet": _ALEXNET}
LPIPS_LAYERS: dict[str, tuple[str, ...]] = {
    "vgg16": ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"),
    "alexnet": ("relu1", "relu2", "relu3", "relu4", "relu5"),
}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST_SIDE_PX = 64  # AlexNet's last maps of smaller images are empty

_SCHEMA, _VERSION = "hicode-perceptual", 1


class _ArraysOnly(pickle.Unpickler):
    """Accepts numpy arrays; raises for any other name in the pickle."""

    def find_class(self, module: str, name: str):
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _plain_dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _reconstruct(kind, shape, code):
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"it asks to build a {kind!r}")
    return np.ndarray(shape, np.dtype(code))


def _plain_dtype(code, *rest):
    dtype = np.dtype(code)
    if dtype.kind not in "fiub":  # an object array could hold anything
        raise pickle.UnpicklingError(f"it holds an array of {dtype}")
    return dtype


def read_arrays(data: bytes, source: str) -> dict:
    """Nested dicts of numeric numpy arrays from a pickle. Raises AssetError, naming `source`, for anything else."""
    try:
        tree = _ArraysOnly(io.BytesIO(data)).load()
        _check_tree(tree)
    except Exception as error:  # a damaged pickle fails in any of a dozen ways
        raise AssetError(
            f"{source} is not a plain file of numpy arrays ({error}). "
            "Refused; fetch it again with `hicode assets pull`."
        ) from error
    return tree


def _check_tree(tree) -> None:
    if not isinstance(tree, dict):
        raise pickle.UnpicklingError(f"it holds a {type(tree).__name__}")
    for key, value in tree.items():
        if not isinstance(key, str):
            raise pickle.UnpicklingError(f"it has the key {key!r}")
        if not (isinstance(value, np.ndarray) and value.dtype.kind in "fiub"):
            _check_tree(value)


def load_weights(network: Network) -> dict[str, Tensor]:
    """Weights in torch's layout: `relu1_2.weight` "o i k k", `relu1_2.bias` "o", and `lpips.relu1_2` "o" (its head)."""
    package = assets.ASSETS["perceptual"].package
    converted = assets.cache_dir() / "converted" / f"{network}-{package.sha256[:16]}.safetensors"
    if converted.exists():
        try:
            return load_tensors(converted, _SCHEMA, _VERSION)[0]
        except FileFormatError:
            pass  # a damaged copy is replaced below
    source = assets.path("perceptual", f"{network}.ckpt")
    tensors = _convert(read_arrays(source.read_bytes(), str(source)), network, source)
    save_tensors(
        converted, tensors, _SCHEMA, _VERSION, {"network": network, "source": f"{package.name} {package.version}"}
    )
    return tensors


def _convert(tree: dict, network: Network, source: Path) -> dict[str, Tensor]:
    convolutions = [row for row in _LAYERS[network] if row[0] != "pool"]
    out: dict[str, Tensor] = {}
    try:
        trunk = tree[{"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}[network]]
        for i, (name, n_in, n_out, k, *_) in enumerate(convolutions):
            kernel, bias = trunk[f"Conv_{i}"]["kernel"], trunk[f"Conv_{i}"]["bias"]  # stored as "k k in out"
            if kernel.shape != (k, k, n_in, n_out) or bias.shape != (n_out,):
                raise ValueError(f"layer {i} has shape {kernel.shape}")
            out[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1), np.float32))
            out[f"{name}.bias"] = torch.from_numpy(np.ascontiguousarray(bias, np.float32))
        for i, name in enumerate(LPIPS_LAYERS[network]):
            head = tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1)
            if head.shape != out[f"{name}.bias"].shape:
                raise ValueError(f"head {i} has {head.size} channels")
            out[f"lpips.{name}"] = torch.from_numpy(np.ascontiguousarray(head, np.float32))
    except (KeyError, TypeError, ValueError) as error:
        raise AssetError(
            f"{source} is not the {network} expected ({error}). Fetch it again with `hicode assets pull`."
        ) from error
    return out


class Features(nn.Module):
    """VGG16 or AlexNet up to the last of `layers`. Frozen; differentiable in its input.

    `dtype` bfloat16 halves the time if the machine multiplies it in hardware (AMX, CUDA), and is slower otherwise.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        network: Network,
        layers: tuple[str, ...],
        weights: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        weights = load_weights(network) if weights is None else weights
        self.network, self.layers, self.dtype = network, tuple(layers), dtype
        table = _LAYERS[network]
        names = [row[0] for row in table]
        unknown = [name for name in layers if name not in names or name == "pool"]
        assert layers and not unknown, f"{network} has no layers {unknown or layers}"
        self.table = table[: max(names.index(name) for name in layers) + 1]
        # The fast kernels need channels-last weights; contiguous ones would be reordered at every call.
        names = [row[0] for row in self.table if row[0] != "pool"]
        as_kernel = {"dtype": dtype, "memory_format": torch.channels_last}
        self.kernels = nn.ParameterList([_frozen(weights[f"{name}.weight"].to(**as_kernel)) for name in names])
        self.biases = nn.ParameterList([_frozen(weights[f"{name}.bias"].to(dtype)) for name in names])
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c y x"]]:
        """The outputs of `layers`, in the network's order, in `dtype`."""
        x = ((images - self.mean) / self.deviation).to(self.dtype).contiguous(memory_format=torch.channels_last)
        out, parameters = [], zip(self.kernels, self.biases, strict=True)
        for name, *shape in self.table:
            if name == "pool":
                x = F.max_pool2d(x, *shape)
                continue
            kernel, bias = next(parameters)
            x = F.relu_(F.conv2d(x, kernel, bias, stride=shape[3], padding=shape[4]))
            if name in self.layers:
                out.append(x)
        return out


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class LPIPS(nn.Module):
    """LPIPS, version 0.1: 0 for equal images, about 0.1 for a good rendering, above 0.5 for unlike images."""

    def __init__(self, network: Network = "alexnet"):
        super().__init__()
        weights = load_weights(network)
        self.features = Features(network, LPIPS_LAYERS[network], weights)
        self.heads = nn.ParameterList(
            [_frozen(weights[f"lpips.{name}"].view(1, -1, 1, 1)) for name in LPIPS_LAYERS[network]]
        )

    def normalized(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c y x"]]:
        """Features of unit length at each place, the input of `from_features`."""
        if min(images.shape[-2:]) < SMALLEST_SIDE_PX:
            raise ValueError(f"LPIPS needs at least {SMALLEST_SIDE_PX} px a side, got {tuple(images.shape[-2:])}")
        return [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in self.features(images)]

    def from_features(
        self, a: list[Tensor], b: list[Tensor], mask: Float[Tensor, "b 1 h w"] | None = None
    ) -> Float[Tensor, "b"]:
        """Distance from `normalized` features: the mean over places of each layer, then the sum over layers.

        A mask (pixel weights) weights each mean, averaged down to the layer's grid. A feature's receptive field is some
        200 px at AlexNet's last layer, so the value of a region depends a little on its surroundings.
        """
        total = torch.zeros(a[0].shape[0], device=a[0].device)
        for x, y, head in zip(a, b, self.heads, strict=True):
            place = ((x - y).square() * head).sum(1, keepdim=True)
            if mask is None:
                total = total + place.mean((1, 2, 3))
            else:
                weight = F.adaptive_avg_pool2d(mask.to(place.dtype), place.shape[-2:])
                total = total + (place * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1e-12)
        return total

    def forward(
        self, a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"], mask: Float[Tensor, "b 1 h w"] | None = None
    ) -> Float[Tensor, "b"]:
        """Distance of each pair of images; with a mask, as `from_features`."""
        return self.from_features(self.normalized(a), self.normalized(b), mask)


@cache
def lpips(network: Network = "alexnet") -> LPIPS:
    """The LPIPS of a network, on the CPU; one per process."""
    return LPIPS(network)
