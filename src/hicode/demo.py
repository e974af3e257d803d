"""The commands in sequence: `make` for a user's own video and speech, `demo` for a sample that comes from a package
registry.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from hicode.audio import SAMPLE_RATE_HZ
from hicode.errors import OutputError
from hicode.preparation.pipeline import PrepareConfig, prepare
from hicode.runtime import Device

DEMO_SECONDS = 12.0
DEMO_SPEECH_SECONDS = 10.0


def make(
    video: Path | str,
    audio: Path | str,
    out: Path | str,
    preset: str = "draft",
    work: Path | str | None = None,
    config: PrepareConfig = PrepareConfig(),
    device: Device = "auto",
    progress: bool = True,
    speech_weights: Path | str | None = None,
) -> Path:
    """prepare + train + speak. Clip, avatar and run stay in `work` (default: OUT.work), so a stopped or repeated call
    does only what is missing; with other `speech_weights` (see `train`) speech alone is learned anew.

    What can be wrong with video, audio and places is found before the long work: InputError, OutputError.
    """
    from hicode.avatar.avatar import Avatar
    from hicode.files import check_writable, sha256_of
    from hicode.media.audio import read_speech
    from hicode.runtime import resolve_device
    from hicode.session.speak import speak
    from hicode.training.adaptation import load_generic
    from hicode.training.avatar import TrainConfig, train

    out = Path(out)
    if out.suffix.lower() not in (".mp4", ".m4v", ".mov"):
        raise OutputError(
            f"{out} does not end in .mp4, .m4v or .mov, the kinds of video written here. Choose such a name with -o."
        )
    check_writable(out)
    resolve_device(device)
    read_speech(audio)
    wanted = None
    if speech_weights is not None:
        load_generic(speech_weights)  # damaged weights are found before the long work
        wanted = sha256_of(speech_weights)
    work = Path(work) if work else out.with_suffix(".work")
    name = Path(video).stem
    clip = prepare(video, work / f"{name}.clip", config, progress)
    stored = work / f"{name}.{preset}.hicode"
    avatar = None
    if stored.exists() and stored.stat().st_mtime >= (clip.path / "clip.json").stat().st_mtime:
        avatar = Avatar.load(stored)
    if avatar is None or avatar.info.get("speech_weights") != wanted:
        weights = None if speech_weights is None else Path(speech_weights)
        settings = TrainConfig(preset, device=device, progress=progress, speech_weights=weights)
        avatar = train(clip, stored, settings)
    print(speak(avatar, audio, out, device=device, progress=progress))
    return out


def demo(
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("hicode-demo"),
    seconds: float = DEMO_SECONDS,
    device: Device = "auto",
) -> None:
    """From nothing to a talking head: fetches the Talking Face Video and a recording of speech, learns a draft avatar,
    makes it speak, measures it.

    Takes a few minutes on two processor cores. A stopped demo goes on where it was when the same command is given
    again.

    Args:
        out: Folder for everything that is made.
        seconds: How much of the video to learn from.
        device: cpu, or cuda for an NVIDIA GPU with gsplat; auto is the CPU.
    """
    from hicode import assets
    from hicode.evaluation.report import evaluate
    from hicode.media.audio import read_speech, write_audio

    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; the demo needs a folder. Choose another name with -o.")
    video = assets.path("demo_video", "franck.mp4")
    speech = out / "speech.wav"
    if not speech.exists():
        write_audio(
            speech,
            excerpt(read_speech(assets.path("demo_speech", "two_cities.wav")), DEMO_SPEECH_SECONDS),
            SAMPLE_RATE_HZ,
        )
    spoken, page = out / "talking.mp4", out / "report.html"
    make(video, speech, spoken, "draft", out, PrepareConfig(duration=seconds), device)
    evaluate(out / "franck.draft.hicode", out / "franck.clip", html=page, json=out / "report.json", device=device)
    print(f"\nThe talking video: {spoken}\nThe report:        {page}")


def excerpt(samples: np.ndarray, seconds: float, rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """The beginning, ending in the quietest 200 ms within a second of `seconds`, so that no word is cut."""
    window = rate_hz // 5
    low, high = round((seconds - 1) * rate_hz), round((seconds + 1) * rate_hz)
    if len(samples) <= high:
        return samples
    power = np.convolve(samples[low : high + window].astype(np.float64) ** 2, np.ones(window), mode="valid")
    return samples[: low + int(power.argmin()) + window // 2]
