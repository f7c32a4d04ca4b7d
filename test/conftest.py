"""Fixtures for all tests: real data, and a ROS graph of one's own for each test.

Every test on the live graph has its own domain id, stays on this host, and has its own rclpy context, spun by the test
itself. Discovery is not symmetric, so "wait for a match, then publish once" loses messages: ``ros.pump`` sends again
until the first answer. Nothing here imports rclpy before a test asks for it: the core tests run without ROS.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from scfeat_ros.domain import free_domain
from scfeat_ros.fastdds import profile_environment
from scfeat_ros.processes import Child

ROOT = Path(__file__).resolve().parent.parent
NO_ROS = "rclpy is not installed: run `make setup`, or source a ROS 2 installation"
NO_MESSAGES = "the scfeat messages are not built: run `make setup`, or colcon build and source install/setup.bash"
T = TypeVar("T")


def _prepare_environment() -> None:
    """Before the first participant of the process, as Fast DDS reads its profile only once."""
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_LOCALHOST_ONLY"] = "1"  # what Humble knows
    os.environ.setdefault("ROS_LOG_DIR", tempfile.mkdtemp(prefix="scfeat-test-log-"))
    os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
    for name, value in profile_environment().items():
        os.environ.setdefault(name, value)


_prepare_environment()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with train/, eval/ and bag/: $SCFEAT_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("SCFEAT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} does not exist; set SCFEAT_DATA to the folder with eval/, train/ and bag/")
    return folder


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A ROS_DOMAIN_ID that no other test or demo on this machine uses while this one runs."""
    with free_domain() as number:
        monkeypatch.setenv("ROS_DOMAIN_ID", str(number))
        yield number


class Ros:
    """A context of its own in the test's domain, with one single-threaded executor that the test spins."""

    def __init__(self, domain: int) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.executor = SingleThreadedExecutor(context=self.context)
        self._nodes: list[Any] = []

    def create_node(self, name: str = "test", **kwargs: Any) -> Any:
        """A plain rclpy node on the executor; destroyed at the end of the test."""
        import rclpy

        return self.add_node(rclpy.create_node(name, context=self.context, **kwargs))

    def add_node(self, node: Any) -> Any:
        """Take over a node that the test made with ``context=ros.context``."""
        self._nodes.append(node)
        self.executor.add_node(node)
        return node

    def spin_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.executor.spin_once(timeout_sec=min(left, 0.02))

    def spin_until(self, condition: Callable[[], T], timeout: float = 20.0, what: str = "the condition") -> T:
        """Spin until ``condition()`` is true and return its value; fail after ``timeout`` seconds."""
        return self.pump(lambda: None, condition, timeout=timeout, what=what)

    def pump(
        self,
        send: Callable[[], object],
        condition: Callable[[], T],
        period: float = 0.1,
        timeout: float = 20.0,
        what: str = "an answer",
    ) -> T:
        """Call ``send()`` every ``period`` seconds, spinning in between, until ``condition()`` is true."""
        end = time.monotonic() + timeout
        next_send = 0.0
        while not (value := condition()):
            now = time.monotonic()
            assert now < end, f"waited {timeout:g} s for {what}"
            if now >= next_send:
                send()
                next_send = now + period
            self.executor.spin_once(timeout_sec=0.01)
        return value

    def call(self, client: Any, request: Any, again: bool = False, timeout: float = 90.0) -> Any:
        """The answer of a service.

        A node that does not know yet who asks loses its answer. So what is asked of it first must be something that
        may be asked ``again``: it is, every two seconds, until there is an answer. The node then knows the clients
        that were created before this one, too. (A transition that is refused will not do: Jazzy does not answer it.)
        """
        self.spin_until(client.service_is_ready, timeout, client.srv_name)
        asked: list[Any] = []

        def ask() -> None:
            if again or not asked:
                asked.append(client.call_async(request))

        answered = lambda: [future for future in asked if future.done()]  # noqa: E731
        return self.pump(ask, answered, period=2.0, timeout=timeout, what=f"an answer of {client.srv_name}")[0].result()

    def close(self) -> None:
        self.executor.shutdown()
        for node in reversed(self._nodes):
            node.destroy_node()
        self.context.try_shutdown()


@pytest.fixture
def ros(domain: int) -> Iterator[Ros]:
    """A live ROS graph of this test alone (see Ros); needs rclpy and the built messages."""
    pytest.importorskip("rclpy", reason=NO_ROS)
    pytest.importorskip("scfeat.msg", reason=NO_MESSAGES)
    graph = Ros(domain)
    yield graph
    graph.close()


class Process(Child):
    """A child process whose output (stdout and stderr together) a test can read."""

    @property
    def output(self) -> str:
        """What the process has written so far."""
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.exit_code is None

    @property
    def popen(self) -> subprocess.Popen[bytes]:
        """For signals."""
        return self._popen

    def wait(self, timeout: float) -> int:
        """The exit status; fails, with the output so far, where the process runs longer than ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while (code := self.exit_code) is None:
            assert time.monotonic() < end, f"{self.name} ran longer than {timeout:g} s; its output:\n{self.output}"
            time.sleep(0.02)
        return code


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """``spawn([sys.executable, "-m", "scfeat_ros.node", …], VARIABLE="value")``: a process that ends with the test.

    It inherits the environment of the test (with ``ros`` or ``domain`` also the domain) and finds the source tree.
    """
    processes: list[Process] = []

    def start(command: Sequence[str | Path], **variables: str) -> Process:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **variables}
        words = [str(word) for word in command]
        processes.append(Process(" ".join(words), words, tmp_path / f"{len(processes)}.log", environment))
        return processes[-1]

    yield start
    for process in processes:
        process.stop()
