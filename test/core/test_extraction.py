from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from scfeat_core import geometry
from scfeat_core.errors import ConfigError, DeviceError, ImageError, WeightsError
from scfeat_core.extraction import Extractor
from scfeat_core.matching import match
from scfeat_core.network.model import VARIANTS, SCFeat
from scfeat_core.preprocessing import equalise
from scfeat_core.types import Features


def random_extractor(**options) -> Extractor:
    with pytest.warns(UserWarning, match="untrained"):
        return Extractor("random", max_keypoints=options.pop("max_keypoints", 200), **{"levels": 1, **options})


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: coloured noise with structure at several scales."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for cell in (4, 8, 24):
        noise = rng.uniform(0, 1, (-(-height // cell) + 1, -(-width // cell) + 1, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return (255 * np.clip((image - 0.8) / 1.4, 0, 1)).astype(np.uint8)


def photograph(shared_data: Path, width: int = 320, height: int = 240) -> np.ndarray:
    image = cv2.imread(str(shared_data / "eval" / "oxford_graf" / "1.png"))
    return cv2.cvtColor(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)


def assert_same(one: Features, other: Features, tolerance: float = 1e-3) -> None:
    """The same points up to the order of nearly equal scores, with close scores and descriptors."""
    one, other = one.numpy(), other.numpy()
    assert len(one) == len(other) > 0
    distance = np.linalg.norm(one.keypoints[:, None] - other.keypoints[None], axis=-1)
    partner = distance.argmin(1)
    assert len(set(partner)) == len(partner)
    assert distance.min(1).max() < tolerance
    np.testing.assert_allclose(one.scores, other.scores[partner], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(one.descriptors, other.descriptors[partner], atol=tolerance)


def shared_points(one: Features, other: Features, radius: float = 1.0) -> float:
    """Share of the points of one that have a point of the other within the radius, the smaller of both directions."""
    distance = np.linalg.norm(one.keypoints[:, None] - other.keypoints[None], axis=-1)
    return min((distance.min(axis) < radius).mean() for axis in (0, 1))


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return random_extractor()


def test_what_comes_out(extractor):
    image = textured(97, 131)
    features = extractor(image)
    count = len(features)
    assert 50 < count <= 200
    for array, shape in (
        (features.keypoints, (count, 2)),
        (features.scores, (count,)),
        (features.descriptors, (count, extractor.descriptor_dim)),
    ):
        assert isinstance(array, np.ndarray) and array.dtype == np.float32 and array.shape == shape
    assert features.image_size == (131, 97)
    assert features.descriptor_space == extractor.descriptor_space == "scfeat:random"
    assert (np.diff(features.scores) <= 0).all()
    assert (features.keypoints >= 3.5).all() and (features.keypoints <= [131 - 4.5, 97 - 4.5]).all()
    np.testing.assert_allclose(np.linalg.norm(features.descriptors, axis=1), 1, atol=1e-6)
    assert set(extractor.timings) == {"preprocess", "network", "select"} and min(extractor.timings.values()) > 0
    on_device = extractor(image, to_numpy=False)
    assert isinstance(on_device.keypoints, torch.Tensor)
    assert_same(on_device.numpy(), features)


def test_descriptors_are_the_map_at_the_points(extractor):
    features = extractor(textured(64, 80))
    given = torch.from_numpy(textured(64, 80)).permute(2, 0, 1)[None].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        output = extractor.model((given - mean[:, None, None]) / std[:, None, None])
    descriptor_map = extractor.model.descriptor_map(output)
    cell = np.flatnonzero((np.abs(features.keypoints % 4 - 2) > 1.2).all(1))[0]  # a point close to a cell's centre
    x, y = np.rint(features.keypoints[cell] / 4).astype(int)
    cosine = torch.cosine_similarity(descriptor_map[0, :, y, x], torch.from_numpy(features.descriptors[cell]), dim=0)
    assert cosine > 0.95
    x, y = np.rint(features.keypoints[0]).astype(int)
    assert output.score_map[0, 0, y, x].item() == pytest.approx(features.scores[0], rel=1e-4)


def test_all_kinds_of_images_mean_the_same(extractor):
    gray = textured(64, 80)[..., 0]
    rgb = np.dstack([gray] * 3)
    expected = extractor(rgb)
    alpha = np.dstack([rgb, np.zeros_like(gray)])
    kinds = {
        "gray": gray,
        "one channel": gray[..., None],
        "RGBA": alpha,
        "uint16": rgb.astype(np.uint16) * 257,
        "float64": rgb / 255,
        "float32": (rgb / 255).astype(np.float32),
        "torch gray": torch.from_numpy(gray),
        "torch CHW": torch.from_numpy(rgb).permute(2, 0, 1),
        "torch float CHW": torch.from_numpy(rgb).permute(2, 0, 1).contiguous() / 255,
        "mirrored twice": np.ascontiguousarray(rgb[:, ::-1])[:, ::-1],
        "sliced": np.pad(rgb, ((3, 3), (5, 5), (0, 0)))[3:-3, 5:-5],
        "read-only buffer": np.frombuffer(rgb.tobytes(), np.uint8).reshape(rgb.shape),
    }
    for name, image in kinds.items():
        try:
            assert_same(extractor(image), expected)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    red = rgb.copy()
    red[..., 2] = 0
    assert shared_points(extractor(red), expected) < 1, "channels must not be averaged away"


def test_channels_are_rgb(extractor):
    image = textured(64, 80)
    planes = torch.from_numpy(image).permute(2, 0, 1)
    assert_same(extractor(planes), extractor(image))
    assert shared_points(extractor(image[..., ::-1]), extractor(image)) < 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((31, 64), np.uint8), r"at least 32x32 pixels, found 64x31"),
        (np.zeros((0, 64, 3), np.uint8), r"found 64x0"),
        (np.zeros((0,), np.uint8), r"shape \(0,\)"),
        (np.zeros((64, 64, 2), np.uint8), r"\(H, W, 1\|3\|4\), found an array of shape \(64, 64, 2\)"),
        (np.zeros((3, 64, 64), np.uint8), r"shape \(3, 64, 64\)"),
        (torch.zeros(64, 64, 3), r"\(C, H, W\) with C = 1, 3 or 4.*\(64, 64, 3\)"),
        (np.zeros((2, 64, 64, 3), np.uint8), r"one image.*\(2, 64, 64, 3\)"),
        (np.zeros((64, 64), np.int32), r"found int32; convert it"),
        (np.zeros((64, 64), bool), r"found bool"),
        (torch.zeros(64, 64, dtype=torch.int64), r"found torch\.int64"),
        (np.full((64, 64), 0.5, np.float32) * 300, r"in \[0, 1\], found values from 150 to 150; divide"),
        (np.full((64, 64), -0.5, np.float32), r"found values from -0\.5"),
        (np.full((64, 64), np.nan, np.float32), r"NaN or infinity"),
        (np.full((64, 64), np.inf, np.float32), r"NaN or infinity"),
        ([[0, 1], [2, 3]], r"numpy array or a torch tensor, found list"),
        (None, r"found NoneType"),
    ],
)
def test_unusable_images_are_named(extractor, image, message):
    with pytest.raises(ImageError, match=message):
        extractor(image)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((80, 64), bool), r"\(H, W\) = \(64, 80\), found \(80, 64\); resize"),
        (np.ones((64, 80), np.float32), r"bool or uint8 .*found float32"),
        ([1, 2], r"found list"),
    ],
)
def test_unusable_masks_are_named(extractor, mask, message):
    with pytest.raises(ImageError, match=message):
        extractor(textured(64, 80), mask)


