"""What real folders look like beside the tidy ones: two sets of weights, settings said twice or not at all, names of
other tools. The reference for what each means is transformers; what is not read so is refused by name."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import cases
import pytest
import torch
import worlds
from safetensors.torch import save_file
from test_hf_architectures import GPT2, REWARD, SIZES, internlm2, make, reference, rows, tensors, transformers

from rlhf_engine.algorithms.heads import last_scores, score_batch
from rlhf_engine.config import ConfigError, ModelConfig
from rlhf_engine.converting.export import head_config
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.experience import pad_rows
from rlhf_engine.hf.config import ARCHITECTURES, parse, read_model_config
from rlhf_engine.hf.files import HFFolder
from rlhf_engine.hf.index import index, unread_files
from rlhf_engine.hf.rows import Window
from rlhf_engine.launching.build import load_base
from rlhf_engine.models.role import RoleModel
from rlhf_engine.models.stream import forward

LLAMA = SIZES | dict(head_dim=10, tie_word_embeddings=True, vocab_size=409)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name, **options)`: a model of transformers, made once."""
    found: dict[str, Path] = {}

    def get(name: str = "LlamaForCausalLM", shard: str = "1GB", **options) -> Path:
        sizes = GPT2 if name.startswith("GPT2") else LLAMA
        key = f"{name} {shard} {options}"
        if key not in found:
            found[key] = make(tmp_path_factory.mktemp("made"), name, sizes | options, shard)
        return found[key]

    return get


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A tied Llama to be changed."""
    return copied(made(), tmp_path / "hf")


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def configure(folder: Path, **changes) -> Path:
    """Changes keys of config.json; those that become `...` are taken out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def write(folder: Path, weights: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    if name.endswith(".bin"):
        torch.save(weights, folder / name)
    else:
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / name, {"format": "pt"})
    return folder


def as_bin(folder: Path, **options) -> Path:
    weights = tensors(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(weights, folder / "pytorch_model.bin", **options)
    return folder


def role_of(folder: Path, mesh, head: str = "lm") -> RoleModel:
    role = RoleModel("policy", read_model_config(str(folder)), mesh, head, torch.float32)
    load_base(role, str(folder))
    return role


def logits(folder: Path) -> torch.Tensor:
    with one_rank() as mesh:
        role = role_of(folder, mesh)
        return forward(role, {"tokens": torch.tensor(rows())}, functools.partial(cases.whole_logits, role), 4)


def hidden_scores(folder: Path) -> torch.Tensor:
    with one_rank() as mesh:
        return forward(
            role_of(folder, mesh, "scalar"), {"tokens": torch.tensor(rows())}, lambda output, batch: output, 4
        )


def theirs(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return reference(folder)(torch.tensor(rows())).logits


def same_as_transformers(folder: Path) -> None:
    wanted = theirs(folder)
    assert wanted.std() > 0.3
    torch.testing.assert_close(logits(folder), wanted, atol=1e-4, rtol=0)


# -- which file ------------------------------------------------------------------------------------------------


def split(folder: Path, suffix: str) -> dict[str, dict[str, torch.Tensor]]:
    """Leaves the weights in two files and an index."""
    weights, stem = tensors(folder), {".safetensors": "model", ".bin": "pytorch_model"}[suffix]
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    parts = {f"{stem}-0000{i + 1}-of-00002{suffix}": dict(sorted(weights.items())[i::2]) for i in range(2)}
    for name, part in parts.items():
        write(folder, part, name)
    listing = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(listing))
    return parts


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards_left", [True, False])
def test_one_file_wins_over_an_index_that_is_left_over(folder, suffix, shards_left):
    new = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in tensors(folder).items()}
    parts = split(folder, suffix)
    if not shards_left:
        for name in parts:
            (folder / name).unlink()
    single = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}[suffix]
    write(folder, new, single)
    same_as_transformers(folder)
    source = HFFolder(folder)
    for name, tensor in new.items():
        assert torch.equal(source.read(Window(name, tuple(tensor.shape), 0, 0, len(tensor))), tensor)
    left = [*(parts if shards_left else ()), f"{single}.index.json"]
    assert [path.name for path in unread_files(folder)] == sorted(left)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_win_over_bin(folder, suffix):
    """One file or several: either kind of safetensors comes before either kind of `.bin`."""
    weights = tensors(folder)
    if suffix == ".bin":
        split(folder, ".safetensors")
    write(folder, {key: torch.zeros_like(tensor) for key, tensor in weights.items()}, "pytorch_model.bin")
    same_as_transformers(folder)
    assert [path.name for path in unread_files(folder)] == ["pytorch_model.bin"]


