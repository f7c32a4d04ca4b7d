"""Files for hloc and COLMAP, and reconstruction, on rendered views whose cameras and points are known."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from scfeat_core import cli
from scfeat_core.errors import CalibrationError, ConfigError, DataError, FeatureError, ScfeatError
from scfeat_core.evaluation.methods import create_method, match_features
from scfeat_core.feature_files import merge_h5, read_h5, write_h5
from scfeat_core.geometry import epipolar_distance, fundamental_from_pose, project_rays, warp_points
from scfeat_core.reconstruction import mapping, workspace
from scfeat_core.reconstruction.cameras import Cameras, calibrated, guessed, one_camera
from scfeat_core.reconstruction.database import write_database
from scfeat_core.reconstruction.features import Extraction
from scfeat_core.reconstruction.hloc import (
    MOST_KEYPOINTS,
    MatchedPair,
    check_group_names,
    read_matches,
    swapped,
    write_matches,
)
from scfeat_core.reconstruction.matching import StoredFeatures, log_false_alarms, match_pairs, verifier
from scfeat_core.reconstruction.pairs import choose_pairs
from scfeat_core.reconstruction.sources import folder_source, image_name, recording_source
from scfeat_core.reconstruction.summary import format_summaries
from scfeat_core.reconstruction.truth import pose_errors, truth_of
from scfeat_core.reconstruction.workspace import Plan, run
from scfeat_core.replay.records import FrameRecord, GroundTruth, Recording
from scfeat_core.two_view import verify
from scfeat_core.types import Camera, Features, GeometryModel, Matches, Tracks, TwoViewGeometry

h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'scfeat-python[reconstruct]'")
pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed: pip install 'scfeat-python[reconstruct]'")

SIFT = Extraction("sift", 400)
SIZE = (320, 240)


def matched(names: tuple[str, str], count: int = 40, model: str = "FUNDAMENTAL", seed: int = 0) -> MatchedPair:
    """Random matches of images with 50 and 60 keypoints, every third an outlier."""
    rng = np.random.default_rng(seed)
    index0 = np.sort(rng.choice(50, count, replace=False))
    index1 = rng.choice(60, count, replace=False)
    inliers = np.arange(count) % 3 > 0
    geometry = TwoViewGeometry(GeometryModel[model], rng.normal(size=(3, 3)), inliers, 1.5)
    return MatchedPair(names, (50, 60), Matches(index0, index1, rng.random(count).astype(np.float32)), geometry)


def as_hloc_reads(path: Path, name0: str, name1: str) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of indices (M, 2) and scores, by what is known of the format: the names in either order."""
    with h5py.File(path, "r") as stored:
        names = [name.replace("/", "-") for name in (name0, name1)]
        backwards = "/".join(names) not in stored
        group = stored["/".join(reversed(names) if backwards else names)]
        partners, scores = group["matches0"][()], group["matching_scores0"][()]
    index0 = np.flatnonzero(partners != -1)
    pairs = np.stack([index0, partners[index0]], 1)
    return (pairs[:, ::-1] if backwards else pairs), scores[index0]


# -- hloc --------------------------------------------------------------------------------------------------------------


def test_matches_are_read_back_as_hloc_does(tmp_path: Path) -> None:
    pair = matched(("left/a b.png", "right/0.png"))
    write_matches(tmp_path / "matches.h5", [pair, matched(("x.png", "y.png"), seed=1)])
    with h5py.File(tmp_path / "matches.h5") as stored:
        group = stored["left-a b.png"]["right-0.png"]
        assert group["matches0"].dtype == np.int16 and group["matches0"].shape == (50,)
        assert group["matching_scores0"].dtype == np.float16 and (group["matches0"][()] == -1).sum() == 10
    expected = np.stack([pair.matches.indices0, pair.matches.indices1], 1)
    indices, scores = as_hloc_reads(tmp_path / "matches.h5", "left/a b.png", "right/0.png")
    assert np.array_equal(indices, expected) and np.allclose(scores, pair.matches.scores, atol=1e-3)
    indices, _ = as_hloc_reads(tmp_path / "matches.h5", "right/0.png", "left/a b.png")
    assert np.array_equal(indices, expected[:, ::-1])


def test_matches_and_geometries_come_back_in_either_order(tmp_path: Path) -> None:
    pair = matched(("a.png", "b.png"))
    write_matches(tmp_path / "matches.h5", [pair])
    (same,) = read_matches(tmp_path / "matches.h5", [("a.png", "b.png")])
    assert same.keypoints == pair.keypoints and same.names == pair.names
    assert np.array_equal(same.matches.indices1, pair.matches.indices1)
    assert same.geometry.model == GeometryModel.FUNDAMENTAL and same.geometry.threshold == 1.5
    assert np.array_equal(same.geometry.matrix, pair.geometry.matrix)
    assert np.array_equal(same.geometry.inliers, pair.geometry.inliers)
    (other,) = read_matches(tmp_path / "matches.h5", [("b.png", "a.png")])
    assert other.names == ("b.png", "a.png") and other.keypoints == (60, 50)
    found = set(zip(other.matches.indices1.tolist(), other.matches.indices0.tolist(), strict=True))
    assert found == set(zip(pair.matches.indices0.tolist(), pair.matches.indices1.tolist(), strict=True))
    assert np.array_equal(other.geometry.matrix, pair.geometry.matrix.T)
    assert other.num_inliers == pair.num_inliers
    with pytest.raises(DataError, match="matches of a.png and c.png"):
        list(read_matches(tmp_path / "matches.h5", [("a.png", "c.png")]))


