"""Charts as HTML with inline SVG: no scripts are needed, none but system fonts, readable in light and dark and narrow.

Text stands beside the drawing, as HTML, so that it has its size at whatever width the drawing has.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLOURS = 6  # of lines; from there on they begin again
_SIZE = 1000  # units of the drawing along both axes: it is stretched to what room there is
_MOST_POINTS = 1200  # of a line: as many as a wide screen shows


@dataclass(frozen=True, eq=False)
class Line:
    """x, y: (n,) float; a gap where one of them is not finite. colour: from 0. dashed: for what others are compared
    with. steps: y holds until the next x."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    dashed: bool = False
    steps: bool = False


@dataclass(frozen=True, eq=False)
class Mark:
    """Something that happened at x: an upright line. kind: "drop" or "reset"."""

    x: float
    kind: str


@dataclass(frozen=True, eq=False)
class Chart:
    """lines over common axes. x_label, unit: of the axes. low, high: what the y axis has at least.
    x_range: of the x axis, for charts one below the other. limit: (y, what it says), drawn across. note: a line of text
    below."""

    title: str
    lines: Sequence[Line]
    x_label: str = ""
    unit: str = ""
    low: float | None = 0.0
    high: float | None = None
    x_range: tuple[float, float] | None = None
    marks: Sequence[Mark] = ()
    limit: tuple[float, str] | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Histogram:
    """values: (n,) float, those that are not finite do not count. unit: of them. counted: what they are of. whole: they
    are whole numbers, and each bar is of equally many."""

    title: str
    values: np.ndarray
    unit: str = ""
    counted: str = "frames"
    whole: bool = False
    bins: int = 24
    limit: tuple[float, str] | None = None


def chart(drawn: Chart) -> str:
    """A chart as a figure; one that says so where no line has anything."""
    finite = [line for line in drawn.lines if (np.isfinite(line.x) & np.isfinite(line.y)).any()]
    if not finite:
        return _figure(drawn.title, "", '<p class="empty">nothing was measured</p>', drawn.note)
    x = np.concatenate([drawn.x_range or (), *(line.x[np.isfinite(line.y)] for line in finite)])
    x_axis = _Axis.of(x, None, None, tight=True)
    values = np.concatenate([line.y for line in finite])
    limits = [] if drawn.limit is None else [drawn.limit[0]]
    y_axis = _Axis.of(np.append(values, limits), drawn.low, drawn.high)
    parts = [_grid(x_axis, y_axis)]
    parts += [_upright(mark, x_axis) for mark in drawn.marks if x_axis.low <= mark.x <= x_axis.high]
    if drawn.limit is not None:
        parts.append(_path([(0, y_axis.down(drawn.limit[0])), (_SIZE, y_axis.down(drawn.limit[0]))], "limit"))
    parts += [_polyline(line, x_axis, y_axis) for line in finite]
    legend = _unit(drawn.unit) + _legend(finite, drawn.limit)
    ranges = f'data-x="{x_axis.low},{x_axis.high}" data-y="{y_axis.low},{y_axis.high}" data-unit="{_text(drawn.unit)}"'
    return _figure(drawn.title, legend, _plot(parts, x_axis, y_axis, drawn.x_label, ranges), drawn.note)


def histogram(drawn: Histogram) -> str:
    """A histogram as a figure: how many values lie where. What is above the 99th percentile is in the last bar."""
    values = drawn.values[np.isfinite(drawn.values)]
    if not len(values):
        return _figure(drawn.title, "", '<p class="empty">nothing was measured</p>', "")
    limits = [] if drawn.limit is None else [drawn.limit[0]]
    x_axis = _Axis.of(np.append(np.minimum(values, np.percentile(values, 99)), limits), 0.0, None)
    counts, edges = np.histogram(values.clip(x_axis.low, x_axis.high), _edges(x_axis, drawn))
    y_axis = _Axis.of(counts, 0.0, None)
    tops = [y_axis.down(count) for count in counts]
    width = 0.92 * (x_axis.along(edges[1]) - x_axis.along(edges[0]))
    bars = [
        f'<rect x="{x_axis.along(edge):.1f}" y="{top:.1f}" width="{width:.1f}" height="{_SIZE - top:.1f}"/>'
        for edge, top, count in zip(edges, tops, counts, strict=False)
        if count
    ]
    parts = [_grid(x_axis, y_axis), *bars]
    if drawn.limit is not None:
        parts.append(_path([(x_axis.along(drawn.limit[0]), 0), (x_axis.along(drawn.limit[0]), _SIZE)], "limit"))
    median, p95 = np.percentile(values, (50, 95))
    legend = f"<span>median {_number(median)}, p95 {_number(p95)} {_text(drawn.unit)}</span>"
    return _figure(drawn.title, legend, _plot(parts, x_axis, y_axis, f"{drawn.unit}; bars: {drawn.counted}"), "")


