"""The commands in sequence: `make` for a user's video and speech, `demo` for a sample from a package registry."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from hicode import assets
from hicode.audio import SAMPLE_RATE_HZ
from hicode.avatar.avatar import Avatar
from hicode.errors import OutputError
from hicode.evaluation.config import EvaluateConfig
from hicode.evaluation.report import evaluate
from hicode.files import sha256_of
from hicode.media.audio import read_speech, write_audio
from hicode.media.source import as_file
from hicode.preparation.clip import Clip
from hicode.preparation.pipeline import PrepareConfig, prepare
from hicode.provenance import plain
from hicode.runtime import Device, resolve_device
from hicode.session.config import SpeakConfig
from hicode.session.speak import check_video_path, speak
from hicode.training.adaptation import load_generic
from hicode.training.avatar import TrainConfig, train
from hicode.trust.consent import consent_record

# A stretch in which the person speaks with a steady head. A head that has never seen an open mouth mumbles.
DEMO_START_S, DEMO_SECONDS = 144.0, 12.0
DEMO_SPEECH_SECONDS = 10.0


@dataclass(frozen=True)
class MakeConfig:
    """The whole way from a video to a video that speaks: the root of the config tree."""

    work: Path | None = None  # Folder for clip, avatar and run, which are kept. Default: OUT.work next to the video.
    prepare: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    speak: SpeakConfig = field(default_factory=SpeakConfig)


def make(
    video: Path | str, audio: Path | str, out: Path | str, config: MakeConfig = MakeConfig(), progress: bool = True
) -> Path:
    """Prepare, train and speak. A stopped or repeated call does only what is missing.

    Raises InputError or OutputError before the long work if video, audio or a place cannot be used.
    """
    check_video_path(Path(out), video, audio)
    with as_file(video) as video_file, as_file(audio) as audio_file:
        return _make(video_file, audio_file, Path(out), config, progress)


def _make(video: Path, audio: Path, out: Path, config: MakeConfig, progress: bool) -> Path:
    training = replace(config.train, progress=progress)
    resolve_device(training.device)
    read_speech(audio)
    if training.speech_weights is not None:
        load_generic(training.speech_weights)
    work = config.work or out.with_suffix(".work")
    name = video.stem
    clip = prepare(video, work / f"{name}.clip", config.prepare, progress)
    file = work / f"{name}.{training.preset}.hicode"
    avatar = Avatar.load(file) if file.exists() else None
    if avatar is None or not _is_made_of(avatar, file, clip, training):
        avatar = train(clip, file, training)
    elif training.consent is not None:
        avatar.info["consent"] = consent_record(training.consent, str(avatar.source.get("sha256", ""))).to_dict()
        avatar.save(file)
    print(speak(avatar, audio, out, config.speak, device=training.device, progress=progress))
    return out


def _is_made_of(avatar: Avatar, file: Path, clip: Clip, config: TrainConfig) -> bool:
    """Whether the avatar was trained on this clip with this config."""
    is_newer = file.stat().st_mtime >= (clip.path / "clip.json").stat().st_mtime
    weights = None if config.speech_weights is None else sha256_of(config.speech_weights)
    head = plain(config.head_config())
    made_of = avatar.info.get("config"), avatar.info.get("speech_weights")
    return is_newer and "iterations" not in avatar.info and made_of == (head, weights)


def demo(
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("hicode-demo"),
    seconds: float = DEMO_SECONDS,
    device: Device = "auto",
) -> None:
    """From nothing to a talking head: fetch a video and a recording of speech, learn a draft avatar,
    make it speak, measure it.

    Takes a few minutes on two processor cores. A stopped demo goes on where it was when the same command is given
    again.

    Args:
        out: Folder for everything that is made.
        seconds: How much of the video to learn from.
        device: cpu, or cuda for an NVIDIA GPU with gsplat; auto is the CPU.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; the demo needs a folder. Choose another name with -o.")
    video = assets.path("demo_video", "franck.mp4")
    speech = out / "speech.wav"
    if not speech.exists():
        samples = read_speech(assets.path("demo_speech", "two_cities.wav"))
        write_audio(speech, excerpt(samples, DEMO_SPEECH_SECONDS), SAMPLE_RATE_HZ)
    spoken, page = out / "talking.mp4", out / "report.html"
    stretch, training = PrepareConfig(start=DEMO_START_S, duration=seconds), TrainConfig("draft", device=device)
    make(video, speech, spoken, MakeConfig(out, stretch, training))
    report = EvaluateConfig(json=out / "report.json", html=page, device=device)
    evaluate(out / "franck.draft.hicode", out / "franck.clip", report)
    print(f"\nThe talking video: {spoken}\nThe report:        {page}")


def excerpt(samples: np.ndarray, seconds: float, rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """The beginning, ending in the quietest 200 ms within a second of `seconds`, so that no word is cut."""
    window = rate_hz // 5
    low, high = round((seconds - 1) * rate_hz), round((seconds + 1) * rate_hz)
    if len(samples) <= high:
        return samples
    power = np.convolve(samples[low : high + window].astype(np.float64) ** 2, np.ones(window), mode="valid")
    return samples[: low + int(power.argmin()) + window // 2]
