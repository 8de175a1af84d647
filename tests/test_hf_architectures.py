"""Every architecture against transformers: the same logits on every mesh, and the same file back, bit for bit."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import cases
import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
logging.getLogger("transformers").setLevel(logging.ERROR)

LAYOUTS: list[tuple] = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 1, False, 1, 2)]
LENGTH = 23
# A vocabulary that nothing divides, a head size that is not hidden / heads, an odd number of layers.
SIZES = dict(
    vocab_size=211, hidden_size=36, intermediate_size=58, num_hidden_layers=5, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
GPT2 = dict(
    vocab_size=211, n_embd=36, n_layer=5, n_head=6, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
EXPERTS = dict(head_dim=10, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=14)
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
    "mixtral": ("MixtralForCausalLM", dict(head_dim=10, num_local_experts=5, num_experts_per_tok=2)),
    "mixtral-window": ("MixtralForCausalLM", dict(num_local_experts=4, num_experts_per_tok=3, sliding_window=6)),
    "qwen3-moe": ("Qwen3MoeForCausalLM", EXPERTS | dict(norm_topk_prob=True)),
    "qwen3-moe-plain-weights": ("Qwen3MoeForCausalLM", EXPERTS | dict(num_experts=6, tie_word_embeddings=True)),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-untied": ("GPT2LMHeadModel", dict(tie_word_embeddings=False, n_inner=70, activation_function="gelu")),
    "qwen3-tied-bias": ("Qwen3ForCausalLM", dict(head_dim=10, tie_word_embeddings=True, attention_bias=True)),
}

EXPERT_PARALLEL = ("mixtral-window", "qwen3-moe-plain-weights")


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


def reference(folder: Path, cls=transformers.AutoModelForCausalLM):
    """transformers' model of a folder, its experts one by one: the grouped product takes multiples of 16 bytes only."""
    model = cls.from_pretrained(folder, dtype=torch.float32).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def expected(folder: Path) -> torch.Tensor:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = reference(folder, getattr(transformers, architecture))
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
            sizes = GPT2 if cls.startswith("GPT2") else SIZES
            made[name] = make(tmp_path_factory.mktemp(name), cls, sizes | options, "40KB" if "bias" in name else "1GB")
        return made[name]

    return get


def moe_layouts() -> list:
    """With experts over expert parallel ranks: (tp, pp, dp, sequence_parallel, ep)."""
    layouts = [(1, 1, 2, False, 2), (2, 1, 2, False, 2), (1, 2, 2, False, 2)]
    return [pytest.param(name, layout, id=f"{layout}-{name}") for name in EXPERT_PARALLEL for layout in layouts]


@pytest.mark.parametrize(
    ("name", "layout"),
    [pytest.param(n, layout, id=f"{layout}-{n}") for layout in LAYOUTS for n in MODELS] + moe_layouts(),
)
def test_logits_and_round_trip(worlds, folders, tmp_path, name, layout):
    folder = folders(name)
    found = worlds(math.prod(layout[:3])).run(cases.hf_round_trip, str(folder), layout, rows(), str(tmp_path / "out"))
    wanted = expected(folder)
    assert wanted.std() > 0.3
    for logits in found:
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    ranks = math.prod(layout[:3])
    for out, files in ((tmp_path / "out", 1), (tmp_path / "out_spread", ranks)):
        assert_same_weights(out, folder)
        assert len(list(out.glob("*.safetensors"))) == files
        source, copy = (json.loads((f / "config.json").read_text()) for f in (folder, out))
        assert copy == source
        _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info


CACHED = ("llama-tied-llama3", "gpt2", "mistral", "qwen3-moe", "qwen2-untied-window", "qwen3-tied-bias")


