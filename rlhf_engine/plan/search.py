"""Other settings of an experiment: the fastest of a world or a mesh, and the smallest change that makes a run fit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..algorithms import ALGORITHMS
from ..config import ROLES, SAMPLING, ConfigError, MeshConfig, ModelConfig, RunConfig, check, resolve_mesh
from ..config.devices import GPUS, Device
from .forecast import Forecaster, PhaseForecast, forecast, training_phases

_SHOWN = 5
_MOST_RANKS = 4096
_ROLES_THAT_LEAVE = (["reference"], ["teacher"], ["reward"], ["reference", "reward"], ROLES)
_ROWS = (1, 2, 4, 8, 16, 32)  # of a micro-batch
_CACHE_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
Changes = dict[str, Any]  # dotted key to value


@dataclass(frozen=True)
class Choice:
    """Settings that fit: seconds of one iteration of every phase, bytes of the fullest rank, and what is changed."""

    seconds: float
    peak: float
    changes: Changes

    @property
    def overrides(self) -> str:
        """The changes as a command line has them."""
        return overrides(self.changes)


def overrides(changes: Changes) -> str:
    """Changes as a command line has them."""
    return " ".join(f"{key}={_text(value)}" for key, value in changes.items())


def mesh_text(mesh: MeshConfig) -> str:
    """A mesh as a line names it."""
    experts = f" (ep {mesh.ep})" if mesh.ep > 1 else ""
    chunks = f" ({mesh.virtual_pp} chunks a stage)" if mesh.virtual_pp > 1 else ""
    return f"tp {mesh.tp} x pp {mesh.pp}{chunks} x dp {mesh.dp}{experts}" + (
        ", sequence parallel" if mesh.sequence_parallel else ""
    )


# -- the fastest settings ------------------------------------------------------------------------------------


def search(
    config: RunConfig, world: int, models: Mapping[str, ModelConfig], device: Device,
    factors: Mapping[str, float] | None = None, most: int = _SHOWN,
) -> list[Choice]:  # fmt: skip
    """The meshes of a world that fit, the fastest first, each with its fastest settings."""
    options: list[Option] = []
    for changes in meshes(config, world, models["policy"], device):
        there = changed(config, changes)
        if (mesh := _mesh(there, world, models)) is not None:
            on = OnMesh(there, mesh, models, device, factors, changes | {"mesh.dp": mesh.dp})
            options += on.options(_passes(there, mesh))
    return fastest(options, most)


def residency(
    config: RunConfig, mesh: MeshConfig, models: Mapping[str, ModelConfig], device: Device,
    factors: Mapping[str, float] | None = None,
) -> Changes:  # fmt: skip
    """What `schedule.residency=auto` is: which roles leave between their stages, and how much of the free memory the
    cache takes, for a run to be fastest; where nothing fits, every role leaves. Nothing where it is not asked for."""
    if config.schedule.residency != "auto":
        return {}
    passes = [{phase: [Changes()] for phase in training_phases(config)}]
    found = fastest(OnMesh(config, mesh, models, device, factors).options(passes), 1)
    return found[0].changes if found else _leave(_roles(config))


def meshes(config: RunConfig, world: int, model: ModelConfig, device: Device) -> Iterator[Changes]:
    """Every tp within a node and pp; what is left is dp. Where a stage is to have several chunks, one as well."""
    for tp in (t for t in range(1, min(world, device.node) + 1) if world % t == 0):
        for pp in (p for p in range(1, min(world // tp, model.num_layers) + 1) if world // tp % p == 0):
            mesh = {"mesh.tp": tp, "mesh.pp": pp, "mesh.dp": None, "mesh.sequence_parallel": tp > 1}
            if config.mesh.virtual_pp > 1:
                yield mesh | {"mesh.virtual_pp": 1}
            yield mesh


def _mesh(config: RunConfig, world: int, models: Mapping[str, ModelConfig]) -> MeshConfig | None:
    """Resolved; None where the run is refused."""
    try:
        mesh = resolve_mesh(config.mesh, world)
        check(config, mesh, *(m for name, m in models.items() if name != "user"), user=models.get("user"))
    except ConfigError:
        return None
    return mesh


def _passes(config: RunConfig, mesh: MeshConfig) -> list[Mapping[str, list[Changes]]]:
    """What is recomputed, and for each phase the micro-batches; those of the configuration first."""
    assert mesh.dp is not None
    found: list[Mapping[str, list[Changes]]] = []
    for recompute in dict.fromkeys((config.schedule.recompute, "none", "full")):
        sizes = {
            phase: dict.fromkeys(min(rows, share) for rows in (getattr(config, phase).micro_batch_size, *_ROWS))
            for phase, share in _shares(config, mesh.dp).items()
        }
        found.append({
            phase: [{"schedule.recompute": recompute, f"{phase}.micro_batch_size": rows} for rows in each]
            for phase, each in sizes.items()
        })  # fmt: skip
    return found


def _placements(config: RunConfig) -> Iterator[list[Changes]]:
    """Which roles leave, the fewest first; for each of that the shares of the cache, the configuration's first."""
    roles = _roles(config)
    shares = dict.fromkeys((config.rollout.cache_share, *_CACHE_SHARES))
    for count in range(len(roles) + 1):
        for leaving in map(_leave, itertools.combinations(roles, count)):
            yield [leaving | {"rollout.cache_share": share} for share in shares] if config.sampling else [leaving]


