"""Folders of posed images and COLMAP models: what is read, which pairs are made, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from scfeat_core.data.colmap import rotations
from scfeat_core.data.pairing import candidate_pairs, reprojection_errors, usable_cameras, view_angles
from scfeat_core.data.posed import PosedConfig, PosedPairs
from scfeat_core.data.posed_images import SceneFolder, find_scenes, open_posed_images, read_scene
from scfeat_core.data.tracks import make_tracks, read_tracks, select_rows
from scfeat_core.errors import DataError


def plain(folder: Path, **settings: object) -> PosedConfig:
    return PosedConfig(data_path=folder, augmentation="none", **settings)  # type: ignore[arg-type]


def names(pairs: PosedPairs) -> set[tuple[str, str]]:
    """Files of all pairs."""
    found = [(pairs.scenes[scene].files, i, j) for scene, i, j in map(pairs.pair, range(len(pairs)))]
    return {(files[i], files[j]) for files, i, j in found}


def edit_cameras(folder: Path, index: int, **changes: object) -> None:
    path = folder / "cameras.json"
    cameras = json.loads(path.read_text())
    cameras[index].update(changes)
    path.write_text(json.dumps(cameras))


# -- scenes and splits -------------------------------------------------------------------------------------------------


def test_scenes_are_found_at_three_depths(tmp_path, write_scene) -> None:
    scene = write_scene(tmp_path / "train" / "multiview" / "b")
    write_scene(tmp_path / "train" / "multiview" / "a")
    assert [s.name for s in find_scenes(scene)] == ["b"]
    assert [s.name for s in find_scenes(scene.parent)] == ["a", "b"]
    assert [s.name for s in find_scenes(tmp_path / "train")] == ["multiview/a", "multiview/b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found none; check data_path"):
        find_scenes(tmp_path / "empty")
    with pytest.raises(DataError, match="expected a folder of scenes"):
        find_scenes(tmp_path / "nowhere")


def test_split_and_exclusion_separate_scenes(tmp_path, write_scene) -> None:
    data = tmp_path / "data"
    for name in "abcdef":
        write_scene(data / name, images=(0, 1, 2))
    split = tmp_path / "split.yaml"
    split.write_text("scenes: [c, e, elsewhere]\nsingles: [x.png]")

    def opened(**settings: object) -> tuple[list[str], list[str]]:
        both = (open_posed_images(plain(data, **settings), held_back=held_back) for held_back in (False, True))
        return tuple([scene.name for scene in pairs.scenes] for pairs in both)  # type: ignore[return-value]

    assert opened(split=split) == (["a", "b", "d", "f"], ["c", "e"])
    assert opened(split=split, excluded_scenes=("b", "c")) == (["a", "d", "f"], ["e"])
    assert opened() == (["b", "c", "d", "e", "f"], ["a"])
    split.write_text("scenes: [elsewhere]")
    assert opened(split=split) == opened()
    left = ["a", "d", "e", "f"]  # too few to lose one: pairs of each are held back
    assert opened(excluded_scenes=("b", "c")) == (left, left)


def test_few_scenes_hold_back_pairs(tmp_path, write_scene) -> None:
    folder = write_scene(tmp_path / "s")
    trained, held_back = (open_posed_images(PosedConfig(data_path=folder), held_back=h) for h in (False, True))
    assert len(trained) == 17 and len(held_back) == 1
    assert names(trained).isdisjoint(names(held_back))
    assert trained.config.augmentation == "jitter" and held_back.config.augmentation == "none"


def test_damaged_scenes_are_named_and_left_out(tmp_path, write_scene, caplog) -> None:
    for name in "abcdef":
        write_scene(tmp_path / name, images=(0, 1, 2))
    (tmp_path / "b" / "cameras.json").write_text("[{]")
    (tmp_path / "c" / "tracks.npz").write_bytes(b"PK no more")
    edit_cameras(tmp_path / "d", 0, K=[1, 2])
    with caplog.at_level(logging.WARNING):
        pairs = open_posed_images(plain(tmp_path))
    assert [scene.name for scene in pairs.scenes] == ["e", "f"]
    assert pairs.problems == {"damaged scene": 3}
    for part in ("b/cameras.json", "c/tracks.npz", "d/cameras.json"):
        assert part in caplog.text
    with pytest.raises(DataError, match="'damaged scene': 1"):
        open_posed_images(plain(tmp_path / "b"))


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_pairs_come_from_what_there_is(tmp_path, write_scene, rendered_views) -> None:
    listed = write_scene(tmp_path / "listed")
    tracked = write_scene(tmp_path / "tracked", pairs=False)
    bare = write_scene(tmp_path / "bare", pairs=False, tracks=False)
    near = {(f"{i}.png", f"{i + d}.png") for i in range(8) for d in (1, 2, 3)}
    assert len(names(open_posed_images(plain(listed))) & near) == 17

    def by(folder: Path, **settings: object) -> set[tuple[int, int]]:
        config = plain(folder, **settings)
        scene, found = read_scene(SceneFolder("s", folder))
        return {tuple(pair) for pair in candidate_pairs(scene, found, np.ones(8, bool), config).tolist()}

    seen = rendered_views.seen.astype(int)
    shared = np.triu(seen @ seen.T, 1)
    for least in (25, 270):
        expected = {tuple(pair) for pair in np.argwhere(shared >= least).tolist()}
        assert by(tracked, min_shared=least) == by(listed, min_shared=least, pair_source="covisibility") == expected
    assert 0 < len(expected) < 28
    axes = rendered_views.R[:, 2]
    angle = np.rad2deg(np.arccos(np.clip(axes @ axes.T, -1, 1)))
    assert np.allclose(view_angles(rendered_views.R), angle)
    expected = {(i, j) for i in range(8) for j in range(i + 1, 8) if 8 <= angle[i, j] <= 20}
    assert by(bare, min_view_angle=8.0, max_view_angle=20.0) == expected
    assert 0 < len(expected) < 28
    for folder, source in ((bare, "pairs_txt"), (bare, "covisibility")):
        with pytest.raises(DataError, match="pair_source"):
            by(folder, pair_source=source)


def test_unknown_images_in_the_list_are_left_out(tmp_path, write_scene, caplog) -> None:
    folder = write_scene(tmp_path / "s")
    (folder / "pairs.txt").write_text("0.png 1.png 99 4.0\n\n1.png nobody.png\n2.png\n1.png 2.png\n2.png 3.png\n")
    assert names(open_posed_images(plain(folder))) == {("1.png", "2.png"), ("2.png", "3.png")}
    assert "2 of 5" in caplog.text
    (folder / "pairs.txt").write_text("1.png nobody.png\n")
    with pytest.raises(DataError, match="damaged scene"):
        open_posed_images(plain(folder))


def test_pairs_without_geometry_are_left_out_and_counted(tmp_path, write_scene, rendered_views, caplog) -> None:
    """Identical cameras, a pure rotation, a camera that is none; and what is rotated too far."""
    folder = write_scene(tmp_path / "s")
    views = rendered_views
    edit_cameras(folder, 1, R=views.R[0].tolist(), t=views.t[0].tolist())  # camera 1 is camera 0
    centre = -views.R[3].T @ views.t[3]
    edit_cameras(folder, 4, t=(-views.R[4] @ centre).tolist())  # camera 4 stands where camera 3 does
    edit_cameras(folder, 6, K=[[np.nan, 0, 160], [0, 300, 120], [0, 0, 1]])
    edit_cameras(folder, 7, R=(2 * views.R[7]).tolist())
    with caplog.at_level(logging.WARNING):
        pairs = open_posed_images(plain(folder))
    found = names(pairs)
    assert ("0.png", "1.png") not in found and ("3.png", "4.png") not in found
    assert not any("6.png" in pair or "7.png" in pair for pair in found)
    assert {("0.png", "3.png"), ("2.png", "3.png"), ("2.png", "5.png")} <= found
    assert pairs.problems == {"degenerate geometry": 2, "unusable camera": 2}
    assert "no baseline, the first: 0.png 1.png" in caplog.text and "the first: 6.png" in caplog.text
    for i in range(len(pairs)):
        assert torch.isfinite(pairs.load(i, np.random.default_rng(0)).fundamental).all()
    turned = open_posed_images(plain(folder, rot_thr=15.0))
    assert 0 < len(turned) < len(pairs)


def test_usable_cameras_names_each_defect(tmp_path, write_scene, rendered_views) -> None:
    folder = write_scene(tmp_path / "s")
    mirrored = np.diag([1, 1, -1]) @ rendered_views.R[2]
    edit_cameras(folder, 1, K=[[-300, 0, 160], [0, 300, 120], [0, 0, 1]])
    edit_cameras(folder, 2, R=mirrored.tolist())
    edit_cameras(folder, 3, t=[np.inf, 0, 0])
    edit_cameras(folder, 4, w=0)
    scene, _ = read_scene(SceneFolder("s", folder))
    assert usable_cameras(scene).tolist() == [True, False, False, False, False, True, True, True]


def test_more_pairs_than_wanted_are_thinned_out_the_same_way(tmp_path, write_scene) -> None:
    folder = write_scene(tmp_path / "s")
    few = [open_posed_images(plain(folder, pairs_per_scene=8)) for _ in range(2)]
    assert names(few[0]) == names(few[1]) and len(few[0]) == 7  # and one held back
    assert len(open_posed_images(plain(folder, pairs_per_scene=18))) == 17


# -- tracks ------------------------------------------------------------------------------------------------------------


def test_tracks_keep_one_observation_of_a_point_and_image() -> None:
    points = np.arange(9.0).reshape(3, 3)
    image, pid = np.array([1, 0, 1, 1, 0]), np.array([2, 1, 0, 2, 2])
    xy = np.arange(10.0).reshape(5, 2)
    tracks = make_tracks(points, xy, pid, image, 3)
    assert tracks.offset.tolist() == [0, 2, 4, 4]
    assert tracks.pid.tolist() == [1, 2, 0, 2]
    assert tracks.xy.tolist() == [[2, 3], [8, 9], [4, 5], [0, 1]]
    assert [p.tolist() for p in tracks.common(0, 1)] == [[[8, 9]], [[0, 1]]]
    assert tracks.covisibility().tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    fewer = select_rows(tracks, np.array([True, False, True, True]))
    assert fewer.offset.tolist() == [0, 1, 3, 3] and fewer.pid.tolist() == [1, 0, 2]


def test_covisibility_of_many_points_is_counted_in_parts() -> None:
    rng = np.random.default_rng(0)
    seen = rng.random((5, 10_000)) < 0.3
    image, pid = np.nonzero(seen)
    tracks = make_tracks(np.zeros((10_000, 3)), np.zeros((len(pid), 2)), pid, image, 5)
    assert (tracks.covisibility() == seen.astype(int) @ seen.T.astype(int)).all()
    assert len(tracks.common(1, 3)[0]) == (seen[1] & seen[3]).sum()


def test_observations_far_from_their_point_are_dropped(tmp_path, write_scene) -> None:
    folder = write_scene(tmp_path / "s")
    with np.load(folder / "tracks.npz") as file:
        arrays = dict(file)
    wrong = np.arange(len(arrays["pid"])) % 10 == 0
    arrays["xy64"] = arrays["xy64"] + (wrong[:, None] * 64 * 3).astype(np.uint16)
    np.savez(folder / "tracks.npz", **arrays)
    scene, _ = read_scene(SceneFolder("s", folder))
    errors = reprojection_errors(scene, scene.tracks)
    assert np.allclose(errors[wrong], 3 * np.sqrt(2), atol=0.02) and errors[~wrong].max() < 0.02
    kept = open_posed_images(plain(folder)).scenes[0].tracks
    assert kept is not None and len(kept.pid) == (~wrong).sum()
    everything = open_posed_images(plain(folder, max_reprojection=0.0)).scenes[0].tracks
    assert everything is not None and len(everything.pid) == len(wrong)


def test_tracks_of_other_cameras_are_refused(tmp_path, write_scene) -> None:
    folder = write_scene(tmp_path / "s")
    with pytest.raises(DataError, match="tracks of 7 images"):
        read_tracks(folder / "tracks.npz", 7)


# -- COLMAP ------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, source: Path, camera: str = "PINHOLE", place: str = "sparse/0") -> Path:
    """The scene ``source`` as a COLMAP model, with ids that do not start at 0 and have gaps."""
    scene, _ = read_scene(SceneFolder("s", source))
    tracks = scene.tracks
    assert tracks is not None
    (folder / place).mkdir(parents=True)
    (folder / "images").symlink_to(source / "images")
    (fx, _, cx), (_, fy, cy), _ = scene.K[0]
    numbers = {"PINHOLE": (fx, fy), "SIMPLE_PINHOLE": (fx,), "SIMPLE_RADIAL": (fx,)}[camera]
    numbers += (cx + 0.5, cy + 0.5) + ((0.1,) if camera == "SIMPLE_RADIAL" else ())
    width, height = scene.sizes[0]
    words = " ".join(f"{n:.17g}" for n in numbers)
    (folder / place / "cameras.txt").write_text(f"# cameras\n3 {camera} {width} {height} {words}\n")
    lines = ["# two lines an image"]
    for i, name in enumerate(scene.files):
        pid, xy = tracks.seen_by(i)
        pose = [*quaternion(scene.R[i]), *scene.t[i]]
        lines.append(f"{10 + i} {' '.join(f'{n:.17g}' for n in pose)} 3 {name}")
        rows = [f"{x + 0.5:.9g} {y + 0.5:.9g} {5 + 3 * p}" for p, (x, y) in zip(pid, xy, strict=True)]
        lines.append(" ".join([*rows[:4], "7.5 8.5 -1", "9.5 9.5 6", *rows[4:]]) if i else "")
    (folder / place / "images.txt").write_text("\n".join(lines) + "\n")
    order = np.random.default_rng(0).permutation(len(tracks.points))
    points = [f"{5 + 3 * p} {' '.join(f'{v:.9g}' for v in tracks.points[p])} 1 2 3 0.5 10 0 11 4" for p in order]
    (folder / place / "points3D.txt").write_text("# points\n" + "\n".join(points) + "\n")
    return folder


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """w, x, y, z of a rotation by less than half a turn."""
    w = np.sqrt(1 + np.trace(rotation)) / 2
    antisymmetric = rotation - rotation.T
    return np.array([w, *(antisymmetric[[2, 0, 1], [1, 2, 0]] / (4 * w))])


def test_rotations_of_quaternions() -> None:
    angle = 0.7
    about_z = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    given = np.array([[2 * np.cos(angle / 2), 0, 0, 2 * np.sin(angle / 2)], [1, 0, 0, 0]])
    assert np.allclose(rotations(given), [about_z, np.eye(3)])


@pytest.mark.parametrize(("camera", "place"), [("PINHOLE", "sparse/0"), ("SIMPLE_PINHOLE", "sparse"), ("PINHOLE", "")])
def test_colmap_model_is_the_same_scene(tmp_path, write_scene, camera, place) -> None:
    source = write_scene(tmp_path / "source")
    scene, listed = read_scene(SceneFolder("m", write_model(tmp_path / "m", source, camera, place)))
    expected, _ = read_scene(SceneFolder("s", source))
    assert listed is None and scene.files == expected.files
    for key in ("K", "R", "t", "sizes"):
        assert np.allclose(getattr(scene, key), getattr(expected, key), atol=1e-6), key
    assert scene.tracks is not None and expected.tracks is not None
    for i in range(1, 7):  # image 0 has no points in this model
        for points, true in zip(scene.tracks.common(i, i + 1), expected.tracks.common(i, i + 1), strict=True):
            assert np.allclose(points, true, atol=1e-3)
    assert len(scene.tracks.common(0, 1)[0]) == 0
    assert reprojection_errors(scene, scene.tracks).max() < 0.05
    pairs = open_posed_images(plain(tmp_path / "m", size=(64, 64)))
    assert pairs.sample(np.random.default_rng(0)).valid.any()


def test_colmap_models_that_cannot_be_used_are_explained(tmp_path, write_scene) -> None:
    source = write_scene(tmp_path / "source")
    distorted = write_model(tmp_path / "distorted", source, "SIMPLE_RADIAL")
    with pytest.raises(DataError, match="SIMPLE_RADIAL.*image_undistorter"):
        read_scene(SceneFolder("s", distorted))
    binary = tmp_path / "binary"
    (binary / "sparse").mkdir(parents=True)
    (binary / "sparse" / "images.bin").write_bytes(b"\0")
    assert [s.name for s in find_scenes(binary)] == ["binary"]
    with pytest.raises(DataError, match="model_converter"):
        read_scene(SceneFolder("s", binary))
    broken = write_model(tmp_path / "broken", source)
    path = broken / "sparse/0/images.txt"
    path.write_text(path.read_text().replace(" 3 5.png", " 4 5.png"))
    with pytest.raises(DataError, match="images.txt"):
        read_scene(SceneFolder("s", broken))
    path.write_text("10 1 0 0 0\n\n")
    with pytest.raises(DataError, match="images.txt"):
        read_scene(SceneFolder("s", broken))


# -- real scenes -------------------------------------------------------------------------------------------------------


def test_real_scene_has_the_pairs_and_points_that_it_lists(shared_data) -> None:
    """Structure from motion of photographs: pixels of tracks are centred as K is, and shared points are as counted."""
    folder = shared_data / "train" / "multiview" / "sceaux_castle"
    scene, listed = read_scene(SceneFolder("s", folder))
    assert scene.tracks is not None and listed is not None
    counts = [int(line.split()[2]) for line in (folder / "pairs.txt").read_text().splitlines()]
    assert scene.tracks.covisibility()[listed[:, 0], listed[:, 1]].tolist() == counts
    usable, config = np.ones(len(scene.files), bool), plain(folder, pair_source="covisibility")
    by_points = candidate_pairs(scene, listed, usable, config).tolist()
    assert sorted(by_points) == sorted(sorted(pair) for pair in listed.tolist())
    assert np.median(reprojection_errors(scene, scene.tracks)) < 0.5
