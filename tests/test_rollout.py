"""Generation: equal to re-forwarding the whole sequence, and independent of mesh, slots and order."""

from __future__ import annotations

import cases
import pytest
import torch
from conftest import SMALL

from rlhf_engine.rollout.sampling import sample_keys, uniforms

SETTINGS = [*SMALL, "phases=[sft]", "rollout.max_new_tokens=10"]
PROMPTS = [[1, *[(7 * i + 3 * j) % 500 + 3 for j in range(2 + i % 5)]] for i in range(11)]
IDS = list(range(len(PROMPTS)))


@pytest.fixture(scope="module")
def settings(small_run) -> list[str]:
    # larger random weights than usual: the distribution must not be flat
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    return [*SETTINGS, f"tokenizer.path={tokenizer}", "output_dir=nowhere", "model.init_std=0.3"]


@pytest.fixture(scope="module")
def sampled(worlds, settings):
    return worlds(1).run(cases.generate, settings, (1, 1, 1), PROMPTS, IDS)[0]


def tokens_of(responses) -> list[list[int]]:
    return [tokens for tokens, _, _ in responses]


def test_greedy_equals_reforwarding(worlds, settings):
    world = worlds(1)
    greedy = world.run(cases.generate, [*settings, "rollout.greedy=true", "rollout.slots=3"], (1, 1, 1), PROMPTS, IDS)[
        0
    ]
    for prompt, (tokens, log_probs, _) in zip(PROMPTS, greedy, strict=True):
        logits = world.run(cases.logits, settings, (1, 1, 1), [prompt + tokens])[0][0]
        for i, token in enumerate(tokens):
            row = logits[len(prompt) + i - 1].clone()
            if i == 0:
                row[2] = -torch.inf  # min_new_tokens=1: the end token cannot come first
            assert int(row.argmax()) == token
            assert float(row.log_softmax(-1)[token]) == pytest.approx(log_probs[i], abs=2e-5)


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 1, True)], ids=str)
def test_layouts_sample_the_same(worlds, settings, sampled, layout):
    for responses in worlds(2).run(cases.generate, settings, layout, PROMPTS, IDS):
        assert tokens_of(responses) == tokens_of(sampled)


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_slots_and_order_do_not_matter(worlds, settings, sampled, slots):
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(slots)).tolist()
    found = worlds(1).run(
        cases.generate, [*settings, f"rollout.slots={slots}"], (1, 1, 1), [PROMPTS[i] for i in order], order
    )[0]
    assert tokens_of(found) == [sampled[i][0] for i in order]


def test_every_end_token_ends_a_response(worlds, settings):
    """And a second one changes nothing before it."""
    settings = [*settings, "rollout.min_new_tokens=0"]
    free = worlds(1).run(cases.generate, settings, (1, 1, 1), PROMPTS, IDS)[0]
    end = max(
        (t for tokens in tokens_of(free) for t in tokens[:-1]), key=lambda t: sum(t in r for r in tokens_of(free))
    )
    for layout in ((1, 1, 1), (2, 1, 1)):
        ended = worlds(layout[0]).run(cases.generate, settings, layout, PROMPTS, IDS, (end,))[0]
        for (tokens, _, finished), (free_tokens, _, free_finished) in zip(ended, free, strict=True):
            stop = free_tokens.index(end) + 1 if end in free_tokens else len(free_tokens)
            assert tokens == free_tokens[:stop] and finished == (free_finished or end in free_tokens)
    late = worlds(1).run(cases.generate, [*settings, "rollout.min_new_tokens=4"], (1, 1, 1), PROMPTS, IDS, (end,))[0]
    assert not any({2, end} & set(tokens[:3]) for tokens in tokens_of(late))


def test_fewer_prompts_than_replicas(worlds, settings, sampled):
    assert tokens_of(worlds(2).run(cases.generate, settings, (1, 1, 2), PROMPTS[:1], [0])[1]) == [sampled[0][0]]


def test_a_prompt_longer_than_the_context_is_refused(worlds, settings):
    with pytest.raises(AssertionError, match="prompt 0 has 600 tokens; the model's context takes 1 to 511"):
        worlds(1).run(cases.generate, settings, (1, 1, 1), [[5] * 600], [0])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "options", [[], ["rollout.temperature=0.7"], ["rollout.top_k=3"], ["rollout.top_p=0.8"]], ids=lambda o: "".join(o)
)
def test_sampled_frequencies(worlds, tp, options):
    """Chi-square of 20,000 draws against the probabilities, truncated ones included."""
    scores, draws = [0.3, -1.0, 2.0, 1.1, -0.2, 0.9, -3.0, 1.9], 20_000
    settings = ["+exp=hh_rlhf", "rollout.min_new_tokens=0", *options]
    counts = worlds(tp).run(cases.sampled_frequencies, settings, (tp, 1, 1), scores, draws)[0]
    x = torch.tensor(scores, dtype=torch.float64) / (0.7 if "temperature" in "".join(options) else 1.0)
    p = x.softmax(0)
    if "top_k" in "".join(options):
        p[p < p.topk(3).values[-1]] = 0
    if "top_p" in "".join(options):
        order = p.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        p[order[before >= 0.8]] = 0
    p /= p.sum()
    counts = torch.tensor(counts, dtype=torch.float64)
    assert not counts[p == 0].any()
    kept = p > 0
    chi_square = ((counts - draws * p)[kept].square() / (draws * p)[kept]).sum()
    # 99.99th percentile at up to 7 degrees of freedom
    assert chi_square < 29.9


def test_uniforms_are_uniform_and_belong_to_the_sample():
    keys = sample_keys(1, 0, torch.arange(200))
    steps = torch.arange(100).repeat(200, 1)
    draws = uniforms(keys.unsqueeze(1), steps)
    counts = torch.histc(draws.flatten(), 50, 0, 1)
    assert ((counts - 400).square() / 400).sum() < 100  # 49 degrees of freedom
    assert abs(float(torch.corrcoef(torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()]))[0, 1])) < 0.03
    assert torch.equal(draws[7], uniforms(keys[7:8], torch.arange(100)))
    assert not torch.equal(draws[0], uniforms(sample_keys(1, 1, torch.arange(1)), torch.arange(100)))
