"""What ``scfeat doctor`` finds out in child processes: imports that may crash, devices and middleware that may hang.

A probe is a generator of facts, (name, value) pairs that JSON can say. Each is sent as soon as it is known, so that the
facts before a crash are not lost, and the last one tells where it was. Probes judge nothing: doctor.py does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

Fact = tuple[str, Any]

_ROOT = Path(__file__).resolve().parent.parent
_IMAGES = {"sensor_msgs/msg/Image": "Image", "sensor_msgs/msg/CompressedImage": "CompressedImage"}
_NODE_SECTIONS = re.compile(r"/\*\*|(?:/\*\*?)?/?scfeat")  # of a parameter file, those that the node reads


@dataclass(frozen=True)
class Facts:
    """What a probe found. failure: why it ended early; empty where it did not. missing: a module that is not there."""

    values: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""
    missing: str = ""

    def get(self, name: str, otherwise: Any = None) -> Any:
        return self.values.get(name, otherwise)


def run_probe(name: str, *arguments: str, timeout: float) -> Facts:
    """Run a probe in a process of its own, for at most ``timeout`` seconds."""
    code = f"import sys; sys.path[0] = {str(_ROOT)!r}; from scfeat_ros.probes import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, name, *arguments]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        output, errors = _kill(child), b""
        return _facts(output, errors, f"no answer within {timeout:g} s")
    return _facts(output, errors, _death(child.returncode))


def main(arguments: list[str]) -> None:
    """Run the probe that is named first with the other arguments, and write its facts, one JSON object a line."""
    name, *rest = arguments
    try:
        for key, value in PROBES[name](*rest):
            _send(key, value)
    except ModuleNotFoundError as error:
        _send("missing", error.name or str(error))
    except Exception as error:  # whatever it is: the doctor reports it
        _send("failure", f"{type(error).__name__}: {error}")


def probe_torch(device: str) -> Iterator[Fact]:
    """The build of torch, that it shares memory with numpy, and that the device computes."""
    import numpy as np

    yield "numpy", np.__version__
    import torch

    yield "torch", torch.__version__
    yield "cuda_build", torch.version.cuda or ""
    try:
        yield "sum", float(torch.from_numpy(np.arange(4, dtype=np.float32)).add_(1).numpy().sum())
    except (RuntimeError, TypeError) as error:  # what torch says to a numpy that it was not built for
        yield "numpy_error", str(error)
    yield "cuda_available", torch.cuda.is_available()
    from scfeat_core.errors import DeviceError
    from scfeat_core.extraction import resolve_device

    try:
        chosen = resolve_device(device)
    except DeviceError as error:
        yield "device_error", str(error)
        return
    yield "device", str(chosen)
    if chosen.type == "cuda":
        yield "device_name", torch.cuda.get_device_name(chosen)
        yield "device_memory", torch.cuda.mem_get_info(chosen)
    image = torch.ones(1, 1, 8, 8, device=chosen)
    yield "convolution", float(torch.nn.functional.conv2d(image, torch.ones(1, 1, 3, 3, device=chosen)).sum())


def probe_opencv() -> Iterator[Fact]:
    """That OpenCV takes arrays of this numpy."""
    import cv2
    import numpy as np

    yield "version", cv2.__version__
    yield "converted", int(cv2.cvtColor(np.full((4, 4, 3), 9, np.uint8), cv2.COLOR_RGB2GRAY).sum())


def probe_cv_bridge() -> Iterator[Fact]:
    """That cv_bridge, where it is installed, converts an image with this numpy and does not crash."""
    import numpy as np
    from cv_bridge import CvBridge

    yield "imported", True
    message = CvBridge().cv2_to_imgmsg(np.full((4, 4, 3), 9, np.uint8), "bgr8")
    yield "converted", int(CvBridge().imgmsg_to_cv2(message, "mono8").sum())


def probe_weights(weights: str) -> Iterator[Fact]:
    """That the weights are whole, and what their card says."""
    if weights == "random":
        yield "random", True
        return
    from scfeat_core.errors import WeightsError
    from scfeat_core.network.weights import WEIGHTS_FOLDER, load_model

    try:
        model = load_model(weights)
    except WeightsError as error:
        yield "weights_error", str(error)
        return
    yield "space", model.descriptor_space
    yield "parameters", sum(parameter.numel() for parameter in model.parameters())
    card = WEIGHTS_FOLDER / f"{weights}.md"
    licence = re.search(r"licence of the weights\W+([\w.-]+)", card.read_text()) if card.is_file() else None
    yield "licence", licence.group(1) if licence else ""


def probe_parameters(path: str) -> Iterator[Fact]:
    """That the node would take this parameter file."""
    import yaml

    from scfeat_core.errors import ScfeatError
    from scfeat_ros.parameters import load_parameters

    try:
        values = load_parameters(node_parameters(yaml.safe_load(Path(path).read_text())), path)
    except (ScfeatError, OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        yield "parameters_error", str(error)
        return
    yield "weights", values.weights
    yield "device", values.device


def node_parameters(content: Any) -> dict[str, Any]:
    """The parameters that a ROS 2 parameter file has for the node, nested ones with dots; ConfigError without any."""
    from scfeat_core.errors import ConfigError

    sections = content if isinstance(content, dict) else {}
    found = {name: section for name, section in sections.items() if _NODE_SECTIONS.fullmatch(str(name))}
    bodies = [section.get("ros__parameters") if isinstance(section, dict) else None for section in found.values()]
    if not bodies or not all(isinstance(body, dict) for body in bodies):
        names = ", ".join(map(str, sections)) or "none"
        raise ConfigError(
            f"expected a section '/**' or 'scfeat' with ros__parameters below it, found sections: {names}; "
            "see config/frontend.yaml"
        )
    return {key: value for body in bodies for key, value in _flat(body or {})}


def probe_ros() -> Iterator[Fact]:
    """rclpy, the middleware that it loads, and the messages of this package."""
    import rclpy
    from rclpy.utilities import get_rmw_implementation_identifier

    from scfeat_ros.fastdds import version_of

    yield "rclpy", version_of("ros-rclpy") or version_of("rclpy") or "installed"
    yield "rmw", get_rmw_implementation_identifier()
    context = rclpy.Context()
    rclpy.init(context=context)
    yield "initialised", True
    context.try_shutdown()
    try:
        messages = import_module("scfeat.msg")
    except ImportError as error:
        yield "messages_error", str(error)
        return
    yield "differences", message_differences(messages, _ROOT / "msg")


def message_differences(messages: Any, folder: Path) -> list[str]:
    """Where message classes differ from the .msg files in a folder, which only a source tree has."""
    differences = []
    for path in sorted(folder.glob("*.msg")):
        kind = getattr(messages, path.stem, None)
        if kind is None:
            differences.append(f"{path.stem} is not built")
            continue
        wanted, built = _fields(path), set(kind.get_fields_and_field_types())
        differences += [f"{path.stem}.{name} is not built" for name in sorted(wanted - built)]
        differences += [f"{path.stem}.{name} is built and no longer there" for name in sorted(built - wanted)]
    return differences


def probe_image(topic: str, patience: str) -> Iterator[Fact]:
    """Who publishes on an image topic, and what a message of it looks like; each is waited for ``patience`` seconds."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    from scfeat_ros.fastdds import use_profile

    use_profile()
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("scfeat_doctor", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        yield from _look_at(node, executor, node.resolve_topic_name(topic), float(patience))
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()


def _look_at(node: Any, executor: Any, topic: str, patience: float) -> Iterator[Fact]:
    yield "topic", topic
    _spin(executor, lambda: _named(node.get_publishers_info_by_topic(topic)), patience)
    publishers = node.get_publishers_info_by_topic(topic)
    yield (
        "publishers",
        [
            {
                "node": f"{info.node_namespace.rstrip('/')}/{info.node_name}",
                "type": info.topic_type,
                "reliability": info.qos_profile.reliability.name,
                "durability": info.qos_profile.durability.name,
            }
            for info in publishers
        ],
    )
    yield "others", sorted(name for name, kinds in node.get_topic_names_and_types() if _IMAGES.keys() & set(kinds))
    kinds = {info.topic_type for info in publishers} & _IMAGES.keys()
    if len(kinds) == 1:
        yield from _receive(node, executor, topic, _IMAGES[kinds.pop()], patience)


def _named(publishers: Sequence[Any]) -> bool:
    """Whether there are some, and all their nodes are known: a node is discovered after its endpoints."""
    return bool(publishers) and not any("UNKNOWN" in info.node_name for info in publishers)


def _receive(node: Any, executor: Any, topic: str, kind: str, patience: float) -> Iterator[Fact]:
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import CameraInfo

    qos = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)  # hears reliable publishers, too, as the node
    images: list[Any] = []
    infos: list[Any] = []
    base = topic.removesuffix("/compressed") if kind == "CompressedImage" else topic
    camera_info = f"{base.rpartition('/')[0]}/camera_info"
    node.create_subscription(getattr(import_module("sensor_msgs.msg"), kind), topic, images.append, qos)
    node.create_subscription(CameraInfo, camera_info, infos.append, qos)
    start = time.monotonic()
    _spin(executor, lambda: images and infos, patience)
    yield "received", len(images)
    yield "seconds", time.monotonic() - start
    if images:
        yield from _describe(node, images[-1], kind)
        yield "camera_info_topic", camera_info
        yield "camera_info", len(infos)
        if infos:
            yield from _calibration(infos[-1], images[-1], kind)


