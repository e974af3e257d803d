"""Small media files made with PyAV. Times are read off the pictures: a grey level that rises with time."""

from fractions import Fraction

import av
import numpy as np

from hicode.media.video import read_video


def grey(value: int, width=64, height=48) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def encode(
    path, frames, times_s, codec="libx264", pix_fmt="yuv420p", audio=None, options=None, aspect=None, start_audio_s=0.0
):
    """Frames at arbitrary presentation times. `audio` = (samples "c n", rate, layout, codec)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options or ({"crf": "1"} if codec == "libx264" else {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 90000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        sound = None
        if audio is not None:
            samples, rate, layout, audio_codec = audio
            sound = container.add_stream(audio_codec, rate=rate, layout=layout)
        for image, time_s in zip(frames, times_s):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time_s * 90000), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(start_audio_s * rate)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def levels(path, **kw) -> np.ndarray:
    return np.array([f.mean() for f in read_video(path, **kw)])


def click(length_s: float, at_s: float, rate: int) -> np.ndarray:
    """A 1 kHz tone burst of 60 ms: lossy codecs keep its onset to a few milliseconds."""
    t = np.arange(int(length_s * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 1000 * t) * ((t >= at_s) & (t < at_s + 0.06))).astype(np.float32)


def onset_s(samples: np.ndarray, rate=16000) -> float:
    return np.argmax(np.abs(samples) > 0.15) / rate


def tone(seconds: float, rate: int = 48_000, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_tracks(path, pictures=(), sounds=(), video_start_s=0.0, defaults=None, file_format=None, options=None):
    """A file with 25 fps pictures (grey levels) and sound tracks at 48 kHz, packets interleaved by time.

    defaults: whether each sound track is marked as the default one.
    """
    with av.open(str(path), "w", format=file_format, options=options or {}) as container:
        packets, video = [], None
        codec = "libvpx" if "webm" in str(path) else "libx264"
        if len(pictures):
            video = container.add_stream(codec, rate=25)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        streams = []
        for k in range(len(sounds)):
            stream = container.add_stream("libopus" if codec == "libvpx" else "aac", rate=48_000, layout="mono")
            if defaults is not None:
                stream.disposition = av.stream.Disposition.default if defaults[k] else av.stream.Disposition(0)
            streams.append(stream)
        for i, level in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(grey(int(level)), format="rgb24")
            frame.pts, frame.time_base = i + round(25 * video_start_s), Fraction(1, 25)
            packets += video.encode(frame)
        if video is not None:
            packets += video.encode(None)
        for stream, samples in zip(streams, sounds, strict=True):
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 48_000, Fraction(1, 48_000), 0
            packets += [*stream.encode(frame), *stream.encode(None)]
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    return path
