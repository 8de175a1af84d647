"""transformer-engine's layers, by a stand-in in plain torch (tests/te) that megatron finds in processes of their own,
as it finds one of apex (tests/fused)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import worlds
import yaml
from conftest import ROOT

from rlhf_engine.config import ConfigError, MeshConfig, ModelConfig, check, resolve_mesh
from rlhf_engine.config.devices import GPUS
from rlhf_engine.launching import layers
from rlhf_engine.launching.compose import compose
from rlhf_engine.launching.earlier import check_output_dir
from rlhf_engine.plan.costs import Costs
from rlhf_engine.plan.memory import Numbers, layer_activations
from rlhf_engine.verify.measure import small

SIZES = dict(
    num_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
    max_position_embeddings=64,
)  # fmt: skip
MODELS = {
    "llama": {},
    "qwen2": dict(architecture="qwen2", qkv_bias=True, sliding_window=5, first_sliding_layer=1),
    "qwen3": dict(architecture="qwen3", qk_norm=True, head_dim=12, tie_word_embeddings=False),
    "gpt2": dict(
        architecture="gpt2", positions="learned", norm="layer", gated_mlp=False, activation="gelu_tanh",
        qkv_bias=True, proj_bias=True, mlp_bias=True, num_key_value_heads=4,
    ),
    "mixtral": dict(architecture="mixtral", num_experts=4, tie_word_embeddings=False),
}  # fmt: skip
ROWS = {
    "tokens": torch.randint(3, 64, (6, 18), generator=torch.Generator().manual_seed(2)),
    "lengths": torch.tensor([18, 7, 12, 18, 3, 9]),
}
PARALLEL = ["qwen3", "gpt2", "qwen2"]
FIGURES = ("loss", "grad_norm", "gradients", "weights", "log_probs", "moments", "log_prob_gap")


def in_processes(size: int, call: str, stand_ins: Sequence[str] = ("te", "fused")) -> list:
    """What a function of this module gives on each rank of a world whose megatron finds transformer-engine and apex."""
    paths = [*(str(ROOT / "tests" / name) for name in (*stand_ins, "")), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_PORT": str(worlds.launcher.free_port()), "PYTHONPATH": os.pathsep.join(paths)}
    code = f"import json, test_te; print(json.dumps(test_te.{call}))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(i)}, stdout=-1, stderr=-1, text=True) for i in range(size)
    ]
    said = [rank.communicate(timeout=worlds.TIMEOUT_SECONDS) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(err for _, err in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.fixture(scope="module")
def one_rank() -> dict:
    return in_processes(1, "on_one_rank()")[0]


# -- in those processes --------------------------------------------------------------------------------------------


def role_of(model: dict, layers: str, layout: tuple, **options):
    """A policy that trains; all its weights, norms and biases too, are random numbers that their names decide."""
    from rlhf_engine.config import ModelConfig, OptimizerConfig
    from rlhf_engine.hf.weights import RandomWeights, load_weights
    from rlhf_engine.models.role import RoleModel

    class Random(RandomWeights):
        def read(self, window):
            noise = torch.randn(window.shape, generator=torch.Generator().manual_seed(zlib.crc32(window.name.encode())))
            whole = 0.2 * noise + (1.0 if len(window.shape) == 1 and window.name.endswith("weight") else 0.0)
            return whole.narrow(window.dim, window.start, window.stop - window.start)

    settings = ModelConfig(**SIZES | model, layers=layers)
    optimizer = OptimizerConfig(lr=1e-3, eps=1e-4)
    role = RoleModel("policy", settings, worlds.mesh(*layout), "lm", torch.float32, optimizer, **options)
    assert (layers == "te") == any("layer_norm_weight" in name for name, _ in role.chunks.named_parameters())
    load_weights(role.chunks, settings, "lm", role.mesh, Random(settings, 0))
    role.start()
    return role


def step(role) -> dict:
    """Log-probs before an update, its loss, gradients and new weights, and responses of the updated policy with the
    distance of their log-probs from the trainer's."""
    from rlhf_engine.algorithms.heads import choose, policy_log_probs
    from rlhf_engine.config import RolloutConfig
    from rlhf_engine.experience import pad_rows, spans
    from rlhf_engine.hf.weights import parameters
    from rlhf_engine.models.residency import Presence
    from rlhf_engine.models.stream import forward, train_step
    from rlhf_engine.models.work import Work
    from rlhf_engine.observing.metrics import Metrics
    from rlhf_engine.observing.trace import Trace
    from rlhf_engine.rollout.generate import rollout
    from rlhf_engine.rollout.sampling import sample_keys

    def fn(output, batch):
        return policy_log_probs(role, output, choose(role, batch, "mask"))[0]

    def loss(output, batch):
        found, mask = fn(output, batch), batch["mask"]
        return -(found * mask).sum(), mask.sum(), {}

    mask = spans(torch.ones_like(ROWS["lengths"]), ROWS["lengths"], 18)
    batch = ROWS | {"mask": mask, "loss_mask": mask}
    before, metrics = forward(role, batch, fn, 2)[mask], Metrics()
    with role.on_device(Presence.TRAINING):
        assert train_step([Work(role, batch, loss, 2)], metrics, Trace()) == {"policy": None}
        found = {"gradients": {name: p.main_grad.clone() for name, p in parameters(role.chunks)}}
    figures, _ = metrics.reduce(role.mesh)
    found |= {"log_probs": before, "loss": figures["policy/loss"], "grad_norm": figures["policy/grad_norm"]}
    prompts = [row[:4].tolist() for row in ROWS["tokens"]]
    config = RolloutConfig(max_new_tokens=8, min_new_tokens=0, slots=4)
    responses = rollout(role, prompts, sample_keys(1, 0, torch.arange(6)), config, [1])
    rows, lengths = pad_rows([p + r.tokens for p, r in zip(prompts, responses, strict=True)], role.mesh.tp)
    mask = spans(torch.full((6,), 4), lengths, rows.shape[1])
    after = forward(role, {"tokens": rows, "mask": mask, "lengths": lengths}, fn, 2)[mask]
    gap = after - torch.tensor([log_prob for r in responses for log_prob in r.log_probs])
    found["log_prob_gap"] = {"most": gap.abs().max()}
    return found | {"tokens": [r.tokens for r in responses], **state_of(role)}


