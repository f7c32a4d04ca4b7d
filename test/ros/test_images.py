"""sensor_msgs images to numpy: every encoding, odd layouts, and what is wrong with a bad one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from scfeat_core.errors import ImageError
from scfeat_ros.images import ENCODINGS, compressed_to_array, depth_to_array, image_to_array

HEIGHT, WIDTH = 20, 30


@dataclass
class Image:
    """The fields of sensor_msgs/Image, so that these tests run without ROS."""

    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: bytearray | bytes | np.ndarray


@dataclass
class CompressedImage:
    format: str
    data: bytes


def message(pixels: np.ndarray, encoding: str, padding: int = 0, bigendian: bool = False) -> Image:
    """Pixels (H, W[, C]) as a message whose rows end with ``padding`` bytes of rubbish."""
    height, width = pixels.shape[:2]
    ordered = pixels.astype(pixels.dtype.newbyteorder(">" if bigendian else "<"))
    rows = np.ascontiguousarray(ordered).view(np.uint8).reshape(height, -1)
    rows = np.hstack([rows, np.full((height, padding), 0xA5, np.uint8)])
    return Image(height, width, encoding, int(bigendian), rows.shape[1], bytearray(rows.tobytes()))


@pytest.fixture
def rgb() -> np.ndarray:
    """A smooth colour picture, so that chroma at half the resolution loses little."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([40 + 6 * x, 60 + 7 * y, 200 - 3 * x - 2 * y], -1).astype(np.uint8)


def test_layouts_that_need_no_copy_are_views(rgb: np.ndarray) -> None:
    rgba = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    cases = {
        "mono8": rgb[..., 0],
        "8UC1": rgb[..., 0],
        "rgb8": rgb,
        "rgba8": rgba,
        "mono16": rgb[..., 0] * np.uint16(257),
    }
    for encoding, pixels in cases.items():
        for padding in (0, 6):
            source = message(pixels, encoding, padding)
            found = image_to_array(source)
            assert np.shares_memory(found, np.frombuffer(source.data, np.uint8)), (encoding, padding)
            np.testing.assert_array_equal(found, pixels[..., :3] if pixels.ndim == 3 else pixels)


@pytest.mark.parametrize("padding", [0, 5])
def test_colour_orders_come_out_as_rgb(rgb: np.ndarray, padding: int) -> None:
    alpha = np.full((HEIGHT, WIDTH, 1), 9, np.uint8)
    wide = rgb.astype(np.uint16) * 257
    cases = {
        "bgr8": rgb[..., ::-1],
        "8UC3": rgb[..., ::-1],
        "bgra8": np.dstack([rgb[..., ::-1], alpha]),
        "8UC4": np.dstack([rgb[..., ::-1], alpha]),
        "bgr16": wide[..., ::-1],
        "bgra16": np.dstack([wide[..., ::-1], alpha]),
        "rgb16": wide,
        "rgba16": np.dstack([wide, alpha]),
    }
    for encoding, pixels in cases.items():
        found = image_to_array(message(np.ascontiguousarray(pixels), encoding, padding))
        np.testing.assert_array_equal(found, wide if "16" in encoding else rgb, err_msg=encoding)
        assert found.flags.aligned


@pytest.mark.parametrize("encoding", ["mono16", "16UC1", "rgb16"])
@pytest.mark.parametrize("padding", [0, 3, 4])
def test_both_byte_orders_and_odd_steps_give_native_pixels(encoding: str, padding: int) -> None:
    channels = 3 if encoding == "rgb16" else 1
    pixels = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, channels), dtype=np.uint16).squeeze()
    for bigendian in (False, True):
        found = image_to_array(message(pixels, encoding, padding, bigendian))
        assert found.dtype == np.uint16 and found.dtype.isnative and found.flags.aligned
        assert all(stride % 2 == 0 for stride in found.strides)  # else torch refuses it
        np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("order", ["rggb", "bggr", "gbrg", "grbg"])
