"""A COLMAP database of images, keypoints, matches and two-view geometries, without descriptors.

COLMAP's descriptors are of SIFT and ALIKED, and it has no kind for others; its mapper needs none. Keypoints are moved
by half a pixel to COLMAP's origin, and with them the matrices that act on pixels.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.feature_files import replaced
from scfeat_core.reconstruction.cameras import PIXEL_ORIGIN, Cameras, ColmapCamera, require_pycolmap
from scfeat_core.reconstruction.hloc import MatchedPair
from scfeat_core.types import GeometryModel, TwoViewGeometry

_SHIFT_BACK = np.array([[1, 0, -PIXEL_ORIGIN], [0, 1, -PIXEL_ORIGIN], [0, 0, 1]])  # pixels of COLMAP to ours
_SHIFT = np.array([[1, 0, PIXEL_ORIGIN], [0, 1, PIXEL_ORIGIN], [0, 0, 1]])
_CONFIGURATIONS = {
    GeometryModel.NONE: "DEGENERATE",
    GeometryModel.FUNDAMENTAL: "UNCALIBRATED",
    GeometryModel.ESSENTIAL: "CALIBRATED",
    GeometryModel.HOMOGRAPHY: "PLANAR_OR_PANORAMIC",
}


def write_database(
    path: Path, keypoints: Mapping[str, np.ndarray], cameras: Cameras, pairs: Iterable[MatchedPair]
) -> None:
    """A new database, which appears once it is complete. Deterministic.

    keypoints: name of an image -> (N, 2) pixels, (0, 0) the centre of the top-left one; ids count from 1 in this order.
    Raises DataError where there is a file already, ScfeatError where it cannot be written or pycolmap is missing.
    """
    pycolmap = require_pycolmap()
    if path.exists():
        raise DataError(f"expected no file at {path}, found one; remove it, or write to another folder")
    with replaced(path) as scratch:
        try:
            with pycolmap.Database.open(scratch) as database, pycolmap.DatabaseTransaction(database):
                _write(pycolmap, database, keypoints, cameras, pairs)
            _leave_log_mode(scratch)
        except (RuntimeError, sqlite3.Error) as error:
            raise ScfeatError(
                f"expected to write {path}, found: {error}; free space, or choose another folder"
            ) from error


def _write(
    pycolmap: Any, database: Any, keypoints: Mapping[str, np.ndarray], cameras: Cameras, pairs: Iterable[MatchedPair]
) -> None:
    for number, camera in enumerate(cameras.cameras, 1):
        _write_camera(pycolmap, database, number, camera)
    ids = {name: number for number, name in enumerate(keypoints, 1)}
    for name, points in keypoints.items():
        _write_image(pycolmap, database, ids[name], name, cameras.of_image[name] + 1)
        database.write_keypoints(ids[name], points.astype(np.float32) + np.float32(PIXEL_ORIGIN))
    for pair in pairs:
        id0, id1 = (ids[name] for name in pair.names)
        indices = np.stack([pair.matches.indices0, pair.matches.indices1], 1).astype(np.uint32)
        database.write_matches(id0, id1, indices)
        if pair.geometry is not None:
            database.write_two_view_geometry(id0, id1, _geometry(pycolmap, pair.geometry, indices))


def _write_camera(pycolmap: Any, database: Any, number: int, camera: ColmapCamera) -> None:
    """With the rig of this one sensor, without which COLMAP from 3.12 on registers nothing."""
    stored = pycolmap.Camera(
        camera_id=number,
        model=camera.model,
        width=camera.size[0],
        height=camera.size[1],
        params=camera.params,
        has_prior_focal_length=camera.prior,
    )
    database.write_camera(stored, use_camera_id=True)
    rig = pycolmap.Rig(rig_id=number)
    rig.add_ref_sensor(stored.sensor_id)
    database.write_rig(rig, use_rig_id=True)


def _write_image(pycolmap: Any, database: Any, number: int, name: str, camera: int) -> None:
    image = pycolmap.Image(name=name, camera_id=camera, image_id=number)
    database.write_image(image, use_image_id=True)
    frame = pycolmap.Frame(frame_id=number, rig_id=camera)
    frame.add_data_id(image.data_id)
    database.write_frame(frame, use_frame_id=True)


def _geometry(pycolmap: Any, geometry: TwoViewGeometry, indices: np.ndarray) -> Any:
    stored = pycolmap.TwoViewGeometry()
    stored.config = int(getattr(pycolmap.TwoViewGeometryConfiguration, _CONFIGURATIONS[geometry.model]))
    stored.inlier_matches = indices[geometry.inliers]
    if geometry.model == GeometryModel.FUNDAMENTAL:
        stored.F = _SHIFT_BACK.T @ geometry.matrix @ _SHIFT_BACK
    elif geometry.model == GeometryModel.ESSENTIAL:
        stored.E = geometry.matrix
    elif geometry.model == GeometryModel.HOMOGRAPHY:
        stored.H = _SHIFT @ geometry.matrix @ _SHIFT_BACK
    return stored


def _leave_log_mode(path: Path) -> None:
    """One file, as everything is in it, that can be renamed and read where nothing can be written."""
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA journal_mode=DELETE")
    finally:
        connection.close()
