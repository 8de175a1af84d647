"""Stages that learn nothing: what is known to be true of an iteration's responses, and their records on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rlhf_kernels import kl_estimate

from ..config import SamplingConfig
from ..context import Context
from ..schedule import Fields, Stage
from ..surviving import durable
from .replay import checksums
from .rollouts import SEQUENCE
from .turns import spoken

_OF_TOKENS = (
    *SEQUENCE, "finished", "failed", "older", "sampler_log_probs", "log_probs", "ref_log_probs", "values", "scores",
    "turn_rewards", "rewards", "advantages", "returns", "importance",
)  # fmt: skip


def stages(settings: SamplingConfig, before: Sequence[Stage]) -> list[Stage]:
    """Rows at the end of a table; what is written is what the rows before give."""
    given = {field for stage in before for field in stage.writes}
    reference = ("ref_log_probs",) if "ref_log_probs" in given else ()
    scores = ("scores",) if "scores" in given else ()
    turns = ("response_mask", "failed", "turn_rewards") if "turn_rewards" in given else ()
    recorded = ("prompts", "tokens", "lengths", *scores, "golds", "log_probs", *reference, *turns)
    arrays = (*(field for field in _OF_TOKENS if field in given), "row_fields")
    table = [Stage("gold", "local", gold, None, ("prompts", "tokens", "lengths"), ("golds",))]
    if settings.write_rollouts:
        table.append(Stage("write", "local", write, None, recorded))
    if settings.write_arrays:
        table.append(Stage("write_arrays", "local", write_arrays, None, arrays))
    return table


def gold(ctx: Context, _, x) -> Fields:
    """Where the true preference is known, how the responses fare by it. It is measured and never learned from."""
    if ctx.gold is None:
        return {"golds": None}
    rows = zip(x.prompts, x.tokens.tolist(), x.lengths.tolist(), strict=True)
    golds = [ctx.gold(ctx.tokenizer.decode(p), ctx.tokenizer.decode(row[len(p) : n])) for p, row, n in rows]
    ctx.metrics.mean("gold/mean", torch.tensor(golds))
    return {"golds": torch.tensor(golds)}


def write(ctx: Context, _, x) -> None:
    """The responses and what was found of them, OUTPUT_DIR/PHASE/rollouts/ITERATION.jsonl: an object for each.

    Keys: prompt, response, score and gold (null where there is none), kl (nats, of each response token, to the
    reference or the teacher; null without one); with an environment `turns` (`turns.spoken`; null where it has failed).
    """
    if not ctx.mesh.is_main:
        return
    kl = kl_estimate(x.log_probs, x.ref_log_probs).tolist() if hasattr(x, "ref_log_probs") else None
    golds = x.golds.tolist() if x.golds is not None else [None] * len(x.lengths)
    scores = x.scores.tolist() if hasattr(x, "scores") else [None] * len(x.lengths)
    lines = []
    for i, (prompt, n) in enumerate(zip(x.prompts, x.lengths.tolist(), strict=True)):
        row = {
            "prompt": ctx.tokenizer.decode(prompt),
            "response": ctx.tokenizer.decode(x.tokens[i, len(prompt) : n].tolist()),
            "score": scores[i],
            "gold": golds[i],
            "kl": kl[i][len(prompt) : n] if kl is not None else None,
        }
        if hasattr(x, "turn_rewards"):
            said = [field[i, len(prompt) : n].tolist() for field in (x.tokens, x.response_mask, x.turn_rewards)]
            row["turns"] = None if x.failed[i] else spoken(ctx.tokenizer.decode, *said)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    _keep(ctx, "jsonl", "".join(lines).encode())


def write_arrays(ctx: Context, _, x) -> None:
    """What an iteration's updates were computed from, OUTPUT_DIR/PHASE/rollouts/ITERATION.npz: an array for each field
    that the stage reads, under its name, padding zero; and `rows`, checksums of what else the rows have."""
    if not ctx.mesh.is_main:
        return
    arrays = {name: np.asarray(value) for name, value in vars(x).items() if name != "row_fields"}
    arrays["rows"] = checksums(x.row_fields)
    arrays["tokens"] = arrays["tokens"].astype(np.int32)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    _keep(ctx, "npz", file.getvalue())


def _keep(ctx: Context, suffix: str, content: bytes) -> None:
    """Writes a file of this iteration's rollouts, where that can be."""
    folder = Path(ctx.config.output_dir) / ctx.phase / "rollouts"
    with durable.spared(folder):
        durable.make_folder(folder)
        durable.write(folder / f"{ctx.state.iteration}.{suffix}", content)
