"""All stages of a training, from random weights to weight files and their scores, in as many short runs as it takes.

Everything is kept in one folder: a folder a stage (see :class:`~scfeat_core.training.run.Run`), and ``results/`` with
what is worth carrying away: the weights in float16 and in files of at most 16 MiB, ``metrics.json``, ``log.jsonl``,
``curves.png``. The same command goes on where the last one was ended, or killed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from scfeat_core.config import Range, load_config, read_mapping
from scfeat_core.data.warps import GeometryConfig, WarpConfig
from scfeat_core.errors import ConfigError
from scfeat_core.extraction import resolve_device
from scfeat_core.network.model import SCFeat
from scfeat_core.network.weights import file_sha256, load_model, save_model
from scfeat_core.training.cli import override, resolve_paths
from scfeat_core.training.config import TrainConfig, merge
from scfeat_core.training.data_sets import load_photo_set, open_posed, photo_paths
from scfeat_core.training.run import Run, plot_curves
from scfeat_core.training.trainer import images_of_any_size, train
from scfeat_core.training.validation import PosedValidation, Validation, WarpValidation

log = logging.getLogger(__name__)

PART_BYTES = 16 * 2**20 - 2**16  # of weights in a file, which has a header, too
# Seconds of a run's time that are kept for what comes after its last step: the checkpoint and the results.
RESERVE = 25.0
STRONG = GeometryConfig(scale_sigma=0.8, rotation_sigma=25, upside_down=0.5)

Count = Annotated[int, Range(minimum=1)]


@dataclass(frozen=True)
class EvaluationConfig:
    """warped_pairs: of held-back photographs, of mild and of strong warps each. posed_pairs: of held-back scenes.

    beside: shipped weights that are measured in the same way. minutes: that all of it may take; with less left of a run
    it is left to the next one.
    """

    warped_pairs: Count = 64
    posed_pairs: Count = 160
    beside: tuple[str, ...] = ("lite",)
    minutes: Annotated[float, Range(minimum=0.0)] = 1.5


@dataclass(frozen=True)
class Plan:
    """common: keys of :class:`TrainConfig` for all stages. stages: those of each, on top of them, in order; each begins
    with the weights of the one before.
    """

    common: dict[str, Any]
    stages: tuple[dict[str, Any], ...]
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def read_plan(path: Path, settings: Sequence[str] = (), data: Path | None = None) -> Plan:
    """settings: ``KEY=VALUE`` for all stages. Raises ConfigError."""
    plan = load_config(Plan, read_mapping(path), where=str(path))
    common, stages = dict(plan.common), [dict(stage) for stage in plan.stages]
    for mapping in (common, *stages):
        resolve_paths(mapping, path.parent)
    for stage in stages:
        for setting in settings:
            override(stage, setting)
        if data is not None:
            override(stage, "data_config_train.data_path=", data)
    return replace(plan, common=common, stages=tuple(stages))


def stage_configs(plan: Plan, folder: Path, model: str, minutes: float | None = None) -> list[TrainConfig]:
    """What is run. minutes: of all stages together, shared out as the plan does. Raises ConfigError."""
    configs: list[TrainConfig] = []
    for number, stage in enumerate(plan.stages):
        config = load_config(TrainConfig, merge(plan.common, {"model": model, **stage}), where=f"stage {number + 1}")
        if configs:
            config = replace(config, load_path=str(folder / configs[-1].checkpoint_name))
        configs.append(config)
    if not configs or len({config.checkpoint_name for config in configs}) < len(configs):
        raise ConfigError("stages: expected at least one, each with a checkpoint_name of its own")
    planned = sum(config.minutes for config in configs)
    if minutes is None or planned == 0:
        return configs
    return [replace(config, minutes=config.minutes * minutes / planned) for config in configs]


def run_plan(
    plan: Plan, folder: Path, model: str, *, budget: float | None = None, minutes: float | None = None
) -> bool:
    """Do what is left of the plan; whether that was all of it. Raises ScfeatError.

    budget: minutes that this run may take, all in all. minutes: see :func:`stage_configs`.
    """
    end = np.inf if budget is None else time.monotonic() + 60 * budget
    configs = stage_configs(plan, folder, model, minutes)
    fast_convolutions()
    for config in configs:
        if not run_stage(config, folder / config.checkpoint_name, end - RESERVE):
            export(folder, configs, None)
            return False
    scores = _read_scores(folder)
    if scores is None:
        weights = export(folder, configs, None)
        if end - time.monotonic() < 60 * plan.evaluation.minutes:
            return False
        scores = evaluate(plan.evaluation, configs[-1], {model: str(weights)})
    export(folder, configs, scores)
    return True


def fast_convolutions() -> None:
    """Let cuDNN measure its algorithms: all batches of a stage have one size.

    Matrix products of float32 stay exact (no TF32): they compute coordinates, and 10 bits are a pixel in 1024.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = False


