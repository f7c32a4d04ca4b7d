"""What scfeat is measured beside: the detectors of OpenCV, and any callable ``(image, max_keypoints) -> features``.

A callable with a parameter ``device`` is told where to run, and is then held to what scfeat is measured on.
OpenCV's are told the budget, as a user who wants that many points would: SIFT and ORB then describe only those. Their
thresholds are those of ``scfeat evaluate``, low enough for the budget to be reached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np

from scfeat_core.bench.images import walk
from scfeat_core.bench.settings import Case
from scfeat_core.bench.timing import Contender, Task
from scfeat_core.errors import ConfigError, DataError
from scfeat_core.evaluation.methods import AKAZE_THRESHOLD, ORB_FAST_THRESHOLD, SIFT_CONTRAST, create_method

Peer = Callable[..., Any]


def _detector(name: str, budget: int) -> Any:
    """Raises ConfigError where this OpenCV has none of that name."""
    if name == "sift":
        return cv2.SIFT.create(nfeatures=budget, contrastThreshold=SIFT_CONTRAST)
    if name == "orb":
        return cv2.ORB.create(nfeatures=budget, fastThreshold=ORB_FAST_THRESHOLD)
    home: Any = cv2 if hasattr(cv2, "AKAZE_create") else getattr(cv2, "xfeatures2d", None)  # in contrib since 5.0
    if not hasattr(home, "AKAZE_create"):
        raise ConfigError(f"OpenCV {cv2.__version__} has no AKAZE; install opencv-contrib-python or opencv-python<5")
    return _limited_akaze(home, budget)


def _limited_akaze(home: Any, budget: int) -> Any:
    try:
        return home.AKAZE_create(threshold=AKAZE_THRESHOLD, max_points=budget)
    except TypeError:  # before OpenCV 4.7
        return home.AKAZE_create(threshold=AKAZE_THRESHOLD)


OPENCV = ("sift", "orb", "akaze")


def create_opencv(name: str, case: Case, images: Sequence[np.ndarray]) -> Contender:
    """Raises ConfigError where this OpenCV has none of that name."""
    detector = _detector(name, case.budget)

    def detect(image: np.ndarray, budget: int) -> Any:
        return detector.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)

    return _contender(f"opencv {name}", "opencv", detect, case, images)


def load_peer(name: str) -> Peer:
    """The callable behind ``module:callable``. Raises ConfigError where there is none."""
    if ":" not in name:
        raise ConfigError(f"expected a peer as 'module:callable', found '{name}'")
    return create_method(name)


def create_peer(name: str, case: Case, images: Sequence[np.ndarray], device: str) -> Contender:
    """device: for those that take one; the others have none among their facts. Raises ConfigError where there is no
    such callable."""
    peer = load_peer(name)
    if not takes_device(peer):
        return _contender(name, "peer", peer, case, images)
    return _contender(name, "peer", partial(peer, device=device), case, images, {"device": device})


def takes_device(peer: Peer) -> bool:
    """Whether it can be told where to run."""
    try:
        return "device" in inspect.signature(peer).parameters
    except ValueError:  # of what is not written in Python
        return False


def _contender(
    name: str,
    kind: str,
    peer: Peer,
    case: Case,
    images: Sequence[np.ndarray],
    facts: Mapping[str, object] | None = None,
) -> Contender:
    calls = _Calls(name, peer, case, images)
    return Contender(name, kind, [Task("extract", calls.run)], facts or {}, calls.found)


class _Calls:
    """One image after the other: a callable knows no batches."""

    def __init__(self, name: str, peer: Peer, case: Case, images: Sequence[np.ndarray]) -> None:
        self._name, self._peer, self._case, self._images = name, peer, case, images
        self._turns = walk(len(images))
        self._points: list[int | None] = []

    def run(self) -> None:
        start = next(self._turns)
        count = len(self._images)
        found = [
            self._peer(self._images[(start + index) % count], self._case.budget) for index in range(self._case.batch)
        ]
        if any(each is None for each in found):
            raise DataError(f"expected '{self._name}' to return its features, found None: did it do the work?")
        self._points = [count_points(each) for each in found]

    def found(self) -> dict[str, float | None]:
        known = [points for points in self._points if points is not None]
        return {"points": float(np.mean(known)) if known else None}


def count_points(found: Any) -> int | None:
    """Of whatever a callable returns: ``.keypoints``, ``["keypoints"]``, or the first of several; None where nothing of
    that kind is there."""
    if isinstance(found, Mapping):
        found = found.get("keypoints")
    else:
        found = getattr(found, "keypoints", found)
    if isinstance(found, tuple) and found:
        found = found[0]
    try:
        return len(found)
    except TypeError:
        return None
