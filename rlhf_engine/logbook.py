"""What a run writes and shows while it runs: metrics.jsonl, the sinks, a table at start, progress lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config import RunConfig
from .data.folders import look_into
from .data.sources import HH_MINI, NEEDS, parse_spec
from .sinks import Dialogues, Sinks

if TYPE_CHECKING:
    from .algorithms.context import Context
    from .preflight import Plan

# figures of a progress line, in order; those that an iteration lacks are left out
_SHOWN = {
    "policy/loss": "loss", "reward/loss": "loss", "reward/accuracy": "accuracy", "score/mean": "score",
    "gold/mean": "gold", "kl/mean": "kl", "rollout/response_length": "length", "eval/loss": "eval loss",
    "eval/accuracy": "eval accuracy", "throughput/generated_tokens_per_second": "tokens/s",
}  # fmt: skip
_SECONDS_BETWEEN_LINES = 5.0


class Logbook:
    """One phase's records. On ranks that are not the main one it does nothing.

    Args:
        resumed_at: iterations done before; later lines of an earlier attempt are cut from metrics.jsonl.
        is_within: the next one has begun.
    """

    def __init__(self, config: RunConfig, phase: str, total: int, resumed_at: int, is_main: bool, is_within: bool):
        self.folder, self.phase, self.total, self.is_main = Path(config.output_dir) / phase, phase, total, is_main
        self.started, self.resumed_at = time.monotonic(), resumed_at
        self.last_line = 0.0
        if not is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        kept = _lines_before(path, resumed_at) if resumed_at else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.file = path.open("a")
        self.sinks = Sinks(config.log, self.folder, asdict(config), resumed_at, bool(resumed_at or is_within))
        if resumed_at or is_within:
            place = f"{'within' if is_within else 'at'} iteration {resumed_at + is_within}"
            print(f"{phase}: resuming {place} of {total}", flush=True)

    def write(self, row: dict[str, float]) -> None:
        """One iteration's figures."""
        if not self.is_main:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        figures = {name: value for name, value in row.items() if name != "iteration"}
        self.sinks.write(int(row["iteration"]), figures)
        now, done = time.monotonic(), int(row["iteration"]) + 1
        if now - self.last_line >= _SECONDS_BETWEEN_LINES or done == self.total:
            self.last_line = now
            per_iteration = (now - self.started) / (done - self.resumed_at)
            left = per_iteration * (self.total - done)
            shown = "  ".join(f"{label} {row[name]:.4g}" for name, label in _SHOWN.items() if name in row)
            print(
                f"{self.phase} {done}/{self.total}  {shown}  {per_iteration:.2f} s/iteration"
                f"  {int(left) // 60}:{int(left) % 60:02d} left",
                flush=True,
            )

    def stop(self, done: int, is_saved: bool, is_within: bool = False) -> None:
        """The phase was asked to stop, after so many iterations or within the next one."""
        if not self.is_main:
            return
        self.file.close()
        self.sinks.close()
        saved = "and saved" if is_saved else "and could not save"
        place = f"{'within' if is_within else 'at'} iteration {done + is_within}"
        print(f"{self.phase}: stopped {place} of {self.total} {saved}: start the same again", flush=True)

    def finish(self, figures: dict[str, float], dialogues: Dialogues) -> None:
        """The held-out figures at the end of the phase, and what the model says there."""
        self.file.close()
        self.sinks.write(self.total, figures)
        self.sinks.show(dialogues)
        self.sinks.close()
        shown = "  ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in figures.items())
        print(f"{self.phase} done in {time.monotonic() - self.started:.0f} s: {shown}", flush=True)


