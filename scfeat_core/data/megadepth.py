"""MegaDepth as CAPS prepared it: undistorted images with cameras and pairs, no tracks.

``<data_path>/<scene>/dense*/aligned/`` holds ``images/``, ``img_cam.txt`` (name w h fx fy cx cy R(9, by rows) t(3) in a
line, x_cam = R X + t) and, optionally, ``pairs.txt`` (two names in a line).

Principal points are taken as they are written: (0, 0) is the centre of the top-left pixel, as everywhere else here. The
files do not say which convention they follow. If the numbers come unchanged from COLMAP, where that centre is
(0.5, 0.5), both views are off by half a pixel of the stored images along each axis, the same way, so that a part of it
cancels between them; the rest is small against the windows in which matches are sought. So nothing is subtracted on
suspicion; ``--check-data`` shows how far SIFT matches are from their epipolar lines.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scfeat_core.data.pairing import SceneFolder, open_scenes
from scfeat_core.data.posed import PosedConfig, PosedPairs, PosedScene
from scfeat_core.data.posed_images import read_pairs
from scfeat_core.errors import DataError


def open_megadepth(config: PosedConfig, *, held_back: bool = False) -> PosedPairs:
    """Pairs of all scenes below ``config.data_path``. Raises DataError where there are none."""
    return open_scenes(find_scenes(config.data_path), read_scene, config, held_back=held_back)


def find_scenes(root: Path) -> list[SceneFolder]:
    """One for each ``<scene>/dense*``, in alphabetical order; those of one ``<scene>`` show the same place."""
    found = sorted(path.parent for path in root.glob("*/dense*/aligned/img_cam.txt"))
    if not found:
        raise DataError(
            f"expected <scene>/dense*/aligned/img_cam.txt in {root}, found none; data_path is the folder of the scenes "
            "(often called train) of MegaDepth as CAPS distributes it"
        )
    names = [path.parent.relative_to(root) for path in found]
    return [SceneFolder(name.as_posix(), path, name.parts[0]) for name, path in zip(names, found, strict=True)]


def read_scene(folder: SceneFolder) -> tuple[PosedScene, np.ndarray | None]:
    """A scene without pairs, and those of its pairs.txt. Raises DataError."""
    path = folder.path / "img_cam.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"expected a readable list of cameras at {path}, found: {error}") from error
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    wrong = next((" ".join(row) for row in rows if len(row) != 19), None)
    try:
        values = np.array([] if wrong else [row[1:] for row in rows], np.float64).reshape(-1, 18)
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise DataError(f"expected name w h fx fy cx cy R(9) t(3) in each line of {path}, found: {wrong}")
    k = np.zeros((len(rows), 3, 3))
    k[:, [0, 1, 0, 1], [0, 1, 2, 2]] = values[:, 2:6]
    k[:, 2, 2] = 1
    files = tuple(row[0] for row in rows)
    sizes, r, t = values[:, :2].astype(np.int32), values[:, 6:15].reshape(-1, 3, 3), values[:, 15:]
    scene = PosedScene(folder.name, folder.path / "images", files, sizes, k, r, t, np.zeros((0, 2), np.int32))
    listed = folder.path / "pairs.txt"
    return scene, read_pairs(listed, files) if listed.is_file() else None
