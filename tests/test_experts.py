"""Experts: one grouped product for all of a layer, and the load-balancing loss that keeps them equally busy."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_engine.algorithms.sft import cross_entropy, text_work
from rlhf_engine.config import ConfigError, MeshConfig, ModelConfig, OptimizerConfig
from rlhf_engine.config.model import check_model
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.hf.config import read_model_config, write_model_config
from rlhf_engine.hf.files import HFFolder
from rlhf_engine.hf.shares import whole_tensors
from rlhf_engine.hf.weights import Table, load_weights, parameters
from rlhf_engine.mesh import ParallelMesh
from rlhf_engine.models import experts
from rlhf_engine.models.balance import Balance
from rlhf_engine.models.experts import by_expert, grouped_linear
from rlhf_engine.models.residency import Presence
from rlhf_engine.models.role import RoleModel
from rlhf_engine.models.stream import train_step
from rlhf_engine.observing.metrics import Metrics
from rlhf_engine.observing.trace import Trace
from rlhf_engine.rollout.attention import LEAST
from rlhf_engine.rollout.decoder import Decoder

ROWS, LENGTHS = 4, [12, 7, 9, 3]
SIZES = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64,
    max_position_embeddings=64, initializer_range=0.3, num_experts_per_tok=2, output_router_logits=True,
    router_aux_loss_coef=0.5,
)  # fmt: skip
MODELS = {
    "Mixtral": dict(num_local_experts=5, intermediate_size=48),
    "Qwen3Moe": dict(num_experts=6, moe_intermediate_size=24, norm_topk_prob=False, tie_word_embeddings=True),
}


# -- the product ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "ends"), [(1, [2, 5, 7, 7]), (2, [2, 6, 8, 8])])
def test_tokens_in_the_order_of_their_experts(monkeypatch, threads, ends):
    """Three tokens with two of four experts each: expert 1 has all of them, expert 3 none."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    chosen = torch.tensor([[1, 2], [0, 1], [0, 1]])
    places = by_expert(chosen, 4)
    assert places.tokens.tolist() == [1, 2, 0, 1, 2, 0]
    assert places.ends.tolist() == [2, 5, 6, 6]
    assert places.rows.tolist() == [[2, 5], [0, 3], [1, 4]]
    assert by_expert(chosen, 4, 2).ends.tolist() == ends
    places = by_expert(chosen, 4, 4)
    assert places.ends.tolist() == [4, 8, 12, 12]
    assert places.tokens.tolist() == [1, 2, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0]
    assert places.rows.tolist() == [[4, 8], [0, 5], [1, 6]]


@pytest.mark.parametrize("is_grouped", [True, False])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 9, 0, 0]], ids=str)
def test_the_grouped_product_is_that_of_each(monkeypatch, counts, is_grouped):
    """Values and gradients, against float64; a gradient that was expanded too."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(9, 16, generator=generator), torch.randn(4, 8, 16, generator=generator)
    assert experts.is_grouped(weight)
    monkeypatch.setattr(experts, "is_grouped", lambda weight: is_grouped)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    found = grouped_linear(x, weight, ends)
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted = torch.cat([part @ each.T for part, each in zip(wide[0].split(counts), wide[1], strict=True)])
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    for loss in (lambda out: out.square().sum(), lambda out: out.sum()):
        ours = torch.autograd.grad(loss(found), (x, weight), retain_graph=True)
        theirs = torch.autograd.grad(loss(wanted), wide, retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-5)


def test_sizes_that_torch_does_not_multiply_go_one_by_one():
    """Rows of 16 bytes: 4 numbers of float32, 8 of bfloat16. Torch has no grouped product of float64."""
    assert experts.is_grouped(torch.zeros(2, 4, 8)) and not experts.is_grouped(torch.zeros(2, 4, 6))
    assert not experts.is_grouped(torch.zeros(2, 4, 8, dtype=torch.bfloat16))
    assert not experts.is_grouped(torch.zeros(2, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("capability", "dtype", "inner", "waits"),
    [
        ((9, 0), torch.bfloat16, 16, False),
        ((10, 0), torch.bfloat16, 16, False),
        ((8, 0), torch.bfloat16, 16, True),
        ((9, 0), torch.float32, 16, True),
        ((9, 0), torch.bfloat16, 12, True),
    ],
    ids=str,
)
def test_on_which_gpus_no_size_is_waited_for(monkeypatch, capability, dtype, inner, waits):
    """So that a decode step can be a CUDA graph: where torch has a kernel and does not loop."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        assert experts.waits_for_sizes(torch.empty(2, inner, 16, dtype=dtype, device="cuda")) is waits


