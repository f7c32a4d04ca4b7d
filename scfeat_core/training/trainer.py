"""A training run from its configuration to its weights: resumable to the step, on one process or many.

Every random draw of a step is a function of (seed, step, pair), so a run that was killed and resumed sees the same data
as one that was not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scfeat_core.data.photos import find_photos, load_photos, matching_split, read_split
from scfeat_core.errors import DataError
from scfeat_core.extraction import resolve_device
from scfeat_core.network.model import SCFeat
from scfeat_core.training.config import DataConfig, TrainConfig
from scfeat_core.training.distributed import Group, join_group, local_device
from scfeat_core.training.loading import Batch, Share, batches, to_device
from scfeat_core.training.objectives import Objective, WarpObjective, WarpSource
from scfeat_core.training.optimisation import create_optimizer
from scfeat_core.training.run import Run, TrainState
from scfeat_core.training.starts import create_model
from scfeat_core.training.step import train_step
from scfeat_core.training.validation import Validation

log = logging.getLogger(__name__)

Photos = list[list[Any]]


def load_photo_set(config: DataConfig, *, held_back: bool) -> Photos:
    if not config.root.is_dir():
        raise DataError(f"data.root: expected a folder of photographs, found none at {config.root}; state it by --data")
    split = matching_split(config.root, read_split(config.split))
    if split is None and config.split is not None and held_back:
        log.warning("%s names none of the photographs in %s: every 20th is held back", config.split, config.root)
    paths = find_photos(config.root, split, held_back=held_back)
    photos, problems = load_photos(paths, config.max_edge)
    for problem in problems:
        log.warning("%s", problem)
    return photos


def create_state(config: TrainConfig, device: torch.device) -> TrainState:
    model = create_model(config).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.optimiser.ema_decay), use_buffers=True)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    return TrainState(model, average, create_optimizer(model, config.optimiser), scaler)


def train(config: TrainConfig, folder: Path, *, resume: bool = False, progress: bool = True) -> Path:
    """Train to ``config.steps`` and return the path of the averaged weights. Raises ScfeatError."""
    device = local_device(resolve_device(config.device))
    config = replace(config, device=str(device))
    with join_group(device, timeout=600.0) as group:
        return _train(config, folder, device, group, resume=resume, progress=progress)


def _train(
    config: TrainConfig, folder: Path, device: torch.device, group: Group, *, resume: bool, progress: bool
) -> Path:
    photos = load_photo_set(config.data, held_back=False)
    objective = WarpObjective(WarpSource(photos, config.data.warps), config)
    validation = Validation(load_photo_set(config.data, held_back=True), config.validation_pairs, config.data.warps)
    state = create_state(config, device)
    run = Run(folder, config)
    run.start(state, resume=resume)
    log.info("%d photographs; steps %d to %d in %s", len(photos), state.step, config.steps, folder)
    share = Share(config.seed, config.batch_size, group.rank)
    try:
        _loop(state, objective, share, validation, run, group, progress)
    except KeyboardInterrupt:
        log.warning("interrupted after step %d; --resume goes on from the last save in %s", state.step, folder)
        raise
    log.info("curves: %s", run.plot())
    return run.weights


def _loop(
    state: TrainState,
    objective: Objective,
    share: Share,
    validation: Validation,
    run: Run,
    group: Group,
    progress: bool,
) -> None:
    from tqdm import tqdm

    config = run.config
    recent: dict[str, list[Tensor]] = {}
    with tqdm(total=config.steps, initial=state.step, disable=not progress, unit="step", smoothing=0.05) as bar:
        for batch in _device_batches(objective, share, range(state.step, config.steps), config):
            means = train_step(state, batch, share.generators(state.step), objective, config, group)
            for key, value in means.items():
                recent.setdefault(key, []).append(value)
            state.step += 1
            bar.update()
            last = state.step == config.steps
            if state.step % config.log_every == 0 or last:
                logged = {key: round(float(torch.stack(values).mean()), 5) for key, values in recent.items()}
                recent.clear()
                run.log(state.step, logged)
                bar.set_postfix(logged, refresh=False)
            if state.step % config.validate_every == 0 or last:
                scores = validation.measure(cast(SCFeat, state.average.module), config.device)
                run.log(state.step, scores)
                bar.write(f"step {state.step}: " + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()))
            if state.step % config.save_every == 0 or last:
                run.save(state)


def _device_batches(objective: Objective, share: Share, steps: range, config: TrainConfig) -> Iterator[Batch]:
    device = torch.device(config.device)
    for batch in batches(objective, share, steps, workers=0, pin=device.type == "cuda"):
        yield to_device(batch, device)
