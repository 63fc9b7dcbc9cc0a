"""Draw line charts as inline SVG, for pages that need no network. png.py draws the same charts as PNG files.

    line_chart(Chart("loss", [Series("run a", steps, losses), ...]))  ->  "<figure ...><svg ...>"

Each curve is reduced to about 400 points (POINTS): its points are divided into buckets of consecutive steps, and each
bucket keeps its lowest and its highest value, so that spikes remain visible. The page contains the values for the
tooltip (SCRIPT). Colours are CSS variables (STYLE). Cost: one second per million points.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Values = Sequence[float] | Numbers

POINTS = 400
WIDTH, HEIGHT = 520, 250  # size of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 58, 28, 34, 30  # margins around the plot area; RIGHT has room for half a label
COLORS = ("#2563eb", "#db2777", "#059669", "#d97706", "#7c3aed", "#0891b2", "#dc2626", "#4d7c0f")


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve. `faint` draws it thin and pale, for raw values behind a smoothed curve; `dots` marks each point."""

    label: str
    x: Values
    y: Values
    color: str = COLORS[0]
    faint: bool = False
    dots: bool = False


def thinned(x: Values, y: Values, points: int = POINTS) -> list[tuple[float, float]]:
    """Return the points of a curve whose y is finite, reduced to about `points`.

    The points are divided into groups of consecutive ones, and the lowest and the highest of each group are kept, in
    order.
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    finite = np.isfinite(ys)
    xs, ys = xs[finite], ys[finite]
    kept = np.arange(len(xs))
    if len(xs) > points:
        size = math.ceil(len(xs) / (points // 2))  # two points per bucket
        starts = range(0, len(xs), size)
        extremes = [(start + find(ys[start : start + size])) for start in starts for find in (np.argmin, np.argmax)]
        kept = np.array(sorted(set(map(int, extremes))))
    return list(zip(xs[kept].tolist(), ys[kept].tolist(), strict=True))


def smoothed(values: Values, window: int) -> Numbers:
    """Return the moving average: for each value, the mean of about `window` values around it.

    Near both ends the window is shorter on both sides, so that the mean of a falling curve does not lag behind.
    """
    array, reach = np.asarray(values, dtype=np.float64), window // 2
    out: Numbers = array.copy()
    if len(array) > 2 * reach:
        # Sum again for each value. In a running sum, one huge value would make all later sums inexact.
        out[reach : len(array) - reach] = np.lib.stride_tricks.sliding_window_view(array, 2 * reach + 1).mean(axis=1)
    for i in range(min(reach, len(array))):
        side = min(i, len(array) - 1 - i)
        out[i] = array[i - side : i + side + 1].mean()
        out[-1 - i] = array[len(array) - 1 - i - side : len(array) - i + side].mean()
    return out


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers, 1, 2 or 5 times a power of ten apart, that cover the range from low to
    high.
    """
    span = high - low
    if span <= 1e-12 * abs(high):  # all values are equal, or differ only by rounding
        span = abs(high) or 1.0
    smallest = max(span / count, 1e-300)
    power = 10 ** math.floor(math.log10(smallest))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= smallest)
    first = math.floor(low / step) * step
    return [first + i * step for i in range(max(1, math.ceil((high - first) / step)) + 1)]


def short_number(value: float) -> str:
    """Return a number as short text, for example 1.5M for 1500000 and 4.2e-4 for 0.00042."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15:
        return f"{value:.2g}"
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = 1e3 if letter == "k" else limit
            return f"{value / unit:.3g}{letter}"
    if size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:.4g}"


@dataclasses.dataclass(frozen=True)
class Chart:
    """A title and the curves of one chart, whose x axis is usually the training step."""

    title: str
    series: Sequence[Series]
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Plot:
    """A chart and its layout: the reduced curves, the range of the x axis and the tick marks of the y axis."""

    curves: Sequence[tuple[Series, list[tuple[float, float]]]]
    x_low: float
    x_high: float
    marks: Sequence[float]

    def to_pixels(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a point in SVG units, measured from the top left corner."""
        low, high = self.marks[0], self.marks[-1]
        across = LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    @property
    def x_marks(self) -> list[float]:
        """The tick marks of the x axis: round numbers inside its range."""
        return [mark for mark in ticks(self.x_low, self.x_high) if self.x_low <= mark <= self.x_high]


