"""Speaking: sound in, frames out. A `Stream` does it as the sound comes; `synthesize` drains one, `speak` writes what it gives as a video.

    sound ──encoder──▶ features ──Faceformers──▶ mouth ──rest in silence──▶ merged with the driving track ──▶ Motion ──▶ frame

Frame i shows while samples 640 i … 640 (i + 1) of the 16 kHz sound are heard, at 25 fps. Head pose, eyes, upper face and background come from
the avatar's driving track, which runs back and forth as long as the sound lasts; where it never blinks, blinks are added. Or one driving frame is held,
still, and eyes and head idle (`hicode.avatar.idle`). Memory does not grow with the sound.

What is rendered goes back into the driving frame. Its head has the rendered one's pose (unless it is held), so hair, ears and neck are right in it: only
the face is taken from the rendering, or, on demand, the whole head, as the paper has it.

Frames do not depend on each other once their motion is known: each is rendered by one thread from beginning to end, a few at once, and they come out
in order. Sound and video encoding run meanwhile on the caller's thread.
"""

import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from jaxtyping import Float, UInt8

from hicode.audio import (
    SAMPLE_RATE_HZ,
    SAMPLES_PER_FEATURE,
    SAMPLES_PER_FRAME,
    VIDEO_SAMPLE_RATE_HZ,
    DcBlocker,
    checked_sound,
    frame_rms,
)
from hicode.avatar.compositor import Region, seam_box
from hicode.avatar.driving import merge_motion, resting_mouth
from hicode.avatar.idle import Idler, head_room, near_own_blinks, neck, own_blinks, still_frame
from hicode.errors import InputError, OutputError
from hicode.files import check_writable
from hicode.motion import Motion, bounce
from hicode.progress import progress_bar
from hicode.runtime import Device, resolve_device
from hicode.speech.loudness import level_of_frames, speech_level
from hicode.speech.voice_activity import VadGate, VoiceActivity, VoiceActivityStream
from hicode.threads import frame_pool

if TYPE_CHECKING:
    from hicode.avatar.avatar import Avatar

# Sound goes to the encoder in pieces of this size whatever comes in, so that the pieces of a live source and of a file give the same frames,
# bit for bit: two frames, which is also the step in which the embedded encoder answers. The first has the encoder's margin in it, so each
# piece ends where an answer becomes possible.
PIECE = 2 * SAMPLES_PER_FRAME
SILENT_DB = -60.0
NOTHING = np.zeros(0, np.float32)
# Samples handed over at a time when all are at hand: bounds the motion that waits for its frames.
READ_AHEAD = 2 * PIECE
# Of x264 for spoken videos: 5 ms a 512² frame instead of "veryfast"'s 8; at this factor it is as good as that at 16 and a fifth larger.
# One thread: the caller's, while the others render.
VIDEO_ENCODING = {"preset": "superfast", "crf": 17, "threads": 1}


@dataclass
class Seconds:
    """Where the time went over all frames so far: seconds of the thread that did it, so parts that ran side by side add up to more than the wall clock's."""

    features: float = 0.0
    """of speech"""
    faceformers: float = 0.0
    """and the merge with the driving track"""
    driving: float = 0.0
    """decoding the driving frame and its mask"""
    deform: float = 0.0
    rasterise: float = 0.0
    composite: float = 0.0
    encode: float = 0.0
    """original size and video encoding"""
    frames: int = 0

    def __str__(self) -> str:
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "frames"}
        each = 1000 / max(self.frames, 1)
        return ", ".join(f"{k} {v * each:.1f}" for k, v in parts.items()) + " ms a frame"

    def __post_init__(self):
        self._lock = threading.Lock()

    def count(self) -> None:
        """One more frame."""
        with self._lock:
            self.frames += 1

    @contextmanager
    def clocked(self, name: str) -> Iterator[None]:
        """Adds the time that this thread works inside."""
        started = time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                setattr(self, name, getattr(self, name) + time.thread_time() - started)


