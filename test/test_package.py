"""The package as a whole: what several files say about the same thing, and how set-up fails."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

import pytest

import scfeat_core

LARGEST_FILE = 2 * 2**20


def git_files(repository: Path) -> list[Path]:
    if not (repository / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: which files belong to the source is not known")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    return [repository / name for name in listed.split("\0") if name and (repository / name).is_file()]


def imported_modules(path: Path) -> Iterator[str]:
    """All modules that a source file names in an import statement, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_one_version(repository: Path) -> None:
    project = re.search(r'^version = "(.+)"$', (repository / "pyproject.toml").read_text(), re.MULTILINE)
    newest = re.search(r"^(\d+\.\d+\.\d+)\b.*\n-+$", (repository / "CHANGELOG.rst").read_text(), re.MULTILINE)
    assert project and newest, "no version in pyproject.toml or CHANGELOG.rst"
    versions = {
        "package.xml": ElementTree.parse(repository / "package.xml").findtext("version"),
        "pyproject.toml": project[1],
        "CHANGELOG.rst": newest[1],
        "scfeat_core": scfeat_core.__version__,
    }
    assert len(set(versions.values())) == 1, versions


def test_message_packages_are_declared_where_they_are_used(repository: Path) -> None:
    used = set()
    for path in (repository / "scfeat_ros").rglob("*.py"):
        used |= set(re.findall(r"^ *from (\w+_(?:msgs|interfaces))\.", path.read_text(), re.MULTILINE))
    package = ElementTree.parse(repository / "package.xml").getroot()
    declared = {node.text or "" for kind in ("depend", "exec_depend") for node in package.iterfind(kind)}
    optional = {"foxglove_msgs", "rtabmap_msgs"}  # whoever wants them has them
    assert {name for name in declared if name.endswith(("_msgs", "_interfaces"))} == used - optional


def test_pip_distribution_is_not_named_like_the_messages(repository: Path) -> None:
    """pip would take the metadata of the generated messages for an older version of it, and delete them."""
    name = re.search(r'^name = "(.+)"$', (repository / "pyproject.toml").read_text(), re.MULTILINE)
    assert name and name[1] != ElementTree.parse(repository / "package.xml").findtext("name")


def test_every_message_is_generated(repository: Path) -> None:
    listed = re.findall(r'"(msg/\w+\.msg)"', (repository / "CMakeLists.txt").read_text())
    assert sorted(listed) == sorted(f"msg/{path.name}" for path in (repository / "msg").iterdir())


@pytest.mark.parametrize("name", ["Features", "FrontendStatus", "Matches", "Tracks", "TwoViewGeometry"])
def test_every_field_of_a_message_is_explained(repository: Path, name: str) -> None:
    lines = (repository / "msg" / f"{name}.msg").read_text().splitlines()
    assert lines[0].startswith("# "), "says first what it is"
    silent = [line for line in lines if line and "#" not in line]
    assert not silent


def test_installed_messages_are_those_of_the_source(repository: Path) -> None:
    messages = pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")
    for path in (repository / "msg").iterdir():
        text = re.sub(r"#.*", "", path.read_text())
        fields = re.findall(r"^[\w/]+(?:\[\d*\])? +(\w+) *$", text, re.MULTILINE)
        assert list(getattr(messages, path.stem).get_fields_and_field_types()) == fields, path.name


def test_core_never_imports_ros(repository: Path) -> None:
    ros = {
        "rclpy",
        "scfeat",
        "scfeat_ros",
        "sensor_msgs",
        "std_msgs",
        "launch",
        "ament_index_python",
        "rosidl_runtime_py",
    }
    files = sorted((repository / "scfeat_core").rglob("*.py"))
    assert len(files) > 10
    offenders = {
        str(path): found for path in files if (found := ros & {n.split(".")[0] for n in imported_modules(path)})
    }
    assert not offenders


def test_core_is_quick_to_import() -> None:
    """The command's help must not wait for torch."""
    code = "import sys, scfeat_core, scfeat_core.cli; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_launch_files_compile(repository: Path) -> None:
    files = list((repository / "launch").glob("*.launch.py"))
    assert repository / "launch" / "frontend.launch.py" in files
    for path in files:
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert "generate_launch_description" in names, path


def test_executable_starts_the_node(repository: Path) -> None:
    script = repository / "scripts" / "frontend"
    assert script.stat().st_mode & stat.S_IXUSR
    assert script.read_text().startswith("#!/usr/bin/env python3\n")
    assert "scfeat_ros.node" in set(imported_modules(script))


