"""What came of some replays: one table (text, Markdown, CSV), JSON, and JUnit XML for continuous integration."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from scfeat_core.checks import Check, Verdict, check_names, judge, parse
from scfeat_core.errors import ConfigError, ScfeatError
from scfeat_core.replay.figures import SUMMARY_NAMES
from scfeat_core.replay.metrics import NEVER_BEGAN
from scfeat_core.report import write

from .live_report import SUMMARY_NAMES as LIVE_NAMES

EXIT_FAILED = 1  # a check says so
EXIT_ERROR = 2  # a replay, or a check that could not be decided
EXIT_INTERRUPTED = 130

_NOTES = ("missing", "above")  # of a summary, that are no figures
LOSSES = ("lost_messages", "lost_bytes")  # of the bag itself; shown where there are any
# What the table of a terminal shows of the summary, where a run has it.
COLUMNS = (
    *(
        "processed",
        "dropped",
        *LOSSES,
        "keypoints",
        "matches",
        "inlier_ratio",
        "coverage",
        "track_length",
        "epipolar_px",
    ),
    *("lost", "ate_m", "rpe_m", "rpe_deg", "ms_total", "fps", "processed_hz", "latency_ms", "latency_p95_ms"),
)
_KNOWN = {*SUMMARY_NAMES, *LIVE_NAMES}
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2
_NONE = "–"
_BAG_FILE = re.compile(r"\.(mcap|db3|bag|bag\.active)(\.zstd)?$")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def bag_name(bag: Path) -> str:
    """As the user calls it: that of its folder, or of its file without what says that it is a bag. Never empty."""
    path = bag.resolve() if bag.name == ".." else bag.absolute()  # a link keeps its name
    return _BAG_FILE.sub("", path.name) or "bag"


@dataclass(frozen=True)
class Run:
    """One replay and what came of it.

    name: unique among the runs, that of its folder. summary: flat figures; None where there are none. error: why not,
    or why they are not of the whole bag. seconds: what it took. interrupted: it was stopped, and the summary, if any,
    is of what had been done. started: not where that was before its turn. reused: it was complete already.
    """

    name: str
    summary: Mapping[str, Any] | None
    error: str = ""
    seconds: float = 0.0
    interrupted: bool = False
    reused: bool = False
    folder: Path | None = None
    bag: Path | None = None
    started: bool = True

    @classmethod
    def not_started(cls, job: Any) -> Run:
        """That of a job, with ``bag`` and ``out``, before which the command was interrupted."""
        return cls(job.out.name, None, "not started", interrupted=True, folder=job.out, bag=job.bag, started=False)

    @property
    def state(self) -> str:
        """A word, and another where the bag is damaged."""
        if self.interrupted:
            word = "interrupted"
        else:
            word = "error" if self.error else "reused" if self.reused else "done"
        return f"{word}, damaged" if self.damaged else word

    @property
    def end(self) -> str:
        """In a line, why there are no figures."""
        if not self.started:
            return "the replay was not started"
        word = "the replay was interrupted" if self.interrupted else "the replay failed"
        return f"{word}: {self.error.partition(chr(10))[0]}" if self.error else word

    @property
    def bag_name(self) -> str:
        """As the user calls it; the folder of a run may be called otherwise."""
        return self.name if self.bag is None else bag_name(self.bag)

    @property
    def missing(self) -> dict[str, list[str]]:
        """Why columns of the table have no value: reason -> their names."""
        found: dict[str, list[str]] = {}
        for name, reason in (self.summary or {}).get("missing", {}).items():
            if name in COLUMNS:
                found.setdefault(reason, []).append(name)
        return found

    @property
    def damaged(self) -> bool:
        """Whether not all of the bag could be read."""
        return bool((self.summary or {}).get("damaged"))


# -- on the command line -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--fail-if, --junit, --json, --table."""
    group = parser.add_argument_group("checks and tables")
    group.add_argument(
        "--fail-if",
        type=_condition,
        action="append",
        default=[],
        metavar="CONDITION",
        help="exit with status 1 where it holds, e.g. 'inlier_ratio<0.5' (< <= > >= ==); may be repeated",
    )
    group.add_argument("--junit", type=Path, metavar="FILE", help="write the checks as JUnit XML")
    group.add_argument("--json", type=Path, metavar="FILE", help="write summaries and checks of all bags as JSON")
    group.add_argument(
        "--table", type=_table_file, metavar="FILE", help="write the table of all bags, too: .txt, .md or .csv"
    )


def warn(text: str) -> None:
    """A line for the user that is no result."""
    print(text, file=sys.stderr, flush=True)


