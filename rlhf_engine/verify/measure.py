"""The first iteration of a phase on a few short rows, and its gradients in a form that knows no mesh."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..algorithms import ALGORITHMS
from ..algorithms.heads import policy_log_probs
from ..config import BUILDS_ON, SAMPLING, OptimizerConfig, RunConfig
from ..context import Context
from ..data.dataset import Dataset, Example
from ..experience import Experience
from ..hf.files import SCORE_BIAS
from ..hf.shares import whole_tensors
from ..hf.weights import Table, parameters
from ..launching.build import begin
from ..models.residency import Presence
from ..models.role import RoleModel
from ..models.stream import infer
from ..models.work import Work
from ..schedule import Schedule, Stage
from .findings import Finding, bound, rms, worst
from .rounding import moved

MICRO_BATCH = 2
_MOST_NEW_TOKENS = 16
_ENTRIES = 1 << 16  # of each tensor's gradient that are kept to be compared
_NO_CLIPPING = 1e30
_ROWS_TO_CHOOSE_FROM = 1000  # of each source


def small(config: RunConfig, world: int) -> RunConfig:
    """The experiment with batches of a few rows, which any mesh of the world divides, and one step an iteration. In
    bfloat16 where products are to be in 8 bits: what those round is more than what mistakes are told from."""
    config = copy.deepcopy(config)
    config.dtype = "bfloat16" if config.dtype == "fp8" else config.dtype
    rows = 2 * world * math.ceil(4 / world)
    sampling = config.rollout
    for offline in (getattr(config, phase) for phase in BUILDS_ON.keys() - SAMPLING):
        offline.batch_size, offline.micro_batch_size = rows, MICRO_BATCH
    config.dpo.reference = config.kto.reference = "each_step"  # of every mesh its own
    for section in config.sampling.values():
        section.shrink(rows, MICRO_BATCH)
    config.schedule.micro_batch_tokens = None
    sampling.max_new_tokens = min(sampling.max_new_tokens, _MOST_NEW_TOKENS)
    sampling.tail = "finish"  # a first iteration, which has nothing that was carried, learns from all that it draws
    sampling.min_new_tokens = min(sampling.min_new_tokens, sampling.max_new_tokens)
    return config


def frozen(config: OptimizerConfig) -> OptimizerConfig:
    """The optimizer whose steps change neither weights nor gradients."""
    return replace(config, lr=0.0, min_lr=0.0, clip_grad=_NO_CLIPPING)


def few(dataset: Dataset, rows: int) -> Dataset:
    """So many rows of each source, evenly among the shorter half."""

    def length(example: Example) -> int:
        return len(example.before) + max(len(answer or ()) for answer in (example.chosen, example.rejected))

    parts = []
    for part in dataset.parts:
        by_length = sorted(part.train[:_ROWS_TO_CHOOSE_FROM], key=length)
        half = by_length[: max(rows, len(by_length) // 2)]
        parts.append(replace(part, train=half[:: max(1, len(half) // rows)][:rows]))
    return Dataset(parts, dataset.seed, dataset.strategy)


@dataclass
class Gradient:
    """Of a role: each HF tensor's norm, and entries of it. Empty on ranks that are not the main one."""

    norms: dict[str, float] = field(default_factory=dict)
    entries: dict[str, Tensor] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Of all tensors together."""
        return math.hypot(*self.norms.values())

    def finding(self, other: Gradient, rounding: Rounding, what: str) -> Finding:
        """How far another one of the same step is, in the tensor where it is furthest for what rounding does there.

        Distances are shares of a tensor's norm, or of a thousandth of the whole gradient's where it is next to nothing:
        what there is of it then is rounding. One token may bring most of the rounding of a tensor, which is by chance
        small in a sample; so what all tensors have had on average is allowed to each besides its own.
        """
        whole = math.hypot(*(float(entries.norm()) for entries in self.entries.values()))
        sizes = {name: float(entries.norm()) + 1e-3 * whole + 1e-30 for name, entries in self.entries.items()}
        samples = [self._gaps(sample, sizes) for sample in rounding.gradients]
        own = {name: _mean_square(sample[name] for sample in samples) for name in sizes}
        of_all = _mean_square(own.values())
        return worst(
            [Finding(0.0, 0.0)]  # of ranks that have no entries
            + [
                Finding(gap, bound(math.hypot(own[name], of_all), whole / sizes[name]), f"{what}, {name}")
                for name, gap in self._gaps(other, sizes).items()
            ]
        )

    def _gaps(self, other: Gradient, sizes: Mapping[str, float]) -> dict[str, float]:
        return {
            name: float((other.entries[name] - entries).norm()) / sizes[name] for name, entries in self.entries.items()
        }


def _mean_square(values: Iterable[float]) -> float:
    found = [value * value for value in values]
    return math.sqrt(sum(found) / max(1, len(found)))


@dataclass(frozen=True)
class Rounding:
    """What the last bits of a role's weights change in its step.

    Attributes:
        without_step: the loss of the rows.
        size: mean size of what rows add to it.
        loss: mean size of what these change by.
        gradients: of weights that are off in several ways.
    """

    without_step: float
    size: float
    loss: float
    gradients: Sequence[Gradient]


def gather_gradient(role: RoleModel) -> None:
    """Behind a step: makes the gradient whole on every replica, where the optimizer left each a shard."""
    for module in role.modules:
        if not module.ddp_config.use_distributed_optimizer:
            continue
        for buffer in module.buffers + module.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                mine = bucket.grad_data.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def gradient(role: RoleModel, phase: str) -> Gradient:
    """Of the step that was just made."""
    gather_gradient(role)
    found = Gradient()
    mine = {name: parameter.main_grad for name, parameter in parameters(role.chunks)}  # type: ignore[attr-defined]
    for name, tensor in whole_tensors(mine, Table(role.model, role.head), role.mesh):
        if (phase, name) == ("reward", SCORE_BIAS):  # it makes no difference between two answers: 0, up to rounding
            continue
        flat = tensor.float().flatten()
        found.norms[name] = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
        # a copy, or all of the tensor would stay in memory with them
        found.entries[name] = flat[:: math.ceil(len(flat) / _ENTRIES)].clone().cpu()
    return found


@dataclass
class Iteration:
    """The first iteration of a phase, its weights as they were.

    Attributes:
        works: of each trained role's step, its own first.
        gradients: of each trained role.
        rounding: of each trained role, once it is measured.
    """

    ctx: Context
    phase: str
    examples: list[Example] = field(default_factory=list)
    experience: Experience = field(default_factory=Experience)
    figures: dict[str, float] = field(default_factory=dict)
    works: dict[str, list[Work]] = field(default_factory=dict)
    gradients: dict[str, Gradient] = field(default_factory=dict)
    rounding: dict[str, Rounding] = field(default_factory=dict)

    def of_responses(self, role: str) -> Work:
        """The work of a role with the responses of a rollout, all of them in their order."""
        work = self.works[role][0]
        batch = {name: getattr(self.experience, name) for name in work.batch if name != "samples"}
        return replace(work, batch=batch)

    @contextlib.contextmanager
    def moved(self, role: str) -> Iterator[Work]:
        """The same, of weights that are off by their last bits."""
        work = self.of_responses(role)
        with work.role.on_device(), moved(work.role):
            yield work

    @functools.cached_property
    def log_prob_bound(self) -> float:
        """What rounding may do to the policy's log-prob of a response token, nats."""
        x, sampling = self.experience, self.ctx.config.rollout
        assert x.log_probs is not None and x.response_mask is not None

        def fn(hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
            return policy_log_probs(self.works["policy"][0].role, hidden, batch, sampling.temperature)[0]

        with self.moved("policy") as work:
            again = infer([replace(work, fn=fn)])[0]
        return bound(rms((again - x.log_probs)[x.response_mask]), rms(again[x.response_mask]))


def first_iteration(ctx: Context, phase: str, rollout: Mapping[str, Any] | None = None) -> Iteration:
    """Builds a phase's roles, runs its stage table once, and keeps what it comes to.

    Args:
        rollout: fields of an Experience that an earlier iteration has generated; None to generate.
    """
    algorithm = ALGORITHMS[phase](ctx.config)
    specs = algorithm.roles()
    specs = {n: replace(s, optimizer=frozen(s.optimizer)) if s.optimizer else s for n, s in specs.items()}
    begin(ctx, phase, specs)
    for role in ctx.roles.values():
        wake_head(role)
    found = Iteration(ctx, phase)

    def watched(stage: Stage) -> Stage:
        def body(ctx: Context, role: RoleModel, x):
            works: Any = stage.body(ctx, role, x)
            steps = [step if isinstance(step, list) else [step] for step in works]
            found.works[role.name] = steps[0]
            yield from steps
            found.gradients[role.name] = gradient(role, phase)

        return replace(stage, body=body) if stage.kind == "train" else stage

    stages = [watched(stage) for stage in algorithm.stages if rollout is None or stage.kind != "rollout"]
    for i, stage in enumerate(stages):
        if "scores" in stage.writes:
            stages.insert(i + 1, Stage("noise", "local", noise, None, ("scores",), ("scores",)))
            break
    schedule = Schedule(stages, {*algorithm.provided, *(rollout or ())}, specs)
    found.examples = ctx.datasets[phase].batch(0, ctx.config.sft.batch_size)
    found.experience = algorithm.batch(ctx)
    for name, value in (rollout or {}).items():
        setattr(found.experience, name, value)
    schedule.run(ctx, found.experience)
    found.figures, _ = ctx.metrics.reduce(ctx.mesh)
    return found


def noise(ctx: Context, _, x) -> dict[str, Tensor]:
    """Scores that differ, without which nothing would be learned from groups: a verifier's may be all alike."""
    return {"scores": x.scores + torch.randn(x.scores.shape, generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def wake_head(role: RoleModel) -> None:
    """Gives a scalar head of zeros some weights, without which nothing below it would have a gradient."""
    if role.head != "scalar" or (role.is_offloaded and not role.is_trained):  # which has left its weights already
        return
    with role.on_device(Presence.TRAINING if role.is_trained else Presence.WEIGHTS):
        if role.mesh.is_last_stage and not (weight := role.chunks[-1].output_layer.weight).any():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            weight.copy_(noise / weight.shape[1] ** 0.5)
        if role.is_trained:
            role.optimizer.reload_model_params()


def generated(x: Experience, multiple: int) -> dict[str, Any]:
    """What a rollout has written, in rows that are a multiple of so many positions long."""
    found = {}
    names = ["tokens", "lengths", "response_mask", "finished", "sampler_log_probs"]
    names += ["turn_rewards", "scores"] if x.turn_rewards is not None else []
    for name in [*names, *(name for name in vars(x) if name.startswith("greedy_"))]:
        if (value := getattr(x, name)) is not None:
            found[name] = F.pad(value, (0, -value.shape[1] % multiple)) if value.dim() == 2 else value
    return found


def rows_of(examples: Sequence[Example]) -> list[list[int]]:
    """Prompts with their answers, where there are some."""
    return [example.before + (example.chosen or []) for example in examples]
