"""A prepared clip: a folder of frames, masks, track, depth, sound and speech features, read lazily.

t frames at 25 fps, h x w px (square). The first 10/11 of them train, the last 1/11 (one to ten seconds) test. Nothing
that learns, averages or stops early may use the test part. Frame i owns the speech features 2i and 2i + 1 and the
samples 640 i … 640 (i + 1).

    clip.json                     schema, source, split, the settings of every step, the capture report
    frames/000000.png …           RGB, lossless
    masks/person/, masks/head/    grey, 0 … 255, soft
    track.safetensors             FaceTrack
    depth.safetensors             of the first training frame and of those that show the head from other sides
    audio.wav                     16 kHz mono as recorded; `Clip.audio` corrects the measured offset
    audio.<encoder>.safetensors   speech features of the corrected sound
"""

import zlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor

from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from hicode.camera import Camera
from hicode.errors import FileFormatError, InputError
from hicode.files import load_tensors, read_json, save_tensors, sha256_of
from hicode.motion import FaceTrack, Motion
from hicode.preparation.defects import Defect, longest_run, usable
from hicode.speech.encoders import AudioEncoder, EncoderSpec, default_spec, encoder_of, match_frames

SCHEMA, VERSION = "hicode-clip", 2
CACHE_BYTES = 128 << 20


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a clip. Masks are soft, 0 … 255."""

    index: int
    image: UInt8[np.ndarray, "h w 3"]
    head_mask: UInt8[np.ndarray, "h w"]
    person_mask: UInt8[np.ndarray, "h w"]
    camera: Camera


def split(frame_count: int) -> tuple[range, range]:
    """(train, test): the last 1/11, at least 25 frames and at most 250, tests."""
    test = min(max(25, min(250, -(-frame_count // 11))), frame_count)
    return range(frame_count - test), range(frame_count - test, frame_count)


class Clip:
    """A clip on disk. Opening reads `clip.json` only; memory stays within a small cache of decoded pictures."""

    def __init__(self, path: Path, config: dict):
        self.path = path
        self.config = config
        self.fps: float = config["fps"]
        self.frame_count: int = config["frame_count"]
        self.width: int = config["width"]
        self.height: int = config["height"]
        self.train = range(*config["train"])
        self.test = range(*config["test"])
        self.source: dict = config["source"]
        self.crop_box: tuple[int, int, int] = tuple(config["crop_box"])  # x0, y0, side in px of the upright source
        self.start_s: float = config["start_s"]
        self.audio_offset_frames: float = config["audio_offset_frames"]
        self.report: dict = config["report"]
        self.defects = [Defect(**defect) for defect in config.get("defects", [])]
        self.chosen_runs: list[list[int]] = config.get("chosen", [[0, self.frame_count]])
        self._pictures = _Pictures()

    @staticmethod
    def open(path: Path | str) -> "Clip":
        """FileFormatError where the folder is no finished clip, or is damaged."""
        path = Path(path)
        if not path.exists():
            raise FileFormatError(f"{path} does not exist. Make a clip first: hicode prepare VIDEO -o {path}")
        if not path.is_dir():
            raise FileFormatError(f"{path} is a file, not a clip folder. Make one: hicode prepare VIDEO -o CLIP")
        if not (path / "clip.json").exists():
            raise FileFormatError(f"{path} is not a clip: it has no clip.json. Make one: hicode prepare VIDEO -o CLIP")
        config = read_json(path / "clip.json", SCHEMA, VERSION)
        if not config.get("complete"):
            raise FileFormatError(
                f"{path} is not finished. Go on with: hicode prepare {config.get('video', 'VIDEO')} -o {path}"
            )
        try:
            _check(config)
            clip = Clip(path, config)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"{path}/clip.json lacks or mangles {error}. It is damaged: run hicode prepare again."
            ) from error
        for name in (
            "track.safetensors",
            f"frames/{clip.frame_count - 1:06d}.png",
            f"masks/head/{clip.frame_count - 1:06d}.png",
        ):
            if not (path / name).exists():
                raise FileFormatError(f"{path} lacks {name}. The clip is damaged: run hicode prepare again.")
        return clip

    @property
    def first_frame(self) -> int:
        """The source's frame, at 25 fps, that is frame 0 here."""
        return round(self.start_s * self.fps)

    @property
    def video(self) -> Path:
        """The source video, where it was when the clip was prepared."""
        return Path(self.source["path"])

    @cached_property
    def usable(self) -> Bool[np.ndarray, "t"]:
        """Frames without a defect."""
        return usable(self.frame_count, self.defects)

    @cached_property
    def chosen(self) -> Bool[np.ndarray, "t"]:
        """Frames that the head is learned from: without a defect, and chosen (`preparation.choice`). Others have no
        mask."""
        chosen = np.zeros(self.frame_count, bool)
        for first, end in self.chosen_runs:
            chosen[first:end] = True
        return chosen & self.usable if (chosen & self.usable)[self.train.start : self.train.stop].any() else chosen

    @property
    def driving(self) -> range:
        """The longest run of chosen frames in the training part: it drives the avatar."""
        run = longest_run(self.chosen[self.train.start : self.train.stop])
        return range(self.train.start + run.start, self.train.start + run.stop)

    @property
    def has_audio(self) -> bool:
        """Whether the source has a sound that is not silent."""
        return self.config["has_audio"]

    @property
    def prepare_seconds(self) -> float:
        """How long all steps of preparing took."""
        return sum(step["seconds"] for step in self.config["steps"].values())

    def __len__(self) -> int:
        return self.frame_count

    def __repr__(self) -> str:
        return f"Clip({str(self.path)!r}, {self.frame_count} frames of {self.width}x{self.height})"

    def __getitem__(self, t: int) -> Frame:
        return Frame(t, self.image(t), self.head_mask(t), self.person_mask(t), self.track.camera_at(t))

    def image(self, t: int) -> UInt8[np.ndarray, "h w 3"]:
        """Frame t, RGB."""
        return self._read("frames", t)

    def head_mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """The head in frame t: 0 … 255, soft."""
        return self._read("masks/head", t)

    def person_mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """The person in frame t: 0 … 255, soft."""
        return self._read("masks/person", t)

    def _read(self, kind: str, t: int) -> np.ndarray:
        if not 0 <= t < self.frame_count:
            raise IndexError(f"frame {t} of {self.frame_count}")
        return self._pictures.get(self.path / kind / f"{t:06d}.png", grey=kind != "frames").copy()

    @cached_property
    def track(self) -> FaceTrack:
        """The head's track."""
        return load_track(self.path / "track.safetensors")

    def hear(self, encoder: EncoderSpec | str | None = None) -> None:
        """Give the track's motion the sound's features, a frame's two rows next to each other.

        For avatars that are moved by them directly (row None of Table 2). Raises InputError for a video without sound.
        """
        if self.track.motion.speech is not None:
            return
        features = self.speech_features(encoder)
        if features is None:
            raise InputError(f"{self.path} has no sound, and speech features move this avatar. Use a clip with sound.")
        self.track = replace(
            self.track, motion=replace(self.track.motion, speech=features.reshape(self.frame_count, -1))
        )

    def depths(self) -> dict[int, Float32[np.ndarray, "h w"]]:
        """Camera depth (dm) by frame, NaN outside the head.

        The first training frame, then those that turn farthest from it and from each other.
        """
        tensors, _ = load_tensors(self.path / "depth.safetensors", "hicode-depth", 2)
        return dict(zip(tensors["frames"].tolist(), tensors["depth"].numpy(), strict=True))

    def audio(self) -> Float32[np.ndarray, "n"] | None:
        """16 kHz mono, 640 samples a frame, moved by the measured offset so that it fits the picture; None for a video
        without sound.
        """
        file = self.path / "audio.wav"
        if not self.has_audio:
            return None
        import soundfile

        try:
            stated = self.config["steps"].get("sound", {}).get("files", {}).get(file.name)
            if stated is not None and stated != sha256_of(file):
                raise FileFormatError(f"{file} is damaged: its checksum differs. Run hicode prepare again.")
            samples, rate_hz = soundfile.read(str(file), dtype="float32")
        except (soundfile.LibsndfileError, OSError) as error:
            raise FileFormatError(f"{file} is missing or damaged ({error}). Run hicode prepare again.") from error
        if rate_hz != SAMPLE_RATE_HZ or samples.ndim != 1:
            raise FileFormatError(f"{file} is not 16 kHz mono. Run hicode prepare again.")
        return shift_audio(samples, self.audio_offset_frames, self.frame_count)

    @property
    def encoder(self) -> EncoderSpec:
        """The speech encoder that the clip was prepared with."""
        return EncoderSpec.from_json(self.config["encoder"])

    def speech_features(self, encoder: EncoderSpec | str | None = None) -> Float[Tensor, "s d"] | None:
        """Two rows a frame, made and stored on first use; None for a video without sound.

        encoder  the clip's own if None; a name means the clip's own of that name, or one that needs no weights

        Raises InputError where features are to be made and the encoder's weights are gone.
        """
        samples = self.audio()
        if samples is None:
            return None
        if not isinstance(encoder, EncoderSpec):
            encoder = self.encoder if encoder in (None, self.encoder.name) else default_spec(encoder)
        file = self.path / f"audio.{encoder.name}.safetensors"
        if file.exists():
            tensors, config = load_tensors(file, FEATURES_SCHEMA, FEATURES_VERSION)
            same = EncoderSpec.from_json(config["encoder"]) == encoder
            same = same and config["offset_frames"] == self.audio_offset_frames
            if same and len(tensors["features"]) == 2 * self.frame_count:
                return tensors["features"]
        made = encoder_of(encoder)
        features = match_frames(made.encode(samples), self.frame_count)
        save_features(file, features, made, self.audio_offset_frames)
        return features


