"""One self-contained HTML page per training phase: key figures, curves, time per stage, sampled dialogues.

The page loads nothing: charts are inline SVG, styling is one ``<style>`` block, hovering uses
SVG's own titles. It can be copied off a cluster as a single file and opened, printed or mailed years later.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from numbers import Real
from pathlib import Path

from ..surviving import durable
from .timeline import draw_timeline, read_trace

Points = dict[float, float]  # iteration -> value; NaN where the run reported something that is not finite

# What shares a chart shares a unit. Phases draw the charts they have keys for. "log": if values span decades.
CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Score", "", ("score/mean", "gold/mean")),
    ("KL to the reference", "", ("kl/mean",)),
    ("Loss", "log", ("policy/loss", "reward/loss", "eval/loss")),
    ("Accuracy", "", ("reward/accuracy", "eval/accuracy")),
    ("Critic loss", "log", ("critic/loss",)),
    ("Entropy", "", ("policy/entropy",)),
    ("Clip fraction", "", ("policy/clip_fraction", "critic/clip_fraction")),
    ("Gradient norm", "log", ("policy/grad_norm", "critic/grad_norm", "reward/grad_norm")),
    ("Response length", "", ("rollout/response_length",)),
    ("Log-prob gap, rollout to training", "log", ("rollout/log_prob_gap",)),
    ("Learning rate", "", ("policy/learning_rate", "critic/learning_rate", "reward/learning_rate")),
    ("Generated tokens per second", "", ("throughput/generated_tokens_per_second",)),
    (
        "Idle share of the pipelines",
        "",
        ("idle/log_probs+ref_log_probs+score+values", "idle/train_critic+train_policy", "idle/train_policy"),
    ),
    (
        "Model-FLOPs utilisation",
        "",
        ("mfu/train_policy", "mfu/train_critic", "mfu/train_critic+train_policy", "mfu/train_reward"),
    ),
)
TIME_TOTALS = {"time/total", "time/iteration"}  # sums of stages: stacked, they would count every second twice
STAGES, COLUMNS, LINE_POINTS, HOVER_POINTS = 7, 60, 600, 150

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 200, 46, 58, 10, 36


def write_report(
    folder: Path,
    *,
    title: str,
    summary: Mapping[str, float | int | str],
    samples: Sequence[Mapping[str, object]],
) -> Path:
    """Draw `folder/metrics.jsonl` as `folder/report.html` and return that path; no log, no charts.

    Numbers of `summary` become tiles, its strings the line under the title. A sample may hold `prompt`,
    `before`, `after`, and `score_` and `gold_` of both; any may be absent.
    """
    series, iterations = _read(folder / "metrics.jsonl")
    left = dict(series)
    charts = []
    for name, scale, keys in CHARTS:
        if group := {key: left.pop(key) for key in keys if key in left}:
            charts.append(_line_chart(name, group, iterations, scale == "log"))
    charts += [_line_chart(key, {key: left.pop(key)}, iterations) for key in list(left) if key.startswith("eval/")]
    # "time/rollout/decode" is part of "time/rollout", which is the one to stack.
    stages = {
        key.removeprefix("time/"): left.pop(key)
        for key in list(left)
        if key.startswith("time/")
        and key not in TIME_TOTALS
        and not any(key.startswith(f"{other}/") for other in series)
    }
    others = [_line_chart(key, {key: left[key]}, iterations) for key in sorted(left)]

    facts = [f"{len(iterations):,} iteration{'s' * (len(iterations) != 1)}"]
    facts += [f"{_label(key)} {_text(value)}" for key, value in summary.items() if isinstance(value, str)]
    tiles = [
        f"<div><dt>{_label(key)}</dt><dd>{_number(value)}</dd></div>"
        for key, value in summary.items()
        if not isinstance(value, str)
    ]
    cards = [_sample(index, sample) for index, sample in enumerate(samples, 1)]
    parts = [f"<header><h1>{_text(title)}</h1><p>{' · '.join(facts)}</p></header>"]
    parts += [f"<dl class=tiles>{''.join(tiles)}</dl>"] * bool(tiles)
    parts += [f"<h2>Curves</h2><div class=grid>{''.join(charts)}</div>"] * bool(charts)
    parts += [f"<h2>Time per stage</h2>{_time_chart(stages)}"] if stages else []
    if figure := draw_timeline(read_trace(folder / "trace.json")):
        parts.append(f"<h2>What each rank did when</h2>{figure}")
    parts += [f"<h2>Sampled dialogues</h2>{''.join(cards)}"] * bool(cards)
    if others:
        parts.append(f"<details><summary>All other metrics ({len(others)})</summary>")
        parts.append(f"<div class=grid>{''.join(others)}</div></details>")
    if not series:
        parts.append("<p>No metrics were logged.</p>")
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        # Should anything slip through the escaping, the browser still neither runs nor loads it.
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = folder / "report.html"
    durable.write(path, page.encode("utf-8", "replace"))  # sampled text may hold lone surrogates
    return path


def _read(path: Path) -> tuple[dict[str, Points], list[float]]:
    series: dict[str, Points] = {}
    iterations: set[float] = set()
    if not path.exists():
        return {}, []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:  # a run that was killed may leave half a line
                continue
            if not isinstance(row, dict):
                continue
            iteration = _finite(row.pop("iteration", None))
            iteration = float(number) if iteration is None or abs(iteration) > 1e15 else iteration
            iterations.add(iteration)
            for key, value in row.items():
                if isinstance(value, Real) and not isinstance(value, bool):  # null: not measured this time
                    finite = _finite(value)
                    # A resumed run repeats iterations; what it wrote last is what the weights went through.
                    series.setdefault(key, {})[iteration] = math.nan if finite is None else finite
    return {key: dict(sorted(points.items())) for key, points in series.items()}, sorted(iterations)


def _finite(value: object) -> float | None:
    """`value` as a float that can be drawn: the bound leaves room for differences and padding."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < 1e100 else None


