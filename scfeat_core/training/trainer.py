"""A training run from its configuration to its weights: resumable to the step, on one process or many.

Every random draw of a step is a function of (seed, step, pair), so a run that was killed and resumed sees the same data
as one that was not. On the CPU and with as many processes its weights are the same bit for bit; on a GPU the order of
sums, and with other numbers of processes also what looks at several pairs at once, make small differences.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from scfeat_core.config import load_config
from scfeat_core.errors import ConfigError, ScfeatError
from scfeat_core.extraction import resolve_device
from scfeat_core.memory import keep_freed_memory
from scfeat_core.network.model import ModelConfig, SCFeat
from scfeat_core.training.config import TrainConfig
from scfeat_core.training.data_sets import DataSets, open_data
from scfeat_core.training.distributed import Group, join_group, local_device
from scfeat_core.training.loading import Batch, Share, batches, on_device
from scfeat_core.training.optimisation import create_average, create_optimizer
from scfeat_core.training.run import Run, TrainState
from scfeat_core.training.starts import create_model
from scfeat_core.training.step import no_step_text, train_step
from scfeat_core.training.throughput import Throughput

log = logging.getLogger(__name__)


def create_state(config: TrainConfig, device: torch.device, network: Mapping[str, Any] | None = None) -> TrainState:
    """network: the configuration of a saved one, whose weights are loaded afterwards."""
    model = create_model(config) if network is None else SCFeat(load_config(ModelConfig, network, where="last.pt"))
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    state = TrainState(model, create_average(model, config), create_optimizer(model, config), scaler)
    if config.compile_network:
        model.backbone.compile()
        model.detector.compile()
    return state


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    until: float = math.inf,
    measure: bool = False,
) -> Path:
    """Train to ``config.steps`` and return the path of the averaged weights. Raises ScfeatError.

    until: ``time.monotonic()`` at which to save and return, wherever the run is then. measure: log the throughput.
    Under ``torchrun`` each process trains on its share of every batch; the first one writes, logs and validates.
    """
    device = local_device(resolve_device(config.device))
    config = replace(config, device=str(device))
    keep_freed_memory()
    with join_group(device, timeout=60 * config.timeout) as group:
        if group.world > 1 and (config.minutes > 0 or until < math.inf):
            raise ConfigError(
                f"expected one process where the clock decides, found {group.world}; set minutes: 0, and epoch_step"
            )
        run = Run(folder, config, main=group.is_main, world=group.world)
        saved = run.open(resume=resume)
        try:
            return _train(run, saved, group, progress, until, measure)
        finally:
            run.close()


def _train(run: Run, saved: dict[str, Any] | None, group: Group, progress: bool, until: float, measure: bool) -> Path:
    config, device = run.config, torch.device(run.config.device)
    data = open_data(config, validate=group.is_main)
    state = create_state(config, device, None if saved is None else saved["network"])
    run.start(state, saved)
    group.wait(device)  # no process looks into the folder any more, so the first one may write
    if group.is_main:
        pairs = config.data_config_train.batch_size * group.world
        log.info("%s; %d a step, on %s", data.summary, pairs, device)
        log.info("steps %d to %d in %s%s", state.step, config.steps, run.folder, _time_left(state, config))
    if is_finished(state, config):
        log.info("nothing to do; a larger epoch_step goes on")
        return run.weights(state.model)
    try:
        meter = Throughput(device, config.precision) if measure else None
        _Loop(state, data, run, group, progress, until, meter).run()
    except KeyboardInterrupt:
        log.warning("interrupted after step %d; --resume goes on from the last save in %s", state.step, run.folder)
        raise
    return run.weights(state.model)


class _Loop:
    """Steps, and what is done between them every so often."""

    def __init__(
        self,
        state: TrainState,
        data: DataSets,
        run: Run,
        group: Group,
        progress: bool,
        until: float = math.inf,
        meter: Throughput | None = None,
    ) -> None:
        self._state = state
        self._data = data
        self._run = run
        self._group = group
        self._progress = progress and group.is_main
        self._until = until
        self._meter = meter
        self._ended = False
        self._recent: dict[str, list[Tensor]] = {}

    def run(self) -> None:
        state, config = self._state, self._run.config
        share = Share(config.seed, config.data_config_train.batch_size, self._group.rank)
        steps = range(state.step, config.steps)
        with _bar(config.steps, state.step, self._progress) as bar, closing(self._batches(share, steps)) as batches:
            start = time.perf_counter()
            for batch in batches:
                self._step(batch, share, start)
                bar.update()
                self._between(bar)
                if self._ended:
                    break
                start = time.perf_counter()
        if state.average.n_averaged == 0:
            raise ScfeatError(no_step_text(state))

    def _step(self, batch: Batch, share: Share, start: float) -> None:
        """start: when the step before, and what is done between them, had ended."""
        state, config, drawn = self._state, self._run.config, time.perf_counter()

        def compute() -> Mapping[str, Tensor]:
            return train_step(state, batch, share, self._data.objective, config, self._group)

        means = compute() if self._meter is None else self._meter.count(compute, share.batch_size)
        for name, value in means.items():
            self._recent.setdefault(name, []).append(value)
        state.step += 1
        seconds = time.perf_counter() - start
        state.seconds += seconds
        if self._meter is not None:
            self._meter.add(share.batch_size, seconds, drawn - start)
        self._ended = is_finished(state, config) or time.monotonic() >= self._until

    def _between(self, bar: Any) -> None:
        config = self._run.config
        if self._is_due(config.log_freq):
            bar.set_postfix(self._log(), refresh=False)
        if self._is_due(config.validate_freq, at_end=is_finished(self._state, config)) and self._group.is_main:
            scores = self._validate()
            if scores:
                bar.write(f"step {self._state.step}: " + _text(scores))
        if self._is_due(config.save_freq):
            self._run.save(self._state)

    def _is_due(self, every: int, at_end: bool = True) -> bool:
        return self._state.step % every == 0 or (self._ended and at_end)

    def _log(self) -> dict[str, float]:
        """Means since the last time, and counts since the start."""
        state = self._state
        values = {name: _rounded(float(torch.stack(recent).mean())) for name, recent in self._recent.items()}
        self._recent.clear()
        counts = Counter(state.incidents)
        for source in self._data.sources:
            counts.update(source.problems)
        if self._meter is not None and (rates := self._meter.values()):
            values |= {name: _rounded(value) for name, value in rates.items()}
            log.info("step %d: loss %g; %s", state.step, values["loss"], _text(rates))
        rates = {f"lr/{i}": _rounded(group["lr"]) for i, group in enumerate(state.optimizer.param_groups)}
        self._run.log(state.step, values | rates | {f"count/{name}": float(n) for name, n in counts.items()})
        return {name: values[name] for name in list(values)[:4]}

    def _validate(self) -> dict[str, float]:
        model = cast(SCFeat, self._state.average.module)
        scores: dict[str, float] = {}
        with images_of_any_size():
            for validation in self._data.validations:
                scores |= validation.measure(model, self._run.config.device)
        self._run.log(self._state.step, scores)
        return scores

    def _batches(self, share: Share, steps: range) -> Generator[Batch, None, None]:
        config, objective = self._run.config, self._data.objective
        device, workers = torch.device(config.device), config.data_config_train.workers
        drawn = batches(objective, share, steps, workers=workers, pin=device.type == "cuda")
        for step, batch in zip(steps, drawn, strict=True):
            yield on_device(objective.source(step), batch, device)


def is_finished(state: TrainState, config: TrainConfig) -> bool:
    """Whether a run has had its steps, or its minutes."""
    return state.step >= config.steps or 0 < 60 * config.minutes <= state.seconds


@contextmanager
def images_of_any_size() -> Iterator[None]:
    """Let cuDNN choose algorithms without measuring them, which does not pay where each size comes once."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _bar(total: int, done: int, shown: bool) -> Iterator[Any]:
    """A progress bar; the one that says nothing needs no package."""
    if not shown:
        yield _NoBar()
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="step", smoothing=0.05) as bar:
        yield bar


class _NoBar:
    def update(self) -> None: ...

    def set_postfix(self, values: Mapping[str, float], refresh: bool) -> None: ...

    def write(self, text: str) -> None:
        log.info(text)


def _time_left(state: TrainState, config: TrainConfig) -> str:
    left = config.minutes - state.seconds / 60
    return f", at most {left:.1f} of {config.minutes:.1f} minutes" if config.minutes > 0 else ""


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _text(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('validation_')} {value:.3f}" for name, value in scores.items())
