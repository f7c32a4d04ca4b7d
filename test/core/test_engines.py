from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import weakref
from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scfeat_core.engines import ENGINES, compiled, create_engine, engine_precisions, parity
from scfeat_core.engines.cache import Cache
from scfeat_core.engines.checked import SIZES, CheckedEngine
from scfeat_core.engines.contract import EngineName, Maps, Target
from scfeat_core.engines.eager import WithoutTensorFloat
from scfeat_core.engines.elsewhere import Beside
from scfeat_core.engines.making import Candidate, Made, Recipe
from scfeat_core.errors import ConfigError, DeviceError
from scfeat_core.extraction import Extractor
from scfeat_core.frontend import Frontend, FrontendConfig
from scfeat_core.network.inference import inference_network
from scfeat_core.network.model import SCFeat

CPU = torch.device("cpu")
NEEDS = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",), "tensorrt": ("onnx", "onnxruntime", "tensorrt")}
LIBRARIES = ("onnx", "openvino")
ON_CUDA = ("cuda_graph", "tensorrt", "onnx", "compile")


def installed(name: str) -> bool:
    return all(importlib.util.find_spec(package) for package in NEEDS.get(name, ()))


def need(name: str) -> None:
    if not installed(name):
        pytest.skip(f"{' and '.join(NEEDS[name])} are not installed: pip install 'scfeat-python[{name}]'")


@pytest.fixture(scope="module")
def model() -> SCFeat:
    return SCFeat.from_pretrained("lite")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One for all tests of the module, so that each size is made once."""
    return Cache(tmp_path_factory.mktemp("engines"))


def perturbed(model: SCFeat) -> SCFeat:
    """Its descriptors and scores are another network's."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.2 * parameter.std(unbiased=False) * torch.randn(parameter.shape, generator=generator)
    return other


def given(*shape: int) -> Tensor:
    return parity.parity_input((shape[0], 3, *shape[1:]), CPU)


