"""GPT-2: LayerNorm, biases everywhere, learned positions, a plain MLP, and weights stored `(in, out)`."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture
from .rows import LAYER, GroupedQKV, Row, Vocabulary, linear, norm, row_linear

HF = "transformer.h.*."

IRRELEVANT = frozenset({
    "attn_pdrop", "resid_pdrop", "embd_pdrop", "n_ctx", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj",
})  # fmt: skip


def mlp_size(hf: dict[str, Any]) -> None:
    """Fills in the MLP's size, which GPT-2 leaves out where it is four times the model's."""
    if hf.get("n_inner") is None and isinstance(hf.get("n_embd"), int):
        hf["n_inner"] = 4 * hf["n_embd"]


GPT2 = Architecture(
    name="gpt2",
    lm="GPT2LMHeadModel",
    scalar="GPT2ForSequenceClassification",
    keys={
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "activation",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    defaults={
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
    constants={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    fields={
        "positions": "learned",
        "norm": "layer",
        "gated_mlp": False,
        "qkv_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
    },
    irrelevant=IRRELEVANT,
    normalize=mlp_size,
    ignored=r".*\.attn\.(masked_)?bias",
    rows=(
        Vocabulary("embedding.word_embeddings.weight", "transformer.wte.weight"),
        Row("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        *norm(f"{LAYER}input_layernorm", f"{HF}ln_1", bias=True),
        # one tensor holds queries, keys and values one after the other
        *linear(GroupedQKV, f"{LAYER}self_attention.linear_qkv", " ".join([f"{HF}attn.c_attn"] * 3), transposed=True),
        *row_linear(f"{LAYER}self_attention.linear_proj", f"{HF}attn.c_proj", transposed=True),
        *norm(f"{LAYER}pre_mlp_layernorm", f"{HF}ln_2", bias=True),
        *linear(Row, f"{LAYER}mlp.linear_fc1", f"{HF}mlp.c_fc", transposed=True),
        *row_linear(f"{LAYER}mlp.linear_fc2", f"{HF}mlp.c_proj", transposed=True),
        *norm("decoder.final_layernorm", "transformer.ln_f", bias=True),
        Vocabulary("output_layer.weight", "lm_head.weight"),
    ),
)