_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("fps", "start_s", "audio_offset_frames"), (int, float)),
    **dict.fromkeys(("frame_count", "width", "height"), int),
    **dict.fromkeys(("train", "test", "crop_box"), list),
    **dict.fromkeys(("source", "report", "encoder", "steps"), dict),
    "has_audio": bool,
}


def _check(config: dict) -> None:
    """Raise KeyError, TypeError or ValueError where clip.json lacks something or has it of another kind."""
    for name, kind in _KINDS.items():
        if not isinstance(config[name], kind) or (kind is not bool and isinstance(config[name], bool)):
            raise TypeError(name)
    count = config["frame_count"]
    for name in ("train", "test"):
        first, end = config[name]
        if not 0 <= first <= end <= count:
            raise ValueError(name)
    if not (count > 0 and 0 < config["fps"] < 1000 and abs(config["audio_offset_frames"]) <= count):
        raise ValueError("frame_count, fps or audio_offset_frames")
    if not all(isinstance(step, dict) for step in config["steps"].values()):
        raise TypeError("steps")
    EncoderSpec.from_json(config["encoder"])


FEATURES_SCHEMA, FEATURES_VERSION = "hicode-speech-features", 2


def save_features(file: Path, features: Float[Tensor, "s d"], encoder: AudioEncoder, offset_frames: float) -> None:
    """Store the features of a sound that was moved by `offset_frames`, and how they were made."""
    config = {"encoder": encoder.spec.to_json(), "offset_frames": offset_frames}
    save_tensors(file, {"features": features}, FEATURES_SCHEMA, FEATURES_VERSION, config)


