"""PPO arithmetic against oracles written from the papers: float64, one row and one token at a time.

No oracle shares the vectorised structure under test: GAE is the explicit sum of arXiv:1506.02438, eq. 16, not
a recursion; gradients are central differences of the oracle. Inputs are exact in float32, so both precisions
see the same numbers. The tolerance, relative to the largest expected magnitude (at least 1), is 1e-6 for a
float32 result and 1e-12 for a float64 one.
"""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rlhf_kernels as kernels

SEEDS = (0, 1, 2) if os.environ.get("TRITON_INTERPRET") != "1" else (0,)
ROWS, COLUMNS, VOCAB, PADDED_VOCAB = 6, 12, 11, 16
GAE_SETTINGS = ((1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0))
CLIP, KL_COEF = 0.2, 0.1
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def ragged_batch(seed, num_tokens=COLUMNS):
    """Prompt, response, right padding: row 0 has no response, row 1 one token, row 2 fills its width."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, num_tokens)

    def normal(*size, scale=1.0):
        return (scale * rng.standard_normal(size)).astype(np.float32).astype(np.float64)

    mask = np.zeros(shape, dtype=np.int64)
    for row in range(ROWS):
        prompt = int(rng.integers(0, num_tokens))
        longest = num_tokens - prompt
        response = {0: 0, 1: 1, 2: longest}.get(row, int(rng.integers(1, longest + 1)))
        mask[row, prompt : prompt + response] = 1
    log_probs, values = -abs(normal(*shape, scale=1.5)), normal(*shape)
    batch = SimpleNamespace(
        mask=mask,
        log_probs=log_probs,
        old_log_probs=(log_probs + normal(*shape, scale=0.3)).astype(np.float32).astype(np.float64),
        values=values,
        old_values=(values + normal(*shape, scale=0.2)).astype(np.float32).astype(np.float64),
        returns=normal(*shape),
        advantages=normal(*shape),
        ref_log_probs=(log_probs + normal(*shape, scale=0.4)).astype(np.float32).astype(np.float64),
        chosen=normal(ROWS, scale=3.0),
        rejected=normal(ROWS, scale=3.0),
        logits=normal(*shape, PADDED_VOCAB, scale=2.0),
        tokens=rng.integers(0, VOCAB, shape),
    )
    batch.logits[..., VOCAB:] += 40.0  # padding that would take all the probability if it were counted
    for name in ("values", "returns", "advantages"):
        getattr(batch, name)[mask == 0] += 50.0  # and so would these
    return batch


def as_tensors(batch, dtype):
    return SimpleNamespace(
        **{k: torch.tensor(x, dtype=dtype if x.dtype == np.float64 else None) for k, x in vars(batch).items()}
    )


def masked_tokens(batch):
    return [(row, t) for row, t in np.ndindex(batch.mask.shape) if batch.mask[row, t]]


# --- Oracles ---


def kl_oracle(b, kind):
    out = np.zeros(b.mask.shape)
    for i in np.ndindex(out.shape):
        r = math.exp(b.old_log_probs[i]) / math.exp(b.log_probs[i])
        out[i] = {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - 1 - math.log(r)}[kind]
    return (out,)


def advantages_oracle(b, gamma, gae_lambda):
    rewards, advantages, returns = (np.zeros(b.mask.shape) for _ in range(3))
    for row in range(len(b.mask)):
        response = np.flatnonzero(b.mask[row])
        delta = {}
        for t in response:
            is_last = t == response[-1]
            rewards[row, t] = -KL_COEF * (b.log_probs[row, t] - b.old_log_probs[row, t])
            rewards[row, t] += b.chosen[row] if is_last else 0.0
            next_value = 0.0 if is_last else b.values[row, t + 1]
            delta[t] = rewards[row, t] + gamma * next_value - b.values[row, t]
        for t in response:
            advantages[row, t] = sum((gamma * gae_lambda) ** (s - t) * delta[s] for s in response if s >= t)
            returns[row, t] = advantages[row, t] + b.values[row, t]
    counted = [advantages[i] for i in masked_tokens(b)]
    mean = math.fsum(counted) / max(1, len(counted))
    variance = math.fsum((x - mean) ** 2 for x in counted) / max(1, len(counted))
    return advantages, returns, rewards.sum(1), np.array([len(counted), mean, variance])


def whiten_oracle(b):
    counted = [b.values[i] for i in masked_tokens(b)]
    mean = math.fsum(counted) / len(counted)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in counted) / len(counted))
    out = np.zeros(b.mask.shape)
    for i in masked_tokens(b):
        out[i] = (b.values[i] - mean) / deviation
    return (out,)


def policy_oracle(b):
    loss = ratio_sum = clip_count = kl = 0.0
    for i in masked_tokens(b):
        ratio, advantage = math.exp(b.log_probs[i] - b.old_log_probs[i]), b.advantages[i]
        loss -= min(ratio * advantage, min(max(ratio, 1 - CLIP), 1 + CLIP) * advantage)
        clip_count += ratio > 1 + CLIP if advantage > 0 else ratio < 1 - CLIP
        ratio_sum += ratio
        kl += ratio - 1 - math.log(ratio)
    return loss, ratio_sum, clip_count, kl


# Settings of the policy loss, by name; `weights` stands for one weight a row.
POLICIES = {
    "two_bounds": dict(clip_ratio=0.1, clip_ratio_high=0.28),
    "dual_clip": dict(clip_ratio=0.2, dual_clip=1.3),
    "gspo": dict(kind="gspo", clip_ratio=0.05, clip_ratio_high=0.1),
    "cispo": dict(kind="cispo", clip_ratio=0.3, clip_ratio_high=0.15),
    "reinforce": dict(kind="reinforce"),
    **{kl: dict(kl=kl, kl_coef=0.3) for kl in ("k1", "k2", "k3", "k3+")},
    "weights": dict(kl="k3", kl_coef=0.3, weights=np.array([9.0, 1.0, 0.5, 0.0, 0.25, 2.0])),
}


def choice_oracle(b, name, at=None):
    """A policy loss by its papers' formulas, and its statistics, a token after the other.

    Args:
        at: the batch where what the papers take for constant is computed; the gradient is that of the log-probs.
    """
    options, fixed = dict(clip_ratio=CLIP, kind="ppo", kl=None, kl_coef=0.0) | POLICIES[name], at or b
    low, high = options["clip_ratio"], options.get("clip_ratio_high", options["clip_ratio"])
    loss = ratio_sum = clip_count = approx_kl = 0.0
    for row, t in masked_tokens(b):
        i, advantage = (row, t), b.advantages[row, t]
        ratio = math.exp(b.log_probs[i] - b.old_log_probs[i])
        approx_kl += ratio - 1 - math.log(ratio)
        if options["kind"] == "gspo":  # eq. 7, and 14 for its gradient
            response = np.flatnonzero(b.mask[row])
            mean = math.fsum(fixed.log_probs[row, u] - b.old_log_probs[row, u] for u in response) / len(response)
            ratio = math.exp(mean) * math.exp(b.log_probs[i] - fixed.log_probs[i])
        near = min(max(ratio, 1 - low), 1 + high)
        if options["kind"] == "reinforce":
            term, clipped = -advantage * b.log_probs[i], False
        elif options["kind"] == "cispo":
            there = math.exp(fixed.log_probs[i] - b.old_log_probs[i])
            term = -min(max(there, 1 - low), 1 + high) * advantage * b.log_probs[i]
            clipped = near != ratio
        else:
            term, plain = -min(ratio * advantage, near * advantage), -ratio * advantage
            if "dual_clip" in options and advantage < 0:
                term = min(term, -options["dual_clip"] * advantage)
            clipped = term != plain
        if options["kl"]:
            d = b.log_probs[i] - b.ref_log_probs[i]
            k3 = math.exp(-d) - 1 + d
            value = {"k1": d, "k2": d * d / 2, "k3": k3, "k3+": k3}[options["kl"]]
            gradient = k3 if options["kl"] == "k3" else d * d / 2
            term += options["kl_coef"] * (value if at is None else gradient)
        loss += term * options.get("weights", np.ones(ROWS))[row]
        ratio_sum, clip_count = ratio_sum + ratio, clip_count + clipped
    return loss, ratio_sum, clip_count, approx_kl


def value_oracle(b):
    loss = clip_count = error = 0.0
    for i in masked_tokens(b):
        low, high = b.old_values[i] - CLIP, b.old_values[i] + CLIP
        plain = (b.values[i] - b.returns[i]) ** 2
        clipped = (min(max(b.values[i], low), high) - b.returns[i]) ** 2
        loss += 0.5 * max(plain, clipped)
        clip_count += clipped > plain
        error += plain
    return loss, clip_count, error


def pairwise_oracle(b):
    return (np.array([math.log(1 + math.exp(r - c)) for c, r in zip(b.chosen, b.rejected, strict=True)]),)


def distribution(logits, token, temperature):
    """Log-prob of `token` and entropy of one softmax over the true vocabulary."""
    weights = [math.exp((x - logits[0]) / temperature) for x in logits[:VOCAB]]
    probs = [w / sum(weights) for w in weights]
    return math.log(probs[token]), -sum(p * math.log(p) for p in probs)


def log_probs_oracle(b, temperature):
    log_probs, entropy = np.zeros(b.mask.shape), np.zeros(b.mask.shape)
    for i in np.ndindex(b.mask.shape):
        log_probs[i], entropy[i] = distribution(b.logits[i], b.tokens[i], temperature)
    return log_probs, entropy


def central_difference(f, x, step=1e-5):
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        grad[i] = (f(up) - f(down)) / (2 * step)
    return grad


# --- Functions under test, on the same batch ---


def run_kl(b, kind):
    return (kernels.kl_estimate(b.log_probs, b.old_log_probs, kind),)


def run_advantages(b, gamma, gae_lambda):
    settings = {"kl_coef": KL_COEF, "gamma": gamma, "gae_lambda": gae_lambda}
    return kernels.kl_advantages(b.log_probs, b.old_log_probs, b.values, b.chosen, b.mask, **settings)


def run_whiten(b):
    return (kernels.whiten(b.values, b.mask, eps=0.0),)


def run_policy(b):
    return kernels.clipped_policy_loss(b.log_probs, b.old_log_probs, b.advantages, b.mask, clip_ratio=CLIP)


def run_choice(b, name):
    options = POLICIES[name]
    if "weights" in options:
        options = options | {"weights": torch.tensor(options["weights"], dtype=b.log_probs.dtype)}
    ref = {"ref_log_probs": b.ref_log_probs} if "kl" in options else {}
    return kernels.clipped_policy_loss(b.log_probs, b.old_log_probs, b.advantages, b.mask, **options, **ref)


def run_value(b):
    return kernels.clipped_value_loss(b.values, b.old_values, b.returns, b.mask, clip_value=CLIP)


def run_pairwise(b):
    return (kernels.pairwise_loss(b.chosen, b.rejected),)


def run_log_probs(b, temperature):
    return kernels.token_log_probs(b.logits, b.tokens, vocab_size=VOCAB, temperature=temperature)


# function, oracle, arguments of both, the inputs that must be read at the right token
CASES = [
    *((run_kl, kl_oracle, (kind,), "log_probs old_log_probs") for kind in ("k1", "k2", "k3")),
    *((run_advantages, advantages_oracle, setting, "log_probs old_log_probs values mask chosen")
      for setting in GAE_SETTINGS),
    (run_whiten, whiten_oracle, (), "values mask"),
    (run_policy, policy_oracle, (), "log_probs old_log_probs advantages mask"),
    *((run_choice, choice_oracle, (name,), "log_probs advantages mask") for name in POLICIES),
    (run_value, value_oracle, (), "values old_values returns mask"),
    (run_pairwise, pairwise_oracle, (), "chosen rejected"),
    *((run_log_probs, log_probs_oracle, (temperature,), "logits tokens") for temperature in (1.0, 0.7, 2.5)),
]  # fmt: skip


def case_name(case):
    return "-".join([case[0].__name__.removeprefix("run_"), *map(str, case[2])])


def agree(actual, expected, tolerance):
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    allowed = tolerance * max(1.0, abs(expected).max(initial=0.0))
    return actual.shape == expected.shape and np.allclose(actual, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("num_tokens", (COLUMNS, 1))
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_agrees_with_the_oracle(case, seed, num_tokens, dtype):
    run, oracle, arguments, _ = case
    batch = ragged_batch(seed, num_tokens)
    results = run(as_tensors(batch, dtype), *arguments)
    for actual, expected in zip(results, oracle(batch, *arguments), strict=True):
        assert agree(actual, expected, TOLERANCE[actual.dtype]), (actual, expected)


@pytest.mark.parametrize("case, name", [
    pytest.param(case, name, id=f"{case_name(case)}-{name}") for case in CASES for name in case[3].split()
])  # fmt: skip
def test_an_input_shifted_by_one_token_is_noticed(case, name):
    run, oracle, arguments, _ = case
    batch = ragged_batch(0)
    expected, x = oracle(batch, *arguments), getattr(batch, name)
    setattr(batch, name, np.roll(x, 1, axis=min(1, x.ndim - 1)))
    actual = run(as_tensors(batch, torch.float32), *arguments)
    assert not all(agree(a, e, 1e-3) for a, e in zip(actual, expected, strict=True))


# --- Gradients ---


@pytest.mark.parametrize("temperature, offset", ((1.0, 0.0), (0.7, 0.0), (1.0, 1000.0)))
@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_log_prob_and_entropy(seed, temperature, offset):
    batch = ragged_batch(seed, num_tokens=4)
    batch.logits = (batch.logits + offset).astype(np.float32).astype(np.float64)
    incoming = np.random.default_rng(seed).standard_normal((2, *batch.tokens.shape)).astype(np.float32)
    logits = torch.tensor(batch.logits, dtype=torch.float32, requires_grad=True)
    outputs = run_log_probs(SimpleNamespace(logits=logits, tokens=torch.tensor(batch.tokens)), temperature)
    torch.autograd.backward(outputs, tuple(torch.tensor(incoming)))
    for i in np.ndindex(batch.tokens.shape):
        weight, token = incoming[(slice(None), *i)].astype(np.float64), batch.tokens[i]
        expected = central_difference(
            lambda x, w=weight, k=token: float(w @ distribution(x, k, temperature)), batch.logits[i]
        )
        assert agree(logits.grad[i], expected, 1e-6)
        assert not agree(logits.grad[i], np.roll(expected, 1), 1e-3)
    assert not logits.grad[..., VOCAB:].any()


@pytest.mark.parametrize("run, oracle, name", [(run_policy, policy_oracle, "log_probs"),
                                               (run_value, value_oracle, "values")])  # fmt: skip
@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_clipped_losses(run, oracle, name, seed):
    batch = ragged_batch(seed)
    tensors = as_tensors(batch, torch.float64)
    x = getattr(tensors, name).requires_grad_()
    run(tensors).loss.backward()
    expected = central_difference(
        lambda v: oracle(SimpleNamespace(**{**vars(batch), name: v}))[0], getattr(batch, name)
    )
    assert agree(x.grad, expected, 1e-6)
    assert not agree(x.grad, np.roll(expected, 1, 1), 1e-3)
    assert not x.grad[tensors.mask == 0].any()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_each_policy_loss(name, seed):
    batch = ragged_batch(seed)
    tensors = as_tensors(batch, torch.float64)
    (3 * run_choice(SimpleNamespace(**vars(tensors) | {"log_probs": tensors.log_probs.requires_grad_()}), name).loss
     ).backward()  # fmt: skip
    expected = 3 * central_difference(
        lambda v: choice_oracle(SimpleNamespace(**{**vars(batch), "log_probs": v}), name, at=batch)[0], batch.log_probs
    )
    assert agree(tensors.log_probs.grad, expected, 1e-6)
    assert not tensors.log_probs.grad[tensors.mask == 0].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_gspo_of_one_advantage_a_response_is_the_sequence_ratio(seed):
    """Its gradient, with each row's mean over its tokens, is that of -min(s A, clip(s) A) with s of the sequence."""
    batch = ragged_batch(seed)
    lengths = batch.mask.sum(1).clip(1)
    scores = torch.tensor(batch.chosen)
    tensors = as_tensors(batch, torch.float64)
    advantages, x = scores.unsqueeze(1).expand(tensors.mask.shape), tensors.log_probs.requires_grad_()
    weights = 1 / torch.tensor(lengths).double()
    found = kernels.clipped_policy_loss(
        x, tensors.old_log_probs, advantages, tensors.mask, kind="gspo", clip_ratio=0.05, weights=weights
    )
    found.loss.backward()

    def loss(log_probs):
        total = 0.0
        for row in range(1, ROWS):  # the first has no response
            tokens = np.flatnonzero(batch.mask[row])
            s = math.exp(np.mean(log_probs[row, tokens] - batch.old_log_probs[row, tokens]))
            total -= min(s * batch.chosen[row], min(max(s, 0.95), 1.05) * batch.chosen[row])
        return total

    assert float(found.loss) == pytest.approx(loss(batch.log_probs), rel=1e-12)
    assert agree(x.grad, central_difference(loss, batch.log_probs), 1e-6)


