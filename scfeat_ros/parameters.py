"""The parameters of the node: one typed table, from which everything else about them is made.

The table is a dataclass; type, limits, choices and whether a parameter may change while the node runs are in its
annotations, and the last one is the documentation. ``declare`` gives the node its parameters with descriptors,
``watch`` checks and hands over what is set while it runs, ``parameters_yaml`` writes config/frontend.yaml, and
``parameters_markdown`` writes the table of the README.

rcl cannot tell the type of an empty list in YAML, and rclpy takes one in Python for bytes. So on the side of ROS an
empty list of names is [''], and an empty list of numbers [0]; here both are ().
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import yaml

from scfeat_core.config import Range, check_config, load_config, read_mapping, type_hints
from scfeat_core.errors import ConfigError, ScfeatError

# What rclpy and launch put among the parameters of a node besides its own.
_FOREIGN = ("use_sim_time", "start_type_description_service")
_FOREIGN_PREFIX = "qos_overrides."
_CAMERA_NAME = re.compile(r"(?!.*__)[A-Za-z][A-Za-z0-9_]*")  # becomes a part of topic names
_ROTATION_TOLERANCE = 1e-3  # of the products of axes: what four digits after the point leave

GROUPS = {
    "weights": "Network",
    "max_keypoints": "Points",
    "min_cosine": "Matches and tracks",
    "cameras": "Cameras",
    "mask_files": "Masks",
    "descriptor_type": "Output",
    "autostart": "Node",
}
"""The titles of the table, by the parameter that each begins with."""


class _Dynamic:
    """The mark of a parameter that may change while the node runs; all others are read-only."""


DYNAMIC = _Dynamic()


@dataclass(frozen=True)
class NodeParameters:
    """All parameters of the node.

    Those marked DYNAMIC may change between two frames, and then come as a new object; the others are read when the node
    is constructed. Raises ConfigError where a value is wrong by itself or does not fit to another.
    """

    weights: Annotated[
        str,
        "network weights: a shipped variant ('lite'), or the path of a .safetensors file; "
        "'random' runs an untrained network, for tests of the plumbing only",
    ] = "lite"
    device: Annotated[
        str, "where the network runs: 'cpu', 'cuda', 'cuda:<number>', or 'auto': CUDA where it is present"
    ] = "cpu"
    precision: Annotated[
        Literal["float32", "bfloat16", "float16", "auto"],
        "arithmetic of the network; 'auto' takes the fastest one that is safe on the device",
    ] = "float32"
    engine: Annotated[
        Literal["eager", "cuda_graph", "compile", "onnx", "openvino", "tensorrt", "auto"],
        "what runs the network: 'eager' is torch as it is; the others are compared with it when the first image of a "
        "size comes, and replaced by it where they deviate (the status says so); 'auto' measures which is the fastest",
    ] = "eager"

    max_keypoints: Annotated[
        int, Range(minimum=1, maximum=65536), DYNAMIC, "keep at most this many keypoints of an image, the best ones"
    ] = 1024
    budgets: Annotated[
        tuple[Annotated[int, Range(minimum=0, maximum=65536)], ...],
        DYNAMIC,
        "max_keypoints of each camera, in the order of cameras; 0: that of all",
    ] = ()
    score_threshold: Annotated[float, Range(minimum=0.0), DYNAMIC, "drop keypoints with a lower detector score"] = 0.0
    nms_radius: Annotated[
        int, Range(minimum=0, maximum=64), DYNAMIC, "pixels: no two keypoints within this distance in x and y"
    ] = 2
    border: Annotated[
        int, Range(minimum=0, maximum=1024), DYNAMIC, "pixels: no keypoints this close to the edge of the image"
    ] = 4
    grid: Annotated[
        int,
        Range(minimum=0, maximum=64),
        DYNAMIC,
        "cells per axis that each get an equal share of the keypoints first, so that they cover the image; 0: off",
    ] = 0
    clahe: Annotated[
        float,
        Range(minimum=0.0, maximum=100.0),
        DYNAMIC,
        "clip limit of the adaptive histogram equalisation before the network; 0: off",
    ] = 0.0
    levels: Annotated[
        int,
        Range(minimum=1, maximum=8),
        DYNAMIC,
        "levels of an image pyramid, each 0.7 times the size of the one before, whose best keypoints are taken "
        "together; 3 take 1.75 times as long, for views from very different distances",
    ] = 1

    min_cosine: Annotated[
        float,
        Range(minimum=-1.0, maximum=1.0),
        DYNAMIC,
        "drop matches whose descriptors have a lower cosine similarity",
    ] = 0.0
    verify: Annotated[bool, DYNAMIC, "verify matches with a two-view geometry and mark the inliers"] = True
    geometry: Annotated[
        Literal["auto", "fundamental", "essential", "homography"],
        DYNAMIC,
        "model of the two views; 'auto': essential with a calibration, fundamental without, homography where the scene "
        "is planar or the camera only turns",
    ] = "auto"
    verification_threshold: Annotated[
        float, Range(above=0.0, maximum=100.0), DYNAMIC, "pixels: how far from the two-view geometry an inlier may be"
    ] = 1.0
    search_radius: Annotated[
        float,
        Range(minimum=0.0, maximum=65536.0),
        DYNAMIC,
        "pixels around the predicted position in which a track is searched; 0: the whole image, or with use_imu a "
        "tenth of its longer side",
    ] = 0.0
    max_track_gap: Annotated[
        int, Range(minimum=0, maximum=1000), DYNAMIC, "frames for which a lost track waits to be recognised again"
    ] = 10
    reidentify_cosine: Annotated[
        float,
        Range(minimum=-1.0, maximum=1.0),
        DYNAMIC,
        "least cosine similarity of descriptors at which a lost track is recognised again",
    ] = 0.8

    cameras: Annotated[
        tuple[str, ...],
        "names of the cameras; one: its topics are image, camera_info, mask, ~/features and so on; several: they are "
        "<name>/image, <name>/camera_info, <name>/mask, ~/<name>/features and so on",
    ] = ("camera",)
    stereo: Annotated[
        tuple[str, ...], "stereo pairs among the cameras, each as 'left:right'; their images are matched, too"
    ] = ()
    stereo_gate: Annotated[
        float,
        Range(above=0.0, maximum=100.0),
        DYNAMIC,
        "pixels: how far from the epipolar line of the calibration a stereo match may be",
    ] = 2.0
    sync_tolerance: Annotated[
        float, Range(minimum=0.0, maximum=1.0), "seconds: images of a stereo pair are at most this far apart"
    ] = 0.005
    rectified: Annotated[bool, "the images are rectified: CameraInfo.P describes them, not K and D"] = False
    image_transport: Annotated[
        Literal["raw", "compressed"], "raw: sensor_msgs/Image on 'image'; compressed: JPEG or PNG on 'image'/compressed"
    ] = "raw"
    use_imu: Annotated[bool, "predict the turn of the camera with the gyroscope of sensor_msgs/Imu on 'imu'"] = False
    imu_rotation: Annotated[
        tuple[Annotated[float, Range(minimum=-1.0, maximum=1.0)], ...],
        "rotation from the frame of the imu to that of the camera, row by row: 9 numbers, or 9 for each camera",
    ] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    mask_files: Annotated[
        tuple[str, ...],
        "image files, one for each camera, black where no keypoints are wanted; '': none for that camera",
    ] = ()
    mask_policy: Annotated[
        Literal["exact", "nearest", "hold"],
        DYNAMIC,
        "which mask of the topic an image gets: that of the same stamp, that of the nearest stamp, or the last one",
    ] = "hold"
    mask_tolerance: Annotated[
        float, Range(minimum=0.0, maximum=60.0), DYNAMIC, "seconds: how far the nearest mask may be from the image"
    ] = 0.05
    mask_patience: Annotated[
        float,
        Range(minimum=0.0, maximum=60.0),
        DYNAMIC,
        "seconds: how long an image waits for its mask (exact, nearest) before it is dropped",
    ] = 0.5

    descriptor_type: Annotated[
        Literal["float32", "float16", "int8", "none"],
        DYNAMIC,
        "descriptors in ~/features; float16 keeps 1024 points under 512 KB, the limit of many DDS defaults",
    ] = "float16"
    status_rate: Annotated[
        float, Range(minimum=0.01, maximum=100.0), DYNAMIC, "Hz: how often ~/status is published"
    ] = 2.0
    debug_rate: Annotated[
        float,
        Range(minimum=0.0, maximum=100.0),
        DYNAMIC,
        "Hz: how often ~/debug_image and ~/annotations are published at most; 0: off",
    ] = 5.0
    debug_layers: Annotated[
        tuple[Literal["matches", "tracks", "mask", "scores"], ...], DYNAMIC, "what ~/debug_image shows"
    ] = ("tracks", "mask")

    autostart: Annotated[bool, "configure and activate at the start; false: a lifecycle manager does it"] = True

    def __post_init__(self) -> None:
        check_config(self, "parameters")
        _check_cameras(self)
        _check_stereo(self)
        for name in ("budgets", "mask_files"):
            _check_one_per_camera(self, name)
        _check_rotations(self)

    @property
    def stereo_pairs(self) -> tuple[tuple[str, str], ...]:
        """(left, right) of each stereo pair."""
        return tuple((left, right) for left, _, right in (pair.partition(":") for pair in self.stereo))

    @property
    def camera_budgets(self) -> dict[str, int]:
        """Camera to its number of keypoints, of those that have one of their own."""
        budgets = zip(self.cameras, self.budgets, strict=False)
        return {camera: budget for camera, budget in budgets if budget}

    @property
    def camera_masks(self) -> dict[str, str]:
        """Camera to the path of its mask, of those that have one."""
        return {camera: path for camera, path in zip(self.cameras, self.mask_files, strict=False) if path}

    @property
    def imu_rotations(self) -> dict[str, np.ndarray]:
        """Camera to the (3, 3) float64 rotation that takes vectors from the frame of the imu to that of the camera."""
        rotations = np.array(self.imu_rotation).reshape(-1, 3, 3)
        return dict(zip(self.cameras, np.broadcast_to(rotations, (len(self.cameras), 3, 3)), strict=True))

    def frontend_config(self) -> Any:
        """The part that scfeat_core.frontend.FrontendConfig knows, as one."""
        from scfeat_core.frontend import FrontendConfig  # imports torch: seconds that a wrong parameter need not cost

        values = vars(self) | {"budgets": self.camera_budgets}
        return FrontendConfig(**{field.name: values[field.name] for field in dataclasses.fields(FrontendConfig)})


def _check_cameras(values: NodeParameters) -> None:
    names = values.cameras
    for name in names:
        if not _CAMERA_NAME.fullmatch(name):
            raise ConfigError(
                "parameters: cameras: expected names that can be part of a topic (letters, digits and single "
                f"underscores, a letter first), found {name!r}"
            )
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"parameters: cameras: expected at least one name, and none twice, found {list(names)}")


def _check_stereo(values: NodeParameters) -> None:
    seen: set[frozenset[str]] = set()
    for text, (left, right) in zip(values.stereo, values.stereo_pairs, strict=True):
        pair = frozenset((left, right))
        if not pair <= set(values.cameras) or len(pair) < 2 or pair in seen:
            raise ConfigError(
                "parameters: stereo: expected 'left:right', two different cameras out of "
                f"{list(values.cameras)}, each pair once, found {text!r}"
            )
        seen.add(pair)


def _check_one_per_camera(values: NodeParameters, name: str) -> None:
    given, wanted = len(getattr(values, name)), len(values.cameras)
    if given not in (0, wanted):
        raise ConfigError(
            f"parameters: {name}: expected none, or one for each of the {wanted} cameras {list(values.cameras)}, "
            f"found {given}"
        )


def _check_rotations(values: NodeParameters) -> None:
    numbers, cameras = len(values.imu_rotation), len(values.cameras)
    if numbers not in (9, 9 * cameras):
        raise ConfigError(
            f"parameters: imu_rotation: expected 9 numbers, or 9 for each of the {cameras} cameras, found {numbers}"
        )
    matrices = np.array(values.imu_rotation).reshape(-1, 3, 3)
    products = matrices @ matrices.swapaxes(-1, -2)
    if np.abs(products - np.eye(3)).max() > _ROTATION_TOLERANCE or (np.linalg.det(matrices) < 0).any():
        raise ConfigError(
            "parameters: imu_rotation: expected a rotation (rows of length 1, at right angles, determinant 1), found "
            f"{list(values.imu_rotation)}; give more digits, or mend a swapped sign"
        )


@dataclass(frozen=True)
class Row:
    """One line of the table. type: of the value, or of its items where it is a list (many).

    limits: None without any; choices: empty without any; both hold for each item of a list.
    """

    name: str
    group: str
    type: type
    many: bool
    default: Any
    doc: str
    limits: Range | None
    choices: tuple[Any, ...]
    dynamic: bool

    @property
    def accepts(self) -> str:
        """The limits or the choices in words; empty without any."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        return f"{'each ' if self.many else ''}{self.limits}" if self.limits else ""

    @property
    def type_name(self) -> str:
        """As ROS tools call it."""
        return {bool: "bool", int: "int", float: "double", str: "string"}[self.type] + ("[]" if self.many else "")

    def from_ros(self, value: Any) -> Any:
        """A value as rclpy gives it, as one of the table."""
        if not self.many or isinstance(value, (str, bytes)):
            return value
        try:
            items = list(value or ())  # None is the empty list of a YAML file
        except TypeError:
            return value
        nothing = self.type is not float and all(type(item) is self.type and not item for item in items)
        return () if nothing else tuple(items)

    def to_ros(self, value: Any) -> Any:
        """A value of the table, as one whose type rclpy can tell."""
        return (list(value) or [self.type()]) if self.many else value


