"""Tables 1 and 2 of the paper beside ours: from finished cells to figures, Markdown, LaTeX and plots.

Ours are means over clips for each seed, then mean and sample standard deviation over seeds ("a ± b"; one seed has no ±). Frames without a figure are
treated as the reports treat them; a figure that some cell lacks is a dash, never the mean of the rest. The paper's rows are marked as following
its own protocol (videos, split and driving it does not state): orientation, not a comparison.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations

from hicode.training.stages import ABLATIONS

PAPER = "(paper, its own protocol)"


@dataclass(frozen=True)
class Metric:
    """A column: where it stands in a report's row, how it is shown, which way is better, and what the paper calls it."""

    title: str
    where: tuple[str, ...]
    digits: int
    best: str  # "high" or "low"
    paper: str | None = None


AVCONF = Metric("AVConf", ("avconf", "confidence"), 2, "high", "AVConf")
METRICS = (
    Metric("SSIM", ("frame", "ssim"), 3, "high", "SSIM"),
    Metric("PSNR", ("frame", "psnr"), 2, "high", "PSNR"),
    Metric("LPIPS", ("frame", "lpips"), 3, "low", "LPIPS"),
    Metric("LMD px", ("lmd_px",), 2, "low", "LMD"),
    Metric("head PSNR", ("head", "psnr"), 2, "high"),
    Metric("mouth PSNR", ("mouth", "psnr"), 2, "high"),
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
DRIVEN = {"tracked": "tracked motion", "audio": "driven by sound"}

_COLUMNS = ("SSIM", "PSNR", "LPIPS", "LMD", "AVConf")
_row = lambda *values: dict(zip(_COLUMNS, values, strict=True))
# Table 1 of the paper, {data set: {method: row}}; Geneface++ only has the third data set.
PAPER_TABLE1: dict[str, dict[str, dict[str, float | None]]] = {
    "HDTF": {
        "Ground Truth": _row(1, None, 0, 0, 8.960), "Wav2Lip": _row(0.759, 20.354, 0.138, 4.452, 8.451),
        "PC-AVS": _row(0.756, 22.483, 0.154, 4.926, 8.694), "ER-NeRF": _row(0.932, 30.214, 0.035, 2.914, 6.936),
        "RAD-NeRF": _row(0.939, 29.911, 0.063, 2.976, 6.480), "GaussianTalker": _row(0.964, 32.622, 0.024, 2.074, 7.507),
        "HiCoDe": _row(0.983, 37.767, 0.013, 1.819, 8.428),
    },
    "Testset 1": {
        "Ground Truth": _row(1, None, 0, 0, 8.610), "Wav2Lip": _row(0.659, 15.950, 0.289, 5.309, 7.809),
        "PC-AVS": _row(0.787, 21.579, 0.140, 6.678, 7.544), "ER-NeRF": _row(0.965, 35.221, 0.018, 2.619, 5.708),
        "RAD-NeRF": _row(0.959, 33.849, 0.039, 2.824, 6.644), "GaussianTalker": _row(0.973, 36.637, 0.019, 2.211, 6.389),
        "HiCoDe": _row(0.983, 38.107, 0.010, 1.528, 7.961),
    },
    "Testset 2": {
        "Ground Truth": _row(1, None, 0, 0, 8.442), "Wav2Lip": _row(0.647, 19.507, 0.217, 3.544, 7.943),
        "PC-AVS": _row(0.757, 22.557, 0.156, 4.771, 8.809), "ER-NeRF": _row(0.819, 28.297, 0.060, 2.850, 6.309),
        "RAD-NeRF": _row(0.838, 28.715, 0.133, 3.207, 6.443), "Geneface++": _row(0.825, 28.763, 0.119, 3.019, 7.229),
        "GaussianTalker": _row(0.962, 33.195, 0.021, 2.095, 6.579), "HiCoDe": _row(0.985, 39.892, 0.014, 1.216, 7.861),
    },
}  # fmt: skip
# (training, frames a second) as its Table 1 has them, on its GPU.
PAPER_SPEED = {
    "Wav2Lip": ("–", 15), "PC-AVS": ("–", 31), "ER-NeRF": ("3 h", 34), "RAD-NeRF": ("8 h", 38), "Geneface++": ("22 h", 24),
    "GaussianTalker": ("2 h", 98), "HiCoDe": ("30 min", 157),
}  # fmt: skip
PAPER_TABLE2: dict[str, dict[str, float]] = {
    "without-3dmm": _row(0.970, 35.042, 0.023, 2.187, 5.706),
    "without-landmarks": _row(0.979, 37.564, 0.018, 1.868, 7.460),
    "none": _row(0.969, 32.614, 0.027, 5.281, 3.597),
    "addition": _row(0.970, 34.749, 0.021, 2.418, 3.847),
    "attention": _row(0.968, 33.511, 0.026, 2.966, 2.934),
    "random-init": _row(0.974, 37.141, 0.013, 1.998, 7.386),
    "without-hfec": _row(0.957, 31.738, 0.037, 4.258, 3.476),
    "full": _row(0.984, 38.285, 0.011, 1.511, 8.403),
}


# ----------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """Of a row and a metric: each seed's mean over clips; their mean and sample standard deviation (None for one seed). Not known: `mean` is None."""

    seeds: tuple[float, ...]
    mean: float | None
    spread: float | None

    def text(self, digits: int) -> str:
        if self.mean is None:
            return "–"
        return f"{self.mean:.{digits}f}" + ("" if self.spread is None else f" ± {self.spread:.{digits}f}")


def figure(values: dict[int, Sequence[float | None]]) -> Figure:
    """`values`: for each seed one value a clip. A clip without one makes the figure unknown: the mean of the others would be of other clips."""
    if (
        not values
        or any(v is None or not math.isfinite(v) for clips in values.values() for v in clips)
        or not all(values.values())
    ):
        return Figure((), None, None)
    seeds = tuple(sum(clips) / len(clips) for _, clips in sorted(values.items()))
    mean = sum(seeds) / len(seeds)
    spread = math.sqrt(sum((s - mean) ** 2 for s in seeds) / (len(seeds) - 1)) if len(seeds) > 1 else None
    return Figure(seeds, mean, spread)


def lookup(row: dict | None, where: tuple[str, ...]) -> float | None:
    value = row
    for key in where:
        value = value.get(key) if isinstance(value, dict) else None
    return value


@dataclass(frozen=True)
class Row:
    """A line of a table: a configuration under one way of driving, over some clips."""

    key: str
    title: str
    mode: str
    figures: dict[str, Figure]
    extra: dict[str, str]


def _metrics(cells: Sequence[dict]) -> tuple[Metric, ...]:
    """The columns: AVConf only where some cell was measured with SyncNet's weights."""
    known = any(lookup(row, AVCONF.where) is not None for c in cells for row in (c["report"].get(m) for m in DRIVEN))
    return (*METRICS[:4], AVCONF, *METRICS[4:]) if known else METRICS


def rows_of(
    cells: Sequence[dict], key: str, title: str, mode: str, metrics: Sequence[Metric], part: str = "report"
) -> Row:
    """The row of cells of one configuration: `part` "report" or "cross", `mode` the row in it."""

    def values(metric: Metric) -> dict[int, list[float | None]]:
        out: dict[int, list[float | None]] = {}
        for cell in cells:
            out.setdefault(cell["seed"], []).append(lookup((cell[part] or {}).get(mode), metric.where))
        return out

    extra = {}
    if part == "report" and mode in DRIVEN:
        seconds = figure(
            {s: [_training_seconds(c) for c in cells if c["seed"] == s] for s in {c["seed"] for c in cells}}
        )
        extra["training"] = "–" if seconds.mean is None else f"{seconds.mean / 60:.1f} min"
        fps = figure({s: [c["report"]["fps"] for c in cells if c["seed"] == s] for s in {c["seed"] for c in cells}})
        extra["FPS"] = fps.text(1).split(" ")[0] if mode == "audio" else "–"
    return Row(key, title, mode, {m.title: figure(values(m)) for m in metrics}, extra)


def _training_seconds(cell: dict) -> float | None:
    seconds = cell["report"]["seconds"]
    return sum(seconds.get(part, 0.0) for part in ("speech", "head", "compositor")) or None


# ----------------------------------------------------------------------------------------------------------------- agreement


def agreement(rows: Sequence[Row], metric: Metric) -> dict:
    """How far our order of Table 2's variants is the paper's, for one metric.

    Kendall's τ over the pairs of the paper's eight rows that we have: 1 the same order, -1 the reverse. A pair is "clear" where our two means differ
    by more than the larger of the two spreads (None without spreads); `against` lists clear pairs that the paper has the other way round.
    """
    known = [r for r in rows if r.key in PAPER_TABLE2 and r.figures[metric.title].mean is not None]
    sign = 1 if metric.best == "high" else -1
    score, against, clear = 0, [], None
    for a, b in combinations(known, 2):
        ours = sign * (a.figures[metric.title].mean - b.figures[metric.title].mean)
        theirs = sign * (PAPER_TABLE2[a.key][metric.paper] - PAPER_TABLE2[b.key][metric.paper])
        score += (ours * theirs > 0) - (ours * theirs < 0)
        spreads = [f.figures[metric.title].spread for f in (a, b)]
        if None in spreads:
            continue
        clear = (clear or 0) + (abs(ours) > max(spreads))
        if abs(ours) > max(spreads) and ours * theirs < 0:
            better, worse = (a, b) if ours > 0 else (b, a)
            against.append(f"{better.title} above {worse.title}")
    pairs = len(known) * (len(known) - 1) // 2
    order = [r.title for r in sorted(known, key=lambda r: -sign * r.figures[metric.title].mean)]
    theirs = [r.title for r in sorted(known, key=lambda r: -sign * PAPER_TABLE2[r.key][metric.paper])]
    tau = score / pairs if pairs else None
    return {
        "metric": metric.title,
        "pairs": pairs,
        "tau": tau,
        "clear": clear,
        "against": against,
        "order": order,
        "paper": theirs,
    }


# ----------------------------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Block:
    """A table with a heading: rows of texts under columns, `bold` the best text of columns by (row, column)."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Made:
    """What a table comes to: blocks to print, rows to plot, lines to read, and the same as JSON."""

    title: str
    blocks: tuple[Block, ...]
    plotted: dict[str, tuple[tuple[Row, ...], Row | None]]  # heading: (rows, control)
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
    """Same identity (tracked, driven by sound) with ground truth and control, another's sound, each clip by itself, and the paper's rows."""
    metrics = _metrics(cells)
    here = [p for p in presets if any(c["row"] == p for c in cells)]
    of = lambda preset, name=None: [c for c in cells if c["row"] == preset and name in (None, c["clip"]["name"])]
    names = sorted({c["clip"]["name"] for c in cells})

    def same_identity(name: str | None) -> list[Row]:
        rows = []
        for preset in here[:1]:  # truth and control do not depend on the preset
            for mode, title in (("ground_truth", "ground truth"), ("control", "control: a static mean head")):
                rows.append(rows_of(of(preset, name), mode, title, mode, metrics))
        for preset in here:
            for mode, title in DRIVEN.items():
                rows.append(rows_of(of(preset, name), f"{preset}-{mode}", f"hicode {preset}, {title}", mode, metrics))
        return rows

    whole = same_identity(None)
    clips = f"{len(names)} clip{'s' * (len(names) != 1)}"
    note = "PSNR of the truth is infinite. The frame columns profit from true background: a result is its distance from the control."
    blocks = [_block(f"Same identity, mean over {clips}", whole, metrics, note)]
    cross = []
    for preset in here:
        spoken = [c for c in of(preset) if c["cross"]]
        if spoken:
            cross.append(
                rows_of(spoken, f"{preset}-cross", f"hicode {preset}, another's sound", "audio", CROSS_METRICS, "cross")
            )
    if cross:
        spoken = [c for c in of(here[0]) if c["cross"]]
        truth = rows_of(
            spoken, "cross-truth", "ground truth: the other's own video", "ground_truth", CROSS_METRICS, "cross"
        )
        frames = sorted({c["cross"]["frames"] for c in spoken})
        note = f"No true frames exist: sync (hicode.speech.sync, not SyncNet) and jitter only, over {frames[0]}-{frames[-1]} frames a clip; it keeps no frames for --check."
        blocks.append(
            _block("Cross identity: each avatar speaks the next clip's sound", [truth, *cross], CROSS_METRICS, note)
        )
    if len(names) > 1:
        blocks += [_block(name, same_identity(name), metrics) for name in names]
    for data, methods in PAPER_TABLE1.items():
        rows = [
            (f"{m} {PAPER}", *(_paper_text(r[c]) for c in _COLUMNS), *map(str, PAPER_SPEED.get(m, ("–", "–"))))
            for m, r in methods.items()
        ]
        blocks.append(Block(f"The paper's Table 1, {data}", ("", *_COLUMNS, "training", "FPS"), tuple(rows)))
    data = {
        "same_identity": _data(whole),
        "cross_identity": _data(cross),
        "clips": {n: _data(same_identity(n)) for n in names},
    }
    control = whole[1] if whole else None
    return Made(
        "Table 1",
        tuple(blocks),
        {"same identity": (tuple(whole[2:]), control)},
        metrics,
        (),
        data | {"paper": PAPER_TABLE1},
    )


def table2(cells: Sequence[dict]) -> Made:
    """The ablations, driven by sound and tracked, beside the paper's figures, and how far the orders agree."""
    metrics = _metrics(cells)
    here = [name for name in ABLATIONS if any(c["row"] == name for c in cells)]
    blocks, plotted, lines, data = [], {}, [], {}
    for mode, title in (("audio", DRIVEN["audio"]), ("tracked", DRIVEN["tracked"])):
        rows = [rows_of([c for c in cells if c["row"] == n], n, ABLATIONS[n].title, mode, metrics) for n in here]
        any_row = [c for c in cells if c["row"] == here[0]] if here else []
        control = rows_of(any_row, "control", "control: a static mean head", "control", metrics)
        blocks.append(_block(f"Ablations, {title}", [control, *rows], metrics))
        plotted[title] = (tuple(rows), control)
        orders = [agreement(rows, m) for m in metrics if m.paper]
        data[mode] = {"control": _data([control]), "rows": _data(rows), "agreement": orders}
        for order in orders:
            if order["pairs"]:
                clear = "one seed shows no spread"
                if order["clear"] is not None:
                    clear = f"{order['clear']} pairs differ by more than the spread over seeds, of which against it: {', '.join(order['against']) or 'none'}"
                lines.append(
                    f"{title}, {order['metric']}: Kendall's τ {order['tau']:+.2f} to the paper's order over {order['pairs']} pairs; {clear}. "
                    f"Ours, best first: {', '.join(order['order']).rstrip('.')}."
                )
    rows = [(f"{ABLATIONS[n].title} {PAPER}", *(_paper_text(r[c]) for c in _COLUMNS)) for n, r in PAPER_TABLE2.items()]
    blocks.append(Block("The paper's Table 2", ("", *_COLUMNS), tuple(rows)))
    lines += [f"{ABLATIONS[n].title}: {ABLATIONS[n].what}." for n in here]
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
        }
        | r.extra
        for r in rows
    ]


