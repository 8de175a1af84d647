"""Process groups of rehearsed ranks: NCCL and gloo as far as a rank can tell, whatever their size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .device import VALUED, put
from .wire import Wire

_BACKEND = "rehearsed"
# groups by the names that a mesh has for them; megatron's own name for the others
LABELS = {
    None: "other", "TENSOR_MODEL_PARALLEL_GROUP": "tp", "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP": "dp", "DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "dp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep", "EXPERT_DATA_PARALLEL_GROUP": "expert dp", "MODEL_PARALLEL_GROUP": "tp x pp",
    "EMBEDDING_GROUP": "embedding",
}  # fmt: skip
_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "SUM": lambda x: x.sum(0, dtype=x.dtype), "AVG": lambda x: x.float().mean(0).to(x.dtype),
    "MAX": lambda x: x.amax(0), "MIN": lambda x: x.amin(0), "PRODUCT": lambda x: x.prod(0, dtype=x.dtype),
}  # fmt: skip


class Work(dist.Work):
    """Of a call that is done but for what `finish` fills in."""

    def __init__(self, finish: Callable[[], None] | None = None):
        super().__init__()
        self.finish = finish

    def wait(self, timeout=None) -> bool:
        if self.finish is not None:
            finish, self.finish = self.finish, None
            finish()
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future:
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(None)
        return future


_ProcessGroup: Any = dist.ProcessGroup  # its methods have several forms each, and c10d uses one


class Group(_ProcessGroup):
    """A group of the rehearsed world."""

    wire: Wire  # of the process

    def __init__(self, rank: int, ranks: Sequence[int], name: str, kind: str, label: str):
        super().__init__(rank, len(ranks))
        self.ranks, self.mine, self.name, self.kind, self.label = list(ranks), rank, name, kind, label
        self.at_exchange = self.wire.channel(self.ranks, kind, label)

    # -- what c10d asks of a group -----------------------------------------------------------------------------

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return self.mine

    def getBackendName(self) -> str:
        return _BACKEND

    @property
    def group_name(self) -> str:
        return self.name

    pg_name = group_name

    def _set_group_name(self, name: str) -> None:
        self.name = name

    def shutdown(self) -> None:
        return None

    def _start_coalescing(self, device) -> None:
        return None

    def _end_coalescing(self, device) -> Work:
        return Work()

    # -- collectives -----------------------------------------------------------------------------------------------

    def allreduce(self, tensors, opts=None) -> Work:
        op = _name(opts)
        return self._call(f"all_reduce {op}", tensors, lambda parts: _fill(self, tensors, _reduced(parts, op)))

    def allreduce_coalesced(self, tensors, opts=None) -> Work:
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors, opts=None) -> Work:
        root = opts.rootRank if opts is not None else 0
        if not self.wire.is_known(self.ranks[root]):  # of what size it would be, each receiver says for itself
            self._check("broadcast", tensors)
            self._count("broadcast", tensors[0].nbytes)
            return Work()
        return self._call(f"broadcast from {root}", tensors, lambda parts: _fill(self, tensors, parts[root]))

    def allgather(self, outputs, inputs, opts=None) -> Work:
        def finish(parts):
            for i, part in enumerate(parts):
                _fill(self, [out[i] for out in outputs], part)

        return self._call("all_gather", inputs, finish, [x for out in outputs for x in out])

    def all_gather_single(self, output, tensor, opts=None) -> Work:
        def finish(parts):
            _fill(self, [output], [torch.cat([part[0].flatten() for part in parts]).view(output.shape)])

        return self._call("all_gather", [tensor], finish, [output])

    def all_gather_single_coalesced(self, outputs, inputs, opts=None) -> Work:
        works = [self.all_gather_single(output, tensor) for output, tensor in zip(outputs, inputs, strict=True)]
        return works[-1]

    def reduce_scatter(self, outputs, inputs, opts=None) -> Work:
        op = _name(opts)

        def finish(parts):
            _fill(self, outputs, _reduced([[part[self.mine]] for part in parts], op))

        return self._call(f"reduce_scatter {op}", list(inputs[0]), finish, outputs)

    def reduce_scatter_single(self, output, tensor, opts=None) -> Work:
        op = _name(opts)

        def finish(parts):
            whole = _reduced(parts, op)[0].flatten()
            _fill(self, [output], [whole.chunk(self.size())[self.mine].view(output.shape)])

        return self._call(f"reduce_scatter {op}", [tensor], finish, [output])

    def reduce_scatter_single_coalesced(self, outputs, inputs, opts=None) -> Work:
        pairs = zip(outputs, inputs, strict=True)
        return [self.reduce_scatter_single(output, tensor, opts) for output, tensor in pairs][-1]

    def all_to_all_single(self, output, tensor, output_sizes, input_sizes, opts=None) -> Work:
        def finish(parts):
            pieces = []
            for part, sizes in parts:
                split = sizes or [len(part) // self.size()] * self.size()
                pieces.append(part.split(split)[self.mine])
            _fill(self, [output], [torch.cat(pieces)])

        return self._call("all_to_all", [tensor], finish, [output], extra=input_sizes, is_same=False)

    def alltoall(self, outputs, inputs, opts=None) -> Work:
        def finish(parts):
            for i, part in enumerate(parts):
                _fill(self, [outputs[i]], [part[self.mine]])

        return self._call("all_to_all", inputs, finish, outputs, is_same=False)

    def gather(self, outputs, inputs, opts=None) -> Work:
        def finish(parts):
            if outputs:
                for i, part in enumerate(parts):
                    _fill(self, [outputs[0][i]], part)

        return self._call(f"gather to {opts.rootRank}", inputs, finish, outputs[0] if outputs else [])

    def scatter(self, outputs, inputs, opts=None) -> Work:
        def finish(parts):
            if len(parts[opts.rootRank]) == self.size():
                _fill(self, outputs, [parts[opts.rootRank][self.mine]])

        sent = inputs[0] if inputs else outputs
        return self._call(f"scatter from {opts.rootRank}", sent, finish, outputs, is_same=False)

    def barrier(self, opts=None) -> Work:
        self.wire.post(self.at_exchange, "barrier", None, waits=True)
        self._count("barrier", 0)
        return Work()

    # torch's older names
    _allgather_base, _reduce_scatter_base, alltoall_base = all_gather_single, reduce_scatter_single, all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _call(self, name: str, sent: Sequence[Tensor], finish, received=(), extra=None, is_same: bool = True) -> Work:
        self._check(name, [*sent, *received])
        wire = self.wire
        sizes = "x".join(str(x.numel()) for x in sent) if is_same else "any"
        types = {str(x.dtype).removeprefix("torch.") for x in sent}
        what = f"{name} of {sizes} {'/'.join(sorted(types))}"
        values = [self._value(x) for x in sent]
        self._count(name.split()[0], sum(x.numel() * x.element_size() for x in sent))
        if any(value is None for value in values):
            wire.post(self.at_exchange, what, None, waits=False)
            return Work()
        mine: Any = values if extra is None else (values, extra)
        parts = wire.post(self.at_exchange, what, mine, waits=True)
        each = [parts.get(wire.twin(other), parts[wire.rank]) for other in self.ranks]
        finish([(part[0][0], part[1]) for part in each] if extra is not None else each)
        return Work()

    # -- from one to another ---------------------------------------------------------------------------------------

    def send(self, tensors, peer: int, tag: int = 0) -> Work:
        self._check("send", tensors)
        self._count("send", tensors[0].nbytes)
        if (channel := self._line(self.mine, peer)) is not None:
            self.wire.post(channel, _message(tensors[0]), self._value(tensors[0]), waits=False)
        return Work()

    def recv(self, tensors, peer: int, tag: int = 0) -> Work:
        self._check("recv", tensors)
        self._count("recv", 0)
        channel, tensor = self._line(peer, self.mine), tensors[0]
        if channel is None:
            return Work()
        if isinstance(tensor, FakeTensor) and tensor.dtype not in VALUED:
            self.wire.post(channel, _message(tensor), None, waits=False)
            return Work()

        def finish() -> None:
            values = self.wire.post(channel, _message(tensor), None, waits=True)
            _fill(self, [tensor], [next(value for rank, value in values.items() if rank != self.wire.rank)])

        return Work(finish)

    def recv_anysource(self, tensors, tag: int = 0) -> Work:
        raise self.wire.gpu.refusal("a message from any rank cannot be rehearsed")

    def _value(self, tensor: Tensor) -> Tensor | None:
        """The numbers of a tensor, as far as it has any."""
        return self.wire.gpu.value(tensor) if isinstance(tensor, FakeTensor) else tensor.detach()

    def _line(self, source: int, target: int) -> tuple | None:
        """The channel of messages from one of the group to another; None where the other is not rehearsed."""
        ends = self.ranks[source], self.ranks[target]
        is_pipeline = len({self.wire.stage_of(rank) for rank in self.ranks}) == len(self.ranks)
        if is_pipeline:
            ends = self.wire.twin(ends[0]), self.wire.twin(ends[1])
        if not set(ends) <= self.wire.present or ends[0] == ends[1]:
            return None
        (kind, size, number) = self.at_exchange[1]
        return tuple(sorted(ends)), (f"{kind} from {ends[0]} to {ends[1]}", size, number)

    def _count(self, name: str, size: int) -> None:
        """Counts a call, and the bytes that a rank sends for it in a ring.

        Args:
            size: bytes that this rank gives.
        """
        if self.size() == 1:
            return
        stage, others = self.wire.gpu.stage, self.size() - 1
        share = {"all_reduce": 2 * others / self.size(), "reduce_scatter": others / self.size(), "all_gather": others}
        share["all_to_all"] = others / self.size()  # what each keeps is not sent
        group = self.at_exchange[1][0]
        stage.collectives[f"{group} {name}"] += 1
        stage.sent[group] += int(size * share.get(name, 1))
        stage.kernels += self.kind == "nccl"

    def _check(self, name: str, tensors: Sequence[Tensor]) -> None:
        gpu = self.wire.gpu
        want = "cuda" if self.kind == "nccl" else "cpu"
        for tensor in tensors:
            what = f"{name} of a tensor {tuple(tensor.shape)}"
            if tensor.device.type != want:
                raise gpu.refusal(f"{what} on {tensor.device.type} through {self.kind}")
            if not tensor.is_contiguous() and self.kind == "nccl":
                raise gpu.refusal(f"{what} that is not contiguous")


def _name(opts) -> str:
    op = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
    for name in ("SUM", "AVG", "PRODUCT", "MIN", "MAX"):
        if op == getattr(dist.ReduceOp, name):
            return name
    return str(op)


def _reduced(parts: Sequence[Sequence[Tensor]], op: str) -> list[Tensor]:
    return [_REDUCE[op](torch.stack(list(each))) for each in zip(*parts, strict=True)]


def _fill(group: Group, targets: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Gives values to tensors, on the device through what is known of their numbers."""
    for target, value in zip(targets, values, strict=True):
        if value is None:
            continue
        if isinstance(target, FakeTensor):
            group.wire.gpu.give(target, value.view(target.shape))
        else:
            target.copy_(value.view(target.shape))


