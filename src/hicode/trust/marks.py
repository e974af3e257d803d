"""What a video says about itself: a C2PA manifest, China's `AIGC` field, and a label that people can see.

C2PA 2: signed metadata in the MP4, bound to its bytes by a hash. Everything is offline: no time stamp of a server, no
public trust list. `AIGC`: GB 45438-2025 asks for a metadata field of this name with JSON of seven keys.

Labels, by summaries of two texts (neither was at hand in full): the Code of Practice of June 10, 2026 on Art. 50 of the
EU AI Act (the acronym AI as the main element, top right, at the start of a video and again later), and GB 45438-2025
(AI with the word for "generated", at least 5 % of the picture's shorter side high, for at least 2 s from the start).
"""

import datetime
import json
import shutil
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import av
import av.error
import cv2
import numpy as np
from jaxtyping import UInt8

from hicode import __version__
from hicode.audio import FPS
from hicode.errors import InputError, OutputError
from hicode.files import atomic_path
from hicode.media.source import INPUT_OPTIONS, media_url
from hicode.trust.consent import ConsentRecord
from hicode.trust.machine_key import MachineKey, config_folder
from hicode.trust.watermark import Payload, Watermark

Label = Literal["eu", "cn"]
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
AVATAR_ASSERTION = "org.hicode.avatar"
AIGC_FIELD = "AIGC"
LABEL_HEIGHT: dict[Label, float] = {"eu": 0.07, "cn": 0.07}
"""Height of the writing as a share of the picture's shorter side; capitals are three quarters of it."""
LABEL_S: dict[Label, tuple[float, float | None]] = {"eu": (5.0, 60.0), "cn": (3.0, None)}
"""Seconds that the label is shown, and after how many it comes again (None: at the start only)."""


@dataclass(frozen=True)
class MarkConfig:
    """How videos are marked. InputError where the marks are left out without a reason."""

    mark: Literal["full", "none"] = "full"
    """full: invisible mark in every frame, C2PA manifest, AIGC field. none: nothing of these; needs --reason."""
    reason: str | None = None  # Why the video carries no mark. It is kept in the avatar's log.
    label: Label | None = None
    """A label that people can see: eu (AI GENERATED, again each minute) or cn (as GB 45438-2025 asks)."""

    def __post_init__(self):
        if self.mark not in ("full", "none"):
            raise InputError(f"There is no mark {self.mark!r}. Choose full or none.")
        if self.label not in (None, "eu", "cn"):
            raise InputError(f"There is no label {self.label!r}. Choose eu or cn.")
        reason = (self.reason or "").strip()
        if self.mark == "none" and not reason:
            raise InputError("--mark none needs a reason. Say with --reason why the video carries no mark.")
        if self.mark == "full" and reason:
            raise InputError("--reason is for videos without a mark. Leave it out, or add --mark none.")


@dataclass(frozen=True)
class VideoRecord:
    """What the manifest of one video says. Hashes are SHA-256, hexadecimal."""

    avatar_sha256: str
    consent: ConsentRecord
    driving_sha256: str = ""

    @property
    def payload(self) -> Payload:
        """What the watermark says."""
        return Payload.of_hash(self.avatar_sha256)


