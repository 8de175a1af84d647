"""What a checkpoint holds of a role: this rank's part of its weights and its optimizer, as megatron describes shards.

The distributed optimizer keeps of each parameter a stretch of its elements in their order. Here that becomes rectangles
of the whole tensor, which is how a checkpoint holds them: a replica writes and reads what it keeps and no more, and any
mesh reads what any other has written. Megatron's own description gathers the whole on every replica first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from ..cpu import cuda_calls_stay
from .optim import optimizer_parts
from .role import RoleModel


def weights(role: RoleModel, name: str) -> dict[str, Any]:
    """This rank's shards of the weights, by their names in `role.chunks`. In a checkpoint `name` stands before them,
    and layers count from the model's first. Loaded, they are in place."""
    found = _weights(role, name)
    apply_factories(found)
    return found


def _weights(role: RoleModel, name: str) -> dict[str, Any]:
    return {
        f"{i}.{key.removeprefix(f'{name}.')}": shard
        for i, chunk in enumerate(role.chunks)
        for key, shard in chunk.sharded_state_dict(prefix=f"{name}.").items()
        if not key.endswith("_extra_state")  # empty: nothing has a state beside its parameters, in 8 bits neither
    }


def to_save(role: RoleModel, name: str) -> dict[str, Any]:
    """Weights and optimizer of a trained role, each element on one replica."""
    model = _weights(role, name)
    found = {"model": model, "optimizer": _optimizer(role, model, is_loading=False)}
    if _distributed(role):
        others = {key: x for key, x in model.items() if not isinstance(x.data, Parameter)}
        found["model"] = others | _shares(role, model, with_weights=True)
    apply_factories(found)
    return found


def to_load(role: RoleModel, name: str) -> dict[str, Any]:
    """What a trained role needs; all but what `load_optimizer` takes is loaded in place."""
    model = _weights(role, name)
    found = {"model": model | _shares(role, model), "optimizer": _optimizer(role, model, is_loading=True)}
    apply_factories(found["model"])
    return found


def _optimizer(role: RoleModel, model: Mapping[str, Any], is_loading: bool) -> Any:
    """What is not in `_shares`: numbers alone, or all that an optimizer has which is not distributed."""
    if _distributed(role):
        state = role.optimizer.state_dict()
        return dict(enumerate(state)) if isinstance(state, list) else state
    with cuda_calls_stay(role.mesh.device):
        return role.optimizer.sharded_state_dict(model, is_loading, metadata={"chained_optim_avoid_prefix": True})


def _distributed(role: RoleModel) -> list[DistributedOptimizer]:
    return [part for part in optimizer_parts(role.optimizer) if isinstance(part, DistributedOptimizer)]


def _shares(role: RoleModel, model: Mapping[str, Any], with_weights: bool = False) -> dict[str, ShardedTensor]:
    """What this replica keeps of each tensor of a distributed optimizer, and as much of the weights."""
    described = {id(shard.data): shard for shard in model.values()}
    found: list[ShardedTensor] = []
    for optimizer in _distributed(role):
        for parameter, held in _held(optimizer):
            shard = described[id(parameter)]
            for key, tensor in optimizer._get_main_param_and_optimizer_states(parameter).items():
                if isinstance(tensor, Tensor) and tensor.dim():  # a step counter is a number
                    found += _rectangles(shard, f"optimizer.state.{key}.{shard.key}", tensor, held.start)
            if with_weights:
                found += _rectangles(shard, shard.key, parameter.view(-1)[held.start : held.end], held.start)
    return {f"share_{i}": shard for i, shard in enumerate(found)}


def _held(optimizer: DistributedOptimizer) -> Iterator[tuple[Parameter, Any]]:
    """Parameters of which this replica keeps a part, and from where to where of their elements."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]


def _rectangles(
    shard: ShardedTensor | ShardedTensorFactory, key: str, held: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """`held`, the elements from `start` on of the parameter that `shard` describes, as parts of the tensor `key`."""
    held, whole = held.detach(), torch.empty(shard.data.shape, dtype=held.dtype, device="meta")
    if isinstance(shard, ShardedTensorFactory):  # a parameter that is several tensors one behind the other
        pieces: Iterable[ShardedTensor] = nested_values(shard.build_fn(key, whole, shard.replica_id, None))
    else:
        pieces = [replace(shard, key=key, data=whole, dtype=held.dtype)]
    for piece in pieces:
        assert piece.data is not None and piece.data.is_contiguous()
        first, axes = piece.data.storage_offset(), piece.prepend_axis_num
        begin, end = max(start, first), min(start + held.numel(), first + piece.data.numel())
        for offsets, sizes in rectangles(piece.local_shape, begin - first, end - first):
            shape = (1,) * axes + sizes
            data, begin = held[begin - start :][: math.prod(sizes)].view(shape), begin + math.prod(sizes)
            yield replace(
                piece, data=data, local_shape=shape, prepend_axis_num=0, axis_fragmentations=None,
                global_offset=tuple(map(sum, zip(piece.global_offset, (0,) * axes + offsets, strict=True))),
                replica_id=(*piece.replica_id[:2], 0),  # each replica has elements of its own
            )  # fmt: skip


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements `start` to `stop` of a tensor, in their order, as a few rectangles: offsets and sizes of each."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        edges = [(last, start - last * row, stop - last * row)]
    else:
        edges = [(first - 1, start - (first - 1) * row, row), (last, 0, stop - last * row)]
    for i, (line, begin, end) in enumerate(edges):
        if i and first < last:
            yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
        for offsets, sizes in rectangles(shape[1:], begin, end):
            yield (line, *offsets), (1, *sizes)