def _roles(config: RunConfig) -> list[str]:
    """Of all training phases."""
    here = {role for phase in training_phases(config) for role in ALGORITHMS[phase](config).roles()}
    return [role for role in ROLES if role in here]


def _leave(roles: Sequence[str]) -> Changes:
    keeps: Changes = {"schedule.residency": "keep"}
    return {"schedule.residency": "offload", "schedule.offload": list(roles)} if roles else keeps


@dataclass(frozen=True)
class OnMesh:
    """An experiment on one mesh, whose other settings are to be chosen.

    Args:
        mesh: resolved.
        changes: those that make the mesh.
    """

    config: RunConfig
    mesh: MeshConfig
    models: Mapping[str, ModelConfig]
    device: Device
    factors: Mapping[str, float] | None = None
    changes: Changes = field(default_factory=dict)

    def options(self, passes: Sequence[Mapping[str, Sequence[Changes]]]) -> list[Option]:
        """What there is to choose from, where rollouts fit.

        Args:
            passes: of each phase the settings to choose from, which are its own; several times, if phases share others.
        """
        placements = list(_placements(self.config))
        if self._place(placements[-1]) is None:  # nor do they where less has left
            return []
        places = [place for shares in placements if (place := self._place(shares))]
        return [Option(self, *place, least) for least in map(self._least, passes) for place in places]

    def plan(self, phase: str, changes: Changes) -> Forecaster:
        """Of a phase with these settings."""
        return Forecaster(phase, changed(self.config, changes), self.mesh, self.models, self.device, self.factors)

    def _place(self, shares: Sequence[Changes]) -> tuple[Changes, dict[str, float]] | None:
        """The fastest of these, if rollouts fit, and seconds of each phase's rollouts and moves."""
        found = []
        for changes in shares:
            plans = {phase: self.plan(phase, changes) for phase in training_phases(self.config)}
            if all(plan.rollouts_fit for plan in plans.values()):
                found.append((changes, {phase: plan.seconds_apart() for phase, plan in plans.items()}))
        return min(found, key=lambda place: sum(place[1].values()), default=None)

    def _least(self, passes: Mapping[str, Sequence[Changes]]) -> dict[str, list[tuple[float, Changes]]]:
        """Seconds of each phase's passes at least, the fewest first."""
        return {
            phase: sorted(((self.plan(phase, c).least_seconds(), c) for c in settings), key=lambda entry: entry[0])
            for phase, settings in passes.items()
        }


