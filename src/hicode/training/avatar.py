"""Training of an avatar from a prepared clip: speech models, head and refiner, each on its own, then one file.

A run has a folder (`run_folder`) with a result or checkpoint per part. Training again into the same folder continues:
the head stays valid while the pictures, track and configuration are the same; the speech models stay valid while sound,
track and speech weights are.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from jaxtyping import UInt8

from hicode.avatar.avatar import MAX_DRIVING_FRAMES, Avatar
from hicode.avatar.blend import estimate_background, with_whole_face
from hicode.errors import InputError
from hicode.files import check_writable, in_use, load_tensors, save_tensors, sha256_of
from hicode.media.images import Images
from hicode.preparation.clip import Clip
from hicode.progress import Report, progress_bar
from hicode.provenance import plain, provenance
from hicode.render import rasterize
from hicode.runtime import Device, available_memory, forecast, peak_memory_mb, require_memory_for_frames, resolve_device
from hicode.speech.speech_model import SpeechModels
from hicode.tracking.head_model import HeadModel
from hicode.training.adaptation import GENERIC, AdaptConfig, example_of, learn_speech_models, load_generic
from hicode.training.adaptation import SCHEMA as SPEECH_SCHEMA
from hicode.training.adaptation import VERSION as SPEECH_VERSION
from hicode.training.calibration import calibrate_rendering
from hicode.training.checkpoint import HeadState
from hicode.training.film_grain import learn_film_grain
from hicode.training.frames import learned_frames, rendered_frame
from hicode.training.head import TrainedHead, deform, train_head
from hicode.training.refiner import RefinerTraining, train_refiner
from hicode.training.run_folder import RunLog, open_run
from hicode.training.stages import DEFAULT_PRESET, HeadConfig, Preset, head_preset
from hicode.trust.consent import consent_record

# The pretrained parts of a clip and an avatar. Provenance records their hashes.
PARTS = ("face_landmarks", "face_detection", "person_mask", "head_model", "speech_encoder", "perceptual")

# Memory of training without decoded frames: of the program, and of each frame's track and speech features.
TRAINING_BYTES, TRAINING_FRAME_BYTES = 1.3e9, 80e3
# Time of training on one core: of an iteration, and where the control is evaluated on every Gaussian; of all else.
_CORE_S_AN_ITERATION, _CORE_S_WITHOUT_ANCHORS, _CORE_S = 0.125, 0.45, 15.0
FIRST_LOOK_S = 60.0  # of training the head, after which a coarse avatar is written
PREVIEWS = 10  # images of the head during training, for TensorBoard


@dataclass(frozen=True)
class TrainConfig:
    """How an avatar is made from a clip."""

    preset: Preset = DEFAULT_PRESET
    """draft: a first result in minutes. standard: about twice as long. paper: the paper's method, many hours."""
    seed: int = 0  # Of everything random.
    head: HeadConfig | None = None  # Training of the head, instead of the preset's. `seed` above replaces its seed.
    refiner: bool | None = None  # Train the refiner (Eqs 17-18). Default: only with the preset paper.
    refiner_training: RefinerTraining = field(default_factory=RefinerTraining)
    """Training of the refiner. `seed` above replaces its seed."""
    device: Device = "auto"  # auto is the CPU; cuda needs gsplat.
    run: Path | None = None  # Folder of checkpoints and logs. Default: runs/NAME next to the avatar.
    speech_weights: Path | None = None  # Generic speech weights of `hicode pretrain`, instead of those that ship.
    consent: str | None = None  # Who says that the person agreed: a name or a statement. It is signed into the avatar.
    progress: Annotated[bool, tyro.conf.Suppress] = True  # Show progress on standard error.

    def head_config(self) -> HeadConfig:
        """The head's configuration that is used: `head` or the preset's, with `seed`."""
        return replace(self.head or head_preset(self.preset), seed=self.seed)

    def refiner_config(self) -> RefinerTraining | None:
        """The refiner's configuration that is used; None: no refiner."""
        wanted = self.preset == "paper" if self.refiner is None else self.refiner
        return replace(self.refiner_training, seed=self.seed) if wanted else None


