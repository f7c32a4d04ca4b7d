"""Start the scfeat front end on one camera, or on several; the topics of several are given in the order of cameras.

ros2 launch scfeat frontend.launch.py image:=/camera/image_raw
ros2 launch scfeat frontend.launch.py cameras:=left,right stereo:=left:right image:=/left/image_raw,/right/image_raw

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
# Arguments that are parameters, too, if they are not empty.
TEXTS = ("image_transport", "weights", "device", "precision", "engine")
SWITCHES = ("autostart", "use_sim_time")
LISTS = ("cameras", "stereo")
TOPICS = ("image", "camera_info", "mask")  # of each camera


class Argument(NamedTuple):  # launch loads this file in a way that dataclasses do not survive
    """One launch argument; an empty default of a parameter leaves it to params_file."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


ARGUMENTS = (
    Argument("namespace", "", "namespace of the node; its topics are <namespace>/scfeat/features, matches, tracks ..."),
    Argument("params_file", str(CONFIG / "frontend.yaml"), "YAML file with the parameters of the node"),
    Argument(
        "cameras", "", "names of several cameras (left,right), to be given with their topics; empty: as in params_file"
    ),
    Argument("stereo", "", "stereo pairs of cameras (left:right,front:rear); empty: as in params_file"),
    Argument("image", "", "image topic without /compressed; one for each of cameras (/a/image,/b/image); empty: image"),
    Argument("camera_info", "", "calibration topic, as many as image; empty: camera_info beside each image topic"),
    Argument("mask", "", "topic of masks, as many as image; empty: mask"),
    Argument("imu", "", "topic of sensor_msgs/Imu whose gyroscope predicts the turn of the camera; empty: none"),
    Argument("image_transport", "", "raw or compressed images; empty: as in params_file", ("", "raw", "compressed")),
    Argument("weights", "", "shipped variant or .safetensors file; empty: as in params_file"),
    Argument("device", "", "cpu, cuda, cuda:<number> or auto; empty: as in params_file"),
    Argument(
        "precision",
        "",
        "arithmetic of the network, auto: the fastest safe one; empty: as in params_file",
        ("", "float32", "bfloat16", "float16", "auto"),
    ),
    Argument(
        "engine",
        "",
        "what runs the network, eager: torch itself, auto: the fastest; empty: as in params_file",
        ("", "eager", "cuda_graph", "compile", "onnx", "openvino", "tensorrt", "auto"),
    ),
    Argument("autostart", "", "false: leave configuring and activating to a lifecycle manager", ("", "true", "false")),
    Argument(
        "use_sim_time",
        "",
        "true: take the time from /clock (simulation, bag); empty: as in params_file",
        ("", "true", "false"),
    ),
    Argument("log_level", "info", "smallest severity that is logged", ("debug", "info", "warn", "error", "fatal")),
)


def split(text: str) -> list[str]:
    """The words between the commas; none of an empty text."""
    return [word.strip() for word in text.split(",")] if text else []


def camera_info_topic(image: str) -> str:
    """The topic beside the image topic, where camera drivers publish the calibration."""
    parent, slash, _ = image.rpartition("/")
    return f"{parent}{slash}camera_info"


def camera_topics(values: Mapping[str, str]) -> dict[str, list[str]]:
    """What each of TOPICS is called for each camera; an empty list leaves the names to the node."""
    topics = {name: split(values[name]) for name in TOPICS}
    topics["camera_info"] = topics["camera_info"] or list(map(camera_info_topic, topics["image"]))
    return topics


def remappings(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name in the node, name of the topic). Raises ValueError where there are not as many topics as cameras."""
    cameras = split(values["cameras"])
    prefixes = [f"{camera}/" for camera in cameras] if len(cameras) > 1 else [""]
    result = [("imu", values["imu"])] if values["imu"] else []
    for name, topics in camera_topics(values).items():
        if topics and len(topics) != len(prefixes):
            raise ValueError(
                f"expected one topic in {name}:= for each of the cameras:={','.join(cameras) or 'camera'}, found "
                f"{len(topics)}: {','.join(topics)}"
            )
        result += [(prefix + name, topic) for prefix, topic in zip(prefixes, topics, strict=False)]
    return result


def overrides(values: Mapping[str, str]) -> dict[str, object]:
    """The parameters that the arguments give; they go over those of params_file."""
    return {
        **{name: values[name] for name in TEXTS if values[name]},
        **{name: values[name] == "true" for name in SWITCHES if values[name]},
        **{name: split(values[name]) for name in LISTS if values[name]},
        **({"use_imu": True} if values["imu"] else {}),
    }


def node_settings(values: Mapping[str, str]) -> dict[str, object]:
    """The keyword arguments of launch_ros.actions.Node for the values of the launch arguments."""
    return {
        "package": "scfeat",
        "executable": "frontend",
        "name": "scfeat",
        "namespace": values["namespace"],
        "output": "screen",
        "parameters": [values["params_file"], *filter(None, [overrides(values)])],
        "remappings": remappings(values),
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
