"""Contenders in turn, again and again, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from scfeat_core.bench.floors import Work
from scfeat_core.errors import ScfeatError

Parts = Mapping[str, float]
NOISY = 0.3  # half the distance of the 5 and 95 % from each other, as a share of the median
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Task:
    """What is timed as one piece.

    stage: its name. call: does it once, and may return milliseconds of parts of it, by their stage. device: a CUDA
    device whose events tell the time; None for the clock on the wall. work: the least that has to be done, of the
    stage and of its parts.
    """

    stage: str
    call: Callable[[], Parts | None]
    device: torch.device | None = None
    work: Mapping[str, Work] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Contender:
    """name: unique in its case. kind: "scfeat", "opencv" or "peer". facts: how it was run. found: what is known
    afterwards, such as ``points``: how many keypoints the last call found in an image."""

    name: str
    kind: str
    tasks: Sequence[Task]
    facts: Mapping[str, object] = field(default_factory=dict)
    found: Callable[[], Mapping[str, object]] = dict


@dataclass(eq=False)
class Samples:
    """What was measured of the contenders of one case.

    milliseconds: contender -> stage -> one value a round, NaN where there is none. errors: contender -> why it was left
    out. rounds: that were begun. interrupted: by Ctrl-C.
    """

    milliseconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    interrupted: bool = False

    def of(self, contender: str, stage: str) -> np.ndarray:
        """(rounds,) float64 milliseconds, NaN where a round has none."""
        return np.array(self.milliseconds.get(contender, {}).get(stage, []), np.float64)

    def begin_round(self) -> None:
        self.rounds += 1

    def add(self, contender: str, parts: Parts) -> None:
        """Of the round that was begun last."""
        stages = self.milliseconds.setdefault(contender, {})
        for stage, value in parts.items():
            values = stages.setdefault(stage, [])
            values.extend([np.nan] * (self.rounds - 1 - len(values)))
            values.append(value)


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    warm_up: int,
    *,
    seconds: float = 0.0,
    progress: Callable[[], object] = lambda: None,
) -> Samples:
    """Time all tasks of all contenders once in each round; every round begins with another contender.

    warm_up: rounds that are not counted. seconds: after which no round begins, 0 for no limit; five are done in any
    case. progress: called after each round, and each of the warm-up. A contender that raises is left out from there on,
    with the reason among the errors; Ctrl-C ends the measurement with what there is.
    """
    samples = Samples()
    try:
        for _ in range(warm_up):
            _round(contenders, 0, samples, counted=False)
            progress()
        started = time.perf_counter()
        for index in range(rounds):
            if seconds and index >= _LEAST_ROUNDS and time.perf_counter() - started > seconds:
                break
            samples.begin_round()
            _round(contenders, index, samples, counted=True)
            progress()
    except KeyboardInterrupt:
        samples.interrupted = True
    return samples


_LEAST_ROUNDS = 5


def _round(contenders: Sequence[Contender], index: int, samples: Samples, counted: bool) -> None:
    first = index % max(len(contenders), 1)
    for contender in (*contenders[first:], *contenders[:first]):
        if contender.name in samples.errors:
            continue
        try:
            for task in contender.tasks:
                parts = timed(task)
                if counted:
                    samples.add(contender.name, parts)
        except Exception as error:  # a peer may raise anything, and must not take the others with it
            samples.errors[contender.name] = reason(error)


def reason(error: Exception) -> str:
    """In one line: the message alone where it was made for the user."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ScfeatError) else f"{type(error).__name__}: {text}" if text else repr(error)


def timed(task: Task) -> dict[str, float]:
    """Milliseconds of the task, and of the parts that it tells, by stage. Waits for all devices before and after."""
    _wait()
    if task.device is not None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(task.device)
        begin.record(stream)
        parts = task.call()
        end.record(stream)
        end.synchronize()
        return {**(parts or {}), task.stage: begin.elapsed_time(end)}
    started = time.perf_counter()
    parts = task.call()
    _wait()
    return {**(parts or {}), task.stage: 1e3 * (time.perf_counter() - started)}


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# -- what the samples say ----------------------------------------------------------------------------------------------


def summarise(values: np.ndarray) -> dict[str, float | int | bool]:
    """Of milliseconds (n,), of which those that are not finite do not count: median, 5 and 95 %, how many, and whether
    they are noisy. Empty where there is none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    low, median, high = (float(value) for value in np.percentile(values, (5, 50, 95)))
    spread = (high - low) / 2 / median if median > 0 else 0.0
    noisy = bool(spread > NOISY and high - low > _CLOCK_MS)
    return {"median_ms": median, "p5_ms": low, "p95_ms": high, "runs": len(values), "spread": spread, "noisy": noisy}


_CLOCK_MS = 0.02  # below that it is the clock and the interpreter that vary


def paired_ratio(values: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How many times the reference, round by round: median, and the 95 % interval of that by bootstrap.

    values, reference: (n,) and (m,) milliseconds of the same rounds, from the first on. Deterministic. Empty where no
    round has both.
    """
    count = min(len(values), len(reference))
    ratios = values[:count] / np.maximum(reference[:count], 1e-9)
    ratios = ratios[np.isfinite(ratios)]
    if not len(ratios):
        return {}
    drawn = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = (float(value) for value in np.percentile(np.median(ratios[drawn], 1), (2.5, 97.5)))
    return {"median": float(np.median(ratios)), "low": low, "high": high}
