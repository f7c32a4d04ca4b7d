"""Posed images: description by epipolar geometry, detection by rewards of it, and sparse true correspondence beside."""

from __future__ import annotations

from torch import Tensor

from scfeat_core.data.posed import PosedBatch
from scfeat_core.training.config import TrainConfig
from scfeat_core.training.descriptor_loss import descriptor_loss
from scfeat_core.training.epipolar_loss import epipolar_terms
from scfeat_core.training.keypoint_loss import epipolar_keypoint_loss, ramp_costs
from scfeat_core.training.loading import Source
from scfeat_core.training.objectives import Generators, Losses, Network, Term, propose_pair, view_pair
from scfeat_core.training.sampling import draw_uniform


class PosedObjective:
    """Description loss where the backbone is trained, keypoint loss where the detector is."""

    def __init__(self, source: Source, config: TrainConfig) -> None:
        self._source = source
        self._config = config

    def source(self, step: int) -> Source:
        return self._source

    def losses(self, network: Network, batch: PosedBatch, step: int, generators: Generators) -> Losses:
        images = view_pair(batch.image0, batch.image1)
        maps = network.maps(images)
        map0, map1 = maps.local_map.float().chunk(2)
        losses = Losses()
        if self._config.describes:
            self._add_epipolar_part(losses, (map0, map1), batch, network, step, generators)
        if self._config.describes and self._config.track_weight > 0:
            self._add_track_part(losses, (map0, map1), batch, network, generators)
        if self._config.detects_at(step):
            self._add_keypoint_part(
                losses, (map0, map1), network.scores(maps, images), batch, network, step, generators
            )
        return losses

    def _add_epipolar_part(
        self,
        losses: Losses,
        maps: tuple[Tensor, Tensor],
        batch: PosedBatch,
        network: Network,
        step: int,
        generators: Generators,
    ) -> None:
        search, config = self._config.preprocess_train_config, self._config.EpipolarLoss_Line2Window_config
        height, width = batch.image0.shape[-2:]
        points0, points1 = (
            draw_uniform((height, width), len(generators), search.kps_generator_config.grid_size, generators)
            for _ in range(2)
        )
        terms = epipolar_terms(
            *maps,
            points0.to(maps[0].device),
            points1.to(maps[0].device),
            batch.fundamental,
            (width, height),
            search,
            config,
            temperature=search.temperature_at(step // self._config.epoch_step),
            alignment=network.alignment,
            generator=generators,
        )
        parts = {
            "loss_g1": (terms.grid0, config.weight_grid),
            "loss_g2": (terms.grid1, config.weight_grid),
            "loss_w1": (terms.window0, config.weight_window),
            "loss_w2": (terms.window1, config.weight_window),
        }
        for name, (part, weight) in parts.items():
            if weight > 0:
                losses.terms[name] = Term(part.mean, part.denominator, weight)
        used = {"percent_g": config.weight_grid, "percent_w": config.weight_window}
        losses.values |= {name: value for name, value in terms.values().items() if used.get(name, 0.0) > 0}

    def _add_keypoint_part(
        self,
        losses: Losses,
        maps: tuple[Tensor, Tensor],
        scores: Tensor,
        batch: PosedBatch,
        network: Network,
        step: int,
        generators: Generators,
    ) -> None:
        config = ramp_costs(self._config.KeypointLoss_config, step - self._config.detector_start)
        draw0, draw1 = propose_pair(scores, config, generators)
        height, width = batch.image0.shape[-2:]
        loss, values = epipolar_keypoint_loss(
            *maps,
            draw0,
            draw1,
            batch.fundamental,
            (width, height),
            config,
            temperature=config.temperature_at(step // self._config.epoch_step),
            alignment=network.alignment,
            generator=generators,
        )
        losses.terms["keypoint_loss"] = Term(loss, len(generators), self._config.keypoint_weight)
        losses.values |= values | {"score_max": scores.detach().amax()}

    def _add_track_part(
        self,
        losses: Losses,
        maps: tuple[Tensor, Tensor],
        batch: PosedBatch,
        network: Network,
        generators: Generators,
    ) -> None:
        config = self._config.DescriptorLoss_config
        height, width = batch.image0.shape[-2:]
        distractors0, distractors1 = (
            draw_uniform((height, width), len(maps[0]), config.cell, generators).to(maps[0].device) for _ in range(2)
        )
        loss, accuracy = descriptor_loss(
            *maps,
            batch.points0,
            batch.points1,
            batch.valid,
            config,
            (distractors0, distractors1),
            alignment=network.alignment,
        )
        count = batch.valid.sum()
        losses.terms["track_loss"] = Term(loss, count, self._config.track_weight)
        losses.terms["track_matched"] = Term(accuracy, count, weight=0.0)
