"""Engines of libraries for the sizes that come, each used once it was made and compared; eager where there is none."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from scfeat_core.engines.contract import Maps, Runner, Shape
from scfeat_core.engines.elsewhere import Beside
from scfeat_core.engines.making import Candidate, Made, Recipe, describe, one_line

log = logging.getLogger(__name__)

SIZES = 16  # those of a pyramid, of a few cameras; making one takes longer than eager takes for hundreds of images

Key = tuple[Shape, int]
"""Of a runner: the shape of its images, and with how many threads."""


class CheckedEngine:
    """Made for each of the first sizes when their first image comes; eager for good from the first that fails.

    candidates: one, or for ``auto`` those that the first size chooses from. beside: where they are made while images go
    on by eager, in float32 until the precision was compared once; None makes the image wait that asks for one.
    """

    def __init__(
        self, asked: str, candidates: Sequence[Candidate], recipe: Recipe, beside: Beside[Made] | None = None
    ) -> None:
        self.name = asked
        self.precision = recipe.target.precision
        self.note = self.making = ""
        self._asked = asked
        self._candidates = tuple(candidates)
        self._recipe = recipe
        self._beside = beside
        self._asks = True
        self._in_work: Key | None = None
        self._eager = recipe.eager
        self._compared = self.precision == "float32"
        self._runners: dict[Key, Runner] = {}

    @torch.inference_mode()
    def run(self, image: Tensor) -> Maps:
        """image: (B, 3, H, W) float32, normalised. Without ``beside`` the first of a size waits for its engine."""
        key = (tuple(image.shape), torch.get_num_threads())
        runner = self._runner(key)
        if runner is None:
            return self._by_eager(image)
        self.name, self.precision = self._asked, self._recipe.target.precision
        try:
            return self._alone(runner, image)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # of a library that runs the network: an image later it would fail again
            reason = f"{self.name} failed: {one_line(error)}"
            self._give_up(f"{reason}; eager in {self.precision} is used instead")
            return self._by_eager(image)

    @contextmanager
    def unasked(self) -> Iterator[None]:
        before, self._asks = (self.name, self.precision), self._beside is None
        try:
            yield
        finally:
            self._asks = True
            if self._beside is not None:
                self.name, self.precision = before

    def close(self) -> None:
        """Give up what is being made, and what was."""
        if self._beside is not None:
            self._beside.close()
        self._give_up("")

    def _by_eager(self, image: Tensor) -> Maps:
        self.name = "eager"
        if not self._compared:
            self.precision = "float32"
            return self._alone(self._recipe.reference, image)
        self.precision = "float32" if self._eager is self._recipe.reference else self._recipe.target.precision
        return self._alone(self._eager, image)

    def _alone(self, runner: Runner, image: Tensor) -> Maps:
        with self._recipe.turn:
            return runner(image)

    def _runner(self, key: Key) -> Runner | None:
        """None: eager."""
        if self._beside is not None and self._in_work is not None and (made := self._beside.take()) is not None:
            self._adopt(self._in_work, made)
        if self._candidates and self._asks and key not in self._runners:
            self._ask(key)
        return self._runners.get(key)

    def _ask(self, key: Key) -> None:
        shape, _ = key
        if len(self._runners) >= SIZES:
            if not self.note:
                self.note = f"{self._asked} is made for {SIZES} sizes and batches at most; eager runs the others"
                log.warning("%s", self.note)
        elif self._beside is None:
            log.info("%s is made for %s; images wait meanwhile", self._asked, describe(shape))
            self._adopt(key, self._recipe.make(self._asked, self._candidates, shape))
        elif self._in_work is None:
            self._in_work = key
            self.making = self._announced(shape)
            log.info("%s", self.making)
            asked, candidates, recipe = self._asked, self._candidates, self._recipe
            self._beside.start(lambda: recipe.make(asked, candidates, shape))

    def _announced(self, shape: Shape) -> str:
        if self._asked == "eager":
            return f"{self._recipe.target.precision} is being compared with float32, which runs meanwhile"
        return f"{self._asked} for {describe(shape)} is being made; eager meanwhile"

    def _adopt(self, key: Key, made: Made) -> None:
        self._in_work, self.making = None, ""
        if not self._candidates:  # given up meanwhile
            return
        self._compared = True
        if not made.precise:
            self._eager = self._recipe.reference
        if made.candidate is None or made.candidate.name == "eager":  # the same for all sizes
            self._give_up(made.refusal)
            return
        self._asked, self._candidates = made.candidate.name, (made.candidate,)
        self._runners[key] = made.runner

    def _give_up(self, note: str) -> None:
        self._candidates = ()
        self._runners.clear()
        self.making = ""
        if note:
            self.note = note
            log.warning("%s", note)
