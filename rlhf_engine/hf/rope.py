"""Rotary settings of config.json: where each stands, and what stands for one that is missing, is as in transformers 5
(`RotaryEmbeddingConfigMixin`): its own defaults, or a refusal where it has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ConfigError

ROPE_SETTINGS = ("rope_scaling", "rope_parameters")
# what each kind is computed from
_KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# transformers passes over those that belong to another kind
_OF_OTHER_KINDS = {
    *_KINDS["llama3"], "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "short_factor", "long_factor", "finetuned",
}  # fmt: skip


def plain_rope(hf: dict[str, Any], default_theta: float, where: str) -> dict[str, Any]:
    """Leaves `rope_theta`, and `rope_scaling` (None, or its `rope_type` and what that is computed from), in place.

    transformers 5 writes `rope_parameters` with everything in it, others `rope_theta` and `rope_scaling`, with `type`
    or `rope_type`.

    Returns:
        Settings that are not understood.

    Raises:
        ConfigError: a kind that is not computed here, or one that lacks a setting.
    """
    parameters = hf.pop("rope_parameters", None)
    scaling = hf.get("rope_scaling") or parameters or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"{where}: rope_scaling={scaling!r} is not an object")
    scaling = {key: value for key, value in scaling.items() if value is not None}
    if nested := [key for key, value in scaling.items() if isinstance(value, Mapping)]:
        raise ConfigError(f"{where}: rope_parameters of their own for {', '.join(nested)} are not supported")
    theta = scaling.pop("rope_theta", None) or hf.get("rope_theta") or default_theta
    original = hf.pop("original_max_position_embeddings", None)
    old_kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", old_kind)
    if kind not in _KINDS:
        raise ConfigError(f"{where}: rope_scaling.rope_type={kind} is not computed here, only {', '.join(_KINDS)}")
    if (partial := scaling.pop("partial_rotary_factor", None)) is not None:
        hf["partial_rotary_factor"] = partial
    if kind == "llama3":
        scaling.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
        if original is not None:
            scaling["original_max_position_embeddings"] = original
    if missing := [key for key in _KINDS[kind] if scaling.get(key) is None]:
        raise ConfigError(f"{where}: rope_scaling of rope_type={kind} lacks {', '.join(missing)}")
    hf["rope_theta"] = theta
    hf["rope_scaling"] = None if kind == "default" else {"rope_type": kind} | {k: scaling[k] for k in _KINDS[kind]}
    return {key: value for key, value in scaling.items() if key not in _OF_OTHER_KINDS}
