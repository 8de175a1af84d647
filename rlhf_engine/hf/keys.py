"""Keys of config.json that change no number here, whatever the family."""

from __future__ import annotations

from typing import Any

# Whatever their value: names of tools, tokens and types, what transformers' `generate` reads, dropout (no role has it),
# and losses of pre-training.
IRRELEVANT = frozenset({
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map", "name_or_path",
    "attn_implementation", "experts_implementation", "use_cache", "use_flash_attn", "use_flash_attention",
    "use_flash_attention_2", "flash_attn", "fp16", "bf16", "fp32", "use_bfloat16", "torchscript", "onnx_safe",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
    "decoder_start_token_id", "bos_token", "eos_token", "pad_token", "unk_token", "tokenizer_class",
    "tokenizer_vocab_size", "tokenizer_type", "model_max_length", "max_sequence_length", "seq_length", "n_ctx",
    "initializer_range", "initializer_factor", "init_std", "pretraining_tp", "gradient_checkpointing",
    "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "prefix", "output_attentions", "output_hidden_states", "output_past", "return_dict",
    "use_return_dict",  "tie_last_hidden_states", "tf_legacy_loss", "is_decoder", "is_llama_config",
    "num_key_value_groups", "layer_norm_eps", "max_window_layers", "score_bias", "value_head_prefix",
    "transformers.js_config", "neftune_noise_alpha", "multiple_of", "ffn_dim_multiplier", "norm_eps", "max_seq_len",
    "predict_special_tokens", "n_special", "license", "language", "tags", "base_model", "base_model_name_or_path",
    "model_name", "logits_to_keep", "num_logits_to_keep",
    # of `generate`
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "renormalize_logits", "cache_implementation",
    # dropout and losses
    "attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "attn_dropout",
    "attn_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout_prob", "resid_dropout", "embd_dropout",
    "emb_dropout_prob", "residual_dropout", "embedding_dropout", "classifier_dropout", "classifier_dropout_prob",
    "router_aux_loss_coef", "router_z_loss_coef", "output_router_logits", "aux_loss_alpha", "seq_aux", "z_loss",
})  # fmt: skip
_IRRELEVANT_PREFIXES = ("_", "unsloth_")

# Those that would change something, and the values with which they do not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "rope_interleaved", "use_sliding_window",
         "attention_bias", "mlp_bias", "bias", "qkv_bias", "lm_head_bias", "use_qk_norm", "qk_norm", "qk_layernorm",
         "alibi", "use_alibi", "use_mrope", "use_dynamic_ntk", "use_logn_attn", "parallel_attn",
         "use_parallel_residual", "scale_embedding", "use_bidirectional_attention"),
        (False,),
    ),
    **dict.fromkeys(("is_causal", "causal", "rms_norm", "use_rmsnorm"), (True,)),
    **dict.fromkeys(
        ("partial_rotary_factor", "rotary_pct", "rope_ratio", "logit_scale", "logits_scaling", "residual_multiplier",
         "embedding_multiplier"),
        (1,),
    ),
    "hidden_activation": ("silu", "swish"),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "num_nextn_predict_layers": (0,),
    "router_jitter_noise": (0,),
}  # fmt: skip


def changes_nothing(key: str, value: Any) -> bool:
    """Whether a model is the same without this setting."""
    if value is None or key in IRRELEVANT or key.startswith(_IRRELEVANT_PREFIXES):
        return True
    return value in HARMLESS.get(key, ())