# -- the load-balancing loss --------------------------------------------------------------------------------------


def test_the_loss_of_two_layers_by_hand():
    """Three experts, one for each token, two tokens and one of padding in each of two layers.

    Layer 0 chooses 0 and 1, layer 1 chooses 1 and 1: f = [1/4, 3/4, 0]. The sums of the probabilities are
    [0.9, 0.8, 0.3] and [0.4, 1.4, 0.2]: P = [0.325, 0.55, 0.125]. 3 (0.325 / 4 + 0.55 * 3 / 4) = 1.48125; by each
    token's probabilities its derivative is 3 f / 4 = [0.1875, 0.5625, 0].
    """
    probs = torch.tensor([
        [[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.2, 0.2, 0.6]],
        [[0.2, 0.7, 0.1], [0.2, 0.7, 0.1], [0.2, 0.2, 0.6]],
    ])  # fmt: skip
    padding = torch.tensor([False, False, True])
    with one_rank():
        balance = Balance(2, 3, 1, 0.5, torch.device("cpu"))

        def see(layer: int, logits: torch.Tensor) -> torch.Tensor:
            chosen = F.one_hot(logits.argmax(-1), 3).bool()
            return balance.see(layer, logits, chosen, padding, weights)

        weights = torch.ones(3, 3)
        with torch.no_grad(), balance.counting():
            for layer, each in enumerate(probs):
                see(layer, each.log())
        balance.settle(torch.tensor(10))  # tokens that the phase's own loss is a mean over
        assert balance.gradient is not None
        torch.testing.assert_close(balance.gradient, 10 * 0.5 * torch.tensor([0.1875, 0.5625, 0]))
        logits = probs.log().requires_grad_()
        weights = torch.ones(3, 3, requires_grad=True)
        out = torch.stack([see(layer, each) for layer, each in enumerate(logits)])
        out.sum().backward()
        assert torch.equal(out, torch.ones(2, 3, 3))
        wanted = probs.clone().requires_grad_()
        scores = wanted.log().softmax(-1)[:, :2]
        (5 * (scores * torch.tensor([0.1875, 0.5625, 0])).sum()).backward()
        torch.testing.assert_close(logits.grad, wanted.grad * probs)  # d log p = dp / p
        found = balance.figures()
    assert found == pytest.approx(
        {"router_aux_loss": 1.48125, "expert_share_max": 1, "expert_share/0": 0.25, "expert_share/1": 0.75,
         "expert_share/2": 0}
    )  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def theirs(request, tmp_path_factory) -> tuple[Path, float, dict[str, torch.Tensor]]:
    """A mixture of transformers': its folder, and the loss of `rows` and its gradients by the names of a checkpoint."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{request.param}Config")(**SIZES, **MODELS[request.param])
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForCausalLM")(config)
    model.set_experts_implementation("eager")
    tokens, is_token = rows()
    labels = tokens.masked_fill(~is_token, -100)
    loss = model(tokens, attention_mask=is_token.long(), labels=labels).loss
    loss.backward()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    with torch.no_grad():  # gradients get the names of weights where these are saved
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder / "gradients")
    return folder, float(loss), load_file(folder / "gradients" / "model.safetensors")


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(B, T)`, padded, and which are none of the padding."""
    tokens = torch.randint(64, (ROWS, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)


def step(mesh: ParallelMesh, folder: Path, micro_batch_size: int, **options) -> tuple[dict, dict[str, torch.Tensor]]:
    """Figures and gradients of a step on `rows`."""
    model = read_model_config(str(folder))
    role = RoleModel("policy", model, mesh, "lm", torch.float32, OptimizerConfig(clip_grad=1e9), **options)
    load_weights(role.chunks, model, "lm", mesh, HFFolder(str(folder)))
    role.start()
    tokens, is_token = rows()
    batch = SimpleNamespace(tokens=tokens, lengths=torch.tensor(LENGTHS), loss_mask=is_token)
    metrics = Metrics()
    with role.on_device(Presence.TRAINING):
        work = text_work(role, batch, cross_entropy(role), micro_batch_size)
        assert train_step([work], metrics, Trace(mesh.device)) == {"policy": None}
        mine = {name: p.main_grad for name, p in parameters(role.chunks)}  # type: ignore[attr-defined]
        gradients = dict(whole_tensors(mine, Table(model, "lm"), mesh))
    return metrics.reduce(mesh)[0], gradients


@pytest.mark.parametrize(
    ("micro_batch_size", "recompute"), [(4, "none"), (1, "none"), (2, "full"), (2, "selective")], ids=str
)
def test_loss_and_gradients_are_those_of_transformers(theirs, micro_batch_size, recompute):
    """Of one forward over all rows, whatever the micro-batches."""
    folder, loss, wanted = theirs
    with one_rank() as mesh:
        figures, found = step(mesh, folder, micro_batch_size, recompute=recompute)
    assert figures["policy/loss"] + 0.5 * figures["policy/router_aux_loss"] == pytest.approx(loss, rel=1e-6)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        gap = torch.linalg.vector_norm(found[name] - gradient) / torch.linalg.vector_norm(gradient)
        assert gap < 1e-5, f"{name}: {gap:.2g}"


def test_the_loop_has_the_same_loss_and_gradients(monkeypatch, theirs):
    """The grouped product against one expert after the other."""
    with one_rank() as mesh:
        figures, grouped = step(mesh, theirs[0], 2)
        monkeypatch.setattr(experts, "is_grouped", lambda weight: False)
        by_loop, one_by_one = step(mesh, theirs[0], 2)
    assert figures == pytest.approx(by_loop, rel=1e-5)
    for name, gradient in one_by_one.items():
        torch.testing.assert_close(grouped[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


# -- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [24, 26])
def test_a_row_is_the_same_whoever_is_decoded_with_it(inner):
    """To the bit, in float32 on a CPU, grouped and one by one: no expert has fewer rows than are rounded alike."""
    sizes = dict(num_layers=1, hidden_size=16, intermediate_size=inner, num_attention_heads=2, num_key_value_heads=2)
    with one_rank() as mesh:
        role = RoleModel("policy", ModelConfig(**sizes, vocab_size=32, num_experts=6), mesh, "lm", torch.float32)
        generator = torch.Generator().manual_seed(1)
        for parameter in role.chunks.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        decoder, mlp = Decoder(role.chunks[0], mesh.tp_group, 16), role.chunks[0].decoder.layers[0].mlp
        x = torch.randn(20 * LEAST, 16, generator=generator)
        with torch.no_grad():
            whole = decoder._experts(mlp, x)
            for first in range(0, len(x), LEAST):
                part = decoder._experts(mlp, x[first : first + LEAST])
                assert torch.equal(part, whole[first : first + LEAST])
            wanted, _ = mlp(x.unsqueeze(1))
    torch.testing.assert_close(whole, wanted.squeeze(1), atol=1e-4, rtol=1e-5)


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("keys", "coefficient"),
    [
        ({}, 0.0),
        (dict(output_router_logits=True), 0.001),
        (dict(output_router_logits=True, router_aux_loss_coef=0.02), 0.02),
        (dict(output_router_logits=False, router_aux_loss_coef=0.02), 0.0),
    ],
    ids=str,
)
def test_the_coefficient_of_a_checkpoint(tmp_path, architecture, keys, coefficient):
    """As transformers adds the loss: where the router's logits are asked for, which in no released mixture they are."""
    model = ModelConfig(architecture=architecture, num_experts=4, vocab_size=64, qk_norm=architecture == "qwen3_moe")
    config = write_model_config(model)
    assert config["output_router_logits"] is False
    del config["output_router_logits"], config["router_aux_loss_coef"]
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    found = read_model_config(str(tmp_path))
    assert found.router_aux_loss_coef == coefficient
    written = write_model_config(found)
    assert (written["output_router_logits"], written["router_aux_loss_coef"]) == (coefficient > 0, coefficient)


def test_a_model_without_experts_has_nothing_to_balance():
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0\.01 .* num_experts=null has none"):
        check_model(MeshConfig(1, 1, 1), ModelConfig(router_aux_loss_coef=0.01))