def conclude(
    runs: Sequence[Run],
    args: argparse.Namespace,
    say: Callable[[str], None] = print,
    complain: Callable[[str], None] = warn,
) -> int:
    """Say and write what came of the runs, as the arguments of :func:`add_arguments` ask; the exit status.

    0 where all is well, 1 where a check failed, 2 where a replay failed or a check could not be decided, 130 where it
    was interrupted. Raises ScfeatError where a file cannot be written.
    """
    verdicts = {run.name: _verdicts(run, args.fail_if) for run in runs}
    if any(run.summary is not None for run in runs):
        say(text_table(runs, verdicts))
    for line in _complaints(runs, verdicts):
        complain(line)
    files = [("--json", args.json, as_json), ("--junit", args.junit, junit)]
    if args.table is not None:
        files.append(("--table", args.table, _TABLES[args.table.suffix]))
    _write_all([(option, path, make(runs, verdicts)) for option, path, make in files if path is not None])
    return exit_status(runs, verdicts)


def _write_all(files: Sequence[tuple[str, Path, str | bytes]]) -> None:
    """Of the options that choose them. What cannot be written is told when all others are."""
    errors = []
    for option, path, content in files:
        try:
            write(path, content, option, "file")
        except ScfeatError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def exit_status(runs: Sequence[Run], verdicts: Mapping[str, Sequence[Verdict]]) -> int:
    """Of the command; see :func:`conclude`."""
    given = [verdict for of_run in verdicts.values() for verdict in of_run]
    if any(run.interrupted for run in runs):
        return EXIT_INTERRUPTED
    if any(run.error for run in runs) or any(verdict.error for verdict in given):
        return EXIT_ERROR
    return EXIT_FAILED if any(verdict.failed for verdict in given) else 0


def _condition(text: str) -> Check:
    try:
        check = parse(text)
        check_names([check], _KNOWN)
        return check
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _table_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _TABLES:
        raise argparse.ArgumentTypeError(f"expected a file that ends in {', '.join(_TABLES)}, found '{text}'")
    return path


def _verdicts(run: Run, checks: Collection[Check]) -> list[Verdict]:
    if run.summary is None:
        return [Verdict(check, error=f"expected figures to check '{check}', found none: {run.end}") for check in checks]
    return [_explained(judge(check, run.summary), run.summary) for check in checks]


def _explained(verdict: Verdict, summary: Mapping[str, Any]) -> Verdict:
    """With the reason why there is no figure; where the odometry never began, it has failed."""
    check = verdict.check
    reason = summary.get("missing", {}).get(check.metric)
    if not verdict.error or reason is None:
        return verdict
    if reason == NEVER_BEGAN:
        return Verdict(check, failed=True, reason=f"none: {reason}")
    return Verdict(check, error=f"expected a value of {check.metric} to check '{check}', found none: {reason}")


def _complaints(runs: Sequence[Run], verdicts: Mapping[str, Sequence[Verdict]]) -> list[str]:
    lines = []
    for run in runs:
        if run.error:
            lines.append(f"{run.name}: {run.state}: {run.error}")
        for reason, names in run.missing.items():
            lines.append(f"{run.name}: no {', '.join(names)}: {reason}")
        if run.damaged:
            lines.append(f"{run.name}: the bag is damaged: {(run.summary or {}).get('damage', 'see the report')}")
        for verdict in verdicts.get(run.name, ()):
            if run.summary is not None and (verdict.error or verdict.failed):
                lines.append(f"{run.name}: {'error' if verdict.error else 'FAILED'}: {verdict.found}")
    return lines


# -- tables ------------------------------------------------------------------------------------------------------------


