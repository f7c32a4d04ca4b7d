"""The one pipeline: an image in, features and the matches to the previous image of the same camera out.

The node, the replay of bags and the tests all call :meth:`Frontend.process`. What a camera leaves behind between two
images is its previous frame and the count of its frames, nothing else.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from scfeat_core import matching
from scfeat_core.config import Range, check_config, load_config
from scfeat_core.errors import CalibrationError, StaleImageError
from scfeat_core.extraction import Extractor, Precision
from scfeat_core.two_view import verify
from scfeat_core.types import Array, Camera, Features, FrameResult, PairResult, TwoViewGeometry

# Nanoseconds: images that overtake each other are closer together, clocks that are set and recordings that start again
# go further back.
LATE = 1_000_000_000


@dataclass(frozen=True)
class FrontendConfig:
    """What the front end does; the names and defaults of the node's parameters.

    min_cosine: drop matches whose descriptors have a lower cosine similarity; 0 drops only what is less alike than
    unrelated vectors are. verify: fit a two-view model to the matches and mark the inliers. verification_threshold:
    pixels. The others are those of ``Extractor``.
    """

    weights: str = "lite"
    device: str = "cpu"
    precision: Precision = "float32"
    max_keypoints: Annotated[int, Range(minimum=1)] = 1024
    score_threshold: Annotated[float, Range(minimum=0.0)] = 0.0
    nms_radius: Annotated[int, Range(minimum=0, maximum=64)] = 2
    border: Annotated[int, Range(minimum=0)] = 4
    min_cosine: Annotated[float, Range(minimum=-1.0, maximum=1.0)] = 0.0
    verify: bool = True
    verification_threshold: Annotated[float, Range(above=0.0)] = 1.0

    def __post_init__(self) -> None:
        check_config(self, "front end")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], where: str = "front end") -> FrontendConfig:
        """Raises ConfigError that names an unknown key and the nearest valid one."""
        return load_config(cls, mapping, where)


@dataclass(frozen=True, eq=False)
class _Frame:
    """The last frame of a camera. on_device: features as torch tensors, for matching; features: as numpy arrays."""

    sequence: int
    stamp: int
    on_device: Features
    features: Features
    calibration: Camera | None


class Frontend:
    """Features, matches and two-view geometry of image streams, any number of cameras.

    To be used by one thread at a time, whichever it is. Raises WeightsError, DeviceError, ConfigError.
    """

    def __init__(self, config: FrontendConfig | None = None) -> None:
        self.config = config = FrontendConfig() if config is None else config
        self.extractor = Extractor(
            config.weights,
            config.device,
            config.max_keypoints,
            score_threshold=config.score_threshold,
            nms_radius=config.nms_radius,
            border=config.border,
            precision=config.precision,
        )
        self._previous: dict[str, _Frame] = {}
        self._counts: dict[str, int] = {}

    def warm_up(self, size: tuple[int, int] = (640, 480)) -> None:
        """Run the network once on an image of (width, height), so that the first frame does not pay for it."""
        self.extractor.warm_up(size)

    def reset(self, camera: str | None = None) -> None:
        """Forget the previous frame of a camera, or of all. The next one has no predecessor; its number goes on."""
        if camera is None:
            self._previous.clear()
        else:
            self._previous.pop(camera, None)

    def close(self) -> None:
        """Give the memory on the device back, to other processes, too. Nothing can be processed after that."""
        device = self.extractor.device
        self._previous.clear()
        del self.extractor
        gc.collect()  # what is in a cycle would keep its tensors
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def process(
        self,
        image: Array,
        stamp: int,
        camera: str = "camera",
        calibration: Camera | None = None,
        mask: Array | None = None,
        *,
        match: bool = True,
    ) -> FrameResult:
        """Process the next image of a camera.

        image, mask: as :class:`Extractor` takes them. stamp: nanoseconds. calibration: with it, matches are verified
        by the essential matrix of undistorted rays; without, by the fundamental matrix of pixels, which is only right
        for images without much distortion. match: False spares the work where nobody asks for matches.

        Stamps must increase. One that equals the previous one, or lies less than a second (LATE) before it, is that of
        an image which was sent twice or came too late. One that lies further back says that a clock was set or that a
        recording starts again: it resets the camera, as another image size does; ``reset_reason`` then says why.

        Raises StaleImageError for a late image, ImageError for one that cannot be used, and CalibrationError for the
        calibration of another image size; all leave the camera as it was.
        """
        self._check_order(camera, stamp)
        on_device = self.extractor(image, mask, to_numpy=False)
        timings = dict(self.extractor.timings)
        start = time.perf_counter()
        features = on_device.numpy()  # waits for the device, where there is one
        timings["select"] += 1e3 * (time.perf_counter() - start)
        _check_size(calibration, features.image_size)
        previous, reset_reason = self._predecessor(camera, stamp, features)
        sequence = self._counts.get(camera, 0)
        frame = _Frame(sequence, stamp, on_device, features, calibration)
        pair = self._match(previous, frame, timings) if match and previous is not None else None
        self._previous[camera] = frame
        self._counts[camera] = sequence + 1
        return FrameResult(camera, sequence, stamp, features, pair, timings, reset_reason)

    def _check_order(self, camera: str, stamp: int) -> None:
        previous = self._previous.get(camera)
        if previous is None or not 0 <= (back := previous.stamp - stamp) < LATE:
            return
        found = f"one {1e-9 * back:.3f} s older" if back else f"the same stamp again ({1e-9 * stamp:.3f} s)"
        raise StaleImageError(
            f"expected an image newer than the previous one of camera '{camera}', found {found}: images overtake each "
            "other or come twice, two publishers share the topic, or the driver sets no stamps"
        )

    def _predecessor(self, camera: str, stamp: int, features: Features) -> tuple[_Frame | None, str]:
        """The previous frame, or none and the reason for a reset."""
        previous = self._previous.get(camera)
        if previous is None:
            return None, ""
        if stamp < previous.stamp:
            back = 1e-9 * (previous.stamp - stamp)
            return None, f"stamp went back by {back:.3f} s: a clock was set, or a recording starts again"
        old, new = previous.features.image_size, features.image_size
        if old != new:
            return None, f"image size changed from {old[0]}x{old[1]} to {new[0]}x{new[1]}"
        return previous, ""

    def _match(self, previous: _Frame, frame: _Frame, timings: dict[str, float]) -> PairResult:
        start = time.perf_counter()
        matches = matching.match(previous.on_device, frame.on_device, min_cosine=self.config.min_cosine).numpy()
        keypoints0 = previous.features.keypoints[matches.indices0]
        keypoints1 = frame.features.keypoints[matches.indices1]
        matched = time.perf_counter()
        timings["match"] = 1e3 * (matched - start)
        geometry: TwoViewGeometry | None = None
        if self.config.verify:
            cameras = None
            if previous.calibration is not None and frame.calibration is not None:
                cameras = (previous.calibration, frame.calibration)
            geometry = verify(
                keypoints0,
                keypoints1,
                threshold=self.config.verification_threshold,
                model="fundamental" if cameras is None else "essential",
                cameras=cameras,
            )
            timings["verify"] = 1e3 * (time.perf_counter() - matched)
        return PairResult(previous.sequence, previous.stamp, matches, keypoints0, keypoints1, geometry)


def _check_size(calibration: Camera | None, image_size: tuple[int, int]) -> None:
    if calibration is not None and tuple(calibration.size) != image_size:
        raise CalibrationError(
            f"expected the calibration of images of {image_size[0]}x{image_size[1]}, found one for "
            f"{calibration.size[0]}x{calibration.size[1]}: give that of this camera, scaled as its images are"
        )