# ----------------------------------------------------------------------------------------------------------------- showing


def markdown(made: Made, status: Sequence[str]) -> str:
    """The whole table as a page of Markdown. `status`: what was run, how much of it is finished, what failed."""
    out = [f"# {made.title}", "", *(f"{line}\n" for line in status)]
    for block in made.blocks:
        out += [f"## {block.heading}", ""]
        out += ["| " + " | ".join(block.columns) + " |", "|" + "---|" * len(block.columns)]
        out += ["| " + " | ".join(row) + " |" for row in block.rows]
        out += ["", *([block.note, ""] if block.note else [])]
    out += [f"- {line}" for line in made.lines]
    return "\n".join(out).rstrip() + "\n"


_LATEX = {
    "%": r"\%",
    "&": r"\&",
    "_": r"\_",
    "#": r"\#",
    "±": r"$\pm$",
    "–": "--",
    "τ": r"$\tau$",
    "μ": r"$\mu$",
    "σ": r"$\sigma$",
    "…": r"\dots{}",
}


def latex(made: Made, status: Sequence[str]) -> str:
    """The tables as LaTeX, one `table` a block; needs no package."""
    escape = lambda text: "".join(_LATEX.get(c, c) for c in text)
    out = [f"% {line}" for line in status]
    for block in made.blocks:
        out += [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'c' * (len(block.columns) - 1)}}}", r"\hline"]
        out += [" & ".join(map(escape, block.columns)) + r" \\ \hline"]
        out += [" & ".join(map(escape, row)) + r" \\" for row in block.rows]
        out += [
            r"\hline",
            r"\end{tabular}",
            rf"\caption{{{escape(f'{made.title}: {block.heading}. {block.note}'.strip())}}}",
            r"\end{table}",
            "",
        ]
    return "\n".join(out)


