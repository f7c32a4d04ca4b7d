"""From settings to results: everything as one plain dictionary, which is what the JSON file holds.

``cases`` has one entry for each size, budget and batch: its contenders, of each the stages with ``median_ms``,
``p5_ms``, ``p95_ms``, ``runs``, ``spread``, ``noisy``, ``rounds_ms`` (each round) and, where there is one, ``floor``;
and ``ratio``, how many times the extraction of the first contender it took. ``rates`` has what floors were computed
from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from scfeat_core.bench import own, peers
from scfeat_core.bench.floors import Rates, floor, measure_rates
from scfeat_core.bench.images import load_images
from scfeat_core.bench.machine import available_cores, describe_machine, load, load_warnings
from scfeat_core.bench.settings import ROUNDS, Case, Settings
from scfeat_core.bench.timing import Contender, Samples, measure, paired_ratio, reason, summarise
from scfeat_core.errors import ScfeatError
from scfeat_core.extraction import resolve_device

SCHEMA = 1
COMPARED = "extract"  # the stage that all contenders have
Progress = Callable[[], object]


@contextlib.contextmanager
def threads_of(count: int) -> Iterator[None]:
    """torch and OpenCV with this number of threads, 0 for that of torch, until the end."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    try:
        torch.set_num_threads(count or before[0])
        cv2.setNumThreads(count or before[0])
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def run(settings: Settings, progress: Progress = lambda: None, ros: own.Ros | None = None) -> dict[str, Any]:
    """Measure all cases. ros: what happens after the front end, None leaves that out. Raises ScfeatError for a peer
    that there is not, and where no variant of scfeat can run.

    Ctrl-C gives what was measured until then, with ``interrupted``.
    """
    for name in settings.peers:
        peers.load_peer(name)
    meter = Meter()
    cases: list[dict[str, Any]] = []
    with threads_of(settings.threads):
        for case in settings.cases:
            if not meter.interrupted:
                cases.append(_run_case(case, settings, meter, progress, ros))
        return meter.results(settings, {"cases": cases})


class Meter:
    """What is common to all cases: the rates of the devices, how busy the machine was, and whether to stop."""

    def __init__(self) -> None:
        self.interrupted = False
        self._before = load()
        self._rates: dict[tuple[str, str], Rates] = {}
        self._pending: list[tuple[dict[str, Any], tuple[str, str], Any]] = []

    def add_floor(self, stage: dict[str, Any], device: str, precision: str, work: Any) -> None:
        """To the figures of a stage, once the rates are known."""
        self._pending.append((stage, (device, precision), work))

    def measure_rates(self, device: str, precision: str) -> None:
        """Again each time, as a floor is what the machine does where nothing disturbs it."""
        measured = measure_rates(resolve_device(device), precision)
        known = self._rates.get((device, precision))
        self._rates[device, precision] = measured if known is None else known.best_of(measured)

    def results(self, settings: Settings, measured: Mapping[str, Any]) -> dict[str, Any]:
        for stage, key, work in self._pending:
            if key in self._rates:
                stage["floor"] = floored(stage, floor(work, self._rates[key]))
        after = load()
        machine = {**describe_machine(), "load_before": self._before, "load_after": after}
        return {
            "schema": SCHEMA,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine,
            "settings": plain(settings),
            "rates": [
                {"device": device, "precision": precision, **dataclasses.asdict(rates)}
                for (device, precision), rates in self._rates.items()
            ],
            **measured,
            "warnings": [*load_warnings(self._before, after, available_cores()), *_warnings(measured, settings)],
            "interrupted": self.interrupted,
        }


