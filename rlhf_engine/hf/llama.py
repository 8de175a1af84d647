"""Llama 2, 3 and 3.x (arXiv:2307.09288, arXiv:2407.21783), and what is built like them: SmolLM, Yi, DeepSeek-LLM."""

from __future__ import annotations

from .architecture import Architecture
from .rows import LAYER, Gated, GroupedQKV, Vocabulary, linear, norm, row_linear

HF = "model.layers.*."

KEYS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048}

EMBEDDING = (
    Vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    *norm("decoder.final_layernorm", "model.norm"),
    Vocabulary("output_layer.weight", "lm_head.weight"),
)
ATTENTION = (
    *norm(f"{LAYER}input_layernorm", f"{HF}input_layernorm"),
    *linear(GroupedQKV, f"{LAYER}self_attention.linear_qkv", " ".join(f"{HF}self_attn.{x}_proj" for x in "qkv")),
    *row_linear(f"{LAYER}self_attention.linear_proj", f"{HF}self_attn.o_proj"),
    *norm(f"{LAYER}pre_mlp_layernorm", f"{HF}post_attention_layernorm"),
)
MLP = (
    *linear(Gated, f"{LAYER}mlp.linear_fc1", f"{HF}mlp.gate_proj {HF}mlp.up_proj"),
    *row_linear(f"{LAYER}mlp.linear_fc2", f"{HF}mlp.down_proj"),
)

LLAMA = Architecture(
    name="llama",
    lm="LlamaForCausalLM",
    scalar="LlamaForSequenceClassification",
    keys=KEYS | {"attention_bias": "qkv_bias proj_bias", "mlp_bias": "mlp_bias"},
    defaults=DEFAULTS,
    constants={"hidden_act": "silu"},
    rows=(*EMBEDDING, *ATTENTION, *MLP),
)