@pytest.mark.parametrize(("kind", "size_mode"), [("bool", "native"), ("uint8", "pad16"), ("torch", "crop16")])
def test_mask_keeps_points_inside(kind, size_mode):
    everything = random_extractor(max_keypoints=0, size_mode=size_mode)
    image = textured(97, 115)
    mask = np.zeros((97, 115), bool)
    mask[20:70, 30:90] = True
    given = {"bool": mask, "uint8": mask.astype(np.uint8) * 255, "torch": torch.from_numpy(mask)}[kind]
    features, unmasked = everything(image, given), everything(image)
    pixel = np.rint(unmasked.keypoints).astype(int)
    inside = mask[pixel[:, 1], pixel[:, 0]]
    assert 0 < inside.sum() < len(unmasked)
    np.testing.assert_array_equal(features.keypoints, unmasked.keypoints[inside])
    assert len(everything(image, np.zeros_like(mask))) == 0
    assert everything(image, np.zeros_like(mask)).descriptors.shape == (0, everything.descriptor_dim)


@pytest.mark.parametrize("size_mode", ["native", "pad16", "crop16"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (50, 131), (95, 64)])
def test_any_size_from_32(size_mode, size):
    """Acceptance test 11."""
    features = random_extractor(size_mode=size_mode, border=0)(textured(*size))
    assert len(features) > 0 and features.image_size == (size[1], size[0])
    limit = np.array([size[1], size[0]]) // (16 if size_mode == "crop16" else 1) * (16 if size_mode == "crop16" else 1)
    assert (features.keypoints >= 0).all() and (features.keypoints <= limit - 1).all()