def test_each_row_may_have_its_lambda():
    b = as_tensors(ragged_batch(0), torch.float32)
    mixtures = torch.tensor([0.0, 0.3, 0.5, 0.9, 0.95, 1.0])
    for row, mixture in enumerate(mixtures.tolist()):
        for found, wanted in zip(run_advantages(b, 0.9, mixtures), run_advantages(b, 0.9, mixture), strict=True):
            if found.shape != (3,):
                torch.testing.assert_close(found[row], wanted[row])


def test_lambda_by_length():
    """VAPO's with alpha 0.05: 0.9 of 200 tokens, 0.99 of 2,000."""
    from rlhf_engine.algorithms.ppo import _lambdas
    from rlhf_engine.config import PPOConfig

    assert _lambdas(PPOConfig(gae_alpha=0.05), torch.tensor([5, 200, 2000])).tolist() == pytest.approx([0, 0.9, 0.99])
    assert _lambdas(PPOConfig(), torch.tensor([5, 200])).tolist() == pytest.approx([0.95, 0.95])


def test_policy_losses_by_hand():
    """One token each: log-ratio ln 1.5, so a ratio of 1.5, and 1.1 for the reference's 1 / ratio."""
    log, one = math.log, torch.ones(1, 1)

    def loss(advantage, new=0.75, old=0.5, **options):
        new, old = (torch.full((1, 1), p, dtype=torch.float64).log() for p in (new, old))
        return float(kernels.clipped_policy_loss(new, old, advantage * one, one, **options).loss)

    assert loss(2.0) == pytest.approx(-2.4)  # clipped at 1.2
    assert loss(2.0, clip_ratio_high=0.4) == pytest.approx(-2.8)
    assert loss(2.0, clip_ratio_high=0.6) == pytest.approx(-3.0)
    assert loss(-2.0) == pytest.approx(3.0)
    assert loss(-2.0, dual_clip=1.25) == pytest.approx(2.5)
    assert loss(-2.0, new=0.25) == pytest.approx(1.6)  # a ratio of a half is clipped at 0.8
    assert loss(2.0, kind="cispo", clip_ratio=1.0, clip_ratio_high=0.25) == pytest.approx(-2.5 * log(0.75))
    assert loss(2.0, kind="reinforce") == pytest.approx(-2 * log(0.75))
    ref = dict(ref_log_probs=torch.full((1, 1), log(0.825), dtype=torch.float64), kl_coef=10.0)
    for kl, value in (("k1", -log(1.1)), ("k2", log(1.1) ** 2 / 2), ("k3", 0.1 - log(1.1)), ("k3+", 0.1 - log(1.1))):
        assert loss(0.0, kl=kl, **ref) == pytest.approx(10 * value), kl


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gppo"}, "policy loss 'gppo' is unknown: ppo, gspo, cispo, reinforce"),
        ({"kl": "k4"}, r"KL term 'k4' is unknown: k1, k2, k3, k3\+"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 must be above 1"),
    ],
    ids=["kind", "kl", "dual_clip"],
)
def test_a_policy_loss_that_there_is_not(options, message):
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=message):
        kernels.clipped_policy_loss(x, x, x, x, **options)