def plot(made: Made) -> bytes | None:
    """A PNG: for each way of driving a panel a metric; a dot for each seed, a bar at the mean, the control dashed. None where there is nothing to
    draw yet, or matplotlib is missing."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        return None
    shown = [m for m in made.metrics if m.title in ("head PSNR", "PSNR", "SSIM", "LPIPS", "LMD px")]
    groups = [(heading, rows, control) for heading, (rows, control) in made.plotted.items() if rows]
    if not groups:
        return None
    height = sum(0.7 + 0.28 * len(rows) for _, rows, _ in groups) + 0.4
    canvas = Canvas(figsize=(3.0 * len(shown) + 2, height), layout="constrained")
    axes = canvas.subplots(
        len(groups),
        len(shown),
        squeeze=False,
        sharey="row",
        height_ratios=[0.7 + 0.28 * len(rows) for _, rows, _ in groups],
    )
    for (heading, rows, control), line in zip(groups, axes, strict=True):
        places = list(range(len(rows)))[::-1]
        for metric, axis in zip(shown, line, strict=True):
            for place, row in zip(places, rows, strict=True):
                found = row.figures[metric.title]
                if found.mean is not None:
                    axis.plot(found.seeds, [place] * len(found.seeds), "o", color="tab:blue", alpha=0.6, markersize=5)
                    axis.plot([found.mean], [place], "|", color="black", markersize=12)
            if control is not None and (level := control.figures[metric.title].mean) is not None:
                axis.axvline(level, color="grey", linestyle="--", linewidth=1)
            axis.set_yticks(places, [row.title for row in rows])
            axis.set_title(f"{metric.title} ({'higher' if metric.best == 'high' else 'lower'} is better)", fontsize=9)
            axis.grid(axis="x", alpha=0.3)
            axis.tick_params(labelsize=8)
        line[0].set_ylabel(heading, fontsize=9)
    canvas.suptitle(f"{made.title}: dots are seeds, bars their mean, dashed the control", fontsize=10)
    png = BytesIO()
    canvas.savefig(png, dpi=110, format="png")
    return png.getvalue()
