"""Make src/hicode/weights/presence.safetensors, the score of speech against other sound: `python tools/fit_presence.py --data ../shared/data`.

It learns from the sources of the manifest but for its anchor (GRID measures it), from espeak-ng's voices in fifteen languages, and from sounds that
are no speech.
"""

from pathlib import Path

import torch
import tyro

from hicode.media.audio import read_audio
from hicode.speech.encoder import create_encoder
from hicode.speech.presence import WEIGHTS
from hicode.training.presence import PresenceConfig, fit_presence, rows_by_level, synthetic_speech
from hicode.training.sources import find_sources

MANIFEST = Path(__file__).with_name("speech_sources.toml")


def main(
    data: Path, out: Path = WEIGHTS, manifest: Path = MANIFEST, speakers: int = 30, sentences: int = 2, config: PresenceConfig = PresenceConfig()
) -> None:
    """
    Args:
        data: folder with the clips that the manifest names.
        manifest: whom to learn from.
        out: where the weights go.
        speakers: synthetic ones.
        sentences: that each of them says.
        config: of the fit.
    """
    sources = find_sources([data], manifest)
    sounds, terms = [], {}
    for source in sources.speakers:
        for path in source.clips.values() if source.learn and source.speaker != sources.anchor else ():
            samples = read_audio(path)
            samples = samples[: 640 * source.learned_frames(len(samples) // 640)]
            sounds.append((samples, rows_by_level(samples)))
            terms[source.speaker] = source.terms
    sounds += synthetic_speech(speakers, sentences, config.seed)
    terms["espeak"] = f"{speakers} synthetic voices (espeak-ng), and synthetic noises"
    presence = fit_presence(sounds, create_encoder("embedded"), config, lambda x: print(f"\r{100 * x:3.0f} %", end="", flush=True))
    presence.save(out, terms)
    print(f"\n{out}: {sum(len(s) for s, _ in sounds) / 16000 / 60:.1f} min of speech, |w| {float(torch.linalg.vector_norm(presence.weight)):.2f}")


if __name__ == "__main__":
    tyro.cli(main)
