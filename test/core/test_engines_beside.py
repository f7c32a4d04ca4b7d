"""Engines that are made while images go on: in a thread, and what takes long in a process of its own."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scfeat_core.engines import create_engine, parity
from scfeat_core.engines.cache import Cache
from scfeat_core.engines.checked import CheckedEngine
from scfeat_core.engines.contract import Engine, Maps, Runner, Target
from scfeat_core.engines.elsewhere import Beside, OtherProcess, Stopped
from scfeat_core.engines.making import Candidate, Made, Recipe
from scfeat_core.extraction import Extractor
from scfeat_core.frontend import Frontend, FrontendConfig
from scfeat_core.network.model import SCFeat

CPU = torch.device("cpu")
PATIENCE = 300.0  # seconds: what makes engines has a low priority, and a busy machine little left for it


@pytest.fixture(scope="module")
def model() -> SCFeat:
    return SCFeat.from_pretrained("lite")


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    gc.collect()
    assert request.session.testsfailed > failed or not (making() or children())


def making() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "scfeat-engine"]


def children() -> list[str]:
    """Processes of this one that make engines."""
    return [path.name for path in Path("/proc").iterdir() if path.name.isdecimal() and _makes_for_us(path)]


def _makes_for_us(process: Path) -> bool:
    try:
        parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[1]
        return int(parent) == os.getpid() and b"engines.elsewhere" in process.joinpath("cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def given(*shape: int) -> Tensor:
    return parity.parity_input((shape[0], 3, *shape[1:]), CPU)


def until(condition: Callable[[], object], step: Callable[[], object] = lambda: None) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        step()
        time.sleep(0.02)


class Gate:
    """Builds what ``give`` returns, once it is opened."""

    def __init__(self, give: Callable[[Target], Runner] = lambda target: target.run) -> None:
        self.open = threading.Event()
        self.asked: list[tuple[int, ...]] = []
        self._give = give

    def __call__(self, target: Target, image: Tensor, cache: Cache) -> Runner:
        self.asked.append((image.shape[3], image.shape[2]))
        assert self.open.wait(PATIENCE)
        return self._give(target)


def beside(build, model: SCFeat, precision: str = "float32") -> CheckedEngine:
    eager, reference = create_engine("eager", model, precision=precision), create_engine("eager", model)
    target = Target(nn.Identity(), eager.run, CPU, precision, "own")
    place: Beside[Made] = Beside()
    recipe = Recipe(target, eager.run, reference.run, Cache(None, place.workshop), "exact")
    return CheckedEngine("own", [Candidate("own", build)], recipe, place)


def serve(engine: Engine, image: Tensor) -> None:
    """Images of one size until something else than eager runs them, or never will."""
    engine.run(image)
    until(lambda: not engine.making, lambda: engine.run(image))
    engine.run(image)


def state(engine: Engine) -> tuple[str, str, str]:
    """What ran and in which precision; why it was not what was asked for, or what is being made."""
    assert not (engine.note and engine.making), "to wait for something is no error"
    return engine.name, engine.precision, engine.note or engine.making


# -- the stream goes on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_eager_runs_until_the_engine_is_there(name, model, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime"}.get(name, name), reason=f"pip install 'scfeat-python[{name}]'")
    engine = create_engine(name, model, build="beside", cache=Cache(tmp_path))
    image, other = given(1, 96, 128), given(2, 75, 101)
    expected = create_engine("eager", model).run(image)
    assert state(engine) == (name, "float32", "")
    assert all(map(torch.equal, engine.run(image), expected)), "eager, at once"
    note = f"{name} for 1 image(s) of 128x96 is being made; eager meanwhile"
    assert state(engine) == ("eager", "float32", note)
    serve(engine, image)
    assert state(engine) == (name, "float32", "") and not making()
    now = create_engine(name, model, cache=Cache(tmp_path)).run(image)
    assert all(map(torch.equal, engine.run(image), now)), "the same engine as one that is made at once"

    engine.run(other)
    assert engine.name == "eager" and "2 image(s) of 101x75" in engine.making and not engine.note
    engine.run(image)
    assert engine.name == name, "what is there goes on"
    serve(engine, other)
    assert state(engine) == (name, "float32", "")
    assert parity.suffices(parity.compare(engine.run(other), create_engine("eager", model).run(other)))
    engine.close()


def test_one_is_made_at_a_time_and_taken_between_two_images(model):
    gate = Gate()
    engine = beside(gate, model)
    for size in ((32, 32), (32, 40), (32, 32), (32, 48)):
        engine.run(given(1, *size))
    until(lambda: gate.asked)
    assert gate.asked == [(32, 32)] and len(making()) == 1
    gate.open.set()
    serve(engine, given(1, 32, 32))
    engine.run(given(1, 32, 40))
    assert state(engine) == ("eager", "float32", "own for 1 image(s) of 40x32 is being made; eager meanwhile")
    serve(engine, given(1, 32, 40))
    assert gate.asked == [(32, 32), (40, 32)] and engine.note == engine.making == ""
    engine.close()


def test_what_cannot_be_made_or_deviates_is_refused_as_ever(model):
    def refuses(target, image, cache):
        raise RuntimeError("no kernel for\nthis operation")

    def deviates(target, image, cache):
        return lambda image: tuple(map_.roll(3, -1) for map_ in target.run(image))

    for build, words in ((refuses, "RuntimeError: no kernel for this operation"), (deviates, "deviates from float32")):
        engine = beside(build, model)
        image = given(1, 96, 128)
        serve(engine, image)
        assert engine.name == "eager" and words in engine.note and not engine.making
        assert engine.note.endswith("; eager in float32 is used instead")
        engine.run(given(1, 64, 64))
        assert not making(), "it is not tried again"


def test_an_engine_that_fails_while_another_is_made_is_left(model):
    def breaks(target: Target) -> Runner:
        runs: list[Tensor] = []

        def run(image: Tensor) -> Maps:
            runs.append(image)
            if len(runs) == 3:  # after the comparison and one image
                raise RuntimeError("device lost")
            return target.run(image)

        return run

    gate = Gate(breaks)
    gate.open.set()
    engine, image = beside(gate, model), given(1, 32, 32)
    serve(engine, image)
    gate.open.clear()
    engine.run(given(1, 32, 40))
    engine.run(image)
    note = "own failed: RuntimeError: device lost; eager in float32 is used instead"
    assert state(engine) == ("eager", "float32", note)
    gate.open.set()
    until(lambda: not making())
    engine.run(given(1, 32, 40))
    assert engine.name == "eager" and "device lost" in engine.note
    engine.close()


def test_a_precision_is_used_only_once_it_was_compared(model):
    gate = Gate()
    engine = beside(gate, model, "bfloat16")
    image = given(1, 96, 128)
    exact, half = (create_engine("eager", model, precision=each).run(image) for each in ("float32", "bfloat16"))
    assert all(map(torch.equal, engine.run(image), exact)) and engine.precision == "float32"
    gate.open.set()
    serve(engine, image)
    assert engine.precision == "bfloat16" and all(map(torch.equal, engine.run(image), half))
    other = given(1, 64, 64)
    gate.open.clear()
    engine.run(other)
    assert state(engine)[:2] == ("eager", "bfloat16")
    gate.open.set()
    engine.close()


def test_what_has_to_run_alone_waits_for_the_image_in_work_and_the_next_one_for_it(model):
    running, overlaps = threading.Event(), []
    eager = create_engine("eager", model)

    def slow(image: Tensor) -> Maps:
        running.set()
        time.sleep(0.02)
        maps = eager.run(image)
        running.clear()
        return maps

    def build(target: Target, image: Tensor, cache: Cache) -> Runner:
        for _ in range(20):
            overlaps.append(running.is_set())
            time.sleep(0.005)
        return eager.run

    place: Beside[Made] = Beside()
    target = Target(nn.Identity(), slow, CPU, "float32", "own")
    recipe = Recipe(target, slow, eager.run, Cache(None, place.workshop), "exact")
    engine = CheckedEngine("own", [Candidate("own", build, alone=True)], recipe, place)
    serve(engine, given(1, 32, 32))
    assert overlaps and not any(overlaps)


def test_features_are_those_of_the_engine_once_it_is_there(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="pip install 'scfeat-python[onnx]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    picture = parity.rendered_images(1, 96, 128)[0]
    extractor = Extractor(max_keypoints=100, levels=2, engine="onnx", build_engines="beside")
    plain = Extractor(max_keypoints=100, levels=2)(picture)
    np.testing.assert_array_equal(extractor(picture).keypoints, plain.keypoints)
    until(lambda: not extractor.engine_making, lambda: extractor(picture))
    assert extractor.engine_note == ""
    expected = Extractor(max_keypoints=100, levels=2, engine="onnx")(picture)
    found = extractor(picture)
    np.testing.assert_array_equal(found.keypoints, expected.keypoints)
    np.testing.assert_array_equal(found.descriptors, expected.descriptors)
    extractor.close()


@pytest.mark.parametrize("name", ["cuda_graph", "compile", "auto"])
def test_on_cuda_images_go_on_while_it_is_made(name, model, tmp_path):
    """A graph is recorded in the thread, while this one has matches and downloads in work, but no network."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    engine = create_engine(name, model, "cuda", build="beside", cache=Cache(tmp_path))
    eager = create_engine("eager", model, "cuda")
    for size in ((1, 96, 128), (2, 75, 101)):
        image = given(*size).cuda()
        expected = eager.run(image)
        points = torch.rand(1000, 64, device="cuda")

        def step(image: Tensor = image, expected: Maps = expected, points: Tensor = points) -> None:
            assert parity.suffices(parity.compare(engine.run(image), expected))
            assert (points @ points.T).argmax(1).cpu().shape == (1000,)

        step()
        until(lambda: not engine.making, step)
        step()
        assert engine.note == "" and (engine.name == name or name == "auto")
    engine.close()


