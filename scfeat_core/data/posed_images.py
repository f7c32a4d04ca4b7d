"""Folders of posed images: ``cameras.json``, or a COLMAP model as text.

One scene a folder:

* ``images/``; ``cameras.json``, a list of {file, w, h, K, R, t} with x_cam = R X + t and pixel (0, 0) the centre of the
  top-left pixel; optionally ``pairs.txt`` (two names first in a line) and ``tracks.npz`` (:func:`tracks.read_tracks`);
* or ``images/`` and ``cameras.txt``, ``images.txt``, ``points3D.txt`` beside it, in ``sparse/`` or in ``sparse/0/``.

Images are undistorted in both.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.data.colmap import find_model, read_model
from scfeat_core.data.pairing import SceneFolder, open_scenes
from scfeat_core.data.posed import PosedConfig, PosedPairs, PosedScene
from scfeat_core.data.tracks import read_tracks
from scfeat_core.errors import DataError

log = logging.getLogger(__name__)


def open_posed_images(config: PosedConfig, *, held_back: bool = False) -> PosedPairs:
    """Pairs of the scene or the scenes in ``config.data_path``. Raises DataError where there are none."""
    return open_scenes(find_scenes(config.data_path), read_scene, config, held_back=held_back)


def find_scenes(root: Path) -> list[SceneFolder]:
    """``root`` itself where it is a scene, or the scenes up to two folders below it, in alphabetical order."""
    if not root.is_dir():
        raise DataError(f"expected a folder of scenes at {root}, found none; check data_path")
    if is_scene(root):
        return [SceneFolder(root.name, root)]
    found = []
    for child in sorted(path for path in root.iterdir() if path.is_dir()):
        inner = [child] if is_scene(child) else sorted(path for path in child.iterdir() if path.is_dir())
        found += [SceneFolder(path.relative_to(root).as_posix(), path) for path in inner if is_scene(path)]
    if not found:
        raise DataError(
            f"expected scenes (folders with images and cameras.json, or a COLMAP model) in {root}, found none; "
            "check data_path"
        )
    return found


def is_scene(folder: Path) -> bool:
    """Whether the folder has cameras: cameras.json, or a COLMAP model."""
    return (folder / "cameras.json").is_file() or find_model(folder) is not None


def read_scene(folder: SceneFolder) -> tuple[PosedScene, np.ndarray | None]:
    """A scene without pairs, and those of its pairs.txt. Raises DataError."""
    scene = read_cameras(folder)
    listed = folder.path / "pairs.txt"
    return scene, read_pairs(listed, scene.files) if listed.is_file() else None


def read_cameras(folder: SceneFolder) -> PosedScene:
    """A scene without pairs, of either layout. Raises DataError."""
    return _read_json(folder) if (folder.path / "cameras.json").is_file() else read_model(folder.name, folder.path)


def _read_json(folder: SceneFolder) -> PosedScene:
    path = folder.path / "cameras.json"
    try:
        cameras = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(str(camera["file"]) for camera in cameras)
        sizes = np.array([(camera["w"], camera["h"]) for camera in cameras], np.int32).reshape(-1, 2)
        k, r, t = (_stack(cameras, *part) for part in (("K", (3, 3)), ("R", (3, 3)), ("t", (3,))))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"expected a list of {{file, w, h, K, R, t}} in {path}, found {error!r}; correct it") from error
    tracks_path = folder.path / "tracks.npz"
    tracks = read_tracks(tracks_path, len(files)) if tracks_path.is_file() else None
    return PosedScene(folder.name, folder.path / "images", files, sizes, k, r, t, np.zeros((0, 2), np.int32), tracks)


def _stack(cameras: list[dict[str, Any]], key: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.array([np.array(camera[key], np.float64).reshape(shape) for camera in cameras]).reshape(-1, *shape)


def read_pairs(path: Path, files: tuple[str, ...]) -> np.ndarray:
    """(P, 2) indices into ``files`` of the first two words of each line.

    Lines with images that the scene does not have are left out, with a warning. Raises DataError where none is left.
    """
    index = {name: i for i, name in enumerate(files)}
    try:
        rows = [line.split()[:2] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"expected a readable list of pairs at {path}, found: {error}") from error
    known = [row for row in rows if len(row) == 2 and row[0] in index and row[1] in index]
    unknown = len(rows) - len(known)
    if unknown:
        message = f"expected two images of the scene in each line of {path}, found {unknown} of {len(rows)} without"
        if not known:
            raise DataError(f"{message}; correct the list")
        log.warning("%s; they are left out", message)
    return np.array([[index[name] for name in row] for row in known], np.int64).reshape(-1, 2)