class _Pictures:
    """Decoded PNG files, the most recently used within CACHE_BYTES."""

    def __init__(self):
        self._recent: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._recent_bytes = 0

    def get(self, file: Path, grey: bool) -> np.ndarray:
        if file in self._recent:
            self._recent.move_to_end(file)
            return self._recent[file]
        picture = read_png(file, grey)
        self._recent[file] = picture
        self._recent_bytes += picture.nbytes
        while self._recent_bytes > CACHE_BYTES and len(self._recent) > 1:
            self._recent_bytes -= self._recent.popitem(last=False)[1].nbytes
        return picture


def read_png(file: Path, grey: bool) -> UInt8[np.ndarray, "h w *c"]:
    """A PNG file as grey or RGB. Raises FileFormatError where it is missing or damaged."""
    picture = None
    with suppress(OSError, cv2.error):
        data = file.read_bytes()
        if is_whole_png(data):
            kind = cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), kind)
    if picture is None:
        raise FileFormatError(f"{file} is missing or damaged. Run hicode prepare again.")
    return picture if grey else np.ascontiguousarray(picture[..., ::-1])


def is_whole_png(data: bytes) -> bool:
    """Whether the bytes are a PNG from its signature to its end, each chunk with the right checksum.

    Decoders show what they can of a damaged one, and say so at most on the console.
    """
    at, view = 8, memoryview(data)
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4], "big")
        if int.from_bytes(view[end : end + 4], "big") != zlib.crc32(view[at + 4 : end]) or end + 4 > len(data):
            return False
        if view[at + 4 : at + 8] == b"IEND":
            return end + 4 == len(data)
        at = end + 4
    return False


