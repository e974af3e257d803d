"""Training an avatar from a prepared clip: speech models, head, compositor, each on its own as the paper trains them, then one file.

A run has a folder: `config.json`, `environment.json`, `metrics.jsonl`, TensorBoard events, and a result or checkpoint per part. Training again into
the same folder goes on where it stopped, by what each part reads: head and compositor hold while pictures, head masks, split, track, depth and
configuration are the same, speech while sound, track and speech weights are. So sound moved by another offset costs no head.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch

from hicode.avatar.avatar import MAX_DRIVING_FRAMES, Avatar
from hicode.avatar.blend import estimate_background, with_whole_face
from hicode.avatar.deformation import Deformation
from hicode.avatar.refiner import Compositor
from hicode.errors import FileFormatError, InputError
from hicode.files import check_writable, load_tensors, read_json, save_tensors, sha256_of, write_json
from hicode.gaussians import Gaussians
from hicode.geometry import rigid, rotation_from_axis_angle
from hicode.media.images import Images
from hicode.motion import Motion
from hicode.preparation.clip import Clip
from hicode.progress import progress_bar
from hicode.provenance import provenance
from hicode.runtime import (
    Device,
    available_memory,
    peak_memory_mb,
    require_memory_for_frames,
    resolve_device,
)
from hicode.speech.speech_model import SpeechModels
from hicode.tracking.head_model import HeadModel
from hicode.training.adaptation import GENERIC, AdaptConfig, example_of, learn_speech_models, load_generic
from hicode.training.adaptation import SCHEMA as SPEECH_SCHEMA
from hicode.training.adaptation import VERSION as SPEECH_VERSION
from hicode.training.film_grain import learn_film_grain
from hicode.training.head import HeadState, deform, train_head
from hicode.training.refiner import CompositorTraining, train_compositor
from hicode.training.stages import DEFAULT_PRESET, HeadConfig, Preset, head_preset

RUN_SCHEMA, RUN_VERSION = "hicode-run", 3
# The pretrained parts that a clip and an avatar are made with: the report of an avatar names them with their hashes.
PARTS = ("face_landmarks", "face_detection", "person_mask", "head_model", "speech_encoder", "perceptual")

# Memory of training without the frames it keeps decoded: of the program, and of each frame's track and speech (measured: 1.3 GB at 8 s, 1.4 GB at 20 s).
TRAINING_BYTES, TRAINING_FRAME_BYTES = 1.3e9, 80e3
POOL_PIXEL_BYTES = 15  # of the compositor's pool: 14 layers and the depth


def train(
    clip: Clip | Path | str,
    out: Path | str,
    preset: Preset = DEFAULT_PRESET,
    *,
    head: HeadConfig | None = None,
    run: Path | str | None = None,
    seed: int = 0,
    compose: bool | None = None,
    device: Device = "auto",
    progress: bool = True,
    speech_weights: Path | str | None = None,
) -> Avatar:
    """Learn an avatar from a clip and write it to `out`.

    `head` overrides the preset's head configuration; `run` is the run's folder (default: `runs/NAME` beside `out`); `compose` says whether the
    compositor (Eqs 17-18) is trained; by default the preset *paper* alone does. A clip without sound trains the renderer alone; its speech models carry the clip's statistics only. `speech_weights`: generic speech
    weights that `hicode pretrain` made, instead of those that ship; in a run that is otherwise the same only speech is learned anew.
    """
    place = resolve_device(device)
    clip = clip if isinstance(clip, Clip) else Clip.open(clip)
    out = Path(out)
    check_writable(out)
    generic = _generic(speech_weights)
    config = head or replace(head_preset(preset), seed=seed)
    _require_memory(clip)
    folder = Path(run) if run else out.parent / "runs" / out.stem
    if config.deformation.coarse == "audio":
        clip.hear()
    description = _open_run(folder, clip, config, preset, seed)
    model = HeadModel.load()
    report = _Report(folder, progress)
    try:
        with report.stage("speech"), progress_bar("Adapting speech", progress) as show:
            speech = learn_speech(
                clip, folder / "speech.safetensors", generic, speech_weights, lambda done: show(round(100 * done), 100)
            )
        with report.stage("head"):
            gaussians, deformation, motion = _head(clip, model, config, folder, report, place)
        with report.stage("compositor"):
            avatar = _assemble(clip, model, gaussians, deformation, motion, speech)
            if preset == "paper" if compose is None else compose:
                avatar.compositor = _compositor(clip, avatar, motion, folder, report, seed, place)
        if preset != "paper":
            with report.stage("film grain"):
                avatar.film_grain = learn_film_grain(avatar, _Samples(clip, avatar, motion), motion)
        avatar.info = {
            "preset": preset,
            "seed": seed,
            "seconds": report.seconds,
            "peak_memory_mb": round(peak_memory_mb()),
            "config": description["config"],
            "speech_weights": speech_weights and sha256_of(speech_weights),
            "provenance": provenance(seed=seed, assets=(*PARTS, *([str(speech_weights)] if speech_weights else []))),
        }
        avatar.save(out)
    finally:
        report.close()
    return avatar


# ---------------------------------------------------------------------------------------------------------------- parts


def _generic(weights: Path | str | None) -> SpeechModels | None:
    """The user's weights; None for those that ship. InputError where they are for another encoder."""
    if weights is None:
        return None
    models, shipped = load_generic(weights), load_generic()
    if models.encoder.name != shipped.encoder.name:
        raise InputError(
            f"{weights} is for the {models.encoder.name} encoder, not for {shipped.encoder.name}. "
            "Make it anew: hicode pretrain."
        )
    return models