def test_the_kl_term_pulls_back_from_beyond_its_clamp():
    x, zeros, ones = torch.tensor([[30.0, -30.0]], requires_grad=True), torch.zeros(1, 2), torch.ones(1, 2)
    kernels.clipped_policy_loss(x, x, zeros, ones, ref_log_probs=zeros, kl="k2", kl_coef=1.0).loss.backward()
    assert x.grad.tolist() == [[20.0, -20.0]]


def test_policy_gradient_flows_to_log_probs_alone():
    b = as_tensors(ragged_batch(0), torch.float32)
    for x in (b.log_probs, b.old_log_probs, b.advantages):
        x.requires_grad_()
    run_policy(b).loss.backward()
    assert b.log_probs.grad is not None
    assert b.old_log_probs.grad is None and b.advantages.grad is None


# --- Properties ---


@pytest.mark.parametrize("kind", ("k1", "k2", "k3"))
def test_kl_estimators_vanish_on_equal_policies_and_saturate_on_disjoint_ones(kind):
    x = -torch.rand(4, 5)
    assert not kernels.kl_estimate(x, x, kind).any()
    for sign in (1.0, -1.0):
        limit = kernels.kl_estimate(torch.zeros(1), torch.tensor([sign * 20.0]), kind)
        assert torch.equal(kernels.kl_estimate(torch.zeros(1), torch.tensor([sign * 500.0]), kind), limit)
        assert limit.isfinite().all()


