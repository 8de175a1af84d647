"""HF `config.json` to ModelConfig and back. Standard library alone: a run is refused before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from ..config import ConfigError, ModelConfig, from_dict, nearest
from .architecture import Architecture
from .gpt2 import GPT2
from .internlm2 import INTERNLM2
from .keys import changes_nothing
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE
from .rope import ROPE_SETTINGS, plain_rope

ARCHITECTURES = {a.name: a for a in (LLAMA, MISTRAL, QWEN2, QWEN3, INTERNLM2, GPT2, MIXTRAL, QWEN3_MOE)}
_ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"
}  # fmt: skip

Head = Literal["lm", "scalar"]


def read_model_config(folder: str, ignore_keys: Sequence[str] = (), option: str = "ignore_keys") -> ModelConfig:
    """The architecture of an HF folder; see `parse`.

    Raises:
        ConfigError: no such folder, an architecture that is not known, or a setting that is not computed here.
    """
    path = Path(folder) / "config.json"
    return parse(read_json(path), str(path), ignore_keys, option)


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} is not there: name a folder in HF format")
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return found


def family(hf: Mapping[str, Any], where: str) -> tuple[Architecture, Head]:
    """The architecture of a config.json, and which head its weights have."""
    known: dict[str, tuple[Architecture, Head]] = {}
    for architecture in ARCHITECTURES.values():
        known |= {architecture.lm: (architecture, "lm"), architecture.scalar: (architecture, "scalar")}
    name = (hf.get("architectures") or [""])[0]
    if not name and hf.get("model_type") in ARCHITECTURES:
        return ARCHITECTURES[hf["model_type"]], "lm"
    if name not in known:
        raise ConfigError(f"{where}: architecture {name!r} is unknown: {nearest(name, known)}")
    return known[name]


def parse(
    source: Mapping[str, Any], where: str, ignore_keys: Sequence[str] = (), option: str = "ignore_keys"
) -> ModelConfig:
    """The contents of a config.json.

    Args:
        ignore_keys: of config.json or of its rope settings, to be read as if they were not there.
        option: what a user calls `ignore_keys`.

    Raises:
        ConfigError: names the file and the key.
    """
    architecture, head = family(source, where)
    if needed := [key for key in ignore_keys if key in architecture.keys or key in architecture.constants]:
        raise ConfigError(f"{option}={needed}: {architecture.name} cannot be computed without")
    hf, unknown = _plain(source, architecture, where, ignore_keys)
    if "quantization_config" in unknown:
        raise ConfigError(f"{where}: quantization_config: a quantised model is not read, dequantise it first")
    if unknown:
        listing = ", ".join(f"{key}={value!r:.99}" for key, value in unknown.items())
        way = f"{option} {' '.join(unknown)}" if option.startswith("-") else f"{option}=[{','.join(unknown)}]"
        raise ConfigError(
            f"{where}: {listing} is not understood for {architecture.name}, and may matter:"
            f" {way} reads the model without"
        )
    found: dict[str, Any] = {"architecture": architecture.name, **architecture.fields}
    for key, names in architecture.keys.items():
        if hf.get(key) is not None:
            found |= dict.fromkeys(names.split(), hf[key])
        elif key in source and not set(names.split()) & _MAY_BE_NULL:
            raise ConfigError(f"{where}: {key} is null, and says nothing")
    if head == "scalar":
        if (labels := len(hf["id2label"]) if hf.get("id2label") else hf.get("num_labels") or 1) != 1:
            raise ConfigError(f"{where}: {labels} labels, and a reward model has one")
        if "score_token" not in architecture.keys.values():
            found["score_pad"] = hf.get("pad_token_id")
    if "activation" in found:
        if found["activation"] not in _ACTIVATIONS:
            raise ConfigError(
                f"{where}: activation {found['activation']!r}: {nearest(found['activation'], _ACTIVATIONS)}"
            )
        found["activation"] = _ACTIVATIONS[found["activation"]]
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
    if missing := [f.name for f in fields(ModelConfig) if f.name in _NEEDED and found.get(f.name) is None]:
        keys = [key for key, names in architecture.keys.items() if names in missing]
        raise ConfigError(f"{where} lacks {', '.join(keys or missing)}")
    try:
        return from_dict(ModelConfig, found)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


_NEEDED = {"num_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"}
_MAY_BE_NULL = _NEEDED | {"num_key_value_heads", "head_dim", "rope_scaling", "sliding_window", "score_token"}


def understood(source: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json without what `parse` reads only with `ignore_keys`: the model has nothing of that."""
    return _without(source, _plain(source, family(source, where)[0], where)[1])


