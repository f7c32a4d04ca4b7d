"""All that one replay needs, as plain values: it can be pickled, and sent to another process or machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from scfeat_core.errors import ConfigError
from scfeat_ros.parameters import NodeParameters

NO_TRUTH = "none"
NO_CAMERA_INFO = "none"
NO_DEPTH = "none"


@dataclass(frozen=True)
class ReplayJob:
    """One bag through the front end.

    out: folder of the run. topic, camera_info: names; None: chosen by type; a camera_info of "none": without
    calibration, unless there are intrinsics. intrinsics: file that replaces the CameraInfo of the bag. ground_truth: a
    file, a topic of the bag, or "none"; None: groundtruth.txt beside the bag, or a topic that is called so.
    truth_of_body: the poses are those of the body that the intrinsics file tells the camera from (T_cam_imu, T_BS).
    depth: topic of depth maps of the same view, or "none"; None: one with the frame_id of the images. method: "scfeat",
    or another of evaluation/methods.py. parameters: those of the node. camera: which of ``parameters.cameras`` the
    images are of; "": the first. frames: at most so many; 0: all. start, stop: seconds of the recording. overwrite:
    replace what the folder holds. report: write report.html, too.
    """

    bag: Path
    out: Path
    topic: str | None = None
    camera_info: str | None = None
    intrinsics: Path | None = None
    ground_truth: str | None = None
    truth_of_body: bool = False
    depth: str | None = None
    method: str = "scfeat"
    parameters: NodeParameters = field(default_factory=NodeParameters)
    camera: str = ""
    frames: int = 0
    start: float = 0.0
    stop: float | None = None
    overwrite: bool = False
    report: bool = True

    def __post_init__(self) -> None:
        if self.camera and self.camera not in self.parameters.cameras:
            raise ConfigError(
                f"expected a camera of the parameters ({', '.join(self.parameters.cameras)}), found '{self.camera}'"
            )
        if self.frames < 0 or self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ConfigError(
                f"expected frames >= 0 and 0 <= start < stop (seconds), found frames {self.frames}, start "
                f"{self.start:g}, stop {self.stop}"
            )

    def window(self, first: int) -> tuple[int, float]:
        """Log times from which on images are replayed, and no more, nanoseconds. first: that of the first image."""
        stop = float("inf") if self.stop is None else first + round(1e9 * self.stop)
        return first + round(1e9 * self.start), stop

    @property
    def camera_name(self) -> str:
        return self.camera or self.parameters.cameras[0]
