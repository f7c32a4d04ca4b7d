"""Losses against hand computation and autograd; the loop on a few steps: it learns, resumes exactly, and says no."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from scfeat_core.cli import main
from scfeat_core.config import dump_config, read_config, read_mapping
from scfeat_core.data.warps import MotionConfig
from scfeat_core.errors import ConfigError, ScfeatError
from scfeat_core.network.model import SCFeat
from scfeat_core.network.weights import save_model
from scfeat_core.training.config import DataConfig, TrainConfig
from scfeat_core.training.data_sets import open_data
from scfeat_core.training.descriptor_loss import DescriptorLossConfig, descriptor_loss
from scfeat_core.training.distributed import Group
from scfeat_core.training.loading import Share, StepBatches
from scfeat_core.training.localisation_loss import LocalisationConfig
from scfeat_core.training.objectives import Network
from scfeat_core.training.run import Run
from scfeat_core.training.sampling import draw_uniform
from scfeat_core.training.starts import create_model
from scfeat_core.training.step import train_step
from scfeat_core.training.trainer import create_state, train


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- descriptor loss ---------------------------------------------------------------------------------------------------


def test_descriptor_loss_equals_cross_entropy() -> None:
    map0, map1 = torch.randn(2, 16, 8, 8, generator=generator()), torch.randn(2, 16, 8, 8, generator=generator(1))
    points = draw_uniform((32, 32), 2, 8, generator(2)) * 0 + torch.tensor(
        [[4.0 * (i % 4) * 2, 4.0 * (i // 4) * 2] for i in range(16)]
    )
    valid = torch.ones(2, 16, dtype=torch.bool)
    config = DescriptorLossConfig(temperature=5.0, negatives=0, exclusion=0.0)
    loss, accuracy = descriptor_loss(map0, map1, points, points, valid, config)
    cells = (points / 4).long()
    d0, d1 = (
        F.normalize(torch.stack([m[b][:, cells[b, :, 1], cells[b, :, 0]].T for b in range(2)]), dim=-1)
        for m in (map0, map1)
    )
    logits = 5 * d0 @ d1.transpose(1, 2)
    target = torch.arange(16).expand(2, -1)
    expected = (F.cross_entropy(logits.transpose(1, 2), target) + F.cross_entropy(logits, target)) / 2
    torch.testing.assert_close(loss, expected)
    both = (logits.argmax(2) == target) & (logits.argmax(1) == target)
    assert float(accuracy) == pytest.approx(float(both.float().mean()))


def test_invalid_points_do_not_reach_the_descriptor_loss() -> None:
    map0, map1 = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8)
    points = draw_uniform((32, 32), 2, 8, generator())
    config = DescriptorLossConfig(negatives=0)
    valid = torch.arange(16).expand(2, -1) < 10
    loss, _ = descriptor_loss(map0, map1, points, points, valid, config)
    alone, _ = descriptor_loss(map0, map1, points[:, :10], points[:, :10], valid[:, :10], config)
    torch.testing.assert_close(loss, alone)
    none, accuracy = descriptor_loss(map0, map1, points, points, torch.zeros_like(valid), config)
    assert float(none) == 0 and float(accuracy) == 0


def test_distractors_are_told_apart_unless_they_are_the_match() -> None:
    map0, map1 = torch.randn(1, 16, 8, 8, generator=generator()), torch.randn(1, 16, 8, 8, generator=generator(1))
    points = torch.tensor([[[4.0, 4.0], [20.0, 24.0]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    config = DescriptorLossConfig(temperature=5.0, negatives=0, exclusion=3.0)
    plain, _ = descriptor_loss(map0, map1, points, points, valid, config)
    far = torch.tensor([[[12.0, 12.0]]])
    hard, _ = descriptor_loss(map0, map1, points, points, valid, config, (far, far))
    d0, d1 = (F.normalize(m[0].flatten(1)[:, [9, 53, 27]].T, dim=-1) for m in (map0, map1))  # cells of points and far
    target = torch.arange(2)
    expected = (F.cross_entropy(5 * d0[:2] @ d1.T, target) + F.cross_entropy(5 * d1[:2] @ d0.T, target)) / 2
    torch.testing.assert_close(hard, expected)
    assert hard > plain
    near = points[:, :1] + 1.0  # hides from the first point only, being its match
    both, _ = descriptor_loss(map0, map1, points[:, :1], points[:, :1], valid[:, :1], config, (near, near))
    torch.testing.assert_close(both, torch.zeros(()))


def test_no_correspondence_is_no_descriptor_loss() -> None:
    maps = torch.randn(2, 8, 4, 4, requires_grad=True)
    none = torch.zeros(2, 0, 2)
    loss, accuracy = descriptor_loss(maps, maps, none, none, none[..., 0].bool(), DescriptorLossConfig())
    loss.backward()
    assert loss == 0 and accuracy == 0 and maps.grad is not None and not maps.grad.any()


# -- loop --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(4):
        noise = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(noise, (320, 240), interpolation=cv2.INTER_CUBIC))
    (folder / "split.yaml").write_text("singles: [3.png]\n")
    return folder


@pytest.fixture
def config(photo_folder: Path) -> TrainConfig:
    data = DataConfig(data_path=photo_folder, split=photo_folder / "split.yaml", batch_size=2)
    return TrainConfig(
        checkpoint_name="test",
        device="cpu",
        data="photos",
        data_config_train=replace(data, warps=replace(data.warps, view_size=64)),
        model="lite",
        optimal_modules=("encoder", "decoder", "localheader"),
        optimal_lrs=(2e-4, 1e-3, 1e-3),
        optimizer="AdamW",
        bn_mode="frozen",
        epoch=1,
        epoch_step=6,
        lr_schedule="cosine",
        warmup_steps=2,
        grad_clip=True,
        clip_norm=1.0,
        detector_start=2,
        log_freq=1,
        save_freq=3,
        validate_freq=6,
        validation_pairs=2,
    )


def test_killed_and_resumed_run_equals_an_uninterrupted_one(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, epoch_step=12)
    whole = SCFeat.from_pretrained(train(config, tmp_path / "whole", progress=False))
    _kill_after(config, tmp_path / "killed", logged_steps=8)
    resumed = SCFeat.from_pretrained(train(config, tmp_path / "killed", resume=True, progress=False))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert (tmp_path / "killed" / "curves.png").stat().st_size > 10_000


def _kill_after(config: TrainConfig, folder: Path, logged_steps: int) -> None:
    """Train in another process and kill it without warning once it has logged so many steps."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(dump_config(config)))
    command = [sys.executable, "-m", "scfeat_core.cli", "train", "--config", str(path), "--output", str(folder)]
    process = subprocess.Popen(command)
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.is_file() or len(log.read_text().splitlines()) < logged_steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (folder / "last.pt").is_file()


