"""InternLM2 and 2.5 (arXiv:2403.17297): Llama under other names, query, key and value already in megatron's groups."""

from __future__ import annotations

from .architecture import Architecture
from .llama import DEFAULTS, KEYS
from .rows import LAYER, Gated, Row, Vocabulary, linear, norm, row_linear

HF = "model.layers.*."

INTERNLM2 = Architecture(
    name="internlm2",
    lm="InternLM2ForCausalLM",
    scalar="InternLM2ForRewardModel",
    score="v_head.weight",
    keys=KEYS | {"bias": "qkv_bias proj_bias", "reward_token_id": "score_token"},
    defaults=DEFAULTS | {"bias": True},
    constants={"hidden_act": "silu"},
    rows=(
        Vocabulary("embedding.word_embeddings.weight", "model.tok_embeddings.weight"),
        *norm(f"{LAYER}input_layernorm", f"{HF}attention_norm"),
        *linear(Row, f"{LAYER}self_attention.linear_qkv", f"{HF}attention.wqkv"),
        *row_linear(f"{LAYER}self_attention.linear_proj", f"{HF}attention.wo"),
        *norm(f"{LAYER}pre_mlp_layernorm", f"{HF}ffn_norm"),
        *linear(Gated, f"{LAYER}mlp.linear_fc1", f"{HF}feed_forward.w1 {HF}feed_forward.w3"),
        *row_linear(f"{LAYER}mlp.linear_fc2", f"{HF}feed_forward.w2"),
        *norm("decoder.final_layernorm", "model.norm"),
        Vocabulary("output_layer.weight", "output.weight"),
    ),
)
