"""HPatches: the protocol on a small tree with known answers, and published results recomputed from cache files."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from scfeat_core.cli import main
from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.evaluation import hpatches
from scfeat_core.evaluation.datasets import HPATCHES_EXCLUDED, hpatches_pairs
from scfeat_core.evaluation.hpatches_cache import read_cache, write_cache
from scfeat_core.evaluation.methods import create_method
from scfeat_core.evaluation.views import Protocol, extract_views

SIZE = (160, 120)
SHIFT = 4  # pixels from one image of a sequence to the next
ERROR = 5  # pixels, by which the homographies of v_wrong are off


# -- published figures -------------------------------------------------------------------------------------------------

# Results of the authors of SCFeat, of PoSFeat and CAPS in their own benchmark, which they published as cache files:
# mean number of features; matches of all, illumination and viewpoint; MMAscore of the same; MMA@1..10 of the same.
PUBLISHED = {
    "scfeat-20k": (
        14876.1,
        (3834.0, 3657.5, 3997.8),
        (0.8197, 0.8867, 0.7575),
        (0.5074, 0.7337, 0.8220, 0.8699, 0.8926, 0.9038, 0.9105, 0.9142, 0.9168, 0.9186),
        (0.6042, 0.7996, 0.8784, 0.9319, 0.9564, 0.9671, 0.9737, 0.9771, 0.9797, 0.9812),
        (0.4176, 0.6726, 0.7696, 0.8122, 0.8333, 0.8451, 0.8519, 0.8558, 0.8585, 0.8604),
    ),
    "scfeat-nms-8k": (
        4875.1,
        (2264.4, 1865.5, 2634.8),
        (0.7878, 0.8461, 0.7336),
        (0.4257, 0.6731, 0.7837, 0.8432, 0.8739, 0.8899, 0.8992, 0.9045, 0.9083, 0.9106),
        (0.4825, 0.7230, 0.8346, 0.9007, 0.9353, 0.9523, 0.9622, 0.9676, 0.9715, 0.9739),
        (0.3729, 0.6267, 0.7364, 0.7897, 0.8169, 0.8320, 0.8408, 0.8460, 0.8496, 0.8519),
    ),
    "posfeat-s": (
        7757.8,
        (3962.0, 4345.2, 3606.1),
        (0.7607, 0.8232, 0.7027),
        (0.3920, 0.6336, 0.7510, 0.8148, 0.8494, 0.8680, 0.8786, 0.8851, 0.8895, 0.8925),
        (0.4355, 0.6778, 0.8071, 0.8811, 0.9203, 0.9402, 0.9512, 0.9579, 0.9626, 0.9657),
        (0.3516, 0.5926, 0.6990, 0.7532, 0.7834, 0.8009, 0.8112, 0.8176, 0.8217, 0.8245),
    ),
    "caps-superpoint": (
        1562.6,
        (870.5, 749.6, 982.8),
        (0.7271, 0.7668, 0.6903),
        (0.3568, 0.5846, 0.7052, 0.7684, 0.8090, 0.8338, 0.8518, 0.8670, 0.8795, 0.8888),
        (0.4333, 0.6107, 0.7275, 0.7940, 0.8427, 0.8704, 0.8907, 0.9097, 0.9260, 0.9379),
        (0.2858, 0.5605, 0.6845, 0.7447, 0.7778, 0.7998, 0.8157, 0.8274, 0.8364, 0.8432),
    ),
}
PAIRS = {"i": 260, "v": 280}


def _spread(mean: float, count: int) -> np.ndarray:
    """(count,) whole numbers with this mean, as near as whole numbers come."""
    return np.diff(np.round(mean * np.arange(count + 1))).astype(int)


def _content(name: str) -> np.ndarray:
    """What D2-Net's script would have stored: dicts with numpy scalars, thresholds to 15, and three arrays."""
    keypoints, matches, _, _, *mma = PUBLISHED[name]
    sums = [
        {np.int64(t): np.float64(row[min(t, 10) - 1] * PAIRS[kind]) for t in range(1, 16)}
        for kind, row in zip("iv", mma, strict=True)
    ]
    kinds = np.array(["i"] * PAIRS["i"] + ["v"] * PAIRS["v"])
    counts = np.concatenate([_spread(matches[1], PAIRS["i"]), _spread(matches[2], PAIRS["v"])])
    content = np.empty(3, object)
    content[0], content[1] = sums
    content[2] = [kinds, _spread(keypoints, 648), counts]
    return content


