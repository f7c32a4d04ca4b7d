"""Classical features in the place of the network."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from scfeat_core.errors import ConfigError, DataError, ImageError
from scfeat_core.evaluation.method_extractor import MethodExtractor, signs
from scfeat_core.frontend import Frontend, FrontendConfig
from scfeat_core.matching import match_descriptors
from scfeat_core.types import Features

METHODS = ["sift", "rootsift", "orb"]


def picture(shift: int = 0) -> np.ndarray:
    """(120, 160) uint8."""
    noise = np.random.default_rng(0).integers(0, 255, (50, 80), np.uint8)
    return cv2.GaussianBlur(cv2.resize(noise, (400, 250)), (5, 5), 0)[60:180, 60 + shift : 220 + shift]


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.unpackbits(a[:, None] ^ b[None], axis=-1).sum(-1)


@pytest.mark.parametrize("size", [16, 32, 61, 64])  # BRIEF 128, ORB, AKAZE and BRISK
def test_dot_products_of_signs_order_as_the_hamming_distance(size: int) -> None:
    rng = np.random.default_rng(size)
    a, b = rng.integers(0, 256, (2, 200, size), np.uint8)
    b[:50] = a[:50] ^ (1 << rng.integers(0, 8, (50, size), np.uint8)) * (rng.random((50, size)) < 0.2)
    distances = hamming(a, b)
    products = signs(a) @ signs(b).T
    assert len(np.unique(products)) == len(np.unique(distances))  # ties stay ties
    order = np.argsort(distances, axis=None)
    assert (np.diff(products.ravel()[order]) <= 0).all()
    assert np.abs(np.linalg.norm(signs(a), axis=1) - 1).max() < 0.01
    found = match_descriptors(signs(a), signs(b))
    assert len(found) >= 50
    best = distances[found.indices0, found.indices1]
    assert (best == distances[found.indices0].min(1)).all() and (best == distances[:, found.indices1].min(0)).all()


@pytest.mark.parametrize("method", METHODS)
def test_features_are_those_that_the_front_end_expects(method: str) -> None:
    (features,) = MethodExtractor(method, 100, border=8).extract_batch([picture()])
    assert 20 < len(features) <= 100 and features.image_size == (160, 120)
    assert features.keypoints.dtype == features.scores.dtype == features.descriptors.dtype == np.float32
    assert (np.diff(features.scores) <= 0).all()
    assert features.keypoints.min() >= 8 and (features.keypoints <= (151, 111)).all()
    assert np.abs(np.linalg.norm(features.descriptors, axis=1) - 1).max() < 0.01
    assert features.descriptor_space == method


def test_kinds_of_images_give_the_same_points() -> None:
    extractor = MethodExtractor("sift", 50)
    gray = picture()
    kinds = [gray, np.dstack([gray] * 3), gray.astype(np.uint16) * 257]
    found = [extractor.extract_batch([image])[0].keypoints for image in kinds]
    for keypoints in found[1:]:
        np.testing.assert_array_equal(keypoints, found[0])
    dark = extractor.extract_batch([gray.astype(np.uint16) * 16])[0]  # 12 bits in 16
    assert len(dark) > 0.8 * len(found[0])


def test_masks_hide_points_and_leave_the_budget() -> None:
    extractor = MethodExtractor("sift", 20)
    keep = np.zeros((120, 160), bool)
    keep[:, 80:] = True
    (masked,) = extractor.extract_batch([picture()], [keep])
    assert len(masked) == 20 and masked.keypoints[:, 0].min() >= 79.5
    first, second = extractor.extract_batch([picture(), picture(5)], [None, keep], [7, 9])
    assert (len(first), len(second)) == (7, 9)


@pytest.mark.parametrize("method", METHODS)
def test_the_front_end_follows_a_camera_by_it(method: str) -> None:
    frontend = Frontend(FrontendConfig(max_keypoints=150), MethodExtractor(method, 150))
    results = [frontend.process(picture(3 * i), 10**9 * (1 + i)) for i in range(4)]
    assert results[-1].pair.geometry.num_inliers > 0.6 * len(results[-1].pair.matches) > 15
    steps = results[-1].pair.keypoints0 - results[-1].pair.keypoints1
    np.testing.assert_allclose(np.median(steps, 0), (3, 0), atol=0.3)
    assert (results[-1].tracks.ages == 4).sum() > 10
    frontend.update(FrontendConfig(max_keypoints=30))
    assert len(frontend.process(picture(12), 6 * 10**9).features) <= 30


def nan(image: np.ndarray, max_keypoints: int) -> Features:
    return Features(np.full((1, 2), np.nan, np.float32), np.ones(1), np.ones((1, 4), np.float32), (160, 120))


def too_many(image: np.ndarray, max_keypoints: int) -> Features:
    n = max_keypoints + 1
    return Features(np.ones((n, 2), np.float32), np.ones(n), np.ones((n, 4), np.float32), (160, 120))


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a method of sift"):
        MethodExtractor("shift")
    with pytest.raises(ImageError):
        MethodExtractor("sift").extract_batch([np.zeros((3, 3, 7), np.uint8)])
    for method, found in ((nan, "found NaN"), (too_many, "expected at most 10 keypoints")):
        with pytest.raises(DataError, match=found):
            MethodExtractor(f"{__name__}:{method.__name__}", 10).extract_batch([picture()])
