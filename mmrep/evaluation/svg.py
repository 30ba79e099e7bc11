"""Small charts as inline SVG: lines and points, with axes, ticks and a legend. No script, no link, one string.

Lines and text take the page's own colour, so that a chart is read on light and on dark. The colours of the series differ in
lightness or hue for colour-blind people too, stand out from white and from black by 3:1, and come with a dash or a shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8609a", "#8a7300", "#7a7a7a", "#7a5cc8", "#c2414b")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 40
"""Margins of the plotting area, in the chart's units."""
LINE_HEIGHT = 17
"""Of the legend, which stands below."""

MOST = 1e300
"""Values beyond it stand at the chart's edge."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: What stands beside it.
        low, high: Its ends.
        log: Whether equal distances are equal ratios.
        ticks: Where; found by `nice_ticks` if there are none.
    """

    label: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()

    @classmethod
    def around(cls, label: str, values: Sequence[float], *, margin: float = 0.04) -> Axis:
        """An axis that holds some finite values, with some room."""
        low, high = (min(MOST, max(-MOST, value)) for value in (min(values), max(values)))
        room = margin * (high - low) or max(abs(high), 1.0) * margin
        return cls(label, low - room, high + room)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two numbers."""
    if not high > low:
        return [low]
    raw = max(high - low, 1 / MOST) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, series: Mapping[str, Sequence[Point]], x: Axis, y: Axis) -> str:
    """Lines through points.

    Args:
        title: Plain text; the chart's name for those who do not see it.
        series: Name -> its points, finite, in order. One of a single point is drawn as a dot.
        x, y: The axes.
    """

    def draw(number: int, points: Sequence[Point], to: Callable[[Point], Point]) -> str:
        colour, dash = style(number)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        if len(points) == 1:
            cx, cy = to(points[0])
            return f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{colour}"/>'
        places = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(to, points))
        return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'

    def sample(number: int) -> str:
        return draw(number, [(0, 0), (1, 0)], lambda point: (22 * point[0], -4))

    return _chart(title, series, x, y, draw, sample)


def scatter(title: str, series: Mapping[str, Sequence[Point]], x: Axis, y: Axis) -> str:
    """Points, a colour and a shape for each series; see `line_chart`."""

    def draw(number: int, points: Sequence[Point], to: Callable[[Point], Point]) -> str:
        colour, _ = style(number)
        marks = "".join(_mark(number, *to(point)) for point in points)
        return f'<g fill="{colour}" fill-opacity="0.6">{marks}</g>'

    def sample(number: int) -> str:
        return draw(number, [(0, 0)], lambda point: (11, -4))

    return _chart(title, series, x, y, draw, sample)


def style(number: int) -> tuple[str, str]:
    """Colour and dash of a series; pairs repeat after as many series as there are colours times dashes."""
    return COLOURS[number % len(COLOURS)], DASHES[(number + number // len(COLOURS)) % len(DASHES)]


def _chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    x: Axis,
    y: Axis,
    draw: Callable[[int, Sequence[Point], Callable[[Point], Point]], str],
    sample: Callable[[int], str],
) -> str:
    def to(point: Point) -> Point:
        right = LEFT + (WIDTH - LEFT - RIGHT) * x.place(point[0])
        return right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y.place(point[1])

    lines = []
    for number, (name, points) in enumerate(series.items()):
        if points:
            lines.append(f"<g><title>{escape(name)}</title>{draw(number, points, to)}</g>")
    legend = [
        f'<g transform="translate({LEFT},{HEIGHT + LINE_HEIGHT * (number + 1)})">{sample(number)}'
        f'<text x="30">{escape(name)}</text></g>'
        for number, name in enumerate(series)
    ]
    height = HEIGHT + LINE_HEIGHT * (len(series) + 1)
    head = f'<text x="{LEFT}" y="16" font-weight="600">{escape(title)}</text>'
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        f"<title>{escape(title)}</title>{head}{_axes(x, y, to)}{''.join(lines)}{''.join(legend)}</svg>\n"
    )


def _axes(x: Axis, y: Axis, to: Callable[[Point], Point]) -> str:
    bottom, left = HEIGHT - BOTTOM, LEFT
    parts = [f'<path d="M{left},{TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="currentColor"/>']
    for tick in x.ticks or nice_ticks(x.low, x.high):
        at, _ = to((tick, y.low))
        parts.append(f'<path d="M{at:.1f},{bottom}v4" stroke="currentColor"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks or nice_ticks(y.low, y.high):
        _, at = to((x.low, tick))
        grid = f'<path d="M{left},{at:.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity="0.15"/>'
        parts.append(f'{grid}<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    side = (TOP + bottom) / 2
    parts.append(
        f'<text x="13" y="{side:.0f}" text-anchor="middle" transform="rotate(-90 13 {side:.0f})">{escape(y.label)}</text>'
    )
    return "".join(parts)


def _mark(number: int, x: float, y: float) -> str:
    """A circle, square, triangle, diamond or cross around a place."""
    shape = number % 5
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
    paths = ("m-2.4,-2.4h4.8v4.8h-4.8z", "m0,-3.2l3,5.4h-6z", "m0,-3.4l3.4,3.4l-3.4,3.4l-3.4,-3.4z")
    cross = "m-1,-3.2h2v2.2h2.2v2h-2.2v2.2h-2v-2.2h-2.2v-2h2.2z"
    return f'<path d="M{x:.1f},{y:.1f}{(*paths, cross)[shape - 1]}"/>'
