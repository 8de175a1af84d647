"""How a model is cut for the mesh, and how many parameters each rank holds. Imports neither torch nor megatron."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import MeshConfig, ModelConfig


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rounded up so that tp divides it. 128 makes every usual tp pad alike, so checkpoints fit any of them."""
    unit = math.lcm(128, tp)
    return (vocab_size + unit - 1) // unit * unit


def stage_layers(num_layers: int, pp: int) -> list[int]:
    """Layers of each pipeline stage: as many as the others, or one more in the middle. The first stage has the
    embedding and most activations, the last one the head."""
    each, more = divmod(num_layers, pp)
    first = (pp - more + 1) // 2
    return [each + (first <= stage < first + more) for stage in range(pp)]


def chunk_layers(num_layers: int, pp: int, virtual_pp: int) -> list[int]:
    """Layers of each chunk of a model in the order of its depth. Stage `i % pp` has the i-th: its `virtual_pp` chunks
    lie apart, so a micro-batch passes through all stages that often (Narayanan et al. 2021, section 2.2)."""
    stages = [stage_layers(layers, virtual_pp) for layers in stage_layers(num_layers, pp)]
    return [stage[chunk] for chunk in range(virtual_pp) for stage in stages]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on one rank. Experts are counted apart: fewer replicas share them."""

    dense: int
    experts: int
    largest: int  # of one tensor

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


def layer_parameters(model: ModelConfig, tp: int, ep: int) -> Parameters:
    """One layer's on a rank, as `models/build.py` builds it."""
    hidden, inner, size = model.hidden_size, model.intermediate_size // tp, model.head_size
    per_norm = 2 if model.norm == "layer" else 1
    queries = model.num_attention_heads * size // tp
    qkv = queries + 2 * model.num_key_value_heads * size // tp
    fc1 = inner * (2 if model.gated_mlp else 1)
    dense = 2 * per_norm * hidden + hidden * qkv + queries * hidden
    dense += (qkv if model.qkv_bias else 0) + (hidden if model.proj_bias else 0)
    dense += 2 * per_norm * size if model.qk_norm else 0
    mlp = hidden * fc1 + inner * hidden + (fc1 + hidden if model.mlp_bias else 0)
    if model.num_experts is None:
        return Parameters(dense + mlp, 0, max(hidden * qkv, hidden * fc1))
    experts = model.num_experts // ep  # in one tensor
    return Parameters(dense + model.num_experts * hidden, experts * mlp, max(hidden * qkv, experts * hidden * fc1))


def rank_parameters(model: ModelConfig, head: str, mesh: MeshConfig, stage: int) -> Parameters:
    """What a rank of pipeline stage `stage` holds of a model with an "lm" or a "scalar" head.

    A tied embedding has a copy on the last stage of a pipeline, which is counted.
    """
    assert model.vocab_size is not None
    hidden, is_last = model.hidden_size, stage == mesh.pp - 1
    layer = layer_parameters(model, mesh.tp, mesh.ep)
    num_layers = stage_layers(model.num_layers, mesh.pp)[stage]
    table = padded_vocab_size(model.vocab_size, mesh.tp) // mesh.tp * hidden
    ends = 0
    if stage == 0:
        ends += table + (model.max_position_embeddings * hidden if model.positions == "learned" else 0)
    if is_last:
        ends += hidden * (2 if model.norm == "layer" else 1)
        if head == "scalar":
            ends += hidden + 1
        elif not model.tie_word_embeddings or mesh.pp > 1:
            ends += table
    largest = max(layer.largest, table if stage == 0 or (is_last and head == "lm") else 0)
    return Parameters(num_layers * layer.dense + ends, num_layers * layer.experts, largest)


def num_parameters(model: ModelConfig, head: str) -> int:
    """Of the whole model, the vocabulary's padding included."""
    return rank_parameters(model, head, MeshConfig(1, 1, 1), 0).total
