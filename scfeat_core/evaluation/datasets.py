"""Image pairs with ground truth on disk. Everything that is wrong with a file becomes a DataError that names it.

Layouts, one folder per set below the root:

* sequence: images ``1.*`` ... ``6.*`` and ``H_1_k``, the homography from image 1 to image k (HPatches);
  a folder of such folders (``homogr_pairs``) is one set with one pair each.
* pose pairs: ``pairs_with_gt.txt``, lines ``img0 img1 rot0 rot1 K0(9) K1(9) T_0to1(16)`` (SuperGlue).
* posed images: scenes as :mod:`scfeat_core.data.posed_images` reads them for training, with ``pairs.txt``.
* HPatches: sequences ``i_*`` (illumination) and ``v_*`` (viewpoint) with ``1.ppm`` ... ``6.ppm`` and ``H_1_2`` ...
* labelled pairs: folders with ``1.*``, ``2.*`` and ``corrs.txt`` (x0 y0 x1 y1), without a model (``wxbs_pairs``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from scfeat_core.errors import DataError
from scfeat_core.geometry import scale_matrix

APART = ("evd_pairs", "wxbs_pairs")  # too hard, or labelled too sparsely, to be averaged with the rest
# Sequences of HPatches that D2-Net (Dusmanu et al., CVPR 2019) left out because of their size, as all have since.
HPATCHES_EXCLUDED = (
    *("i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding"),
    *("v_artisans", "v_astronautis", "v_talent"),
)
Size = tuple[int, int]
HPATCHES_SPLITS = {"i": "illumination", "v": "viewpoint"}
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".webp")


@dataclass(frozen=True, eq=False)
class ImagePair:
    """Two image files of a set. split: the name of the set; name: of the pair within it."""

    split: str
    name: str
    path0: Path
    path1: Path


@dataclass(frozen=True, eq=False)
class HomographyPair(ImagePair):
    """homography: (3, 3) float64, pixels of image 0 to pixels of image 1, as stored."""

    homography: np.ndarray


@dataclass(frozen=True, eq=False)
class PosePair(ImagePair):
    """x1 = rotation x0 + translation; translation up to scale.

    k0, k1: (3, 3) float64, pixels of images of ``sizes``, (width, height) each; None: of the images as stored.
    """

    k0: np.ndarray
    k1: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray
    sizes: tuple[Size, Size] | None = None


@dataclass(frozen=True, eq=False)
class LabelledPair(ImagePair):
    """points0, points1: (N, 2) float64, corresponding pixels of the stored images, labelled by hand."""

    points0: np.ndarray
    points1: np.ndarray


Pair = TypeVar("Pair", bound=ImagePair)


# -- images ------------------------------------------------------------------------------------------------------------


def shrink_image(image: np.ndarray, longer_side: int) -> tuple[np.ndarray, np.ndarray]:
    """The image with its longer side at most ``longer_side``, and (3, 3) float64 from old pixels to new ones.

    Area filter; an image that is small enough is returned as it is. longer_side 0 means no limit.
    """
    height, width = image.shape[:2]
    factor = longer_side / max(height, width)
    if longer_side == 0 or factor >= 1:
        return image, np.eye(3)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), scale_matrix((size[0] / width, size[1] / height))


# -- sets --------------------------------------------------------------------------------------------------------------


def homography_pairs(root: Path, splits: Sequence[str] = ()) -> list[HomographyPair]:
    """Pairs of all sequences below ``root``, or of the named ones (those in APART only when named)."""
    return _collect(root, splits, _homography_set, "sequences with H_1_k files")


def pose_pairs(root: Path, splits: Sequence[str] = ()) -> list[PosePair]:
    """Pairs of all sets with relative poses below ``root``, or of the named ones."""
    return _collect(root, splits, _pose_set, "sets with pairs_with_gt.txt, or posed images with pairs.txt")


def labelled_pairs(root: Path, splits: Sequence[str] = ()) -> list[LabelledPair]:
    """Pairs below ``root`` with hand-made correspondences and no model."""
    return _collect(root, splits, _labelled_set, "folders with corrs.txt", apart=())


def hpatches_sequences(root: Path, names: Sequence[str] = ()) -> list[Path]:
    """Folders ``i_*`` and ``v_*`` of ``root`` without HPATCHES_EXCLUDED, or the named ones. Raises DataError."""
    wanted = "sequences i_* and v_* of HPatches"
    folders = [f for f in _set_folders(root, names, wanted) if f.name[:2] in ("i_", "v_")]
    folders = [folder for folder in folders if names or folder.name not in HPATCHES_EXCLUDED]
    if not folders:
        raise DataError(f"expected {wanted} in {root}, found none; give the folder that holds them")
    return folders


def hpatches_pairs(root: Path, names: Sequence[str] = ()) -> list[HomographyPair]:
    """Image 1 to images 2..6 of the sequences; split: illumination or viewpoint; name: sequence/1-k."""
    return [
        _homography_pair(HPATCHES_SPLITS[folder.name[0]], f"{folder.name}/", folder / f"H_1_{number}")
        for folder in hpatches_sequences(root, names)
        for number in range(2, 7)
    ]


def limit_pairs(pairs: Sequence[Pair], per_split: int) -> list[Pair]:
    """At most ``per_split`` pairs of each split, evenly spread over its list; 0 means all."""
    by_split: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_split.setdefault(pair.split, []).append(pair)
    return [group[i] for group in by_split.values() for i in _spread(len(group), per_split or len(group))]


def _spread(count: int, limit: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def _collect(
    root: Path,
    splits: Sequence[str],
    read: Callable[[Path], Iterator[Pair]],
    wanted: str,
    apart: Sequence[str] = APART,
) -> list[Pair]:
    folders = _set_folders(root, splits, wanted)
    pairs = [pair for folder in folders if splits or folder.name not in apart for pair in read(folder)]
    if not pairs:
        raise DataError(
            f"expected {wanted} in {', '.join(splits) or 'the folders'} of {root}, found none; give the folder "
            "that holds the sets, and the kind that they are for"
        )
    return pairs


def _set_folders(root: Path, names: Sequence[str], wanted: str) -> list[Path]:
    """The named folders in ``root``, or all in order."""
    if not root.is_dir():
        raise DataError(f"expected a folder with {wanted} at {root}, found none; check the path")
    missing = [name for name in names if not (root / name).is_dir()]
    if missing:
        known = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir()))
        raise DataError(f"expected a folder '{missing[0]}' in {root}, found only: {known}")
    return [root / name for name in names] or sorted(path for path in root.iterdir() if path.is_dir())


def _homography_set(folder: Path) -> Iterator[HomographyPair]:
    for file in sorted(folder.glob("H_1_*")):
        yield _homography_pair(folder.name, "", file)
    for file in sorted(folder.glob("*/H_1_*")):
        yield _homography_pair(folder.name, f"{file.parent.name}/", file)


def _homography_pair(split: str, prefix: str, file: Path) -> HomographyPair:
    number = file.stem.removeprefix("H_1_")
    path0, path1 = _numbered_image(file.parent, "1"), _numbered_image(file.parent, number)
    homography = _read_table(file, 3)
    if homography.shape != (3, 3) or abs(np.linalg.det(homography)) < 1e-12:
        raise DataError(f"expected an invertible 3x3 homography in {file}, found {homography.tolist()}")
    return HomographyPair(split, f"{prefix}1-{number}", path0, path1, homography)


def _numbered_image(folder: Path, number: str) -> Path:
    for suffix in _IMAGE_SUFFIXES:
        if (path := folder / f"{number}{suffix}").is_file():
            return path
    raise DataError(f"expected an image {number}{'|'.join(_IMAGE_SUFFIXES)} in {folder}, found none")


def _pose_set(folder: Path) -> Iterator[PosePair]:
    if (folder / "pairs_with_gt.txt").is_file():
        yield from _superglue_pairs(folder, folder / "pairs_with_gt.txt")
    elif (folder / "pairs.txt").is_file() and _has_cameras(folder):
        yield from _posed_pairs(folder)


def _has_cameras(folder: Path) -> bool:
    from scfeat_core.data.posed_images import is_scene

    return is_scene(folder)


def _superglue_pairs(folder: Path, file: Path) -> Iterator[PosePair]:
    for number, words in _lines(file):
        where = f"{file}, line {number}"
        if len(words) != 38:
            raise DataError(f"{where}: expected img0 img1 rot0 rot1 K0(9) K1(9) T(16), found {len(words)} words of 38")
        if words[2:4] != ["0", "0"]:
            raise DataError(f"{where}: expected upright images (rot0 rot1 = 0 0), found {words[2]} {words[3]}")
        values = _floats(words[4:], where)
        pose = values[18:].reshape(4, 4)
        k0, k1 = values[:9].reshape(3, 3), values[9:18].reshape(3, 3)
        yield _pose_pair(folder.name, folder / words[0], folder / words[1], k0, k1, pose[:3, :3], pose[:3, 3])


def _posed_pairs(folder: Path) -> Iterator[PosePair]:
    """Cameras as training reads them; a pair that it would leave out is an error here, where pairs are counted."""
    from scfeat_core.data.pairing import SceneFolder, usable_cameras
    from scfeat_core.data.posed import relative_pose
    from scfeat_core.data.posed_images import read_cameras

    scene = read_cameras(SceneFolder(folder.name, folder))
    usable = usable_cameras(scene)
    index = {name: i for i, name in enumerate(scene.files)}
    for number, words in _lines(folder / "pairs.txt"):
        where = f"{folder / 'pairs.txt'}, line {number}"
        if len(words) < 2 or not index.keys() >= set(words[:2]):
            raise DataError(f"{where}: expected two images of the scene's cameras, found {' '.join(words[:2])}")
        rows = [index[name] for name in words[:2]]
        if not usable[rows].all():
            raise DataError(
                f"{where}: expected cameras with finite values, positive focal lengths and a rotation, found another "
                f"one in {folder}; correct it, or take the pair out"
            )
        image0, image1 = (scene.image(row) for row in rows)
        pair = _pose_pair(folder.name, image0.path, image1.path, image0.K, image1.K, *relative_pose(image0, image1))
        yield replace(pair, sizes=(image0.size, image1.size))


def _pose_pair(
    split: str, path0: Path, path1: Path, k0: np.ndarray, k1: np.ndarray, rotation: np.ndarray, translation: np.ndarray
) -> PosePair:
    return PosePair(split, f"{path0.stem}-{path1.stem}", path0, path1, k0, k1, rotation, translation)


def _labelled_set(folder: Path) -> Iterator[LabelledPair]:
    for file in sorted(folder.glob("*/corrs.txt")):
        if (file.parent / "H_1_2").exists():
            continue
        points = _read_table(file, 4)
        paths = _numbered_image(file.parent, "1"), _numbered_image(file.parent, "2")
        yield LabelledPair(folder.name, file.parent.name, *paths, points[:, :2], points[:, 2:])


# -- text files --------------------------------------------------------------------------------------------------------


def _lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"expected a readable text file at {file}, found: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if words := line.split():
            yield number, words


def _read_table(file: Path, columns: int) -> np.ndarray:
    """(rows, columns) float64."""
    rows = []
    for number, words in _lines(file):
        if len(words) != columns:
            raise DataError(f"{file}, line {number}: expected {columns} numbers, found {len(words)} words")
        rows.append(_floats(words, f"{file}, line {number}"))
    return np.array(rows).reshape(-1, columns)


def _floats(words: Sequence[str], where: str) -> np.ndarray:
    try:
        values = np.array(words, np.float64)
    except ValueError as error:
        raise DataError(f"{where}: expected numbers, found {error}") from error
    if not np.isfinite(values).all():
        raise DataError(f"{where}: expected finite numbers, found {' '.join(words)}")
    return values