def test_a_swapped_homography_goes_back() -> None:
    pair = matched(("a", "b"), model="HOMOGRAPHY")
    points = np.random.default_rng(3).uniform(0, 300, (20, 2))
    there = warp_points(points, pair.geometry.matrix)
    assert np.allclose(warp_points(there, swapped(pair).geometry.matrix), points)


def test_more_keypoints_than_int16_can_index_are_refused(tmp_path: Path) -> None:
    most = replace(matched(("a", "b")), keypoints=(MOST_KEYPOINTS, MOST_KEYPOINTS))
    most.matches.indices1[0] = MOST_KEYPOINTS - 1
    write_matches(tmp_path / "most.h5", [most])
    assert as_hloc_reads(tmp_path / "most.h5", "a", "b")[0][0, 1] == MOST_KEYPOINTS - 1
    for keypoints in ((MOST_KEYPOINTS + 1, 60), (50, MOST_KEYPOINTS + 1)):
        with pytest.raises(FeatureError, match="int16"):
            write_matches(tmp_path / "more.h5", [replace(most, keypoints=keypoints)])
    assert not (tmp_path / "more.h5").exists()
    with pytest.raises(DataError, match="int16"):
        Extraction(max_keypoints=MOST_KEYPOINTS + 1)


def test_names_that_hloc_cannot_tell_apart_are_refused() -> None:
    check_group_names(["a/b.jpg", "a/c.jpg"])
    with pytest.raises(DataError, match="'a/b.jpg' and 'a-b.jpg'"):
        check_group_names(["a/b.jpg", "a-b.jpg"])


def test_binary_descriptors_stay_binary_in_files(tmp_path: Path, rendered_views: Any) -> None:
    features = [create_method("orb")(image, 200) for image in rendered_views.images[:2]]
    write_h5(tmp_path / "orb.h5", [(str(i), each, 1.0) for i, each in enumerate(features)])
    with h5py.File(tmp_path / "orb.h5") as stored:
        assert stored["0"]["descriptors"].dtype == np.uint8 and stored["0"]["descriptors"].shape == (32, 200)
        matches = StoredFeatures(stored).match("0", "1")
    index0, index1 = match_features(*features)
    assert np.array_equal(matches.indices0, index0) and np.array_equal(matches.indices1, index1)
    bits = np.unpackbits(features[0].descriptors[index0[0]] ^ features[1].descriptors[index1[0]])
    assert matches.scores[0] == pytest.approx(1 - bits.sum() / 256)


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_pairs_are_all_or_the_next_or_listed(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    assert choose_pairs(names, "exhaustive") == [
        *(("a", "b"), ("a", "c"), ("a", "d")),
        *(("b", "c"), ("b", "d"), ("c", "d")),
    ]
    assert choose_pairs(names, "sequential:1") == [("a", "b"), ("b", "c"), ("c", "d")]
    assert choose_pairs(names, "sequential") == choose_pairs(names, "exhaustive")  # fewer than ten follow
    (tmp_path / "pairs.txt").write_text("c a\n\nb d\na c\n")
    assert choose_pairs(names, str(tmp_path / "pairs.txt")) == [("a", "c"), ("b", "d")]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a b\na x\n", "line 2 .*'x'"), ("a a\n", "'a a'"), ("a b c\n", "line 1"), ("\n", "no line"), (None, "No such")],
)
def test_a_wrong_list_of_pairs_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "pairs.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        choose_pairs(["a", "b", "c"], str(tmp_path / "pairs.txt"))


def test_a_wrong_overlap_is_refused() -> None:
    with pytest.raises(ConfigError, match="sequential:0"):
        choose_pairs(["a", "b"], "sequential:0")


# -- cameras -----------------------------------------------------------------------------------------------------------

K = np.array([[410.0, 0, 322.5], [0, 405.0, 241.25], [0, 0, 1]])


@pytest.mark.parametrize(
    ("model", "distortion", "expected"),
    [
        ("plumb_bob", [], "PINHOLE"),
        ("plumb_bob", [0, 0, 0, 0, 0], "PINHOLE"),
        ("plumb_bob", [-0.28, 0.07, 2e-4, 2e-5, 0], "OPENCV"),
        ("plumb_bob", [-0.28, 0.07, 2e-4, 2e-5, -0.01], "FULL_OPENCV"),
        ("rational_polynomial", [0.3, 0.02, 1e-4, -2e-4, 0.003, 0.6, 0.05, 0.01], "FULL_OPENCV"),
        ("rational_polynomial", [0.3, 0.02, 1e-4, -2e-4, 0.003, 0.6, 0.05, 0.01, 0, 0, 0, 0], "FULL_OPENCV"),
        ("equidistant", [-0.01, 0.02, -0.005, 0.001], "OPENCV_FISHEYE"),
    ],
)
def test_cameras_of_ros_project_alike_in_colmap(model: str, distortion: list[float], expected: str) -> None:
    camera = Camera(K, np.array(distortion), (640, 480), model)
    found = calibrated(camera)
    assert found.model == expected and found.prior and found.size == (640, 480)
    theirs = pycolmap.Camera(model=found.model, width=640, height=480, params=found.params)
    assert theirs.verify_params()
    rays = np.random.default_rng(0).uniform((-0.6, -0.45), (0.6, 0.45), (50, 2))
    pixels = theirs.img_from_cam(np.column_stack([rays, np.ones(50)]))
    assert np.abs(pixels - 0.5 - project_rays(rays, camera)).max() < 1e-9