def lay_out(chart: Chart) -> Plot | None:
    """Return the layout of a chart, or None if no curve has a point."""
    curves = [(s, points) for s in chart.series if (points := thinned(s.x, s.y))]
    if not curves:
        return None
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    return Plot(curves, min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, ticks(min(ys), max(ys)))


def line_chart(chart: Chart) -> str:
    """Return a chart as an HTML figure with an SVG, or with the text "no data" if no curve has a point."""
    title, plot = html.escape(chart.title), lay_out(chart)
    if plot is None:
        return f'<figure class="chart empty"><figcaption>{title}</figcaption><p>no data</p></figure>'
    body = [_grid(plot)]
    body += [_curve(s, [plot.to_pixels(*point) for point in points]) for s, points in plot.curves]
    body.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>')
    body += [f'<circle class="nearest" cx="-9" cy="-9" r="4" style="fill:{s.color}"/>' for s, _ in plot.curves]
    # SCRIPT needs these for the tooltip: the curves, and the values and positions of the corners of the plot area.
    data = [
        {"label": s.label + (", raw" if s.faint else ""), "color": s.color, "points": points}
        for s, points in plot.curves
    ]
    corners = {"x": [plot.x_low, plot.x_high], "y": [plot.marks[0], plot.marks[-1]]}
    frame = json.dumps(
        corners | {"across": [LEFT, WIDTH - RIGHT], "down": [HEIGHT - BOTTOM, TOP], "size": [WIDTH, HEIGHT]}
    )
    caption = title + (f' <span class="unit">{html.escape(chart.unit)}</span>' if chart.unit else "")
    return (
        f'<figure class="chart" data-frame="{html.escape(frame)}" data-series="{html.escape(json.dumps(data))}">'
        f"<figcaption>{caption}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(body)}</svg>'
        f"<output hidden></output></figure>"
    )


def _grid(plot: Plot) -> str:
    """Return the SVG of a chart's grid lines and their labels."""
    out = []
    for mark in plot.marks:
        _, y = plot.to_pixels(plot.x_low, mark)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short_number(mark)}</text>')
    for mark in plot.x_marks:
        x, _ = plot.to_pixels(mark, plot.marks[0])
        out.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{short_number(mark)}</text>')
    return "".join(out)


