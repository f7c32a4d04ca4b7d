"""The launch file: its arguments without launch, and for real where launch is installed."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

from scfeat_ros.parameters import NodeParameters, rows


@pytest.fixture(scope="module")
def launch_file() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "launch" / "frontend.launch.py"
    spec = importlib.util.spec_from_file_location("frontend_launch", path)
    assert spec is not None and spec.loader is not None
    # As launch does it: not in sys.modules, which dataclasses would need.
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(launch_file: ModuleType, **changes: str) -> dict[str, str]:
    return {argument.name: argument.default for argument in launch_file.ARGUMENTS} | changes


def test_every_argument_is_described_and_its_default_is_a_choice(launch_file: ModuleType) -> None:
    names = [argument.name for argument in launch_file.ARGUMENTS]
    assert names == list(dict.fromkeys(names))
    assert set(names) >= {"namespace", "params_file", "image", "camera_info", "image_transport", "weights", "device"}
    for argument in launch_file.ARGUMENTS:
        assert len(argument.description) > 10, argument.name
        assert not argument.choices or argument.default in argument.choices, argument.name


def test_arguments_agree_with_the_parameters(launch_file: ModuleType) -> None:
    table = {row.name: row for row in rows()}
    for name in set(launch_file.PARAMETERS) - {"use_sim_time"}:
        argument = next(argument for argument in launch_file.ARGUMENTS if argument.name == name)
        if argument.choices and table[name].choices:
            assert set(argument.choices) == {"", *table[name].choices}
        assert argument.default == "", "the default belongs into config/frontend.yaml"
        named = set(re.findall(r"'([a-z]+)'", table[name].doc)) - {"image", "random"}
        assert all(value in argument.description or value == "lite" for value in named), name


def test_defaults_leave_everything_to_the_parameter_file(launch_file: ModuleType) -> None:
    settings = launch_file.node_settings(values(launch_file))
    assert settings["parameters"] == [str(launch_file.CONFIG / "frontend.yaml"), {"use_sim_time": False}]
    assert settings["remappings"] == [("image", "image"), ("camera_info", "camera_info")]
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
    settings = launch_file.node_settings(values(launch_file, image="/a/image", camera_info="/b/info"))
    assert settings["remappings"][1] == ("camera_info", "/b/info")


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


def test_no_network_and_no_processes(launch_file: ModuleType) -> None:
    text = Path(launch_file.__file__ or "").read_text()
    compile(text, "frontend.launch.py", "exec")
    assert not re.search(r"subprocess|urllib|requests|socket|os\.system|pip", text)


def test_the_description_for_real(launch_file: ModuleType) -> None:
    reason = "launch_ros is not installed (it is not on PyPI): source a ROS 2 installation"
    launch = pytest.importorskip("launch", reason=reason)
    pytest.importorskip("launch_ros.actions", reason=reason)
    description = launch_file.generate_launch_description()
    declared = [
        entity.name for entity in description.entities if isinstance(entity, launch.actions.DeclareLaunchArgument)
    ]
    assert declared == [argument.name for argument in launch_file.ARGUMENTS]
    assert NodeParameters().autostart
