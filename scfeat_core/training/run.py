"""The folder of a training run: checkpoint to resume from, log, averaged weights, curves."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.optim.swa_utils import AveragedModel

from scfeat_core.config import dump_config
from scfeat_core.errors import ConfigError, ScfeatError
from scfeat_core.feature_files import replaced, writing
from scfeat_core.network.model import SCFeat
from scfeat_core.network.weights import save_model
from scfeat_core.report import check_folder
from scfeat_core.training.config import TrainConfig
from scfeat_core.training.starts import variant_name

log = logging.getLogger(__name__)

PLOT_COLUMNS = 3
PLOT_EVERY = 60.0  # seconds, as drawing takes some
OPTION = "--output"  # by which the folder is chosen

# How long and where a run goes on may change. The data folder, too: folders move, and what is in it is the user's word.
# The batch of a process may, where that of all processes stays.
MAY_CHANGE = (
    "checkpoint_name",
    "epoch",
    "epoch_step",
    "device",
    "timeout",
    "minutes",
    "compile_network",
    "load_path",
    "log_freq",
    "save_freq",
    "validate_freq",
    "validation_pairs",
)
DATA_MAY_CHANGE = ("data_path", "split", "workers", "cache_mb", "patience", "max_photos", "batch_size")
SAVED = {"config", "network", "model", "average", "optimizer", "scaler", "step", "incidents"}


@dataclass
class TrainState:
    """All that changes from step to step.

    incidents: how often what went wrong. seconds: that the steps took, without what is done between them. Not saved:
    pieces: in how many each batch is computed, for lack of memory; skipped: steps since the last one that changed the
    network.
    """

    model: SCFeat
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0
    incidents: Counter[str] = field(default_factory=Counter)
    pieces: int = 1
    skipped: int = 0


class Run:
    """``last.pt`` (to resume), ``log.jsonl``, ``config.json``, ``<variant>.safetensors`` (averaged), ``curves.png``
    and, where its package is there, ``tensorboard/``.

    Of several processes, ``world`` in number, only the ``main`` one writes.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, main: bool = True, world: int = 1) -> None:
        self.folder = folder
        self.config = config
        self._main = main
        self._world = world
        self._checkpoint = folder / "last.pt"
        self._log = folder / "log.jsonl"
        self._board: Any = None
        self._lock: IO[str] | None = None
        self._plotted = time.monotonic()

    def open(self, *, resume: bool) -> dict[str, Any] | None:
        """The saved state to go on from, or None for a new run.

        Raises ConfigError where the folder holds another run, a damaged one, or none to resume, or another process is
        at it, and ScfeatError where it cannot be written to.
        """
        check_folder(self.folder)
        self._check_there(resume)  # before anything is made
        try:
            if self._main:
                self._take_lock()
                self._tidy()
            return self._read(resume)
        except BaseException:
            self._release()
            raise

    def _check_there(self, resume: bool) -> None:
        if resume and not self._checkpoint.is_file():
            raise ConfigError(
                f"expected a run to resume in {self.folder}, found none; check --output, or start without --resume"
            )

    def _read(self, resume: bool) -> dict[str, Any] | None:
        self._check_there(resume)
        if not self._checkpoint.is_file():
            return None
        if not resume:
            raise ConfigError(f"{self.folder} holds a run already; go on by --resume, or choose another --output")
        try:
            saved = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # of damaged bytes, its reader may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise self._damaged(reason) from error
        missing = SAVED - set(saved if isinstance(saved, dict) else ())
        if missing:
            raise self._damaged(f"no {', '.join(sorted(missing))} in it")
        self._check_same(saved)
        return saved

    def start(self, state: TrainState, saved: dict[str, Any] | None) -> None:
        """Begin, or take up what :meth:`open` returned."""
        if saved is not None:
            _restore(state, saved)
        if not self._main:
            return
        self._drop_log_after(state.step)
        with replaced(self.folder / "config.json", OPTION) as scratch:
            scratch.write_text(json.dumps(dump_config(self.config), indent=1))
        with writing(self.folder / "tensorboard", OPTION):
            self._board = _open_board(self.folder / "tensorboard", state.step)

    def _take_lock(self) -> None:
        with writing(self.folder, OPTION):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"expected a run that nobody is at, found another process training in {self.folder}; wait for it, end "
                "it, or choose another --output"
            ) from None
        except OSError as error:  # as of some network file systems
            log.warning("%s cannot be locked (%s): see to it that no second process trains there", self.folder, error)

    def _tidy(self) -> None:
        """Remove what a process that was killed had half written, see :func:`replaced`."""
        for name in ("last.pt", "log.jsonl", "config.json", "curves.png"):
            for file in self.folder.glob(f".{name}.*.tmp"):
                with contextlib.suppress(OSError):
                    file.unlink()

    def _damaged(self, found: str) -> ConfigError:
        return ConfigError(
            f"expected the state of a run in {self._checkpoint}, found a damaged file ({found}); remove "
            f"{self.folder} and train anew, or choose another --output"
        )

    def _pairs(self, batch_size: int) -> int:
        """In each step, over all processes."""
        return batch_size * self._world

    def _check_same(self, checkpoint: dict[str, Any]) -> None:
        """How long and where a run goes on may change; what it trains, on what and how, may not."""
        own = _fixed(dump_config(self.config))
        saved = _fixed(checkpoint["config"])
        different = [key for key in own if own[key] != saved.get(key)]
        batch_size = self.config.data_config_train.batch_size
        was = checkpoint["config"].get("data_config_train", {}).get("batch_size", batch_size)
        pairs = checkpoint.get("pairs", self._pairs(was))
        if not different and pairs != self._pairs(batch_size):
            raise ConfigError(
                f"{self._checkpoint} was made with {pairs} pairs a step, found {self._pairs(batch_size)} "
                f"(data_config_train.batch_size {batch_size}, processes {self._world}); resume with {pairs} in all"
            )
        if different:
            raise ConfigError(
                f"{self._checkpoint} was made with other settings of {', '.join(different)}; resume with those in "
                f"{self.folder / 'config.json'}, or start a run of its own with another --output"
            )

    def _drop_log_after(self, step: int) -> None:
        """What was logged after the checkpoint is done, and logged, again."""
        if self._log.is_file():
            kept = [line for line in self._log.read_text().splitlines() if _step_of(line) <= step]
            with replaced(self._log, OPTION) as scratch:
                scratch.write_text("".join(f"{line}\n" for line in kept))

    def weights(self, model: SCFeat) -> Path:
        return self.folder / f"{variant_name(model.config)}.safetensors"

    def save(self, state: TrainState) -> None:
        """Raises ScfeatError where it cannot be written; then what was saved before is still there."""
        if not self._main:
            return
        content = {
            "config": dump_config(self.config),
            "network": dump_config(state.model.config),
            "model": state.model.state_dict(),
            "average": state.average.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "step": state.step,
            "seconds": state.seconds,
            "incidents": dict(state.incidents),
            "pairs": self._pairs(self.config.data_config_train.batch_size),
        }
        _write_weights(cast(SCFeat, state.average.module), self.weights(state.model))
        with replaced(self._checkpoint, OPTION) as scratch:  # last: a run is resumed that has all else
            _write_checkpoint(content, scratch)
        if time.monotonic() > self._plotted + PLOT_EVERY:
            self.plot()
            self._plotted = time.monotonic()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if not self._main:
            return
        with writing(self._log, OPTION):
            _append(self._log, json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            with writing(self.folder / "tensorboard", OPTION):
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
                self._board.flush()

    def plot(self) -> Path:
        """Curves of all that was logged; nothing but a warning where they cannot be written."""
        path = self.folder / "curves.png"
        try:
            return plot_curves(self.rows(), path)
        except ScfeatError as error:
            log.warning("no curves: %s; log.jsonl has the numbers", error)
            return path

    def rows(self) -> list[dict[str, float]]:
        """What was logged, but for a line that a kill cut off."""
        lines = self._log.read_text().splitlines() if self._log.is_file() else []
        return [json.loads(line) for line in lines if _step_of(line) < math.inf]

    def close(self) -> None:
        """The last curves, also of a run that was interrupted."""
        if self._board is not None:
            with contextlib.suppress(OSError):  # which log() has told of
                self._board.close()
        if self._main and self._log.is_file():
            self.plot()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()


def plot_curves(rows: Sequence[Mapping[str, float]], path: Path) -> Path:
    """One panel a quantity, over the ``step`` of the rows; nothing but a warning where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        log.warning("no curves: matplotlib is not installed (pip install matplotlib); log.jsonl has the numbers")
        return path
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    height = max(1, math.ceil(len(names) / PLOT_COLUMNS))
    figure = Figure(figsize=(4 * PLOT_COLUMNS, 2.6 * height))
    figure.subplots_adjust(0.07, 0.3 / (height + 0.3), 0.98, 1 - 0.2 / height, 0.28, 0.35)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(height, PLOT_COLUMNS, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.set_title(name, fontsize="medium")
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    with replaced(path, OPTION) as scratch:
        figure.savefig(scratch, dpi=90, format="png")
    return path


def _write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Raises OSError, which torch would hide: its writer of archives only notices that bytes are missing."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _write_weights(model: SCFeat, path: Path) -> None:
    try:
        with writing(path, OPTION):
            save_model(model, path)
    except ScfeatError:
        with contextlib.suppress(OSError):
            path.with_suffix(".partial").unlink()
        raise


def _append(path: Path, line: str) -> None:
    """A whole line or nothing."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def _restore(state: TrainState, saved: dict[str, Any]) -> None:
    state.model.load_state_dict(saved["model"])
    state.average.load_state_dict(saved["average"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.incidents = saved["step"], Counter(saved["incidents"])
    state.seconds = saved.get("seconds", 0.0)  # of a run from before they were counted


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """What must be the same after a resume."""
    data = {key: value for key, value in config.get("data_config_train", {}).items() if key not in DATA_MAY_CHANGE}
    return {key: value for key, value in config.items() if key not in MAY_CHANGE} | {"data_config_train": data}


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line that a kill cut off


def _open_board(folder: Path, step: int) -> Any:
    """A TensorBoard writer, or None where its package is missing: then training goes on without."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("no TensorBoard: its package is not installed (pip install tensorboard); log.jsonl has the same")
        return None
    return SummaryWriter(str(folder), purge_step=step or None)
