"""Start the scfeat front end on one camera.

ros2 launch scfeat frontend.launch.py image:=/camera/image_raw

Everything before ``generate_launch_description`` is plain Python, so that it can be tested without launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# The file lies in launch/, beside config/, in the source tree as well as in share/scfeat.
CONFIG = Path(__file__).parent.parent / "config"
NEW_PROFILE, OLD_PROFILE = "FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"
OLD_DISTRIBUTIONS = ("humble", "iron", "jazzy")  # they know the old name only; later ones complain about it
PARAMETERS = ("image_transport", "weights", "device", "autostart", "use_sim_time")  # arguments that are parameters, too


class Argument(NamedTuple):  # launch loads this file in a way that dataclasses do not survive
    """One launch argument; an empty default of a parameter leaves it to params_file."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


ARGUMENTS = (
    Argument("namespace", "", "namespace of the node; its topics are <namespace>/scfeat/features, matches, status"),
    Argument("params_file", str(CONFIG / "frontend.yaml"), "YAML file with the parameters of the node"),
    Argument("image", "image", "image topic, without /compressed"),
    Argument("camera_info", "", "calibration topic; empty: camera_info beside the image topic"),
    Argument("image_transport", "", "raw or compressed images; empty: as in params_file", ("", "raw", "compressed")),
    Argument("weights", "", "shipped variant or .safetensors file; empty: as in params_file"),
    Argument("device", "", "cpu, cuda, cuda:<number> or auto; empty: as in params_file"),
    Argument("autostart", "", "false: leave configuring and activating to a lifecycle manager", ("", "true", "false")),
    Argument("use_sim_time", "false", "take the time from /clock (simulation, bag)", ("true", "false")),
    Argument("log_level", "info", "smallest severity that is logged", ("debug", "info", "warn", "error", "fatal")),
)


def camera_info_topic(image: str) -> str:
    """The topic beside the image topic, where camera drivers publish the calibration."""
    parent, slash, _ = image.rpartition("/")
    return f"{parent}{slash}camera_info"


def node_settings(values: Mapping[str, str]) -> dict[str, object]:
    """The keyword arguments of launch_ros.actions.Node for the values of the launch arguments."""
    overrides: dict[str, object] = {name: values[name] for name in PARAMETERS if values[name]}
    for name in ("autostart", "use_sim_time"):
        if name in overrides:
            overrides[name] = overrides[name] == "true"
    return {
        "package": "scfeat",
        "executable": "frontend",
        "name": "scfeat",
        "namespace": values["namespace"],
        "output": "screen",
        "parameters": [values["params_file"], overrides],
        "remappings": [
            ("image", values["image"]),
            ("camera_info", values["camera_info"] or camera_info_topic(values["image"])),
        ],
        "ros_arguments": ["--log-level", values["log_level"]],
    }


def profile_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that gives the node the Fast DDS profile for large images; none where the user has set one."""
    if environment.get(NEW_PROFILE) or environment.get(OLD_PROFILE):
        return {}
    name = OLD_PROFILE if environment.get("ROS_DISTRO") in OLD_DISTRIBUTIONS else NEW_PROFILE
    return {name: str(CONFIG / "fastdds.xml")}


def generate_launch_description():
    """Called by ``ros2 launch``."""
    from launch.actions import DeclareLaunchArgument, OpaqueFunction
    from launch_ros.actions import Node

    from launch import LaunchDescription

    def declare(argument: Argument) -> DeclareLaunchArgument:
        choices = {"choices": list(argument.choices)} if argument.choices else {}
        return DeclareLaunchArgument(
            argument.name, default_value=argument.default, description=argument.description, **choices
        )

    def start(context) -> list[Node]:
        values = {argument.name: context.launch_configurations[argument.name] for argument in ARGUMENTS}
        return [Node(**node_settings(values), additional_env=profile_environment(context.environment))]

    return LaunchDescription([*map(declare, ARGUMENTS), OpaqueFunction(function=start)])
