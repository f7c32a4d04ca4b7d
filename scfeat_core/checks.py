"""What figures must reach: conditions on them by name, as ``--fail-if "inlier_ratio<0.5"``."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from scfeat_core.errors import ConfigError, DataError

OPERATORS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_OPPOSITES = {"<=": ">", ">=": "<", "==": "!=", "<": ">=", ">": "<="}
_CONDITION = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|==|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Check:
    """A run fails where ``metric operator limit`` holds. metric: a flat name of the summary."""

    metric: str
    operator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.limit:.15g}"

    @property
    def expectation(self) -> str:
        """What must hold for a run to pass."""
        return f"{self.metric} {_OPPOSITES[self.operator]} {self.limit:.15g}"


@dataclass(frozen=True)
class Verdict:
    """A check of one run. value: the figure that was found. error: why there is no verdict; empty where there is.

    reason: why it is decided without a figure, as where what is measured never came about.
    """

    check: Check
    failed: bool = False
    value: float | None = None
    error: str = ""
    reason: str = ""

    @property
    def found(self) -> str:
        """Expected and found in one line."""
        if self.error:
            return self.error
        return f"expected {self.check.expectation}, found {self.reason or format(self.value, '.6g')}"


def parse(text: str) -> Check:
    """``NAME OPERATOR NUMBER`` with an operator of < <= > >= ==. Raises ConfigError."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"expected a check such as 'inlier_ratio<0.5', a metric, one of {' '.join(OPERATORS)} and a number, "
            f"found '{text}'"
        )
    metric, sign, number = match.groups()
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise ConfigError(f"expected a finite number behind '{metric}{sign}', found '{number}'")
    return Check(metric, sign, limit)


def check_names(checks: Collection[Check], names: Collection[str]) -> None:
    """Raise ConfigError for a metric that is none of ``names``, with the nearest of them."""
    for check in checks:
        if check.metric not in names:
            raise ConfigError(_unknown(check.metric, names))


def failed(check: Check, summary: Mapping[str, Any]) -> bool:
    """Whether a run with this summary fails the check.

    A figure without a value may be known to be greater than a number, by "above" of the summary. Raises ConfigError
    where there is no such metric, DataError where it has no value in this run by which that could be told.
    """
    check_names([check], summary.keys())
    value = summary[check.metric]
    if isinstance(value, str):
        raise ConfigError(f"expected a metric that is a number, found {check.metric} = '{value}'")
    if value is None and (bound := _bound(check, summary)) is not None and check.limit <= bound:
        return check.operator in (">", ">=")
    if value is None or not math.isfinite(value):
        raise DataError(
            f"expected a value of {check.metric} to check '{check}', found none in this run"
            f"{_remedy(check.metric)}; or drop the check"
        )
    return bool(OPERATORS[check.operator](value, check.limit))


def judge(check: Check, summary: Mapping[str, Any]) -> Verdict:
    """The same, with what :func:`failed` raises as the verdict's error."""
    try:
        fails, value = failed(check, summary), summary[check.metric]
        if value is None:
            return Verdict(check, fails, reason=f"more than {_bound(check, summary):.6g}")
        return Verdict(check, fails, float(value))
    except (ConfigError, DataError) as error:
        return Verdict(check, error=str(error))


def _bound(check: Check, summary: Mapping[str, Any]) -> float | None:
    """What a figure without a value is known to be greater than."""
    found: float | None = summary.get("above", {}).get(check.metric)
    return found


def _unknown(metric: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(metric, names, n=1, cutoff=0.4)
    suggestion = f"did you mean '{near[0]}'? " if near else ""
    return f"there is no metric '{metric}': {suggestion}There are {', '.join(sorted(names))}"


def _remedy(metric: str) -> str:
    if metric.startswith(("ate", "rpe")) or "truth" in metric:
        return ": it needs ground truth (--ground-truth FILE or TOPIC) and a calibration"
    return ""
