"""``scfeat doctor``: is everything there that the node needs, does it work together, and if not, what mends it.

Facts come from child processes (probes.py) and from the system; each check is a pure function that judges some of them.
Nothing here needs more than the standard library to be imported, so that it can say what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from scfeat_core import __version__
from scfeat_ros.fastdds import profile_environment
from scfeat_ros.probes import Facts, run_probe

Level = Literal["OK", "WARN", "FAIL"]

PATIENCE = 3.0  # seconds for a publisher, and then for a message of it
PROBE_TIMEOUT = 90.0  # seconds: torch from a slow card, and the first call of a CUDA device
SOCKET_BUFFER = 4 << 20  # bytes that config/fastdds.xml asks for: one large image in fragments
SEGMENT = 8 << 20  # bytes of shared memory for one image of 1920x1080 in colour
OLD_STAMP = 1.0  # seconds
_TORCH = (2, 4)
# The lowest driver with which a CUDA build starts (CUDA release notes, minor version compatibility).
_DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 0)}
_RANGES = ("SUBNET", "LOCALHOST", "OFF", "SYSTEM_DEFAULT")
_PROFILES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")


@dataclass(frozen=True)
class Check:
    """One line of the report. fix: what to do; empty where all is well."""

    name: str
    level: Level
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Request:
    """What the doctor is asked to look at; empty: not given."""

    image: str = ""
    weights: str = ""
    device: str = ""
    params_file: str = ""

    @property
    def needs_ros(self) -> bool:
        return bool(self.image or self.params_file)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", default="", metavar="TOPIC", help="look at this image topic, too")
    parser.add_argument("--weights", default="", help="name or path (default: of the parameter file, or lite)")
    parser.add_argument(
        "--device", default="", help="cpu, cuda, cuda:1, auto (default: of the parameter file, or auto)"
    )
    parser.add_argument("--params-file", default="", metavar="F", help="check this parameter file of the node")
    parser.add_argument("--json", action="store_true", help="write the checks as JSON")
    parser.epilog = "Exit status: 0 where nothing fails, 1 where something does. Nothing is sent to any network."


def run(args: argparse.Namespace) -> int:
    checks = examine(Request(args.image, args.weights, args.device, args.params_file), dict(os.environ))
    sys.stdout.write(as_json(checks) if args.json else as_text(checks))
    return exit_code(checks)


def examine(request: Request, environment: Mapping[str, str]) -> list[Check]:
    """All checks, in the order of the report. Takes some seconds, and never longer than the timeouts of the probes."""
    facts = _probe(request, environment)
    device = request.device or facts["parameters"].get("device") or "auto"
    needs_ros = request.needs_ros or "ROS_DISTRO" in environment
    checks = [
        check_python(sys.version_info[:3], sys.executable),
        check_torch(facts["torch"]),
        check_numpy(facts["torch"]),
        check_opencv(facts["opencv"]),
        check_cv_bridge(facts["cv_bridge"]),
        check_driver(facts["torch"], _driver(), device),
        check_device(facts["torch"], device),
        check_weights(facts["weights"]),
        check_memory(_available_memory()),
        check_rclpy(facts["ros"], environment.get("ROS_DISTRO", ""), needs_ros),
    ]
    checks += [check_parameters(request.params_file, facts["parameters"])] if request.params_file else []
    if facts["ros"].get("rmw") or facts["ros"].failure:
        checks.append(
            check_middleware(facts["ros"], environment.get("RMW_IMPLEMENTATION", ""), _installed(environment))
        )
    if facts["ros"].get("rmw"):
        checks += [check_messages(facts["ros"])]
    checks += [check_domain(environment), check_discovery(environment)]
    if "fastrtps" in facts["ros"].get("rmw", "rmw_fastrtps_cpp"):
        checks.append(check_profile(environment, profile_environment()))
    checks += [check_sockets(_number("/proc/sys/net/core/rmem_max")), check_shared_memory(_shared_memory())]
    return checks + (check_image(facts["image"], request.image) if request.image else [])


def as_text(checks: Iterable[Check]) -> str:
    """The report for people: a line for each check, the fix below it, and the sum."""
    checks = list(checks)
    lines = [f"scfeat {__version__}: is everything there for the node?", ""]
    for check in checks:
        lines.append(f"{check.level:<5} {check.name:<17} {check.found}")
        lines += [f"{'':<23} fix: {check.fix}"] if check.fix else []
    count = {level: sum(check.level == level for check in checks) for level in ("OK", "WARN", "FAIL")}
    return "\n".join([*lines, "", ", ".join(f"{number} {level}" for level, number in count.items()), ""])


def as_json(checks: Iterable[Check]) -> str:
    """The report for programs: ``ok`` and the ``checks`` with their fields."""
    checks = list(checks)
    report = {"version": __version__, "ok": not exit_code(checks), "checks": [asdict(check) for check in checks]}
    return json.dumps(report, indent=2) + "\n"


def exit_code(checks: Iterable[Check]) -> int:
    return int(any(check.level == "FAIL" for check in checks))


# What follows judges facts. ---------------------------------------------------------------------------------------


def check_python(version: tuple[int, int, int], executable: str) -> Check:
    found = f"{'.'.join(map(str, version))} at {executable}"
    if version >= (3, 10):
        return Check("python", "OK", found)
    return Check("python", "FAIL", found, "use Python 3.10 or later: Ubuntu 22.04 and 24.04 have it")


def check_torch(facts: Facts) -> Check:
    """facts: of probe_torch."""
    build = facts.get("torch")
    if build is None:
        return _unusable("torch", facts, "pip install torch safetensors (see https://pytorch.org/get-started)")
    version = tuple(int(part) for part in re.findall(r"\d+", build)[:2])
    found = f"{build}, built {'for CUDA ' + facts.get('cuda_build') if facts.get('cuda_build') else 'without CUDA'}"
    if version < _TORCH:
        return Check("torch", "FAIL", found, "install torch 2.4 or later")
    return Check("torch", "OK", found)


def check_numpy(facts: Facts) -> Check:
    """Whether torch and numpy share arrays; facts: of probe_torch."""
    version = facts.get("numpy")
    if version is None:
        return _unusable("numpy", facts, "pip install numpy")
    if facts.get("torch") is None:
        return Check("numpy", "OK", f"{version} (not tried with torch)")
    if facts.get("sum") == 10.0:
        return Check("numpy", "OK", f"{version}, shares memory with torch")
    fix = "torch and numpy were built for different major versions: pip install 'numpy<2', or a newer torch"
    return Check(
        "numpy",
        "FAIL",
        f"{version}; torch.from_numpy does not work: {facts.get('numpy_error') or facts.failure or 'wrong result'}",
        fix,
    )


def check_opencv(facts: Facts) -> Check:
    """facts: of probe_opencv."""
    if facts.get("converted") == 144:
        return Check("opencv", "OK", f"{facts.get('version')}, works with this numpy")
    fix = "apt install python3-opencv; beside a numpy 2 from pip: pip install --upgrade opencv-python, or 'numpy<2'"
    return _unusable("opencv", facts, fix)


def check_cv_bridge(facts: Facts) -> Check:
    """facts: of probe_cv_bridge. The front end does without it; other nodes in the same environment do not."""
    if facts.missing:
        return Check("cv_bridge", "OK", "not installed, not needed")
    if facts.get("converted") == 144:
        return Check("cv_bridge", "OK", "works with this numpy (not needed)")
    fix = "nothing for scfeat, which does not use it; for other nodes: pip install 'numpy<2'"
    return Check("cv_bridge", "WARN", f"does not work: {facts.failure or 'wrong result'}", fix)


def check_driver(facts: Facts, driver: str, device: str) -> Check:
    """facts: of probe_torch. driver: version of the NVIDIA driver, empty without one."""
    needed: Level = "FAIL" if device.startswith("cuda") else "WARN"
    build = facts.get("cuda_build", "")
    if not driver:
        if needed == "FAIL":
            return Check("driver", needed, "no NVIDIA driver", "install the driver of the GPU, or use device cpu")
        return Check("driver", "OK", "no NVIDIA driver: the network runs on the CPU")
    if device == "cpu" or facts.get("torch") is None:
        return Check("driver", "OK", f"NVIDIA {driver}" + (", not asked for (device cpu)" if device == "cpu" else ""))
    if not build:
        fix = "install a CUDA build of torch (https://pytorch.org/get-started), or use device cpu"
        return Check("driver", needed, f"NVIDIA {driver}, but torch is built without CUDA", fix)
    lowest = _DRIVERS.get(int(build.partition(".")[0]), (0, 0))
    if _numbers(driver) < lowest:
        fix = f"install driver {lowest[0]}.{lowest[1]} or later, or a torch for an older CUDA"
        return Check("driver", needed, f"NVIDIA {driver}, too old for torch with CUDA {build}", fix)
    return Check("driver", "OK", f"NVIDIA {driver}, torch with CUDA {build}")


def check_device(facts: Facts, device: str) -> Check:
    """Whether it computes; facts: of probe_torch."""
    if facts.get("torch") is None:
        return Check("device", "FAIL", f"'{device}' not tried: torch does not work", "see torch")
    if facts.get("device_error"):
        return Check("device", "FAIL", facts.get("device_error"), "use device cpu or auto, or see driver")
    if facts.get("convolution") != 324.0:
        fix = "end other processes on the device (nvidia-smi), restart, or use device cpu"
        return Check("device", "FAIL", f"'{device}' does not compute: {facts.failure or 'wrong result'}", fix)
    free = facts.get("device_memory")
    memory = f", {facts.get('device_name')}, {free[0] / 2**30:.1f} of {free[1] / 2**30:.1f} GB free" if free else ""
    return Check("device", "OK", f"'{device}' is {facts.get('device')}{memory}; a convolution ran")


def check_weights(facts: Facts) -> Check:
    """facts: of probe_weights."""
    if facts.get("random"):
        fix = "use weights lite, or a file of yours: features of an untrained network mean nothing"
        return Check("weights", "WARN", "'random': an untrained network", fix)
    if facts.get("weights_error"):
        return Check(
            "weights",
            "FAIL",
            facts.get("weights_error"),
            "check the name or the path; weights lite is shipped; a damaged file must be fetched again",
        )
    if facts.get("space") is None:
        return _unusable("weights", facts, "see torch; pip install safetensors")
    licence = facts.get("licence") or "licence not stated (no card)"
    found = f"{facts.get('space')}, whole, {facts.get('parameters') / 1e6:.2f} M parameters, {licence}"
    return Check("weights", "OK", found)


def check_memory(available: int | None) -> Check:
    """available: bytes, None where the system does not say."""
    if available is None:
        return Check("memory", "OK", "not known on this system")
    found = f"{available / 2**30:.1f} GB available"
    if available < 1 << 30:
        level: Level = "FAIL" if available < 400 << 20 else "WARN"
        return Check("memory", level, found, "end other processes: the node takes 0.5 to 1 GB, more for large images")
    return Check("memory", "OK", found)


def check_parameters(path: str, facts: Facts) -> Check:
    """facts: of probe_parameters."""
    if facts.get("weights") is not None:
        return Check("parameters", "OK", f"{path}: all names and values are valid")
    if facts.get("parameters_error"):
        return Check(
            "parameters",
            "FAIL",
            facts.get("parameters_error"),
            f"check the path of {path}, and what is in it; see config/frontend.yaml",
        )
    return _unusable("parameters", facts, "see numpy; pip install pyyaml")


def check_rclpy(facts: Facts, distro: str, needed: bool) -> Check:
    """facts: of probe_ros. distro: ROS_DISTRO. needed: False where only the Python library may be wanted."""
    if facts.get("rclpy") is not None:
        named = f"ROS_DISTRO {distro}" if distro else "ROS_DISTRO is not set (fine for ROS from pip)"
        return Check("rclpy", "OK", f"{facts.get('rclpy')}, {named}")
    fix = (
        "source /opt/ros/<distro>/setup.bash in this shell, and run the Python that it is for (Humble: 3.10, Jazzy: "
        "3.12); a virtual environment needs --system-site-packages"
    )
    found = f"not importable by {sys.executable}" + (f" ({facts.failure})" if facts.failure else "")
    return Check("rclpy", "FAIL" if needed else "WARN", f"{found}: the node cannot run", fix)


def check_middleware(facts: Facts, wanted: str, installed: list[str]) -> Check:
    """facts: of probe_ros. wanted: RMW_IMPLEMENTATION. installed: names of the implementations that are there."""
    there = ", ".join(installed) or "none that the ament index knows"
    if wanted and installed and wanted not in installed:
        fix = f"apt install ros-$ROS_DISTRO-{wanted.replace('_', '-')}, or unset RMW_IMPLEMENTATION"
        return Check("middleware", "FAIL", f"RMW_IMPLEMENTATION is {wanted}, installed: {there}", fix)
    if not facts.get("initialised"):
        fix = "unset RMW_IMPLEMENTATION, correct ROS_DOMAIN_ID, see the checks below"
        return Check("middleware", "FAIL", f"does not start: {facts.failure or 'no answer'}", fix)
    return Check("middleware", "OK", f"{facts.get('rmw')}; installed: {there}")


def check_messages(facts: Facts) -> Check:
    """facts: of probe_ros."""
    fix = "colcon build --packages-select scfeat && source install/setup.bash (with ROS from pip: make setup)"
    if facts.get("messages_error"):
        return Check("messages", "FAIL", f"scfeat.msg cannot be imported: {facts.get('messages_error')}", fix)
    differences = facts.get("differences")
    if differences is None:
        return Check("messages", "FAIL", f"not examined: {facts.failure or 'no answer'}", fix)
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        return Check("messages", "FAIL", f"built from another version: {'; '.join(differences[:3])}{more}", fix)
    return Check("messages", "OK", f"scfeat.msg is built, its fields are those of scfeat {__version__}")


def check_domain(environment: Mapping[str, str]) -> Check:
    text = environment.get("ROS_DOMAIN_ID", "")
    number = int(text) if text.isdecimal() else -1 if text else 0
    if not 0 <= number <= 232:
        return Check("domain", "FAIL", f"ROS_DOMAIN_ID is '{text}'", "export a number from 0 to 101, or unset it")
    if number > 101:
        fix = "take a number up to 101: above, its ports collide with those that Linux gives away"
        return Check("domain", "WARN", f"ROS_DOMAIN_ID {number}", fix)
    return Check("domain", "OK", f"ROS_DOMAIN_ID {number}" + ("" if text else " (not set)"))


def check_discovery(environment: Mapping[str, str]) -> Check:
    """Which other processes can be seen at all."""
    reach, local = environment.get("ROS_AUTOMATIC_DISCOVERY_RANGE", ""), environment.get("ROS_LOCALHOST_ONLY", "")
    if reach and reach not in _RANGES:
        fix = f"export one of {', '.join(_RANGES)}, or unset it"
        return Check("discovery", "FAIL", f"ROS_AUTOMATIC_DISCOVERY_RANGE is '{reach}'", fix)
    if local not in ("", "0", "1"):
        return Check("discovery", "FAIL", f"ROS_LOCALHOST_ONLY is '{local}'", "export 0 or 1, or unset it")
    if reach == "OFF":
        fix = "unset ROS_AUTOMATIC_DISCOVERY_RANGE, unless ROS_STATIC_PEERS names all others"
        return Check("discovery", "WARN", "OFF: this process sees no other one", fix)
    if reach == "LOCALHOST" or local == "1":
        return Check("discovery", "OK", "this machine only; nodes on other machines are not seen")
    return Check("discovery", "OK", "all machines of this network")


def check_profile(environment: Mapping[str, str], ours: Mapping[str, str]) -> Check:
    """The Fast DDS profile with room for large images. ours: the variable and the file that the node takes itself."""
    name = "Fast DDS profile"
    proposal = (
        "".join(f"export {key}={value}" for key, value in ours.items()) or "reinstall scfeat: its profile is gone"
    )
    chosen = {key: environment[key] for key in _PROFILES if environment.get(key)}
    if not chosen:
        found = "not set here: the node sets it for itself, but a camera driver started from here has 0.5 MB a message"
        return Check(name, "WARN", found, f"before the camera driver: {proposal}")
    key, path = next(iter(chosen.items()))
    if ours and not chosen.keys() & ours.keys():
        return Check(name, "WARN", f"{key} is set, which this ROS distribution does not read", proposal)
    size = _segment_size(Path(path))
    if size is None:
        return Check(name, "FAIL", f"{key} names {path}: no readable XML file", proposal)
    if size < SEGMENT:
        found = f"{path}: no shared-memory segment of {SEGMENT >> 20} MB or more, larger images may vanish"
        return Check(name, "WARN", found, proposal)
    return Check(name, "OK", f"{path}, {size >> 20} MB of shared memory")


def check_sockets(rmem_max: int | None) -> Check:
    """rmem_max: bytes, the most that a socket may buffer; for images from other machines and containers."""
    if rmem_max is None:
        return Check("socket buffers", "OK", "not known on this system")
    if rmem_max < SOCKET_BUFFER:
        found = f"net.core.rmem_max is {rmem_max / 1024:.0f} kB: images from other machines and containers lose parts"
        fix = f"sudo sysctl -w net.core.rmem_max={SOCKET_BUFFER} (to keep it: a file in /etc/sysctl.d)"
        return Check("socket buffers", "WARN", found, fix)
    return Check("socket buffers", "OK", f"net.core.rmem_max {rmem_max >> 20} MB")


def check_shared_memory(space: tuple[int, int] | None) -> Check:
    """space: (bytes in all, bytes free) of /dev/shm; None where there is none."""
    if space is None:
        fix = "mount a tmpfs there (Docker: --ipc=host or --shm-size=512m)"
        return Check("/dev/shm", "WARN", "not there: messages go through sockets", fix)
    total, free = (value >> 20 for value in space)
    found = f"{free} of {total} MB free"
    if free < 128:
        fix = "Docker: --shm-size=512m or --ipc=host; else delete what dead processes left: fastdds shm clean"
        return Check("/dev/shm", "FAIL" if free < 32 else "WARN", f"{found}, each process takes 32 MB", fix)
    return Check("/dev/shm", "OK", found)


def check_image(facts: Facts, topic: str) -> list[Check]:
    """The image topic, its messages and the calibration beside it; facts: of probe_image."""
    publishers = facts.get("publishers")
    if publishers is None:
        return [_unusable("image", facts, "see rclpy and middleware")]
    first = check_publishers(facts.get("topic", topic), publishers, facts.get("others", []))
    if first.level == "FAIL" or facts.get("received") is None:
        return [first]
    checks = [first, check_received(facts)]
    return checks if not facts.get("received") else [*checks, check_stamp(facts), check_camera_info(facts)]


def check_publishers(topic: str, publishers: list[Mapping[str, str]], others: list[str]) -> Check:
    """others: topics that carry images."""
    if not publishers:
        there = f"image topics here: {', '.join(others)}" if others else "no image topic is seen here at all"
        fix = f"{there}; check the name, ROS_DOMAIN_ID and discovery on both sides"
        return Check("image topic", "FAIL", f"nobody publishes on {topic}", fix)
    kinds = sorted({publisher["type"] for publisher in publishers})
    if not set(kinds) <= {"sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"} or len(kinds) > 1:
        fix = "give the topic of sensor_msgs/msg/Image, or its /compressed"
        return Check("image topic", "FAIL", f"{topic} carries {', '.join(kinds)}", fix)
    said = ", ".join(f"{each['node']} ({each['reliability'].lower().replace('_', ' ')})" for each in publishers)
    found = f"{topic}: {kinds[0]} from {said}"
    if len(publishers) > 1:
        return Check("image topic", "WARN", found, "two publishers on one topic: stamps will jump; remap one of them")
    return Check("image topic", "OK", found)


def check_received(facts: Facts) -> Check:
    """facts: of probe_image. Any image, and one that the node can read."""
    if not facts.get("received"):
        fix = (
            "is the camera running? Large images (above 0.5 MB) vanish without the Fast DDS profile in the process of"
            " the camera driver: see Fast DDS profile, /dev/shm, socket buffers"
        )
        return Check("images", "FAIL", f"none received in {facts.get('seconds', PATIENCE):.0f} s", fix)
    if facts.get("image_error"):
        return Check("images", "FAIL", facts.get("image_error"), "correct the camera driver")
    size = facts.get("size")
    if size is None:
        return Check("images", "FAIL", f"not decoded: {facts.failure or 'no answer'}", "correct the camera driver")
    found = f"{size[0]}x{size[1]} {facts.get('encoding')}, {facts.get('bytes') / 1e6:.1f} MB"
    if min(size) < 32:
        return Check("images", "FAIL", found, "the network needs 32x32 pixels or more")
    return Check("images", "OK", found)


def check_stamp(facts: Facts) -> Check:
    """facts: of probe_image."""
    stamp, age = facts.get("stamp", 0.0), facts.get("now", 0.0) - facts.get("stamp", 0.0)
    if stamp == 0:
        return Check("stamps", "FAIL", "0: each image counts as the same one", "let the camera driver set header.stamp")
    if abs(age) > OLD_STAMP:
        fix = "synchronise the clocks (chrony), or set use_sim_time where a bag or a simulation plays"
        return Check("stamps", "WARN", f"{age:.1f} s old on arrival", fix)
    found = f"{1e3 * age:.0f} ms old on arrival, frame '{facts.get('frame_id')}'"
    if not facts.get("frame_id"):
        return Check("stamps", "WARN", found, "let the camera driver set header.frame_id")
    return Check("stamps", "OK", found)


def check_camera_info(facts: Facts) -> Check:
    """facts: of probe_image."""
    topic = facts.get("camera_info_topic")
    if not facts.get("camera_info"):
        fix = f"publish {topic}, or remap camera_info: without it matches are verified on distorted pixels"
        return Check("calibration", "WARN", f"nothing received on {topic}", fix)
    if facts.get("calibration_error"):
        fix = "calibrate (camera_calibration), or correct the driver's calibration file"
        return Check("calibration", "WARN", f"{topic} cannot be used: {facts.get('calibration_error')}", fix)
    return Check("calibration", "OK", f"{topic}: {facts.get('calibration')}")


# What follows finds facts. ----------------------------------------------------------------------------------------


def _probe(request: Request, environment: Mapping[str, str]) -> dict[str, Facts]:
    """All probes by name; those of what was not asked for are empty."""
    asked = bool(request.params_file)
    parameters = run_probe("parameters", request.params_file, timeout=PROBE_TIMEOUT) if asked else Facts()
    device = request.device or parameters.get("device") or "auto"
    weights = request.weights or parameters.get("weights") or "lite"
    jobs: dict[str, tuple[str, ...]] = {"torch": (device,), "opencv": (), "cv_bridge": (), "weights": (weights,)}
    jobs["ros"] = ()
    if request.image:
        jobs["image"] = (request.image, str(PATIENCE))
    with ThreadPoolExecutor(max_workers=3) as pool:
        found = pool.map(lambda job: run_probe(job[0], *job[1], timeout=PROBE_TIMEOUT), jobs.items())
        return {"parameters": parameters, "image": Facts(), **dict(zip(jobs, found, strict=True))}


def _unusable(name: str, facts: Facts, fix: str) -> Check:
    """What cannot be imported, or died of it."""
    found = f"no module '{facts.missing}' for {sys.executable}" if facts.missing else facts.failure or "wrong result"
    return Check(name, "FAIL", found, fix)


def _driver() -> str:
    """Version of the NVIDIA driver of this machine, read where the kernel module says it; empty without one."""
    text = _text("/proc/driver/nvidia/version")
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else "of a Jetson" if Path("/etc/nv_tegra_release").exists() else ""


def _available_memory() -> int | None:
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"))
    return int(found.group(1)) << 10 if found else None


def _installed(environment: Mapping[str, str]) -> list[str]:
    """The RMW implementations in the ament index."""
    prefixes = [Path(prefix) for prefix in environment.get("AMENT_PREFIX_PATH", sys.prefix).split(os.pathsep) if prefix]
    folders = [prefix / "share/ament_index/resource_index/rmw_typesupport" for prefix in prefixes]
    names = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}
    return sorted(names - {"rmw_implementation"})


def _shared_memory() -> tuple[int, int] | None:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return usage.total, usage.free


def _segment_size(path: Path) -> int | None:
    """Bytes of the largest shared-memory segment in a profile, 0 without any; None where it cannot be read."""
    try:
        sizes = [
            element.text or "" for element in ElementTree.parse(path).iter() if _local(element.tag) == "segment_size"
        ]
    except (OSError, ElementTree.ParseError):
        return None
    return max((int(size) for size in sizes if size.strip().isdecimal()), default=0)


def _local(tag: str) -> str:
    """An XML name without its name space."""
    return tag.rpartition("}")[2]


def _numbers(version: str) -> tuple[int, ...]:
    """A version to compare; one without numbers counts as new enough."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) or (sys.maxsize,)


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
