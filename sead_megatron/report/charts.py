"""Small SVG charts: geometry here, markup in templates/chart.html, colours in templates/report.css.

Hand-made and not matplotlib's: colours then follow the reader's light or dark mode, a chart is a few kB, and text
stays text. All lengths are in units of the view box.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sead_megatron.report.loading import evenly

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 468, 28, 258
FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM}
"""The same for templates/chart.html."""
LINE_POINTS = 600
"""A line has at most so many points; of more, evenly spaced ones are drawn."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels; `start` is where `low` lies."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value; values beyond an end lie on it."""
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, max(value, self.low)))
            if self.log
            else (self.low, self.high, value)
        )
        part = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Pixels and labels of round values."""
        if self.log:
            low, high = round(math.log10(self.low)), round(math.log10(self.high))
            stride = 1 + (high - low) // 7
            exponents = range(low, high + 1, stride)
            return [(self.place(10.0**e), f"10{str(e).translate(_SUPERSCRIPTS)}") for e in exponents]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        values = [(first + i) * step for i in range(int((self.high - first * step) / step + 1e-9) + 1)]
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(self.place(value), tick_label(value, decimals)) for value in values]


def tick_label(value: float, decimals: int = 0) -> str:
    """A short number: 12000 is 12k, and 2e-7 is not written with 7 decimals."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            scale = 1e3 if letter == "k" else unit
            return f"{value / scale:.4g}{letter}"
    text = f"{value:.{decimals}f}" if decimals <= 4 else f"{value:.4g}"
    return ("0" if float(text) == 0 else text).replace("-", "−").replace("e−0", "e−")


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def linear_axis(values: Iterable[float], start: float, end: float, *, zero: bool = False) -> Axis:
    """An axis over the values, with a little room; `zero`: from 0 (or below, if values are)."""
    known = [*values, 0.0] if zero else list(values)
    low, high = min(known), max(known)
    if high - low < 1e-12 * max(1.0, abs(high)):
        room = abs(high) / 2 or 1.0
        return Axis(low if zero else low - room, high + room, start, end)
    room = (high - low) * 0.06
    return Axis(
        low if zero and low == 0 else low - room, high if zero and high == 0 else high + room, start, end
    )


def step_axis(steps: Iterable[float]) -> Axis:
    """The x axis of training steps, without room on either side."""
    known = list(steps)
    low, high = min(known), max(known)
    return Axis(low - 1, high + 1, LEFT, RIGHT) if low == high else Axis(low, high, LEFT, RIGHT)


def log_axis(values: Iterable[float], start: float, end: float, floor: float) -> Axis:
    """Whole decades around the values; those below `floor` lie on the lower end."""
    known = [max(value, floor) for value in values] or [floor]
    low = math.floor(math.log10(min(known)) + 1e-9)
    high = max(low + 1, math.ceil(math.log10(max(known)) - 1e-9))
    return Axis(10.0**low, 10.0**high, start, end, log=True)


@dataclass(frozen=True)
class Mark:
    """A path. `kind` and `colour` are CSS classes; `title` is shown by the browser on hovering."""

    kind: str
    colour: str
    path: str
    title: str = ""


@dataclass(frozen=True)
class Label:
    """Text in the plot; `anchor` is SVG's text-anchor, `colour` a CSS class."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    colour: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of the legend: its swatch has the classes of a mark."""

    kind: str
    colour: str
    name: str


@dataclass
class Chart:
    """What templates/chart.html draws. `missing` replaces the drawing by a sentence."""

    title: str
    unit: str = ""
    alt: str = ""
    note: str = ""
    missing: str = ""
    x_name: str = "step"
    y_name: str = ""
    x: Axis | None = None
    y: Axis | None = None
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    hover: dict[str, Any] | None = None


