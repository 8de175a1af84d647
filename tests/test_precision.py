"""What is computed in which precision, and that sampler and trainer do it alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_engine.algorithms import rollouts
from rlhf_engine.config import ModelConfig, RunConfig
from rlhf_engine.context import TrainState
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.models import layers
from rlhf_engine.models.role import RoleModel, head_weight
from rlhf_engine.rollout.decoder import Decoder

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
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
    """In bfloat16 a prompt's logits are those of the trainer's forward to the last bit, and float32."""
    with one_rank() as mesh:
        role = policy(mesh, BFLOAT16, **MODELS[name])
        gpt = role.chunks[0]
        tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(2))
        decoder = Decoder(gpt, mesh.tp_group, 16)
        lane = decoder.new_cache(1, 16).open(16, 1)
        with torch.no_grad():
            logits = decoder.prefill(tokens, torch.tensor([12]), lane, 0, torch.tensor([0]))
            hidden = gpt(tokens, torch.arange(12).unsqueeze(0), None)
        wanted = hidden[:, -1].float() @ head_weight(gpt).float().T
    assert logits.dtype is FLOAT32 and wanted.std() > 0.3
    assert torch.equal(logits, wanted), (logits - wanted).abs().max()


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
            wanted, _ = mlp.experts.local_experts[1](x)
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