def state_of(role) -> dict:
    """Weights, and what the optimizer holds of them, by one name for both kinds of layers."""
    from rlhf_engine.hf.weights import parameters
    from rlhf_engine.models.optim import optimizer_tensors

    weights = {name: p.detach().clone() for name, p in parameters(role.chunks)}
    return {"weights": weights, "moments": sum(float(x.abs().sum()) for x in optimizer_tensors(role.optimizer, []))}


def distance(one, other) -> float:
    """The largest between two numbers, tensors or dictionaries of them."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max(distance(one[key], other[key]) for key in one)
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


def both(model: dict, layout: tuple, folder: str) -> dict:
    """How far steps with the two kinds of layers are apart, and what each has saved from what the other loads."""
    from rlhf_engine.config import CheckpointConfig
    from rlhf_engine.models.checkpoint import Checkpoints, load

    roles = {layers: role_of(model, layers, layout) for layers in ("own", "te")}
    steps = {layers: step(role) for layers, role in roles.items()}
    own, te = steps["own"], steps["te"]
    found = {key: distance(own[key], te[key]) for key in FIGURES}
    found |= {"tokens": own["tokens"] == te["tokens"], "gap": float(te["log_prob_gap"]["most"])}
    for saved, loaded in (("own", "te"), ("te", "own")):
        checkpoints = Checkpoints(Path(folder) / saved, roles[saved].mesh, CheckpointConfig())
        checkpoints.save(1, {"policy": roles[saved]}, {})
        assert checkpoints.finish()
        fresh = role_of(model, loaded, layout)
        load(Path(folder) / saved / "iteration_1", {"policy": fresh})
        found[f"{loaded} of {saved}"] = distance(state_of(roles[saved]), state_of(fresh))
    return found


def on_one_rank() -> dict:
    """`both` of each model; what products in 8 bits are like, with recomputation; and a step with apex's kernel."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict = {name: both(model, (1, 1, 1), f"{folder}/{name}") for name, model in MODELS.items()}
    return found | {"fp8": in_8_bits(), "apex": by_apex()}


def in_8_bits() -> dict:
    """How far a step that computes its layers again is from one that is not in 8 bits: the stand-in rounds nothing. And
    its products' recipes, widths of micro-batches, and sizes of what is multiplied."""
    from transformer_engine.pytorch import PRODUCTS

    plain = step(role_of({}, "te", (1, 1, 1)))
    assert PRODUCTS == []
    fp8 = step(role_of({}, "te", (1, 1, 1), fp8=True, recompute="full"))
    found = {key: distance(plain[key], fp8[key]) for key in FIGURES}
    recipes, widths, sizes = (sorted(set(column)) for column in zip(*PRODUCTS, strict=True))
    return found | {"tokens": plain["tokens"] == fp8["tokens"], "products": [recipes, widths, sizes]}


