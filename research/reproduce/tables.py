"""From finished cells to the paper's Tables 1 and 2.

A figure is the mean over clips for each seed, then mean and sample standard deviation over seeds ("a ± b"; one seed has
no ±). If a cell lacks a figure, the row has a dash, not the mean of the other clips.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from research.reproduce.ablations import ABLATIONS
from research.reproduce.paper import COLUMNS, PAPER, PAPER_SPEED, PAPER_TABLE1, PAPER_TABLE2


@dataclass(frozen=True)
class Metric:
    """A column of a table.

    where   keys of the figure in a report's row
    digits  decimals that are shown
    best    "high" or "low"; "one" for a ratio to the truth
    paper   the paper's column of the same meaning
    """

    title: str
    where: tuple[str, ...]
    digits: int
    best: str
    paper: str | None = None


AVCONF = Metric("AVConf", ("avconf", "confidence"), 2, "high", "AVConf")
METRICS = (
    Metric("SSIM", ("frame", "ssim"), 3, "high", "SSIM"),
    Metric("PSNR", ("frame", "psnr"), 2, "high", "PSNR"),
    Metric("LPIPS", ("frame", "lpips"), 3, "low", "LPIPS"),
    Metric("LMD px", ("lmd_px",), 2, "low", "LMD"),
    Metric("head PSNR", ("head", "psnr"), 2, "high"),
    Metric("mouth PSNR", ("mouth", "psnr"), 2, "high"),
    Metric("opening CCC", ("motion", "opening_ccc"), 2, "high"),
    Metric("width CCC", ("motion", "width_ccc"), 2, "high"),
    Metric("opening amplitude", ("motion", "opening_amplitude"), 2, "one"),
    Metric("width amplitude", ("motion", "width_amplitude"), 2, "one"),
    Metric("closed", ("motion", "closed_share_ratio"), 2, "one"),
    Metric("sync margin", ("sync_margin",), 2, "high"),
    Metric("jitter px", ("jitter_px",), 2, "low"),
)
CROSS_METRICS = (
    Metric("sync margin", ("sync_margin",), 2, "high"),
    Metric("shuffled", ("sync_margin_shuffled",), 2, "low"),
    Metric("offset, frames", ("sync_offset_frames",), 1, "low"),
    Metric("jitter px", ("jitter_px",), 2, "low"),
    Metric("missed faces", ("missed_faces",), 1, "low"),
)
DRIVEN = {"audio": "driven by sound", "tracked": "tracked motion"}


# ------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """A row's value of a metric: each seed's mean over clips, their mean, their sample standard deviation.

    `mean` is None if the figure is not known, `spread` is None for one seed.
    """

    seeds: tuple[float, ...]
    mean: float | None
    spread: float | None

    def text(self, digits: int) -> str:
        """ "mean ± spread", or a dash."""
        if self.mean is None:
            return "–"
        return f"{self.mean:.{digits}f}" + ("" if self.spread is None else f" ± {self.spread:.{digits}f}")


def figure(values: dict[int, list[float | None]]) -> Figure:
    """A figure from one value per clip for each seed. One missing value makes the figure unknown."""
    clips = [[v for v in row if v is not None and math.isfinite(v)] for _, row in sorted(values.items())]
    if not clips or not all(clips) or sum(map(len, clips)) < sum(map(len, values.values())):
        return Figure((), None, None)
    seeds = tuple(sum(row) / len(row) for row in clips)
    mean = sum(seeds) / len(seeds)
    spread = math.sqrt(sum((s - mean) ** 2 for s in seeds) / (len(seeds) - 1)) if len(seeds) > 1 else None
    return Figure(seeds, mean, spread)


def lookup(row: dict | None, where: tuple[str, ...]) -> float | None:
    """The value under nested keys. None if a key is missing."""
    value = row
    for key in where:
        value = value.get(key) if isinstance(value, dict) else None
    return value  # pyright: ignore[reportReturnType] - the last key's value is a number


@dataclass(frozen=True)
class Row:
    """A line of a table: a configuration in one driving mode, over some clips. `extra`: columns of text."""

    key: str
    title: str
    mode: str
    figures: dict[str, Figure]
    extra: dict[str, str]


def row_of(
    cells: Sequence[dict], key: str, title: str, mode: str, metrics: Sequence[Metric], part: str = "report"
) -> Row:
    """The row of cells of one configuration. `part` is "report" or "cross", `mode` the row in it."""

    def over_cells(value) -> Figure:
        values: dict[int, list[float | None]] = {}
        for cell in cells:
            values.setdefault(cell["seed"], []).append(value(cell))
        return figure(values)

    extra = {}
    if part == "report" and mode in DRIVEN:
        seconds = over_cells(_training_seconds)
        extra["training"] = "–" if seconds.mean is None else f"{seconds.mean / 60:.1f} min"
        fps = over_cells(lambda cell: cell["report"]["fps"])
        extra["FPS"] = "–" if mode != "audio" or fps.mean is None else f"{fps.mean:.1f}"
    figures = {m.title: over_cells(lambda c, m=m: lookup((c[part] or {}).get(mode), m.where)) for m in metrics}
    return Row(key, title, mode, figures, extra)


def _training_seconds(cell: dict) -> float | None:
    seconds = cell["report"]["seconds"]
    return sum(seconds.get(part, 0.0) for part in ("speech", "head", "refiner")) or None


def _metrics(cells: Sequence[dict]) -> tuple[Metric, ...]:
    """The columns. AVConf only if a cell was measured with SyncNet's weights."""
    measured = any(lookup(c["report"].get(mode), AVCONF.where) is not None for c in cells for mode in DRIVEN)
    return (*METRICS[:4], AVCONF, *METRICS[4:]) if measured else METRICS


