"""Replays of damaged recordings: damage costs itself, and no ground truth is moved to where it does not belong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[replay]'")

from test_replay import START, STEP, bag, depth_bag, dropped, images, job, jpeg, picture, replay

from scfeat_core.replay.metrics import read_metrics
from scfeat_core.replay.run_folder import read_run
from scfeat_ros.bags import open_bag, write_bag
from scfeat_ros.replay.run import run_job

NO_HEADER = b"\x00\x01\x00\x00"


# -- headers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3])
def test_an_early_image_without_a_header_is_one_drop(tmp_path: Path, at: int) -> None:
    found = images(11)
    found[at] = NO_HEADER
    replay(bag(tmp_path / "bag", found), tmp_path / "out")
    assert dropped(tmp_path / "out") == ["decode" if i == at else "" for i in range(11)]
    assert read_run(tmp_path / "out").frames[at].stamp == START + at * STEP  # that of the recording


@pytest.mark.parametrize("at", [0, 3])
def test_a_damaged_frame_id_costs_nothing(tmp_path: Path, at: int) -> None:
    found = images(8)
    found[at] = jpeg(START + at * STEP, picture(3 * at), frame_id="lenS")
    assert replay(bag(tmp_path / "bag", found), tmp_path / "out")["processed"] == 8


@pytest.mark.parametrize(("at", "pairs"), [(0, 6), (3, 5)])
def test_a_depth_map_without_a_header_costs_its_pairs(tmp_path: Path, at: int, pairs: int) -> None:
    path, lines = depth_bag(tmp_path / "bag"), []
    with open_bag(path) as source:
        types = {topic.name: topic.type for topic in source.topics}
        kept = list(source.messages(source.topics))
    of_depth = [i for i, message in enumerate(kept) if message.topic == "/eye/depth_registered"]
    kept[of_depth[at]] = replace(kept[of_depth[at]], data=kept[of_depth[at]].data[:8])
    write_bag(tmp_path / "damaged", types, kept)
    (tmp_path / "damaged" / "groundtruth.txt").write_bytes((path / "groundtruth.txt").read_bytes())
    run_job(job(tmp_path / "damaged", tmp_path / "out"), lines.append, progress=False)
    assert np.isfinite(read_metrics(tmp_path / "out").per_frame["repeatability"]).sum() == pairs
    assert "warning: 1 depth maps on /eye/depth_registered are damaged, their frames have no repeatability" in lines


def test_depth_maps_of_images_whose_first_frame_id_is_damaged(tmp_path: Path) -> None:
    path = depth_bag(tmp_path / "bag")
    with open_bag(path) as source:
        types = {topic.name: topic.type for topic in source.topics}
        kept = list(source.messages(source.topics))
    first = next(i for i, message in enumerate(kept) if message.topic == "/eye/image/compressed")
    kept[first] = replace(kept[first], data=jpeg(START, picture(0), frame_id="lenS"))
    write_bag(tmp_path / "damaged", types, kept)
    (tmp_path / "damaged" / "groundtruth.txt").write_bytes((path / "groundtruth.txt").read_bytes())
    assert replay(tmp_path / "damaged", tmp_path / "out")["repeatability"] > 0.85
