"""From the settings of a run to what it trains and is validated on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scfeat_core.data import megadepth, posed_images
from scfeat_core.data.photos import find_photos, load_photos, matching_split, read_split
from scfeat_core.data.posed import PosedPairs
from scfeat_core.errors import ConfigError, DataError
from scfeat_core.training.config import DataConfig, TrainConfig
from scfeat_core.training.loading import Source
from scfeat_core.training.objectives import AlternatingObjective, Objective, WarpObjective, WarpSource
from scfeat_core.training.posed_objective import PosedObjective
from scfeat_core.training.validation import PosedValidation, Validation, WarpValidation

log = logging.getLogger(__name__)

READERS = {"megadepth": megadepth, "posed_images": posed_images}
Photos = list[list[np.ndarray]]


@dataclass(frozen=True)
class DataSets:
    """sources: all that the objective draws from. summary: what was found, for the log."""

    objective: Objective
    sources: tuple[Source, ...]
    validations: tuple[Validation, ...]
    summary: str


def open_data(config: TrainConfig, *, validate: bool = True) -> DataSets:
    """validate: also open what is held back. Raises DataError, ConfigError."""
    if config.data == "photos":
        return _open_photos(config, validate)
    training, held_back = open_posed(config.data, config.data_config_train)
    summary = f"{len(training)} pairs of {len(training.scenes)} scenes"
    if config.track_weight > 0 and not any(scene.tracks for scene in training.scenes):
        raise ConfigError(
            f"track_weight: expected true correspondences with the scenes of {config.data_config_train.data_path}, "
            "found none; set track_weight: 0, or add tracks.npz (see docs of posed images)"
        )
    objective: Objective = PosedObjective(training, config)
    sources: tuple[Source, ...] = (training,)
    validations: list[Validation] = []
    if validate:
        validations.append(PosedValidation(held_back, config.validation_pairs))
    if config.warp_share > 0:
        photos = load_photo_set(_outside(config.data_config_train, held_back), config.data_config_train)
        sources = (training, WarpSource(photos, config.data_config_train.warps))
        objective = AlternatingObjective(objective, WarpObjective(sources[1], config), config.warp_share)
        summary += f", {len(photos)} photographs to warp"
    return DataSets(objective, sources, tuple(validations), summary)


def open_posed(layout: str, config: DataConfig) -> tuple[PosedPairs, PosedPairs]:
    """Pairs to train on, and pairs that are held back. layout: ``auto``, ``megadepth`` or ``posed_images``."""
    if layout == "auto":
        layout = detect_layout(config.data_path)
    reader = READERS[layout]
    opener = reader.open_megadepth if layout == "megadepth" else reader.open_posed_images
    return opener(config, held_back=False), opener(config, held_back=True)


def detect_layout(folder: Path) -> str:
    """``megadepth`` or ``posed_images``. Raises DataError where the folder is neither."""
    problems = []
    for name, reader in READERS.items():
        try:
            reader.find_scenes(folder)
        except DataError as error:
            problems.append(str(error))
        else:
            return name
    if not folder.is_dir():
        raise DataError(f"expected the folder of the training data at {folder}, found none; state it by --data")
    raise DataError(
        f"expected scenes of posed images in {folder}, of one of two layouts; {'; '.join(problems)}; photographs "
        "without poses can be warped: config/pretrain_warps.yaml"
    )


def _open_photos(config: TrainConfig, validate: bool) -> DataSets:
    data = config.data_config_train
    photos = load_photo_set(photo_paths(data, held_back=False), data)
    validations: tuple[Validation, ...] = ()
    if validate:
        held_back = load_photo_set(photo_paths(data, held_back=True), data)
        validations = (WarpValidation(held_back, config.validation_pairs, data.warps),)
    source = WarpSource(photos, data.warps)
    return DataSets(WarpObjective(source, config), (source,), validations, f"{len(photos)} photographs")


def photo_paths(config: DataConfig, *, held_back: bool) -> list[Path]:
    root = config.data_path
    if not root.is_dir():
        raise DataError(f"data_path: expected a folder of photographs, found none at {root}; state it by --data")
    split = matching_split(root, read_split(config.split))
    if split is None and config.split is not None and held_back:
        log.warning("%s names none of the photographs in %s: every 20th is held back", config.split, root)
    return find_photos(root, split, held_back=held_back)


def _outside(config: DataConfig, held_back: PosedPairs) -> list[Path]:
    """The photographs that are not held back, neither as such nor with their scene."""
    folders = {scene.folder for scene in held_back.scenes}
    paths = photo_paths(config, held_back=False)
    apart = [path for path in paths if folders.isdisjoint(path.parents)]
    return apart or paths  # of few scenes, pairs are held back, not scenes


def load_photo_set(paths: Sequence[Path], config: DataConfig) -> Photos:
    """Pyramids of at most ``max_photos`` of the photographs; those that cannot be read are named in the log."""
    if len(paths) > config.max_photos:
        chosen = np.linspace(0, len(paths) - 1, config.max_photos).round().astype(int)
        paths = [paths[i] for i in chosen]
    photos, problems = load_photos(paths, config.max_edge)
    for problem in problems:
        log.warning("%s", problem)
    return photos