def rows() -> Iterator[Row]:
    """The table, in its order."""
    hints = type_hints(NodeParameters)
    group = ""
    for field in dataclasses.fields(NodeParameters):
        group = GROUPS.get(field.name, group)
        yield _row(field, group, hints[field.name])


def _row(field: Any, group: str, annotation: Any) -> Row:
    hint, *extras = get_args(annotation)
    many = get_origin(hint) is tuple
    item = get_args(hint)[0] if many else hint
    kind, *item_extras = get_args(item) if get_origin(item) is Annotated else (item,)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    limits = next((extra for extra in (*extras, *item_extras) if isinstance(extra, Range)), None)
    kind = type(choices[0]) if choices else kind
    return Row(field.name, group, kind, many, field.default, extras[-1], limits, choices, DYNAMIC in extras)


def load_parameters(overrides: Mapping[str, Any], where: str = "parameters") -> NodeParameters:
    """Check overrides by name, type, range, and one against the other.

    Raises ConfigError that names the nearest valid parameter where a name is unknown.
    """
    own = {name: value for name, value in overrides.items() if not _is_foreign(name)}
    table = {row.name: row for row in rows()}
    values = {name: table[name].from_ros(value) if name in table else value for name, value in own.items()}
    return load_config(NodeParameters, values, where)