def test_cameras_that_colmap_has_no_model_for_are_refused() -> None:
    skewed = K + np.diag([0.5, 0], 1)
    with pytest.raises(CalibrationError, match="skew"):
        calibrated(Camera(skewed, np.zeros(5), (640, 480)))
    prism = np.array([0.3, 0.02, 1e-4, -2e-4, 0.003, 0.6, 0.05, 0.01, 1e-3, 0, 0, 0])
    with pytest.raises(CalibrationError, match="thin prism"):
        calibrated(Camera(K, prism, (640, 480), "rational_polynomial"))
    with pytest.raises(CalibrationError, match="focal"):
        calibrated(Camera(np.zeros((3, 3)), np.zeros(5), (640, 480)))


def test_images_of_other_sizes_cannot_share_a_camera() -> None:
    with pytest.raises(DataError, match="640x480 .*'b' of 480x640"):
        one_camera({"a": (640, 480), "b": (480, 640)}, guessed((640, 480)))


# -- verification ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_what_chance_gives_is_not_verified(rendered_views: Any, known: bool) -> None:
    """Wrong matches have many more inliers than COLMAP's 15; true ones stay."""
    views, pair = rendered_views, ("a", "b")
    camera = calibrated(Camera(views.K, np.zeros(0), SIZE, "")) if known else guessed(SIZE)
    check = verifier(one_camera(dict.fromkeys(pair, SIZE), camera), 2.0)
    rng = np.random.default_rng(0)
    for _ in range(5):
        points0, points1 = rng.uniform((0, 0), SIZE, (2, 300, 2))
        calibrations = (camera.calibration, camera.calibration) if known else None
        model = "essential" if known else "fundamental"
        assert verify(points0, points1, threshold=2.0, model=model, cameras=calibrations).num_inliers > 15
        found = check(pair, points0, points1)
        assert found.model == GeometryModel.NONE and not found.inliers.any() and len(found.inliers) == 300
    seen = np.flatnonzero(views.seen[2] & views.seen[4])[:60]
    true0, true1 = (np.concatenate([views.xy[i][seen], rng.uniform((0, 0), SIZE, (100, 2))]) for i in (2, 4))
    found = check(pair, true0, true1)
    assert found.model != GeometryModel.NONE and found.inliers[:60].mean() > 0.95


def test_false_alarms_fall_with_inliers_and_rise_with_matches() -> None:
    def alarms(model: str, inliers: int, matches: int) -> float:
        geometry = TwoViewGeometry(GeometryModel[model], np.eye(3), np.arange(matches) < inliers, 2.0)
        return log_false_alarms(geometry, (640, 480))

    for model in ("FUNDAMENTAL", "ESSENTIAL", "HOMOGRAPHY"):
        assert alarms(model, 60, 300) < alarms(model, 40, 300) < alarms(model, 30, 300)
        assert alarms(model, 30, 30) < alarms(model, 30, 100) < alarms(model, 30, 300)
    assert alarms("HOMOGRAPHY", 15, 300) < -5 < 0 < alarms("ESSENTIAL", 25, 300)  # a disc is less than a band
    # 10 of 20 by the binomials themselves: 20 * 184756 * 252 * (3200 / 307200)^5
    assert alarms("ESSENTIAL", 10, 20) == pytest.approx(np.log10(20 * 184756 * 252) + 5 * np.log10(1 / 96))


# -- database ----------------------------------------------------------------------------------------------------------


def pair_id(image0: int, image1: int) -> int:
    return min(image0, image1) * 2147483647 + max(image0, image1)


def numbers(row: tuple[int, int, bytes], kind: type) -> np.ndarray:
    return np.frombuffer(row[2], kind).reshape(row[:2])


@pytest.fixture
def true_pair(rendered_views: Any) -> tuple[dict[str, np.ndarray], MatchedPair]:
    """Two views with their exact points and fundamental matrix. The second name comes first in the database."""
    views, (i, j) = rendered_views, (2, 4)
    seen = np.flatnonzero(views.seen[i] & views.seen[j])
    keypoints = {"b.png": views.xy[j].astype(np.float32), "a.png": views.xy[i].astype(np.float32)}
    r = views.R[j] @ views.R[i].T
    fundamental = fundamental_from_pose(views.K, views.K, r, views.t[j] - r @ views.t[i])
    geometry = TwoViewGeometry(GeometryModel.FUNDAMENTAL, fundamental, np.arange(len(seen)) > 4, 1.0)
    matches = Matches(seen, seen, np.ones(len(seen), np.float32))
    return keypoints, MatchedPair(("a.png", "b.png"), (len(views.points),) * 2, matches, geometry)