def _describe(node: Any, message: Any, kind: str) -> Iterator[Fact]:
    from scfeat_core.errors import ImageError
    from scfeat_ros.images import compressed_to_array, image_to_array

    stamp = message.header.stamp
    yield "stamp", stamp.sec + 1e-9 * stamp.nanosec
    yield "now", 1e-9 * node.get_clock().now().nanoseconds
    yield "frame_id", message.header.frame_id
    yield "bytes", len(message.data)
    yield "encoding", message.encoding if kind == "Image" else message.format
    try:
        pixels = image_to_array(message) if kind == "Image" else compressed_to_array(message)
        yield "size", [pixels.shape[1], pixels.shape[0]]
    except ImageError as error:
        yield "image_error", str(error)


def _calibration(info: Any, image: Any, kind: str) -> Iterator[Fact]:
    from scfeat_core.errors import CalibrationError
    from scfeat_ros.calibration import camera_from_message

    size = (image.width, image.height) if kind == "Image" else (info.width, info.height)
    try:
        camera = camera_from_message(info, size)
        yield "calibration", f"{camera.distortion_model or 'no distortion'}, f = {camera.K[0, 0]:.0f} px"
    except CalibrationError as error:
        yield "calibration_error", str(error)


PROBES: dict[str, Callable[..., Iterator[Fact]]] = {
    "torch": probe_torch,
    "opencv": probe_opencv,
    "cv_bridge": probe_cv_bridge,
    "weights": probe_weights,
    "parameters": probe_parameters,
    "ros": probe_ros,
    "image": probe_image,
}


