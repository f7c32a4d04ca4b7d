"""The plots of docs/performance.md, from what ``scfeat bench`` wrote.

    scfeat bench --peer xfeat_peer:xfeat --out build/bench
    scfeat bench --growth --out build/growth
    python benchmarks/plot_performance.py build/bench/bench.json build/growth/bench.json --output docs

performance_stages.svg: the stages of the first variant in the first case, with their floors, and the extraction of all
contenders. performance_growth.svg: time against pixels and against points, with the fitted exponents. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from scfeat_core.bench.comparing import read_results

plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scfeat", "font.size": 9})
plt.rcParams.update({"axes.grid": True, "axes.axisbelow": True})
OURS, OTHER, FLOOR = "#12795a", "#9aa3ad", "#22262b"
MADE_OF_OTHERS = ("extract", "total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, help="of scfeat bench")
    parser.add_argument("growth", type=Path, help="of scfeat bench --growth")
    parser.add_argument("--output", type=Path, default=Path("docs"), metavar="DIR")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    plot_stages(read_results(args.bench)["cases"][0], args.output / "performance_stages.svg")
    plot_growth(read_results(args.growth)["growth"], args.output / "performance_growth.svg")


def plot_stages(case: Mapping[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    ours = case["contenders"][0]
    stages = {name: each for name, each in ours["stages"].items() if name not in MADE_OF_OTHERS}
    bars(left, {name: each["median_ms"] for name, each in stages.items()}, dict.fromkeys(stages, OURS))
    floors = {name: each["floor"]["floor_ms"] for name, each in stages.items() if each.get("floor")}
    left.barh([list(stages).index(name) for name in floors], list(floors.values()), height=0.3, color=FLOOR)
    left.set(xscale="log", xlabel="milliseconds; dark: floor", title=f"{ours['name']}, stage by stage")
    left.set_xlim(0.01)
    measured = {each["name"]: each for each in case["contenders"] if "extract" in each["stages"]}
    colours = {name: OURS if each["kind"] == "scfeat" else OTHER for name, each in measured.items()}
    bars(right, {name: each["stages"]["extract"]["median_ms"] for name, each in measured.items()}, colours)
    right.set(xlabel="milliseconds", title=f"Extraction, {case['name']}")
    save(figure, path)


def bars(axes: Any, values: Mapping[str, float], colours: Mapping[str, str]) -> None:
    places = range(len(values))
    axes.barh(places, list(values.values()), height=0.7, color=[colours[name] for name in values])
    axes.set_yticks(places, list(values))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def plot_growth(curves: list[Mapping[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, (against, unit) in zip(axes, (("pixels", 1e6), ("points", 1)), strict=True):
        places: list[float] = []
        for curve in curves:
            if curve["against"] == against and curve["fit"]:
                fit = curve["fit"]
                name = f"{curve['contender'].split(' cpu')[0]} {curve['stage']}"
                label = f"{name}: {fit['exponent']:.2f} ± {fit['error']:.2f}"
                places = [x / unit for x in curve["x"]]
                panel.loglog(places, curve["median_ms"], marker="o", markersize=3, linewidth=1.2, label=label)
        panel.set_xticks(places, [f"{place:.2g}" if unit > 1 else f"{place:.0f}" for place in places])
        panel.set_xticks([], minor=True)
        panel.set(
            xlabel="megapixels" if unit > 1 else against,
            ylabel="milliseconds",
            title=f"Time against {against}, and exponents",
        )
        panel.legend(fontsize=7)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    main()
