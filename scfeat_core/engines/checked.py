"""An engine of a library, compared with float32 eager before it is used, and replaced by eager where it deviates."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scfeat_core.engines import parity
from scfeat_core.engines.cache import Cache
from scfeat_core.engines.contract import Maps, Runner, Shape, Target
from scfeat_core.network.layers import Alignment

log = logging.getLogger(__name__)

SIZES = 16  # those of a pyramid, of a few cameras; making one takes longer than eager takes for hundreds of images
ROUNDS = 9  # of a measurement; its median counts
GAIN = 0.95  # of the time of eager that ``auto`` wants another engine to stay below: less is within the noise

Build = Callable[[Target, Tensor, Cache], Runner]


@dataclass(frozen=True)
class Candidate:
    name: str
    build: Build


class CheckedEngine:
    """Made for each of the first sizes when their first image comes; eager for good from the first that fails.

    candidates: one, or for ``auto`` those that the first size chooses from, made from ``target``. eager: what takes
    over, in the precision of the engine. reference: the same in float32.
    """

    def __init__(
        self,
        asked: str,
        candidates: Sequence[Candidate],
        target: Target,
        eager: Runner,
        reference: Runner,
        cache: Cache,
        alignment: Alignment,
    ) -> None:
        self.name = asked
        self.precision = target.precision
        self.note = ""
        self._asked = asked
        self._candidates = tuple(candidates)
        self._target = target
        self._eager = eager
        self._reference = reference
        self._cache = cache
        self._alignment = alignment
        self._runners: dict[tuple[Shape, int], Runner] = {}

    @torch.inference_mode()
    def run(self, image: Tensor) -> Maps:
        """image: (B, 3, H, W) float32, normalised. The first of a size waits until the engine is made and compared."""
        try:
            return self._runner(image)(image)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # of a library that runs the network: an image later it would fail again
            self._fall_back(f"{self.name} failed: {_one_line(error)}")
            return self._eager(image)

    def _runner(self, image: Tensor) -> Runner:
        key = (tuple(image.shape), torch.get_num_threads())
        if not self._candidates:
            return self._eager
        if key not in self._runners and len(self._runners) >= SIZES:
            if not self.note:
                self.note = f"{self.name} is made for {SIZES} sizes and batches at most; eager runs the others"
                log.warning("%s", self.note)
            return self._eager
        if key not in self._runners:
            self._runners[key] = self._prepare(image)
        return self._runners[key]

    def _prepare(self, image: Tensor) -> Runner:
        expected = _Expected(tuple(image.shape), image.device, self._reference, self._eager, self.precision)
        if self.precision != "float32" and not self._has_precision(expected):
            return self._eager
        made = {
            each: runner for each in self._candidates if (runner := self._checked(each, image, expected)) is not None
        }
        if self._asked == "auto":
            return self._choose(made, image)
        for candidate, runner in made.items():
            self.name = candidate.name
            if candidate.name == "eager":  # the same for all sizes
                self._candidates = ()
            return runner
        return self._eager

    def _has_precision(self, expected: _Expected) -> bool:
        """Whether eager gives features in the precision; it goes on in float32 where it does not."""
        own = parity.compare(expected.own, expected.maps, self._alignment)
        log.info("eager in %s against float32: %s", self.precision, own)
        if parity.usable(own):
            return True
        reason = f"{self._asked} in {self.precision} deviates from float32 on images of this size: {own}"
        self._eager, self.precision = self._reference, "float32"
        self._fall_back(reason)
        return False

    def _checked(self, candidate: Candidate, image: Tensor, expected: _Expected) -> Runner | None:
        """The candidate for the size of this image; None where it fails or deviates."""
        size = f"{image.shape[0]} image(s) of {image.shape[3]}x{image.shape[2]}"
        log.info("%s is made for %s; images wait meanwhile", candidate.name, size)
        try:
            runner = candidate.build(self._target, image, self._cache)
            result = parity.compare(runner(expected.given), expected.maps, self._alignment)
            own = parity.compare(expected.own, expected.maps, self._alignment)
        except Exception as error:  # of a library that builds programs for a device; memory that is not enough, too
            self._refuse(f"{candidate.name} could not be made for {size}: {_one_line(error)}")
            return None
        if not parity.suffices(result, own):
            self._refuse(f"{candidate.name} deviates from float32 torch on {size}: {result}")
            return None
        log.info("%s agrees with float32 torch on %s: %s", candidate.name, size, result)
        return runner

    def _choose(self, made: dict[Candidate, Runner], image: Tensor) -> Runner:
        """The fastest of those that were made for ``auto``; the choice stays."""
        runners = {"eager": self._eager, **{candidate.name: runner for candidate, runner in made.items()}}
        times = _times(runners, image)
        best = min(times, key=lambda name: times[name] * (GAIN if name == "eager" else 1))
        log.info("auto takes %s: %s", best, ", ".join(f"{name} {1e3 * each:.1f} ms" for name, each in times.items()))
        self._asked = self.name = best
        self._candidates = tuple(each for each in made if each.name == best)
        return runners[best]

    def _refuse(self, reason: str) -> None:
        if self._asked == "auto":
            log.warning("auto leaves %s", reason)
        else:
            self._fall_back(reason)

    def _fall_back(self, reason: str) -> None:
        self.name, self.note = "eager", f"{reason}; eager in {self.precision} is used instead"
        self._candidates = ()
        self._runners.clear()
        log.warning("%s", self.note)


class _Expected:
    """What a size is compared on, computed when it is first asked for. own: of eager in the precision of the engine."""

    def __init__(self, shape: Shape, device: torch.device, reference: Runner, eager: Runner, precision: str) -> None:
        self._shape, self._device = shape, device
        self._reference, self._eager, self._precision = reference, eager, precision

    @cached_property
    def given(self) -> Tensor:
        return parity.parity_input(self._shape, self._device)

    @cached_property
    def maps(self) -> Maps:
        return self._reference(self.given)

    @cached_property
    def own(self) -> Maps:
        return self.maps if self._precision == "float32" else self._eager(self.given)


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


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
