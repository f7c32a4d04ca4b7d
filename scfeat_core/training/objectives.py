"""What is trained for: where the pairs of a step come from, and the parts of their loss.

An objective knows geometry and nothing of optimisers, processes or files; the trainer is the other way round. A part
of the loss is a mean, and its ``share`` says over how much: means of several processes, or of the pieces of a batch,
are joined in that proportion, which makes them the mean over all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from scfeat_core.data.warps import WarpConfig, WarpPairs, draw_pairs
from scfeat_core.geometry import Alignment, seen, warp_points
from scfeat_core.network.backbone import BackboneOutput
from scfeat_core.network.model import SCFeat
from scfeat_core.network.weights import load_model
from scfeat_core.preprocessing import normalise
from scfeat_core.training.config import TrainConfig, takes_turn
from scfeat_core.training.descriptor_loss import descriptor_loss
from scfeat_core.training.distillation_loss import distillation_loss
from scfeat_core.training.keypoint_loss import (
    KeypointLossConfig,
    good_rewards,
    keypoint_loss,
    match_probability,
    ramp_costs,
    repeatability_loss,
)
from scfeat_core.training.loading import Source
from scfeat_core.training.localisation_loss import localisation_loss
from scfeat_core.training.sampling import Proposals, draw_numbers, draw_uniform, propose_keypoints
from scfeat_core.training.starts import weights_in

Generators = Sequence[torch.Generator]  # one for each pair of the batch


class Term(NamedTuple):
    """One part of the loss. value: () the mean, with gradient. share: () what it is a mean over, of any unit.

    With weight 0 it is only logged.
    """

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
    """The model as objectives see it, in the precision of the run.

    align_local_grad: let the detector's gradient reach the backbone.
    """

    model: SCFeat
    precision: str = "float32"
    align_local_grad: bool = False

    def maps(self, images: Tensor) -> BackboneOutput:
        """images: normalised, (B, 3, H, W)."""
        with self._autocast(images):
            return self.model.backbone(images)

    @property
    def alignment(self) -> Alignment:
        return self.model.config.backbone.alignment

    def scores(self, maps: BackboneOutput, images: Tensor) -> Tensor:
        """(B, 1, H, W) float32."""
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


def propose_pair(scores: Tensor, config: KeypointLossConfig, generators: Generators) -> tuple[Proposals, Proposals]:
    """Keypoints drawn from the score maps (2B, 1, H, W) of a :func:`view_pair`."""
    draw0, draw1 = (
        propose_keypoints(score, config.grid_size, config.score_scale, config.accept_bias, generators)
        for score in scores.chunk(2)
    )
    return draw0, draw1


# -- warped photographs: dense true correspondence ---------------------------------------------------------------------


class WarpSource:
    """Warped pairs of photographs in memory (pyramids, see :mod:`scfeat_core.data.photos`).

    problems: how often what went wrong while they were read.
    """

    def __init__(
        self, photos: Sequence[Sequence[np.ndarray]], config: WarpConfig, problems: Mapping[str, int] | None = None
    ) -> None:
        self._photos = photos
        self._config = config
        self.problems: dict[str, int] = dict(problems or {})

    def sample(self, rng: np.random.Generator) -> WarpPairs:
        return draw_pairs(self._photos, 1, self._config, rng)


class WarpObjective:
    """Descriptor loss on true matches; keypoint, repeatability, localisation and distillation loss of the detector."""

    def __init__(self, source: Source, config: TrainConfig, teacher: Teacher) -> None:
        self._source = source
        self._config = config
        self._teacher = teacher

    def source(self, step: int) -> Source:
        return self._source

    def losses(self, network: Network, batch: WarpPairs, step: int, generators: Generators) -> Losses:
        config = self._config
        images = view_pair(batch.image0, batch.image1)
        maps = network.maps(images)
        map0, map1 = maps.local_map.float().chunk(2)
        size = (images.shape[-2], images.shape[-1])
        points0 = draw_uniform(size, len(map0), config.DescriptorLoss_config.cell, generators).to(images.device)
        if not config.detects_at(step):
            return self._descriptor_part(map0, map1, points0, batch, network)
        settings = ramp_costs(config.KeypointLoss_config, step - config.detector_start)
        scores = network.scores(maps, images)
        score0, score1 = scores.chunk(2)
        draws = propose_pair(scores, settings, generators)
        losses = Losses()
        if config.describes:
            points0 = self._some_proposed(points0, draws[0].points, generators)
            losses = self._descriptor_part(map0, map1, points0, batch, network)
        temperature = settings.temperature_at(step // config.epoch_step)
        self._add_keypoint_part(losses, network, (map0, map1), draws, batch, settings, temperature)
        self._add_dense_part(losses, (score0, score1), batch, settings)
        self._teacher.add(losses, network, scores, maps, images, step)
        losses.values["score_max"] = scores.detach().amax()
        return losses

    def _some_proposed(self, uniform: Tensor, proposed: Tensor, generators: Generators) -> Tensor:
        """Both have one point a cell; ``proposal_share`` of them is taken from the detector."""
        if self._config.proposal_share == 0:
            return uniform
        chance = draw_numbers(uniform.shape[:2], generators).to(uniform.device)
        return torch.where((chance < self._config.proposal_share)[..., None], proposed, uniform)

    def _descriptor_part(
        self, map0: Tensor, map1: Tensor, points0: Tensor, batch: WarpPairs, network: Network
    ) -> Losses:
        points1 = warp_points(points0, batch.homography)
        valid = seen(points0, batch.visible0) & seen(points1, batch.visible1)
        loss, accuracy = descriptor_loss(
            map0, map1, points0, points1, valid, self._config.DescriptorLoss_config, alignment=network.alignment
        )
        count = valid.sum()
        terms = {"descriptor_loss": Term(loss, count), "matched": Term(accuracy, count, weight=0.0)}
        return Losses(terms, {"valid": valid.float().mean()})

    def _add_keypoint_part(
        self,
        losses: Losses,
        network: Network,
        maps: tuple[Tensor, Tensor],
        draws: tuple[Proposals, Proposals],
        batch: WarpPairs,
        settings: KeypointLossConfig,
        temperature: float,
    ) -> None:
        draw0, draw1 = draws
        with torch.no_grad():
            probability = match_probability(*maps, draw0.points, draw1.points, temperature, network.alignment)
            visible = (batch.visible0, batch.visible1)
            reward = good_rewards(draw0.points, draw1.points, batch.homography, visible, settings)
        loss, matches = keypoint_loss(draw0, draw1, probability, reward, settings)
        losses.terms["keypoint_loss"] = Term(loss, len(batch.homography), self._config.keypoint_weight)
        losses.values["expected_matches"] = matches
        losses.values["accepted"] = draw0.accepted.float().mean()

    def _add_dense_part(
        self, losses: Losses, scores: tuple[Tensor, Tensor], batch: WarpPairs, settings: KeypointLossConfig
    ) -> None:
        weight = self._config.keypoint_weight
        visible = (batch.visible0, batch.visible1)
        repeatability = repeatability_loss(*scores, batch.homography, visible, settings)
        losses.terms["repeatability_loss"] = Term(repeatability, len(scores[0]), weight * settings.repeat_weight)
        localisation = self._config.LocalisationLoss_config
        if localisation.weight > 0:
            apart, pairs = localisation_loss(*scores, batch.homography, visible, localisation)
            losses.terms["localisation_loss"] = Term(apart, pairs, weight * localisation.weight)


class MotionObjective:
    """Localisation loss of the detector on pairs as of a video, and what its teacher says of them."""

    def __init__(self, source: Source, config: TrainConfig, teacher: Teacher) -> None:
        self._source = source
        self._config = config
        self._teacher = teacher

    def source(self, step: int) -> Source:
        return self._source

    def losses(self, network: Network, batch: WarpPairs, step: int, generators: Generators) -> Losses:
        images = view_pair(batch.image0, batch.image1)
        maps = network.maps(images)
        scores = network.scores(maps, images)
        score0, score1 = scores.chunk(2)
        settings = self._config.MotionLoss_config
        apart, pairs = localisation_loss(score0, score1, batch.homography, (batch.visible0, batch.visible1), settings)
        losses = Losses({"motion_loss": Term(apart, pairs, self._config.keypoint_weight * settings.weight)})
        self._teacher.add(losses, network, scores, maps, images, step)
        return losses


class Teacher:
    """The distillation loss of a run, where it has a teacher."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises WeightsError where its weights are not there."""
        self._config = config
        self.model: SCFeat | None = None
        if config.teacher:
            model = load_model(weights_in(config.teacher, "teacher")).requires_grad_(False).eval()
            self.model = model.to(device=config.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._one_backbone: bool | None = None  # of teacher and pupil; None before there was one

    def add(
        self, losses: Losses, network: Network, scores: Tensor, maps: BackboneOutput, images: Tensor, step: int
    ) -> None:
        """Add what the scores lack. maps: of the images, by the pupil."""
        settings = self._config.DistillationLoss_config
        if self.model is None or not settings.counts_at(step):
            return
        if self._one_backbone is None:  # a run has one network
            self._one_backbone = _same_for_good(network.model, self.model)
        with torch.no_grad():
            teacher = replace(network, model=self.model)
            taught = teacher.scores(maps if self._one_backbone else teacher.maps(images), images)
        place, rank = distillation_loss(scores, taught, settings)
        weight = self._config.keypoint_weight * settings.weight
        losses.terms["taught_place"] = Term(place, len(scores), weight)
        losses.terms["taught_rank"] = Term(rank, len(scores), weight)


def _same_for_good(pupil: SCFeat, teacher: SCFeat) -> bool:
    """Whether both have one backbone, which no step changes: often the detector alone is trained."""
    if pupil.config.backbone != teacher.config.backbone or any(m.training for m in pupil.backbone.modules()):
        return False
    if any(parameter.requires_grad for parameter in pupil.backbone.parameters()):
        return False
    own, others = pupil.backbone.state_dict(), teacher.backbone.state_dict()
    return all(torch.equal(value, others[name]) for name, value in own.items())


# -- two kinds of data in turn -----------------------------------------------------------------------------------------


class AlternatingObjective:
    """``share`` of its steps, evenly spread, are those of ``other``.

    within: its steps are such a share of all, as where it is the other one itself.
    """

    def __init__(self, main: Objective, other: Objective, share: float, within: float = 1.0) -> None:
        self._main = main
        self._other = other
        self._share = share
        self._within = within

    def source(self, step: int) -> Source:
        return self._of(step).source(step)

    def losses(self, network: Network, batch: Any, step: int, generators: Generators) -> Losses:
        return self._of(step).losses(network, batch, step, generators)

    def _of(self, step: int) -> Objective:
        return self._other if takes_turn(int(step * self._within), self._share) else self._main
