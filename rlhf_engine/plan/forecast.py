"""An experiment on a mesh, foretold: memory of each pipeline stage, FLOPs, traffic and seconds of each stage.

The stages, their groups and their roles are those of the algorithm's table and the schedule that would run it. Memory
is that of the longest rows that the configuration allows, to which the others are padded; FLOPs, and seconds of a
rollout, are those of the rows that are expected (`plan.prompt_tokens`, `plan.response_tokens`).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..algorithms import ALGORITHMS
from ..algorithms.algorithm import Algorithm, RoleSpec
from ..config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from ..config.devices import Device
from ..models.flops import BACKWARD, forward_flops
from ..models.partition import Parameters, rank_parameters
from ..models.pipeline import ahead, simulate
from ..models.residency import Presence
from ..schedule import Schedule, Stage, needs
from .costs import Costs
from .memory import (
    Memory,
    Numbers,
    at_a_step,
    decoded_at_once,
    generation_workspace,
    kv_bytes_per_token,
    kv_positions,
    resident,
    saved,
    second_head,
    stage_activations,
    workspace,
)
from .moves import moved
from .rows import Rows, rows_of


@dataclass(frozen=True)
class StageForecast:
    """Stages that run together.

    Args:
        flops: of the models, over all ranks.
        sent: bytes that a rank sends over each group ("tp", "ep", "pp", "dp"), where that is most.
        moved: bytes of roles that come for it and leave behind it, of a rank.
        idle: share of the pipeline's length that ranks have nothing to do.
        memory: of a rank of each pipeline stage, at its fullest.
    """

    name: str
    kind: str
    seconds: float
    flops: float
    sent: Mapping[str, float]
    idle: float
    memory: Sequence[Memory]
    moved: float = 0.0


@dataclass(frozen=True)
class RoleForecast:
    name: str
    parameters: int  # of the whole model
    held: Parameters  # on the fullest rank
    memory: Memory


@dataclass
class PhaseForecast:
    phase: str
    rows: Rows
    device: Device
    world: int
    roles: list[RoleForecast]
    save: StageForecast  # or a load, which needs no more; it is no part of an iteration
    copied: float  # bytes of host memory that a save fills on the rank that writes most
    stages: list[StageForecast] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of one iteration."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def moments(self) -> list[StageForecast]:
        """What needs memory."""
        return [*self.stages, self.save]

    @property
    def peaks(self) -> list[float]:
        """Bytes of a rank of each pipeline stage, at the fullest moment."""
        return [max(m.total for m in column) for column in zip(*(s.memory for s in self.moments), strict=True)]

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has the memory."""
        return max(self.peaks) <= self.device.memory


