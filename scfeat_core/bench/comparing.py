"""Two results stage by stage, and conditions on their ratios, for continuous integration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.bench.measuring import COMPARED, SCHEMA
from scfeat_core.bench.tables import milliseconds
from scfeat_core.checks import OPERATORS, Check, check_names, parse
from scfeat_core.errors import ConfigError, DataError

_SAME = ("cpu", "cores", "threads", "opencv_threads", "gpus", "torch", "opencv")  # or times are not comparable


@dataclass(frozen=True)
class Change:
    """Of one stage. old, new: milliseconds, medians. ratio: new / old, divided by what OpenCV's detectors did in the
    same case where ``relative``."""

    case: str
    contender: str
    stage: str
    old: float
    new: float
    ratio: float


@dataclass(frozen=True)
class Gone:
    """Stages of a contender that were measured before, and are not now. whole: it has no others. why: the error of the
    contender, or what else is known."""

    case: str
    contender: str
    stages: tuple[str, ...]
    whole: bool
    why: str

    def __str__(self) -> str:
        what = self.contender if self.whole else f"{self.contender}: {', '.join(self.stages)}"
        return f"{self.case}: {what}: measured before, and not now: {self.why}"


def read_results(path: Path) -> dict[str, Any]:
    """What ``scfeat bench`` wrote. Raises DataError."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"expected results of scfeat bench at {path}, found no file; check the path") from error
    except (OSError, ValueError) as error:
        raise DataError(f"expected results of scfeat bench in {path}, found {error}; measure again") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or "machine" not in results:
        found = results.get("schema") if isinstance(results, dict) else type(results).__name__
        raise DataError(f"expected results of scfeat bench (schema {SCHEMA}) in {path}, found {found}; measure again")
    return results


def changes(old: Mapping[str, Any], new: Mapping[str, Any], relative: bool = False) -> list[Change]:
    """Of all stages that both have, in the order of the new one.

    relative: divide by the geometric mean of the ratios of OpenCV's detectors in the same case, which nothing in this
    package changes: what is left is not the machine's. Raises DataError where they have nothing in common.
    """
    known = dict(_medians(old))
    found = [
        Change(*key, known[key], median, median / known[key]) for key, median in _medians(new) if known.get(key, 0) > 0
    ]
    if not found:
        raise DataError(
            "expected results with cases, contenders and stages in common, found none; compare like with like"
        )
    if not relative:
        return found
    scale = {case: _scale(case, found) for case in {each.case for each in found}}
    return [
        Change(each.case, each.contender, each.stage, each.old, each.new, each.ratio / scale[each.case])
        for each in found
    ]


def _medians(results: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], float]]:
    for case in results.get("cases", []):
        for contender in case["contenders"]:
            for stage, figures in contender["stages"].items():
                yield (case["name"], contender["name"], stage), figures["median_ms"]


def _scale(case: str, found: Sequence[Change]) -> float:
    ratios = [each.ratio for each in found if each.case == case and _is_reference(each)]
    if not ratios:
        raise DataError(
            f"expected one of OpenCV's detectors in both results of '{case}', found none; leave --relative out"
        )
    return float(np.exp(np.mean(np.log(ratios))))


def _is_own(contender: str) -> bool:
    return contender.startswith("scfeat ")


def _is_reference(change: Change) -> bool:
    return change.contender.startswith("opencv ") and change.stage == COMPARED


def other_machine(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the machines, so that absolute times are not comparable."""
    pairs = ((name, old["machine"].get(name), new["machine"].get(name)) for name in _SAME)
    return [f"{name}: {before} before, {now} now" for name, before, now in pairs if before != now]


def gone(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Gone]:
    """Of each contender of scfeat the stages that the old results have and the new ones lack, in cases that both
    have."""
    cases = {case["name"] for case in new.get("cases", [])}
    before, now = _stages(old), _stages(new)
    found = []
    for key, stages in before.items():
        left = now.get(key, [])
        lost = tuple(stage for stage in stages if stage not in left)
        if lost and key[0] in cases and _is_own(key[1]):
            found.append(Gone(*key, lost, not left, _why(new, key)))
    return found


def _stages(results: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Those of each case and contender."""
    found: dict[tuple[str, str], list[str]] = {}
    for (case, contender, stage), _ in _medians(results):
        found.setdefault((case, contender), []).append(stage)
    return found


def _why(results: Mapping[str, Any], key: tuple[str, str]) -> str:
    """Why results lack stages of this case and contender."""
    errors = {
        (case["name"], contender["name"]): contender["error"]
        for case in results["cases"]
        for contender in case["contenders"]
    }
    if errors.get(key):
        return str(errors[key])
    if results.get("interrupted"):
        return "it was not asked for, or the measurement was interrupted"
    return "what they need is not there" if key in errors else "it was not asked for"


def other_engines(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Contenders of one name that ran on another engine, or in another precision."""
    before, now = dict(_engines(old)), dict(_engines(new))
    return [
        f"{': '.join(key)}: ran as {' '.join(before[key])} before, as {' '.join(now[key])} now"
        for key in now
        if key in before and before[key] != now[key]
    ]


def _engines(results: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    for case in results.get("cases", []):
        for contender in case["contenders"]:
            if "engine" in contender:
                yield (case["name"], contender["name"]), (contender["engine"], contender["precision"])


def change_rows(found: Sequence[Change]) -> list[list[str]]:
    head = ["case, contender, stage", "before ms", "now ms", "ratio"]
    return [
        head,
        *([_name(each), milliseconds(each.old), milliseconds(each.new), f"{each.ratio:.2f}"] for each in found),
    ]


def _name(change: Change) -> str:
    return f"{change.case}: {change.contender}: {change.stage}"


# -- conditions --------------------------------------------------------------------------------------------------------


def parse_checks(texts: Sequence[str]) -> list[Check]:
    """Of ``--fail-if``: a stage, an operator and a ratio. Raises ConfigError."""
    return [parse(text) for text in texts]


def failures(checks: Sequence[Check], found: Sequence[Change], missing: Sequence[Gone] = ()) -> list[str]:
    """One line for each stage that a condition holds for, but OpenCV's. Raises ConfigError for a stage that is unknown
    among the missing, too."""
    own = [each for each in found if not _is_reference(each)]
    check_names(checks, {each.stage for each in own} | {stage for each in missing for stage in each.stages})
    return [line for check in checks for line in _failures(check, own)]


def undecided(checks: Sequence[Check], missing: Sequence[Gone]) -> list[Gone]:
    """Those of the missing without which a condition cannot be told."""
    return [each for each in missing if any(check.metric in each.stages for check in checks)]


def _failures(check: Check, own: Sequence[Change]) -> Iterator[str]:
    for each in own:
        if each.stage == check.metric and OPERATORS[check.operator](each.ratio, check.limit):
            times = f"{milliseconds(each.old)} ms, now {milliseconds(each.new)} ms"
            yield f"{_name(each)}: {each.ratio:.3g} times what it was ({times}), and '{check}' fails"


def require_comparison(checks: Sequence[str], compared: bool) -> None:
    """Raise ConfigError for conditions with nothing to compare to."""
    if checks and not compared:
        raise ConfigError(
            f"expected --compare OLD.json with --fail-if, found none: {', '.join(checks)} is a ratio to it"
        )
