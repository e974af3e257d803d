"""The sound of a clip: level, its offset from the picture, speech features."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import soundfile
from jaxtyping import Float32

from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from hicode.media.audio import level_db, read_audio, write_audio
from hicode.preparation.clip import load_track, save_features, shift_audio
from hicode.speech.encoders import EncoderName, create_encoder, match_frames
from hicode.speech.sync import SyncModel, estimate_offset


@dataclass(frozen=True)
class SoundConfig:
    """What counts as silence."""

    silent_db: float = -60.0  # a sound that is nowhere louder is taken as none
    quiet_db: float = -45.0  # a frame this far below the loudest is quiet


@dataclass(frozen=True)
class Sound:
    """What the recording has: level of the loudest part, share of quiet frames, share of clipped samples."""

    usable: bool
    present: bool
    loudest_db: float = 0.0
    quiet: float = 0.0
    clipped: float = 0.0


@dataclass(frozen=True)
class Offset:
    """How much later the mouth is than the sound, in frames; 0 where the measurement is not reliable."""

    frames: float
    reliable: bool
    measured: float
    margin: float


@dataclass(frozen=True)
class Features:
    """The encoder of the stored speech features, as `EncoderSpec.to_json` has it."""

    encoder: dict


def store_sound(folder: Path, video: Path, start_s: float, frame_count: int, config: SoundConfig) -> Sound:
    """Write the sound as recorded to `folder`/audio.wav, cut as the pictures are; nothing where it is silent."""
    samples = read_audio(video)
    (folder / "audio.wav").unlink(missing_ok=True)
    if samples is None:
        return Sound(usable=False, present=False)
    samples = shift_audio(samples[round(start_s * SAMPLE_RATE_HZ) :], 0.0, frame_count)
    loudest = level_db(samples)
    if loudest < config.silent_db:
        return Sound(usable=False, present=True, loudest_db=round(loudest, 1))
    write_audio(folder / "audio.wav", samples, SAMPLE_RATE_HZ)
    power = (samples.reshape(frame_count, SAMPLES_PER_FRAME).astype(np.float64) ** 2).mean(1)
    quiet = 10 * np.log10(np.maximum(power, 1e-12)) < loudest + config.quiet_db
    clipped = float((np.abs(samples) > 0.999).mean())
    return Sound(True, True, round(loudest, 1), round(float(quiet.mean()), 3), round(clipped, 5))


def _stored_sound(folder: Path) -> Float32[np.ndarray, "n"]:
    return soundfile.read(str(folder / "audio.wav"), dtype="float32")[0]


def measure_offset(folder: Path, train: range) -> Offset:
    """The offset between sound and lips in the training part."""
    model = SyncModel.load()
    features = match_frames(create_encoder(cast(EncoderName, model.encoder)).encode(_stored_sound(folder)), train.stop)
    landmarks = load_track(folder / "track.safetensors").motion.landmarks[: train.stop]
    found = estimate_offset(features, landmarks, model)
    frames = round(found.offset_frames, 2)
    return Offset(frames if found.reliable else 0.0, found.reliable, frames, round(found.margin, 3))


def store_features(
    folder: Path, encoder_name: EncoderName, encoder_weights: Path | None, frame_count: int, offset_frames: float
) -> Features:
    """Write the speech features of the sound, moved onto the picture."""
    encoder = create_encoder(encoder_name, encoder_weights)
    features = match_frames(encoder.encode(shift_audio(_stored_sound(folder), offset_frames, frame_count)), frame_count)
    save_features(folder / f"audio.{encoder_name}.safetensors", features, encoder, offset_frames)
    return Features(encoder.spec.to_json())
