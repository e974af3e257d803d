"""The commands in sequence: `make` for a user's own video and speech, `demo` for a sample from a package registry."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from hicode import assets
from hicode.audio import SAMPLE_RATE_HZ
from hicode.errors import OutputError
from hicode.files import sha256_of
from hicode.media.audio import read_speech, write_audio
from hicode.preparation.pipeline import PrepareConfig, prepare
from hicode.runtime import Device, resolve_device
from hicode.training.stages import DEFAULT_PRESET, Preset

DEMO_SECONDS = 12.0
DEMO_SPEECH_SECONDS = 10.0


@dataclass(frozen=True)
class MakeConfig:
    """How an avatar is made, and where what is made on the way stays."""

    preset: Preset = DEFAULT_PRESET
    """draft (a first look in minutes), standard, paper (the paper's schedule)."""
    work: Path | None = None
    """Folder for clip, avatar and run, which are kept; OUT.work next to the video if not given."""
    speech_weights: Path | None = None
    """What `hicode pretrain` made, instead of the weights that ship."""
    device: Device = "auto"
    """Where to train and render: cpu, or cuda for an NVIDIA GPU with gsplat; auto is the CPU."""


def make(
    video: Path | str,
    audio: Path | str,
    out: Path | str,
    config: MakeConfig = MakeConfig(),
    prepare_config: PrepareConfig = PrepareConfig(),
    progress: bool = True,
) -> Path:
    """prepare + train + speak. A stopped or repeated call does only what is missing.

    With other speech weights, speech alone is learned anew. What can be wrong with video, audio and places is noticed
    before the long work. Raises InputError, OutputError.
    """
    from hicode.avatar.avatar import Avatar
    from hicode.session.speak import check_video_path, speak
    from hicode.training.adaptation import load_generic
    from hicode.training.avatar import TrainConfig, train

    out = Path(out)
    check_video_path(out, audio, video)
    resolve_device(config.device)
    read_speech(audio)
    weights = None
    if config.speech_weights is not None:
        load_generic(config.speech_weights)
        weights = sha256_of(config.speech_weights)
    work = config.work or out.with_suffix(".work")
    name = Path(video).stem
    clip = prepare(video, work / f"{name}.clip", prepare_config, progress)
    stored = work / f"{name}.{config.preset}.hicode"
    avatar = None
    if stored.exists() and stored.stat().st_mtime >= (clip.path / "clip.json").stat().st_mtime:
        avatar = Avatar.load(stored)
    if avatar is None or avatar.info.get("speech_weights") != weights:
        settings = TrainConfig(
            config.preset, device=config.device, progress=progress, speech_weights=config.speech_weights
        )
        avatar = train(clip, stored, settings)
    print(speak(avatar, audio, out, device=config.device, progress=progress))
    return out


def demo(
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("hicode-demo"),
    seconds: float = DEMO_SECONDS,
    device: Device = "auto",
) -> None:
    """From nothing to a talking head: fetch a sample video and speech, learn a draft avatar, make it speak, measure it.

    Takes a few minutes on two processor cores. A stopped demo goes on where it was when the same command is given
    again.

    Args:
        out: Folder for everything that is made.
        seconds: How much of the video to learn from.
        device: cpu, or cuda for an NVIDIA GPU with gsplat; auto is the CPU.
    """
    from hicode.evaluation.config import EvaluateConfig
    from hicode.evaluation.report import evaluate

    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; the demo needs a folder. Choose another name with -o.")
    video = assets.path("demo_video", "franck.mp4")
    speech = out / "speech.wav"
    if not speech.exists():
        samples = read_speech(assets.path("demo_speech", "two_cities.wav"))
        write_audio(speech, excerpt(samples, DEMO_SPEECH_SECONDS), SAMPLE_RATE_HZ)
    spoken, page = out / "talking.mp4", out / "report.html"
    make(video, speech, spoken, MakeConfig("draft", out, device=device), PrepareConfig(duration=seconds))
    config = EvaluateConfig(json=out / "report.json", html=page, device=device)
    evaluate(out / "franck.draft.hicode", out / "franck.clip", config)
    print(f"\nThe talking video: {spoken}\nThe report:        {page}")


def excerpt(samples: np.ndarray, seconds: float, rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """The beginning, ending in the quietest 200 ms within a second of `seconds`, so that no word is cut."""
    window = rate_hz // 5
    low, high = round((seconds - 1) * rate_hz), round((seconds + 1) * rate_hz)
    if len(samples) <= high:
        return samples
    power = np.convolve(samples[low : high + window].astype(np.float64) ** 2, np.ones(window), mode="valid")
    return samples[: low + int(power.argmin()) + window // 2]
