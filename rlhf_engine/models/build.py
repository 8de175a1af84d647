"""ModelConfig and mesh to megatron's GPTModel: this rank's part of it, weights not yet filled."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

from ..config import ModelConfig, Recompute
from ..cpu import cuda_calls_stay
from ..hf.config import Head
from ..mesh import ParallelMesh
from . import te
from .balance import Router
from .experts import Dispatcher, GroupedExperts
from .layers import (
    CoreAttention,
    LayerNorm,
    LMHead,
    RMSNorm,
    Rotary,
    ScalarHead,
    SwiGLU,
    scaled_frequencies,
    without_bias,
)
from .partition import chunk_layers, padded_vocab_size

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # 0.16 asks whether it is None without having defined it
_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


def transformer_config(
    model: ModelConfig, mesh: ParallelMesh, dtype: torch.dtype, folded: bool = False, recompute: Recompute = "none",
    fp8: bool = False,
) -> TransformerConfig:  # fmt: skip
    """Megatron's configuration of `model` on `mesh`.

    Args:
        folded: the whole depth and all experts on one rank and no sequence parallelism, for generation under
            pipelines or expert parallelism.
        recompute: what backward computes again.
        fp8: see `te.settings`.
    """
    pp = 1 if folded else mesh.pp
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.intermediate_size,
        normalization="RMSNorm" if model.norm == "rms" else "LayerNorm",
        layernorm_epsilon=model.rms_norm_eps,
        qk_layernorm=model.qk_norm,
        activation_func=_ACTIVATIONS[model.activation],
        gated_linear_unit=model.gated_mlp,
        add_bias_linear=model.proj_bias or model.mlp_bias,
        add_qkv_bias=model.qkv_bias,
        # no dropout in any role: the first ratio of an update must be exactly 1
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=pp,
        pipeline_model_parallel_layout=_pipeline_layout(model, mesh) if pp > 1 else None,
        sequence_parallel=mesh.config.sequence_parallel and not folded,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,  # weights always come from a source that does not know the mesh
        # gradients are divided by the token count of the whole minibatch, in `finalize_model_grads`
        calculate_per_token_loss=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # see `optim.accumulate_in_products`
        apply_rope_fusion=model.positions == "rotary",
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        **(_experts(model, mesh, folded) if model.num_experts is not None else {}),
        **(te.settings(model, fp8) if model.layers == "te" else {}),
    )


def _experts(model: ModelConfig, mesh: ParallelMesh, folded: bool) -> dict[str, Any]:
    return dict(
        num_moe_experts=model.num_experts,
        moe_ffn_hidden_size=model.intermediate_size,
        moe_router_topk=model.experts_per_token,
        # a softmax over the chosen experts is a softmax over all of them, its weights made to add up to 1
        moe_router_pre_softmax=not model.normalize_experts,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",  # as the sampler's: whom bfloat16 chooses, its last digit decides
        moe_token_dispatcher_type="allgather",  # which `Dispatcher` replaces
        moe_grouped_gemm=False,
        expert_model_parallel_size=1 if folded else mesh.ep,
        expert_tensor_parallel_size=mesh.tp,
    )


def _pipeline_layout(model: ModelConfig, mesh: ParallelMesh) -> list[list[str]]:
    """Layers of each chunk, and what the first and the last have besides, as megatron wants to be told."""
    chunks = [["decoder"] * layers for layers in chunk_layers(model.num_layers, mesh.pp, mesh.virtual_pp)]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]


def build_model(
    model: ModelConfig,
    mesh: ParallelMesh,
    head: Head,
    dtype: torch.dtype,
    chunk: int = 0,
    folded: bool = False,
    recompute: Recompute = "none",
    fp8: bool = False,
) -> GPTModel:
    """A chunk of this rank's part of the model, its weights allocated and not filled.

    Args:
        head: "lm" gives hidden states `(B, S, H)` (under sequence parallelism this rank's part of S), "scalar" gives
            `(B, S, 1)` in float32.
        chunk: of this rank's `mesh.virtual_pp`.
        folded, recompute, fp8: see `transformer_config`.
    """
    assert model.vocab_size is not None
    config = transformer_config(model, mesh, dtype, folded, recompute, fp8)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if folded:
        groups.pp = groups.ep = mesh.self_group
        groups.tp_ep = groups.expt_tp = mesh.tp_group
    norm: type = te.NORM if model.layers == "te" else {"rms": RMSNorm, "layer": LayerNorm}[model.norm]
    spec = _layer_spec(model, norm)
    num_layers = get_num_layers_to_build(config, chunk, 0 if folded else mesh.pp_rank)
    with cuda_calls_stay(mesh.device):
        gpt = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm),
            vocab_size=padded_vocab_size(model.vocab_size, mesh.tp),
            max_sequence_length=model.max_position_embeddings,
            pre_process=folded or (mesh.is_first_stage and chunk == 0),
            post_process=folded or (mesh.is_last_stage and chunk == mesh.virtual_pp - 1),
            share_embeddings_and_output_weights=model.tie_word_embeddings and head == "lm",
            position_embedding_type="rope" if model.positions == "rotary" else "learned_absolute",
            rotary_base=model.rope_theta,  # type: ignore[arg-type]
            pg_collection=groups,
            vp_stage=chunk,
        )
    if model.rope_scaling is not None:
        gpt.rotary_pos_emb.inv_freq = scaled_frequencies(gpt.rotary_pos_emb.inv_freq, model.rope_scaling)
    # of what megatron builds, here and below, the forward alone is another
    if model.positions == "rotary":
        gpt.rotary_pos_emb.__class__, gpt.rotary_pos_emb.dtype = Rotary, dtype
    if model.positions == "learned" and gpt.pre_process:
        table = gpt.embedding.position_embeddings.weight  # megatron leaves it in float32
        table.data = table.data.to(dtype=dtype)
    if model.layers == "te":
        te.finish(gpt)
    for block in gpt.decoder.layers:
        if model.num_experts is not None:
            block.mlp.token_dispatcher.__class__ = Dispatcher  # of which megatron knows no name
        slides = block.layer_number > model.first_sliding_layer
        block.self_attention.core_attention.window = model.sliding_window if slides else None
        if type(block.mlp) is MLP and model.gated_mlp and model.activation == "silu":
            block.mlp.__class__ = SwiGLU
    if head == "lm" and gpt.post_process:
        gpt.output_layer.__class__ = LMHead
    if head == "scalar" and gpt.post_process:
        gpt.output_layer = ScalarHead(config, mesh.tp_group)
    for tensor in itertools.chain(gpt.parameters(), gpt.buffers()):
        tensor.data = tensor.data.to(device=mesh.device)  # megatron makes some on the CPU: positions, experts' routers
    _mark_parameters(gpt)
    return gpt


class _MetaFactories(TorchFunctionMode):
    """Takes every named device for the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Within it models are built without memory for their weights."""
    with torch.device("meta"), _MetaFactories():
        yield


def _layer_spec(model: ModelConfig, norm: type) -> ModuleSpec:
    """Megatron's local layer with our norms and our attention, or its layer of transformer-engine's parts; biases where
    the model has them."""
    spec = get_gpt_layer_local_spec(
        num_experts=model.num_experts, moe_grouped_gemm=False, qk_layernorm=model.qk_norm, normalization="RMSNorm"
    )
    if model.layers == "te":
        spec = te.layer_spec(model, spec.submodules.mlp)
    layer = spec.submodules
    attention = layer.self_attention.submodules
    if model.layers == "own":
        layer.input_layernorm = layer.pre_mlp_layernorm = norm
        attention.core_attention = CoreAttention
        if model.qk_norm:
            attention.q_layernorm = attention.k_layernorm = norm
    if not model.qkv_bias:
        attention.linear_qkv = without_bias(attention.linear_qkv)
    if not model.proj_bias:
        attention.linear_proj = without_bias(attention.linear_proj)
    mlp = layer.mlp.keywords["submodules"] if isinstance(layer.mlp, functools.partial) else layer.mlp.submodules
    if model.num_experts is not None:
        mlp.experts, mlp.router = GroupedExperts, Router
    elif not model.mlp_bias:
        mlp.linear_fc1, mlp.linear_fc2 = without_bias(mlp.linear_fc1), without_bias(mlp.linear_fc2)
    return spec


def _mark_parameters(gpt: GPTModel) -> None:
    """Marks what is split over tensor parallel ranks. Megatron does so while it draws initial weights, which we
    do not ask of it; unmarked, the gradient norm would count the first rank's shard alone."""
    for module in gpt.modules():
        if isinstance(module, RowParallelLinear):
            split = [(module.weight, 1)]
        elif isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            split = [(module.weight, 0), (getattr(module, "bias", None), 0)]
        else:
            continue
        for parameter, dim in split:
            if parameter is not None and not getattr(parameter, "tensor_model_parallel", False):
                for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                    if hasattr(parameter, name):
                        delattr(parameter, name)
                set_tensor_model_parallel_attributes(parameter, True, dim, 1)
