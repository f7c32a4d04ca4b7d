"""The results as one page that needs nothing but itself."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scfeat_core.bench.measuring import COMPARED
from scfeat_core.bench.own import STAGES
from scfeat_core.bench.tables import (
    adding_up,
    batch_rows,
    contender_rows,
    growth_rows,
    rate_rows,
    stage_rows,
    summary,
    work_rows,
)
from scfeat_core.charts import COLOURS, Chart, Line, chart
from scfeat_core.report import document, facts_list

_LEGEND = (
    "Medians, and 5 to 95 % of the rounds. Floor: the larger of what the arithmetic takes at the rate of a large "
    "matrix product, and what the bytes take at the rate of a copy. A tilde marks what is noisy."
)


def page(results: Mapping[str, Any]) -> str:
    """Results of ``measuring`` or ``growth`` as HTML."""
    parts = ["<h1>scfeat bench</h1>", f'<p class="summary">{html.escape(summary(results))}</p>']
    parts += [f'<p class="warned">{html.escape(warning)}</p>' for warning in results["warnings"]]
    for case in results.get("cases", []):
        parts += _case(case)
    if results.get("cases") and len(rows := batch_rows(results)) > 1:
        parts += ["<h2>Several cameras</h2>", _table(rows)]
    if curves := results.get("growth"):
        parts += ["<h2>Growth</h2>", f'<div class="charts">{"".join(_growth_charts(curves))}</div>']
        parts.append(_table(growth_rows(curves)))
    if results.get("cases") and len(rows := work_rows(results)) > 1:
        parts += ["<h2>The network</h2>", _table(rows)]
    if results["rates"]:
        parts += ["<h2>What the machine can do</h2>", _table(rate_rows(results))]
    parts += ["<h2>Stages</h2>", facts_list(STAGES), "<h2>How it was measured</h2>"]
    parts.append(facts_list({**results["machine"], **_settings(results["settings"]), "date": results["date"]}))
    return document("scfeat bench", parts, _STYLE)


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("cases", "variants", "threads")}


def _case(case: Mapping[str, Any]) -> list[str]:
    parts = [f"<h2>{html.escape(case['name'])}</h2>"]
    medians = [each["stages"].get(COMPARED, {}).get("median_ms") for each in case["contenders"]]
    parts.append(_table(contender_rows(case), _bars(medians)))
    parts.append(f'<div class="charts">{_over_rounds(case)}</div>')
    for contender in case["contenders"]:
        if contender["kind"] == "scfeat" and contender["stages"]:
            parts += _stages(contender)
    return parts


def _over_rounds(case: Mapping[str, Any]) -> str:
    """Whether the machine was quiet: what disturbs one disturbs all."""
    measured = [each for each in case["contenders"] if COMPARED in each["stages"]]
    values = [np.array(each["stages"][COMPARED]["rounds_ms"], float) for each in measured]
    lines = [
        Line(each["name"], np.arange(1.0, len(own) + 1), own, index)
        for index, (each, own) in enumerate(zip(measured, values, strict=True))
    ]
    return chart(Chart("Extraction, round by round", lines, "round", "ms"))


def _stages(contender: Mapping[str, Any]) -> list[str]:
    stages = contender["stages"]
    counted = adding_up(stages)
    medians = [figures["median_ms"] if name in counted else None for name, figures in stages.items()]
    floors = [(figures.get("floor") or {}).get("floor_ms") for figures in stages.values()]
    table = _table(stage_rows(contender), [*_bars(medians, floors), ""])
    return [f"<h3>{html.escape(contender['name'])}</h3>", table, f'<p class="about">{_LEGEND}</p>']


def _bars(values: Sequence[float | None], floors: Sequence[float | None] = ()) -> list[str]:
    """One for each value, empty for None; the part that is the floor is darker."""
    longest = max((value for value in values if value), default=0.0)
    padded = [*floors, *[None] * (len(values) - len(floors))]
    return [
        _bar(value / longest, min(1.0, (floor or 0.0) / value)) if value else ""
        for value, floor in zip(values, padded, strict=True)
    ]


def _bar(share: float, floor: float) -> str:
    inner = f'<i style="width:{100 * floor:.1f}%"></i>' if floor else ""
    return f'<span class="bar" style="width:{max(100 * share, 0.5):.1f}%">{inner}</span>'


def _table(rows: Sequence[Sequence[str]], bars: Sequence[str] = ()) -> str:
    """bars: HTML, one for each row below the head."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0]) + ("<th></th>" if bars else "")
    drawn = [f'<td class="bars">{bar}</td>' for bar in bars] or [""] * len(rows)
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row[1:])}{bar}</tr>"
        for row, bar in zip(rows[1:], drawn, strict=False)
    )
    return f'<div class="scroll"><table class="bench"><tr class="head">{head}</tr>{body}</table></div>'


# -- growth ------------------------------------------------------------------------------------------------------------

_UNITS = {"pixels": (1e-6, "megapixels"), "points": (1.0, "points")}


def _growth_charts(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """One for each stage: medians, and dashed what was fitted."""
    keys = dict.fromkeys((curve["against"], curve["stage"]) for curve in curves)
    return [
        chart(_growth_chart(key, [each for each in curves if (each["against"], each["stage"]) == key])) for key in keys
    ]


def _growth_chart(key: tuple[str, str], curves: Sequence[Mapping[str, Any]]) -> Chart:
    against, stage = key
    scale, label = _UNITS[against]
    lines = [line for index, curve in enumerate(curves) for line in _lines(curve, scale, index % COLOURS)]
    fits = [
        f"{each['contender']}: exponent {each['fit']['exponent']:.2f} ± {each['fit']['error']:.2f}"
        for each in curves
        if each["fit"]
    ]
    return Chart(f"{stage} against {against}", lines, label, "ms", note="; ".join(fits))


def _lines(curve: Mapping[str, Any], scale: float, colour: int) -> list[Line]:
    x, fit = np.array(curve["x"], float), curve["fit"]
    drawn = [Line(curve["contender"], scale * x, np.array(curve["median_ms"], float), colour)]
    if fit:
        dense = np.geomspace(x.min(), x.max(), 50)
        drawn.append(Line("", scale * dense, fit["factor"] * dense ** fit["exponent"], colour, dashed=True))
    return drawn


_STYLE = """
table.bench { width: 100%; } table.bench th, table.bench td { padding-left: 14px; padding-right: 0; }
table.bench th:first-child { padding-left: 0; white-space: nowrap; }
tr.head th { color: var(--soft); font-size: 12px; text-align: right; } tr.head th:first-child { text-align: left; }
td.bars { width: 34%; min-width: 120px; text-align: left; }
.bar { display: block; height: 11px; background: var(--accent); opacity: 0.75; border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--ink); border-radius: 2px; }
h3 { font-size: 15px; margin: 26px 0 6px; overflow-wrap: anywhere; }
.warned { border-left: 5px solid var(--watch); padding-left: 14px; }
"""
