"""Training and synthesis on another device: on a GPU with gsplat where there is one, and everywhere against a stand-in.

The stand-in is a device of torch's own kind ("standin": the PrivateUse1 key, implemented here by the CPU kernels), so
that what a GPU would refuse fails here too: operations that mix devices, `numpy()` of a tensor that is not on the CPU,
kernels of ours that read CPU memory. gsplat is the stand-in of tests/test_render.py. What it cannot show: CUDA's and
gsplat's own numerics, memory and speed.

A device must be registered before torch's first backward, so these tests run in a process of their own.
"""

import os
import subprocess
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as tree

from helpers.drawn_head import clip_on_disk, draw_clip, psnr, short
from helpers.scenes import stand_in
from hicode.tracking.head_model import HeadModel
from hicode.training.losses import LossWeights


@pytest.fixture(scope="module")
def model():
    return HeadModel.load()


@pytest.fixture(scope="module")
def clip(model):
    return draw_clip(model)


CHILD = "HICODE_STAND_IN_DEVICE"
GPU = CHILD not in os.environ and torch.cuda.is_available() and find_spec("gsplat") is not None
needs_device = pytest.mark.skipif(
    CHILD not in os.environ and not GPU, reason="runs in the child process, and here where there are a GPU and gsplat"
)


@pytest.mark.slow
@pytest.mark.skipif(CHILD in os.environ, reason="this is the child process")
def test_on_a_device_of_their_own():
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot register a device from Python (2.10 and newer can)")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env=os.environ | {CHILD: "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=360,
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


# -- the device --------------------------------------------------------------------------------------------------------

# Operations that a GPU, too, takes CPU tensors in (copies between devices; indices).
MIXED = {
    "aten::_copy_from", "aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_",
}  # fmt: skip
# Operators that torch makes, on a foreign device, of an empty result and an operator that resizes it, which a stand-in
# cannot be.
FUNCTIONAL = ["abs", "arange", "arange.start", "arange.start_step", "eye", "eye.m"]
# By the address of a stand-in's storage, so that aliases find it. The reference keeps the address from being reused.
_memory: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}
_swept = [0]  # how many were left when the dead ones went last


def on_device(raw: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):  # a view of an ordinary tensor is one, whatever mode it is taken in
        out = torch._C._acc.create_empty_tensor(tuple(raw.shape), raw.dtype)
    _memory[out.untyped_storage()._cdata] = StorageWeakRef(out.untyped_storage()), raw
    if len(_memory) > _swept[0] + 2000:
        for address in [a for a, (storage, _) in list(_memory.items()) if storage.expired()]:
            _memory.pop(address, None)  # another thread may sweep too
        _swept[0] = len(_memory)
    return out


def memory_of(t: torch.Tensor) -> torch.Tensor:
    """The CPU memory behind a stand-in, as it sees it: torch's own views share the storage and differ in shape and
    strides.
    """
    if t.device.type != "standin":
        return t
    raw = _memory[t.untyped_storage()._cdata][1]
    if t.shape == raw.shape and t.is_contiguous():  # what `on_device` made says of itself that it is
        return raw
    raw = raw.contiguous()
    return raw.as_strided(t.shape, t.stride(), raw.storage_offset() + t.storage_offset())


