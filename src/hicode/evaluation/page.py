"""The report as one HTML file: figures, curves frame by frame, sound and opening, mouths over time, the worst frames.

Also what was not measured and why, and what made it all. Nothing is loaded from elsewhere; there is no script.
"""

import base64
import itertools
import json
from html import escape
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from hicode.evaluation.gallery import Pictures, ShownFrame
from hicode.evaluation.show import TITLES, cell, headlines, rows_of, shown_columns
from hicode.files import atomic_path

DIFFERENCE_GAIN = 4  # a difference of 64 levels is full scale
SHOWN_PX = 512  # longer side of a frame on the page
COLORS = {
    "audio": "#cf5a17",
    "video": "#2259b8",
    "tracked": "#2259b8",
    "tracked_face": "#7a4fb5",
    "ground_truth": "#1f8a4c",
    "control": "#8b8f96",
}
CURVES = {
    "Head PSNR, dB ↑": "psnr_head",
    "Mouth PSNR, dB ↑": "psnr_mouth",
    "Frame LPIPS ↓": "lpips_frame",
    "LMD, px ↓": "lmd_px",
}
STRIP_HEIGHT_PX, STRIP_LINE = 88, 12
MISSED = "#c2182b"

_STYLE = """
:root { --line: #dfe2e6; --soft: #5d646e; --ink: #16191d }
* { box-sizing: border-box }
body { font: 14.5px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1340px; padding: 1.6rem 1.6rem 4rem;
  color: var(--ink); background: #fff }
h1 { font-size: 1.45rem; margin: 0 0 .2rem } h3 { font-size: .92rem; margin: 1rem 0 .25rem; font-weight: 600 }
h2 { font-size: 1.08rem; margin: 2.4rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line) }
p { margin: .3rem 0 .6rem; max-width: 62rem } .soft, figcaption, dd { color: var(--soft) } .small { font-size: .85rem }
nav { font-size: .85rem; margin: .6rem 0 0 } nav a { color: #2259b8; margin-right: 1.1rem; text-decoration: none }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; margin: .6rem 0 }
th, td { padding: .3rem .62rem; text-align: right; white-space: nowrap } td { border-top: 1px solid var(--line) }
th { font-weight: 500; color: var(--soft) } th:first-child, td:first-child { text-align: left }
.dot { display: inline-block; width: .62rem; height: .62rem; border-radius: 50%; margin-right: .45rem }
.say { border-left: 3px solid #c98a00; background: #fff9ea; padding: .45rem .8rem; margin: .35rem 0; max-width: 62rem }
.row { display: flex; gap: 8px; flex-wrap: wrap; margin: .3rem 0 1.5rem } figure { margin: 0 }
figure img { display: block; width: 208px; max-width: 100%; height: auto; background: #eee }
figcaption { font-size: .78rem; max-width: 208px }
.strip { display: grid; grid-template-columns: 6.4rem repeat(12, minmax(0, 1fr)); gap: 2px; align-items: center;
  font-size: .78rem }
.strip img { width: 100%; height: auto; display: block } .strip b { font-weight: 600 } .strip + .strip {
  margin-top: 14px } .strip i { font-style: normal; color: var(--soft); text-align: center }
.key { display: flex; flex-wrap: wrap; gap: 1.2rem; font-size: .82rem; margin: .1rem 0 .2rem }
.key i { display: inline-block; width: 1.3rem; border-top: 2.5px solid; vertical-align: middle; margin-right: .4rem }
svg { display: block; max-width: 100%; height: auto; margin-bottom: .9rem }
dl { columns: 2; column-gap: 2.5rem; font-size: .85rem } dt { font-weight: 600; margin-top: .3rem; break-after: avoid }
dd { margin: 0; break-inside: avoid } details { margin-top: 1rem }
pre { font-size: .76rem; overflow-x: auto; background: #f6f7f8; padding: .8rem }
.ramp { display: inline-block; width: 9rem; height: .7rem; vertical-align: middle; margin: 0 .4rem }
"""


