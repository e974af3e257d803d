"""A report for people: its rows and columns, the table on the terminal, and what the page shares with it."""

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hicode.evaluation.images import AREAS

TITLES = {
    "audio": "audio",
    "video": "video",
    "tracked": "tracked",
    "tracked_face": "tracked face",
    "ground_truth": "ground truth",
    "control": "control",
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
        """With its group."""
        return f"{self.group} {self.name}".strip()


COLUMNS: tuple[Column, ...] = (
    *(
        Column(area, metric.upper(), (area, metric), digits, better)
        for area in AREAS
        for metric, digits, better in (("psnr", 2, 1), ("ssim", 3, 1), ("lpips", 3, -1))
    ),
    Column("frame", "LPIPS (VGG)", ("frame", "lpips_vgg"), 3, -1),
    Column("lips", "LMD px", ("lmd_px",), 2, -1),
    Column("lips", "LMD / eyes", ("lmd_norm",), 4, -1),
    Column("lips", "opening r", ("opening_correlation",), 2, 1),
    Column("lips", "opening CCC", ("motion", "opening_ccc"), 2, 1),
    Column("lips", "width CCC", ("motion", "width_ccc"), 2, 1),
    Column("lips", "opening ampl.", ("motion", "opening_amplitude"), 2),
    Column("lips", "width ampl.", ("motion", "width_amplitude"), 2),
    Column("lips", "closed share", ("motion", "closed_share"), 2),
    Column("lips", "closure", ("closure",), 2, 1),
    Column("lips", "closed else", ("closed_elsewhere",), 2),
    Column("motion", "lip dynamics", ("motion", "lip_dynamics"), 2),
    Column("motion", "lip speed", ("motion", "lip_speed"), 2),
    Column("motion", "brow dynamics", ("motion", "brow_dynamics"), 2),
    Column("motion", "head", ("motion", "head_motion"), 2),
    Column("motion", "silent lips", ("motion", "silent_lip_stability"), 2),
    Column("motion", "in silence", ("motion_in_silence",), 2, -1),
    Column("motion", "to loudness", ("motion", "lip_loudness"), 3),
    Column("motion", "jitter px", ("jitter_px",), 2),
    Column("sync", "offset", ("sync_offset_frames",), 1),
    Column("sync", "margin", ("sync_margin",), 2, 1),
    Column("sync", "shuffled", ("sync_margin_shuffled",), 2),
    Column("sync", "AUC", ("sync_auc_shifted",), 2, 1),
    Column("sync", "near", ("sync_windows_near",), 2, 1),
    Column("AVConf", "LSE-C", ("avconf", "confidence"), 2, 1),
    Column("AVConf", "LSE-D", ("avconf", "distance"), 2, -1),
    Column("AVConf", "offset", ("avconf", "offset_frames"), 0),
    Column("", "seam", ("seam",), 4, -1),
    Column("", "no face", ("missed_faces",), 0, -1),
)


def rows_of(report: dict) -> dict[str, dict]:
    """The report's rows by name, in order. A comparison of two videos has the video's figures at its top level."""
    rows = {name: report.get(name) for name in TITLES}
    if "over_control" in report and "video" in report["over_control"]:
        rows["video"] = report
    return {name: row for name, row in rows.items() if row is not None}


def shown_columns(report: dict) -> list[Column]:
    """The columns of which some row has a figure."""
    rows = rows_of(report).values()
    return [c for c in COLUMNS if any(value(row, c.where) is not None for row in rows)]


def value(row: dict, where: tuple[str, ...]) -> float | None:
    """A figure of a row."""
    figure = row
    for key in where:
        figure = figure.get(key) if isinstance(figure, dict) else None
    return figure  # pyright: ignore[reportReturnType] - a column's path ends at a number


def cell(row: dict, column: Column) -> str:
    """A figure as shown: "∞" for the PSNR of equal images, "–" for what is not known."""
    figure = value(row, column.where)
    if figure is None:
        area = row.get(column.where[0])
        return "∞" if column.where[-1] == "psnr" and isinstance(area, dict) and area.get("ssim") == 1 else "–"
    return f"{figure:.{column.digits}f}"


def headlines(report: dict) -> list[str]:
    """What the figures come to, a line each."""
    lines = []
    for mode, gain in report["over_control"].items():
        parts = [f"{area} {gain[area]:+.2f} dB" for area in AREAS if gain[area] is not None]
        if gain["lmd_px"] is not None:
            parts.append(f"LMD {gain['lmd_px']:+.2f} px")
        if parts:
            lines.append(f"{TITLES[mode]} over the control: {', '.join(parts)}")
    if kept := report.get("training_frames"):
        frame, head = (kept[area]["psnr"] for area in ("frame", "head"))
        lines.append(
            f"training frames ({kept['frames']} of them, whose poses were fitted): frame {_db(frame)}, "
            f"head {_db(head)}, LPIPS {kept['frame']['lpips']:.3f}; no rank with the rows"
        )
    if report.get("fps") is not None:
        lines.append(
            f"{report['fps']:.1f} frames a second, {report['timing']['fps_is']}, on {report['provenance']['machine']}"
        )
    if report.get("seconds"):
        stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in report["seconds"].items())
        lines.append(f"seconds: {stages}; {report['peak_memory_mb']:.0f} MB")
    lines += report["notes"]
    return lines + [f"not measured: {what}, because {why}" for what, why in report["not_measured"].items()]


def _db(psnr: float | None) -> str:
    return "∞" if psnr is None else f"{psnr:.2f} dB"


def print_table(report: dict, console: Console | None = None) -> None:
    """The report as a table for people. Measures go down and rows across: six columns fit any terminal."""
    console = console or Console()
    table = Table(title=report["title"], title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    rows = rows_of(report)
    table.add_column("", no_wrap=True)
    for name in rows:
        table.add_column(TITLES[name], justify="right", no_wrap=True)
    for column in shown_columns(report):
        table.add_row(column.title, *(cell(row, column) for row in rows.values()))
    console.print(table)
    for line in headlines(report):
        console.print(line, highlight=False)
