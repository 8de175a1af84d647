"""What roles are asked to do: a batch, a function of the output, and the micro-batches that it is cut into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .role import RoleModel

Batch = Mapping[str, Tensor]  # field name to (rows, ...)
InferFn = Callable[[Tensor, Batch], Tensor]  # model output, micro-batch -> (rows, ...), which may end with T
# a sum over the same count as the losses, or one with a count of its own
Statistic = Tensor | tuple[Tensor, Tensor]
# model output, micro-batch -> sum of losses, count that the sum over the minibatch is divided by, statistics
LossFn = Callable[[Tensor, Batch], tuple[Tensor, Tensor, Mapping[str, Statistic]]]


@dataclass(frozen=True)
class Work:
    """What a role is to do with a batch: `fn` of its output for every row, or a step on the sum of `fn`'s losses.

    Args:
        batch: the rows of all replicas, with `tokens` `(B, T)` among its fields and, where a step or a token budget
            asks for them, `lengths` `(B,)`.
        micro_batch_size: a forward on one replica computes at most as many tokens as so many rows as wide as `tokens`
            have, padding included, where the role has no token budget.
        together: so many neighbouring rows are never parted.
        is_derivative: the gradient is the derivative of `fn`'s losses; False where it holds a part of them constant.
        prepare: makes of a micro-batch on the CPU what `fn` reads, so that `fn` itself need not wait for the device.
    """

    role: RoleModel
    batch: Batch
    fn: InferFn | LossFn
    micro_batch_size: int
    together: int = 1
    is_derivative: bool = True
    prepare: Callable[[Batch], Batch] = dict

    @functools.cached_property
    def parts(self) -> list[tuple[Tensor, int]]:
        """The micro-batches: which rows, `(dp, rows)` with a line for each replica, and the width that they are cut to.

        Rows of like length go together, the longest first. All replicas get micro-batches of the same shapes, which
        expert parallelism needs, and nobody waits for others.
        """
        mesh, whole = self.role.mesh, self.batch["tokens"].shape[1]
        lengths = self.batch["lengths"] if "lengths" in self.batch else torch.full((len(self.batch["tokens"]),), whole)
        longest = lengths.view(-1, self.together).amax(1)
        order = longest.argsort(descending=True, stable=True).view(-1, mesh.dp)  # a line goes to all replicas
        unit = self.role.width_unit
        most = whole if unit == mesh.tp else -(-whole // unit) * unit
        widths = [min(most, -(-length // unit) * unit) for length in longest[order[:, 0]].tolist()]
        budget = self.role.micro_batch_tokens or self.micro_batch_size * whole
        found, start = [], 0
        for end in pack(widths, budget // self.together, _COST // self.together):
            rows = order[start:end].T.unsqueeze(2) * self.together + torch.arange(self.together)
            found.append((rows.flatten(1), widths[start]))
            start = end
        return found

    def cut(self, rows: Tensor, width: int) -> dict[str, Tensor]:
        """One of these micro-batches on this replica's device."""
        mesh, whole = self.role.mesh, self.batch["tokens"].shape[1]
        found = {}
        for name, field in self.batch.items():
            field = field[rows[mesh.dp_rank]]
            per_token = field.dim() > 1 and field.shape[1] == whole
            found[name] = _to_width(field, width) if per_token else field
        return {name: field.to(mesh.device) for name, field in self.prepare(found).items()}


def _to_width(field: Tensor, width: int) -> Tensor:
    """`(rows, T, ...)` cut to so many positions, or filled up with zeros."""
    field = field[:, :width].contiguous()
    missing = width - field.shape[1]
    return torch.cat([field, field.new_zeros(len(field), missing, *field.shape[2:])], 1) if missing else field


# tokens that could be computed in the time that a micro-batch costs beside its tokens
_COST = 64


def pack(widths: Sequence[int], budget: int, cost: int) -> list[int]:
    """Cuts rows that stand in order of their length into micro-batches, so that all of them compute the least.

    Args:
        widths: of the rows, the longest first; a micro-batch is as wide as its first row.
        budget: tokens of a micro-batch, padding included; a longer row goes alone.
        cost: of a micro-batch beside its tokens, in tokens.

    Returns:
        Where each micro-batch ends.
    """
    least, begins = [0], [0]  # for the first so many rows: what they cost, and where their last micro-batch begins
    for end in range(1, len(widths) + 1):
        cheapest, begin = least[end - 1] + widths[end - 1] + cost, end - 1
        for start in range(end - 2, -1, -1):
            if (tokens := (end - start) * widths[start]) > budget:
                break
            cheapest, begin = min((cheapest, begin), (least[start] + tokens + cost, start))
        least.append(cheapest)
        begins.append(begin)
    ends = [len(widths)]
    while begins[ends[-1]]:
        ends.append(begins[ends[-1]])
    return ends[::-1]
