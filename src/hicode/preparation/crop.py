"""Who is in a video, and the one square that is kept of it.

"Source" pixels are the upright video's, "crop" pixels those of the square. There is one box for the whole clip, so
that it cannot jitter. A box is (x0, y0, x1, y1).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from hicode.audio import FPS
from hicode.errors import InputError
from hicode.files import check_free_space
from hicode.media.video import Picture, VideoInfo
from hicode.preparation.clip import write_png
from hicode.preparation.defects import DefectFinder
from hicode.preparation.steps import whole_folder
from hicode.progress import Report
from hicode.threads import map_frames
from hicode.tracking.landmarks import FaceDetector

Image = UInt8[np.ndarray, "h w 3"]
Box = Float[np.ndarray, "4"]


@dataclass(frozen=True)
class CropConfig:
    """How faces are searched for, and how the square lies around the one that is followed.

    Margins are around the detector's box (brows to chin, ear to ear), in its sizes.
    """

    sample_every: int = 5  # frames between two samples
    sample_size_px: int = 640  # longer side of the frames that are sampled
    above: float = 0.7  # margin for hair
    below: float = 0.35  # margin for the neck
    side: float = 0.5  # margin for hair and turns
    fills: float = 0.4  # a square video whose face takes this share of its side is a head crop already
    stays: float = 0.5  # a candidate is seen in this share of the samples of the most constant person
    bystander: float = 0.15  # a further face is reported when seen in this share of the samples


@dataclass(frozen=True)
class FaceSearch:
    """The face that is followed, and who else is there. Source px.

    reach    x0, y0, x1, y1 of all the face's boxes, outliers left out
    others   sizes of the other faces
    light    [frame, mean brightness of the face] of each sample
    """

    frame_count: int
    samples: int
    size_px: float
    reach: list[float]
    others: list[float]
    light: list[list[float]]


@dataclass(frozen=True)
class Crop:
    """box: x0, y0, side in source px · scale: crop px in a source px · defects: fields of `Defect`."""

    frame_count: int
    box: list[int]
    scale: float
    defects: list[dict] = field(default_factory=list)


def find_faces(
    frames: Iterable[Image],
    detector: FaceDetector,
    info: VideoInfo,
    min_frames: int,
    config: CropConfig,
    progress: Callable[[int], None],
) -> FaceSearch:
    """Search frames, decoded to `config.sample_size_px`, for the face to follow.

    Raises InputError where the video is too short, or no face is in half of the samples.
    """
    samples: list[list[Box]] = []
    light: dict[tuple[float, ...], float] = {}
    count, scale = 0, 1.0
    for i, frame in enumerate(frames):
        count += 1
        scale = info.width / frame.shape[1]
        if i % config.sample_every == 0:
            boxes = [np.array([face.x0, face.y0, face.x1, face.y1]) for face in detector.detect(frame)]
            samples.append([box * scale for box in boxes])
            light |= {tuple(box * scale): _mean_in(frame, box) for box in boxes}
        progress(count)
    if count < min_frames:
        raise InputError(
            f"{info.path} has {count / FPS:.1f} s of pictures; at least {min_frames / FPS:g} s are needed, a minute is "
            "better. Give a longer video."
        )
    person, others = _choose_person(samples, count, info, config)
    boxes = np.array(list(person.values()))
    low, high = np.percentile(boxes[:, :2], 1, axis=0), np.percentile(boxes[:, 2:], 99, axis=0)
    return FaceSearch(
        frame_count=count,
        samples=len(samples),
        size_px=_median_size(person),
        reach=[float(v) for v in (*low, *high)],
        others=[_median_size(other) for other in others],
        light=[[config.sample_every * i, round(light[tuple(box)], 1)] for i, box in person.items()],
    )


def _choose_person(
    samples: list[list[Box]], frame_count: int, info: VideoInfo, config: CropConfig
) -> tuple[dict[int, Box], list[dict[int, Box]]]:
    """(the largest person of those who stay, the others who are there for a while)."""
    people = follow_people(samples)
    if not people:
        raise InputError(
            f"No face in {info.path} (looked at {len(samples)} of {frame_count} frames). Film one person from the "
            "front, in good light."
        )
    longest = max(map(len, people))
    staying = [person for person in people if len(person) >= config.stays * longest]
    chosen = max(staying, key=lambda person: len(person) * _median_size(person))
    if len(chosen) < 0.5 * len(samples):
        raise InputError(
            f"A face in only {len(chosen)} of the {len(samples)} frames looked at in {info.path}. Trim the video with "
            "--start and --duration to where one person is seen."
        )
    return chosen, [p for p in people if p is not chosen and len(p) >= config.bystander * len(samples)]


def follow_people(samples: list[list[Box]]) -> list[dict[int, Box]]:
    """Boxes of successive samples joined into people, each {sample: box}.

    A box goes to the person last seen nearest to it, nearest pairs first: none farther than one face size away, or of
    another size by more than half.
    """
    people: list[dict[int, Box]] = []
    for i, boxes in enumerate(samples):
        pairs = []
        for p, person in enumerate(people):
            last = person[max(person)]
            for b, box in enumerate(boxes):
                distance = np.hypot(*((last[:2] + last[2:]) / 2 - (box[:2] + box[2:]) / 2)) / _size(last)
                if distance < 1 and 1 / 1.5 < _size(box) / _size(last) < 1.5:
                    pairs.append((distance, p, b))
        taken_people, taken_boxes = set(), set()
        for _, p, b in sorted(pairs):
            if p not in taken_people and b not in taken_boxes:
                people[p][i] = boxes[b]
                taken_people.add(p)
                taken_boxes.add(b)
        people += [{i: box} for b, box in enumerate(boxes) if b not in taken_boxes]
    return people


def _size(box: Box) -> float:
    return float(max(box[2] - box[0], box[3] - box[1]))


def _median_size(person: dict[int, Box]) -> float:
    return float(np.median([_size(box) for box in person.values()]))


def _mean_in(frame: Image, box: Box) -> float:
    x0, y0 = np.clip(box[:2], 0, np.array(frame.shape[1::-1]) - 1).astype(int)
    x1, y1 = np.clip(box[2:], (x0 + 1, y0 + 1), frame.shape[1::-1]).astype(int)
    return float(frame[y0:y1, x0:x1].mean())


def check_light(light: list[list[float]], video: Path, max_light: float) -> None:
    """Raise InputError where the face's brightness changes by more than the factor `max_light`.

    One colour is learned for each place. Trained on a face that falls to 0.4 of its brightness for a while, a head has
    dark patches that wander over it.
    """
    frames, means = np.array(light).T
    low, high = np.percentile(means, [5, 95])
    factor = high / max(low, 1.0)
    if factor > max_light:
        darkest = clock(int(frames[means.argmin()]))
        raise InputError(
            f"The light on the face changes by a factor of {factor:.1f} along {video} (darkest at {darkest}). "
            "Trim it to even light with --start and --duration, or accept patches with "
            f"--max-light {np.ceil(10 * factor) / 10:.1f}."
        )


def clock(frame: int) -> str:
    """A frame's time as mm:ss.ss."""
    minutes, seconds = divmod(frame / FPS, 60)
    return f"{int(minutes):02d}:{seconds:05.2f}"


