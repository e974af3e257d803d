"""The report as one HTML file: table, frames side by side (worst first), difference maps, mouth strips, curves. Nothing
is loaded from elsewhere."""

import base64
import json
from html import escape
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from hicode.evaluation.report import COLUMNS, ROWS, TITLES, Pictures, ShownFrame, cell, headlines
from hicode.files import atomic_path

DIFFERENCE_GAIN = 4  # a difference of 64 levels is full scale
COLORS = {"ground_truth": "#2a9d4a", "control": "#8a8a8a", "tracked": "#2563c4", "audio": "#d2571e"}
STRIP_HEIGHT_PX = 96

_STYLE = """ body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1280px; padding: 0 1rem; color:
#1c1c1c; background: #fff } h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem } th, td { padding: .28rem
.6rem; text-align: right; border-bottom: 1px solid #ddd } th:first-child, td:first-child { text-align: left } thead th {
border-bottom: 2px solid #888; font-weight: 600; vertical-align: bottom } .scroll { overflow-x: auto } .row { display:
flex; gap: 8px; flex-wrap: wrap; margin: .3rem 0 1.4rem } figure { margin: 0 } figure img { display: block; width:
236px; max-width: 100%; height: auto } figcaption { font-size: .8rem; color: #555 } .strip { display: flex; gap: 2px;
align-items: center; margin-bottom: 2px; overflow-x: auto } .strip b { flex: 0 0 7rem; font-size: .8rem; font-weight:
600 } .strip img { height: 96px; width: auto; display: block } .note, dd { color: #555 } dt { font-weight: 600;
margin-top: .3rem } dd { margin: 0 } svg { max-width: 100%; height: auto } details { margin-top: 1rem } pre { font-size:
.78rem; overflow-x: auto; background: #f5f5f5; padding: .8rem }
"""


