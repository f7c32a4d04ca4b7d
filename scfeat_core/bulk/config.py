"""The settings of ``scfeat extract --config``, with the names that the authors of SCFeat gave to theirs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from scfeat_core.bulk.images import ImageFile, aachen_images, find_images, hpatches_images
from scfeat_core.bulk.jobs import Job
from scfeat_core.bulk.outputs import H5Output, NpzOutput, Output, check_name
from scfeat_core.bulk.pipeline import Settings
from scfeat_core.config import Range
from scfeat_core.engines import EngineName
from scfeat_core.errors import ConfigError
from scfeat_core.extraction import Precision
from scfeat_core.preprocessing import SizeMode
from scfeat_core.selection import Refinement, ThresholdMode

Count = Annotated[int, Range(minimum=0)]


@dataclass(frozen=True)
class DataConfig:
    """data_path: folder of the images. batch_size: images of one size at once, 0: 8 on a GPU, else 1. workers: threads
    that decode images, or the actors of ``--ray``."""

    data_path: Path
    batch_size: Count = 0
    workers: Annotated[int, Range(minimum=1)] = 4


@dataclass(frozen=True)
class DetectorConfig:
    """num_pts: at most so many, false: all. stable: the best, as nothing else is offered. use_nms, nms_radius: pixels.

    thr: least score, false: none; thr_mod: in what it is measured (the score itself, or its mean or maximum over the
    image). border: pixels without points. refinement: how positions become sub-pixel; the authors' is centroid3.
    """

    num_pts: Count | Literal[False] = 8192
    stable: Literal[True] = True
    use_nms: bool = True
    nms_radius: Annotated[int, Range(minimum=1, maximum=64)] = 1
    thr: Annotated[float, Range(minimum=0.0)] | Literal[False] = False
    thr_mod: ThresholdMode = "abs"
    border: Count = 4
    refinement: Refinement = "quadratic"

    def options(self) -> dict[str, Any]:
        """As options of the Extractor."""
        return {
            "max_keypoints": int(self.num_pts),
            "nms_radius": self.nms_radius if self.use_nms else 0,
            "score_threshold": float(self.thr),
            "threshold_mode": self.thr_mod,
            "border": self.border,
            "refinement": self.refinement,
        }


@dataclass(frozen=True)
class ExtractConfig:
    """output_root: features go to ``desc/`` below it, pictures of the keypoints (``output_img``) to ``image/``.

    load_path: weights, a name or a .safetensors file. data: hpatches (sequences), aachen (``images_upright``), or any
    folder of images. postfix: files are called ``<image>.<postfix>``. save_npz: false writes one hloc-style HDF5 file
    ``desc.h5`` instead. loss_distance: cos, unit descriptors, which all networks here have. use_sift: descriptors at
    SIFT's keypoints, of which detector_config only limits the number. detector_config_query: of the images below
    ``query/`` of aachen, where it is another (with save_npz: false their file is ``desc_query.h5``).
    """

    output_root: Path
    data_config_extract: DataConfig
    data: Literal["hpatches", "images", "aachen"] = "images"
    load_path: str = "lite"
    postfix: str = "scfeat"
    output_desc: bool = True
    output_img: bool = False
    save_npz: bool = True
    loss_distance: Literal["cos"] = "cos"
    use_sift: bool = False
    detector_config: DetectorConfig = field(default_factory=DetectorConfig)
    detector_config_query: DetectorConfig | None = None
    device: str = "auto"
    precision: Precision = "float32"
    engine: EngineName = "eager"
    size_mode: SizeMode = "native"
    max_edge: Count = 0

    def __post_init__(self) -> None:
        check_name(self.postfix)
        if not self.output_desc:
            raise ConfigError("output_desc: expected true, found false; pictures alone are not made")
        if self.output_img and not self.save_npz:
            raise ConfigError(
                "output_img: expected false with save_npz: false, found true; pictures come with npz files"
            )
        if self.detector_config_query is not None and self.data != "aachen":
            raise ConfigError(f"detector_config_query: expected none with data: {self.data}; only aachen has queries")


def create_jobs(config: ExtractConfig) -> list[Job]:
    """One job; two where queries have a detector of their own. Raises DataError, ImageError."""
    files = _files(config)
    if config.detector_config_query is None:
        return [_job(config, files, config.detector_config)]
    queries = [file for file in files if file.name.startswith("query/")]
    others = [file for file in files if not file.name.startswith("query/")]
    return [
        _job(config, others, config.detector_config),
        _job(config, queries, config.detector_config_query, "_query"),
    ]


def _files(config: ExtractConfig) -> list[ImageFile]:
    root = config.data_config_extract.data_path
    if config.data == "hpatches":
        return hpatches_images(root)
    if config.data == "aachen":
        return aachen_images(root)
    return find_images([root], outside=config.output_root)


def _job(config: ExtractConfig, files: list[ImageFile], detector: DetectorConfig, part: str = "") -> Job:
    """part: what tells the output of this job from that of another."""
    options = {
        **detector.options(),
        "precision": config.precision,
        "engine": config.engine,
        "size_mode": config.size_mode,
        "max_edge": config.max_edge,
    }
    data = config.data_config_extract
    settings = Settings(config.load_path, config.device, options, config.use_sift, data.batch_size, data.workers)
    output: Output
    if config.save_npz:
        pictures = config.output_root / "image" if config.output_img else None
        output = NpzOutput(config.output_root / "desc", config.postfix, False, pictures, f"extraction{part}")
    else:
        output = H5Output(config.output_root / f"desc{part}.h5")
    return Job(files, settings, output)