@dataclass(frozen=True)
class Option:
    """Which roles leave, the cache's share, and passes to choose from.

    Args:
        apart: seconds of each phase's rollouts and moves.
        passes: of each phase, with the seconds that they take at least, the fewest first.
    """

    on: OnMesh
    changes: Changes
    apart: Mapping[str, float]
    passes: Mapping[str, Sequence[tuple[float, Changes]]]

    @property
    def least(self) -> float:
        """Seconds of one iteration of every phase at least."""
        return sum(self.apart.values()) + sum(settings[0][0] for settings in self.passes.values())

    def choice(self) -> Choice | None:
        """With the fastest passes that fit; None where none do."""
        found = [best for phase in self.passes if (best := self._of_phase(phase))]
        if len(found) < len(self.passes):
            return None
        passes = {key: value for _, each in found for key, value in each.items()}
        return _choice([plan for plan, _ in found], self.on.changes | passes | self.changes)

    def _of_phase(self, phase: str) -> tuple[PhaseForecast, Changes] | None:
        best: tuple[PhaseForecast, Changes] | None = None
        for least, passes in self.passes[phase]:
            if best is not None and least + self.apart[phase] >= best[0].seconds:
                break
            plan = self.on.plan(phase, passes | self.changes)
            if plan.fits:
                found = plan.run()
                if best is None or found.seconds < best[0].seconds:
                    best = found, passes
        return best


def fastest(options: Sequence[Option], most: int) -> list[Choice]:
    """The fastest meshes, each with its fastest settings that fit.

    Of all options is known what an iteration takes at least: its rollouts and moves, by which roles leave and by the
    cache, and the least that its passes can take. Whole forecasts are made in the order of these sums, until no option
    can be faster than what was found.
    """
    best: dict[int, Choice] = {}  # by mesh
    for option in sorted(options, key=lambda option: option.least):
        found = sorted(choice.seconds for choice in best.values())
        if len(found) >= most and option.least >= found[most - 1]:
            break
        before, choice = best.get(id(option.on)), None
        if before is None or option.least < before.seconds:
            choice = option.choice()
        if choice is not None and (before is None or choice.seconds < before.seconds):
            best[id(option.on)] = choice
    return sorted(best.values(), key=lambda choice: choice.seconds)[:most]


# -- changes -------------------------------------------------------------------------------------------------


def micro_batches(config: RunConfig, rows: int, dp: int) -> Changes:
    """Micro-batches of so many rows, or of all that a replica has of each phase's batch."""
    return {f"{phase}.micro_batch_size": min(rows, share) for phase, share in _shares(config, dp).items() if share}


def _shares(config: RunConfig, dp: int) -> dict[str, int]:
    """Rows that a replica has of an optimizer step of each phase."""
    sizes = {p: getattr(config, p).batch_size for p in training_phases(config) if p not in SAMPLING}
    sizes |= {phase: part.samples // part.num_minibatches for phase, part in config.sampling.items()}
    return {phase: size // dp for phase, size in sizes.items()}


def changed(config: RunConfig, changes: Changes) -> RunConfig:
    """A copy with other values at dotted keys, which shares the sections that nothing changes."""
    config = copy.copy(config)
    for section in {key.split(".")[0] for key in changes}:
        setattr(config, section, copy.copy(getattr(config, section)))
    change(config, changes)
    return config


def change(config: RunConfig, changes: Changes) -> None:
    """Other values at dotted keys."""
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)


def evaluate(
    config: RunConfig, world: int, changes: Changes, models: Mapping[str, ModelConfig], device: Device
) -> Choice | None:
    """The forecast of a changed run; None where it is refused or does not fit."""
    other = changed(config, changes)
    mesh = _mesh(other, world, models)
    if mesh is None:
        return None
    if not all(Forecaster(phase, other, mesh, models, device).fits for phase in training_phases(config)):
        return None
    return _choice(forecast(other, mesh, models, device), changes)


def _choice(phases: Sequence[PhaseForecast], changes: Changes) -> Choice:
    """Of all phases together."""
    return Choice(sum(phase.seconds for phase in phases), max(max(phase.peaks) for phase in phases), changes)


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