def test_eager_in_a_precision_is_compared_while_float32_runs(model):
    engine = create_engine("eager", model, precision="bfloat16", build="beside", cache=Cache(None))
    image = given(1, 96, 128)
    engine.run(image)
    note = "bfloat16 is being compared with float32, which runs meanwhile"
    assert state(engine) == ("eager", "float32", note)
    serve(engine, image)
    assert state(engine) == ("eager", "bfloat16", "")
    engine.close()


# -- the end -----------------------------------------------------------------------------------------------------------


def takes_forever(target: Target, image: Tensor, cache: Cache) -> Runner:
    cache.get("endless", {}, partial(time.sleep, 1e6))  # type: ignore[arg-type]
    raise AssertionError


def test_closing_ends_what_is_being_made(model):
    engine = beside(takes_forever, model)
    engine.run(given(1, 32, 32))
    until(children)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 10 and not making() and not children()
    engine.run(given(1, 32, 32))
    assert state(engine) == ("eager", "float32", "") and not making()


def test_an_engine_that_is_dropped_ends_what_it_makes(model):
    engine = beside(takes_forever, model)
    engine.run(given(1, 32, 32))
    until(children)
    del engine
    gc.collect()
    assert not making() and not children()


def test_an_engine_that_is_collected_in_the_thread_that_makes_it_ends(model, capfd):
    """Garbage is collected in any thread: there nothing can be waited for."""
    gate = Gate()

    def build(target: Target, image: Tensor, cache: Cache) -> Runner:
        runner = gate(target, image, cache)
        gc.collect()
        return runner

    cycle = [beside(build, model)]
    cycle[0].run(given(1, 32, 32))
    cycle.append(cycle)  # type: ignore[arg-type]
    gc.disable()
    try:
        del cycle
        gate.open.set()
        until(lambda: not making())
    finally:
        gc.enable()
    assert "cannot join" not in capfd.readouterr().err


