"""HF `config.json` to ModelConfig and back. Standard library alone: a run is refused before torch is imported."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from ..config import ConfigError, ModelConfig, from_dict, nearest
from .architecture import Architecture
from .gpt2 import GPT2
from .internlm2 import INTERNLM2
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE

ARCHITECTURES = {a.name: a for a in (LLAMA, MISTRAL, QWEN2, QWEN3, INTERNLM2, GPT2, MIXTRAL, QWEN3_MOE)}
# Keys that change nothing in a forward pass here: no role has dropout, and an auxiliary loss is no part of RLHF.
_IRRELEVANT = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map",
    "attn_implementation", "_attn_implementation", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "tokenizer_class", "initializer_range", "pretraining_tp", "attention_dropout", "id2label",
    "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "output_attentions",
    "output_hidden_states", "return_dict", "use_return_dict", "score_bias",
}  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

Head = Literal["lm", "scalar"]


def read_model_config(folder: str) -> ModelConfig:
    """The architecture of an HF folder.

    Raises:
        ConfigError: no such folder, an architecture that is not known, or a setting that is not computed here.
    """
    path = Path(folder) / "config.json"
    return parse(read_json(path), str(path))


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


def family(hf: dict[str, Any], where: str) -> tuple[Architecture, Head]:
    """The architecture of a config.json, and which head its weights have."""
    name = (hf.get("architectures") or [""])[0]
    known: dict[str, tuple[Architecture, Head]] = {}
    for architecture in ARCHITECTURES.values():
        known |= {architecture.lm: (architecture, "lm"), architecture.scalar: (architecture, "scalar")}
    if name not in known:
        raise ConfigError(f"{where}: architecture {name!r} is unknown: {nearest(name, known)}")
    return known[name]


def parse(source: dict[str, Any], where: str) -> ModelConfig:
    """The contents of a config.json.

    Raises:
        ConfigError: names the file and the key.
    """
    architecture, head = family(source, where)
    hf = {**architecture.defaults, **source}
    if head == "scalar" and len(hf.get("id2label") or "1") != 1:
        raise ConfigError(f"{where}: {len(hf['id2label'])} labels, and a reward model has one")
    _plain_rope(hf)
    architecture.normalize(hf)
    _layer_types(hf, where)
    for key, value in hf.items():
        if key in architecture.constants:
            if value != architecture.constants[key]:
                raise ConfigError(f"{where}: {key}={value!r} is not supported, only {architecture.constants[key]!r}")
        elif key not in architecture.keys and key not in _IRRELEVANT | architecture.irrelevant and value is not None:
            raise ConfigError(f"{where}: {key}={value!r} is not understood for {architecture.name}, and may matter")
    found: dict[str, Any] = {"architecture": architecture.name, **architecture.fields}
    for key, names in architecture.keys.items():
        if hf.get(key) is not None:
            found |= dict.fromkeys(names.split(), hf[key])
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


def _plain_rope(hf: dict[str, Any]) -> None:
    """transformers 5 writes `rope_parameters`, others `rope_theta` and `rope_scaling`, with `type` or `rope_type`."""
    scaling = hf.pop("rope_parameters", None) or hf.get("rope_scaling") or {}
    scaling = dict(scaling)
    if (theta := scaling.pop("rope_theta", None)) is not None:
        hf["rope_theta"] = theta
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind or "default")
    hf["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling


def _layer_types(hf: dict[str, Any], where: str) -> None:
    """transformers 5 names the layers that slide one by one; ours are all layers from some layer on."""
    types = hf.pop("layer_types", None)
    if types is None:
        return
    slides = [kind == "sliding_attention" for kind in types]
    if set(types) - {"sliding_attention", "full_attention"} or slides != sorted(slides):
        raise ConfigError(f"{where}: layer_types={types} is not supported: only full attention below sliding attention")
    if not any(slides):
        hf["sliding_window"] = None
    elif slides.index(True):
        hf["first_sliding_layer"] = slides.index(True)


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
    hf["head_dim"] = model.head_size
    back = asdict(parse(hf, "model"))
    ignored = {"init_std", "head_dim", "first_sliding_layer"}
    for key in values.keys() - ignored:
        if back[key] != asdict(model)[key]:
            raise ConfigError(f"model.{key}={asdict(model)[key]!r}: {architecture.name} has {back[key]!r} only")
    return hf
