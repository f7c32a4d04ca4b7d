"""The results of runs as a table and a JSON file."""

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
