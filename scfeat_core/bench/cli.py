"""``scfeat bench``: times of every stage, beside other features, the floors of the machine, and earlier results."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfeat_core.commands.common import count_from

if TYPE_CHECKING:
    from scfeat_core.bench.settings import Settings

EXIT_FAILED = 1  # a condition of --fail-if holds
EXIT_UNDECIDED = 2  # a condition cannot be told, as of a replay
EXIT_INTERRUPTED = 130
JSON_FILE, PAGE = "bench.json", "report.html"

EPILOG = """\
Every option of the first group takes several values, separated by commas, and all combinations are measured.
Everything of one size, budget and batch takes turns, round after round, and ratios are those of the same rounds: so
they hold on a machine that does other things, too, where milliseconds do not.

Where rclpy is there, messages are published to a subscriber in another process, on a graph of their own.

--peer module:callable   measures (image (H, W, 3) uint8 RGB, max_keypoints) -> features of yours; whatever it returns,
                         but not None. Its folder must be on PYTHONPATH. With a parameter "device" it is told that of
                         the first of ours.
--fail-if CONDITION      a stage, an operator and how many times what it was in OLD.json: "network>1.2". Exit status 1
                         where it holds for any size and variant; 2 where that cannot be told, as a variant that was
                         measured in OLD.json is not now.

examples:
  scfeat bench --quick                                      a first look, in a minute
  scfeat bench --size 640x480,1280x720 --weights lite,r50   r50 with random weights takes as long as a trained one
  scfeat bench --batch 1,2,4,8                              what several cameras cost
  scfeat bench --peer xfeat_peer:xfeat                      beside XFeat, see docs/performance.md
  scfeat bench --count --weights lite,r50 --size 1280x720   for machines that are not at hand
  scfeat bench --growth                                     exponents: against pixels up to 4K, and points up to 8192
  scfeat bench --compare old/bench.json --fail-if "network>1.2" --fail-if "total>1.2" --relative"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what")
    what.add_argument(
        "--weights",
        type=_words,
        default=["lite"],
        metavar="NAME",
        help="lite, a .safetensors file, or r18, r34, r50 with random weights (lite)",
    )
    what.add_argument("--size", type=_sizes, metavar="WxH", help="of the images (640x480; with --growth VGA to 4K)")
    what.add_argument("--budget", type=_counts, metavar="N", help="most keypoints (1024; with --growth 256 to 8192)")
    what.add_argument("--batch", type=_counts, default=[1], metavar="N", help="images at once (1)")
    what.add_argument("--device", type=_words, default=["cpu"], metavar="NAME", help="cpu, cuda, cuda:1, auto (cpu)")
    what.add_argument(
        "--precision",
        type=_words,
        default=["float32"],
        metavar="NAME",
        help="float32, bfloat16, float16, auto (float32)",
    )
    what.add_argument(
        "--engine",
        type=_words,
        default=["eager"],
        metavar="NAME",
        help="what runs the network, see docs/performance.md (eager)",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--images", type=Path, metavar="PATH", help="image or folder (a rendered room)")
    how.add_argument(
        "--levels",
        type=count_from(1),
        default=1,
        metavar="N",
        help="of the image pyramid (%(default)s, as the node runs)",
    )
    how.add_argument(
        "--threads", type=count_from(1), default=0, metavar="N", help="of torch and OpenCV (as many as torch takes)"
    )
    how.add_argument("--rounds", type=count_from(1), metavar="N", help="that count (30)")
    how.add_argument("--warm-up", type=count_from(0), default=3, metavar="N", help="rounds before those (%(default)s)")
    how.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="begin no round of a case after S seconds; at least five are done",
    )
    how.add_argument("--quick", action="store_true", help="5 rounds, 1 before them: a look, not a measurement")
    how.add_argument(
        "--peer", action="append", default=[], metavar="MODULE:CALLABLE", help="measure this, too; may be repeated"
    )
    how.add_argument(
        "--growth",
        action="store_true",
        help="growth against pixels and points instead, of the first variant; exponents from three of either on",
    )
    how.add_argument(
        "--count", action="store_true", help="operations, bytes and memory of the network instead; measures nothing"
    )
    out = parser.add_argument_group("results")
    out.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("build/bench"),
        metavar="DIR",
        help=f"for {JSON_FILE} and {PAGE} (%(default)s)",
    )
    out.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    out.add_argument("--results", type=Path, metavar="NEW.json", help="of an earlier run, instead of measuring")
    out.add_argument("--compare", type=Path, metavar="OLD.json", help="print how many times these the results are")
    out.add_argument(
        "--relative",
        action="store_true",
        help="divide that by what became of OpenCV's detectors: for machines of varying speed",
    )
    out.add_argument(
        "--fail-if", action="append", default=[], metavar="CONDITION", help="on the ratios to OLD.json; may be repeated"
    )
    out.add_argument("--no-progress", action="store_true", help="no progress bar (none without a terminal)")