def test_a_bin_file_of_an_old_torch(folder):
    same_as_transformers(as_bin(folder, _use_new_zipfile_serialization=False))


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def shard_lacks_a_tensor(folder: Path, suffix: str) -> list[str]:
    parts = split(folder, suffix)
    name = next(name for name, part in parts.items() if NORM in part)
    write(folder, {key: tensor for key, tensor in parts[name].items() if key != NORM}, name)
    return [f"places {NORM} in {name}, which does not have it"]


def shard_has_one_too_many(folder: Path, suffix: str) -> list[str]:
    name, part = next(iter(split(folder, suffix).items()))
    write(folder, part | {"model.layers.0.self_attn.q_proj.bias": torch.ones(60)}, name)
    return [name, "model.layers.0.self_attn.q_proj.bias", "does not name"]


def a_tensor_twice(folder: Path, suffix: str) -> list[str]:
    parts = split(folder, suffix)
    (first, one), (second, other) = parts.items()
    name, tensor = next(iter(one.items()))
    write(folder, other | {name: tensor + 1}, second)
    return [first, second, f"both have a tensor {name}"]


def a_shard_is_gone(folder: Path, suffix: str) -> list[str]:
    name = next(iter(split(folder, suffix)))
    (folder / name).unlink()
    return [f"names {name}, which is not there"]


def no_map(folder: Path, suffix: str) -> list[str]:
    split(folder, suffix)
    for path in folder.glob("*.index.json"):
        path.write_text('{"metadata": {}}')
    return ["has no weight_map"]


def shards_without_index(folder: Path, suffix: str) -> list[str]:
    parts = split(folder, suffix)
    for path in folder.glob("*.index.json"):
        path.unlink()
    return ["has no weights", *parts]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    "spoil",
    [shard_lacks_a_tensor, shard_has_one_too_many, a_tensor_twice, a_shard_is_gone, no_map, shards_without_index],
)
def test_an_index_that_is_wrong(folder, spoil, suffix):
    words = spoil(folder, suffix)
    with pytest.raises(ConfigError) as error:
        index(folder)
    assert all(word in str(error.value) for word in words), error.value


def test_a_tensor_twice_with_the_same_numbers(folder):
    parts = split(folder, ".safetensors")
    (_, one), (second, other) = parts.items()
    write(folder, other | dict([next(iter(one.items()))]), second)
    same_as_transformers(folder)


def test_an_index_that_names_a_tied_head(folder):
    """As it was before saving dropped the copy."""
    name = next(iter(split(folder, ".safetensors")))
    path = folder / "model.safetensors.index.json"
    listing = json.loads(path.read_text())
    listing["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(listing))
    same_as_transformers(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [({"model": {"a": torch.ones(2)}}, "not tensors by name"), ({}, "not tensors by name"), (b"no pickle", "")],
)
def test_a_bin_file_of_something_else(folder, content, words):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ConfigError, match=f"pytorch_model.bin .*{words}"):
        index(folder)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors", "model.gguf", "tf_model.h5"])
def test_other_formats(folder, name):
    """Beside the weights they are named; instead of them, the refusal names them."""
    shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "training_args.bin").write_bytes(b"")
    assert [path.name for path in unread_files(folder)] == [name]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"has no weights.*{name}"):
        index(folder)


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(folder, file, with_model):
    (folder / file).write_text("{}")
    if not with_model:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"{file}.*merge"):
        index(folder)


# -- tied embeddings -------------------------------------------------------------------------------------------

HEAD = "lm_head.weight"


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_tied_head_that_is_there_too(folder, suffix):
    weights = tensors(folder)
    name = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}[suffix]
    (folder / "model.safetensors").unlink()
    write(folder, weights | {HEAD: weights[EMBEDDING].clone()}, name)
    same_as_transformers(folder)
    write(folder, weights | {HEAD: weights[EMBEDDING] + 0.1}, name)
    with pytest.raises(ConfigError, match=f"ties {HEAD} to {EMBEDDING}.*tie_word_embeddings"):
        HFFolder(folder)
    same_as_transformers(configure(folder, tie_word_embeddings=False))


