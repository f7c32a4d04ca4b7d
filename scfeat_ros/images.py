"""sensor_msgs/Image and sensor_msgs/CompressedImage to numpy, gray or RGB, without a copy where the layout allows.

Works on anything with the fields of these messages (rclpy messages, messages that ``rosbags`` read from a bag), so
nothing of ROS is imported here. Encodings are those of sensor_msgs/image_encodings.hpp; the conversions are the ones
that cv_bridge asks of OpenCV, without its binaries (a test holds both to the same pixels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from scfeat_core.data.photos import is_cut_jpeg
from scfeat_core.errors import ImageError


@dataclass(frozen=True)
class Encoding:
    """How one encoding lies in memory, and the colour conversion of OpenCV that makes RGB of it (None: none needed)."""

    dtype: type = np.uint8
    channels: int = 1
    conversion: int | None = None

    @property
    def pixel_bytes(self) -> int:
        return self.channels * np.dtype(self.dtype).itemsize


# OpenCV names a Bayer pattern after the second row, ROS after the first: bayer_rggb8 is BayerBG there.
_BAYER = {
    "rggb": cv2.COLOR_BayerBG2RGB,
    "bggr": cv2.COLOR_BayerRG2RGB,
    "gbrg": cv2.COLOR_BayerGR2RGB,
    "grbg": cv2.COLOR_BayerGB2RGB,
}
# 8UC3 and the other nameless ones follow OpenCV, whose matrices they are: blue comes first.
_ENCODINGS = {
    **dict.fromkeys(("mono8", "8UC1"), Encoding()),
    **dict.fromkeys(("mono16", "16UC1"), Encoding(np.uint16)),
    "rgb8": Encoding(channels=3),
    "rgba8": Encoding(channels=4),
    **dict.fromkeys(("bgr8", "8UC3"), Encoding(channels=3, conversion=cv2.COLOR_BGR2RGB)),
    **dict.fromkeys(("bgra8", "8UC4"), Encoding(channels=4, conversion=cv2.COLOR_BGRA2RGB)),
    "rgb16": Encoding(np.uint16, 3),
    "rgba16": Encoding(np.uint16, 4),
    **dict.fromkeys(("bgr16", "16UC3"), Encoding(np.uint16, 3, cv2.COLOR_BGR2RGB)),
    **dict.fromkeys(("bgra16", "16UC4"), Encoding(np.uint16, 4, cv2.COLOR_BGRA2RGB)),
    **{f"bayer_{order}8": Encoding(conversion=code) for order, code in _BAYER.items()},
    **{f"bayer_{order}16": Encoding(np.uint16, conversion=code) for order, code in _BAYER.items()},
    **dict.fromkeys(("yuv422", "uyvy"), Encoding(channels=2, conversion=cv2.COLOR_YUV2RGB_UYVY)),
    **dict.fromkeys(("yuv422_yuy2", "yuyv"), Encoding(channels=2, conversion=cv2.COLOR_YUV2RGB_YUYV)),
}


@dataclass(frozen=True)
class SemiPlanar:
    """A plane of luma, then one of interleaved chroma, both with rows of ``step`` bytes per ``width`` bytes of content.

    subsampling: pixels per chroma value, along x and y alike. conversion: of OpenCV; None: by the matrix.
    """

    subsampling: int
    conversion: int | None = None


# height is that of the image, as sensor_msgs defines it, not that of both planes on top of each other.
_SEMI_PLANAR = {
    "nv12": SemiPlanar(2, cv2.COLOR_YUV2RGB_NV12),
    "nv21": SemiPlanar(2, cv2.COLOR_YUV2RGB_NV21),
    "nv24": SemiPlanar(1),
}
# Y, Cb, Cr of 8 bits, studio swing, to RGB (ITU-R BT.601), as OpenCV has it for the subsampled ones.
_BT601 = np.array([[1.164, 0.0, 1.596], [1.164, -0.391, -0.813], [1.164, 2.018, 0.0]])
_BT601 = np.hstack([_BT601, -_BT601 @ [[16], [128], [128]]]).astype(np.float32)

ENCODINGS = (*_ENCODINGS, *_SEMI_PLANAR)

_DEPTHS = {"16UC1": Encoding(np.uint16), "32FC1": Encoding(np.float32)}  # REP 118

# No picture has more: a JPEG takes at least a bit for each block of 64, and a PNG of one bit a pixel, which no camera
# sends, could reach 8256 (deflate shrinks by at most 1032).
_PIXELS_PER_BYTE = 1032


def image_to_array(message: Any) -> np.ndarray:
    """The pixels of a sensor_msgs/Image: (H, W) gray or (H, W, 3) RGB, uint8 or uint16.

    A view of ``message.data`` for gray, RGB and RGBA in the byte order of this machine, whatever the row step; a
    converted copy for the rest. Raises ImageError where the encoding is unknown or the fields contradict each other.
    """
    if message.encoding in _SEMI_PLANAR:
        return _convert_planes(message, _SEMI_PLANAR[message.encoding])
    encoding = _lookup(message.encoding)
    pixels = _view(message, encoding)
    if encoding.conversion is not None:
        return _convert(pixels, encoding.conversion, message.encoding)
    return pixels[..., :3] if encoding.channels == 4 else pixels


def depth_to_array(message: Any) -> np.ndarray:
    """The depths of a sensor_msgs/Image or of a CompressedImage of compressedDepth: (H, W) float32 metres, NaN where
    there is none.

    REP 118: 16UC1 in millimetres, 0 where there is none, and 32FC1 in metres. Raises ImageError for another encoding,
    and where the fields contradict each other or the data is damaged.
    """
    if hasattr(message, "format"):
        depth = _decompressed_depth(message)
    elif message.encoding in _DEPTHS:
        depth = _view(message, _DEPTHS[message.encoding])
    else:
        raise _no_depth(f"encoding {message.encoding!r}")
    metres = depth * np.float32(1e-3) if depth.dtype == np.uint16 else depth
    return np.where((metres > 0) & (metres < np.inf), metres, np.float32(np.nan))


def _decompressed_depth(message: Any) -> np.ndarray:
    """Of compressed_depth_image_transport: a header (format, two floats) and a PNG of 16 bits; for 32FC1 that has
    inverse depths q = a / depth + b, where q is not 0."""
    encoding, code = message.format.partition(";")[0].strip(), bytes(message.data)
    if encoding not in _DEPTHS or "compressedDepth" not in message.format or "rvl" in message.format:
        raise _no_depth(f"format {message.format!r}")
    if _is_cut_png(code[12:]) or _claimed_pixels(code[12:]) > _PIXELS_PER_BYTE * len(code):
        raise _undecodable(message, "that are a picture without its end")
    pixels = cv2.imdecode(np.frombuffer(code, np.uint8, offset=12), cv2.IMREAD_UNCHANGED) if len(code) > 12 else None
    if pixels is None or pixels.ndim != 2 or pixels.dtype != np.uint16:
        raise _undecodable(message, "that are no PNG of 16 bits")
    if encoding == "16UC1":
        return pixels
    a, b = np.frombuffer(code, np.float32, 2, offset=4)
    with np.errstate(divide="ignore"):
        return np.where(pixels > 0, a / (pixels - b), np.float32(np.nan))


def _no_depth(found: str) -> ImageError:
    return ImageError(f"expected a depth map (16UC1, 32FC1; compressedDepth as PNG), found {found}")


def compressed_to_array(message: Any) -> np.ndarray:
    """The pixels of a sensor_msgs/CompressedImage (JPEG, PNG): (H, W) gray or (H, W, 3) RGB, uint8 or uint16.

    Raises ImageError where the data is empty, damaged, cut short, or not a picture (compressedDepth).
    """
    if "compressedDepth" in message.format:
        raise ImageError(
            f"expected a JPEG or PNG picture, found a depth map (format {message.format!r}): "
            "subscribe to the colour or gray image of this camera"
        )
    code = bytes(message.data)
    if is_cut_jpeg(code) or _is_cut_png(code):  # OpenCV would fill the rest with gray, or make room for gigabytes
        raise _undecodable(message, "that are a picture without its end")
    if (pixels := _claimed_pixels(code)) > _PIXELS_PER_BYTE * len(code):  # it would fill them
        raise _undecodable(message, f"whose header claims {pixels} pixels")
    # The camera decides what is up, not the EXIF tag: calibration refers to the pixels as they were sent.
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(code, np.uint8), flags) if code else None
    except cv2.error:  # some damage it raises for, such as a size beyond its limits
        image = None
    if image is None:
        raise _undecodable(message, "that OpenCV cannot decode")
    return image if image.ndim == 2 else _convert(image, cv2.COLOR_BGR2RGB, message.format)


def _undecodable(message: Any, found: str) -> ImageError:
    return ImageError(
        f"expected a JPEG or PNG picture, found {len(message.data)} bytes {found} (format {message.format!r}): "
        "check the publisher of the compressed topic, or use image_transport:=raw"
    )


def _is_cut_png(code: bytes) -> bool:
    """Whether these are the bytes of a PNG whose chunks do not end with the last one."""
    at = 8
    while at + 12 <= len(code) and code[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(code[at : at + 4], "big")
    return code.startswith(b"\x89PNG") and at + 12 > len(code)


def _claimed_pixels(code: bytes) -> int:
    """Width times height in the header of a PNG (first chunk) or JPEG (frame header); 0 where there is none."""
    if code.startswith(b"\x89PNG"):
        return int.from_bytes(code[16:20], "big") * int.from_bytes(code[20:24], "big")
    at = 2
    while code.startswith(b"\xff\xd8") and at + 9 <= len(code) and code[at] == 0xFF and code[at + 1] != 0xDA:
        kind = code[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # SOFn; not DHT, JPG, DAC
            return int.from_bytes(code[at + 5 : at + 7], "big") * int.from_bytes(code[at + 7 : at + 9], "big")
        at += 1 if kind == 0xFF else 2 + int.from_bytes(code[at + 2 : at + 4], "big")
    return 0


def _convert(pixels: np.ndarray, conversion: int, encoding: str) -> np.ndarray:
    try:
        return cv2.cvtColor(pixels, conversion)
    except cv2.error as error:
        raise _not_convertible(encoding, pixels.shape[1], pixels.shape[0], error) from error


def _convert_planes(message: Any, encoding: SemiPlanar) -> np.ndarray:
    """(H, W, 3) RGB of a plane of luma and one of interleaved chroma."""
    height, width, step = message.height, message.width, message.step
    _check_fields(message, width)
    rows, columns = -(-height // encoding.subsampling), -(-width // encoding.subsampling)
    chroma_step = 2 * step // encoding.subsampling
    data = _bytes(message, height * step + (rows - 1) * chroma_step + 2 * columns)
    luma = np.ndarray((height, width), np.uint8, data, strides=(step, 1))
    chroma = np.ndarray((rows, columns, 2), np.uint8, data, height * step, (chroma_step, 2, 1))
    try:
        if encoding.conversion is None:
            return cv2.transform(np.dstack([luma, chroma]), _BT601)
        return cv2.cvtColorTwoPlane(luma, chroma, encoding.conversion)
    except cv2.error as error:
        raise _not_convertible(message.encoding, width, height, error) from error


def _not_convertible(encoding: str, width: int, height: int, error: cv2.error) -> ImageError:
    return ImageError(
        f"expected {encoding} pixels that can be made RGB, found {width}x{height} that OpenCV cannot convert "
        f"({error.err or error}); YUV 4:2:2 needs an even width, 4:2:0 an even height, too: let the camera driver "
        "send mono8, rgb8 or bgr8"
    )


def _lookup(name: str) -> Encoding:
    encoding = _ENCODINGS.get(name)
    if encoding is None:
        raise ImageError(
            f"unknown image encoding {name!r}: expected one of {', '.join(ENCODINGS)}; "
            "let the camera driver send mono8, rgb8 or bgr8"
        )
    return encoding


def _view(message: Any, encoding: Encoding) -> np.ndarray:
    """(H, W) or (H, W, C) view of the data; a copy only for the other byte order and for odd steps of 16-bit rows."""
    height, width, step = message.height, message.width, message.step
    row = width * encoding.pixel_bytes
    _check_fields(message, row)
    data = _bytes(message, (height - 1) * step + row)
    dtype = np.dtype(encoding.dtype).newbyteorder(">" if message.is_bigendian else "<")
    strides: tuple[int, ...] = (step, encoding.pixel_bytes, dtype.itemsize)
    shape: tuple[int, ...] = (height, width, encoding.channels)
    if encoding.channels == 1:
        shape, strides = shape[:2], strides[:2]
    pixels = np.ndarray(shape, dtype, data, strides=strides)
    native = pixels.astype(encoding.dtype, copy=False)
    return native if native.flags.aligned and step % dtype.itemsize == 0 else native.copy()


def _check_fields(message: Any, row: int) -> None:
    """row: bytes of the pixels of one row."""
    if message.height == 0 or message.width == 0:
        raise ImageError(
            f"expected an image with pixels, found {message.width}x{message.height}: check the camera driver"
        )
    if message.step < row:
        raise ImageError(
            f"expected a step of at least {row} bytes for {message.width} pixels of {message.encoding}, found "
            f"{message.step}: the publisher sets step, width or encoding wrongly"
        )


def _bytes(message: Any, needed: int) -> np.ndarray:
    """The data, at least ``needed`` bytes: the padding of the last row may be missing, as some drivers cut it off."""
    data = np.frombuffer(message.data, np.uint8)
    if len(data) < needed:
        raise ImageError(
            f"truncated image: expected {needed} bytes for {message.height} rows of {message.step} bytes of "
            f"{message.encoding}, found {len(data)}; check the driver that publishes it"
        )
    return data
