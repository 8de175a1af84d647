"""Megatron parameters from HF tensors and back, by the rows of an architecture's table.

Where weights come from is a `Source`: an HF folder, or random numbers that depend on the seed and the tensor's name
alone, so that a run from scratch does not depend on the mesh either.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ..config import ConfigError, ModelConfig
from ..mesh import ParallelMesh
from .config import ARCHITECTURES, Head
from .files import HFFolder
from .index import SCORE_BIAS, Entry, lm_head
from .rows import Row, Window


class Source(Protocol):
    """Named HF tensors."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, window: Window) -> Tensor:
        """The part of a tensor that `window` names."""
        ...


@dataclass(frozen=True)
class Table:
    """An architecture's rows by megatron name, with the head that a model has."""

    model: ModelConfig
    head: Head

    def row(self, name: str) -> tuple[Row, list[str]]:
        """The row of a parameter, and the numbers of its layer and its expert.

        Raises:
            ConfigError: the architecture has no such parameter.
        """
        architecture = ARCHITECTURES[self.model.architecture]
        numbers = re.findall(r"\.(\d+)\.", name)
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        if self.head == "scalar" and pattern == "output_layer.weight":
            return Row(pattern, architecture.score), []
        if self.head == "scalar" and pattern == "output_layer.bias":
            return Row(pattern, SCORE_BIAS), []
        if pattern == "output_layer.weight" and self.model.tie_word_embeddings:
            pattern = "embedding.word_embeddings.weight"
        for row in architecture.rows:
            if row.megatron == pattern:
                return row, numbers
        raise ConfigError(f"{architecture.name} has no parameter {pattern}")

    def load(self, name: str, shape: torch.Size, source: Source, rank: int, ranks: int) -> Tensor | None:
        """The shard of a parameter; None for a scalar head that the source does not have."""
        row, numbers = self.row(name)
        shard = torch.empty(shape, device="meta")
        windows = row.windows(numbers, shard, self.model, rank, ranks)
        if self.head == "scalar" and name.startswith("output_layer") and windows[0].name not in source:
            return None
        parts = [source.read(window) for window in windows]
        return row.join([part.t() for part in parts] if row.transposed else parts, shape, self.model)

    def export(self, name: str, shards: list[Tensor]) -> dict[str, Tensor]:
        """Whole HF tensors from every tensor parallel rank's shard of a parameter."""
        row, numbers = self.row(name)
        found: dict[str, Tensor] = {}
        for rank, shard in enumerate(shards):
            windows = row.windows(numbers, shard, self.model, rank, len(shards))
            for window, part in zip(windows, row.split(shard, self.model), strict=True):
                whole = found.setdefault(window.name, part.new_empty(window.shape))
                part = part.t() if row.transposed else part
                length = window.stop - window.start
                whole.narrow(window.dim, window.start, length).copy_(part.narrow(window.dim, 0, length))
        return found

    def is_split(self, name: str) -> bool:
        """Whether tensor parallel ranks have different parts of a parameter."""
        return self.row(name)[0].dim is not None

    def is_copy(self, name: str) -> bool:
        """Whether a parameter is the last pipeline stage's copy of a tied embedding."""
        return self.head == "lm" and self.model.tie_word_embeddings and name == "output_layer.weight"


