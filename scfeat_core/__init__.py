"""scfeat_core: the SCFeat network, its training, matching and evaluation. Never imports ROS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scfeat_core.errors import ScfeatError

if TYPE_CHECKING:
    from scfeat_core.extraction import Extractor
    from scfeat_core.frontend import Frontend
    from scfeat_core.matching import match
    from scfeat_core.network.model import SCFeat

__version__ = "0.1.0"
__all__ = ["Extractor", "Frontend", "SCFeat", "ScfeatError", "match"]

_LAZY = {"Extractor": "extraction", "Frontend": "frontend", "match": "matching", "SCFeat": "network.model"}


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for, so that ``scfeat --help`` stays quick."""
    if name not in _LAZY:
        raise AttributeError(f"module 'scfeat_core' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"scfeat_core.{_LAZY[name]}"), name)