def run_stage(config: TrainConfig, folder: Path, until: float) -> bool:
    """Train until the stage is finished or ``time.monotonic()`` is ``until``; whether it is finished."""
    done = folder / "done"
    if done.is_file():
        return True
    if time.monotonic() >= until:
        return False
    log.info("-- stage %s", config.checkpoint_name)
    resume = (folder / "last.pt").is_file()
    train(config, folder, resume=resume, progress=False, until=until, measure=True)
    if time.monotonic() >= until:  # and if it was finished at the same time, the next run will see that
        return False
    done.touch()
    return True


# -- results -----------------------------------------------------------------------------------------------------------


def export(folder: Path, configs: Sequence[TrainConfig], scores: Mapping[str, Any] | None) -> Path | None:
    """Write ``results/`` as far as there are any; returns the path of the weights."""
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    begun = [config for config in configs if (folder / config.checkpoint_name / "last.pt").is_file()]
    if not begun:
        return None
    weights = _export_weights(folder / begun[-1].checkpoint_name, results)
    rows, summary = _joined_log(folder, begun)
    (results / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    metrics = {
        "weights": {path.name: file_sha256(path) for path in sorted(results.glob(f"{weights.name}*"))},
        "stages": summary,
        "machine": {"torch": torch.__version__, "device": _device_name(begun[-1].device)},
        "validation": scores,
    }
    _write_text(results / "metrics.json", json.dumps(metrics, indent=1))
    numbers = [{name: value for name, value in row.items() if name != "stage"} for row in rows]
    plot_curves(numbers, results / "curves.png")
    log.info("results: %s", results)
    return weights


def _export_weights(stage: Path, results: Path) -> Path:
    (source,) = stage.glob("*.safetensors")
    model = load_model(source)
    for old in results.glob(f"{source.name}*"):
        old.unlink()
    save_model(model, results / source.name, max_bytes=PART_BYTES)
    return results / source.name


def _joined_log(folder: Path, configs: Sequence[TrainConfig]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of all stages one after the other, with steps that go on, and what each stage came to."""
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    before = 0
    for config in configs:
        own = Run(folder / config.checkpoint_name, config).rows()
        rows += [row | {"stage": config.checkpoint_name, "step": before + row["step"]} for row in own]
        steps = int(max((row["step"] for row in own), default=0))
        last = {name: value for row in own for name, value in row.items()}
        summary[config.checkpoint_name] = last | {"pairs": steps * config.data_config_train.batch_size}
        before += steps
    return rows, summary


def _device_name(device: str) -> str:
    found = resolve_device(device)
    return torch.cuda.get_device_name(found) if found.type == "cuda" else str(found)


def _read_scores(folder: Path) -> dict[str, Any] | None:
    path = folder / "results" / "metrics.json"
    return json.loads(path.read_text())["validation"] if path.is_file() else None


def _write_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


# -- validation --------------------------------------------------------------------------------------------------------


def evaluate(config: EvaluationConfig, stage: TrainConfig, weights: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Scores of the weights, and of those beside them, on what the split holds back. stage: whose data."""
    validations = _validations(config, stage)
    device = str(resolve_device(stage.device))
    scores = {}
    for name, path in {**weights, **{name: name for name in config.beside}}.items():
        model = load_model(path).to(device)
        with images_of_any_size():
            scores[name] = _measure(validations, model, device)
        log.info("%s: %s", name, ", ".join(f"{key} {value:.3f}" for key, value in scores[name].items()))
    return scores


def _validations(config: EvaluationConfig, stage: TrainConfig) -> dict[str, Validation]:
    data = stage.data_config_train
    photos, _ = load_photo_set(photo_paths(data, held_back=True), data)
    validations: dict[str, Validation] = {
        "mild": WarpValidation(photos, config.warped_pairs, WarpConfig()),
        "strong": WarpValidation(photos, config.warped_pairs, WarpConfig(geometry=STRONG)),
    }
    if stage.data != "photos":
        held_back = open_posed(stage.data, data, held_back=True)
        validations["scenes"] = PosedValidation(held_back, config.posed_pairs)
    return validations


def _measure(validations: Mapping[str, Validation], model: SCFeat, device: str) -> dict[str, float]:
    return {
        f"{kind}/{name.removeprefix('validation_')}": round(value, 5)
        for kind, validation in validations.items()
        for name, value in validation.measure(model, device).items()
    }