@pytest.mark.parametrize(
    ("name", "layout", "as_on_cuda"),
    [pytest.param(n, (1, 1, 1), False, id=f"(1, 1, 1)-{n}") for n in MODELS]
    + [pytest.param(n, (1, 1, 1), True, id=f"(1, 1, 1)-{n}-as-on-cuda") for n in CACHED]
    + [pytest.param(n, layout, False, id=f"{layout}-{n}") for layout in LAYOUTS[1:3] for n in CACHED]
    + [pytest.param(*param.values, False, id=param.id) for param in moe_layouts()],
)
def test_generation_is_that_of_transformers_and_of_training(worlds, folders, name, layout, as_on_cuda):
    """Greedy tokens over our KV cache against the whole sequence forwarded anew for each, and their log-probs against
    those of megatron's forward."""
    folder = folders(name)
    model = reference(folder)
    prompts = [row[: 2 + 3 * i] for i, row in enumerate(rows())]
    found, gap = worlds(math.prod(layout[:3])).run(cases.hf_greedy, str(folder), layout, prompts, 9, as_on_cuda)[0]
    assert gap <= 1e-5
    for prompt, tokens in zip(prompts, found, strict=True):
        sequence = torch.tensor([prompt])
        for token in tokens:
            with torch.no_grad():
                assert int(model(sequence).logits[0, -1].argmax()) == token
            sequence = torch.cat([sequence, torch.tensor([[token]])], 1)


# -- InternLM2, which transformers does not have: a Llama under its names ----------------------------------------


def internlm2(llama: Path, folder: Path, score: bool = False) -> Path:
    """The Llama of a folder as an InternLM2, whose wqkv holds the queries, key and value of each group together."""
    config = json.loads((llama / "config.json").read_text())
    heads, groups, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    weights, renamed = tensors(llama), {}
    names = {
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "score": "v_head",
    }  # fmt: skip
    for key, tensor in weights.items():
        if "k_proj" in key or "v_proj" in key:
            continue
        if "q_proj" in key:
            parts = [weights[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            q, k, v = (part.reshape(groups, -1, size, *part.shape[1:]) for part in parts)
            key = key.replace("self_attn.q_proj", "attention.wqkv")
            tensor = torch.cat([q, k, v], 1).reshape((heads + 2 * groups) * size, *parts[0].shape[1:])
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        renamed[key] = tensor.clone()
    config |= {"architectures": ["InternLM2ForRewardModel" if score else "InternLM2ForCausalLM"]}
    config |= {"model_type": "internlm2", "bias": config.pop("attention_bias"), "dtype": "float32"}
    config |= {
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": config.pop("rope_parameters")["rope_theta"],
    }
    config.pop("mlp_bias")
    folder.mkdir(exist_ok=True)
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-attention-bias"])
def test_internlm2(worlds, folders, tmp_path, name, layout):
    folder = internlm2(folders(name), tmp_path / "internlm2")
    world = worlds(layout[0] * layout[1])
    logits = world.run(cases.hf_round_trip, str(folder), layout, rows(), str(tmp_path / "out"))[0]
    torch.testing.assert_close(logits, expected(folders(name)), atol=1e-4, rtol=0)
    assert_same_weights(tmp_path / "out", folder)
    source, copy = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    assert copy == source


# -- reward models ---------------------------------------------------------------------------------------------

REWARD = {
    "LlamaForSequenceClassification": SIZES | dict(head_dim=10, num_labels=1),
    "MistralForSequenceClassification": SIZES | dict(head_dim=10, num_labels=1, sliding_window=6),
    "Qwen2ForSequenceClassification": SIZES | dict(num_labels=1, tie_word_embeddings=True),
    "Qwen3ForSequenceClassification": SIZES | dict(head_dim=10, num_labels=1),
    "GPT2ForSequenceClassification": GPT2 | dict(num_labels=1),
}


@pytest.mark.parametrize("name", [*REWARD, "InternLM2ForRewardModel"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scalar_heads(worlds, tmp_path, name, layout):
    options = REWARD.get(name, REWARD["LlamaForSequenceClassification"])
    cls = name if name in REWARD else "LlamaForSequenceClassification"
    source = folder = make(tmp_path / "source", cls, options)
    if name not in REWARD:
        folder = internlm2(source, tmp_path / "internlm2", score=True)
    world, out = worlds(layout[0] * layout[1]), tmp_path / "out"
    wanted = expected(source)
    scores = world.run(cases.hf_round_trip, str(folder), layout, rows(), str(out), "scalar")[0]
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=0)
    assert_same_weights(out, folder)
    # a bias of ours goes out and comes back beside the weights
    config = json.loads((out / "config.json").read_text()) | {"score_bias": -0.3125}
    (out / "config.json").write_text(json.dumps(config))
    again = world.run(cases.hf_round_trip, str(out), layout, rows(), str(tmp_path / "again"), "scalar")[0]
    torch.testing.assert_close(again, wanted - 0.3125, atol=1e-4, rtol=0)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["score_bias"] == -0.3125


def test_a_critic_starts_from_a_language_model_with_a_head_of_zeros(worlds, folders, tmp_path):
    scores = worlds(1).run(
        cases.hf_round_trip, str(folders("qwen3")), (1, 1, 1), rows(), str(tmp_path / "out"), "scalar"
    )
    assert not scores[0].any()
    wanted = tensors(folders("qwen3"))
    found = tensors(tmp_path / "out")
    assert found.pop("score.weight").shape == (1, 36) and wanted.pop("lm_head.weight") is not None
    assert found.keys() == wanted.keys()


# -- real configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-0.5b", 494_032_768),
        ("internlm2_5-1_8b-chat", 1_889_110_016),
        ("smollm2-135m-instruct", 134_515_008),
        ("stories260K", 260_032),
    ],
)
def test_real_configs_have_the_right_number_of_parameters(worlds, shared, name, count):
    assert worlds(1).run(cases.num_parameters, str(shared / "configs" / f"{name}.json")) == [count]


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1)], ids=str)
def test_stories(worlds, shared, tmp_path, layout):
    """A real model: transformers' log-probs to 1e-5 and its greedy story."""
    folder = shared / "models" / "stories260K_hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    story = model.generate(torch.tensor([[1, 403, 407, 261, 378]]), max_new_tokens=60, do_sample=False)
    world = worlds(layout[0] * layout[1])
    logits = world.run(cases.hf_round_trip, str(folder), layout, story.tolist(), str(tmp_path / "out"))[0]
    log_probs, wanted = (
        x[:, :-1].log_softmax(-1).gather(2, story[:, 1:, None]) for x in (logits, model(story).logits.detach())
    )
    torch.testing.assert_close(log_probs, wanted, atol=1e-5, rtol=0)
    assert_same_weights(tmp_path / "out", folder)
    found, gap = world.run(cases.hf_greedy, str(folder), layout, [story[0, :5].tolist()], story.shape[1] - 5)[0]
    assert found == [story[0, 5:].tolist()] and gap <= 1e-5