@pytest.mark.parametrize("scale", (1e-5, 1e-3, 1.0, 30.0))
def test_k3_is_never_negative(scale):
    log_probs, ref_log_probs = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)) * scale
    assert (kernels.kl_estimate(log_probs, ref_log_probs, "k3") >= 0).all()


@pytest.mark.parametrize("scale", (1e-5, 1e-4, 1e-3))
def test_approx_kl_of_a_small_policy_step(scale):
    log_ratio = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)) * scale
    zeros = torch.zeros_like(log_ratio)
    loss = kernels.clipped_policy_loss(log_ratio, zeros, zeros, torch.ones_like(zeros))
    expected = math.fsum(math.expm1(x) - x for x in log_ratio[0].tolist())
    assert float(loss.approx_kl) == pytest.approx(expected, rel=1e-2)


def test_policy_ratio_is_clamped():
    log_probs, old, one = torch.tensor([[90.0, -90.0]]), torch.zeros(1, 2), torch.ones(1, 2)
    loss = kernels.clipped_policy_loss(log_probs, old, -one, one)
    assert float(loss.ratio) == pytest.approx(math.exp(20) + math.exp(-20))
    assert float(loss.loss) == pytest.approx(math.exp(20) + 0.8)


@pytest.mark.parametrize("seed", SEEDS)
def test_value_within_the_clip_range_is_not_counted_as_clipped(seed):
    """In float32 V_old + (V - V_old) is not always V, most visibly for the small values of a fresh critic."""
    values, old_values, returns = 0.02 * torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(seed))
    loss = kernels.clipped_value_loss(values, old_values, returns, torch.ones(8, 64), clip_value=CLIP)
    assert (values - old_values).abs().max() < CLIP and loss.clip_fraction == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_whitened_batch_has_mean_0_and_variance_1(seed):
    b = as_tensors(ragged_batch(seed), torch.float64)
    white, counted = kernels.whiten(b.values, b.mask), b.mask.bool()
    assert float(white[counted].mean()) == pytest.approx(0, abs=1e-6)
    assert float(white[counted].var(correction=0)) == pytest.approx(1, abs=1e-6)
    assert not white[~counted].any()


