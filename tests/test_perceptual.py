"""VGG16, AlexNet and LPIPS: the weights' reader refuses code, the distances are those of the `lpips` package."""

import pickle

import numpy as np
import pytest
import torch

from hicode import assets, perceptual
from hicode.errors import AssetError
from hicode.perceptual import LPIPS, LPIPS_LAYERS, Features, load_weights, read_arrays


def pattern(name: str, side: int = 96) -> torch.Tensor:
    """A formula, so that the goldens below can be made again anywhere: a coloured grating, and three ways to spoil
    it."""
    y, x = torch.meshgrid(
        torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64), indexing="ij"
    )
    image = torch.stack([0.5 + 0.4 * torch.sin(x / 7 + c) * torch.cos(y / (9 + c)) for c in range(3)])
    if name == "grain":
        image = image + 0.1 * torch.sin(37.7 * x + 91.3 * y)
    if name == "shift":
        image = image.roll(4, 2)
    if name == "negative":
        image = 1 - image
    return image.clamp(0, 1).float()[None]


# By hand with `lpips` 0.1.4, its own heads and forward pass on the same trunks: lpips.LPIPS(net=...)(2 a - 1, 2 b - 1).
GOLDEN = {
    ("alexnet", "grain"): 0.1810471, ("alexnet", "shift"): 0.0461102, ("alexnet", "negative"): 0.2467878,
    ("vgg16", "grain"): 0.4941385, ("vgg16", "shift"): 0.1819128, ("vgg16", "negative"): 0.8066194,
}  # fmt: skip


@pytest.fixture(scope="module", params=["alexnet", "vgg16"])
def model(request) -> LPIPS:
    if not assets.is_cached("perceptual"):
        pytest.skip("the asset `perceptual` is not in the cache: `hicode assets pull perceptual`")
    return LPIPS(request.param)


@pytest.mark.parametrize("spoiled", ["grain", "shift", "negative"])
def test_values_are_those_of_the_lpips_package(model, spoiled):
    value = model(pattern("plain"), pattern(spoiled)).item()
    # float32 sums in another order: about 1e-7
    assert value == pytest.approx(GOLDEN[model.features.network, spoiled], rel=1e-4)


def test_a_distance_is_zero_on_itself_symmetric_and_grows_with_the_fault(model):
    a = pattern("plain")
    assert model(a, a).item() == 0
    b = pattern("grain")
    assert model(a, b).item() == pytest.approx(model(b, a).item(), rel=1e-6)
    mild = a + 0.3 * (b - a)
    assert 0 < model(a, mild).item() < model(a, b).item()


def test_a_batch_is_its_images(model):
    a, b = torch.cat([pattern("plain")] * 2), torch.cat([pattern("grain"), pattern("shift")])
    together = model(a, b)
    alone = [model(a[i : i + 1], b[i : i + 1]).item() for i in range(2)]
    assert together.tolist() == pytest.approx(alone, rel=1e-5)


def test_a_mask_of_ones_changes_nothing_and_a_mask_finds_the_fault(model):
    a = pattern("plain", 192)
    b = a.clone()
    b[..., :64, :64] = 1 - b[..., :64, :64]
    ones, here, there = torch.ones(1, 1, 192, 192), torch.zeros(1, 1, 192, 192), torch.zeros(1, 1, 192, 192)
    here[..., :64, :64], there[..., 128:, 128:] = 1, 1
    assert model(a, b, ones).item() == pytest.approx(model(a, b).item(), rel=1e-5)
    assert model(a, b, here) > 2 * model(a, b) > 10 * model(a, b, there)


def test_features_have_the_customary_shapes(model):
    if model.features.network == "vgg16":
        shapes = [tuple(f.shape[1:]) for f in Features("vgg16", LPIPS_LAYERS["vgg16"])(pattern("plain", 64))]
        assert shapes == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)]
    else:
        shapes = [tuple(f.shape[1:]) for f in Features("alexnet", LPIPS_LAYERS["alexnet"])(pattern("plain", 224))]
        assert shapes == [(64, 55, 55), (192, 27, 27), (384, 13, 13), (256, 13, 13), (256, 13, 13)]


def test_nothing_trains_and_images_take_gradients(model):
    a = pattern("plain").requires_grad_()
    model(a, pattern("grain")).sum().backward()
    assert a.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in model.parameters())


def test_heads_are_not_negative(model):
    """LPIPS clamps its heads at 0 while it learns them: a distance, not a difference."""
    assert all((head >= 0).all() for head in model.heads)


def test_too_small_an_image_is_refused(model):
    with pytest.raises(ValueError, match="at least 64 px"):
        model(torch.zeros(1, 3, 40, 200), torch.zeros(1, 3, 40, 200))


def test_the_converted_copy_is_read_and_a_damaged_one_made_anew(model, tmp_path, monkeypatch):
    network = model.features.network
    original, first = assets.folder("perceptual"), load_weights(network)
    monkeypatch.setattr(assets, "folder", lambda name: original)
    monkeypatch.setenv("HICODE_CACHE", str(tmp_path))
    made = load_weights(network)
    (copy,) = (tmp_path / "converted").glob("*.safetensors")
    size = copy.stat().st_size
    copy.write_bytes(copy.read_bytes()[: size // 2])
    again = load_weights(network)
    assert copy.stat().st_size == size
    assert all(torch.equal(first[k], made[k]) and torch.equal(first[k], again[k]) for k in first)
    monkeypatch.setattr(perceptual, "read_arrays", None)  # from here on, only the copy can answer
    assert torch.equal(
        load_weights(network)["lpips." + LPIPS_LAYERS[network][0]], first["lpips." + LPIPS_LAYERS[network][0]]
    )


class _Runs:
    def __reduce__(self):
        return (print, ("this must never run",))


class _ObjectArray:
    def __reduce__(self):
        return (np.dtype, ("O",))


@pytest.mark.parametrize(
    "poison",
    [
        _Runs(),
        {"a": _Runs()},
        {"a": np.array([{}], object)},
        {"a": _ObjectArray()},
        [np.zeros(3)],
        {"a": "text"},
        {3: np.zeros(3)},
    ],
    ids=["call", "call within", "object array", "object dtype", "not a dict", "a string", "a number for a name"],
)  # fmt: skip
def test_a_pickle_with_anything_but_arrays_is_refused(poison, capsys):
    with pytest.raises(AssetError, match=r"some\.ckpt is not a plain file of numpy arrays"):
        read_arrays(pickle.dumps(poison, protocol=3), "some.ckpt")
    assert capsys.readouterr().out == ""


def test_arrays_pass_and_damaged_files_are_refused():
    tree = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(2)}}
    data = pickle.dumps(tree, protocol=3)
    read = read_arrays(data, "good.ckpt")
    assert np.array_equal(read["layer"]["kernel"], tree["layer"]["kernel"])
    for broken in (data[: len(data) // 2], b"", b"PK\x03\x04 not a pickle", b"\x80\x05"):
        with pytest.raises(AssetError, match=r"broken\.ckpt"):
            read_arrays(broken, "broken.ckpt")