def run(args: argparse.Namespace) -> int:
    from scfeat_core.bench import comparing
    from scfeat_core.bench.report import page
    from scfeat_core.bench.tables import as_text
    from scfeat_core.report import check_folder, write

    if args.count:
        return _count(args)
    comparing.require_comparison(args.fail_if, args.compare is not None)
    checks = comparing.parse_checks(args.fail_if)
    old = None if args.compare is None else comparing.read_results(args.compare)
    check_folder(args.out)
    results = comparing.read_results(args.results) if args.results else _measured(args)
    print(as_text(results, "markdown" if args.markdown else "plain"))
    if args.results is None:
        write(args.out / JSON_FILE, json.dumps(results, indent=1, allow_nan=False) + "\n", "--out")
    write(args.out / PAGE, page(results), "--out")
    print(f"\n{args.out / PAGE}")
    status = 0 if old is None else _compared(old, results, args, checks)
    return EXIT_INTERRUPTED if results["interrupted"] else status


def _count(args: argparse.Namespace) -> int:
    from scfeat_core.bench import counting
    from scfeat_core.bench.tables import aligned, markdown

    rows = counting.rows(counting.count(settings_from(args)))
    print(markdown(rows) if args.markdown else aligned(rows))
    return 0


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    from scfeat_core.bench import growth, measuring, own

    settings = settings_from(args)
    grow = partial(growth.run, sizes=args.size or growth.SIZES, points=args.budget or growth.POINTS)
    total = (1 if args.growth else len(settings.cases)) * (settings.rounds + settings.warm_up)
    with _progress(total, not args.no_progress and sys.stderr.isatty()) as step:
        if args.growth:
            return grow(settings, step)
        with own.listened_ros() as (ros, missing):
            results = measuring.run(settings, step, ros)
    return {**results, "warnings": [*filter(None, [missing]), *results["warnings"]]}


def settings_from(args: argparse.Namespace) -> Settings:
    """All combinations of the values that were given; growth has sizes and budgets of its own."""
    from scfeat_core.bench.settings import QUICK_ROUNDS, ROUNDS, Case, Settings, Variant

    usual = Case()
    sizes, budgets = ([usual.size], [usual.budget]) if args.growth else (args.size, args.budget)
    return Settings(
        cases=tuple(Case(*each) for each in product(sizes or [usual.size], budgets or [usual.budget], args.batch)),
        variants=tuple(Variant(*each) for each in product(args.weights, args.device, args.precision, args.engine)),
        levels=args.levels,
        threads=args.threads,
        rounds=args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
        warm_up=min(args.warm_up, 1) if args.quick else args.warm_up,
        seconds=args.seconds,
        peers=tuple(args.peer),
        images=args.images,
    )


def _compared(old: dict[str, Any], new: dict[str, Any], args: argparse.Namespace, checks: Sequence[Any]) -> int:
    """Print the ratios, what is missing and what fails; the exit status."""
    from scfeat_core.bench import comparing
    from scfeat_core.bench.tables import aligned, markdown

    found = comparing.changes(old, new, args.relative)
    rows = comparing.change_rows(found)
    print(f"\n{markdown(rows) if args.markdown else aligned(rows)}")
    missing = comparing.gone(old, new)
    undecided, failed = comparing.undecided(checks, missing), comparing.failures(checks, found, missing)
    told = [f"not the same machine: {each}" for each in comparing.other_machine(old, new)]
    unchecked = [each for each in missing if each not in undecided]
    _tell("warning", [*told, *comparing.other_engines(old, new), *unchecked])
    _tell("undecided", undecided)
    _tell("failed", failed)
    return EXIT_UNDECIDED if undecided else EXIT_FAILED if failed else 0


def _tell(kind: str, lines: Sequence[object]) -> None:
    for line in lines:
        print(f"{kind}: {line}", file=sys.stderr)


@contextlib.contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """A bar of the rounds, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, unit="round", dynamic_ncols=True, disable=not wanted, leave=False) as bar:
        yield bar.update


# -- values ------------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError(f"expected at least one value, found '{text}'")
    return list(dict.fromkeys(words))


def _counts(text: str) -> list[int]:
    return [count_from(1)(word) for word in _words(text)]


def _sizes(text: str) -> list[tuple[int, int]]:
    return [_size(word) for word in _words(text)]


def _size(text: str) -> tuple[int, int]:
    from scfeat_core.network.model import MIN_IMAGE_SIZE

    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= MIN_IMAGE_SIZE):
        raise argparse.ArgumentTypeError(
            f"expected WIDTHxHEIGHT of at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}, such as 640x480, found '{text}'"
        )
    return int(width), int(height)
