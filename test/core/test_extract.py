"""Features of many images: files, resuming, failures, both formats, the configuration, and the same on Ray."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from scfeat_core import cli
from scfeat_core.bulk.config import ExtractConfig, create_jobs
from scfeat_core.bulk.images import (
    Decoded,
    ImageFile,
    Undecoded,
    aachen_images,
    decode_ahead,
    find_images,
    group_by_size,
    hpatches_images,
    read_image,
)
from scfeat_core.bulk.jobs import Job, run_job
from scfeat_core.bulk.outputs import H5Output, NpzOutput
from scfeat_core.bulk.pipeline import Settings, extract_images
from scfeat_core.config import dump_config, load_config, read_mapping
from scfeat_core.errors import ConfigError, DataError, ImageError, ScfeatError
from scfeat_core.extraction import Extractor
from scfeat_core.feature_files import h5_names, is_complete_npz, read_npz, replaced, write_npz
from scfeat_core.types import Features

NO_H5PY = "h5py is not installed: pip install 'scfeat-python[extract]'"
NO_RAY = "Ray Data is not installed: pip install 'scfeat-python[ray]'"
SETTINGS = Settings(options={"max_keypoints": 40}, decoders=2)
SIZES = {"a.png": (96, 64), "b.png": (96, 64), "sub/c.png": (64, 96), "sub/d.jpg": (96, 64), "sub/deep/e.PNG": (80, 48)}


def _picture(seed: int, size: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for seed, (name, size) in enumerate(SIZES.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(root / name), _picture(seed, size))
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return SETTINGS.create()


def _job(folder: Path, output: NpzOutput | H5Output, **changes: Any) -> Job:
    return Job(find_images([folder]), replace(SETTINGS, **changes), output)


# -- which images ------------------------------------------------------------------------------------------------------


def test_images_are_found_in_order_and_called_by_their_path(folder):
    assert [file.name for file in find_images([folder])] == sorted(SIZES)
    assert [file.name for file in find_images([folder], outside=folder / "sub" / "deep")] == sorted(SIZES)[:-1]
    for above in (folder, folder.parent, folder.parent / "photos" / ".." / "out"):  # these hide nothing
        assert len(find_images([folder], outside=above)) == 5
    assert len(find_images([folder], outside=folder / "sub" / ".." / "sub")) == 2
    both = find_images([folder / "sub" / "c.png", folder / "sub" / "deep"])
    assert [file.name for file in both] == ["c.png", "e.PNG"]
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected images .*empty, found none"):
        find_images([folder / "empty"])


def test_features_that_would_overwrite_each_other_are_refused(folder):
    files = [*find_images([folder]), *find_images([folder])]
    with pytest.raises(
        DataError, match=r"overwrite each other: a\.png\.npz.* \.\.\.|overwrite each other: a\.png\.npz"
    ):
        Job(files, SETTINGS, NpzOutput(folder / "out"))


def test_hpatches_and_aachen_are_called_as_their_tools_expect(tmp_path):
    picture = _picture(0, (64, 64))
    for name in ("i_one/1.ppm", "i_one/2.ppm", "v_two/1.ppm", "i_dc/1.ppm", "db/1.jpg", "query/night/nexus5x/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(tmp_path / name), picture)
    assert [file.name for file in hpatches_images(tmp_path)] == ["i_one/1.ppm", "i_one/2.ppm", "v_two/1.ppm"]
    assert [file.name for file in aachen_images(tmp_path)] == ["db/1.jpg", "query/night/nexus5x/2.jpg"]
    with pytest.raises(DataError, match="images_upright"):
        aachen_images(tmp_path / "db")


def test_images_are_read_as_they_are_stored(tmp_path):
    """A JPEG whose EXIF data asks for a quarter turn."""
    assert cv2.imwrite(str(tmp_path / "plain.jpg"), _picture(1, (64, 48)))
    data = (tmp_path / "plain.jpg").read_bytes()
    entry = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"  # orientation: 6
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00" + entry + b"\x00\x00\x00\x00"
    turned = tmp_path / "turned.jpg"
    turned.write_bytes(data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:])
    assert read_image(turned).shape == (48, 64, 3)
    assert read_image(turned, turned=True).shape == (64, 48, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".ppm"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.97])
def test_an_image_without_its_end_is_refused(suffix, share, tmp_path):
    """With a whole JPEG, as a thumbnail is one, in the header of the JPEG."""
    data = cv2.imencode(suffix, _picture(1, (96, 64)))[1].tobytes()
    if suffix == ".jpg":
        segment = b"Exif" + data
        data = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    assert read_image(path).shape == (64, 96, 3)
    path.write_bytes(data + b"video of a telephone")
    assert read_image(path).shape == (64, 96, 3)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=rf"expected an image at .*a\{suffix}, found"):
        read_image(path)


def test_decoding_keeps_the_order_and_hands_errors_on(folder):
    (folder / "b.png").write_bytes(b"damaged")
    found = list(decode_ahead(find_images([folder]), workers=3, ahead=2))
    assert [each.file.name for each in found] == sorted(SIZES)
    assert [each.file.name for each in found if isinstance(each, Undecoded)] == ["b.png"]
    assert all(each.image.shape[1::-1] == SIZES[each.file.name] for each in found if isinstance(each, Decoded))


def test_batches_are_of_one_size_and_do_not_wait_forever():
    def image(name: str, size: int) -> Decoded:
        return Decoded(ImageFile(name, name), np.zeros((size, size, 3), np.uint8))

    failed: list[Undecoded] = []
    broken = Undecoded(ImageFile("x", "x"), ImageError("broken"))
    given = [image("a1", 1), image("b1", 2), broken, image("a2", 1), image("c1", 3), image("d1", 4), image("a3", 1)]
    batches = [[d.file.name for d in batch] for batch in group_by_size(given, 2, 3, failed.append)]
    # Three wait when d1 comes: b1, the oldest, goes alone.
    assert batches == [["a1", "a2"], ["b1"], ["c1"], ["d1"], ["a3"]]
    assert failed == [broken]


# -- what is written ---------------------------------------------------------------------------------------------------


def test_npz_files_hold_what_the_extractor_finds(folder, tmp_path, extractor):
    output = NpzOutput(tmp_path / "out")
    report = run_job(_job(folder, output, batch_size=2))
    assert (report.images, report.extracted, report.skipped, report.failures) == (5, 5, 0, ())
    total = 0
    for name, size in SIZES.items():
        expected = extractor(read_image(folder / name))
        found = read_npz(output.path(name))
        assert found.keypoints == pytest.approx(expected.keypoints, abs=1e-3)
        assert found.descriptors == pytest.approx(expected.descriptors, abs=1e-4)
        assert found.scores == pytest.approx(expected.scores, rel=1e-4)
        assert found.image_size == size and found.descriptor_space == extractor.descriptor_space
        total += len(found)
    assert report.keypoints == total > 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png.npz", "b.png.npz", "sub", "extraction.json"}


def test_half_descriptors_and_pictures(folder, tmp_path):
    run_job(_job(folder, NpzOutput(tmp_path / "out", half=True, pictures=tmp_path / "pictures")))
    with np.load(tmp_path / "out" / "a.png.npz") as stored:
        assert stored["descriptors"].dtype == np.float16 and stored["keypoints"].dtype == np.float32
    picture = cv2.imread(str(tmp_path / "pictures" / "sub" / "c.png.jpg"))
    assert picture.shape == (96, 64, 3)


def test_an_h5_file_is_what_hloc_reads(folder, tmp_path, extractor):
    """Read in hloc's own words: names by visiting, arrays by group, descriptors transposed."""
    h5py = pytest.importorskip("h5py", reason=NO_H5PY)
    path = tmp_path / "features.h5"
    report = run_job(_job(folder, H5Output(path, part_images=2), options={"max_keypoints": 40, "max_edge": 48}))
    assert report.extracted == 5 and not (tmp_path / "features.h5.parts").exists()
    with h5py.File(path, "r") as stored:
        names: list[str] = []
        stored.visititems(lambda _, x: names.append(x.parent.name.strip("/")) if isinstance(x, h5py.Dataset) else None)
        assert sorted(set(names)) == sorted(SIZES)
        small = Extractor("lite", max_keypoints=40, max_edge=48)
        for name, size in SIZES.items():
            expected = small(read_image(folder / name))
            group = stored[name]
            assert group["keypoints"].dtype == np.float32 and tuple(group["image_size"]) == size
            assert group["keypoints"][()] == pytest.approx(expected.keypoints, abs=1e-3)
            assert group["descriptors"].shape == (extractor.descriptor_dim, len(expected))
            descriptors = group["descriptors"][()].T
            assert descriptors == pytest.approx(expected.descriptors, abs=1e-4)
            assert group["scores"].shape == (len(expected),)
            assert group["keypoints"].attrs["uncertainty"] == pytest.approx(max(size) / 48)
    assert not path.with_suffix(".failed.txt").exists()


