from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from scfeat_core.errors import ImageError
from scfeat_core.quality import BLURRED, coverage, has_contrast, reduce
from scfeat_core.quality import assess as assess_reduced


def assess(image):
    return assess_reduced(reduce(image))


def series(shared_data: Path, name: str) -> list[np.ndarray]:
    """Images 1 to 6 of a sequence, 640 pixels wide, (H, W, 3) uint8 RGB."""
    images = []
    for number in range(1, 7):
        image = cv2.cvtColor(cv2.imread(str(shared_data / "eval" / name / f"{number}.png")), cv2.COLOR_BGR2RGB)
        size = (640, round(640 * image.shape[0] / image.shape[1]))
        images.append(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    return images


def test_sharpness_falls_with_the_blur_of_real_images(shared_data):
    sharpness = [assess(image).sharpness for image in series(shared_data, "oxford_bikes")]
    assert (np.diff(sharpness) < 0).all()
    assert sharpness[0] > 3 * BLURRED and sharpness[3] > BLURRED > sharpness[4]


def test_sharpness_does_not_depend_on_exposure(shared_data):
    images = series(shared_data, "oxford_leuven")
    found = [assess(image) for image in images]
    sharpness = np.array([quality.sharpness for quality in found])
    assert sharpness.max() < 1.2 * sharpness.min()
    means = np.array([quality.mean for quality in found])
    assert (np.diff(means) < 0).all() and means[0] > 3 * means[-1]
    assert found[-1].dark > found[0].dark
    dimmed = assess(images[0].astype(np.float32) / 255 * 0.3 + 0.1)
    assert dimmed.sharpness == pytest.approx(found[0].sharpness, rel=1e-3)


def test_sharpness_tells_blur_whatever_is_seen(shared_data):
    for name in ("oxford_graf", "oxford_leuven", "oxford_bark"):
        image = series(shared_data, name)[0]
        blurred = cv2.GaussianBlur(image, (0, 0), 2)
        assert assess(image).sharpness > 1.5 * BLURRED > BLURRED > assess(blurred).sharpness


def test_sharpness_does_not_depend_on_resolution():
    rng = np.random.default_rng(0)
    small = rng.uniform(0, 1, (60, 80)).astype(np.float32)
    base = cv2.resize(small, (320, 240), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    values = [assess(np.kron(base, np.ones((n, n), np.float32))).sharpness for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(values, values[0], rtol=1e-3)


def test_shares_at_the_ends_of_the_range():
    image = np.full((120, 160), 128, np.uint8)
    image[:30] = 2
    image[90:, :80] = 255
    quality = assess(image)
    assert quality.dark == pytest.approx(0.25) and quality.saturated == pytest.approx(0.125)
    assert quality.mean == pytest.approx(image.mean() / 255, abs=1e-4)
    for value, expected in ((0, (1, 0)), (255, (0, 1)), (128, (0, 0))):
        flat = assess(np.full((120, 160), value, np.uint8))
        assert (flat.dark, flat.saturated) == expected and flat.sharpness == 0


def test_all_kinds_of_images_mean_the_same():
    rng = np.random.default_rng(1)
    gray = cv2.GaussianBlur(rng.integers(0, 256, (241, 323), np.uint8), (0, 0), 1.5)
    rgb = np.dstack([gray] * 3)
    expected = assess(gray)
    kinds = {
        "one channel": gray[..., None],
        "RGB": rgb,
        "RGBA": np.dstack([rgb, gray // 2]),
        "uint16": gray.astype(np.uint16) * 257,
        "float64": gray / 255,
        "float16": (gray / 255).astype(np.float16),
        "torch": torch.from_numpy(gray),
        "torch CHW": torch.from_numpy(rgb).permute(2, 0, 1),
        "torch half": torch.from_numpy(gray).float()[None].div(255).bfloat16(),
        "mirrored": np.ascontiguousarray(gray[:, ::-1])[:, ::-1],
        "read-only": np.frombuffer(rgb.tobytes(), np.uint8).reshape(rgb.shape),
    }
    for name, image in kinds.items():
        found = assess(image)
        assert found.mean == pytest.approx(expected.mean, abs=2e-3), name
        assert found.sharpness == pytest.approx(expected.sharpness, rel=0.05), name


@pytest.mark.parametrize("size", [(1, 1), (1, 640), (3, 3), (5, 700), (33, 47)])
def test_small_images_do_no_harm(size):
    quality = assess(np.random.default_rng(0).integers(0, 256, size, np.uint8))
    assert np.isfinite([quality.mean, quality.dark, quality.saturated, quality.sharpness]).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 64), np.uint8), r"shape \(0, 64\)"),
        (np.zeros((3, 64, 64), np.uint8), r"shape \(3, 64, 64\)"),
        (torch.zeros(64, 64, 3), r"\(C, H, W\).*\[?\(64, 64, 3\)"),
        (np.zeros((64, 64), np.int32), "found int32"),
        (np.full((64, 64), np.nan, np.float32), "NaN"),
        (None, r"shape \(\)"),
    ],
)
def test_unusable_images_are_named(image, message):
    with pytest.raises(ImageError, match=message):
        assess(image)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_contrast_is_what_is_above_a_fraction_of_a_level(kind):
    flat = np.full((120, 160), 40, np.uint8)
    assert not has_contrast(reduce(kind(flat)))
    flat[::40, ::40] += 1
    assert not has_contrast(reduce(kind(flat)))
    flat[:, 80:] += 1
    assert has_contrast(reduce(kind(flat))), "one level is enough"


def test_coverage_counts_the_cells_of_the_grid() -> None:
    y, x = np.mgrid[0:8, 0:8]
    centres = np.stack([x.ravel() * 80 + 39.5, y.ravel() * 60 + 29.5], 1)
    assert coverage(centres, (640, 480)) == 1.0
    assert coverage(np.repeat(centres[:16], 3, axis=0), (640, 480)) == 0.25
    assert coverage(np.array([[-0.5, -0.5], [639.5, 479.5]]), (640, 480)) == 2 / 64
    assert coverage(np.empty((0, 2)), (640, 480)) == 0.0