def parameters(chunks: Iterable[GPTModel]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a rank's chunks of a model under global names: layers count from the model's first, experts from
    the first rank's, and norms that transformer-engine fuses into the projection behind them have names of their own.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield from globally(chunk, name, parameter)


def globally(chunk: GPTModel, name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter of a chunk under its global name, or where a layer's experts are one tensor, each of them under its
    own: a view of it, with its part of the gradient."""
    if match := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
        layer = chunk.decoder.layers[int(match[1])]
        name = f"decoder.layers.{layer.layer_number - 1}.{match[2]}"
        if match := re.match(r"(.*\.experts)\.weight(\d)", name):
            for i, number in enumerate(layer.mlp.local_expert_indices):
                expert = parameter.data[i]
                gradient = getattr(parameter, "main_grad", None)
                if gradient is not None and gradient.untyped_storage().size():  # it comes and goes
                    expert.main_grad = gradient[i]  # type: ignore[attr-defined]
                yield f"{match[1]}.local_experts.{number}.linear_fc{match[2]}.weight", expert
            return
    name = re.sub(r"self_attention\.linear_qkv\.layer_norm_(\w+)", r"input_layernorm.\1", name)
    name = re.sub(r"mlp\.linear_fc1\.layer_norm_(\w+)", r"pre_mlp_layernorm.\1", name)
    yield name, parameter


@torch.no_grad()
def load_weights(
    chunks: Iterable[GPTModel], model: ModelConfig, head: Head, mesh: ParallelMesh, source: Source
) -> None:
    """Fills this rank's parameters from HF tensors. A scalar head that the source lacks stays as it is.

    Raises:
        ConfigError: on every rank, if one of them finds a tensor absent, of another shape, not finite, or left over.
    """
    table, used, error = Table(model, head), set(), None
    try:
        for name, parameter in parameters(chunks):
            tensor = table.load(name, parameter.shape, source, mesh.tp_rank, mesh.tp)
            row, numbers = table.row(name)
            used |= {w.name for w in row.windows(numbers, parameter, model, 0, mesh.tp)}
            if tensor is not None:
                parameter.copy_(tensor)
    except ConfigError as found:
        error = str(found)
    for said in filter(None, mesh.all_gather_object(error)):
        raise ConfigError(said)
    if isinstance(source, HFFolder):
        names = sorted(source.tensors)
        is_used = mesh.any_rank(torch.tensor([name in used for name in names], device=mesh.device))
        check_leftover(source, model, {name for name, found in zip(names, is_used, strict=True) if found})


def check_leftover(source: HFFolder, model: ModelConfig, used: set[str]) -> None:
    """Refuses tensors that nothing was made of: a bias left out gives results that are only a little wrong.

    Raises:
        ConfigError: names the first of them.
    """
    architecture = ARCHITECTURES[model.architecture]
    heads = {lm_head(architecture)[0], architecture.score, SCORE_BIAS}  # of a kind that this role may not have
    for entry in leftover(source, model, used | heads):
        raise ConfigError(f"{entry.path}: tensor {entry.name} has no place in a {architecture.name} model")


def leftover(source: HFFolder, model: ModelConfig, used: set[str]) -> list[Entry]:
    """Tensors of a folder that hold something learned and are none of these."""
    ignored = ARCHITECTURES[model.architecture].ignored
    names = sorted(source.tensors.keys() - used)
    return [source.tensors[name] for name in names if not re.fullmatch(ignored, name)]


@dataclass(frozen=True)
class Difference:
    name: str
    what: str


def compare(tensors: Iterable[tuple[str, Tensor]], source: Source) -> tuple[int, list[Difference]]:
    """How many whole HF tensors of a model equal those of their source bit for bit, and which do not."""
    equal, found = 0, []
    for name, tensor in tensors:
        if name not in source:
            found.append(Difference(name, "is not in the source"))
            continue
        wanted = source.read(Window(name, tuple(tensor.shape), 0, 0, len(tensor)))
        tensor = tensor.cpu()
        if wanted.dtype == tensor.dtype and torch.equal(wanted, tensor):
            equal += 1
        elif wanted.dtype != tensor.dtype and torch.equal(wanted.to(tensor.dtype), tensor):
            found.append(Difference(name, f"is {tensor.dtype} for {wanted.dtype}, otherwise equal"))
        else:
            gap = float((wanted.double() - tensor.double()).abs().max())
            found.append(Difference(name, f"differs by up to {gap:.3g}"))
    return equal, found


class RandomWeights:
    """Normal weights of standard deviation `init_std`, residual outputs scaled by 1 / sqrt(2 layers) (GPT-2)."""

    def __init__(self, model: ModelConfig, seed: int):
        self.model, self.seed = model, seed

    def __contains__(self, name: str) -> bool:
        return name not in (SCORE_BIAS, ARCHITECTURES[self.model.architecture].score)

    def read(self, window: Window) -> Tensor:
        name, shape = window.name, window.shape
        if name.endswith(".bias"):
            whole = torch.zeros(shape)
        elif len(shape) == 1:
            whole = torch.ones(shape)
        else:
            std = self.model.init_std
            if name.split(".")[-2] in ("o_proj", "down_proj", "wo", "w2", "c_proj"):
                std /= math.sqrt(2 * self.model.num_layers)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
            whole = torch.randn(shape, generator=generator) * std
        return whole.narrow(window.dim, window.start, window.stop - window.start)
