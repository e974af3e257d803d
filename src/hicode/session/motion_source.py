"""Sound to motion: what the mouth does comes from speech, everything else from the driving track.

    sound --encoder--> features --Faceformers--> mouth --VAD gate--> mouth at rest in silence      MotionSource
    driving track, back and forth --blinks, or gaze and head of a held frame--> base motion        Animation
    base motion + mouth --> Motion of one frame                                                    Animation.merge

t frames at 25 fps, 640 samples of 16 kHz sound a frame. Neither part depends on how the sound is cut into chunks.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hicode.audio import FPS, SAMPLES_PER_FEATURE, SAMPLES_PER_FRAME, DcBlocker, frame_rms
from hicode.avatar.avatar import Avatar
from hicode.avatar.driving import merge_motion, resting_mouth
from hicode.avatar.eyes import near_tracked_blinks, tracked_blinks
from hicode.avatar.idle import Idler, head_room, neck, still_frame
from hicode.errors import InputError
from hicode.motion import Motion, ping_pong
from hicode.session.config import SpeakConfig
from hicode.session.timings import Timings
from hicode.speech.encoders import AudioEncoder
from hicode.speech.loudness import LoudnessEstimator
from hicode.speech.speech_model import SpeechModels
from hicode.speech.voice_activity import VadGate, VoiceActivity

# Sound goes to the encoder in pieces of this size, however it arrives, so that a live source and a file give the same
# frames bit for bit. Two frames are also the step in which the embedded encoder answers.
PIECE = 2 * SAMPLES_PER_FRAME


@dataclass(frozen=True)
class DrivingTrack:
    """What gives a spoken head its pose, eyes, upper face and background: t frames of motion, pictures, head masks."""

    motion: Motion
    frame: Callable[[int], UInt8[np.ndarray, "h w 3"]]
    mask: Callable[[int], UInt8[np.ndarray, "h w"]]

    @staticmethod
    def of(avatar: Avatar) -> "DrivingTrack":
        """The avatar's own: the training part of its clip."""
        return DrivingTrack(avatar.driving, avatar.driving_frame, avatar.driving_mask)


@dataclass(frozen=True, eq=False)
class Mouth:
    """One frame's mouth: expression "64", canonical landmarks "478 3", and the sound's features "s" where an avatar is
    driven by them directly (an ablation)."""

    expression: Float[Tensor, "64"]
    landmarks: Float[Tensor, "478 3"]
    speech: Float[Tensor, "s"] | None = None

    @staticmethod
    def at_rest(avatar: Avatar, encoder: AudioEncoder) -> "Mouth":
        """The subject's resting mouth, from the avatar's own driving track."""
        speech = None
        if avatar.audio_driven:
            speech = encoder.encode(np.zeros(SAMPLES_PER_FRAME, np.float32))[:2].flatten()
        return Mouth(*resting_mouth(avatar.driving, avatar), speech)

    def midway(self, other: "Mouth") -> "Mouth":
        """Half-way to another mouth; speech features are the other's."""
        return Mouth(
            torch.lerp(self.expression, other.expression, 0.5),
            torch.lerp(self.landmarks, other.landmarks, 0.5),
            other.speech,
        )


class Loudness:
    """How loud the speaker of a session is, as the encoder and the VAD gate hear it: kept between utterances."""

    def __init__(self):
        self.features, self.gate = LoudnessEstimator(), LoudnessEstimator(FPS)


