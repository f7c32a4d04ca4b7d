"""What runs the network: the same two maps from the same image, by torch itself or by a library that is faster.

All engines but ``eager`` are made for one size at a time, and compared with float32 ``eager`` before an image goes
through them (making.py, parity.py): while that image waits, or while ``eager`` runs it (elsewhere.py). One that
deviates, or fails, is replaced by ``eager``, and says so in its ``note``. What is expensive to make is kept on disk
(cache.py).
"""

from scfeat_core.engines.contract import ENGINES, BuildEngines, Engine, EngineName
from scfeat_core.engines.factory import create_engine, engine_precisions

__all__ = ["ENGINES", "BuildEngines", "Engine", "EngineName", "create_engine", "engine_precisions"]