def test_training_lowers_the_descriptor_loss(config: TrainConfig, tmp_path: Path) -> None:
    data = replace(config.data_config_train, batch_size=4)
    config = replace(config, epoch_step=40, detector_start=100, validate_freq=40, data_config_train=data)
    train(config, tmp_path / "run", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["descriptor_loss"] for row in rows if "descriptor_loss" in row]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert {"validation_mma3", "validation_repeatability3", "validation_matches"} <= rows[-1].keys()


def test_motions_make_points_exact_and_leave_the_rest_to_the_teacher(config: TrainConfig, tmp_path: Path) -> None:
    data = replace(config.data_config_train, batch_size=4, motions=MotionConfig(view_size=64))
    config = replace(
        config,
        load_path="lite",
        teacher="lite",
        optimal_modules=("localheader",),
        optimal_lrs=(1e-3,),
        motion_share=0.75,
        epoch_step=96,
        validate_freq=96,
        data_config_train=data,
    )
    apart_before = _motion_loss(create_model(config), config)
    before = {name: tensor.clone() for name, tensor in create_model(config).state_dict().items()}
    train(config, tmp_path, progress=False)
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert changed and all(name.startswith("detector") for name in changed)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [("motion_loss" in row) for row in steps] == 24 * [False, True, True, True]
    assert all({"taught_place", "taught_rank"} <= row.keys() for row in steps)
    assert all(("keypoint_loss" in row) != ("motion_loss" in row) for row in steps)
    apart = _motion_loss(SCFeat.from_pretrained(tmp_path / "lite.safetensors"), config)
    assert apart < 0.97 * apart_before  # 0.90 to 0.92 of it with other seeds