# -- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eager", *LIBRARIES])
def test_every_engine_gives_the_maps_of_eager(name, model, cache):
    need(name)
    engine = create_engine(name, model, cache=cache)
    assert (engine.name, engine.precision, engine.note) == (name, "float32", "")
    eager = create_engine("eager", model)
    for size in ((1, 96, 128), (2, 75, 101), (1, 96, 128)):  # an odd size, a batch, and back
        image = given(*size)
        before = image.clone()
        maps = engine.run(image)
        assert (engine.name, engine.note) == (name, "")
        assert maps[0].shape == (size[0], 1, *size[1:])
        assert maps[1].shape == (size[0], model.descriptor_dim, -(-size[1] // 4), -(-size[2] // 4))
        assert all(map_.dtype == torch.float32 and map_.device == CPU for map_ in maps)
        assert torch.equal(image, before), "the image is only read"
        agreement = parity.compare(maps, eager.run(image))
        assert agreement.keypoints >= 0.99 and agreement.cosine > 0.999
        torch.testing.assert_close(engine.run(image.contiguous())[0], maps[0], msg="another layout of the same image")


@pytest.mark.parametrize("name", ["eager", *LIBRARIES])
def test_results_are_the_callers_and_the_same_from_run_to_run(name, model, cache):
    need(name)
    engine = create_engine(name, model, cache=cache)
    image = given(1, 96, 128)
    first = engine.run(image)
    kept = [map_.clone() for map_ in first]
    engine.run(image.flip(3))
    assert all(torch.equal(map_, copied) for map_, copied in zip(first, kept, strict=True))
    for again in (engine, create_engine(name, model, cache=cache)):
        assert all(torch.equal(map_, copied) for map_, copied in zip(again.run(image), kept, strict=True))


@pytest.mark.parametrize("name", LIBRARIES)
def test_another_number_of_threads_makes_it_again_with_the_same_results(name, model, cache, caplog):
    need(name)
    engine = create_engine(name, model, cache=cache)
    threads = torch.get_num_threads()
    image = given(1, 96, 128)
    try:
        with caplog.at_level(logging.INFO):
            torch.set_num_threads(1)
            one = engine.run(image)
            torch.set_num_threads(2)
            two = engine.run(image)
    finally:
        torch.set_num_threads(threads)
    assert parity.compare(two, one).keypoints == 1 and engine.note == ""
    assert caplog.text.count(f"{name} is made for 1 image(s) of 128x96; images wait meanwhile") == 2


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_extractor_finds_the_same_points_by_every_engine(name, tmp_path, monkeypatch):
    need(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image = parity.rendered_images(1, 96, 128)[0]
    expected = Extractor(max_keypoints=200, levels=2)(image)
    extractor = Extractor(max_keypoints=200, levels=2, engine=name)
    found = extractor(image)
    assert (extractor.engine, extractor.engine_note, extractor.precision) == (name, "", "float32")
    distance = np.linalg.norm(found.keypoints[:, None] - expected.keypoints[None], axis=-1)
    assert len(found) == len(expected) and (distance.min(1) < 0.1).mean() >= 0.99
    assert len(list((tmp_path / "scfeat").glob("*.json"))) == 2, "one for each level"


def test_auto_takes_what_is_installed_and_stays_with_it(model, cache, caplog):
    if not any(map(installed, LIBRARIES)):
        pytest.skip("neither ONNX Runtime nor OpenVINO is installed: pip install 'scfeat-python[onnx]'")
    engine = create_engine("auto", model, cache=cache)
    assert engine.name == "auto"
    image = given(1, 96, 128)
    with caplog.at_level(logging.INFO):
        engine.run(image)
    chosen = engine.name
    assert chosen in ("eager", *filter(installed, LIBRARIES)) and engine.note == ""
    assert f"auto takes {chosen}: eager" in caplog.text and caplog.text.count(" ms") > 1
    engine.run(given(2, 75, 101))
    assert engine.name == chosen


def test_auto_without_anything_installed_is_eager(model):
    if installed("openvino"):
        pytest.skip("OpenVINO is installed, and computes in bfloat16")
    engine = create_engine("auto", model, precision="bfloat16")  # which ONNX Runtime does not have
    assert (engine.name, engine.note, engine.precision) == ("eager", "", "bfloat16")


class Tiny(nn.Module):
    """Maps of the right shapes from little that has to be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(3, 1, 3, padding=1)
        self.features = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, image: Tensor) -> Maps:
        return nn.functional.softplus(self.score(image)), self.features(image)


def test_compile_gives_the_maps_of_the_network_from_a_file(tmp_path):
    if not hasattr(torch._inductor, "aoti_compile_and_package"):
        pytest.skip("torch before 2.6 packages no compiled networks")
    network = Tiny().eval().requires_grad_(False)
    target = Target(network, network, CPU, "float32", "tiny")
    image = given(1, 64, 64)
    maps = compiled.build(target, image, Cache(tmp_path))(image)
    for map_, expected in zip(maps, network(image), strict=True):
        torch.testing.assert_close(map_, expected, rtol=1e-4, atol=1e-5)
    (entry,) = tmp_path.glob("*.pt2")
    made = entry.stat().st_mtime_ns
    again = compiled.build(target, image, Cache(tmp_path))(image)
    assert entry.stat().st_mtime_ns == made and all(map(torch.equal, maps, again))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ON_CUDA)
def test_engines_on_cuda(name, precision, model, cache):
    need(name)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    if precision not in engine_precisions(name, device):
        pytest.skip(f"{name} does not compute in {precision}")
    engine = create_engine(name, model, device, precision, cache=cache)
    eager = create_engine("eager", model, device)
    for size in ((1, 96, 128), (2, 75, 101), (1, 96, 128)):
        image = given(*size).to(device)
        first = engine.run(image)
        assert (engine.name, engine.note) == (name, "")
        kept = [map_.clone() for map_ in first]
        engine.run(image.flip(3))
        assert all(map(torch.equal, first, kept)), "results are the caller's"
        own = parity.compare(create_engine("eager", model, device, precision).run(image), eager.run(image))
        assert parity.suffices(parity.compare(first, eager.run(image)), own)


def tensor_float() -> tuple[str, str]:
    """The switches of convolutions and of recurrent networks."""
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    return ("tf32" if cudnn.allow_tf32 else "ieee",) * 2


def test_tensor_float_is_off_while_anybody_runs_and_then_what_it_was():
    """Of any threads: A begins, B begins, A ends, B ends."""
    before, exact = torch.backends.cudnn.allow_tf32, WithoutTensorFloat()
    for allowed in (True, False):
        try:
            torch.backends.cudnn.allow_tf32 = allowed
            switches = tensor_float()
            with contextlib.ExitStack() as a, contextlib.ExitStack() as b:
                for stack in (a, b):
                    stack.enter_context(exact)
                    assert tensor_float() == ("ieee", "ieee") and torch.backends.cudnn.allow_tf32 is False
                a.close()
                assert tensor_float() == ("ieee", "ieee"), "B still runs"
                b.close()
                assert tensor_float() == switches and torch.backends.cudnn.allow_tf32 is allowed
        finally:
            torch.backends.cudnn.allow_tf32 = before


def test_tensor_float_of_convolutions_alone_comes_back():
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        pytest.skip("torch before 2.9 has one switch for both")
    before = tensor_float()
    try:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "tf32", "ieee"  # asking for allow_tf32 now raises
        with WithoutTensorFloat():
            assert tensor_float() == ("ieee", "ieee")
        assert tensor_float() == ("tf32", "ieee")
    finally:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before
    assert cudnn.allow_tf32 in (True, False), "it is told again"


# -- what cannot be had ------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_nearest_one(model):
    with pytest.raises(ConfigError, match="found 'onx'; did you mean 'onnx'"):
        create_engine("onx", model)
    with pytest.raises(ConfigError, match="found 'quantum'; there are eager, cuda_graph"):
        create_engine("quantum", model)
    with pytest.raises(ConfigError, match="engine: expected one of 'eager'.*did you mean 'openvino'"):
        Extractor(engine="openvin")


def test_a_device_or_precision_that_an_engine_does_not_have_is_refused(model):
    with pytest.raises(
        DeviceError, match="'cuda_graph' runs on cuda, found device 'cpu'; on this one there are eager, co"
    ):
        create_engine("cuda_graph", model)
    with pytest.raises(DeviceError, match="'openvino' runs on cpu, found device 'cuda'"):
        create_engine("openvino", model, "cuda")
    with pytest.raises(ConfigError, match="engine 'onnx' on cpu: expected precision float32, found 'bfloat16'"):
        create_engine("onnx", model, precision="bfloat16")
    with pytest.raises(DeviceError, match="'tensorrt' runs on cuda"):
        Extractor(engine="tensorrt")


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(name, model, monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package in NEEDS[name] else own(package))
    with pytest.raises(ConfigError, match=rf"engine '{name}' needs .*pip install 'scfeat-python\[{name}\]'"):
        create_engine(name, model)


def test_an_engine_stays_what_it_is():
    frontend = Frontend(FrontendConfig())
    with pytest.raises(ConfigError, match="engine cannot change"):
        frontend.update(replace(frontend.config, engine="auto"))
    with pytest.raises(ConfigError, match="engine cannot change from 'eager' to 'auto'"):
        frontend.extractor.update(engine="auto")
    assert frontend.extractor.engine == "eager"


def test_a_closed_front_end_keeps_no_network():
    frontend = Frontend(FrontendConfig())
    frontend.extractor(np.zeros((64, 64), np.uint8))
    networks = [weakref.ref(frontend.extractor.model), weakref.ref(frontend.extractor._engine.network)]
    frontend.close()
    assert [network() for network in networks] == [None, None]


def test_the_node_offers_the_same_engines():
    from scfeat_ros.parameters import NodeParameters, rows

    (row,) = (row for row in rows() if row.name == "engine")
    assert row.choices == ENGINES == get_args(EngineName) and not row.dynamic
    assert NodeParameters().engine == FrontendConfig().engine == "eager"
    assert "engine" in {field.name for field in fields(FrontendConfig)}


# -- engines that are wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_deviating_engine_is_replaced_by_eager_and_says_so(name, model, cache, caplog):
    need(name)
    image = given(1, 96, 128)
    with caplog.at_level(logging.WARNING):
        engine = create_engine(name, model, source=perturbed(model), cache=cache)
        maps = engine.run(image)
    assert engine.name == "eager"
    assert engine.note.startswith(f"{name} deviates from float32 torch on 1 image(s) of 128x96: ")
    assert engine.note.endswith("; eager in float32 is used instead") and engine.note in caplog.text
    assert all(map(torch.equal, maps, create_engine("eager", model).run(image)))


def checked(
    build, model: SCFeat, asked: str = "own", precision: str = "float32", beside: Beside[Made] | None = None
) -> CheckedEngine:
    """The public contract around an engine of the test's own."""
    eager, reference = create_engine("eager", model, precision=precision), create_engine("eager", model)
    target = Target(nn.Identity(), eager.run, CPU, precision, "own")
    cache = Cache(None, None if beside is None else beside.workshop)
    recipe = Recipe(target, eager.run, reference.run, cache, "exact")
    return CheckedEngine(asked, [Candidate("own", build)], recipe, beside)


def test_auto_leaves_what_deviates(model, caplog):
    broken = create_engine("eager", perturbed(model))
    engine = checked(lambda target, image, cache: broken.run, model, "auto")
    with caplog.at_level(logging.INFO):
        maps = engine.run(given(1, 96, 128))
    assert (engine.name, engine.note) == ("eager", "")
    assert "auto leaves own deviates from float32 torch" in caplog.text and "auto takes eager" in caplog.text
    assert all(map(torch.equal, maps, create_engine("eager", model).run(given(1, 96, 128))))


def test_an_engine_that_cannot_be_made_or_fails_is_replaced_by_eager(model):
    image = given(1, 96, 128)
    expected = create_engine("eager", model).run(image)

    def refuses(target, image, cache):
        raise RuntimeError("no kernel for\nthis operation")

    engine = checked(refuses, model)
    assert all(map(torch.equal, engine.run(image), expected))
    assert engine.name == "eager"
    assert engine.note == (
        "own could not be made for 1 image(s) of 128x96: RuntimeError: no kernel for this operation; "
        "eager in float32 is used instead"
    )

    runs = []

    def breaks(target, image, cache):
        def run(image):
            runs.append(image)
            if len(runs) == 3:
                raise RuntimeError("device lost")
            return target.run(image)

        return run

    engine = checked(breaks, model)
    engine.run(image)
    assert (engine.name, engine.note) == ("own", "")
    assert all(map(torch.equal, engine.run(image), expected))
    assert (
        engine.name == "eager"
        and engine.note == "own failed: RuntimeError: device lost; eager in float32 is used instead"
    )
    engine.run(image)
    assert len(runs) == 3, "it is not tried again"


def test_each_size_is_made_and_compared_once_and_beyond_the_first_ones_eager_runs(model):
    made = []

    def build(target, image, cache):
        made.append(tuple(image.shape[2:]))
        return target.run

    engine = checked(build, model)
    sizes = [(32, 32 + index) for index in range(SIZES)]
    for size in [*sizes, sizes[-1], sizes[0]]:
        engine.run(given(1, *size))
    assert made == sizes and (engine.name, engine.note) == ("own", "")
    image = given(2, 32, 32)
    assert all(map(torch.equal, engine.run(image), create_engine("eager", model).run(image)))
    assert made == sizes and engine.note == f"own is made for {SIZES} sizes and batches at most; eager runs the others"


def test_below_float32_an_engine_may_be_as_far_off_as_torch_in_the_same_precision(model):
    image = given(1, 96, 128)
    engine = checked(lambda target, image, cache: target.run, model, precision="bfloat16")
    own = parity.compare(engine.run(image), create_engine("eager", model).run(image))
    assert (engine.name, engine.note) == ("own", "")
    assert own.keypoints < 1, "bfloat16 is not float32"
    worse = replace(own, keypoints=1 - 2 * (1 - own.keypoints))
    assert parity.suffices(own, own) and not (own.keypoints < 0.99 and parity.suffices(worse, own))


def test_a_precision_in_which_numbers_overflow_is_replaced_by_float32(model, caplog):
    image = given(1, 96, 128)
    eager = create_engine("eager", model, precision="bfloat16")
    with caplog.at_level(logging.INFO):
        eager.run(image)
    assert (eager.name, eager.precision, eager.note) == ("eager", "bfloat16", "")
    assert "eager in bfloat16 against float32: " in caplog.text

    exact = create_engine("eager", model)

    def overflows(given):
        scores, features = exact.run(given)
        return scores / 0, features

    target = Target(nn.Identity(), overflows, CPU, "bfloat16", "own")
    candidate = Candidate("own", lambda target, image, cache: target.run)
    engine = CheckedEngine("own", [candidate], Recipe(target, overflows, exact.run, Cache(None), "exact"))
    assert all(map(torch.equal, engine.run(image), exact.run(image)))
    assert (engine.name, engine.precision) == ("eager", "float32")
    assert engine.note.startswith("own in bfloat16 deviates from float32 on images of this size: 0.0 %")


def test_weights_are_converted_once_and_maps_stay_the_same(model):
    image = given(1, 96, 128)
    network = inference_network(model).to(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = network(image)
    found = create_engine("eager", model, precision="bfloat16").run(image)
    assert all(map(torch.equal, found, expected))


def test_parity_sees_shifts_other_descriptors_and_what_is_not_finite(model):
    maps = create_engine("eager", model).run(given(2, 96, 128))
    assert parity.compare(maps, maps) == parity.Parity(1.0, pytest.approx(1), pytest.approx(1))
    scores, features = maps
    moved = torch.nn.functional.interpolate(torch.nn.functional.pad(scores, (1, 0, 0, 0))[..., :-1], scores.shape[2:])
    assert parity.compare((moved, features), maps).keypoints < 0.1
    one = features.clone()
    one[1] = one[1].roll(1, 0)
    found = parity.compare((scores, one), maps)
    assert found.keypoints == 1 and found.cosine < 0.9, "the worst of the images counts"
    assert parity.compare((scores, features / 0), maps) == parity.Parity(0, 0, 0)
    assert parity.compare((scores[:1], features[:1]), maps) == parity.Parity(0, 0, 0)
    assert not parity.suffices(found) and parity.suffices(parity.compare(maps, maps))
    nothing = parity.Parity(0, 0, 0)
    assert not parity.suffices(nothing, nothing) and not parity.usable(nothing)
    poor = parity.Parity(0.33, 0.9999, 0.9999)
    assert not parity.suffices(replace(poor, keypoints=0.0), poor) and not parity.suffices(poor, poor)


def test_the_image_of_the_comparison_has_corners_enough(model):
    pictures = parity.rendered_images(2, 120, 160)
    assert pictures.shape == (2, 120, 160, 3) and pictures.dtype == np.uint8 and (pictures[0] != pictures[1]).any()
    features = Extractor(model, levels=1)(parity.rendered_images(1, 240, 320)[0])
    assert len(features) > 500 and np.median(features.scores) > 2 * features.scores.min()


def test_legacy_alignment_is_compared_as_it_is_sampled(cache):
    need("onnx")
    config = SCFeat.create("lite").config
    backbone, detector = replace(config.backbone, alignment="legacy"), replace(config.detector, alignment="legacy")
    torch.manual_seed(0)
    legacy = SCFeat(replace(config, backbone=backbone, detector=detector)).eval()
    engine = create_engine("onnx", legacy, cache=cache)
    engine.run(given(1, 96, 128))
    assert (engine.name, engine.note) == ("onnx", "")


def test_the_threads_of_onnx_runtime_leave_the_processor_to_what_follows(cache, model, monkeypatch):
    need("onnx")
    import onnxruntime

    made, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *given, **named: made.append(given) or session(*given, **named)
    )
    create_engine("onnx", model, cache=cache).run(given(1, 96, 128))
    ((_, options),) = made
    for kind in ("intra", "inter"):
        assert options.get_session_config_entry(f"session.{kind}_op.allow_spinning") == "0"
