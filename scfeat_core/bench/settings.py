"""What is measured: cases (the images and how many points), and in each of them contenders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

QUICK_ROUNDS = 5
ROUNDS = 30  # below that a median and its 5 and 95 % say little


@dataclass(frozen=True)
class Case:
    """size: (width, height), pixels. budget: most keypoints of an image. batch: images at once."""

    size: tuple[int, int] = (640, 480)
    budget: int = 1024
    batch: int = 1

    @property
    def size_text(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"

    def __str__(self) -> str:
        return f"{self.size_text}, {self.budget} points, batch {self.batch}"


@dataclass(frozen=True)
class Variant:
    """One way to run the network. weights: see ``network_weights``; the others are those of ``Extractor``."""

    weights: str = "lite"
    device: str = "cpu"
    precision: str = "float32"
    engine: str = "eager"

    def __str__(self) -> str:
        return f"scfeat {Path(self.weights).name} {self.device} {self.precision} {self.engine}"


@dataclass(frozen=True)
class Settings:
    """cases, variants: each of the latter in each of the former. levels: of the image pyramid. threads: of torch and
    OpenCV, 0 leaves those of torch. seconds: after which no further round of a case begins, 0 for no limit. peers:
    ``module:callable``. images: a folder or a file, None for the rendered scene."""

    cases: tuple[Case, ...] = (Case(),)
    variants: tuple[Variant, ...] = (Variant(),)
    levels: int = 1
    threads: int = 0
    rounds: int = ROUNDS
    warm_up: int = 3
    seconds: float = 0.0
    peers: tuple[str, ...] = ()
    images: Path | None = None