def test_an_empty_mask_gives_zeros():
    b = as_tensors(ragged_batch(0), torch.float32)
    b.mask.zero_()
    for x in (kernels.whiten(b.values, b.mask), *run_advantages(b, 1.0, 0.95), *run_policy(b), *run_value(b)):
        assert not x.any()


@pytest.mark.parametrize("token", (VOCAB, PADDED_VOCAB - 1, PADDED_VOCAB, -1))
def test_token_outside_the_true_vocabulary_is_refused(token):
    logits, tokens = torch.zeros(1, 3, PADDED_VOCAB), torch.tensor([[0, token, 1]])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        kernels.token_log_probs(logits, tokens, vocab_size=VOCAB)


def test_scores_are_clipped_then_standardised_by_all_so_far():
    """As XTuner's norm_rewards has it; a response without an end loses its penalty after that."""
    from rlhf_engine.algorithms.rollouts import shape_scores
    from rlhf_engine.config import RunConfig
    from rlhf_engine.context import TrainState

    ppo = RunConfig().ppo
    ctx = SimpleNamespace(settings=ppo, state=TrainState())
    ppo.score_min, ppo.score_max, ppo.score_center, ppo.score_scale, ppo.missing_eos_penalty = -2, 3, True, True, 0.5
    first, second = np.array([-9.0, 1.0, 2.0]), np.array([0.0, 7.0])
    shape_scores(ctx, torch.tensor(first), torch.tensor([True, True, True]))
    found = shape_scores(ctx, torch.tensor(second), torch.tensor([True, False]))
    seen = np.concatenate([first, second]).clip(-2, 3)
    np.testing.assert_allclose(found, (second.clip(-2, 3) - seen.mean()) / seen.std() - [0, 0.5], rtol=1e-6)


def test_what_overlong_responses_lose():
    """By DAPO's eq. 13: nothing up to 12 of 16 tokens, and then a quarter of the penalty for each."""
    from rlhf_engine.algorithms.rollouts import overlong
    from rlhf_engine.config import RunConfig

    config = RunConfig()
    config.rollout.max_new_tokens, config.ppo.overlong_buffer, config.ppo.overlong_penalty = 16, 4, 2.0
    ctx = SimpleNamespace(settings=config.ppo, config=config)
    assert overlong(ctx, torch.tensor([1, 12, 13, 15, 16])).tolist() == [0, 0, 0.5, 1.5, 2]
    config.ppo.overlong_buffer = 0
    assert not overlong(ctx, torch.tensor([1, 16])).any()