def test_the_database_is_what_colmap_documents(tmp_path: Path, true_pair: Any, rendered_views: Any) -> None:
    keypoints, pair = true_pair
    camera = calibrated(Camera(rendered_views.K, np.zeros(0), SIZE, ""))
    write_database(tmp_path / "d.db", keypoints, Cameras((camera,), dict.fromkeys(keypoints, 0)), [pair])
    assert [file.name for file in tmp_path.iterdir()] == ["d.db"]
    stored = sqlite3.connect(f"file:{tmp_path / 'd.db'}?immutable=1", uri=True)
    assert stored.execute("SELECT image_id, name, camera_id FROM images").fetchall() == [
        (1, "b.png", 1),
        (2, "a.png", 1),
    ]
    ((model, width, height, params, prior),) = stored.execute(
        "SELECT model, width, height, params, prior_focal_length FROM cameras"
    )
    k = rendered_views.K
    assert (model, width, height, prior) == (1, *SIZE, 1)  # PINHOLE
    assert np.frombuffer(params).tolist() == [k[0, 0], k[1, 1], k[0, 2] + 0.5, k[1, 2] + 0.5]
    for number, name in enumerate(keypoints, 1):
        (row,) = stored.execute("SELECT rows, cols, data FROM keypoints WHERE image_id = ?", (number,))
        assert np.array_equal(numbers(row, np.float32), keypoints[name] + np.float32(0.5))
    ((number, *row),) = stored.execute("SELECT pair_id, rows, cols, data FROM matches")
    assert number == pair_id(1, 2)
    expected = np.stack([pair.matches.indices1, pair.matches.indices0], 1)  # image 1 is b.png
    assert np.array_equal(numbers(row, np.uint32), expected)
    ((number, config, matrix, *row),) = stored.execute(
        "SELECT pair_id, config, F, rows, cols, data FROM two_view_geometries"
    )
    assert (number, config) == (pair_id(1, 2), 3)  # UNCALIBRATED
    inliers = numbers(row, np.uint32)
    assert np.array_equal(inliers, expected[5:])
    points1, points2 = (keypoints[name].astype(np.float64) + 0.5 for name in ("b.png", "a.png"))
    fundamental = np.frombuffer(matrix).reshape(3, 3)
    distances = epipolar_distance(points1[inliers[:, 0]], points2[inliers[:, 1]], fundamental)
    assert distances.max() < 1e-3
    assert stored.execute("SELECT count(*) FROM descriptors").fetchone() == (0,)
    stored.close()


@pytest.mark.parametrize(
    ("model", "config", "column"),
    [("ESSENTIAL", 2, "E"), ("HOMOGRAPHY", 6, "H"), ("NONE", 1, None)],
)
def test_each_geometry_has_its_configuration(
    tmp_path: Path, true_pair: Any, model: str, config: int, column: str | None
) -> None:
    keypoints, pair = true_pair
    matrix = np.random.default_rng(0).normal(size=(3, 3))
    inliers = pair.geometry.inliers if model != "NONE" else np.zeros_like(pair.geometry.inliers)
    pair = replace(pair, names=("b.png", "a.png"))
    pair = replace(pair, geometry=TwoViewGeometry(GeometryModel[model], matrix, inliers, 1.0))
    write_database(tmp_path / "d.db", keypoints, one_camera(dict.fromkeys(keypoints, SIZE), guessed(SIZE)), [pair])
    with pycolmap.Database.open(tmp_path / "d.db") as database:
        found = database.read_two_view_geometry(1, 2)
        assert not database.read_camera(1).has_prior_focal_length
    assert found.config == config and len(found.inlier_matches) == inliers.sum()
    assert [name for name in "EFH" if getattr(found, name) is not None] == ([column] if column else [])
    if column == "E":
        assert np.array_equal(found.E, matrix)
    if column == "H":
        points = keypoints["b.png"].astype(np.float64)
        assert np.allclose(warp_points(points + 0.5, found.H), warp_points(points, matrix) + 0.5)


def test_an_existing_database_is_not_touched(tmp_path: Path, true_pair: Any) -> None:
    keypoints, pair = true_pair
    (tmp_path / "d.db").write_text("precious")
    with pytest.raises(DataError, match=r"no file at .*d.db"):
        write_database(tmp_path / "d.db", keypoints, one_camera(dict.fromkeys(keypoints, SIZE), guessed(SIZE)), [pair])
    assert (tmp_path / "d.db").read_text() == "precious"


# -- exact points ------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_recording(rendered_views: Any) -> Recording:
    """A replay whose tracks are the true points; each point's id changes its place from frame to frame."""
    views, frames = rendered_views, []
    for i in range(8):
        order = np.random.default_rng(i).permutation(np.flatnonzero(views.seen[i]))
        ids = np.sort(order).astype(np.uint32) + 1
        indices = np.argsort(order)
        keypoints = views.xy[i][order].astype(np.float32)
        tracks = Tracks(ids, ids, indices, keypoints[indices], None, None, np.zeros(len(ids), np.uint8), ids[:0])
        scores = np.ones(len(order), np.float32)
        frames.append(FrameRecord(i, 10**18 + i, "", "", i, SIZE, keypoints, scores, None, tracks))
    frames.insert(3, FrameRecord(3, 10**18 + 100, dropped="decode", error="damaged"))
    poses = np.tile(np.eye(4), (8, 1, 1))
    poses[:, :3, :3] = views.R.swapaxes(1, 2)
    poses[:, :3, 3] = -(poses[:, :3, :3] @ views.t[..., None])[..., 0]
    truth = GroundTruth(np.arange(8) + 10**18, poses)
    return Recording({}, frames, Camera(views.K, np.zeros(5), SIZE), truth)