@dataclass(frozen=True)
class Line:
    """A series. `low` and `high`, if given, are the ends of an interval at each point."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def thinned(self) -> Line:
        """At most `LINE_POINTS` of the points."""
        kept = evenly(range(len(self.x)), LINE_POINTS)
        parts = (self.x, self.y, self.low, self.high)
        x, y, low, high = ([part[i] for i in kept] if part else [] for part in parts)
        return Line(self.name, self.colour, x, y, self.dashed, low, high)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    note: str = "",
    missing: str = "not in the records",
    zero: bool = False,
    log: bool = False,
    y_values: Sequence[float] = (),
    rules: Sequence[tuple[float, str]] = (),
    percent: bool = False,
) -> Chart:
    """Lines over steps.

    `y_values` widen the y axis, `rules` are horizontal lines (value, label), `percent`: shares, shown times 100.
    Lines without points are left out; without any, the chart says `missing`.
    """
    lines = [line.thinned() for line in lines if len(line.x)]
    if not lines:
        return Chart(title, unit, missing=missing)
    values = [v for line in lines for v in (*line.y, *line.low, *line.high)]
    values += [*y_values, *(value for value, _ in rules)]
    y = log_axis(values, BOTTOM, TOP, 1e-9) if log else linear_axis(values, BOTTOM, TOP, zero=zero)
    x = step_axis([step for line in lines for step in line.x])
    chart = Chart(title, unit, note=note, x=x, y=y, x_ticks=_step_ticks(x))
    for line in lines:
        dashed = " dashed" if line.dashed else ""
        points = [(x.place(a), y.place(b)) for a, b in zip(line.x, line.y, strict=True)]
        if line.low:
            ends = zip(points, line.low, line.high, strict=True)
            path = "".join(_whisker(at, y.place(low), y.place(high)) for (at, _), low, high in ends)
            chart.marks.append(Mark("whisker", line.colour, path))
        chart.marks.append(Mark("line" + dashed, line.colour, "M" + "L".join(f"{a} {b}" for a, b in points)))
        if len(points) <= 30:
            chart.marks.append(Mark("point", line.colour, dots(points)))
        chart.keys.append(Key("line" + dashed, line.colour, line.name))
    _rules(chart, rules)
    shown = percent_text if percent else number_text
    chart.alt = "; ".join(
        f"{line.name}: {shown(line.y[0])} in step {line.x[0]:g}, {shown(line.y[-1])} in step {line.x[-1]:g}"
        for line in lines
    )
    chart.hover = _hover(lines, x, y, shown)
    return chart


def _whisker(x: float, low: float, high: float) -> str:
    return f"M{x - 4:.1f} {low}h8M{x} {low}V{high}M{x - 4:.1f} {high}h8"


def _step_ticks(x: Axis) -> list[tuple[float, str]]:
    """Whole steps only."""
    return [(position, label) for position, label in x.ticks() if "." not in label or label[-1] in "kMG"]


def _rules(chart: Chart, rules: Sequence[tuple[float, str]]) -> None:
    if chart.y is None:
        return
    for value, label in rules:
        position = chart.y.place(value)
        chart.marks.append(Mark("rule", "", f"M{LEFT} {position}H{RIGHT}"))
        chart.labels.append(Label(RIGHT - 2, position - 5, label, "end"))


def _hover(lines: Sequence[Line], x: Axis, y: Axis, shown: Any) -> dict[str, Any]:
    """What report.js needs to show the values at the step nearest to the pointer."""
    steps = sorted({step for line in lines for step in line.x})
    series = []
    for line in lines:
        at = dict(zip(line.x, zip(line.y, [*line.low, *[None] * len(line.y)], strict=False), strict=True))
        high = dict(zip(line.x, line.high, strict=False))
        entries = [
            None
            if step not in at
            else [
                y.place(at[step][0]),
                shown(at[step][0])
                + (f" ({shown(at[step][1])} to {shown(high[step])})" if step in high else ""),
            ]
            for step in steps
        ]
        series.append({"name": line.name, "colour": line.colour, "points": entries})
    return {
        "x": [x.place(step) for step in steps],
        "steps": steps,
        "series": series,
        "top": TOP,
        "bottom": BOTTOM,
    }


def dots(points: Iterable[tuple[float, float]]) -> str:
    """A path of dots: strokes without length, which round caps make visible."""
    return "".join(f"M{x} {y}h0" for x, y in points)


def box(x: float, y: float, width: float, height: float) -> str:
    """A path of a rectangle; (x, y) is its upper left corner."""
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"


def number_text(value: float | None) -> str:
    """Four significant digits; an en dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def percent_text(value: float | None) -> str:
    """A share in percent with one decimal; an en dash for what is not known."""
    return (
        "–"
        if value is None or not math.isfinite(value)
        else f"{value:.1%}".replace("-", "−").replace("%", " %")
    )
