"""Distillation: a detector learns where another one has its peaks, and which of them are the higher ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scfeat_core.data.warps import MotionConfig, WarpConfig, WarpPairs, draw_pairs
from scfeat_core.errors import ConfigError, WeightsError
from scfeat_core.network.model import SCFeat
from scfeat_core.network.weights import load_model, save_model
from scfeat_core.training.config import DataConfig, TrainConfig
from scfeat_core.training.distillation_loss import DistillationConfig, distillation_loss
from scfeat_core.training.objectives import Network, Teacher, WarpObjective

CONFIG = DistillationConfig()


def scores(seed: int = 0, size: tuple[int, int] = (40, 48)) -> torch.Tensor:
    return F.softplus(torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(seed)))


def test_nothing_is_to_be_learnt_from_oneself() -> None:
    place, rank = distillation_loss(scores(), scores(), CONFIG)
    assert float(place) == pytest.approx(0, abs=1e-6) and float(rank) == 0


def test_place_and_rank_are_told_apart() -> None:
    taught = torch.zeros(1, 1, 32, 32)
    taught[..., 10, 10], taught[..., 21, 21] = 2.0, 1.0
    moved = taught.roll(1, 3)
    place, rank = distillation_loss(moved, taught, CONFIG)
    assert place > 1 and rank < 1e-3
    swapped = taught.clone()
    swapped[..., 10, 10], swapped[..., 21, 21] = 1.0, 2.0
    place, rank = distillation_loss(swapped, taught, CONFIG)
    assert place < 1e-3 and rank > 1e-2


def test_scale_of_the_scores_is_free() -> None:
    place, rank = distillation_loss(3 * scores(), scores(), CONFIG)
    assert float(place) < 1e-3 and float(rank) < 1e-3


@pytest.mark.parametrize("size", [(41, 51), (16, 16)])
def test_a_gradient_leads_to_the_teacher(size: tuple[int, int]) -> None:
    taught = scores(1, size)
    logits = torch.zeros_like(taught, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        place, rank = distillation_loss(F.softplus(logits), taught, CONFIG)
        (place + rank).backward()
        assert torch.isfinite(logits.grad).all()
        optimizer.step()
    height, width = (n // 8 * 8 for n in size)
    found, expected = (F.pixel_unshuffle(x[..., :height, :width], 8).argmax(1) for x in (logits.detach(), taught))
    assert (found == expected).float().mean() > 0.95


def test_dark_scores_are_finite() -> None:
    flat = torch.zeros(1, 1, 32, 32, requires_grad=True)
    place, rank = distillation_loss(flat, torch.zeros(1, 1, 32, 32), CONFIG)
    (place + rank).backward()
    assert float(place.detach()) == 0 and float(rank.detach()) == 0 and torch.isfinite(flat.grad).all()


def test_teacher_has_to_have_something_to_teach() -> None:
    with pytest.raises(ConfigError, match="teacher: expected a detector that is trained on warps"):
        TrainConfig("", teacher="lite", data="photos")
    with pytest.raises(ConfigError, match="teacher: expected"):
        TrainConfig("", teacher="lite", optimal_modules=("localheader",), data="posed_images")


def test_a_view_has_cells() -> None:
    with pytest.raises(ConfigError, match="cell: expected at most half"):
        TrainConfig(
            "",
            teacher="lite",
            data="photos",
            optimal_modules=("localheader",),
            DistillationLoss_config=DistillationConfig(cell=1000),
        )


@pytest.mark.parametrize(("warps", "motions"), [(64, 32), (32, 64)])
def test_a_view_of_a_video_has_cells_too(warps: int, motions: int) -> None:
    """One cell alone has no rank: that part of the loss would be 0."""
    data = DataConfig(warps=WarpConfig(warps), motions=MotionConfig(motions))
    config = TrainConfig(
        "",
        teacher="lite",
        data="photos",
        data_config_train=data,
        optimal_modules=("localheader",),
        motion_share=0.5,
        DistillationLoss_config=DistillationConfig(cell=16),
    )
    fault = "motions" if motions < warps else "warps"
    with pytest.raises(ConfigError, match=rf"cell: .* half of data_config_train\.{fault}\.view_size \(32\), found 20"):
        replace(config, DistillationLoss_config=DistillationConfig(cell=20))
    if motions < warps:  # of which there are none
        replace(config, motion_share=0.0, DistillationLoss_config=DistillationConfig(cell=20))


def test_teacher_is_looked_for_at_once(tmp_path: Path) -> None:
    config = TrainConfig("", teacher=str(tmp_path / "no.safetensors"), data="photos", optimal_modules=("localheader",))
    with pytest.raises(WeightsError, match=r"no\.safetensors"):
        Teacher(config)
    with pytest.raises(WeightsError, match=r"teacher: expected a run at .*nowhere"):
        Teacher(replace(config, teacher=str(tmp_path / "nowhere")))


def test_only_the_pupil_learns_and_only_until_it_is_told(tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_model(SCFeat.create("lite"), tmp_path / "teacher.safetensors")
    config = TrainConfig(
        "",
        device="cpu",
        data="photos",
        optimal_modules=("localheader",),
        teacher=str(tmp_path / "teacher.safetensors"),
        DistillationLoss_config=DistillationConfig(until=5),
    )
    objective = WarpObjective(None, config, Teacher(config))
    network = Network(SCFeat.create("lite").eval())
    batch = _batch()
    generators = [torch.Generator().manual_seed(0)]
    losses = objective.losses(network, batch, 4, generators)
    assert {"taught_place", "taught_rank"} <= losses.terms.keys()
    losses.terms["taught_place"].value.backward()
    assert all(p.grad is None for p in objective._teacher.model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in network.model.detector.parameters())
    assert not {"taught_place", "taught_rank"} & objective.losses(network, batch, 5, generators).terms.keys()
    always = replace(config, DistillationLoss_config=DistillationConfig())
    objective = WarpObjective(None, always, Teacher(always))
    assert "taught_place" in objective.losses(network, batch, 5000, generators).terms


def test_a_backbone_that_both_have_is_computed_once(tmp_path: Path) -> None:
    """Where it is trained, or in training mode, or another one, the teacher's is computed."""
    file = tmp_path / "teacher.safetensors"
    save_model(SCFeat.create("lite"), file)
    config = TrainConfig("", device="cpu", data="photos", optimal_modules=("localheader",), teacher=str(file))
    pupil = load_model(file).requires_grad_(False).to(memory_format=torch.channels_last)
    pupil.detector.load_state_dict(SCFeat.create("lite").detector.state_dict())
    pupil.detector.requires_grad_(True)

    def taught(model: SCFeat, count: int = 2) -> tuple[list[torch.Tensor], int]:
        """What it is taught in each of some steps, and how often the teacher's backbone ran."""
        objective, calls = WarpObjective(None, config, Teacher(config)), []
        objective._teacher.model.backbone.register_forward_hook(lambda *unused: calls.append(1))
        generators = [torch.Generator().manual_seed(0)]
        losses = [objective.losses(Network(model), _batch(), step, generators) for step in range(count)]
        return [each.terms[name].value.detach() for each in losses for name in ("taught_place", "taught_rank")], len(
            calls
        )

    once, calls = taught(pupil)
    assert calls == 0
    trained = copy.deepcopy(pupil)
    trained.backbone.requires_grad_(True)
    twice, calls = taught(trained)
    assert calls == 2 and float(once[0]) > 0
    torch.testing.assert_close(once, twice, rtol=0, atol=0)
    norm = next(module for module in pupil.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.train()
    assert taught(pupil)[1] == 2
    norm.eval()
    norm.running_mean += 1e-3
    assert taught(pupil)[1] == 2


def _batch() -> WarpPairs:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)
    return draw_pairs([[photo]], 1, WarpConfig(view_size=64), rng)