def write_png(file: Path, picture: UInt8[np.ndarray, "h w *c"]) -> None:
    """Write losslessly and fast (level 1). Not atomic: writers of a series rename the folder when it is whole.

    One filter (the row above): a third less time to write and to read than the best filter of each row, an eighth
    more bytes.
    """
    stored = picture[..., ::-1] if picture.ndim == 3 else picture
    done, data = cv2.imencode(
        ".png",
        np.ascontiguousarray(stored),
        [
            *(cv2.IMWRITE_PNG_COMPRESSION, 1),
            *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
            *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP),
        ],
    )
    assert done, picture.shape
    file.write_bytes(data.tobytes())


def shift_audio(samples: Float32[np.ndarray, "n"], offset_frames: float, frame_count: int) -> Float32[np.ndarray, "m"]:
    """Sound moved onto the picture, which trails it by `offset_frames` (negative: leads); 640 samples a frame."""
    start = round(-offset_frames * SAMPLES_PER_FRAME)
    length = frame_count * SAMPLES_PER_FRAME
    out = np.zeros(length, np.float32)
    source = samples[max(start, 0) : max(start + length, 0)]
    at = max(-start, 0)
    source = source[: length - at]
    out[at : at + len(source)] = source
    return out


def save_track(path: Path, track: FaceTrack) -> None:
    """Write a track as one safetensors file."""
    tensors = {
        **track.motion.tensors(),
        "identity": track.identity,
        "K": track.camera.K,
        "landmarks_px": track.landmarks_px,
        "confidence": track.confidence,
    }
    config = {"fps": track.motion.fps, "width": track.camera.width, "height": track.camera.height}
    save_tensors(path, tensors, "hicode-track", 1, config)


def load_track(path: Path) -> FaceTrack:
    """A track that `save_track` wrote. Raises FileFormatError where it is missing or damaged."""
    tensors, config = load_tensors(path, "hicode-track", 1)
    try:
        motion = Motion(tensors["expression"], tensors["landmarks"], tensors["T_camera_head"], config["fps"])
        camera = Camera(tensors["K"], torch.eye(4), config["width"], config["height"])
        return FaceTrack(motion, tensors["identity"], camera, tensors["landmarks_px"], tensors["confidence"])
    except KeyError as error:
        raise FileFormatError(f"{path} lacks {error}. The track is damaged: run hicode prepare again.") from error
