"""The way of many images: decoded ahead, in batches of one size through the network, to a writer. One process."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np

from scfeat_core.bulk.images import Decoded, ImageFile, Undecoded, decode_ahead, group_by_size
from scfeat_core.bulk.outputs import Output, Writer
from scfeat_core.errors import DeviceError, ImageError
from scfeat_core.evaluation.methods import SIFT_CONTRAST
from scfeat_core.extraction import Extractor
from scfeat_core.types import Features

GPU_BATCH = 8  # where none is given; on a CPU a batch gains nothing and holds memory
_WAITING_BATCHES = 4  # images of other sizes that may wait for their batch to fill


@dataclass(frozen=True)
class Settings:
    """All that decides what is extracted, and how; plain data, for other processes.

    options: of the Extractor. use_sift: descriptors at the positions of SIFT instead of the detector's. batch_size 0:
    GPU_BATCH on a GPU, else 1. decoders: threads that decode ahead.
    """

    weights: str = "lite"
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)
    use_sift: bool = False
    batch_size: int = 0
    decoders: int = 2

    def create(self) -> Extractor:
        """Raises WeightsError, DeviceError, ConfigError."""
        return Extractor(self.weights, self.device, **self.options)


class Outcome(NamedTuple):
    """What became of an image. error: empty where all is well."""

    name: str
    keypoints: int
    error: str


def extract_images(
    files: Iterable[ImageFile], settings: Settings, extractor: Extractor, output: Output
) -> Generator[Outcome, None, None]:
    """Extract and write, image by image; outcomes come as they are, in the order of the batches.

    An image that cannot be decoded or extracted is an outcome with an error. Raises ScfeatError where nothing can be
    written. What is complete is kept, also where the caller stops asking.
    """
    batch_size = settings.batch_size or (1 if extractor.device.type == "cpu" else GPU_BATCH)
    failed: list[Undecoded] = []
    decoded = decode_ahead(files, settings.decoders, 2 * max(settings.decoders, batch_size))
    with contextlib.closing(decoded), contextlib.closing(output.writer()) as writer:
        for batch in group_by_size(decoded, batch_size, _WAITING_BATCHES * batch_size, failed.append):
            yield from _failures(failed)
            yield from _extract_batch(batch, settings, extractor, writer)
        yield from _failures(failed)


def _failures(failed: list[Undecoded]) -> Iterator[Outcome]:
    for file, reason in failed:
        yield Outcome(file.name, 0, str(reason))
    failed.clear()


def _extract_batch(
    batch: Sequence[Decoded], settings: Settings, extractor: Extractor, writer: Writer
) -> Iterator[Outcome]:
    """One by one where the batch as a whole is refused: too large for the device, or with one bad image in it."""
    try:
        results = _features([decoded.image for decoded in batch], settings, extractor)
    except (ImageError, DeviceError) as error:
        if len(batch) == 1:
            yield Outcome(batch[0].file.name, 0, str(error))
            return
        for decoded in batch:
            yield from _extract_batch([decoded], settings, extractor, writer)
        return
    for decoded, features in zip(batch, results, strict=True):
        writer.add(decoded.file.name, decoded.image, features, _uncertainty(features, extractor.options.max_edge))
        yield Outcome(decoded.file.name, len(features), "")


def _features(images: list[Any], settings: Settings, extractor: Extractor) -> list[Features]:
    if not settings.use_sift:
        return extractor.extract_batch(images)
    return [_features_at_sift(image, extractor) for image in images]


def _features_at_sift(image: np.ndarray, extractor: Extractor) -> Features:
    """Each position once, however many orientations SIFT has there; the strongest first."""
    found = cv2.SIFT.create(contrastThreshold=SIFT_CONTRAST).detect(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
    points = np.array([keypoint.pt for keypoint in found], np.float32).reshape(-1, 2)
    scores = np.array([keypoint.response for keypoint in found], np.float32)
    order = np.argsort(-scores, kind="stable")
    _, first = np.unique(points[order], axis=0, return_index=True)
    best = order[np.sort(first)][: extractor.options.max_keypoints or None]
    size = (image.shape[1], image.shape[0])
    descriptors = extractor.describe(image, points[best])
    return Features(points[best], scores[best], descriptors, size, extractor.descriptor_space)


def _uncertainty(features: Features, max_edge: int) -> float:
    """One pixel of the image that the network saw, in pixels of the image that was given."""
    return max(1.0, max(features.image_size) / max_edge) if max_edge else 1.0