def _without(source: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Without keys, in the rope settings as well."""
    found = {key: value for key, value in source.items() if key not in keys}
    for name in ROPE_SETTINGS:
        if isinstance(found.get(name), Mapping):
            found[name] = {key: value for key, value in found[name].items() if key not in keys}
    return found


def _plain(
    source: Mapping[str, Any], architecture: Architecture, where: str, ignore_keys: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config.json with one way to say a thing and the family's defaults, and what of it is not understood."""
    hf = {**architecture.defaults, **_without(source, ignore_keys)}
    unknown: dict[str, Any] = {}
    if "rope_theta" in architecture.keys:
        unknown |= plain_rope(hf, architecture.defaults["rope_theta"], where)
    architecture.normalize(hf)
    _layer_types(hf, architecture, where)
    if hf.get("hidden_act") == "swish":
        hf["hidden_act"] = "silu"
    for key, value in hf.items():
        if key in architecture.constants:
            if value is not None and value != architecture.constants[key]:
                raise ConfigError(f"{where}: {key}={value!r} is not supported, only {architecture.constants[key]!r}")
        elif key not in architecture.keys and key not in architecture.irrelevant and not changes_nothing(key, value):
            unknown[key] = value
    return hf, unknown


def _layer_types(hf: dict[str, Any], architecture: Architecture, where: str) -> None:
    """transformers 5 names the layers that slide one by one; ours are all layers from some layer on."""
    types = hf.pop("layer_types", None)
    if types is None:
        return
    slides = [kind == "sliding_attention" for kind in types]
    first = slides.index(True) if any(slides) else None
    if set(types) - {"sliding_attention", "full_attention"} or slides != sorted(slides):
        raise ConfigError(f"{where}: layer_types={types} is not supported: only full attention below sliding attention")
    if "first_sliding_layer" not in architecture.keys:
        if first != (0 if hf.get("sliding_window") else None):
            raise ConfigError(
                f"{where}: layer_types={types} with sliding_window={hf.get('sliding_window')}: the layers of"
                f" {architecture.name} all slide or none does"
            )
    elif first is None:
        hf["sliding_window"] = None
    else:
        hf["first_sliding_layer"] = first


def write_model_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model that did not come from one.

    Raises:
        ConfigError: the architecture has no words for one of the model's settings.
    """
    architecture = ARCHITECTURES[model.architecture]
    values = asdict(model)
    values["activation"] = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[model.activation]
    hf = {"architectures": [architecture.lm], "model_type": architecture.name, **architecture.constants}
    hf |= {key: values[names.split()[0]] for key, names in architecture.keys.items()}
    if "first_sliding_layer" in hf:
        hf["max_window_layers"] = hf.pop("first_sliding_layer")
        hf["use_sliding_window"] = model.sliding_window is not None
    if "router_aux_loss_coef" in hf:
        hf["output_router_logits"] = model.router_aux_loss_coef > 0
    hf["head_dim"] = model.head_size
    back = asdict(parse(hf, "model"))
    ignored = {"init_std", "head_dim", "first_sliding_layer", "score_pad", "layers"}
    for key in values.keys() - ignored:
        if back[key] != asdict(model)[key]:
            raise ConfigError(f"model.{key}={asdict(model)[key]!r}: {architecture.name} has {back[key]!r} only")
    return hf
