"""Incremental mapping by pycolmap, with the figures of ETH's local feature benchmark (Schönberger et al., CVPR 2017).

As deterministic as COLMAP is: one thread, seeds fixed. The same database gives the same model.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import ScfeatError
from scfeat_core.reconstruction.cameras import Cameras, require_pycolmap
from scfeat_core.reconstruction.matching import MIN_INLIERS

SEED = 0
MIN_MODEL_IMAGES = 3  # COLMAP keeps a first model of two
_SCRATCH = ".sparse-"


@dataclass(frozen=True, eq=False)
class Model:
    """One reconstruction. poses: name of a registered image -> (4, 4) T_world_camera, up to a similarity.

    points: in space. observations: of these in images. reprojection_error: pixels, mean of the points, each the mean of
    its observations. focal_lengths: in x, pixels, after bundle adjustment, of each camera that was used.
    """

    poses: Mapping[str, np.ndarray]
    points: int
    observations: int
    reprojection_error: float
    focal_lengths: tuple[float, ...]

    @property
    def track_length(self) -> float:
        """Mean number of images in which a point is seen; NaN without points."""
        return self.observations / self.points if self.points else float("nan")


def reconstruct(
    database: Path,
    images: Path | None,
    output: Path,
    cameras: Cameras,
    registered: Callable[[], None] = lambda: None,
) -> list[Model]:
    """Map incrementally; the models, those with most images first, lie as text in ``output``/0, /1 and so on.

    images: folder from which the points get their colours; None: they stay black. output: replaced. cameras:
    calibrated ones are kept as they are, guessed ones refined. registered: called with each image after the first two.
    An empty list where nothing could be reconstructed. Raises ScfeatError.
    """
    pycolmap = require_pycolmap()
    options = _options(pycolmap, cameras, colours=images is not None)
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f"{_SCRATCH}*"):  # by a mapping that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=_SCRATCH) as scratch, _quiet(pycolmap):
        try:
            pycolmap.set_random_seed(SEED)
            found = pycolmap.incremental_mapping(
                database, images or Path(), scratch, options=options, next_image_callback=registered
            )
        except (RuntimeError, ValueError) as error:
            raise ScfeatError(
                f"expected pycolmap to map {database}, found: {error}; write the database again"
            ) from error
        models = [model for _, model in sorted(found.items()) if model.num_reg_images() >= MIN_MODEL_IMAGES]
        models.sort(key=lambda model: -model.num_reg_images())
        _write(output, models)
    return [_summarise(model) for model in models]


def _options(pycolmap: Any, cameras: Cameras, colours: bool) -> Any:
    options = pycolmap.IncrementalPipelineOptions()
    options.num_threads = options.mapper.num_threads = 1
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = SEED
    options.min_num_matches = MIN_INLIERS
    options.min_model_size = MIN_MODEL_IMAGES
    options.mapper.init_max_forward_motion = 1.0  # vehicles drive forward; COLMAP would begin with no pair of theirs
    options.extract_colors = colours
    fixed = {number for number, camera in enumerate(cameras.cameras, 1) if camera.calibration is not None}
    options.constant_cameras = options.mapper.constant_cameras = fixed
    if len(fixed) == len(cameras.cameras):  # the search for the pose of an image would refine them, too
        options.ba_refine_focal_length = options.ba_refine_extra_params = False
        options.mapper.abs_pose_refine_focal_length = options.mapper.abs_pose_refine_extra_params = False
    return options


def _write(output: Path, models: list[Any]) -> None:
    if output.exists():
        shutil.rmtree(output)
    for number, model in enumerate(models):
        folder = output / str(number)
        folder.mkdir(parents=True)
        model.write_text(folder)


def _summarise(model: Any) -> Model:
    images = [model.image(number) for number in model.reg_image_ids()]
    cameras = sorted({image.camera_id for image in images})
    return Model(
        poses={image.name: _pose(image) for image in sorted(images, key=lambda image: image.name)},
        points=model.num_points3D(),
        observations=model.compute_num_observations(),
        reprojection_error=float(model.compute_mean_reprojection_error()),
        focal_lengths=tuple(float(model.camera(number).focal_length_x) for number in cameras),
    )


def _pose(image: Any) -> np.ndarray:
    pose = np.eye(4)
    pose[:3] = image.cam_from_world().inverse().matrix()
    return pose


@contextmanager
def _quiet(pycolmap: Any) -> Iterator[None]:
    """Without COLMAP's lines on stderr."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = int(pycolmap.logging.Level.FATAL)
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = before
