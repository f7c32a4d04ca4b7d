"""``scfeat compare RUN RUN ...``: replays of one recording side by side, as a table and as one page."""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.charts import Chart, Line, chart, plan
from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.feature_files import replaced
from scfeat_core.replay import paths
from scfeat_core.replay.figures import FIGURES, Number, shown
from scfeat_core.replay.metrics import Metrics, read_metrics
from scfeat_core.replay.records import GroundTruth
from scfeat_core.replay.report import STYLE, survival_lines
from scfeat_core.replay.tum import read_tum
from scfeat_core.replay.verdicts import interruption
from scfeat_core.report import document

PAGE, FIGURES_FILE = "compare.html", "compare.json"
_SAME = ("bag", "topic", "window")  # facts without which runs are of different images
_OF_PATHS = ("ate_m", "ate_share", "rpe_m", "rpe_deg")  # errors of paths
_WHOLE = 0.99  # of the longest path: errors of less are those of another path
_NAMED = 3  # settings at most in the name of a run
_LOSSES = ("dropped", "resets", "damaged", "lost_messages", "lost_bytes")
_NO_SETTINGS = (
    *_SAME,
    "damage",
    "lost",
    "warnings",
    "interrupted",
    "descriptor_space",
    "bytes",
    "messages",
    "frame_ids",
)


@dataclass(frozen=True, eq=False)
class Run:
    """name: told apart from the others. facts: of run.json. trajectory: stamps (N,) int64 and poses (N, 4, 4) of
    trajectory.txt, None where there is none; truth, too."""

    name: str
    facts: Mapping[str, Any]
    metrics: Metrics
    trajectory: tuple[np.ndarray, np.ndarray] | None
    truth: GroundTruth | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `scfeat replay --out` wrote")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("build/compared"),
        metavar="DIR",
        help="for the page (default %(default)s)",
    )
    parser.add_argument("--anyway", action="store_true", help="compare runs of different recordings, too")


def run(args: argparse.Namespace) -> int:
    """Print the table, write the page. Raises ScfeatError for runs that cannot be compared."""
    runs = read_runs(args.runs)
    problems = check(runs, args.anyway)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    print(f"{_about(runs)}\n\n{text_table(runs)}")
    print(f"\n{write(args.out, runs, problems)}")
    return 0


# -- runs --------------------------------------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises DataError where one cannot be read, ScfeatError for less than two."""
    if len(folders) < 2:
        raise ScfeatError(f"expected two runs or more to compare, found {len(folders)}; give their folders")
    facts = [_facts(folder) for folder in folders]
    names = _names(folders, facts)
    return [_read(*given) for given in zip(names, folders, facts, strict=True)]


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
    except FileNotFoundError as error:
        live = (folder / "live.json").exists()
        found = "a live one, whose figures are in live.json and live.html" if live else "no run.json in it"
        raise DataError(
            f"expected the folder of a replay at {folder}, found {found}; give one of `scfeat replay` without --live"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"expected the facts of a replay in {path}, found {error!r}; replay the bag again") from error
    if not isinstance(facts, dict):
        raise DataError(f"expected the facts of a replay in {path}, found {type(facts).__name__}; replay the bag again")
    return facts