def test_no_large_files(repository: Path) -> None:
    large = {
        str(path.relative_to(repository)): path.stat().st_size
        for path in git_files(repository)
        if path.stat().st_size > LARGEST_FILE and path.suffix != ".safetensors"
    }
    assert not large


def test_no_setup_cfg(repository: Path) -> None:
    """ament_python_install_package would take it for each of the two packages."""
    assert not (repository / "setup.cfg").exists()


def test_locks_hold_what_they_are_made_from(repository: Path) -> None:
    for source in (repository / "requirements").glob("*.in"):
        lines = [line.partition("#")[0].strip() for line in source.read_text().splitlines()]
        lines = [line for line in lines if line and not line.startswith("-")]
        wanted = re.findall(r"^([\w-]+)(?:\[\w+\])?(==[\w.]+)?$", "\n".join(lines), re.MULTILINE)
        pinned = dict(re.findall(r"^([\w-]+)==(\S+)", source.with_suffix(".txt").read_text().lower(), re.MULTILINE))
        assert wanted and len(wanted) == len(lines), source.name
        for name, version in wanted:
            if name != "torch":
                assert name.lower() in pinned, f"{source.name}: {name}; run make lock"
                assert version in ("", f"=={pinned[name.lower()]}"), f"{source.name}: {name}; run make lock"


def test_setup_pins_the_torch_that_the_lock_was_made_with(repository: Path) -> None:
    pinned = re.search(r"^torch==(.+)$", (repository / "requirements" / "dev.in").read_text(), re.MULTILINE)
    assert pinned and f"\nTORCH={pinned[1]}\n" in (repository / "tools" / "setup").read_text()


class TestSetup:
    """tools/setup on machines that lack something: the tools it sees are links in a folder that is all of PATH."""

    TOOLS = ("bash", "env", "cat", "cut", "dirname", "uname", "sha256sum", "head")

    def run(self, repository: Path, folder: Path, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        folder.mkdir()
        for tool in (*self.TOOLS, *more):
            found = shutil.which(tool)
            assert found, f"this test needs {tool}"
            (folder / tool).symlink_to(found)
        environment = {
            "PATH": str(folder),
            "HOME": os.environ.get("HOME", "/"),
            "VENV": str(folder / "venv"),
            **variables,
        }
        return subprocess.run(
            [repository / "tools" / "setup"], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def test_no_python(self, repository: Path, tmp_path: Path) -> None:
        result = self.run(repository, tmp_path / "bin")
        assert result.returncode == 1
        assert "no Python 3.10 to 3.13 was found" in result.stderr
        assert "apt-get install python3" in result.stderr

    def test_unsuitable_python(self, repository: Path, tmp_path: Path) -> None:
        result = self.run(repository, tmp_path / "bin", PYTHON="no-such-python")
        assert result.returncode == 1
        assert "PYTHON=no-such-python is not a Python 3.10 to 3.13" in result.stderr

    def test_no_compiler(self, repository: Path, tmp_path: Path) -> None:
        result = self.run(repository, tmp_path / "bin", PYTHON=sys.executable)
        assert result.returncode == 1
        assert "no C compiler: gcc" in result.stderr
        assert "apt-get install gcc" in result.stderr
        assert not (tmp_path / "bin" / "venv").exists()

    def test_no_cxx_compiler(self, repository: Path, tmp_path: Path) -> None:
        result = self.run(repository, tmp_path / "bin", "gcc", PYTHON=sys.executable)
        assert result.returncode == 1
        assert "no C++ compiler: g++" in result.stderr

    def test_unknown_distribution(self, repository: Path, tmp_path: Path) -> None:
        result = self.run(repository, tmp_path / "bin", PYTHON=sys.executable, ROS_DISTRO="foxy")
        assert result.returncode == 1
        assert "no ROS 2 wheels of 'foxy'" in result.stderr


def test_metadata_builds(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """setup.py finds both packages and the files that belong to them."""
    import setuptools

    given: dict[str, object] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(repository)
    spec = spec_from_file_location("scfeat_setup", repository / "setup.py")
    assert spec and spec.loader
    spec.loader.exec_module(module_from_spec(spec))
    assert {"scfeat_core", "scfeat_core.network", "scfeat_ros"} <= set(given["packages"])
    data = dict(given["data_files"])
    assert {"config/frontend.yaml", "config/fastdds.xml"} <= set(data["share/scfeat/config"])
    assert "launch/frontend.launch.py" in data["share/scfeat/launch"]
    core = repository / "scfeat_core"
    files = {path.name for pattern in given["package_data"]["scfeat_core"] for path in core.glob(pattern)}
    assert {"lite.safetensors", "lite.md", "py.typed"} <= files
