"""A training run from its configuration to its weights: resumable to the step, on one process or many.

Every random draw of a step is a function of (seed, step, pair), so a run that was killed and resumed sees the same data
as one that was not. On the CPU and with as many processes its weights are the same bit for bit; on a GPU the order of
sums, and with other numbers of processes also what looks at several pairs at once, make small differences.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from scfeat_core.config import load_config
from scfeat_core.errors import ScfeatError
from scfeat_core.extraction import resolve_device
from scfeat_core.network.model import ModelConfig, SCFeat
from scfeat_core.training.config import TrainConfig
from scfeat_core.training.data_sets import DataSets, open_data
from scfeat_core.training.distributed import Group, join_group, local_device
from scfeat_core.training.loading import Batch, Share, batches, to_device
from scfeat_core.training.memory import keep_freed_memory
from scfeat_core.training.objectives import Objective
from scfeat_core.training.optimisation import create_average, create_optimizer
from scfeat_core.training.run import Run, TrainState
from scfeat_core.training.starts import create_model
from scfeat_core.training.step import no_step_text, train_step

log = logging.getLogger(__name__)


def create_state(config: TrainConfig, device: torch.device, network: Mapping[str, Any] | None = None) -> TrainState:
    """network: the configuration of a saved one, whose weights are loaded afterwards."""
    model = create_model(config) if network is None else SCFeat(load_config(ModelConfig, network, where="last.pt"))
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    return TrainState(model, create_average(model, config), create_optimizer(model, config), scaler)


def train(config: TrainConfig, folder: Path, *, resume: bool = False, progress: bool = True) -> Path:
    """Train to ``config.steps`` and return the path of the averaged weights. Raises ScfeatError.

    Under ``torchrun`` each process trains on its share of every batch; the first one writes, logs and validates.
    """
    device = local_device(resolve_device(config.device))
    config = replace(config, device=str(device))
    keep_freed_memory()
    with join_group(device, timeout=60 * config.timeout) as group:
        run = Run(folder, config, main=group.is_main, world=group.world)
        saved = run.open(resume=resume)
        data = open_data(config, validate=group.is_main)
        state = create_state(config, device, None if saved is None else saved["network"])
        run.start(state, saved)
        group.wait(device)  # no process looks into the folder any more, so the first one may write
        if group.is_main:
            pairs = config.data_config_train.batch_size * group.world
            log.info("%s; %d a step, on %s", data.summary, pairs, device)
            log.info("steps %d to %d in %s", state.step, config.steps, folder)
        if state.step >= config.steps:
            log.info("nothing to do; a larger epoch_step goes on")
            run.close()
            return run.weights(state.model)
        try:
            _Loop(state, data, run, group, progress).run()
        except KeyboardInterrupt:
            log.warning("interrupted after step %d; --resume goes on from the last save in %s", state.step, folder)
            raise
        finally:
            run.close()
        return run.weights(state.model)


class _Loop:
    """Steps, and what is done between them every so often."""

    def __init__(self, state: TrainState, data: DataSets, run: Run, group: Group, progress: bool) -> None:
        self._state = state
        self._data = data
        self._run = run
        self._group = group
        self._progress = progress and group.is_main
        self._recent: dict[str, list[Tensor]] = {}

    def run(self) -> None:
        from tqdm import tqdm

        state, config = self._state, self._run.config
        share = Share(config.seed, config.data_config_train.batch_size, self._group.rank)
        steps = range(state.step, config.steps)
        with tqdm(
            total=config.steps, initial=state.step, disable=not self._progress, unit="step", smoothing=0.05
        ) as bar:
            for batch in _device_batches(self._data.objective, share, steps, config):
                means = train_step(state, batch, share, self._data.objective, config, self._group)
                for name, value in means.items():
                    self._recent.setdefault(name, []).append(value)
                state.step += 1
                bar.update()
                if self._is_due(config.log_freq):
                    bar.set_postfix(self._log(), refresh=False)
                if self._is_due(config.validate_freq) and self._group.is_main:
                    scores = self._validate()
                    if scores:
                        bar.write(f"step {state.step}: " + _text(scores))
                if self._is_due(config.save_freq):
                    self._run.save(state)
        if state.average.n_averaged == 0:
            raise ScfeatError(no_step_text(state))

    def _is_due(self, every: int) -> bool:
        return self._state.step % every == 0 or self._state.step == self._run.config.steps

    def _log(self) -> dict[str, float]:
        """Means since the last time, and counts since the start."""
        state = self._state
        values = {name: _rounded(float(torch.stack(recent).mean())) for name, recent in self._recent.items()}
        self._recent.clear()
        counts = Counter(state.incidents)
        for source in self._data.sources:
            counts.update(source.problems)
        rates = {f"lr/{i}": _rounded(group["lr"]) for i, group in enumerate(state.optimizer.param_groups)}
        self._run.log(state.step, values | rates | {f"count/{name}": float(n) for name, n in counts.items()})
        return {name: values[name] for name in list(values)[:4]}

    def _validate(self) -> dict[str, float]:
        model = cast(SCFeat, self._state.average.module)
        scores: dict[str, float] = {}
        for validation in self._data.validations:
            scores |= validation.measure(model, self._run.config.device)
        self._run.log(self._state.step, scores)
        return scores


def _device_batches(objective: Objective, share: Share, steps: range, config: TrainConfig) -> Iterator[Batch]:
    device = torch.device(config.device)
    workers = config.data_config_train.workers
    for batch in batches(objective, share, steps, workers=workers, pin=device.type == "cuda"):
        yield to_device(batch, device)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _text(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('validation_')} {value:.3f}" for name, value in scores.items())
