"""Line charts as inline SVG, drawn into the page: no script, no font, no other file. Colours are the page's CSS."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

Point = tuple[float, float]  # optimizer step, value

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 408, 10, 184  # the edges of what is plotted into
MAX_POINTS = 800  # of a line: about two a pixel column
COLORS = 6
_LARGEST = 1e150  # a larger value counts as none: its square overflows


class Series(NamedTuple):
    """One line of a chart."""

    label: str
    points: list[Point]  # by rising step; a value that is not finite breaks the line
    is_marked: bool = False  # a mark at each point, for values that are few and far between
    bars: Sequence[tuple[float, float, float]] = ()  # step, low and high end of an interval


def line_chart(series: Sequence[Series], *, title: str) -> str:
    """An ``<svg>`` element with axes, grid and one line for each series, or "" where no value is finite.

    A line of more than ``MAX_POINTS`` points is drawn through the lowest and highest of each few neighbours, and looks
    the same.

    Args:
        series: Line k has the CSS class ``s<k>``, modulo ``COLORS``.
        title: What a screen reader says.
    """
    drawable = [point for line in series for point in line.points if _is_drawable(point)]
    if not drawable:
        return ""
    bars = [bar for line in series for bar in line.bars if _is_drawable(bar)]
    lows = [y for _, y in drawable] + [low for _, low, _ in bars]
    highs = [y for _, y in drawable] + [high for _, _, high in bars]
    frame = _Frame.around([x for x, _ in drawable] + [x for x, _, _ in bars], lows, highs)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">', *_axes(frame)]
    for k, line in enumerate(series):
        parts.append(f'<g class="s{k % COLORS}">')
        parts += [_bar(frame, *bar) for bar in line.bars if _is_drawable(bar)]
        parts.append(f'<path class="line" d="{_path(frame, _thinned(line.points))}"/>')
        if line.is_marked:
            parts += [_mark(frame, point, line.label) for point in line.points if _is_drawable(point)]
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def number(value: float) -> str:
    """A number in at most four digits, or whole where it is a whole number."""
    is_whole = math.isfinite(value) and value == int(value) and abs(value) < 1e15
    return str(int(value)) if is_whole else f"{value:.4g}"


class _Frame(NamedTuple):
    """The values at the edges and between them, and where they are on the page."""

    x_low: float
    x_high: float
    x_ticks: list[float]
    y_ticks: list[float]  # the first and last are the edges

    @classmethod
    def around(cls, steps: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> _Frame:
        """The frame that shows all of these."""
        x_low, x_high = _spread(min(steps), max(steps))
        x_ticks = [x for x in _ticks(x_low, x_high, whole=True) if min(steps) <= x <= max(steps)]
        return cls(x_low, x_high, x_ticks, _ticks(*_spread(min(lows), max(highs))))

    def x(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return BOTTOM + (TOP - BOTTOM) * (value - low) / (high - low)


def _spread(low: float, high: float) -> tuple[float, float]:
    """The range, made wide enough to be divided where all values are the same, or nearly."""
    if high - low > max(1e-9 * max(abs(low), abs(high)), 1e-290):
        return low, high
    middle = low / 2 + high / 2
    half = abs(middle) * 0.1
    return (middle - half, middle + half) if half > 1e-290 else (0.0, 1.0)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to eight round numbers, the first at or below ``low`` and the last at or above ``high``."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10, 20) if m * power >= rough)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def _axes(frame: _Frame) -> list[str]:
    parts = []
    for value in frame.y_ticks:
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_label(value)}</text>')
    for step in frame.x_ticks:
        x = frame.x(step)
        parts.append(f'<path class="grid" d="M{x:.1f} {BOTTOM}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{_label(step)}</text>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle:g}" y="{HEIGHT - 4}" text-anchor="middle">optimizer step</text>')
    return parts


def _label(value: float) -> str:
    return f"{value:.6g}"  # six digits: rounding hides what adding up steps leaves, and neighbours still differ


def _path(frame: _Frame, points: Sequence[Point]) -> str:
    """Lines through neighbouring points; a point alone becomes a dot, by a line without length and round ends."""
    pieces = []
    for is_drawable, run in itertools.groupby(points, key=_is_drawable):
        if is_drawable:
            places = [f"{frame.x(step):.1f} {frame.y(value):.1f}" for step, value in run]
            pieces.append(f"M{'L'.join(places)}" if len(places) > 1 else f"M{places[0]}h0")
    return "".join(pieces)


def _mark(frame: _Frame, point: Point, label: str) -> str:
    told = html.escape(f"{label}, step {number(point[0])}: {number(point[1])}")
    place = f'cx="{frame.x(point[0]):.1f}" cy="{frame.y(point[1]):.1f}"'
    return f'<circle class="mark" r="3.5" {place}><title>{told}</title></circle>'


def _bar(frame: _Frame, step: float, low: float, high: float) -> str:
    x, bottom, top = frame.x(step), frame.y(low), frame.y(high)
    ends = "".join(f"M{x - 4:.1f} {y:.1f}h8" for y in (bottom, top))
    return f'<path class="bar" d="M{x:.1f} {bottom:.1f}V{top:.1f}{ends}"/>'


def _thinned(points: list[Point]) -> list[Point]:
    """Of each few neighbours the lowest and the highest, in their order."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = []
    for start in range(0, len(points), size):
        few = [point for point in points[start : start + size] if _is_drawable(point)]
        if few:
            kept += sorted({min(few, key=lambda p: p[1]), max(few, key=lambda p: p[1])})
    return kept


def _is_drawable(values: Sequence[float]) -> bool:
    return all(abs(value) < _LARGEST for value in values)  # false for NaN
