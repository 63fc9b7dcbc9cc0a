"""Draw charts as PNG files with Pillow, which TensorBoard depends on.

Pillow does not smooth lines. So a chart is drawn at twice its size (SUPER) and then reduced. Cost: 0.1 s per picture.
"""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFont

from packspeed.launch.observe.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Plot, lay_out, short_number

SCALE = 2  # pixels of the file per SVG unit of charts.py
SUPER = 2
PX = SCALE * SUPER  # pixels of the drawing per SVG unit
ROW = 18  # height of a row of the legend
INK, DIM, LINE, PAPER = "#0f172a", "#64748b", "#e2e8f0", "#ffffff"


def draw_png(chart: Chart) -> bytes | None:
    """Return a chart as the content of a PNG file, or None if no curve has a point."""
    plot = lay_out(chart)
    if plot is None:
        return None
    labels = {series.label: series.color for series, _ in plot.curves if not series.faint}
    rows = _legend_rows(list(labels)) if len(labels) > 1 else []
    image = Image.new("RGB", (WIDTH * PX, (HEIGHT + ROW * len(rows)) * PX), PAPER)
    draw = ImageDraw.Draw(image)
    _text(draw, LEFT, TOP / 2 - 2, chart.title, INK, 14, "lm")
    _text(draw, WIDTH - RIGHT, TOP / 2 - 2, chart.unit, DIM, 11, "rm")
    _grid(draw, plot)
    for series, points in plot.curves:
        points_px = [plot.to_pixels(*point) for point in points]
        color = _pale(series.color) if series.faint else series.color
        draw.line(_scaled(points_px), fill=color, width=round((1 if series.faint else 1.8) * PX), joint="curve")
        if series.dots or len(points) == 1:
            for x, y in points_px:
                draw.circle((x * PX, y * PX), 3 * PX, fill=color)
    for row, names in enumerate(rows):
        x = float(LEFT)
        for name in names:
            y = HEIGHT + ROW * (row + 0.4)
            draw.rectangle(_scaled([(x, y - 4), (x + 9, y + 5)]), fill=labels[name])
            _text(draw, x + 14, y, name, INK, 11, "lm")
            x += _entry_width(name)
    out = io.BytesIO()
    image.reduce(SUPER).save(out, "PNG", optimize=True)
    return out.getvalue()


def _legend_rows(names: list[str]) -> list[list[str]]:
    """Divide the labels of the curves into rows of a legend that fit into the width of the chart."""
    rows: list[list[str]] = [[]]
    for name in names:
        if rows[-1] and sum(map(_entry_width, [*rows[-1], name])) > WIDTH - LEFT - RIGHT:
            rows.append([])
        rows[-1].append(name)
    return rows


def _entry_width(name: str) -> float:
    """Return the width of a curve's label in the legend with its coloured mark, in SVG units."""
    return _font(11).getlength(name) / PX + 32


def _grid(draw: ImageDraw.ImageDraw, plot: Plot) -> None:
    """Draw the grid lines of a chart and their labels."""
    for mark in plot.marks:
        left, y = plot.to_pixels(plot.x_low, mark)
        draw.line(_scaled([(left, y), (WIDTH - RIGHT, y)]), fill=LINE, width=PX)
        _text(draw, LEFT - 6, y, short_number(mark), DIM, 11, "rm")
    for mark in plot.x_marks:
        x, _ = plot.to_pixels(mark, plot.marks[0])
        _text(draw, x, HEIGHT - BOTTOM / 2, short_number(mark), DIM, 11, "mm")


def _scaled(points_px: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Convert points from SVG units to pixels of the drawing."""
    return [(x * PX, y * PX) for x, y in points_px]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's default font. `size` is in SVG units."""
    return ImageFont.load_default(size * PX)


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, color: str, size: int, anchor: str) -> None:
    """Write text at a position in SVG units. `anchor` is Pillow's, such as "lm" for left and middle."""
    draw.text((x * PX, y * PX), text, fill=color, font=_font(size), anchor=anchor)


def _pale(color: str) -> str:
    """Return a colour mixed with three quarters of white, as #rrggbb."""
    red, green, blue = (round(0.25 * int(color[i : i + 2], 16) + 0.75 * 255) for i in (1, 3, 5))
    return f"#{red:02x}{green:02x}{blue:02x}"