def learn_speech(
    clip: Clip,
    file: Path,
    generic: SpeechModels | None = None,
    weights: Path | str | None = None,
    progress: Callable[[float], None] | None = None,
) -> SpeechModels:
    """The subject's speech models: those in `file` where they were made of what the clip holds now and of these weights, else learned and written there.

    `generic` are the models in the file `weights`; None for those that ship.
    """
    generic, config = generic or load_generic(), AdaptConfig()
    encoder = generic.encoder if clip.encoder.name == generic.encoder.name else clip.encoder
    example = example_of(clip, encoder)
    digest = hashlib.sha256(
        json.dumps([asdict(config), sha256_of(weights or GENERIC), encoder.variant], sort_keys=True).encode()
    )
    for tensor in (example.features, example.expression, example.landmarks, example.speaking):
        digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    made_of = digest.hexdigest()[:16]
    if file.exists():
        tensors, header = load_tensors(file, SPEECH_SCHEMA, SPEECH_VERSION)
        if header.get("made_of") == made_of:
            return SpeechModels.from_state(tensors, header)
        print(
            f"{file} was learned from other sound, track or speech weights than these, or by an earlier hicode: speech is learned anew."
        )
    if encoder != generic.encoder and example.speaking.any():
        print(
            f"No generic speech models exist for the {encoder.name} encoder: speech is learned from this clip alone. "
            "Expect less exact lips."
        )
    speech, _ = learn_speech_models(example, encoder, generic, config, progress)
    tensors, header = speech.state()
    save_tensors(file, tensors, SPEECH_SCHEMA, SPEECH_VERSION, header | {"made_of": made_of})
    return speech


