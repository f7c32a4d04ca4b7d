"""Steps in pieces and on several processes: losses and weights of one process with the whole batch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scfeat_core.config import dump_config
from scfeat_core.training.config import DataConfig, TrainConfig
from scfeat_core.training.data_sets import open_data
from scfeat_core.training.distributed import Group
from scfeat_core.training.loading import Share, StepBatches
from scfeat_core.training.objectives import Objective
from scfeat_core.training.run import TrainState
from scfeat_core.training.step import is_out_of_memory, train_step
from scfeat_core.training.trainer import create_state

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path, write_scene: Callable[..., Path]) -> TrainConfig:
    """Description by epipolar geometry and tracks, plain gradient descent: its weights show what its gradients are."""
    write_scene(tmp_path / "scene")
    data = DataConfig(data_path=tmp_path / "scene", size=(96, 64), max_points=32, batch_size=4)
    return TrainConfig(
        checkpoint_name="test",
        device="cpu",
        data="posed_images",
        data_config_train=data,
        model="lite",
        bn_mode="frozen",
        optimizer="SGD",
        optimal_lrs=(1e-2,),
        epoch=1,
        epoch_step=3,
        track_weight=1.0,
        DescriptorLoss_config=replace(TrainConfig("").DescriptorLoss_config, negatives=0),
        log_freq=1,
        validate_freq=10,
        save_freq=10,
        validation_pairs=1,
    )


def first_step(config: TrainConfig, objective: Objective | None = None, **settings: Any) -> tuple[TrainState, dict]:
    """The state after one step, and what it logs."""
    state = create_state(config, CPU)
    for name, value in settings.items():
        setattr(state, name, value)
    objective = objective or open_data(config, validate=False).objective
    share = Share(config.seed, config.data_config_train.batch_size)
    batch = StepBatches(objective, share)[0]
    return state, train_step(state, batch, share, objective, config, Group())


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], start: dict) -> None:
    moved = max(float((first[name].double() - start[name].double()).abs().max()) for name in first)
    apart = max(float((first[name].double() - second[name].double()).abs().max()) for name in first)
    assert moved > 1e-4
    assert apart < 1e-4 * moved


class Greedy:
    """An objective that asks for more memory than there is, until it is given few enough pairs."""

    def __init__(self, inner: Objective, fits: int, backward: bool = False) -> None:
        self.source = inner.source
        self._inner = inner
        self._fits = fits
        self._backward = backward

    def losses(self, network: Any, batch: Any, step: int, generators: Any) -> Any:
        losses = self._inner.losses(network, batch, step, generators)
        if len(generators) > self._fits:
            if not self._backward:
                torch.empty(2**55, dtype=torch.uint8)
            term = next(iter(losses.terms.values()))
            if term.value.requires_grad:
                term.value.register_hook(lambda gradient: torch.empty(2**55, dtype=torch.uint8))
        return losses


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_out_of_memory_is_survived_in_pieces(config: TrainConfig, backward: bool) -> None:
    start = create_state(config, CPU).model.state_dict()
    whole, logged = first_step(config)
    objective = open_data(config, validate=False).objective
    pieces, logged_in_pieces = first_step(config, Greedy(objective, fits=1, backward=backward))
    assert pieces.pieces == 4
    assert pieces.incidents == {"out_of_memory": 2}
    for name, value in logged.items():
        torch.testing.assert_close(logged_in_pieces[name], value, rtol=1e-4, atol=1e-5)
    assert_same_weights(whole.model.state_dict(), pieces.model.state_dict(), start)


def test_a_pair_that_never_fits_is_skipped(config: TrainConfig) -> None:
    start = create_state(config, CPU).model.state_dict()
    objective = open_data(config, validate=False).objective
    state, _ = first_step(config, Greedy(objective, fits=0))
    assert state.incidents["too_large_for_memory"] == 1
    assert all(torch.equal(start[name], tensor) for name, tensor in state.model.state_dict().items())


def batch_norm_statistics(state: TrainState) -> dict[str, torch.Tensor]:
    endings = ("running_mean", "running_var", "num_batches_tracked")
    return {name: tensor for name, tensor in state.model.state_dict().items() if name.endswith(endings)}


def test_a_loss_that_is_not_finite_leaves_batch_norm_alone(config: TrainConfig) -> None:
    """Nor does it reach the average by the steps to come."""
    config = replace(config, bn_mode="train")
    state = create_state(config, CPU)
    start = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    objective = open_data(config, validate=False).objective
    share = Share(config.seed, config.data_config_train.batch_size)
    batch = StepBatches(objective, share)[0]
    bad = batch.image0.clone()
    bad[0, 0, 5, 5] = torch.nan
    train_step(state, batch._replace(image0=bad), share, objective, config, Group())
    assert state.incidents.total() == 1
    assert all(torch.equal(start[name], tensor) for name, tensor in state.model.state_dict().items())
    train_step(state, batch, share, objective, config, Group())
    assert state.incidents.total() == 1
    tensors = [*state.model.state_dict().values(), *state.average.state_dict().values()]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    assert any(not torch.equal(start[name], tensor) for name, tensor in batch_norm_statistics(state).items())


def test_batch_norm_counts_each_piece_once(config: TrainConfig) -> None:
    config = replace(config, bn_mode="train")
    objective = open_data(config, validate=False).objective
    pieces = batch_norm_statistics(first_step(config, pieces=2)[0])
    for backward in (False, True):  # attempts that fail leave nothing behind
        found = batch_norm_statistics(first_step(config, Greedy(objective, fits=2, backward=backward))[0])
        assert all(torch.equal(pieces[name], tensor) for name, tensor in found.items())
    counts = {int(tensor) for name, tensor in pieces.items() if name.endswith("num_batches_tracked")}
    assert counts - {0} == {2}


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))


# -- processes ---------------------------------------------------------------------------------------------------------


def launch(config: TrainConfig, output: Path, processes: int, *words: str) -> subprocess.Popen:
    """``torchrun``, as a user would; its output goes to <output>.txt."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(dump_config(config)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "scfeat_core.cli", "train"]
    command += ["--config", str(path), "--output", str(output), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = output.with_suffix(".txt").open("w")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_with_the_whole_batch(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scfeat_core.training import trainer

    def in_halves(*arguments: Any) -> TrainState:
        """As large as the batches of two processes: in others the sums of convolutions are rounded otherwise, which
        now and then moves a value across a kink of the loss. Whole batches and pieces are compared above."""
        state = create_state(*arguments)
        state.pieces = 2
        return state

    monkeypatch.setattr(trainer, "create_state", in_halves)
    torch.set_num_threads(1)  # as the processes have, for the same reason
    half = replace(config, data_config_train=replace(config.data_config_train, batch_size=2))
    both = launch(half, tmp_path / "two", 2)
    trainer.train(config, tmp_path / "one", progress=False)
    assert both.wait(300) == 0, (tmp_path / "two.txt").read_text()
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    losses = {"loss", "loss_w1", "loss_w2", "track_loss"}
    counts = {"percent_w", "track_matched"}  # of 48 points a pair and more, some of which lie on the edge
    for first, second in zip(one, two, strict=True):
        for name in losses & set(first):
            assert second[name] == pytest.approx(first[name], rel=1e-3), (name, first["step"])
        for name in counts & set(first):
            assert second[name] == pytest.approx(first[name], abs=0.02), (name, first["step"])
    assert losses | counts <= set(one[0]) and counts <= set(one[-2])
    weights = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("one", "two")]
    assert_same_weights(*weights, create_state(config, CPU).model.state_dict())


def test_a_lost_process_ends_the_run_with_a_message(config: TrainConfig, tmp_path: Path) -> None:
    """The others neither hang nor go on alone."""
    config = replace(config, epoch_step=10_000, data_config_train=replace(config.data_config_train, batch_size=1))
    run = launch(config, tmp_path / "run", 2)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "log.jsonl").is_file():
        assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "run.txt").read_text()
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert run.wait(60) != 0
    text = (tmp_path / "run.txt").read_text()
    assert "exitcode: -9" in text or "exitcode  : -9" in text, text
