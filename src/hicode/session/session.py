"""`Session`: sound in, frames out, live. The one way from sound to frames.

    sound --push_audio--> queue --MotionSource--> mouths --Animation--> motion --render pool--> frames

Frame i shows while its 40 ms of sound are played: picture and sound travel in one object, so nothing can part them.
Head pose, eyes, upper face and background come from the driving track, which runs back and forth without end. Where
nobody speaks, the mouth rests.

Threads. One thread writes (`push_audio`, `end_utterance`, `clear`), one reads (`frames`, `drain`); they may be the
same. The writer converts and queues sound and never waits for rendering. The reader turns sound into motion and takes
frames from the render pool, which all sessions of the process share. `close` may be called by either.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int16, Shaped, UInt8

from hicode.audio import FPS, SAMPLE_RATE_HZ, SpeechInput
from hicode.avatar.avatar import Avatar
from hicode.errors import InputError, ResourceError
from hicode.motion import Motion
from hicode.session.config import SpeakConfig
from hicode.session.idle_frames import IdleFrames
from hicode.session.motion_source import PIECE, Animation, Base, DrivingTrack, Loudness, MotionSource, Mouth
from hicode.session.rendering import FrameRenderer
from hicode.session.timings import Timings
from hicode.speech.encoders import AudioEncoder
from hicode.speech.voice_activity import VoiceActivity
from hicode.threads import frame_pool


@dataclass(frozen=True, eq=False)
class Frame:
    """40 ms of picture and sound.

    pts_s          when it is shown, from the session's first frame on
    audio          its sound at `SpeakConfig.output_rate_hz`, mono; zeros where nobody speaks
    speaking       whether it belongs to an utterance
    driving_frame  the frame of the driving track that it shows
    motion         what its head was rendered from, "1 ..."
    late           whether its own picture was not ready in time: `image` is the newest one that was
    """

    image: UInt8[np.ndarray, "h w 3"]
    pts_s: float
    audio: Int16[np.ndarray, "n"]
    speaking: bool
    driving_frame: int
    motion: Motion
    late: bool = False


@dataclass(frozen=True, eq=False)
class _Sound:
    """Sound in the queue, the same at both rates: for the speech models and for `Frame.audio`."""

    samples: np.ndarray
    output: np.ndarray


END = _Sound(np.zeros(0, np.float32), np.zeros(0, np.float32))  # of an utterance


@dataclass(frozen=True, eq=False)
class _Spoken:
    """A frame's mouth with its sound and the number of its utterance (None: idle)."""

    mouth: Mouth
    audio: np.ndarray
    utterance: int | None


@dataclass
class _Planned:
    """A frame to come."""

    base: Base
    motion: Motion
    spoken: _Spoken
    image: Future


