"""The command line. Each command is a function. Its options are the function's parameters and the fields of its
configs.

Exit status: 0 done; 2 something the user can mend, said in one line on standard error; 130 interrupted. A traceback is
a defect of hicode. Only the modules of the chosen command are imported, so `hicode --help` is instant.
"""

import difflib
import errno
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from hicode import __version__
from hicode.arguments import option, parse
from hicode.errors import HicodeError, InputError
from hicode.runtime import Device, share_cores, tune_allocator

Out = Annotated[Path, tyro.conf.arg(aliases=("-o",))]
Video = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="VIDEO")]]
Audio = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="AUDIO")]]
ClipFolder = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CLIP")]]
AvatarFile = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="AVATAR")]]
MaybeAvatar = tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="AVATAR")]]
MaybeClip = tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="CLIP")]]
NoPrefix = tyro.conf.arg(name="")
Preset = Literal["draft", "standard", "paper"]
EXIT_USER, EXIT_INTERRUPTED = 2, 130


def _demo(argv: list[str]) -> Callable:
    from hicode.demo import demo

    return demo


def _prepare(argv: list[str]) -> Callable:
    from hicode.preparation.pipeline import PrepareConfig, prepare

    def run(video: Video, out: Out, config: Annotated[PrepareConfig, NoPrefix] = PrepareConfig()) -> None:
        """Make a clip from a video: frames, landmarks, head track, masks, speech features, and a capture report.

        A run that was stopped goes on where it was when the same command is given again.

        Args:
            video: Someone speaking, filmed from the front: at least 2 s, better a minute.
            out: Folder of the clip.
        """
        clip = prepare(video, out, config)
        avatar = clip.path.with_suffix(".hicode")
        print(f"{clip.path}: {clip.frame_count} frames. Next: hicode train {clip.path} -o {avatar}")

    return run


def _train(argv: list[str]) -> Callable:
    from hicode.training.avatar import TrainConfig, train
    from hicode.training.stages import head_preset

    preset = _preset(argv)
    default = TrainConfig(preset=preset, head=head_preset(preset))

    def run(
        clip: ClipFolder,
        out: Out,
        config: Annotated[TrainConfig, NoPrefix, tyro.conf.AvoidSubcommands] = default,
    ) -> None:
        """Learn an avatar from a clip.

        A run that was stopped goes on from its last checkpoint when the same command is given again.

        Args:
            clip: What `hicode prepare` made.
            out: The avatar, one file; the usual ending is .hicode.
        """
        train(clip, out, config)
        print(f"{out}. Next: hicode speak {out} AUDIO -o speech.mp4")

    return run


def _preset(argv: list[str]) -> Preset:
    """The chosen preset, whose values are the defaults of the other options."""
    from hicode.training.stages import DEFAULT_PRESET

    name = option(argv, "--preset")
    return name if name in get_args(Preset) else DEFAULT_PRESET  # the parser refuses a wrong name


def _speak(argv: list[str]) -> Callable:
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
        _check_device(device)
        print(speak(avatar, audio, out, config, video, device))

    return run


def _make(argv: list[str]) -> Callable:
    from hicode.demo import MakeConfig, make
    from hicode.preparation.pipeline import PrepareConfig

    def run(
        video: Video,
        audio: Audio,
        out: Out,
        config: Annotated[MakeConfig, NoPrefix] = MakeConfig(),
        prepare: Annotated[PrepareConfig, NoPrefix] = PrepareConfig(),
    ) -> None:
        """Prepare, train and speak in one go: from a video of someone and any speech to a video of them speaking it.

        Args:
            video: Someone speaking, filmed from the front: at least 2 s, better a minute.
            audio: What they shall say, in any sound or video file.
            out: The video, ending in .mp4.
        """
        make(video, audio, out, config, prepare)

    return run


def _evaluate(argv: list[str]) -> Callable:
    from hicode.evaluation.config import EvaluateConfig
    from hicode.evaluation.report import evaluate
    from hicode.evaluation.videos import CompareConfig, compare_videos

    def run(
        avatar: MaybeAvatar = None,
        clip: MaybeClip = None,
        video: Path | None = None,
        reference: Path | None = None,
        config: Annotated[EvaluateConfig, NoPrefix] = EvaluateConfig(),
        compare: Annotated[CompareConfig, NoPrefix] = CompareConfig(),
    ) -> None:
        """Measure an avatar on the part of its clip that it has not seen, or any video against a reference.

        Prints a table; on request writes JSON and a page with pictures. Give AVATAR and CLIP, or --video and
        --reference.

        Args:
            avatar: What `hicode train` made.
            clip: The clip it was trained on.
            video: A video, or a folder of pictures (25 a second), that somebody's system made.
            reference: The recording that it should equal.
        """
        _check_device(config.device)
        config.check_outputs()
        if video is not None or reference is not None:
            if avatar is not None or video is None or reference is None:
                raise InputError(
                    "A video is measured against a reference. Give both, without an avatar: --video A --reference B."
                )
            if config.region != EvaluateConfig.region or config.modes != EvaluateConfig.modes:
                raise InputError("--region and --modes are an avatar's. Leave them out where two videos are compared.")
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


