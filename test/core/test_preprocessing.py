from __future__ import annotations

import numpy as np
import pytest
import torch

from scfeat_core import preprocessing
from scfeat_core.network.model import IMAGENET_MEAN, IMAGENET_STD
from scfeat_core.preprocessing import normalise, stack_images


@pytest.mark.parametrize("size", [(33, 47), (64, 100), (130, 32)])
@pytest.mark.parametrize("kind", ["gray", "rgb", "rgba", "planes", "turned"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float16"])
def test_images_are_normalised_as_defined(size, kind, dtype):
    """On a CPU, and as any other device does it: whatever the layout in memory, whole strips and what is left."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (*size, 4)).astype(np.uint8)
    full = {"uint8": 255, "uint16": 65535}.get(dtype, 1)
    image = (levels / 255.0 * full).astype(dtype)
    colours = {"gray": image[..., 0], "rgb": image[..., :3].copy(), "rgba": image}.get(kind, image[..., :3])
    given = torch.from_numpy(np.moveaxis(colours.astype(np.float32) / full, 2, 0)) if kind == "planes" else colours
    given = np.rot90(given, 2) if kind == "turned" else given
    stacked = stack_images([given, given])
    found = normalise(stacked)
    assert found.shape == (2, 3, *size) and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    plain = stack_images([given]).numpy()[0].astype(np.float64) / (255 if stacked.dtype == torch.uint8 else 1)
    expected = (plain - IMAGENET_MEAN) / IMAGENET_STD
    for each in found:
        np.testing.assert_allclose(each.permute(1, 2, 0), np.broadcast_to(expected, (*size, 3)), atol=2e-6)
    elsewhere = preprocessing._normalised(stacked, 255.0 if stacked.dtype == torch.uint8 else 1.0)
    torch.testing.assert_close(found.permute(0, 2, 3, 1), elsewhere, rtol=0, atol=2e-6)


def test_the_image_stays_as_it_was():
    image = np.random.default_rng(0).uniform(0, 1, (40, 50, 3)).astype(np.float32)
    before = image.copy()
    normalise(stack_images([image]))
    assert np.array_equal(image, before)
