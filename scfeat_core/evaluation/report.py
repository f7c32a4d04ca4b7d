"""The result of a run as a table, a JSON file and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from scfeat_core import __version__

Summary = dict[str, float]
Summarise = Callable[..., Summary]


@dataclass(frozen=True, eq=False)
class Section:
    """One kind of measurement: the whole, each set, each pair. columns: keys of a summary, for the table."""

    title: str
    columns: Sequence[str]
    total: Summary
    splits: dict[str, Summary]
    rows: list[Any]


def create_section(
    title: str, columns: Sequence[str], rows: list[Any], of_set: Summarise, of_all: Summarise
) -> Section:
    """rows: dataclasses with ``split``. of_set summarises the rows of one set, of_all those of all sets."""
    names = dict.fromkeys(row.split for row in rows)
    splits = {name: of_set([row for row in rows if row.split == name]) for name in names}
    return Section(title, columns, of_all(rows), splits, rows)


def format_table(section: Section, label: str) -> str:
    """Plain text: one line for each set, and one for all of them where there are several."""
    lines = [(name, summary) for name, summary in section.splits.items()]
    if len(lines) > 1:
        lines.append(("all sets", section.total))
    width = max(len(section.title), *(len(name) for name, _ in lines))
    widths = [max(len(column), 6) for column in section.columns]
    head = "  ".join([section.title.ljust(width), *(c.rjust(w) for c, w in zip(section.columns, widths, strict=True))])
    body = [_format_line(name.ljust(width), summary, section.columns, widths) for name, summary in lines]
    rule = "-" * len(head)
    return "\n".join([f"{label}", head, rule, *body[:-1], *([rule] if len(body) > 1 else []), body[-1]])


def _format_line(name: str, summary: Summary, columns: Sequence[str], widths: Sequence[int]) -> str:
    values = (
        f"{summary[column]:.0f}" if column in ("pairs", "keypoints", "matches") else f"{summary[column]:.1f}"
        for column in columns
    )
    return "  ".join([name, *(value.rjust(width) for value, width in zip(values, widths, strict=True))])


def write_json(path: Path, config: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """Configuration, versions, aggregates and all pairs; numbers that are infinite become null."""
    content = {
        "config": dict(config),
        "versions": _versions(),
        "sections": {
            section.title: {
                "all": section.total,
                "splits": section.splits,
                "pairs": [dataclasses.asdict(row) for row in section.rows],
            }
            for section in sections
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str | None]:
    return {
        "scfeat": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "torch": torch.__version__,
        "poselib": _installed("poselib"),
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def write_plots(folder: Path, label: str, sections: Sequence[Section]) -> list[Path]:
    """One picture for each section that has a curve; none without matplotlib. Returns what was written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    written = []
    for section in sections:
        curves, x_label, y_label = _curves(section)
        if not curves:
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, title=f"{section.title}: {label}")
        for name, (x, y) in curves.items():
            axes.plot(x, y, label=name, linewidth=2.5 if name == "all sets" else 1.2)
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        written.append(folder / f"{section.title}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def _curves(section: Section) -> tuple[dict[str, tuple[Any, Any]], str, str]:
    if section.title == "homography":
        summaries = {**section.splits, "all sets": section.total}
        thresholds = list(range(1, 11))
        curves = {name: (thresholds, [s[f"MMA@{t}"] for t in thresholds]) for name, s in summaries.items()}
        return curves, "threshold in pixels", "mean matching accuracy in %"
    if section.title == "pose":
        return _pose_curves(section), "pose error in degrees", "pairs in %"
    return {}, "", ""


def _pose_curves(section: Section) -> dict[str, tuple[Any, Any]]:
    thresholds = np.linspace(0, 20, 81)
    curves = {}
    for split in section.splits:
        errors = np.array([row.pose_errors for row in section.rows if row.split == split])
        recall = (errors[..., None] <= thresholds).mean((0, 2))  # (RANSAC thresholds, x)
        curves[split] = (thresholds, 100 * recall[recall.mean(1).argmax()])
    return curves