def floored(stage: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The floor, and how many times it the median took."""
    ratio = stage["median_ms"] / found["floor_ms"] if found["floor_ms"] > 0 and "median_ms" in stage else None
    return {**found, "ratio": ratio}


def plain(value: Any) -> Any:
    """Settings as JSON knows them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# -- one case ----------------------------------------------------------------------------------------------------------


def _run_case(case: Case, settings: Settings, meter: Meter, progress: Progress, ros: own.Ros | None) -> dict[str, Any]:
    errors: dict[str, str] = {}
    contenders: list[Contender] = []
    samples = Samples(interrupted=True)
    try:
        images = load_images(case.size, settings.images)
        contenders = list(_contenders(case, settings, images, errors, ros))
        _measure_rates(contenders, meter)
        samples = measure(contenders, settings.rounds, settings.warm_up, seconds=settings.seconds, progress=progress)
        if not samples.interrupted:
            _measure_rates(contenders, meter)
    except KeyboardInterrupt:
        samples.interrupted = True
    meter.interrupted = samples.interrupted
    listed = [_contender_results(each, contenders[0], samples, meter) for each in contenders]
    failed = [{"name": name, "kind": _kind(name), "error": error, "stages": {}} for name, error in errors.items()]
    return {
        "name": str(case),
        "size": list(case.size),
        "budget": case.budget,
        "batch": case.batch,
        "rounds": samples.rounds,
        "contenders": [*listed, *failed],
    }


def _contenders(
    case: Case, settings: Settings, images: Sequence[np.ndarray], errors: dict[str, str], ros: own.Ros | None
) -> Iterator[Contender]:
    """Those that can be made; why the others cannot is noted among the errors. Raises ScfeatError where none of ours
    can."""
    yield from _own(case, settings, images, errors, ros)
    for name in peers.OPENCV:
        try:
            yield peers.create_opencv(name, case, images)
        except ScfeatError as error:
            errors[f"opencv {name}"] = reason(error)
    for name in settings.peers:
        yield peers.create_peer(name, case, images, _peer_device(settings))


def _peer_device(settings: Settings) -> str:
    """That of the first variant, beside which peers are shown."""
    return str(resolve_device(settings.variants[0].device))


def _own(
    case: Case, settings: Settings, images: Sequence[np.ndarray], errors: dict[str, str], ros: own.Ros | None
) -> Iterator[Contender]:
    failed: list[Exception] = []
    for variant in settings.variants:
        try:
            yield own.create_contender(variant, case, images, settings.levels, ros)
        except Exception as error:  # out of memory and the like; the other variants may fit
            errors[str(variant)] = reason(error)
            failed.append(error)
    if len(failed) == len(settings.variants):
        raise failed[0] if isinstance(failed[0], ScfeatError) else ScfeatError(reason(failed[0]))


def _kind(name: str) -> str:
    return "opencv" if name.startswith("opencv ") else "scfeat" if name.startswith("scfeat ") else "peer"


def _measure_rates(contenders: Sequence[Contender], meter: Meter) -> None:
    pairs = {_arithmetic(each) for each in contenders if each.kind == "scfeat"}
    for device, precision in sorted(pairs):
        meter.measure_rates(device, precision)


def _arithmetic(contender: Contender) -> tuple[str, str]:
    """Device and precision of a contender of ours."""
    return str(contender.facts["device"]), str(contender.found()["precision"])


def _contender_results(contender: Contender, first: Contender, samples: Samples, meter: Meter) -> dict[str, Any]:
    measured = samples.milliseconds.get(contender.name, {})
    stages = {stage: _figures(samples.of(contender.name, stage)) for stage in sorted(measured, key=_order)}
    stages = {stage: figures for stage, figures in stages.items() if figures}
    for task in contender.tasks:
        for stage, work in task.work.items():
            if stage in stages:
                meter.add_floor(stages[stage], *_arithmetic(contender), work)
    ratio = paired_ratio(samples.of(contender.name, COMPARED), samples.of(first.name, COMPARED))
    return {
        "name": contender.name,
        "kind": contender.kind,
        **contender.facts,
        **contender.found(),
        "error": samples.errors.get(contender.name, ""),
        "stages": stages,
        "ratio": ratio,
    }


def _figures(values: np.ndarray) -> dict[str, Any]:
    """What the values say, and the values themselves; empty where there is none."""
    found: dict[str, Any] = dict(summarise(values))
    each = [round(value, 4) if np.isfinite(value) else None for value in values.tolist()]
    return {**found, "rounds_ms": each} if found else {}


def _order(stage: str) -> int:
    names = list(own.STAGES)
    return names.index(stage) if stage in names else len(names)


# -- what the reader is to know ----------------------------------------------------------------------------------------


def _warnings(measured: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    untold = [name for name in settings.peers if not peers.takes_device(peers.load_peer(name))]
    if untold and torch.cuda.is_available() and all(each.device == "cpu" for each in settings.variants):
        yield (
            f"{', '.join(untold)} may have used the GPU, and scfeat did not: CUDA_VISIBLE_DEVICES= keeps all on the "
            "CPU, and a peer with a parameter 'device' is told"
        )
    cases: dict[str, list[str]] = {}  # by what is to be said of them, which is said once
    for case in measured.get("cases", []):
        for text in _case_warnings(case):
            cases.setdefault(text, []).append(case["name"])
    for text, names in cases.items():
        everywhere = 1 < len(names) == len(measured["cases"])
        yield f"{'everywhere' if everywhere else '; '.join(names)}: {text}"


def _case_warnings(case: Mapping[str, Any]) -> Iterator[str]:
    if case["rounds"] < ROUNDS:
        yield f"{case['rounds']} rounds; medians of fewer than {ROUNDS} say little"
    for contender in case["contenders"]:
        yield from _contender_warnings(contender)
    figures = [each for contender in case["contenders"] for each in contender["stages"].values()]
    if noisy := sum(each["noisy"] for each in figures):
        yield (
            f"{noisy} of {len(figures)} medians are noisy, marked ~: 5 to 95 % of the rounds span more than 30 % of "
            "them to each side"
        )


def _contender_warnings(contender: Mapping[str, Any]) -> Iterator[str]:
    name = contender["name"]
    if contender["error"]:
        yield f"{name}: left out: {contender['error']}"
    if contender.get("note"):
        yield f"{name}: {contender['note']}"
    if contender.get("random_weights"):
        yield f"{name}: random weights: what comes after the network works on points that mean nothing"