def test_a_tied_head_of_another_type(folder):
    weights = tensors(folder)
    weights[EMBEDDING] = weights[EMBEDDING].bfloat16()
    write(folder, weights | {HEAD: weights[EMBEDDING].float()})
    same_as_transformers(folder)
    write(folder, weights | {HEAD: weights[EMBEDDING].float() + 1e-3})
    with pytest.raises(ConfigError, match=f"ties {HEAD}"):
        HFFolder(folder)


def test_a_tied_embedding_that_stands_under_the_name_of_the_head(folder):
    weights = tensors(folder)
    write(folder, weights | {HEAD: weights.pop(EMBEDDING)})
    same_as_transformers(folder)


def test_untied_and_no_head(folder):
    with pytest.raises(ConfigError, match=f"no tensor {HEAD}.*tie_word_embeddings to true"):
        index(configure(folder, tie_word_embeddings=False))


# -- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_tensors_without_the_prefix_of_their_family(made, tmp_path, name):
    """As the best known GPT-2 is published, its masks among them."""
    folder = copied(made(name), tmp_path / "hf")
    prefix = {"GPT2LMHeadModel": "transformer."}.get(name, "model.")
    weights = {key.removeprefix(prefix): tensor for key, tensor in tensors(folder).items()}
    if name == "GPT2LMHeadModel":
        mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(5)}
        weights |= mask | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(5)}
    else:
        weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    wanted = theirs(folder)
    torch.testing.assert_close(logits(write(folder, weights)), wanted, atol=1e-4, rtol=0)
    write(folder, weights | {"layers.9.self_attn.q_proj.weight": torch.ones(60, 36)})
    with pytest.raises(ConfigError, match=r"tensor layers\.9\.self_attn\.q_proj\.weight|layers\.9"):
        logits(folder)


@pytest.mark.parametrize("name", ["GPT2ForSequenceClassification", "LlamaForSequenceClassification"])
def test_a_classifier_without_the_prefix(made, tmp_path, name):
    folder = copied(made(name, num_labels=1), tmp_path / "hf")
    wanted = hidden_scores(folder)
    assert wanted.std() > 0.1
    weights = {key.partition(".")[2] if "score" not in key else key: tensor for key, tensor in tensors(folder).items()}
    assert torch.equal(hidden_scores(write(folder, weights)), wanted)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_group_of_mixed_types_keeps_the_numbers_of_the_widest(folder, part):
    """transformers casts each tensor by itself."""
    narrow = f"model.layers.1.self_attn.{part}_proj.weight"
    weights = tensors(folder)
    weights |= {narrow: weights[narrow].bfloat16(), "model.layers.2.mlp.up_proj.weight": torch.randn(58, 36).half()}
    same_as_transformers(write(folder, weights))


