"""``scfeat doctor``: what it says of machines that are broken for real, and of facts that no test can bring about."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scfeat_ros import doctor, probes
from scfeat_ros.doctor import Check, Request
from scfeat_ros.probes import Facts, run_probe

PATIENCE = 90.0  # seconds: on a busy machine torch alone takes ten to start
PUBLISHER = """
import sys, time
import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image

rclpy.init()
node = rclpy.create_node("driver")
qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
images = node.create_publisher(Image, "/camera/image_raw", qos)
infos = node.create_publisher(CameraInfo, "/camera/camera_info", qos)
info = CameraInfo(width=64, height=48, distortion_model="plumb_bob", d=[0.0] * 5)
info.k = [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, float("nan") if "nan" in sys.argv else 1.0]
image = Image(width=64, height=48, step=64, encoding="depth" if "encoding" in sys.argv else "mono8")
image.data.frombytes(bytes(64 * 48))
image.header.frame_id = "camera_optical_frame"
while True:
    if "stamp" not in sys.argv:
        image.header.stamp = info.header.stamp = node.get_clock().now().to_msg()
    if "silent" not in sys.argv:
        images.publish(image)
        infos.publish(info)
    time.sleep(0.03)
"""


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_command_reports_every_part_and_its_status_follows(spawn: Callable[..., Any]) -> None:
    process = spawn([sys.executable, "-m", "scfeat_core.cli", "doctor", "--device", "cpu", "--json"])
    code = process.wait(PATIENCE)
    report = json.loads(process.output)
    levels = {check["name"]: check["level"] for check in report["checks"]}
    assert levels["python"] == levels["torch"] == levels["numpy"] == levels["opencv"] == levels["device"] == "OK"
    assert levels["weights"] == "OK"
    assert {"rclpy", "domain", "discovery", "/dev/shm", "socket buffers", "memory", "driver"} <= levels.keys()
    assert code == int("FAIL" in levels.values())
    assert report["ok"] == (code == 0)


def test_the_report_for_people_has_the_fix_below_each_complaint() -> None:
    checks = [Check("python", "OK", "3.11"), Check("torch", "FAIL", "not there", "pip install torch")]
    lines = doctor.as_text(checks).splitlines()
    (complaint,) = [i for i, line in enumerate(lines) if line.startswith("FAIL")]
    assert "fix: pip install torch" in lines[complaint + 1]
    assert lines[-1] == "1 OK, 0 WARN, 1 FAIL"
    assert doctor.exit_code(checks) == 1
    assert doctor.exit_code(checks[:1]) == 0


def test_without_ros_everything_else_is_still_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that cannot import rclpy, which only the node needs."""
    (tmp_path / "rclpy.py").write_text("raise ModuleNotFoundError(\"No module named 'rclpy'\", name='rclpy')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("ROS_DISTRO", raising=False)
    checks = doctor.examine(Request(weights="random", device="cpu"), dict(os.environ))
    found = by_name(checks)
    assert doctor.exit_code(checks) == 0
    assert found["rclpy"].level == "WARN"
    assert "source" in found["rclpy"].fix
    assert found["device"].level == "OK"
    facts = run_probe("image", "/camera/image_raw", "3", timeout=PATIENCE)
    assert [check.level for check in doctor.check_image(facts, "/camera/image_raw")] == ["FAIL"]
    assert doctor.check_rclpy(facts, "", Request(image="/camera/image_raw").needs_ros).level == "FAIL"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import sys; sys.stderr.write('compiled for numpy 1\\n'); sys.exit(3)", "exit code 3: compiled for numpy 1"),
        ("raise ImportError('numpy.core.multiarray failed to import')", "numpy.core.multiarray failed to import"),
        ("import time; time.sleep(60)", "no answer within"),
    ],
)
def test_a_library_that_crashes_or_hangs_is_a_line_of_the_report(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cv2.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    start = time.monotonic()
    check = doctor.check_opencv(run_probe("opencv", timeout=10.0 if "sleep" not in body else 2.0))
    assert time.monotonic() - start < 15
    assert check.level == "FAIL"
    assert said in check.found
    assert check.fix


def test_a_torch_that_does_not_take_this_numpy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch built for numpy 1 behaves beside numpy 2: it can be imported, and from_numpy raises."""
    (tmp_path / "torch.py").write_text(
        "__version__ = '2.2.0'\n"
        "class version: cuda = None\n"
        "def from_numpy(array): raise RuntimeError('Numpy is not available')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    facts = run_probe("torch", "cpu", timeout=PATIENCE)
    assert doctor.check_torch(facts).level == "FAIL"  # too old, as well
    check = doctor.check_numpy(facts)
    assert check.level == "FAIL"
    assert "Numpy is not available" in check.found
    assert "numpy<2" in check.fix
    assert doctor.check_device(facts, "cpu").level == "FAIL"


def test_a_device_that_is_not_there_is_refused() -> None:
    facts = Facts(dict(probes.probe_torch("cuda:63")))
    check = doctor.check_device(facts, "cuda:63")
    assert check.level == "FAIL"
    assert "cuda:63" in check.found


def weights(given: str | Path) -> Check:
    return doctor.check_weights(Facts(dict(probes.probe_weights(str(given)))))


def test_damaged_weights_are_found(tmp_path: Path, repository: Path) -> None:
    whole = (repository / "scfeat_core" / "weights" / "lite.safetensors").read_bytes()
    damaged = tmp_path / "lite.safetensors"
    damaged.write_bytes(whole[:-1000] + bytes(1000))
    check = weights(damaged)
    assert check.level == "FAIL"
    assert "damaged" in check.found
    damaged.write_bytes(whole[: len(whole) // 2])
    assert weights(damaged).level == "FAIL"
    assert weights("large").level == "FAIL"


def test_shipped_weights_are_whole_and_their_licence_is_said() -> None:
    check = weights("lite")
    assert check.level == "OK"
    assert "Apache-2.0" in check.found
    assert weights("random").level == "WARN"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/**:\n  ros__parameters:\n    max_keypoint: 5\n", "max_keypoints"),
        ("scfeat:\n  ros__parameters:\n    nms_radius: 1000\n", "nms_radius"),
        ("/**:\n  ros__parameters:\n    weights: 5\n", "weights"),
        ("other_node:\n  ros__parameters:\n    weights: lite\n", "other_node"),
        ("weights: lite\n", "ros__parameters"),
        ("/**:\n  ros__parameters: [1\n", "expected"),
        ("", "found sections: none"),
    ],
)
def test_a_wrong_parameter_file_is_explained(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(text)
    check = doctor.check_parameters(str(path), Facts(dict(probes.probe_parameters(str(path)))))
    assert check.level == "FAIL"
    assert said in check.found


def test_the_shipped_parameter_file_is_valid_and_says_what_to_examine(repository: Path, tmp_path: Path) -> None:
    path = repository / "config" / "frontend.yaml"
    facts = run_probe("parameters", str(path), timeout=PATIENCE)
    assert doctor.check_parameters(str(path), facts).level == "OK"
    assert (facts.get("weights"), facts.get("device")) == ("lite", "cpu")
    missing = doctor.check_parameters("none.yaml", run_probe("parameters", str(tmp_path / "none"), timeout=PATIENCE))
    assert missing.level == "FAIL"


@pytest.mark.parametrize(
    ("environment", "level", "said"),
    [
        ({}, "OK", "0 (not set)"),
        ({"ROS_DOMAIN_ID": "7"}, "OK", "7"),
        ({"ROS_DOMAIN_ID": "150"}, "WARN", "150"),
        ({"ROS_DOMAIN_ID": "400"}, "FAIL", "400"),
        ({"ROS_DOMAIN_ID": "robot"}, "FAIL", "robot"),
        ({"ROS_DOMAIN_ID": "-1"}, "FAIL", "-1"),
    ],
)
def test_domains(environment: dict[str, str], level: str, said: str) -> None:
    check = doctor.check_domain(environment)
    assert (check.level, said in check.found) == (level, True)


@pytest.mark.parametrize(
    ("environment", "level"),
    [
        ({}, "OK"),
        ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}, "OK"),
        ({"ROS_LOCALHOST_ONLY": "1"}, "OK"),
        ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"}, "WARN"),
        ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "localhost"}, "FAIL"),
        ({"ROS_LOCALHOST_ONLY": "yes"}, "FAIL"),
    ],
)
def test_discovery(environment: dict[str, str], level: str) -> None:
    assert doctor.check_discovery(environment).level == level


def test_the_profile_of_fast_dds_is_read(tmp_path: Path, repository: Path) -> None:
    ours = {"FASTDDS_DEFAULT_PROFILES_FILE": str(repository / "config" / "fastdds.xml")}
    assert doctor.check_profile(ours, ours).level == "OK"
    assert "32 MB" in doctor.check_profile(ours, ours).found
    unset = doctor.check_profile({}, ours)
    assert unset.level == "WARN"
    assert f"export FASTDDS_DEFAULT_PROFILES_FILE={repository}" in unset.fix
    other = {"FASTRTPS_DEFAULT_PROFILES_FILE": ours["FASTDDS_DEFAULT_PROFILES_FILE"]}
    assert doctor.check_profile(other, ours).level == "WARN"  # the name of another distribution
    for content, level in (("<profiles><dds/></profiles>", "WARN"), ("<profiles", "FAIL")):
        (tmp_path / "own.xml").write_text(content)
        assert doctor.check_profile({"FASTDDS_DEFAULT_PROFILES_FILE": str(tmp_path / "own.xml")}, ours).level == level
    assert doctor.check_profile({"FASTDDS_DEFAULT_PROFILES_FILE": str(tmp_path / "none")}, ours).level == "FAIL"


@pytest.mark.parametrize(
    ("driver", "build", "device", "level"),
    [
        ("", "", "auto", "OK"),
        ("", "12.8", "cuda", "FAIL"),
        ("570.133.20", "12.8", "cuda", "OK"),
        ("570.133.20", "12.8", "cpu", "OK"),
        ("570.133.20", "", "auto", "WARN"),
        ("570.133.20", "", "cuda:0", "FAIL"),
        ("470.256.02", "12.8", "cuda", "FAIL"),
        ("470.256.02", "12.8", "auto", "WARN"),
        ("of a Jetson", "12.6", "cuda", "OK"),
    ],
)
def test_driver_and_build_of_torch_must_fit(driver: str, build: str, device: str, level: str) -> None:
    check = doctor.check_driver(Facts({"torch": "2.8.0", "cuda_build": build}), driver, device)
    assert check.level == level
    assert bool(check.fix) == (level != "OK")


def test_limits_of_the_system() -> None:
    assert doctor.check_sockets(212992).level == "WARN"
    assert "net.core.rmem_max=4194304" in doctor.check_sockets(212992).fix
    assert doctor.check_sockets(8 << 20).level == "OK"
    assert doctor.check_shared_memory((64 << 20, 60 << 20)).level == "WARN"  # Docker's default
    assert doctor.check_shared_memory((64 << 20, 1 << 20)).level == "FAIL"
    assert doctor.check_shared_memory((8 << 30, 7 << 30)).level == "OK"
    assert doctor.check_shared_memory(None).level == "WARN"
    assert doctor.check_memory(200 << 20).level == "FAIL"
    assert doctor.check_memory(700 << 20).level == "WARN"
    assert doctor.check_memory(4 << 30).level == "OK"
    assert doctor.check_python((3, 8, 10), "/usr/bin/python3").level == "FAIL"


def test_messages_of_another_version_are_found(tmp_path: Path, repository: Path) -> None:
    messages = pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")
    (tmp_path / "Tracks.msg").write_text("uint8 NEW=1  # a constant\nstd_msgs/Header header\nfloat32[] depths  # new\n")
    (tmp_path / "Lines.msg").write_text("float32[] ends\n")
    differences = probes.message_differences(messages, tmp_path)
    assert "Lines is not built" in differences
    assert "Tracks.depths is not built" in differences
    assert any("Tracks.ids is built" in each for each in differences)
    assert doctor.check_messages(Facts({"differences": differences})).level == "FAIL"
    assert doctor.check_messages(Facts({"messages_error": "No module named 'scfeat'"})).level == "FAIL"


def test_a_middleware_that_is_not_installed_is_named(domain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
    monkeypatch.setenv("RMW_IMPLEMENTATION", "rmw_of_nobody_cpp")
    facts = run_probe("ros", timeout=PATIENCE)
    check = doctor.check_middleware(facts, "rmw_of_nobody_cpp", ["rmw_fastrtps_cpp"])
    assert check.level == "FAIL"
    assert "rmw_of_nobody_cpp" in check.found
    assert doctor.check_middleware(facts, "", []).level == "FAIL"  # it did not start, whatever the index says


def look(patience: float = 3.0, topic: str = "/camera/image_raw") -> dict[str, Check]:
    facts = run_probe("image", topic, str(patience), timeout=PATIENCE)
    return by_name(doctor.check_image(facts, topic))


def test_a_live_best_effort_camera_is_described(ros: Any, spawn: Callable[..., Any]) -> None:
    spawn([sys.executable, "-c", PUBLISHER])
    checks = look(patience=30.0)
    assert {check.level for check in checks.values()} == {"OK"}
    assert "/driver (best effort)" in checks["image topic"].found
    assert "64x48 mono8" in checks["images"].found
    assert "camera_optical_frame" in checks["stamps"].found
    assert "f = 50 px" in checks["calibration"].found


def test_what_is_wrong_with_a_live_camera_is_found(ros: Any, spawn: Callable[..., Any]) -> None:
    spawn([sys.executable, "-c", PUBLISHER, "nan", "stamp", "encoding"])
    checks = look(patience=30.0)
    assert checks["image topic"].level == "OK"
    assert checks["images"].level == "FAIL"
    assert "depth" in checks["images"].found
    assert checks["stamps"].level == "FAIL"
    assert checks["calibration"].level == "WARN"
    other = look(topic="/camera/camera_info")["image topic"]
    assert other.level == "FAIL"
    assert "sensor_msgs/msg/CameraInfo" in other.found


def test_a_silent_publisher_and_a_wrong_name_are_told_apart(ros: Any, spawn: Callable[..., Any]) -> None:
    spawn([sys.executable, "-c", PUBLISHER, "silent"])
    node = ros.create_node()
    ros.spin_until(lambda: node.get_publishers_info_by_topic("/camera/image_raw"), what="the publisher", timeout=60)
    silent = look(patience=10.0)  # also for finding it, on a busy machine
    assert silent["image topic"].level == "OK"
    assert silent["images"].level == "FAIL"
    assert "none received" in silent["images"].found
    wrong = look(topic="/cam/image_raw")["image topic"]
    assert wrong.level == "FAIL"
    assert "/camera/image_raw" in wrong.fix


def test_a_request_for_ros_makes_its_absence_a_failure() -> None:
    assert Request(image="/image").needs_ros
    assert not Request(weights="lite").needs_ros
    nothing = Facts(missing="rclpy")
    assert doctor.check_rclpy(nothing, "", needed=False).level == "WARN"
    assert doctor.check_rclpy(nothing, "jazzy", needed=True).level == "FAIL"