def _spin(executor: Any, condition: Callable[[], Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        executor.spin_once(timeout_sec=0.05)


def _send(name: str, value: Any) -> None:
    sys.stdout.write("\n" + json.dumps({name: value}) + "\n")  # a line of its own, whatever a library wrote before
    sys.stdout.flush()


def _facts(output: bytes, errors: bytes, death: str) -> Facts:
    values: dict[str, Any] = {}
    for line in output.decode(errors="replace").splitlines():
        try:
            values.update(json.loads(line) if line.startswith("{") else {})
        except json.JSONDecodeError:  # something that a library printed
            continue
    missing, failure = values.pop("missing", ""), values.pop("failure", "")
    if death and not failure:
        said = errors.decode(errors="replace").strip().splitlines()
        failure = f"{death}{f' after {list(values)[-1]}' if values else ''}{f': {said[-1]}' if said else ''}"
    return Facts(values, failure, missing)


def _death(code: int) -> str:
    """How a process ended, in words; empty where it ended well."""
    if code == 0:
        return ""
    return f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _kill(child: subprocess.Popen[bytes]) -> bytes:
    """What it has written. A process that waits for a driver cannot be killed; it is left behind."""
    child.kill()
    try:
        return child.communicate(timeout=2)[0]
    except subprocess.TimeoutExpired as error:
        return error.stdout or b""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _fields(path: Path) -> set[str]:
    """The names of the fields of a .msg file, without its constants."""
    lines = (line.partition("#")[0].split() for line in path.read_text().splitlines())
    return {words[1] for words in lines if len(words) >= 2 and "=" not in "".join(words[1:3])}