def test_a_replay_with_exact_points_gives_the_exact_scene_twice(tmp_path: Path, exact_recording: Recording) -> None:
    """Also the pixel origin of keypoints and cameras is the same, or the errors would be ten times as large."""
    for folder in ("one", "two"):
        result = run(recording_source(exact_recording), tmp_path / folder, Plan())
        assert result.summary["registered"] == 8 and result.summary["models"] == 1
        assert result.summary["reprojection_px"] < 1e-3 and result.summary["inlier_ratio"] > 0.99
        assert result.summary["position_error"] < 1e-4 and result.summary["rotation_error_deg"] < 1e-2
        assert result.summary["compared"] == 8
    files = [
        "database.db",
        "matches.h5",
        "pairs.txt",
        *(f"sparse/0/{n}.txt" for n in ("cameras", "images", "points3D")),
    ]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    model = pycolmap.Reconstruction(tmp_path / "one" / "sparse" / "0")
    assert model.num_reg_images() == 8
    content = json.loads((tmp_path / "one" / "reconstruction.json").read_text())
    assert content["registered"] == [image_name(10**18 + i) for i in range(8)] and content["not_registered"] == []
    assert str(tmp_path) not in (tmp_path / "one" / "reconstruction.json").read_text()


def test_an_unknown_camera_is_found(tmp_path: Path, exact_recording: Recording, rendered_views: Any) -> None:
    source = recording_source(replace(exact_recording, camera=None))
    (model,) = run(source, tmp_path / "out", Plan()).models
    (focal,) = model.focal_lengths
    assert focal == pytest.approx(rendered_views.K[0, 0], rel=0.01)


def test_tracks_match_frames_at_any_distance(exact_recording: Recording, rendered_views: Any) -> None:
    source = recording_source(exact_recording, every=3)
    assert source.names == tuple(image_name(10**18 + i) for i in (0, 3, 6))
    features = dict(source.frames)
    matches = source.tracks(source.names[0], source.names[2])
    assert len(matches) == (rendered_views.seen[0] & rendered_views.seen[6]).sum()
    points0 = features[source.names[0]].keypoints[matches.indices0]
    points1 = features[source.names[2]].keypoints[matches.indices1]
    where = [np.flatnonzero(np.abs(rendered_views.xy[0] - point).max(1) < 1e-3)[0] for point in points0]
    assert np.abs(rendered_views.xy[6][where] - points1).max() < 1e-3
    assert (np.diff(matches.indices0) > 0).all()


def test_ids_of_another_epoch_are_other_tracks(exact_recording: Recording) -> None:
    last = exact_recording.frames[-1]
    again = replace(last, tracks=replace(last.tracks, epoch=1))
    source = recording_source(replace(exact_recording, frames=[*exact_recording.frames[:-1], again]))
    assert len(source.tracks(source.names[0], source.names[1])) > 0
    assert len(source.tracks(source.names[0], source.names[-1])) == 0


def test_a_replay_without_tracks_is_refused(exact_recording: Recording) -> None:
    frames = [replace(exact_recording.frames[0], tracks=None)]
    with pytest.raises(DataError, match="expected tracks"):
        recording_source(replace(exact_recording, frames=frames))


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path: Path, write_scene: Callable[..., Path]) -> Path:
    """Eight images with cameras.json."""
    return write_scene(tmp_path / "scene", pairs=False, tracks=False)


def reconstruct(capsys: Any, *words: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["reconstruct", *map(str, words)])
    return status, *capsys.readouterr()


def test_a_folder_of_images_is_reconstructed(tmp_path: Path, scene: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = (scene, "--out", out, "--max-keypoints", 400, "--method", "sift", "--compare", "rootsift")
    status, printed, _ = reconstruct(capsys, *words)
    assert status == 0 and "sift: 8 images, 28 pairs" in printed
    for label, folder in (("sift", out), ("rootsift", out / "rootsift")):
        found = json.loads((folder / "reconstruction.json").read_text())["summary"]
        line = next(line for line in printed.splitlines() if line.startswith(f"{label} ")).split()
        assert line[1:4] == ["8", "8", str(found["points"])]
        assert found["registered"] == 8 and found["reprojection_px"] < 1 and found["track_length"] > 3
        assert found["position_error_share"] < 0.01 and found["rotation_error_deg"] < 0.5
    with h5py.File(out / "features.h5") as stored:
        features = read_h5(stored, "images/3.png")
        descriptors = stored["images/3.png"]["descriptors"][()]
    image = cv2.cvtColor(cv2.imread(str(scene / "images" / "3.png")), cv2.COLOR_BGR2RGB)
    direct = create_method("sift")(image, 400)
    assert np.array_equal(features.keypoints, direct.keypoints) and features.image_size == SIZE
    assert descriptors.shape == (128, len(direct)) and np.allclose(descriptors.T, direct.descriptors)
    names = (out / "pairs.txt").read_text().splitlines()[0].split()
    indices, _ = as_hloc_reads(out / "matches.h5", *names)
    with pycolmap.Database.open(out / "database.db") as database:
        assert np.array_equal(database.read_matches(1, 2), indices)


def test_what_is_there_is_kept_and_other_settings_are_not_mixed(tmp_path: Path, scene: Path, capsys: Any) -> None:
    out, moved = tmp_path / "out", tmp_path / "7.png"
    words = (
        scene,
        "--out",
        out,
        "--export-only",
        "--pairs",
        "sequential:2",
        "--method",
        "sift",
        "--max-keypoints",
        300,
    )
    (scene / "images" / "7.png").rename(moved)
    assert reconstruct(capsys, *words)[0] == 0
    before = {name: (out / name).stat().st_mtime_ns for name in ("features.h5", "matches.h5")}
    assert reconstruct(capsys, *words)[0] == 0
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}
    moved.rename(scene / "images" / "7.png")
    status, printed, _ = reconstruct(capsys, *words)
    assert status == 0 and "8 images, 13 pairs" in printed
    with h5py.File(out / "matches.h5") as stored:
        assert sum(len(stored[name]) for name in stored) == 13
    with pycolmap.Database.open(out / "database.db") as database:
        assert database.num_images() == 8 and database.num_matched_image_pairs() == 13
    status, _, complaint = reconstruct(capsys, *words[:-1], 200)
    assert status == 2 and "max_keypoints was 300 and is now 200" in complaint
    assert reconstruct(capsys, *words[:-1], 200, "--overwrite")[0] == 0
    with h5py.File(out / "features.h5") as stored:
        assert len(read_h5(stored, "images/0.png")) == 200
    status, printed, _ = reconstruct(capsys, *words[:-1], 200, "--threshold", 1)
    assert status == 0 and "made again" in printed