def _reproduce(argv: list[str]) -> Callable:
    _find_research()
    from research.reproduce.command import command

    return command


def _pretrain(argv: list[str]) -> Callable:
    _find_research()
    from research.pretrain.command import command

    return command


def _find_research() -> None:
    """Make `research` importable: it stands next to the package in a clone of the repository, and is in no wheel."""
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "research" / "__init__.py").exists():
        raise InputError("This command needs a clone of the repository. Clone it and run ./run there.")
    if str(clone) not in sys.path:
        sys.path.append(str(clone))


def _assets(argv: list[str]) -> Callable:
    from hicode import assets

    def run(
        action: tyro.conf.Positional[Literal["list", "pull"]] = "list",
        names: tyro.conf.Positional[tuple[str, ...]] = (),
    ) -> None:
        """List the pretrained parts with source and licence, or fetch them so that later runs need no network.

        Args:
            action: list or pull.
            names: The parts to pull; all of them if none is named.
        """
        if action == "pull":
            from hicode.progress import progress_bar

            wanted = names or tuple(assets.ASSETS)
            with progress_bar("Fetching") as report:
                for i, name in enumerate(wanted):
                    assets.pull([name])
                    report(i + 1, len(wanted))
            print(f"{len(wanted)} parts are in {assets.cache_dir()}")
            return
        if names:
            raise InputError(f"assets list takes no names ({names[0]!r} given). Leave them out.")
        for name, asset in assets.ASSETS.items():
            package = asset.package
            print(f"{name:<15} {asset.what}{'' if assets.is_cached(name) else ' (not fetched yet)'}")
            print(f"{'':<15} {package.registry} {package.name} {package.version}: {package.source}. {package.licence}")
        print(f"Cache: {assets.cache_dir()}")

    return run


def _doctor(argv: list[str]) -> Callable:
    from hicode.doctor import doctor

    return doctor


# name: (what makes the function, what it does)
COMMANDS: dict[str, tuple[Callable[[list[str]], Callable], str]] = {
    "demo": (_demo, "everything below on a sample that is fetched; ends with a video and a report"),
    "prepare": (_prepare, "VIDEO -o CLIP: frames, landmarks, track, masks, speech features"),
    "train": (_train, "CLIP -o AVATAR [--preset draft|standard|paper]: learn a talking head"),
    "speak": (_speak, "AVATAR AUDIO -o OUT.mp4: make it speak"),
    "make": (_make, "VIDEO AUDIO -o OUT.mp4: prepare, train and speak"),
    "evaluate": (
        _evaluate,
        "AVATAR CLIP | --video A --reference B [--json FILE] [--html FILE]: measure it on what it has not seen",
    ),
    "reproduce": (
        _reproduce,
        "table1|table2 CLIPS -o OUT [--ray local|ADDRESS]: the paper's tables from a folder of clips",
    ),
    "pretrain": (
        _pretrain,
        "FOLDER... -o WEIGHTS.safetensors --cache CORPUS: speech weights from your own videos of people who speak",
    ),
    "assets": (_assets, "list|pull: the pretrained parts, their sources and licences"),
    "doctor": (_doctor, "is this machine ready?"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    share_cores()
    tune_allocator()
    try:
        return _run(argv)
    except HicodeError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        again = shlex.join(["hicode", *argv])
        print(f"\nhicode: stopped. What is finished is kept; to go on: {again}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody to tell
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _complain(f"Disk full{_where(error)}. Free some space, or write elsewhere.")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return _complain(f"No permission{_where(error)}. Change its rights, or write elsewhere with -o.")
        raise
    except (MemoryError, RuntimeError) as error:
        # torch has no exception of its own for the CPU's memory, and one that is a RuntimeError for a GPU's.
        if isinstance(error, RuntimeError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        return _complain("Not enough memory. Close other programs, or use a shorter video (--duration 60).")


def _where(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""


def _complain(message: str) -> int:
    print(f"hicode: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"hicode {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(COMMANDS)}."
        kind = "option" if name.startswith("-") else "command"
        raise InputError(f"No {kind} is called {name!r}. {hint} See hicode --help.")
    call = parse(COMMANDS[name][0](argv[1:]), argv[1:], name)
    if call is not None:
        call()
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  hicode {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    title = f"hicode {__version__}: a talking head learned from a short video"
    return f"{title}\n\n{commands}\n\nOptions of a command: hicode COMMAND --help"


def _check_device(device: Device) -> None:
    from hicode.runtime import resolve_device

    resolve_device(device)
