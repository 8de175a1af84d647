"""The same first iteration on every mesh that a world of ranks allows, and a run that was interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algorithms import ALGORITHMS
from ..config import ConfigError, MeshConfig, ModelConfig, check_model
from ..context import Context, TrainState
from ..launching.build import begin
from ..models import checkpoint
from ..schedule import Schedule
from .findings import Finding, worst
from .measure import Iteration, first_iteration
from .updates import NORM, distances

_OF_THE_MACHINE = ("time/", "throughput/", "idle/", "mfu/")


def layouts(world: int, own: MeshConfig, models: Sequence[ModelConfig]) -> Iterator[MeshConfig]:
    """Every mesh of the world that the models can be cut for, but the run's own, with as many expert parallel ranks and
    chunks of a stage as the run has, where they fit."""
    num_layers = min(model.num_layers for model in models)
    for tp in (n for n in range(1, world + 1) if world % n == 0):
        for pp in (n for n in range(1, world // tp + 1) if world // tp % n == 0):
            dp = world // tp // pp
            for is_parallel in (False, True) if tp > 1 else (False,):
                ep = own.ep if dp % own.ep == 0 else 1
                chunks = own.virtual_pp if 1 < pp <= num_layers // own.virtual_pp else 1
                mesh = MeshConfig(tp, pp, dp, ep, is_parallel, chunks)
                if mesh != own and all(_takes(mesh, model) for model in models):
                    yield mesh


def _takes(mesh: MeshConfig, model: ModelConfig) -> bool:
    try:
        check_model(mesh, model)
    except ConfigError:
        return False
    # megatron trains experts over tensor parallel ranks with sequence parallelism only
    return model.num_experts is None or mesh.tp == 1 or mesh.sequence_parallel


def same_iteration(ctx: Context, phase: str, wanted: Iteration, rollout: dict[str, Any] | None) -> Finding:
    """Losses and gradients of a phase on another mesh against those on the run's own."""
    found = first_iteration(ctx, phase, rollout)
    gaps = []
    for name, ours in found.gradients.items():
        gaps += distances(name, name, found.figures.get(f"{name}/loss", torch.nan), ours, wanted)
        if ctx.mesh.is_main and ours.norm:
            norm = abs(found.figures[f"{name}/grad_norm"] / ours.norm - 1)
            gaps.append(Finding(norm, NORM, f"{name}, norm of the whole"))
    return worst(gaps)


def resumed(ctx: Context, phase: str, folder: Path) -> Finding:
    """An iteration of roles that were saved and loaded, against the same iteration straight on."""
    straight = _Run(ctx, phase, folder)
    straight.iterate()
    straight.save()
    before = straight.weights()
    wanted = straight.iterate(), straight.weights()
    del straight
    ctx.roles = {}
    again = _Run(ctx, phase, folder)
    again.load()
    found = again.iterate(), again.weights()
    if ctx.mesh.is_main:
        shutil.rmtree(folder)
    off = sum((x - y).double().square().sum() for x, y in zip(found[1], wanted[1], strict=True))
    update = sum((x - y).double().square().sum() for x, y in zip(wanted[1], before, strict=True))
    differing = [name for name, value in wanted[0].items() if str(found[0].get(name)) != str(value)]  # nan as well
    detail = (
        f"{differing[0]} is {found[0].get(differing[0])}, not {wanted[0][differing[0]]}"
        if differing
        else "figures equal"
    )
    exact = ctx.mesh.device.type == "cpu"
    # a GPU's sums of gradients come in any order, and Adam's step is as large for a small gradient as for a large one
    share = float((off / update) ** 0.5) if off else 0.0  # of an update that may be nothing
    return Finding(share + (len(differing) if exact else 0), 0.0 if exact else 0.1, detail)


class _Run:
    """A phase of training that goes on as the trainer's does."""

    def __init__(self, ctx: Context, phase: str, folder: Path):
        self.ctx, self.algorithm = ctx, ALGORITHMS[phase](ctx.config)
        specs = self.algorithm.roles()
        self.schedule = Schedule(self.algorithm.stages, self.algorithm.provided, specs)
        begin(ctx, phase, specs)
        self.checkpoints = checkpoint.Checkpoints(folder, ctx.mesh, ctx.config.checkpoint)

    def iterate(self) -> dict[str, float]:
        self.schedule.run(self.ctx, self.algorithm.batch(self.ctx))
        self.ctx.state.iteration += 1
        figures, _ = self.ctx.metrics.reduce(self.ctx.mesh)
        return {name: value for name, value in figures.items() if not name.startswith(_OF_THE_MACHINE)}

    def save(self) -> None:
        self.checkpoints.save(self.ctx.state.iteration, self.ctx.roles, self.ctx.state.to_dict())
        if not self.checkpoints.finish():
            raise ConfigError(f"{self.checkpoints.folder}: a checkpoint cannot be saved there: make room")

    def load(self) -> None:
        found = self.checkpoints.newest()
        assert found is not None
        self.ctx.state = TrainState.from_dict(checkpoint.load(found, self.ctx.roles))

    def weights(self) -> list[Tensor]:
        found = []
        for role in self.ctx.roles.values():
            if role.is_trained:
                with role.on_device():
                    found += [parameter.detach().cpu().clone() for parameter in role.chunks.parameters()]
        return found
