"""Is a video synthetic, by which avatar, and is it unaltered? Reads both layers of marks and says whether they agree.

Exit codes of `hicode verify`: 0 a mark of hicode is there and nothing contradicts it; 1 no mark of hicode; 2 the file
cannot be read; 3 a mark is there, but the file was altered after signing, or the two layers contradict each other.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import av.error
import numpy as np
from jaxtyping import UInt8

from hicode.errors import HicodeError, InputError
from hicode.media.source import INPUT_OPTIONS, media_url
from hicode.media.video import read_video
from hicode.trust.machine_key import MachineKey
from hicode.trust.marks import AVATAR_ASSERTION, c2pa_context, read_aigc
from hicode.trust.watermark import FALSE_ALARM_RATE, WINDOW_PX, Accumulator, Detection, detect, detect_in

FRAMES_A_PART, PARTS = 25, 12
"""The watermark is looked for in the whole video first, then in each of at most PARTS equal parts."""
FINDABLE_PX = 192
"""Pictures with a shorter side below this are too small for the watermark: it is found in some and not in others."""
LIMITS = (
    "No mark found does not prove that a video is real: marks can be removed, and other systems have others.",
    "The watermark proves no author: its key is public, so anybody can forge it, or copy it into a real recording.",
    "A signature shows that nothing changed after signing. Whose key it is remains open, unless it is this machine's.",
    "Consent is what somebody stated when the avatar was trained. Nobody checked it.",
)

SYNTHETIC_TYPE = "rainedAlgorithmicMedia"  # of "trained..." and "compositeWithTrained..."
Verdict = Literal["synthetic", "altered", "contradictory", "no mark"]


@dataclass(frozen=True)
class ManifestFinding:
    """The C2PA layer. `state`: none; ours (signed by this machine); valid (by an unknown key); invalid (altered).

    `by_hicode`: it has hicode's assertion about an avatar. `source_types`: the digital source types of its actions.
    `failures` are C2PA's own codes.
    """

    state: Literal["none", "ours", "valid", "invalid"]
    by_hicode: bool = False
    generator: str = ""
    avatar_sha256: str = ""
    avatar_id: str = ""
    consent: str = ""
    consent_sha256: str = ""
    source_types: str = ""
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class WatermarkFinding:
    """The watermark layer. `marked_s`: parts of the video that carry it, (start, end) in seconds.

    `false_alarm_rate`: probability that an unmarked video gives such evidence; it counts every part that was looked at.
    `confidence`: probability that `avatar_id` is right, given that the mark is there. `mirrored`, `scale`: of the
    picture against the original. `side_px`: the picture's shorter side; below FINDABLE_PX the mark may be there unseen.
    """

    present: bool
    avatar_id: str
    confidence: float
    false_alarm_rate: float
    marked_s: tuple[tuple[float, float], ...]
    scale: float
    mirrored: bool
    frames: int
    side_px: int


@dataclass(frozen=True)
class Verification:
    """What both layers say of a file, and the conclusion. `agreement` is None where one of them is absent."""

    path: str
    verdict: Verdict
    manifest: ManifestFinding
    watermark: WatermarkFinding
    aigc: dict | None
    agreement: bool | None

    @property
    def exit_code(self) -> int:
        """See the module's docstring."""
        return {"synthetic": 0, "no mark": 1, "altered": 3, "contradictory": 3}[self.verdict]

    def to_json(self) -> str:
        """All fields, the limits and the exit code."""
        return json.dumps(asdict(self) | {"exit_code": self.exit_code, "limits": LIMITS}, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        mark, manifest = self.watermark, self.manifest
        lines = [f"{self.path}: {_SENTENCES[self.verdict]}"]
        if mark.present:
            lines.append(
                f"  watermark: avatar {mark.avatar_id or 'not readable'} ({100 * mark.confidence:.1f} % sure), "
                f"false-alarm rate {mark.false_alarm_rate:.0e}, at {_times(mark.marked_s)}, scale {mark.scale:.2f}"
                + (", mirrored" if mark.mirrored else "")
            )
        else:
            small = f"; {mark.side_px} px are too few to find it surely" if mark.side_px < FINDABLE_PX else ""
            lines.append(f"  watermark: none above the threshold (false-alarm rate {FALSE_ALARM_RATE:.0e}){small}")
        lines.append(f"  C2PA: {_manifest_line(manifest)}")
        lines.append(f"  AIGC field: {'there' if self.aigc else 'none'}")
        if self.agreement is not None:
            lines.append(
                f"  watermark and C2PA {'name the same avatar' if self.agreement else 'contradict each other'}"
            )
        return "\n".join(lines + [f"  Note: {limit}" for limit in LIMITS])


_SENTENCES: dict[Verdict, str] = {
    "synthetic": "synthetic, made by hicode; nothing contradicts its marks.",
    "altered": "synthetic, made by hicode; the file was altered after it was signed.",
    "contradictory": "its marks contradict each other: one is forged or of another video, or a program signed anew.",
    "no mark": "no mark of hicode.",
}


def verify(path: Path | str) -> Verification:
    """Look for both layers in a video. InputError where it cannot be read as one."""
    path = Path(path)
    watermark = find_watermark(path)
    manifest = read_manifest(path)
    agreement = None
    if watermark.avatar_id and manifest.by_hicode:
        agreement = watermark.avatar_id == manifest.avatar_id
    return Verification(
        str(path), _verdict(manifest, watermark, agreement), manifest, watermark, read_aigc(path), agreement
    )


def _verdict(manifest: ManifestFinding, watermark: WatermarkFinding, agreement: bool | None) -> Verdict:
    """Contradictory: a sound manifest of another maker next to our watermark, or of ours where one should be found."""
    sound = manifest.state in ("ours", "valid")
    lacking = manifest.by_hicode and not watermark.present and watermark.side_px >= FINDABLE_PX
    if agreement is False or (sound and (lacking or (watermark.present and not manifest.by_hicode))):
        return "contradictory" if watermark.present or manifest.by_hicode else "no mark"
    if manifest.state == "invalid" and (manifest.by_hicode or watermark.present):
        return "altered"
    return "synthetic" if watermark.present or manifest.by_hicode else "no mark"


def synthetic_source(path: Path | str) -> str | None:
    """One sentence if a recording that somebody wants to learn from says itself that it is synthetic; else None.

    Reads any maker's C2PA manifest and AIGC field, and looks for our watermark in the first seconds. A video that
    cannot be read says nothing.
    """
    path = Path(path)
    if SYNTHETIC_TYPE in read_manifest(path).source_types:
        return f"{path.name} has a C2PA manifest that calls it synthetic."
    if (read_aigc(path) or {}).get("Label") in ("1", 1):
        return f"{path.name} has an AIGC field that calls it synthetic."
    frames = islice(read_video(path, max_size=2 * WINDOW_PX), 0, 10 * FRAMES_A_PART, 10)
    try:
        found = detect(_middle(frame) for frame in frames)
    except InputError:
        return None
    if not found.present:
        return None
    avatar = "" if found.payload is None else f" of avatar {found.payload.avatar_id:08x}"
    return f"{path.name} carries hicode's watermark{avatar}: it is synthetic."


def read_manifest(path: Path | str) -> ManifestFinding:
    """The active C2PA manifest of an MP4; other containers count as without one."""
    import c2pa

    with open(path, "rb") as f:
        if f.read(8)[4:] != b"ftyp":
            return ManifestFinding("none")

    try:
        key = MachineKey.load()
    except HicodeError:
        key = None  # a machine without a key of its own knows none
    kind = {".mov": "video/quicktime", ".m4v": "video/x-m4v"}.get(Path(path).suffix.lower(), "video/mp4")
    try:
        with open(path, "rb") as f, c2pa.Reader(kind, f, context=c2pa_context(key)) as reader:
            store = json.loads(reader.json())
            state = str(reader.get_validation_state())
    except (c2pa.C2paError, OSError, ValueError) as error:
        missing = str(error).startswith("ManifestNotFound")  # its class has no public name that types know
        return ManifestFinding("none" if missing else "invalid", failures=() if missing else (str(error),))
    active = store["manifests"][store["active_manifest"]]
    avatar = next((a["data"] for a in active.get("assertions", ()) if a["label"] == AVATAR_ASSERTION), {})
    failed = store.get("validation_results", {}).get("activeManifest", {}).get("failure", ())
    generator = (active.get("claim_generator_info") or [{}])[0]
    return ManifestFinding(
        state="ours" if state == "Trusted" else "valid" if state == "Valid" else "invalid",
        by_hicode=bool(avatar),
        generator=f"{generator.get('name', '')} {generator.get('version', '')}".strip(),
        avatar_sha256=str(avatar.get("avatar_sha256", "")),
        avatar_id=str(avatar.get("watermark", {}).get("avatar_id", "")),
        consent=str(avatar.get("consent", "")),
        consent_sha256=str(avatar.get("consent_sha256", "")),
        source_types=" ".join(_source_types(active)),
        failures=tuple(f["code"] for f in failed if f["code"] != "signingCredential.untrusted"),
    )


def _middle(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "y x 3"]:
    """At most the window in which the detector searches."""
    y, x = (max(side - WINDOW_PX, 0) // 2 for side in frame.shape[:2])
    return frame[y : y + WINDOW_PX, x : x + WINDOW_PX]


def _source_types(manifest: dict) -> Iterator[str]:
    for assertion in manifest.get("assertions", ()):
        if assertion["label"].startswith("c2pa.actions"):
            yield from (str(a.get("digitalSourceType", "")) for a in assertion["data"].get("actions", ()))


def find_watermark(path: Path | str) -> WatermarkFinding:
    """Look in the whole video, then in its parts: a part of it may be ours."""
    parts = list(_parts(Path(path)))
    spans = [span for span, _ in parts]
    pictures = [part.picture() for _, part in parts]
    counts = [part.frames for _, part in parts]
    looked = 1 + len(parts) * (len(parts) > 1)
    best = _counted(detect_in(np.average(pictures, axis=0, weights=counts).astype(np.float32)), looked)
    marked = spans if best.present else []
    if len(parts) > 1 and not (best.present and best.coherence > 0.5):
        found = [_counted(detect_in(picture), looked) for picture in pictures]
        marked = [span for span, detection in zip(spans, found, strict=True) if detection.present] or marked
        best = min([best, *found], key=lambda d: (d.payload is None, d.false_alarm_rate))
    return WatermarkFinding(
        present=best.present,
        avatar_id="" if best.payload is None else f"{best.payload.avatar_id:08x}",
        confidence=best.payload_confidence,
        false_alarm_rate=best.false_alarm_rate,
        marked_s=tuple(marked),
        scale=round(best.alignment.scale_x, 3),
        mirrored=best.alignment.mirrored,
        frames=sum(counts),
        side_px=min(pictures[0].shape),
    )


def _counted(found: Detection, looked: int) -> Detection:
    """The detection with the number of parts in its rate."""
    rate = min(found.false_alarm_rate * looked, 1.0)
    present = found.present and rate <= FALSE_ALARM_RATE
    return replace(found, false_alarm_rate=rate, present=present, payload=found.payload if present else None)


def _parts(path: Path) -> Iterator[tuple[tuple[float, float], Accumulator]]:
    """Equal parts of at least 4 s, each with at most FRAMES_A_PART of its frames, 25 frames a second counted."""
    length_s = _length_s(path)
    count = int(np.clip(length_s // 4, 1, PARTS)) if length_s else 1
    part_s = length_s / count if length_s else float("inf")
    step = max(1, round(min(part_s, 1e6) * 25 / FRAMES_A_PART)) if length_s else 4
    current, number = Accumulator(), 0
    for index, frame in enumerate(read_video(path)):
        if index / 25 >= (number + 1) * part_s and number + 1 < count:
            if current.frames:
                yield (number * part_s, (number + 1) * part_s), current
            current, number = Accumulator(), number + 1
        if index % step == 0:
            current.add(frame)
    if current.frames:
        yield (number * part_s if number else 0.0, length_s or index / 25), current


def _length_s(path: Path) -> float:
    try:
        with av.open(media_url(path), options=INPUT_OPTIONS) as container:
            return max(container.duration or 0, 0) / av.time_base
    except (av.error.FFmpegError, OSError):
        return 0.0


def _times(spans: tuple[tuple[float, float], ...]) -> str:
    joined: list[list[float]] = []
    for start, end in spans:
        if joined and start - joined[-1][1] < 0.05:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return ", ".join(f"{start:.1f}-{end:.1f} s" for start, end in joined) or "unknown times"


def _manifest_line(manifest: ManifestFinding) -> str:
    if manifest.state == "none":
        return "no manifest"
    who = {"ours": "signed by this machine", "valid": "signed by a key unknown here", "invalid": "not valid"}
    line = f"{who[manifest.state]}, {manifest.generator or 'unknown software'}"
    if manifest.by_hicode:
        line += f", avatar {manifest.avatar_id}, consent {manifest.consent}"
    return line + (f" ({', '.join(manifest.failures)})" if manifest.failures else "")