def _head(clip: Clip, model: HeadModel, config: HeadConfig, folder: Path, report: "_Report", device: str):
    def preview(iteration: int, state: HeadState) -> None:
        report.image(iteration, "render", _preview_image(clip, state))

    with progress_bar("Training the head", report.visible) as show:

        def log(iteration: int, scalars: dict[str, float]) -> None:
            report.log("head", iteration, config.iterations, scalars)
            show(iteration, config.iterations)

        return train_head(
            clip,
            model,
            replace(config, preload_bytes=_room_for_frames(clip, config.preload_bytes)),
            checkpoint=folder / "head.safetensors",
            log=log,
            preview=preview,
            preview_every=max(250, config.iterations // 10),
            device=device,
        )


def _compositor(
    clip: Clip, avatar: Avatar, motion: Motion, folder: Path, report: "_Report", seed: int, device: str
) -> Compositor:
    """The generator of Eq. 18, trained on renders of the training frames."""
    config = CompositorTraining(seed=seed)
    config = replace(config, renders=_room_for_renders(clip, config.renders))
    return train_compositor(
        _Samples(clip, avatar, motion),
        avatar.background_plate,
        config,
        progress=report.visible,
        checkpoint=folder / "compositor.safetensors",
        log=lambda step, terms: report.log("compositor", step, config.steps, terms),
        device=device,
    )


def _require_memory(clip: Clip) -> None:
    """Raise ResourceError where training would run out of memory, before it begins."""
    frames = len(clip.track)
    require_memory_for_frames(frames, clip.fps, TRAINING_BYTES, TRAINING_FRAME_BYTES, f"Training on {frames} frames")


def _room_for_frames(clip: Clip, wanted: int) -> int:
    """How many bytes of decoded frames may stay in memory: at most half of what is left, so that the rest of the program has room."""
    whole = 4 * len(clip.train) * clip.width * clip.height
    room = int(min(wanted, available_memory() / 2))
    if room < min(whole, wanted):
        print(
            f"{room / 1e6:.0f} MB of memory are to spare for decoded frames, {whole / 1e6:.0f} MB would hold all: "
            "frames that do not fit are read from disk each time, which is slower."
        )
    return room


def _room_for_renders(clip: Clip, wanted: int) -> int:
    """How many renders the compositor may learn from: their pool takes at most half of the memory that is left."""
    each = POOL_PIXEL_BYTES * clip.width * clip.height
    room = int(max(8, min(wanted, available_memory() / 2 // each)))
    if room < wanted:
        print(
            f"The compositor learns from {room} renders instead of {wanted}: {each * wanted / 1e6:.0f} MB of memory are not to spare."
        )
    return room


class _Samples:
    """What the compositor learns from: renders of training frames beside the frames themselves, perturbed where a seed is given.

    A trained head knows its training frames by heart; on frames it has not seen its render sits a px or two off. The perturbation moves pose,
    expression and landmarks about as much as tracking errs, so the compositor meets the renders that it will have to mend.
    """

    def __init__(self, clip: Clip, avatar: Avatar, motion: Motion):
        """`motion` of the training part, as `train_head` found it."""
        self.clip, self.avatar, self.motion = clip, avatar, motion

    def __len__(self) -> int:
        return len(self.motion)

    def __call__(self, k: int, perturbation: int | None = None):
        """(rgb "h w 3", alpha "h w", frame uint8, head mask uint8) of the k-th frame."""
        t = self.clip.train[k]
        motion = self.motion[k : k + 1]
        if perturbation is not None:
            rng = np.random.default_rng((perturbation, t))
            noise = lambda scale, *shape: torch.from_numpy(rng.normal(0, scale, shape).astype(np.float32))
            turn = rigid(
                rotation_from_axis_angle(noise(0.006, 3)), noise(0.004, 3)
            )  # 0.35°, 0.4 mm a standard deviation
            motion = replace(
                motion,
                expression=motion.expression + noise(0.03, 1, 64),
                landmarks=motion.landmarks + noise(0.004, 1, 1, 3) + noise(0.003, 1, 478, 3),
                T_camera_head=motion.T_camera_head @ turn,
            )
        rendering = self.avatar.render(motion[0], motion.T_camera_head[0])
        return rendering.rgb, rendering.alpha, self.clip.image(t), self.clip.head_mask(t)


def _source(clip: Clip) -> dict:
    """Where the clip came from: what output at the original size needs to find its frames again."""
    place = {"path": str(clip.video), "first_frame": clip.first_frame, "crop_box": list(clip.crop_box)}
    return clip.source | place


def _assemble(
    clip: Clip, model: HeadModel, gaussians: Gaussians, deformation: Deformation, motion: Motion, speech
) -> Avatar:
    """`motion`: the training part's, refined."""
    frames = list(clip.train)
    faces = (with_whole_face(clip.head_mask(t), clip.track.landmarks_px[t].numpy()) for t in frames)
    plate = estimate_background((clip.image(t) for t in frames), faces)
    kept = frames[:MAX_DRIVING_FRAMES]
    return Avatar(
        gaussians,
        deformation.eval(),
        clip.track.camera.with_pose(torch.eye(4)),
        motion[: len(kept)],
        Images.encode((clip.image(t) for t in kept), ".jpg"),
        Images.encode((clip.head_mask(t) for t in kept), ".png"),
        plate,
        model.mouth_expression.clone(),
        model.mouth_landmark_weight.clone(),
        speech=speech,
        source=_source(clip),
    )


@torch.no_grad()
def _preview_image(clip: Clip, state: HeadState) -> np.ndarray:
    """Truth and render of three training frames, side by side, for TensorBoard."""
    from hicode.render import rasterize

    rows = []
    for t in np.linspace(clip.train[0], clip.train[-1], 3).astype(int):
        moved = deform(
            state.gaussians(),
            state.deformation,
            clip.track.motion,
            int(t),
            learned=state.deformation.anchors is not None,
        )
        rendering = rasterize(moved, clip.track.camera_at(int(t)), torch.full((3,), 0.5))
        rows.append(np.hstack([clip.image(int(t)), (rendering.rgb.clamp(0, 1) * 255).byte().cpu().numpy()]))
    return np.vstack(rows)


# ---------------------------------------------------------------------------------------------------------------- the run's folder


def _open_run(folder: Path, clip: Clip, config: HeadConfig, preset: Preset, seed: int) -> dict:
    """Write what the run is, or find that it is the same as the one in the folder; another run's folder is set aside, never mixed.

    The run's identity is that of head and compositor: speech says itself what it was learned from (`learn_speech`).
    """
    what = {"preset": preset, "seed": seed, "config": json.loads(json.dumps(asdict(config)))}
    description = {"schema": RUN_SCHEMA, "version": RUN_VERSION, "pictures": _pictures(clip)} | what
    file = folder / "config.json"
    if file.exists():
        old = _read_run(file)
        if old == description:
            return description
        aside = _free_name(f"{folder}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"{folder} held another run ({_difference(old, description)}); it is now {aside}.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, description)
    write_json(folder / "environment.json", provenance())
    return description


def _free_name(wanted: str) -> Path:
    """Nothing is called so yet: two runs may be set aside in one second."""
    names = chain([wanted], (f"{wanted}-{i}" for i in count(2)))
    return next(path for path in map(Path, names) if not path.exists())


def _read_run(file: Path) -> dict:
    try:
        old = read_json(file)
    except FileFormatError:
        return {}
    return old if isinstance(old, dict) and old.get("schema") == RUN_SCHEMA else {}


def _difference(old: dict, new: dict) -> str:
    """Why the old run is not the new one, for the terminal."""
    if not old:
        return "its config.json does not say which"
    if old.get("version") != new["version"]:
        return "made by another hicode from this clip as it was then, or from another"
    names = {
        "preset": "preset",
        "seed": "seed",
        "config": "configuration",
        "pictures": "pictures, masks, split, track or depth",
    }
    return "other " + ", ".join(name for key, name in names.items() if old.get(key) != new[key])


def _pictures(clip: Clip) -> str:
    """Changes with whatever head and compositor read of a clip, and with nothing else: its training frames and head masks, track and depth; of the
    sound nothing, but where its features move the head directly (`Clip.hear`)."""
    digest = hashlib.sha256(json.dumps([clip.width, clip.height, clip.train.start, clip.train.stop]).encode())
    pictures = [clip.path / kind / f"{t:06d}.png" for kind in ("frames", "masks/head") for t in clip.train]
    for file in (clip.path / "track.safetensors", clip.path / "depth.safetensors", *pictures):
        try:
            digest.update(bytes.fromhex(sha256_of(file)))
        except OSError as error:
            raise FileFormatError(
                f"{file} is missing or damaged ({error.strerror}). Run hicode prepare again."
            ) from error
    if clip.track.motion.speech is not None:
        digest.update(clip.track.motion.speech.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Report:
    """metrics.jsonl, TensorBoard, and seconds per stage."""

    LOG_EVERY = 25

    def __init__(self, folder: Path, visible: bool):
        from torch.utils.tensorboard import SummaryWriter

        self.visible = visible
        self.seconds: dict[str, float] = {}
        self._lines = open(folder / "metrics.jsonl", "a", buffering=1)
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    @contextmanager
    def stage(self, name: str):
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 1)

    def log(self, part: str, iteration: int, total: int, scalars: dict[str, float]) -> None:
        if iteration % self.LOG_EVERY and iteration != total:
            return
        self._lines.write(
            json.dumps({"part": part, "iteration": iteration, "time": round(time.time(), 2)} | scalars) + "\n"
        )
        for name, value in scalars.items():
            self._writer.add_scalar(f"{part}/{name}", value, iteration)

    def image(self, iteration: int, name: str, image: np.ndarray) -> None:
        self._writer.add_image(name, image, iteration, dataformats="HWC")

    def close(self) -> None:
        self._lines.close()
        self._writer.close()
