"""Figures of a run as a table, as JSON, and as one self-contained HTML page. All three show the same numbers.

Figures are a nested dictionary, section -> name -> a number, None where there is none, or a dictionary of numbers
(median, p95). They are rounded once, by :func:`rounded`, before anything is made of them.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from scfeat_core.errors import ScfeatError

Number = int | float | None
Figures = Mapping[str, Mapping[str, Number | Mapping[str, Number]]]


@dataclass(frozen=True, eq=False)
class Picture:
    """image: (H, W, 3) uint8 RGB or (H, W) gray."""

    image: np.ndarray
    caption: str


@dataclass(frozen=True, eq=False)
class Series:
    """Values over the frames of a run, for a small chart. values: (N,) float, NaN where there is none."""

    name: str
    values: np.ndarray
    unit: str = ""


def rounded(value: float | None, digits: int = 1) -> Number:
    """A figure as it will be shown: None for NaN and None, an int where ``digits`` is 0."""
    if value is None or not math.isfinite(value):
        return None
    return round(value) if digits == 0 else round(float(value), digits)


def percentiles(values: Any, digits: int = 1) -> dict[str, Number]:
    """Median and 95th percentile of the finite values, None where there is none."""
    array = np.asarray(values, np.float64).ravel()
    array = array[np.isfinite(array)]
    if not array.size:
        return {"median": None, "p95": None}
    median, p95 = np.percentile(array, (50, 95))
    return {"median": rounded(median, digits), "p95": rounded(p95, digits)}


def table_rows(figures: Figures) -> list[tuple[str, str, list[str]]]:
    """(section, name, cells) of each line of the table; a dictionary becomes "key value" cells."""
    lines: list[tuple[str, str, list[str]]] = []
    for section, content in figures.items():
        for name, value in content.items():
            parts = value if isinstance(value, Mapping) else {"": value}
            cells = [f"{key} {_text(number)}".strip() for key, number in parts.items()]
            lines.append((_words(section), _words(name), cells))
    return lines


def text_table(figures: Figures) -> str:
    """The figures for a terminal: one line each, sections apart."""
    rows = table_rows(figures)
    width = max((len(name) for _, name, _ in rows), default=0)
    lines: list[str] = []
    last = ""
    for section, name, cells in rows:
        if section != last:
            lines.extend(["", section] if lines else [section])
            last = section
        lines.append(f"  {name:<{width}}  " + "".join(_column(cell) for cell in cells))
    return "\n".join(lines)


def _column(cell: str) -> str:
    key, _, number = cell.rpartition(" ")
    return f"{key:>9} {number:>8}"


def write_json(path: Path, figures: Figures, facts: Mapping[str, Any]) -> None:
    """The figures, and under "setup" how they came about. Raises ScfeatError where it cannot be written."""
    write(path, json.dumps({**figures, "setup": dict(facts)}, indent=2, allow_nan=False) + "\n")


def write(path: Path, content: str | bytes) -> None:
    """Write a file and its folder. Raises ScfeatError with the path and the reason."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ScfeatError(
            f"expected to write {path}, found {error.strerror or error}: choose another folder with --output"
        ) from error