def train(clip: Clip | Path | str, out: Path | str, config: TrainConfig = TrainConfig()) -> Avatar:
    """Train an avatar and write it to `out`.

    A coarse avatar that talks already is written there after a minute, and what there is when training is interrupted:
    their `info["iterations"]` says how far they are. Continues an interrupted run of the same clip and configuration.
    If the clip has no sound, the speech models only have its statistics.
    """
    device = resolve_device(config.device)
    clip, out = clip if isinstance(clip, Clip) else Clip.open(clip), Path(out)
    check_writable(out)
    consent = consent_record(config.consent, str(clip.source.get("sha256", "")))
    _generic_speech(config.speech_weights)  # wrong weights are refused before the long work
    frames = len(clip.track)
    require_memory_for_frames(frames, clip.fps, TRAINING_BYTES, TRAINING_FRAME_BYTES, f"Training on {frames} frames")
    head, refiner = config.head_config(), config.refiner_config()
    if config.progress:
        print(training_forecast(head, frames), file=sys.stderr)
    if head.deformation.control == "speech":
        clip.hear()
    folder = config.run or out.parent / "runs" / out.stem
    settings = {"preset": config.preset, "seed": config.seed, "config": plain(head)}
    model = HeadModel.load()
    with in_use(folder):
        open_run(folder, clip, settings)
    with in_use(folder), RunLog(folder) as log:
        with log.timed("speech"), progress_bar("Adapting speech", config.progress) as report:
            speech = learn_speech(clip, folder / "speech.safetensors", config.speech_weights, report)
        with log.timed("head"), progress_bar("Training the head", config.progress) as report:
            look = partial(_first_look, clip, model, speech, out, settings | {"consent": consent.to_dict()}, config)
            trained = _train_head(clip, head, folder, log, report, device, look)
        with log.timed("assembly"):
            avatar = assemble(clip, model, trained, speech)
            avatar.speech = calibrated(avatar, clip)
        learned = learned_frames(clip)
        render = lambda i: rendered_frame(avatar, clip, trained.motion, learned[i])
        if refiner is not None:
            with log.timed("refiner"), progress_bar("Training the refiner", config.progress) as report:

                def log_refiner(step: int, terms: dict[str, float]) -> None:
                    log.scalars("refiner", step, refiner.steps, terms)
                    report(step, refiner.steps)

                checkpoint = folder / "refiner.safetensors"
                avatar.compositor = train_refiner(
                    render, len(learned), avatar.background_plate, refiner, checkpoint, log_refiner, device
                )
        if config.preset != "paper":
            with log.timed("film grain"):
                avatar.film_grain = learn_film_grain(render, len(learned), avatar.background_plate, avatar.compositor)
        own = [] if config.speech_weights is None else [str(config.speech_weights)]
        avatar.info = settings | {
            "consent": consent.to_dict(),
            "seconds": log.seconds,
            "peak_memory_mb": round(peak_memory_mb()),
            "speech_weights": sha256_of(own[0]) if own else None,
            "provenance": provenance(seed=config.seed, assets=(*PARTS, *own)),
        }
    avatar.save(out)
    return avatar


def training_forecast(head: HeadConfig, frames: int) -> str:
    """What training on so many frames will take here, without a refiner; said before it starts."""
    each = _CORE_S_AN_ITERATION if head.deformation.anchors else _CORE_S_WITHOUT_ANCHORS
    need_bytes = TRAINING_BYTES + frames * TRAINING_FRAME_BYTES
    return forecast(f"Training of {head.iterations:,} iterations", _CORE_S + head.iterations * each, need_bytes)


def _generic_speech(weights: Path | None) -> SpeechModels:
    """Generic speech models: the user's, or those that ship. Raises InputError if their encoder is another."""
    shipped = load_generic()
    if weights is None:
        return shipped
    models = load_generic(weights)
    if models.encoder.name != shipped.encoder.name:
        raise InputError(
            f"{weights} is for the {models.encoder.name} encoder, not for {shipped.encoder.name}. "
            "Make it anew: hicode pretrain."
        )
    return models


def learn_speech(clip: Clip, file: Path, weights: Path | None = None, report: Report | None = None) -> SpeechModels:
    """The clip's speech models: read from `file` if it was made from the same inputs, else adapted and written there.

    `weights`: generic speech weights; None: those that ship.
    """
    generic, config = _generic_speech(weights), AdaptConfig()
    encoder = generic.encoder if clip.encoder.name == generic.encoder.name else clip.encoder
    example = example_of(clip, encoder)
    settings = [asdict(config), sha256_of(weights or GENERIC), encoder.variant]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in (example.features, example.expression, example.landmarks, example.speaking):
        digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    made_of = digest.hexdigest()[:16]
    if file.exists():
        tensors, header = load_tensors(file, SPEECH_SCHEMA, SPEECH_VERSION)
        if header.get("made_of") == made_of:
            return SpeechModels.from_state(tensors, header)
        print(f"{file} was made from other sound, track or speech weights. Speech is adapted again.")
    if encoder != generic.encoder and example.speaking.any():
        print(
            f"No generic speech models exist for the {encoder.name} encoder: speech is learned from this clip alone. "
            "Expect less exact lips."
        )
    progress = None if report is None else lambda done: report(round(100 * done), 100)
    speech, _ = learn_speech_models(example, encoder, generic, config, progress)
    tensors, header = speech.state()
    save_tensors(file, tensors, SPEECH_SCHEMA, SPEECH_VERSION, header | {"made_of": made_of})
    return speech