def _motion_loss(model: SCFeat, config: TrainConfig) -> float:
    """Mean over 48 pairs, always the same: those of the steps of a run differ by more than it learns."""
    objective, share, found = open_data(config, validate=False).objective, Share(99, 4), []
    for step in (step for step in range(16) if step % 4):
        with torch.no_grad():
            batch = StepBatches(objective, share)[step]
            losses = objective.losses(Network(model.eval()), batch, step, share.generators(step))
        found.append(float(losses.terms["motion_loss"].value))
    return float(np.mean(found))


def test_frozen_parts_stay_and_the_detector_may_rest(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(
        config,
        epoch_step=3,
        detector_start=0,
        keypoint_every=2,
        frozen_modules=("backbone.encoder.stem", "backbone.bridge"),
        LocalisationLoss_config=LocalisationConfig(weight=1.0, count=50),
    )
    start = {name: tensor.clone() for name, tensor in create_model(config).state_dict().items()}
    train(config, tmp_path, progress=False)
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert not any(name.startswith(("backbone.encoder.stem", "backbone.bridge")) for name in changed)
    assert any(name.startswith("backbone.encoder.stages") for name in changed)
    assert any(name.startswith("detector") for name in changed)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert any("localisation_loss" in row for row in rows)
    with pytest.raises(ConfigError, match=r"backbone.encoder.* found 'backbone.stem'"):
        create_state(replace(config, frozen_modules=("backbone.stem",)), torch.device("cpu"))


def test_a_folder_with_a_run_is_not_overwritten(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, epoch_step=1, validate_freq=1)
    train(config, tmp_path, progress=False)
    with pytest.raises(ConfigError, match="--resume"):
        train(config, tmp_path, progress=False)
    with pytest.raises(ConfigError, match="other settings of seed, model"):
        train(replace(config, model="r18", seed=3), tmp_path, resume=True, progress=False)
    train(replace(config, epoch_step=2), tmp_path, resume=True, progress=False)  # longer is no contradiction
    train(config, tmp_path, resume=True, progress=False)  # done already
    assert '"step": 2' in (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ConfigError, match="expected a run to resume in .*typo, found none"):
        train(config, tmp_path / "typo", resume=True, progress=False)
    assert not (tmp_path / "typo").exists()


def test_a_run_needs_a_folder(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScfeatError, match="expected a folder to write to"):
        train(config, tmp_path / "file" / "run", progress=False)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As if the disk were full beyond so many bytes a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".partial", ".tmp")]


def test_a_folder_that_cannot_be_made_is_one_clear_line(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(dump_config(config)))
    assert main(["train", "--config", str(path), "--output", "/proc/no/run"]) == 2
    error = capsys.readouterr().err
    assert "expected to write /proc/no/run, found: No such file or directory; " in error and "--output" in error
    assert error.count("\n") == 1


