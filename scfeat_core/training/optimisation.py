"""Optimiser, learning rates, and what of the network is trained."""

from __future__ import annotations

import math

import torch
from torch import nn

from scfeat_core.network.model import SCFeat
from scfeat_core.training.config import OptimiserConfig, TrainConfig


def network_parts(model: SCFeat) -> tuple[nn.Module, nn.Module]:
    """The parts whose gradients are clipped for themselves: backbone and detector."""
    return model.backbone, model.detector


def create_optimizer(model: SCFeat, config: OptimiserConfig) -> torch.optim.Optimizer:
    named = list(model.backbone.named_parameters())
    groups = [
        {"params": [p for name, p in named if name.startswith("encoder.")], "lr": config.encoder_lr},
        {"params": [p for name, p in named if not name.startswith("encoder.")], "lr": config.decoder_lr},
        {"params": list(model.detector.parameters()), "lr": config.detector_lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def learning_rates(step: int, config: TrainConfig) -> list[float]:
    """Of each group of parameters, in the order of :func:`create_optimizer`."""
    optimiser = config.optimiser
    factor = learning_rate_factor(step, config.steps, optimiser)
    return [rate * factor for rate in (optimiser.encoder_lr, optimiser.decoder_lr, optimiser.detector_lr)]


def learning_rate_factor(step: int, steps: int, config: OptimiserConfig) -> float:
    """Linear warm-up, then a cosine from 1 to ``final_lr``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_modes(model: SCFeat, config: TrainConfig) -> None:
    """Training mode, but for BatchNorm statistics that stay fixed."""
    model.train()
    if config.bn_mode == "frozen":
        model.backbone.encoder.eval()