def _first_look(
    clip: Clip, model: HeadModel, speech: SpeechModels, out: Path, info: dict, config: TrainConfig, state: HeadState
) -> None:
    """Write the head as it is, without refiner and film grain."""
    avatar = assemble(clip, model, TrainedHead.of(state, clip, goes_on=True), speech)
    avatar.info = info | {"iterations": state.iteration, "provenance": provenance(seed=config.seed, assets=PARTS)}
    avatar.save(out)
    if config.progress:
        print(f"A first look, coarse: {out} talks already.", file=sys.stderr)


def calibrated(avatar: Avatar, clip: Clip) -> SpeechModels | None:
    """The avatar's speech models with the opening of the mouth matched in its own pictures."""
    speech = avatar.speech
    if speech is None or speech.calibration is None:
        return speech
    return replace(speech, calibration=calibrate_rendering(avatar, clip, example_of(clip, speech.encoder)))


def _train_head(
    clip: Clip,
    config: HeadConfig,
    folder: Path,
    log: RunLog,
    report: Report,
    device: str,
    look: Callable[[HeadState], None],
) -> TrainedHead:
    """Train; `look` is called once after a minute, and when training is interrupted."""
    preview_every, model = max(250, config.iterations // PREVIEWS), HeadModel.load()
    started, looked, latest = time.monotonic(), False, None

    def show(state: HeadState, scalars: dict[str, float]) -> None:
        nonlocal looked, latest
        if config.stage_at(min(state.iteration, config.iterations - 1))[0].deform:
            latest = state
        if latest and not looked and time.monotonic() - started > FIRST_LOOK_S:
            look(state)
            looked = True
        log.scalars("head", state.iteration, config.iterations, scalars)
        report(state.iteration, config.iterations)
        if state.iteration % preview_every == 0 or state.iteration == config.iterations:
            log.image("render", state.iteration, preview_image(clip, state))

    config = replace(config, preload_bytes=affordable_preload(clip, config.preload_bytes))
    try:
        return train_head(clip, model, config, folder / "head.safetensors", show, device=device)
    except KeyboardInterrupt:
        if latest:
            look(latest)
        raise


def affordable_preload(clip: Clip, budget_bytes: int) -> int:
    """Memory for decoded frames: the budget, or half of the free memory if that is less. Says so if not all fit."""
    all_bytes = 4 * len(clip.train) * clip.width * clip.height
    preload = int(min(budget_bytes, available_memory() / 2))
    if preload < min(all_bytes, budget_bytes):
        print(
            f"{preload / 1e6:.0f} MB of memory are free for decoded frames; all need {all_bytes / 1e6:.0f} MB. "
            "The others are read from disk each time, which is slower."
        )
    return preload


def assemble(clip: Clip, model: HeadModel, head: TrainedHead, speech: SpeechModels) -> Avatar:
    """An avatar without refiner and film grain: the head, and the clip's training part as background and driving."""
    frames = learned_frames(clip)
    faces = (with_whole_face(clip.head_mask(t), clip.track.landmarks_px[t].numpy()) for t in frames)
    plate = estimate_background((clip.image(t) for t in frames), faces)
    kept = clip.driving[:MAX_DRIVING_FRAMES]
    first = kept.start - clip.train.start
    source = {"path": str(clip.video), "first_frame": clip.first_frame + kept.start, "crop_box": list(clip.crop_box)}
    return Avatar(
        head.gaussians,
        head.deformation.eval(),
        clip.track.camera.with_pose(torch.eye(4)),
        head.motion[first : first + len(kept)],
        Images.encode((clip.image(t) for t in kept), ".jpg"),
        Images.encode((clip.head_mask(t) for t in kept), ".png"),
        plate,
        model.mouth_expression.clone(),
        model.mouth_landmark_weight.clone(),
        speech=speech,
        source=clip.source | source,
    )


@torch.no_grad()
def preview_image(clip: Clip, state: HeadState) -> UInt8[np.ndarray, "h w 3"]:
    """Target and rendering of three training frames, side by side."""
    learned, rows = state.deformation.anchors is not None, []
    for t in (int(t) for t in np.linspace(clip.train[0], clip.train[-1], 3)):
        deformed = deform(state.gaussians(), state.deformation, clip.track.motion, t, learned)
        rendering = rasterize(deformed, clip.track.camera_at(t), torch.full((3,), 0.5))
        rows.append(np.hstack([clip.image(t), (rendering.rgb.clamp(0, 1) * 255).byte().cpu().numpy()]))
    return np.vstack(rows)
