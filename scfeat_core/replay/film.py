"""Tracks over the images of a replay: a short film, and a strip of single frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from scfeat_core.drawing import Tails, draw_frame
from scfeat_core.replay.records import FrameRecord
from scfeat_core.types import Features, FrameResult

Pictures = Callable[
    [Sequence[int]], dict[int, np.ndarray]
]  # indices of images -> (H, W, 3) uint8 of those that are there

LONGEST = 40  # pictures of a film
LARGEST = 1_900_000  # bytes of it
STRIP = 6  # pictures of a strip
TAIL = 12  # frames
_STEP = 2  # frames between two pictures of the film at most, or motion cannot be followed
_WIDTH = 520  # pixels of a picture of the film
_MOST_TRACKS = 300  # drawn in a picture, the oldest ones: more hide the image, and make the film large
_QUALITIES = (60, 35, 15)


@dataclass(frozen=True, eq=False)
class Film:
    """content: an animated WebP; empty where OpenCV cannot write one. first, last: indices of its images. slower: how
    many times slower than the camera it plays."""

    content: bytes
    first: int
    last: int
    slower: float


def film_frames(frames: Sequence[FrameRecord]) -> list[int]:
    """Places of those for a film: the middle of a long recording, all of a short one."""
    alike = _alike(frames)
    step = min(_STEP, max(1, -(-len(alike) // LONGEST)))
    start = max(0, (len(alike) - step * LONGEST) // 2)
    return alike[start : start + step * LONGEST : step]


def strip_frames(frames: Sequence[FrameRecord]) -> list[int]:
    """Places of some that are spread over the recording."""
    alike = _alike(frames)
    spread = np.unique(np.linspace(0, max(len(alike) - 1, 0), STRIP).round().astype(int))
    return [alike[place] for place in spread] if alike else []


def _alike(frames: Sequence[FrameRecord]) -> list[int]:
    """Those of the size that most images have, and with tracks."""
    sizes = {place: frame.image_size for place, frame in enumerate(frames) if frame.tracks is not None}
    usual = max((counts := Counter(sizes.values())), key=counts.__getitem__, default=None)
    return [place for place, size in sizes.items() if size == usual]


def draw_tracks(
    frames: Sequence[FrameRecord], places: Sequence[int], images: Mapping[int, np.ndarray], width: int = _WIDTH
) -> dict[int, np.ndarray]:
    """Pictures (h, w, 3) uint8 RGB, at most so wide, of tracks with their tails, by place; where the image is there."""
    needed = {before for place in places for before in range(max(place - TAIL + 1, 0), place + 1)}
    wanted, tails, drawn = set(places), Tails(TAIL), {}
    for place in sorted(needed):
        frame = frames[place]
        if frame.dropped:
            continue
        if frame.tracks is None or frame.reset_reason:
            tails.clear()
        if frame.tracks is None:
            continue
        tails.add(frame.tracks)
        if place in wanted and frame.index in images:
            drawn[place] = _narrowed(_drawn(frame, images[frame.index], tails.lines(frame.tracks)), width)
    return drawn


def _drawn(frame: FrameRecord, image: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """The oldest tracks, by their lines (T, L, 2)."""
    tracks = frame.tracks
    assert tracks is not None
    kept = np.sort(np.argsort(-tracks.ages.astype(np.int64), kind="stable")[:_MOST_TRACKS])
    fewer = replace(
        tracks,
        ids=tracks.ids[kept],
        ages=tracks.ages[kept],
        indices=np.arange(len(kept)),
        keypoints=tracks.keypoints[kept],
    )
    shown = replace(frame, tracks=fewer, keypoints=tracks.keypoints[kept], scores=np.zeros(len(kept), np.float32))
    return draw_frame(image, frame_result(shown), ("tracks",), tails=lines[kept])


def frame_result(frame: FrameRecord) -> FrameResult:
    """A record as what the front end gave, without descriptors."""
    count = len(frame.keypoints)
    features = Features(frame.keypoints, frame.scores, np.zeros((count, 0), np.float32), frame.image_size)
    return FrameResult(
        "camera", frame.sequence, frame.stamp, features, frame.pair, tracks=frame.tracks, quality=frame.quality
    )


def make_film(frames: Sequence[FrameRecord], drawn: Mapping[int, np.ndarray]) -> Film | None:
    """A film of what :func:`draw_tracks` drew, none of less than two pictures. Not smaller than LARGEST: without."""
    places = sorted(drawn)
    if len(places) < 2:
        return None
    seconds = 1e-9 * (frames[places[-1]].stamp - frames[places[0]].stamp) / (len(places) - 1)
    shown = max(2 * seconds, 0.1)
    content = _encoded([drawn[place] for place in places], round(1000 * shown))
    first, last = frames[places[0]].index, frames[places[-1]].index
    return Film(content, first, last, shown / seconds if seconds > 0 else 1.0) if content else None


def _encoded(pictures: Sequence[np.ndarray], milliseconds: int) -> bytes:
    """As an animated WebP, in the best quality that is small enough; empty where there is none."""
    if not hasattr(cv2, "imencodeanimation"):  # OpenCV before 4.12
        return b""
    film = cv2.Animation(0, (0, 0, 0, 0))
    film.frames = [cv2.cvtColor(picture, cv2.COLOR_RGB2BGRA) for picture in pictures]
    film.durations = [milliseconds] * len(pictures)
    for quality in _QUALITIES:
        done, content = cv2.imencodeanimation(".webp", film, [cv2.IMWRITE_WEBP_QUALITY, quality])
        if done and len(content) <= LARGEST:
            return bytes(content)
    return b""


def _narrowed(picture: np.ndarray, width: int) -> np.ndarray:
    if picture.shape[1] <= width:
        return picture
    height = max(round(picture.shape[0] * width / picture.shape[1]), 1)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