def _store(path: Path, content: Any, protocol: int = 4, module: bytes = b"") -> Path:
    """As np.save does it, with any protocol; module: where numpy's functions were, in old versions elsewhere."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": (3,)})
    data = pickle.dumps(content, protocol=protocol)
    path.write_bytes(buffer.getvalue() + (data.replace(b"numpy._core", module) if module else data))
    return path


@pytest.fixture(params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    np.save(tmp_path / f"{request.param}.npy", _content(request.param), allow_pickle=True)
    return tmp_path / f"{request.param}.npy"


def test_published_figures_are_recomputed(published):
    keypoints, matches, scores, *mma = PUBLISHED[published.stem]
    counts = read_cache(published)
    for kinds, n, score, row in zip(("iv", "i", "v"), matches, scores, mma, strict=True):
        summary = hpatches.summarise_counts(counts, kinds)
        assert summary["pairs"] == (540 if kinds == "iv" else PAIRS[kinds])
        assert summary["matches"] == pytest.approx(n, abs=0.06)
        assert [summary[f"MMA@{t}"] for t in range(1, 11)] == pytest.approx([100 * x for x in row], abs=0.011)
        assert summary["MMAscore"] == pytest.approx(100 * score, abs=0.011)
    summary = hpatches.summarise_counts(counts)
    assert summary["keypoints"] == pytest.approx(keypoints, abs=0.06)
    assert summary["keypoints_min"] <= keypoints <= summary["keypoints_max"]


def test_the_command_shows_cache_files_side_by_side(tmp_path, capsys):
    files = [_store(tmp_path / f"{name}.npy", _content(name)) for name in PUBLISHED]
    assert main(["evaluate", "hpatches", "--cache", *map(str, files), "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.split("all sets")[1].splitlines() if "scfeat-20k" in line)
    numbers = [float(word) for word in line.replace("scfeat-20k", "").split()]
    assert numbers[:3] == [540, 14876, 3834] and numbers[-1] == pytest.approx(81.97, abs=0.011)
    assert numbers[3:13] == pytest.approx([100 * x for x in PUBLISHED["scfeat-20k"][3]], abs=0.011)
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["label"] for run in stored["runs"]] == list(PUBLISHED)
    assert (tmp_path / "out" / "hpatches.png").is_file() and (tmp_path / "out" / "hpatches_sets.png").is_file()


@pytest.mark.parametrize(
    ("protocol", "module"), [(2, b"numpy.core"), (3, b"numpy.core"), (3, b"numpy._core"), (4, b"numpy._core")]
)
def test_files_of_old_numpys_are_read(protocol, module, tmp_path):
    path = _store(tmp_path / "old.npy", _content("scfeat-20k"), protocol, module)
    assert hpatches.summarise_counts(read_cache(path))["MMAscore"] == pytest.approx(81.97, abs=0.011)


# -- what a file may do ------------------------------------------------------------------------------------------------


class _Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _attacks(target: Path) -> dict[str, Any]:
    import os

    from numpy.testing import measure

    return {
        "system": _Call(os.system, f"touch {target}"),
        "exec": _Call(exec, f"open({str(target)!r}, 'w')"),
        "open": _Call(open, str(target), "w"),
        "numpy": _Call(measure, f"open({str(target)!r}, 'w')"),
        "getattr": _Call(getattr, {}, "keys"),
        "huge": _Call(np.ndarray, (1 << 50,)),
    }


@pytest.mark.parametrize("attack", ["system", "exec", "open", "numpy", "getattr", "huge"])
@pytest.mark.parametrize("place", ["whole", "inside"])
def test_a_file_that_would_run_code_is_refused(attack, place, tmp_path):
    target = tmp_path / "pwned"
    malice = _attacks(target)[attack]
    content = _content("scfeat-20k")
    content[2] = [malice, *content[2][1:]]
    path = _store(tmp_path / "evil.npy", malice if place == "whole" else content)
    with pytest.raises(DataError, match="evil.npy"):
        read_cache(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "damaged"),
        (b"\x93NUMPY\x01\x00", "damaged"),
        (b"not an array", "damaged"),
    ],
)
def test_a_damaged_file_is_named(content, found, tmp_path):
    (tmp_path / "broken.npy").write_bytes(content)
    with pytest.raises(DataError, match=found):
        read_cache(tmp_path / "broken.npy")
    whole = _store(tmp_path / "whole.npy", _content("scfeat-20k")).read_bytes()
    (tmp_path / "broken.npy").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"broken\.npy"):
        read_cache(tmp_path / "broken.npy")
    with pytest.raises(DataError, match="No such file"):
        read_cache(tmp_path / "absent.npy")


def test_contents_that_make_no_sense_are_refused(tmp_path):
    def broken(change: Any) -> Path:
        content = _content("scfeat-20k")
        change(content)
        return _store(tmp_path / "broken.npy", content)

    def too_large(content: np.ndarray) -> None:
        content[0] = dict.fromkeys(range(1, 16), 1000.0)

    def other_kind(content: np.ndarray) -> None:
        content[2][0] = np.array(["x"] * 540)

    def few_matches(content: np.ndarray) -> None:
        content[2][2] = content[2][2][:7]

    def few_thresholds(content: np.ndarray) -> None:
        content[0] = {1: 2.0, 3: 4.0}

    def no_lists(content: np.ndarray) -> None:
        content[2] = 3

    expected = {
        too_large: "at most 260",
        other_kind: "'i' and 'v'",
        few_matches: "each of 540",
        few_thresholds: "thresholds",
        no_lists: "another content",
    }
    for change, message in expected.items():
        with pytest.raises(DataError, match=message):
            read_cache(broken(change))


# -- the protocol ------------------------------------------------------------------------------------------------------


def _picture(seed: int) -> np.ndarray:
    """(H, W, 3) uint8, large enough to cut shifted views from."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (SIZE[1] // 5 + 10, SIZE[0] // 5 + 10, 3), np.uint8)
    return cv2.resize(small, None, fx=5, fy=5, interpolation=cv2.INTER_CUBIC)