def test_descriptors_at_the_keypoints_of_sift(folder, tmp_path, extractor):
    run_job(_job(folder, NpzOutput(tmp_path / "out"), use_sift=True))
    image = read_image(folder / "a.png")
    found = read_npz(tmp_path / "out" / "a.png.npz")
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    points = {keypoint.pt for keypoint in cv2.SIFT.create(contrastThreshold=0.005).detect(gray, None)}
    assert 0 < len(found) <= 40 and {tuple(map(float, xy)) for xy in found.keypoints} <= points
    assert len(np.unique(found.keypoints, axis=0)) == len(found) and (np.diff(found.scores) <= 0).all()
    own = Extractor("lite", max_keypoints=40, levels=1)(image)
    assert extractor.describe(image, own.keypoints) == pytest.approx(own.descriptors, abs=1e-5)


def test_describe_follows_the_size_that_the_network_sees(folder):
    small = Extractor("lite", max_keypoints=30, max_edge=64, levels=1)
    image = read_image(folder / "a.png")
    found = small(image)
    assert small.describe(image, found.keypoints) == pytest.approx(found.descriptors, abs=1e-4)


# -- resuming and failing ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["npz", "h5"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> NpzOutput | H5Output:
    if request.param == "npz":
        return NpzOutput(tmp_path / "out")
    pytest.importorskip("h5py", reason=NO_H5PY)
    return H5Output(tmp_path / "features.h5")


