"""The charts of the report: their numbers, and the page as Chromium draws it."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from packspeed.launch.observe.charts import Chart, Series, line_chart, short_number, smoothed, ticks
from packspeed.launch.observe.report import report
from support.browser import browse
from support.run_folder import make_run, step_line, write_lines

# Runs in the page: moves a pointer over the chart of the gradient norm, and reports what a reader sees.
HOVER = """
<script>
const figure = [...document.querySelectorAll('figure')].find(f => f.textContent.includes('gradient norm'));
const svg = figure.querySelector('svg'), tip = figure.querySelector('output'), box = svg.getBoundingClientRect();
const point = figure.querySelector('polyline').points[POINT];
const at = x => ({clientX: box.left + x / 520 * box.width, clientY: box.top + 90, bubbles: true});
const seen = {before: tip.hidden};
svg.dispatchEvent(new PointerEvent('pointermove', at(point.x + 0.4)));
const area = figure.getBoundingClientRect(), shown = tip.getBoundingClientRect();
seen.rows = [...tip.children].map(row => row.textContent);
seen.inside = shown.left >= area.left && shown.right <= area.right && shown.width > 0;
seen.dot = [...figure.querySelectorAll('.nearest')].map(dot => [+dot.getAttribute('cx'), +dot.getAttribute('cy')]);
seen.point = [point.x, point.y];
svg.dispatchEvent(new PointerEvent('pointerleave'));
seen.after = tip.hidden;
seen.width = document.documentElement.clientWidth;
seen.labels = [...document.querySelectorAll('svg text')].map(text => {
  const r = text.getBoundingClientRect(), s = text.ownerSVGElement.getBoundingClientRect();
  return [text.textContent, r.left, r.right, r.top, r.bottom, s.left, s.right, s.top, s.bottom];
});
const out = document.createElement('pre');
out.id = 'seen';
out.textContent = JSON.stringify(seen);
document.body.append(out);
</script></body>"""


def look(page: Path, folder: Path, point: int = 0, width: int = 1400) -> Any:
    """What HOVER finds on a page in a window of `width` pixels."""
    copy = folder / "hovered.html"
    copy.write_text(page.read_text().replace("</body>", HOVER.replace("POINT", str(point))))
    dom = browse(f"file://{copy}", folder / "profile", f"--window-size={width},1100", "--dump-dom")
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Two runs of 2,000 steps with a line every 10 steps, and every 30 steps."""
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for folder, stride in ((first, 10), (second, 30)):
        steps = [step_line(step, grad_norm=1.0 + step / 1_000) for step in range(stride, 2_001, stride)]
        write_lines(folder / "metrics.jsonl", steps)
    report([first, second], tmp_path / "report.html")
    return tmp_path / "report.html"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1400, 520])
def test_labels_are_inside_their_chart_and_the_page(page: Path, tmp_path: Path, width: int) -> None:
    found = look(page, tmp_path, width=width)
    labels = [label[0] for label in found["labels"]]
    assert labels.count("2000") == 7, "the last label of each x axis; there is no validation loss"
    for text, left, right, top, bottom, svg_left, svg_right, svg_top, svg_bottom in found["labels"]:
        assert svg_left <= left < right <= svg_right <= found["width"], text
        assert svg_top <= top < bottom <= svg_bottom, text


@pytest.mark.browser
@pytest.mark.parametrize("point", [0, 17, 100, -1])
def test_hovering_shows_the_step_and_the_values(page: Path, tmp_path: Path, point: int) -> None:
    data = re.search(r'data-series="([^"]*)"><figcaption>gradient norm', page.read_text())
    assert data
    curves = [curve["points"] for curve in json.loads(html.unescape(data[1]))]
    step, value = curves[0][point]
    found = look(page, tmp_path, point if point >= 0 else len(curves[0]) + point)
    assert found["before"] is found["after"] is True
    assert found["inside"]
    assert found["rows"][0] == f"step {int(step):,}"
    assert found["rows"][1] == f"{value:g} r"
    other = min((abs(x - step), x, y) for x, y in curves[1])
    note = "" if other[1] == step else f" (step {int(other[1]):,})"
    assert found["rows"][2] == f"{other[2]:g} r{note}"
    assert found["dot"][0] == pytest.approx(found["point"], abs=0.1)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (5e-324, 5e-324), (1e50, 1e50), (-1e50, 1e50), (2.5, 2.5), (1, 2_000)]
)
def test_ticks_are_few_and_cover_the_values(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 8
    assert marks[0] - 1e-12 * abs(low) <= low <= high <= marks[-1] + 1e-12 * abs(high)
    assert marks[0] < marks[-1]
    assert all(len(short_number(mark)) <= 8 for mark in marks)
    assert "<svg" in line_chart(Chart("c", [Series("a", [1, 2], [low, high])]))


def test_one_huge_value_does_not_spoil_the_smoothed_curve() -> None:
    values = [3.0] * 50 + [1e40] + [3.0] * 50
    assert smoothed(values, 10)[:45].tolist() == smoothed(values, 10)[-45:].tolist() == [3.0] * 45