def _names(folders: Sequence[Path], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The methods, where they tell the runs apart, or these and the settings that differ; else the names of folders, or
    their paths. Of bags of different names always with the settings, and with the name of the bag before it."""
    several = len({fact.get("bag") for fact in facts}) > 1
    methods = [" ".join(str(fact.get(name, "")) for name in ("bag", "method")[not several :]).strip() for fact in facts]
    candidates = (
        *([] if several else [methods]),
        [", ".join([method, *own]) for method, own in zip(methods, _own_settings(facts), strict=True)],
        [folder.resolve().name for folder in folders],
        [str(folder) for folder in folders],
    )
    unique = (names for names in candidates if len(set(names)) == len(names) and all(names))
    return next(unique, [f"{number}: {folder}" for number, folder in enumerate(folders, 1)])


def _own_settings(facts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of each run those settings in which runs differ; none where these are too many for a name."""
    flat = [dict(_flat(fact.get("settings") or {}, "settings.")) for fact in facts]
    names = dict.fromkeys(name for settings in flat for name in settings)
    differing = [name for name in names if len({settings.get(name) for settings in flat}) > 1]
    if len(differing) > _NAMED:
        return [[] for _ in facts]
    return [
        [f"{name.removeprefix('settings.')} {settings[name]}" for name in differing if name in settings]
        for settings in flat
    ]


def _read(name: str, folder: Path, facts: Mapping[str, Any]) -> Run:
    trajectory, truth = (
        read_tum(path) if path.is_file() else None for path in (folder / "trajectory.txt", folder / "groundtruth.txt")
    )
    return Run(name, facts, read_metrics(folder), trajectory, None if truth is None else GroundTruth(*truth))


def check(runs: Sequence[Run], anyway: bool = False) -> list[str]:
    """What is to be known about a comparison. Raises DataError for runs of different images, unless told anyway."""
    problems = []
    for name in _SAME:
        found = [_known_by(name, run.facts) for run in runs]
        values = dict(zip(found, runs, strict=True))
        listed = ", ".join(f"{json.dumps(run.facts.get(name))} ({run.name})" for run in values.values())
        if len(values) > 1 and not anyway:
            alike = name == "bag" and len({run.facts.get(name) for run in runs}) == 1
            found_text = f"bags of one name and other contents, {listed}" if alike else f"a {name} of {listed}"
            raise DataError(
                f"expected runs of the same images, found {found_text}; replay the same recording, or give --anyway"
            )
        if len(values) > 1:
            problems.append(f"the runs are of different images: {name} is {listed}")
    names = list(dict.fromkeys(str(run.facts.get("bag")) for run in runs))
    if len(names) > 1 and not problems:
        problems.append(f"copies of one bag: {', '.join(names)}")
    for figure in ("frames", "processed", "ate_frames"):
        counts = [run.metrics.summary.get(figure) for run in runs]
        if len(set(counts)) > 1:
            listed = ", ".join(f"{count} ({run.name})" for count, run in zip(counts, runs, strict=True))
            problems.append(f"not equally many images: {FIGURES[figure].label} {listed}")
    problems += [
        f"{run.name} was {interruption(run.metrics, run.facts)}" for run in runs if run.facts.get("interrupted")
    ]
    return problems


def _known_by(name: str, facts: Mapping[str, Any]) -> str:
    """What tells one recording, topic or window from others: a bag by what is in it, whatever it is called."""
    contents = facts.get("contents") or {}
    return json.dumps(contents.get("bag") or facts.get("bag") if name == "bag" else facts.get(name), sort_keys=True)


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """values: of each run. above: what each is greater than, where only that is known. best: which of them is the best
    one alone, None where none is. ratios: to the first run, None where there is none."""

    name: str
    values: Sequence[Number]
    above: Sequence[float | None]
    best: int | None
    ratios: Sequence[float | None]

    @property
    def label(self) -> str:
        figure = FIGURES[self.name]
        return f"{figure.label} [{figure.unit}]" if figure.unit else figure.label

    def cells(self) -> list[str]:
        return [
            shown(self.name, value) if bound is None else f"> {shown(self.name, bound)}"
            for value, bound in zip(self.values, self.above, strict=True)
        ]


def rows(runs: Sequence[Run]) -> list[Row]:
    """Of all figures that at least one run has; losses only where there were any."""
    found = [(name, [run.metrics.summary.get(name) for run in runs]) for name in FIGURES]
    unequal = _are_unequal([run.metrics.summary.get("ate_frames") for run in runs])
    different = any(len({_known_by(name, run.facts) for run in runs}) > 1 for name in _SAME)
    return [
        _row(name, values, [run.metrics.above.get(name) for run in runs], different or (name in _OF_PATHS and unequal))
        for name, values in found
        if any(values)
        or any(name in run.metrics.above for run in runs)
        or (any(value is not None for value in values) and not name.startswith(_LOSSES))
    ]


def _are_unequal(counts: Sequence[Number]) -> bool:
    """Whether paths have so different numbers of frames that their errors are of different paths."""
    known = [count for count in counts if isinstance(count, (int, float))]
    return len(known) > 1 and min(known) < _WHOLE * max(known)


def _row(name: str, values: Sequence[Number], above: Sequence[float | None], apart: bool) -> Row:
    """apart: values that say nothing beside each other, none of which is the best."""
    numbers = [float(value) if isinstance(value, (int, float)) else None for value in values]
    if name == "initialisations":
        numbers = [number or None for number in numbers]  # 0: it never began, which is not better than once
    first = numbers[0]
    ratios = [None if not first or number is None else number / first for number in numbers]
    best = _best(name, numbers) if all(bound is None for bound in above) else _beyond(numbers, above)
    return Row(name, values, above, None if apart else best, ratios)


def _best(name: str, numbers: Sequence[float | None]) -> int | None:
    """None where neither is better, or where two look the same in the table."""
    better, known = FIGURES[name].better, [number for number in numbers if number is not None]
    if not better or len(known) < 2:
        return None
    best = max(known) if better == "higher" else min(known)
    alike = [
        place for place, number in enumerate(numbers) if number is not None and shown(name, number) == shown(name, best)
    ]
    return alike[0] if len(alike) == 1 else None


def _beyond(numbers: Sequence[float | None], above: Sequence[float | None]) -> int | None:
    """The only one of which a bound is all that is known, where no other reaches that; more is better of these."""
    beyond = [(place, bound) for place, bound in enumerate(above) if bound is not None]
    known = [number for number in numbers if number is not None]
    return beyond[0][0] if len(beyond) == 1 and known and max(known) <= beyond[0][1] else None


def text_table(runs: Sequence[Run]) -> str:
    """For a terminal: an asterisk at the best value, and how many times that of the first run the others are."""
    head = ["", *(run.name for run in runs)]
    body = [[row.label, *(_text_cell(row, place) for place in range(len(runs)))] for row in rows(runs)]
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in (head, *body)
    ]
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:]), "* the best one"])


