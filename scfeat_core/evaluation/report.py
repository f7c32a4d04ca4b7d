"""The results of runs as a table, a JSON file and pictures."""

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
from scfeat_core.evaluation.metrics import MMA_THRESHOLDS
from scfeat_core.report import write

Summary = dict[str, float]
Summarise = Callable[..., Summary]
ALL_SETS = "all sets"


COUNTS = ("pairs", "keypoints", "matches")  # shown without decimals


@dataclass(frozen=True, eq=False)
class Section:
    """One kind of measurement: the whole, each set, each pair. columns: keys of a summary, for the table."""

    title: str
    columns: Sequence[str]
    total: Summary
    splits: dict[str, Summary]
    rows: list[Any]
    decimals: int = 1


@dataclass(frozen=True, eq=False)
class Run:
    """What one method gives with one budget of points and one size of images. settings: all that makes it differ."""

    label: str
    settings: dict[str, Any]
    sections: list[Section]


def create_section(
    title: str,
    columns: Sequence[str],
    rows: list[Any],
    of_set: Summarise,
    of_all: Summarise,
    decimals: int = 1,
) -> Section:
    """rows: dataclasses with ``split``. of_set summarises the rows of one set, of_all those of all sets."""
    names = dict.fromkeys(row.split for row in rows)
    splits = {name: of_set([row for row in rows if row.split == name]) for name in names}
    return Section(title, columns, of_all(rows), splits, rows, decimals)


def format_runs(runs: Sequence[Run]) -> str:
    """Plain text: for each section a table of the sets, with a line for each run."""
    tables = []
    for index, section in enumerate(runs[0].sections):
        if len(runs) == 1:
            tables.append(format_table(section, runs[0].label))
        else:
            tables.append(format_comparison({run.label: run.sections[index] for run in runs}))
    return "\n\n".join(tables)


def format_table(section: Section, label: str) -> str:
    """Plain text: one line for each set, and one for all of them where there are several."""
    lines = [(name, summary) for name, summary in section.splits.items()]
    if len(lines) > 1:
        lines.append((ALL_SETS, section.total))
    width = max(len(section.title), *(len(name) for name, _ in lines))
    head, body = _format_lines(section, section.title.ljust(width), [(name.ljust(width), s) for name, s in lines])
    rule = "-" * len(head)
    return "\n".join([f"{label}", head, rule, *body[:-1], *([rule] if len(body) > 1 else []), body[-1]])


def format_comparison(sections: Mapping[str, Section]) -> str:
    """Plain text: for each set one line for each of ``sections`` (of one title), which are called by their keys."""
    first = next(iter(sections.values()))
    sets = list(first.splits) if len(first.splits) == 1 else [*first.splits, ALL_SETS]
    widths = (max(map(len, [first.title, *sets])), max(map(len, sections)))
    lines = [
        (f"{name if index == 0 else '':<{widths[0]}}  {label:<{widths[1]}}", summary_of(section, name))
        for name in sets
        for index, (label, section) in enumerate(sections.items())
    ]
    head, body = _format_lines(first, f"{first.title:<{widths[0]}}  {'':<{widths[1]}}", lines)
    rule = "-" * len(head)
    groups = [body[i : i + len(sections)] for i in range(0, len(body), len(sections))]
    return "\n".join([head, *(line for group in groups for line in [rule, *group])])


def summary_of(section: Section, name: str) -> Summary:
    """Of one set by its name, or of all sets."""
    return section.total if name == ALL_SETS else section.splits[name]


def _format_lines(section: Section, corner: str, lines: Sequence[tuple[str, Summary]]) -> tuple[str, list[str]]:
    """Head and lines of a table; the names in ``lines`` and the corner are of one width."""
    widths = [max(len(column), 6) for column in section.columns]
    head = "  ".join([corner, *(c.rjust(w) for c, w in zip(section.columns, widths, strict=True))])
    body = [
        "  ".join([name, *(_cell(section, summary, c).rjust(w) for c, w in zip(section.columns, widths, strict=True))])
        for name, summary in lines
    ]
    return head, body


def _cell(section: Section, summary: Summary, column: str) -> str:
    value = summary.get(column, math.nan)
    if not math.isfinite(value):
        return "–"
    return f"{value:.{0 if column in COUNTS else section.decimals}f}"