def test_size_modes_agree_where_they_should():
    """Acceptance test 11: on multiples of 16 all are one; crop16 is the published network's cropping."""
    native, pad, crop = (random_extractor(size_mode=mode) for mode in ("native", "pad16", "crop16"))
    image = textured(96, 112)
    assert_same(pad(image), native(image))
    assert_same(crop(image), native(image))
    odd = textured(107, 125)
    assert_same(crop(odd), native(odd[:96, :112]))
    # Padding is seen by the global statistics and by the receptive fields at the border, but not by more than that.
    assert shared_points(pad(odd), native(odd)) > 0.75


def test_max_edge_scales_down_and_maps_back():
    image = textured(150, 200)
    small = random_extractor(max_edge=120)
    features = small(image)
    assert features.image_size == (200, 150)
    shrunk = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    shrunk = torch.nn.functional.interpolate(shrunk, size=(90, 120), mode="bilinear", antialias=True)[0]
    expected = random_extractor()(shrunk.clamp(0, 1))
    back = geometry.scale_points(expected.keypoints, 1 / 0.6)
    np.testing.assert_allclose(features.keypoints[:20], back[:20], atol=0.02)
    assert_same(small(textured(96, 112)), random_extractor()(textured(96, 112)))  # small enough already

    mask = np.zeros((150, 200), bool)
    mask[40:100, 50:151] = True
    pixel = np.rint(small(image, mask).keypoints).astype(int)
    assert len(pixel) > 10 and mask[pixel[:, 1], pixel[:, 0]].all()
    assert random_extractor(max_edge=64)(textured(40, 400)).image_size == (400, 40)  # never below 32 pixels


@pytest.mark.parametrize("real", [False, True], ids=["synthetic", "photograph"])
def test_batch_equals_single_images(extractor, real, request):
    if real:
        image = photograph(request.getfixturevalue("shared_data"))
        images = [image[:160, :200], image[60:220, 100:300], image[:160, :200][:, ::-1]]
    else:
        images = [textured(80, 96, seed) for seed in range(3)]
    height, width = images[0].shape[:2]
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2] = 1
    for batch, single in zip(extractor.extract_batch(images), map(extractor, images), strict=True):
        assert_same(batch, single)
    masked = extractor.extract_batch(images, [None, mask, None])
    assert_same(masked[0], extractor(images[0]))
    assert_same(masked[1], extractor(images[1], mask))
    for batch, image in zip(extractor.extract_batch(np.stack(images), mask), images, strict=True):
        assert_same(batch, extractor(image, mask))


def test_batches_that_do_not_fit_together_are_named(extractor):
    with pytest.raises(ImageError, match=r"one size and type.*80x64x3.*96x64x3"):
        extractor.extract_batch([textured(64, 80), textured(64, 96)])
    with pytest.raises(ImageError, match="at least one image"):
        extractor.extract_batch([])
    with pytest.raises(ImageError, match="one for each of 2 images, found 3"):
        extractor.extract_batch([textured(64, 80)] * 2, np.ones((3, 64, 80), bool))