def _message(tensor: Tensor) -> str:
    return f"a message of {tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}"


def install(wire: Wire, rank: int, world_size: int) -> None:
    """Makes this process rank `rank` of so many, whatever backend the run asks for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    Group.wire = wire
    asked = {"kind": "nccl", "label": "world"}  # of the group that torch is making
    default = "nccl"

    def create(options, _):
        ranks = list(options.global_ranks_in_group) or list(range(world_size))
        return Group(options.group_rank, ranks, options.group_id, **asked)

    dist.Backend.register_backend(_BACKEND, create, extended_api=True, devices=["cpu", "cuda"])
    c10d: Any = dist.distributed_c10d
    init, new_group = dist.init_process_group, dist.new_group

    def init_process_group(backend=None, *args, timeout=None, **kwargs):
        nonlocal default
        asked["kind"] = default = backend or "nccl"
        init(_BACKEND, rank=rank, world_size=world_size, store=FakeStore(), timeout=timeout)

    def make_group(ranks=None, timeout=None, backend=None, *args, group_desc=None, **kwargs):
        asked.update(kind=backend or default, label=LABELS.get(group_desc, (group_desc or "other").lower()))
        every = c10d._get_default_group()
        wire.post(every.at_exchange, f"new_group of {ranks}", None, waits=False)
        return new_group(ranks, timeout, _BACKEND, group_desc=group_desc)

    send_objects = dist.broadcast_object_list

    def broadcast_object_list(objects, src=None, *args, **kwargs) -> None:
        if src is not None and not wire.is_known(src):
            objects[:] = wire.assumed
            return
        send_objects(objects, src, *args, **kwargs)

    def object_device(group=None) -> str:
        group = group or c10d._get_default_group()
        return "cuda" if group.kind == "nccl" else "cpu"

    for module in (dist, c10d):
        put(
            module, init_process_group=init_process_group, new_group=make_group,
            broadcast_object_list=broadcast_object_list,
        )  # fmt: skip
    put(
        c10d, _get_object_coll_device=object_device, _device_capability=lambda group=None: [object_device(group)],
        _get_pg_default_device=lambda group=None: torch.device(object_device(group)),
        _store_based_barrier=lambda *args, **kwargs: None,
    )  # fmt: skip
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "1")