class FrameMarker:
    """Marks the frames of one video in their order: label, then watermark."""

    def __init__(self, config: MarkConfig, record: VideoRecord, fps: float = FPS):
        self._watermark = Watermark(record.payload) if config.mark == "full" else None
        self._label: Label | None = config.label
        self._fps, self._frame = fps, 0

    def __call__(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The next frame, marked; a copy where anything changes."""
        if self._label is not None and label_is_shown(self._label, self._frame / self._fps):
            frame = labelled(frame, self._label)
        self._frame += 1
        return frame if self._watermark is None else self._watermark.embed(frame)


# --------------------------------------------------------------------------------------------------------- signed file


def sign_video(path: Path | str, record: VideoRecord, key: MachineKey | None = None) -> None:
    """Add the AIGC field and a signed C2PA manifest to an MP4 of ours, in place; whole or not at all.

    OutputError where it cannot be written.
    """
    path, key = Path(path), key or MachineKey.load()
    import c2pa

    with atomic_path(path) as signed:
        plain = signed.with_name(f"plain-{signed.name}")
        try:
            _with_metadata(path, plain, {AIGC_FIELD: json.dumps(aigc_field(record), ensure_ascii=False)})
            builder = c2pa.Builder(manifest(record), c2pa_context(key))
            info = c2pa.C2paSignerInfo(alg=b"es256", sign_cert=key.chain.encode(), private_key=key.private, ta_url=None)
            builder.sign_file(str(plain), str(signed), c2pa.Signer.from_info(info))
        except c2pa.C2paError as error:
            raise OutputError(
                f"{path} could not be signed ({error}). Free some space, or use --mark none with a reason."
            ) from error


def log_unmarked(config: MarkConfig, record: VideoRecord, path: Path) -> None:
    """Append a video that was made without marks, and the reason, to the avatar's log on this machine.

    The log is `log/AVATAR_ID.jsonl` next to the signing key. OutputError where it cannot be written.
    """
    if config.mark != "none":
        return
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = {"date": date, "video": path.name, "avatar_sha256": record.avatar_sha256, "reason": config.reason}
    file = config_folder() / "log" / f"{record.payload.avatar_id:08x}.jsonl"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(
            f"The log {file} cannot be written ({error.strerror}). Set HICODE_CONFIG to your own folder."
        ) from error


def c2pa_context(key: MachineKey | None):
    """Offline settings that trust this machine's own root, if it has a key."""
    import c2pa

    settings: dict = {
        "verify": {"verify_trust": True, "remote_manifest_fetch": False, "verify_after_sign": False},
        "builder": {"thumbnail": {"enabled": False}},
    }
    return c2pa.Context.from_dict(settings if key is None else settings | {"trust": {"trust_anchors": key.root}})


def manifest(record: VideoRecord) -> dict:
    """The C2PA manifest's definition."""
    generator = {"name": "hicode", "version": __version__}
    avatar = {
        "avatar_sha256": record.avatar_sha256,
        "watermark": {"coding": "hicode-ss-1", "avatar_id": f"{record.payload.avatar_id:08x}"},
        "consent": "stated" if record.consent.stated else "not stated",
        "consent_sha256": record.consent.sha256,
    }
    created = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": generator}
    definition: dict = {
        "claim_generator_info": [generator],
        "format": "video/mp4",
        "title": "Talking head",
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
            {"label": AVATAR_ASSERTION, "data": avatar},
        ],
    }
    if record.driving_sha256:
        definition["ingredients"] = [
            {
                "title": "Driving video",
                "format": "video/mp4",
                "relationship": "inputTo",
                "instance_id": f"sha256:{record.driving_sha256}",
            }
        ]
    return definition


def aigc_field(record: VideoRecord) -> dict[str, str]:
    """The seven keys of GB 45438-2025, annex on metadata. Label 1: is generated. Fields of platforms stay empty."""
    return {
        "Label": "1",
        "ContentProducer": f"hicode {__version__}",
        "ProduceID": uuid.uuid4().hex,
        "ReservedCode1": f"avatar {record.payload.avatar_id:08x}",
        "ContentPropagator": "",
        "PropagateID": "",
        "ReservedCode2": "",
    }