def _lines_before(path: Path, iteration: int) -> list[str]:
    """Whole lines of metrics.jsonl of iterations before `iteration`."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.is_file() else ():
        try:
            if json.loads(line)["iteration"] < iteration:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # half a line, of a run that was killed
    return kept


def show_run(plan: Plan, ctx: Context) -> None:
    """The resolved mesh, model, data and batch hierarchy, as numbers."""
    config, mesh, model = plan.config, ctx.mesh, ctx.model
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    parallel = f"tp {mesh.tp} x pp {mesh.pp} x dp {mesh.dp} = {mesh.world_size} ranks on {plan.device}"
    table.add_row("mesh", parallel + (", sequence parallel" if mesh.config.sequence_parallel else ""))
    size = (
        f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads"
        f" / {model.num_key_value_heads} kv, vocabulary {model.vocab_size}, context {model.max_position_embeddings}"
    )
    table.add_row("model", size)
    table.add_row("policy", config.policy.path or "random weights")
    if config.reward.path is not None:
        table.add_row("reward", config.reward.path)
    table.add_row("template", escape(ctx.tokenizer.template.about))
    sft, reward, ppo, length = config.sft, config.reward, config.ppo, config.data.max_seq_len

    def split(rows: int, what: str, micro_batch_size: int, tokens: int) -> str:
        """How `rows` of an optimizer step reach the replicas, and the most tokens of one micro-batch."""
        most = config.schedule.micro_batch_tokens or micro_batch_size * tokens
        return (
            f"{rows} {what} a step = {mesh.dp} replicas x {rows // mesh.dp}, in micro-batches of at most {most} tokens"
        )

    if "sft" in config.phases:
        steps = split(sft.batch_size, "dialogues", sft.micro_batch_size, length)
        table.add_row("sft", f"{sft.iterations} iterations, {steps}")
    if "reward" in config.phases:
        steps = split(reward.batch_size, "pairs", reward.micro_batch_size, 2 * length)
        table.add_row("reward", f"{reward.iterations} iterations, {steps}")
    if "ppo" in config.phases:
        samples = ppo.prompts_per_iteration * ppo.samples_per_prompt
        table.add_row(
            "ppo",
            f"{ppo.iterations} iterations, {ppo.prompts_per_iteration} prompts x {ppo.samples_per_prompt} ="
            f" {samples} samples, generated by {mesh.num_replicas} replicas",
        )
        tokens = config.data.max_prompt_len + config.rollout.max_new_tokens
        steps = split(samples // ppo.num_minibatches, "samples", ppo.micro_batch_size, tokens)
        table.add_row("", f"{ppo.epochs} epochs x {ppo.num_minibatches} minibatches, {steps}")
    optimizers = {"sft": config.sft.optimizer, "reward": config.reward.optimizer, "ppo policy": config.ppo.optimizer}
    optimizers["ppo critic"] = config.ppo.critic_optimizer
    rates = {name: rate for name, rate in optimizers.items() if name.split()[0] in config.phases}
    table.add_row("rates", ", ".join(f"{name} {rate.lr:g} {rate.schedule}" for name, rate in rates.items()))
    data = config.data
    table.add_row(
        "lengths",
        f"dialogues of {data.max_seq_len} tokens, prompts of {data.max_prompt_len}, responses of"
        f" {config.rollout.max_new_tokens}, at most",
    )
    if plan.settled:
        table.add_row("chosen here", "  ".join(f"{key}={value}" for key, value in plan.settled.items()))
    table.add_row("output", config.output or config.output_dir)
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    if ctx.datasets:
        console.print(_mixture(plan, ctx))
    for line in _remarks(plan, ctx):
        print(line, flush=True)


def _mixture(plan: Plan, ctx: Context) -> Table:
    """A line for each source: rows read, rows that each phase uses with their share of its draws, rows left out."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for title in ("source", "rows", "held out", *ctx.datasets, "left out"):
        table.add_column(title, overflow="fold")
    for source in (*plan.sources, *plan.ptx_sources):
        spec, used, reasons = source.spec, [], []
        for phase, dataset in ctx.datasets.items():
            part = next((part for part in dataset.parts if part.source is source), None)
            used.append(f"{len(part.train)} ({part.share:.1%})" if part else "-")
            if part and part.left_out:
                reasons.append(f"{phase}: " + ", ".join(f"{n} {reason}" for reason, n in part.left_out.items()))
        presets = {"system": spec.system, "reward": spec.reward or "default"}
        name = spec.name + "".join(f" [{key}={preset}]" for key, preset in presets.items() if preset != "default")
        rows, held_out = len(source.train), len(source.held_out)
        of_all = f" ({held_out / (rows + held_out):.1%})" if held_out and spec.name not in HH_MINI else ""
        table.add_row(escape(name), str(rows), f"{held_out}{of_all}", *used, "; ".join(reasons) or "-")
    return table


def _remarks(plan: Plan, ctx: Context) -> Iterator[str]:
    """What was read of folders, and which source has nothing for a phase that draws from others."""
    for name in (*plan.config.data.sources, *plan.config.ppo.ptx.sources):
        if (path := Path(parse_spec(name).name)).is_dir():
            yield str(look_into(path))
    for phase, dataset in ctx.datasets.items():
        used = [part.source for part in dataset.parts]
        for source in plan.ptx_sources if phase == "ptx" else plan.sources:
            if not any(source is other for other in used):
                yield f"{source.spec.name}: no row has {NEEDS[phase]}: {phase} draws from the other sources alone"