def test_what_is_complete_is_skipped(folder, output):
    job = _job(folder, output)
    first = replace(job, files=job.files[:3])
    assert run_job(first).extracted == 3
    report = run_job(job)
    assert (report.extracted, report.skipped) == (2, 3)
    assert run_job(job).skipped == 5 and job.output.missing(job.files) == []
    assert run_job(job, overwrite=True).extracted == 5
    changed = _job(folder, output, options={"max_keypoints": 7})
    with pytest.raises(DataError, match=r"'max_keypoints': 40.*'max_keypoints': 7.*--overwrite"):
        run_job(changed)
    assert run_job(changed, overwrite=True).keypoints <= 35


def test_a_corrupt_image_does_not_end_the_run(folder, output):
    for name in ("b.png", "sub/d.jpg"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    assert cv2.imwrite(str(folder / "tiny.png"), np.zeros((9, 9, 3), np.uint8))
    files = [*find_images([folder]), ImageFile("gone.png", str(folder / "gone.png"))]
    seen = []
    report = run_job(Job(files, SETTINGS, output), watch=seen.append)
    failed = {outcome.name: outcome.error for outcome in report.failures}
    assert set(failed) == {"gone.png", "tiny.png", "b.png", "sub/d.jpg"} and "at least 32x32" in failed["tiny.png"]
    assert len(seen) == 7 and report.extracted == 3
    listed = output.record.with_name(f"{output.record.stem}.failed.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in listed} == set(failed)
    assert "FAILED" in str(report)
    # once mended they are all that is left to do
    for name in failed:
        assert cv2.imwrite(str(folder / name), _picture(3, (64, 64)))
    report = run_job(Job(files, SETTINGS, output))
    assert report.extracted == len(failed) and not report.failures
    assert not output.record.with_name(f"{output.record.stem}.failed.txt").exists()


def test_one_bad_image_does_not_take_its_batch_with_it(folder, tmp_path, extractor):
    """Images of one size: those the network refuses are found one by one."""
    for name in ("t1.png", "t2.png"):
        assert cv2.imwrite(str(folder / name), np.zeros((9, 9, 3), np.uint8))
    job = _job(folder, NpzOutput(tmp_path / "out"), batch_size=4)
    outcomes = list(extract_images(job.files, job.settings, extractor, job.output))
    assert sorted(o.name for o in outcomes if o.error) == ["t1.png", "t2.png"]
    assert len(outcomes) == 7


def test_a_half_written_file_never_counts(folder, output, tmp_path):
    """Truncated features, as after a power cut, and what a killed writer leaves behind."""
    job = _job(folder, output)
    run_job(replace(job, files=job.files[:2]))
    if isinstance(output, NpzOutput):
        target = output.path("a.png")
        target.write_bytes(target.read_bytes()[:-30])
        assert not is_complete_npz(target)
        (target.parent / ".b.png.npz.0123.tmp").write_bytes(b"half")
        assert run_job(job).extracted == 4
        assert is_complete_npz(target)
        return
    writer = output.writer()
    writer.add("sub/c.png", np.zeros((1, 1, 3), np.uint8), _features(), 1.0)
    writer.close()
    (part,) = output.parts.glob("*.h5")
    part.write_bytes(part.read_bytes()[:-100])
    (output.parts / ".x.h5.0123.tmp").write_bytes(b"half")
    assert [file.name for file in output.missing(job.files)] == sorted(SIZES)[2:]
    assert not part.exists()
    assert run_job(job).extracted == 3 and sorted(h5_names(output.path)) == sorted(SIZES)
    assert not output.parts.exists()
    output.path.write_bytes(output.path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"features\.h5: expected a complete HDF5 file"):
        run_job(job)


def _features() -> Features:
    return Features(np.ones((1, 2)), np.ones(1), np.ones((1, 4)), (10, 10), "test")


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "features.npz"
    write_npz(path, _features())
    before = path.read_bytes()
    with pytest.raises(RuntimeError), replaced(path) as scratch:
        scratch.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    (tmp_path / "file").write_text("")
    with pytest.raises(ScfeatError, match="expected to write"):
        write_npz(tmp_path / "file" / "features.npz", _features())


@pytest.mark.parametrize("damage", [b"", b"no archive"])
def test_damaged_features_are_named(damage, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(damage)
    with pytest.raises(DataError, match=r"a\.npz"):
        read_npz(path)
    np.savez(path, keypoints=np.ones((3, 2)), descriptors=np.ones((2, 4)))
    with pytest.raises(DataError, match=r"\(3, 2\)"):
        read_npz(path)
    np.savez(path, keypoints=np.ones((3, 2)), descriptors=np.array([{}], object))
    with pytest.raises(DataError, match="pickle"):
        read_npz(path)


def test_a_run_that_stops_early_keeps_what_it_has(folder, tmp_path, extractor):
    """As Ctrl-C does, and for HDF5, whose parts are larger than one image."""
    pytest.importorskip("h5py", reason=NO_H5PY)
    job = _job(folder, H5Output(tmp_path / "features.h5"))
    outcomes = extract_images(job.files, job.settings, extractor, job.output)
    done = [next(outcomes).name for _ in range(2)]
    outcomes.close()
    assert {file.name for file in job.files} - {file.name for file in job.output.missing(job.files)} == set(done)


def test_a_killed_process_loses_only_what_was_in_work(tmp_path, spawn: Callable[..., Any]):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        assert cv2.imwrite(str(folder / f"{number:02}.png"), _picture(number, (160, 120)))
    words = [sys.executable, "-m", "scfeat_core.cli", "extract", folder, "-o", tmp_path / "out"]
    process = spawn(words)
    end = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*.npz"))) < 3:
        assert time.monotonic() < end and process.running, process.output
        time.sleep(0.005)
    process.popen.send_signal(signal.SIGKILL)
    process.wait(30)
    job = Job(find_images([folder]), Settings(), NpzOutput(tmp_path / "out"))
    left = job.output.missing(job.files)
    assert 0 < len(left) < 40
    report = run_job(job)
    assert report.extracted == len(left) and job.output.missing(job.files) == []
    for file in job.files:
        assert len(read_npz(job.output.path(file.name))) > 0


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_on_a_folder(folder, tmp_path, capsys):
    words = ["extract", str(folder), "-o", str(tmp_path / "out"), "--max-keypoints", "30", "--set", "nms_radius=3"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "5 of 5 images to extract" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert cli.main(words) == 0
    assert "5 of 5 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "extraction.json").read_text())["options"]["nms_radius"] == 3
    assert cli.main([*words, "--dry-run"]) == 0
    assert "0 of 5 images to extract" in capsys.readouterr().out
    (folder / "broken.png").write_bytes(b"?")
    assert cli.main(words) == 1  # that one, the others are there
    shown = capsys.readouterr()
    assert "5 skipped" in shown.out and "1 FAILED" in shown.out and "failed: broken.png" in shown.err


def test_the_command_writes_h5_where_it_is_told(folder, tmp_path, capsys):
    pytest.importorskip("h5py", reason=NO_H5PY)
    words = ["extract", str(folder / "a.png"), "--format", "h5", "--max-keypoints", "9", "--half"]
    assert cli.main([*words, "-o", str(tmp_path / "a.h5")]) == 0
    assert cli.main([*words, "-o", str(tmp_path / "out")]) == 0
    assert h5_names(tmp_path / "a.h5") == h5_names(tmp_path / "out" / "features.h5") == ["a.png"]
    assert f"{tmp_path}/a.h5: 1 of 1 images" in capsys.readouterr().out
    assert cli.main(["extract", str(folder / "a.png"), "-o", str(tmp_path / "by_suffix.h5")]) == 0
    assert h5_names(tmp_path / "by_suffix.h5") == ["a.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected images or folders"),
        (["x.png", "--data", "y"], "expected images or folders"),
        (["x.png", "--config", "CONFIG"], "with --config"),
        (["--half", "--config", "CONFIG"], "with --config"),
        (["x.png", "--set", "nms_radiu=3"], "nms_radius"),
        (["x.png", "--set", "nms_radius=[3"], "expected a value in YAML"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, message, tmp_path, capsys, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    words = [str(repository / "config" / "extract_hpatches.yaml") if word == "CONFIG" else word for word in words]
    try:
        status = cli.main(["extract", *words])
    except SystemExit as stopped:  # argparse
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_without_h5py_the_message_names_the_fix(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert cli.main(["extract", str(folder), "-o", str(tmp_path / "a.h5"), "--format", "h5"]) == 2
    assert "scfeat-python[extract]" in capsys.readouterr().err


# -- the configuration -------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, repository: Path) -> dict[str, Any]:
    """The file that is shipped, for a small HPatches of two sequences."""
    for name in ("i_one/1.ppm", "i_one/2.ppm", "v_two/1.ppm"):
        (tmp_path / "hpatches" / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(tmp_path / "hpatches" / name), _picture(1, (64, 48)))
    mapping = read_mapping(repository / "config" / "extract_hpatches.yaml")
    mapping["data_config_extract"]["data_path"] = "hpatches"
    mapping["output_root"] = str(tmp_path / "out")
    return mapping


def test_the_shipped_configuration_extracts_hpatches(config, tmp_path, capsys):
    (tmp_path / "extract.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["extract", "--config", str(tmp_path / "extract.yaml")]) == 0
    assert "3 of 3 images" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "desc" / "i_one" / "1.ppm.scfeat") as stored:  # as D2-Net's script does
        count = len(stored["keypoints"])
        assert stored["keypoints"].shape == (count, 2) and stored["scores"].shape == (count,) and count > 0
        assert stored["descriptors"].shape == (count, 64)
    elsewhere = ["--data", str(tmp_path / "hpatches" / ".." / "hpatches"), "-o", str(tmp_path / "other"), "--dry-run"]
    assert cli.main(["extract", "--config", str(tmp_path / "extract.yaml"), *elsewhere]) == 0
    assert "3 of 3 images to extract to" in capsys.readouterr().out


def test_the_keys_become_options_of_the_extractor(config, tmp_path):
    config["data_config_extract"]["data_path"] = str(tmp_path / "hpatches")
    config["detector_config"] |= {"num_pts": False, "use_nms": False, "thr": 1.5, "thr_mod": "mean"}
    (job,) = create_jobs(load_config(ExtractConfig, config))
    options = job.settings.options
    assert (options["max_keypoints"], options["nms_radius"], options["border"]) == (0, 0, 4)
    assert (options["score_threshold"], options["threshold_mode"]) == (1.5, "mean")
    assert set(options) < set(dump_config(Extractor("lite", **options).options))


def test_queries_may_have_a_detector_of_their_own(config, tmp_path):
    for name in ("db/1.png", "query/night/2.png", "query/night/3.png"):
        (tmp_path / "aachen" / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(tmp_path / "aachen" / name), _picture(2, (64, 48)))
    config["data_config_extract"]["data_path"] = str(tmp_path / "aachen")
    config |= {"data": "aachen", "detector_config_query": {"num_pts": 5}}
    for job in create_jobs(load_config(ExtractConfig, config)):
        run_job(job)
    assert len(read_npz(tmp_path / "out" / "desc" / "db" / "1.png.scfeat")) > 5
    assert len(read_npz(tmp_path / "out" / "desc" / "query" / "night" / "2.png.scfeat")) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_thr": 0.99}, "unknown key 'local_thr'"),
        ({"detector_config": {"nms_radus": 2}}, "detector_config: unknown key 'nms_radus'; did you mean 'nms_radius'"),
        ({"detector_config": {"stable": False}}, "stable"),
        ({"loss_distance": "l2"}, "loss_distance"),
        ({"data": "eth"}, "data"),
        ({"postfix": "a/b"}, "postfix"),
        ({"output_desc": False}, "output_desc"),
        ({"save_npz": False, "output_img": True}, "output_img"),
        ({"detector_config_query": {}}, "detector_config_query"),
    ],
)
def test_wrong_keys_are_refused(change, message, config):
    with pytest.raises((ConfigError, ScfeatError), match=message):
        load_config(ExtractConfig, {**config, **change})


# -- Ray ---------------------------------------------------------------------------------------------------------------


def test_two_workers_of_a_local_ray_write_what_one_process_writes(folder, tmp_path, spawn: Callable[..., Any]):
    """In a process of its own, as Ray leaves threads behind."""
    pytest.importorskip("ray.data", reason=NO_RAY)
    pytest.importorskip("h5py", reason=NO_H5PY)
    (folder / "b.png").write_bytes(b"damaged")
    words = ["extract", str(folder), "--format", "h5", "--max-keypoints", "40", "--workers", "2"]
    assert cli.main([*words, "-o", str(tmp_path / "one.h5")]) == 1
    command = [sys.executable, "-m", "scfeat_core.cli", *words, "-o", str(tmp_path / "two.h5"), "--ray"]
    process = spawn(command)
    assert process.wait(600) == 1, process.output  # half a minute on two idle cores
    assert "failed: b.png" in process.output and "4 of 5 images" in process.output
    import h5py

    with h5py.File(tmp_path / "one.h5") as one, h5py.File(tmp_path / "two.h5") as two:
        names = h5_names(tmp_path / "one.h5")
        assert sorted(names) == sorted(h5_names(tmp_path / "two.h5")) == sorted(set(SIZES) - {"b.png"})
        for name in names:
            for key in ("keypoints", "scores", "descriptors", "image_size"):
                assert one[name][key][()] == pytest.approx(two[name][key][()], abs=1e-4)
    assert not (tmp_path / "two.h5.parts").exists()
    record = [(tmp_path / name).read_text() for name in ("one.json", "two.json")]
    assert record[0] == record[1]


@pytest.mark.parametrize("option", ["--workers", "--batch-size"])
@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_numbers_that_make_no_sense_are_refused(folder, option, number, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["extract", str(folder), "--dry-run", option, number])
    assert stop.value.code == 2
    assert f"argument {option}: expected a whole number of at least 1, found '{number}'" in capsys.readouterr().err