def read_aigc(path: Path | str) -> dict | None:
    """The AIGC field of any video; None where there is none, or no JSON object in it."""
    try:
        with av.open(media_url(path), options=INPUT_OPTIONS) as container:
            text = container.metadata.get(AIGC_FIELD)
        value = json.loads(text) if text else None
    except (av.error.FFmpegError, OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _with_metadata(source: Path, target: Path, metadata: dict[str, str]) -> None:
    """The same packets with more metadata. QuickTime's keys hold fields of any name; MP4's own list does not."""
    try:
        with (
            av.open(media_url(source)) as given,
            av.open(media_url(target), "w", options={"movflags": "+faststart+use_metadata_tags"}) as made,
        ):
            streams = {s.index: made.add_stream_from_template(s) for s in given.streams if s.type in ("video", "audio")}
            made.metadata.update(given.metadata | metadata)
            for packet in given.demux(*(s for s in given.streams if s.index in streams)):
                if packet.dts is not None:
                    packet.stream = streams[packet.stream.index]
                    made.mux(packet)
    except (av.error.FFmpegError, OSError) as error:
        free = shutil.disk_usage(target.parent).free / 1e6
        raise OutputError(
            f"{source} could not be marked ({error.strerror}; {free:.0f} MB are free). Free some space."
        ) from error


# --------------------------------------------------------------------------------------------------------------- label

# Strokes of two Chinese characters ("generated"), in a square from (0, 0) to (1, 1).
_GENERATED = (
    ((0.28, 0.05), (0.08, 0.42)), ((0.2, 0.28), (0.9, 0.28)), ((0.52, 0.02), (0.52, 0.95)), ((0.15, 0.6), (0.87, 0.6)),
    ((0.03, 0.95), (0.97, 0.95)),
), (
    ((0.1, 0.25), (0.95, 0.25)), ((0.16, 0.25), (0.16, 0.6), (0.04, 0.97)),
    ((0.16, 0.48), (0.44, 0.48), (0.42, 0.8), (0.3, 0.78)),
    ((0.55, 0.02), (0.62, 0.5), (0.78, 0.85), (0.93, 0.97), (0.96, 0.75)),
    ((0.86, 0.42), (0.72, 0.7), (0.46, 0.97)), ((0.72, 0.04), (0.86, 0.15)),
)  # fmt: skip


def label_is_shown(label: Label, time_s: float) -> bool:
    """Whether the label is in the picture at this time of the video."""
    shown_s, again_s = LABEL_S[label]
    return (time_s if again_s is None else time_s % again_s) < shown_s


def labelled(frame: UInt8[np.ndarray, "h w 3"], label: Label) -> UInt8[np.ndarray, "h w 3"]:
    """A copy with the label at the top right: white letters on a dark ground."""
    h, w = frame.shape[:2]
    size = max(round(LABEL_HEIGHT[label] * min(h, w)), 8)
    ink = _label_ink(label, size)
    pad = max(size // 3, 2)
    ground = np.pad(ink, pad)
    y, x = size // 2, max(w - ground.shape[1] - size // 2, 0)
    height, width = min(ground.shape[0], h - y), min(ground.shape[1], w - x)
    alpha = ground[:height, :width, None].astype(np.float32) / 255
    out = np.array(frame)
    place = out[y : y + height, x : x + width]
    place[:] = (0.35 * place * (1 - alpha) + 255 * alpha + 0.5).astype(np.uint8)
    return out


@cache
def _label_ink(label: Label, size: int) -> UInt8[np.ndarray, "h w"]:
    """The label's strokes, 255 on 0, with letters `size` px high."""
    stroke = max(round(size / 9), 1)
    font, text = cv2.FONT_HERSHEY_SIMPLEX, "AI GENERATED" if label == "eu" else "AI"
    scale = cv2.getFontScaleFromHeight(font, size, stroke)
    (width, height), _ = cv2.getTextSize(text, font, scale, stroke)
    glyphs = _GENERATED if label == "cn" else ()
    ink = np.zeros((max(size, height) + 2 * stroke, width + len(glyphs) * (size + size // 4) + 2 * stroke), np.uint8)
    cv2.putText(ink, text, (stroke, stroke + max(size, height)), font, scale, 255, stroke, cv2.LINE_AA)
    for i, glyph in enumerate(glyphs):
        corner = np.array([width + size // 4 + i * (size + size // 4), stroke])
        for points in glyph:
            line = np.round((np.array(points) * size + corner) * 16).astype(np.int32)
            cv2.polylines(ink, [line], False, 255, stroke, cv2.LINE_AA, shift=4)
    return ink