def test_a_full_disk_ends_a_run_in_one_clear_line(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "train.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(dump_config(replace(config, epoch_step=1, validate_freq=100))))
    command = ["train", "--config", str(path), "--output", str(folder)]
    with files_of_at_most(800 * 1024):
        assert main(command) == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert f"expected to write {folder}/" in error and "found: File too large; free space, or " in error
    assert not half_written(folder) and not (folder / "last.pt").exists()
    assert main(command) == 0, "and with a disk that is not full, the same command trains"


def test_what_was_saved_outlasts_a_full_disk(config: TrainConfig, tmp_path: Path) -> None:
    run, state = Run(tmp_path, config), create_state(config, torch.device("cpu"))
    run.open(resume=False)
    run.start(state, None)
    run.save(state)
    run.log(1, {"loss": 1.0})
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    weights = run.weights(state.model)
    for limit, name in ((1000, weights.name), (weights.stat().st_size + 5000, "last.pt")):
        with files_of_at_most(limit), pytest.raises(ScfeatError, match=rf"expected to write .*{name}, found: File too"):
            run.save(state)
    with files_of_at_most(len(kept["log.jsonl"]) + 5), pytest.raises(ScfeatError, match=r"log\.jsonl, found"):
        run.log(2, {"loss": 0.5})
    state.step = 1
    with files_of_at_most(10), pytest.raises(ScfeatError, match=r"log\.jsonl, found"):
        run.start(state, None)
    assert not half_written(tmp_path)
    assert kept == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with files_of_at_most(2000):
        run.close()
    assert not (tmp_path / "curves.png").exists() and not half_written(tmp_path)


def test_what_a_killed_run_left_half_written_goes(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / ".last.pt.0123.tmp").write_bytes(b"half")
    (tmp_path / ".notes.tmp").write_bytes(b"of others")
    run = Run(tmp_path, config)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    run.open(resume=False)
    assert run.rows() == [{"step": 1, "loss": 1.0}]
    run.close()
    assert half_written(tmp_path) == [tmp_path / ".notes.tmp"]


@pytest.mark.parametrize("content", [b"", b"garbage, and more of it", b"PK\x03\x04 cut off", {"model": {}}, [1]])
def test_a_damaged_checkpoint_is_one_clear_error(config: TrainConfig, tmp_path: Path, content: object) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ConfigError, match=r"expected the state of a run in .*last\.pt, found") as raised:
        train(config, tmp_path, resume=True, progress=False)
    assert "\n" not in str(raised.value)


def test_a_run_goes_on_with_as_many_pairs_a_step(config: TrainConfig, tmp_path: Path) -> None:
    run = Run(tmp_path, config, world=2)
    run.start(create_state(config, torch.device("cpu")), None)
    run.save(create_state(config, torch.device("cpu")))
    run.close()
    assert run.open(resume=True) is not None
    run.close()
    with pytest.raises(ConfigError, match="made with 4 pairs a step, found 2 .*processes 1"):
        Run(tmp_path, config).open(resume=True)
    whole = replace(config, data_config_train=replace(config.data_config_train, batch_size=4))
    assert Run(tmp_path, whole).open(resume=True) is not None


def test_two_processes_never_write_to_one_run(config: TrainConfig, tmp_path: Path) -> None:
    first = Run(tmp_path, config)
    assert first.open(resume=False) is None
    with pytest.raises(ConfigError, match="another process training in"):
        train(config, tmp_path, progress=False)
    assert not list(tmp_path.glob("*.*s*")), "the second one left something behind"
    first.close()
    again = Run(tmp_path, config)
    again.open(resume=False)
    again.close()