# ----------------------------------------------------------------------------------------------------------- agreement


def agreement(rows: Sequence[Row], metric: Metric) -> dict:
    """How far the order of Table 2's rows agrees with the paper's order, for one metric.

    `tau` is Kendall's τ over the pairs of the paper's rows: 1 is the same order, -1 the reverse. `clear` counts the
    pairs whose means differ by more than the larger spread (None without spreads). `against` lists the clear pairs that
    are the other way round in the paper.
    """
    assert metric.paper is not None, metric.title
    means = {r.key: r.figures[metric.title].mean for r in rows if r.key in PAPER_TABLE2}
    spreads = {r.key: r.figures[metric.title].spread for r in rows}
    sign = 1 if metric.best == "high" else -1
    ours = {key: sign * mean for key, mean in means.items() if mean is not None}
    theirs = {key: sign * (PAPER_TABLE2[key][metric.paper] or 0.0) for key in ours}
    score, against, clear = 0, [], None
    for a, b in combinations(ours, 2):
        difference, expected = ours[a] - ours[b], theirs[a] - theirs[b]
        score += (difference * expected > 0) - (difference * expected < 0)
        pair = [s for s in (spreads[a], spreads[b]) if s is not None]
        if len(pair) < 2:
            continue
        is_clear = abs(difference) > max(pair)
        clear = (clear or 0) + is_clear
        if is_clear and difference * expected < 0:
            better, worse = (a, b) if difference > 0 else (b, a)
            against.append(f"{ABLATIONS[better].title} above {ABLATIONS[worse].title}")
    pairs = len(ours) * (len(ours) - 1) // 2
    order = lambda values: [ABLATIONS[key].title for key in sorted(values, key=lambda k: -values[k])]
    return {
        "metric": metric.title, "pairs": pairs, "tau": score / pairs if pairs else None, "clear": clear,
        "against": against, "order": order(ours), "paper": order(theirs),
    }  # fmt: skip


def _agreement_text(title: str, order: dict) -> str:
    clear = "one seed shows no spread"
    if order["clear"] is not None:
        against = ", ".join(order["against"]) or "none"
        clear = f"{order['clear']} pairs differ by more than the spread over seeds, against the paper: {against}"
    return (
        f"{title}, {order['metric']}: Kendall's τ {order['tau']:+.2f} over {order['pairs']} pairs; {clear}. "
        f"Best first: {', '.join(order['order']).rstrip('.')}."
    )