def test_what_is_stopped_while_its_process_starts_ends(monkeypatch):
    workshop, started = OtherProcess(), subprocess.Popen

    def collected_meanwhile(*arguments, **options):
        workshop.stop()  # as a finaliser would, in this thread
        return started(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", collected_meanwhile)
    with pytest.raises(Stopped):
        workshop.make(partial(time.sleep, 1e6))  # type: ignore[arg-type]


def test_closing_does_not_wait_for_another_process_that_makes_the_entry(model, tmp_path):
    first, second = OtherProcess(), OtherProcess()
    stopped = []

    def get(workshop: OtherProcess) -> None:
        try:
            Cache(tmp_path, workshop).get("endless", {}, partial(time.sleep, 1e6))  # type: ignore[arg-type]
        except Stopped:
            stopped.append(workshop)

    threads = [threading.Thread(target=get, args=[each]) for each in (first, second)]
    threads[0].start()
    until(children)
    threads[1].start()
    time.sleep(0.3)
    second.stop()
    threads[1].join(5)
    assert stopped == [second] and len(children()) == 1
    first.stop()
    threads[0].join(5)
    assert stopped == [second, first]
    with pytest.raises(Stopped):
        first.make(partial(bytes, 3))


ENDS = """
import sys, time
from scfeat_core.engines import parity
from scfeat_core.extraction import Extractor
from scfeat_core.engines import elsewhere
extractor = Extractor("random", engine="{engine}", levels=1, build_engines="beside")
image = parity.rendered_images(1, 96, 128)[0]
extractor(image)
while extractor._engine._beside.workshop._process is None: time.sleep(0.01)
print(extractor.engine_making, extractor._engine._beside.workshop._process.pid, flush=True)
{then}
"""


@pytest.mark.parametrize("then", ["sys.exit(3)", "time.sleep(100)"])
def test_the_end_of_the_process_ends_what_it_makes(then, tmp_path):
    """compile takes long enough to be met at it."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = ENDS.format(engine="compile", then=then)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    *words, pid = process.stdout.readline().split()
    assert " ".join(words) == "compile for 1 image(s) of 128x96 is being made; eager meanwhile"
    if "sleep" in then:
        process.send_signal(signal.SIGKILL)
    assert process.wait(30) == (-signal.SIGKILL if "sleep" in then else 3)
    until(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text())
    assert not list((tmp_path / "scfeat").glob("*.pt2")), "nothing that is half made"


def test_a_closed_front_end_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    frontend = Frontend(FrontendConfig(engine="compile"), build_engines="beside")
    frontend.warm_up()
    assert (frontend.extractor.engine, frontend.extractor.engine_note) == ("compile", ""), "for no size that comes"
    frontend.process(parity.rendered_images(1, 96, 128)[0], 0)
    assert "compile for 1 image(s) of 128x96 is being made" in frontend.extractor.engine_making
    until(children)
    frontend.close()
    assert not making() and not children()


# -- the other process -------------------------------------------------------------------------------------------------


NOISY = """(
    __import__('os').write(1, b'noise'),
    f"{__import__('torch').get_num_threads()} {__import__('os').nice(0)}".encode(),
)[1]"""


def test_the_other_process_has_the_same_threads_and_a_low_priority():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        said = OtherProcess().make(partial(eval, NOISY))
    finally:
        torch.set_num_threads(threads)
    assert said.decode().split() == ["2", str(min(os.nice(0) + 5, 19))], "what libraries print is no part of it"


def test_its_error_is_passed_on():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: .*by zero"):
        OtherProcess().make(partial(divmod, 1, 0))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="ended with -6|Aborted|dumped"):
        OtherProcess().make(partial(os.abort))  # type: ignore[arg-type]
