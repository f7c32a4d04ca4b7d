"""The network rewritten for inference: the same function with less work."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scfeat_core.network.model import SCFeat


def inference_network(model: SCFeat) -> nn.Module:
    """A copy of ``model`` that maps a normalised image (B, 3, H, W) to what extraction needs, without gradients.

    Returns (score_map (B, 1, H, W), descriptor_map (B, D, h, w)), those of ``model`` in evaluation up to rounding.
    """
    return InferenceNetwork(model).eval().requires_grad_(False)


class InferenceNetwork(nn.Module):
    """See :func:`inference_network`."""

    def __init__(self, model: SCFeat) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        fold_batch_norms(self.model)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(image)
        return output.score_map, self.model.descriptor_map(output)


def fold_batch_norms(module: nn.Module) -> None:
    """Multiply each batch norm that directly follows a convolution into it, in place; for evaluation only."""
    previous: tuple[str, nn.Module] = ("", module)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and isinstance(previous[1], nn.Conv2d):
            setattr(module, previous[0], fuse_conv_bn_eval(previous[1], child))
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norms(child)
        previous = (name, child)
