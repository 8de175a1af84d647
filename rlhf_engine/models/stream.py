"""One pipeline over the micro-batches of several roles, without draining it between them.

Megatron's schedules run one model; here they run a stand-in that hands each micro-batch to the role that it belongs
to. P stages and M micro-batches leave (P - 1) / (M + P - 1) of the time idle, so four roles of M micro-batches idle
less in one stream of 4 M than one after the other: 16% for 43% at P = M = 4. With V chunks on each stage a micro-batch
counts V times (`mesh.virtual_pp`). Roles may differ in depth and width; every rank knows the shapes of all messages.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from ..experience import numbered
from ..hf.weights import parameters
from ..mesh import ParallelMesh
from ..observing.metrics import Metrics
from ..observing.trace import Trace
from .balance import Balance
from .flops import BACKWARD, forward_flops
from .optim import gradient_tensors
from .pipeline import chunk_group, forward_order
from .residency import Presence
from .role import RoleModel
from .work import Batch, InferFn, Work


@torch.no_grad()
def infer(works: Sequence[Work], trace: Trace | None = None) -> list[Tensor]:
    """`fn` of the model's output for every row of each work: `(B, ...)` on every rank's CPU.

    Rows are split over the replicas and into micro-batches; where the replicas do not divide them, they are filled up
    with copies of the last row, whose results are dropped.
    """
    mesh = works[0].role.mesh
    filled = []
    for work in works:
        num_rows = len(work.batch["tokens"])
        unit = mesh.dp * work.together
        index = torch.arange(-(-num_rows // unit) * unit).clamp_max(num_rows - 1)
        batch = {name: field[index] for name, field in work.batch.items()}
        filled.append(replace(work, batch=batch))
    with contextlib.ExitStack() as stack:
        for work in works:
            stack.enter_context(work.role.on_device())
        parts = _run(filled, trace or Trace(), forward_only=True)
    results = []
    for work, whole, part in zip(works, filled, parts, strict=True):
        length = whole.batch["tokens"].shape[1]
        wide = [
            F.pad(found, (0, length - width)) if found.dim() > 1 and found.shape[-1] == width else found
            for found, (_, width) in zip(part, whole.parts, strict=False)
        ]  # none on other stages than the last
        found = mesh.gather(torch.cat(wide) if mesh.is_last_stage else None)
        order = torch.cat([rows for rows, _ in whole.parts], 1).flatten()
        results.append(found[order.argsort()][: len(work.batch["tokens"])])
    return results


def forward(role: RoleModel, batch: Batch, fn: InferFn, micro_batch_size: int) -> Tensor:
    """`infer` of one role."""
    return infer([Work(role, batch, fn, micro_batch_size)])[0]


def train_step(works: Sequence[Work], metrics: Metrics, trace: Trace) -> dict[str, str | None]:
    """One optimizer step of each role on its works; rows are a multiple of dp.

    The loss is the sum of `fn`'s losses over the whole batch divided by the sum of its counts, whatever the split into
    replicas and micro-batches; of several works of one role, the sum of all their losses divided by that of all counts.
    Statistics (sums over the same count, or one of their own) become `role/name` metrics. Of several steps of an
    iteration these are means, and so is `role/grad_norm`, beside the largest, `role/grad_norm_max`;
    `role/learning_rate` is the last one's. Of experts there are besides how the tokens were shared out among them, and
    their load-balancing loss, which is not in `role/loss` but in the gradients (`balance.py`).

    Returns:
        For each role None, or what was not finite, its loss or a gradient, and where: then it is as it was before.
    """
    roles = list(dict.fromkeys(work.role for work in works))
    with contextlib.ExitStack() as stack:
        for role in roles:
            stack.enter_context(role.on_device(Presence.TRAINING))
            for module in role.modules:
                module.zero_grad_buffer()
            role.optimizer.zero_grad()
        return _step(works, roles, metrics, trace)


def _step(works: Sequence[Work], roles: Sequence[RoleModel], metrics: Metrics, trace: Trace) -> dict[str, str | None]:
    totals = [torch.zeros([], dtype=torch.int, device=role.mesh.device) for role in roles]
    for role in roles:
        if role.balance is not None and role.balance.coefficient:
            _settle_balance(role.balance, [work for work in works if work.role is role], trace)
    outcomes = _run(works, trace, forward_only=False)
    for work, results in zip(works, outcomes, strict=True):
        lengths = work.batch["lengths"]
        masks = [work.batch[key] for key in ("response_mask", "loss_mask") if key in work.batch]
        outputs = int(masks[0].sum()) if masks else len(lengths)
        trace.count((1 + BACKWARD) * forward_flops(work.role.model, work.role.head, lengths.tolist(), outputs))
        for _, count, _, _ in results:
            totals[roles.index(work.role)] += count
    for role, total in zip(roles, totals, strict=True):
        # Reduces the gradients over the replicas and divides them by the total of all counts. Neither the schedule nor
        # DDP has divided them by anything, as `calculate_per_token_loss` asks.
        finalize_model_grads(role.modules, total)
    problems = _problems(works, outcomes, roles)
    for work, results in zip(works, outcomes, strict=True):
        name = work.role.name
        for loss, count, statistics, _ in results if problems[name] is None else ():
            metrics.add(f"{name}/loss", loss, count)
            for key, value in statistics.items():
                metrics.add(f"{name}/{key}", *(value if isinstance(value, tuple) else (value, count)))
        padded = sum(rows.numel() * width for rows, width in work.parts)
        metrics.add(f"throughput/{name}_padding", padded - int(work.batch["lengths"].sum()), padded)
    for role in roles:
        learning_rate = role.optimizer.param_groups[0]["lr"]
        if problems[role.name] is None:
            _, grad_norm, _ = role.optimizer.step()
            if role.mesh.is_main:  # which every rank knows whole
                metrics.add(f"{role.name}/grad_norm", grad_norm)
            metrics.most(f"{role.name}/grad_norm_max", grad_norm)
        if role.balance is not None:
            figures = role.balance.figures()
            for key, value in figures.items() if role.mesh.is_main and problems[role.name] is None else ():
                metrics.add(f"{role.name}/{key}", value)
        role.scheduler.step(1)  # of a skipped update too: it counts what the phase has behind it
        metrics.record(f"{role.name}/learning_rate", learning_rate)
    return problems


@torch.no_grad()
def _settle_balance(balance: Balance, works: Sequence[Work], trace: Trace) -> None:
    """Counts what the experts of a role are given in a step, before it is made."""
    with balance.counting():
        outcomes = _run(works, trace, forward_only=True)
    mesh = works[0].role.mesh
    counts = [count for results in outcomes for _, count, _ in results if mesh.tp_rank == 0]  # of the last stage
    balance.settle(sum(counts, torch.zeros([], dtype=torch.int64, device=mesh.device)))


def _problems(works: Sequence[Work], outcomes: Sequence[list], roles: Sequence[RoleModel]) -> dict[str, str | None]:
    """For each role what is not finite, the same on all ranks; that everything is, is found in one pass."""
    mesh = roles[0].mesh
    sums = []
    for role in roles:
        parts = [buffer.sum() for buffer in gradient_tensors(role.modules)]
        parts += [r[0] for work, results in zip(works, outcomes, strict=True) if work.role is role for r in results]
        sums.append(torch.stack([part.float() for part in parts]).sum())
    bad = mesh.any_rank(~torch.stack(sums).isfinite())
    problems: dict[str, str | None] = {}
    for role, is_bad in zip(roles, bad, strict=True):
        problems[role.name] = _problem(works, outcomes, role) if is_bad else None
    return problems


def _problem(works: Sequence[Work], outcomes: Sequence[list], role: RoleModel) -> str:
    """What of a role is not finite: the loss, and of which samples, or a gradient, and of which parameter."""
    samples: list[int] = []
    for work, results in zip(works, outcomes, strict=True):
        if work.role is not role:
            continue
        numbers = work.batch.get("samples", torch.arange(len(work.batch["tokens"])))
        for (rows, _), (loss, _, _, row_sums) in zip(work.parts, results, strict=False):
            if not loss.isfinite():
                mine = rows[role.mesh.dp_rank]
                fields = [f[mine].flatten(1) if f.dim() > 1 else f[mine, None] for f in work.batch.values()]
                suspects = ~torch.cat([row_sums.cpu()[:, None], *(f.float() for f in fields)], 1).isfinite().all(1)
                samples += numbers[mine][suspects if suspects.any() else slice(None)].tolist()
    gradients = [name for name, p in parameters(role.chunks) if not p.main_grad.sum().isfinite()]  # type: ignore[attr-defined]
    parts = role.mesh.all_gather_object((samples, gradients))
    if found := sorted({sample for part, _ in parts for sample in part}):
        return f"the loss of {role.name} is not finite at {numbered(found)}"
    names = [name for _, part in parts for name in part]
    return f"the gradient of {role.name} is not finite in {names[0] if names else 'a sum over the replicas'}"


def _run(works: Sequence[Work], trace: Trace, forward_only: bool) -> list[list[Any]]:
    """What the last pipeline stage made of each micro-batch, by work; nothing on the other stages."""
    mesh = works[0].role.mesh
    micro_batches = [(work, work.cut(*part)) for work in works for part in work.parts]
    # chunks pass on as many as there are stages; what fills them up goes first, or it would be the last of its role
    empty = max(0, mesh.pp - len(micro_batches)) if mesh.virtual_pp > 1 else 0
    work, batch = micro_batches[0]
    nothing = {name: torch.zeros_like(field) for name, field in batch.items()}
    micro_batches = [(replace(work, fn=_nothing), nothing)] * empty + micro_batches
    roles = list(dict.fromkeys(work.role for work in works))
    last = {id(work.role): i for i, (work, _) in enumerate(micro_batches)}
    steps = [(work, batch, last[id(work.role)] == i) for i, (work, batch) in enumerate(micro_batches)]
    config = _config(roles, len(micro_batches))
    neighbours: dict[str, Any] = {}
    if mesh.pp > 1:
        neighbours["p2p_communicator"] = _Neighbours(mesh, config, trace, [_hidden(*each) for each in micro_batches])
        neighbours["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups()
    with trace.stream(has_backward=not forward_only), _without_sync(() if forward_only else roles):
        results = get_forward_backward_func()(
            forward_step_func=lambda iterator, stream: stream.step(*next(iterator), forward_only),
            data_iterator=[iter(steps) for _ in range(mesh.virtual_pp)],
            model=[_Stream(config, chunk, trace) for chunk in range(mesh.virtual_pp)],
            num_microbatches=len(micro_batches),
            seq_length=batch["tokens"].shape[1],  # of the first, which nobody reads: `_Neighbours` knows all of them
            micro_batch_size=batch["tokens"].shape[0],
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            **neighbours,
        )
    found = iter(results[empty:])
    return [[next(found) for _ in work.parts] if mesh.is_last_stage else [] for work in works]


def _nothing(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """The loss of a micro-batch that only fills up a pipeline."""
    return 0 * output.sum(), torch.zeros([], device=output.device), {}


def _hidden(work: Work, batch: Batch) -> tuple[int, int, int]:
    """Shape `(S, B, H)` of what a stage passes on of a micro-batch; S is of this rank under sequence parallelism."""
    rows, width = batch["tokens"].shape
    mesh = work.role.mesh
    return width // mesh.tp if mesh.config.sequence_parallel else width, rows, work.role.model.hidden_size


def _config(roles: Sequence[RoleModel], micro_batches: int) -> TransformerConfig:
    """What megatron's schedules ask of a model."""
    config = copy.copy(roles[0].chunks[0].config)
    # `train_step` finalises the gradients of each role by itself
    config.finalize_model_grads_func = config.grad_scale_func = None
    config.no_sync_func = contextlib.nullcontext  # and each has a last micro-batch of its own
    config.microbatch_group_size_per_vp_stage = chunk_group(roles[0].mesh.pp, micro_batches)
    return config