def run_on_cpu(op, *args, **kwargs):
    """Any operator on the stand-in: refused where a GPU would refuse it, else done by the CPU on the memory behind."""
    name = op.name().split(".")[0]
    tensors = [t for t in tree.tree_leaves((args, kwargs)) if torch.is_tensor(t)]
    if name not in MIXED and len({t.device for t in tensors if t.dim() or t.device.type != "cpu"}) > 1:
        raise RuntimeError(f"{name} on two devices: {[(str(t.device), tuple(t.shape)) for t in tensors]}")
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    raw = {id(t): memory_of(t) for t in tensors}
    raw_args, raw_kwargs = tree.tree_map(lambda v: raw.get(id(v), v), (args, kwargs))
    if name == "aten::_copy_from":
        raw_args[1].copy_(raw_args[0])
        return args[1]
    if name == "aten::as_strided":  # its offset counts from the start of the storage, of which the memory may be a part
        start = raw_args[0].contiguous()
        offset = args[3] - args[0].storage_offset() if len(args) > 3 and args[3] is not None else 0
        raw_args = (start, *args[1:3], start.storage_offset() + offset)
    elif name in ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias"):
        raw_args = (raw_args[0].contiguous(), *args[1:])
    out = op(*raw_args, **raw_kwargs)
    for t in tensors:
        if raw[id(t)].shape != t.shape:
            raise NotImplementedError(f"{op.name()} resizes a stand-in: name its functional form in FUNCTIONAL")
    given = {id(raw[id(t)]): t for t in tensors}
    return tree.tree_map(lambda v: given.get(id(v), on_device(v)) if torch.is_tensor(v) else v, out)


def _convolution_backward(grad, x, weight, *rest):
    *settings, mask = rest
    return run_on_cpu(torch.ops.aten.convolution_backward.default, grad, x, weight, [len(weight)], *settings, mask)


@pytest.fixture(scope="session")
def device():
    if GPU:
        yield "cuda"
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("standin")
    library = torch.library.Library("_", "IMPL")
    library.fallback(run_on_cpu, "PrivateUse1")
    makers = torch.library.Library("aten", "IMPL")
    for name in FUNCTIONAL:
        op = getattr(torch.ops.aten, name.partition(".")[0])
        op = getattr(op, name.partition(".")[2] or "default")
        makers.impl(name, lambda *args, op=op, **kwargs: run_on_cpu(op, *args, **kwargs), "PrivateUse1")
    aten = torch.ops.aten  # convolutions are the one operator that torch asks a foreign device for by other names
    makers.impl("convolution_overrideable", lambda *args: run_on_cpu(aten.convolution.default, *args), "PrivateUse1")
    makers.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    yield "standin"
    del library, makers


@pytest.fixture(autouse=True)
def gsplat(monkeypatch):
    """gsplat's name for its stand-in, taken for whatever is not on the CPU, as it is for CUDA's tensors."""
    if GPU:
        return
    from hicode import render

    module = types.ModuleType("gsplat")
    module.rasterization = stand_in
    monkeypatch.setitem(sys.modules, "gsplat", module)
    choose = render._choose
    monkeypatch.setattr(
        render, "_choose", lambda g, backend: "cuda" if g.means.device.type == "standin" else choose(g, backend)
    )


@needs_device
def test_the_stand_in_refuses_what_a_gpu_refuses(device):
    a = torch.ones(3, device=device)
    assert torch.equal((2 * a + torch.tensor(1.0)).cpu(), torch.full((3,), 3.0))
    with pytest.raises(RuntimeError):
        a + torch.ones(3)
    with pytest.raises((TypeError, RuntimeError)):
        a.numpy()
    w = torch.ones(3, device=device, requires_grad=True)
    (w * a).sum().backward()
    assert w.grad.device.type == device and torch.equal(w.grad.cpu(), torch.ones(3))


# -- what runs on it ---------------------------------------------------------------------------------------------------


@needs_device
def test_training_on_the_device_is_training_on_the_cpu(device, clip, model):
    from hicode.training import head as training

    config = short(loss=LossWeights(wing=0.0005), vgg_start=0.0, vgg_every=7, wing_every=7)  # every loss
    logs, heads = {}, {}
    for place in ("cpu", device):
        logs[place] = []
        log = lambda state, scalars, place=place: logs[place].append(scalars)
        heads[place] = training.train_head(clip, model, config, log=log, device=place)
    head = heads[device]
    network, binding = dict(head.deformation.named_parameters()), head.deformation.binding.tensors()
    for name, tensor in {**head.gaussians.tensors(), **network, **binding}.items():
        assert tensor.device.type == device, name
    assert head.motion.T_camera_head.device.type == "cpu"
    assert [s["gaussians"] for s in logs["cpu"]] == [s["gaussians"] for s in logs[device]]
    losses = np.array([[s["loss"] for s in logs[place]] for place in ("cpu", device)])
    # Adam makes rounding errors as large as its steps: 1e-3 at the third iteration.
    assert np.allclose(*losses[:, :2], rtol=1e-4)
    assert np.allclose(*losses, rtol=0.05)
    on_cpu = [
        replace(h, gaussians=h.gaussians.map(lambda v: v.cpu()), deformation=h.deformation.to("cpu"))
        for h in heads.values()
    ]
    figures = [psnr(clip, h, clip.test[0]) for h in on_cpu]
    assert abs(figures[0] - figures[1]) < 0.3, figures


