"""Plain values made into a configuration: names, types and bounds."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar

NEEDED = "<needed>"  # in conf/, what an experiment asks of its user
_LONGEST_LINE = 1500  # characters of an error


class ConfigError(ValueError):
    """A run that cannot start, in one line for its user, whatever of theirs the message quotes."""

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
        super().__init__(line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…")


def size(default: int) -> Any:
    """A field that may be null until `sizes.settle` has filled it in, before anything reads it."""
    return field(default=default, metadata={"is_size": True})


# The least value of a number, by the last part of its key; the others may have any.
_AT_LEAST: dict[str, float] = {
    **dict.fromkeys(
        ("batch_size", "micro_batch_size", "save_every", "keep_last", "keep_every", "num_rows", "num_eval_rows",
         "max_seq_len", "max_prompt_len", "min_prompt_len", "prompts_per_iteration", "samples_per_prompt", "epochs",
         "num_minibatches", "eval_prompts", "max_new_tokens", "micro_batch_tokens", "rows", "slots", "kv_tokens",
         "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim",
         "vocab_size", "max_position_embeddings", "max_bad_steps", "tp", "pp", "dp", "ep", "virtual_pp", "world",
         "prompt_tokens", "response_tokens", "measure_gap_every", "concurrency", "max_tokens", "max_turns", "prompts"),
        1,
    ),
    **dict.fromkeys(
        ("iterations", "eval_every", "critic_warmup_iterations", "warmup_steps", "top_k", "min_p", "min_new_tokens",
         "seed", "end_id", "lr", "min_lr", "weight_decay", "beta1", "beta2", "eps", "clip_grad", "kl_coef", "gamma",
         "gae_lambda", "critic_lambda", "max_log_prob_gap", "clip_ratio", "clip_ratio_high", "clip_value", "processes",
         "retries", "std_eps", "overlong_buffer", "overlong_penalty", "redraws", "coef", "init_std", "max_restarts",
         "samples", "margin", "label_smoothing", "reward_coef", "desirable_weight", "undesirable_weight",
         "router_aux_loss_coef"),
        0,
    ),
}  # fmt: skip
_POSITIVE = {
    "beta", "gae_alpha", "kl_target", "kl_horizon", "max_kl", "max_log_prob_gap", "stage", "temperature", "timeout",
    "top_p", "cache_share", "done_share",
    "rope_theta", "rms_norm_eps", "memory", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip
_AT_MOST = {"seed": 2**32 - 1, "timeout": 10**9, "stage": 10**9}  # what the seeds of minibatches and waits can take


_KIND = {int: "whole number", float: "number", bool: "truth value (true or false)", str: "text"}

T = TypeVar("T")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A suggestion for a name that is not known: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a config dataclass, sections included."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        found.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            found += keys(typing.cast(type, hint), f"{prefix}{name}.")
    return found


def from_dict(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Builds the dataclass `cls` from plain values.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    sizes = {f.name for f in dataclasses.fields(cls) if f.metadata.get("is_size")}  # type: ignore[arg-type]
    built = {}
    for name, value in values.items():
        key = prefix + name
        if name not in hints:
            raise ConfigError(f"unknown key {key}: {nearest(key, [prefix + known for known in hints])}")
        if value == NEEDED:
            raise ConfigError(f"{key} is not set, and this experiment needs it")
        built[name] = None if value is None and name in sizes else _convert(hints[name], value, key)
    return cls(**built)


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is a section with keys of its own, not {value!r}")
        return from_dict(typing.cast(type, hint), value, key + ".")
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(args[0], value, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key}={value} is not one of {', '.join(map(str, args))}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r} is not a mapping: write {key}={{name: value}}")
        return dict(value)
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={value!r} is not a list: write {key}=[{value}]")
        return [_convert(args[0], item, key) for item in value]
    is_number = hint in (int, float)
    kinds = (int, float) if hint is float else hint
    if not isinstance(value, kinds) or (is_number and isinstance(value, bool)):
        raise ConfigError(f"{key}={value!r} is not a {_KIND[hint]}")
    if is_number:
        name = key.split(".")[-1]
        if not -(2**62) < value < 2**62:  # NaN and infinities too
            raise ConfigError(f"{key}={value} is not a finite number")
        value = hint(value)
        if value < _AT_LEAST.get(name, value):
            raise ConfigError(f"{key}={value} must be at least {_AT_LEAST[name]}")
        if value > _AT_MOST.get(name, value):
            raise ConfigError(f"{key}={value} must be at most {_AT_MOST[name]}")
        if name in _POSITIVE and value <= 0:
            hint_greedy = "; rollout.greedy=true takes the likeliest token" if name == "temperature" else ""
            raise ConfigError(f"{key}={value} must be positive{hint_greedy}")
    return value
