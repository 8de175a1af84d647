"""HF `config.json` to ModelConfig. Standard library alone, so that a run is refused before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import ConfigError, ModelConfig, nearest

# HF key to ours
_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
# Keys that change the mathematics, and the one value of each that we compute.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "sliding_window": None,
}
_ARCHITECTURES = ("LlamaForCausalLM",)


def read_model_config(folder: str) -> ModelConfig:
    """The architecture of an HF folder.

    Raises:
        ConfigError: no such folder, an architecture that is not known, or a setting that is not computed here.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"policy.path={folder} has no config.json: name a folder in HF format")
    try:
        hf = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    architecture = (hf.get("architectures") or [""])[0]
    if architecture not in _ARCHITECTURES:
        raise ConfigError(f"{path}: architecture {architecture!r} is unknown: {nearest(architecture, _ARCHITECTURES)}")
    for key, value in _REQUIRED.items():
        if hf.get(key, value) != value:
            raise ConfigError(f"{path}: {key}={hf[key]!r} is not supported, only {value!r}")
    if "num_key_value_heads" not in hf:
        hf["num_key_value_heads"] = hf["num_attention_heads"]
    hf.setdefault("tie_word_embeddings", False)
    found = {ours: hf[key] for key, ours in _FIELDS.items() if hf.get(key) is not None}
    return ModelConfig(**found)
