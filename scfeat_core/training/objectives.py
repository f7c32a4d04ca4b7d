"""What is trained for: where the pairs of a step come from, and the parts of their loss.

An objective knows geometry and nothing of optimisers, processes or files; the trainer is the other way round. A part
of the loss is a mean, and its ``share`` says over how much: means of several processes, or of the pieces of a batch,
are joined in that proportion, which makes them the mean over all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from scfeat_core.data.warps import WarpConfig, WarpPairs, draw_pairs
from scfeat_core.geometry import warp_points
from scfeat_core.network.backbone import BackboneOutput
from scfeat_core.network.model import SCFeat
from scfeat_core.preprocessing import normalise
from scfeat_core.training.config import TrainConfig
from scfeat_core.training.descriptor_loss import descriptor_loss
from scfeat_core.training.keypoint_loss import (
    KeypointLossConfig,
    good_rewards,
    keypoint_loss,
    match_probability,
    ramp_costs,
    repeatability_loss,
)
from scfeat_core.training.loading import Source
from scfeat_core.training.sampling import Proposals, draw_uniform, propose_keypoints

Generators = Sequence[torch.Generator]  # one for each pair of the batch


class Term(NamedTuple):
    """One part of the loss. value: () the mean, with gradient. share: () what it is a mean over, of any unit."""

    value: Tensor
    share: Tensor | float
    weight: float = 1.0


@dataclass
class Losses:
    """terms: parts of the loss by name. values: what is only logged, means over the pairs."""

    terms: dict[str, Term] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    def source(self, step: int) -> Source:
        """What the pairs of this step are drawn from."""

    def losses(self, network: Network, batch: Any, step: int, generators: Generators) -> Losses:
        """batch: what ``source(step)`` yields, on the network's device. The names depend on nothing but the step."""


@dataclass(frozen=True)
class Network:
    """The model as objectives see it: its maps are float32, whatever it computes in.

    align_local_grad: let the detector's gradient reach the backbone.
    """

    model: SCFeat
    precision: str = "float32"
    align_local_grad: bool = False

    def maps(self, images: Tensor) -> BackboneOutput:
        """images: normalised, (B, 3, H, W)."""
        with self._autocast(images):
            maps = self.model.backbone(images)
        return BackboneOutput(*(tensor.float() for tensor in maps))

    def scores(self, maps: BackboneOutput, images: Tensor) -> Tensor:
        """(B, 1, H, W)."""
        with self._autocast(images):
            if not self.align_local_grad:
                return self.model.detect(maps, images).float()
            return self.model.detector(torch.cat((maps.local_map, maps.stem_map), 1), images).float()

    def _autocast(self, images: Tensor) -> torch.autocast:
        dtype = torch.float16 if self.precision == "float16" else torch.bfloat16
        return torch.autocast(images.device.type, dtype, enabled=self.precision != "float32")


def view_pair(image0: Tensor, image1: Tensor) -> Tensor:
    """Both images of each pair as one normalised batch (2B, 3, H, W), all first images first."""
    return normalise(torch.cat((image0, image1)).permute(0, 2, 3, 1))


def draw_each(draw: Callable[[int, torch.Generator], Any], generators: Generators) -> Any:
    """``draw(i, generator of pair i)``, which has a batch axis of 1, for all pairs as one batch."""
    drawn = [draw(i, generator) for i, generator in enumerate(generators)]
    if isinstance(drawn[0], Tensor):
        return torch.cat(drawn)
    return type(drawn[0])(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


# -- warped photographs: dense true correspondence ---------------------------------------------------------------------


class WarpSource:
    """Warped pairs of photographs in memory (pyramids, see :mod:`scfeat_core.data.photos`)."""

    def __init__(self, photos: Sequence[Sequence[np.ndarray]], config: WarpConfig) -> None:
        self._photos = photos
        self._config = config
        self.problems: dict[str, int] = {}

    def sample(self, rng: np.random.Generator) -> WarpPairs:
        return draw_pairs(self._photos, 1, self._config, rng)


class WarpObjective:
    """Descriptor loss on true matches; from ``detector_start`` on the keypoint and the repeatability loss, too."""

    def __init__(self, source: Source, config: TrainConfig) -> None:
        self._source = source
        self._config = config

    def source(self, step: int) -> Source:
        return self._source

    def losses(self, network: Network, batch: WarpPairs, step: int, generators: Generators) -> Losses:
        config = self._config
        images = view_pair(batch.image0, batch.image1)
        maps = network.maps(images)
        size = (images.shape[-2], images.shape[-1])
        points0 = draw_each(lambda _, g: draw_uniform(size, 1, config.descriptor_loss.cell, g), generators)
        points0 = points0.to(images.device)
        map0, map1 = maps.local_map.chunk(2)
        if step < config.detector_start:
            return self._descriptor_part(map0, map1, points0, batch.homography, size)
        settings = ramp_costs(config.keypoint_loss, step - config.detector_start)
        score0, score1 = network.scores(maps, images).chunk(2)
        draw0, draw1 = (_propose(score, settings, generators) for score in (score0, score1))
        if config.proposal_share > 0:  # both draw one point a cell
            chance = draw_each(lambda _, g: torch.rand(1, points0.shape[1], generator=g), generators)
            by_detector = chance.to(images.device) < config.proposal_share
            points0 = torch.where(by_detector[..., None], draw0.points, points0)
        losses = self._descriptor_part(map0, map1, points0, batch.homography, size)
        self._add_keypoint_part(losses, (map0, map1), (draw0, draw1), batch.homography, settings)
        repeatability = repeatability_loss(score0, score1, batch.homography, settings)
        weight = config.keypoint_weight * settings.repeat_weight
        losses.terms["repeatability_loss"] = Term(repeatability, len(score0), weight)
        losses.values["score_max"] = torch.stack((score0, score1)).detach().amax()
        return losses

    def _descriptor_part(
        self, map0: Tensor, map1: Tensor, points0: Tensor, homography: Tensor, size: tuple[int, int]
    ) -> Losses:
        points1 = warp_points(points0, homography)
        limit = points1.new_tensor((size[1] - 1, size[0] - 1))
        valid = ((points1 >= 0) & (points1 <= limit)).all(-1)
        loss, accuracy = descriptor_loss(map0, map1, points0, points1, valid, self._config.descriptor_loss)
        values = {"matched": accuracy, "valid": valid.float().mean()}
        return Losses({"descriptor_loss": Term(loss, valid.sum())}, values)

    def _add_keypoint_part(
        self,
        losses: Losses,
        maps: tuple[Tensor, Tensor],
        draws: tuple[Proposals, Proposals],
        homography: Tensor,
        settings: KeypointLossConfig,
    ) -> None:
        draw0, draw1 = draws
        with torch.no_grad():
            probability = match_probability(*maps, draw0.points, draw1.points, settings.temperature)
            reward = good_rewards(draw0.points, draw1.points, homography, settings)
        loss, matches = keypoint_loss(draw0, draw1, probability, reward, settings)
        losses.terms["keypoint_loss"] = Term(loss, len(homography), self._config.keypoint_weight)
        losses.values["expected_matches"] = matches
        losses.values["accepted"] = draw0.accepted.float().mean()


def _propose(score: Tensor, settings: KeypointLossConfig, generators: Generators) -> Proposals:
    return draw_each(
        lambda i, g: propose_keypoints(score[i : i + 1], settings.cell, settings.score_scale, settings.accept_bias, g),
        generators,
    )