def write_page(path: Path, report: dict, pictures: Pictures) -> None:
    """Write the page whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(page(report, pictures), encoding="utf-8")


def page(report: dict, pictures: Pictures) -> str:
    """The HTML."""
    made = report["provenance"]
    code = f"hicode {made['version']}" + (f", commit {made['commit']}" if made.get("commit") else "")
    code += " with uncommitted changes" if made.get("dirty") else ""
    sections = (
        ("figures", "Figures", _table(report)),
        ("open", "Not measured", _open(report)),
        ("curves", "Frame by frame", _curves(report)),
        ("sound", "Sound and mouth", _sound(report, pictures.sound)),
        ("mouths", "Mouths over time", _strips(pictures.strip)),
        ("frames", "Frames, worst first", _frames(pictures.frames)),
        ("how", "What was measured, and how", _definitions(report)),
    )
    sections = [s for s in sections if s[2]]
    links = "".join(f"<a href='#{key}'>{escape(title)}</a>" for key, title, _ in sections)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{escape(report['title'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(report['title'])}</h1>",
        f"<p class='soft'>{escape(report['protocol'][0].upper() + report['protocol'][1:])}.</p>",
        f"<p class='soft small'>{escape(code)}; {escape(made['made'])}; {escape(made['machine'])}</p>",
        f"<nav>{links}</nav>",
        "".join(f"<p class='say'>{escape(note)}</p>" for note in report["notes"]),
        *(f"<h2 id='{key}'>{escape(title)}</h2>{content}" for key, title, content in sections),
        "</body></html>",
    ]
    return "\n".join(parts)


# --- figures


def _table(report: dict) -> str:
    """As on the terminal: measures down, rows across; and what the figures come to."""
    rows, arrow = rows_of(report), {1: " ↑", -1: " ↓", 0: ""}
    names = "".join(f"<th>{_dot(name)}{TITLES[name]}</th>" for name in rows)
    lines = (
        f"<tr><td>{escape(column.title)}{arrow[column.better]}</td>"
        + "".join(f"<td>{cell(row, column)}</td>" for row in rows.values())
        for column in shown_columns(report)
    )
    gains = "".join(f"<p>{escape(line)}</p>" for line in headlines({**report, "notes": [], "not_measured": {}}))
    return (
        f"<table><tr><th></th>{names}</tr>{'</tr>'.join(lines)}</tr></table>"
        "<p class='soft small'>↑ higher is better, ↓ lower is better, no arrow: the truth's value is best. The control "
        f"is what a still picture scores on the true background: read a result as its distance from it.</p>{gains}"
    )


def _dot(name: str) -> str:
    return f"<span class='dot' style='background:{COLORS[name]}'></span>"


def _open(report: dict) -> str:
    return "".join(
        f"<p>{escape(what)}: <span class='soft'>{escape(why)}</span></p>"
        for what, why in report["not_measured"].items()
    )


# --- curves


def _curves(report: dict) -> str:
    rows = report["per_frame"]
    judged = [name for name in TITLES if name in rows and name != "ground_truth"]
    missed = _faceless(rows)
    out = [_key([(TITLES[name], COLORS[name], "") for name in judged])]
    if missed:
        out.append(f"<p class='small' style='color:{MISSED}'>Red ticks: some row, or the truth, has no face there.</p>")
    for title, key in CURVES.items():
        series = [(TITLES[name], COLORS[name], rows[name][key], "") for name in judged]
        out.append(f"<h3>{escape(title)}</h3>{chart(series, report['split']['test'][0], marks=missed)}")
    return "".join(out)


def _faceless(rows: dict[str, dict]) -> list[int]:
    """Frames in which some row has no face."""
    return sorted({i for row in rows.values() for i, seen in enumerate(row["face"]) if not seen})


def _sound(report: dict, samples: np.ndarray | None) -> str:
    """The waveform and, on the same time axis, the opening: the truth's, the rows', what speech predicted."""
    first = report["split"]["test"][0]
    rows = {name: row for name, row in report["per_frame"].items() if name != "control"}
    series = [(TITLES[name], COLORS[name], rows[name]["opening"], "") for name in TITLES if name in rows]
    if "opening_predicted" in rows.get("audio", {}):
        series.append(("predicted from the sound", COLORS["audio"], rows["audio"]["opening_predicted"], "4 3"))
    out = [_key([(name, color, dash) for name, color, _, dash in series])]
    count = len(rows["ground_truth"]["opening"])
    out.append(waveform(samples, count, first) if samples is not None else "<p class='soft'>There is no sound.</p>")
    out.append("<h3>Opening of the mouth, over the distance of the outer eye corners</h3>")
    return "".join(out) + chart(series, first, height=210, marks=_faceless(rows))


def _key(entries: list[tuple[str, str, str]]) -> str:
    items = "".join(
        f"<span><i style='border-color:{color};border-top-style:{'dashed' if dash else 'solid'}'></i>"
        f"{escape(name)}</span>"
        for name, color, dash in entries
    )
    return f"<div class='key'>{items}</div>"


WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1280, 46, 8, 8, 22  # of a chart, and its margins: all share their time axis


def _x(i: float, count: int) -> float:
    """Where frame i's middle lies; frame i is the i-th of `count` equal cells."""
    return LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / max(count, 1)


