"""Pairs of posed images: their matrices must belong to their pictures, and damage must be survived."""

from __future__ import annotations

import logging
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from scfeat_core.data.colour import LEGACY_JITTER, JitterConfig, jitter, turn_hue
from scfeat_core.data.posed import PosedBatch, PosedConfig, PosedPairs, scene_shares
from scfeat_core.data.posed_images import open_posed_images
from scfeat_core.data.windows import Window, choose_windows, covering_size
from scfeat_core.errors import DataError
from scfeat_core.geometry import epipolar_distance, sample_map, scale_points
from scfeat_core.training.loading import collate

LANDSCAPE, PORTRAIT = (0, 240, 0, 320), (0, 240, 90, 230)


def seeded(index: int) -> np.random.Generator:
    return np.random.default_rng((7, index))


def plain(folder: Path, **settings: object) -> PosedConfig:
    return PosedConfig(data_path=folder, augmentation="none", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [LANDSCAPE, PORTRAIT], ids=["landscape", "portrait"])
@pytest.mark.parametrize("size", [(320, 240), (128, 128), (100, 160), (416, 312)], ids=str)
@pytest.mark.parametrize("zoom", [(1.0, 1.0), (1.3, 2.0)], ids=["whole", "zoomed"])
def test_geometry_belongs_to_the_views(tmp_path, write_scene, cut, size, zoom) -> None:
    """True points are on their epipolar lines, and both views show the same there; half a pixel off shows."""
    pairs = open_posed_images(plain(write_scene(tmp_path / "s", cut=cut), size=size, zoom=zoom))
    batch = collate([pairs.sample(seeded(i)) for i in range(6)])
    assert batch.image0.shape == batch.image1.shape == (6, 3, size[1], size[0])
    assert batch.points0.shape == (6, 512, 2)
    assert torch.allclose(batch.fundamental.square().sum((1, 2)), torch.ones(6))
    assert batch.valid.sum(1).min() >= 10
    limit = torch.tensor(size) - 1
    for points in (batch.points0, batch.points1):
        assert (points[~batch.valid] == 0).all() and ((points >= 0) & (points <= limit)).all()
    scale = max(size) / 140
    errors = epipolar_distance(batch.points0.double(), batch.points1.double(), batch.fundamental.double())
    assert errors[batch.valid].max() < 0.05 * scale
    exact, shifted = (
        (sample_map(batch.image0, batch.points0, 1) - sample_map(batch.image1, batch.points1 + shift, 1))
        .abs()
        .mean(-1)[batch.valid]
        .median()
        for shift in (0.0, 1.5 * scale)
    )
    assert exact < 0.02
    assert shifted > 1.5 * exact


def test_draws_are_a_function_of_the_generator(tmp_path, write_scene) -> None:
    pairs = open_posed_images(PosedConfig(data_path=write_scene(tmp_path / "s"), size=(96, 96), zoom=(1.0, 2.0)))
    copy = pickle.loads(pickle.dumps(pairs))
    for i in range(4):
        first, again, copied = (p.sample(seeded(i)) for p in (pairs, pairs, copy))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, copied, strict=True))
    assert not torch.equal(pairs.sample(seeded(0)).image0, pairs.sample(seeded(1)).image0)


def test_each_pair_can_be_loaded_by_its_index(tmp_path, write_scene) -> None:
    for name, images in (("a", range(4)), ("b", range(8))):
        write_scene(tmp_path / "data" / name, images=images)
    pairs = open_posed_images(plain(tmp_path / "data", size=(64, 64)))
    held_back = open_posed_images(plain(tmp_path / "data", size=(64, 64)), held_back=True)
    listed = [pairs.pair(i) for i in range(len(pairs))]
    assert len(set(listed)) == len(listed) == 5 + 17 and len(held_back) == 2
    assert [scene for scene, _, _ in listed] == [0] * 5 + [1] * 17
    assert {pairs.draw(seeded(i)) for i in range(300)} == set(range(len(pairs)))


