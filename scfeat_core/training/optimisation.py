"""Optimiser, learning rates, average of the weights, and what of the network is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from scfeat_core.errors import ConfigError
from scfeat_core.network.model import SCFeat
from scfeat_core.training.config import PARTS, TrainConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


def network_parts(model: SCFeat) -> tuple[nn.Module, nn.Module]:
    """The parts whose gradients are clipped for themselves: backbone and detector."""
    return model.backbone, model.detector


def create_optimizer(model: SCFeat, config: TrainConfig) -> torch.optim.Optimizer:
    """With a group of parameters for each of ``optimal_modules``; all others are frozen. Raises ConfigError."""
    model.requires_grad_(False)
    groups = []
    for module, rate in zip(config.optimal_modules, config.optimal_lrs, strict=True):
        parameters = [p for part in PARTS[module] for p in _parameters(model, part)]
        for parameter in parameters:
            parameter.requires_grad_(True)
        groups.append({"params": parameters, "lr": rate})
    for name in config.frozen_modules:
        _submodule(model, name).requires_grad_(False)
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]  # type: ignore[attr-defined]
        if not group["params"]:
            raise ConfigError("frozen_modules leaves nothing to train of one of optimal_modules; name it in neither")
    optimizer = getattr(torch.optim, config.optimizer)
    return optimizer(groups, weight_decay=config.weight_decay)


def _parameters(model: SCFeat, part: str) -> list[nn.Parameter]:
    if part == "localheader":
        return list(model.detector.parameters())
    named = model.backbone.named_parameters()
    return [parameter for name, parameter in named if name.startswith("encoder.") == (part == "encoder")]


def _submodule(model: SCFeat, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(name for name, _ in model.named_modules() if name.count(".") == 1)
        raise ConfigError(f"frozen_modules: expected parts of the network ({names} ...), found '{name}'") from error


def learning_rates(step: int, config: TrainConfig, seconds: float = 0.0) -> list[float]:
    """Of each of ``optimal_modules``. seconds: that the steps before took, where ``minutes`` are the measure."""
    factor = learning_rate_factor(step, config, seconds)
    return [rate * factor for rate in config.optimal_lrs]


def learning_rate_factor(step: int, config: TrainConfig, seconds: float = 0.0) -> float:
    """Linear warm-up; then steps down by epochs, or a cosine from 1 to ``final_lr``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "step":
        return config.lr_decay_factor ** (step // config.epoch_step // config.lr_decay_step)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.minutes > 0:
        progress = max(progress, seconds / (60 * config.minutes))
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def average_decay(updates: int, config: TrainConfig) -> float:
    """Of the average of the weights: ``ema_decay``, but less after few updates, so that the start is forgotten.

    With a constant decay of 0.999, 37 % of the average after 1000 updates would be the weights of the first.
    """
    return min(config.ema_decay, (1 + updates) / (10 + updates))


def create_average(model: nn.Module, config: TrainConfig) -> AveragedModel:
    """Exponential average of weights and buffers; the first update copies."""

    @torch.no_grad()
    def update(averages: Tensors, news: Tensors, updates: Tensor | int) -> None:
        decay = average_decay(int(updates), config)
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, news, 1 - decay)
        else:
            torch._foreach_copy_(averages, news)  # counts of BatchNorm

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def set_modes(model: SCFeat, config: TrainConfig) -> None:
    """Training mode for what is trained; what is not keeps its BatchNorm statistics, as does all if they are fixed."""
    model.eval()
    trained = {part for module in config.optimal_modules for part in PARTS[module]}
    if "decoder" in trained:
        model.backbone.train()
        model.backbone.encoder.eval()
    if "encoder" in trained and config.bn_mode == "train":
        model.backbone.encoder.train()
    for name in config.frozen_modules:
        model.get_submodule(name).eval()
