"""Which images are matched: all with all, each with those that follow, or a list."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from scfeat_core.errors import ConfigError, DataError
from scfeat_core.reconstruction.hloc import Pair

OVERLAP = 10  # images after each one


def choose_pairs(names: Sequence[str], choice: str) -> list[Pair]:
    """Pairs of different images, each once, in the order of ``names``.

    choice: ``exhaustive``; ``sequential`` or ``sequential:N``, each image with the OVERLAP or N after it, where
    ``names`` is in the order of time; else the path of a file as hloc and COLMAP write it, with the names of two images
    in a line. Raises ConfigError, and DataError for a list that does not fit.
    """
    kind, _, count = choice.partition(":")
    if choice == "exhaustive":
        return list(combinations(names, 2))
    if kind == "sequential":
        overlap = _overlap(choice, count) if count else OVERLAP
        return [(name, other) for i, name in enumerate(names) for other in names[i + 1 : i + 1 + overlap]]
    return _read(Path(choice), names)


def _overlap(choice: str, count: str) -> int:
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"expected pairs such as 'sequential:{OVERLAP}', found '{choice}'")
    return int(count)


def _read(path: Path, names: Sequence[str]) -> list[Pair]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"expected pairs 'exhaustive', 'sequential', or a file with the names of two images in a line, found "
            f"'{path}': {error}"
        ) from error
    order = {name: i for i, name in enumerate(names)}
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    found: dict[Pair, None] = {}
    for number, words in rows:
        unknown = [word for word in words if word not in order]
        if len(words) != 2 or unknown or words[0] == words[1]:
            what = f"'{unknown[0]}', which is none of the {len(names)} images" if unknown else f"'{' '.join(words)}'"
            raise DataError(f"expected the names of two images in line {number} of {path}, found {what}")
        first, second = sorted(words, key=order.__getitem__)
        found[first, second] = None
    if not found:
        raise DataError(f"expected the names of two images in a line in {path}, found no line")
    return list(found)
