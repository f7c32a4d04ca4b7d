"""Weight files: a round trip, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scfeat_core.errors import WeightsError
from scfeat_core.network import weights
from scfeat_core.network.model import VARIANTS, SCFeat


@pytest.fixture(scope="module")
def model() -> SCFeat:
    torch.manual_seed(0)
    return SCFeat.create("lite").eval()


@pytest.fixture
def saved(model: SCFeat, tmp_path: Path) -> Path:
    path = tmp_path / "own.safetensors"
    weights.save_model(model, path, half=False)
    return path


def test_round_trip_gives_the_same_network(model: SCFeat, saved: Path) -> None:
    loaded = SCFeat.from_pretrained(saved)
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        for a, b in zip(model(image), loaded(image), strict=True):
            torch.testing.assert_close(a, b)
    assert loaded.config == model.config
    assert loaded.descriptor_space == f"scfeat:{weights.file_sha256(saved)[:6]}"


def test_equal_weights_are_equal_files(model: SCFeat, saved: Path, tmp_path: Path) -> None:
    for attempt in range(8):  # the library orders metadata by chance
        weights.save_model(model, tmp_path / f"{attempt}.safetensors", half=False)
        assert (tmp_path / f"{attempt}.safetensors").read_bytes() == saved.read_bytes()


def test_checksum_is_insisted_on(saved: Path) -> None:
    SCFeat.from_pretrained(saved, sha256=weights.file_sha256(saved))
    with pytest.raises(WeightsError, match="expected sha256 0000"):
        SCFeat.from_pretrained(saved, sha256="0" * 64)


def test_missing_file_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="scfeat train"):
        SCFeat.from_pretrained(tmp_path / "none.safetensors")


def test_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(WeightsError, match="found 'superb'"):
        SCFeat.from_pretrained("superb")


@pytest.mark.parametrize("keep", [0, 7, 1000, 0.5])
def test_truncated_file(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(WeightsError, match="complete safetensors file"):
        SCFeat.from_pretrained(saved)


def test_a_single_damaged_number_is_noticed(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1000] ^= 1
    saved.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged"):
        SCFeat.from_pretrained(saved)


def test_large_weights_in_several_files(model: SCFeat, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "parts" / "large.safetensors"
    sha256 = weights.save_model(model, path, half=False, max_bytes=2**20)
    parts = sorted(path.parent.glob("large.safetensors.*"))
    assert len(parts) >= 2 and all(file.stat().st_size < 2**20 + 2**16 for file in (path, *parts))
    whole, again = weights.load_model(saved).state_dict(), weights.load_model(path, sha256=sha256).state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    content = bytearray(parts[0].read_bytes())
    content[-3] ^= 1
    parts[0].write_bytes(content)
    with pytest.raises(WeightsError, match="expected sha256"):
        weights.load_model(path)
    parts[0].unlink()
    with pytest.raises(WeightsError, match="expected a part of the weights"):
        weights.load_model(path)


def test_others_may_read_the_file(saved: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~umask


def test_safetensors_of_another_program(saved: Path) -> None:
    save_file({"weight": torch.zeros(3)}, saved)
    with pytest.raises(WeightsError, match="another kind"):
        SCFeat.from_pretrained(saved)


def test_tensors_that_do_not_fit_the_header(saved: Path, model: SCFeat) -> None:
    tensors = load_file(saved)
    del tensors["detector.score.0.bias"]
    header = {"format": "scfeat", "config": "{}", "data": weights._digest(tensors)}
    save_file(tensors, saved, metadata=header)
    with pytest.raises(WeightsError, match="do not fit"):
        SCFeat.from_pretrained(saved)


def test_header_of_another_version(saved: Path) -> None:
    tensors = load_file(saved)
    header = {"format": "scfeat", "config": json.dumps({"attention": True}), "data": weights._digest(tensors)}
    save_file(tensors, saved, metadata=header)
    with pytest.raises(WeightsError, match=r"another version of scfeat.*attention"):
        SCFeat.from_pretrained(saved)


def test_numbers_that_float16_cannot_hold_are_not_saved(tmp_path: Path) -> None:
    model = SCFeat.create("lite")
    model.detector.score[0].bias.data.fill_(1e6)
    with pytest.raises(WeightsError, match=r"detector\.score\.0\.bias"):
        weights.save_model(model, tmp_path / "large.safetensors")


def test_lite_is_shipped_as_the_variant_is_trained() -> None:
    assert "lite" in weights.shipped_weights()
    assert SCFeat.from_pretrained("lite").config == VARIANTS["lite"]


@pytest.mark.parametrize("name", weights.shipped_weights())
def test_shipped_weights_match_their_card(name: str) -> None:
    loaded = SCFeat.from_pretrained(name)
    assert weights.card_sha256(name).startswith(loaded.descriptor_space.removeprefix("scfeat:"))
    card = (weights.WEIGHTS_FOLDER / f"{name}.md").read_text()
    assert "licence" in card.lower()
