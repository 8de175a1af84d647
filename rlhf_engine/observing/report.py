"""One self-contained HTML page per training phase: key figures, curves, time per stage, sampled dialogues.

The page loads nothing: charts are inline SVG, styling is one ``<style>`` block, hovering uses
SVG's own titles. It can be copied off a cluster as a single file and opened, printed or mailed years later.
The curves are our own SVG: plotly, bokeh and altair put megabytes of scripts into a page, and matplotlib's shows no
values where one points.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from numbers import Real
from pathlib import Path

import jinja2

from ..surviving import durable
from .charts import LineChart, Points, StageTimes
from .timeline import read_trace

# What shares a chart shares a unit. Phases draw the charts they have keys for. "log": if values span decades.
CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Score", "", ("score/mean", "gold/mean")),
    ("KL to the reference", "", ("kl/mean",)),
    ("Loss", "log", ("policy/loss", "reward/loss", "eval/loss")),
    ("Accuracy", "", ("reward/accuracy", "policy/accuracy", "eval/accuracy")),
    ("Implicit rewards", "", ("policy/chosen", "policy/rejected", "policy/margin")),
    ("Critic loss", "log", ("critic/loss",)),
    ("Entropy", "", ("policy/entropy",)),
    ("Clip fraction", "", ("policy/clip_fraction", "critic/clip_fraction")),
    ("Gradient norm", "log", ("policy/grad_norm", "critic/grad_norm", "reward/grad_norm")),
    (
        "Load-balancing loss of experts",
        "",
        ("policy/router_aux_loss", "critic/router_aux_loss", "reward/router_aux_loss"),
    ),
    (
        "Largest share that one expert has of a layer's tokens",
        "",
        ("policy/expert_share_max", "critic/expert_share_max", "reward/expert_share_max"),
    ),
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


def write_report(
    folder: Path,
    *,
    title: str,
    summary: Mapping[str, float | int | str],
    samples: Sequence[Mapping[str, object]],
) -> Path:
    """Draw `folder/metrics.jsonl` as `folder/report.html` and return that path; no log, no charts.

    Numbers of `summary` become tiles, its strings the line under the title. A sample may hold `prompt`,
    `before`, `after`, `score_` and `gold_` of both, and `turns_`, what was said `by` the policy, with its `reward`, and
    by the environment; any may be absent.
    """
    series, iterations = _read(folder / "metrics.jsonl")
    charts, times, others = _arrange(series, iterations)
    page = _template().render(
        title=title,
        iterations=len(iterations),
        facts=[item for item in summary.items() if isinstance(item[1], str)],
        tiles=[item for item in summary.items() if not isinstance(item[1], str)],
        charts=charts,
        times=times,
        timeline=read_trace(folder / "trace.json"),
        samples=samples,
        others=others,
    )
    page = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", page)  # HTML cannot hold them
    path = folder / "report.html"
    durable.write(path, page.encode("utf-8", "replace"))  # sampled text may hold lone surrogates
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, seconds=_seconds, finite=_finite)
    return environment.get_template("report.jinja")


def _arrange(
    series: Mapping[str, Points], iterations: Sequence[float]
) -> tuple[list[LineChart], StageTimes | None, list[LineChart]]:
    """The charts, the stages' seconds, and charts of everything else."""
    left = dict(series)
    charts = []
    for name, scale, keys in CHARTS:
        if group := {key: left.pop(key) for key in keys if key in left}:
            charts.append(LineChart(name, group, iterations, scale == "log"))
    charts += [LineChart(key, {key: left.pop(key)}, iterations) for key in list(left) if key.startswith("eval/")]
    # "time/rollout/decode" is part of "time/rollout", which is the one to stack.
    stages = {
        key.removeprefix("time/"): left.pop(key)
        for key in list(left)
        if key.startswith("time/")
        and key not in TIME_TOTALS
        and not any(key.startswith(f"{other}/") for other in series)
    }
    others = [LineChart(key, {key: left[key]}, iterations) for key in sorted(left)]
    return charts, StageTimes(stages) if stages else None, others


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
        return "–" if value is None else str(value)
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
