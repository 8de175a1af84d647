"""transformer-engine's layers (`model.layers=te`): megatron's own spec of them, and what the engine asks of them.

Its linear layers compute the norm before them, and their weights' gradients are added to the float32 ones within the
product. Parameters have other names there, which the rows of `hf/` know (`hf.weights.parameters`), and the same ones in
a checkpoint: what one kind of layers has saved the other loads. Where transformer-engine is not installed, nothing here
is called.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TELinear, TENorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from ..config import ModelConfig

NORM: Any = TENorm


class NormWithin(IdentityOp):
    """Stands where a layer has its norm, which the projection behind it computes: passes on what it gets, and has that
    norm's parameters for those who look for them here."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear: tuple[Any] = (linear,)  # as a module of its own its parameters would have two names

    @property
    def weight(self) -> Tensor:
        """`(H,)`."""
        return self.linear[0].layer_norm_weight

    @property
    def bias(self) -> Tensor | None:
        """`(H,)`; None of a root-mean-square norm."""
        return self.linear[0].layer_norm_bias

    @property
    def eps(self) -> float:
        return self.linear[0].eps


def settings(model: ModelConfig, fp8: bool) -> dict[str, Any]:
    """What megatron's configuration has besides.

    Args:
        fp8: products of these layers in 8 bits, E4M3 forward and E5M2 of gradients, activations scaled by 128 numbers
            of one token and weights by blocks (DeepSeek-V3, arXiv:2412.19437, section 3.3.2), so that a token's numbers
            do not depend on what is computed beside it.
    """
    # nothing tells the layers of an optimizer's step, so weights in 8 bits are made anew in every forward
    found: dict[str, Any] = {"disable_parameter_transpose_cache": True}
    if model.sliding_window is not None:
        found["window_size"] = (model.sliding_window - 1, 0)  # tokens before this one, and after it
        found["window_attn_skip_freq"] = [int(i >= model.first_sliding_layer) for i in range(model.num_layers)]
    return found | ({"fp8": "hybrid", "fp8_recipe": "blockwise"} if fp8 else {})


def layer_spec(model: ModelConfig, experts: Any) -> ModuleSpec:
    """Megatron's spec of a layer.

    Args:
        experts: spec of a mixture, which is ours, where the model has one.
    """
    if model.num_experts is None:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm)
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=model.num_experts, qk_layernorm=model.qk_norm)
    spec.submodules.mlp = experts
    spec.submodules.sharded_state_dict_keys_map = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return spec


def finish(gpt: GPTModel) -> None:
    """Called once the layers are built."""
    for layer in gpt.decoder.layers:
        layer.input_layernorm = NormWithin(layer.self_attention.linear_qkv)
        if gpt.config.num_moe_experts is None:
            layer.pre_mlp_layernorm = NormWithin(layer.mlp.linear_fc1)
    for module in gpt.modules():
        if isinstance(module, (TELinear, TELayerNormColumnParallelLinear)):
            module.fuse_wgrad_accumulation = True
