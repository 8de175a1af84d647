"""HF tensors of a model that is spread over the mesh: each whole on one rank, and written by it.

Of the ranks that have a parameter one gets it whole, from its tensor parallel group; others are asked only where there
are fewer that write than there are parts of a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ..config import ModelConfig
from ..mesh import ParallelMesh
from .config import Head
from .files import cut, file_names, write_files
from .index import SCORE_BIAS
from .weights import Table, parameters

_LEAST_BYTES, _MOST_BYTES = 10**9, 5 * 10**9  # of what a rank writes, and of a file


def save_weights(
    chunks: Iterable[GPTModel], model: ModelConfig, head: Head, mesh: ParallelMesh, folder: Path
) -> tuple[list[str], float | None]:
    """Every HF tensor of a model spread over the mesh, in safetensors files of a folder that all ranks see. Each rank
    writes files of its own, unless the model is small.

    Returns:
        Names of the files, and the bias of a score's head, which is in none of them. The same on every rank.

    Raises:
        OSError: on every rank, where one could not write.
    """
    table, mine = Table(model, head), dict(parameters(chunks))
    biases = [name for name in mine if table.row(name)[0].hf == SCORE_BIAS]
    bias = next((float(mine.pop(name)) for name in biases), None)
    shares = Shares.of(mine, table, mesh, _LEAST_BYTES)
    files = [(rank, names) for rank in shares.of_rank for names in cut(shares.sizes(rank), _MOST_BYTES)]
    names = file_names(len(files))
    own = {
        file: {key: tensor for name in part for key, tensor in shares.tensors[name].items()}
        for file, (rank, part) in zip(names, files, strict=True)
        if rank == mesh.rank
    }
    tensors, error = whole_tensors(mine, table, mesh, shares), None
    try:
        write_files(folder, own, tensors)
    except OSError as failure:
        error = failure
    for _ in tensors:  # the others wait for this rank's shards
        pass
    for failed, found in mesh.all_gather_object((error, bias)):
        if failed is not None:
            raise failed
        bias = found if bias is None else bias
    return names, bias


@dataclass(frozen=True)
class Shares:
    """Which rank gets which parameters of a model whole; the same on every rank.

    Attributes:
        tensors: the HF tensors of each parameter, on the meta device.
        shards: shape and type of each parameter's.
        holders: ranks that have one.
        of_rank: parameters of each rank that gets any.
    """

    tensors: dict[str, dict[str, Tensor]]
    shards: dict[str, tuple[torch.Size, torch.dtype]]
    holders: dict[str, list[int]]
    of_rank: dict[int, list[str]]

    @classmethod
    def of(cls, mine: Mapping[str, Tensor], table: Table, mesh: ParallelMesh, least_bytes: int | None = None) -> Shares:
        """Shares of about equal size for as many ranks as get `least_bytes` each; None: all for the main rank."""
        listing = [(name, p.shape, p.dtype) for name, p in mine.items() if not table.is_copy(name)]
        shards: dict[str, tuple[torch.Size, torch.dtype]] = {}
        holders: dict[str, list[int]] = {}
        for rank, found in enumerate(mesh.all_gather_object(listing)):
            for name, shape, dtype in found:
                shards[name] = shape, dtype
                holders.setdefault(name, []).append(rank)
        tensors = {}
        for name, (shape, dtype) in shards.items():
            ranks = mesh.tp if table.is_split(name) else 1
            tensors[name] = table.export(name, [torch.empty(shape, dtype=dtype, device="meta")] * ranks)
        sizes = {name: sum(tensor.nbytes for tensor in parts.values()) for name, parts in tensors.items()}
        count = 1 if least_bytes is None else min(mesh.world_size, max(1, sum(sizes.values()) // least_bytes))
        writers = [i * mesh.world_size // count for i in range(count)]
        # of several types the widest first: see `TensorFile`
        order = {name: (-dtype.itemsize, i) for i, (name, (_, dtype)) in enumerate(shards.items())}
        dealt = deal(sizes, holders, writers).items()
        of_rank = {rank: sorted(names, key=order.__getitem__) for rank, names in dealt}
        return cls(tensors, shards, holders, of_rank)

    def sizes(self, rank: int) -> dict[str, int]:
        """Bytes of each of its parameters."""
        return {name: sum(x.nbytes for x in self.tensors[name].values()) for name in self.of_rank[rank]}


def deal(sizes: Mapping[str, int], holders: Mapping[str, Sequence[int]], ranks: Sequence[int]) -> dict[int, list[str]]:
    """What each rank gets: the largest first, each to the one with the least so far of those that hold it, or of all
    where none of them does."""
    loads, dealt = dict.fromkeys(ranks, 0), {rank: list[str]() for rank in ranks}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = min([rank for rank in holders[name] if rank in loads] or ranks, key=loads.__getitem__)
        loads[rank] += sizes[name]
        dealt[rank].append(name)
    return {rank: names for rank, names in dealt.items() if names}


@torch.no_grad()
def whole_tensors(
    mine: Mapping[str, Tensor], table: Table, mesh: ParallelMesh, shares: Shares | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every HF tensor of what is spread over the mesh, whole on one rank. All ranks take part to the end.

    They take turns by parameter, and a rank has its own in hand when the others have theirs, so that whatever they do
    with them they do at the same time.

    Args:
        mine: this rank's `parameters`, or something of their names and shapes, such as gradients.
        shares: None: all of them on the main rank.
    """
    shares = shares or Shares.of(mine, table, mesh)
    for turn in zip_longest(*shares.of_rank.values()):
        found: dict[str, Tensor] = {}
        for rank, name in zip(shares.of_rank, turn, strict=True):
            if name is None:
                continue
            holders = shares.holders[name]
            source = (rank if rank in holders else holders[0]) // mesh.tp * mesh.tp
            shards = mesh.shards_to(rank, mine.get(name), *shares.shards[name], source, table.is_split(name))
            if rank == mesh.rank:
                found = table.export(name, shards)
        yield from found.items()
