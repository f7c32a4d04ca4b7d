"""sensor_msgs images to numpy: every encoding, odd layouts, and what is wrong with a bad one."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import pytest

from scfeat_core.errors import ImageError
from scfeat_ros.images import ENCODINGS, compressed_to_array, image_to_array

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


@pytest.mark.parametrize(("encoding", "luma"), [("yuv422", 1), ("uyvy", 1), ("yuv422_yuy2", 0), ("yuyv", 0)])
def test_yuv422(rgb: np.ndarray, encoding: str, luma: int) -> None:
    red, green, blue = (rgb[..., i].astype(float) for i in range(3))
    # ITU-R BT.601, studio swing
    y = 16 + (65.738 * red + 129.057 * green + 25.064 * blue) / 256
    u = 128 + (-37.945 * red - 74.494 * green + 112.439 * blue) / 256
    v = 128 + (112.439 * red - 94.154 * green - 18.285 * blue) / 256
    packed = np.empty((HEIGHT, WIDTH, 2), np.uint8)
    packed[..., luma] = y.round()
    packed[:, 0::2, 1 - luma] = u[:, 0::2].round()
    packed[:, 1::2, 1 - luma] = v[:, 0::2].round()
    found = image_to_array(message(packed, encoding, padding=8)).astype(int)
    assert abs(found - rgb).max() <= 8 and abs(found - rgb).mean() < 3  # two columns share their chroma


@pytest.mark.parametrize("encoding", ["yuv422", "yuyv"])
def test_an_odd_width_that_cannot_be_converted_is_explained(encoding: str) -> None:
    with pytest.raises(ImageError, match=f"{encoding} pixels.*found 31x32 .*even width"):
        image_to_array(Image(32, 31, encoding, 0, 62, bytes(62 * 32)))


def test_every_encoding_is_decoded() -> None:
    """No entry of the table names a conversion that OpenCV refuses."""
    for encoding in ENCODINGS:
        size = 32 * 4 * 8
        found = image_to_array(Image(32, 32, encoding, 0, size, bytes(32 * size)))
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


def test_a_picture_that_claims_to_be_huge_is_explained() -> None:
    data = bytearray(cv2.imencode(".jpg", np.zeros((16, 16), np.uint8))[1])
    size = data.index(b"\xff\xc0") + 5  # in the frame header
    data[size : size + 4] = b"\xff\x00" * 2  # more pixels than OpenCV takes: it raises
    with pytest.raises(ImageError, match="cannot decode"):
        compressed_to_array(CompressedImage("jpeg", bytes(data)))


@pytest.mark.parametrize(
    ("format", "data", "word"),
    [
        ("jpeg", b"", "found 0 bytes"),
        ("jpeg", b"\xff\xd8\xff\xe0 and then nothing", "cannot decode"),
        ("16UC1; compressedDepth png", b"\0" * 40, "depth map"),
    ],
)
def test_a_bad_compressed_picture_is_explained(format: str, data: bytes, word: str) -> None:
    with pytest.raises(ImageError, match=word):
        compressed_to_array(CompressedImage(format, data))