class Forecaster:
    """One phase of a run.

    Args:
        mesh: resolved.
        models: "policy" and "reward", their vocabulary known.
        factors: measured over planned seconds of stages, by kind; 1 where there is none.
    """

    def __init__(
        self, phase: str, config: RunConfig, mesh: MeshConfig, models: Mapping[str, ModelConfig], device: Device,
        factors: Mapping[str, float] | None = None,
    ):  # fmt: skip
        assert mesh.dp is not None
        self.phase, self.config, self.mesh, self.device, self.dp = phase, config, mesh, device, mesh.dp
        self.rows, self.factors = rows_of(phase, config), factors or {}
        self.algorithm: Algorithm = ALGORITHMS[phase](config)
        self.specs: dict[str, RoleSpec] = self.algorithm.roles()
        self.models = {name: models[spec.base] for name, spec in self.specs.items()}
        is_float32 = config.dtype == "float32" or not device.is_gpu
        self.numbers = Numbers(4 if is_float32 else 2, "cuda" if device.is_gpu else "cpu", config.dtype == "fp8")
        schedule = Schedule(self.algorithm.stages, self.algorithm.provided, self.specs)
        offloaded = [name for name in self.specs if config.schedule.moves(name)]
        self.groups = schedule.groups(config.schedule, mesh.pp, offloaded)
        self._whole = functools.cache(self._whole_of)

    def run(self) -> PhaseForecast:
        """The forecast of a phase."""
        roles = [self._role(name) for name in self.specs]
        world = self.mesh.tp * self.mesh.pp * self.dp
        copied = max(self._copied(p) for p in range(self.mesh.pp))
        found = PhaseForecast(self.phase, self.rows, self.device, world, roles, self._save(), copied)
        found.stages += [self._stage(group) for group in self.groups]
        return found

    # -- what is sooner known than the whole forecast ------------------------------------------------------

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has the memory."""
        moments = itertools.chain(map(self._memory, self.groups), [self._saving()])
        return all(memory.total <= self.device.memory for ranks in moments for memory in ranks)

    @property
    def rollouts_fit(self) -> bool:
        """The same of rollouts alone, which micro-batches and recomputation change nothing of."""
        rollouts = [group for group in self.groups if group[0].kind == "rollout"]
        return all(memory.total <= self.device.memory for group in rollouts for memory in self._memory(group))

    def seconds_apart(self) -> float:
        """Of rollouts and of roles that come and go."""
        rollouts = sum(self._rollout(group)[0] for group in self.groups if group[0].kind == "rollout")
        return rollouts + sum(self._moved) / self.device.host

    def least_seconds(self) -> float:
        """Of everything else at least, whatever runs together: no pipeline is shorter than its busiest rank's work."""
        found, stages, chunks = 0.0, range(self.mesh.pp), self.mesh.virtual_pp
        for kind in ("infer", "train"):
            names = [stage.role or "" for stage in self.algorithm.stages if stage.kind == kind]
            passes = [self._passes(name, kind) for name in names]
            if not passes:
                continue
            busy = [sum(count * (there[p] + back[p]) for there, back, count in passes) for p in stages]
            # until the first micro-batch has come to a stage, and until its last one is through the others
            there = [min(there[p] for there, _, _ in passes) / chunks for p in stages]
            back = [min(back[p] for _, back, _ in passes) / chunks for p in stages]
            after = [sum(back[:p]) if kind == "train" else sum(there[p + 1 :]) for p in stages]
            length = max(sum(there[:p]) + busy[p] + after[p] for p in stages)
            each = self._shared(length, self.mesh.tp * self.dp * sum(busy)) + self._updates(names, kind)
            found += each * (self.rows.steps if kind == "train" else 1)
        return found

    # -- memory --------------------------------------------------------------------------------------------

    def _held(self, name: str, stage: int) -> Parameters:
        return rank_parameters(self.models[name], self.specs[name].head, self.mesh, stage)

    def _role(self, name: str) -> RoleForecast:
        held = max((self._held(name, p) for p in range(self.mesh.pp)), key=lambda p: p.total)
        whole = rank_parameters(self.models[name], self.specs[name].head, MeshConfig(1, 1, 1), 0).total
        return RoleForecast(name, whole, held, resident(held, self.specs[name].optimizer, self.mesh, self.numbers))

    def _resident(self, stage: int, group: Sequence[Stage]) -> Memory:
        """What roles have on the device while this group is at work."""
        wanted = [needs(group)]
        if self.config.schedule.prefetch:
            following = self.groups[self.groups.index(list(group)) + 1 :] + self.groups
            wanted.append(needs(next(other for other in following if needs(other))))
        return self._present(stage, {n: max(each.get(n, Presence.AWAY) for each in wanted) for n in self.specs})

    def _present(self, stage: int, wanted: Mapping[str, Presence]) -> Memory:
        """What a rank has where so much of each role that comes and goes is on the device."""
        memory = Memory(process=self.device.base)
        if not self.device.is_gpu and self.config.checkpoint.async_save:
            memory += Memory(process=self._copied(stage))  # stays for the next save
        for name in self.specs:
            stays = Presence.AWAY if self.config.schedule.moves(name) else Presence.STATE
            presence = max(stays, wanted.get(name, Presence.AWAY))
            if presence > Presence.AWAY:
                memory += self._whole(name, stage, presence)
        return memory

    def _whole_of(self, name: str, stage: int, presence: Presence) -> Memory:
        """So much of a role on a rank of a pipeline stage."""
        optimizer = self.specs[name].optimizer if presence >= Presence.STATE else None
        whole = resident(self._held(name, stage), optimizer, self.mesh, self.numbers)
        return whole if presence is Presence.TRAINING else replace(whole, gradients=0.0)

    def _saving(self) -> list[Memory]:
        """Of a rank of each pipeline stage: a trained role at a time, beside what is there behind an iteration."""
        present = needs(self.groups[0])
        trained = [name for name, spec in self.specs.items() if spec.optimizer is not None]
        found = []
        for p in range(self.mesh.pp):
            each = [
                self._present(p, present | {n: max(present.get(n, Presence.AWAY), Presence.STATE)}) for n in trained
            ]
            most = max(each, key=lambda memory: memory.total)
            copies = not self.device.is_gpu and not self.config.checkpoint.async_save
            found.append(most + Memory(process=self._copied(p) if copies else 0.0))
        return found

    def _copied(self, stage: int) -> float:
        """Bytes of host memory that a save fills, on a rank of pipeline stage `stage`."""
        trained = {name: spec.optimizer for name, spec in self.specs.items() if spec.optimizer is not None}
        return sum(saved(self._held(name, stage), o, self.mesh, self.numbers) for name, o in trained.items())

    def _save(self) -> StageForecast:
        """What the loop waits for: roles that come, and the copies; the writing goes on beside it."""
        moved = max(self._copied(p) for p in range(self.mesh.pp))
        for name, spec in self.specs.items():
            if spec.optimizer is not None and self.config.schedule.moves(name):
                whole = resident(self._held(name, 0), spec.optimizer, self.mesh, self.numbers)
                moved += whole.weights + whole.optimizer
        return StageForecast("save or load", "save", moved / self.device.host, 0.0, {}, 0.0, self._saving(), moved)

    def _memory(self, group: Sequence[Stage]) -> list[Memory]:
        """Of a rank of each pipeline stage."""
        return [self._resident(p, group) + self._working(group, p) for p in range(self.mesh.pp)]

    def _working(self, group: Sequence[Stage], stage: int) -> Memory:
        """What comes and goes on a rank of pipeline stage `stage`."""
        kind, rows = group[0].kind, self.rows
        if kind == "local":
            return Memory()
        if kind == "rollout":
            return self._generating(group, stage)
        kept = most = step = 0.0
        for name, beside in ((s.role, s.beside) for s in group):
            assert name is not None
            shape = (self.models[name], self.specs[name].head, *rows.largest)
            if kind == "train":
                each = stage_activations(*shape, self.mesh, self.numbers, stage, self.config.schedule.recompute)
                chunks = self.mesh.virtual_pp
                count = ahead(self.mesh.pp, stage, len(group) * self._micro_batches(rows.minibatch), chunks)
                kept = max(kept, each * count / chunks)
                if (optimizer := self.specs[name].optimizer) is not None:
                    step = max(step, at_a_step(self._held(name, stage), optimizer, self.mesh, self.numbers))
            outputs = rows.largest[0] * rows.response
            within = workspace(
                *shape, outputs, self.mesh, self.numbers, stage, kind == "train", self.config.schedule.recompute
            )
            if beside is not None and stage == self.mesh.pp - 1:
                copies = self.config.schedule.moves(beside)
                within += second_head(self.models[beside], outputs, self.mesh, self.numbers, copies)
            most = max(most, within)
        within = self.numbers.holes * (kept + most)
        # a heap does not give back what it held before the step
        return Memory(activations=within + step if self.numbers.device == "cpu" else max(within, step))

    def _generating(self, group: Sequence[Stage], stage: int) -> Memory:
        """The folded copies of the policy and of who answers it, their caches, and a forward's or the sampler's
        tensors."""
        model = self.models[group[0].role or ""]
        per_replica, prompts = self._per_replica()
        copy, _, cache = self._cache(group, stage)
        slots = min(self.config.rollout.slots, per_replica)
        longest = self.rows.largest[1] - self.rows.response
        work = generation_workspace(model, slots, prompts, longest, self.mesh, self.numbers)
        return Memory(weights=copy, activations=self.numbers.holes * work, kv_cache=cache)

    def _cache(self, group: Sequence[Stage], stage: int) -> tuple[float, int, float]:
        """Bytes of the folded copies, positions of the policy's cache in what is left, and bytes of all caches."""
        roles = [self.models[name] for name in (group[0].role, group[0].beside) if name is not None]
        copy = 0.0
        if self.mesh.pp > 1 or self.mesh.ep > 1:
            whole = MeshConfig(self.mesh.tp, 1, 1)
            copy = sum(rank_parameters(model, "lm", whole, 0).total for model in roles) * self.numbers.itemsize
        left = max(0.0, self.device.memory - copy - self._resident(stage, group).total)
        share, rows = self.config.rollout.cache_share, self._per_replica()[0]
        sizes = [kv_bytes_per_token(model, self.mesh.tp, self.numbers.itemsize) for model in roles]
        positions = [
            kv_positions(self.config.rollout, rows, self.rows.largest[1], part * left / size)
            for size, part in zip(sizes, (share, (1 - share) / 2), strict=False)
        ]
        return copy, positions[0], sum(map(operator.mul, positions, sizes))

    # -- time ----------------------------------------------------------------------------------------------

    def _micro_batches(self, rows: int) -> int:
        """Of one replica."""
        return -(-rows // (self.dp * self.rows.usual[0]))

    def _per_replica(self) -> tuple[int, int]:
        """Rows that a replica has under way, and different prompts that are new among them."""
        replicas = self.dp * self.mesh.pp
        return -(-(self.rows.total + self.rows.carried) // replicas), -(-self.rows.distinct // replicas)

    def _stage(self, group: Sequence[Stage]) -> StageForecast:
        kind, name = group[0].kind, "+".join(stage.name for stage in group)
        memory = self._memory(group)
        if kind == "local":
            return StageForecast(name, kind, 0.0, 0.0, {}, 0.0, memory)
        if kind == "rollout":
            seconds, flops, sent, idle = self._rollout(group)
        else:
            seconds, flops, sent, idle = self._pipeline([stage.role or "" for stage in group], kind == "train")
        moved = self._moved[self.groups.index(list(group))]
        return StageForecast(name, kind, seconds + moved / self.device.host, flops, sent, idle, memory, moved)

    @functools.cached_property
    def _moved(self) -> list[float]:
        """Bytes that come for each group of stages and leave behind it, of the fullest rank."""
        found = [0.0] * len(self.groups)
        working = [i for i, group in enumerate(self.groups) if needs(group)]
        for name in filter(self.config.schedule.moves, self.specs):
            whole = self._role(name).memory
            sizes = {Presence.WEIGHTS: whole.weights, Presence.STATE: whole.optimizer}
            needed = [needs(self.groups[i]).get(name, Presence.AWAY) for i in working]
            for i, size in zip(working, moved(needed, sizes, self.config.schedule.prefetch), strict=True):
                found[i] += size
        return found

    def _costs(self, name: str, kind: str) -> Costs:
        device = self.device.slowed(self.factors.get(kind, 1.0))
        head, recompute = self.specs[name].head, self.config.schedule.recompute
        return Costs(self.models[name], head, self.mesh, device, self.numbers, recompute)

    def _shared(self, seconds: float, busy: float) -> float:
        """On a CPU ranks share the cores: `busy` seconds of work, over all ranks, take so long at least."""
        return seconds if self.device.is_gpu else max(seconds, busy / self.device.node)

    def _rollout(self, group: Sequence[Stage]) -> tuple[float, float, dict[str, float], float]:
        name = group[0].role or ""
        costs, model = self._costs(name, "rollout"), self.models[name]
        prompt, response = self.rows.expected
        rows, prompts = self._per_replica()
        positions = min(self._cache(group, p)[1] for p in range(self.mesh.pp))
        held = decoded_at_once(positions, rows, prompts, prompt, response)
        slots = min(rows, self.config.rollout.slots, held)
        rows = -(-self.rows.total // (self.dp * self.mesh.pp))  # of which there are responses in the end
        shape = rows, slots, prompts, prompt, response
        again = self.rows.carried / (self.dp * self.mesh.pp)  # in the middle of their responses, on average
        seconds = costs.generate(*shape) + again * costs.prefill(prompt + response // 2)
        seconds += sum(self._answers(stage.beside, rows, slots) for stage in group if stage.beside is not None)
        world = self.mesh.tp * self.mesh.pp * self.dp
        # prompts once each, then a token at a time
        flops = forward_flops(model, "lm", [prompt] * self.rows.distinct, self.rows.distinct)
        longer = forward_flops(model, "lm", [prompt + response], response) - forward_flops(model, "lm", [prompt], 0)
        flops += self.rows.total * longer + forward_flops(model, "lm", [prompt + response // 2] * self.rows.carried, 0)
        tokens = prompts * prompt + rows * response
        sent = {"tp": model.num_layers * costs.tp_bytes(tokens), "pp": costs.fold_bytes()}
        return self._shared(seconds, world * seconds) + costs.exchange(*shape), flops, sent, 0.0

    def _answers(self, name: str, rows: int, slots: int) -> float:
        """Seconds in which a model answers so many rows, at each turn that an expected row has room for."""
        (prompt, response), said = self.rows.expected, self.config.user.max_new_tokens
        count = min(self.config.env.max_turns - 1, response // (self.config.rollout.max_new_tokens + said))
        return count * self._costs(name, "rollout").generate(rows, slots, rows, prompt + response // 2, said)

    def _pipeline(self, names: Sequence[str], train: bool) -> tuple[float, float, dict[str, float], float]:
        """One pass of the roles' micro-batches, or for training all steps of the iteration."""
        rows, stages = self.rows, range(self.mesh.pp)
        tokens = rows.usual[0] * rows.usual[1]
        forward, backward, counted, flops = [], [], [], 0.0
        sent = {"tp": 0.0, "ep": 0.0, "pp": 0.0, "dp": 0.0}
        steps, kind = rows.steps if train else 1, "train" if train else "infer"
        for name in names:
            costs, model, head = self._costs(name, kind), self.models[name], self.specs[name].head
            onward, back, count = self._passes(name, kind)
            forward += [onward] * count
            backward += [back] * count
            passes = (1 + BACKWARD) if train else 1
            one = forward_flops(model, head, [sum(rows.expected)], rows.expected[1])
            flops += passes * one * self._rows(name, kind) * steps
            is_counted = train and self._is_balanced(name)
            both_ways = 2 + is_counted if train else 1
            counted += [onward] * (count * is_counted)
            layers = -(-model.num_layers // self.mesh.pp)
            sent["tp"] += steps * count * both_ways * layers * costs.tp_bytes(tokens)
            sent["ep"] += steps * count * both_ways * layers * costs.ep_bytes(tokens)
            sent["pp"] += steps * count * both_ways * self.mesh.virtual_pp * costs.pp_bytes(tokens)
        if self.mesh.virtual_pp > 1:  # fewer micro-batches than stages are filled up with empty ones
            forward, backward, counted = (
                [*times, *times[-1:] * (self.mesh.pp - len(times))] for times in (forward, backward, counted)
            )
        seconds, idle = simulate(forward, backward if train else None, costs.transfer(tokens), self.mesh.virtual_pp)
        busy = self.mesh.tp * self.dp * sum(map(sum, forward + backward))
        seconds = self._shared(seconds, busy) + self._updates(names, kind)
        if counted:
            busy = self.mesh.tp * self.dp * sum(map(sum, counted))
            seconds += self._shared(simulate(counted, None, costs.transfer(tokens), self.mesh.virtual_pp)[0], busy)
        for name, optimizer in self._optimizers(names, kind):
            sent["dp"] += steps * max(self._costs(name, kind).dp_bytes(p, optimizer) for p in stages)
        return seconds * steps, flops, sent, idle

    def _is_balanced(self, name: str) -> bool:
        """Whether a forward before each update counts what a role's experts are given (`models/balance.py`)."""
        return self.specs[name].head == "lm" and self.models[name].router_aux_loss_coef > 0

    def _rows(self, name: str, kind: str) -> int:
        """That pass through a role: in an optimizer step, or all of an iteration."""
        rows = self.rows
        return rows.total if kind == "infer" else rows.minibatch + (rows.other_text if name == "policy" else 0)

    def _passes(self, name: str, kind: str) -> tuple[list[float], list[float], int]:
        """Seconds of a role's forward and backward of a micro-batch, on each pipeline stage, and how many there are."""
        costs, stages = self._costs(name, kind), range(self.mesh.pp)
        shape = (*self.rows.usual, self.rows.usual[0] * self.rows.expected[1])
        forward = [costs.forward(p, *shape) for p in stages]
        backward = [costs.backward(p, *shape) if kind == "train" else 0.0 for p in stages]
        return forward, backward, self._micro_batches(self._rows(name, kind))

    def _optimizers(self, names: Sequence[str], kind: str) -> list[tuple[str, OptimizerConfig]]:
        optimizers = [(name, self.specs[name].optimizer) for name in dict.fromkeys(names) if kind == "train"]
        return [(name, optimizer) for name, optimizer in optimizers if optimizer is not None]

    def _updates(self, names: Sequence[str], kind: str) -> float:
        """Seconds of an optimizer step of each of these roles."""
        optimizers = self._optimizers(names, kind)
        step = sum(max(self._costs(n, kind).step(p, o) for p in range(self.mesh.pp)) for n, o in optimizers)
        return self._shared(step, self.mesh.tp * self.mesh.pp * self.dp * step)


def forecast(
    config: RunConfig, mesh: MeshConfig, models: Mapping[str, ModelConfig], device: Device,
    factors: Mapping[str, float] | None = None,
) -> list[PhaseForecast]:  # fmt: skip
    """Every training phase of a run; a job that reads a file and writes a file has none."""
    return [Forecaster(phase, config, mesh, models, device, factors).run() for phase in training_phases(config)]


def training_phases(config: RunConfig) -> list[str]:
    """The phases of a run that train."""
    return [phase for phase in config.phases if phase in ALGORITHMS]