@pytest.mark.parametrize("steps", [3, 60])
def test_a_run_that_makes_no_step_fails(config: TrainConfig, tmp_path: Path, steps: int) -> None:
    data = replace(config.data_config_train, batch_size=1)
    config = replace(config, epoch_step=steps, validate_freq=100, save_freq=100, data_config_train=data)
    spoilt = create_model(config)
    for parameter in spoilt.backbone.parameters():
        parameter.data.fill_(6e4)  # finite, but nothing that it computes is
    save_model(spoilt, tmp_path / "spoilt.safetensors")
    config = replace(config, model=None, load_path=str(tmp_path / "spoilt.safetensors"))
    with pytest.raises(ScfeatError, match=rf"the last {min(steps, 50)} up to step .* all skipped .*optimal_lrs"):
        train(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimal_lr=[1.0]", "did you mean 'optimal_lrs'"),
        ("epoch_step=0", "epoch_step"),
        ("optimal_lrs=[0.1]", "a learning rate for each"),
        ("optimal_modules=[encoder,encoder]", "each part once"),
        ("KeypointLoss_config.grid_size=16", "proposal_share: 0"),
        ("data_config_train.data_path=/does/not/exist", "/does/not/exist"),
        ("data=auto", "config/pretrain_warps.yaml"),
        ("model=null", "found null"),
        ("model_config.backbone.cn_init=identitty", "model_config: backbone.cn_init"),
        ("device=cuda", "device='cpu'"),
        ("device=gpu", "'gpu'"),
        ("checkpoint_name.first=1", "'checkpoint_name'"),
        ("seed", "KEY=VALUE"),
        ("epoch_step=[1", "--set epoch_step: expected a value in YAML"),
        ("optimal_lrs=[nan, 1.0]", "expected float"),
        ("data_config_train.warps.geometry.zoom=[0,1]", "zoom"),
        ("load_path=/no/such.safetensors", "/no/such.safetensors"),
        ("load_path=/no/such.pth", "/no/such.pth"),
        ("load_path=runs/none", "expected a run at runs/none"),
    ],
)
def test_wrong_settings_are_one_clear_line(
    photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, so asking for it is no error")
    config = tmp_path / "train.yaml"
    config.write_text(
        "checkpoint_name: wrong\ndata: photos\nmodel: lite\nepoch_step: 1\noptimal_modules: [decoder, localheader]\n"
        f"optimal_lrs: [1.0, 1.0]\ndata_config_train: {{data_path: {photo_folder}, split: {photo_folder}/split.yaml}}\n"
    )
    status = main(["train", "--config", str(config), "--output", str(tmp_path / "run"), "--set", override])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "readable"), ("", "checkpoint_name"), ("a: [", "valid YAML"), ("- 1", "mapping of settings")],
)
def test_unusable_files_are_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    config = tmp_path / "train.yaml"
    if text is not None:
        config.write_text(text)
    assert main(["train", "--config", str(config), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_shipped_configuration_trains_on_any_folder(repository: Path, photo_folder: Path, tmp_path: Path) -> None:
    """Its split names other photographs; some of these are held back all the same."""
    small = ["load_path=random", "epoch_step=1", "data_config_train.batch_size=1", "validation_pairs=1"]
    small.append("data_config_train.warps.view_size=64")
    settings = [word for setting in small for word in ("--set", setting)]
    config = ["--config", str(repository / "config" / "pretrain_warps.yaml"), "--data", str(photo_folder)]
    assert main(["train", *config, "--output", str(tmp_path / "run"), *settings]) == 0


def test_a_gradient_that_is_not_finite_changes_nothing(config: TrainConfig) -> None:
    state = create_state(config, torch.device("cpu"))
    state.step = 2
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    next(state.model.detector.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    objective = open_data(config, validate=False).objective
    share = Share(config.seed, 2)
    train_step(state, StepBatches(objective, share)[2], share, objective, config, Group())
    assert state.incidents == {"gradient_not_finite": 1}
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())


def test_shipped_training_configurations_are_valid(repository: Path) -> None:
    paths = [path for path in (repository / "config").glob("*.yaml") if "checkpoint_name" in read_mapping(path)]
    assert {"pretrain_warps", "lite_warps", "lite_posed", "train_desc", "train_det"} <= {path.stem for path in paths}
    for path in paths:
        assert read_config(TrainConfig, path).checkpoint_name == path.stem