def _edges(axis: _Axis, drawn: Histogram) -> np.ndarray:
    """Of the bars, over the whole axis."""
    if not drawn.whole:
        return np.linspace(axis.low, axis.high, drawn.bins + 1)
    width = max(1, math.ceil((axis.high - axis.low) / drawn.bins))
    return np.arange(math.floor(axis.low), axis.high + width, width)


def plan(title: str, lines: Sequence[Line], unit: str = "m") -> str:
    """Ways seen from above, both axes in one scale."""
    known = [line for line in lines if (np.isfinite(line.x) & np.isfinite(line.y)).any()]
    if not known:
        return _figure(title, "", '<p class="empty">nothing was measured</p>', "")
    points = np.concatenate([np.column_stack((line.x, -line.y)) for line in known])
    low, high = np.nanmin(points, 0), np.nanmax(points, 0)
    side = max(float((high - low).max()), 1e-6)
    step = _step(side / 4)
    left, top = low - 0.06 * side
    width, height = high - low + 0.12 * side
    grid = [
        *(f"M{x:.6g} {top:.6g}v{height:.6g}" for x in np.arange(math.ceil(left / step), (left + width) / step) * step),
        *(f"M{left:.6g} {y:.6g}h{width:.6g}" for y in np.arange(math.ceil(top / step), (top + height) / step) * step),
    ]
    drawn = "".join(
        f'<polyline class="line c{line.colour % COLOURS}{" dashed" if line.dashed else ""}" points="{points}"/>'
        for line in known
        for points in _pieces(line.x, -line.y)
    )
    body = (
        f'<svg class="plan" viewBox="{left:.6g} {top:.6g} {width:.6g} {height:.6g}" role="img" '
        f'aria-label="{_text(title)}"><path class="grid" d="{"".join(grid)}"/>{drawn}</svg>'
    )
    return _figure(title, _legend(known, None), body, f"grid: {_number(step)} {unit}")


# -- axes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """low, high: its ends. step: between its ticks."""

    low: float
    high: float
    step: float

    @classmethod
    def of(cls, values: np.ndarray, low: float | None, high: float | None, tight: bool = False) -> _Axis:
        """One that holds all finite values, and low and high where they are given; ends on a tick, unless tight."""
        finite = values[np.isfinite(values)].astype(float)
        bottom = min(finite.min(), math.inf if low is None else low)
        top = max(finite.max(), -math.inf if high is None else high)
        if top <= bottom:
            top = bottom + 1.0
        step = _step((top - bottom) / (6 if tight else 4))
        if not tight:
            bottom, top = math.floor(bottom / step + 1e-9) * step, math.ceil(top / step - 1e-9) * step
        return cls(bottom, top, step)

    @property
    def ticks(self) -> np.ndarray:
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return np.arange(first, last + 1) * self.step

    def along(self, value: float) -> float:
        """From the left, in units of the drawing."""
        return (value - self.low) / (self.high - self.low) * _SIZE

    def down(self, value: float) -> float:
        """From the top."""
        return _SIZE - self.along(value)


