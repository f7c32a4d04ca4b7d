"""Views that a device renders in batches must be those that OpenCV makes one at a time."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from scfeat_core.data.gpu_images import ImageStore, jpeg
from scfeat_core.data.gpu_pairs import render_warps
from scfeat_core.data.photos import pyramid
from scfeat_core.data.posed_images import open_posed_images
from scfeat_core.data.warps import (
    GeometryConfig,
    MotionConfig,
    PhotometricConfig,
    WarpConfig,
    compress,
    draw_warps,
    render_pairs,
)
from scfeat_core.errors import ConfigError
from scfeat_core.geometry import epipolar_distance
from scfeat_core.training.config import DataConfig, TrainConfig
from scfeat_core.training.data_sets import open_data
from scfeat_core.training.gpu_sources import DevicePosed, DeviceWarps
from scfeat_core.training.loading import Share, batches, collate, on_device
from scfeat_core.training.sampling import draw_numbers

PLAIN = PhotometricConfig(**dict.fromkeys(PhotometricConfig.__dataclass_fields__, 0.0))
DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]


@pytest.fixture(scope="module")
def photos() -> list[list[np.ndarray]]:
    """Of several sizes, an odd one among them, smooth enough that a fraction of a pixel is a fraction of a step."""
    rng = np.random.default_rng(0)
    sizes = [(240, 320), (301, 203), (180, 180)]
    grids = [torch.from_numpy(rng.random((1, 3, 14, 18), np.float32)) for _ in sizes]
    images = [
        torch.nn.functional.interpolate(g, size=s, mode="bicubic").clamp(0, 1)
        for g, s in zip(grids, sizes, strict=True)
    ]
    return [pyramid((255 * image[0].permute(1, 2, 0).numpy()).astype(np.uint8)) for image in images]


def test_a_store_is_as_large_as_it_says() -> None:
    store = ImageStore([pyramid(np.zeros((256, 320, 3), np.uint8))], torch.device("cpu"))
    assert store._words is not None and store._words.nbytes == 5.25 * 256 * 320


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_photographs_are_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Also where warps and motions are made of them."""
    rng = np.random.default_rng(0)
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 255, (80, 96, 3), dtype=np.uint8))
    stores: list[ImageStore] = []
    make = ImageStore.__init__
    monkeypatch.setattr(ImageStore, "__init__", lambda self, *args: (stores.append(self), make(self, *args))[1])
    data = DataConfig(data_path=tmp_path, on_device=True, warps=WarpConfig(64), motions=MotionConfig(32))
    config = TrainConfig(
        "x",
        device="cpu",
        data="photos",
        data_config_train=data,
        optimal_modules=("localheader",),
        motion_share=share,
    )
    sources = open_data(config, validate=False).sources
    assert len(stores) == 1 and len(sources) == (2 if share else 1)
    assert all(isinstance(source, DeviceWarps) and source._store is stores[0] for source in sources)
    views = [on_device(s, s.sample(np.random.default_rng(0)), torch.device("cpu")).image0 for s in sources]
    assert [view.shape[-1] for view in views] == [64, 32][: len(sources)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zoom", [(0.4, 0.6), (2.5, 4.0)])
def test_views_are_those_of_opencv(
    photos: list[list[np.ndarray]], zoom: tuple[float, float], device: torch.device
) -> None:
    geometry = GeometryConfig(zoom=zoom, scale_sigma=1.0, upside_down=0.5)
    config = WarpConfig(view_size=96, geometry=geometry, photometric=PLAIN)
    store = ImageStore(photos, device)
    draws = draw_warps(store.sizes, store.levels, 8, config, np.random.default_rng(1))
    there, here = render_warps(store, draws, config), render_pairs(photos, draws, config)
    assert torch.equal(there.homography.cpu(), here.homography)
    for view, expected in ((there.image0, here.image0), (there.image1, here.image1)):
        difference = (view.cpu() - expected).abs() * 255
        assert difference.max() < 2.5 and difference.mean() < 0.1
    assert there.visible0.all() and there.visible1.all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_occluded_is_the_same(photos: list[list[np.ndarray]], device: torch.device) -> None:
    config = WarpConfig(view_size=96, photometric=replace(PLAIN, occlusion=0.5))
    store = ImageStore(photos, device)
    draws = draw_warps(store.sizes, store.levels, 8, config, np.random.default_rng(0))
    there, here = render_warps(store, draws, config), render_pairs(photos, draws, config)
    visible, expected = there.visible0.cpu(), here.visible0
    assert not expected.all() and expected.flatten(1).all(1).any()
    assert (visible != expected).float().mean() < 0.01  # along the edges of the ellipses
    same = (visible == expected)[:, None].expand_as(here.image0)
    assert ((there.image0.cpu() - here.image0).abs()[same] * 255 < 2.5).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quality", [30, 60, 94])
def test_jpeg_is_that_of_an_encoder(photos: list[list[np.ndarray]], quality: int, device: torch.device) -> None:
    rng = np.random.default_rng(0)
    noisy = [np.clip(photo[0][:100, :120] + rng.normal(0, 12, (100, 120, 3)), 0, 255) for photo in photos]
    original = torch.from_numpy(np.stack(noisy)).permute(0, 3, 1, 2).float().div(255)
    expected = original.clone()
    for image in expected:
        compress(image, quality)
    coded = jpeg(original.to(device), torch.full((3,), quality, device=device)).cpu()
    lost, left = (expected - original).abs().mean(), (coded - expected).abs().mean()
    assert left < 0.1 * lost + 1 / 255  # encoders compute in whole numbers
    assert coded.min() >= 0 and coded.max() <= 1


@pytest.mark.parametrize("device", DEVICES)
def test_photometry_changes_views_on_the_device(photos: list[list[np.ndarray]], device: torch.device) -> None:
    config = WarpConfig(view_size=64)
    store = ImageStore(photos, device)
    draws = draw_warps(store.sizes, store.levels, 6, config, np.random.default_rng(0))
    first, again = render_warps(store, draws, config), render_warps(store, draws, config)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.isfinite(first.image0).all() and first.image0.min() >= 0 and first.image0.max() <= 1
    plain = render_warps(store, draws, replace(config, photometric=PLAIN))
    assert (first.image0 - plain.image0).abs().mean() > 0.02


@pytest.mark.parametrize("device", DEVICES)
def test_posed_views_agree_with_the_loader(
    tmp_path: Path, write_scene: Callable[..., Path], device: torch.device
) -> None:
    write_scene(tmp_path / "scene")
    config = DataConfig(data_path=tmp_path, size=(160, 128), zoom=(1.0, 1.6), augmentation="none", max_points=64)
    pairs = open_posed_images(config)
    source = DevicePosed(pairs, device)
    pixels, draws = pairs.sample(np.random.default_rng(3)), source.sample(np.random.default_rng(3))
    views = source.render(draws)
    assert torch.equal(views.fundamental.cpu(), pixels.fundamental)
    assert torch.equal(views.valid.cpu(), pixels.valid) and torch.equal(views.points0.cpu(), pixels.points0)
    assert views.image0.shape == pixels.image0.shape == (1, 3, 128, 160)
    assert ((views.image0.cpu() - pixels.image0).abs() * 255).mean() < 6  # pyramids instead of area filters
    valid = views.valid[0].cpu()
    points0, points1 = views.points0[0].cpu()[valid].double(), views.points1[0].cpu()[valid].double()
    assert valid.sum() > 20
    assert epipolar_distance(points0, points1, views.fundamental[0].cpu().double()).max() < 0.1


def test_a_damaged_image_is_counted_and_passed_over(tmp_path: Path, write_scene: Callable[..., Path]) -> None:
    scene = write_scene(tmp_path / "scene", images=range(4))
    (scene / "images" / "0.png").write_bytes(b"no picture")
    source = DevicePosed(
        open_posed_images(DataConfig(data_path=tmp_path, size=(96, 64), augmentation="none")), torch.device("cpu")
    )
    draws = [source.sample(np.random.default_rng(seed)) for seed in range(12)]
    assert all((draw.picture > 0).all() for draw in draws)
    assert source.problems["damaged image"] == 1 and source.problems["damaged image, again"] > 0


def test_workers_draw_without_the_pixels(photos: list[list[np.ndarray]]) -> None:
    source = DeviceWarps(ImageStore(photos, torch.device("cpu")), WarpConfig(view_size=64))
    elsewhere = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 10_000
    rngs = [[np.random.default_rng((seed, 5)) for seed in range(3)] for _ in range(2)]
    here, there = (collate([s.sample(rng) for rng in each]) for s, each in zip((source, elsewhere), rngs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))

    class Always:
        def source(self, step: int) -> DeviceWarps:
            return source

    drawn = list(batches(Always(), Share(seed=0, batch_size=2), range(2), workers=2))
    pairs = on_device(source, drawn[1], torch.device("cpu"))
    assert pairs.image0.shape == (2, 3, 64, 64)
    assert not torch.equal(pairs.image0, on_device(source, drawn[0], torch.device("cpu")).image0)


def test_jitter_is_refused_on_the_device() -> None:
    with pytest.raises(ConfigError, match="photometric or none"):
        TrainConfig("x", model="lite", data_config_train=DataConfig(on_device=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_draws_on_a_device_belong_to_their_pair() -> None:
    def numbers(seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return draw_numbers((len(seeds), 50), generators, torch.device("cuda"))

    assert torch.equal(numbers([1, 2, 3])[1:], numbers([2, 3]))
    assert numbers([1]).device.type == "cuda"
