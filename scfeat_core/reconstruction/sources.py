"""What is reconstructed: images, a file of features, or a replayed sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from scfeat_core.bulk.images import ImageFile, find_images
from scfeat_core.data.pairing import SceneFolder
from scfeat_core.data.posed_images import read_cameras
from scfeat_core.errors import DataError
from scfeat_core.feature_files import h5_names
from scfeat_core.reconstruction.matching import Matcher
from scfeat_core.reconstruction.truth import truth_of
from scfeat_core.replay.records import FrameRecord, Recording
from scfeat_core.types import Camera, Features, Matches


@dataclass(frozen=True, eq=False)
class Source:
    """names: of the images, in the order of time where ``in_order``, unique.

    One of these is there: files, images to extract from, called by their names below the folder ``images``; features, a
    file of those that were extracted; frames, of a replay, features without descriptors and ``tracks`` that match them.
    calibrations: of the images whose camera is known. truth: true poses (4, 4), T_world_camera, of some images.
    """

    names: tuple[str, ...]
    files: tuple[ImageFile, ...] = ()
    images: Path | None = None
    features: Path | None = None
    frames: Sequence[tuple[str, Features]] = ()
    tracks: Matcher | None = None
    in_order: bool = False
    calibrations: Mapping[str, Camera] = field(default_factory=dict)
    truth: Mapping[str, np.ndarray] = field(default_factory=dict)


# -- images ------------------------------------------------------------------------------------------------------------


def folder_source(folder: Path, outside: Path | None = None) -> Source:
    """All images below a folder, with the cameras and poses of its ``cameras.json`` where it has one.

    outside: a folder whose images do not count. Raises DataError where there is no folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"expected a folder of images at {folder}, found none; check the path")
    files = tuple(find_images([folder], outside))
    source = Source(tuple(file.name for file in files), files, folder)
    return with_cameras(source, folder) if (folder / "cameras.json").is_file() else source


def with_cameras(source: Source, folder: Path) -> Source:
    """The source with calibrations and poses of ``cameras.json``, for the images that it lists. Raises DataError."""
    scene = read_cameras(SceneFolder(folder.name, folder))
    calibrations, truth = {}, {}
    for i, name in enumerate(scene.files):
        for called in {name, f"images/{name}"}.intersection(source.names):
            size = (int(scene.sizes[i, 0]), int(scene.sizes[i, 1]))
            calibrations[called] = Camera(scene.K[i], np.zeros(0), size, "")
            truth[called] = _pose(scene.R[i], scene.t[i])
    return replace(source, calibrations=calibrations, truth=truth)


def _pose(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """T_world_camera of x_cam = R X + t."""
    pose = np.eye(4)
    pose[:3, :3] = rotation.T
    pose[:3, 3] = -rotation.T @ translation
    return pose


# -- features ----------------------------------------------------------------------------------------------------------


def features_source(path: Path) -> Source:
    """The images of an HDF5 file of features, as ``scfeat extract --format h5`` and hloc write it. Raises DataError."""
    names = sorted(h5_names(path))
    if not names:
        raise DataError(f"expected features of images in {path}, found none; extract them with --format h5")
    return Source(tuple(names), features=path)


# -- a replay ----------------------------------------------------------------------------------------------------------


def image_name(stamp: int) -> str:
    """What the image of a sequence is called by its stamp (nanoseconds), so that names are in the order of time."""
    return f"{stamp:019d}.png"


def recording_source(recording: Recording, every: int = 1) -> Source:
    """Every n-th processed frame of a replay. Its tracks match frames at any distance.

    Raises DataError where the replay has no tracks, or two frames of one stamp.
    """
    frames, ids, stamps = [], {}, []
    processed = (record for record in recording.frames if not record.dropped)
    for record in islice(processed, 0, None, every):
        name = image_name(record.stamp)
        frames.append((name, _features(record)))
        ids[name] = _track_ids(record)
        stamps.append(record.stamp)
    names = tuple(name for name, _ in frames)
    if len(ids) < len(names):
        raise DataError("expected frames of different stamps, found two of the same; replay the bag with other stamps")
    calibrations = {} if recording.camera is None else dict.fromkeys(names, recording.camera)
    return Source(
        names,
        frames=frames,
        tracks=lambda name0, name1: _common(ids[name0], ids[name1]),
        in_order=True,
        calibrations=calibrations,
        truth=truth_of(names, stamps, recording.truth),
    )


def _features(record: FrameRecord) -> Features:
    nothing = np.zeros((len(record.keypoints), 0), np.float32)
    return Features(record.keypoints, record.scores, nothing, record.image_size)


def _track_ids(record: FrameRecord) -> tuple[np.ndarray, np.ndarray]:
    """Ids (T,) int64, unique over epochs, and the indices (T,) of their keypoints."""
    if record.tracks is None:
        raise DataError(f"expected tracks in each frame of the replay, found none in frame {record.index}")
    return record.tracks.ids.astype(np.int64) | (record.tracks.epoch << 32), np.asarray(record.tracks.indices)


def _common(tracks0: tuple[np.ndarray, np.ndarray], tracks1: tuple[np.ndarray, np.ndarray]) -> Matches:
    """Matches of the points that are of one track, by their index in view 0."""
    _, places0, places1 = np.intersect1d(tracks0[0], tracks1[0], assume_unique=True, return_indices=True)
    index0, index1 = tracks0[1][places0], tracks1[1][places1]
    order = np.argsort(index0, kind="stable")
    return Matches(index0[order], index1[order], np.ones(len(order), np.float32))
