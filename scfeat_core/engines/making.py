"""An engine of a library for one size: made, and compared with float32 eager before it is used."""

from __future__ import annotations

import contextlib
import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from scfeat_core.engines import parity
from scfeat_core.engines.cache import Cache
from scfeat_core.engines.contract import Maps, Runner, Shape, Target
from scfeat_core.engines.elsewhere import Stopped
from scfeat_core.network.layers import Alignment

log = logging.getLogger(__name__)

ROUNDS = 9  # of a measurement; its median counts
GAIN = 0.95  # of the time of eager that ``auto`` wants another engine to stay below: less is within the noise

Build = Callable[[Target, Tensor, Cache], Runner]


@dataclass(frozen=True)
class Candidate:
    """build: makes it for images like the one that is given. alone: while nothing else of the engine runs."""

    name: str
    build: Build
    alone: bool = False


@dataclass(frozen=True)
class Made:
    """What came of it. candidate: whose runner; None: eager takes over for good. refusal: why; empty where it was
    chosen. precise: False where eager gives no features in the precision.
    """

    candidate: Candidate | None
    runner: Runner
    refusal: str = ""
    precise: bool = True


@dataclass(frozen=True, eq=False)
class Recipe:
    """What engines of a network are made from, and compared with.

    eager: what takes over, in the precision of the engine. reference: the same in float32. turn: held by whoever has
    to run alone.
    """

    target: Target
    eager: Runner
    reference: Runner
    cache: Cache
    alignment: Alignment
    turn: threading.Lock = field(default_factory=threading.Lock)

    @torch.inference_mode()
    def make(self, asked: str, candidates: Sequence[Candidate], shape: Shape) -> Made:
        """For images of a shape (B, 3, H, W), by any thread. asked: the name of the only candidate, or ``auto`` for
        the fastest of them. Raises nothing but Stopped.
        """
        try:
            return self._make(asked, candidates, shape)
        except Stopped:
            raise
        except Exception as error:  # of a library that builds programs for a device; memory that is not enough, too
            return self._refused(f"{asked} could not be made for {describe(shape)}: {one_line(error)}")

    def _make(self, asked: str, candidates: Sequence[Candidate], shape: Shape) -> Made:
        expected = _Expected(shape, self)
        if self.target.precision != "float32" and not parity.usable(own := self._deviation(expected)):
            reason = f"{asked} in {self.target.precision} deviates from float32 on images of this size: {own}"
            return Made(None, self.reference, f"{reason}; eager in float32 is used instead", precise=False)
        made: dict[str, Made] = {each.name: self._checked(each, expected) for each in candidates}
        if asked != "auto":
            (only,) = made.values()
            return only
        for each in made.values():
            if each.refusal:
                log.warning("auto leaves %s", each.refusal)
        return self._fastest([each for each in made.values() if not each.refusal], expected.given)

    def _deviation(self, expected: _Expected) -> parity.Parity:
        """Of eager in the precision."""
        own = parity.compare(expected.own, expected.maps, self.alignment)
        log.info("eager in %s against float32: %s", self.target.precision, own)
        return own

    def _checked(self, candidate: Candidate, expected: _Expected) -> Made:
        """A refusal where it deviates."""
        size = describe(expected.shape)
        try:
            with self.turn if candidate.alone else contextlib.nullcontext():
                runner = candidate.build(self.target, expected.given, self.cache)
            result = parity.compare(runner(expected.given), expected.maps, self.alignment)
            own = parity.compare(expected.own, expected.maps, self.alignment)
        except Stopped:
            raise
        except Exception as error:
            return self._refused(f"{candidate.name} could not be made for {size}: {one_line(error)}")
        if not parity.suffices(result, own):
            return self._refused(f"{candidate.name} deviates from float32 torch on {size}: {result}")
        log.info("%s agrees with float32 torch on %s: %s", candidate.name, size, result)
        return Made(candidate, runner)

    def _refused(self, reason: str) -> Made:
        return Made(None, self.eager, f"{reason}; eager in {self.target.precision} is used instead")

    def _fastest(self, made: Sequence[Made], image: Tensor) -> Made:
        contenders = {"eager": Made(None, self.eager), **{each.candidate.name: each for each in made if each.candidate}}
        times = _times({name: each.runner for name, each in contenders.items()}, image)
        best = min(times, key=lambda name: times[name] * (GAIN if name == "eager" else 1))
        log.info("auto takes %s: %s", best, ", ".join(f"{name} {1e3 * each:.1f} ms" for name, each in times.items()))
        return contenders[best]


class _Expected:
    """What a size is compared on, computed when it is first asked for. own: of eager in the precision of the engine."""

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        self.shape, self._recipe = shape, recipe

    @cached_property
    def given(self) -> Tensor:
        return parity.parity_input(self.shape, self._recipe.target.device)

    @cached_property
    def maps(self) -> Maps:
        return self._recipe.reference(self.given)

    @cached_property
    def own(self) -> Maps:
        return self.maps if self._recipe.target.precision == "float32" else self._recipe.eager(self.given)


def _times(runners: dict[str, Runner], image: Tensor) -> dict[str, float]:
    """Seconds of each, medians of rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, runner in runners.items():
            _synchronise(image)
            start = time.perf_counter()
            runner(image)
            _synchronise(image)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronise(image: Tensor) -> None:
    if image.device.type == "cuda":
        torch.cuda.synchronize(image.device)


def describe(shape: Shape) -> str:
    return f"{shape[0]} image(s) of {shape[3]}x{shape[2]}"


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
