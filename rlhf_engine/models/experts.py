"""Mixtures of experts: the experts of a layer as one grouped product, and tokens in the order of their experts.

Megatron's own grouped experts need transformer-engine, or the package grouped_gemm, which knows CUDA alone; its loop
over modules runs as many small products as there are experts, whose sizes the host has to know. Here one tensor has a
layer's experts, and torch multiplies rows that stand in order of their experts with all of them at once. Layer and
router are megatron's.

Legend for shapes: T tokens, k experts of each; N rows, one for each token and each of its experts, in the order of the
experts; E experts of this rank, H hidden size, F an expert's inner size, which tensor parallel ranks split.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from torch import Tensor, nn

from ..cpu import parameter_device

_ALIGNED = 16  # bytes, of which torch's grouped product wants a row to be a multiple
_WITHOUT_WAIT = (9, 10)  # major compute capabilities for which it has a kernel; elsewhere it loops, and waits


class GroupedExperts(MegatronModule):
    """This rank's shard of each of its experts, without biases.

    Attributes:
        weight1: `(E, 2 F, H)`, the gate over the other half; `(E, F, H)` without a gate.
        weight2: `(E, H, F)`.
    """

    def __init__(self, num_local_experts: int, config, pg_collection, **unused):
        super().__init__(config=config)
        self.num_local_experts, self.groups = num_local_experts, pg_collection
        inner = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.halves = 2 if config.gated_linear_unit else 1
        self.weight1 = self._parameter(1, self.halves * inner, config.hidden_size)
        self.weight2 = self._parameter(2, config.hidden_size, inner)

    def _parameter(self, split: int, *shape: int) -> nn.Parameter:
        """Experts are marked as such at EP 1 too. They have an optimizer of their own, and a checkpoint can only be
        loaded where there are as many optimizers as where it was saved."""
        dtype, device = self.config.params_dtype, parameter_device()
        parameter = nn.Parameter(torch.empty(self.num_local_experts, *shape, dtype=dtype, device=device))
        set_tensor_model_parallel_attributes(parameter, True, split, 1)
        parameter.allreduce = False  # type: ignore[attr-defined]
        return parameter

    def forward(self, x: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """As megatron's dispatchers call it: `(N, H)`, rows of each expert `(E,)` and the router's weight of each row
        `(N,)`, to `(N, H)`, this rank's part of a sum over tensor parallel ranks."""
        return self._multiply(x, tokens_per_expert.to(x.device).cumsum(0).to(torch.int32), weights), None

    def mix(self, x: Tensor, weights: Tensor, places: Places) -> Tensor:
        """`(T, H)`, and the router's weights of each token's experts `(T, k)`, to `(T, H)`, likewise."""
        return places.collect(self._multiply(places.spread(x), places.ends, places.of_rows(weights)))

    def _multiply(self, x: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
        gate, *up = grouped_linear(x, self.weight1, ends).chunk(self.halves, -1)
        inner = self.config.activation_func(gate)
        for factor in (*up, weights.unsqueeze(1)):
            # what no backward reads is written over: tensors that a CPU has no cache for take longer than products
            inner = (inner * factor).to(x.dtype) if torch.is_grad_enabled() else inner.mul_(factor)
        return grouped_linear(inner, self.weight2, ends)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """As megatron's experts stand in a checkpoint when each is a module: all of a layer in one tensor, and the two
        halves of a gated projection each split by themselves."""
        first, second = f"{prefix}experts.linear_fc1.weight", f"{prefix}experts.linear_fc2.weight"
        return {
            f"{prefix}weight1": self._factory(first, self.weight1, sharded_offsets, 1, self.halves),
            f"{prefix}weight2": self._factory(second, self.weight2, sharded_offsets, 2, 1),
        }

    def _factory(self, key: str, weight: Tensor, offsets: tuple, split: int, halves: int) -> ShardedTensorFactory:
        """
        Args:
            offsets: of the layer in the model.
            split: axis of `weight` that tensor parallel ranks split, in so many `halves`.
        """
        ep, tp, axis = self.groups.ep, self.groups.expt_tp, len(offsets)
        first, experts = ep.rank() * self.num_local_experts, ep.size() * self.num_local_experts

        def build(key: str, whole: Tensor, replica_id: Any, flattened_range: Any = None) -> list[ShardedTensor]:
            found = []
            for i, expert in enumerate(whole):
                for half, part in enumerate(expert.chunk(halves, split - 1)):
                    place = (axis + split, half * tp.size() + tp.rank(), halves * tp.size())
                    found.append(ShardedTensor.from_rank_offsets(
                        key, part, *offsets, (axis, first + i, experts), place, replica_id=replica_id,
                        prepend_axis_num=axis + 1,
                    ))  # fmt: skip
            return found

        def merge(parts: list[Tensor]) -> Tensor:
            return torch.cat([part.flatten() for part in parts]).view(weight.shape)

        return ShardedTensorFactory(key, weight, build, merge, (0, 0, self.groups.expt_dp.rank()))


# -- the product ---------------------------------------------------------------------------------------------


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each group of rows with its own weight.

    Args:
        x: `(N, I)`.
        weight: `(E, O, I)`.
        ends: `(E,)` int32, where the rows of each group end.

    Returns:
        `(N, O)`
    """
    if not is_grouped(weight):
        sizes = [stop - start for start, stop in itertools.pairwise([0, *ends.tolist()])]
        return torch.cat([part @ each.T for part, each in zip(x.split(sizes), weight, strict=True)])
    out = torch._grouped_mm(x, weight.mT, offs=ends)
    if out.requires_grad:
        out.register_hook(Tensor.contiguous)  # a gradient that was expanded has rows of no bytes
    return out


def is_grouped(weight: Tensor) -> bool:
    """Whether torch has a grouped product for such weights; where it has not, experts are multiplied one by one."""
    aligned = all(size * weight.element_size() % _ALIGNED == 0 for size in weight.shape[1:])
    return aligned and _has_grouped(weight.device.type, weight.dtype)


def waits_for_sizes(weight: Tensor) -> bool:
    """Whether the host has to know how many rows each expert has."""
    if not (weight.is_cuda and weight.dtype is torch.bfloat16 and is_grouped(weight)):
        return True
    return torch.cuda.get_device_capability(weight.device)[0] not in _WITHOUT_WAIT


@functools.cache
def _has_grouped(device: str, dtype: torch.dtype) -> bool:
    """Torch has it since 2.8, not for every device and type."""
    try:
        x = torch.zeros(16, 16, dtype=dtype, device=device)
        torch._grouped_mm(x, x.unsqueeze(0), offs=torch.full((1,), 16, dtype=torch.int32, device=device))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


# -- who is where --------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Tokens in the order of their experts.

    Attributes:
        tokens: `(N,)`, the token of each row.
        rows: `(T, k)`, the rows of each token.
        ends: `(E,)` int32, where the rows of each expert end.
    """

    tokens: Tensor
    rows: Tensor
    ends: Tensor

    @property
    def sizes(self) -> Tensor:
        """`(E,)`, how many rows each expert has."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).long()

    def spread(self, x: Tensor) -> Tensor:
        """`(T, H)` to `(N, H)`."""
        return _Spread.apply(x, self)

    def collect(self, x: Tensor) -> Tensor:
        """`(N, H)` to the sum of each token's rows `(T, H)`."""
        return _Collect.apply(x, self)

    def of_rows(self, weights: Tensor) -> Tensor:
        """What `(T, k)` says of each row, `(N,)`."""
        return weights.new_zeros(len(self.tokens)).index_copy(0, self.rows.flatten(), weights.flatten())


def by_expert(chosen: Tensor, num_experts: int, least: int = 1) -> Places:
    """Where the experts of each token, `(T, k)`, have them.

    Args:
        least: rows of each expert that has any, or where threads share them out a multiple of it, filled up with
            others; of 1 the host waits for nothing.
    """
    experts, order = chosen.flatten().sort(stable=True)
    tokens, places = order // chosen.shape[1], torch.arange(len(order), device=order.device)
    ends = torch.searchsorted(experts, torch.arange(num_experts, device=order.device), right=True)
    if least > 1:
        counts = ends.diff(prepend=ends.new_zeros(1))
        several = torch.get_num_threads() > 1
        filled = (counts + least - 1) // least * least if several else counts.clamp(min=least) * (counts > 0)
        moved = filled.cumsum(0) - filled - (ends - counts)
        places, ends = places + moved[experts], filled.cumsum(0)
        tokens = tokens.new_zeros(int(ends[-1])).index_copy(0, places, tokens)
    rows = torch.empty_like(order).index_copy(0, order, places).view_as(chosen)
    return Places(tokens, rows, ends.to(torch.int32))


class _Spread(torch.autograd.Function):
    """Backward is what `_Collect` does; autograd's would on a GPU add up in another order each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return x[places.tokens]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.places.rows].sum(1), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return x[places.rows].sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.places.tokens], None


class Dispatcher(MoEAllGatherTokenDispatcher):
    """Tokens to their experts and back: all-gather over tensor parallel ranks, which have shards of the same experts,
    then all-to-all over expert parallel ones.

    Megatron's all-to-all dispatcher gathers over tensor parallel ranks what each has received, k rows a token and on no
    two ranks as many, which gloo cannot. It waits for the device three times a layer; this once, to learn how many rows
    go where, and at EP 1 not at all.
    """

    routing_map: Any  # `(T, E)` bool, which experts each token has

    def token_dispatch(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """`(T, H)` and the router's `(T, E)` of all tensor parallel ranks; E experts of the model here and below."""
        if self.tp_size > 1 and self.config.sequence_parallel:
            gather = functools.partial(gather_from_sequence_parallel_region, group=self.tp_group)
            self.routing_map, hidden, probs = gather(self.routing_map), gather(hidden), gather(probs)
        return hidden, probs

    def dispatch_postprocess(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """To the rows of this rank's experts `(N, H)`, how many each has, and the router's weight of each `(N,)`."""
        chosen = self.routing_map.int().topk(self.router_topk).indices.sort().values
        self.routing_map, self.places = None, by_expert(chosen, probs.shape[1])
        rows, weights = self.places.spread(hidden), self.places.of_rows(probs.gather(1, chosen))
        if self.ep_size == 1:
            return rows, self.places.sizes, weights
        mine = self.places.sizes.view(self.ep_size, -1)  # by rank of the expert
        theirs = torch.empty_like(mine)  # of this rank's experts, by rank of the token
        dist.all_to_all_single(theirs, mine, group=self.ep_group)
        self.sent, self.received = torch.stack([mine.sum(1), theirs.sum(1)]).tolist()
        rows, weights = (all_to_all(self.ep_group, x, self.received, self.sent) for x in (rows, weights))
        experts = torch.arange(self.num_local_experts, device=rows.device).repeat(self.ep_size)
        experts = experts.repeat_interleave(theirs.flatten(), output_size=len(rows))
        self.places_here = by_expert(experts.unsqueeze(1), self.num_local_experts)
        return self.places_here.spread(rows), self.places_here.sizes, weights[self.places_here.tokens]

    def combine_preprocess(self, hidden: Tensor) -> Tensor:
        """`(N, H)` back to `(T, H)`."""
        if self.ep_size > 1:
            hidden = self.places_here.collect(hidden)
            hidden = all_to_all(self.ep_group, hidden, self.sent, self.received)
        return self.places.collect(hidden)

    def token_combine(self, hidden: Tensor) -> Tensor:
        """The sum over tensor parallel ranks; under sequence parallelism of this rank's tokens."""
        if self.tp_size == 1:
            return hidden
        if not self.config.sequence_parallel:
            return reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return reduce_scatter_to_sequence_parallel_region(hidden.float(), group=self.tp_group).to(hidden.dtype)