def read_parameters(path: str | Path, node: str = "scfeat") -> dict[str, Any]:
    """What a ROS parameter file sets for the node of this name, as rcl reads it, for :func:`load_parameters`.

    Sections count whose name is that of the node, in any namespace, or a wildcard; later ones win. Raises ConfigError
    where the file has another layout, or nothing for the node.
    """
    sections = _sections(read_mapping(path))
    if not sections:
        raise ConfigError(
            f"{path}: expected a parameter file of ROS ('/**:', below it 'ros__parameters:', below that the "
            "parameters), found no ros__parameters: start from config/frontend.yaml"
        )
    meant = [values for name, values in sections if name.rpartition("/")[2] in (node, "*", "**")]
    if not meant:
        names = ", ".join(name for name, _ in sections)
        raise ConfigError(f"{path}: expected parameters of the node '{node}' or of all ('/**'), found those of {names}")
    found: dict[str, Any] = {}
    for values in meant:
        found.update(_flat(values, path))
    return found


def _sections(mapping: Mapping[Any, Any], name: str = "") -> list[tuple[str, Any]]:
    """(full name of a node, its ros__parameters); names may be nested: namespace, below it the node."""
    found = []
    for key, value in mapping.items():
        if key == "ros__parameters":
            found.append((name, value))
        elif isinstance(value, Mapping):
            found += _sections(value, f"{name}/{str(key).strip('/')}")
    return found