def by_apex() -> dict:
    """How far a step of our layers is from one without apex's kernel, and of what sizes the kernel's results were."""
    from fused_weight_gradient_mlp_cuda import CALLS

    from rlhf_engine.models.optim import accumulate_in_products

    CALLS.clear()
    found = {"without": step(role_of({}, "own", (1, 1, 1)))}
    assert CALLS == []
    fused = role_of({}, "own", (1, 1, 1))
    for chunk in fused.chunks:
        accumulate_in_products(chunk)  # as on a GPU
    found["with"] = step(fused)
    sizes = sorted(set(CALLS))
    return {"gradients": distance(found["with"]["gradients"], found["without"]["gradients"]), "sizes": sizes}


def on_two_ranks() -> list[dict]:
    """`both` under tensor parallelism, with and without sequence parallelism, and in two pipeline stages."""
    with tempfile.TemporaryDirectory() as folder:
        box = [folder]
        worlds.mesh(2, 1, 1)
        torch.distributed.broadcast_object_list(box)
        layouts = [(2, 1, 1, True), (2, 1, 1), (1, 2, 1)]
        found = [both(MODELS[name], layout, f"{box[0]}/{name}") for name, layout in zip(PARALLEL, layouts, strict=True)]
        torch.distributed.barrier()
    return found


def places() -> dict:
    """Whether checkpoints have both kinds of layers' parameters under the same names, shapes and places, by model."""
    from rlhf_engine.config import ModelConfig
    from rlhf_engine.converting.layout import layout, one_rank

    found = {}
    for name, model in MODELS.items():
        with one_rank() as mesh, without_a_gpu():
            kinds = [
                {p.name: (p.shape, [(s.key, s.global_shape, s.global_offset) for s in p.places]) for p in held}
                for held in (layout(ModelConfig(**SIZES | model, layers=x), "lm", "model", mesh) for x in ("own", "te"))
            ]
        found[name] = kinds[0] == kinds[1]
    return found


@contextlib.contextmanager
def without_a_gpu():
    """Within it the real transformer-engine builds its layers on the meta device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
        for name in ("rmsnorm", "layer_norm"):
            module = sys.modules.get(f"transformer_engine.pytorch.ops.basic.{name}")
            if module is not None:
                patch.setattr(module, "canonicalize_device", lambda device: torch.device(device or "meta"))
        yield


# -- what they found -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_either_kind_of_layers_computes_and_saves_the_same(one_rank, name):
    """A step and a rollout behind it, and what one has saved, the other loads, optimizer and all."""
    found = one_rank[name]
    assert found.pop("tokens")
    assert max(found.values()) <= 2e-6, found


@pytest.fixture(scope="module")
def two_ranks() -> list:
    return in_processes(2, "on_two_ranks()")


@pytest.mark.parametrize("name", PARALLEL)
def test_the_same_on_two_ranks(two_ranks, name):
    """Norms before a projection see a part of the sequence; a pipeline's stages fold into one model for a rollout."""
    for rank in two_ranks:
        found = rank[PARALLEL.index(name)]
        assert found.pop("tokens")
        assert max(found.values()) <= 5e-6, found


def test_products_in_8_bits(one_rank):
    """A recipe that scales a token by itself, in every layer; micro-batches are filled up to sizes that such products
    come in, 18 tokens to 32, and nothing else changes."""
    found = one_rank["fp8"]
    assert found.pop("products") == [["Float8BlockScaling"], [16, 32], [32, 48]]
    assert found.pop("tokens")
    assert max(found.values()) <= 2e-6, found


def test_apex_adds_up_the_gradients_of_weights(one_rank):
    """Of all four products of our layers."""
    assert one_rank["apex"]["sizes"] == [[32, 32], [32, 48], [64, 32], [96, 32]]
    assert one_rank["apex"]["gradients"] <= 2e-6


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine_torch") is None, reason="transformer-engine is absent")
def test_the_real_layers_have_the_same_places():
    """On the meta device, which needs a build of torch for CUDA and no GPU."""
    assert in_processes(1, "places()", stand_ins=())[0] == dict.fromkeys(MODELS, True)


