"""Two jobs that train nothing: score text, and generate responses. Each reads a file and writes a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .algorithms.context import Context
from .algorithms.heads import policy_log_probs
from .config import ConfigError
from .data.chat import Messages, clean
from .data.files import read_rows
from .data.messages import read_messages
from .data.sources import parse_spec
from .experience import pad_rows, spans
from .models.role import RoleModel
from .models.stream import Batch
from .rollout.generate import rollout
from .rollout.sampling import sample_keys

_ROWS_AT_ONCE = 512  # rows per replica between two looks at the file
_MICRO_BATCH = 8


def _rows(ctx: Context) -> list[dict[str, Any]]:
    return [row for source in ctx.config.data.sources for _, row in read_rows(parse_spec(source).name)]


def _messages(row: dict[str, Any]) -> Messages:
    return read_messages(row["messages"], "", "messages")  # which the preflight has tried


def score(ctx: Context, policy: RoleModel) -> None:
    """Log-prob of every token and the entropy where it was drawn; `tokens`, `log_probs`, `entropy` per row.

    Rows are `{"text": …}` or `{"messages": […]}`. The first token has neither (null). Rows longer than the
    model's context are refused by number.
    """
    rows = _rows(ctx)
    tokens = [
        ctx.tokenizer.encode(row["text"]) if "text" in row else ctx.tokenizer.render(_messages(row), marks=False)[0]
        for row in rows
    ]
    _check_lengths(ctx, tokens, "tokens", ctx.model.max_position_embeddings)

    def fn(hidden: Tensor, batch: Batch) -> Tensor:
        return torch.stack(policy_log_probs(policy, hidden, batch, batch["mask"]), 1)

    with _Output(ctx) as output:
        # rows of like length together: less padding, and the order of the file at the end
        order = sorted(range(len(rows)), key=lambda i: len(tokens[i]))
        for start in range(0, len(order), _ROWS_AT_ONCE):
            part = order[start : start + _ROWS_AT_ONCE]
            padded, lengths = pad_rows([tokens[i] for i in part], ctx.mesh.tp)
            mask = spans(torch.ones_like(lengths), lengths, padded.shape[1])
            with ctx.watch(f"the scoring of rows from {start + 1} on"):
                both = policy.infer({"tokens": padded, "lengths": lengths, "mask": mask}, fn, _MICRO_BATCH)
            for k, i in enumerate(part):
                log_probs, entropy = both[k, :, : len(tokens[i])].tolist()
                output.rows[i] = {
                    "tokens": tokens[i],
                    "log_probs": [None, *log_probs[1:]],
                    "entropy": [None, *entropy[1:]],
                }


def generate(ctx: Context, policy: RoleModel) -> None:
    """A response to every row, `{"prompt": …}` or `{"messages": […]}`: `prompt`, `response`, `tokens`, `log_probs`."""
    rows = _rows(ctx)
    prompts = [
        ctx.tokenizer.encode(row["prompt"]) if "prompt" in row else ctx.tokenizer.render_prompt(_messages(row))
        for row in rows
    ]
    _check_lengths(ctx, prompts, "prompt tokens", ctx.model.max_position_embeddings - 1)
    keys = sample_keys(ctx.config.seed, 0, torch.arange(len(rows)))
    step = _ROWS_AT_ONCE * ctx.mesh.num_replicas
    tokenizer = ctx.tokenizer
    with _Output(ctx) as output:
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            with ctx.watch(f"the responses from {start + 1} on"):
                found = rollout(
                    policy, prompts[part], keys[part], ctx.config.rollout, tokenizer.end_ids, decode=tokenizer.decode
                )
            for i, response in enumerate(found, start):
                output.rows[i] = {
                    "prompt": clean(rows[i].get("prompt", ctx.tokenizer.decode(prompts[i]))),
                    "response": ctx.tokenizer.decode(response.tokens),
                    "tokens": response.tokens,
                    "log_probs": response.log_probs,
                }


def _check_lengths(ctx: Context, rows: Sequence[Sequence[int]], what: str, limit: int) -> None:
    for i, row in enumerate(rows):
        if not 0 < len(row) <= limit:
            raise ConfigError(f"row {i + 1} has {len(row)} {what}; the model's context takes 1 to {limit}")


class _Output:
    """The output file, in the order of the input; it appears when the job is done, and not before."""

    def __init__(self, ctx: Context):
        self.path, self.is_main = Path(ctx.config.output or ""), ctx.mesh.is_main
        self.rows: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, kind, *unused) -> None:
        if kind is not None or not self.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for i in sorted(self.rows):
                file.write(json.dumps(self.rows[i], ensure_ascii=False) + "\n")
        os.replace(temporary, self.path)
        print(f"wrote {len(self.rows)} rows to {self.path}", flush=True)


BODIES = {"score": score, "generate": generate}
