"""Warped pairs: the pictures must agree with the homography that comes with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scfeat_core.data.photos import PYRAMID_LEVELS, ValidationSplit, find_photos, load_photos, read_photo
from scfeat_core.data.warps import (
    GeometryConfig,
    MotionConfig,
    PhotometricConfig,
    WarpConfig,
    distort_photometry,
    draw_pairs,
    draw_views,
)
from scfeat_core.errors import DataError
from scfeat_core.geometry import sample_map, warp_points

PLAIN = PhotometricConfig(**dict.fromkeys(PhotometricConfig.__dataclass_fields__, 0.0))


def smooth_photo(seed: int) -> list[np.ndarray]:
    """A pyramid of low-frequency colour noise, whose warps can be compared pixel by pixel."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(1, 3, 12, 16, generator=generator)
    image = torch.nn.functional.interpolate(grid, size=(480, 640), mode="bicubic").clamp(0, 1)
    levels = [image]
    for _ in range(PYRAMID_LEVELS - 1):
        levels.append(torch.nn.functional.avg_pool2d(levels[-1], 2))
    return [(level[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8) for level in levels]


@pytest.fixture(scope="module")
def photos() -> list[list[np.ndarray]]:
    return [smooth_photo(seed) for seed in range(3)]


@pytest.mark.parametrize("zoom", [(0.5, 0.7), (1.5, 2.4)])
def test_homography_takes_view_0_to_view_1(photos: list[list[np.ndarray]], zoom: tuple[float, float]) -> None:
    config = WarpConfig(view_size=96, geometry=GeometryConfig(zoom=zoom), photometric=PLAIN)
    pairs = draw_pairs(photos, 8, config, np.random.default_rng(1))
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    pixels = torch.stack((x, y), -1).reshape(1, -1, 2).expand(8, -1, -1)
    warped = warp_points(pixels, pairs.homography)
    inside = ((warped > 1) & (warped < 94)).all(-1)
    difference = (sample_map(pairs.image1, warped, stride=1) - pairs.image0.flatten(2).transpose(1, 2)).abs().amax(-1)
    assert inside.float().mean() > 0.3
    assert difference[inside].mean() < 0.01
    shifted = sample_map(pairs.image1, warped + 4, stride=1) - pairs.image0.flatten(2).transpose(1, 2)
    assert shifted.abs().amax(-1)[inside].mean() > 2 * difference[inside].mean()


def test_motions_are_those_of_a_video(photos: list[list[np.ndarray]]) -> None:
    """A few per cent of the view, of any fraction of a pixel, and nothing upside down."""
    size = 96
    pairs = draw_pairs(photos, 64, MotionConfig(view_size=size), np.random.default_rng(2))
    corners = torch.tensor([[0.0, 0.0], [size - 1, 0], [size - 1, size - 1], [0, size - 1]]).expand(64, -1, -1)
    moved = (warp_points(corners, pairs.homography) - corners).norm(dim=-1)
    assert moved.amax() < 0.3 * size and 1 < moved.median() < 0.1 * size
    fractions = torch.histc(moved % 1, 4, 0, 1)
    assert fractions.amin() > 0.15 * moved.numel()


@pytest.mark.parametrize(("edge", "at_least", "at_most"), [(200, 0.9, 1.0), (75, 0.65, 0.78)])
def test_motions_hardly_enlarge_photographs_that_fill_the_view(edge: int, at_least: float, at_most: float) -> None:
    """The least that a pixel of a view shows of the photograph, in pixels, along any direction."""
    rng = np.random.default_rng(0)
    pairs = [draw_views((edge, 4 * edge // 3), MotionConfig(view_size=96), rng) for _ in range(300)]
    corners = [(x, y, 1.0) for x in (0, 95) for y in (0, 95)]
    shown = [_least_scale(view, np.array(corner)) for pair in pairs for view in pair for corner in corners]
    assert at_least < min(shown) < at_most


def _least_scale(matrix: np.ndarray, point: np.ndarray) -> float:
    u, v, w = matrix @ point
    jacobian = (matrix[:2, :2] - np.outer((u / w, v / w), matrix[2, :2])) / w
    return float(np.linalg.svd(jacobian, compute_uv=False)[-1])


def test_same_state_gives_the_same_pairs(photos: list[list[np.ndarray]]) -> None:
    a, b = (draw_pairs(photos, 4, WarpConfig(view_size=64), np.random.default_rng((3, 7))) for _ in range(2))
    other = draw_pairs(photos, 4, WarpConfig(view_size=64), np.random.default_rng((3, 8)))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.image0, other.image0)


def test_photometry_changes_views_but_stays_in_range(photos: list[list[np.ndarray]]) -> None:
    config = WarpConfig(view_size=64)
    changed = draw_pairs(photos, 16, config, np.random.default_rng(0))
    plain = draw_pairs(photos, 16, replace(config, photometric=PLAIN), np.random.default_rng(0))
    assert changed.image0.min() >= 0 and changed.image0.max() <= 1
    assert torch.isfinite(changed.image0).all()
    assert (changed.image0.std(0).mean() - plain.image0.std(0).mean()).abs() > 1e-3


def test_split_separates_scenes_and_singles(tmp_path) -> None:
    image = np.full((64, 64, 3), 127, np.uint8)
    import cv2

    for name in ("multiview/castle/images/a.png", "multiview/desk/images/a.png", "singles/b.png", "singles/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), image)
    split = ValidationSplit(scenes=("castle",), singles=("c.png",))
    trained = [str(p.relative_to(tmp_path)) for p in find_photos(tmp_path, split)]
    held_back = [str(p.relative_to(tmp_path)) for p in find_photos(tmp_path, split, held_back=True)]
    assert trained == ["multiview/desk/images/a.png", "singles/b.png"]
    assert held_back == ["multiview/castle/images/a.png", "singles/c.png"]


def test_without_a_split_some_are_held_back_all_the_same(tmp_path) -> None:
    for i in range(45):
        (tmp_path / f"{i:02d}.jpg").touch()
    held_back = find_photos(tmp_path, None, held_back=True)
    assert [p.stem for p in held_back] == ["00", "20", "40"]
    assert set(held_back).isdisjoint(find_photos(tmp_path, None))


def test_empty_folder_and_damaged_photographs_are_named(tmp_path) -> None:
    with pytest.raises(DataError, match="found none"):
        find_photos(tmp_path, None)
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8 no more")
    with pytest.raises(DataError, match=r"damaged\.jpg"):
        read_photo(damaged, 640)
    with pytest.raises(DataError, match="none of the 1 photographs"):
        load_photos([damaged], 640)


def test_what_is_occluded_is_marked(photos: list[list[np.ndarray]]) -> None:
    config = WarpConfig(view_size=96, photometric=PLAIN)
    covered = replace(config, photometric=replace(PLAIN, occlusion=1.0))
    changed = draw_pairs(photos, 8, covered, np.random.default_rng(0))
    assert not changed.visible0.all((1, 2)).any() and not changed.visible1.all((1, 2)).any()
    assert changed.visible0.float().mean() > 0.7
    plain = draw_pairs(photos, 8, config, np.random.default_rng(0))
    assert plain.visible0.all() and plain.visible1.all()
    # The first view is drawn before any occlusion takes from the generator, so both draws show it.
    same = ((changed.image0[0] - plain.image0[0]).abs() < 1 / 255).all(0)
    assert same[changed.visible0[0]].all()
    assert not same[~changed.visible0[0]].all()


def test_bands_change_rows_not_columns(photos: list[list[np.ndarray]]) -> None:
    images = torch.full((6, 3, 64, 64), 0.4)
    banded = distort_photometry(images, replace(PLAIN, banding=1.0), torch.Generator().manual_seed(0))
    inner = banded[..., 8:-8, 8:-8]
    assert inner.std(-1).max() < 1e-5
    assert (inner.std(-2).amax((1, 2)) > 0.02).all()


def test_compression_keeps_colours_and_comes_last(photos: list[list[np.ndarray]]) -> None:
    config = WarpConfig(view_size=96, photometric=PLAIN)
    plain = draw_pairs(photos, 4, config, np.random.default_rng(0))
    compressed = draw_pairs(photos, 4, replace(config, photometric=replace(PLAIN, jpeg=1.0)), np.random.default_rng(0))
    assert not torch.equal(plain.image0, compressed.image0)
    assert (plain.image0 - compressed.image0).abs().mean() < 0.03  # smooth pictures; swapped channels differ by more
    assert (plain.image0 - compressed.image0.flip(1)).abs().mean() > 0.1
    levels = compressed.image0 * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
