"""A report for people: the table on the terminal, and what the page shares with it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from hicode.evaluation.images import REGIONS, Box

ROWS = ("ground_truth", "control", "video", "tracked", "audio")
TITLES = {
    "ground_truth": "ground truth",
    "control": "control",
    "video": "video",
    "tracked": "tracked",
    "audio": "audio",
}


@dataclass(frozen=True)
class Column:
    """A figure of a row: where it stands, how it is shown, and which way is better (+1 up, -1 down, 0 neither)."""

    group: str
    name: str
    where: tuple[str, ...]
    digits: int
    better: int = 0

    @property
    def title(self) -> str:
        return f"{self.group} {self.name}".strip()


COLUMNS: tuple[Column, ...] = (
    *(
        Column(region, metric.upper(), (region, metric), digits, better)
        for region in REGIONS
        for metric, digits, better in (("psnr", 2, 1), ("ssim", 3, 1), ("lpips", 3, -1))
    ),
    Column("frame", "LPIPS (VGG)", ("frame", "lpips_vgg"), 3, -1),
    Column("lips", "LMD px", ("lmd_px",), 2, -1),
    Column("lips", "LMD / eyes", ("lmd_norm",), 4, -1),
    Column("lips", "opening r", ("opening_correlation",), 2, 1),
    Column("lips", "opening", ("opening_mean",), 3),
    Column("lips", "closure", ("closure",), 2, 1),
    Column("lips", "closed else", ("closed_elsewhere",), 2),
    Column("sync", "offset", ("sync_offset_frames",), 1),
    Column("sync", "margin", ("sync_margin",), 2, 1),
    Column("sync", "shuffled", ("sync_margin_shuffled",), 2),
    Column("sync", "AUC", ("sync_auc_shifted",), 2, 1),
    Column("sync", "near", ("sync_windows_near",), 2, 1),
    Column("AVConf", "LSE-C", ("avconf", "confidence"), 2, 1),
    Column("AVConf", "LSE-D", ("avconf", "distance"), 2, -1),
    Column("AVConf", "offset", ("avconf", "offset_frames"), 0),
    Column("stability", "jitter px", ("jitter_px",), 2),
    Column("stability", "in silence", ("motion_in_silence",), 2, -1),
    Column("", "seam", ("seam",), 4, -1),
    Column("", "no face", ("missed_faces",), 0, -1),
)


def rows_of(report: dict) -> dict[str, dict]:
    """The report's rows by name, in order. A comparison of two videos has the video's figures at its top level."""
    found = {name: report.get(name) for name in ROWS}
    if "over_control" in report and "video" in report["over_control"]:
        found["video"] = report
    return {name: row for name, row in found.items() if row is not None}


def shown_columns(report: dict) -> list[Column]:
    """The columns of which some row has a figure."""
    rows = rows_of(report).values()
    return [c for c in COLUMNS if any(value(row, c.where) is not None for row in rows)]


def value(row: dict, where: tuple[str, ...]) -> float | None:
    found = row
    for key in where:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def cell(row: dict, column: Column) -> str:
    """A figure as shown: "∞" for the PSNR of equal images, "–" for what is not known."""
    found = value(row, column.where)
    if found is None:
        region = row.get(column.where[0])
        return "∞" if column.where[-1] == "psnr" and isinstance(region, dict) and region.get("ssim") == 1 else "–"
    return f"{found:.{column.digits}f}"


def headlines(report: dict) -> list[str]:
    """What the figures come to, a line each."""
    lines = []
    for mode, gain in report["over_control"].items():
        parts = [f"{region} {gain[region]:+.2f} dB" for region in REGIONS if gain[region] is not None]
        if gain["lmd_px"] is not None:
            parts.append(f"LMD {gain['lmd_px']:+.2f} px")
        if parts:
            lines.append(f"{TITLES[mode]} over the control: {', '.join(parts)}")
    steady = [
        f"{TITLES[m]} {row['jitter_px']:.2f}" for m, row in rows_of(report).items() if row["jitter_px"] is not None
    ]
    if steady:
        lines.append(f"landmark jitter, px (the truth's own is what to aim at): {', '.join(steady)}")
    if kept := report.get("training_frames"):
        lines.append(
            f"frames that it learned from, under the motion that training found in them: frame {_db(kept['frame']['psnr'])}, head {_db(kept['head']['psnr'])}, "
            f"LPIPS {kept['frame']['lpips']:.3f} over {kept['frames']} of them; what it remembers, no measure of unseen ones"
        )
    if report.get("fps") is not None:
        lines.append(
            f"{report['fps']:.1f} frames a second, {report['timing']['fps_is']}, on {report['provenance']['machine']}"
        )
    if report.get("seconds"):
        lines.append(
            "seconds: "
            + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in report["seconds"].items())
            + f"; {report['peak_memory_mb']:.0f} MB"
        )
    lines += report["notes"]
    return lines + [f"not measured: {what}, because {why}" for what, why in report["not_measured"].items()]


def _db(psnr: float | None) -> str:
    return "∞" if psnr is None else f"{psnr:.2f} dB"


def print_table(report: dict, console=None) -> None:
    """The report as a table for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    table = Table(
        title=report["title"], title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False
    )
    shown = rows_of(report)
    # Measures go down and rows across, unlike on the page: four columns fit any terminal.
    table.add_column("", no_wrap=True)
    for name in shown:
        table.add_column(TITLES[name], justify="right", no_wrap=True)
    for column in shown_columns(report):
        table.add_row(column.title, *(cell(row, column) for row in shown.values()))
    console.print(table)
    for line in headlines(report):
        console.print(line, highlight=False)


