"""The results of runs as pictures, where matplotlib is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.evaluation.metrics import MMA_THRESHOLDS
from scfeat_core.evaluation.report import ALL_SETS, Run, Section, summary_of

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
