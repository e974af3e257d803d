"""hicode: a talking head learned from a short video, spoken by any audio.

The same steps as the command line, importable by name; nothing heavy loads until a name is used.

    clip = hicode.prepare("me.mp4", "me.clip")
    avatar = hicode.train(clip, "me.hicode", hicode.TrainConfig(preset="draft"))
    hicode.speak(avatar, "hello.wav", "out.mp4", hicode.SpeakConfig(region="face"))

Or live, sound in and frames out:

    with hicode.Session(avatar, hicode.SpeakConfig()) as session:
        session.push_audio(samples, sample_rate=24_000)
        session.end_utterance()
        for frame in session.frames():
            show(frame.image, frame.audio)
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "prepare": "hicode.preparation.pipeline",
    "Clip": "hicode.preparation.clip",
    "train": "hicode.training.avatar",
    "TrainConfig": "hicode.training.avatar",
    "Avatar": "hicode.avatar.avatar",
    "speak": "hicode.session.speak",
    "synthesize": "hicode.session.speak",
    "Session": "hicode.session.session",
    "SpeakConfig": "hicode.session.config",
    "open": "hicode.session.open",
    "evaluate": "hicode.evaluation.report",
    "compare_videos": "research.compare.videos",  # in a clone
    "rasterize": "hicode.render",
    "Gaussians": "hicode.gaussians",
    "Camera": "hicode.camera",
    "Motion": "hicode.motion",
    "FaceTrack": "hicode.motion",
}
# A star import must not hide the built-in `open`, and must not need a clone.
__all__ = ["__version__", *(name for name in _HOME if name not in ("open", "compare_videos"))]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'hicode' has no attribute {name!r}")
    if name == "compare_videos":
        import_module("hicode.runtime").find_research()
    return getattr(import_module(_HOME[name]), name)
