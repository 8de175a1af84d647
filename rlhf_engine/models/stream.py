"""One pipeline over the micro-batches of several roles, without draining it between them.

Megatron's schedules run one model; here they run a stand-in that hands each micro-batch to the role that it belongs
to. P stages and M micro-batches leave (P - 1) / (M + P - 1) of the time idle, so four roles of M micro-batches idle
less in one stream of 4 M than one after the other: 16% for 43% at P = M = 4. Roles may differ in depth and width:
neighbouring stages tell each other the shapes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..metrics import Metrics
from ..trace import Trace
from .residency import Presence

if TYPE_CHECKING:
    from .role import RoleModel

Batch = Mapping[str, Tensor]  # field name to (rows, ...)
InferFn = Callable[[Tensor, Batch], Tensor]  # model output, micro-batch -> (rows, ...)
# model output, micro-batch -> sum of losses, count that the sum over the minibatch is divided by, statistics
LossFn = Callable[[Tensor, Batch], tuple[Tensor, Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Work:
    """What a role is to do with a batch: `fn` of its output for every row, or a step on the sum of `fn`'s losses.

    Args:
        batch: the rows of all replicas, with `tokens` `(B, T)` among its fields.
        micro_batch_size: rows of one forward on one replica.
    """

    role: RoleModel
    batch: Batch
    fn: InferFn | LossFn
    micro_batch_size: int


@torch.no_grad()
def infer(works: Sequence[Work], trace: Trace | None = None) -> list[Tensor]:
    """`fn` of the model's output for every row of each work: `(B, ...)` on every rank's CPU.

    Rows are split over the replicas and into micro-batches; missing ones are filled up with copies of the last row,
    whose results are dropped.
    """
    mesh = works[0].role.mesh
    filled = []
    for work in works:
        num_rows, unit = len(work.batch["tokens"]), mesh.dp * work.micro_batch_size
        index = torch.arange(-(-num_rows // unit) * unit).clamp_max(num_rows - 1)
        batch = {name: field[index] for name, field in work.batch.items()}
        filled.append(Work(work.role, batch, work.fn, work.micro_batch_size))
    with contextlib.ExitStack() as stack:
        for work in works:
            stack.enter_context(work.role.on_device())
        parts = _run(filled, trace or Trace(), forward_only=True)
    local = [torch.cat(part) if mesh.is_last_stage else None for part in parts]
    return [mesh.gather(part)[: len(work.batch["tokens"])] for part, work in zip(local, works, strict=True)]


def train_step(works: Sequence[Work], metrics: Metrics, trace: Trace) -> None:
    """One optimizer step of each work's role on its rows (a multiple of dp x micro_batch_size).

    The loss is the sum of `fn`'s losses over the whole batch divided by the sum of its counts, whatever the split into
    replicas and micro-batches. Statistics (sums over the same count) become `role/name` metrics.
    """
    with contextlib.ExitStack() as stack:
        for work in works:
            stack.enter_context(work.role.on_device(Presence.TRAINING))
            work.role.module.zero_grad_buffer()
            work.role.optimizer.zero_grad()
        _step(works, metrics, trace)


def _step(works: Sequence[Work], metrics: Metrics, trace: Trace) -> None:
    for work, results in zip(works, _run(works, trace, forward_only=False), strict=True):
        role, total = work.role, torch.zeros([], dtype=torch.int, device=work.role.mesh.device)
        for loss, count, statistics in results:
            total += count
            metrics.add(f"{role.name}/loss", loss, count)
            for key, value in statistics.items():
                metrics.add(f"{role.name}/{key}", value, count)
        # Reduces the gradients over the replicas and divides them by the total of all counts. Neither the schedule nor
        # DDP has divided them by anything, as `calculate_per_token_loss` asks.
        finalize_model_grads([role.module], total)
        learning_rate = role.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = role.optimizer.step()
        role.scheduler.step(1)
        metrics.record(f"{role.name}/grad_norm", grad_norm)
        metrics.record(f"{role.name}/learning_rate", learning_rate)


def _run(works: Sequence[Work], trace: Trace, forward_only: bool) -> list[list[Any]]:
    """What the last pipeline stage made of each micro-batch, by work; nothing on the other stages."""
    mesh = works[0].role.mesh
    counts, micro_batches = [], []
    for work in works:
        local = {name: mesh.take(rows).to(mesh.device) for name, rows in work.batch.items()}
        starts = range(0, len(local["tokens"]), work.micro_batch_size)
        counts.append(len(starts))
        for i in starts:
            rows = slice(i, i + work.micro_batch_size)
            micro_batches.append((work, {name: field[rows] for name, field in local.items()}))
    stream = _Stream([work.role for work in works], trace)
    neighbours: dict[str, Any] = {}
    if mesh.pp > 1:
        neighbours["p2p_communicator"] = _Neighbours(mesh.pp_group, stream.config, trace)
        neighbours["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups()
    with trace.stream(has_backward=not forward_only):
        results = get_forward_backward_func()(
            forward_step_func=lambda iterator, stream: stream.step(*next(iterator), forward_only),
            data_iterator=iter(micro_batches),
            model=[stream],
            num_microbatches=len(micro_batches),
            seq_length=works[0].batch["tokens"].shape[1],
            micro_batch_size=works[0].micro_batch_size,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            **neighbours,
        )
    found = iter(results)
    return [[next(found) for _ in range(count)] if mesh.is_last_stage else [] for count in counts]


class _Stream:
    """Stands where megatron's schedules expect a model."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, roles: Sequence[RoleModel], trace: Trace):
        self.trace = trace
        self.config = copy.copy(roles[0].gpt.config)
        # `train_step` finalises the gradients of each role by itself
        self.config.finalize_model_grads_func = self.config.grad_scale_func = None
        self.config.no_sync_func = lambda: _without_sync([role for role in roles if role.is_trained])
        self.config.variable_seq_lengths = len(roles) > 1
        self.input: Any = None

    def set_input_tensor(self, tensor) -> None:
        """What the stage before has sent."""
        self.input = tensor

    def step(self, work: Work, batch: Batch, forward_only: bool):
        """Megatron's forward step: the role's output for a micro-batch, and what the last stage makes of it."""
        tokens = batch["tokens"]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        work.role.gpt.set_input_tensor(self.input)
        with self.trace.span(work.role.name, "forward"):
            # right padding and a causal model: no real token sees padding, so there is no mask
            output = work.role.module(tokens, positions, None)

        def finish(output: Tensor, non_loss_data: bool = False):
            if forward_only:
                return work.fn(output, batch)
            loss, count, statistics = work.fn(output, batch)
            return loss, count.to(torch.int), (loss.detach(), count, statistics)

        return output, finish


class _Neighbours(P2PCommunicator):
    """Megatron's exchange with the stages before and behind, its time noted as waiting."""

    def __init__(self, group, config, trace: Trace):
        super().__init__(group, config)
        self.trace = trace

    def _communicate(self, **tensors):
        with self.trace.span("neighbours", "wait"):
            return super()._communicate(**tensors)


@contextlib.contextmanager
def _without_sync(roles: Sequence[RoleModel]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for role in roles:
            stack.enter_context(role.module.no_sync())
        yield
