"""Every architecture against transformers: the same logits on every mesh, and the same file back, bit for bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import cases
import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
logging.getLogger("transformers").setLevel(logging.ERROR)

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)]
LENGTH = 23
# A vocabulary that nothing divides, a head size that is not hidden / heads, an odd number of layers.
SIZES = dict(
    vocab_size=211, hidden_size=36, intermediate_size=58, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
MODELS = {
    "llama": ("LlamaForCausalLM", dict(head_dim=10)),
    "llama-tied-llama3": ("LlamaForCausalLM", dict(tie_word_embeddings=True, rope_scaling=LLAMA3)),
    "llama-linear": ("LlamaForCausalLM", dict(head_dim=10, rope_scaling=dict(rope_type="linear", factor=2.5))),
    "llama-dynamic": ("LlamaForCausalLM", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0))),
    "llama-attention-bias": ("LlamaForCausalLM", dict(head_dim=10, attention_bias=True)),
    "llama-mlp-bias": ("LlamaForCausalLM", dict(mlp_bias=True)),
    "llama-both-biases": ("LlamaForCausalLM", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralForCausalLM", dict(head_dim=10, sliding_window=5)),
    "qwen2": ("Qwen2ForCausalLM", dict(tie_word_embeddings=True)),
    "qwen2-untied-window": ("Qwen2ForCausalLM", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3ForCausalLM", dict(head_dim=10)),
    "qwen3-tied-bias": ("Qwen3ForCausalLM", dict(head_dim=10, tie_word_embeddings=True, attention_bias=True)),
}


def make(folder: Path, name: str, options: dict, shard: str = "50GB") -> Path:
    """A model of `transformers` with random weights, norms and biases included, saved to `folder`."""
    cls = getattr(transformers, name)
    config = cls.config_class(**options)
    torch.manual_seed(3)
    model = cls(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2)
            if "norm" in key or "ln_" in key:
                parameter += 1
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def rows() -> list[list[int]]:
    return torch.randint(3, 211, (4, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()


def expected(folder: Path) -> torch.Tensor:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        if "Classification" not in architecture:
            return model(torch.tensor(rows())).logits
        hidden = model.base_model(torch.tensor(rows())).last_hidden_state
        return model.score(hidden)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def assert_same_weights(found: Path, wanted: Path) -> None:
    ours, theirs = tensors(found), tensors(wanted)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(name)`: the HF folder of one of MODELS, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            cls, options = MODELS[name]
            made[name] = make(tmp_path_factory.mktemp(name), cls, SIZES | options, "40KB" if "bias" in name else "1GB")
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_and_round_trip(worlds, folders, tmp_path, name, layout):
    folder = folders(name)
    found = worlds(layout[0] * layout[1]).run(cases.hf_round_trip, str(folder), layout, rows(), str(tmp_path / "out"))
    wanted = expected(folder)
    assert wanted.std() > 0.3
    for logits in found:
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    assert_same_weights(tmp_path / "out", folder)
    source, copy = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    assert copy == source
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("name", ["llama-tied-llama3", "mistral", "qwen2-untied-window", "qwen3-tied-bias"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1)], ids=str)
def test_generation_is_that_of_transformers(worlds, folders, name, layout):
    """Greedy tokens over our KV cache against the whole sequence forwarded anew for each."""
    folder = folders(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [row[: 2 + 3 * i] for i, row in enumerate(rows())]
    found = worlds(layout[0] * layout[1]).run(cases.hf_greedy, str(folder), layout, prompts, 9)[0]
    for prompt, tokens in zip(prompts, found, strict=True):
        sequence = torch.tensor([prompt])
        for token in tokens:
            with torch.no_grad():
                assert int(model(sequence).logits[0, -1].argmax()) == token
            sequence = torch.cat([sequence, torch.tensor([[token]])], 1)