def _write_sequence(folder: Path, seed: int, shift: int, error: int) -> None:
    """Six views of one picture, each ``shift`` pixels to the right of the one before; truths that are off by error."""
    picture = _picture(seed)
    folder.mkdir()
    for number in range(1, 7):
        x = shift * (number - 1)
        assert cv2.imwrite(str(folder / f"{number}.ppm"), picture[: SIZE[1], x : x + SIZE[0]])
        if number > 1:
            np.savetxt(folder / f"H_1_{number}", [[1, 0, -x], [0, 1, error], [0, 0, 1]])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """i_same: six times the same image. v_shift: shifted, truth exact. v_wrong: the truth is off by 5 px."""
    root = tmp_path_factory.mktemp("hpatches")
    _write_sequence(root / "i_same", 1, 0, 0)
    _write_sequence(root / "v_shift", 2, SHIFT, 0)
    _write_sequence(root / "v_wrong", 3, SHIFT, ERROR)
    for name in HPATCHES_EXCLUDED:
        (root / name).mkdir()  # without images: reading one would fail
    (root / "notes").mkdir()
    return root


def test_the_excluded_sequences_are_left_out(tree):
    pairs = hpatches_pairs(tree)
    assert len(pairs) == 15 and len(HPATCHES_EXCLUDED) == 8
    assert [pair.split for pair in pairs] == ["illumination"] * 5 + ["viewpoint"] * 10
    assert pairs[0].name == "i_same/1-2" and pairs[-1].path1 == tree / "v_wrong" / "6.ppm"
    with pytest.raises(DataError, match="i_dc"):  # asked for by name it is read, and has nothing
        hpatches_pairs(tree, ["i_dc"])
    with pytest.raises(DataError, match="sequences i_"):
        hpatches_pairs(tree / "notes")


def test_known_homographies_give_the_errors_that_are_known(tree):
    pairs = hpatches_pairs(tree)
    protocol = Protocol(max_keypoints=150, longer_side=0)
    method = create_method("sift")
    ((*rows,),) = hpatches.evaluate_hpatches(pairs, lambda p: [extract_views(p, method, protocol)], [protocol])
    by_sequence = {
        name: [row for row in rows if row.name.startswith(name)] for name in ("i_same", "v_shift", "v_wrong")
    }
    same = hpatches.summarise_hpatches(by_sequence["i_same"])
    assert same["MMA@1"] == same["MMAscore"] == pytest.approx(100) and same["AUC@1"] > 99
    shifted = hpatches.summarise_hpatches(by_sequence["v_shift"])
    assert shifted["MMA@1"] > 90 and shifted["pairs"] == 5
    # The shift along x is compensated, so all that is left is the error along y.
    wrong = hpatches.summarise_hpatches(by_sequence["v_wrong"])
    assert wrong["MMA@4"] < 5 and wrong["MMA@6"] > 90
    corners = [row.corner_errors[0] for row in by_sequence["v_wrong"]]
    assert corners == pytest.approx([ERROR] * 5, abs=0.5)
    assert all(len(row.accuracy) == 15 for row in rows)