def test_stored_in_another_resolution(tmp_path, write_scene) -> None:
    """Half the pixels of the same pictures: the same matrices. Another shape is refused."""
    whole = open_posed_images(plain(write_scene(tmp_path / "whole"), size=(128, 96)))
    folder = write_scene(tmp_path / "half")
    for path in (folder / "images").iterdir():
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (160, 120), interpolation=cv2.INTER_AREA))
    half = open_posed_images(plain(folder, size=(128, 96)))
    a, b = whole.sample(seeded(0)), half.sample(seeded(0))
    assert torch.equal(a.fundamental, b.fundamental) and torch.equal(a.points0, b.points0)
    assert (a.image0 - b.image0).abs().mean() < 0.02
    for path in (folder / "images").iterdir():
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (160, 160)))
    with pytest.raises(DataError, match="none of 1000 random pairs"):
        half.sample(seeded(0))


# -- damage ------------------------------------------------------------------------------------------------------------


def test_damaged_images_are_named_once_counted_and_survived(tmp_path, write_scene, caplog) -> None:
    folder = write_scene(tmp_path / "s")
    pairs = open_posed_images(plain(folder, size=(64, 64)))
    sound = {i: pairs.sample(seeded(i)) for i in range(20)}
    path = folder / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:100])
    (folder / "images" / "5.png").unlink()
    with caplog.at_level(logging.WARNING):
        drawn = {i: pairs.sample(seeded(i)) for i in range(20)}
    named = [record.message for record in caplog.records]
    assert len(named) == 2 and any("3.png" in line for line in named) and any("5.png" in line for line in named)
    assert pairs.problems["damaged image"] == 2
    assert pairs.problems["damaged image, again"] > 5
    same = [torch.equal(drawn[i].image0, sound[i].image0) for i in range(20)]
    assert 0 < sum(same) < 20  # pairs without these two images are as before


