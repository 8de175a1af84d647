"""What is computed in which precision, and that sampler and trainer do it alike."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_engine.algorithms import rollouts
from rlhf_engine.config import ModelConfig, OptimizerConfig, RunConfig
from rlhf_engine.context import TrainState
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.models import layers
from rlhf_engine.models.optim import accumulate_in_products, wrap_ddp
from rlhf_engine.models.role import RoleModel, head_weight
from rlhf_engine.rollout.attention import LEAST
from rlhf_engine.rollout.decoder import Decoder

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
# Triton's interpreter, under which test_kernels_triton.py runs this once more, cuts digits of bfloat16 off where torch
# and GPUs round
HALF = torch.float16 if os.environ.get("TRITON_INTERPRET") == "1" else BFLOAT16
MODELS = {
    "llama": dict(num_key_value_heads=2, tie_word_embeddings=False),
    "biases": dict(num_key_value_heads=4, qkv_bias=True, proj_bias=True, mlp_bias=True, sliding_window=5),
    "gpt2": dict(
        num_key_value_heads=4, positions="learned", norm="layer", gated_mlp=False, activation="gelu_tanh",
        qkv_bias=True, proj_bias=True, mlp_bias=True,
    ),
    "experts": dict(num_key_value_heads=4, num_experts=4, qk_norm=True),
    "weights over all experts": dict(num_key_value_heads=4, num_experts=4, normalize_experts=False),
}  # fmt: skip


def policy(mesh, dtype: torch.dtype, **options) -> RoleModel:
    model = ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4, intermediate_size=96, vocab_size=256)
    for name, value in options.items():
        setattr(model, name, value)
    role = RoleModel("policy", model, mesh, "lm", dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in role.chunks.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (0.9 if "norm" in name else 0))
    return role


@pytest.mark.parametrize("name", MODELS)
def test_sampler_and_trainer_have_one_precision(name):
    """In 16 bits a prompt's logits are those of the trainer's forward to the last bit, and float32."""
    with one_rank() as mesh:
        role = policy(mesh, HALF, **MODELS[name])
        gpt = role.chunks[0]
        tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(2))
        decoder = Decoder(gpt, mesh.tp_group, 16)
        cache = decoder.new_cache(1)
        places = cache.places(torch.ones(12, dtype=torch.int64), torch.arange(12))
        with torch.no_grad():
            logits = decoder.prefill(tokens[0], [(1, 12)], torch.tensor([11]), torch.arange(12), places, cache)
            hidden = gpt(tokens, torch.arange(12).unsqueeze(0), None)
        # of fewer rows BLAS would round the product otherwise
        wanted = (hidden[0, -LEAST:].float() @ head_weight(gpt).float().T)[-1:]
    assert logits.dtype is FLOAT32 and wanted.std() > 0.3
    assert torch.equal(logits, wanted), (logits - wanted).abs().max()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="without a GPU its kernels are interpreted")
def test_a_model_by_kernels_is_one_by_torch(monkeypatch):
    found = []
    for kernels in ("triton", "reference"):
        monkeypatch.setenv("RLHF_KERNELS", kernels)
        with one_rank() as mesh:
            gpt = policy(mesh, FLOAT32, num_key_value_heads=2, qk_norm=True, qkv_bias=True).chunks[0]
            gpt.requires_grad_(True)
            tokens = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(2))
            out = gpt(tokens, torch.arange(7).expand(2, -1), None)
            (out * torch.linspace(-1, 1, 64)).sum().backward()
            grads = {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}
            found.append({"output": out.detach(), **grads})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, wanted in found[1].items():
        torch.testing.assert_close(found[0][name], wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0, msg=name)


def test_decoding_is_the_trainers_arithmetic():
    """But for attention over the cache, which rounds in another order: with one position there is nothing to add up."""
    with one_rank() as mesh, torch.no_grad():
        gpt = policy(mesh, HALF, num_key_value_heads=2, qk_norm=True).chunks[0]
        tokens = torch.tensor([3, 100, 7, 250])
        decoder = Decoder(gpt, mesh.tp_group, 16)
        table = torch.arange(1, 5).unsqueeze(1)
        zeros = torch.zeros(4, dtype=torch.int64)
        logits = decoder.decode(tokens, zeros, table, decoder.new_cache(4))
        hidden = gpt(tokens.unsqueeze(1), zeros.unsqueeze(1), None)
        wanted = hidden[:, 0].float() @ head_weight(gpt).float().T
    assert logits.std() > 0.3 and torch.equal(logits, wanted), (logits - wanted).abs().max()


def test_gradients_of_weights_are_not_rounded():
    """Two tokens give a weight 1 and 1/512; their sum is 1 in bfloat16. Two micro-batches give twice as much."""
    with one_rank() as mesh:
        role = policy(mesh, BFLOAT16, num_key_value_heads=4)
        module = wrap_ddp(role.chunks[0].requires_grad_(True), OptimizerConfig())
        linear = role.chunks[0].decoder.layers[0].mlp.linear_fc2
        found = []
        for within in (False, True):
            if within:
                accumulate_in_products(role.chunks[0])
            module.zero_grad_buffer()
            for _ in range(2):
                x = torch.ones(2, 1, 96, dtype=BFLOAT16, requires_grad=True)
                out, _ = linear(x)
                out.backward(torch.tensor([1.0, 1 / 512], dtype=BFLOAT16)[:, None, None].expand_as(out))
            found.append(linear.weight.main_grad.unique().tolist())
        assert found == [[2.0], [2 + 1 / 256]] and linear.weight.main_grad.dtype is FLOAT32


def test_a_router_is_float32():
    """Of two experts that bfloat16 makes alike the likelier one is chosen, by the trainer and by the sampler."""
    with one_rank() as mesh:
        role = policy(mesh, BFLOAT16, num_key_value_heads=4, num_experts=4)
        mlp = role.chunks[0].decoder.layers[0].mlp
        mlp.router.weight.data[:] = 0
        mlp.router.weight.data[:, 0] = torch.tensor([16.0, 16.0, -16.0, -16.0])
        mlp.router.weight.data[1, 1] = 1 / 64  # half of what bfloat16 tells apart near 16
        x = torch.zeros(1, 64, dtype=BFLOAT16)
        x[:, :2] = 1
        scores = mlp.router.gating(x)
        assert scores.dtype is FLOAT32 and scores.tolist() == [[16, 16 + 1 / 64, -16, -16]]
        role.chunks[0].decoder.config.moe_router_topk = 1
        with torch.no_grad():
            found = Decoder(role.chunks[0], mesh.tp_group, 16)._experts(mlp, x)
            wanted, _ = mlp.experts(x, torch.tensor([0, 1, 0, 0]), torch.ones(1))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("dtype", "limit", "gap", "suffices"),
    [
        (FLOAT32, None, 2e-4, False),
        (FLOAT32, None, 5e-5, True),
        (BFLOAT16, None, 0.2, True),
        (BFLOAT16, None, 2.0, False),
        (BFLOAT16, 0.1, 0.2, False),
    ],
    ids=str,
)
def test_when_the_samplers_log_probs_suffice(dtype, limit, gap, suffices):
    """bfloat16 rounds hidden states to some hundredths of a nat, which is no reason to compute log-probs anew."""
    config = RunConfig()
    config.ppo.old_log_probs, config.ppo.max_log_prob_gap = "sampler", limit or config.ppo.max_log_prob_gap
    state, tokenizer = TrainState(iteration=1, log_prob_gap=gap), SimpleNamespace(end_ids=(0,))
    ctx = SimpleNamespace(config=config, settings=config.ppo, state=state, tokenizer=tokenizer)
    x = SimpleNamespace(sampler_log_probs=torch.zeros(1, 4), tokens=None, lengths=None, response_mask=None)
    body = rollouts.log_probs(ctx, SimpleNamespace(dtype=dtype), x)
    if not suffices:
        assert next(body) is not None  # work for the trainer
        return
    with pytest.raises(StopIteration) as done:
        next(body)
    assert done.value.value == {"log_probs": x.sampler_log_probs}


@pytest.mark.parametrize(
    ("dtype", "window", "is_grouped"),
    [(BFLOAT16, None, True), (BFLOAT16, 8, True), (BFLOAT16, 5, False), (FLOAT32, None, False), (FLOAT32, 5, False)],
    ids=str,
)
def test_attention_on_a_gpu_has_a_fused_kernel(monkeypatch, dtype, window, is_grouped):
    """For grouped heads torch has one without a mask in 16 bits; elsewhere it would hold all scores, so keys and values
    are expanded."""
    called = []

    def noted(q, k, v, enable_gqa, **options):
        called.append((k.shape[1], v.shape[1], enable_gqa))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    core = layers.CoreAttention(SimpleNamespace(), 1, None, None)
    core.window = window
    with FakeTensorMode():
        query, *both = (torch.empty(8, 2, heads, 16, dtype=dtype, device="cuda") for heads in (6, 2, 2))
        core(query, *both)
    assert called == [(2, 2, True) if is_grouped else (6, 6, False)]


@pytest.mark.parametrize("window", [None, 5])
def test_expanded_heads_are_those_of_their_groups(monkeypatch, window):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 8, 16, generator=generator) for heads in (6, 2, 2))
    mask = layers.causal_mask(8, window, q.device)
    grouped = layers.causal_attention(q, k, v, mask)
    monkeypatch.setattr(layers, "_has_grouped_kernel", lambda query, mask: False)
    torch.testing.assert_close(layers.causal_attention(q, k, v, mask), grouped, atol=1e-6, rtol=0)
