"""MegaDepth in the layout of CAPS."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scfeat_core.data.megadepth import find_scenes, open_megadepth
from scfeat_core.data.posed import PosedConfig
from scfeat_core.data.posed_images import open_posed_images
from scfeat_core.errors import DataError


def plain(folder: Path, **settings: object) -> PosedConfig:
    return PosedConfig(data_path=folder, augmentation="none", size=(160, 120), **settings)  # type: ignore[arg-type]


def convert(folder: Path, root: Path, name: str, *, pairs: bool = True) -> Path:
    """The scene ``folder`` with cameras.json as ``root``/``name``/aligned."""
    target = root / name / "aligned"
    target.mkdir(parents=True)
    (target / "images").symlink_to(folder / "images")
    lines = ["# name w h fx fy cx cy R t"]
    for camera in json.loads((folder / "cameras.json").read_text()):
        (fx, _, cx), (_, fy, cy), _ = camera["K"]
        numbers = [camera["w"], camera["h"], fx, fy, cx, cy, *np.ravel(camera["R"]), *camera["t"]]
        lines.append(" ".join([camera["file"], *map(repr, map(float, numbers))]))
    (target / "img_cam.txt").write_text("\n".join(lines))
    if pairs:
        (target / "pairs.txt").write_text((folder / "pairs.txt").read_text())
    return target


def test_same_pairs_as_from_cameras_json(tmp_path, write_scene) -> None:
    source = write_scene(tmp_path / "s", tracks=False)
    convert(source, tmp_path / "train", "0001/dense0")
    pairs, expected = open_megadepth(plain(tmp_path / "train")), open_posed_images(plain(source))
    assert len(pairs) == len(expected) == 17
    for i in range(0, 17, 4):
        a, b = (p.load(i, np.random.default_rng(i)) for p in (pairs, expected))
        assert torch.equal(a.image0, b.image0) and torch.equal(a.image1, b.image1)
        assert torch.allclose(a.fundamental, b.fundamental, atol=1e-7)
        assert a.valid.shape == (1, 0)


def test_scenes_are_sorted_and_can_be_excluded(tmp_path, write_scene) -> None:
    source = write_scene(tmp_path / "s", images=(0, 1, 2))
    names = ["0022/dense1", "0022/dense0", "0008/dense0", "5018/dense0", "0103/dense2", "1589/dense0"]
    for name in names:
        convert(source, tmp_path / "train", name)
    assert [scene.name for scene in find_scenes(tmp_path / "train")] == sorted(names)
    split = tmp_path / "split.yaml"
    split.write_text("scenes: ['0022']")
    config = plain(tmp_path / "train", split=split, excluded_scenes=("0008", "1589"))
    trained, held_back = (open_megadepth(config, held_back=h) for h in (False, True))
    assert [scene.name for scene in trained.scenes] == ["0103/dense2", "5018/dense0"]
    assert [scene.name for scene in held_back.scenes] == ["0022/dense0", "0022/dense1"]


def test_reconstructions_of_one_place_are_on_the_same_side(tmp_path, write_scene) -> None:
    source = write_scene(tmp_path / "s", images=(0, 1, 2))
    for name in ("0001/dense0", "0001/dense1", *(f"{i:04d}/dense0" for i in range(2, 7))):
        convert(source, tmp_path / "train", name)

    def places(split: Path | None) -> list[set[str]]:
        config = plain(tmp_path / "train", split=split)
        return [{s.name for s in open_megadepth(config, held_back=h).scenes} for h in (False, True)]

    trained, held_back = places(None)
    assert held_back == {"0001/dense0", "0001/dense1"} and len(trained) == 5
    split = tmp_path / "split.yaml"
    split.write_text("scenes: [0001/dense1]")
    assert places(split) == [trained, held_back]


def test_without_a_list_pairs_are_made_by_view_angle(tmp_path, write_scene) -> None:
    convert(write_scene(tmp_path / "s"), tmp_path / "train", "0001/dense0", pairs=False)
    wide = open_megadepth(plain(tmp_path / "train"))
    narrow = open_megadepth(plain(tmp_path / "train", max_view_angle=12.0))
    assert 0 < len(narrow) < len(wide) < 28
    with pytest.raises(DataError, match="damaged scene"):
        open_megadepth(plain(tmp_path / "train", pair_source="pairs_txt"))


@pytest.mark.parametrize("line", ["a.jpg 640 480 500 500", "a.jpg" + " x" * 18, "a b.jpg" + " 1" * 18])
def test_damaged_camera_lists_are_named(tmp_path, write_scene, caplog, line) -> None:
    source = write_scene(tmp_path / "s")
    convert(source, tmp_path / "train", "0001/dense0")
    target = convert(source, tmp_path / "train", "0002/dense0")
    path = target / "img_cam.txt"
    path.write_text(path.read_text() + "\n" + line)
    pairs = open_megadepth(plain(tmp_path / "train"))
    assert [scene.name for scene in pairs.scenes] == ["0001/dense0"]
    assert pairs.problems == {"damaged scene": 1}
    assert "0002/dense0/aligned/img_cam.txt" in caplog.text


def test_another_layout_is_refused(tmp_path, write_scene) -> None:
    write_scene(tmp_path / "s")
    with pytest.raises(DataError, match=r"dense\*/aligned/img_cam.txt"):
        open_megadepth(plain(tmp_path))