def check_folder(folder: Path) -> None:
    """Raise ScfeatError now where a folder could not be made or written to after the work."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ScfeatError(f"expected a folder to write to at {folder}, found a file at {existing}; choose another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ScfeatError(f"expected to write to {folder}, found that {existing} is not writable; choose another one")


def encode(image: np.ndarray, suffix: str = ".png") -> bytes:
    """An RGB or gray uint8 image as the bytes of a file: .png or .jpg."""
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    done, data = cv2.imencode(suffix, pixels, [cv2.IMWRITE_JPEG_QUALITY, 88] if suffix == ".jpg" else [])
    if not done:
        raise ScfeatError(f"expected an image that can be stored as {suffix}, found shape {image.shape}")
    return bytes(data)


def html_page(
    title: str,
    summary: str,
    figures: Figures,
    pictures: Sequence[Picture] = (),
    series: Sequence[Series] = (),
    facts: Mapping[str, Any] | None = None,
) -> str:
    """One page without references to anything outside of it."""
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="summary">{html.escape(summary)}</p>']
    parts += [_figure(picture) for picture in pictures]
    if series:
        parts.append("<h2>Over the sequence</h2>")
        parts.append('<div class="charts">' + "".join(_chart(s) for s in series) + "</div>")
    parts += ["<h2>Figures</h2>", _table(figures)]
    if facts:
        parts += ["<h2>How it was made</h2>", _facts(facts)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(number: Number) -> str:
    return "–" if number is None else f"{number:g}" if isinstance(number, float) and abs(number) < 1e5 else str(number)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _figure(picture: Picture) -> str:
    data = base64.b64encode(encode(picture.image, ".jpg")).decode()
    caption = html.escape(picture.caption)
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(figures: Figures) -> str:
    lines, last = [], ""
    for section, name, cells in table_rows(figures):
        if section != last:
            lines.append(f'<tr class="section"><th colspan="3">{html.escape(section)}</th></tr>')
            last = section
        columns = [html.escape(cell) for cell in cells]
        span = f' colspan="{3 - len(columns)}"' if len(columns) < 2 else ""
        numbers = "".join(f"<td{span}>{column}</td>" for column in columns)
        lines.append(f"<tr><th>{html.escape(name)}</th>{numbers}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _facts(facts: Mapping[str, Any]) -> str:
    lines = []
    for key, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        lines.append(f"<dt>{html.escape(_words(key))}</dt><dd>{html.escape(text)}</dd>")
    return "<dl>" + "\n".join(lines) + "</dl>"


def _chart(series: Series, width: int = 420, height: int = 110) -> str:
    """A line over the frames; a gap where there is no value."""
    values = np.asarray(series.values, np.float64)
    finite = values[np.isfinite(values)]
    top = float(finite.max()) * 1.05 if finite.size and finite.max() > 0 else 1.0
    x = np.linspace(0, width, max(len(values), 2))
    pieces: list[list[str]] = [[]]
    for at, value in zip(x, values, strict=False):
        if np.isfinite(value):
            pieces[-1].append(f"{at:.1f},{height - value / top * height:.1f}")
        elif pieces[-1]:
            pieces.append([])
    lines = "".join(f'<polyline points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1)
    label = html.escape(f"{series.name}: median {_text(percentiles(finite)['median'])} {series.unit}".strip())
    limit = html.escape(f"{top:.{0 if top >= 100 else 2}f} {series.unit}".strip())
    return (
        f'<div class="chart"><div>{label}</div>'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{label}">{lines}</svg>'
        f'<div class="axis"><span>0 – {limit}</span><span>{len(values)} frames</span>'
        "</div></div>"
    )


_STYLE = """
:root { color-scheme: light; --ink: #22262b; --soft: #69727d; --line: #e2e5e9; --accent: #12795a; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f8; color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; background: #fff; min-height: 100vh; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 36px 0 10px; }
.summary { color: var(--soft); margin: 0 0 20px; }
figure { margin: 0 0 20px; }
figure img { width: 100%; display: block; border-radius: 6px; }
figcaption { color: var(--soft); font-size: 13px; padding-top: 6px; }
table { border-collapse: collapse; min-width: 460px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; padding: 3px 32px 3px 0; }
td { text-align: right; padding: 3px 0 3px 32px; white-space: nowrap; }
tr { border-bottom: 1px solid var(--line); }
tr.section { border: 0; }
tr.section th { color: var(--accent); font-weight: 600; padding-top: 16px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 24px; }
.chart { font-size: 13px; }
.chart svg { width: 100%; height: 110px; display: block; background: #f6f7f8; border-radius: 4px; }
.chart polyline { fill: none; stroke: var(--accent); stroke-width: 1.6; vector-effect: non-scaling-stroke; }
.axis { display: flex; justify-content: space-between; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 24px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""
