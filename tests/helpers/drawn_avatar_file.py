"""A real avatar file in seconds: a drawn head that trains for some iterations, with the generic speech models."""

import sys
from pathlib import Path

from helpers.drawn_head import a_config, draw_clip, drawn_avatar
from hicode.tracking.head_model import HeadModel
from hicode.training.adaptation import load_generic
from hicode.training.head import train_head


def write_drawn_avatar(path: Path) -> Path:
    """The file; it can speak."""
    model = HeadModel.load()
    clip = draw_clip(model)
    avatar = drawn_avatar(clip, model, train_head(clip, model, a_config()))
    avatar.speech = load_generic()
    return avatar.save(path)


if __name__ == "__main__":
    write_drawn_avatar(Path(sys.argv[1]))
