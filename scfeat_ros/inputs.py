"""What comes into the node: which image waits for which mask or partner, and what masks hide.

Four stages, each with the frames that wait in it: :class:`InfoGate` gives an image its calibration, :class:`MaskGate`
its mask, :class:`Partners` brings the images of a stereo pair together, the worker (worker.py) keeps the newest. The
first three belong to the executor's thread; they only compare stamps and never wait themselves. Nothing here imports
ROS or torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from scfeat_core.errors import ConfigError, ImageError

from .images import image_to_array

# Nanoseconds: images that overtake each other are closer together, recordings that start again go further back.
LATE = 1_000_000_000
ROOM = 30  # images or masks that may wait, a second of a usual camera: whatever does not come, memory is bounded
INFO_PATIENCE = 0.5  # seconds that the first images wait for a calibration that somebody publishes
PARTNER_PATIENCE = 0.5  # seconds that an image waits for that of the other camera; transport differs by far less


def stamp_of(message: Any) -> int:
    """The stamp in the header of a message, nanoseconds."""
    stamp = message.header.stamp
    return stamp.sec * 1_000_000_000 + stamp.nanosec


@dataclass(frozen=True, eq=False)
class Frame:
    """An image on its way from its topic to the worker.

    message: sensor_msgs/Image or CompressedImage. camera_info: the newest sensor_msgs/CameraInfo, mask: the
    sensor_msgs/Image that belongs to it; None where there is none. arrived: time.perf_counter(), seconds.
    """

    camera: str
    message: Any
    arrived: float
    camera_info: Any = None
    mask: Any = None

    @property
    def stamp(self) -> int:
        """Nanoseconds."""
        return stamp_of(self.message)


Dropped = Callable[[Frame, str], None]  # told the image, and why it is dropped


class InfoGate:
    """Gives the images of one camera the newest CameraInfo. passed(frame): where the images go, in their order.

    A driver sends its first image before the CameraInfo of it: images wait for that, at most INFO_PATIENCE seconds in
    all, and then go on without a calibration.
    """

    def __init__(self, passed: Callable[[Frame], None]) -> None:
        self._passed = passed
        self._waiting: deque[Frame] = deque()
        self._info: Any = None
        self._end: float | None = None  # of the patience, time.perf_counter(), seconds

    def add_image(self, frame: Frame, now: float, expected: Callable[[], bool]) -> None:
        """now: time.perf_counter(). expected: whether somebody publishes a CameraInfo; asked only before the first."""
        if self._info is not None:
            self._passed(replace(frame, camera_info=self._info))
            return
        self._end = now + INFO_PATIENCE if self._end is None else self._end
        self._waiting.append(frame)
        if now >= self._end or len(self._waiting) > ROOM or not expected():
            self._release()

    def add_info(self, info: Any) -> None:
        """info: sensor_msgs/CameraInfo."""
        self._info = info
        self._release()

    def poll(self, now: float) -> None:
        """To be called from time to time, for images that wait while nothing else comes."""
        if self._end is not None and now >= self._end:
            self._release()

    def clear(self) -> None:
        """Nothing more comes: what waits goes on without a calibration. One that is there stays."""
        self._release()

    def forget(self) -> None:
        """The next images wait for a calibration anew."""
        self._info = self._end = None

    def _release(self) -> None:
        while self._waiting:
            self._passed(replace(self._waiting.popleft(), camera_info=self._info))


@dataclass(frozen=True)
class MaskRules:
    """Which mask of the topic an image gets.

    hold: the newest one that came, none before the first; no image waits. exact: the one with the stamp of the image.
    nearest: the one nearest in time, within ``tolerance`` seconds. For the last two an image waits at most ``patience``
    seconds, and is dropped where it has no mask by then: features on what should be hidden are worse than none.
    """

    policy: str = "hold"
    tolerance: float = 0.05
    patience: float = 0.5


class MaskGate:
    """Gives the images of one camera their masks. passed(frame), dropped(frame, why): where the images go.

    ``rules`` may be replaced at any time, for the images that come then and those that wait.
    """

    def __init__(self, rules: MaskRules, passed: Callable[[Frame], None], dropped: Dropped) -> None:
        self.rules = rules
        self._passed = passed
        self._dropped = dropped
        self._masks: deque[tuple[int, Any]] = deque(maxlen=ROOM)  # with their stamps, in the order of arrival
        self._waiting: deque[Frame] = deque()

    def add_image(self, frame: Frame, now: float) -> None:
        """now: time.perf_counter()."""
        self._waiting.append(frame)
        self._advance(now)

    def add_mask(self, mask: Any, now: float) -> None:
        """mask: sensor_msgs/Image."""
        stamp = stamp_of(mask)
        if self._masks and stamp < self._masks[-1][0] - LATE:
            self._masks.clear()  # of a recording that starts again
        self._masks.append((stamp, mask))
        self._advance(now)

    def poll(self, now: float) -> None:
        """To be called from time to time, for images that wait while nothing else comes."""
        if self._waiting:
            self._advance(now)

    def restart(self) -> None:
        """The time starts anew: images that wait are dropped, and masks belong to no image that comes.

        But with "hold" the newest one stays: a mask that was published once would not come again.
        """
        held = self._masks[-1] if self._masks and self.rules.policy == "hold" else None
        self.clear()
        if held is not None:
            self._masks.append(held)

    def clear(self) -> None:
        """Forget the masks; images that wait for one are dropped."""
        self._masks.clear()
        while self._waiting:
            self._dropped(self._waiting.popleft(), "the node stopped waiting for its mask")

    def _advance(self, now: float) -> None:
        """Settle what can be settled, the oldest first, so that images keep their order."""
        while self._waiting:
            frame = self._waiting[0]
            last_call = now - frame.arrived >= self.rules.patience or len(self._waiting) > ROOM
            found, final = self._choose(frame.stamp, last_call)
            if not (final or self._overtaken(frame)):
                return
            self._waiting.popleft()
            if found is None and self.rules.policy != "hold":
                self._dropped(frame, self._missing(now - frame.arrived))
            else:
                self._passed(replace(frame, mask=found))

    def _missing(self, waited: float) -> str:
        """waited: seconds; less than patience where no mask can come any more."""
        rules = self.rules
        wanted = "with its stamp" if rules.policy == "exact" else f"within {rules.tolerance:g} s of its stamp"
        late = waited >= rules.patience
        when = f"within {rules.patience:g} s" if late else "when later ones or more images had come already"
        return (
            f"expected a mask {wanted}, found none {when} (mask_policy {rules.policy}): publish "
            "masks with the stamps of the images, or set mask_tolerance, mask_patience, or mask_policy to 'hold'"
        )

    def _overtaken(self, frame: Frame) -> bool:
        """A later image has its mask already: masks come in order, so that of this one was left out."""
        stamps = {stamp for stamp, _ in self._masks}
        return self.rules.policy == "exact" and any(later.stamp in stamps for later in self._waiting if later != frame)

    def _choose(self, stamp: int, last_call: bool) -> tuple[Any, bool]:
        """The mask for an image, and whether that is final: no better one can come, or it has waited long enough."""
        rules = self.rules
        if rules.policy == "hold":
            return (self._masks[-1][1] if self._masks else None), True
        if not self._masks:
            return None, last_call
        distance, mask = min(((abs(at - stamp), mask) for at, mask in self._masks), key=lambda pair: pair[0])
        if rules.policy == "exact":
            return (mask, True) if distance == 0 else (None, last_call)
        passed_by = self._masks[-1][0] >= stamp
        return (mask if distance <= 1e9 * rules.tolerance else None), passed_by or last_call


class Partners:
    """Brings the images of cameras together that have the same time, within a tolerance.

    cameras: two or more. tolerance: seconds. passed(frames): gets a frame of each, by camera. dropped(frame, why): gets
    each that found no partner within PARTNER_PATIENCE, or that was overtaken by a later set.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        tolerance: float,
        passed: Callable[[dict[str, Frame]], None],
        dropped: Dropped,
    ) -> None:
        self._tolerance = round(1e9 * tolerance)
        self._passed = passed
        self._dropped = dropped
        self._waiting: dict[str, deque[Frame]] = {camera: deque() for camera in cameras}

    def add(self, frame: Frame, now: float) -> None:
        """now: time.perf_counter()."""
        own = self._waiting[frame.camera]
        if own and frame.stamp < own[-1].stamp - LATE:
            self.clear()  # of a recording that starts again
        own.append(frame)
        self._complete(frame)
        self.poll(now)

    def poll(self, now: float) -> None:
        """To be called from time to time, for images that wait while nothing else comes."""
        for waiting in self._waiting.values():
            while waiting and (now - waiting[0].arrived >= PARTNER_PATIENCE or len(waiting) > ROOM):
                self._drop(waiting.popleft())

    def clear(self) -> None:
        """Drop what waits."""
        for waiting in self._waiting.values():
            while waiting:
                self._dropped(waiting.popleft(), "the node stopped waiting for the other camera")

    def _complete(self, frame: Frame) -> None:
        """Pass on the set that this frame completes, if it does, and drop what is older."""
        chosen = {camera: self._nearest(waiting, frame.stamp) for camera, waiting in self._waiting.items()}
        together = {camera: partner for camera, partner in chosen.items() if partner is not None}
        if len(together) < len(chosen):
            return
        for camera, partner in together.items():
            waiting = self._waiting[camera]
            while (first := waiting.popleft()) is not partner:
                self._drop(first)
        self._passed(together)

    def _drop(self, frame: Frame) -> None:
        others = {camera: frames for camera, frames in self._waiting.items() if camera != frame.camera}
        distances = [abs(other.stamp - frame.stamp) for frames in others.values() for other in frames]
        found = f"the nearest is {1e-9 * min(distances):.4f} s away" if distances else "none waits"
        self._dropped(
            frame,
            f"expected an image of {', '.join(others)} within {1e-9 * self._tolerance:g} s of that of {frame.camera}, "
            f"found {found}: synchronise the cameras, or set sync_tolerance",
        )

    def _nearest(self, waiting: Sequence[Frame], stamp: int) -> Frame | None:
        nearest = min(waiting, key=lambda frame: abs(frame.stamp - stamp), default=None)
        return nearest if nearest is not None and abs(nearest.stamp - stamp) <= self._tolerance else None


