"""The self-check of a loader must pass what is right and catch what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scfeat_core.data.pair_check import check_batch, check_pairs, format_report, sift_matches
from scfeat_core.data.posed import PosedConfig, PosedPairs
from scfeat_core.data.posed_images import open_posed_images
from scfeat_core.geometry import warp_points


def plain(folder: Path, **settings: object) -> PosedConfig:
    return PosedConfig(data_path=folder, size=(256, 192), **settings)  # type: ignore[arg-type]


@pytest.fixture
def pairs(tmp_path, write_scene) -> PosedPairs:
    return open_posed_images(plain(write_scene(tmp_path / "room")))


def test_right_geometry_passes(pairs) -> None:
    report = check_pairs(pairs, 6, np.random.default_rng(0))
    assert report.agrees and report.suspects == []
    assert report.overall.pairs == report.overall.measured == 6
    assert report.overall.share > 0.9 and report.overall.best_half < 0.3 and report.overall.point_distance < 0.05
    assert report.overall.matches > 100
    text = format_report(report)
    assert "room" in text and "agree with the fundamental matrices." in text and "does not" not in text


def test_transposed_matrix_is_caught(pairs) -> None:
    """Where it differs: that of two parallel cameras side by side is, but for the sign, its own transpose."""
    for index in (0, 8, 12):
        batch = pairs.load(index, np.random.default_rng(0))
        right = check_batch(batch)
        wrong = check_batch(batch._replace(fundamental=batch.fundamental.transpose(1, 2)))
        assert right.matches == wrong.matches > 50
        assert right.share > 0.8 and right.best_half < 0.5 and right.point_distance < 0.1
        assert wrong.share < 0.3 and wrong.best_half > 2 and wrong.point_distance > 2


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_calibration_of_another_resolution_is_caught(tmp_path, write_scene, factor) -> None:
    folder = write_scene(tmp_path / "room", tracks=False)
    path = folder / "cameras.json"
    cameras = json.loads(path.read_text())
    for camera in cameras:
        camera["K"] = (np.diag([factor, factor, 1]) @ camera["K"]).tolist()
    path.write_text(json.dumps(cameras))
    report = check_pairs(open_posed_images(plain(folder)), 6, np.random.default_rng(0))
    assert not report.agrees and report.suspects == ["room"]
    assert "do not agree with the fundamental matrices of: room" in format_report(report)
    assert np.isnan(report.overall.point_distance)


def test_poses_from_camera_to_world_are_caught(pairs) -> None:
    scene = pairs.scenes[0]
    r = scene.R.swapaxes(1, 2)
    inverted = replace(scene, R=r, t=-(r @ scene.t[..., None])[..., 0])
    assert not check_pairs(PosedPairs([inverted], pairs.config), 6, np.random.default_rng(0)).agrees


def test_wrong_tracks_are_caught(pairs) -> None:
    scene = pairs.scenes[0]
    assert scene.tracks is not None
    shifted = replace(scene, tracks=replace(scene.tracks, xy=scene.tracks.xy[::-1].copy()))
    report = check_pairs(PosedPairs([shifted], pairs.config), 6, np.random.default_rng(0))
    assert report.overall.share > 0.9 and report.overall.point_distance > 2
    assert report.suspects == ["room"]


def test_too_little_to_judge_is_said(tmp_path, write_scene) -> None:
    folder = write_scene(tmp_path / "room")
    pairs = open_posed_images(plain(folder))
    report = check_pairs(pairs, 2, np.random.default_rng(0))
    assert report.overall.agrees is None and report.agrees
    assert "(too little to judge)" in format_report(report)
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    nothing = check_pairs(pairs, 3, np.random.default_rng(0))
    assert nothing.rows == () and nothing.overall.agrees is None
    assert "0/0" in format_report(nothing)


def test_sift_matches_correspond(rendered_views) -> None:
    gray = rendered_views.images[0][..., 0]
    shift = np.array([[1.0, 0, -20], [0, 1, -12], [0, 0, 1]])
    points0, points1 = sift_matches(gray[:200, :280], np.ascontiguousarray(gray[12:212, 20:300]))
    assert len(points0) > 50
    assert np.median(np.linalg.norm(warp_points(points0, shift) - points1, axis=1)) < 0.1
    assert [len(p) for p in sift_matches(gray, np.zeros_like(gray))] == [0, 0]


def test_real_scene_passes(shared_data) -> None:
    config = replace(plain(shared_data / "train" / "multiview" / "lund_door"), size=(240, 320))
    report = check_pairs(open_posed_images(config), 3, np.random.default_rng(0))
    assert report.agrees and report.overall.agrees
    assert report.overall.share > 0.9 and report.overall.point_distance < 0.3
