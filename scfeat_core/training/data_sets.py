"""From the settings of a run to what it trains and is validated on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scfeat_core.data import megadepth, posed_images
from scfeat_core.data.gpu_images import ImageStore
from scfeat_core.data.pairing import SceneFolder, whole_scenes_held_back
from scfeat_core.data.photos import find_photos, load_photos, matching_split, read_split
from scfeat_core.data.posed import PosedPairs
from scfeat_core.data.warps import WarpConfig
from scfeat_core.errors import ConfigError, DataError
from scfeat_core.training.config import DataConfig, TrainConfig
from scfeat_core.training.gpu_sources import DevicePosed, DeviceWarps
from scfeat_core.training.loading import Source
from scfeat_core.training.objectives import (
    AlternatingObjective,
    MotionObjective,
    Objective,
    Teacher,
    WarpObjective,
    WarpSource,
)
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
    data = config.data_config_train
    training = open_posed(config.data, data)
    summary = f"{len(training)} pairs of {len(training.scenes)} scenes"
    if config.track_weight > 0 and not any(scene.tracks for scene in training.scenes):
        raise ConfigError(
            f"track_weight: expected true correspondences with the scenes of {data.data_path}, found none; set "
            "track_weight: 0, or add tracks.npz to them (scfeat_core/data/posed_images.py has the layout; README, "
            "'Train your own')"
        )
    device = torch.device(config.device)
    source: Source = DevicePosed(training, device) if data.on_device else training
    objective: Objective = PosedObjective(source, config)
    sources: tuple[Source, ...] = (source,)
    if config.warp_share > 0:
        photos, problems = load_photo_set(_outside_held_back(config), data)
        warps, of_photos = _on_photos(photos, config, problems)
        sources = (source, *of_photos)
        objective = AlternatingObjective(objective, warps, config.warp_share)
        summary += f", {len(photos)} photographs to warp"
    return DataSets(objective, sources, _posed_validations(config) if validate else (), summary)


def _on_photos(photos: Photos, config: TrainConfig, problems: dict[str, int]) -> tuple[Objective, tuple[Source, ...]]:
    """Warps, and motions where there is a share of them, with what they draw from."""
    data, teacher = config.data_config_train, Teacher(config)
    kept = ImageStore(photos, torch.device(config.device)) if data.on_device else photos
    sources = [warp_source(kept, data.warps, problems)]
    warps = WarpObjective(sources[0], config, teacher)
    if config.motion_share == 0:
        return warps, tuple(sources)
    sources.append(warp_source(kept, data.motions, {}))
    motions = MotionObjective(sources[1], config, teacher)
    within = 1.0 if config.data == "photos" else config.warp_share
    return AlternatingObjective(warps, motions, config.motion_share, within), tuple(sources)


def warp_source(photos: Photos | ImageStore, pairs: WarpConfig, problems: dict[str, int]) -> Source:
    """Warped pairs of photographs, rendered where these are kept."""
    if isinstance(photos, ImageStore):
        return DeviceWarps(photos, pairs, problems)
    return WarpSource(photos, pairs, problems)


def _posed_validations(config: TrainConfig) -> tuple[Validation, ...]:
    """None where nothing is held back, as of a single pair: it is trained on."""
    try:
        held_back = open_posed(config.data, config.data_config_train, held_back=True)
    except DataError as error:
        log.warning("no validation: %s", error)
        return ()
    if not _whole_held_back(config):
        log.info("validation: other pairs of the scenes that are trained on, for there are few; its scores flatter")
    return (PosedValidation(held_back, config.validation_pairs),)


def open_posed(layout: str, config: DataConfig, *, held_back: bool = False) -> PosedPairs:
    """Pairs to train on, or those that are held back. layout: ``auto``, ``megadepth`` or ``posed_images``."""
    layout = _resolve_layout(layout, config)
    opener = megadepth.open_megadepth if layout == "megadepth" else posed_images.open_posed_images
    return opener(config, held_back=held_back)


def _resolve_layout(layout: str, config: DataConfig) -> str:
    return detect_layout(config.data_path) if layout == "auto" else layout


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
    photos, problems = load_photo_set(photo_paths(data, held_back=False), data)
    validations: tuple[Validation, ...] = ()
    if validate:
        held_back, _ = load_photo_set(photo_paths(data, held_back=True), data)
        validations = (WarpValidation(held_back, config.validation_pairs, data.warps),)
    objective, sources = _on_photos(photos, config, problems)
    return DataSets(objective, sources, validations, f"{len(photos)} photographs")


def photo_paths(config: DataConfig, *, held_back: bool) -> list[Path]:
    root = config.data_path
    if not root.is_dir():
        raise DataError(f"data_path: expected a folder of photographs, found none at {root}; state it by --data")
    split = matching_split(root, read_split(config.split))
    if split is None and config.split is not None and held_back:
        log.warning("%s names none of the photographs in %s: every 20th is held back", config.split, root)
    return find_photos(root, split, held_back=held_back)


def _outside_held_back(config: TrainConfig) -> list[Path]:
    """The photographs that are not held back, neither as such nor with their scene.

    Every process of a run has the same ones, whether it validates or not: scenes are not opened for it.
    """
    folders = {folder.path for folder in _whole_held_back(config)}
    photos = photo_paths(config.data_config_train, held_back=False)
    return [path for path in photos if folders.isdisjoint(path.parents)]


def _whole_held_back(config: TrainConfig) -> list[SceneFolder]:
    data = config.data_config_train
    found = READERS[_resolve_layout(config.data, data)].find_scenes(data.data_path)
    return whole_scenes_held_back(found, data)


def load_photo_set(paths: Sequence[Path], config: DataConfig) -> tuple[Photos, dict[str, int]]:
    """Pyramids of at most ``max_photos`` of the photographs, and how many could not be read, by what was wrong.

    Those are named in the log.
    """
    if len(paths) > config.max_photos:
        chosen = np.linspace(0, len(paths) - 1, config.max_photos).round().astype(int)
        paths = [paths[i] for i in chosen]
    photos, problems = load_photos(paths, config.max_edge)
    for problem in problems:
        log.warning("%s", problem)
    return photos, {"damaged photograph": len(problems)} if problems else {}