def write_json(path: Path, config: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Configuration, versions, aggregates and all pairs; numbers that are infinite become null.

    One run: ``config`` with its settings, and ``sections``. Several: ``runs``, each with its label, settings, sections.
    """
    content: dict[str, Any]
    if len(runs) == 1:
        content = {"config": {**config, **runs[0].settings}, "versions": _versions(), "sections": _sections(runs[0])}
    else:
        parts = [{"label": run.label, "config": run.settings, "sections": _sections(run)} for run in runs]
        content = {"config": dict(config), "versions": _versions(), "runs": parts}
    write(path, json.dumps(_finite(content), indent=1) + "\n")


def _sections(run: Run) -> dict[str, Any]:
    return {
        section.title: {
            "all": section.total,
            "splits": section.splits,
            "pairs": [dataclasses.asdict(row) for row in section.rows],
        }
        for section in run.sections
    }


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


# -- pictures ----------------------------------------------------------------------------------------------------------

Curve = tuple[Any, Any]


def write_plots(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """For each section the curves (``<title>.png``) and bars of the sets (``<title>_sets.png``).

    One run: a curve for each set. Several: a curve for each run, of all sets. None without matplotlib. Returns what
    was written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    written = []
    for index, section in enumerate(runs[0].sections):
        sections = {run.label: run.sections[index] for run in runs}
        curves = _curves(sections)
        name = section.title.replace(", ", "_")
        if curves:
            written.append(_plot_curves(folder / f"{name}.png", section.title, runs, curves))
        if _bar_column(section):
            written.append(_plot_bars(folder / f"{name}_sets.png", section.title, sections))
    return written


def _figure(**axes: str) -> tuple[Any, Any]:
    """Without pyplot, which would choose a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(**axes)


def _plot_curves(path: Path, title: str, runs: Sequence[Run], curves: Mapping[str, Curve]) -> Path:
    accuracy = not title.startswith("pose")
    figure, axes = _figure(
        xlabel="threshold in pixels" if accuracy else "pose error in degrees",
        ylabel="mean matching accuracy in %" if accuracy else "pairs in %",
        title=f"{title}: {runs[0].label}" if len(runs) == 1 else title,
    )
    for (name, (x, y)), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        axes.plot(x, y, label=name, color=colour, linewidth=2.5 if name == ALL_SETS else 1.2)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def _plot_bars(path: Path, title: str, sections: Mapping[str, Section]) -> Path:
    """Groups of bars, one group for each set, one bar in it for each of ``sections``."""
    first = next(iter(sections.values()))
    names = [*first.splits, ALL_SETS]
    column = _bar_column(first)
    figure, axes = _figure(ylabel=f"{column} in %", title=title)
    width = 0.8 / len(sections)
    for index, ((label, section), colour) in enumerate(zip(sections.items(), _colours(len(sections)), strict=True)):
        values = [summary_of(section, name).get(column, math.nan) for name in names]
        axes.bar(np.arange(len(names)) + (index + 0.5) * width - 0.4, values, width, label=label, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def _colours(count: int) -> list[Any]:
    """As many colours as there are names: the usual ones, or where they do not suffice the steps of a range."""
    from matplotlib import colormaps

    if count <= colormaps["tab10"].N:
        return [colormaps["tab10"](index) for index in range(count)]
    return [colormaps["turbo"](0.05 + 0.9 * index / (count - 1)) for index in range(count)]


def _bar_column(section: Section) -> str:
    """The figure that stands for a section in the bars: the first of these that its table has."""
    return next((column for column in ("MMA@3", "AUC@5", "recall@5") if column in section.columns), "")


def _curves(sections: Mapping[str, Section]) -> dict[str, Curve]:
    """Of one section the curve of each set and of all; of several that of all sets for each."""
    if len(sections) > 1:
        return {label: curve for label, section in sections.items() if (curve := _curve(section, ALL_SETS))}
    (section,) = sections.values()
    names = [*section.splits, ALL_SETS]
    return {name: curve for name in names if (curve := _curve(section, name))}


def _curve(section: Section, name: str) -> Curve | None:
    if "MMA@3" in section.columns:
        summary = summary_of(section, name)
        return list(MMA_THRESHOLDS), [summary[f"MMA@{t}"] for t in MMA_THRESHOLDS]
    if section.title.startswith("pose"):
        return _recall_curve(section, list(section.splits) if name == ALL_SETS else [name])
    return None


def _recall_curve(section: Section, names: Sequence[str]) -> Curve:
    """Share of the pairs up to an error, with the better RANSAC threshold of each set; the mean over the sets."""
    errors = np.linspace(0, 20, 81)
    shares = []
    for name in names:
        found = np.array([row.pose_errors for row in section.rows if row.split == name])
        recall = (found[..., None] <= errors).mean((0, 2))  # (RANSAC thresholds, errors)
        shares.append(recall[recall.mean(1).argmax()])
    return errors, 100 * np.mean(shares, axis=0)