@dataclass(frozen=True, eq=False)
class ShownFrame:
    """A frame as the page shows it: the truth and each row's image, each row's head PSNR (NaN where it has none), and what chose it."""

    t: int
    why: str
    truth: UInt8[np.ndarray, "h w 3"]
    images: dict[str, UInt8[np.ndarray, "h w 3"]]
    psnr_head: dict[str, float]


@dataclass(frozen=True, eq=False)
class Pictures:
    """`frames` side by side, worst first; `strip`: (frame, {row: mouth crop}) evenly through the frames; `sound` at 16 kHz, 640 samples
    a frame, or None."""

    frames: list[ShownFrame]
    strip: list[tuple[int, dict[str, UInt8[np.ndarray, "h w 3"]]]]
    sound: Float32[np.ndarray, "640*t"] | None = None


def worst_first(psnr: list[float], worst: int, spread: int) -> list[tuple[int, str]]:
    """(frame, why) of the `worst` lowest values, worst first, then of `spread` evenly spread others. NaN is never worst."""
    order = np.argsort(np.nan_to_num(np.asarray(psnr, float), nan=np.inf), kind="stable")
    low = [int(i) for i in order[:worst] if np.isfinite(psnr[int(i)])]
    even = [int(i) for i in np.linspace(0, len(psnr) - 1, spread) if int(i) not in low]
    return [(i, f"worst {k + 1} by head PSNR") for k, i in enumerate(low)] + [
        (i, "evenly spread") for i in dict.fromkeys(even)
    ]


def evenly(count: int, shown: int) -> list[int]:
    return sorted({int(k) for k in np.linspace(0, count - 1, min(count, shown))})


def mouth_windows(boxes: list[Box], width: int, height: int) -> list[Box]:
    """Windows of one size about the mouth boxes, as large as the largest, inside the image: over time the mouth changes, not the scale."""
    w = min(max(x1 - x0 for x0, _, x1, _ in boxes), width)
    h = min(max(y1 - y0 for _, y0, _, y1 in boxes), height)
    out = []
    for x0, y0, x1, y1 in boxes:
        left = min(max((x0 + x1 - w) // 2, 0), width - w)
        top = min(max((y0 + y1 - h) // 2, 0), height - h)
        out.append((left, top, left + w, top + h))
    return out
