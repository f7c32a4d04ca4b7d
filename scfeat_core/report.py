"""Figures of a run as a table, as JSON, and as one self-contained HTML page. All three show the same numbers.

Figures are a nested dictionary, section -> name -> a number, None where there is none, or a dictionary of numbers
(median, p95). They are rounded once, by :func:`rounded`, before anything is made of them.
"""

from __future__ import annotations

import base64
import hashlib
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

from scfeat_core import charts
from scfeat_core.errors import ScfeatError
from scfeat_core.feature_files import replaced

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


def write(path: Path, content: str | bytes, option: str = "", place: str = "folder") -> None:
    """Write a file and its folder, all of it or nothing. option: of the command, which chooses the place: a "folder" or
    a "file". Raises ScfeatError with the path and the reason."""
    with replaced(path, option, place) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


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
    parts += [figure(picture) for picture in pictures]
    if series:
        parts.append("<h2>Over the sequence</h2>")
        parts.append('<div class="charts">' + "".join(charts.chart(_chart(s)) for s in series) + "</div>")
    parts += ["<h2>Figures</h2>", figures_table(figures)]
    if facts:
        parts += ["<h2>How it was made</h2>", facts_list(facts)]
    return document(title, parts)


def document(title: str, parts: Sequence[str], style: str = "", script: str = "") -> str:
    """A page of these pieces of HTML that needs nothing but itself. style, script: what it has beside the usual."""
    code = charts.SCRIPT + script
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(code)}">\n'
        '<link rel="icon" href="data:,">\n'  # or the browser asks a server for one
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{charts.STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + f"\n</main>\n<script>{code}</script>\n</body>\n</html>\n"
    )


def data_uri(content: bytes, kind: str) -> str:
    """The bytes of a file, of a media type such as image/png, in the place of its address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _chart(series: Series) -> charts.Chart:
    median = _text(percentiles(series.values)["median"])
    line = charts.Line(f"median {median} {series.unit}".strip(), np.arange(len(series.values)), series.values)
    return charts.Chart(series.name, [line], "frame", series.unit)


def _text(number: Number) -> str:
    return "–" if number is None else f"{number:g}" if isinstance(number, float) and abs(number) < 1e5 else str(number)


def _line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_line(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_line(item) for item in value) or "–"
    return "–" if value is None or value == "" else str(value)


def _words(key: str) -> str:
    return key.replace("_", " ")


def figure(picture: Picture) -> str:
    """A picture with its caption below."""
    caption = html.escape(picture.caption)
    source = data_uri(encode(picture.image, ".jpg"), "image/jpeg")
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def figures_table(figures: Figures) -> str:
    """The figures as a table of HTML."""
    lines, last = [], ""
    for section, name, cells in table_rows(figures):
        if section != last:
            lines.append(f'<tr class="section"><th colspan="3">{html.escape(section)}</th></tr>')
            last = section
        columns = [html.escape(cell) for cell in cells]
        span = f' colspan="{3 - len(columns)}"' if len(columns) < 2 else ""
        numbers = "".join(f"<td{span}>{column}</td>" for column in columns)
        lines.append(f"<tr><th>{html.escape(name)}</th>{numbers}</tr>")
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def facts_list(facts: Mapping[str, Any]) -> str:
    """Names and values; a mapping or a sequence as one line."""
    lines = []
    for key, value in facts.items():
        text = _line(value)
        lines.append(f"<dt>{html.escape(_words(key))}</dt><dd>{html.escape(text)}</dd>")
    return "<dl>" + "\n".join(lines) + "</dl>"


def _policy(script: str) -> str:
    """What a browser may load and run: pictures that the page holds, and this one script. What comes from a bag, such
    as the name of a topic, is text; should it ever get further, it does not run."""
    code = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{code}'; base-uri 'none'; "
        "form-action 'none'"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --soft: #69727d; --line: #e2e5e9; --accent: #12795a; --paper: #fff;
  --ground: #f6f7f8; --good: #12795a; --watch: #a86400; --bad: #c62f3b;
  --c0: #2468d6; --c1: #d9730d; --c2: #12795a; --c3: #8445c9; --c4: #c62f3b; --c5: #5b6571; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #98a2ad; --line: #33393f; --accent: #3fc296;
  --paper: #191c1f; --ground: #101214; --good: #3fc296; --watch: #eda53f; --bad: #ff7480;
  --c0: #73a9ff; --c1: #ff9f4a; --c2: #3fc296; --c3: #c195ff; --c4: #ff7480; --c5: #aab4be; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 28px 64px; background: var(--paper); min-height: 100vh; }
@media (max-width: 600px) { main { padding: 20px 14px 40px; } }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 44px 0 12px; }
p { margin: 0 0 12px; }
.summary, .about { color: var(--soft); }
.summary { margin: 0 0 20px; }
figure { margin: 0 0 20px; }
figure img { width: 100%; display: block; border-radius: 6px; }
figcaption { color: var(--soft); font-size: 13px; padding-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; padding: 4px 28px 4px 0; }
td { text-align: right; padding: 4px 0 4px 28px; white-space: nowrap; }
tr { border-bottom: 1px solid var(--line); }
tr.section { border: 0; }
tr.section th { color: var(--accent); font-weight: 600; padding-top: 16px; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 24px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; } dd { padding-bottom: 6px; } }
"""