def text_table(runs: Sequence[Run], verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """A line a run, numbers to the right, for a terminal."""
    rows = _rows(runs, verdicts)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown_table(runs: Sequence[Run], verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """The same for a page."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in _rows(runs, verdicts)]
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def csv_table(runs: Sequence[Run], verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """All figures of the summaries, unrounded; empty where there is none."""
    names = _names(runs)
    sink = io.StringIO()
    table = csv.writer(sink, lineterminator="\n")
    table.writerow(["bag", "run", "state", "checks", *names, "seconds", "error"])
    for run in runs:
        summary = run.summary or {}
        values = ["" if (value := summary.get(name)) is None else value for name in names]
        row = [run.bag_name, run.name, run.state, _score(verdicts.get(run.name, ()))]
        table.writerow([*row, *values, f"{run.seconds:.3f}", run.error])
    return sink.getvalue()


_TABLES = {
    ".txt": lambda runs, verdicts: text_table(runs, verdicts) + "\n",
    ".md": markdown_table,
    ".csv": csv_table,
}


def _names(runs: Sequence[Run]) -> list[str]:
    """Of all figures, in the order of the summaries."""
    return list(dict.fromkeys(name for run in runs for name in run.summary or {} if name not in _NOTES))


def _rows(runs: Sequence[Run], verdicts: Mapping[str, Sequence[Verdict]]) -> list[list[str]]:
    names = [name for name in COLUMNS if _is_shown(name, runs)]
    checked = any(verdicts.values())
    named = any(run.name != run.bag_name for run in runs)
    rows = [["bag", *(["run"] if named else []), *names, *(["checks"] if checked else []), "state"]]
    for run in runs:
        cells = [run.bag_name, *([run.name] if named else []), *(_figure(run, name) for name in names)]
        rows.append([*cells, *([_score(verdicts.get(run.name, ()))] if checked else []), run.state])
    return rows


def _is_shown(name: str, runs: Sequence[Run]) -> bool:
    if name in LOSSES:
        return any(run.damaged for run in runs)
    return any(_figure(run, name) != _NONE for run in runs)


def _figure(run: Run, name: str) -> str:
    cell = _cell((run.summary or {}).get(name))
    return "unknown" if cell == _NONE and name in LOSSES and run.damaged else cell


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return _NONE
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _score(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    failed = sum(verdict.failed for verdict in verdicts)
    errors = sum(bool(verdict.error) for verdict in verdicts)
    parts = [f"{failed} failed" if failed else "", f"{errors} undecided" if errors else ""]
    return ", ".join(part for part in parts if part) or "passed"


# -- for machines ------------------------------------------------------------------------------------------------------


def as_json(runs: Sequence[Run], verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """{"status", "runs": [{"name", "bag", "folder", "state", "error", "seconds", "summary", "checks"}]}."""
    content = {"status": exit_status(runs, verdicts), "runs": [_run_json(run, verdicts[run.name]) for run in runs]}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _run_json(run: Run, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "name": run.name,
        "bag": None if run.bag is None else str(run.bag),
        "folder": None if run.folder is None else str(run.folder),
        "state": run.state,
        "error": run.error,
        "seconds": round(run.seconds, 3),
        "summary": None if run.summary is None else {key: _finite(value) for key, value in run.summary.items()},
        "checks": [
            {
                "check": str(verdict.check),
                "failed": verdict.failed,
                "value": verdict.value,
                "reason": verdict.reason,
                "error": verdict.error,
            }
            for verdict in verdicts
        ],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def junit(runs: Sequence[Run], verdicts: Mapping[str, Sequence[Verdict]], suite: str = "scfeat replay") -> str:
    """JUnit XML as Jenkins and GitLab read it (xunit-plugin's junit-10.xsd): one suite, and for each bag a case
    "replay", with what it took, and one for each check.

    A replay that failed is an error; a check that could not be decided is an error, too. Those of a replay that was not
    started are skipped.
    """
    cases = [case for run in runs for case in _cases(run, verdicts[run.name])]

    def count(kind: str) -> str:
        return str(sum(case.find(kind) is not None for case in cases))

    counts = {
        "tests": str(len(cases)),
        "failures": count("failure"),
        "errors": count("error"),
        "time": f"{sum(run.seconds for run in runs):.3f}",
    }
    root = ElementTree.Element("testsuites", {"name": suite, **counts})
    ElementTree.SubElement(root, "testsuite", {"name": suite, "skipped": count("skipped"), **counts}).extend(cases)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _cases(run: Run, verdicts: Sequence[Verdict]) -> list[ElementTree.Element]:
    replay = _case(run, "replay", run.seconds)
    error = "error" if run.started else "skipped"
    if run.error or run.interrupted:
        _add(replay, error, run.state, run.error or "interrupted: the figures are of what had been done")
    if run.damaged:
        summary = run.summary or {}
        lost = ", ".join(f"{name} {_figure(run, name)}" for name in LOSSES)
        text = f"the bag is damaged ({lost}): {summary.get('damage', '')}"
        ElementTree.SubElement(replay, "system-out").text = _printable(text)
    cases = [replay]
    for verdict in verdicts:
        case = _case(run, str(verdict.check), 0.0)
        if verdict.error or verdict.failed:
            _add(case, error if verdict.error else "failure", verdict.check.metric, verdict.found)
        cases.append(case)
    return cases


def _case(run: Run, name: str, seconds: float) -> ElementTree.Element:
    return ElementTree.Element("testcase", {"classname": _printable(run.name), "name": name, "time": f"{seconds:.3f}"})


def _add(case: ElementTree.Element, kind: str, of: str, text: str) -> None:
    text = _printable(text).strip()
    ElementTree.SubElement(case, kind, {"type": of, "message": text.partition("\n")[0]}).text = text


def _printable(text: str) -> str:
    """Without what XML cannot hold, such as the colours of a log."""
    return _NO_XML.sub("?", _ESCAPE.sub("", text))