def _number(value: object, digits: int = 4) -> str:
    if isinstance(value, int) and abs(value) < 1_000_000:
        return f"{value:,}"
    number = _finite(value)
    if number is None:
        return _text("–" if value is None else value)
    size = abs(number)
    if size and (size < 1e-3 or size >= 1e15):
        mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    for scale, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= max(scale, 1e4):
            return f"{number / scale:.{digits}g}{suffix}"
    return f"{number:.0f}" if size >= 10 ** (digits - 1) else f"{number:.{digits}g}"


def _seconds(value: float) -> str:
    return f"{_number(value, 3)} s" if value < 600 else str(timedelta(seconds=round(value)))


def _text(value: object) -> str:
    """Escaped for HTML, without the control characters that HTML cannot hold."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", str(value)))


def _verbatim(value: object) -> str:
    # HTML drops a newline that opens a <pre>: this one, so that one of the text's own stays.
    return f"<pre dir=auto>\n{_text(value)}</pre>"


def _label(key: str) -> str:
    return _text(key.replace("_", " "))


def _ticks(low: float, high: float, count: int, smallest: float = 0.0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose [low, high] in about `count` steps."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(smallest, next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _frame(
    xs: Sequence[float], values: Sequence[float], log: bool, pad: float = 0.0
) -> tuple[Callable[[float], float], Callable[[float], float], str]:
    """The scales of both axes, and the axes drawn: gridlines, ticks and the x label."""
    low, high = min(values), max(values)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ticks = [10.0**k for k in range(first, last + 1, math.ceil((last - first) / 5))]
        bottom, span, bend = float(first), float(last - first), math.log10
    else:
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
            low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
        elif 0 < low < high / 2:
            low = 0.0  # with zero in sight, heights compare
        ticks = _ticks(low, high, 4)
        bottom, span, bend = ticks[0], ticks[-1] - ticks[0], float
    start, end = min(xs) - pad, max(xs) + pad
    if start == end:
        start, end = start - 1, end + 1

    def to_x(x: float) -> float:
        return LEFT + (x - start) / (end - start) * (WIDTH - LEFT - RIGHT)

    def to_y(y: float) -> float:
        return HEIGHT - BOTTOM - (bend(y) - bottom) / span * (HEIGHT - BOTTOM - TOP)

    axes = [
        f'<path class=rule d="M{LEFT},{to_y(t):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{to_y(t) + 4:.1f}" class=left>{_number(t, 6)}</text>'
        for t in ticks
    ]
    axes += [
        f'<path class=axis d="M{to_x(t):.1f},{HEIGHT - BOTTOM}v4"/>'
        f'<text x="{to_x(t):.1f}" y="{HEIGHT - BOTTOM + 15}" class=mid>{_number(t, 6)}</text>'
        for t in _ticks(min(xs), max(max(xs), min(xs) + 1), 5, smallest=1.0)
        if min(xs) <= t <= max(xs)
    ]
    axes.append(f'<path class=axis d="M{LEFT},{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    axes.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" class=mid>iteration</text>')
    return to_x, to_y, "".join(axes)


def _svg(name: str, body: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{_text(name)}">{body}</svg>'


def _line_chart(name: str, group: Mapping[str, Points], iterations: Sequence[float], log: bool = False) -> str:
    """A figure with one line per key; `iterations` are those of the whole run, so that all charts line up."""
    finite = {key: {x: y for x, y in points.items() if not math.isnan(y)} for key, points in group.items()}
    values = [y for points in finite.values() for y in points.values()]
    broken = sum(map(len, group.values())) - len(values)
    log = log and bool(values) and min(values) > 1e-100 and max(values) >= 100 * min(values)
    notes = ["log scale"] * log + [f"{broken:,} not finite"] * bool(broken)
    swatch = '<i class="s{}"></i>' if len(group) > 1 else ""
    legend = "".join(f"<span>{swatch.format(i)}{_text(key)}</span>" for i, key in enumerate(group))
    caption = f"<b>{_text(name)}</b>" + (legend if list(group) != [name] else "")
    caption += "".join(f"<em>{note}</em>" for note in notes)
    if not values:
        return f"<figure><figcaption>{caption}</figcaption></figure>"

    xs = sorted({x for points in group.values() for x in points})
    to_x, to_y, axes = _frame(iterations, values, log)
    marks, ends = [], []
    for i, (key, points) in enumerate(group.items()):
        if not finite[key]:
            continue
        lines: list[list[str]] = [[]]
        for x, y in _thin(points):
            if math.isnan(y):
                lines.append([])  # the gap is the message
            else:
                lines[-1].append(f"{to_x(x):.1f},{to_y(y):.1f}")
        path = "".join("M" + "L".join(line) for line in lines if len(line) > 1)
        last_x, last_y = next(reversed(finite[key].items()))
        dense = " dense" if len(points) > HOVER_POINTS else ""
        dots = {line[0] for line in lines if len(line) == 1} | {f"{to_x(last_x):.1f},{to_y(last_y):.1f}"}
        marks.append(f'<g class="s{i}"><path class="line{dense}" d="{path}"/>')
        marks += ['<circle cx="{}" cy="{}" r="2.5"/>'.format(*dot.split(",")) for dot in sorted(dots)]
        marks.append("</g>")
        ends.append((to_y(last_y), i, last_y))
    above = -math.inf
    for rank, (y, i, value) in enumerate(sorted(ends), 1):  # by height, pushed apart where they would overlap
        above = max(min(y, HEIGHT - BOTTOM - 13 * (len(ends) - rank)), above + 13)
        last = f'<text x="{WIDTH - RIGHT + 7}" y="{above + 4:.1f}" class="s{i}">{_number(value, 3)}</text>'
        marks.append(last)
    if len(xs) <= HOVER_POINTS:
        marks.append(_hover(xs, group, to_x))
    return f"<figure><figcaption>{caption}</figcaption>{_svg(name, axes + ''.join(marks))}</figure>"


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


def _hover(xs: Sequence[float], group: Mapping[str, Points], to_x: Callable[[float], float]) -> str:
    """An invisible strip around every iteration whose title, which browsers show on hover, has the values."""
    edges = [LEFT, *((to_x(a) + to_x(b)) / 2 for a, b in itertools.pairwise(xs)), WIDTH - RIGHT]
    return "".join(
        f'<rect class=hit x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}">'
        f"<title>iteration {_number(x, 6)}"
        + "".join(f"\n{_text(key)} {_number(points[x])}" for key, points in group.items() if x in points)
        + "</title></rect>"
        for x, (left, right) in zip(xs, itertools.pairwise(edges), strict=True)
    )


def _time_chart(stages: Mapping[str, Points]) -> str:
    """Stacked bars of seconds per iteration, and a table that is their legend and holds the totals."""
    # NaN > 0 is false, too
    clean = {stage: {x: y if y > 0 else 0.0 for x, y in points.items()} for stage, points in stages.items()}
    spent = dict(sorted(clean.items(), key=lambda item: -sum(item[1].values())))
    if len(spent) > STAGES + 1:  # there are only so many colours that can be told apart
        rest: Points = {}
        for stage in list(spent)[STAGES:]:
            for x, y in spent.pop(stage).items():
                rest[x] = rest.get(x, 0.0) + y
        spent["other stages"] = rest
    xs = sorted({x for points in spent.values() for x in points})
    count = min(len(xs), COLUMNS)
    buckets = [xs[i * len(xs) // count : (i + 1) * len(xs) // count] for i in range(count)]
    columns = [[sum(p.get(x, 0.0) for x in bucket) / len(bucket) for p in spent.values()] for bucket in buckets]
    half = (xs[-1] - xs[0]) / (len(xs) - 1) / 2 if len(xs) > 1 else 0.5
    to_x, to_y, axes = _frame(xs, [0.0, *map(sum, columns)], log=False, pad=half)
    bars = []
    for bucket, column in zip(buckets, columns, strict=True):
        left, right, base = to_x(bucket[0] - half), to_x(bucket[-1] + half), 0.0
        span = _number(bucket[0], 6) + (f" to {_number(bucket[-1], 6)}" if len(bucket) > 1 else "")
        hint = "".join(f"\n{_text(stage)} {_seconds(y)}" for stage, y in zip(spent, column, strict=True))
        bars.append(f"<g><title>iteration {span}{hint}</title>")
        for i, y in enumerate(column):
            top, base, low = to_y(base + y), base + y, to_y(base)
            bars.append(
                f'<rect class="bar s{i}" x="{left:.1f}" y="{top:.1f}" '
                f'width="{max(right - left - 1, 0.5):.1f}" height="{low - top:.1f}"/>'
            )
        bars.append("</g>")
    totals = {stage: sum(points.values()) for stage, points in spent.items()}
    whole = sum(totals.values())
    rows = "".join(
        f'<tr><td><i class="bar s{i}"></i>{_text(stage)}<td>{_seconds(total)}'
        f"<td>{_seconds(total / len(xs))}<td>{total / (whole or 1.0):.1%}"
        for i, (stage, total) in enumerate(totals.items())
    )
    return (
        f"<div class=time><figure><figcaption><b>Seconds per iteration</b></figcaption>"
        f"{_svg('Seconds per iteration, by stage', axes + ''.join(bars))}</figure>"
        f"<table><tr><th>stage<th>total<th>per iteration<th>share{rows}"
        f"<tr class=total><td>total<td>{_seconds(whole)}<td>{_seconds(whole / len(xs))}<td></table></div>"
    )


def _sample(index: int, sample: Mapping[str, object]) -> str:
    answers = [side for side in ("before", "after") if sample.get(side) is not None]
    columns = []
    for side in answers:
        chips = []
        for kind in ("score", "gold"):
            value, before = _finite(sample.get(f"{kind}_{side}")), _finite(sample.get(f"{kind}_before"))
            if value is not None:
                change = ""
                if before is not None and side == "after":
                    change = f" ({'+' * (value >= before)}{_number(value - before, 3)})"
                chips.append(f"<span>{kind} <b>{_number(value, 3)}</b>{change}</span>")
        columns.append(
            f"<div><h3>{side if len(answers) > 1 else 'answer'}{''.join(chips)}</h3>{_verbatim(sample[side])}</div>"
        )
    prompt = sample.get("prompt")
    asked = "" if prompt is None else f"<h3>prompt</h3>{_verbatim(prompt)}"
    return f"<article><b>{index}</b>{asked}<div class=pair>{''.join(columns)}</div></article>"


# The colours follow Okabe and Ito's, distinct for colour-blind readers; dashes tell lines apart in print.
STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b1f24;--soft:#5b6570;--rule:#e3e6ea}
.s0{color:#0072b2}.s1{color:#c84e00}.s2{color:#00805c}.s3{color:#b0568a}
.s4{color:#3a9bd6}.s5{color:#b87d00}.s6{color:#6b7280}.s7{color:#1b1f24}
.bar.s1{color:#e69f00}.bar.s5{color:#d55e00}
@media screen and (prefers-color-scheme:dark){
:root{--page:#101317;--card:#191d23;--ink:#e6e9ed;--soft:#9aa4b0;--rule:#2c323a}
.s0{color:#4aa8e8}.s1{color:#ff9447}.s2{color:#2dc39a}.s3{color:#e59ac4}
.s4{color:#8fd0f5}.s5{color:#f0b429}.s6{color:#9ca3af}.s7{color:#e6e9ed}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 16px 48px;max-width:1180px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{margin:0;font-size:1.7em;line-height:1.2}h2{margin:32px 0 12px;font-size:1.15em}
header p{margin:6px 0;color:var(--soft)}
.tiles{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));margin:18px 0 0}
.tiles div,figure,article,.time{background:var(--card);border:1px solid var(--rule);
border-radius:8px;padding:10px 14px}
dt{color:var(--soft);font-size:.85em}dd{margin:0;font-size:1.4em;font-weight:600;font-variant-numeric:tabular-nums}
.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
figure{margin:0;display:flex;flex-direction:column}
figcaption{display:flex;flex-wrap:wrap;gap:0 12px;font-size:.85em;min-height:1.6em}
figcaption span,figcaption em{color:var(--soft);font-style:normal}figcaption em{margin-left:auto}
figcaption i{display:inline-block;width:18px;margin-right:5px;vertical-align:middle;border-top:3px solid}
figcaption .s1{border-top-style:dashed}figcaption .s2{border-top-style:dotted}
svg{display:block;width:100%;height:auto;margin-top:auto;overflow:visible}
text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
text[class^=s]{fill:currentColor;font-weight:600}.left{text-anchor:end}.mid{text-anchor:middle}
.rule{stroke:var(--rule);fill:none}.axis{stroke:var(--soft);fill:none}
.line{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}.line.dense{stroke-width:1}
circle,rect.bar{fill:currentColor}
.s1 .line{stroke-dasharray:6 3}.s2 .line{stroke-dasharray:2 3}
.hit{fill:transparent}.hit:hover{fill:var(--soft);fill-opacity:.15}g:hover>.bar{opacity:.75}
.time{display:flex;flex-wrap:wrap;gap:12px 32px;align-items:center}
.time figure{border:0;padding:0;flex:0 1 470px}
.time table{flex:1 1 330px}table{border-collapse:collapse;font-size:.9em;font-variant-numeric:tabular-nums}
th,td{padding:3px 0 3px 12px;text-align:right;font-weight:400;border-bottom:1px solid var(--rule)}
th{color:var(--soft)}th:first-child,td:first-child{text-align:left;padding-left:0}
.total td{font-weight:600;border:0}
td i{display:inline-block;width:11px;height:11px;margin-right:8px;border-radius:2px;background:currentColor}
details{margin-top:24px}details>summary{cursor:pointer;color:var(--soft);margin-bottom:12px}
article{margin-bottom:12px}article>b{float:right;color:var(--soft)}
h3{margin:4px 0;font-size:.85em;font-weight:600;color:var(--soft)}h3 span{margin-left:12px;font-weight:400}
h3 b{color:var(--ink)}
.pair{display:grid;gap:0 14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
pre{margin:0 0 8px;padding:8px 10px;background:var(--page);border-radius:6px;max-height:26em;overflow:auto;
white-space:pre-wrap;font:13px/1.45 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media print{body{padding:0;max-width:none}pre{max-height:none}figure,article,.tiles div{break-inside:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
