"""The launch files: their arguments without launch, and for real where launch is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from scfeat_ros.parameters import NodeParameters, load_parameters, rows

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
NO_LAUNCH = "launch and launch_ros are not installed (they are not on PyPI): source a ROS 2 installation"
TWO = {
    "namespace": "robot",
    "cameras": "left,right",
    "stereo": "left:right",
    "image": "/left/image_raw,/right/image_raw",
    "mask": "masks/left,masks/right",
    "imu": "/imu/data",
    "weights": "random",
    "precision": "auto",
    "engine": "compile",
    "autostart": "false",
    "log_level": "debug",
}


@pytest.fixture(scope="module")
def launch_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("frontend_launch", LAUNCH / "frontend.launch.py")
    assert spec is not None and spec.loader is not None
    # As launch does it: not in sys.modules, which dataclasses would need.
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(launch_file: ModuleType, **changes: str) -> dict[str, str]:
    assert set(changes) <= {argument.name for argument in launch_file.ARGUMENTS}
    return {argument.name: argument.default for argument in launch_file.ARGUMENTS} | changes


def test_every_argument_is_described_and_its_default_is_a_choice(launch_file: ModuleType) -> None:
    names = [argument.name for argument in launch_file.ARGUMENTS]
    assert names == list(dict.fromkeys(names))
    wanted = "namespace params_file image camera_info image_transport cameras weights device precision engine autostart"
    assert set(names) >= {*wanted.split(), "use_sim_time", "log_level"}
    for argument in launch_file.ARGUMENTS:
        assert len(argument.description) > 10, argument.name
        assert not argument.choices or argument.default in argument.choices, argument.name


def test_arguments_agree_with_the_parameters(launch_file: ModuleType) -> None:
    table = {row.name: row for row in rows()}
    types = {str: launch_file.TEXTS, bool: launch_file.SWITCHES}
    for name in {*launch_file.TEXTS, *launch_file.SWITCHES, *launch_file.LISTS}:
        argument = next(argument for argument in launch_file.ARGUMENTS if argument.name == name)
        assert argument.default == "", "the default belongs into config/frontend.yaml"
        if name == "use_sim_time":  # of every node
            continue
        if argument.choices and table[name].choices:
            assert set(argument.choices) == {"", *table[name].choices}
        assert name in (launch_file.LISTS if table[name].many else types[table[name].type])
        named = set(re.findall(r"'([a-z]+)'", table[name].doc)) - {"image", "random"}
        assert all(value in argument.description or value == "lite" for value in named), name


def test_defaults_leave_everything_to_the_parameter_file(launch_file: ModuleType) -> None:
    settings = launch_file.node_settings(values(launch_file))
    assert settings["parameters"] == [str(launch_file.CONFIG / "frontend.yaml")]
    assert settings["remappings"] == []
    assert (launch_file.CONFIG / "frontend.yaml").is_file() and (launch_file.CONFIG / "fastdds.xml").is_file()


def test_given_arguments_become_parameters_and_remappings(launch_file: ModuleType) -> None:
    given = {"image": "/front/image_raw", "weights": "r50.safetensors", "autostart": "false", "use_sim_time": "true"}
    settings = launch_file.node_settings(values(launch_file, **given, image_transport="compressed", log_level="debug"))
    overrides = {
        "weights": "r50.safetensors",
        "autostart": False,
        "use_sim_time": True,
        "image_transport": "compressed",
    }
    assert settings["parameters"][1] == overrides
    assert settings["remappings"] == [("image", "/front/image_raw"), ("camera_info", "/front/camera_info")]
    assert settings["ros_arguments"] == ["--log-level", "debug"]
    settings = launch_file.node_settings(values(launch_file, image="/a/image", camera_info="/b/info", mask="/c/mask"))
    expected = [("image", "/a/image"), ("camera_info", "/b/info"), ("mask", "/c/mask")]
    assert settings["remappings"] == expected
    named = launch_file.node_settings(values(launch_file, image="/a/image", cameras="front"))
    assert named["remappings"][0] == ("image", "/a/image"), "the topics of one camera have no name before them"


def test_topics_of_several_cameras_come_in_their_order(launch_file: ModuleType) -> None:
    settings = launch_file.node_settings(values(launch_file, **TWO))
    assert settings["remappings"] == [
        ("imu", "/imu/data"),
        ("left/image", "/left/image_raw"),
        ("right/image", "/right/image_raw"),
        ("left/camera_info", "/left/camera_info"),
        ("right/camera_info", "/right/camera_info"),
        ("left/mask", "masks/left"),
        ("right/mask", "masks/right"),
    ]
    overrides = settings["parameters"][1]
    assert (overrides["cameras"], overrides["stereo"]) == (["left", "right"], ["left:right"]) and overrides["use_imu"]
    assert load_parameters(overrides).stereo_pairs == (("left", "right"),)
    unnamed = launch_file.node_settings(values(launch_file, cameras="left,right"))
    assert unnamed["remappings"] == [], "left/image, right/image ... as they are"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image": "/a/image,/b/image"}, ["image:=", "cameras:=camera", "found 2"]),
        ({"cameras": "a,b", "image": "/a/image"}, ["image:=", "cameras:=a,b", "found 1: /a/image"]),
        ({"cameras": "a,b", "image": "/a/i,/b/i", "camera_info": "/a/info"}, ["camera_info:=", "found 1: /a/info"]),
        ({"cameras": "a", "mask": "/a/mask,/b/mask"}, ["mask:=", "cameras:=a", "found 2"]),
    ],
)
def test_another_number_of_topics_than_of_cameras_is_refused(
    launch_file: ModuleType, given: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        launch_file.node_settings(values(launch_file, **given))
    assert all(word in str(error.value) for word in words)


def test_the_xml_file_is_a_twin(launch_file: ModuleType) -> None:
    root = ElementTree.parse(LAUNCH / "frontend.launch.xml").getroot()
    declared = [
        (
            argument.get("name"),
            (argument.get("default") or "").replace("$(dirname)/../config", str(launch_file.CONFIG)),
            argument.get("description"),
            tuple(choice.get("value") for choice in argument.iterfind("choice")),
        )
        for argument in root.iterfind("arg")
    ]
    assert declared == [tuple(argument) for argument in launch_file.ARGUMENTS]
    (include,) = root.iterfind("include")
    assert include.get("file") == "$(dirname)/frontend.launch.py"
    passed = {argument.get("name"): argument.get("value") for argument in include}
    assert passed == {argument.name: f"$(var {argument.name})" for argument in launch_file.ARGUMENTS}
    assert {child.tag for child in root} == {"arg", "include"}


def test_the_node_understands_what_the_launch_file_gives_it(launch_file: ModuleType, ros: Any, tmp_path: Path) -> None:
    """With the arguments that launch_ros would make of it, read by rcl."""
    from scfeat_ros.parameters import declare

    settings = launch_file.node_settings(values(launch_file, **TWO))
    file, overrides = settings["parameters"]
    path = tmp_path / "overrides.yaml"
    path.write_text(yaml.safe_dump({"/**": {"ros__parameters": overrides}}))
    arguments = ["--ros-args", "-r", f"__ns:=/{settings['namespace']}", "--params-file", file]
    arguments += ["--params-file", str(path), *settings["ros_arguments"]]
    for name, topic in settings["remappings"]:
        arguments += ["-r", f"{name}:={topic}"]
    node = ros.create_node(settings["name"], cli_args=arguments, use_global_arguments=False)
    expected = {"cameras": ("left", "right"), "stereo": ("left:right",), "weights": "random"}
    assert declare(node) == NodeParameters(
        **expected, precision="auto", engine="compile", use_imu=True, autostart=False
    )
    topics = [node.resolve_topic_name(name) for name in ("left/image", "right/camera_info", "left/mask", "~/tracks")]
    assert topics == ["/left/image_raw", "/right/camera_info", "/robot/masks/left", "/robot/scfeat/tracks"]


def test_the_profile_is_given_unless_the_user_has_one(launch_file: ModuleType) -> None:
    profile = str(launch_file.CONFIG / "fastdds.xml")
    new, old = "FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"
    for distribution, name in {"humble": old, "jazzy": old, "kilted": new, "rolling": new}.items():
        assert launch_file.profile_environment({"ROS_DISTRO": distribution}) == {name: profile}
        assert launch_file.profile_environment({"ROS_DISTRO": distribution, old: "/mine.xml"}) == {}
        assert launch_file.profile_environment({"ROS_DISTRO": distribution, new: "/mine.xml"}) == {}
    assert launch_file.profile_environment({}) == {new: profile}


def test_the_profile_has_a_segment_for_large_images(launch_file: ModuleType) -> None:
    root = ElementTree.parse(launch_file.CONFIG / "fastdds.xml").getroot()
    space = {"dds": "http://www.eprosima.com"}
    size = root.findtext(".//dds:transport_descriptor[dds:type='SHM']/dds:segment_size", namespaces=space)
    assert size is not None and int(size) == 32 * 2**20
    declared = {node.text for node in root.iterfind(".//dds:transport_descriptor/dds:transport_id", space)}
    used = {node.text for node in root.iterfind(".//dds:userTransports/dds:transport_id", space)}
    assert declared == used


@pytest.mark.parametrize("kind", ["py", "xml"])
def test_no_network_and_no_processes(kind: str) -> None:
    text = (LAUNCH / f"frontend.launch.{kind}").read_text()
    assert not re.search(
        r"subprocess|urllib|requests|socket|os\.system|\bpip\b|ExecuteProcess|<executable|command", text
    )
    if kind == "py":
        compile(text, "frontend.launch.py", "exec")


# -- for real ----------------------------------------------------------------------------------------------------------

RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import AnyLaunchDescriptionSource

arguments = [tuple(word.split(":=", 1)) for word in sys.argv[2:]]
service = LaunchService(noninteractive=True)  # it is signalled, not the terminal
service.include_launch_description(
    LaunchDescription([IncludeLaunchDescription(AnyLaunchDescriptionSource(sys.argv[1]), launch_arguments=arguments)])
)
sys.exit(service.run())
"""


