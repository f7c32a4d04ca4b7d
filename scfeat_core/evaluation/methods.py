"""What is measured: callables ``(image (H, W, 3) uint8 RGB, max_keypoints) -> Features``, and how to match those.

Features come best first, and the first n of a larger budget must be what a budget of n gives.

Features with unsigned 8-bit descriptors are binary and compared by the Hamming distance; all others have unit rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import cv2
import numpy as np

from scfeat_core.errors import ConfigError, DataError
from scfeat_core.types import Features

Method = Callable[[np.ndarray, int], Features]

SIFT_CONTRAST = 0.005
ORB_FAST_THRESHOLD = 5
AKAZE_THRESHOLD = 1e-4
# The best n of a larger budget are not what a budget of n gives: ORB shares it out over octaves before it ranks.
BUDGET_CHANGES_FEATURES = ("orb",)


def create_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method called ``name``: sift, rootsift, orb, akaze, scfeat, or ``module:callable``.

    options: for scfeat, keywords of the Extractor; for ``module:callable``, keywords of each call.
    Raises ConfigError for a name that stands for nothing.
    """
    options = dict(options or {})
    if ":" in name:
        return _imported(name, options)
    if name == "scfeat":
        return _scfeat(options)
    if name not in _CLASSICAL:
        raise ConfigError(_unknown(name))
    if options:
        raise ConfigError(f"method '{name}' takes no options, found {', '.join(options)}")
    return _CLASSICAL[name]


def match_features(features0: Features, features1: Features) -> tuple[np.ndarray, np.ndarray]:
    """Indices (M,), (M,) int64 of the mutual nearest neighbours."""
    if len(features0) == 0 or len(features1) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if features0.descriptors.dtype == np.uint8:
        found = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(features0.descriptors, features1.descriptors)
        pairs = np.array([(m.queryIdx, m.trainIdx) for m in found], np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]
    from scfeat_core.matching import match

    matches = match(features0, features1).numpy()
    return matches.indices0, matches.indices1


def _unknown(name: str) -> str:
    names = [*_CLASSICAL, "scfeat"]
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"expected a method of {', '.join(names)} or 'module:callable', found '{name}'{hint}"


# -- methods -----------------------------------------------------------------------------------------------------------


def _scfeat(options: dict[str, Any]) -> Method:
    from scfeat_core.extraction import Extractor

    if "max_keypoints" in options:
        raise ConfigError("expected the number of keypoints as --max-keypoints, found it among the options")
    extractor_for = lru_cache(maxsize=1)(lambda count: Extractor(max_keypoints=count, **options))
    return lambda image, max_keypoints: extractor_for(max_keypoints)(image)


def _imported(name: str, options: dict[str, Any]) -> Method:
    module_name, _, attribute = name.partition(":")
    try:
        method = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"expected an importable 'module:callable', found '{name}': {error}; is its folder on PYTHONPATH?"
        ) from error
    if not callable(method):
        raise ConfigError(f"expected '{name}' to be a callable (image, max_keypoints) -> Features, found {method!r}")
    return partial(method, **options) if options else method


def _sift(image: np.ndarray, max_keypoints: int) -> Features:
    detector = cv2.SIFT.create(contrastThreshold=SIFT_CONTRAST)
    return _unit(_opencv_features(detector, image, max_keypoints, "sift"))


def _rootsift(image: np.ndarray, max_keypoints: int) -> Features:
    """SIFT under the Hellinger kernel (Arandjelovic and Zisserman, CVPR 2012)."""
    features = _opencv_features(cv2.SIFT.create(contrastThreshold=SIFT_CONTRAST), image, max_keypoints, "rootsift")
    descriptors = features.descriptors
    roots = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-12))
    return Features(features.keypoints, features.scores, roots, features.image_size, "rootsift")


def _orb(image: np.ndarray, max_keypoints: int) -> Features:
    detector = cv2.ORB.create(nfeatures=2 * max_keypoints, fastThreshold=ORB_FAST_THRESHOLD)
    return _opencv_features(detector, image, max_keypoints, "orb")


def _akaze(image: np.ndarray, max_keypoints: int) -> Features:
    home: Any = cv2 if hasattr(cv2, "AKAZE_create") else getattr(cv2, "xfeatures2d", None)  # in contrib since 5.0
    if not hasattr(home, "AKAZE_create"):
        raise ConfigError(f"OpenCV {cv2.__version__} has no AKAZE; install opencv-contrib-python or opencv-python<5")
    return _opencv_features(home.AKAZE_create(threshold=AKAZE_THRESHOLD), image, max_keypoints, "akaze")


def _opencv_features(detector: Any, image: np.ndarray, max_keypoints: int, space: str) -> Features:
    keypoints, descriptors = detector.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
    size = (image.shape[1], image.shape[0])
    if descriptors is None:
        dtype = np.uint8 if detector.descriptorType() == cv2.CV_8U else np.float32
        empty = np.zeros((0, detector.descriptorSize()), dtype)
        return Features(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), empty, size, space)
    scores = np.array([keypoint.response for keypoint in keypoints], np.float32)
    best = np.argsort(-scores, kind="stable")[:max_keypoints]
    points = np.asarray(cv2.KeyPoint.convert(keypoints))
    return Features(points[best], scores[best], descriptors[best], size, space)


def _unit(features: Features) -> Features:
    descriptors = features.descriptors
    unit = descriptors / np.maximum(np.linalg.norm(descriptors, axis=1, keepdims=True), 1e-12)
    return Features(features.keypoints, features.scores, unit, features.image_size, features.descriptor_space)


_CLASSICAL: dict[str, Method] = {"sift": _sift, "rootsift": _rootsift, "orb": _orb, "akaze": _akaze}


def check_features(features: Any, max_keypoints: int) -> Features:
    """The features as numpy arrays. Raises DataError where a method has returned something else, or too many."""
    if not isinstance(features, Features):
        raise DataError(f"expected the method to return scfeat_core.types.Features, found {type(features).__name__}")
    features = features.numpy()
    count = len(features)
    if count > max_keypoints or len(features.descriptors) != count or len(features.scores) != count:
        raise DataError(
            f"expected at most {max_keypoints} keypoints with a score and a descriptor each, found {count} keypoints, "
            f"{len(features.scores)} scores and {len(features.descriptors)} descriptors"
        )
    return features
