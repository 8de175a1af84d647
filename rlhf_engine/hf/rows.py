"""Rows of a weight table: how one megatron parameter and its HF tensors become each other.

A row's `split` turns this rank's shard of the parameter into this rank's part of each HF tensor, and `join` is its
inverse. Where those parts stand in the whole HF tensors follows from their shapes (`windows`), so that loading,
exporting, checking shapes and counting parameters all come from one line of a table.

torch is not imported here: tables are read before a run is known to be worth it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Entries [start, stop) along `dim` of the HF tensor `name` of shape `shape`; the whole tensor is one too."""

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """A parameter that is one HF tensor.

    Args:
        megatron: its name; layer and expert numbers stand as `*` on both sides.
        hf: HF names separated by blanks. A name that comes twice holds those parts one after the other.
        dim: axis that tensor parallel ranks split; None: each holds the whole.
        transposed: HF stores `(in, out)` where megatron has `(out, in)`.
    """

    megatron: str
    hf: str
    dim: int | None = None
    transposed: bool = False

    def split(self, shard: Tensor, model: ModelConfig) -> list[Tensor]:
        """A megatron shard to its part of each HF tensor, in the order of `hf`."""
        return [shard]

    def join(self, parts: Sequence[Tensor], shape: Sequence[int], model: ModelConfig) -> Tensor:
        """Inverse of `split`: a megatron shard of `shape`."""
        return parts[0]

    def whole(self, length: int, ranks: int, model: ModelConfig) -> int:
        """Entries of an HF tensor along `dim`, of which each rank has `length`."""
        return length * ranks

    def windows(self, numbers: Sequence[str], shard: Tensor, model: ModelConfig, rank: int, ranks: int) -> list[Window]:
        """Where the results of `split` stand in whole HF tensors.

        Args:
            numbers: of the layer and the expert, in the place of each `*`.
            shard: only its shape matters, so it may be on the meta device.
        """
        parts = self.split(shard, model)
        names = [fill(name, numbers) for name in self.hf.split()]
        dim = self.dim or 0
        lengths = [part.shape[dim] if self.dim is None else self.whole(part.shape[dim], ranks, model) for part in parts]
        found = []
        for i, (name, part) in enumerate(zip(names, parts, strict=True)):
            before = sum(lengths[j] for j in range(i) if names[j] == name)
            total = sum(length for other, length in zip(names, lengths, strict=True) if other == name)
            first = 0 if self.dim is None else min(rank * part.shape[dim], lengths[i])
            last = min(first + part.shape[dim], lengths[i])
            shape = [total if axis == dim else size for axis, size in enumerate(part.shape)]
            if self.transposed:
                shape.reverse()
            hf_dim = len(shape) - 1 - dim if self.transposed else dim
            found.append(Window(name, tuple(shape), hf_dim, before + first, before + last))
        return found


@dataclass(frozen=True)
class Vocabulary(Row):
    """Embeddings and LM heads; megatron's are padded to a size that the ranks divide, by zeros."""

    dim: int | None = 0

    def join(self, parts: Sequence[Tensor], shape: Sequence[int], model: ModelConfig) -> Tensor:
        if len(parts[0]) == shape[0]:
            return parts[0]
        padded = parts[0].new_zeros(tuple(shape))
        padded[: len(parts[0])] = parts[0]
        return padded

    def whole(self, length: int, ranks: int, model: ModelConfig) -> int:
        assert model.vocab_size is not None
        return model.vocab_size


@dataclass(frozen=True)
class Gated(Row):
    """Gate and up projections: a rank holds its part of the one over its part of the other."""

    dim: int | None = 0

    def split(self, shard: Tensor, model: ModelConfig) -> list[Tensor]:
        return list(shard.chunk(2))

    def join(self, parts: Sequence[Tensor], shape: Sequence[int], model: ModelConfig) -> Tensor:
        return concatenate(parts, 0)


@dataclass(frozen=True)
class GroupedQKV(Row):
    """Query, key and value projections. Megatron keeps them by key-value head: [q ... q k v] for each."""

    dim: int | None = 0

    def split(self, shard: Tensor, model: ModelConfig) -> list[Tensor]:
        queries = model.num_attention_heads // model.num_key_value_heads
        groups = shard.reshape(-1, queries + 2, model.head_size, *shard.shape[1:])
        return [part.reshape(-1, *shard.shape[1:]) for part in (groups[:, :queries], groups[:, queries], groups[:, -1])]

    def join(self, parts: Sequence[Tensor], shape: Sequence[int], model: ModelConfig) -> Tensor:
        groups = len(parts[1]) // model.head_size
        return concatenate([part.reshape(groups, -1, *part.shape[1:]) for part in parts], 1).reshape(tuple(shape))


def fill(pattern: str, numbers: Sequence[str]) -> str:
    """`pattern` with each `*` replaced by the next number."""
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def concatenate(parts: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat: parts of several types make one of the type that holds all their numbers."""
    shape = list(parts[0].shape)
    sizes = [part.shape[dim] for part in parts]
    shape[dim] = sum(sizes)
    widest = functools.reduce(operator.add, (part.new_zeros(()) for part in parts)).dtype
    whole = parts[0].new_empty(shape, dtype=widest)
    for part, place in zip(parts, whole.split(sizes, dim), strict=True):
        place.copy_(part)
    return whole


# -- rows that many architectures share ------------------------------------------------------------------------

LAYER = "decoder.layers.*."


def norm(megatron: str, hf: str, bias: bool = False) -> list[Row]:
    """Weight and, with `bias`, bias of a norm, the same on all ranks."""
    return [Row(f"{megatron}.{x}", f"{hf}.{x}") for x in (("weight", "bias") if bias else ("weight",))]


def linear(row: type[Row], megatron: str, hf: str, transposed: bool = False) -> list[Row]:
    """Weight and bias of a projection whose output features are split over the ranks."""
    names = {x: " ".join(f"{name}.{x}" for name in hf.split()) for x in ("weight", "bias")}
    return [
        row(f"{megatron}.weight", names["weight"], 0, transposed),
        row(f"{megatron}.bias", names["bias"], 0),
    ]


def row_linear(megatron: str, hf: str, transposed: bool = False) -> list[Row]:
    """Weight and bias of a projection whose input features are split; every rank holds the bias."""
    return [Row(f"{megatron}.weight", f"{hf}.weight", 1, transposed), Row(f"{megatron}.bias", f"{hf}.bias")]
