"""Held-out prompts answered several times: how many of the answers pass (`eval.*`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..context import Context
from ..data.dataset import Example
from .algorithm import Algorithm, Evaluation
from .samples import EVAL_ITERATION, respond, scores_of


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples passes, where c of n have: 1 - C(n - c, k) / C(n, k), which is unbiased (Chen et
    al. 2021, arXiv:2107.03374, eq. 1).

    Raises:
        ValueError: k or c is not between 0 and n.
    """
    if not (0 <= c <= n and 0 <= k <= n):
        raise ValueError(f"{k} of {n} samples of which {c} have passed")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(ctx: Context, algorithm: Algorithm, final: bool) -> Evaluation:
    """What an algorithm evaluates, and with `eval.samples` how often its policy's answers pass."""
    found = algorithm.evaluate(ctx, final)
    if ctx.config.eval.samples and "policy" in ctx.roles and ctx.roles["policy"].is_trained:
        found.figures |= passing(ctx)
    return found


def passing(ctx: Context) -> dict[str, float]:
    """pass@k and the mean score over `eval.samples` samples, as means over prompts: of all, and where there are several
    sources of each. The noise is the same at each evaluation."""
    asked, names = ctx.config.eval, []
    examples: list[Example] = []
    for name, some in sets(ctx):
        examples += some
        names += [name] * len(some)
    if not examples:  # text has no prompts
        return {}
    scores = answers_scores(ctx, examples)
    passed = (scores >= asked.passed_at).sum(1).tolist()
    figures = {}
    for name in ["", *(dict.fromkeys(names) if len(set(names)) > 1 else ())]:
        rows = [i for i, of in enumerate(names) if name in ("", of)]
        end = f"/{name}" if name else ""
        for k in asked.k:
            figures[f"eval/pass@{k}{end}"] = sum(pass_at_k(asked.samples, passed[i], k) for i in rows) / len(rows)
        figures[f"eval/avg@{asked.samples}{end}"] = float(scores[rows].double().mean())
    return figures


def sets(ctx: Context) -> Iterator[tuple[str, Sequence[Example]]]:
    """Held-out prompts of each source, under its short name: those of `eval.sources`, or else the phase's."""
    data = ctx.datasets.get("eval")
    parts = (data or ctx.datasets[ctx.phase]).parts
    short = Counter(Path(part.source.spec.name).stem for part in parts)
    for part in parts:
        name = Path(part.source.spec.name).stem
        rows = part.train if data else [example for example in part.held_out if example.prompt]
        yield name if short[name] == 1 else part.source.spec.name, rows[: ctx.config.eval.prompts]


def answers_scores(ctx: Context, examples: Sequence[Example]) -> torch.Tensor:
    """Of `eval.samples` responses to each prompt the scores, `(prompts, samples)`."""
    asked = ctx.config.eval
    own = {key: value for key in ("temperature", "top_p") if (value := getattr(asked, key)) is not None}
    repeated = [example for example in examples for _ in range(asked.samples)]
    config = replace(ctx.config.rollout, **own)
    x, _ = respond(ctx, ctx.roles["policy"], repeated, EVAL_ITERATION + 1, config, asked.samples)
    scores, _ = scores_of(ctx, x)
    assert scores is not None
    return scores.view(-1, asked.samples)
