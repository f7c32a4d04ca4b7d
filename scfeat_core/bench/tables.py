"""Results as rows of text: for the terminal, for Markdown, and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scfeat_core.bench.measuring import COMPARED

Rows = list[list[str]]
NOTHING = "–"
WHOLE = ("extract", "total")  # made of the other stages
_GIVEN = ("decode", "network")  # the rest is what the front end adds


def adding_up(stages: Mapping[str, Any]) -> list[str]:
    """Names of the stages that add up to all: publication is measured with the bytes that it sends."""
    return [name for name in stages if name not in WHOLE and not (name == "serialise" and "publish" in stages)]


def stage_rows(contender: Mapping[str, Any]) -> Rows:
    """A head, and one row a stage: median, 5 to 95 %, the share of the whole, the floor, and how many times it."""
    head = ["stage", "ms", "p5–p95", "% of all", "floor ms", "x floor", "bound by"]
    stages = contender["stages"]
    single = {name: stages[name]["median_ms"] for name in adding_up(stages)}
    shares = {name: f"{100 * value / (sum(single.values()) or 1):.0f}" for name, value in single.items()}
    rows = [_stage_row(name, figures, shares.get(name, NOTHING)) for name, figures in stages.items()]
    besides = sum(value for name, value in single.items() if name not in _GIVEN)
    return [head, *rows, ["all but decode and network", milliseconds(besides), *[NOTHING] * 5]]


def _stage_row(name: str, figures: Mapping[str, Any], share: str) -> list[str]:
    floor = figures.get("floor") or {}
    cells = [name, _median(figures), _range(figures), share]
    if not floor.get("floor_ms"):
        return [*cells, NOTHING, NOTHING, NOTHING]
    return [*cells, milliseconds(floor["floor_ms"]), f"{floor['ratio']:.1f}", floor["bound"]]


def contender_rows(case: Mapping[str, Any]) -> Rows:
    """A head, and one row a contender: extraction of one image or batch, beside that of the first one."""
    head = ["contender", "extract ms", "p5–p95", "x first", "95 %", "images/s", "points"]
    return [head, *(_contender_row(each, case["batch"]) for each in case["contenders"])]


def _contender_row(contender: Mapping[str, Any], batch: int) -> list[str]:
    figures = contender["stages"].get(COMPARED)
    if not figures:
        return [contender["name"], *[NOTHING] * 6]
    ratio = contender.get("ratio") or {}
    points = contender.get("points")
    return [
        contender["name"],
        _median(figures),
        _range(figures),
        f"{ratio['median']:.2f}" if ratio else NOTHING,
        f"{ratio['low']:.2f}–{ratio['high']:.2f}" if ratio else NOTHING,
        f"{1e3 * batch / figures['median_ms']:.0f}" if figures["median_ms"] > 0 else NOTHING,
        NOTHING if points is None else f"{points:.0f}",
    ]


def _median(figures: Mapping[str, Any]) -> str:
    """With a tilde where it is noisy."""
    return f"{'~' if figures['noisy'] else ''}{milliseconds(figures['median_ms'])}"


def _range(figures: Mapping[str, Any]) -> str:
    return f"{milliseconds(figures['p5_ms'])}–{milliseconds(figures['p95_ms'])}"


def milliseconds(value: float) -> str:
    """With three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate_rows(results: Mapping[str, Any]) -> Rows:
    head = ["device", "precision", "matrix product GFLOP/s", "copy GB/s", "to device GB/s", "from device GB/s"]
    return [head, *([each["device"], each["precision"], *_rates(each)] for each in results["rates"])]


def _rates(rates: Mapping[str, Any]) -> Iterator[str]:
    for name in ("flops", "copy", "to_device", "from_device"):
        value = 1e-9 * rates[name]
        yield f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def work_rows(results: Mapping[str, Any]) -> Rows:
    """What the network of each contender has to do, and the share of the rate of matrix products that it reached."""
    head = ["case", "contender", "GFLOP", "MB moved", "MB held", "floor ms", "network ms", "% of matrix product"]
    rows = [head]
    for case in results["cases"]:
        for contender in case["contenders"]:
            figures = contender["stages"].get("network", {})
            if floor := figures.get("floor"):
                share = 100 * floor["compute_ms"] / figures["median_ms"]
                held = 1e-6 * contender["network_bytes"]
                work = [f"{1e-9 * floor['flops']:.3g}", f"{1e-6 * floor['bytes']:.0f}", f"{held:.0f}"]
                times = [milliseconds(floor["floor_ms"]), _median(figures)]
                rows.append([case["name"], contender["name"], *work, *times, f"{share:.0f}"])
    return rows


