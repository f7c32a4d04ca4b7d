"""The exception family of scfeat: every message says what was expected, what was found, and what to do."""

from __future__ import annotations


class ScfeatError(Exception):
    """Root of everything that scfeat raises on purpose."""


class ConfigError(ScfeatError, ValueError):
    """A configuration key is unknown, or a value is of the wrong type or out of range."""


class ImageError(ScfeatError, ValueError):
    """An image, a mask or an encoding that cannot be used; the frame is dropped, the process goes on."""


class StaleImageError(ImageError):
    """An image that comes after a newer one of its camera, or a second time."""


class CalibrationError(ScfeatError, ValueError):
    """Camera intrinsics that are missing, not finite, or not usable."""


class WeightsError(ScfeatError):
    """A weight file that is missing, damaged, or made for another network."""


class DeviceError(ScfeatError, RuntimeError):
    """A compute device that was asked for and is not there."""


class DataError(ScfeatError):
    """A data set, a bag or a ground-truth file that is missing, damaged, or laid out differently."""


class FeatureError(ScfeatError, ValueError):
    """Features, descriptors or points of two views that cannot be used together."""
