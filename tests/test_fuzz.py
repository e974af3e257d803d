"""Damaged and hostile files: refused with a reason, or as good as the whole one; never executed, never a traceback."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.clips import write_clip
from helpers.deformations import a_deformation
from helpers.fake_avatar import motion_of, speech_models
from helpers.scenes import cloud, head_camera
from hicode.avatar.avatar import SCHEMA, VERSION, Avatar
from hicode.avatar.film_grain import FilmGrain
from hicode.avatar.rig import Binding
from hicode.errors import FileFormatError, HicodeError
from hicode.files import load_tensors, read_json, save_tensors, sha256_of, write_json
from hicode.media.images import Images
from hicode.preparation.clip import Clip

pytestmark = pytest.mark.slow
SIZE, FRAMES = 32, 4


@pytest.fixture(scope="module")
def avatar_file(tmp_path_factory) -> Path:
    """A small avatar with every part."""
    rng = np.random.default_rng(0)
    head, camera = cloud(200), head_camera(SIZE, SIZE)
    motion = replace(motion_of(FRAMES), T_camera_head=camera.T_camera_head.repeat(FRAMES, 1, 1))
    deformation = a_deformation(anchors=50)
    deformation.fit(motion)
    deformation.place_anchors(head.means)
    rows = torch.arange(200)[:, None]
    weights = torch.full((200, 3), 0.01), torch.full((200, 8), 0.01)
    deformation.binding = Binding((rows + torch.arange(3)) % 12, weights[0], (rows + torch.arange(8)) % 478, weights[1])
    pictures = [rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in range(FRAMES)]
    grey = [picture[..., 0] for picture in pictures]
    avatar = Avatar(
        head,
        deformation,
        replace(camera, T_camera_head=torch.eye(4)),
        motion,
        Images.encode(pictures, ".jpg"),
        Images.encode(grey, ".png"),
        pictures[0],
        torch.arange(64) < 40,
        torch.linspace(0, 1, 478),
        film_grain=FilmGrain(Images.encode(grey, ".jpg"), torch.rand(FRAMES, 478, 2), 0.5),
        speech=speech_models(),
    )
    return avatar.save(tmp_path_factory.mktemp("avatar") / "a.hicode")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A clip with the checksums that `prepare` writes."""
    path, _ = write_clip(tmp_path_factory.mktemp("clip") / "c", t=30)
    config = json.loads((path / "clip.json").read_text())
    config["steps"] = {"sound": {"seconds": 0.0, "files": {"audio.wav": sha256_of(path / "audio.wav")}}}
    write_json(path / "clip.json", config, sealed=True)
    return path


def damaged(data: bytes, chance: random.Random) -> bytes:
    """As a disk or a network damages: bits, bytes, a hole, a cut, an end of zeros, a piece lost or doubled."""
    out, size = bytearray(data), len(data)
    begin = chance.randrange(size) if chance.random() < 0.6 else chance.randrange(min(size, 4096))
    end = min(begin + chance.choice((1, 16, 512, 4096)), size)
    kind = chance.randrange(7)
    if kind == 0:
        out[begin] ^= 1 << chance.randrange(8)
    elif kind == 1:
        for _ in range(8):
            out[chance.randrange(size)] = chance.randrange(256)
    elif kind == 2:
        out[begin:end] = bytes(end - begin)
    elif kind == 3:
        del out[begin:]
    elif kind == 4:
        del out[begin:end]
    elif kind == 5:
        out[begin:begin] = out[begin:end]
    else:
        out[begin:] = bytes(size - begin)
    return bytes(out)


def all_of_avatar(path: Path) -> list:
    Avatar.load(path)
    tensors, config = load_tensors(path, SCHEMA, VERSION)
    return [tensors, config]


def all_of_clip(path: Path) -> list:
    clip = Clip.open(path)
    pictures = [read(t) for t in (0, 7) for read in (clip.image, clip.head_mask, clip.person_mask)]
    sound, features = clip.audio(), clip.speech_features("logmel")
    tensors = clip.track.motion.tensors() | {"points": clip.track.landmarks_px}
    if sound is not None and features is not None:
        tensors |= {"sound": torch.from_numpy(sound), "features": features}
    return [tensors, [clip.config, *(p.tolist() for p in pictures), clip.depths()[0].tolist()]]


def same(a: list, b: list) -> bool:
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())


def outcomes(file: Path, read: Callable[[], list], variants: int, seed: int) -> tuple[int, int]:
    """(refused, as good as whole) of so many variants of a file. Anything else fails."""
    whole, data, chance = read(), file.read_bytes(), random.Random(seed)
    refused = harmless = 0
    for number in range(variants):
        file.write_bytes(damaged(data, chance))
        try:
            found = read()
        except HicodeError as error:
            assert str(error).strip(), "a reason"
            refused += 1
        else:
            assert same(found, whole), f"variant {number} of {file.name} reads as something else"
            harmless += 1
    file.write_bytes(data)
    assert same(read(), whole)
    return refused, harmless