class MotionSource:
    """The sound of one utterance in, a mouth for each frame out. Mono float32 at 16 kHz, in chunks of any size.

    A frame's mouth is complete when at most `latency_samples` have followed its own sound.
    """

    def __init__(
        self,
        speech: SpeechModels,
        encoder: AudioEncoder,
        rest: Mouth,
        config: SpeakConfig,
        activity: VoiceActivity | None,
        loudness: Loudness | None = None,
    ):
        loudness = loudness or Loudness()
        self._rest, self._encoder = rest, encoder
        self._features, self._mouths = encoder.stream(config.level, loudness.features), speech.stream()
        self._activity = activity.stream() if activity is not None and config.rest else None
        self._gate = None
        if config.rest:
            self._gate = VadGate(config.level, scored=self._activity is not None, loudness=loudness.gate)
        self._look_ahead = max(speech.look_ahead, VoiceActivity.AHEAD if self._activity is not None else 0)
        self._blocker, self._unmeasured = DcBlocker(), np.zeros(0, np.float32)  # sound of an incomplete frame
        self._sound = np.zeros(0, np.float32)  # not yet given to the encoder
        # The first piece has the encoder's margin in it, so that each piece ends where an answer becomes possible.
        self._until_piece = PIECE + encoder.margin
        self._gates: list[float] = []  # gates and motion that wait for each other
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows: list[Tensor] | None = [] if rest.speech is not None else None  # features of frames to come

    @property
    def latency_samples(self) -> int:
        """How much sound must follow a frame's own, at most, before its mouth is complete.

        The encoder answers a block at once, which waits for its last row, its look-ahead and its margin. A frame waits
        for the features of the frames that it looks ahead to, which may be the next block's.
        """
        window, margin = self._encoder.window, self._encoder.margin
        block = max(window.hop * SAMPLES_PER_FEATURE, PIECE)
        block += PIECE if block % PIECE else 0  # an encoder whose blocks do not end with pieces
        motion = block + window.look * SAMPLES_PER_FEATURE + margin + (self._look_ahead - 1) * SAMPLES_PER_FRAME
        if self._gate is None:
            return motion
        # Levels come with the pieces.
        return max(motion, self._gate.config.look_ahead * SAMPLES_PER_FRAME + PIECE - SAMPLES_PER_FRAME + margin)

    def push(self, samples: Float[np.ndarray, "n"], timings: Timings) -> list[Mouth]:
        """The mouths that became complete."""
        self._sound = np.concatenate([self._sound, samples])
        out = []
        while len(self._sound) >= self._until_piece:
            piece, self._sound = self._sound[: self._until_piece], self._sound[self._until_piece :]
            self._until_piece = PIECE
            with timings.clocked("features"):
                features = self._features.push(piece)
            with timings.clocked("faceformers"):
                self._measure(piece, [features])
                out += self._advance([features], [self._mouths.push(features)])
        return out

    def finish(self, timings: Timings) -> list[Mouth]:
        """The remaining mouths, as if silence followed. In all, ceil(n / 640) have come out."""
        with timings.clocked("features"):
            features = [self._features.push(self._sound), self._features.finish()]
        with timings.clocked("faceformers"):
            motion = [*(self._mouths.push(f) for f in features), self._mouths.finish()]
            self._measure(self._sound, features)
            if self._gate is not None:
                scores = None if self._activity is None else self._activity.finish()
                self._gates += self._gate.push(frame_rms(self._unmeasured), scores).tolist()
                self._gates += self._gate.finish().tolist()
            return self._advance(features, motion)

    def _measure(self, samples: np.ndarray, features: list[Tensor]) -> None:
        """Gates of the next frames."""
        if self._gate is None:
            return
        self._unmeasured = np.concatenate([self._unmeasured, self._blocker(samples)])
        whole = len(self._unmeasured) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
        rms, self._unmeasured = frame_rms(self._unmeasured[:whole]), self._unmeasured[whole:]
        scores = None
        if self._activity is not None:
            scores = np.concatenate([self._activity.push(f) for f in features])
        self._gates += self._gate.push(rms, scores).tolist()

    def _advance(self, features: list[Tensor], motion: Sequence[tuple[Tensor, Tensor]]) -> list[Mouth]:
        """The mouths whose motion and gate are both there."""
        for expression, landmarks in motion:
            self._waiting += zip(expression, landmarks, strict=True)
        if self._rows is not None:
            self._rows += [row for f in features for row in f]
        count = len(self._waiting) if self._gate is None else min(len(self._waiting), len(self._gates))
        out = [self._gated(i) for i in range(count)]
        del self._waiting[:count], self._gates[:count]
        return out

    def _gated(self, i: int) -> Mouth:
        expression, landmarks = self._waiting[i]
        if self._gate is not None:
            gate = float(self._gates[i])
            expression = torch.lerp(self._rest.expression, expression, gate)
            landmarks = torch.lerp(self._rest.landmarks, landmarks, gate)
        return Mouth(expression, landmarks, self._frame_features())

    def _frame_features(self) -> Tensor | None:
        """The next frame's two rows of features side by side. A last half frame repeats its row."""
        if self._rows is None:
            return None
        rows = self._rows[:2]
        del self._rows[:2]
        return torch.cat([rows[0], rows[-1]])