@dataclass
class _Waiting:
    """A frame to come: what it shows, and its rendering once that has begun."""

    t: int
    motion: Motion
    index: int
    frame: Future | None = None


class Stream:
    """An avatar that speaks what it hears.

        stream = Stream(avatar)
        for chunk in microphone:                  # float32 mono at 16 kHz, chunks of any size
            for frame in stream.push(chunk):      # uint8 "h w 3", 25 a second
                show(frame)
        for frame in stream.flush():
            show(frame)

    A frame comes at most `latency_s` after its sound has ended. `level` is the speech's RMS where it is known beforehand (a file), else a running estimate;
    `rest=False` leaves the mouth to the speech models in silence too. `start` is the driving frame to begin with (the first); with `still`, the one
    that is held (one that holds well), while blinks, gaze and small movements of the head are generated from `seed`. Blinks are also added to a running
    driving track where it has none for long; `blinks=False` adds none. `region` is what of the rendered head goes into the driving frame: the face, or all
    of it; a held frame, whose head moves, always gets all. Raises InputError where the avatar has no speech models or no such frame.
    """

    def __init__(
        self, avatar: "Avatar", level: float | None = None, start: int | None = None, rest: bool = True, encoder=None,
        still: bool = False, blinks: bool = True, seed: int = 0, region: Region = "face",
    ):  # fmt: skip
        if avatar.speech is None:
            raise InputError("The avatar has no speech models: its clip had no sound. Train it on a clip with sound.")
        if encoder is None:
            encoder = avatar.speech.encoder_for()
        if encoder.name != avatar.speech.encoder:
            raise InputError(
                f"The avatar's speech models take features of the {avatar.speech.encoder} encoder, not {encoder.name}. Leave the encoder out."
            )
        if region not in ("face", "head"):
            raise InputError(f"There is no region {region!r} of the head to render. Choose face or head.")
        self.avatar, self.region = avatar, "head" if still else region
        self.seconds = Seconds()
        self._features, self._mouths = encoder.stream(level), avatar.speech.stream()
        presence = VoiceActivity.load() if rest else None
        self._presence = presence.stream() if rest and presence.encoder == encoder.name else None
        self._gate = VadGate(level, scored=self._presence is not None) if rest else None
        self.latency_s = _latency_samples(encoder, avatar.speech.look_ahead, self._gate, self._presence) / SAMPLE_RATE_HZ
        self._blocker, self._unmeasured = DcBlocker(), np.zeros(0, np.float32)  # sound of a frame that is not complete
        self._until_piece = PIECE + encoder.margin
        self._rest = resting_mouth(avatar.driving, avatar)
        self._sound = np.zeros(0, np.float32)  # not yet given to the encoder
        self._gates = np.zeros(0, np.float32)  # gates and mouths that wait for each other
        self._waiting = (
            self._rest[0].new_zeros(0, *self._rest[0].shape),
            self._rest[1].new_zeros(0, *self._rest[1].shape),
        )
        self._heard: list[torch.Tensor] | None = (
            [] if getattr(avatar, "hears", False) else None
        )  # features of frames to come
        self._motions: deque[_Waiting] = deque()
        self._pool = frame_pool()
        self.ahead = 2 * torch.get_num_threads()  # frames rendered at once, or before they are asked for
        self.still, self.start = still, _driving_start(avatar.driving, start, still)
        self._received, self._moved, self._flushed = 0, 0, False
        self._idler = self._own = None
        if still:
            pivot = neck(avatar.driving)
            self._idler = Idler(avatar.driving, avatar, True, blinks, seed, pivot, head_room(avatar, self.start, pivot))
        elif blinks:
            self._idler, self._own = Idler(avatar.driving, avatar, seed=seed), own_blinks(avatar.driving)

    def push(self, samples: Float[np.ndarray, "n"]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The frames that became complete, rendered as they are asked for (and `ahead` more at once); what is not asked for comes with a later call.

        Raises InputError where the sound is not finite or not mono.
        """
        assert not self._flushed, "the stream is flushed"
        self._hear(checked_sound(samples))
        return (frame for _, frame in self.frames())

    def flush(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The remaining frames, as if silence followed: in all ceil(n / 640)."""
        if not self._flushed:
            self._flushed = True
            with torch.inference_mode():
                with self.seconds.clocked("features"):
                    features = [self._keep(self._features.push(self._sound)), self._keep(self._features.finish())]
                with self.seconds.clocked("faceformers"):
                    mouths = [*(self._mouths.push(f) for f in features), self._mouths.finish()]
                    self._know(self._sound, features)
                    self._finish_gates()
                    for mouth in mouths:
                        self._move(*mouth)
                self._sound = self._sound[:0]
            assert self._moved == -(-self._received // SAMPLES_PER_FRAME), (self._moved, self._received)
        return (frame for _, frame in self.frames())

    def close(self) -> None:
        """End the stream's threads, now rather than when it is garbage; frames not yet asked for are lost."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def motion(self) -> Iterator[tuple[int, Motion]]:
        """Instead of frames: (driving frame, motion of one frame), as far as they are complete."""
        while self._motions:
            waiting = self._motions.popleft()
            yield waiting.t, waiting.motion

    def frames(self, keep: int = 0) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
        """(driving frame, frame) of the complete motions, the last `keep` of them left for later, though their rendering begins."""
        while len(self._motions) > keep:
            for waiting in islice(self._motions, self.ahead):
                if waiting.frame is None:
                    waiting.frame = self._pool.submit(self._frame, waiting)
            first = self._motions[0]
            frame = first.frame.result()
            self._motions.popleft()
            yield first.t, frame

    def _hear(self, samples: np.ndarray) -> None:
        with torch.inference_mode():
            self._received += len(samples)
            self._sound = np.concatenate([self._sound, samples])
            while len(self._sound) >= self._until_piece:
                piece, self._sound = self._sound[: self._until_piece], self._sound[self._until_piece :]
                self._until_piece = PIECE
                with self.seconds.clocked("features"):
                    features = self._keep(self._features.push(piece))
                with self.seconds.clocked("faceformers"):
                    self._know(piece, [features])
                    self._move(*self._mouths.push(features))

    def _know(self, samples: np.ndarray, features: list[torch.Tensor]) -> None:
        """Gates of the next frames."""
        if self._gate is None:
            return
        self._unmeasured = np.concatenate([self._unmeasured, self._blocker(samples)])
        whole = len(self._unmeasured) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
        rms, self._unmeasured = frame_rms(self._unmeasured[:whole], SAMPLES_PER_FRAME), self._unmeasured[whole:]
        scores = [self._presence.push(f) for f in features] if self._presence is not None else []
        self._gates = np.concatenate([self._gates, self._gate.push(rms, np.concatenate([*scores, NOTHING]))])

    def _finish_gates(self) -> None:
        if self._gate is None:
            return
        scores = NOTHING if self._presence is None else self._presence.finish()
        last = self._gate.push(frame_rms(self._unmeasured, SAMPLES_PER_FRAME), scores)  # a part of a frame, if any
        self._gates = np.concatenate([self._gates, last, self._gate.finish()])

    def _keep(self, features: torch.Tensor) -> torch.Tensor:
        if self._heard is not None:
            self._heard.extend(features)
        return features

    def _frame_features(self, count: int) -> torch.Tensor:
        """Two rows of features a frame, side by side, for the next frames; a last half frame repeats its row."""
        rows = self._heard[: 2 * count]
        self._heard = self._heard[2 * count :]
        rows += rows[-1:] * (2 * count - len(rows))
        return torch.stack(rows).reshape(count, -1)

    def _move(self, expression: torch.Tensor, landmarks: torch.Tensor) -> None:
        expression, landmarks = torch.cat([self._waiting[0], expression]), torch.cat([self._waiting[1], landmarks])
        count = len(expression) if self._gate is None else min(len(expression), len(self._gates))
        self._waiting = expression[count:], landmarks[count:]
        if count == 0:
            return
        expression, landmarks = expression[:count], landmarks[:count]
        if self._gate is not None:
            gate = torch.from_numpy(self._gates[:count])
            self._gates = self._gates[count:]
            expression = torch.lerp(self._rest[0], expression, gate[:, None])
            landmarks = torch.lerp(self._rest[1], landmarks, gate[:, None, None])
        indices = self._played(0, count)
        motion = merge_motion(self.avatar.driving[indices], expression, landmarks, self.avatar)
        if self._idler is not None:
            motion = self._idler(motion, self._near_own_blink(count))
        if self._heard is not None:
            motion = replace(motion, speech=self._frame_features(count))
        # A held frame's grain stands still, on the head as around it.
        self._motions.extend(
            _Waiting(int(t), motion[i : i + 1], 0 if self.still else self._moved + i) for i, t in enumerate(indices)
        )
        self._moved += count

    def _played(self, begin: int, end: int) -> np.ndarray:
        """Driving frames of the frames from `begin` to `end`, counted from the next one."""
        if self.still:
            return np.full(end - begin, self.start)
        return bounce(len(self.avatar.driving), self.start + self._moved + begin, end - begin)

    def _near_own_blink(self, count: int) -> np.ndarray:
        if self._own is None:
            return np.zeros(count, bool)
        within = round(self._idler.config.own_blink_s * self.avatar.driving.fps)
        return near_own_blinks(self._own, self._played(-within, count + within), within)

    @torch.inference_mode()
    def _frame(self, waiting: _Waiting) -> UInt8[np.ndarray, "h w 3"]:
        avatar, seconds, t, motion = self.avatar, self.seconds, waiting.t, waiting.motion
        with seconds.clocked("driving"):
            frame, mask = avatar.driving_frame(t), avatar.driving_mask(t)
            shown = avatar.face_mask(motion, 0, mask, avatar.driving, t) if self.region == "face" else None
        with seconds.clocked("deform"):
            deformed = avatar.deformed(motion, 0)
        with seconds.clocked("rasterise"):
            rendering = avatar.rasterized(deformed, motion, 0, within=None if shown is None else seam_box(shown))
        with seconds.clocked("composite"):
            # The head of a held frame moves a little before its mask.
            out = avatar.composed(
                rendering, motion, 0, frame, mask, waiting.index, same_pose=not self.still, shown=shown
            )
        seconds.count()
        return out


def _latency_samples(encoder, look_ahead: int, gate: VadGate | None, presence: VoiceActivityStream | None) -> int:
    """How much sound must follow a frame's own, at most, before it is known. What the encoder answers at once, a block, waits for its last row, its
    look and its margin; a frame, for the features of those that it looks ahead to, which may be the next block's."""
    window = encoder.window
    if presence is not None:
        look_ahead = max(look_ahead, presence.model.AHEAD)
    block = max(window.hop * SAMPLES_PER_FEATURE, PIECE)
    block += PIECE if block % PIECE else 0  # of an encoder whose blocks do not end with pieces
    motion = block + window.look * SAMPLES_PER_FEATURE + encoder.margin + (look_ahead - 1) * SAMPLES_PER_FRAME
    if gate is None:
        return motion
    return max(
        motion, gate.config.look_ahead * SAMPLES_PER_FRAME + PIECE - SAMPLES_PER_FRAME + encoder.margin
    )  # levels come with the pieces


def _driving_start(driving: Motion, start: int | None, still: bool) -> int:
    if start is None:
        return still_frame(driving) if still else 0
    if start < 0 or (still and start >= len(driving)):
        raise InputError(
            f"There is no driving frame {start}: they run from 0 to {len(driving) - 1}. Choose one of them with --start."
        )
    return start


def synthesize(
    avatar: "Avatar", audio: Float[np.ndarray, "n"], start: int | None = None, rest: bool = True,
    still: bool = False, blinks: bool = True, seed: int = 0, region: Region = "face",
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:  # fmt: skip
    """The frames of a whole sound, ceil(n / 640) of them, rendered a few before they are asked for: a `Stream`, drained.

    audio: float32 mono at 16 kHz. Raises InputError where it is empty, not finite, not mono, or the avatar cannot speak.
    """
    audio = _some_sound(audio)
    stream = Stream(
        avatar, level=speech_level(audio), start=start, rest=rest, still=still, blinks=blinks, seed=seed, region=region
    )
    return (frame for _, frame in _drained(stream, [audio]))


def synthesize_motion(
    avatar: "Avatar", audio: Float[np.ndarray, "n"], start: int | None = None, rest: bool = True,
    still: bool = False, blinks: bool = True, seed: int = 0,
) -> Iterator[tuple[int, Motion]]:  # fmt: skip
    """What `synthesize` renders: for each frame the driving frame and the motion of one frame."""
    audio = _some_sound(audio)
    stream = Stream(avatar, level=speech_level(audio), start=start, rest=rest, still=still, blinks=blinks, seed=seed)
    for _ in _heard(stream, [audio]):
        yield from stream.motion()


def _some_sound(samples) -> Float[np.ndarray, "n"]:
    samples = checked_sound(samples)
    if len(samples) == 0:
        raise InputError("The sound is empty. Give a file with speech.")
    return samples


def _drained(stream: Stream, pieces: Iterable[np.ndarray]) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """(driving frame, frame) of a whole sound. The threads that render have work while the next sound is heard."""
    try:
        for finished in _heard(stream, pieces):
            yield from stream.frames(keep=0 if finished else stream.ahead)
    finally:
        stream.close()


def _heard(stream: Stream, pieces: Iterable[np.ndarray]) -> Iterator[bool]:
    """Gives the stream a little sound at a time, and says each time whether that was all."""
    for piece in pieces:
        for begin in range(0, len(piece), READ_AHEAD):
            stream._hear(piece[begin : begin + READ_AHEAD])
            yield False
    stream.flush()
    yield True


# --- a video ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spoken:
    """What `speak` wrote: `frames` at 25 fps in `seconds` of work, `parts` says where they went."""

    path: Path
    frames: int
    seconds: float
    parts: Seconds

    @property
    def fps(self) -> float:
        return self.frames / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        return f"{self.path}: {self.frames} frames ({self.frames / 25:.1f} s) at {self.fps:.1f} frames a second ({self.parts})"


def speak(
    avatar: "Avatar | Path | str",
    audio: Path | str | Float[np.ndarray, "n"],
    out: Path | str,
    *,
    original_size: bool = False,
    source_video: Path | str | None = None,
    start: int | None = None,
    rest: bool = True,
    still: bool = False,
    blinks: bool = True,
    seed: int = 0,
    region: Region = "face",
    device: Device = "auto",
    progress: bool = True,
) -> Spoken:
    """Write an MP4 (H.264 and AAC, 25 fps) of the avatar speaking `audio`: a sound or video file, or 16 kHz samples.

    original_size  paste the head back into the frames of the video that the avatar came from; `source_video` says where that is now
    start          driving frame to begin with: the first if not given, with `still` one that holds well
    rest           let the lips rest in silence
    still          hold one driving frame; eyes and head idle
    blinks         add blinks where the driving track has none of its own
    seed           of what idles
    region         what of the rendered head goes into the driving frame: the face (hair, ears and neck are the frame's then), or the whole head; with
                   `still` always the head
    device         where the head is rendered; speech and video stay on the CPU

    Memory does not grow with the sound. The file appears when it is whole. Raises InputError for a
    sound or a source that cannot be used, OutputError where `out` cannot be written: both before any work.
    """
    from hicode.media.video import VideoWriter

    out = Path(out)
    _check_out(out, audio, source_video)
    if isinstance(avatar, (str, Path)):
        from hicode.avatar.avatar import Avatar

        avatar = Avatar.load(avatar)
    if (place := resolve_device(device)) != "cpu":
        avatar = avatar.to(place)
    sound = _Sound.of(audio)
    stream = Stream(
        avatar, level=sound.level, start=start, rest=rest, still=still, blinks=blinks, seed=seed, region=region
    )
    total = -(-sound.samples // SAMPLES_PER_FRAME)
    original = (
        _Original(avatar, source_video, stream.start, 1 if still else total, out.parent) if original_size else None
    )
    height, width = avatar.plate.shape[:2]
    width, height = (width, height) if original is None else original.size
    started = time.perf_counter()
    with ExitStack() as stack:
        if original is not None:
            stack.enter_context(original)
        report = stack.enter_context(progress_bar("Speaking", progress))
        video = stack.enter_context(
            VideoWriter(
                out, width, height, avatar.driving.fps, sound.pieces(sound.rate_hz), sound.rate_hz, **VIDEO_ENCODING
            )
        )
        for done, (t, frame) in enumerate(_drained(stream, sound.pieces(SAMPLE_RATE_HZ)), 1):
            with stream.seconds.clocked("encode"):
                video.write(frame if original is None else original.paste(t, frame))
            report(done, total)
    return Spoken(out, total, time.perf_counter() - started, stream.seconds)


def _check_out(out: Path, *inputs) -> None:
    if out.suffix.lower() not in (".mp4", ".m4v", ".mov"):
        raise OutputError(
            f"{out} does not end in .mp4, .m4v or .mov, the kinds of video written here. Choose such a name with -o."
        )
    check_writable(out)
    for path in inputs:
        if isinstance(path, (str, Path)) and out.exists() and Path(path).exists() and out.samefile(path):
            raise OutputError(f"{out} is also the input, which would be lost. Choose another name with -o.")


@dataclass(frozen=True)
class _Sound:
    """Sound to speak, in pieces of any size; files are read as often as needed and never held."""

    source: Path | np.ndarray
    samples: int
    """at 16 kHz"""
    level: float
    """RMS of its speech"""

    @staticmethod
    def of(audio: Path | str | np.ndarray) -> "_Sound":
        """Heard through once; InputError where it cannot be used."""
        audio = checked_sound(audio) if isinstance(audio, np.ndarray) else Path(audio)
        name = "The sound" if isinstance(audio, np.ndarray) else str(audio)
        count, rms, rest, blocker = 0, [], np.zeros(0, np.float32), DcBlocker()
        for piece in _Sound(audio, 0, 0.0).pieces(SAMPLE_RATE_HZ):
            count += len(piece)
            piece = np.concatenate([rest, blocker(piece)])
            whole = len(piece) // SAMPLES_PER_FEATURE * SAMPLES_PER_FEATURE
            rms.append(frame_rms(piece[:whole], SAMPLES_PER_FEATURE))
            rest = piece[whole:]
        levels = np.concatenate([*rms, frame_rms(rest, SAMPLES_PER_FEATURE)])
        if count == 0:
            raise InputError(f"{name} holds no sound at all. Give a file with speech.")
        loudest_db = 20 * np.log10(max(levels.max(), 1e-6))
        if loudest_db < SILENT_DB:
            raise InputError(f"{name} is silent (loudest 20 ms at {loudest_db:.0f} dB). Give a file with speech.")
        return _Sound(audio, count, level_of_frames(levels))

    @property
    def rate_hz(self) -> int:
        """At which it goes into the video: samples as they are, a file's in full quality."""
        return SAMPLE_RATE_HZ if isinstance(self.source, np.ndarray) else VIDEO_SAMPLE_RATE_HZ

    def pieces(self, rate_hz: int) -> Iterator[np.ndarray]:
        from hicode.media.audio import stream_audio

        if isinstance(self.source, np.ndarray):
            return iter([self.source])
        pieces = stream_audio(self.source, rate_hz)
        if pieces is None:
            raise InputError(f"{self.source} has no sound track. Give a file with speech.")
        return pieces


class _Original:
    """The source video's frames with the composited head in them: what composition changed of the crop, resized, pasted at the crop box; all else stays as
    sharp as the source has it.

    The driving track runs back and forth, a video only forward: frames are kept, compressed, in a temporary file where they are needed again.
    """

    def __init__(self, avatar: "Avatar", source_video: Path | str | None, start: int, frames: int, folder: Path):
        from hicode.media.video import probe

        source = avatar.source
        path = source_video or source.get("path")
        if path is None:
            name = source.get("name", "a video that the avatar does not name")
            raise InputError(
                f"The avatar came from {name}, and does not say where that is. Name its place with --source-video."
            )
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(
                f"{self.path}, the video that the avatar came from, is gone. Name its new place with --source-video, or leave --original-size out."
            )
        if "crop_box" not in source:
            raise InputError(
                "The avatar does not know where its crop lies in the video. Train it anew, or leave --original-size out."
            )
        info = probe(self.path)
        self.size = info.width, info.height
        self.box = x0, y0, side = tuple(round(v) for v in source["crop_box"])
        if x0 < 0 or y0 < 0 or x0 + side > info.width or y0 + side > info.height:
            raise InputError(
                f"{self.path} is {info.width}x{info.height}, too small for the avatar's crop at ({x0}, {y0}), {side} px wide: "
                "it is not the video that the avatar came from. Name that one with --source-video."
            )
        self.avatar, self.folder = avatar, folder
        self._first = int(source.get("first_frame", 0))
        self._keep = start + frames > len(avatar.driving)

    def __enter__(self) -> Self:
        from hicode.media.video import read_video

        self._frames = read_video(self.path, float(self.avatar.driving.fps))
        self._read = -self._first  # driving frame that comes next
        self._spool = tempfile.TemporaryFile(dir=self.folder) if self._keep else None
        self._offsets = [0]
        self._latest: tuple[int, np.ndarray] | None = None
        return self

    def __exit__(self, *error) -> None:
        self._frames.close()
        if self._spool is not None:
            self._spool.close()

    def paste(self, t: int, crop: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The source frame of driving frame t with what is new in the crop."""
        import cv2

        x0, y0, side = self.box
        out = self._frame(t).copy()
        region = np.where((crop != self.avatar.driving_frame(t)).any(-1), np.uint8(255), np.uint8(0))
        region = cv2.morphologyEx(
            region, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)
        )  # a rendered pixel may be the driving frame's by chance
        if crop.shape[0] != side:
            # Area averages are right for reducing, Lanczos for enlarging; the region's edge becomes soft by a crop's pixel.
            crop = cv2.resize(
                crop, (side, side), interpolation=cv2.INTER_AREA if side < crop.shape[0] else cv2.INTER_LANCZOS4
            )
            region = cv2.resize(
                region, (side, side), interpolation=cv2.INTER_AREA if side < region.shape[0] else cv2.INTER_LINEAR
            )
        weight = region[..., None].astype(np.float32) / 255
        target = out[y0 : y0 + side, x0 : x0 + side]
        target[:] = np.where(weight > 0, target + weight * (crop.astype(np.float32) - target) + 0.5, target).astype(
            np.uint8
        )
        return out

    def _frame(self, t: int) -> np.ndarray:
        import cv2

        if self._latest is not None and self._latest[0] == t:
            return self._latest[1]
        while self._read <= t:
            frame = next(self._frames, None)
            if frame is None:
                raise InputError(
                    f"{self.path} ends before driving frame {t}: it is not the video that the avatar came from."
                )
            if self._read >= 0:
                self._latest = self._read, frame
                self._store(frame)
            self._read += 1
        if self._latest is None or self._latest[0] != t:
            assert self._spool is not None, f"driving frame {t} is needed again and was not kept"
            self._spool.seek(self._offsets[t])
            data = np.frombuffer(self._spool.read(self._offsets[t + 1] - self._offsets[t]), np.uint8)
            self._latest = t, np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])
        return self._latest[1]

    def _store(self, frame: np.ndarray) -> None:
        if self._spool is None:
            return
        import cv2

        options = [cv2.IMWRITE_JPEG_QUALITY, 97, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        _, data = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), options)
        try:
            self._spool.seek(self._offsets[-1])
            self._spool.write(data.tobytes())
        except OSError as error:
            raise OutputError(
                f"Cannot keep the source's frames in {self.folder}: {error.strerror}. Free some space."
            ) from error
        self._offsets.append(self._offsets[-1] + len(data))
