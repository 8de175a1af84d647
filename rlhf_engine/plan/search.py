"""Other meshes and settings of an experiment: the fastest of a world, and the smallest change that makes a run fit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..algorithms import ALGORITHMS
from ..config import ROLES, SAMPLING, ConfigError, MeshConfig, ModelConfig, RunConfig, check, resolve_mesh
from ..config.devices import GPUS, Device
from .forecast import Forecaster, forecast, training_phases

_SHOWN = 5
_MOST_RANKS = 4096
_ROLES_THAT_LEAVE = (["reference"], ["teacher"], ["reward"], ["reference", "reward"], ROLES)
Changes = dict[str, Any]  # dotted key to value


@dataclass(frozen=True)
class Choice:
    """Settings that fit: seconds of one iteration of every phase, bytes of the fullest rank, and the overrides."""

    seconds: float
    peak: float
    overrides: str


def mesh_text(mesh: MeshConfig) -> str:
    """A mesh as a line names it."""
    experts = f" (ep {mesh.ep})" if mesh.ep > 1 else ""
    chunks = f" ({mesh.virtual_pp} chunks a stage)" if mesh.virtual_pp > 1 else ""
    return f"tp {mesh.tp} x pp {mesh.pp}{chunks} x dp {mesh.dp}{experts}" + (
        ", sequence parallel" if mesh.sequence_parallel else ""
    )


def search(
    config: RunConfig, world: int, models: Mapping[str, ModelConfig], device: Device,
    factors: Mapping[str, float] | None = None, most: int = _SHOWN,
) -> list[Choice]:  # fmt: skip
    """The meshes of a world that fit, the fastest first, each with its best micro-batches and recompute."""
    found = []
    for mesh in meshes(world, models["policy"], device):
        dp = world // (mesh["mesh.tp"] * mesh["mesh.pp"])
        settings = [
            mesh | micro_batches(config, rows, dp) | {"schedule.recompute": recompute}
            for recompute, rows in itertools.product(("none", "full"), (1, 2, 4, 8, 16, 32))
        ]
        choices = [evaluate(config, world, changes, models, device, factors) for changes in settings]
        found += sorted((c for c in choices if c is not None), key=lambda choice: choice.seconds)[:1]
    return sorted(found, key=lambda choice: choice.seconds)[:most]


def meshes(world: int, model: ModelConfig, device: Device) -> Iterator[Changes]:
    """Every tp within a node and pp; what is left is dp."""
    for tp in (t for t in range(1, min(world, device.node) + 1) if world % t == 0):
        for pp in (p for p in range(1, min(world // tp, model.num_layers) + 1) if world // tp % p == 0):
            yield {"mesh.tp": tp, "mesh.pp": pp, "mesh.dp": None, "mesh.sequence_parallel": tp > 1}


def micro_batches(config: RunConfig, rows: int, dp: int) -> Changes:
    """Micro-batches of so many rows, or of all that a replica has of each phase's batch."""
    sizes = {p: getattr(config, p).batch_size for p in training_phases(config) if p not in SAMPLING}
    sizes |= {phase: part.samples // part.num_minibatches for phase, part in config.sampling.items()}
    shares = {phase: size // dp for phase, size in sizes.items()}
    return {f"{phase}.micro_batch_size": min(rows, share) for phase, share in shares.items() if share}


def changed(config: RunConfig, changes: Changes) -> RunConfig:
    """A copy with other values at dotted keys."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    return config


def evaluate(
    config: RunConfig, world: int, changes: Changes, models: Mapping[str, ModelConfig], device: Device,
    factors: Mapping[str, float] | None = None,
) -> Choice | None:  # fmt: skip
    """The forecast of a changed run; None where it is refused or does not fit."""
    other = changed(config, changes)
    try:
        mesh = resolve_mesh(other.mesh, world)
        check(other, mesh, *models.values())
    except ConfigError:
        return None
    if not all(Forecaster(phase, other, mesh, models, device).fits for phase in training_phases(config)):
        return None
    phases = forecast(other, mesh, models, device, factors)
    changes = changes | ({"mesh.dp": mesh.dp} if "mesh.tp" in changes else {})
    overrides = " ".join(f"{key}={_text(value)}" for key, value in changes.items())
    return Choice(sum(phase.seconds for phase in phases), max(max(phase.peaks) for phase in phases), overrides)


def residency(config: RunConfig, mesh: MeshConfig, models: Mapping[str, ModelConfig], device: Device) -> Changes:
    """The fewest roles that must leave between their stages for a run to fit; every one where that is not enough."""
    changes: Changes = {}
    here = {role for phase in training_phases(config) for role in ALGORITHMS[phase](config).roles()}
    for roles in ([], *_ROLES_THAT_LEAVE):
        leaving = [role for role in roles if role in here]
        changes = {"schedule.residency": "offload" if roles else "keep", "schedule.offload": leaving}
        other = changed(config, changes)
        if all(Forecaster(phase, other, mesh, models, device).fits for phase in training_phases(config)):
            break
    return changes


def remedy(config: RunConfig, mesh: MeshConfig, models: Mapping[str, ModelConfig], device: Device) -> str | None:
    """The fewest changed settings that make a run fit, the fastest of these; else another mesh, more ranks, or another
    device. None where nothing helps."""
    assert mesh.dp is not None
    world = mesh.tp * mesh.pp * mesh.dp
    single: list[Changes] = [{"schedule.recompute": "full"}, {"mesh.sequence_parallel": True}]
    single += [{"mesh.virtual_pp": 1}] if mesh.virtual_pp > 1 else []  # which holds fewer micro-batches
    single += [micro_batches(config, rows, mesh.dp) for rows in (16, 8, 4, 2, 1)]
    single += [{"rollout.slots": config.rollout.slots // n} for n in (2, 4, 8) if config.rollout.slots >= n]
    single += [{"schedule.residency": "offload", "schedule.offload": list(roles)} for roles in _ROLES_THAT_LEAVE]
    fixed = {f"mesh.{name}": getattr(mesh, name) for name in ("tp", "pp", "dp")}
    for count in (1, 2):
        joined = [dict(kv for part in parts for kv in part.items()) for parts in itertools.combinations(single, count)]
        choices = [evaluate(changed(config, fixed), world, changes, models, device) for changes in joined]
        if fitting := [choice for choice in choices if choice is not None]:
            return min(fitting, key=lambda choice: choice.seconds).overrides
    larger = [gpu for gpu in GPUS.values() if device.is_gpu and gpu.memory > device.memory]
    tries = [(world << n, device) for n in range(13) if world << n <= _MOST_RANKS] + [(world, gpu) for gpu in larger]
    for ranks, other in tries:
        if best := search(config, ranks, models, other, most=1):
            more = f" (plan.world={ranks})" if ranks > world else ""
            return best[0].overrides + (more if other is device else f" plan.device={other.name}")
    return None


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