def _text_cell(row: Row, place: int) -> str:
    ratio = f"{_ratio(row.ratios[place]):>8}" if place else ""
    return f"{row.cells()[place]}{' *' if row.best == place else '  '}{ratio}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None or ratio == 1 else f"x{ratio:.2f}"


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings and facts in which the runs differ: name -> the value of each."""
    flat = [dict(_flat(run.facts)) for run in runs]
    names = dict.fromkeys(name for facts in flat for name in facts)
    values = {name: [facts.get(name, "–") for facts in flat] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif prefix or name not in _NO_SETTINGS:
            yield f"{prefix}{name}", "–" if value in ("", None) else str(value)


# -- page --------------------------------------------------------------------------------------------------------------


def write(folder: Path, runs: Sequence[Run], problems: Sequence[str] = ()) -> Path:
    """compare.html and compare.json, into a folder. Returns the page. Raises ScfeatError."""
    content = {row.name: dict(zip((run.name for run in runs), row.values, strict=True)) for row in rows(runs)}
    files = {FIGURES_FILE: json.dumps(content, indent=1, allow_nan=False) + "\n", PAGE: page(runs, problems)}
    for name, text in files.items():
        with replaced(folder / name) as scratch:
            scratch.write_text(text, encoding="utf-8")
    return folder / PAGE


def page(runs: Sequence[Run], problems: Sequence[str] = ()) -> str:
    title, about = " · ".join(run.name for run in runs), _about(runs)
    warned = "".join(f'<p class="warned">{html.escape(problem)}</p>' for problem in problems)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="summary">{html.escape(about)}</p>{warned}',
        _html_table(runs),
        _differences_table(runs),
        _trajectories(runs),
        "<h2>How long tracks live</h2>",
        f'<div class="charts">{_survival(runs)}</div>',
        "<h2>Over time</h2>",
        f'<div class="charts">{"".join(_over_time(runs))}</div>',
    ]
    return document(f"scfeat compare: {title}", [part for part in parts if part], STYLE + _STYLE)


def _about(runs: Sequence[Run]) -> str:
    """Which recording it is."""
    named = dict.fromkeys(str(run.facts[name]) for name in ("bag", "topic") for run in runs if run.facts.get(name))
    return " · ".join(named)


def _html_table(runs: Sequence[Run]) -> str:
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(
        f'<tr title="{html.escape(FIGURES[row.name].meaning)}"><th>{html.escape(row.label)}</th>'
        + "".join(_html_cell(row, place) for place in range(len(runs)))
        + "</tr>"
        for row in rows(runs)
    )
    return (
        f'<div class="scroll"><table class="wide"><tr class="head"><th></th>{head}</tr>{body}</table></div>'
        '<p class="about">Green: the best one. Small: how many times the value of the first run.</p>'
    )


def _html_cell(row: Row, place: int) -> str:
    ratio = f" <small>{_ratio(row.ratios[place])}</small>" if place else ""
    return f"<td{' class=best' if row.best == place else ''}>{html.escape(row.cells()[place])}{ratio}</td>"


def _differences_table(runs: Sequence[Run]) -> str:
    found = differences(runs)
    if not found:
        return '<h2>What differs</h2><p class="about">No setting: these are runs of the same kind.</p>'
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{html.escape(value)}</td>" for value in values) + "</tr>"
        for name, values in found.items()
    )
    table = f'<table class="wide"><tr class="head"><th></th>{head}</tr>{body}</table>'
    return f'<h2>What differs</h2><div class="scroll">{table}</div>'


def _trajectories(runs: Sequence[Run]) -> str:
    """All aligned to the truth, or without one to the first of them."""
    known = [(run, run.trajectory) for run in runs if run.trajectory is not None and len(run.trajectory[0])]
    if not known:
        return ""
    truth = next((run.truth for run in runs if run.truth is not None and len(run.truth.stamps)), None)
    reference = truth or GroundTruth(*known[0][1])
    ways = {run.name: paths.aligned(*at, np.ones(len(at[0]), bool), reference) for run, at in known}
    positions = [(name, way.positions) for name, way in ways.items()]
    if truth is not None:
        stamps = np.concatenate([stamps for _, (stamps, _) in known])
        inside = slice(*np.searchsorted(truth.stamps, [stamps.min(), stamps.max() + 1]))
        positions.insert(0, (paths.TRUTH, truth.poses[inside, :3, 3]))
    drawn = [plan("The way of the camera", paths.lines(positions), "m" if truth is not None else "units")]
    if truth is not None:
        first = min(stamps[0] for _, (stamps, _) in known)
        errors = [
            Line(run.name, 1e-9 * (stamps - first), ways[run.name].errors, colour)
            for colour, (run, (stamps, _)) in enumerate(known)
        ]
        drawn.append(chart(Chart("Distance from the truth, after alignment", errors, "seconds", "m")))
    return f'<h2>Trajectory</h2><div class="charts">{"".join(drawn)}</div>'


def _survival(runs: Sequence[Run]) -> str:
    lines = [line for colour, run in enumerate(runs) for line in survival_lines(run.metrics.survival, run.name, colour)]
    survival = Chart(
        "Tracks that are followed without a gap, of those seen twice",
        lines,
        "frames since the first sight",
        "%",
        high=100.0,
    )
    return chart(survival)


_COLUMNS = (
    ("inlier_ratio", "Inlier ratio", "%"),
    ("inliers", "Inliers", ""),
    ("keypoints", "Keypoints", ""),
    ("matches", "Matches", ""),
    ("track_age", "Age of the tracks, median", "frames"),
    ("coverage", "Coverage", "%"),
    ("epipolar_truth_px", "Epipolar error under the true motion, median", "px"),
    ("ms_total", "Time", "ms"),
)


def _over_time(runs: Sequence[Run]) -> Iterator[str]:
    for name, title, unit in _COLUMNS:
        lines = [
            Line(run.name, columns["index"], (100 if unit == "%" else 1) * columns[name], colour)
            for colour, run in enumerate(runs)
            if np.isfinite((columns := run.metrics.per_frame).get(name, np.zeros(0))).any()
        ]
        if lines:
            yield chart(Chart(title, lines, "image", unit, high=100.0 if unit == "%" else None))


_STYLE = """
td.best { color: var(--good); font-weight: 600; }
td small { display: inline-block; min-width: 52px; color: var(--soft); font-weight: 400; }
.warned { border-left: 5px solid var(--watch); padding-left: 14px; }
"""