def test_a_quantised_tensor(folder):
    weights = tensors(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    write(folder, weights | {name: torch.ones(weights[name].shape, dtype=torch.int8)})
    with pytest.raises(ConfigError, match=f"{name} is stored as torch.int8"):
        logits(folder)


# -- heads that score ------------------------------------------------------------------------------------------


def value_head(folder: Path, place: str, names: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    head = {f"{names}.weight": torch.randn(1, 36), f"{names}.bias": torch.randn(1)}
    if place == "model.safetensors":
        write(folder, tensors(folder) | head)
    else:
        write(folder, head, place)
    return head


@pytest.mark.parametrize("place", ["model.safetensors", "value_head.safetensors", "value_head.bin"])
@pytest.mark.parametrize("names", ["v_head.summary", "v_head", "value_head"])
def test_a_value_head_beside_a_language_model(folder, place, names):
    """As TRL and LLaMA-Factory write them."""
    head = value_head(folder, place, names)
    with torch.no_grad():
        hidden = reference(folder).model(torch.tensor(rows())).last_hidden_state
    wanted = hidden @ head[f"{names}.weight"].T + head[f"{names}.bias"]
    torch.testing.assert_close(hidden_scores(folder), wanted, atol=1e-4, rtol=0)
    assert index(folder)["score.weight"].name == f"{names}.weight" and not unread_files(folder)
    same_as_transformers(folder)  # and the policy is what it was


def test_a_head_with_other_layers_is_refused(folder):
    write(folder, tensors(folder) | {"v_head.0.weight": torch.ones(36, 36), "v_head.2.weight": torch.ones(1, 36)})
    with pytest.raises(ConfigError, match=r"v_head\.0\.weight has no place"):
        hidden_scores(folder)


@pytest.mark.parametrize("said", [dict(num_labels=3), dict(id2label={"0": "a", "1": "b", "2": "c"}), {}])
def test_several_labels(made, tmp_path, said):
    folder = copied(made("LlamaForSequenceClassification", num_labels=3), tmp_path / "hf")
    configure(folder, **(dict(id2label=..., label2id=...) | said))
    with pytest.raises(ConfigError, match="3 labels"):
        read_model_config(str(folder)), index(folder)


PADS = {"no pad": None, "a pad that ends rows": 2, "a pad of its own": 0, "a pad in the middle": 50, "minus one": -1}


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("name", REWARD)
def test_a_score_is_read_where_the_config_says(made, tmp_path, name, pad):
    """transformers reads it at the last token that is not the pad, wherever that is."""
    folder = copied(made(name, num_labels=1), tmp_path / "hf")
    configure(folder, pad_token_id=PADS[pad])
    sequences = [[1, 50, 7, 9, 2], [5, 6, 2, 2], [7, 8, 9, 10, 11, 50], [3, 2]]
    model = reference(folder, transformers.AutoModelForSequenceClassification)
    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([row])).logits[0] for row in sequences])
    tokens, lengths = pad_rows(sequences)
    with one_rank() as mesh:
        role = role_of(folder, mesh, "scalar")
        found = forward(role, score_batch(role, tokens, lengths), last_scores, 4)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_where_other_heads_have_their_score(made, tmp_path):
    """InternLM2's stands behind a token of its own, and TRL's at the last token, whatever the pad is."""
    llama = made("LlamaForSequenceClassification", num_labels=1)
    folder = configure(internlm2(llama, tmp_path / "internlm2", score=True), pad_token_id=2, reward_token_id=9)
    model = read_model_config(str(folder))
    assert (model.score_token, model.score_pad) == (9, None)
    folder = configure(copied(made(), tmp_path / "llama"), pad_token_id=2)
    value_head(folder, "value_head.safetensors", "v_head.summary")
    assert read_model_config(str(folder)).score_pad is None


# -- settings that are missing, or said twice ------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "internlm2"])
def test_defaults_are_those_of_transformers(name):
    architecture = ARCHITECTURES[name]
    needed = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=32, intermediate_size=64, vocab_size=99)
    needed |= dict(moe_intermediate_size=64) if name == "qwen3_moe" else {}
    # without which the coefficient is 0, whatever the key says
    needed |= dict(output_router_logits=True) if "router_aux_loss_coef" in architecture.keys else {}
    if name == "gpt2":
        needed = dict(n_embd=64, n_layer=2, n_head=32, vocab_size=99)
    theirs = getattr(transformers, architecture.lm).config_class(**needed)
    ours = parse({"architectures": [architecture.lm], **needed}, "config.json")
    for key, fields in architecture.keys.items():
        field = fields.split()[0]
        if key == "rope_theta":
            wanted = theirs.rope_parameters["rope_theta"]
        elif key in ("activation_function", "n_inner", "first_sliding_layer", "rope_scaling"):
            continue  # said in other words
        else:
            wanted = getattr(theirs, key, None)
        found = getattr(ours, field)
        assert (ours.head_size if field == "head_dim" and wanted else found) == wanted, key
    assert ours.rope_scaling is None and ours.first_sliding_layer == 0


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ORIGINAL = dict(original_max_position_embeddings=16)
ROPES = {
    "theta inside": dict(rope_parameters=dict(rope_theta=500.0, rope_type="default")),
    "theta outside": dict(rope_theta=500.0, rope_parameters=dict(rope_type="default")),
    "theta in both": dict(rope_theta=100.0, rope_parameters=dict(rope_theta=500.0, rope_type="default")),
    "no theta": dict(rope_parameters=dict(rope_type="default")),
    "nothing": {},
    "scaling null": dict(rope_theta=500.0, rope_scaling=None),
    "scaling empty": dict(rope_theta=500.0, rope_scaling={}),
    "scaling without a type": dict(rope_theta=500.0, rope_scaling=dict(factor=4.0)),
    "both settings": dict(rope_scaling=dict(type="linear", factor=4.0), rope_parameters=dict(rope_theta=50.0)),
    "type": dict(rope_scaling=dict(type="linear", factor=2.5)),
    "both types": dict(rope_scaling=dict(type="dynamic", rope_type="linear", factor=2.5)),
    "whole number": dict(rope_scaling=dict(type="linear", factor=2)),
    "dynamic": dict(rope_scaling=dict(type="dynamic", factor=2.0)),
    "dynamic with an original": dict(rope_scaling=dict(type="dynamic", factor=2.0) | ORIGINAL),
    "linear with an original": dict(rope_parameters=dict(rope_type="linear", factor=4.0) | ORIGINAL),
    "llama3": dict(rope_scaling=LLAMA3 | ORIGINAL),
    "llama3 without an original": dict(rope_scaling=LLAMA3),
    "llama3 with the original outside": dict(rope_scaling=LLAMA3, original_max_position_embeddings=20),
    "llama3 with two originals": dict(rope_scaling=LLAMA3 | ORIGINAL, original_max_position_embeddings=20),
    "whole rotation": dict(rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=1.0)),
    "keys of another kind": dict(rope_scaling=dict(type="linear", factor=2.0, beta_fast=32, attention_factor=0.5)),
}


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("name", ROPES)
def test_rope_settings(made, tmp_path, name, family):
    options = dict(num_local_experts=4) if family.startswith("Mixtral") else {}
    folder = copied(made(family, **options), tmp_path / "hf")
    configure(folder, **dict(rope_parameters=..., rope_theta=..., rope_scaling=...) | ROPES[name])
    same_as_transformers(folder)