def batch_rows(results: Mapping[str, Any]) -> Rows:
    """What several cameras cost, where more than one size of a batch was measured: a head, and one row for each."""
    head = ["images", "contender", "at once", "extract ms", "ms an image", "x as many alone", "network ms an image"]
    found = [
        (case, contender)
        for case in results["cases"]
        for contender in case["contenders"]
        if contender["kind"] == "scfeat" and COMPARED in contender["stages"]
    ]
    if len({case["batch"] for case, _ in found}) < 2:
        return [head]
    alone = {_apart_from_batch(*each): each[1] for each in found if each[0]["batch"] == 1}
    return [head, *(_batch_row(*each, alone.get(_apart_from_batch(*each))) for each in found)]


def _apart_from_batch(case: Mapping[str, Any], contender: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*case["size"], case["budget"], contender["name"])


def _batch_row(case: Mapping[str, Any], contender: Mapping[str, Any], alone: Mapping[str, Any] | None) -> list[str]:
    batch, figures = case["batch"], contender["stages"][COMPARED]
    one = batch * alone["stages"][COMPARED]["median_ms"] if alone else 0.0
    network = contender["stages"].get("network")
    return [
        f"{case['size'][0]}x{case['size'][1]}, {case['budget']} points",
        contender["name"],
        str(batch),
        _median(figures),
        milliseconds(figures["median_ms"] / batch),
        f"{figures['median_ms'] / one:.2f}" if one else NOTHING,
        milliseconds(network["median_ms"] / batch) if network else NOTHING,
    ]


# -- as text -----------------------------------------------------------------------------------------------------------


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """For a terminal: the first column to the left, all others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(rows[0]) - 1), *lines[1:]])


def as_text(results: Mapping[str, Any], style: str = "plain") -> str:
    """All tables. style: "plain" for a terminal, or "markdown"."""
    table = markdown if style == "markdown" else aligned
    parts = [summary(results)]
    for case in results.get("cases", []):
        parts.append(_heading(case["name"], style))
        parts.append(table(contender_rows(case)))
        for contender in case["contenders"]:
            if contender["kind"] == "scfeat" and contender["stages"]:
                parts += [contender["name"], table(stage_rows(contender))]
    if results.get("cases") and len(rows := batch_rows(results)) > 1:
        parts += [_heading("Several cameras", style), table(rows)]
    if results.get("growth"):
        parts += [_heading("Growth", style), table(growth_rows(results["growth"]))]
    if results["rates"]:
        parts += [_heading("Rates that the floors are computed from", style), table(rate_rows(results))]
    if results.get("cases") and len(rows := work_rows(results)) > 1:
        parts += [_heading("The network", style), table(rows)]
    parts += [f"warning: {warning}" for warning in results["warnings"]]
    return "\n\n".join(parts)


def _heading(text: str, style: str) -> str:
    return f"### {text}" if style == "markdown" else text


def summary(results: Mapping[str, Any]) -> str:
    """The machine in one line."""
    machine = results["machine"]
    gpus = ", ".join(machine.get("gpus", []))
    load = f", load {machine['load_before']} before and {machine['load_after']} after"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads{', ' if gpus else ''}{gpus}, "
        f"torch {machine['torch']}, OpenCV {machine['opencv']}{load}"
        f"{'; interrupted' if results['interrupted'] else ''}"
    )


def growth_rows(growth: Sequence[Mapping[str, Any]]) -> Rows:
    """A head, and one row a curve: from where to where it was measured, and the exponent with its error."""
    head = ["stage", "against", "from", "ms", "to", "ms", "exponent", "±"]
    return [head, *(_growth_row(curve) for curve in growth)]


def _growth_row(curve: Mapping[str, Any]) -> list[str]:
    x, y = curve["x"], curve["median_ms"]
    name = f"{curve['contender']} {curve['stage']}"
    if not x:
        return [name, curve["against"], *[NOTHING] * 6]
    ends = [f"{x[0]:.4g}", milliseconds(y[0]), f"{x[-1]:.4g}", milliseconds(y[-1])]
    fit = curve["fit"]
    exponent = [f"{fit['exponent']:.2f}", f"{fit['error']:.2f}"] if fit else [NOTHING] * 2
    return [name, curve["against"], *ends, *exponent]