def test_a_damaged_avatar_is_refused(avatar_file):
    refused, harmless = outcomes(avatar_file, lambda: all_of_avatar(avatar_file), 700, 0)
    assert refused > 650 and refused + harmless == 700


def test_a_damaged_checkpoint_is_refused(tmp_path):
    """Of head, refiner, speech models or track: all are such files."""
    file = tmp_path / "head.safetensors"
    tensors = {f"moment.{k}": torch.rand(20, 3) for k in range(6)} | {"steps": torch.arange(5)}
    save_tensors(file, tensors, "hicode-head-checkpoint", 4, {"iteration": 40, "deformation": {"rig": True}})
    refused, _ = outcomes(file, lambda: list(load_tensors(file, "hicode-head-checkpoint", 4)), 700, 1)
    assert refused > 650


@pytest.mark.parametrize(
    "name",
    ["clip.json", "track.safetensors", "depth.safetensors", "audio.wav", "audio.logmel.safetensors",
     "frames/000007.png", "masks/head/000007.png", "masks/person/000000.png"],
)  # fmt: skip
def test_a_damaged_file_of_a_clip_is_refused(clip_folder, name):
    all_of_clip(clip_folder)  # makes the features
    refused, harmless = outcomes(clip_folder / name, lambda: all_of_clip(clip_folder), 80, 2)
    assert refused > 60 and refused + harmless == 80


# ---- files that somebody made so: their checksums are right, their contents are not ----


def changed(value, chance: random.Random):
    """A JSON value with one leaf, or one branch, replaced."""
    others = [None, True, -1, 0, 1e308, 10**12, "x", "../../etc/passwd", [], {}, [[]], {"a": 1}]
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        if chance.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], changed(value[at], chance), *value[at + 1 :]]
    return chance.choice(others)


def other_tensor(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    kind = chance.randrange(6)
    if kind == 0:
        return tensor[: len(tensor) // 2].clone() if tensor.ndim else tensor.repeat(3)
    if kind == 1:
        return torch.cat([tensor, tensor]) if tensor.ndim else tensor[None]
    if kind == 2 and tensor.is_floating_point():
        return torch.full_like(tensor, chance.choice((float("nan"), float("inf"))))
    if kind == 3 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        return torch.full_like(tensor, chance.choice((0, 127) if tensor.dtype == torch.uint8 else (-5, 10**9)))
    if kind == 4:
        return tensor.flatten()
    return tensor.to(chance.choice((torch.float64, torch.int8, torch.float16)))


def speaks(avatar: Avatar) -> None:
    """What a spoken frame reads of an avatar."""
    motion = avatar.driving
    for t in range(len(motion)):
        frame, mask = avatar.driving_frame(t), avatar.driving_mask(t)
        avatar.synthesize_frame(motion, t, frame, mask, motion)


def test_an_avatar_that_somebody_altered_works_or_is_refused(avatar_file, tmp_path):
    tensors, config = load_tensors(avatar_file, SCHEMA, VERSION)
    chance, file, refused = random.Random(3), tmp_path / "b.hicode", 0
    speaks(Avatar.load(avatar_file))
    for _ in range(200):
        parts, header = dict(tensors), config
        if chance.random() < 0.4:
            other = changed(config, chance)
            header = other if isinstance(other, dict) else {}
        else:
            name = chance.choice([k for k in parts if not k.startswith("speech.")])
            parts[name] = other_tensor(parts[name], chance)
        save_tensors(file, parts, SCHEMA, VERSION, header)
        try:
            speaks(Avatar.load(file))
        except HicodeError:
            refused += 1
    assert refused > 100


def test_a_clip_json_that_somebody_altered_works_or_is_refused(clip_folder, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(clip_folder, folder)
    config, chance, refused = read_json(clip_folder / "clip.json"), random.Random(4), 0
    for _ in range(300):
        other = changed(config, chance)
        write_json(folder / "clip.json", other if isinstance(other, dict) else {}, sealed=True)
        try:
            all_of_clip(folder)
        except HicodeError:
            refused += 1
    assert refused > 50


def test_a_pickle_in_an_avatars_place_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"a": Bomb()}, tmp_path / "a.hicode")
    with pytest.raises(FileFormatError):
        Avatar.load(tmp_path / "a.hicode")
    assert not (tmp_path / "executed").exists()


def test_a_file_without_a_checksum_is_read(tmp_path):
    """As other programs write it: what is wrong with it is found by its contents."""
    header = {"schema": "thing", "version": "1", "config": "{}"}
    save_file({"a": torch.arange(3)}, str(tmp_path / "a"), metadata=header)
    assert torch.equal(load_tensors(tmp_path / "a", "thing", 1)[0]["a"], torch.arange(3))
