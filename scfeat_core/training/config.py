"""The settings of a training run; a YAML file in ``config/`` is read into :class:`TrainConfig`, strictly.

Keys that the published code has keep their names there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from scfeat_core.config import Range, dump_config, load_config
from scfeat_core.data.posed import PosedConfig
from scfeat_core.data.warps import MotionConfig, WarpConfig
from scfeat_core.errors import ConfigError
from scfeat_core.network.model import VARIANTS, ModelConfig
from scfeat_core.training.descriptor_loss import DescriptorLossConfig
from scfeat_core.training.distillation_loss import DistillationConfig
from scfeat_core.training.epipolar_loss import EpipolarLossConfig, LineToWindowConfig
from scfeat_core.training.keypoint_loss import KeypointLossConfig
from scfeat_core.training.localisation_loss import LocalisationConfig, MotionLossConfig

Positive = Annotated[float, Range(above=0.0)]
NotNegative = Annotated[float, Range(minimum=0.0)]
Share = Annotated[float, Range(minimum=0.0, maximum=1.0)]
Count = Annotated[int, Range(minimum=1)]
NotNegativeInt = Annotated[int, Range(minimum=0)]
Module = Literal["backbone", "encoder", "decoder", "localheader"]


@dataclass(frozen=True)
class DataConfig(PosedConfig):
    """Settings of posed images (see :class:`PosedConfig`), and:

    batch_size: pairs a step, in each process. workers: processes that load data; 0 is one thread.
    max_edge: pixels, larger photographs are reduced before they are warped. max_photos: so many are kept in memory,
    evenly chosen of more. warps: how photographs become pairs of views. motions: and pairs as of a
    video, of which the training has motion_share.
    on_device: decode all images once into the memory of the device, 5.25 bytes a pixel of theirs (and twice that while
    they are put there), and render the views there instead of on the CPU; posed images with the ``photometric``
    augmentation or none.
    """

    batch_size: Count = 2
    workers: NotNegativeInt = 0
    max_edge: Annotated[int, Range(minimum=64)] = 640
    max_photos: Count = 5000
    warps: WarpConfig = field(default_factory=WarpConfig)
    motions: MotionConfig = field(default_factory=MotionConfig)
    on_device: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, from what, and how long.

    checkpoint_name: of the run; its folder is runs/<checkpoint_name>.
    data: ``photos`` are warped; ``posed_images`` and ``megadepth`` are folders of scenes, ``auto`` whichever of the two
    is there.

    model: ``lite``, ``r18``, ``r34``, ``r50``; null is that of the checkpoint to start from. model_config: changes to
    it, as ``backbone: {cn_init: legacy}``. load_path: where the weights come from: ``random``; ``imagenet`` (only the
    encoder, from an installed package); the folder of a run; a .safetensors file; the name of shipped weights; or an
    encoder's state dict (.pth, .pt). Of a list, the first that is there.

    optimal_modules: what is trained, the rest stays as it is: ``backbone`` (``encoder`` and ``decoder``) by the
    description loss, ``localheader``, the detector, by the keypoint loss. optimal_lrs: their learning rates.
    frozen_modules: parts of them that stay all the same, as ``backbone.encoder.stages.0``.
    align_local_grad: let the detector's loss train the backbone. bn_mode: whether BatchNorm statistics are those of the
    batch or stay fixed.

    epoch, epoch_step: so many times so many steps. lr_schedule: ``step`` multiplies the rates by ``lr_decay_factor``
    every ``lr_decay_step`` epochs; ``cosine`` goes down to ``final_lr`` of them. Before it they grow over
    ``warmup_steps``. minutes: > 0: the run ends, and the cosine with it, after so many minutes of steps, however many
    they were; after ``epoch * epoch_step`` at the latest. clip_norm: of the gradient, backbone and detector each, where
    ``grad_clip``. ema_decay: of the average of the weights that is validated and written, which forgets faster in the
    beginning (see :func:`~scfeat_core.training.optimisation.average_decay`); 0 is no average.

    detector_start: first step of the keypoint loss, before it the descriptors are too poor to reward anything.
    keypoint_every: only in each so many steps. Both are for training of more than the detector, and set aside where it
    is all that is trained. proposal_share: share of the descriptor points of warps that are drawn by the detector
    instead of uniformly.
    keypoint_weight: of the detector's losses beside the description loss.
    teacher: weights, as of load_path, whose scores the detector learns on warps, beside its other losses (see
    :class:`DistillationConfig`); none where empty.
    track_weight: of a loss on the sparse true correspondences of posed images, beside the epipolar one.
    warp_share: share of the steps of posed images that are taken on warped photographs of the same data instead;
    pairs that are posed upright let a network forget rotation.
    motion_share: where the detector alone is trained, the share of the steps on warps in which it learns from pairs as
    of a video to place its points exactly (MotionLoss_config): between two frames they lag behind the image otherwise.
    With a teacher, which may be what it was before, it meanwhile keeps to what its points are worth.

    compile_network: through torch.compile; a minute or two before the first step, and not what resumes bit for bit.
    log_freq, save_freq, validate_freq: steps. validation_pairs: of each kind of data. timeout: minutes that processes
    of a distributed run wait for each other, and for the validation by the first one.
    """

    checkpoint_name: str
    seed: NotNegativeInt = 0
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile_network: bool = False
    timeout: Positive = 10.0

    data: Literal["auto", "photos", "posed_images", "megadepth"] = "auto"
    data_config_train: DataConfig = field(default_factory=DataConfig)

    model: Literal["lite", "r18", "r34", "r50"] | None = None
    model_config: dict[str, Any] = field(default_factory=dict)
    load_path: str | tuple[str, ...] = "random"

    optimal_modules: tuple[Module, ...] = ("backbone",)
    optimal_lrs: tuple[Positive, ...] = (1e-4,)
    frozen_modules: tuple[str, ...] = ()
    align_local_grad: bool = False
    bn_mode: Literal["train", "frozen"] = "train"
    optimizer: Literal["Adam", "AdamW", "SGD"] = "Adam"
    weight_decay: NotNegative = 0.0
    epoch: Count = 10
    epoch_step: Count = 10_000
    lr_schedule: Literal["step", "cosine"] = "step"
    lr_decay_step: Count = 9
    lr_decay_factor: Positive = 0.1
    warmup_steps: NotNegativeInt = 0
    minutes: NotNegative = 0.0
    final_lr: Share = 0.02
    grad_clip: bool = False
    clip_norm: Positive = 10.0
    ema_decay: Annotated[float, Range(minimum=0.0, below=1.0)] = 0.999

    preprocess_train_config: LineToWindowConfig = field(default_factory=LineToWindowConfig)
    EpipolarLoss_Line2Window_config: EpipolarLossConfig = field(default_factory=EpipolarLossConfig)
    KeypointLoss_config: KeypointLossConfig = field(default_factory=KeypointLossConfig)
    DescriptorLoss_config: DescriptorLossConfig = field(default_factory=DescriptorLossConfig)
    LocalisationLoss_config: LocalisationConfig = field(default_factory=LocalisationConfig)
    MotionLoss_config: MotionLossConfig = field(default_factory=MotionLossConfig)
    DistillationLoss_config: DistillationConfig = field(default_factory=DistillationConfig)
    teacher: str = ""
    detector_start: NotNegativeInt = 0
    keypoint_every: Count = 1
    proposal_share: Share = 0.5
    keypoint_weight: NotNegative = 1.0
    track_weight: NotNegative = 0.0
    warp_share: Annotated[float, Range(minimum=0.0, below=1.0)] = 0.0
    motion_share: Annotated[float, Range(minimum=0.0, below=1.0)] = 0.0

    log_freq: Count = 100
    save_freq: Count = 500
    validate_freq: Count = 1000
    validation_pairs: Count = 48

    def __post_init__(self) -> None:
        self._check_modules()
        if not self.describes:  # a detector alone waits for nothing
            object.__setattr__(self, "detector_start", 0)
            object.__setattr__(self, "keypoint_every", 1)
        self._check_weights()
        self._check_turns()
        self._check_teacher()
        if self.minutes > 0 and self.lr_schedule != "cosine":
            raise ConfigError(
                f"minutes: expected lr_schedule: cosine, which can follow the clock, found '{self.lr_schedule}'; set "
                "it, or minutes: 0"
            )
        self._check_motions()
        data = self.data_config_train
        if data.on_device and self.data != "photos" and data.augmentation in ("jitter", "legacy"):
            raise ConfigError(
                "data_config_train.augmentation: expected photometric or none with on_device: true, found "
                f"'{data.augmentation}', which is done by OpenCV; change one of the two"
            )
        if self.model is not None:
            model_config(VARIANTS[self.model], self.model_config)
        cells = (self.DescriptorLoss_config.cell, self.KeypointLoss_config.grid_size)
        warps = self.data == "photos" or self.warp_share > 0
        if warps and self.describes and self.detects and self.proposal_share > 0 and cells[0] != cells[1]:
            raise ConfigError(
                f"expected DescriptorLoss_config.cell and KeypointLoss_config.grid_size to be equal, found {cells[0]} "
                f"and {cells[1]}; make them equal, or set proposal_share: 0"
            )

    def _check_modules(self) -> None:
        modules, rates = self.optimal_modules, self.optimal_lrs
        if not modules or len(modules) != len(rates):
            raise ConfigError(f"optimal_lrs: expected a learning rate for each of {list(modules)}, found {list(rates)}")
        names = [name for module in modules for name in PARTS[module]]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"optimal_modules: expected each part once, found {list(modules)}; 'backbone' is 'encoder' and "
                "'decoder'"
            )

    def _check_weights(self) -> None:
        """In every step there has to be a loss."""
        if not self.describes and self.keypoint_weight == 0:
            raise ConfigError(
                "keypoint_weight: expected more than 0, as nothing else trains the detector, found 0; raise it, or "
                "train more of the network (optimal_modules)"
            )
        loss = self.EpipolarLoss_Line2Window_config
        if self.data == "photos" or not self.describes or loss.weight_window + loss.weight_grid + self.track_weight > 0:
            return
        detects_always = self.detects and self.detector_start == 0 and self.keypoint_every == 1
        otherwise = self.align_local_grad or self.warp_share > 0
        if not (detects_always and self.keypoint_weight > 0 and otherwise):
            raise ConfigError(
                "expected a description loss on posed images, found weight_window, weight_grid and track_weight all 0; "
                f"raise one of them, or train the detector alone (optimal_modules: [localheader]), not "
                f"{list(self.optimal_modules)}"
            )

    def _check_turns(self) -> None:
        """The detector has to see both kinds of steps."""
        if self.data == "photos" or self.warp_share == 0 or not self.detects:
            return
        first = -(-self.detector_start // self.keypoint_every) * self.keypoint_every
        steps = range(first, first + 200 * self.keypoint_every, self.keypoint_every)
        turns = {takes_turn(step, self.warp_share) for step in steps}
        if len(turns) < 2:
            raise ConfigError(
                f"expected a detector that is trained on posed images and on warps, found that warp_share: "
                f"{self.warp_share} and keypoint_every: {self.keypoint_every} keep it from "
                f"{'posed images' if turns == {True} else 'warps'}; change one of them, as to warp_share: 0.6 with "
                "keypoint_every: 2"
            )

    def _check_motions(self) -> None:
        if self.motion_share > 0 and (self.describes or not (self.data == "photos" or self.warp_share > 0)):
            raise ConfigError(
                f"motion_share: expected a detector that is trained alone, and on warps, found {self.motion_share} for "
                f"optimal_modules: {list(self.optimal_modules)}, data: {self.data}, warp_share: {self.warp_share}; set "
                "optimal_modules: [localheader], and data: photos or warp_share, or motion_share: 0"
            )

    def _check_teacher(self) -> None:
        if self.teacher and not (self.detects and (self.data == "photos" or self.warp_share > 0)):
            raise ConfigError(
                f"teacher: expected a detector that is trained on warps, found '{self.teacher}' for optimal_modules: "
                f"{list(self.optimal_modules)}, data: {self.data}, warp_share: {self.warp_share}; add localheader, or "
                "set data: photos or warp_share"
            )
        if self.teacher:
            self._check_cells()

    def _check_cells(self) -> None:
        """A rank is one among several cells of a view."""
        cell, data = self.DistillationLoss_config.cell, self.data_config_train
        views = {"warps": data.warps.view_size}
        if self.motion_share > 0:
            views["motions"] = data.motions.view_size
        for pairs, view in views.items():
            if 2 * cell > view:
                raise ConfigError(
                    f"DistillationLoss_config.cell: expected at most half of data_config_train.{pairs}.view_size "
                    f"({view}), found {cell}; lower it, or make the views larger"
                )

    @property
    def steps(self) -> int:
        return self.epoch * self.epoch_step

    @property
    def describes(self) -> bool:
        """Whether anything is trained that a description loss reaches."""
        return any(module != "localheader" for module in self.optimal_modules)

    @property
    def detects(self) -> bool:
        return "localheader" in self.optimal_modules

    def detects_at(self, step: int) -> bool:
        """Whether the detector is trained in this step; always, where nothing else is."""
        return self.detects and step >= self.detector_start and step % self.keypoint_every == 0


def takes_turn(step: int, share: float) -> bool:
    """Whether this is one of the ``share`` of all steps, evenly spread."""
    return int((step + 1) * share) > int(step * share)


PARTS: dict[str, tuple[str, ...]] = {
    "backbone": ("encoder", "decoder"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "localheader": ("localheader",),
}


def model_config(base: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """``base`` with some keys changed, unknown ones refused. Raises ConfigError."""
    return load_config(ModelConfig, merge(dump_config(base), changes), where="model_config")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the changes, key by key also in the mappings within it."""
    nested = {
        k: merge(base[k], v) for k, v in changes.items() if isinstance(v, Mapping) and isinstance(base.get(k), dict)
    }
    return {**base, **changes, **nested}