# ---------------------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Block:
    """One grid of text with a heading, column titles and a note."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Made:
    """A finished table: blocks to print, rows to plot (by heading: rows and control), lines of text, data for JSON."""

    title: str
    blocks: tuple[Block, ...]
    plotted: dict[str, tuple[tuple[Row, ...], Row | None]]
    metrics: tuple[Metric, ...]
    lines: tuple[str, ...]
    data: dict


def _block(heading: str, rows: Sequence[Row], metrics: Sequence[Metric], note: str = "") -> Block:
    extra = list(dict.fromkeys(name for row in rows for name in row.extra))
    columns = ("", *(m.title for m in metrics), *extra)
    texts = [
        (r.title, *(r.figures[m.title].text(m.digits) for m in metrics), *(r.extra.get(e, "–") for e in extra))
        for r in rows
    ]
    return Block(heading, columns, tuple(texts), note)


def table1(cells: Sequence[dict], presets: Sequence[str]) -> Made:
    """The system: truth, control and presets, driven by sound and tracked; another person's sound; each clip alone."""
    metrics = _metrics(cells)
    presets = [p for p in presets if any(c["row"] == p for c in cells)]
    names = sorted({c["clip"]["name"] for c in cells})
    all_clips = _same_identity(cells, presets, metrics)
    note = "The truth's PSNR is infinite. True background raises the frame columns: read the distance from the control."
    heading = f"Same identity, mean over {len(names)} clip{'s' * (len(names) != 1)}"
    blocks = [_block(heading, all_clips, metrics, note)]
    cross = _cross_identity(cells, presets)
    if cross:
        frames = sorted({c["cross"]["frames"] for c in cells if c["cross"]})
        note = (
            "No true frames exist: only sync (by hicode.speech.sync, not SyncNet) and jitter are measured, over "
            f"{frames[0]}-{frames[-1]} frames a clip. No frames are kept for --check."
        )
        blocks.append(_block("Cross identity: each avatar speaks the next clip's sound", cross, CROSS_METRICS, note))
    by_clip = {n: _same_identity([c for c in cells if c["clip"]["name"] == n], presets, metrics) for n in names}
    if len(names) > 1:
        blocks += [_block(name, rows, metrics) for name, rows in by_clip.items()]
    for source, methods in PAPER_TABLE1.items():
        rows = [
            (f"{m} {PAPER}", *(_paper_text(r[c]) for c in COLUMNS), *map(str, PAPER_SPEED.get(m, ("–", "–"))))
            for m, r in methods.items()
        ]
        blocks.append(Block(f"The paper's Table 1, {source}", ("", *COLUMNS, "training", "FPS"), tuple(rows)))
    data = {
        "same_identity": _data(all_clips),
        "cross_identity": _data(cross[1:]),
        "clips": {name: _data(rows) for name, rows in by_clip.items()},
        "paper": PAPER_TABLE1,
    }
    control = all_clips[1] if all_clips else None
    return Made("Table 1", tuple(blocks), {"same identity": (tuple(all_clips[2:]), control)}, metrics, (), data)


def _same_identity(cells: Sequence[dict], presets: Sequence[str], metrics: Sequence[Metric]) -> list[Row]:
    of = lambda preset: [c for c in cells if c["row"] == preset]
    rows = []
    for mode, title in (("ground_truth", "ground truth"), ("control", "control: a static mean head")):
        rows += [row_of(of(preset), mode, title, mode, metrics) for preset in presets[:1]]  # the same for every preset
    for preset in presets:
        for mode, title in DRIVEN.items():
            rows.append(row_of(of(preset), f"{preset}-{mode}", f"hicode {preset}, {title}", mode, metrics))
    return rows


def _cross_identity(cells: Sequence[dict], presets: Sequence[str]) -> list[Row]:
    """The truth's row, then one per preset. Empty if no avatar spoke another clip's sound."""
    rows = []
    for preset in presets:
        spoken = [c for c in cells if c["row"] == preset and c["cross"]]
        if not spoken:
            continue
        if not rows:
            title = "ground truth: the other's own video"
            rows.append(row_of(spoken, "cross-truth", title, "ground_truth", CROSS_METRICS, "cross"))
        title = f"hicode {preset}, another's sound"
        rows.append(row_of(spoken, f"{preset}-cross", title, "audio", CROSS_METRICS, "cross"))
    return rows


def table2(cells: Sequence[dict]) -> Made:
    """The ablations, driven by sound and tracked; the paper's figures; the agreement of the two orders."""
    metrics = _metrics(cells)
    names = [name for name in ABLATIONS if any(c["row"] == name for c in cells)]
    of = lambda name: [c for c in cells if c["row"] == name]
    blocks, plotted, lines, data = [], {}, [], {}
    for mode, title in DRIVEN.items():
        rows = [row_of(of(n), n, ABLATIONS[n].title, mode, metrics) for n in names]
        first = of(names[0]) if names else []  # the control is the same for every row
        control = row_of(first, "control", "control: a static mean head", "control", metrics)
        blocks.append(_block(f"Ablations, {title}", [control, *rows], metrics))
        plotted[title] = (tuple(rows), control)
        orders = [agreement(rows, m) for m in metrics if m.paper]
        data[mode] = {"control": _data([control]), "rows": _data(rows), "agreement": orders}
        lines += [_agreement_text(title, order) for order in orders if order["pairs"]]
    rows = [(f"{ABLATIONS[n].title} {PAPER}", *(_paper_text(r[c]) for c in COLUMNS)) for n, r in PAPER_TABLE2.items()]
    blocks.append(Block("The paper's Table 2", ("", *COLUMNS), tuple(rows)))
    lines += [f"{ABLATIONS[n].title}: {ABLATIONS[n].what}." for n in names]
    return Made("Table 2", tuple(blocks), plotted, metrics, tuple(lines), data | {"paper": PAPER_TABLE2})


def _paper_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _data(rows: Sequence[Row]) -> list[dict]:
    return [
        {
            "key": r.key,
            "title": r.title,
            "mode": r.mode,
            "figures": {m: {"mean": f.mean, "spread": f.spread, "seeds": list(f.seeds)} for m, f in r.figures.items()},
            **r.extra,
        }
        for r in rows
    ]
