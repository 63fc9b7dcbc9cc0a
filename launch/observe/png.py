"""The charts of a report as PNG files, drawn with Pillow, which TensorBoard brings along.

Drawn SUPER times larger and reduced, which smooths the lines. Cost: 0.1 s a picture, without torch.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from packspeed.launch.observe.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Plot, plot, short

SCALE = 2  # pixels of the file per unit of the page


SUPER = 2


PX = SCALE * SUPER


ROW = 18  # height of a row of the legend


INK, DIM, LINE, PAPER = "#0f172a", "#64748b", "#e2e8f0", "#ffffff"


def write_png(chart: Chart, path: Path) -> bool:
    """Draw a chart; False, and no file, where there is nothing to draw."""
    found = plot(chart)
    if found is None:
        return False
    labels = {series.label: series.color for series, _ in found.curves if not series.faint}
    rows = _legend_rows(list(labels)) if len(labels) > 1 else []
    image = Image.new("RGB", (WIDTH * PX, (HEIGHT + ROW * len(rows)) * PX), PAPER)
    draw = ImageDraw.Draw(image)
    _text(draw, LEFT, TOP / 2 - 2, chart.title, INK, 14, "lm")
    _text(draw, WIDTH - RIGHT, TOP / 2 - 2, chart.unit, DIM, 11, "rm")
    _grid(draw, found)
    for series, points in found.curves:
        places = [found.at(*point) for point in points]
        color = _pale(series.color) if series.faint else series.color
        draw.line(_scaled(places), fill=color, width=round((1 if series.faint else 1.8) * PX), joint="curve")
        if series.dots or len(points) == 1:
            for x, y in places:
                draw.circle((x * PX, y * PX), 3 * PX, fill=color)
    for row, names in enumerate(rows):
        x = float(LEFT)
        for name in names:
            y = HEIGHT + ROW * (row + 0.4)
            draw.rectangle(_scaled([(x, y - 4), (x + 9, y + 5)]), fill=labels[name])
            _text(draw, x + 14, y, name, INK, 11, "lm")
            x += _entry_width(name)
    image.reduce(SUPER).save(path, optimize=True)
    return True


def _legend_rows(names: list[str]) -> list[list[str]]:
    """Names in rows that fit the width."""
    rows: list[list[str]] = [[]]
    for name in names:
        if rows[-1] and sum(map(_entry_width, [*rows[-1], name])) > WIDTH - LEFT - RIGHT:
            rows.append([])
        rows[-1].append(name)
    return rows


def _entry_width(name: str) -> float:
    return _font(11).getlength(name) / PX + 32


def _grid(draw: ImageDraw.ImageDraw, found: Plot) -> None:
    for mark in found.marks:
        left, y = found.at(found.x_low, mark)
        draw.line(_scaled([(left, y), (WIDTH - RIGHT, y)]), fill=LINE, width=PX)
        _text(draw, LEFT - 6, y, short(mark), DIM, 11, "rm")
    for mark in found.x_marks:
        x, _ = found.at(mark, found.marks[0])
        _text(draw, x, HEIGHT - BOTTOM / 2, short(mark), DIM, 11, "mm")


def _scaled(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x * PX, y * PX) for x, y in places]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * PX)


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, color: str, size: int, anchor: str) -> None:
    draw.text((x * PX, y * PX), text, fill=color, font=_font(size), anchor=anchor)


def _pale(color: str) -> str:
    """A quarter of the colour on paper."""
    red, green, blue = (round(0.25 * int(color[i : i + 2], 16) + 0.75 * 255) for i in (1, 3, 5))
    return f"#{red:02x}{green:02x}{blue:02x}"
