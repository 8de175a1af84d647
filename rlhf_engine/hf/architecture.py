"""What an architecture is to us: a config table, a weight table, and what else makes it itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .rows import Row


@dataclass(frozen=True)
class Architecture:
    """One family of HF models.

    Args:
        name: HF's `model_type`, and ModelConfig.architecture.
        lm, scalar: HF classes with an LM head and with one score.
        keys: HF config key to the ModelConfig fields (separated by blanks) that it sets.
        rows: every parameter the family may have; a model without biases has no use for their rows.
        defaults: HF's own values of keys that config.json leaves out.
        constants: keys that change the mathematics, and the one value of each that we compute.
        fields: ModelConfig fields that the family sets without a key.
        irrelevant: keys that change nothing here, besides those common to all families.
        normalize: rewrites odd keys into plain ones, in place, before anything is read.
        score: HF name of the scalar head's weight.
        ignored: regular expression of tensors that hold nothing learned.
    """

    name: str
    lm: str
    scalar: str
    keys: Mapping[str, str]
    rows: tuple[Row, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    irrelevant: frozenset[str] = frozenset()
    normalize: Callable[[dict[str, Any]], None] = lambda hf: None
    score: str = "score.weight"
    ignored: str = r".*rotary_emb\.inv_freq"