class _Stream(Module):
    """Stands where megatron's schedules expect a chunk of a model."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, chunk: int, trace: Trace):
        super().__init__()
        self.config, self.chunk, self.trace = config, chunk, trace
        self.input: Any = None

    def set_input_tensor(self, tensor) -> None:
        """What the stage before has sent."""
        self.input = tensor

    def step(self, work: Work, batch: Batch, is_last: bool, forward_only: bool):
        """Megatron's forward step: the role's output for a micro-batch, and what the last stage makes of it.

        Args:
            is_last: of the role, so that its gradients are reduced as its backward comes to them.
        """
        tokens = batch["tokens"]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        gpt = work.role.chunks[self.chunk]
        gpt.set_input_tensor(self.input)
        balance, counted = work.role.balance, {}
        if balance is not None and (balance.is_counting or not forward_only):
            counted["padding_mask"] = positions >= batch["lengths"].unsqueeze(1)
        with self.trace.span(work.role.name, "forward"):
            # right padding and a causal model: no real token sees padding, so there is no mask
            output = work.role.modules[self.chunk](tokens, positions, None, **counted)
        gpt.set_input_tensor(None)  # which would be kept as long as the role

        def begins(gradient: Tensor) -> None:
            if is_last:
                _sync(work.role.modules[self.chunk], True)

        def finish(output: Tensor, non_loss_data: bool = False):
            if forward_only:
                return work.fn(output, batch)
            loss, count, statistics = work.fn(output, batch)
            loss.register_hook(begins)  # the head's gradient comes before that of the output
            # a row of outputs that is not finite shows in its sum, and which it was is asked when the loss is not
            row_sums = output.detach().flatten(1).sum(1, dtype=torch.float32)
            return loss, count.to(torch.int), (loss.detach(), count, statistics, row_sums)

        if not forward_only:
            output.register_hook(begins)
        return output, finish


class _Neighbours(P2PCommunicator):
    """The exchange with the stages before and behind, its time noted as waiting.

    In place of megatron's, which has neighbours tell each other the shapes that differ, and the host wait for all of
    the device after each message. Here the device's stream alone waits, and shapes are known beforehand.

    Args:
        shapes: of what is passed on of each micro-batch.
    """

    def __init__(
        self, mesh: ParallelMesh, config: TransformerConfig, trace: Trace, shapes: Sequence[tuple[int, int, int]]
    ):
        super().__init__(mesh.pp_group, config)
        self.mesh, self.trace = mesh, trace
        order = forward_order(mesh.pp, len(shapes), mesh.virtual_pp)
        # all but the first chunk of the first stage are sent activations, all but the last of the last one gradients
        first, last = (0 if mesh.is_first_stage else None), (0 if mesh.is_last_stage else None)
        self.activations = iter([shapes[i] for i, chunk in order if chunk != first])
        self.gradients = iter([shapes[i] for i, chunk in order if chunk != last])  # chunks in reverse

    def _communicate(self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, **_):
        with self.trace.span("neighbours", "wait"):
            activation = self._room(self.activations) if recv_prev else None
            gradient = self._room(self.gradients) if recv_next else None
            # Messages bear no names. A group's operations have one order, which both sides go by.
            onward = [(dist.irecv, activation, self.prev_rank), (dist.isend, tensor_send_next, self.next_rank)]
            back = [(dist.isend, tensor_send_prev, self.prev_rank), (dist.irecv, gradient, self.next_rank)]
            if self.mesh.pp_back_group is None:
                batches = [(self.mesh.pp_group, onward + back)]
            else:
                batches = [(self.mesh.pp_group, onward), (self.mesh.pp_back_group, back)]
            requests = []
            for group, messages in batches:
                ops = [dist.P2POp(op, tensor, peer, group) for op, tensor, peer in messages if tensor is not None]
                requests += dist.batch_isend_irecv(ops) if ops else []
            for request in requests:
                request.wait()
        return activation, gradient, None

    def _room(self, shapes: Iterator[tuple[int, int, int]]) -> Tensor:
        return torch.empty(next(shapes), dtype=self.config.pipeline_dtype, device=self.mesh.device, requires_grad=True)


@contextlib.contextmanager
def _without_sync(roles: Sequence[RoleModel]) -> Iterator[None]:
    """Within it gradients are reduced from where `_sync` says so."""
    modules = [module for role in roles for module in role.modules]
    for module in modules:
        _sync(module, False)
    yield
    for module in modules:
        _sync(module, True)


def _sync(module: DistributedDataParallel, is_last: bool) -> None:
    """Whether the backward that runs is the last before a step, which megatron's `no_sync` knows only as a context."""
    for group in module.bucket_groups + module.expert_parallel_bucket_groups:
        group.is_last_microbatch = is_last
