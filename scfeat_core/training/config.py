"""The settings of a training run; a YAML file in ``config/`` is read into :class:`TrainConfig`, strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from scfeat_core.config import Range
from scfeat_core.data.warps import WarpConfig
from scfeat_core.errors import ConfigError
from scfeat_core.training.descriptor_loss import DescriptorLossConfig
from scfeat_core.training.keypoint_loss import KeypointLossConfig

Positive = Annotated[float, Range(above=0.0)]
Count = Annotated[int, Range(minimum=1)]


@dataclass(frozen=True)
class DataConfig:
    """root: photographs are searched for below it. max_edge: pixels.

    split: YAML file of what is held back for validation (``scenes``: folder names, ``singles``: file names);
    without it, every 20th photograph is.
    """

    root: Path = Path("data/train")
    split: Path | None = None
    max_edge: Annotated[int, Range(minimum=64)] = 640
    warps: WarpConfig = field(default_factory=WarpConfig)


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW; cosine decay to ``final_lr`` of each rate after a linear warm-up. ema_decay 0 switches averaging off."""

    encoder_lr: Positive = 2e-4
    decoder_lr: Positive = 1e-3
    detector_lr: Positive = 1e-3
    weight_decay: Annotated[float, Range(minimum=0.0)] = 1e-4
    warmup_steps: Annotated[int, Range(minimum=0)] = 200
    final_lr: Annotated[float, Range(minimum=0.0, maximum=1.0)] = 0.02
    clip_norm: Positive = 1.0
    ema_decay: Annotated[float, Range(minimum=0.0, below=1.0)] = 0.999


@dataclass(frozen=True)
class TrainConfig:
    """init: ``random``, ``imagenet`` (encoder from an installed package), or the path of a .safetensors file.

    steps and batch_size count pairs of views. detector_start: first step of the keypoint loss; before it the
    descriptors are too poor to reward anything. proposal_share: share of the descriptor points that are drawn by the
    detector instead of uniformly. bn_mode: whether the encoder's BatchNorm statistics stay fixed.
    """

    name: str
    variant: Literal["lite", "r18", "r34", "r50"] = "lite"
    init: str = "random"
    seed: int = 0
    device: str = "cpu"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    steps: Count = 10_000
    batch_size: Count = 6
    bn_mode: Literal["frozen", "train"] = "frozen"
    detector_start: Annotated[int, Range(minimum=0)] = 500
    proposal_share: Annotated[float, Range(minimum=0.0, maximum=1.0)] = 0.5
    keypoint_weight: Annotated[float, Range(minimum=0.0)] = 1.0
    log_every: Count = 20
    save_every: Count = 200
    validate_every: Count = 500
    validation_pairs: Count = 48
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    descriptor_loss: DescriptorLossConfig = field(default_factory=DescriptorLossConfig)
    keypoint_loss: KeypointLossConfig = field(default_factory=KeypointLossConfig)

    def __post_init__(self) -> None:
        cells = (self.descriptor_loss.cell, self.keypoint_loss.cell)
        if self.proposal_share > 0 and cells[0] != cells[1]:
            raise ConfigError(
                f"expected descriptor_loss.cell and keypoint_loss.cell to be equal, found {cells[0]} and {cells[1]}; "
                "make them equal, or set proposal_share: 0"
            )
