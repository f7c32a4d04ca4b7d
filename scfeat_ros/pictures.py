"""Debug pictures: sensor_msgs/Image, and foxglove_msgs/ImageAnnotations where that package is installed."""

from __future__ import annotations

import math
from collections.abc import Collection
from importlib import import_module
from typing import Any

import cv2
import numpy as np
from sensor_msgs.msg import Image

from scfeat_core.drawing import AGE_COLOURS, LAYERS, LOOSE, Colour, Tails, age_classes, draw_frame, match_colours
from scfeat_core.types import Array, FrameResult

TAIL = 12  # frames


def foxglove_module() -> Any:
    """The module with the messages of foxglove_msgs; None where the package is not installed."""
    try:
        return import_module("foxglove_msgs.msg")
    except ImportError:
        return None


def wants_scores(layers: Collection[str]) -> bool:
    """Whether these layers need ``FrameInput.score_map``."""
    return "scores" in layers


class Pictures:
    """The pictures of one camera, with the latest positions of its tracks. For one thread.

    layers: of scfeat_core.drawing.LAYERS; may be replaced at any time.
    """

    def __init__(self, layers: Collection[str] = LAYERS) -> None:
        self.layers = layers
        self._tails = Tails(TAIL)

    def follow(self, result: FrameResult) -> None:
        """Take note of a frame, whether there will be a picture of it or not; to be called once for each, in order."""
        if result.reset_reason:
            self.reset()
        if result.tracks is not None:
            self._tails.add(result.tracks)

    def reset(self) -> None:
        """Forget where the tracks were."""
        self._tails.clear()

    def image(
        self, pixels: np.ndarray, result: FrameResult, header: Any, mask: Array | None = None, ms: float = math.nan
    ) -> Image:
        """bgr8 picture of the frame that was followed last (see draw_frame for its size).

        pixels: (H, W) or (H, W, 3) RGB, as image_to_array gives them. header: of the image, taken over. mask: (H, W),
        non-zero = kept. ms: milliseconds that the frame took, for the caption.
        """
        text = caption(result, ms)
        picture = draw_frame(pixels, result, self.layers, tails=self._lines(result), mask=mask, text=text)
        return picture_to_message(picture, header)

    def annotations(self, foxglove: Any, result: FrameResult, header: Any, ms: float = math.nan) -> Any:
        """The layers ``matches`` and ``tracks`` as foxglove_msgs/ImageAnnotations over the source image."""
        text = caption(result, ms)
        return annotations_to_message(foxglove, result, header.stamp, self.layers, tails=self._lines(result), text=text)

    def _lines(self, result: FrameResult) -> np.ndarray | None:
        return None if result.tracks is None else self._tails.lines(result.tracks)


def caption(result: FrameResult, ms: float = math.nan) -> str:
    """The line of text in a picture: what the frame has, and no more."""
    words = [f"{result.camera} #{result.sequence}", f"{len(result.features)} points"]
    if result.pair is not None:
        words.append(f"{len(result.pair.matches)} matches")
        words += [] if result.pair.geometry is None else [f"{result.pair.geometry.num_inliers} inliers"]
    words += [] if result.tracks is None else [f"{len(result.tracks)} tracks"]
    words += [f"{ms:.1f} ms"] if math.isfinite(ms) else []
    return "   ".join(words)


def picture_to_message(picture: np.ndarray, header: Any) -> Image:
    """picture: (H, W, 3) RGB uint8. Returns bgr8 with that header."""
    height, width, _ = picture.shape
    message = Image(header=header, height=height, width=width, encoding="bgr8", step=3 * width)
    message.data.frombytes(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR).data)
    return message


def annotations_to_message(
    foxglove: Any,
    result: FrameResult,
    stamp: Any,
    layers: Collection[str] = LAYERS,
    *,
    tails: np.ndarray | None = None,
    text: str = "",
) -> Any:
    """A frame as foxglove_msgs/ImageAnnotations, in the colours of ``draw_frame``.

    foxglove: the module with the message classes (see foxglove_module). stamp: of the image, by which the viewer finds
    it. tails: (T, L, 2) pixels. The points of the message start at the corner of the top-left pixel, ours at its
    centre.
    """
    message = foxglove.ImageAnnotations()
    make = _Maker(foxglove, stamp)
    message.points.append(make.points(result.features.keypoints, LOOSE, 2.0))
    if "tracks" in layers and result.tracks is not None:
        classes = age_classes(result.tracks.ages)
        ways = result.tracks.keypoints[:, None] if tails is None else tails[:, _spread(tails.shape[1])]
        for i, colour in enumerate(AGE_COLOURS):
            message.points += make.ways(ways[classes == i], colour)
    if "matches" in layers and result.pair is not None:
        ways = np.stack([result.pair.keypoints1, result.pair.keypoints0], axis=1)
        for chosen, colour in match_colours(result.pair):
            message.points += make.ways(ways[chosen], colour)
    if text:
        message.texts.append(make.text(text, result.features.image_size))
    return message


def _spread(length: int, limit: int = 4) -> np.ndarray:
    """At most ``limit`` of so many positions, the first and the last included: a point is an object in a message."""
    return np.unique(np.linspace(0, length - 1, limit).round().astype(int))


class _Maker:
    """Makes the annotations of one image."""

    def __init__(self, foxglove: Any, stamp: Any) -> None:
        self._foxglove = foxglove
        self._stamp = stamp

    def ways(self, ways: np.ndarray, colour: Colour) -> list[Any]:
        """ways: (n, L, 2) pixels, newest first: a disc at the newest position, and the line to it."""
        if len(ways) == 0:
            return []
        segments = np.stack([ways[:, :-1], ways[:, 1:]], axis=2)
        kind = self._foxglove.PointsAnnotation.LINE_LIST
        return [self._annotation(kind, segments, colour, 1.0), self.points(ways[:, 0], colour, 4.0)]

    def points(self, keypoints: np.ndarray, colour: Colour, size: float) -> Any:
        """A disc at each of (n, 2) pixels."""
        return self._annotation(self._foxglove.PointsAnnotation.POINTS, keypoints, colour, size)

    def text(self, text: str, image_size: tuple[int, int]) -> Any:
        """At the bottom left of the image."""
        foxglove, size = self._foxglove, max(image_size[1] / 32, 8.0)
        return foxglove.TextAnnotation(
            timestamp=self._stamp,
            position=foxglove.Point2(x=size / 2, y=image_size[1] - size / 2),
            text=text,
            font_size=size,
            text_color=self._colour((235, 235, 235)),
            background_color=self._colour((0, 0, 0), 0.6),
        )

    def _annotation(self, kind: int, points: np.ndarray, colour: Colour, thickness: float) -> Any:
        shown = self._colour(colour)
        rows = (points.reshape(-1, 2) + 0.5).astype(float).tolist()
        return self._foxglove.PointsAnnotation(
            timestamp=self._stamp,
            type=kind,
            points=[self._foxglove.Point2(x=x, y=y) for x, y in rows],  # objects: nothing else goes in there
            outline_color=shown,
            fill_color=shown,
            thickness=thickness,
        )

    def _colour(self, colour: Colour, alpha: float = 1.0) -> Any:
        red, green, blue = (value / 255 for value in colour)
        return self._foxglove.Color(r=red, g=green, b=blue, a=alpha)
