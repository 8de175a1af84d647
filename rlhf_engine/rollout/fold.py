"""The whole policy on every rank that generates: the training model itself, or a copy of it folded together.

Decoding walks all layers token by token, so a rank that holds a part of them (a pipeline stage, some of the experts)
first receives the rest. Then it serves as a replica that waits for no other, tensor parallel ranks aside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ..hf.weights import parameters
from ..mesh import ParallelMesh
from ..models.build import build_model
from ..models.role import RoleModel

_BUCKET_NUMEL = 1 << 26  # parameters sent at once when stages fold


@torch.no_grad()
def whole_model(role: RoleModel) -> GPTModel:
    """The policy whole but for TP: the training model itself, or under PP or EP a copy, freed with its last user."""
    return _fold(role) if role.mesh.is_folded_to_generate else role.chunks[0]


def _fold(role: RoleModel) -> GPTModel:
    """A copy of the whole depth and all experts (this rank's TP shard)."""
    mesh = role.mesh
    gpt = build_model(role.model, mesh, role.head, role.dtype, folded=True).requires_grad_(False).eval()
    wanted = dict(parameters([gpt]))
    # under tied embeddings the last stage has a second copy, which the folded model has no place for
    mine = {name: p for name, p in parameters(role.chunks) if name in wanted}
    _exchange(mine, wanted, mesh.pp_group, mesh)
    # every rank now has its own experts of all layers
    if mesh.ep > 1:
        assert role.model.num_experts is not None
        each = role.model.num_experts // mesh.ep
        numbers = ((name, re.search(r"\.local_experts\.(\d+)\.", name)) for name in wanted)
        own = [name for name, found in numbers if found and int(found[1]) // each == mesh.ep_rank]
        _exchange({name: wanted[name] for name in own}, wanted, mesh.ep_group, mesh)
    return gpt


def _exchange(
    mine: Mapping[str, Tensor], wanted: Mapping[str, Tensor], group: dist.ProcessGroup, mesh: ParallelMesh
) -> None:
    """Every rank of the group sends what it has to the others, in buckets."""
    for rank in dist.get_process_group_ranks(group):
        is_source = rank == mesh.rank
        box = [list(mine) if is_source else None]
        dist.broadcast_object_list(box, rank, group=group, device=mesh.device)
        assert box[0] is not None
        bucket: list[str] = []
        for name in box[0]:
            bucket.append(name)
            sizes = [wanted[n].numel() for n in bucket]
            if name != box[0][-1] and sum(sizes) < _BUCKET_NUMEL:
                continue
            if is_source:
                flat = torch.cat([mine[n].reshape(-1) for n in bucket])
            else:
                flat = torch.empty(sum(sizes), dtype=wanted[name].dtype, device=mesh.device)
            dist.broadcast(flat, rank, group=group)
            for n, values in zip(bucket, flat.split(sizes), strict=True):
                wanted[n].copy_(values.view_as(wanted[n]))
            bucket = []
