"""From an image to its local features, on any device."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.config import Range, check_config, dump_config, load_config
from scfeat_core.engines import BuildEngines, EngineName, create_engine, engine_precisions
from scfeat_core.errors import ConfigError, DeviceError
from scfeat_core.geometry import sample_map, scale_points
from scfeat_core.memory import Surplus, keep_freed_memory
from scfeat_core.network.model import MIN_IMAGE_SIZE, SCFeat
from scfeat_core.preprocessing import NetworkInput, SizeMode, equalise, network_input, stack_images, stack_masks
from scfeat_core.selection import Refinement, Selected, ThresholdMode, best_of_levels, select_padded
from scfeat_core.transfer import Download
from scfeat_core.types import Array, Features

# A keypoint of a smaller level is located less well, and its score counts less by this factor, a level. On held-back
# pairs, 1 gives a point more of right matches and takes two of pose accuracy; 0.7 has less of both.
LEVEL_WEIGHT = 0.8

Precision = Literal["float32", "bfloat16", "float16", "auto"]


@dataclass(frozen=True)
class ExtractionOptions:
    """What :class:`Extractor` takes besides weights and device; the selection is that of ``select_keypoints``.

    score_threshold: 0 keeps all. nms_radius: 2 keeps points 3 pixels apart, within one cell of the stride 4 map.
    border: 4 pixels, one cell, within which the network sees mostly padding. grid: cells along each axis that get an
    equal share of the keypoints first; 0 takes the best wherever they are. clahe: clip limit of a local equalisation
    of brightness before the network, see ``equalise``; 0 is off. levels: of an image pyramid, each smaller than the one
    before by the square root of 2, whose best keypoints are taken together; 1 is the image alone. Three cost 1.75 times
    as much, and match better, most of all what is seen from different distances (docs/experiments.md).
    precision: arithmetic of the network; ``auto`` is bfloat16 on CUDA devices and engines that have it, else float32.
    engine: what runs the network, see ``scfeat_core.engines``: ``eager`` is torch as it is, ``auto`` the fastest that
    is installed and agrees with it, chosen by a measurement on the first image, so that the last digits of a result may
    be others another time. All but eager are made for one size, which takes seconds, or minutes: for many images of few
    sizes. size_mode, max_edge: see ``network_input``.
    synchronise: wait for the device between the stages, so that ``timings`` tells them apart there.
    """

    max_keypoints: Annotated[int, Range(minimum=0)] = 1024
    score_threshold: Annotated[float, Range(minimum=0.0)] = 0.0
    threshold_mode: ThresholdMode = "abs"
    nms_radius: Annotated[int, Range(minimum=0, maximum=64)] = 2
    border: Annotated[int, Range(minimum=0)] = 4
    refinement: Refinement = "quadratic"
    grid: Annotated[int, Range(minimum=0, maximum=64)] = 0
    clahe: Annotated[float, Range(minimum=0.0, maximum=100.0)] = 0.0
    levels: Annotated[int, Range(minimum=1, maximum=8)] = 3
    precision: Precision = "float32"
    engine: EngineName = "eager"
    size_mode: SizeMode = "native"
    max_edge: Annotated[int, Range(minimum=0)] = 0
    synchronise: bool = False

    def __post_init__(self) -> None:
        check_config(self, "Extractor")


class Points(NamedTuple):
    """Of a batch, best first, filled up to one number. keypoints: (B, K, 2) float32, pixels of the images.

    scores: (B, K), -inf where an image has no more points. descriptors: (B, K, D).
    """

    keypoints: Array
    scores: Array
    descriptors: Array


class PaddedFeatures(NamedTuple):
    """Features of a batch on the device, filled up to one number. score_maps: one for each image, or None."""

    points: Points
    score_maps: Sequence[Tensor | None]
    image_size: tuple[int, int]
    descriptor_space: str

    def of_each(self) -> list[PaddedFeatures]:
        """Those of each image alone."""
        return [
            self._replace(points=Points(*(values[i : i + 1] for values in self.points)), score_maps=[score_map])
            for i, score_map in enumerate(self.score_maps)
        ]

    def on_device(self) -> list[Features]:
        """Those of each image; waits until it is known how many there are."""
        return self.split(self.points, (self.points.scores > -torch.inf).sum(1).tolist())

    def on_host(self) -> list[Features]:
        """Those of each image as numpy arrays; waits for one copy, and for those of score maps."""
        points = Points(*Download(self.points).arrays())
        return [features.numpy() for features in self.split(points, (points.scores > -np.inf).sum(1).tolist())]

    def split(self, points: Points, counts: Sequence[int]) -> list[Features]:
        """points: those of the batch, as they are or as numpy arrays."""
        rows = zip(zip(*points, strict=True), self.score_maps, counts, strict=True)
        return [
            Features(kp[:n], scores[:n], descriptors[:n], self.image_size, self.descriptor_space, score_map)
            for (kp, scores, descriptors), score_map, n in rows
        ]


class Extractor:
    """``Extractor()(image) -> Features``: keypoints, scores and descriptors, best first.

    weights: name of shipped weights, path of a .safetensors file, an SCFeat (which is copied), or ``"random"``: an
    untrained network, for tests of the plumbing. device: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``. options: fields of
    :class:`ExtractionOptions`. build_engines: ``now`` makes the first image of a size wait for its engine, so that
    results do not depend on time; ``beside`` is for images that do not wait: see ``create_engine``, and :meth:`close`
    it at the end. timings: milliseconds of the last call: preprocess, network, select. On a CUDA device
    they count what was submitted, unless ``synchronise`` is set; their sum is right in any case.
    One instance serves one thread at a time. Raises WeightsError, DeviceError, ConfigError.
    """

    def __init__(
        self,
        weights: str | Path | SCFeat = "lite",
        device: str | torch.device = "cpu",
        max_keypoints: int = 1024,
        *,
        build_engines: BuildEngines = "now",
        **options: Any,
    ) -> None:
        self.options = load_config(ExtractionOptions, {"max_keypoints": max_keypoints, **options}, "Extractor")
        self.device = resolve_device(device)
        self._surplus = Surplus()
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = _network(weights).eval()
        self.timings: dict[str, float] = {}
        precision = _resolve_precision(self.options.precision, self.device, self.options.engine)
        self._engine = create_engine(self.options.engine, self.model, self.device, precision, build=build_engines)
        self._check_size_mode(self.options)

    def update(self, **options: Any) -> None:
        """Change options between two images, without loading anything again: all that are given, or none.

        options: fields of :class:`ExtractionOptions` except ``precision`` and ``engine``. Descriptors remain comparable
        with those made before. Raises ConfigError.
        """
        changed = load_config(ExtractionOptions, {**dump_config(self.options), **options}, "Extractor")
        for name in ("precision", "engine"):
            old, new = getattr(self.options, name), getattr(changed, name)
            if old != new:
                raise ConfigError(
                    f"Extractor: {name} cannot change from '{old}' to '{new}' while it runs; make a new one"
                )
        self._check_size_mode(changed)
        self.options = changed

    def _check_size_mode(self, options: ExtractionOptions) -> None:
        if self.model.config.backbone.alignment == "legacy" and options.size_mode == "native":
            raise ConfigError(
                "expected size_mode 'crop16' or 'pad16' for a network with legacy alignment, found 'native'"
            )

    @property
    def descriptor_dim(self) -> int:
        return self.model.descriptor_dim

    @property
    def descriptor_space(self) -> str:
        return self.model.descriptor_space

    @property
    def precision(self) -> str:
        """What the network computes in: ``auto`` resolved."""
        return self._engine.precision

    @property
    def engine(self) -> str:
        """What ran the network for the last image; before the first one what was asked for."""
        return self._engine.name

    @property
    def engine_note(self) -> str:
        """Why it is another engine than the one asked for; empty where it is not. May change with each image."""
        return self._engine.note

    @property
    def engine_making(self) -> str:
        """Which engine is being made beside, and what runs meanwhile; empty where none is."""
        return self._engine.making

    def close(self) -> None:
        """Give up engines that are being made beside; returns when that has ended."""
        self._engine.close()

    def __call__(self, image: Array, mask: Array | None = None, *, to_numpy: bool = True) -> Features:
        """Features of one image.

        image: numpy (H, W), (H, W, 1), (H, W, 3) **RGB** or (H, W, 4), or torch (H, W) or (C, H, W); uint8, uint16, or
        floating in [0, 1]; at least 32x32. mask: (H, W) bool or uint8, non-zero = keep keypoints here.
        to_numpy: False leaves the arrays as torch tensors on the device. Raises ImageError, DeviceError.
        """
        return self.extract_batch([image], None if mask is None else [mask], to_numpy=to_numpy)[0]

    def extract_batch(
        self,
        images: Sequence[Array] | Array,
        masks: Sequence[Array | None] | Array | None = None,
        max_keypoints: Sequence[int] | None = None,
        *,
        score_maps: bool | Sequence[bool] = False,
        to_numpy: bool = True,
    ) -> list[Features]:
        """Features of several images of one size and kind in one pass; the same as one by one.

        masks: one (H, W) for all, or one for each, None for those without. max_keypoints: one for each image, 0 keeps
        all; None: that of the options for all. score_maps: which results keep the scores of the detector all over the
        image, as a view of those of the batch. Raises ImageError, DeviceError, and ConfigError for budgets that do not
        fit.
        """
        padded = self.extract_padded(images, masks, max_keypoints, score_maps=score_maps)
        with self._timed("select"):
            return padded.on_host() if to_numpy else padded.on_device()

    @torch.inference_mode()
    def extract_padded(
        self,
        images: Sequence[Array] | Array,
        masks: Sequence[Array | None] | Array | None = None,
        max_keypoints: Sequence[int] | None = None,
        *,
        score_maps: bool | Sequence[bool] = False,
    ) -> PaddedFeatures:
        """:meth:`extract_batch` without waiting for the device: how many points there are is not known yet."""
        self.timings = {}
        with self._timed("preprocess"):
            stacked = stack_images(images)
            height, width = stacked.shape[1:3]
            if self.device.type == "cpu":
                self._surplus.processed(len(stacked) * height * width)
            budgets = self._budgets(max_keypoints, len(stacked))
            mask = stack_masks(masks, (width, height), len(stacked))
            given = self._pyramid(stacked, None if mask is None else self._upload(mask))
        with self._timed("network"):
            maps = [self._run_network(level.image) for level in given]
        with self._timed("select"):
            found = [self._points(*each, budgets) for each in zip(given, maps, strict=True)]
            points = self._best(found, budgets, (width, height))
            wanted = [score_maps] * len(stacked) if isinstance(score_maps, bool) else score_maps
            scored = [
                given[0].without_padding(scores).float() if keep else None
                for scores, keep in zip(maps[0][0][:, 0], wanted, strict=True)
            ]
            return PaddedFeatures(points, scored, (width, height), self.descriptor_space)

    @torch.inference_mode()
    def describe(self, image: Array, keypoints: Array) -> Array:
        """Descriptors (N, D) float32, unit rows, at keypoints (N, 2) of one's own, pixels of the image (see __call__).

        Numpy where the keypoints are, else torch on the device; of the first level. Raises ImageError, DeviceError.
        """
        given = self._pyramid(stack_images([image]), None, levels=1)[0]
        _, descriptor_map = self._run_network(given.image)
        points = torch.as_tensor(keypoints, dtype=torch.float32).to(self.device)
        points = points if given.scale_xy == (1, 1) else scale_points(points, given.scale_xy)
        (descriptors,) = self._describe(descriptor_map, points[None])
        return descriptors.cpu().numpy() if not isinstance(keypoints, Tensor) else descriptors

    def warm_up(self, size: tuple[int, int] = (640, 480), batch: int = 1) -> None:
        """Run once on gray images of (width, height), so that the first real ones do not pay for initialisation.

        Engines that are made beside are not: they are made for the images that come.
        """
        with self._engine.unasked():
            self.extract_batch([torch.full((size[1], size[0]), 127, dtype=torch.uint8)] * batch)

    def _budgets(self, max_keypoints: Sequence[int] | None, count: int) -> int | list[int]:
        if max_keypoints is None:
            return self.options.max_keypoints
        budgets = list(max_keypoints)
        if len(budgets) != count or not all(type(budget) is int and budget >= 0 for budget in budgets):
            raise ConfigError(
                f"max_keypoints: expected a whole number >= 0 for each of {count} images, found {budgets}"
            )
        return budgets

    def _pyramid(self, images: Tensor, mask: Tensor | None, levels: int | None = None) -> list[NetworkInput]:
        options = self.options
        if options.clahe > 0:
            images = equalise(images, options.clahe)
        images = self._upload(images)
        height, width = images.shape[1:3]
        edges = _edges(width, height, options.max_edge, options.levels if levels is None else levels)
        return [network_input(images, mask, options.size_mode, edge) for edge in edges]

    def _upload(self, tensor: Tensor) -> Tensor:
        # Towards the host nothing would wait for the copy.
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def _run_network(self, image: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self._engine.run(image)
        except torch.cuda.OutOfMemoryError as error:
            batch, _, height, width = image.shape
            raise DeviceError(
                f"{self.device} is out of memory for {batch} image(s) of {width}x{height}; set max_edge to scale large "
                "images down, pass fewer images at once, or use precision='bfloat16'"
            ) from error

    def _points(self, given: NetworkInput, maps: tuple[Tensor, Tensor], max_keypoints: int | list[int]) -> Points:
        """What one level has to offer."""
        score_map, descriptor_map = maps
        selected = self._select(score_map, given, max_keypoints)
        return Points(given.to_image(selected.xy), selected.scores, self._describe(descriptor_map, selected.xy))

    def _best(self, levels: Sequence[Points], max_keypoints: int | list[int], size: tuple[int, int]) -> Points:
        """The best of all levels; what the network scores does not depend on the scale."""
        if len(levels) == 1:
            return levels[0]
        weighted = [own._replace(scores=own.scores * LEVEL_WEIGHT**level) for level, own in enumerate(levels)]
        joined = Points(*(torch.cat(parts, 1) for parts in zip(*weighted, strict=True)))
        best, valid = best_of_levels(joined.keypoints, joined.scores, max_keypoints, size, self.options.grid)
        keypoints, descriptors = (
            values.gather(1, best[..., None].expand(-1, -1, values.shape[2]))
            for values in (joined.keypoints, joined.descriptors)
        )
        return Points(keypoints, torch.where(valid, joined.scores.gather(1, best), -torch.inf), descriptors)

    def _select(self, score_map: Tensor, given: NetworkInput, max_keypoints: int | list[int]) -> Selected:
        options = self.options
        return select_padded(
            score_map,
            max_keypoints=max_keypoints,
            nms_radius=options.nms_radius,
            border=options.border,
            threshold=options.score_threshold or None,
            threshold_mode=options.threshold_mode,
            refinement=options.refinement,
            mask=given.mask,
            valid_size=given.valid_size,
            grid=options.grid,
        )

    def _describe(self, descriptor_map: Tensor, points: Tensor) -> Tensor:
        """Unit descriptors (B, K, D) float32 at points (B, K, 2) of the level that the map is of."""
        samples = sample_map(descriptor_map, points, alignment=self.model.config.backbone.alignment)
        return F.normalize(samples, dim=-1, eps=1e-8)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Any:
        start = time.perf_counter()
        yield
        if self.options.synchronise and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.timings[stage] = self.timings.get(stage, 0.0) + 1e3 * (time.perf_counter() - start)


def _edges(width: int, height: int, max_edge: int, levels: int) -> list[int]:
    """The longest edge that each level may have; 0: as it is. Levels that the network is too large for are left out."""
    longer, shorter = max(width, height), min(width, height)
    first = min(longer, max_edge or longer)
    edges = [round(first * 0.5 ** (level / 2)) for level in range(1, levels)]
    return [max_edge, *(edge for edge in edges if edge * shorter >= MIN_IMAGE_SIZE * longer)]


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto`` is the first CUDA device if there is one, else the CPU. Raises DeviceError for one that is not there."""
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise DeviceError(f"expected device 'cpu', 'cuda', 'cuda:<number>' or 'auto', found '{name}'")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable NVIDIA driver"
        )
        raise DeviceError(
            f"device '{name}' was asked for, but {why}; use device='cpu' or 'auto', or install a CUDA build of torch "
            "and the NVIDIA driver (https://pytorch.org/get-started)"
        )
    if index and int(index) >= torch.cuda.device_count():
        raise DeviceError(
            f"device '{name}' was asked for, but there are only {torch.cuda.device_count()} CUDA devices, "
            "counted from cuda:0"
        )
    return torch.device(name)


def _resolve_precision(precision: Precision, device: torch.device, engine: str) -> str:
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return "bfloat16" if fast and "bfloat16" in engine_precisions(engine, device) else "float32"
    if precision == "float16" and device.type == "cpu":
        raise DeviceError(
            "precision 'float16' needs a CUDA device, CPUs take 10 times as long for it; use 'float32' or 'bfloat16'"
        )
    return precision


def _network(weights: str | Path | SCFeat) -> SCFeat:
    if isinstance(weights, SCFeat):
        return copy.deepcopy(weights)
    if not isinstance(weights, (str, Path)):
        raise ConfigError(f"weights: expected a name, a path or an SCFeat, found {type(weights).__name__}")
    if str(weights) != "random":
        return SCFeat.from_pretrained(weights)
    warnings.warn("weights='random': an untrained network, its features mean nothing", stacklevel=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SCFeat.create("lite")