def _line(x0: float, y0: float, x1: float, y1: float, color: str) -> str:
    return f"<line x1='{x0:.1f}' y1='{y0:.1f}' x2='{x1:.1f}' y2='{y1:.1f}' stroke='{color}'/>"


def _text(x: float, y: float, anchor: str, shown: object) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='#5d646e'>{shown}</text>"


def _svg(inside: str, height: int) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' font-size='11'>{inside}</svg>"


def chart(
    series: list[tuple[str, str, list[float | None], str]],
    first: int,
    height: int = 170,
    marks: list[int] | None = None,
) -> str:
    """Lines over frames as inline SVG: (name, colour, values with None for gaps, dash pattern); `first` numbers the
    first frame; `marks` are frames to tick in red."""
    known = [v for _, _, values, _ in series for v in values if v is not None]
    if not known:
        return "<p class='soft'>Nothing was measured.</p>"
    low, high = min(known), max(known)
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin
    step = _round_step(high - low)
    digits = max(0, -int(np.floor(np.log10(step))))
    count, base = max(len(values) for _, _, values, _ in series), height - BOTTOM

    def y(v: float) -> float:
        return TOP + (base - TOP) * (high - v) / (high - low)

    out = []
    for v in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step:
        out.append(_line(LEFT, y(v), WIDTH - RIGHT, y(v), "#e8eaed"))
        out.append(_text(LEFT - 6, y(v) + 4, "end", f"{v + 0.0:.{digits}f}"))
    out.append(_ticks(count, first, height))
    out += [_line(_x(i, count), base - 6, _x(i, count), base, MISSED) for i in marks or []]
    for name, color, values, dash in series:
        for seen, run in itertools.groupby(enumerate(values), lambda entry: entry[1] is not None):
            points = [f"{_x(i, count):.1f},{y(v):.1f}" for i, v in run if v is not None]
            if seen:
                out.append(
                    f"<polyline points='{' '.join(points if len(points) > 1 else points * 2)}' fill='none' "
                    f"stroke='{color}' stroke-width='1.5' stroke-linejoin='round' stroke-linecap='round' "
                    f"stroke-dasharray='{dash}'><title>{escape(name)}</title></polyline>"
                )
    return _svg("".join(out), height)


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that three to six of it fill the span."""
    power = 10.0 ** np.floor(np.log10(span / 3))
    return float(max(k * power for k in (1, 2, 5) if k * power <= span / 3))


def _ticks(count: int, first: int, height: int) -> str:
    """Frame numbers below, at a round step."""
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50, 100, 250, 500, 1000, 2500) if count / s <= 14), 5000)
    base = height - BOTTOM
    out = [_line(LEFT, base, WIDTH - RIGHT, base, "#9aa1aa")]
    for i in range((-first) % step, count, step):
        x = _x(i, count)
        out += [_line(x, base, x, base + 4, "#9aa1aa"), _text(x, height - 5, "middle", first + i)]
    return "".join(out)


def waveform(samples: Float[np.ndarray, "n"], count: int, first: int, height: int = 92) -> str:
    """The sound's envelope over the frames' time axis: lowest and highest sample of each pixel's worth of time."""
    edges = np.linspace(0, len(samples), WIDTH - LEFT - RIGHT + 1).astype(int)
    half = (height - TOP - BOTTOM) / 2
    scale = half / max(float(np.abs(samples).max(initial=0.0)), 1e-6)
    high, low = [], []
    for k, (a, b) in enumerate(itertools.pairwise(edges)):
        part = samples[a : max(b, a + 1)]
        high.append(f"{LEFT + k},{TOP + half - scale * max(part.max(initial=0.0), 0):.1f}")
        low.append(f"{LEFT + k},{TOP + half - scale * min(part.min(initial=0.0), 0):.1f}")
    outline = f"<polygon points='{' '.join(high + low[::-1])}' fill='#7d8794'/>"
    return f"<h3>Sound</h3>{_svg(outline + _ticks(count, first, height), height)}"