def _curve(series: Series, points: Sequence[tuple[float, float]]) -> str:
    """Return the SVG of one curve. `points` are in SVG units."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = "faint" if series.faint else "curve"
    out = f'<polyline class="{style}" style="stroke:{series.color}" points="{path}"/>'
    if series.dots or len(points) == 1:
        out += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{series.color}"/>' for x, y in points)
    return out


# Shows a tooltip beside the pointer: the step, and the nearest value of each curve with its own step if that differs.
SCRIPT = """
for (const figure of document.querySelectorAll('figure[data-series]')) {
  const frame = JSON.parse(figure.dataset.frame), series = JSON.parse(figure.dataset.series);
  const [svg, cursor, tip] = ['svg', '.cursor', 'output'].map(name => figure.querySelector(name));
  const dots = figure.querySelectorAll('.nearest');
  const scale = ([low, high], [start, end]) => value => start + (value - low) / (high - low) * (end - start);
  const across = scale(frame.x, frame.across), down = scale(frame.y, frame.down);
  const element = (name, text, color) => {
    const made = document.createElement(name);
    made.textContent = text;
    if (color) made.style.color = color;
    return made;
  };
  const hide = () => {
    tip.hidden = true;
    for (const dot of dots) dot.setAttribute('cx', -9);
    for (const x of ['x1', 'x2']) cursor.setAttribute(x, -9);
  };
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const pointer = (event.clientX - box.left) / box.width * frame.size[0];
    const nearer = (a, b) => Math.abs(across(b[0]) - pointer) < Math.abs(across(a[0]) - pointer) ? b : a;
    const points = series.map(curve => curve.points.reduce(nearer)), step = points.reduce(nearer)[0];
    tip.replaceChildren(element('div', 'step ' + step.toLocaleString('en')));
    series.forEach((curve, i) => {
      const [x, y] = points[i], row = element('div', '');
      row.append(element('b', +y.toPrecision(6), curve.color), ' ' + curve.label);
      if (x !== step) row.append(' (step ' + x.toLocaleString('en') + ')');
      tip.append(row);
      dots[i].setAttribute('cx', across(x));
      dots[i].setAttribute('cy', down(y));
    });
    for (const x of ['x1', 'x2']) cursor.setAttribute(x, across(step));
    tip.hidden = false;
    // On the side of the pointer that has more space, so that the tooltip stays inside the figure.
    const left = event.clientX - figure.getBoundingClientRect().left, right = figure.clientWidth - left;
    tip.style.left = left < right ? left + 14 + 'px' : 'auto';
    tip.style.right = left < right ? 'auto' : right + 14 + 'px';
  });
  svg.addEventListener('pointerleave', hide);
}
"""

STYLE = """
:root{--ink:#0f172a;--dim:#64748b;--line:#e2e8f0;--card:#fff;--page:#f8fafc;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e2e8f0;--dim:#94a3b8;--line:#334155;--card:#1e293b;--page:#0f172a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:24px;font:15px/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif;
color:var(--ink);background:var(--page)}
header{margin-bottom:8px}h1{margin:0;font-size:28px}header p{margin:0;color:var(--dim)}
section{margin:28px 0}h2{font-size:19px;margin:0 0 12px;padding-bottom:6px;border-bottom:1px solid var(--line)}
h3{font-size:15px;margin:14px 0 6px}h4{margin:8px 0 4px;color:var(--dim);font-weight:600}
.runs{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr))}
article{background:var(--card);border:1px solid var(--line);border-left:5px solid;border-radius:8px;padding:12px 16px}
article h3{margin:0 0 8px;font-size:16px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(125px,1fr));gap:10px;margin:0}
dt{font-size:12px;color:var(--dim)}dd{margin:0;font-size:17px;font-weight:600;font-variant-numeric:tabular-nums}
.charts{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr))}
.chart{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px 4px;
position:relative}
.chart svg{display:block;width:100%;height:auto}figcaption{font-weight:600;display:flex;gap:6px;align-items:baseline}
.unit{color:var(--dim);font-weight:400;font-size:12px}
output{position:absolute;top:44px;max-width:50%;padding:4px 8px;font-size:12px;pointer-events:none;
background:var(--card);border:1px solid var(--line);border-radius:6px;
box-shadow:0 2px 6px #0003;font-variant-numeric:tabular-nums}
.empty p{color:var(--dim)}.grid{stroke:var(--line)}.tick{font-size:11px;fill:var(--dim)}
.curve{fill:none;stroke-width:1.8;stroke-linejoin:round}.faint{fill:none;stroke-width:1;opacity:.25}
.cursor{stroke:var(--dim);stroke-dasharray:3 3}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0;font-size:13px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.bar{display:flex;height:26px;border-radius:6px;overflow:hidden;background:var(--line)}.bar i{display:block}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;margin:8px 0;min-width:50%}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}
th{color:var(--dim);font-weight:600}td:first-child{white-space:nowrap}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:10px 12px;
overflow-x:auto;margin:6px 0;font:12.5px/1.45 ui-monospace,"DejaVu Sans Mono",monospace;white-space:pre-wrap}
details{margin:6px 0}summary{cursor:pointer;font-weight:600}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