def _flat(values: Any, path: str | Path, prefix: str = "") -> dict[str, Any]:
    """Nested parameters have dots in their names."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected parameters below ros__parameters, found {values!r}")
    found = {}
    for key, value in values.items():
        found.update(_flat(value, path, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found


def declare(node: Any) -> NodeParameters:
    """Declare all parameters on an rclpy node, with descriptors, and return their values. Raises ConfigError."""
    # rclpy has no public way to see the overrides that nobody declared.
    overrides = {name: parameter.value for name, parameter in node._parameter_overrides.items()}
    values = load_parameters(overrides, _where(node))
    for row in rows():
        # The override is in the value already: checked, and with 1 accepted where 1.0 is meant.
        value = row.to_ros(getattr(values, row.name))
        node.declare_parameter(row.name, value, descriptor(row), ignore_override=True)
    return values


def watch(node: Any, changed: Callable[[NodeParameters], None]) -> None:
    """From now on, check what is set on a node that has declared its parameters, and hand over the new values.

    All that is set in one request is checked together, and either all of it holds or nothing does. What is wrong is
    refused with a reason. changed: called by the executor's thread, before the request is answered; a ScfeatError from
    it refuses the request as well.

    rclpy refuses read-only parameters by itself. Unknown names it refuses too, but does not name them; construct the
    node with ``allow_undeclared_parameters=True``, and they come here, and are refused by name.
    """
    from rcl_interfaces.msg import SetParametersResult

    def on_set(parameters: list[Any]) -> Any:
        new = {parameter.name: parameter.value for parameter in parameters}
        if all(map(_is_foreign, new)):
            return SetParametersResult(successful=True)
        present = {row.name: node.get_parameter(row.name).value for row in rows()}
        try:
            _refuse_deletion(new, _where(node))
            changed(load_parameters(present | new, _where(node)))
        except ScfeatError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    node.add_on_set_parameters_callback(on_set)


def _is_foreign(name: str) -> bool:
    return name in _FOREIGN or name.startswith(_FOREIGN_PREFIX)


def _refuse_deletion(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if value is None:
            raise ConfigError(f"{where}: {name}: expected a value, found none: parameters cannot be deleted")


def unused_overrides(node: Any) -> list[str]:
    """Overrides of the QoS of topics that the node does not have; rclpy ignores them in silence."""
    return [name for name in node._parameter_overrides if name.startswith("qos_") and not node.has_parameter(name)]


def descriptor(row: Row) -> Any:
    """rcl_interfaces/ParameterDescriptor of one line of the table. ROS has no ranges for lists: these are in words.

    The types of dynamic ones are left to ``watch``: rclpy would refuse 5 for 5.0, give types by number ("expected '3'
    got '2'") and not say whose they are.
    """
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

    result = ParameterDescriptor(name=row.name, description=row.doc)
    result.read_only, result.dynamic_typing = not row.dynamic, row.dynamic
    result.additional_constraints = f"{'each ' if row.many else ''}one of {row.accepts}" if row.choices else row.accepts
    if row.limits is None or row.many:
        return result
    if row.type is int:
        result.integer_range = [
            IntegerRange(from_value=_lowest(row.limits, -(2**63)), to_value=_highest(row.limits, 2**63 - 1))
        ]
    else:
        result.floating_point_range = [
            FloatingPointRange(from_value=_lowest(row.limits, -_LARGEST), to_value=_highest(row.limits, _LARGEST))
        ]
    return result


def parameters_yaml() -> str:
    """The text of config/frontend.yaml: every parameter with its default, its limits and what it does."""
    lines = [
        "# All parameters of the scfeat front end with their defaults.",
        "# Copy the file, keep the lines that you change, and pass it on as params_file:=... of frontend.launch.py.",
        "# 'dynamic': may change while the node runs (ros2 param set /scfeat grid 4); the others are read",
        "# when it starts. A list cannot be empty in such a file: [''] and [0] stand for empty ones.",
        "/**:",
        "  ros__parameters:",
    ]
    group = ""
    for row in rows():
        if row.group != group:
            group = row.group
            lines += ["", f"    # -- {group} ".ljust(112, "-")]
        lines += _yaml_lines(row)
    return "\n".join(lines) + "\n"


def _yaml_lines(row: Row) -> list[str]:
    notes = "; ".join(filter(None, [row.accepts, "dynamic" if row.dynamic else ""]))
    comment = row.doc + (f" ({notes})" if notes else "")
    wrapped = textwrap.wrap(comment, 112, initial_indent="    # ", subsequent_indent="    # ")
    return [*wrapped, f"    {row.name}: {_yaml(row.to_ros(row.default))}"]


def parameters_markdown() -> str:
    """The table of parameters in the README."""
    lines = ["| Parameter | Type | Default | Accepts | Dynamic | Meaning |", "|---|---|---|---|---|---|"]
    group = ""
    for row in rows():
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** | | | | | |")
        default, dynamic = _yaml(row.to_ros(row.default)), "yes" if row.dynamic else ""
        doc = row.doc.replace("<", "&lt;")  # <name> would be taken for a tag, and vanish
        lines.append(f"| `{row.name}` | {row.type_name} | `{default}` | {row.accepts} | {dynamic} | {doc} |")
    return "\n".join(lines) + "\n"


_LARGEST = 1.7976931348623157e308


def _where(node: Any) -> str:
    return f"parameters of {node.get_fully_qualified_name()}"


def _lowest(limits: Range, otherwise: Any) -> Any:
    """The inclusive lower end; an open one cannot be said in a descriptor, its constraint text says it."""
    return next((value for value in (limits.minimum, limits.above) if value is not None), otherwise)


def _highest(limits: Range, otherwise: Any) -> Any:
    return next((value for value in (limits.maximum, limits.below) if value is not None), otherwise)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=200).removesuffix("...\n").strip()