@dataclass
class Base:
    """A frame to come without its mouth: the driving frame it shows, its motion "1 ...", and its number.

    plain  whether the motion is the driving track's own
    idle   its rendering with the mouth at rest, once that was asked for
    """

    driving_frame: int
    motion: Motion
    number: int
    plain: bool
    idle: Future | None = None


class Animation:
    """The base motion of the frames to come, in order: pose, eyes and upper face, whatever the mouth will do.

    The driving track runs back and forth; blinks are added where it has none for long. With `still`, one frame is held,
    and blinks, gaze and small head movements are generated. Frames that were dropped unseen can be put back, so that
    their motion is shown with another mouth and the pose goes on without a jump.
    """

    def __init__(self, avatar: Avatar, driving: DrivingTrack, config: SpeakConfig):
        self._avatar, self._driving, self.still = avatar, driving.motion, config.still
        self.start = _start(driving.motion, config)
        self._idler = self._blinks = None
        if config.still:
            pivot = neck(driving.motion)
            room = head_room(avatar, self.start, pivot)
            self._idler = Idler(driving.motion, avatar, True, config.blinks, config.seed, pivot, room)
        elif config.blinks:
            self._idler = Idler(driving.motion, avatar, seed=config.seed)
            self._blinks = tracked_blinks(driving.motion)
        self._ahead: deque[Base] = deque()
        self._made = 0

    def peek(self, k: int = 0) -> Base:
        """The k-th frame to come."""
        while len(self._ahead) <= k:
            self._ahead.append(self._make())
        return self._ahead[k]

    def next(self) -> Base:
        """The next frame; it is no longer to come."""
        self.peek()
        return self._ahead.popleft()

    def put_back(self, bases: Iterable[Base]) -> None:
        """Frames that were taken and not shown, in order."""
        self._ahead.extendleft(reversed(list(bases)))

    def merge(self, base: Base, mouth: Mouth) -> Motion:
        """The motion "1 ..." of a frame with a mouth."""
        motion = merge_motion(base.motion, mouth.expression[None], mouth.landmarks[None], self._avatar)
        return motion if mouth.speech is None else replace(motion, speech=mouth.speech[None])

    def _make(self) -> Base:
        t = int(self._played(0, 1)[0])
        own = motion = self._driving[t : t + 1]
        if self._idler is not None:
            motion = self._idler(own, self._near_own_blink())
        # A held frame's grain stands still, on the head as around it.
        base = Base(t, motion, 0 if self.still else self._made, motion is own)
        self._made += 1
        return base

    def _played(self, begin: int, end: int) -> np.ndarray:
        """Driving frames of the frames from `begin` to `end`, counted from the next one."""
        if self.still:
            return np.full(end - begin, self.start)
        return ping_pong(len(self._driving), self.start + self._made + begin, end - begin)

    def _near_own_blink(self) -> np.ndarray:
        if self._blinks is None or self._idler is None:
            return np.zeros(1, bool)
        within = round(self._idler.config.tracked_blink_s * self._driving.fps)
        return near_tracked_blinks(self._blinks, self._played(-within, within + 1), within)


def _start(driving: Motion, config: SpeakConfig) -> int:
    if config.start is None:
        return still_frame(driving) if config.still else 0
    if config.start < 0 or (config.still and config.start >= len(driving)):
        raise InputError(
            f"There is no driving frame {config.start}: they run from 0 to {len(driving) - 1}. "
            "Choose one of them with --start."
        )
    return config.start