def test_matching_goes_on_where_it_was_interrupted(tmp_path: Path, rendered_views: Any) -> None:
    sift = create_method("sift")
    path = tmp_path / "matches.h5"
    items = [(f"{i}", sift(image, 100), 1.0) for i, image in enumerate(rendered_views.images[:5])]
    write_h5(tmp_path / "features.h5", items)
    pairs = choose_pairs([name for name, _, _ in items], "exhaustive")
    check = verifier(one_camera({name: SIZE for name, _, _ in items}, guessed(SIZE)), 2.0)
    with h5py.File(tmp_path / "features.h5") as stored:
        features = StoredFeatures(stored)

        def until_interrupted(name0: str, name1: str) -> Matches:
            if (name0, name1) == pairs[4]:
                raise KeyboardInterrupt
            return features.match(name0, name1)

        with pytest.raises(KeyboardInterrupt):
            match_pairs(path, pairs, features, until_interrupted, check)
        assert [pair.names for pair in read_matches(path, pairs[:4])] == pairs[:4]
        assert match_pairs(path, pairs, features, features.match, check) == len(pairs) - 4
    assert [file.name for file in tmp_path.glob("matches*")] == ["matches.h5"]
    assert len(list(read_matches(path, pairs))) == len(pairs)


def test_an_interruption_leaves_a_report_of_what_was_done(
    tmp_path: Path, scene: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the second of two methods is mapped: the figures of the first, and the matches of the second."""
    out, mapped = tmp_path / "out", mapping.reconstruct

    def stopped_at_the_second(database: Path, *rest: Any) -> Any:
        if database.parent != out:
            raise KeyboardInterrupt
        return mapped(database, *rest)

    words = (scene, "--out", out, "--max-keypoints", 300, "--method", "sift", "--compare", "rootsift")
    monkeypatch.setattr(workspace, "reconstruct", stopped_at_the_second)
    status, printed, complaint = reconstruct(capsys, *words)
    assert status == 130 and "the same command goes on" in complaint
    assert any(line.startswith("sift ") for line in printed.splitlines())
    second = json.loads((out / "rootsift" / "reconstruction.json").read_text())
    assert second["summary"]["verified_pairs"] > 20 and "registered" not in second["summary"]
    assert "mapping" not in second["timings"]
    monkeypatch.undo()
    status, printed, _ = reconstruct(capsys, *words)
    assert status == 0 and any(line.startswith("rootsift ") for line in printed.splitlines())


def test_features_of_a_replay_alone_cannot_be_matched(tmp_path: Path, exact_recording: Recording, capsys: Any) -> None:
    run(recording_source(exact_recording), tmp_path / "model", Plan(mapping=False))
    status, _, complaint = reconstruct(capsys, tmp_path / "model" / "features.h5", "--out", tmp_path / "other")
    assert status == 2 and "found none; of a replay give the folder of the run" in complaint


FULL_DISK = """
import resource, signal
from pathlib import Path
import numpy as np
from scfeat_core.errors import ScfeatError
from scfeat_core.feature_files import merge_h5, write_h5
from scfeat_core.types import Features

features = Features(np.zeros((900, 2)), np.zeros(900), np.zeros((900, 64), np.float32), (640, 480), "made")
items = [(f"{i}.png", features, 1.0) for i in range(4)]
write_h5(Path("part.h5"), items)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    write_h5(Path("whole.h5"), items)
except ScfeatError as error:
    print(error)
"""


def test_a_disk_that_fills_up_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """HDF5 cannot close a file that it cannot write, and takes the process with it in the end."""
    found = subprocess.run([sys.executable, "-c", FULL_DISK], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0 and found.stderr == "", found.stderr[-500:]
    assert found.stdout.startswith("expected to write whole.h5, found: File too large; free space")
    assert [file.name for file in tmp_path.iterdir()] == ["part.h5"]


def test_parts_that_do_not_fit_on_the_disk_are_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(np.zeros((9, 2)), np.zeros(9), np.zeros((9, 64), np.float32), (640, 480), "made")
    write_h5(tmp_path / "part.h5", [("0.png", features, 1.0)])
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room._replace(free=1000))
    with pytest.raises(ScfeatError, match=r"expected room for .* found 0\.0 MB: free space, or choose another folder"):
        merge_h5(tmp_path / "all.h5", [tmp_path / "part.h5"])
    monkeypatch.undo()
    merge_h5(tmp_path / "all.h5", [tmp_path / "part.h5"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["all.h5", "part.h5"]


def test_a_damaged_image_is_reported_and_the_others_go_on(tmp_path: Path, scene: Path, capsys: Any) -> None:
    (scene / "images" / "2.png").write_bytes(b"no picture")
    status, _, complaint = reconstruct(
        capsys, scene, "--out", tmp_path / "out", "--method", "sift", "--max-keypoints", 300
    )
    content = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert status == 1 and "failed: images/2.png" in complaint and list(content["failed"]) == ["images/2.png"]
    assert content["summary"]["registered"] == 7 and content["summary"]["images"] == 8
    assert content["not_registered"] == ["images/2.png"]


def test_features_that_are_there_already_are_matched(tmp_path: Path, scene: Path, capsys: Any) -> None:
    assert cli.main(["extract", str(scene), "-o", str(tmp_path / "f.h5"), "--max-keypoints", "200"]) == 0
    before = (tmp_path / "f.h5").read_bytes()
    status, printed, _ = reconstruct(capsys, tmp_path / "f.h5", "--out", tmp_path / "out", "--camera", "shared")
    assert status == 0 and "1 cameras, 0 of them calibrated" in printed
    assert (tmp_path / "f.h5").read_bytes() == before and not (tmp_path / "out" / "features.h5").exists()
    assert printed.splitlines()[-1].endswith("out: matches.h5, pairs.txt, database.db, sparse/0"), "what is written"
    assert json.loads((tmp_path / "out" / "reconstruction.json").read_text())["summary"]["registered"] == 8
    status, _, complaint = reconstruct(capsys, tmp_path / "f.h5", "--out", tmp_path / "new", "--compare", "sift")
    assert status == 2 and "expected images with --compare" in complaint


def test_bundle_adjustment_leaves_calibrated_cameras_alone(tmp_path: Path, scene: Path, rendered_views: Any) -> None:
    (model,) = run(folder_source(scene), tmp_path / "out", Plan(SIFT)).models
    assert model.focal_lengths == (rendered_views.K[0, 0],)
    wrong = Camera(rendered_views.K * [[1.02], [1.02], [1]], np.zeros(0), SIZE, "")
    (model,) = run(folder_source(scene), tmp_path / "wrong", Plan(SIFT, camera=lambda size: wrong)).models
    assert model.focal_lengths == (pytest.approx(1.02 * rendered_views.K[0, 0]),)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_too_few_images_are_refused(tmp_path: Path, scene: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    status, _, complaint = reconstruct(capsys, tmp_path / "empty", "--out", tmp_path / "out")
    assert status == 2 and "expected images" in complaint
    status, _, complaint = reconstruct(capsys, tmp_path / "nowhere", "--out", tmp_path / "out")
    assert status == 2 and "nothing there" in complaint
    for image in (scene / "images").glob("[1-7].png"):
        image.unlink()
    status, _, complaint = reconstruct(capsys, scene, "--out", tmp_path / "out")
    assert status == 2 and "at least two images, found 1: images/0.png" in complaint
    (scene / "images" / "1.png").write_bytes(b"no picture")
    status, _, complaint = reconstruct(capsys, scene, "--out", tmp_path / "out", "--method", "sift")
    assert status == 2 and "features of at least two images, found 1 (images/1.png" in complaint


def test_sizes_that_do_not_fit_the_camera_are_refused(tmp_path: Path, scene: Path, capsys: Any) -> None:
    image = cv2.imread(str(scene / "images" / "5.png"))
    cv2.imwrite(str(scene / "images" / "5.png"), image[:200])
    words = (scene, "--out", tmp_path / "out", "--method", "sift", "--export-only")
    status, _, complaint = reconstruct(capsys, *words)
    assert status == 2 and "'images/5.png' of 320x240 pixels, as its calibration says, found 320x200" in complaint
    status, _, complaint = reconstruct(capsys, *words, "--camera", "shared")
    assert status == 2 and "share one camera, found 'images/5.png' of 320x200" in complaint
    (tmp_path / "camera.txt").write_text("1 PINHOLE 320 200 250 250 160 100\n")
    status, _, complaint = reconstruct(capsys, *words, "--camera", tmp_path / "camera.txt")
    assert status == 2 and "320x240" in complaint
    assert reconstruct(capsys, *words, "--camera", "each")[0] == 0


def test_a_missing_pycolmap_is_named_before_the_work(
    tmp_path: Path, scene: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    status, _, complaint = reconstruct(capsys, scene, "--out", tmp_path / "out", "--method", "sift")
    assert status == 2 and "pip install 'scfeat-python[reconstruct]'" in complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["database.db", "sparse", "features.h5"])
def test_results_of_others_are_not_replaced(tmp_path: Path, scene: Path, capsys: Any, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    status, _, complaint = reconstruct(capsys, scene, "--out", tmp_path / "out", "--method", "sift")
    assert status == 2 and name in complaint and (tmp_path / "out" / name).read_text() == "precious"


def test_nothing_to_reconstruct_is_said(tmp_path: Path, capsys: Any) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for i in range(3):
        cv2.imwrite(str(tmp_path / "noise" / f"{i}.png"), rng.integers(0, 255, (120, 160), np.uint8))
    status, printed, complaint = reconstruct(capsys, tmp_path / "noise", "--out", tmp_path / "out", "--method", "sift")
    assert status == 1 and "nothing could be reconstructed" in printed and complaint == ""
    assert printed.splitlines()[-1].endswith("out: features.h5, matches.h5, pairs.txt, database.db")
    assert json.loads((tmp_path / "out" / "reconstruction.json").read_text())["summary"]["registered"] == 0
    assert list((tmp_path / "out").glob("*.tmp")) == [] and not list((tmp_path / "out").glob(".sparse-*"))


def test_wrong_arguments_are_named(tmp_path: Path, scene: Path, capsys: Any) -> None:
    words = (scene, "--out", tmp_path / "out")
    assert "above 0" in reconstruct(capsys, *words, "--threshold", 0)[2]
    assert "none of the 8 images" in reconstruct(capsys, *words, "--pairs", _file(tmp_path / "pairs.txt", "x y z"))[2]
    assert "different methods" in reconstruct(capsys, *words, "--compare", "scfeat")[2]
    assert "expected a method of" in reconstruct(capsys, *words, "--method", "surf")[2]
    assert "camera.yaml" in reconstruct(capsys, *words, "--camera", tmp_path / "camera.yaml")[2]
    assert not (tmp_path / "out").exists()


def _file(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


# -- truth -------------------------------------------------------------------------------------------------------------


def test_poses_are_compared_after_a_similarity(exact_recording: Recording) -> None:
    truth = {str(i): pose for i, pose in enumerate(exact_recording.truth.poses)}
    rotation = cv2.Rodrigues(np.array([0.4, -0.3, 1.2]))[0]

    def elsewhere(pose: np.ndarray) -> np.ndarray:
        moved = np.eye(4)
        moved[:3, :3] = rotation @ pose[:3, :3]
        moved[:3, 3] = 0.2 * rotation @ pose[:3, 3] + (5, 6, 7)
        return moved

    found = {name: elsewhere(pose) for name, pose in truth.items()}
    exact = pose_errors(found, truth)
    assert exact.images == 8 and exact.position < 1e-9 and exact.rotation < 1e-6
    off = {name: pose.copy() for name, pose in truth.items()}
    off["3"][:3, 3] += (0, 0, 0.3)
    off["3"][:3, :3] = off["3"][:3, :3] @ cv2.Rodrigues(np.array([0, 0, np.radians(8)]))[0]
    errors = pose_errors(elsewhere_all(off, elsewhere), truth)
    assert 0.2 < errors.position_max < 0.35 and errors.position_max > 2 * errors.position
    assert errors.rotation > 0.8
    assert pose_errors({name: found[name] for name in ("0", "1")}, truth) is None
    assert pose_errors(found, dict.fromkeys(truth, np.eye(4))) is None  # all in one place


def test_a_straight_way_leaves_no_rotation_open(exact_recording: Recording) -> None:
    truth = {str(i): pose.copy() for i, pose in enumerate(exact_recording.truth.poses)}
    found = {name: pose.copy() for name, pose in truth.items()}
    rng = np.random.default_rng(0)
    for i, name in enumerate(truth):
        truth[name][:3, 3] = (i, 0, 0)
        found[name][:3, 3] = (i, *rng.normal(0, 1e-3, 2))
        truth[name][:3, 3] += (0, *rng.normal(0, 1e-3, 2))
    errors = pose_errors(found, truth)
    assert errors.position < 5e-3 and errors.rotation < 1e-6


def elsewhere_all(poses: dict[str, np.ndarray], move: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    return {name: move(pose) for name, pose in poses.items()}


def test_only_images_with_a_true_pose_are_compared(exact_recording: Recording) -> None:
    truth = truth_of(["a", "b"], [10**18 + 2, 10**18 + 10**9], exact_recording.truth)
    assert list(truth) == ["a"] and np.allclose(truth["a"], exact_recording.truth.poses[2])
    assert truth_of(["a"], [0], None) == {}


def test_errors_have_their_units_in_the_table() -> None:
    head = format_summaries({"sift": {"position_error": 0.0123, "rotation_error_deg": 0.5}}).splitlines()[0]
    assert "position, unit of truth" in head and "rotation deg" in head


# -- real images -------------------------------------------------------------------------------------------------------


def test_a_real_facade_is_reconstructed(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "eval" / "strecha_Herz-Jesus-P8"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    source = folder_source(folder)
    source = replace(source, names=source.names[:5], files=source.files[:5])
    summary = run(source, tmp_path / "out", Plan(Extraction("scfeat", 512, {"max_edge": 480}))).summary
    assert summary["registered"] == 5 and summary["reprojection_px"] < 1.2
    assert summary["position_error"] < 0.05 and summary["rotation_error_deg"] < 0.5  # metres, of a facade of 20