def write_page(path: Path, report: dict, pictures: Pictures) -> None:
    """Write the page whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(page(report, pictures), encoding="utf-8")


def page(report: dict, pictures: Pictures) -> str:
    clip = report["provenance"]["clip"].get("name", "clip")
    first, end = report["split"]["test"]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>hicode: {escape(clip)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(clip)}</h1>",
        f"<p class='note'>{end - first} frames ({first} … {end - 1}) that the avatar has not seen, before any encoding.",
        f"{escape(report['upper_face'].capitalize())}. Every row but the truth shares the true background:",
        "read it as its distance from the control.</p>",
        _table(report),
        "".join(f"<p>{escape(line)}</p>" for line in headlines(report)),
        _frames(pictures.frames),
        _strips(pictures.strip),
        _curves(report),
        _definitions(report),
        "</body></html>",
    ]
    return "\n".join(parts)


def _table(report: dict) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column, _, _ in COLUMNS)
    body = "".join(
        f"<tr><td>{TITLES[name]}</td>"
        + "".join(f"<td>{cell(report[name], where, digits)}</td>" for _, where, digits in COLUMNS)
        + "</tr>"
        for name in ROWS
        if report[name] is not None
    )
    return f"<div class='scroll'><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _frames(frames: list[ShownFrame]) -> str:
    out = ["<h2>Frames, worst first</h2>"]
    for shown in frames:
        cells = [_figure(shown.truth, "ground truth")]
        cells += [
            _figure(image, f"{TITLES[name]}, head {shown.psnr_head[name]:.2f} dB")
            for name, image in shown.images.items()
        ]
        for name, image in shown.images.items():
            if name != "control":
                cells.append(
                    _figure(difference_map(image, shown.truth), f"{TITLES[name]}: difference x{DIFFERENCE_GAIN}")
                )
        out.append(f"<h3>Frame {shown.t}: {escape(shown.why)}</h3><div class='row'>{''.join(cells)}</div>")
    return "".join(out)


def difference_map(image: UInt8[np.ndarray, "h w 3"], truth: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Largest difference over the channels, amplified, from black over red to yellow."""
    size = np.abs(image.astype(np.int16) - truth).max(2)
    colored = cv2.applyColorMap(np.clip(size * DIFFERENCE_GAIN, 0, 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.ascontiguousarray(colored[..., ::-1])


def _strips(strip: list[tuple[int, dict[str, np.ndarray]]]) -> str:
    if not strip:
        return ""
    out = [f"<h2>Mouths</h2><p class='note'>Frames {', '.join(str(t) for t, _ in strip)}.</p>"]
    for name in strip[0][1]:
        images = "".join(f"<img alt='frame {t}' src='{_data_uri(_to_height(crops[name]))}'>" for t, crops in strip)
        out.append(f"<div class='strip'><b>{TITLES[name]}</b>{images}</div>")
    return "".join(out)


def _to_height(image: np.ndarray) -> np.ndarray:
    width = max(1, round(image.shape[1] * STRIP_HEIGHT_PX / image.shape[0]))
    return cv2.resize(image, (width, STRIP_HEIGHT_PX), interpolation=cv2.INTER_CUBIC)


def _curves(report: dict) -> str:
    first = report["split"]["test"][0]
    rows = report["per_frame"]
    charts = (
        ("Head PSNR, dB", "psnr_head", ("control", "tracked", "audio")),
        ("Mouth PSNR, dB", "psnr_mouth", ("control", "tracked", "audio")),
        ("LPIPS of the frame (lower is better)", "lpips_frame", ("control", "tracked", "audio")),
        ("LMD, px (lower is better)", "lmd_px", ("control", "tracked", "audio")),
        ("Opening of the mouth, over the outer-eye distance", "opening", ("ground_truth", "tracked", "audio")),
    )
    out = ["<h2>Frame by frame</h2>"]
    for title, key, names in charts:
        series = [(TITLES[name], COLORS[name], rows[name][key], "") for name in names if name in rows]
        if key == "opening" and "opening_predicted" in rows.get("audio", {}):
            series.append(("predicted from the sound", COLORS["audio"], rows["audio"]["opening_predicted"], "4 3"))
        out.append(f"<h3>{escape(title)}</h3>{chart(series, first)}")
    return "".join(out)


def chart(
    series: list[tuple[str, str, list[float | None], str]], first: int, width: int = 1200, height: int = 190
) -> str:
    """Lines over frames as inline SVG: (name, colour, values with None for gaps, dash pattern); `first` numbers the
    first frame."""
    known = [v for _, _, values, _ in series for v in values if v is not None]
    if not known:
        return "<p class='note'>Nothing was measured.</p>"
    low, high = min(known), max(known)
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin
    count = max(len(values) for _, _, values, _ in series)
    left, right, top, bottom = 46, 8, 22, 22

    def x(i: int) -> float:
        return left + (width - left - right) * i / max(count - 1, 1)

    def y(v: float) -> float:
        return top + (height - top - bottom) * (high - v) / (high - low)

    out = [f"<svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' font-size='11'>"]
    for v in np.linspace(low + margin, high - margin, 4):
        out.append(f"<line x1='{left}' x2='{width - right}' y1='{y(v):.1f}' y2='{y(v):.1f}' stroke='#e4e4e4'/>")
        out.append(f"<text x='{left - 5}' y='{y(v) + 4:.1f}' text-anchor='end' fill='#666'>{v:.3g}</text>")
    for i in sorted({int(k) for k in np.linspace(0, count - 1, min(count, 9))}):
        out.append(f"<text x='{x(i):.1f}' y='{height - 6}' text-anchor='middle' fill='#666'>{first + i}</text>")
    at = left
    for name, color, values, dash in series:
        pieces, piece = [], []
        for i, v in enumerate([*values, None]):
            if v is not None:
                piece.append(f"{x(i):.1f},{y(v):.1f}")
            elif piece:
                pieces.append(piece)
                piece = []
        for piece in pieces:
            points = " ".join(piece if len(piece) > 1 else piece * 2)
            out.append(
                f"<polyline points='{points}' fill='none' stroke='{color}' stroke-width='1.6' stroke-dasharray='{dash}'/>"
            )
        out.append(f"<path d='M{at} 10H{at + 18}' stroke='{color}' stroke-width='2' stroke-dasharray='{dash}'/>")
        out.append(f"<text x='{at + 23}' y='14' fill='#333'>{escape(name)}</text>")
        at += 40 + 7 * len(name)
    out.append("</svg>")
    return "".join(out)


def _definitions(report: dict) -> str:
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report["definitions"].items())
    made = json.dumps(
        {key: report[key] for key in ("provenance", "split", "timing", "seconds", "evaluation")}, indent=1
    )
    return (
        f"<h2>What was measured, and how</h2><p>Landmarks by {escape(report['detector'])}.</p><dl>{terms}</dl>"
        f"<details><summary>Where this comes from</summary><pre>{escape(made)}</pre></details>"
    )


def _figure(image: np.ndarray, caption: str) -> str:
    caption = escape(caption)
    return f"<figure><img alt='{caption}' src='{_data_uri(image)}'><figcaption>{caption}</figcaption></figure>"


def _data_uri(image: UInt8[np.ndarray, "h w 3"]) -> str:
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done, image.shape
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
