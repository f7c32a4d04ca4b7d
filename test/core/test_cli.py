from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from scfeat_core import cli
from scfeat_core.errors import ConfigError


class TestDispatcher:
    def test_help_teaches_every_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert all(name in text and command.summary[:20] in text for name, command in cli.COMMANDS.items())
        assert "scfeat demo --bag" in text

    def test_runs_as_a_process_without_importing_torch(self) -> None:
        code = (
            "import sys; from scfeat_core import cli\n"
            "try: cli.main(['--help'])\n"
            "except SystemExit: pass\n"
            "sys.exit(3 if 'torch' in sys.modules else 0)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("usage: scfeat")

    @pytest.mark.parametrize("words", [["dance"], []])
    def test_wrong_command(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        assert "COMMAND" in capsys.readouterr().err

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_every_command_exists_and_has_help(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        if name == "demo":
            pytest.importorskip("rclpy", reason="scfeat demo needs ROS 2: run `make setup`")
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0
        assert f"scfeat {name}" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("error", "status", "text"),
        [
            (ConfigError("expected a, found b: do c"), 2, "scfeat fake: error: expected a, found b: do c\n"),
            (KeyboardInterrupt(), 130, "scfeat fake: interrupted\n"),
            (ModuleNotFoundError("No module named 'lute'", name="lute"), 2, "pip install lute-strings\n"),
        ],
    )
    def test_errors_become_one_line_and_a_status(
        self,
        error: BaseException,
        status: int,
        text: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.install(monkeypatch, tmp_path, "raise ERROR")
        import scfeat_fake_command

        scfeat_fake_command.ERROR = error
        assert cli.main(["fake"]) == status
        written = capsys.readouterr().err
        assert written.endswith(text)
        assert written.count("\n") == 1

    def test_a_bug_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.install(monkeypatch, tmp_path, "import scfeat_core.no_such_module")
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            cli.main(["fake"])

    def test_status_of_the_command_is_passed_on(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.install(monkeypatch, tmp_path, "return args.status")
        assert cli.main(["fake", "--status", "7"]) == 7

    @staticmethod
    def install(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
        """A sub-command of its own for one test."""
        source = (
            "ERROR = None\n"
            "def add_arguments(parser): parser.add_argument('--status', type=int)\n"
            f"def run(args):\n    {body}\n"
        )
        (folder / "scfeat_fake_command.py").write_text(source)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "scfeat_fake_command", raising=False)
        command = cli.Command("scfeat_fake_command", "do something", "pip install lute-strings")
        monkeypatch.setitem(cli.COMMANDS, "fake", command)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Coloured squares of many sizes: something to find keypoints on."""
    rng = np.random.default_rng(5)
    image = np.full((160, 200, 3), 90, np.uint8)
    for _ in range(60):
        corner = rng.integers([0, 0], [180, 140])
        size = rng.integers(6, 30, 2)
        cv2.rectangle(image, corner, corner + size, tuple(int(c) for c in rng.integers(0, 256, 3)), -1)
    path = tmp_path / "squares.png"
    assert cv2.imwrite(str(path), image)
    return path


@pytest.mark.filterwarnings("ignore:.*random.*")
class TestImages:
    """extract and match on a labelled random network: the plumbing, not the quality."""

    def test_extract(self, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = tmp_path / "out"
        words = ["extract", str(picture), "-o", str(output), "--weights", "random", "--max-keypoints", "50"]
        assert cli.main(words) == 0
        with np.load(output / "squares.png.npz") as stored:
            count = len(stored["keypoints"])
            assert 0 < count <= 50
            assert stored["keypoints"].shape == (count, 2)
            assert stored["descriptors"].shape[0] == stored["scores"].shape[0] == count
            assert tuple(stored["image_size"]) == (200, 160)
            assert str(stored["descriptor_space"]) == "scfeat:random"
        assert f"{count} keypoints" in capsys.readouterr().out

    def test_match_of_an_image_with_itself(
        self, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "new" / "matches.png"
        assert cli.main(["match", str(picture), str(picture), "-o", str(output), "--weights", "random"]) == 0
        drawn = cv2.imread(str(output))
        assert drawn is not None and drawn.shape == (160, 400, 3)
        assert "matches" in capsys.readouterr().out

    def test_match_takes_the_options_of_the_extractor(
        self, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["match", str(picture), str(picture), "-o", str(tmp_path / "m.png"), "--weights", "random"]
        assert cli.main([*command, "--set", "max_edge=100", "--set", "max_keypoints=7"]) == 0
        assert capsys.readouterr().out.startswith("7 and 7 keypoints")
        assert cli.main([*command, "--set", "engine=onx"]) == 2
        assert "did you mean 'onnx'" in capsys.readouterr().err

    def test_refuses_what_would_overwrite_itself(self, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
        twin = picture.parent / "sub" / picture.name
        assert cli.main(["extract", str(picture), str(twin)]) == 2
        assert "overwrite each other: squares.png.npz" in capsys.readouterr().err

    def test_missing_and_damaged_images(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        damaged = tmp_path / "damaged.png"
        damaged.write_bytes(b"not a picture")
        for path, text in ((tmp_path / "none.png", "found no file at"), (damaged, "damaged, or of an unknown format")):
            assert cli.main(["extract", str(path), "-o", str(tmp_path), "--weights", "random"]) == 2
            assert text in capsys.readouterr().err

    def test_missing_weights(self, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        absent = tmp_path / "absent.safetensors"
        assert cli.main(["extract", str(picture), "-o", str(tmp_path), "--weights", str(absent)]) == 2
        assert "absent.safetensors" in capsys.readouterr().err
