"""The parameters of the node: one typed table, from which everything else about them is made.

The table is a dataclass; type, limits and choices are in its annotations, and the last one is the documentation.
``declare`` gives the node its parameters with descriptors, ``parameters_yaml`` writes config/frontend.yaml, and
``parameters_markdown`` writes the table of the README.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

from scfeat_core.config import Range, check_config, load_config, type_hints

# What rclpy and launch put among the overrides of a node besides its own parameters.
_FOREIGN = ("use_sim_time", "qos_overrides.", "start_type_description_service")


@dataclass(frozen=True)
class NodeParameters:
    """All parameters of the node. They are read when the node is constructed and cannot change while it lives."""

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
    max_keypoints: Annotated[
        int, Range(minimum=1, maximum=65536), "keep at most this many keypoints, the best ones"
    ] = 1024
    score_threshold: Annotated[float, Range(minimum=0.0), "drop keypoints with a lower detector score"] = 0.0
    nms_radius: Annotated[
        int, Range(minimum=0, maximum=64), "pixels: no two keypoints within this distance in x and y"
    ] = 2
    border: Annotated[
        int, Range(minimum=0, maximum=1024), "pixels: no keypoints this close to the edge of the image"
    ] = 4
    min_cosine: Annotated[
        float, Range(minimum=-1.0, maximum=1.0), "drop matches whose descriptors have a lower cosine similarity"
    ] = 0.0
    verify: Annotated[bool, "verify matches with a two-view geometry and mark the inliers"] = True
    verification_threshold: Annotated[
        float, Range(above=0.0, maximum=100.0), "pixels: how far from the two-view geometry an inlier may be"
    ] = 1.0
    camera: Annotated[str, "name of the camera in all messages"] = "camera"
    rectified: Annotated[bool, "the images are rectified: CameraInfo.P describes them, not K and D"] = False
    image_transport: Annotated[
        Literal["raw", "compressed"], "raw: sensor_msgs/Image on 'image'; compressed: JPEG or PNG on 'image'/compressed"
    ] = "raw"
    descriptor_type: Annotated[
        Literal["float32", "float16", "int8", "none"],
        "descriptors in ~/features; float16 keeps 1024 points under 512 KB, the limit of many DDS defaults",
    ] = "float16"
    status_rate: Annotated[float, Range(above=0.0, maximum=100.0), "Hz: how often ~/status is published"] = 2.0
    autostart: Annotated[bool, "configure and activate at the start; false: a lifecycle manager does it"] = True

    def __post_init__(self) -> None:
        check_config(self, "parameters")

    def frontend_config(self) -> Any:
        """The part that scfeat_core.frontend.FrontendConfig knows, as one."""
        from scfeat_core.frontend import FrontendConfig  # imports torch: seconds that a wrong parameter need not cost

        return FrontendConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(FrontendConfig)})


@dataclass(frozen=True)
class Row:
    """One line of the table. limits: None without any; choices: empty without any."""

    name: str
    type: type
    default: Any
    doc: str
    limits: Range | None
    choices: tuple[Any, ...]

    @property
    def accepts(self) -> str:
        """The limits or the choices in words; empty without any."""
        return ", ".join(map(str, self.choices)) if self.choices else str(self.limits or "")


def rows() -> Iterator[Row]:
    """The table, in its order."""
    hints = type_hints(NodeParameters)
    for field in dataclasses.fields(NodeParameters):
        hint, *extras = get_args(hints[field.name])
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        limits = next((extra for extra in extras if isinstance(extra, Range)), None)
        yield Row(field.name, type(field.default), field.default, extras[-1], limits, choices)


def load_parameters(overrides: Mapping[str, Any], where: str = "parameters") -> NodeParameters:
    """Check overrides by name, type and range. Raises ConfigError that names the nearest valid parameter."""
    own = {name: value for name, value in overrides.items() if not name.startswith(_FOREIGN)}
    return load_config(NodeParameters, own, where)


def declare(node: Any) -> NodeParameters:
    """Declare all parameters on an rclpy node, with descriptors, and return their values. Raises ConfigError."""
    # rclpy has no public way to see the overrides that nobody declared.
    overrides = {name: parameter.value for name, parameter in node._parameter_overrides.items()}
    values = load_parameters(overrides, f"parameters of {node.get_fully_qualified_name()}")
    for row in rows():
        # The override is in the value already: checked, and with 1 accepted where 1.0 is meant.
        node.declare_parameter(row.name, getattr(values, row.name), descriptor(row), ignore_override=True)
    return values


def unused_overrides(node: Any) -> list[str]:
    """Overrides of the QoS of topics that the node does not have; rclpy ignores them in silence."""
    return [name for name in node._parameter_overrides if name.startswith("qos_") and not node.has_parameter(name)]


def descriptor(row: Row) -> Any:
    """rcl_interfaces/ParameterDescriptor of one line of the table."""
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

    result = ParameterDescriptor(name=row.name, description=row.doc, read_only=True)
    result.additional_constraints = f"one of {row.accepts}" if row.choices else row.accepts
    if row.limits is not None and row.type is int:
        result.integer_range = [
            IntegerRange(from_value=_lowest(row.limits, -(2**63)), to_value=_highest(row.limits, 2**63 - 1))
        ]
    elif row.limits is not None:
        result.floating_point_range = [
            FloatingPointRange(from_value=_lowest(row.limits, -_LARGEST), to_value=_highest(row.limits, _LARGEST))
        ]
    return result


def parameters_yaml() -> str:
    """The text of config/frontend.yaml: every parameter with its default, its limits and what it does."""
    lines = [
        "# All parameters of the scfeat front end with their defaults. They are read when the node starts.",
        "# Copy the file, keep the lines that you change, and pass it on as params_file:=... of frontend.launch.py.",
        "/**:",
        "  ros__parameters:",
    ]
    for row in rows():
        comment = row.doc + (f" ({row.accepts})" if row.accepts else "")
        lines += textwrap.wrap(comment, 110, initial_indent="    # ", subsequent_indent="    # ")
        lines.append(f"    {row.name}: {_yaml(row.default)}")
    return "\n".join(lines) + "\n"


def parameters_markdown() -> str:
    """The table of parameters in the README."""
    lines = ["| Parameter | Type | Default | Accepts | Meaning |", "|---|---|---|---|---|"]
    for row in rows():
        accepts = row.accepts.replace("|", "\\|")
        lines.append(f"| `{row.name}` | {_TYPE_NAMES[row.type]} | `{_yaml(row.default)}` | {accepts} | {row.doc} |")
    return "\n".join(lines) + "\n"


_LARGEST = 1.7976931348623157e308
_TYPE_NAMES = {bool: "bool", int: "int", float: "double", str: "string"}


def _lowest(limits: Range, otherwise: Any) -> Any:
    """The inclusive lower end; an open one cannot be said in a descriptor, its constraint text says it."""
    return next((value for value in (limits.minimum, limits.above) if value is not None), otherwise)


def _highest(limits: Range, otherwise: Any) -> Any:
    return next((value for value in (limits.maximum, limits.below) if value is not None), otherwise)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value).removesuffix("...\n").strip()
