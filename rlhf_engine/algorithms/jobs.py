"""Two jobs that train nothing: score text, and generate responses. Each reads a file and writes a file.

Rows are made in parts, whose rows do not depend on the mesh, so that neither do their figures where TP is the same.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..context import Context
from ..data.chat import Messages, clean
from ..data.files import read_rows
from ..data.formats import offered
from ..data.messages import asked_of, read_messages
from ..data.sources import parse_spec
from ..data.tools import Tools
from ..experience import pad_rows, spans
from ..models.role import RoleModel
from ..models.stream import infer
from ..models.work import Batch, Work
from ..rollout.generate import rollout
from ..rollout.progress import Progress
from ..rollout.sampling import sample_keys
from ..signals import RunError, before_leaving
from ..surviving.durable import reason
from ..surviving.parts import Parts
from .heads import choose, policy_log_probs
from .turns import talk

_NUM_PARTS = 8  # of a small input at least; what is under way when a job is stopped is made again
_LEAST_SCORED, _MOST_SCORED = 64, 512  # rows of a part
_LEAST_GENERATED = 16
_FILLINGS = 2  # of the slots, at most: one waits while the other is decoded
_GROUP = 8  # rows that are scored side by side
_SECONDS_BETWEEN_LINES = 5.0


def run(ctx: Context, made_with: dict[str, Any], policy: Callable[[], RoleModel]) -> None:
    """The job that `ctx.config` names, from where an earlier one was stopped.

    Args:
        made_with: the settings that its rows depend on; of the main rank alone.
        policy: loads the model.

    Raises:
        ConfigError: a row is too long.
        RunError: its output cannot be written.
    """
    job, path = ctx.config.phases[0], Path(ctx.config.output or "")
    parts = Parts(path, made_with, ctx.config.rerun) if ctx.mesh.is_main else None
    if ctx.mesh.from_main(parts is not None and parts.is_finished):
        if ctx.mesh.is_main:
            print(f"{job}: finished before, in {path} (rerun=true runs it again)", flush=True)
        return
    rows = [row for source in ctx.config.data.sources for _, row in read_rows(parse_spec(source).name)]
    BODIES[job](ctx, rows, policy, parts)


def _rendered(row: dict[str, Any], render: Callable[[Messages, Tools], list[int]]) -> list[int]:
    messages = read_messages(row["messages"], "", "messages")  # which the preflight has tried
    return render(messages, offered(row, messages, ""))


def score(ctx: Context, rows: list[dict], load: Callable[[], RoleModel], parts: Parts | None) -> None:
    """Log-prob of every token and the entropy where it was drawn; `tokens`, `log_probs`, `entropy` per row.

    Rows are `{"text": …}` or `{"messages": […]}`. The first token has neither (null). Rows longer than the
    model's context are refused by number.
    """

    def whole(messages: Messages, tools: Tools) -> list[int]:
        return ctx.tokenizer.render(messages, marks=False, tools=tools)[0]

    tokens = [ctx.tokenizer.encode(row["text"]) if "text" in row else _rendered(row, whole) for row in rows]
    _check_lengths(ctx, tokens, "tokens", ctx.model.max_position_embeddings)
    # rows of like length together: less padding, and the order of the file at the end
    order = sorted(range(len(rows)), key=lambda i: len(tokens[i]))
    output = _Output(ctx, parts, order, _part_size(len(rows), _LEAST_SCORED, _MOST_SCORED))
    policy = load()
    for _, part in output.left(1):
        output.write(_score(ctx, policy, [tokens[i] for i in part]))


def _score(ctx: Context, policy: RoleModel, rows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    def fn(hidden: Tensor, batch: Batch) -> Tensor:
        return torch.stack(policy_log_probs(policy, hidden, batch), 1)

    # Each group of rows is forwarded alone and as wide as its part, so that none is of another shape on another mesh.
    policy.micro_batch_tokens = 1
    padded, lengths = pad_rows(rows, ctx.mesh.tp)
    mask = spans(torch.ones_like(lengths), lengths, padded.shape[1])
    batch = {"tokens": padded, "mask": mask}
    prepare = functools.partial(choose, policy, mask="mask")
    (found,) = infer([Work(policy, batch, fn, micro_batch_size=1, together=_GROUP, prepare=prepare)])
    made = []
    for row, both in zip(rows, found, strict=True):
        log_probs, entropy = both[:, : len(row)].tolist()
        made.append({"tokens": row, "log_probs": [None, *log_probs[1:]], "entropy": [None, *entropy[1:]]})
    return made


def generate(ctx: Context, rows: list[dict], load: Callable[[], RoleModel], parts: Parts | None) -> None:
    """A response to every row, `{"prompt": …}` or `{"messages": […]}`: `prompt`, `response`, `tokens`, `log_probs`.

    With `env.fn` it is a trajectory (`Talked.records`). Each part is the work of one replica: sequences that are
    decoded side by side round each other's figures.
    """
    if ctx.config.env.fn is not None:
        return _talk(ctx, rows, load, parts)
    prompts = [
        ctx.tokenizer.encode(row["prompt"]) if "prompt" in row else _rendered(row, ctx.tokenizer.render_prompt)
        for row in rows
    ]
    _check_lengths(ctx, prompts, "prompt tokens", ctx.model.max_position_embeddings - 1)
    keys, config, tokenizer = sample_keys(ctx.config.seed, 0, torch.arange(len(rows))), ctx.config, ctx.tokenizer
    size = _part_size(len(rows), _LEAST_GENERATED, _FILLINGS * config.rollout.slots)
    output = _Output(ctx, parts, range(len(rows)), size)
    policy = load()
    for shares, part in output.left(ctx.mesh.num_replicas):
        found = rollout(
            policy,
            [prompts[i] for i in part],
            keys[part],
            config.rollout,
            tokenizer.end_ids,
            decode=tokenizer.decode,
            report=output.report,
            shares=shares,
        )
        output.write([
            {
                "prompt": clean(rows[i].get("prompt", tokenizer.decode(prompts[i]))),
                "response": tokenizer.decode(response.tokens),
                "tokens": response.tokens,
                "log_probs": response.log_probs,
            }
            for i, response in zip(part, found, strict=True)
        ])  # fmt: skip


def _talk(ctx: Context, rows: list[dict], load: Callable[[], RoleModel], parts: Parts | None) -> None:
    keys, config = sample_keys(ctx.config.seed, 0, torch.arange(len(rows))), ctx.config
    asked = [json.dumps({**asked_of(row), "seed": i}) for i, row in enumerate(rows)]
    output = _Output(ctx, parts, range(len(rows)), _part_size(len(rows), _LEAST_GENERATED, config.rollout.slots))
    policy = load()
    for shares, part in output.left(ctx.mesh.num_replicas):
        found = talk(ctx, policy, [asked[i] for i in part], keys[part], config.rollout, shares, output.report)
        output.write(found.records(ctx))


def _check_lengths(ctx: Context, rows: Sequence[Sequence[int]], what: str, limit: int) -> None:
    for i, row in enumerate(rows):
        if not 0 < len(row) <= limit:
            raise ConfigError(f"row {i + 1} has {len(row)} {what}; the model's context takes 1 to {limit}")


def _part_size(num_rows: int, least: int, most: int) -> int:
    return min(most, max(least, -(-num_rows // _NUM_PARTS)))


class _Output:
    """The parts that are left of a job's output, and how far it is.

    Args:
        parts: of the main rank, which writes; None elsewhere.
        order: in which the rows are made.
        size: rows of a part.
    """

    def __init__(self, ctx: Context, parts: Parts | None, order: Sequence[int], size: int):
        self.ctx, self.file, self.order = ctx, parts, order
        self.parts = [list(order[i : i + size]) for i in range(0, len(order), size)]
        self.job = ctx.config.phases[0]
        self.num_done = self.begun_with = 0  # rows
        self.started, self.said = time.monotonic(), 0.0
        with self._written():
            whole = parts.begin([len(part) for part in self.parts]) if parts is not None else 0
        self.whole = ctx.mesh.from_main(whole)  # parts
        self.num_done = self.begun_with = sum(map(len, self.parts[: self.whole]))
        if parts is not None:
            before_leaving(self._say_stopped)
            if self.num_done:
                print(f"{self.job}: going on behind {self.num_done} of {len(order)} rows", flush=True)

    def left(self, at_once: int) -> Iterator[tuple[list[list[int]], list[int]]]:
        """The rows of the next `at_once` parts, and for each part the places of its rows among them. What is made of
        them is to be handed to `write`."""
        while self.whole < len(self.parts):
            group = self.parts[self.whole : self.whole + at_once]
            rows = [row for part in group for row in part]
            places = iter(range(len(rows)))
            shares = [[next(places) for _ in part] for part in group]
            with self.ctx.watch(f"the rows from {self.num_done + 1} on"):
                yield shares + [[] for _ in range(at_once - len(group))], rows
            self.whole += len(group)
        if self.file is not None:
            with self._written():
                self.file.finish(self.order)
            print(f"wrote {len(self.order)} rows to {self.file.path}", flush=True)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.file is not None:
            with self._written():
                self.file.add(rows)
        self.num_done += len(rows)
        self._show(self.num_done)

    def report(self, progress: Progress) -> None:
        """Of the rows under way, as far as this rank knows."""
        if (done := self.num_done + progress.rows_done) < len(self.order):
            self._show(done)

    def _show(self, done: int) -> None:
        now, total = time.monotonic(), len(self.order)
        if self.file is None or (now - self.said < _SECONDS_BETWEEN_LINES and done < total) or done == self.begun_with:
            return
        self.said = now
        per_second = (done - self.begun_with) / (now - self.started)
        left = int((total - done) / per_second)
        print(f"{self.job} {done}/{total} rows  {per_second:.3g} rows/s  {left // 60}:{left % 60:02d} left", flush=True)

    def _say_stopped(self) -> None:
        line = f"{self.job}: stopped behind {self.num_done} of {len(self.order)} rows, saved: start the same again\n"
        os.write(1, line.encode())  # in the middle of whatever else is printed

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            saved = f"{self.num_done} of {len(self.order)} rows are saved"
            raise RunError(f"output={self.ctx.config.output}: {reason(error)}; {saved}, start the same again") from None


BODIES = {"score": score, "generate": generate}
