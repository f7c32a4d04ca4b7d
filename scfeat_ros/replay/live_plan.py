"""Which topics of a bag are played for a node, and under which names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfeat_core.errors import ConfigError, ScfeatError
from scfeat_ros.bags import CAMERA_INFO, IMAGE, IMAGE_TYPES, Bag, Topic
from scfeat_ros.parameters import NodeParameters, load_parameters, read_parameters, rows
from scfeat_ros.player import IMU, PLAYABLE, QOS

from .job import NO_CAMERA_INFO

if TYPE_CHECKING:
    from scfeat_ros.monitor import Listener

    from .job import ReplayJob

OUTPUTS = ("features", "matches", "tracks", "stereo_matches")
STATUS_RATE = 20.0  # Hz, of a node of our own, so that nearly every frame's times are seen
SIDES = (("left", "right"), ("cam0", "cam1"), ("camera0", "camera1"), ("infra1", "infra2"))


@dataclass(frozen=True)
class LiveOptions:
    """How a bag is played, and to whom.

    rate: speed, 2 plays twice as fast. node: full name of a running one; "": one is started. clock: Hz of /clock, 0:
    none. qos: of player.QOS. imu, masks: topics of the bag. play_as: topic of the bag -> name under which it is played.
    outputs: of OUTPUTS, what is listened to beside status and diagnostics. patience: seconds for which a running node
    may stay silent. config: parameter file of the node. settings: parameters of the node beside those of the file.
    """

    rate: float = 1.0
    node: str = ""
    clock: float = 100.0
    qos: str = QOS[0]
    imu: str = ""
    masks: tuple[str, ...] = ()
    play_as: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = OUTPUTS
    patience: float = 20.0
    config: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low, high in (("rate", 0.01, 100.0), ("clock", 0.0, 1000.0), ("patience", 0.1, 3600.0)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"expected --{name} between {low:g} and {high:g}, found {getattr(self, name):g}")


@dataclass(frozen=True)
class PlayedCamera:
    """name: of the camera in the node; "" while it is not known. topic: of its images in the bag. played: under which
    name they are published. count: images.
    """

    name: str
    topic: str
    played: str
    count: int


@dataclass(frozen=True)
class Plan:
    """cameras: whose images are played. beside: topic of the bag -> name, of what goes with them. words: arguments of a
    node of our own. why: these cameras, in words.
    """

    cameras: tuple[PlayedCamera, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        return ", ".join(camera.played for camera in self.cameras) + (f" ({self.why})" if self.why else "")


def own_plan(bag: Bag, job: ReplayJob, options: LiveOptions) -> Plan:
    """For a node that is started for it: the topics that the job names, or the image topic with most messages, and the
    other one where that is of a stereo pair. Raises DataError and ConfigError where these are not in the bag.
    """
    given = {} if options.config is None else read_parameters(options.config)
    given.update(options.settings)
    images = _image_topics(bag, job.topic)
    names = _camera_names(images, given, job.parameters)
    calibrated = job.camera_info != NO_CAMERA_INFO
    infos = [bag.camera_info_topic(image, job.camera_info) if calibrated else None for image in images]
    masks = [_named(bag, name, (IMAGE,)) for name in options.masks]
    imu = _named(bag, options.imu, (IMU,)) if options.imu else None
    remaps = _remaps(names, images, infos, masks, imu, options)
    beside = [topic for topic in (*infos, *masks, imu) if topic is not None]
    cameras = tuple(
        PlayedCamera(name, image.name, _played_name(image, options), image.count)
        for name, image in zip(names, images, strict=True)
    )
    parameters = _parameters(options, given, names, images, all(infos))
    words = ["--ros-args", *(word for remap in remaps for word in ("-r", remap))]
    if options.config is not None:
        words += ["--params-file", str(options.config)]
    # JSON quotes what YAML, as which ROS reads a value, would take for something else than text
    words += [word for name, value in parameters.items() for word in ("-p", f"{name}:={json.dumps(value)}")]
    chosen = {topic.name: options.play_as.get(topic.name, topic.name) for topic in beside}
    return Plan(cameras, chosen, tuple(words), _why(bag, images, job.topic))


def _why(bag: Bag, images: Sequence[Topic], named: str | None) -> str:
    """What the command did not say."""
    if named:
        return "as asked for"
    others = [topic.name for topic in bag.image_topics if topic not in images]
    if len(images) > 1:
        return f"both cameras of the pair; --topic {images[0].name} plays one of them"
    return f"not {', '.join(others)}: choose with --topic" if others else "the only image topic"


def _image_topics(bag: Bag, names: str | None) -> list[Topic]:
    if names:
        images = [bag.choose_image_topic(name.strip())[0] for name in names.split(",")]
    else:
        first = bag.choose_image_topic()[0]
        images = [first]
        for left, right in _pairs(first.name):
            both = [topic for topic in bag.image_topics if topic.name in (left, right) and topic.type == first.type]
            images = sorted(both, key=lambda topic: topic.name != left) if len(both) == 2 else images
    if len({image.compressed for image in images}) > 1 or len({image.name for image in images}) < len(images):
        raise ConfigError(
            "expected different image topics, all raw or all compressed, found "
            + ", ".join(f"{image.name} [{image.type}]" for image in images)
        )
    return images


def _pairs(name: str) -> Iterator[tuple[str, str]]:
    """What the two topics of a stereo pair would be called of which this is one: (left, right)."""
    for left, right in SIDES:
        for this, other in ((left, right), (right, left)):
            partner = re.sub(rf"(?<![A-Za-z0-9]){this}(?![A-Za-z0-9])", other, name)
            if partner != name:
                yield (name, partner) if this == left else (partner, name)


def _camera_names(images: Sequence[Topic], given: Mapping[str, Any], parameters: NodeParameters) -> tuple[str, ...]:
    if "cameras" in given:
        if len(parameters.cameras) != len(images):
            raise ConfigError(
                f"expected an image topic for each of the cameras {', '.join(parameters.cameras)}, found "
                f"{', '.join(image.name for image in images)}: name them with --topic A,B, or change 'cameras'"
            )
        return parameters.cameras
    if len(images) == 1:
        return parameters.cameras[:1]
    if _is_pair(images):
        return "left", "right"
    return tuple(f"camera{i}" for i in range(len(images)))


def _is_pair(images: Sequence[Topic]) -> bool:
    return len(images) == 2 and (images[0].name, images[1].name) in _pairs(images[0].name)


def _named(bag: Bag, name: str, types: Sequence[str]) -> Topic:
    found = [topic for topic in bag.topics if topic.name == name and topic.type in types]
    if not found:
        listing = ", ".join(f"{topic.name} [{topic.type}]" for topic in bag.topics)
        raise ConfigError(f"expected a topic {name} of {', '.join(types)} in {bag.path}, found {listing}")
    return found[0]


def _played_name(image: Topic, options: LiveOptions) -> str:
    """A node appends /compressed to the name of its image, and so it must end with that."""
    name = options.play_as.get(image.name, image.name)
    return name.removesuffix("/compressed") + "/compressed" if image.compressed else name


def _remaps(
    names: Sequence[str],
    images: Sequence[Topic],
    infos: Sequence[Topic | None],
    masks: Sequence[Topic],
    imu: Topic | None,
    options: LiveOptions,
) -> Iterator[str]:
    if masks and len(masks) != len(names):
        raise ConfigError(f"expected one mask topic for each of {len(names)} cameras, found {len(masks)}: --mask A,B")
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
        below = f"{name}/" if len(names) > 1 else ""
        played = _played_name(image, options).removesuffix("/compressed" if image.compressed else "")
        info = infos[i]
        beside = played.rpartition("/")[0] + "/camera_info" if info is None else info.name
        yield f"{below}image:={played}"
        yield f"{below}camera_info:={options.play_as.get(beside, beside)}"
        if masks:
            yield f"{below}mask:={options.play_as.get(masks[i].name, masks[i].name)}"
    if imu is not None:
        yield f"imu:={options.play_as.get(imu.name, imu.name)}"


def _parameters(
    options: LiveOptions, given: Mapping[str, Any], names: Sequence[str], images: Sequence[Topic], calibrated: bool
) -> dict[str, Any]:
    """All that is set beside the file, as ROS takes it. Raises ConfigError where the node would refuse it."""
    own: dict[str, Any] = {"status_rate": STATUS_RATE} | dict(options.settings)
    own |= {"cameras": list(names), "image_transport": "compressed" if images[0].compressed else "raw"}
    if "stereo" not in given and calibrated and _is_pair(images):
        own["stereo"] = [":".join(names)]
    if options.imu:
        own["use_imu"] = True
    checked = load_parameters({**given, **own})
    values = {row.name: row.to_ros(getattr(checked, row.name)) for row in rows() if row.name in own}
    return values | {"use_sim_time": options.clock > 0}


def graph_plan(bag: Bag, job: ReplayJob, options: LiveOptions, listener: Listener) -> Plan:
    """For a node that is running: what it subscribes to of what the bag has.

    Raises ScfeatError where there are no images among that.
    """
    taken = listener.subscribed(PLAYABLE)
    cameras_of = {topic: camera for camera, topic in listener.inputs.items()}
    names = {topic: options.play_as.get(topic.name, topic.name) for topic in bag.topics if topic.type in PLAYABLE}
    wanted = [bag.choose_image_topic(name.strip())[0] for name in job.topic.split(",")] if job.topic else []
    unwanted = (CAMERA_INFO,) if job.camera_info == NO_CAMERA_INFO else ()
    heard = [topic for topic, name in names.items() if taken.get(name) == topic.type and topic.type not in unwanted]
    images = wanted or [topic for topic in heard if topic.type in IMAGE_TYPES]
    cameras = [
        PlayedCamera(_camera_of(names[topic], cameras_of), topic.name, names[topic], topic.count) for topic in images
    ]
    if len(cameras) > 1 or (len(cameras_of) == 1 and not wanted):  # of several, some may be masks
        cameras = [camera for camera in cameras if camera.name or wanted]
    if not cameras:
        there = ", ".join(f"{topic.name} [{topic.type}]" for topic in bag.image_topics) or "no images"
        asked = ", ".join(f"{name} [{kind}]" for name, kind in taken.items()) or "nothing: is it active?"
        raise ScfeatError(
            f"expected image topics of {bag.path} that {options.node} subscribes to, found {there} in the bag, while "
            f"the node subscribes to {asked}: rename with --play-as TOPIC=NAME, or remap the node"
        )
    if len(cameras) == 1 and not cameras[0].name:
        only = next((heard.name for heard in listener.heard.values()), "")
        cameras = [PlayedCamera(only, cameras[0].topic, cameras[0].played, cameras[0].count)]
    chosen = {camera.topic for camera in cameras}
    beside = {topic.name: names[topic] for topic in heard if topic.name not in chosen}
    why = "as asked for" if wanted else f"what {options.node} subscribes to; --topic chooses"
    return Plan(tuple(cameras), beside, why=why)


def _camera_of(played: str, cameras_of: Mapping[str, str]) -> str:
    return cameras_of.get(played) or cameras_of.get(played.removesuffix("/compressed"), "")