def _step(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(rough, 1e-12)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


# -- parts -------------------------------------------------------------------------------------------------------------


def _plot(parts: Sequence[str], x_axis: _Axis, y_axis: _Axis, x_label: str, attributes: str = "") -> str:
    ys = "".join(
        f'<span style="top:{y_axis.down(y) / 10:.1f}%">{label}</span>'
        for y, label in zip(y_axis.ticks, _brief(y_axis), strict=True)
    )
    xs = "".join(_below(x_axis.along(x) / 10, _number(x)) for x in x_axis.ticks)
    return (
        f'<div class="plot"><div class="ys">{ys}</div><div class="area" {attributes}>'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg></div>'
        f'<div class="xs">{xs}</div>'
        f'<div class="label">{_text(x_label)}</div></div>'
    )


def _below(percent: float, number: str) -> str:
    """A number below the x axis; one at its end does not stick out of a narrow page."""
    kind = ' class="end"' if percent > 95 else ""
    return f'<span{kind} style="left:{percent:.1f}%">{number}</span>'


def _figure(title: str, legend: str, body: str, note: str) -> str:
    below = f'<p class="note">{_text(note)}</p>' if note else ""
    caption = f'<b>{_text(title)}</b><span class="legend">{legend}</span>'
    return f'<figure class="chart"><figcaption>{caption}</figcaption>{body}{below}</figure>'


def _unit(unit: str) -> str:
    return f"<span>{_text(unit)}</span>" if unit else ""


def _legend(lines: Sequence[Line], limit: tuple[float, str] | None) -> str:
    named = [
        f'<span><i class="c{line.colour % COLOURS}{" dashed" if line.dashed else ""}"></i>{_text(line.name)}</span>'
        for line in lines
        if line.name
    ]
    return "".join(named) + (f'<span><i class="limit"></i>{_text(limit[1])}</span>' if limit is not None else "")


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    across = "".join(f"M0 {y_axis.down(y):.1f}h{_SIZE}" for y in y_axis.ticks)
    up = "".join(f"M{x_axis.along(x):.1f} 0v{_SIZE}" for x in x_axis.ticks)
    return f'<path class="grid" d="{across}{up}"/>'


def _upright(mark: Mark, axis: _Axis) -> str:
    return f'<path class="mark {mark.kind}" d="M{axis.along(mark.x):.1f} 0v{_SIZE}"/>'


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def _polyline(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    x, y = _thinned(line.x.astype(float), line.y.astype(float))
    if line.steps:
        x, y = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
    kind = f"line c{line.colour % COLOURS}{' dashed' if line.dashed else ''}"
    name = _text(line.name)
    x, y = (x - x_axis.low) / (x_axis.high - x_axis.low), (y_axis.high - y) / (y_axis.high - y_axis.low)
    return "".join(
        f'<polyline class="{kind}" data-name="{name}" points="{points}"/>' for points in _pieces(_SIZE * x, _SIZE * y)
    )


def _pieces(x: np.ndarray, y: np.ndarray) -> list[str]:
    """The points between gaps. A single one becomes a line of no length, which round ends make a dot."""
    known = np.isfinite(x) & np.isfinite(y)
    places = np.flatnonzero(known)
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    texts = [" ".join(f"{a:.6g},{b:.6g}" for a, b in zip(x[run], y[run], strict=True)) for run in runs if len(run)]
    return [text if " " in text else f"{text} {text}" for text in texts]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about _MOST_POINTS of the points, the lowest and the highest of each stretch: what sticks out stays."""
    every = -(-2 * len(y) // _MOST_POINTS)
    if every <= 2:
        return x, y
    padded = np.concatenate((y, np.full(-len(y) % every, np.nan))).reshape(-1, every)
    starts = np.arange(len(padded)) * every
    lowest = starts + np.where(np.isfinite(padded), padded, np.inf).argmin(1)
    highest = starts + np.where(np.isfinite(padded), padded, -np.inf).argmax(1)
    kept = np.unique(np.concatenate((lowest, highest)))
    return x[kept], y[kept]


def _number(value: float) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "0" if float(text.replace(",", "")) == 0 else text.replace(",", "\u202f").replace("-", "−")


def _brief(axis: _Axis) -> list[str]:
    """Its ticks, in thousands and more where there is no room for all digits."""
    largest = max(abs(axis.low), abs(axis.high))
    units = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0.0, 1.0, ""))
    unit, letter = next((unit, letter) for least, unit, letter in units if largest >= least)
    return [_number(tick / unit) + (f"\u202f{letter}" if letter and tick else "") for tick in axis.ticks]


def _text(words: str) -> str:
    return html.escape(words)


STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 26px 32px; }
.charts + .charts { margin-top: 30px; }
.charts.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); }
figure.chart { margin: 0; min-width: 0; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; padding: 0 0 6px; }
.chart figcaption b { font-weight: 600; color: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 12px; color: var(--soft); }
.legend i { display: inline-block; width: 14px; border-top: 2.5px solid; margin-right: 5px; vertical-align: 3px; }
.legend i.dashed, .legend i.limit { border-top-style: dashed; }
.plot { display: grid; grid-template-columns: 44px minmax(0, 1fr); font-size: 11px; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.area, .ys { height: 160px; position: relative; }
.small .area, .small .ys { height: 96px; }
.area svg { width: 100%; height: 100%; display: block; overflow: visible; clip-path: inset(-4px -1px); }
.ys span { position: absolute; right: 7px; transform: translateY(-50%); white-space: nowrap; }
.xs { grid-column: 2; position: relative; height: 18px; }
.xs span { position: absolute; transform: translateX(-50%); top: 3px; white-space: nowrap; }
@media (max-width: 600px) { .xs .end { transform: translateX(-80%); } }
.plot .label { grid-column: 2; text-align: center; }
.area svg *, svg.plan * { vector-effect: non-scaling-stroke; fill: none; }
.grid { stroke: var(--line); stroke-width: 1; }
.line { stroke: currentColor; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.line.dashed { stroke-dasharray: 5 4; }
.area svg rect { fill: var(--accent); }
path.limit, .legend .limit { stroke: var(--bad); border-color: var(--bad); stroke-width: 1.3; stroke-dasharray: 5 4; }
.mark { stroke-width: 1.3; stroke: var(--bad); opacity: 0.75; }
.mark.reset { stroke: var(--watch); stroke-dasharray: 2 3; }
svg.plan { width: 100%; height: auto; max-height: 420px; display: block; }
.chart + dl { margin-top: 14px; }
.note, .empty { font-size: 12px; color: var(--soft); margin: 4px 0 0; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--ink); opacity: 0.5;
  pointer-events: none; }
.tip { position: absolute; top: 4px; padding: 3px 7px; background: var(--paper); border: 1px solid var(--line);
  border-radius: 4px; color: var(--ink); pointer-events: none; white-space: nowrap; z-index: 1; line-height: 1.5; }
"""

# Shows the values under the pointer, in all charts of a page that have the same x axis. The page is whole without it.
SCRIPT = """
for (const area of document.querySelectorAll('.area[data-x]')) {
  const same = [...document.querySelectorAll('.area')].filter(other => other.dataset.x === area.dataset.x);
  const clear = () => same.forEach(other => other.querySelectorAll('.cursor, .tip').forEach(part => part.remove()));
  area.addEventListener('pointerleave', clear);
  area.addEventListener('pointermove', event => {
    clear();
    const box = area.getBoundingClientRect();
    const at = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    same.forEach(other => show(other, at));
  });
}
function show(area, at) {
  const [left, right] = area.dataset.x.split(',').map(Number), [low, high] = area.dataset.y.split(',').map(Number);
  const found = new Map();
  for (const line of area.querySelectorAll('polyline[data-name]'))
    for (const point of line.points) {
      const far = Math.abs(point.x / 1000 - at), old = found.get(line.dataset.name);
      const y = high - point.y / 1000 * (high - low);
      if (!old || far < old.far) found.set(line.dataset.name, { far, y, x: point.x });
    }
  if (!found.size) return;
  const places = [...found.values()], nearest = places.reduce((a, b) => a.far < b.far ? a : b);
  const cursor = document.createElement('div'), tip = document.createElement('div');
  cursor.className = 'cursor'; tip.className = 'tip';
  cursor.style.left = nearest.x / 10 + '%';
  tip.style[at < 0.5 ? 'left' : 'right'] = (at < 0.5 ? nearest.x / 10 : 100 - nearest.x / 10) + '%';
  const format = value => Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
  const lines = [`at ${format(left + nearest.x / 1000 * (right - left))}`];
  for (const [name, place] of found)
    if (place.far < 0.02 + 1.5 * nearest.far) lines.push(`${name || 'value'}: ${format(place.y)} ${area.dataset.unit}`);
  tip.innerText = lines.join('\\n');
  area.append(cursor, tip);
}
"""
