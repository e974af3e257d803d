"""A table as Markdown, LaTeX and a plot."""

from collections.abc import Sequence
from io import BytesIO

from research.reproduce.tables import Made


def markdown(made: Made, status: Sequence[str]) -> str:
    """The table as a page of Markdown. `status`: what was run, how much of it is finished, what failed."""
    out = [f"# {made.title}", "", *(f"{line}\n" for line in status)]
    for block in made.blocks:
        out += [f"## {block.heading}", ""]
        out += ["| " + " | ".join(block.columns) + " |", "|" + "---|" * len(block.columns)]
        out += ["| " + " | ".join(row) + " |" for row in block.rows]
        out += ["", *([block.note, ""] if block.note else [])]
    out += [f"- {line}" for line in made.lines]
    return "\n".join(out).rstrip() + "\n"


_LATEX: dict[str, str] = {
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
    """The table as LaTeX, one `table` environment per block. It needs no package."""
    escape = lambda text: text.translate(str.maketrans(_LATEX))
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
    """The table as a PNG: a row of panels per driving mode, a panel per metric.

    A dot is a seed, a bar the mean, the dashed line the control. None if there are no figures yet, or no matplotlib.
    """
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