@pytest.mark.parametrize("real", [False, True], ids=["synthetic", "photograph"])
def test_runs_agree_to_the_bit(extractor, real, request):
    image = photograph(request.getfixturevalue("shared_data")) if real else textured(120, 160)
    first, second, other = extractor(image), extractor(image), random_extractor()(image)
    for features in (second, other):
        assert np.array_equal(first.keypoints, features.keypoints)
        assert np.array_equal(first.scores, features.scores)
        assert np.array_equal(first.descriptors, features.descriptors)


@pytest.mark.parametrize("real", [False, True], ids=["synthetic", "photograph"])
def test_autocast_agrees_within_tolerance(extractor, real, request):
    image = photograph(request.getfixturevalue("shared_data")) if real else textured(120, 160)
    exact, half = extractor(image), random_extractor(precision="bfloat16")(image)
    assert half.descriptors.dtype == np.float32
    assert shared_points(exact, half) > 0.85
    distance = np.linalg.norm(exact.keypoints[:, None] - half.keypoints[None], axis=-1)
    close = distance.min(1) < 0.5
    cosine = (exact.descriptors * half.descriptors[distance.argmin(1)]).sum(1)[close]
    assert close.mean() > 0.8 and cosine.min() > 0.99


def test_random_weights_are_reproducible_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    random_extractor()
    assert torch.equal(torch.rand(3), expected)


def test_a_given_network_is_copied():
    model = SCFeat.create("lite").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extractor = Extractor(model, max_keypoints=20)
    extractor(textured(64, 64))
    assert model.training and extractor.model is not model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_uniform_images_do_no_harm(extractor):
    for value in (0, 128, 255):
        features = extractor(np.full((64, 80, 3), value, np.uint8))
        assert np.isfinite(features.keypoints).all() and np.isfinite(features.descriptors).all()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", ""])
