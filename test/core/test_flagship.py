"""All stages in one command, ended by the clock or by a kill, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from scfeat_core.errors import ConfigError
from scfeat_core.network.weights import load_model
from scfeat_core.training.config import TrainConfig
from scfeat_core.training.flagship import Plan, read_plan, run_plan, stage_configs
from scfeat_core.training.optimisation import learning_rate_factor
from scfeat_core.training.throughput import Throughput, matmul_rate

COMMON = {
    "device": "cpu",
    "optimizer": "AdamW",
    "lr_schedule": "cosine",
    "epoch": 1,
    "epoch_step": 2,
    "log_freq": 1,
    "save_freq": 1,
    "validate_freq": 1000,
    "validation_pairs": 1,
    "data_config_train": {"size": [64, 64], "batch_size": 1, "on_device": True, "augmentation": "photometric"},
    "KeypointLoss_config": {"reward_config": {"reward_type": "posfeat"}},
}
WARPS = {"checkpoint_name": "warps", "data": "photos", "optimal_modules": ["backbone"], "optimal_lrs": [1e-3]}
POSED = {
    "checkpoint_name": "posed",
    "data": "posed_images",
    "optimal_modules": ["backbone", "localheader"],
    "optimal_lrs": [1e-4, 1e-3],
    "keypoint_every": 2,
    "track_weight": 1.0,
    "warp_share": 0.6,
}
SMALL_WARPS = {"data_config_train": {"warps": {"view_size": 64}}}


@pytest.fixture
def plan_file(tmp_path: Path, write_scene: Callable[..., Path]) -> Path:
    data = tmp_path / "data"
    for name in ("a", "b"):
        write_scene(data / name, images=range(4))
    for name in ("held", "kept"):
        image = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
        cv2.imwrite(str(data / f"{name}.png"), image)
    (tmp_path / "split.yaml").write_text("scenes: [b]\nsingles: [held.png]\n")
    common = COMMON | {"data_config_train": COMMON["data_config_train"] | {"data_path": "data", "split": "split.yaml"}}
    stages = [WARPS | SMALL_WARPS, POSED | SMALL_WARPS]
    evaluation = {"warped_pairs": 1, "posed_pairs": 1, "beside": []}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"common": common, "stages": stages, "evaluation": evaluation}))
    return path


def test_stages_follow_each_other_to_weights_and_scores(plan_file: Path, tmp_path: Path) -> None:
    plan, output = read_plan(plan_file), tmp_path / "run"
    assert not run_plan(plan, output, "lite", budget=0.0)  # no time for anything
    assert not (output / "warps").exists()
    assert run_plan(plan, output, "lite")
    metrics = json.loads((output / "results" / "metrics.json").read_text())
    assert [stage["step"] for stage in metrics["stages"].values()] == [2, 2]
    assert "strong/mma3" in metrics["validation"]["lite"] and "scenes/epipolar3" in metrics["validation"]["lite"]
    rows = [json.loads(line) for line in (output / "results" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    written = (output / "posed" / "lite.safetensors").stat().st_mtime_ns
    assert run_plan(plan, output, "lite")  # all is done: nothing is trained or measured again
    assert (output / "posed" / "lite.safetensors").stat().st_mtime_ns == written
    first, last = (load_model(output / name / "lite.safetensors") for name in ("warps", "results"))
    assert not torch.equal(first.backbone.fusion.weight, last.backbone.fusion.weight)


def test_a_killed_run_goes_on(plan_file: Path, repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ["--config", plan_file, "--output", output, "--model", "lite", "--set", "epoch_step=1000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, repository / "tools" / "flagship", *map(str, words)],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 120
        while not (output / "warps" / "last.pt").is_file():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps = torch.load(output / "warps" / "last.pt", weights_only=True)["step"]
    assert run_plan(read_plan(plan_file, [f"epoch_step={steps + 1}"]), output, "lite")
    assert torch.load(output / "warps" / "last.pt", weights_only=True)["step"] == steps + 1


def test_the_shipped_plan_is_valid_and_fits_its_time(repository: Path, tmp_path: Path) -> None:
    plan = read_plan(repository / "config" / "flagship.yaml", ["seed=3"], tmp_path)
    for model in ("r50", "r18"):
        configs = stage_configs(plan, tmp_path / "run", model)
        assert [config.checkpoint_name for config in configs] == ["warps", "posed", "detector"]
        assert {config.model for config in configs} == {model} and {config.seed for config in configs} == {3}
        assert [config.load_path for config in configs[1:]] == [str(tmp_path / "run" / n) for n in ("warps", "posed")]
        assert all(config.data_config_train.on_device and config.minutes > 0 for config in configs)
        split = configs[0].data_config_train.split
        assert split is not None and split.resolve() == repository / "config" / "validation_split.yaml"
    assert sum(config.minutes for config in stage_configs(plan, tmp_path, "r50", 6.0)) == pytest.approx(6.0)


def test_a_plan_without_names_is_refused(tmp_path: Path) -> None:
    stage = {"checkpoint_name": "same", "data": "photos"}
    with pytest.raises(ConfigError, match="name of its own"):
        stage_configs(Plan({}, (stage, stage)), tmp_path, "lite")


def test_minutes_end_the_cosine() -> None:
    config = TrainConfig("x", model="lite", lr_schedule="cosine", minutes=2.0, final_lr=0.1, epoch_step=10**6)
    assert learning_rate_factor(5, config, 0.0) == pytest.approx(1.0, abs=1e-3)
    assert learning_rate_factor(5, config, 60.0) == pytest.approx(0.55)
    assert learning_rate_factor(5, config, 500.0) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="follow the clock"):
        replace(config, lr_schedule="step")


def test_throughput_counts_operations_of_a_pair() -> None:
    meter = Throughput(torch.device("cpu"), "float32")
    a = torch.randn(64, 32)
    for _ in range(10):
        meter.count(lambda: a @ a.T, pairs=4)
        meter.add(4, 0.5, 0.1)
    assert meter.values() == {}  # those were slower, as they were counted
    for _ in range(2):
        meter.count(lambda: a @ a.T, pairs=4)
        meter.add(4, 0.5, 0.1)
    values = meter.values()
    assert values["rate/pairs_per_s"] == pytest.approx(8) and values["rate/waited_ms"] == pytest.approx(100)
    assert values["rate/tflop_per_s"] == pytest.approx(2 * 64 * 64 * 32 / 4 * 8 / 1e12)
    assert values["rate/percent_of_matmul"] == pytest.approx(100 * values["rate/tflop_per_s"] * 1e12 / meter.peak)
    assert matmul_rate(torch.device("cpu"), "bfloat16") > 0