REFUSED_ROPES = {
    "linear without a factor": (dict(type="linear"), ["rope_type=linear lacks factor"]),
    "a factor of null": (dict(type="linear", factor=None), ["rope_type=linear lacks factor"]),
    "dynamic without a factor": (dict(type="dynamic"), ["rope_type=dynamic lacks factor"]),
    "llama3 without its factors": (dict(rope_type="llama3", factor=8.0), ["lacks low_freq_factor, high_freq_factor"]),
    "a factor of zero": (dict(type="linear", factor=0.0), ["factor=0.0", "positive"]),
    "text": (dict(type="linear", factor="2"), ["factor='2'", "number"]),
    "yarn": (dict(type="yarn", factor=4.0), ["rope_type=yarn", "linear"]),
    "proportional": (dict(rope_type="proportional", factor=4.0), ["rope_type=proportional"]),
    "half a rotation": (dict(type="default", partial_rotary_factor=0.5), ["partial_rotary_factor=0.5", "ignore_keys"]),
    "unknown": (dict(type="linear", factor=4.0, sharpness=1.0), ["sharpness=1.0", "ignore_keys=[sharpness]"]),
    "by type of layer": (dict(full_attention=dict(rope_type="default")), ["full_attention"]),
    "no object": ("linear", ["rope_scaling='linear'"]),
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", REFUSED_ROPES)
def test_rope_settings_that_are_refused(folder, name, key):
    settings, words = REFUSED_ROPES[name]
    configure(folder, **dict(rope_parameters=..., rope_theta=10.0) | {key: settings})
    with pytest.raises(ConfigError) as error:
        read_model_config(str(folder))
    assert all(word in str(error.value) for word in words), error.value


WINDOWS = {
    "types": dict(layer_types=["full_attention"] * 2 + ["sliding_attention"] * 3),
    "types and another first": dict(layer_types=["sliding_attention"] * 5, max_window_layers=28),
    "first": dict(layer_types=..., max_window_layers=2),
    "none": dict(layer_types=["full_attention"] * 5, max_window_layers=0),
    "off": dict(layer_types=..., use_sliding_window=False, max_window_layers=0),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_which_layers_slide(made, tmp_path, name):
    window = dict(use_sliding_window=True, sliding_window=5)
    folder = copied(made("Qwen2ForCausalLM", **window), tmp_path / "hf")
    same_as_transformers(configure(folder, **window | WINDOWS[name]))


def test_all_layers_of_a_family_slide(made, tmp_path):
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=14)
    options = experts | dict(use_sliding_window=True, sliding_window=5)
    folder = copied(made("Qwen3MoeForCausalLM", **options), tmp_path / "moe")
    same_as_transformers(configure(folder, max_window_layers=28))
    folder = copied(made("MistralForCausalLM", sliding_window=5), tmp_path / "mistral")
    same_as_transformers(configure(folder, layer_types=["sliding_attention"] * 5))
    with pytest.raises(ConfigError, match="layers of mistral all slide or none"):
        read_model_config(str(configure(folder, layer_types=["full_attention"] * 5)))


# -- keys of config.json ---------------------------------------------------------------------------------------

HARMLESS = {
    "unsloth_fixed": True, "unsloth_version": "2024.9", "transformers.js_config": {"dtype": "q4"}, "_commit_hash": "a",
    "is_llama_config": True, "rope_interleaved": False, "max_length": 20, "temperature": 0.6, "do_sample": True,
    "chunk_size_feed_forward": 0, "is_decoder": True, "torchscript": False, "model_max_length": 4096,
    "pruned_heads": {}, "is_encoder_decoder": False, "layer_norm_eps": 1e-5, "use_sliding_window": False,
    "gradient_checkpointing": False, "pad_token": "<pad>", "mlp_bias": False, "num_key_value_groups": 2,
    "suppress_tokens": [1], "bad_words_ids": None, "partial_rotary_factor": 1.0, "hidden_dropout": 0.1,
    "tie_encoder_decoder": False, "cross_attention_hidden_size": None, "sep_token_id": 3, "prefix": "x", "top_k": 5,
    "logit_scale": 1.0, "use_mrope": False, "max_window_layers": 3, "hidden_act": "swish", "bf16": True, "alibi": False,
}  # fmt: skip
HARMFUL = {
    "rope_interleaved": True, "is_encoder_decoder": True, "pruned_heads": {"0": [1]}, "use_sliding_window": True,
    "partial_rotary_factor": 0.5, "logit_scale": 0.5, "tie_encoder_decoder": True, "alibi": True, "use_qk_norm": True,
    "final_logit_softcapping": 30.0, "sliding_window": 16, "per_layer_config": {"0": {"head_dim": 4}},
}  # fmt: skip


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_that_change_nothing(folder, key):
    known = read_model_config(str(folder))
    assert read_model_config(str(configure(folder, **{key: HARMLESS[key]}))) == known


def test_transformers_agrees_that_they_change_nothing(folder):
    wanted = theirs(folder)
    configure(folder, **{key: value for key, value in HARMLESS.items() if key != "temperature"})
    assert torch.equal(theirs(folder), wanted)
    torch.testing.assert_close(logits(folder), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("key", HARMFUL)
def test_keys_that_would_change_something(folder, key):
    known = read_model_config(str(folder))
    configure(folder, **{key: HARMFUL[key]}, another_one=True)
    with pytest.raises(ConfigError) as error:
        read_model_config(str(folder), option="policy.ignore_keys")
    message = str(error.value)
    assert f"{key}=" in message and "may matter" in message and f"policy.ignore_keys=[{key},another_one]" in message
    assert read_model_config(str(folder), [key, "another_one"]) == known
    assert not {key, "another_one"} & head_config(known, "lm", folder).keys()  # what was trained has nothing of them


@pytest.mark.parametrize(
    ("changes", "ignore", "words"),
    [
        ({}, ["hidden_size"], ["ignore_keys=['hidden_size']", "llama cannot be computed without"]),
        ({}, ["hidden_act"], ["hidden_act"]),
        (dict(rms_norm_eps=None), [], ["rms_norm_eps is null"]),
        (dict(quantization_config={"bits": 4}), [], ["quantization_config", "dequantise"]),
        (dict(hidden_act="gelu"), [], ["hidden_act='gelu'", "'silu'"]),
    ],
)
def test_what_cannot_be_ignored(folder, changes, ignore, words):
    with pytest.raises(ConfigError) as error:
        read_model_config(str(configure(folder, **changes)), ignore)
    assert all(word in str(error.value) for word in words), error.value


def test_an_architecture_that_only_the_type_tells(folder):
    known = read_model_config(str(folder))
    assert read_model_config(str(configure(folder, architectures=...))) == known != ModelConfig()


# -- what a run says -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Of fewer ids than the models here have; it ends rows with 2."""
    from rlhf_engine.data.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([f"\n\nHuman: {i} and {i * i}\n\nAssistant: no" for i in range(300)], path, 400)
    return path


@pytest.fixture
def explained(tokenizer, capsys, monkeypatch):
    """Exit code and lines of a run on these folders that only says what it would do."""
    monkeypatch.delenv("RANK", raising=False)

    def get(*settings: str) -> tuple[int, str]:
        sizes = ["data.max_seq_len=64", "data.max_prompt_len=40", "rollout.max_new_tokens=24", "data.num_rows=64"]
        sizes += ["data.num_eval_rows=8", f"tokenizer.path={tokenizer}", "device=cpu", "schedule=explain"]
        sizes += ["sft.optimizer.lr=1e-5", "reward.optimizer.lr=1e-5", "ppo.optimizer.lr=1e-6"]
        sizes += ["ppo.critic_optimizer.lr=1e-6"]  # as for a pretrained model, or that would be noted
        code = worlds.launcher.main(["+exp=hh_rlhf", *sizes, *settings])
        found = capsys.readouterr()
        return code, found.out + found.err

    return get


def test_what_is_not_read_is_said(explained, folder):
    split(folder, ".safetensors")
    write(folder, tensors(folder))
    code, said = explained(f"policy.path={folder}", "phases=[sft]")
    assert code == 0 and "note: policy.path=" in said and "not read: model-00001-of-00002.safetensors" in said


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_reward_model_without_its_head(explained, folder, made, tmp_path, suffix):
    """Fresh where it is to be trained, which is said; refused where it is to score."""
    reward = copied(made("LlamaForSequenceClassification", num_labels=1), tmp_path / "reward")
    weights = tensors(reward)
    del weights["score.weight"]
    write(reward, weights)
    if suffix == ".bin":
        as_bin(reward)
    paths = (f"policy.path={folder}", f"reward.path={reward}")
    code, said = explained(*paths, "phases=[ppo]")
    assert code == 2 and "has no tensor score.weight" in said and "phases=[reward,ppo]" in said
    code, said = explained(*paths, "phases=[reward,ppo]")
    assert code == 0 and f"note: reward.path={reward} has no score's head" in said


def test_a_value_head_and_who_has_a_use_for_it(explained, folder, made):
    value_head(folder, "value_head.safetensors", "v_head.summary")
    code, said = explained(f"policy.path={made()}", f"reward.path={folder}", "phases=[ppo]")
    assert code == 0 and "note" not in said
    code, said = explained(f"policy.path={folder}", "phases=[sft]")
    assert code == 0 and "note: policy.path=" in said and "v_head.summary.weight in value_head.safetensors" in said


def test_a_reward_model_is_no_policy(explained, made):
    code, said = explained(f"policy.path={made('LlamaForSequenceClassification', num_labels=1)}", "phases=[sft]")
    assert code == 2 and "is a reward model: reward.path=" in said


def test_a_pad_that_ends_rows_is_said(explained, made, tmp_path):
    reward = copied(made("LlamaForSequenceClassification", num_labels=1), tmp_path / "reward")
    paths = (f"policy.path={made()}", f"reward.path={reward}", "phases=[ppo]")
    assert "note" not in explained(*paths)[1]
    configure(reward, pad_token_id=2)
    code, said = explained(*paths)
    assert code == 0 and "pad_token_id=2 of its config.json ends rows" in said


def test_keys_that_a_user_has_looked_at(explained, folder, made, tmp_path):
    reward = copied(made("LlamaForSequenceClassification", num_labels=1), tmp_path / "reward")
    paths = (f"policy.path={configure(folder, gate=2)}", f"reward.path={configure(reward, logit_scale=2)}")
    code, said = explained(*paths, "phases=[ppo]")
    assert code == 2 and "policy.ignore_keys=[gate]" in said
    code, said = explained(*paths, "phases=[ppo]", "policy.ignore_keys=[gate]")
    assert code == 2 and "reward.ignore_keys=[logit_scale]" in said
    assert explained(*paths, "phases=[ppo]", "policy.ignore_keys=[gate]", "reward.ignore_keys=[logit_scale]")[0] == 0