class Intake:
    """The way of all images of the node to the worker: calibration, mask, partners. For the executor's thread.

    stereo: pairs of names; cameras that are connected by pairs form one group. tolerance: seconds between the stamps
    of a pair. submit(group, frames): what is complete. dropped(frame, why): what found no mask or no partner in time.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        stereo: Sequence[tuple[str, str]],
        tolerance: float,
        rules: MaskRules,
        submit: Callable[[tuple[str, ...], dict[str, Frame]], None],
        dropped: Dropped,
    ) -> None:
        self._gates = {camera: MaskGate(rules, self._masked, dropped) for camera in cameras}
        self._infos = {camera: InfoGate(self._calibrated) for camera in cameras}
        self._groups = {camera: group for group in groups(cameras, stereo) for camera in group}
        self._submit = submit
        self._partners = {
            group: Partners(group, tolerance, lambda frames, group=group: submit(group, frames), dropped)  # type: ignore[misc]
            for group in set(self._groups.values())
            if len(group) > 1
        }
        self._now = 0.0

    def set_rules(self, rules: MaskRules) -> None:
        for gate in self._gates.values():
            gate.rules = rules

    def add_image(self, frame: Frame, now: float, calibrated: Callable[[], bool] = lambda: False) -> None:
        """now: time.perf_counter(). calibrated: whether somebody publishes a CameraInfo for it."""
        self._now = now
        self._infos[frame.camera].add_image(frame, now, calibrated)

    def add_info(self, camera: str, info: Any, now: float) -> None:
        """info: sensor_msgs/CameraInfo."""
        self._now = now
        self._infos[camera].add_info(info)

    def add_mask(self, camera: str, mask: Any, now: float) -> None:
        """mask: sensor_msgs/Image."""
        self._now = now
        self._gates[camera].add_mask(mask, now)

    def poll(self, now: float) -> None:
        """To be called several times a second: drops what has waited too long."""
        self._now = now
        for stage in self._stages():
            stage.poll(now)

    def restart(self) -> None:
        """Drop what waits: the time starts anew. Calibrations, and masks that are held, stay."""
        for gate in self._gates.values():
            gate.restart()
        for partners in self._partners.values():
            partners.clear()

    def clear(self) -> None:
        """Drop what waits and forget the masks: nothing more will come. Calibrations stay."""
        for stage in self._stages():
            stage.clear()

    def forget_calibrations(self) -> None:
        """What comes next may be of other cameras."""
        for gate in self._infos.values():
            gate.forget()

    def _stages(self) -> list[InfoGate | MaskGate | Partners]:
        return [*self._infos.values(), *self._gates.values(), *self._partners.values()]

    def _calibrated(self, frame: Frame) -> None:
        self._gates[frame.camera].add_image(frame, self._now)

    def _masked(self, frame: Frame) -> None:
        group = self._groups[frame.camera]
        if len(group) == 1:
            self._submit(group, {frame.camera: frame})
        else:
            self._partners[group].add(frame, self._now)


def groups(cameras: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
    """The cameras, those that are connected by pairs together. Names keep the order of ``cameras``."""
    found: list[set[str]] = [{camera} for camera in cameras]
    for pair in pairs:
        joined = set().union(*(group for group in found if group & set(pair)))
        found = [group for group in found if not group & joined] + [joined]
    ordered = [tuple(camera for camera in cameras if camera in group) for group in found]
    return sorted(ordered, key=lambda group: cameras.index(group[0]))


def read_mask(path: str | Path) -> np.ndarray:
    """The static mask of a camera from an image file: (H, W) bool, True where it is not black: keep keypoints there.

    Raises ConfigError where the file is missing, no image, or black all over.
    """
    if not Path(path).is_file():
        raise ConfigError(
            f"expected the mask of a camera at {path}, found no file: mask_files takes paths of images, white where "
            "keypoints may be and black where not, or '' for a camera without"
        )
    pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ConfigError(f"expected an image (PNG) as the mask {path}, found a file that OpenCV cannot read")
    if not pixels.any():
        raise ConfigError(f"expected white pixels in the mask {path}, found none: all of the image would be hidden")
    return pixels > 0


@dataclass(eq=False)
class Masks:
    """The masks of one camera made into one; for the worker's thread.

    static: (H, W) bool, of the mask file; None without one. complain(text): told about a mask that cannot be used. Such
    a mask is left out, and the image is processed without it.
    """

    static: np.ndarray | None
    complain: Callable[[str], None]
    _cached: tuple[Any, tuple[int, int]] | None = None  # what the mask was made of
    _mask: np.ndarray | None = field(default=None, repr=False)
    share: float = math.nan  # of the image that the last mask hides; NaN without one
    refused: str = ""  # why a mask that is there was left out

    def __call__(self, message: Any, image_size: tuple[int, int]) -> np.ndarray | None:
        """(H, W) bool, True where keypoints may be; None where nothing is hidden.

        message: sensor_msgs/Image with one channel, non-zero = keep; None without one. image_size: (width, height).
        """
        if self._cached is None or self._cached[0] is not message or self._cached[1] != image_size:
            self.refused = ""
            self._mask = self._combine(message, image_size)
            self.share = math.nan if self._mask is None else 1.0 - float(self._mask.mean())
            self._cached = message, image_size
        return self._mask

    def _combine(self, message: Any, image_size: tuple[int, int]) -> np.ndarray | None:
        static = self._checked(self.static, image_size, "the mask file")
        moving = self._checked(self._decode(message), image_size, "the mask on its topic")
        if static is None or moving is None:
            return moving if static is None else static
        return static & moving

    def _decode(self, message: Any) -> np.ndarray | None:
        if message is None:
            return None
        try:
            pixels = image_to_array(message)
        except ImageError as error:
            self._refuse(f"mask not used: {error}")
            return None
        if pixels.ndim != 2:
            self._refuse(f"mask not used: expected one channel (mono8), found encoding '{message.encoding}'")
            return None
        return pixels != 0

    def _refuse(self, text: str) -> None:
        self.refused = text
        self.complain(text)

    def _checked(self, mask: np.ndarray | None, image_size: tuple[int, int], what: str) -> np.ndarray | None:
        if mask is None or mask.shape == image_size[::-1]:
            return mask
        self._refuse(
            f"mask not used: expected {what} to have the size of the image, {image_size[0]}x{image_size[1]}, found "
            f"{mask.shape[1]}x{mask.shape[0]}"
        )
        return None