@needs_device
def test_a_checkpoint_of_the_device_is_resumed_there_and_on_the_cpu(device, clip, model, tmp_path):
    from hicode.training import head as training

    file, config = tmp_path / "head.safetensors", short()
    training.train_head(clip, model, config, checkpoint=file, stop_at=6, device=device)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    for place, stored in ((device, file), ("cpu", copy)):
        gaussians = training.train_head(clip, model, config, stored, stop_at=8, device=place).gaussians
        assert gaussians.means.device.type == place and bool(gaussians.means.cpu().isfinite().all())


@needs_device
@pytest.mark.parametrize("count", [3, 200])
def test_interpolation_has_the_same_gradient_on_both(device, count):
    from hicode.avatar.anchors import Anchors

    r = torch.Generator().manual_seed(0)
    index, weight = torch.randint(7, (count, 4), generator=r), torch.rand(count, 4, generator=r)
    table, upstream = torch.rand(7, 10, generator=r), torch.rand(count, 10, generator=r)
    found = []
    for place in ("cpu", device):
        leaf = table.to(place).detach().requires_grad_()
        (
            Anchors(torch.zeros(7, 3), index.to(place), weight.to(place)).interpolate(leaf) * upstream.to(place)
        ).sum().backward()
        found.append(leaf.grad.cpu())
    torch.testing.assert_close(*found)


@needs_device
def test_from_clip_to_spoken_video_and_its_figures(device, clip, model, tmp_path, monkeypatch):
    """`train`, `speak` and `evaluate` as the commands call them, with --device cuda answered by the stand-in."""
    from hicode.avatar.avatar import Avatar
    from hicode.avatar.refiner import CompositorConfig
    from hicode.evaluation import report
    from hicode.evaluation.config import EvaluateConfig
    from hicode.session import speak as synthesis
    from hicode.training import avatar as run
    from hicode.training.refiner import RefinerTraining

    for module in (run, synthesis, report):
        monkeypatch.setattr(module, "resolve_device", lambda asked: device if asked == "cuda" else "cpu")
    path = clip_on_disk(tmp_path / "c", clip)
    config = run.TrainConfig(
        head=short(),
        refiner=True,
        refiner_training=RefinerTraining(steps=4, crop_px=48, batch=1, generator=CompositorConfig(filters=4)),
        device="cuda",
        progress=False,
    )
    trained = run.train(path, tmp_path / "a.hicode", config)
    assert trained.gaussians.means.device.type == device
    sound = (0.1 * np.random.default_rng(0).standard_normal(5 * 640)).astype(np.float32)
    frames = {}
    for asked in ("cpu", "cuda"):
        avatar = Avatar.load(tmp_path / "a.hicode")
        spoken = synthesis.speak(avatar, sound, tmp_path / f"{asked}.mp4", device=asked, progress=False)
        assert spoken.frames == 5
        spoken = synthesis.synthesize(avatar.to(device if asked == "cuda" else "cpu"), sound)
        frames[asked] = np.stack([frame.image for frame in spoken])
    # the kernels against the dense reference, each within half a grey level
    assert np.abs(frames["cpu"].astype(int) - frames["cuda"]).max() <= 1
    figures = [
        report.evaluate(tmp_path / "a.hicode", path, EvaluateConfig(modes=("tracked",), device=asked), progress=False)
        for asked in ("cpu", "cuda")
    ]
    assert abs(figures[0]["tracked"]["head"]["psnr"] - figures[1]["tracked"]["head"]["psnr"]) < 0.05