@pytest.mark.parametrize("bits", [8, 16])
def test_bayer_patterns(rgb: np.ndarray, order: str, bits: int) -> None:
    flat = np.array([200, 120, 40], np.uint8 if bits == 8 else np.uint16)  # one colour: no demosaicing can blur it
    mosaic = np.empty((HEIGHT, WIDTH), flat.dtype)
    for index, name in enumerate(order):
        mosaic[index // 2 :: 2, index % 2 :: 2] = flat["rgb".index(name)]
    found = image_to_array(message(mosaic, f"bayer_{order}{bits}", padding=4))
    np.testing.assert_array_equal(found[2:-2, 2:-2], np.broadcast_to(flat, (HEIGHT - 4, WIDTH - 4, 3)))


def yuv(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) float Y, U, V of 8 bits: ITU-R BT.601, studio swing."""
    red, green, blue = (rgb[..., i].astype(float) for i in range(3))
    y = 16 + (65.738 * red + 129.057 * green + 25.064 * blue) / 256
    u = 128 + (-37.945 * red - 74.494 * green + 112.439 * blue) / 256
    v = 128 + (112.439 * red - 94.154 * green - 18.285 * blue) / 256
    return np.stack([y, u, v], -1)


@pytest.mark.parametrize(("encoding", "luma"), [("yuv422", 1), ("uyvy", 1), ("yuv422_yuy2", 0), ("yuyv", 0)])
def test_yuv422(rgb: np.ndarray, encoding: str, luma: int) -> None:
    y, u, v = np.moveaxis(yuv(rgb).round(), -1, 0)
    packed = np.empty((HEIGHT, WIDTH, 2), np.uint8)
    packed[..., luma] = y
    packed[:, 0::2, 1 - luma] = u[:, 0::2]
    packed[:, 1::2, 1 - luma] = v[:, 0::2]
    found = image_to_array(message(packed, encoding, padding=8)).astype(int)
    assert abs(found - rgb).max() <= 8 and abs(found - rgb).mean() < 3  # two columns share their chroma


def semi_planar(rgb: np.ndarray, encoding: str, padding: int) -> Image:
    """The rows of both planes end with rubbish: of NV24 the rows of chroma are twice as long, padding included."""
    y, u, v = np.moveaxis(yuv(rgb).round().astype(np.uint8), -1, 0)
    step = 1 if encoding == "nv24" else 2
    order = (v, u) if encoding == "nv21" else (u, v)
    chroma = np.stack([plane[::step, ::step] for plane in order], -1).reshape(len(y[::step]), -1)
    wide = 2 * padding if encoding == "nv24" else padding
    planes = [
        np.pad(plane, ((0, 0), (0, extra)), constant_values=0xA5) for plane, extra in ((y, padding), (chroma, wide))
    ]
    data = bytearray(b"".join(plane.tobytes() for plane in planes))
    return Image(*y.shape, encoding, 0, y.shape[1] + padding, data)


@pytest.mark.parametrize("padding", [0, 1, 5, 34])
@pytest.mark.parametrize(("encoding", "limit"), [("nv12", 14), ("nv21", 14), ("nv24", 2)])
def test_luma_and_chroma_in_planes(rgb: np.ndarray, encoding: str, limit: int, padding: int) -> None:
    source = semi_planar(rgb, encoding, padding)
    found = image_to_array(source)
    assert found.dtype == np.uint8 and found.shape == rgb.shape
    error = abs(found.astype(int) - rgb)
    assert error[::2, ::2].max() <= 2 and error.max() <= limit  # of NV12 and NV21 four pixels share that of the first
    if padding:
        del source.data[-padding:]  # some drivers do not send the end of the last row
        np.testing.assert_array_equal(image_to_array(source), found)
    del source.data[-padding - 1 :]
    with pytest.raises(ImageError, match=f"truncated image: expected .* of {encoding}"):
        image_to_array(source)


@pytest.mark.parametrize("encoding", ["nv12", "nv21"])
@pytest.mark.parametrize(("width", "height"), [(31, 32), (32, 31)])
def test_a_size_that_chroma_cannot_have_is_explained(encoding: str, width: int, height: int) -> None:
    with pytest.raises(ImageError, match=f"{encoding} pixels.*found {width}x{height} .*4:2:0 an even height"):
        image_to_array(Image(height, width, encoding, 0, width, bytes(64 * 64)))


@pytest.mark.parametrize("encoding", ["yuv422", "yuyv"])
def test_an_odd_width_that_cannot_be_converted_is_explained(encoding: str) -> None:
    with pytest.raises(ImageError, match=f"{encoding} pixels.*found 31x32 .*even width"):
        image_to_array(Image(32, 31, encoding, 0, 62, bytes(62 * 32)))


def test_every_encoding_is_decoded() -> None:
    """No entry of the table names a conversion that OpenCV refuses."""
    for encoding in ENCODINGS:
        size = 32 * 4 * 8
        found = image_to_array(Image(32, 32, encoding, 0, size, bytes(3 * 32 * size)))
        assert found.shape[:2] == (32, 32) and found.ndim in (2, 3) and found.dtype in (np.uint8, np.uint16), encoding


def test_the_last_row_may_lack_its_padding(rgb: np.ndarray) -> None:
    source = message(rgb, "rgb8", padding=10)
    del source.data[-10:]
    np.testing.assert_array_equal(image_to_array(source), rgb)
    del source.data[-1:]
    with pytest.raises(ImageError, match="truncated"):
        image_to_array(source)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoding": "jpeg2000"}, ["'jpeg2000'", "mono8", "let the camera driver send"]),
        ({"encoding": ""}, ["''", "mono8"]),
        ({"data": bytes(100)}, ["truncated", f"{HEIGHT * WIDTH * 3} bytes", "found 100"]),
        ({"data": b""}, ["truncated", "found 0"]),
        ({"height": 0}, ["with pixels", f"found {WIDTH}x0"]),
        ({"width": 0, "step": 0}, ["with pixels", f"found 0x{HEIGHT}"]),
        ({"step": WIDTH}, ["step", f"at least {WIDTH * 3} bytes", f"found {WIDTH}:"]),
        ({"step": 0}, ["step", "found 0:"]),
        ({"height": 1 << 31, "width": 1 << 30, "step": 3 << 30}, ["truncated"]),
    ],
)
def test_a_bad_image_is_explained(rgb: np.ndarray, changes: dict[str, object], words: list[str]) -> None:
    source = message(rgb, "rgb8")
    for name, value in changes.items():
        setattr(source, name, value)
    with pytest.raises(ImageError) as error:
        image_to_array(source)
    for word in words:
        assert word in str(error.value)


def test_compressed_pictures(rgb: np.ndarray) -> None:
    wide = rgb[..., 0].astype(np.uint16) * 257
    encoded = {
        name: bytes(cv2.imencode(".png", pixels)[1])
        for name, pixels in {"colour": rgb[..., ::-1], "gray": rgb[..., 0], "gray16": wide}.items()
    }
    np.testing.assert_array_equal(
        compressed_to_array(CompressedImage("bgr8; png compressed bgr8", encoded["colour"])), rgb
    )
    np.testing.assert_array_equal(compressed_to_array(CompressedImage("png", encoded["gray"])), rgb[..., 0])
    np.testing.assert_array_equal(
        compressed_to_array(CompressedImage("mono16; png compressed ", encoded["gray16"])), wide
    )
    jpeg = bytes(cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1])
    found = compressed_to_array(CompressedImage("jpeg", jpeg)).astype(int)
    assert abs(found - rgb).mean() < 5


def test_a_picture_that_claims_to_be_huge_is_explained_and_costs_nothing() -> None:
    pixels = np.zeros((16, 16), np.uint8)
    jpeg = bytearray(cv2.imencode(".jpg", pixels)[1])
    size = jpeg.index(b"\xff\xc0") + 5  # in the frame header
    jpeg[size : size + 4] = b"\xff\x00" * 2
    png = bytearray(cv2.imencode(".png", pixels)[1])
    png[16] = 0x20  # 2 ** 29 pixels wide
    for data, claimed in ((jpeg, 65280**2), (png, (2**29 + 16) * 16)):
        with pytest.raises(ImageError, match=f"found {len(data)} bytes whose header claims {claimed} pixels"):
            compressed_to_array(CompressedImage("jpeg", bytes(data)))


def test_a_plain_picture_is_not_taken_for_a_huge_one() -> None:
    """The highest compression that there is: one value everywhere."""
    plain = np.zeros((1080, 1920), np.uint8)
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_OPTIMIZE, 1, cv2.IMWRITE_JPEG_QUALITY, 1]
    for suffix, setting in ((".jpg", options), (".png", [cv2.IMWRITE_PNG_COMPRESSION, 9])):
        for picture in (plain, np.dstack([plain] * 3)):
            data = bytes(cv2.imencode(suffix, picture, setting)[1])
            assert compressed_to_array(CompressedImage("jpeg", data)).shape == picture.shape


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_picture_without_its_end_is_explained(rgb: np.ndarray, suffix: str) -> None:
    data = bytes(cv2.imencode(suffix, rgb)[1])
    for cut in (1, 12, 40):
        with pytest.raises(ImageError, match=f"found {len(data) - cut} bytes that are a picture without its end"):
            compressed_to_array(CompressedImage("jpeg", data[:-cut]))
    assert compressed_to_array(CompressedImage("jpeg", data + b"padding")).shape == rgb.shape


@pytest.mark.parametrize(
    ("format", "data", "word"),
    [
        ("jpeg", b"", "found 0 bytes"),
        ("jpeg", b"\xff\xd8\xff\xe0 and then nothing", "without its end"),
        ("jpeg", b"\xff\xd8\xff\xda\x00\x02 and then the end \xff\xd9", "cannot decode"),
        ("png", b"\x89PNG", "without its end"),
        ("png", b"\x89PNG\r\n\x1a\n\xf9\x00\x02\x25IDAT and no gigabytes", "without its end"),
        ("16UC1; compressedDepth png", b"\0" * 40, "depth map"),
    ],
)
def test_a_bad_compressed_picture_is_explained(format: str, data: bytes, word: str) -> None:
    with pytest.raises(ImageError, match=word):
        compressed_to_array(CompressedImage(format, data))


FUZZED = (*ENCODINGS, "32FC1", "NV12", "", "rgb8 ")


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_gives_an_image_of_the_right_size_or_an_image_error(seed: int) -> None:
    random = np.random.default_rng(seed)
    fine = 0
    for _ in range(400):
        encoding = FUZZED[random.integers(len(FUZZED))]
        height, width = (int(value) for value in random.integers(0, 40, 2))
        step = width * int(random.integers(0, 9)) + int(random.integers(0, 4))
        if random.random() < 0.1:  # what a damaged header may hold
            height, width, step = (int(value) for value in random.integers(0, 2**32, 3))
        size = min(height * step * int(random.integers(1, 4)), 1 << 14)
        data = random.integers(0, 256, max(0, size - int(random.integers(0, 3))), dtype=np.uint8).tobytes()
        try:
            found = image_to_array(Image(height, width, encoding, int(random.integers(0, 256)), step, data))
        except ImageError as error:
            assert str(error)
            continue
        fine += 1
        assert found.shape in ((height, width), (height, width, 3)) and encoding in ENCODINGS
        assert found.dtype in (np.uint8, np.uint16) and found.dtype.isnative
    assert fine > 50


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_picture_gives_an_image_or_an_image_error(rgb: np.ndarray, seed: int) -> None:
    random = np.random.default_rng(seed)
    for suffix in (".jpg", ".png"):
        picture = np.frombuffer(cv2.imencode(suffix, rgb)[1], np.uint8)
        for _ in range(40):
            damaged = picture.copy()[: random.integers(1, len(picture) + 1)]
            places = random.integers(0, len(damaged), random.integers(0, 4))
            damaged[places] = random.integers(0, 256, len(places))
            try:
                found = compressed_to_array(CompressedImage("rgb8; jpeg compressed bgr8", damaged.tobytes()))
            except ImageError:
                continue
            assert found.dtype in (np.uint8, np.uint16) and found.ndim in (2, 3) and found.size > 0


# What cv_bridge is asked for, by what it converts: its colours to RGB, and the rest left as it is.
BRIDGED = {
    **dict.fromkeys(("mono8", "mono16", "8UC1", "16UC1", "rgb8", "rgb16"), "passthrough"),
    **dict.fromkeys(
        ("bgr8", "rgba8", "bgra8", "yuv422", "yuv422_yuy2", "uyvy", "yuyv", "nv21", "nv24", "nv12"), "rgb8"
    ),
    **{f"bayer_{order}8": "rgb8" for order in ("rggb", "bggr", "gbrg", "grbg")},
    **{f"bayer_{order}16": "rgb16" for order in ("rggb", "bggr", "gbrg", "grbg")},
    **dict.fromkeys(("bgr16", "rgba16", "bgra16"), "rgb16"),
}
BRIDGE = """
import sys
import numpy as np
from cv_bridge import CvBridge, CvBridgeError
from sensor_msgs.msg import Image
folder, *pairs = sys.argv[1:]
CvBridge().imgmsg_to_cv2(Image(height=1, width=1, encoding="bgr8", step=3, data=bytes(3)), "rgb8")
for pair in pairs:
    encoding, wanted = pair.split(":")
    with np.load(f"{folder}/{encoding}.npz") as file:
        fields = {name: int(file[name]) for name in ("height", "width", "step", "is_bigendian")}
        image = Image(encoding=encoding, **fields)
        image.data.frombytes(file["data"].tobytes())
    try:
        np.save(f"{folder}/{encoding}.npy", CvBridge().imgmsg_to_cv2(image, wanted))
    except (CvBridgeError, KeyError, TypeError, ValueError) as error:
        print(encoding, repr(error))
"""


def test_pixels_are_those_of_cv_bridge(rgb: np.ndarray, tmp_path: Path) -> None:
    """In a process of its own: binaries of cv_bridge that were built for another numpy may end the process."""
    if importlib.util.find_spec("cv_bridge") is None:
        pytest.skip("cv_bridge is not installed (apt install ros-$ROS_DISTRO-cv-bridge)")
    sources = {encoding: bridge_sample(rgb, encoding) for encoding in BRIDGED}
    for encoding, source in sources.items():
        np.savez(tmp_path / f"{encoding}.npz", **{**vars(source), "data": np.frombuffer(source.data, np.uint8)})
    words = [f"{encoding}:{wanted}" for encoding, wanted in BRIDGED.items()]
    done = subprocess.run([sys.executable, "-c", BRIDGE, tmp_path, *words], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cv_bridge is installed and does not run here: {done.stderr[-300:]}")
    compared = [encoding for encoding in sources if (tmp_path / f"{encoding}.npy").exists()]
    for encoding in compared:
        bridged = np.load(tmp_path / f"{encoding}.npy").squeeze()
        np.testing.assert_array_equal(image_to_array(sources[encoding]), bridged, err_msg=encoding)
    assert {"mono8", "bgr8", "bgra8", "bayer_rggb8", "yuv422"} <= set(compared), done.stdout


def bridge_sample(rgb: np.ndarray, encoding: str) -> Image:
    """Random bytes, in the layout that cv_bridge takes: whole rows, the byte order of this machine."""
    if encoding.startswith("nv"):
        return semi_planar(rgb, encoding, padding=0)
    wide = 2 if "16" in encoding else 1
    four, two = "a8" in encoding or "a16" in encoding, encoding.startswith(("yu", "uy"))
    channels = 4 if four else 2 if two else 3 if encoding.startswith(("rgb", "bgr")) else 1
    shape = (HEIGHT, WIDTH * channels * wide)
    data = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).tobytes()
    return Image(HEIGHT, WIDTH, encoding, int(sys.byteorder == "big"), shape[1], data)


# -- depth -------------------------------------------------------------------------------------------------------------


def test_depth_maps_are_in_metres_and_unknown_where_there_is_none() -> None:
    millimetres = np.array([[0, 1500], [2, 65535]], np.uint16)
    expected = np.array([[np.nan, 1.5], [0.002, 65.535]], np.float32)
    np.testing.assert_allclose(depth_to_array(message(millimetres, "16UC1", padding=3, bigendian=True)), expected)
    metres = np.array([[np.nan, 1.5], [-1, np.inf]], np.float32)
    found = depth_to_array(message(metres, "32FC1"))
    assert found.dtype == np.float32 and found[0, 1] == 1.5 and np.isnan(found).sum() == 3
    with pytest.raises(ImageError, match="expected a depth map .*'rgb8'"):
        depth_to_array(message(np.zeros((2, 2, 3), np.uint8), "rgb8"))


def test_compressed_depth_maps() -> None:
    """As compressed_depth_image_transport writes them: 32FC1 by inverse depths, most exact near the camera."""
    millimetres = np.arange(0, 6000, 10, np.uint16).reshape(20, 30)
    code = cv2.imencode(".png", millimetres)[1].tobytes()
    found = depth_to_array(CompressedImage("16UC1; compressedDepth png", bytes(12) + code))
    np.testing.assert_allclose(found[0, 1:], millimetres[0, 1:] * 1e-3, rtol=1e-6)
    assert np.isnan(found[0, 0])

    a, b = np.float32(100 * 101), np.float32(1 - 100 * 101 / 10)
    metres = np.linspace(0.5, 9, 600, dtype=np.float32).reshape(20, 30)
    quantised = np.where(metres < 8, a / metres + b, 0).astype(np.uint16)
    header = bytes(4) + np.array([a, b], np.float32).tobytes()
    code = cv2.imencode(".png", quantised)[1].tobytes()
    found = depth_to_array(CompressedImage("32FC1; compressedDepth", header + code))
    np.testing.assert_allclose(found[metres < 8], metres[metres < 8], rtol=0.01)
    assert np.isnan(found[metres >= 8]).all()


@pytest.mark.parametrize("cut", [0, 5, 12, 40, -4])
def test_damaged_compressed_depth_is_an_error(cut: int) -> None:
    code = bytes(12) + cv2.imencode(".png", np.full((20, 30), 1000, np.uint16))[1].tobytes()
    with pytest.raises(ImageError):
        depth_to_array(CompressedImage("16UC1; compressedDepth", code[:cut]))


@pytest.mark.parametrize("format", ["jpeg", "16UC1; compressedDepth rvl", "mono8; png compressed"])
def test_what_is_no_compressed_depth_is_named(format: str) -> None:
    with pytest.raises(ImageError, match="expected a depth map"):
        depth_to_array(CompressedImage(format, bytes(40)))
