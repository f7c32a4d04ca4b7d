"""Which images of a scene make a pair: listed, covisible, or by view angle; without those that have no geometry."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scfeat_core.data.photos import read_split
from scfeat_core.data.posed import PosedConfig, PosedPairs, PosedScene
from scfeat_core.data.tracks import Tracks, select_rows
from scfeat_core.errors import DataError

log = logging.getLogger(__name__)

THINNING_SEED = 234  # as published
HELD_BACK_SCENES = 10  # every 10th, where no split is given
HELD_BACK_PAIRS = 20  # every 20th, where there are too few scenes
FEW_SCENES = 5


@dataclass(frozen=True)
class SceneFolder:
    """Where a scene lies; name: its path below the data folder, or the folder's own name.

    group: what it shares with other reconstructions of the same place, which are held back with it; empty: its name.
    """

    name: str
    path: Path
    group: str = ""

    @property
    def place(self) -> str:
        return self.group or self.name


def open_scenes(
    folders: Sequence[SceneFolder],
    read: Callable[[SceneFolder], tuple[PosedScene, np.ndarray | None]],
    config: PosedConfig,
    *,
    held_back: bool,
) -> PosedPairs:
    """The pairs of all scenes that can be read, without those that are held back (or only those).

    read: gives a scene, still without pairs, and the (P, 2) pairs of its list or None. A scene that it raises
    DataError for is named in the log, counted, and left out. Raises DataError where no pair is left.
    """
    problems: Counter[str] = Counter()
    scenes = []
    by_pairs = _few(_kept(folders, config), config)
    for folder in choose_scenes(folders, config, held_back=held_back):
        try:
            scene = prepare_scene(*read(folder), config, problems)
        except DataError as error:
            log.warning("scene left out: %s", error)
            problems["damaged scene"] += 1
            continue
        scenes.append(scene)
    if by_pairs:
        scenes = [_split_pairs(scene, held_back=held_back) for scene in scenes]
    if not any(len(scene.pairs) for scene in scenes):
        kind = "held-back pairs" if held_back else "pairs"
        raise DataError(
            f"expected {kind} of images in {config.data_path}, found none in {len(folders)} scenes "
            f"({dict(problems) or 'nothing was damaged'}); check data_path, split, rot_thr and pair_source"
        )
    if held_back:
        config = replace(config, augmentation="none", zoom=(1.0, 1.0))
    pairs = PosedPairs(scenes, config, problems)
    log.info("%d pairs of %d scenes in %s", len(pairs), len(pairs.scenes), config.data_path)
    return pairs


# -- scenes ------------------------------------------------------------------------------------------------------------


def choose_scenes(folders: Sequence[SceneFolder], config: PosedConfig, *, held_back: bool) -> list[SceneFolder]:
    """Without the excluded ones, and without the held-back ones (or only those); of few scenes, pairs are held back."""
    kept = _kept(folders, config)
    if _few(kept, config):
        return kept
    apart = {folder.place for folder in whole_scenes_held_back(folders, config)}
    return [folder for folder in kept if (folder.place in apart) == held_back]


def whole_scenes_held_back(folders: Sequence[SceneFolder], config: PosedConfig) -> list[SceneFolder]:
    """The scenes that no pair is trained on: those of the split, or every 10th place; none of few."""
    kept = _kept(folders, config)
    if _few(kept, config):
        return []
    if named := _held_back_names(kept, config):
        places = {folder.place for folder in kept if _is_named(folder, named)}
    else:
        places = set(_places(kept)[::HELD_BACK_SCENES])
    return [folder for folder in kept if folder.place in places]


def _kept(folders: Sequence[SceneFolder], config: PosedConfig) -> list[SceneFolder]:
    return [folder for folder in folders if not _is_named(folder, config.excluded_scenes)]


def _places(folders: Sequence[SceneFolder]) -> list[str]:
    return list(dict.fromkeys(folder.place for folder in folders))


def _held_back_names(folders: Sequence[SceneFolder], config: PosedConfig) -> tuple[str, ...]:
    """What the split names, or nothing where it was made for other scenes."""
    split = read_split(config.split)
    if split is None or not any(_is_named(folder, split.scenes) for folder in folders):
        return ()
    return split.scenes


def _few(kept: Sequence[SceneFolder], config: PosedConfig) -> bool:
    return len(_places(kept)) < FEW_SCENES and not _held_back_names(kept, config)


def _is_named(folder: SceneFolder, names: Sequence[str]) -> bool:
    return folder.name in names or not set(names).isdisjoint(folder.name.split("/"))


def _split_pairs(scene: PosedScene, *, held_back: bool) -> PosedScene:
    """Every 20th pair is held back; the only one is not."""
    chosen = np.arange(len(scene.pairs)) % HELD_BACK_PAIRS == 0
    return replace(scene, pairs=scene.pairs[(chosen & (len(chosen) > 1)) == held_back])


# -- one scene ---------------------------------------------------------------------------------------------------------


def prepare_scene(
    scene: PosedScene, listed: np.ndarray | None, config: PosedConfig, problems: Counter[str]
) -> PosedScene:
    """The scene with its pairs, and tracks without outliers."""
    usable = usable_cameras(scene)
    if not usable.all():
        bad = [scene.files[i] for i in np.flatnonzero(~usable)]
        log.warning("%s: %d images have no usable camera, the first: %s", scene.name, len(bad), bad[0])
        problems["unusable camera"] += len(bad)
    if scene.tracks is not None and config.max_reprojection > 0:
        good = reprojection_errors(scene, scene.tracks) <= config.max_reprojection
        scene = replace(scene, tracks=select_rows(scene.tracks, good))
    pairs = candidate_pairs(scene, listed, usable, config)
    pairs = pairs[usable[pairs].all(1)]
    sound = has_baseline(scene, pairs, usable, config.min_baseline)
    if not sound.all():
        first = [scene.files[i] for i in pairs[~sound][0]]
        log.warning("%s: %d pairs have no baseline, the first: %s", scene.name, (~sound).sum(), " ".join(first))
        problems["degenerate geometry"] += int((~sound).sum())
    pairs = pairs[sound]
    pairs = pairs[rotation_angles(scene, pairs) <= config.rot_thr]
    return replace(scene, pairs=thin_out(pairs, config.pairs_per_scene).astype(np.int32))


def usable_cameras(scene: PosedScene) -> np.ndarray:
    """(n,) bool: finite, with positive focal lengths and a rotation that is one."""
    values = np.concatenate([scene.K.reshape(-1, 9), scene.R.reshape(-1, 9), scene.t], 1)
    focal, corner = scene.K[:, [0, 1], [0, 1]], scene.K[:, 2]
    with np.errstate(invalid="ignore"):
        orthogonal = abs(scene.R @ scene.R.swapaxes(1, 2) - np.eye(3)).max((1, 2)) < 1e-2
        rotation = orthogonal & (np.linalg.det(np.nan_to_num(scene.R)) > 0)
        pinhole = (focal > 0).all(1) & (corner == (0, 0, 1)).all(1) & (scene.sizes > 0).all(1)
    return np.isfinite(values).all(1) & rotation & pinhole


def candidate_pairs(
    scene: PosedScene, listed: np.ndarray | None, usable: np.ndarray, config: PosedConfig
) -> np.ndarray:
    """(P, 2) from the source that is asked for. Raises DataError where the scene does not have it."""
    source = config.pair_source
    if source == "auto":
        by_tracks = "covisibility" if scene.tracks is not None else "view_angle"
        source = "pairs_txt" if listed is not None else by_tracks  # type: ignore[assignment]
    if source == "pairs_txt":
        if listed is None:
            raise DataError(f"expected pairs.txt in {scene.folder}, found none; write it, or set pair_source: auto")
        return listed
    if source == "covisibility":
        if scene.tracks is None:
            raise DataError(
                f"expected tracks (tracks.npz, or a COLMAP model with points) for {scene.folder}, found none; "
                "set pair_source: view_angle"
            )
        return _upper_pairs(scene.tracks.covisibility() >= config.min_shared)
    angles = view_angles(scene.R)
    return _upper_pairs((angles >= config.min_view_angle) & (angles <= config.max_view_angle) & usable)


def _upper_pairs(chosen: np.ndarray) -> np.ndarray:
    return np.argwhere(np.triu(chosen, 1))


def view_angles(rotations: np.ndarray) -> np.ndarray:
    """(n, n) degrees between the optical axes of cameras (n, 3, 3)."""
    axes = rotations[:, 2]
    return np.rad2deg(np.arccos(np.clip(axes @ axes.T, -1, 1)))


def rotation_angles(scene: PosedScene, pairs: np.ndarray) -> np.ndarray:
    """(P,) degrees of the relative rotation of each pair."""
    r0, r1 = scene.R[pairs[:, 0]], scene.R[pairs[:, 1]]
    cosine = ((r0 * r1).sum((1, 2)) - 1) / 2
    return np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))


def has_baseline(scene: PosedScene, pairs: np.ndarray, usable: np.ndarray, share: float) -> np.ndarray:
    """(P,) bool: the cameras are farther apart than this share of the spread of all cameras of the scene."""
    with np.errstate(invalid="ignore"):
        centres = -(scene.R.swapaxes(1, 2) @ scene.t[..., None])[..., 0]
    known = centres[usable]
    if not len(known):
        return np.zeros(len(pairs), bool)
    spread = np.sqrt(((known - np.median(known, 0)) ** 2).sum(1).mean())
    baseline = np.linalg.norm(centres[pairs[:, 1]] - centres[pairs[:, 0]], axis=1)
    noise = 1e-9 * abs(known).max()  # of identical poses that were stored as text
    return baseline > max(share * spread, noise)


def reprojection_errors(scene: PosedScene, tracks: Tracks) -> np.ndarray:
    """(M,) pixels between each observation and the projection of its point; infinite behind the camera."""
    image = tracks.image_of_row()
    camera = scene.K @ np.concatenate([scene.R, scene.t[..., None]], 2)  # (n, 3, 4)
    points = tracks.points[tracks.pid].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        projected = np.einsum("mij,mj->mi", camera[image, :, :3], points) + camera[image, :, 3]
        errors = np.linalg.norm(projected[:, :2] / projected[:, 2:] - tracks.xy, axis=1)
    return np.where(projected[:, 2] > 0, errors, np.inf)


def thin_out(pairs: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` pairs, a random choice that is always the same, in their order."""
    if len(pairs) <= count:
        return pairs
    return pairs[np.sort(np.random.default_rng(THINNING_SEED).choice(len(pairs), count, replace=False))]