# --- pictures


def _strips(strip: list[tuple[int, dict[str, np.ndarray]]]) -> str:
    out = []
    for start in range(0, len(strip), STRIP_LINE):
        line = strip[start : start + STRIP_LINE]
        blank = "<span></span>" * (STRIP_LINE - len(line))
        cells = ["<b></b>", *(f"<i>{t}</i>" for t, _ in line), blank]
        for name in line[0][1]:
            cells.append(f"<b>{_dot(name)}{TITLES[name]}</b>")
            cells += [
                f"<img alt='{TITLES[name]}, frame {t}' src='{_data_uri(_mouth(crops[name]))}'>" for t, crops in line
            ]
            cells.append(blank)
        out.append(f"<div class='strip'>{''.join(cells)}</div>")
    return "".join(out)


def _mouth(image: np.ndarray) -> np.ndarray:
    scale = STRIP_HEIGHT_PX / image.shape[0]
    size = max(1, round(image.shape[1] * scale)), STRIP_HEIGHT_PX
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _frames(frames: list[ShownFrame]) -> str:
    ramp = _data_uri(difference_map(*_ramp()))
    out = [
        "<p class='soft small'>Difference maps: largest of the three channels, amplified "
        f"{DIFFERENCE_GAIN} times; 0 <img class='ramp' alt='scale' src='{ramp}'> {255 // DIFFERENCE_GAIN} of 255 "
        "levels and more.</p>"
    ]
    for shown in frames:
        cells = [_figure(shown.truth, "ground truth")]
        for name, image in shown.images.items():
            score = shown.psnr_head[name]
            known = f", head {score:.2f} dB" if np.isfinite(score) else ", equal" if score > 0 else ", no head"
            cells.append(_figure(image, TITLES[name] + known))
        for name, image in shown.images.items():
            if name != "control":
                cells.append(_figure(difference_map(image, shown.truth), f"{TITLES[name]}: difference"))
        out.append(f"<h3>Frame {shown.t}: {escape(shown.why)}</h3><div class='row'>{''.join(cells)}</div>")
    return "".join(out)


def _ramp() -> tuple[np.ndarray, np.ndarray]:
    level = np.linspace(0, 255 // DIFFERENCE_GAIN, 144).astype(np.uint8)
    return np.repeat(np.repeat(level[None, :, None], 11, 0), 3, 2), np.zeros((11, 144, 3), np.uint8)


def difference_map(image: UInt8[np.ndarray, "h w 3"], truth: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Largest difference over the channels, amplified, from black over red to yellow."""
    size = np.abs(image.astype(np.int16) - truth).max(2)
    colored = cv2.applyColorMap(np.clip(size * DIFFERENCE_GAIN, 0, 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.ascontiguousarray(colored[..., ::-1])


def _definitions(report: dict) -> str:
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report["definitions"].items())
    kept = ("provenance", "split", "frames", "timing", "seconds", "evaluation")
    made = json.dumps({key: report[key] for key in kept if key in report}, indent=1, ensure_ascii=False)
    return (
        f"<p>Landmarks by {escape(report['detector'])}.</p><dl>{terms}</dl>"
        f"<details><summary>Where this comes from</summary><pre>{escape(made)}</pre></details>"
    )


def _figure(image: np.ndarray, caption: str) -> str:
    caption = escape(caption)
    scale = SHOWN_PX / max(image.shape[:2])
    if scale < 1:
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return f"<figure><img alt='{caption}' src='{_data_uri(image)}'><figcaption>{caption}</figcaption></figure>"


def _data_uri(image: UInt8[np.ndarray, "h w 3"]) -> str:
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done, image.shape
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