def head_box(
    width: int, height: int, reach: Sequence[float], size_px: float, config: CropConfig = CropConfig()
) -> tuple[int, int, int]:
    """(x0, y0, side) of the one square that holds head, hair and neck wherever the face goes in the video.

    `reach` is the outline of all the face's boxes. A square video that is a head crop already is kept whole, exactly.
    Where the border cuts the margins, the square holds what there is: no pixel is invented.
    """
    if width == height and size_px >= config.fills * width:
        return 0, 0, width
    left, right = reach[0] - config.side * size_px, reach[2] + config.side * size_px
    top, bottom = reach[1] - config.above * size_px, reach[3] + config.below * size_px
    side = int(min(max(right - left, bottom - top), width, height))
    x = np.clip((left + right - side) / 2, 0, width - side)
    y = np.clip((top + bottom - side) / 2, 0, height - side)
    return round(float(x)), round(float(y)), side


def decode_size(box: Sequence[int], size: int, info: VideoInfo) -> int | None:
    """Longer side to which frames are decoded: about twice the crop's resolution, or None for their own.

    It spares most of the conversion of a 4K frame.
    """
    scale = 2 * size / box[2]
    return None if scale >= 1 else round(max(info.width, info.height) * scale)


def write_crops(
    frames: Iterable[Picture], folder: Path, size: int, box: tuple[int, int, int], expected: int, report: Report
) -> Crop:
    """Write the crop of every frame, decoded to `decode_size`, to `folder`/frames as a lossless picture.

    It also finds the frames with defects.
    """
    check_free_space(folder, round(expected * size * size * 1.5))
    x0, y0, side = box
    scale, count, finder = min(1.0, 2 * size / side), 0, DefectFinder()
    with whole_folder(folder / "frames") as target:

        def crops() -> Iterator[tuple[int, UInt8[np.ndarray, "s s 3"]]]:
            for t, frame in enumerate(frames):
                crop = crop_square(frame.rgb, x0 * scale, y0 * scale, side * scale, size)
                finder.add(crop, frame.damaged)
                yield t, crop

        for _ in map_frames(lambda crop: write_png(target / f"{crop[0]:06d}.png", crop[1]), crops()):
            count += 1
            report(count, expected)
    return Crop(count, [x0, y0, side], size / side, [asdict(defect) for defect in finder.defects()])


def crop_square(frame: Image, x0: float, y0: float, side: float, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """A square of a frame at `size` px: exact where nothing is scaled, else averaged or bicubic."""
    x, y, n = round(x0), round(y0), round(side)
    x, y = min(x, frame.shape[1] - n), min(y, frame.shape[0] - n)
    part = frame[max(y, 0) : max(y, 0) + n, max(x, 0) : max(x, 0) + n]
    if part.shape[:2] == (size, size):
        return part
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if n > size else cv2.INTER_CUBIC)