def test_unknown_devices_are_named(name):
    with pytest.raises(DeviceError, match=r"'cpu', 'cuda', 'cuda:<number>' or 'auto', found"):
        Extractor("random", device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA: nothing is absent")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_absent_cuda_is_named_with_the_fix(name):
    with pytest.raises(DeviceError, match=rf"'{name}' was asked for.*device='cpu' or 'auto'.*CUDA build of torch"):
        Extractor("random", device=name)
    assert random_extractor(device="auto").device.type == "cpu"
    assert random_extractor(device="auto", precision="auto").precision == "float32"
    with pytest.raises(DeviceError, match="'float16' needs a CUDA device"):
        random_extractor(precision="float16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(extractor):
    image = textured(240, 320)
    on_cuda = random_extractor(device="cuda", synchronise=True)
    assert on_cuda(image, to_numpy=False).keypoints.is_cuda
    assert shared_points(on_cuda(image), extractor(image)) > 0.97
    index = torch.cuda.device_count()
    with pytest.raises(DeviceError, match=f"'cuda:{index}' was asked for"):
        Extractor("random", device=f"cuda:{index}")


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Extractor: unknown key 'nms_radios'; did you mean 'nms_radius'"):
        Extractor("random", nms_radios=3)
    with pytest.raises(ConfigError, match=r"precision: expected one of .*'bfloat16'.*found 'half'"):
        Extractor("random", precision="half")
    with pytest.raises(ConfigError, match=r"border: expected a value >= 0, found -1"):
        Extractor("random", border=-1)
    with pytest.raises(ConfigError, match="found int"):
        Extractor(3)
    with pytest.raises(WeightsError, match=r"nothing\.safetensors"):
        Extractor(tmp_path / "nothing.safetensors")


def test_score_threshold_and_limit(extractor):
    image = textured(96, 112)
    features = extractor(image)
    threshold = float(features.scores[math.floor(len(features) / 2)])
    limited = random_extractor(score_threshold=threshold)(image)
    assert 0 < len(limited) < len(features) and limited.scores.min() > threshold
    assert len(random_extractor(max_keypoints=7)(image)) == 7


def test_a_network_with_legacy_alignment_insists_on_multiples_of_16():
    lite = VARIANTS["lite"]
    legacy = replace(
        lite,
        backbone=replace(lite.backbone, alignment="legacy"),
        detector=replace(lite.detector, alignment="legacy"),
    )
    with pytest.raises(ConfigError, match="crop16"):
        Extractor(SCFeat(legacy))
    with pytest.raises(ConfigError, match="one alignment"):
        replace(lite, backbone=replace(lite.backbone, alignment="legacy"))
    features = Extractor(SCFeat(legacy), size_mode="crop16")(np.zeros((100, 75), np.uint8))
    assert features.image_size == (75, 100)


def test_options_change_between_images_without_loading(extractor):
    image = textured(96, 112)
    changing = random_extractor()
    model = changing.model
    changing.update(max_keypoints=50, nms_radius=4, grid=3)
    assert_same(changing(image), random_extractor(max_keypoints=50, nms_radius=4, grid=3)(image))
    before = changing.options
    for wrong, message in (
        ({"grid": -1}, "grid: expected a value >= 0"),
        ({"border": 2, "nms_radius": "wide"}, "nms_radius: expected int"),
        ({"max_keypoint": 5}, "did you mean 'max_keypoints'"),
        ({"precision": "bfloat16"}, "precision cannot change from 'float32' to 'bfloat16'"),
    ):
        with pytest.raises(ConfigError, match=message):
            changing.update(**wrong)
    assert changing.options is before and changing.model is model
    changing.update(max_keypoints=200, nms_radius=2, grid=0)
    assert_same(changing(image), extractor(image))


def test_budgets_and_score_maps_of_each_image(extractor):
    images = [textured(80, 96, seed) for seed in range(3)]
    features = extractor.extract_batch(images, max_keypoints=[20, 0, 60], score_maps=[False, True, False])
    assert [len(f) for f in features][::2] == [20, 60] and len(features[1]) > 60
    assert features[0].score_map is None and features[2].score_map is None
    score_map = features[1].score_map
    assert score_map.shape == (80, 96) and score_map.dtype == np.float32
    x, y = np.rint(features[1].keypoints[0]).astype(int)
    assert score_map[y, x] == features[1].scores[0]
    padded = random_extractor(size_mode="pad16").extract_batch([textured(50, 70)], score_maps=True)
    assert padded[0].score_map.shape == (50, 70)
    for wrong in ([20, 0], [20, 0, -1], [20, 0, 1.5]):
        with pytest.raises(ConfigError, match="for each of 3 images, found"):
            extractor.extract_batch(images, max_keypoints=wrong)


def test_equalise_is_opencvs_on_the_brightness():
    image = textured(96, 128) // 4
    gray = image[..., :1]
    clahe = cv2.createCLAHE(3.0, (8, 8))
    (out,) = equalise(torch.from_numpy(gray)[None], 3.0)
    np.testing.assert_array_equal(out[..., 0], clahe.apply(gray[..., 0]))
    (colour,) = equalise(torch.from_numpy(image)[None], 3.0)
    before, after = (cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb).astype(int) for rgb in (image, colour.numpy()))
    assert after[..., 0].std() > 2 * before[..., 0].std()
    assert np.median(abs(after[..., 1:] - before[..., 1:])) <= 1, "colours stay"
    assert image.max() < 64, "the image of the caller is left alone"


def test_equalise_takes_all_kinds_of_images_and_keeps_the_bits_of_deep_ones():
    image = textured(96, 128)
    images = torch.from_numpy(np.stack([image, image // 2]))
    whole = equalise(images, 2.0)
    assert whole.shape == (2, 96, 128, 3) and whole.dtype == torch.uint8
    np.testing.assert_array_equal(equalise(images[:1].float() / 255, 2.0), whole[:1])
    deep = textured(96, 128)[..., :1].astype(np.float32) * 16 / 65535  # 12 bits in 16
    (out,) = equalise(torch.from_numpy(deep)[None], 2.0)
    assert len(np.unique(out)) > 100


def test_clahe_finds_in_the_dark_what_is_found_in_the_light(shared_data):
    image = photograph(shared_data)
    noise = np.random.default_rng(0).normal(0, 0.5, image.shape)
    dark = np.clip(image * 0.06 + noise, 0, 255).astype(np.uint8)
    plain, equalised = Extractor(max_keypoints=300), Extractor(max_keypoints=300, clahe=3.0)
    bright = plain(image)
    # The same place and the same descriptor; the images are the same but for the exposure.
    hits = [same_places(bright, extract(dark)) for extract in (plain, equalised)]
    assert hits[1] > hits[0]


def same_places(one: Features, other: Features) -> int:
    found = match(one, other)
    distance = np.linalg.norm(one.keypoints[found.indices0] - other.keypoints[found.indices1], axis=1)
    return int((distance < 2).sum())


# -- pyramid -----------------------------------------------------------------------------------------------------------


def shown_smaller(image: np.ndarray, factor: float) -> np.ndarray:
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def test_levels_find_again_what_is_seen_from_farther_away(shared_data):
    near = photograph(shared_data, 640, 480)
    far = shown_smaller(near, 1 / 3)

    def right(levels: int) -> int:
        extractor = Extractor(max_keypoints=500, levels=levels)
        views = extractor(near), extractor(far)
        matches = match(*views)
        moved = geometry.scale_points(views[0].keypoints[matches.indices0], (1 / 3, 1 / 3))
        return int((np.linalg.norm(moved - views[1].keypoints[matches.indices1], axis=1) < 1.5).sum())

    assert right(3) > 1.5 * right(1)


def test_levels_are_those_of_smaller_images_best_first_within_the_budget():
    image = textured(160, 200)
    whole, pyramid = random_extractor(max_keypoints=0), random_extractor(max_keypoints=300, levels=3)
    features = pyramid(image)
    levels = [whole(image), *(random_extractor(max_keypoints=0, max_edge=edge)(image) for edge in (141, 100))]
    scores = np.sort(np.concatenate([0.8**i * level.scores for i, level in enumerate(levels)]))[::-1]
    np.testing.assert_allclose(features.scores, scores[:300], atol=1e-5)
    assert (np.diff(features.scores) <= 0).all()
    points = np.concatenate([level.keypoints for level in levels])
    distances = np.linalg.norm(features.keypoints[:, None] - points[None], axis=2).min(1)
    assert distances.max() < 1e-2
    assert not (np.linalg.norm(features.keypoints[:, None] - levels[0].keypoints[None], axis=2).min(1) < 1e-2).all()


def test_a_small_budget_takes_the_first_of_a_large_one():
    image = textured(120, 160)
    few, many = (random_extractor(max_keypoints=count, levels=3)(image) for count in (40, 200))
    np.testing.assert_array_equal(few.keypoints, many.keypoints[:40])
    np.testing.assert_array_equal(few.descriptors, many.descriptors[:40])


def test_levels_below_the_least_size_are_left_out():
    image = textured(40, 60)
    one, five = random_extractor(max_keypoints=0), random_extractor(max_keypoints=0, levels=5)
    assert len(five(image)) == len(one(image))


def test_levels_respect_masks_budgets_and_the_grid():
    images = [textured(128, 160, seed) for seed in range(2)]
    mask = np.zeros((128, 160), bool)
    mask[:, 80:] = True
    extractor = random_extractor(max_keypoints=64, levels=3, grid=4)
    left, right = extractor.extract_batch(images, [None, mask], [64, 32], score_maps=[True, False])
    assert len(left) == 64 and len(right) == 32
    assert (right.keypoints[:, 0] > 79).all()
    assert left.score_map.shape == (128, 160) and right.score_map is None
    cells = (np.rint(left.keypoints) // (40, 32)).astype(int)
    counts = np.bincount(cells @ (1, 4), minlength=16)
    assert (counts == 4).all(), "64 points over 16 cells"
    single = extractor(images[0])
    np.testing.assert_allclose(single.scores, left.scores, atol=1e-4)
