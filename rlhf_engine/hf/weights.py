"""HF tensors to this rank's megatron parameters, one row of a table per parameter.

A row knows how its parameter is split over tensor parallel ranks and reads its own slice and nothing else. Layer
numbers stand as `*` on both sides. Where weights come from is a `Source`: an HF folder, or random numbers that
depend on the seed and the tensor's name alone, so that a run from scratch does not depend on the mesh either.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from torch import Tensor

from ..config import ConfigError, ModelConfig
from ..mesh import ParallelMesh


class Source(Protocol):
    """Named HF tensors."""

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Entries [start, stop) of a tensor along `dim`, fewer where it ends before."""
        ...


@dataclass(frozen=True)
class Part:
    """What a row needs to know of the rank that reads it."""

    rank: int
    size: int
    model: ModelConfig

    def range(self, length: int) -> tuple[int, int]:
        step = length // self.size
        return self.rank * step, (self.rank + 1) * step


@dataclass(frozen=True)
class Row:
    """A parameter that every tensor parallel rank holds whole."""

    megatron: str
    hf: str

    def load(self, source: Source, hf: list[str], shape: torch.Size, part: Part) -> Tensor:
        return source.read(hf[0], 0, 0, shape[0])


@dataclass(frozen=True)
class Split(Row):
    """A parameter cut evenly along `dim`; rows of padding, which only a vocabulary has, are zero."""

    dim: int = 0

    def load(self, source: Source, hf: list[str], shape: torch.Size, part: Part) -> Tensor:
        start = part.rank * shape[self.dim]
        found = source.read(hf[0], self.dim, start, start + shape[self.dim])
        if found.shape != shape:
            padded = found.new_zeros(shape)
            padded[: found.shape[0]] = found
            return padded
        return found


@dataclass(frozen=True)
class Gated(Row):
    """Gate and up projections, `hf` names both; a rank holds its part of the one over its part of the other."""

    def load(self, source: Source, hf: list[str], shape: torch.Size, part: Part) -> Tensor:
        start, stop = part.range(part.model.intermediate_size)
        return torch.cat([source.read(name, 0, start, stop) for name in hf])


@dataclass(frozen=True)
class GroupedQKV(Row):
    """Query, key and value projections, `hf` names the three; megatron keeps them by group of query heads:
    [q ... q k v] for each key-value head."""

    def load(self, source: Source, hf: list[str], shape: torch.Size, part: Part) -> Tensor:
        model = part.model
        head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
        groups = model.num_key_value_heads // part.size
        sizes = (model.num_attention_heads * head_dim,) + (model.num_key_value_heads * head_dim,) * 2
        parts = []
        for name, size in zip(hf, sizes, strict=True):
            tensor = source.read(name, 0, *part.range(size))
            parts.append(tensor.reshape(groups, -1, *tensor.shape[1:]))
        return torch.cat(parts, 1).reshape(shape)


# Llama, https://arxiv.org/abs/2307.09288; several HF names in a row are separated by blanks
_LAYER = "model.layers.*."
LLAMA: tuple[Row, ...] = (
    Split("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Row("decoder.layers.*.input_layernorm.weight", _LAYER + "input_layernorm.weight"),
    GroupedQKV(
        "decoder.layers.*.self_attention.linear_qkv.weight",
        " ".join(f"{_LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
    ),
    Split("decoder.layers.*.self_attention.linear_proj.weight", _LAYER + "self_attn.o_proj.weight", dim=1),
    Row("decoder.layers.*.pre_mlp_layernorm.weight", _LAYER + "post_attention_layernorm.weight"),
    Gated("decoder.layers.*.mlp.linear_fc1.weight", f"{_LAYER}mlp.gate_proj.weight {_LAYER}mlp.up_proj.weight"),
    Split("decoder.layers.*.mlp.linear_fc2.weight", _LAYER + "mlp.down_proj.weight", dim=1),
    Row("decoder.final_layernorm.weight", "model.norm.weight"),
    Split("output_layer.weight", "lm_head.weight"),
)


def parameters(gpt: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters of this rank under global names: the layer number counts from the first stage's first layer."""
    for name, parameter in gpt.named_parameters():
        if match := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
            layer = gpt.decoder.layers[int(match[1])].layer_number - 1
            name = f"decoder.layers.{layer}.{match[2]}"
        yield name, parameter


@torch.no_grad()
def load_weights(gpt: GPTModel, model: ModelConfig, mesh: ParallelMesh, source: Source) -> None:
    """Fills this rank's parameters from HF tensors. A scalar head is left as it is.

    Raises:
        ConfigError: the source lacks a tensor or has it in another shape.
    """
    table = {row.megatron: row for row in LLAMA}
    part = Part(mesh.tp_rank, mesh.tp, model)
    for name, parameter in parameters(gpt):
        layer = re.search(r"\.(\d+)\.", name)
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        scalar_head = gpt.post_process and pattern.startswith("output_layer") and not hasattr(
            gpt.output_layer, "output_size_per_partition"
        )  # fmt: skip
        if scalar_head:
            continue
        row = table[pattern]
        hf = [n.replace("*", layer[1] if layer else "") for n in row.hf.split()]
        if hf == ["lm_head.weight"] and model.tie_word_embeddings:
            hf = ["model.embed_tokens.weight"]
        tensor = row.load(source, hf, parameter.shape, part)
        if tensor.shape != parameter.shape:
            raise ConfigError(f"{' + '.join(hf)}: {tuple(tensor.shape)} does not fit {tuple(parameter.shape)}")
        parameter.copy_(tensor)


class HFFolder:
    """The safetensors files of an HF folder; only the slices asked for are read."""

    def __init__(self, folder: str):
        root = Path(folder)
        index = root / "model.safetensors.index.json"
        if index.is_file():
            self.files = {n: root / f for n, f in json.loads(index.read_text())["weight_map"].items()}
        elif (single := root / "model.safetensors").is_file():
            with safe_open(single, "pt") as file:
                self.files = dict.fromkeys(file.keys(), single)
        else:
            raise ConfigError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
        self.folder = folder

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        if name not in self.files:
            raise ConfigError(f"{self.folder} has no tensor {name}")
        if not self.files[name].is_file():
            raise ConfigError(f"{self.folder}: the index names {self.files[name].name}, which is not there")
        with safe_open(self.files[name], "pt") as file:
            tensor = file.get_slice(name)
            size = tensor.get_shape()[dim]
            start, stop = min(start, size), min(stop, size)
            return tensor[start:stop] if dim == 0 else tensor[:, start:stop]


class RandomWeights:
    """Normal weights of standard deviation `init_std`, residual outputs scaled by 1 / sqrt(2 layers) (GPT-2)."""

    def __init__(self, model: ModelConfig, seed: int):
        self.model, self.seed = model, seed
        heads = model.head_dim or model.hidden_size // model.num_attention_heads
        q, kv = model.num_attention_heads * heads, model.num_key_value_heads * heads
        hidden, ffn = model.hidden_size, model.intermediate_size
        assert model.vocab_size is not None
        self.shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens": (model.vocab_size, hidden), "lm_head": (model.vocab_size, hidden),
            "q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q),
            "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn),
        }  # fmt: skip

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        kind = name.split(".")[-2]
        if "norm" in kind:
            return torch.ones(self.model.hidden_size)
        std = self.model.init_std
        if kind in ("o_proj", "down_proj"):
            std /= math.sqrt(2 * self.model.num_layers)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        whole = torch.randn(self.shapes[kind], generator=generator) * std
        return whole[start:stop] if dim == 0 else whole[:, start:stop]