def test_the_command_measures_stores_and_reads_back(tree, tmp_path, capsys):
    cache = tmp_path / "new" / "sift.npy"
    command = ["evaluate", "hpatches", str(tree), "--method", "sift", "--max-keypoints", "150"]
    assert main([*command, "--write-cache", str(cache), "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "sift, 150 points, as stored" in shown and "viewpoint" in shown
    section = json.loads((tmp_path / "out" / "results.json").read_text())["sections"]["hpatches"]
    assert section["splits"]["illumination"]["MMA@1"] == pytest.approx(100)
    counts = read_cache(cache)
    assert len(counts.keypoints) == 18 and len(counts.matches) == 15
    for kinds, summary in (("iv", section["all"]), ("v", section["splits"]["viewpoint"])):
        again = hpatches.summarise_counts(counts, kinds)
        assert again == pytest.approx({key: summary[key] for key in again})
    assert main(["evaluate", "hpatches", "--cache", str(cache)]) == 0
    stored, measured = capsys.readouterr().out.splitlines()[1:], shown.splitlines()[1:-1]
    assert stored == [line[: len(cut)] for line, cut in zip(measured, stored, strict=True)]
    assert measured[0].split()[-5:] == ["repeatability@1", "repeatability@3", "AUC@1", "AUC@3", "AUC@5"]
    # D2-Net's own script would read it like this
    illumination, viewpoint, (kinds, features, matches) = np.load(cache, allow_pickle=True)
    assert sorted(illumination) == sorted(viewpoint) == list(range(1, 16))
    assert list(kinds) == ["i"] * 5 + ["v"] * 10 and len(features) == 18 and len(matches) == 15


def test_features_in_files_give_what_the_method_gives(tree, tmp_path, capsys):
    """Stored as D2-Net stores them: worst first, a scale beside the position, and scores in a column."""
    method = create_method("sift")
    for image in sorted(tree.glob("*/*.ppm")):
        features = method(cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB), 150)
        target = tmp_path / "features" / image.parent.name / f"{image.name}.sift"
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            scaled = np.column_stack([features.keypoints, np.ones(len(features))])
            np.savez(
                file,
                keypoints=scaled[::-1],
                scores=features.scores[::-1, None],
                descriptors=features.descriptors[::-1],
            )
    direct = ["evaluate", "hpatches", str(tree), "--method", "sift", "--max-keypoints", "150"]
    stored = ["evaluate", "hpatches", str(tree), "--features", str(tmp_path / "features"), "--postfix", "sift"]
    assert main(direct) == 0
    by_method = capsys.readouterr().out.splitlines()
    assert main(stored) == 0
    assert capsys.readouterr().out.splitlines()[1:] == by_method[1:]
    assert main([*stored, "--max-keypoints", "100,150"]) == 0
    compared = capsys.readouterr().out
    assert "sift, 100 points" in compared and by_method[-2].split()[-1] in compared
    (tmp_path / "features" / "v_wrong" / "3.ppm.sift").unlink()
    assert main(stored) == 2
    assert "3.ppm.sift" in capsys.readouterr().err


def test_what_extract_writes_is_what_evaluate_measures(tree, tmp_path, repository, capsys):
    """The shipped configuration, and the same network as a method of the evaluation."""
    settings = yaml.safe_load((repository / "config" / "extract_hpatches.yaml").read_text())
    settings["detector_config"]["num_pts"] = 100
    (tmp_path / "extract.yaml").write_text(yaml.safe_dump(settings))
    out = str(tmp_path / "out")
    assert main(["extract", "--config", str(tmp_path / "extract.yaml"), "--data", str(tree), "-o", out]) == 0
    assert "18 of 18 images" in capsys.readouterr().out
    assert main(["evaluate", "hpatches", str(tree), "--features", f"{out}/desc"]) == 0
    by_files = capsys.readouterr().out.splitlines()
    assert main(["evaluate", "hpatches", str(tree), "--max-keypoints", "100", "--set", "nms_radius=1"]) == 0
    by_method = capsys.readouterr().out.splitlines()
    assert by_files[0] == "scfeat, all points, as stored" and by_files[1:] == by_method[1:]


def test_mistakes_on_the_command_line_are_named(tree, tmp_path, capsys):
    cache = str(_store(tmp_path / "a.npy", _content("scfeat-20k")))
    for words, message in [
        (["homography", "--cache", cache], "kind 'hpatches'"),
        (["hpatches", str(tree), "--cache", cache], "none or both"),
        (["hpatches"], "none or both"),
        (["hpatches", "--cache", cache, "--write-cache", cache], "alone"),
        (["hpatches", str(tree), "--features", str(tree), "--longer-side", "640"], "--longer-side"),
        (["hpatches", str(tree), "--features", str(tree), "--max-keypoints", "0"], "max_keypoints"),
        (["hpatches", str(tree), "--method", "sift,orb", "--write-cache", cache], "found several"),
    ]:
        assert main(["evaluate", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_leaves_no_file(tmp_path):
    counts = read_cache(_store(tmp_path / "a.npy", _content("scfeat-20k")))
    (tmp_path / "taken").mkdir()
    with pytest.raises(ScfeatError, match="taken"):
        write_cache(tmp_path / "taken", counts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "taken"]
