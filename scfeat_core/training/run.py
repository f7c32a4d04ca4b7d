"""The folder of a training run: checkpoint to resume from, log, averaged weights, curves."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel

from scfeat_core.config import dump_config
from scfeat_core.errors import ConfigError
from scfeat_core.network.model import SCFeat
from scfeat_core.network.weights import save_model
from scfeat_core.training.config import TrainConfig

CURVES = (
    ("descriptor loss", ("descriptor_loss",)),
    ("share matched", ("matched",)),
    ("expected matches a pair", ("expected_matches",)),
    ("keypoints accepted", ("accepted",)),
    ("validation", ("validation_mma3", "validation_repeatability3")),
)
# "data" because folders move; the photographs in them are the user's word.
MAY_CHANGE = ("name", "steps", "device", "data", "log_every", "save_every", "validate_every", "validation_pairs")


@dataclass
class TrainState:
    """All that changes from step to step.

    incidents: how often what went wrong. pieces: in how many each batch is computed, for lack of memory; not saved.
    """

    model: SCFeat
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    incidents: Counter[str] = field(default_factory=Counter)
    pieces: int = 1


class Run:
    """``last.pt`` (to resume), ``log.jsonl``, ``config.json``, ``<variant>.safetensors`` (averaged), ``curves.png``."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.folder = folder
        self.config = config
        self.weights = folder / f"{config.variant}.safetensors"
        self._checkpoint = folder / "last.pt"
        self._log = folder / "log.jsonl"

    def start(self, state: TrainState, *, resume: bool) -> None:
        """Begin a new run or take up the saved one. Raises ConfigError where that is not what the folder holds."""
        saved = self._checkpoint.is_file()
        if saved and not resume:
            raise ConfigError(f"{self.folder} holds a run already; go on by --resume, or choose another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        if saved:
            self._restore(state)
        (self.folder / "config.json").write_text(json.dumps(dump_config(self.config), indent=1))

    def _restore(self, state: TrainState) -> None:
        saved = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        self._check_same(saved["config"])
        state.model.load_state_dict(saved["model"])
        state.average.load_state_dict(saved["average"])
        state.optimizer.load_state_dict(saved["optimizer"])
        state.scaler.load_state_dict(saved["scaler"])
        state.step, state.incidents = saved["step"], Counter(saved["incidents"])
        self._drop_log_after(state.step)

    def _check_same(self, saved: dict[str, Any]) -> None:
        """How long and where a run goes on may change; what it trains, on what and how, may not."""
        own = dump_config(self.config)
        different = [key for key in own if key not in MAY_CHANGE and own[key] != saved.get(key)]
        if different:
            raise ConfigError(
                f"{self._checkpoint} was made with other settings of {', '.join(different)}; resume with those in "
                f"{self.folder / 'config.json'}, or start a run of its own with another --output"
            )

    def _drop_log_after(self, step: int) -> None:
        """What was logged after the checkpoint is done, and logged, again."""
        if self._log.is_file():
            kept = [line for line in self._log.read_text().splitlines() if json.loads(line)["step"] <= step]
            self._log.write_text("".join(f"{line}\n" for line in kept))

    def save(self, state: TrainState) -> None:
        content = {
            "config": dump_config(self.config),
            "model": state.model.state_dict(),
            "average": state.average.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "step": state.step,
            "scaler": state.scaler.state_dict(),
            "incidents": dict(state.incidents),
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(self._checkpoint)  # a kill while writing leaves the checkpoint before
        save_model(cast(SCFeat, state.average.module), self.weights)

    def log(self, step: int, values: dict[str, Any]) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def plot(self) -> Path:
        """Curves of all that was logged; one panel a quantity."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        rows = [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.is_file() else []
        figure, axes = plt.subplots(math.ceil(len(CURVES) / 2), 2, figsize=(11, 9), constrained_layout=True)
        for axis, (title, keys) in zip(axes.flat, CURVES, strict=False):
            for key in keys:
                points = [(row["step"], row[key]) for row in rows if key in row]
                axis.plot([x for x, _ in points], [y for _, y in points], label=key)
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
            if len(keys) > 1:
                axis.legend()
        path = self.folder / "curves.png"
        figure.savefig(path, dpi=90)
        plt.close(figure)
        return path
