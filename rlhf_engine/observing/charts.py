"""Where the lines, bars, ticks and labels of the report's charts stand. report.jinja draws them."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Points = dict[float, float]  # iteration -> value, in order; NaN where the run reported something that is not finite

STAGES, COLUMNS, LINE_POINTS, HOVER_POINTS = 7, 60, 600, 150


class Plot:
    """Both axes of a chart: `x` and `y` turn values into places in its viewBox, of `width` x `height`."""

    width, height, left, right, top, bottom = 360, 200, 46, 302, 10, 164

    def __init__(self, xs: Sequence[float], values: Sequence[float], log: bool = False, pad: float = 0.0):
        """`log`: values are above 0, and those that differ span decades; `pad`: room beside the first and last x."""
        low, high = min(values), max(values)
        self.scale: Callable[[float], float] = math.log10 if log else float
        self.low: float
        self.high: float
        if log:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            self.y_ticks = [10.0**k for k in range(first, last + 1, math.ceil((last - first) / 5))]
            self.low, self.high = first, last
        else:
            if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
                low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
            elif 0 < low < high / 2:
                low = 0.0  # with zero in sight, heights compare
            self.y_ticks = _ticks(low, high, 4)
            self.low, self.high = self.y_ticks[0], self.y_ticks[-1]
        start, end = min(xs), max(xs)
        self.x_ticks = [t for t in _ticks(start, max(end, start + 1), 5, smallest=1.0) if start <= t <= end]
        pad = pad or float(start == end)
        self.first, self.last = start - pad, end + pad

    def x(self, iteration: float) -> float:
        share = (iteration - self.first) / (self.last - self.first)
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        share = (self.scale(value) - self.low) / (self.high - self.low)
        return round(self.bottom - share * (self.bottom - self.top), 1)


@dataclass
class Line:
    index: int  # of its colour and dashes
    path: str
    dots: list[tuple[float, float]]
    dense: bool
    last: float  # its last value, and where the label that says it stands
    y: float


class LineChart:
    """One line per key. `iterations` are those of the whole run, so that all charts line up."""

    def __init__(self, name: str, group: Mapping[str, Points], iterations: Sequence[float], log: bool = False):
        self.name, self.keys = name, list(group)
        values = [y for points in group.values() for y in points.values() if not math.isnan(y)]
        broken = sum(map(len, group.values())) - len(values)
        log = log and bool(values) and min(values) > 1e-100 and max(values) >= 100 * min(values)
        self.notes = ["log scale"] * log + [f"{broken:,} not finite"] * bool(broken)
        self.plot = Plot(iterations, values, log) if values else None
        lines = (self.plot and _line(self.plot, i, points) for i, points in enumerate(group.values()))
        self.lines = [line for line in lines if line]
        above = -math.inf
        for i, line in enumerate(sorted(self.lines, key=operator.attrgetter("y")), 1 - len(self.lines)):
            above = line.y = max(min(line.y, Plot.bottom + 13 * i), above + 13)  # labels must not overlap
        xs = sorted({x for points in group.values() for x in points})
        self.hits = _hits(self.plot, xs, group) if self.plot and len(xs) <= HOVER_POINTS else []


class StageTimes:
    """Stacked bars of seconds per iteration, and for the table that is their legend each stage's total."""

    def __init__(self, stages: Mapping[str, Points]):
        spent = _largest(stages)
        self.xs = sorted({x for points in spent.values() for x in points})
        count = min(len(self.xs), COLUMNS)
        buckets = [self.xs[i * len(self.xs) // count : (i + 1) * len(self.xs) // count] for i in range(count)]
        means = [[sum(p.get(x, 0.0) for x in bucket) / len(bucket) for p in spent.values()] for bucket in buckets]
        half = (self.xs[-1] - self.xs[0]) / (len(self.xs) - 1) / 2 if len(self.xs) > 1 else 0.5
        self.plot = Plot(self.xs, [0.0, *map(sum, means)], pad=half)
        # of each bar: its iterations, left edge, width, and each stage with its mean seconds, top and height
        self.bars = []
        for bucket, seconds in zip(buckets, means, strict=True):
            left, right = self.plot.x(bucket[0] - half), self.plot.x(bucket[-1] + half)
            edges = [self.plot.y(y) for y in itertools.accumulate(seconds, initial=0.0)]
            heights = [round(low - top, 1) for low, top in itertools.pairwise(edges)]
            parts = list(zip(spent, seconds, edges[1:], heights, strict=True))
            self.bars.append((bucket, left, round(max(right - left - 1, 0.5), 1), parts))
        self.totals = {stage: sum(points.values()) for stage, points in spent.items()}


def _ticks(low: float, high: float, count: int, smallest: float = 0.0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose [low, high] in about `count` steps."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(smallest, next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _line(plot: Plot, index: int, points: Points) -> Line | None:
    finite = [(x, y) for x, y in points.items() if not math.isnan(y)]
    if not finite:
        return None
    runs = [
        [(plot.x(x), plot.y(y)) for x, y in run]
        for gap, run in itertools.groupby(_thin(points), key=lambda point: math.isnan(point[1]))
        if not gap  # the gap is the message
    ]
    path = "".join("M" + "L".join(f"{x},{y}" for x, y in run) for run in runs if len(run) > 1)
    x, y = plot.x(finite[-1][0]), plot.y(finite[-1][1])
    dots = {run[0] for run in runs if len(run) == 1} | {(x, y)}
    return Line(index, path, sorted(dots), len(points) > HOVER_POINTS, finite[-1][1], y)


def _thin(points: Points) -> list[tuple[float, float]]:
    """About `LINE_POINTS` points with the same outline: the lowest and the highest of every stretch."""
    items = list(points.items())
    if len(items) <= LINE_POINTS:
        return items
    size = math.ceil(2 * len(items) / LINE_POINTS)
    kept: list[tuple[float, float]] = []
    by_value = operator.itemgetter(1)
    for i in range(0, len(items), size):
        stretch = [item for item in items[i : i + size] if not math.isnan(item[1])]
        kept += sorted({min(stretch, key=by_value), max(stretch, key=by_value)}) if stretch else [items[i]]
    return kept


def _hits(plot: Plot, xs: Sequence[float], group: Mapping[str, Points]) -> list[tuple]:
    """A strip around every iteration, to be hovered over: left edge, width, iteration, and each key's value."""
    edges = [plot.left, *(round((plot.x(a) + plot.x(b)) / 2, 1) for a, b in itertools.pairwise(xs)), plot.right]
    return [
        (left, round(right - left, 1), x, [(key, points[x]) for key, points in group.items() if x in points])
        for x, (left, right) in zip(xs, itertools.pairwise(edges), strict=True)
    ]


def _largest(stages: Mapping[str, Points]) -> dict[str, Points]:
    """The stages that take longest first; as many as there are colours that can be told apart, and what is left."""
    # NaN > 0 is false, too
    clean = {stage: {x: y if y > 0 else 0.0 for x, y in points.items()} for stage, points in stages.items()}
    spent = dict(sorted(clean.items(), key=lambda item: -sum(item[1].values())))
    if len(spent) > STAGES + 1:
        rest: Points = {}
        for stage in list(spent)[STAGES:]:
            for x, y in spent.pop(stage).items():
                rest[x] = rest.get(x, 0.0) + y
        spent["other stages"] = rest
    return spent
