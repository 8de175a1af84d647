"""What a megatron checkpoint of a model holds, worked out on one rank and without memory for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from ..config import MeshConfig, ModelConfig
from ..hf.config import Head
from ..hf.weights import Table, globally
from ..mesh import ParallelMesh
from ..models.build import build_model, on_meta
from ..models.checkpoint import IMPORTED

Progress = Callable[[int], Any]  # is told of bytes as they are done


@contextlib.contextmanager
def one_rank() -> Iterator[ParallelMesh]:
    """A world of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = ParallelMesh(MeshConfig(1, 1, 1), "cpu")
    try:
        yield mesh
    finally:
        mesh.close()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Parameter:
    """A whole parameter and its places in a checkpoint: one, or one for each half of a gated MLP, along axis 0."""

    name: str
    shape: torch.Size
    places: Sequence[ShardedTensor]


def layout(model: ModelConfig, head: Head, prefix: str, mesh: ParallelMesh) -> list[Parameter]:
    """Every parameter of a model as megatron's checkpoints hold it, without any memory for it."""
    with on_meta():
        gpt = build_model(model, mesh, head, torch.float32)
        state = gpt.sharded_state_dict(prefix=f"{prefix}.")
        found = []
        for local, whole in gpt.named_parameters():
            entry, named = state[f"{prefix}.{local}"], list(globally(gpt, local, whole))
            places = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            each = len(places) // len(named)
            found += [Parameter(name, p.shape, places[i * each :][:each]) for i, (name, p) in enumerate(named)]
    return found


def count_parameters(model: ModelConfig, head: Head, mesh: ParallelMesh) -> int:
    """Learned numbers, those of a padded vocabulary left out and a tied embedding counted once."""
    table, total = Table(model, head), 0
    for parameter in layout(model, head, IMPORTED, mesh):
        row, numbers = table.row(parameter.name)
        shapes = {
            w.name: w.shape for w in row.windows(numbers, torch.empty(parameter.shape, device="meta"), model, 0, 1)
        }
        total += sum(math.prod(shape) for shape in shapes.values())
    return total
