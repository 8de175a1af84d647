"""What a run is made of: its tokenizer, its data, and its roles with their weights in place."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..algorithms.algorithm import RoleSpec
from ..config import RunConfig
from ..context import Context, TrainState
from ..data.sources import gold_rule
from ..hf.files import HFFolder
from ..hf.index import is_checkpoint
from ..hf.weights import RandomWeights, Source, load_weights
from ..mesh import ParallelMesh
from ..models import checkpoint
from ..models.role import RoleModel
from ..observing.metrics import Metrics
from ..observing.trace import Trace
from ..rewards.scoring import Rewards
from ..surviving import durable
from .earlier import SUMMARY
from .preflight import Plan
from .rows import datasets_of, tokenizer_of


def build_context(plan: Plan, mesh: ParallelMesh) -> Context:
    """Tokenizer, data and model configuration of a run."""
    config = plan.config
    tokenizer = tokenizer_of(plan)
    for each in (tokenizer, plan.user_tokenizer):
        if each is not None and each.template.is_dated:
            each.date = config.tokenizer.date = mesh.from_main(config.tokenizer.date or str(datetime.date.today()))
    bases = {
        name: replace(base, model=replace(base.model, vocab_size=base.model.vocab_size or tokenizer.vocab_size))
        for name, base in plan.bases.items()
    }
    datasets = datasets_of(plan, tokenizer, is_checking=False)
    rewards = Rewards(config) if config.calls_functions else None
    gold, trace = gold_rule(plan.sources), Trace(mesh.device)
    ctx = Context(config, bases, mesh, tokenizer, datasets, gold, rewards, plan.user_tokenizer, trace=trace)
    ctx.build = functools.partial(build_role, ctx)
    return ctx


def begin(ctx: Context, phase: str, specs: Mapping[str, RoleSpec]) -> None:
    """A phase from its beginning: counters and figures at zero, and roles with their weights in place."""
    ctx.phase, ctx.state, ctx.metrics = phase, TrainState(), Metrics()
    ctx.roles = {name: build_role(ctx, name, spec) for name, spec in specs.items()}


def build_role(ctx: Context, name: str, spec: RoleSpec) -> RoleModel:
    """A role with its weights in place: from the first finished phase, else the base policy's."""
    config = ctx.config
    base = ctx.bases[spec.base]
    role = RoleModel(
        name,
        base.model,
        ctx.mesh,
        spec.head,
        _dtype(config, ctx.mesh),
        spec.optimizer,
        spec.total_steps,
        Path(config.output_dir) / "offloaded" if config.schedule.moves(name) else None,
        config.schedule.recompute,
        config.schedule.micro_batch_tokens,
        config.dtype == "fp8",
    )
    for phase, source in spec.weights:
        if found := last_checkpoint(ctx, phase):
            checkpoint.load_weights(found, source, role)
            break
    else:
        load_base(role, base.path, config.seed)
    role.start()
    return role


def base_policy(ctx: Context) -> RoleModel:
    """The policy of jobs that do not train."""
    with ctx.watch("the loading of the policy"):
        return build_role(ctx, "policy", RoleSpec("lm"))


def load_base(role: RoleModel, path: str | None, seed: int = 0) -> None:
    """Weights of an HF folder or of what tools/convert_hf made of one; random ones where there is no path."""
    if path and is_checkpoint(path):
        return checkpoint.load_weights(Path(path), checkpoint.IMPORTED, role)
    source: Source = HFFolder(path) if path else RandomWeights(role.model, seed)
    load_weights(role.chunks, role.model, role.head, role.mesh, source)


def _dtype(config: RunConfig, mesh: ParallelMesh) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "fp8" else getattr(torch, config.dtype)


# Ranks may see a shared folder at different times, so the main rank looks and tells the others.


def iterations_of_finished(ctx: Context, phase: str) -> int:
    """How many iterations a finished phase has behind it; -1 where it is not finished."""
    summary = Path(ctx.config.output_dir) / phase / SUMMARY
    found = durable.read(summary) if ctx.mesh.is_main else None
    return ctx.mesh.from_main((found or {}).get("iterations", -1))


def last_checkpoint(ctx: Context, phase: str) -> Path | None:
    """Of a finished phase, for all roles that start from it, the last or the best, read whole to be sure."""
    if phase not in ctx.finished and iterations_of_finished(ctx, phase) >= 0:
        with ctx.watch(f"the check of {phase}'s checkpoint"):
            ctx.finished[phase] = phase_checkpoints(ctx, phase).chosen()
    return ctx.finished.get(phase)


def phase_checkpoints(ctx: Context, phase: str) -> checkpoint.Checkpoints:
    """The checkpoints of a phase of this run."""
    folder = Path(ctx.config.output_dir) / phase / "checkpoints"
    return checkpoint.Checkpoints(folder, ctx.mesh, ctx.config.checkpoint)