def test_a_jpeg_that_was_cut_off_is_damaged(tmp_path, write_scene) -> None:
    """OpenCV would decode it, with gray for the rest."""
    folder = write_scene(tmp_path / "s", images=(2, 3))
    path = folder / "images" / "2.png"
    code = cv2.imencode(".jpg", cv2.imread(str(path)))[1].tobytes()
    path.write_bytes(code)
    pairs = open_posed_images(plain(folder, size=(64, 64)))
    pairs.load(0, seeded(0))
    path.write_bytes(code[: len(code) // 2])
    with pytest.raises(DataError, match=r"2\.png"):
        pairs.load(0, seeded(0))


def test_nothing_left_to_draw_is_an_error(tmp_path, write_scene) -> None:
    folder = write_scene(tmp_path / "s")
    pairs = open_posed_images(plain(folder))
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="replace them, and go on with --resume"):
        pairs.sample(seeded(0))


def test_a_vanished_data_folder_is_waited_for(tmp_path, write_scene, caplog) -> None:
    folder = write_scene(tmp_path / "data" / "s").parent
    expected = open_posed_images(plain(folder, size=(64, 64))).sample(seeded(0))
    pairs = open_posed_images(plain(folder, size=(64, 64), patience=30.0))
    impatient = open_posed_images(plain(folder, size=(64, 64), patience=0.0))
    away = folder.with_name("away")
    folder.rename(away)
    with pytest.raises(DataError, match="bring the folder back"):
        impatient.sample(seeded(0))
    timer = threading.Timer(0.3, away.rename, (folder,))
    timer.start()
    batch = pairs.sample(seeded(0))
    timer.join()
    assert torch.equal(batch.image0, expected.image0)
    assert pairs.problems == {"vanished folder": 1}
    assert "has vanished" in caplog.text


def test_a_vanished_scene_is_left_out(tmp_path, write_scene) -> None:
    for name in "ab":
        write_scene(tmp_path / "data" / name)
    pairs = open_posed_images(plain(tmp_path / "data", size=(64, 64)))
    shutil.rmtree(tmp_path / "data" / "a")
    for i in range(30):
        pairs.sample(seeded(i))
    assert 2 <= pairs.problems["damaged image"] <= 8


class _Steps(Dataset[PosedBatch]):
    def __init__(self, pairs: PosedPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return 12

    def __getitem__(self, step: int) -> PosedBatch:
        return self.pairs.sample(seeded(step))


def test_workers_draw_the_same_and_count_together(tmp_path, write_scene) -> None:
    folder = write_scene(tmp_path / "s")
    (folder / "images" / "3.png").write_bytes(b"no picture")
    pairs = open_posed_images(PosedConfig(data_path=folder, size=(64, 64)))
    loader = DataLoader(_Steps(pairs), batch_size=3, num_workers=2, collate_fn=collate)
    with torch.random.fork_rng():
        batches = list(loader)
    counted = pairs.problems
    assert 1 <= counted["damaged image"] <= 2 and counted["damaged image, again"] >= 1
    here = collate([pairs.sample(seeded(step)) for step in range(12)])
    together = collate(batches)
    assert all(torch.equal(a, b) for a, b in zip(here, together, strict=True))


# -- choices -----------------------------------------------------------------------------------------------------------


def test_scenes_share_the_draws_as_they_are_told(tmp_path, write_scene) -> None:
    assert np.allclose(scene_shares(np.array([1, 9, 90]), "pairs"), [0.01, 0.09, 0.9])
    assert np.allclose(scene_shares(np.array([1, 4, 9]), "sqrt"), np.array([1, 2, 3]) / 6)
    write_scene(tmp_path / "data" / "few", images=(0, 1))
    write_scene(tmp_path / "data" / "many")
    for weight, share in (("pairs", 1 / 18), ("equal", 0.5)):
        pairs = open_posed_images(plain(tmp_path / "data", scene_weight=weight))
        rng = seeded(0)
        drawn = [pairs.pair(pairs.draw(rng))[0] for _ in range(1000)]
        assert [scene.name for scene in pairs.scenes] == ["few", "many"]
        assert abs(np.mean(np.equal(drawn, 0)) - share) < 0.05


def test_without_tracks_there_are_no_points(tmp_path, write_scene) -> None:
    pairs = open_posed_images(plain(write_scene(tmp_path / "s", tracks=False, cut=PORTRAIT), size=(96, 64)))
    batch = collate([pairs.sample(seeded(i)) for i in range(2)])
    assert batch.points0.shape == batch.points1.shape == (2, 0, 2) and batch.valid.shape == (2, 0)
    few = open_posed_images(plain(write_scene(tmp_path / "t"), max_points=5)).sample(seeded(0))
    assert few.valid.shape == (1, 5) and few.valid.all()


def test_decoded_images_are_kept_up_to_the_limit(tmp_path, write_scene) -> None:
    folder = write_scene(tmp_path / "s")
    pairs = open_posed_images(plain(folder, cache_mb=1, size=(64, 64)))
    expected = [pairs.sample(seeded(i)).image0 for i in range(20)]
    for path in (folder / "images").iterdir():
        path.unlink()
    batch = pairs.sample(seeded(0))  # some pair of the four images of 230,400 bytes that one megabyte holds
    assert batch.image0.shape == expected[0].shape
    uncached = pickle.loads(pickle.dumps(pairs))
    with pytest.raises(DataError):
        uncached.sample(seeded(0))


# -- windows -----------------------------------------------------------------------------------------------------------


def test_covering_size_covers_and_keeps_the_shape() -> None:
    assert covering_size((640, 480), (640, 480)) == (640, 480)
    assert covering_size((360, 640), (640, 480)) == (640, 1138)
    assert covering_size((640, 360), (320, 240), 1.5) == (640, 360)
    for old in ((517, 333), (100, 901)):
        new = covering_size(old, (64, 48))
        assert new[0] >= 64 and new[1] >= 48 and (new[0] == 64 or new[1] == 48)
        assert abs(new[0] / old[0] - new[1] / old[1]) < 0.51 / min(old)


def test_window_pixels_follow_its_matrix() -> None:
    """A blob is where the matrix says, after shrinking, enlarging and cropping."""
    image = np.zeros((240, 320, 3), np.uint8)
    cv2.circle(image, (200, 100), 6, (255, 255, 255), -1)
    for resized in ((160, 120), (480, 360), (320, 240)):
        window = Window((320, 240), resized, (20, 30), (100, 80) if resized[0] == 160 else (300, 200))
        view = window.cut(image)[..., 0].astype(float)
        assert view.shape == window.size[::-1]
        y, x = np.mgrid[: view.shape[0], : view.shape[1]]
        centre = np.array([(x * view).sum(), (y * view).sum()]) / view.sum()
        expected = scale_points(np.array([200.0, 100.0]), resized[0] / 320) - (20, 30)
        assert np.abs(centre - expected).max() < 0.05
        assert np.allclose(window.matrix @ (200, 100, 1), [*expected, 1])


def test_windows_are_laid_where_both_views_see_the_same() -> None:
    """A portrait pair whose common points are at the top of one and at the bottom of the other."""
    rng = seeded(0)
    points0 = rng.uniform((0, 500), (359, 639), (60, 2))
    points1 = points0 - (0, 480)
    for i in range(10):
        w0, w1 = choose_windows(((360, 640), (360, 640)), (points0, points1), (320, 240), (1.0, 1.0), seeded(i))
        moved = [np.column_stack([p, np.ones(60)]) @ w.matrix[:2].T for p, w in ((points0, w0), (points1, w1))]
        assert (w0.contains(moved[0]) & w1.contains(moved[1])).mean() > 0.8
    nothing = np.zeros((0, 2))
    tops = {
        choose_windows(((360, 640), (360, 640)), (nothing, nothing), (320, 240), (1.0, 1.0), seeded(i))[0].offset[1]
        for i in range(30)
    }
    assert min(tops) < 80 and max(tops) > 240 and len(tops) > 15


# -- colours -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(rendered_views) -> np.ndarray:
    return rendered_views.images[0][60:180, 80:240]


def test_jitter_never_ends_in_the_dark(picture) -> None:
    deviations = [jitter(picture, JitterConfig(), seeded(i)).std() for i in range(100)]
    legacy = [jitter(picture, LEGACY_JITTER, seeded(i)).std() for i in range(100)]
    assert min(deviations) > 4
    assert min(legacy) < 2  # as published
    assert max(deviations) > 1.3 * picture.std()


def test_jitter_of_nothing_changes_nothing(picture) -> None:
    still = JitterConfig(brightness=(1, 1), contrast=(1, 1), saturation=(1, 1), hue=0.0)
    changed = jitter(picture, still, seeded(0)).astype(int)
    assert np.abs(changed - picture).max() <= 4  # eight bits of hue


def test_hue_turns_around_the_circle() -> None:
    red = np.full((2, 2, 3), (200, 40, 40), np.uint8)
    assert np.allclose(turn_hue(red, 1 / 3), (40, 200, 40), atol=6)
    assert np.allclose(turn_hue(red, -1 / 3), (40, 40, 200), atol=6)


@pytest.mark.parametrize("augmentation", ["jitter", "legacy", "photometric"])
def test_augmentation_changes_each_view_for_itself_and_stays_in_range(tmp_path, write_scene, augmentation) -> None:
    pairs = open_posed_images(plain(write_scene(tmp_path / "s"), size=(96, 96)))
    changed = PosedPairs(pairs.scenes, replace(pairs.config, augmentation=augmentation))
    index = 2
    a, b = pairs.load(index, seeded(0)), changed.load(index, seeded(0))
    assert torch.equal(a.fundamental, b.fundamental)
    assert b.image0.min() >= 0 and b.image0.max() <= 1 and b.image0.dtype == torch.float32
    gains = [(y.mean((2, 3)) / x.mean((2, 3))) for x, y in ((a.image0, b.image0), (a.image1, b.image1))]
    assert (gains[0] - gains[1]).abs().max() > 0.02