@pytest.fixture
def launched(spawn: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """``launched("xml", image="/a")``: what ``ros2 launch`` does, with the node of this tree as the package scfeat."""
    pytest.importorskip("launch", reason=NO_LAUNCH)
    pytest.importorskip("launch_ros.actions", reason=NO_LAUNCH)
    executable = tmp_path / "lib" / "scfeat" / "frontend"
    executable.parent.mkdir(parents=True)
    script = (LAUNCH.parent / "scripts" / "frontend").read_text()
    executable.write_text(script.replace("#!/usr/bin/env python3", f"#!{sys.executable}"))
    executable.chmod(0o755)
    marker = tmp_path / "share" / "ament_index" / "resource_index" / "packages" / "scfeat"
    marker.parent.mkdir(parents=True)
    marker.touch()
    prefixes = os.pathsep.join([str(tmp_path), os.environ["AMENT_PREFIX_PATH"]])

    def run(kind: str, **arguments: str) -> Any:
        # On a busy machine an interpreter with torch in it may take longer to end than the 5 s that launch gives it.
        words = [f"{name}:={value}" for name, value in {**arguments, "sigterm_timeout": "600"}.items()]
        path = LAUNCH / f"frontend.launch.{kind}"
        return spawn([sys.executable, "-c", RUN, path, *words], AMENT_PREFIX_PATH=prefixes, OMP_NUM_THREADS="1")

    return run


def subscriptions(node: Any, namespace: str) -> set[str]:
    return {name for name, _ in node.get_subscriber_names_and_types_by_node("scfeat", namespace)}


@pytest.mark.live
@pytest.mark.parametrize("kind", ["py", "xml"])
def test_two_cameras_are_launched_for_a_lifecycle_manager(launched: Any, ros: Any, kind: str) -> None:
    from lifecycle_msgs.msg import State, Transition
    from lifecycle_msgs.srv import ChangeState, GetState
    from rcl_interfaces.srv import GetParameters

    process = launched(kind, **TWO)
    client = ros.create_node("manager")
    change = client.create_client(ChangeState, "/robot/scfeat/change_state")
    state = client.create_client(GetState, "/robot/scfeat/get_state")
    assert ros.call(state, GetState.Request(), again=True).current_state.id == State.PRIMARY_STATE_UNCONFIGURED
    names = ["cameras", "stereo", "weights", "autostart", "use_imu", "max_keypoints", "use_sim_time"]
    request = GetParameters.Request(names=names)
    got = ros.call(client.create_client(GetParameters, "/robot/scfeat/get_parameters"), request, again=True).values
    assert list(got[0].string_array_value) == ["left", "right"] and list(got[1].string_array_value) == ["left:right"]
    assert got[2].string_value == "random" and not got[3].bool_value and got[4].bool_value
    assert got[5].integer_value == NodeParameters().max_keypoints and not got[6].bool_value
    for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
        assert ros.call(change, ChangeState.Request(transition=Transition(id=transition))).success, process.output
    topics = {"/left/image_raw", "/right/image_raw", "/left/camera_info", "/right/camera_info", "/imu/data"}
    topics |= {"/robot/masks/left", "/robot/masks/right"}
    ros.spin_until(lambda: topics <= subscriptions(client, "/robot"), what="the subscriptions")
    process.popen.send_signal(signal.SIGINT)
    assert process.wait(180.0) == 0, process.output
    assert "process has finished cleanly" in process.output and "Traceback" not in process.output, process.output


@pytest.mark.live
def test_a_parameter_file_of_the_user_is_taken(launched: Any, ros: Any, tmp_path: Path) -> None:
    from rcl_interfaces.srv import GetParameters

    path = tmp_path / "mine.yaml"
    lines = ["/**:", "  ros__parameters:", "    weights: random", "    max_keypoints: 77", "    device: cuda:9"]
    path.write_text("\n".join([*lines, "    use_sim_time: true"]))
    process = launched("py", params_file=str(path), device="cpu", image="camera/image_raw")
    client = ros.create_node("user")
    request = GetParameters.Request(names=["max_keypoints", "device", "use_sim_time"])
    got = ros.call(client.create_client(GetParameters, "/scfeat/get_parameters"), request, again=True).values
    assert got[0].integer_value == 77 and got[1].string_value == "cpu" and got[2].bool_value
    topics = {"/camera/image_raw", "/camera/camera_info", "/clock"}
    ros.spin_until(lambda: topics <= subscriptions(client, "/"), 90.0, what="the subscriptions")
    process.popen.send_signal(signal.SIGINT)
    assert process.wait(180.0) == 0, process.output


@pytest.mark.parametrize("kind", ["py", "xml"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": "/a/image,/b/image"}, ["expected one topic in image:=", "found 2"]),
        ({"image_transport": "theora"}, ["image_transport", "theora", "compressed"]),
    ],
)
def test_a_wrong_argument_ends_the_launch_with_a_reason(
    launched: Any, kind: str, arguments: dict[str, str], words: list[str]
) -> None:
    process = launched(kind, **arguments)
    assert process.wait(60.0) != 0
    assert all(word in process.output for word in words), process.output