def test_names_of_transformer_engine(worlds):
    """Its layers fuse norms into the projections behind them; the rows know those parameters too."""
    assert worlds(1).run(cases.te_names) == [[]]


# -- training: gradients of what is new here do not depend on the mesh either -------------------------------------

TRAINED = {
    "qwen3": ["model.qk_norm=true", "model.head_dim=12"],
    "qwen2": ["model.qkv_bias=true", "model.sliding_window=9", "model.first_sliding_layer=1"],
    "gpt2": [
        "model.positions=learned", "model.norm=layer", "model.gated_mlp=false", "model.activation=gelu_tanh",
        "model.qkv_bias=true", "model.proj_bias=true", "model.mlp_bias=true", "model.num_key_value_heads=4",
    ],
    "mixtral": ["model.num_experts=4", "model.tie_word_embeddings=false"],
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_first_step_does_not_depend_on_the_mesh(worlds, tmp_path, name):
    settings = [*SMALL, f"output_dir={tmp_path}", "phases=[sft]", f"model.architecture={name}", *TRAINED[name]]
    wanted = worlds(1).run(cases.first_iteration, settings, (1, 1, 1), "sft")[0]["figures"]
    layouts: list[tuple] = [(2, 1, 1, True), (1, 2, 1), (1, 1, 2)]
    if name == "mixtral":
        layouts += [(1, 1, 2, False, 2), (2, 1, 2, True, 2), (1, 2, 2, False, 2)]
    else:
        layouts.append((2, 1, 1))  # megatron trains experts over tensor parallel ranks with sequence parallelism only
    for layout in layouts:
        found = worlds(math.prod(layout[:3])).run(cases.first_iteration, settings, layout, "sft")[0]["figures"]
        for key in ("policy/loss", "policy/grad_norm"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-5), (layout, key)