def test_a_plan_of_products_in_8_bits():
    """Of a layer of Llama 7B and 2,048 tokens: three of the inputs of products, 2 x 4,096 + 11,008 numbers of a token,
    in a byte less, and its 202,383,360 parameters twice in one; half the seconds of 0.829 TFLOP at 692 TFLOP/s, and
    three times the bytes at 2.68 TB/s."""
    model = ModelConfig(
        num_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008,
        vocab_size=32000, max_position_embeddings=2048, layers="te",
    )  # fmt: skip
    mesh, numbers = MeshConfig(1, 1, 1), [Numbers(2, "cuda", fp8) for fp8 in (False, True)]
    plain, fp8 = (layer_activations(model, 1, 2048, mesh, each) for each in numbers)
    assert fp8 - plain == 2 * 202_383_360 - 2048 * (2 * 4096 + 11008) == 365_445_120
    plain, fp8 = (Costs(model, "lm", mesh, GPUS["h100"], each).forward(0, 1, 2048, 0) for each in numbers)
    assert (plain - fp8) / 32 == pytest.approx(598.7e-6 - 409.1e-6, rel=1e-3)


# -- what is refused before a run starts ---------------------------------------------------------------------------


def refusal(monkeypatch, *overrides: str, device: str = "cuda", reason=None, fp8=None) -> str | None:
    monkeypatch.setattr(layers, "_failure", lambda code: fp8 if code == layers._HAS_FP8 else reason)
    config = compose(["+exp=hh_rlhf", *overrides])
    try:
        check(config, resolve_mesh(config.mesh, 2), config.model)
        layers.check_layers(config, device, is_main=True)
    except ConfigError as error:
        return str(error)
    return None


FP8 = ["model.layers=te", "dtype=fp8"]


@pytest.mark.parametrize(
    ("overrides", "here", "words"),
    [
        (["model.layers=te"], {}, None),
        (FP8, {}, None),
        (["model.layers=te"], {"device": "cpu"}, ["model.layers=te needs a GPU", "model.layers=own"]),
        (["model.layers=te"], {"reason": "No module named 'x'"}, ["cannot be imported here (No module named 'x')"]),
        (["dtype=fp8"], {}, ["model.layers=te", "dtype=bfloat16"]),
        (["model.layers=te"], {"fp8": "an old GPU"}, None),
        (FP8, {"fp8": "an old GPU"}, ["dtype=fp8 cannot be computed here (an old GPU)", "dtype=bfloat16"]),
        ([*FP8, "plan.device=a100"], {}, ["plan.device=a100", "dtype=bfloat16"]),
        ([*FP8, "model.num_experts=4"], {}, ["experts", "dtype=bfloat16"]),
        ([*FP8, "model.intermediate_size=360"], {}, ["intermediate_size / mesh.tp is 360", "16"]),
        ([*FP8, "mesh.tp=2", "model.positions=learned", "model.max_position_embeddings=528"], {}, ["of 32", "528"]),
        ([*FP8, "mesh.tp=2", "model.intermediate_size=368"], {}, ["is 184", "another mesh.tp"]),
    ],
)
def test_layers_that_cannot_be_computed_are_refused(monkeypatch, overrides, here, words):
    found = refusal(monkeypatch, *overrides, **here)
    assert found is None if words is None else all(word in found for word in words), found


def test_why_another_process_fails(monkeypatch):
    assert layers._failure("import json") is None
    assert layers._failure("import no.such") == "ModuleNotFoundError: No module named 'no'"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / "tests" / name) for name in ("te", "")))
    assert layers._failure(layers._HAS_FP8) is None
    code = layers._HAS_FP8.replace("is_there, reason = ", "is_there, reason = False, 'an old GPU' or ")
    assert layers._failure(code) == "an old GPU"


def test_products_in_8_bits_are_verified_without():
    config = compose(["+exp=hh_rlhf", *FP8])
    assert (small(config, 2).dtype, config.dtype) == ("bfloat16", "fp8")


def test_another_kind_of_layers_goes_on_from_what_is_there(tmp_path):
    """Another size does not."""
    config = compose(["+exp=hh_rlhf", f"output_dir={tmp_path}"])
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.yaml").write_text(yaml.dump({"model": asdict(config.model) | {"layers": "te"}}))
    check_output_dir(config)
    config.model.hidden_size = 64
    with pytest.raises(ConfigError, match=r"model\.hidden_size=64"):
        check_output_dir(config)