class Session:
    """An avatar that speaks what it is given, listens and idles, and can be interrupted.

        with Session(avatar) as session:
            session.push_audio(samples, 24_000)      # writer; any type, rate and size
            session.end_utterance()
            for frame in session.frames():           # reader; for ever
                show(frame)

    A frame is complete when `latency_s` of sound have followed its own, at most (and the resampler's few ms at other
    rates than 16 kHz); rendering follows. `driving` replaces the avatar's own driving track; the mouth at rest stays
    the avatar's. Raises InputError where the avatar has no speech models or the options do not fit it.
    """

    def __init__(
        self,
        avatar: Avatar,
        config: SpeakConfig = SpeakConfig(),
        driving: DrivingTrack | None = None,
        encoder: AudioEncoder | None = None,
    ):
        if avatar.speech is None:
            raise InputError("The avatar has no speech models: its clip had no sound. Train it on a clip with sound.")
        encoder = encoder or avatar.speech.encoder_for(config.encoder_weights)
        if encoder.spec != avatar.speech.encoder:
            raise InputError(
                f"The avatar's speech models take features of the {avatar.speech.encoder.name} encoder, "
                f"not {encoder.name}. Leave the encoder out."
            )
        if driving is not None and config.still:
            raise InputError("Only the avatar's own driving frames can be held. Leave still or the driving track out.")
        self.avatar, self.config, self.timings = avatar, config, Timings()
        driving = driving or DrivingTrack.of(avatar)
        self._speech, self._encoder = avatar.speech, encoder
        activity = VoiceActivity.load() if config.rest else None
        self._activity = activity if activity is not None and activity.encoder == encoder.name else None
        self._rest = Mouth.at_rest(avatar, encoder)
        self._animation = Animation(avatar, driving, config)
        self.start = self._animation.start
        region = "head" if config.still else config.region
        self._renderer = FrameRenderer(avatar, driving, region, config.film_grain)
        self._idle_frames = IdleFrames(driving)
        self._pool = frame_pool()
        self.ahead = 2 * torch.get_num_threads()
        """Frames in rendering at once, or before they are asked for."""
        self._loudness = Loudness()
        self._source = self._new_source()
        self.latency_s = self._source.latency_samples / SAMPLE_RATE_HZ

        # Shared by writer and reader, under the lock.
        self._lock = threading.Lock()
        self._queue: deque[_Sound] = deque()
        self._waiting_samples = 0
        self._generation = 0  # grows with every interruption
        self._planned: deque[_Planned] = deque()
        self._shown = 0  # frames handed out
        self._utterance_shown = (-1, 0)  # number of the utterance shown last, its frames handed out
        self._closed = False
        # The writer's.
        self._input, self._output = self._new_inputs()
        self._open_utterance = False
        # The reader's.
        self._reading = threading.Lock()
        self._seen = 0  # generation that the reader's state belongs to
        self._mouths: deque[_Spoken] = deque()
        self._audio = np.zeros(0, np.float32)  # of the utterance, not yet given to a frame
        self._utterance = 0
        self._between = True  # no sound of the utterance to come was taken yet
        self._moving: Mouth | None = None  # the mouth of the frame planned last, if that speaks
        self._shown_mouth: Mouth | None = None  # likewise of the frame handed out last
        self._overdue: deque[Future] = deque(maxlen=8)  # pictures that were not ready in time
        self._image: np.ndarray | None = None  # handed out last

    # ---------------------------------------------------------------------------------------------------- the writer

    def push_audio(self, samples: Shaped[np.ndarray, "n *c"], sample_rate: int = SAMPLE_RATE_HZ) -> None:
        """Queue sound: float32 or int16, any rate and length; the channels of "n c" are averaged. Never blocks.

        Sound may come faster than real time, up to `SpeakConfig.max_waiting_s`. The first sound after `end_utterance`
        begins a new utterance. Raises InputError for sound that cannot be used and ResourceError for too much of it;
        then nothing was taken.
        """
        self._check_open()
        waiting_s = self.waiting_s + len(samples) / max(sample_rate, 1)
        if waiting_s > self.config.max_waiting_s:
            raise ResourceError(
                f"{waiting_s:.1f} s of sound would wait for their frames; {self.config.max_waiting_s:.0f} s may. "
                "Take frames as fast as sound comes, or raise SpeakConfig.max_waiting_s."
            )
        heard = self._input.push(samples, sample_rate)
        output = heard if self._output is None else self._output.push(samples, sample_rate)
        self._open_utterance = True
        self._enqueue(_Sound(heard, output))

    def end_utterance(self) -> None:
        """The last words are out: what is queued is spoken to its end, as if silence followed. The session lives on."""
        self._check_open()
        if self._open_utterance:
            heard = self._input.finish()
            self._enqueue(_Sound(heard, heard if self._output is None else self._output.finish()), END)
            self._open_utterance = False

    def clear(self) -> float:
        """Interrupt: drop what is queued or rendered and not shown; the next sound begins a new utterance.

        The mouth rests within two frames; pose, gaze and idle movements go on without a jump. Returns the seconds that
        were handed out of the utterance shown last, 0 if it was none.
        """
        with self._lock:
            self._queue.clear()
            self._waiting_samples = 0
            self._generation += 1
            seconds, self._utterance_shown = self._utterance_shown[1] / FPS, (-1, 0)
        self._input, self._output = self._new_inputs()
        self._open_utterance = False
        return seconds

    @property
    def waiting_s(self) -> float:
        """Sound that is queued and not yet turned into motion, s."""
        return self._waiting_samples / SAMPLE_RATE_HZ

    @property
    def pending(self) -> bool:
        """Whether sound that was pushed still waits for its frames; for the reader. Between them, idle frames may come
        where there was no time to listen.
        """
        planned = any(planned.spoken.utterance is not None for planned in self._planned)
        return bool(self._queue or self._mouths or planned)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Load and compile what the first sound would wait for."""
        source = MotionSource(self._speech, self._encoder, self._rest, self.config, self._activity)
        source.push(np.random.default_rng(0).normal(0, 0.05, SAMPLE_RATE_HZ).astype(np.float32), self.timings)
        source.finish(self.timings)

    def close(self) -> None:
        """End the session. Its frames in rendering are dropped, `frames` ends, sound is refused."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            for planned in self._planned:
                planned.image.cancel()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("The session is closed. Begin another one.")

    def _new_inputs(self) -> tuple[SpeechInput, SpeechInput | None]:
        """Conversions to the two rates; the second is None where they are the same."""
        rate_hz = self.config.output_rate_hz
        return SpeechInput(), None if rate_hz == SAMPLE_RATE_HZ else SpeechInput(rate_hz)

    def _enqueue(self, *sounds: _Sound) -> None:
        with self._lock:
            self._queue.extend(sounds)
            self._waiting_samples += sum(len(sound.samples) for sound in sounds)

    # ---------------------------------------------------------------------------------------------------- the reader

    def frames(self) -> Iterator[Frame]:
        """Frames for ever, 25 for each second that they are shown; the reader sets the pace.

        Where a frame of an utterance is not complete when it is asked for, an idle one comes instead.
        """
        while (frame := self._next(idle=True)) is not None:
            yield frame

    def drain(self, keep: int = 0) -> Iterator[Frame]:
        """The frames of utterances that are complete, without waiting for sound and without idling.

        After `end_utterance`, all that remain. The last `keep` frames are left for later, though their rendering
        begins. For files: the frames do not depend on how the sound was cut into chunks.
        """
        while (frame := self._next(idle=False, keep=keep)) is not None:
            yield frame

    def frame_within(self, wait_s: float) -> Frame | None:
        """The next frame, for a reader with a clock: its picture is waited for `wait_s` at most; None: closed.

        A frame of an utterance that is late comes with the newest picture that is ready, so its sound is in time. Where
        the render pool is behind, a frame keeps the picture of the one before. An idle frame that is late is asked for
        again the next time. The first picture of all is always waited for.
        """
        return self._next(idle=True, wait_s=wait_s)

    def _next(self, idle: bool, keep: int = 0, wait_s: float | None = None) -> Frame | None:
        if not self._reading.acquire(blocking=False):
            raise InputError("Two threads take frames of one session. Give each session one reader.")
        until_s = math.inf if wait_s is None else time.monotonic() + wait_s
        try:
            while not self._closed:
                self._catch_up()
                # With a clock, a third of the time at most goes into sound that is not needed yet.
                self._listen(until_s if wait_s is None else until_s - 2 * wait_s / 3)
                self._plan(clocked=wait_s is not None)
                if idle:
                    self._prepare_idling()
                if len(self._planned) + len(self._mouths) > keep:
                    planned = self._planned[0]
                elif idle:
                    planned = self._idle()
                else:
                    return None
                try:
                    left_s = None if wait_s is None or self._image is None else max(0.0, until_s - time.monotonic())
                    image = planned.image.result(left_s)
                    frame = self._hand_out(planned, image)
                except (CancelledError, TimeoutError):
                    if self._closed or wait_s is None:
                        return None
                    frame = self._hand_out_late(planned)
                if frame is not None:
                    return frame
            return None
        finally:
            self._reading.release()

    def _catch_up(self) -> None:
        """After an interruption: frames that nobody saw are to come again, with another mouth."""
        with self._lock:
            if self._seen == self._generation:
                return
            self._seen = self._generation
            for planned in self._planned:
                planned.image.cancel()
            self._animation.put_back(planned.base for planned in self._planned)
            self._planned.clear()
        self._mouths.clear()
        self._overdue.clear()
        self._moving = self._shown_mouth
        self._begin_utterance()

    def _begin_utterance(self) -> None:
        self._source = self._new_source()
        self._audio = np.zeros(0, np.float32)
        self._utterance += 1
        self._between = True

    def _new_source(self) -> MotionSource:
        return MotionSource(self._speech, self._encoder, self._rest, self.config, self._activity, self._loudness)

    @torch.inference_mode()
    def _listen(self, until_s: float) -> None:
        """Sound to mouths, until there are enough to keep the pool busy; after that time, one piece more at most."""
        while len(self._mouths) + len(self._planned) <= self.ahead:
            sound = self._take()
            if sound is None:
                return
            self._between = False
            self._audio = np.concatenate([self._audio, sound.output])
            ended = sound is END
            mouths = self._source.finish(self.timings) if ended else self._source.push(sound.samples, self.timings)
            for mouth in mouths:
                self._mouths.append(_Spoken(mouth, self._frame_audio(), self._utterance))
            if ended:
                self._begin_utterance()
            if time.monotonic() > until_s:
                return

    def _take(self) -> _Sound | None:
        """The next piece of sound from the queue."""
        with self._lock:
            if not self._queue or self._seen != self._generation:
                return None
            sound = self._queue.popleft()
            if len(sound.samples) > PIECE:
                cut = PIECE * self.config.output_rate_hz // SAMPLE_RATE_HZ
                self._queue.appendleft(_Sound(sound.samples[PIECE:], sound.output[cut:]))
                sound = _Sound(sound.samples[:PIECE], sound.output[:cut])
            self._waiting_samples -= len(sound.samples)
            return sound

    def _frame_audio(self) -> Int16[np.ndarray, "n"]:
        count = round(self.config.output_rate_hz / FPS)
        samples, self._audio = self._audio[:count], self._audio[count:]
        scaled = np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)
        return np.pad(scaled, (0, count - len(scaled)))

    def _plan(self, clocked: bool) -> None:
        """Begin to render frames whose mouth is known. `clocked`: only as many as the pool is in time with."""
        while self._mouths and len(self._planned) < self.ahead:
            spoken = self._mouths.popleft()
            base = self._animation.next()
            if base.idle is not None:
                base.idle.cancel()
            begun = {*self._overdue, *(planned.image for planned in self._planned)}
            in_time = sum(not image.done() for image in begun) <= self.ahead // 2
            if in_time or not clocked or not self._planned:
                planned = self._render(base, spoken)
            else:
                motion = self._animation.merge(base, spoken.mouth)
                planned = _Planned(base, motion, spoken, self._planned[-1].image)
            with self._lock:
                self._planned.append(planned)
            self._moving = spoken.mouth

    def _render(self, base: Base, spoken: _Spoken) -> _Planned:
        motion = self._animation.merge(base, spoken.mouth)
        image = self._pool.submit(self._renderer.render, base.driving_frame, motion, base.number, self.timings)
        return _Planned(base, motion, spoken, image)

    @torch.inference_mode()
    def _idle(self) -> _Planned:
        """The next frame with a resting mouth; one half-way to it where the frame before spoke. Stays to come."""
        base = self._animation.peek()
        count = round(self.config.output_rate_hz / FPS)
        if self._moving is not None:
            eased = _Spoken(self._moving.midway(self._rest), np.zeros(count, np.int16), None)
            return self._render(base, eased)
        spoken = _Spoken(self._rest, np.zeros(count, np.int16), None)
        return _Planned(base, self._animation.merge(base, self._rest), spoken, self._idle_image(base))

    @torch.inference_mode()
    def _prepare_idling(self) -> None:
        """Between utterances, begin to render the idle frames that follow. Speech that comes first cancels them."""
        if self._between and not self._mouths:
            for k in range(self._moving is not None, self.ahead - len(self._planned)):
                self._idle_image(self._animation.peek(k))

    def _idle_image(self, base: Base) -> Future:
        if base.idle is None or base.idle.cancelled():
            motion = self._animation.merge(base, self._rest)
            base.idle = self._pool.submit(self._idle_frames.image, self._renderer, base, motion, self.timings)
        return base.idle

    def _hand_out_late(self, planned: _Planned) -> Frame | None:
        """The frame with the newest picture that is ready; its own is rendered on only if that has begun."""
        image = self._image
        assert image is not None
        while self._overdue and self._overdue[0].done():
            overdue = self._overdue.popleft()
            image = image if overdue.cancelled() else overdue.result()
        if planned.spoken.utterance is not None:
            self._overdue.append(planned.image)
        elif planned.image is not planned.base.idle:  # half-way to rest: it is not asked for again
            planned.image.cancel()
        return self._hand_out(planned, image, late=True)

    def _hand_out(self, planned: _Planned, image: np.ndarray, late: bool = False) -> Frame | None:
        """The frame, unless it was interrupted."""
        spoken = planned.spoken
        with self._lock:
            if self._seen != self._generation:
                return None
            self._image = image
            if not late:
                self._overdue.clear()
            if spoken.utterance is None:
                if not late or self._moving is not None:
                    self._animation.next()
                    self._moving = None
            else:
                self._planned.popleft()
                utterance, frames = self._utterance_shown
                self._utterance_shown = (spoken.utterance, frames + 1 if utterance == spoken.utterance else 1)
            self._shown_mouth = None if spoken.utterance is None else spoken.mouth
            pts_s = self._shown / FPS
            self._shown += 1
        speaking = spoken.utterance is not None
        return Frame(image, pts_s, spoken.audio, speaking, planned.base.driving_frame, planned.motion, late)
