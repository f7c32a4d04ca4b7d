"""What a run trains and is validated on: data with little or nothing to hold back, and damage that is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from scfeat_core.cli import main
from scfeat_core.data.photos import load_photos
from scfeat_core.training.config import DataConfig, TrainConfig
from scfeat_core.training.data_sets import open_data


def posed(folder: Path, **settings: Any) -> TrainConfig:
    data = DataConfig(data_path=folder, size=(96, 64), batch_size=2)
    return TrainConfig("test", data_config_train=data, device="cpu", data="posed_images", model="lite", **settings)


def test_a_single_pair_is_trained_on_without_validation(tmp_path, write_scene, caplog) -> None:
    config = posed(write_scene(tmp_path / "scene", images=(0, 1)))
    data = open_data(config)
    assert data.validations == () and data.summary == "1 pairs of 1 scenes"
    assert "no validation: expected held-back pairs" in caplog.text
    caplog.clear()
    assert len(open_data(posed(write_scene(tmp_path / "more")), validate=True).validations) == 1
    assert "no validation" not in caplog.text


def test_data_is_checked_without_what_is_held_back(
    repository: Path,
    tmp_path: Path,
    write_scene: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scfeat_core.training.cli.CHECKED_PAIRS", 3)
    folder = write_scene(tmp_path / "scene", images=(3, 4))
    command = ["train", "--config", str(repository / "config/train_desc.yaml"), "--data", str(folder), "--check-data"]
    assert main([*command, "--set", "data_config_train.size=[320,240]"]) in (0, 1)  # 2 would be an error
    assert "best half px" in capsys.readouterr().out


@pytest.mark.parametrize("warped_beside_poses", [False, True])
def test_damaged_photographs_are_counted(tmp_path, write_scene, warped_beside_poses) -> None:
    scene = write_scene(tmp_path / "scene")
    for name in ("2.png", "5.png"):
        (scene / "images" / name).write_bytes(b"damaged")
    config = posed(scene)
    if warped_beside_poses:
        config = replace(config, warp_share=0.5, optimal_modules=("backbone", "localheader"), optimal_lrs=(1e-4, 1e-3))
    else:
        config = replace(config, data="photos")
    assert open_data(config, validate=False).sources[-1].problems == {"damaged photograph": 2}


def test_photographs_of_held_back_scenes_are_not_warped(tmp_path, write_scene) -> None:
    """Nor by processes that do not validate."""
    for name in "abcdef":
        write_scene(tmp_path / "data" / name, images=(0, 1, 2))
    both = {"optimal_modules": ("backbone", "localheader"), "optimal_lrs": (1e-4, 1e-3), "warp_share": 0.5}
    summaries = [open_data(posed(tmp_path / "data", **both), validate=v).summary for v in (True, False)]
    assert summaries == ["15 pairs of 5 scenes, 15 photographs to warp"] * 2


def test_a_cut_photograph_is_named(tmp_path) -> None:
    code = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()
    (tmp_path / "whole.jpg").write_bytes(code)
    (tmp_path / "cut.jpg").write_bytes(code[:-100])
    photos, problems = load_photos([tmp_path / "whole.jpg", tmp_path / "cut.jpg"], 64)
    assert len(photos) == 1 and len(problems) == 1 and "cut.jpg, found a JPEG without its end" in problems[0]
