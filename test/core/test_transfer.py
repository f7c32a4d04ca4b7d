from __future__ import annotations

import numpy as np
import pytest
import torch

from scfeat_core.transfer import Download


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensors_arrive_as_they_were(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    floats = torch.arange(24, dtype=torch.float32, device=device).view(2, 3, 4).transpose(0, 2)
    numbers = torch.tensor([[-1, 1 << 30]], dtype=torch.int32, device=device)
    nothing = torch.zeros(0, 5, device=device)
    arrays = Download([floats, numbers, nothing, floats[1:, 0]]).arrays()
    for array, tensor in zip(arrays, (floats, numbers, nothing, floats[1:, 0]), strict=True):
        assert array.shape == tuple(tensor.shape) and torch.from_numpy(array).dtype == tensor.dtype
        np.testing.assert_array_equal(array, tensor.cpu().numpy())
    assert Download([]).arrays() == []
