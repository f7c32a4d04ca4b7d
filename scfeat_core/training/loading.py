"""Batches ahead of the network: a batch is a function of (seed, step, index of the pair) alone.

So a run that was killed and resumed sees the same data as one that was not, and process r of a distributed run sees
the pairs that a single process would see at those places of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scfeat_core.errors import DataError, ScfeatError

Batch = Any  # a NamedTuple of tensors whose first axis is the pair


class Source(Protocol):
    """What pairs are drawn from; goes to the workers, so it can be pickled."""

    @property
    def problems(self) -> Mapping[str, int]:
        """How often what went wrong so far."""

    def sample(self, rng: np.random.Generator) -> Batch:
        """One pair as a batch of 1; a function of the generator's state."""


class RenderingSource(ABC):
    """A source that draws numbers alone, in whatever process, and makes the pictures where they are used."""

    @property
    @abstractmethod
    def problems(self) -> Mapping[str, int]: ...

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> Batch:
        """What one pair will be."""

    @abstractmethod
    def render(self, draws: Batch) -> Batch:
        """The pairs of several samples, on the device."""


class Sources(Protocol):
    def source(self, step: int) -> Source: ...


class Share(NamedTuple):
    """The part of the global batch that this process computes."""

    seed: int
    batch_size: int
    rank: int = 0

    def indices(self) -> range:
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def generators(self, step: int) -> list[torch.Generator]:
        """One a pair, for the draws that the losses make."""
        keys = [np.random.SeedSequence((self.seed, step, index, 1)) for index in self.indices()]
        return [torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1)) for key in keys]


class StepBatches(Dataset):
    """``[step]`` is the batch of a step, or the error that kept it from being made."""

    def __init__(self, sources: Sources, share: Share) -> None:
        self._sources = sources
        self._share = share

    def __getitem__(self, step: int) -> Batch | ScfeatError:
        source = self._sources.source(step)
        rngs = (np.random.default_rng((self._share.seed, step, index)) for index in self._share.indices())
        try:
            return collate([source.sample(rng) for rng in rngs])
        except ScfeatError as error:  # passed on as it is: a worker's exception comes back as a text of many lines
            return error


def collate(samples: Sequence[Batch]) -> Batch:
    """One batch of several."""
    return type(samples[0])(*(torch.cat(parts) for parts in zip(*samples, strict=True)))


def part_of(batch: Batch, start: int, stop: int) -> Batch:
    return type(batch)(*(tensor[start:stop] for tensor in batch))


def on_device(source: Source, batch: Batch, device: torch.device) -> Batch:
    """What the objective takes, of what the source drew."""
    return source.render(batch) if isinstance(source, RenderingSource) else to_device(batch, device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return type(batch)(*(tensor.to(device, non_blocking=True) for tensor in batch))


def batches(sources: Sources, share: Share, steps: range, *, workers: int, pin: bool = False) -> Iterator[Batch]:
    """The batches of ``steps`` in order, drawn ahead by worker processes, or by a thread where ``workers`` is 0.

    Raises ScfeatError where one cannot be made.
    """
    dataset = StepBatches(sources, share)
    for item in _by_thread(dataset, steps) if workers == 0 else _by_workers(dataset, steps, workers, pin):
        if isinstance(item, ScfeatError):
            raise item
        yield item


def _by_thread(dataset: StepBatches, steps: range) -> Iterator[Batch | ScfeatError]:
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(dataset.__getitem__, step) for step in steps[:1]]
        for step in steps:
            item = ahead.pop().result()
            ahead = [pool.submit(dataset.__getitem__, step + 1)] if step + 1 in steps else []
            yield item


def _by_workers(dataset: StepBatches, steps: range, workers: int, pin: bool) -> Iterator[Batch | ScfeatError]:
    loader: DataLoader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_single_thread,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that loads data died ({str(error).splitlines()[0]}); if the machine ran out of memory, lower "
            "data_config_train.workers, then go on by --resume"
        ) from error


def _single_thread(_: int) -> None:
    cv2.setNumThreads(0)  # threads of the parent's pool do not exist in a forked worker
