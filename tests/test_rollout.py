"""Generation: equal to re-forwarding the whole sequence, and independent of mesh, slots and order."""

from __future__ import annotations

import functools
import json

import cases
import pytest
import torch
from conftest import SMALL

from rlhf_engine.data.tokenizer import Tokenizer
from rlhf_engine.rollout.generate import split
from rlhf_engine.rollout.sampling import sample_keys, uniforms

SETTINGS = [*SMALL, "phases=[sft]", "rollout.max_new_tokens=10"]
PROMPTS = [[1, *[(7 * i + 3 * j) % 500 + 3 for j in range(2 + i % 5)]] for i in range(11)]
IDS = list(range(len(PROMPTS)))


@pytest.fixture(scope="module")
def settings(small_run) -> list[str]:
    # larger random weights than usual: the distribution must not be flat
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    return [*SETTINGS, f"tokenizer.path={tokenizer}", f"output_dir={small_run}/nowhere", "model.init_std=0.3"]


@pytest.fixture(scope="module")
def sampled(worlds, settings):
    return generate(worlds, settings)


def generate(worlds, settings, layout=(1, 1, 1), prompts=PROMPTS, ids=IDS, **options):
    """The responses, which are the same on every rank."""
    found = worlds(layout[0] * layout[1] * layout[2]).run(
        functools.partial(cases.generate, **options), settings, layout, prompts, ids
    )
    for responses, _ in found[1:]:
        assert responses == found[0][0]
    return found[0][0]


def tokens_of(responses) -> list[list[int]]:
    return [tokens for tokens, _, _ in responses]


def test_greedy_equals_reforwarding(worlds, settings):
    greedy = generate(worlds, [*settings, "rollout.greedy=true", "rollout.slots=3"])
    for prompt, (tokens, log_probs, _) in zip(PROMPTS, greedy, strict=True):
        logits = worlds(1).run(cases.logits, settings, (1, 1, 1), [prompt + tokens])[0][0]
        for i, token in enumerate(tokens):
            row = logits[len(prompt) + i - 1].clone()
            if i == 0:
                row[2] = -torch.inf  # min_new_tokens=1: the end token cannot come first
            assert int(row.argmax()) == token
            assert float(row.log_softmax(-1)[token]) == pytest.approx(log_probs[i], abs=2e-5)


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 1, True)], ids=str)
def test_layouts_sample_the_same(worlds, settings, sampled, layout):
    assert tokens_of(generate(worlds, settings, layout)) == tokens_of(sampled)


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("slots", [1, 4, 9, 64])
def test_slots_and_order_do_not_matter(worlds, settings, sampled, slots, layout):
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(slots)).tolist()
    found = generate(worlds, [*settings, f"rollout.slots={slots}"], layout, [PROMPTS[i] for i in order], order)
    expected = [sampled[i] for i in order]
    assert (found == expected) if layout[0] == 1 else (tokens_of(found) == tokens_of(expected))  # to the bit


LIMITS = [(7 * i) % 41 + 1 for i in range(60)]  # lanes empty, merge and fill again
MANY = [PROMPTS[i % 7] for i in range(60)]


@pytest.fixture(scope="module")
def many(worlds, settings):
    """Several samples of each prompt, one sequence at a time."""
    one = [*settings, "rollout.slots=1", "rollout.max_new_tokens=41"]
    return generate(worlds, one, prompts=MANY, ids=list(range(60)), limits=LIMITS)


@pytest.mark.parametrize(
    "options", [["slots=64"], ["slots=16"], ["slots=24", "kv_tokens=200"], ["kv_tokens=47"]], ids=str
)
@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 2)], ids=str)
def test_samples_of_one_prompt_and_lengths_of_their_own(worlds, settings, many, options, layout):
    order = torch.randperm(60, generator=torch.Generator().manual_seed(len(options))).tolist()
    options = [*settings, "rollout.max_new_tokens=41", *(f"rollout.{option}" for option in options)]
    prompts, limits = [MANY[i] for i in order], [LIMITS[i] for i in order]
    found = generate(worlds, options, layout, prompts, order, limits=limits)
    assert tokens_of(found) == [many[i][0] for i in order]
    for (tokens, _, finished), limit in zip(found, limits, strict=True):
        assert len(tokens) == limit or finished
    assert len({tuple(tokens[:3]) for tokens, _, _ in found}) > 30


@pytest.mark.parametrize("options", [["slots=64"], ["slots=24", "kv_tokens=200"], ["cuda_graphs=false"]], ids=str)
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1)], ids=str)
def test_rows_are_read_one_by_one_as_on_cuda(worlds, settings, many, options, layout):
    """In steps of fixed sizes, the rest of a step filled with rows of nothing."""
    options = [*settings, "rollout.max_new_tokens=41", *(f"rollout.{option}" for option in options)]
    found = generate(worlds, options, layout, MANY, list(range(60)), limits=LIMITS, as_on_cuda=True)
    assert tokens_of(found) == tokens_of(many)


SHARED = [[(5 * i + 3 * j) % 500 + 3 for j in range((5, 20, 40, 70)[i % 4])] for i in range(8) for _ in range(5)]
ENDS = tuple(range(40, 70))  # so many that responses end long before they have to


@pytest.mark.parametrize(
    ("model", "layouts"),
    [([], [(1, 1, 1), (2, 1, 1), (1, 2, 1)]), (["model.architecture=mixtral", "model.num_experts=4"], [(1, 1, 1)])],
    ids=["dense", "experts"],
)
def test_the_same_in_a_cache_that_holds_a_twentieth_of_the_work(worlds, settings, model, layouts):
    """Rows step back, are computed again, and become what they would have become; samples of a prompt share it."""
    settings = [*settings, *model, "rollout.max_new_tokens=90", "rollout.slots=16"]
    work = sum(map(len, SHARED)) + 90 * len(SHARED)
    few = [*settings, f"rollout.kv_tokens={work // 20}"]
    run = functools.partial(cases.generate, ends=ENDS)
    (whole, progress), *_ = worlds(1).run(run, settings, (1, 1, 1), SHARED, list(range(40)))
    assert progress.preempted == 0 and len({tuple(tokens) for tokens in tokens_of(whole)}) > 30
    for layout, as_on_cuda in ((layouts[0], True), *((layout, False) for layout in layouts)):
        one = functools.partial(run, as_on_cuda=as_on_cuda)
        for found, progress in worlds(2 if 2 in layout else 1).run(one, few, layout, SHARED, list(range(40))):
            assert tokens_of(found) == tokens_of(whole)
            assert [finished for *_, finished in found] == [finished for *_, finished in whole]
            is_equal = layout[0] == 1 and not as_on_cuda  # to the bit
            for (_, log_probs, _), (_, expected, _) in zip(found, whole, strict=True):
                assert log_probs == (expected if is_equal else pytest.approx(expected, abs=1e-5))
            assert progress.preempted > 2 and progress.rows_done == 40
            assert progress.tokens == sum(map(len, tokens_of(whole)))


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_a_response_goes_on_where_it_was_left(worlds, settings, many, layout):
    """After none, one or all but one of its tokens, with their log-probs and the same noise."""
    cuts = [(0, 1, len(tokens) - 1)[i % 3] if len(tokens) > 1 else 0 for i, (tokens, *_) in enumerate(many)]
    begun = [(tokens[:cut], log_probs[:cut], False) for (tokens, log_probs, _), cut in zip(many, cuts, strict=True)]
    run = functools.partial(cases.generate, limits=LIMITS, begun=begun)
    slots = [*settings, "rollout.slots=7"]
    for found, progress in worlds(layout[1] * layout[2]).run(run, slots, layout, MANY, list(range(60))):
        assert [(t, p) for t, p, _ in found] == [(t, p) for t, p, _ in many]
        assert progress.tokens == sum(len(t) - len(b) for (t, *_), (b, *_) in zip(many, begun, strict=True))
    marked = [([7] * len(t), [-3.0] * len(t), False) for t, *_ in begun]  # nothing of it is made anew
    found, _ = worlds(1).run(functools.partial(run, begun=marked), slots, (1, 1, 1), MANY, list(range(60)))[0]
    for (tokens, log_probs, _), (first, their, _) in zip(found, marked, strict=True):
        assert (tokens[: len(first)], log_probs[: len(first)]) == (first, their)


def test_samples_of_a_prompt_keep_it_once(worlds, settings):
    """70 tokens fill two blocks, and each of five samples has one of its own for the rest."""
    assert worlds(1).run(cases.blocks_of_prompts, settings, [[7] * 70] * 5)[0] == 2 + 5


@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_what_is_reported(worlds, settings, as_on_cuda):
    """A row that has ended is decoded once more where that is known late, and nobody counts it."""
    run = functools.partial(cases.generate, ends=ENDS, as_on_cuda=as_on_cuda)
    for layout in ((1, 1, 1), (1, 1, 2), (2, 1, 1)):
        slots = [*settings, "rollout.slots=4"]
        for responses, progress in worlds(2 if 2 in layout else 1).run(run, slots, layout, PROMPTS, IDS):
            assert len(set(map(len, tokens_of(responses)))) > 3
            assert progress.rows_done == progress.num_rows == len(PROMPTS)
            assert progress.tokens == sum(map(len, tokens_of(responses)))
            # the first token of each comes with its prompt
            assert progress.rows_decoded == progress.tokens - len(PROMPTS)
            assert 0.3 < progress.slot_occupancy <= 1 and 0 < progress.prefill_share < 1
            assert 0 < progress.idle_share < 1 if layout == (1, 1, 2) else abs(progress.idle_share) < 0.2


def test_work_is_split_by_length():
    prompts = [[i // 4] * (i // 4 + 1) for i in range(64)]
    need = [len(prompt) + 8 for prompt in prompts]
    shares = split(prompts, need, 3)
    assert sorted(i for share in shares for i in share) == list(range(64))
    loads = [sum(need[i] for i in share) for share in shares]
    assert max(loads) < 1.1 * min(loads)
    assert all({i // 4 * 4 + k for k in range(4)} <= set(share) for share in shares for i in share)
    assert split(prompts[:1] * 6, [5] * 6, 3) == [[0, 3], [1, 4], [2, 5]]
    assert split([], [], 2) == [[], []]


def test_every_end_token_ends_a_response(worlds, settings):
    """And a second one changes nothing before it."""
    settings = [*settings, "rollout.min_new_tokens=0"]
    free = generate(worlds, settings)
    end = max(
        (t for tokens in tokens_of(free) for t in tokens[:-1]), key=lambda t: sum(t in r for r in tokens_of(free))
    )
    for layout in ((1, 1, 1), (2, 1, 1)):
        ended = generate(worlds, settings, layout, ends=(end,))
        for (tokens, _, finished), (free_tokens, _, free_finished) in zip(ended, free, strict=True):
            stop = free_tokens.index(end) + 1 if end in free_tokens else len(free_tokens)
            assert tokens == free_tokens[:stop] and finished == (free_finished or end in free_tokens)
    late = generate(worlds, [*settings, "rollout.min_new_tokens=4"], ends=(end,))
    assert not any({2, end} & set(tokens[:3]) for tokens in tokens_of(late))


@pytest.mark.parametrize("least", [0, 4])
def test_a_stop_string_ends_a_response_behind_the_token_that_completes_it(worlds, settings, small_run, least):
    decode = Tokenizer(str(small_run / "tokenizer" / "tokenizer.model")).decode
    wanted = generate(worlds, [*settings, f"rollout.min_new_tokens={least}"])
    # from the last character of one token to the first of the next
    pairs = [
        now[len(before) - 1 : len(before) + 1]
        for tokens in tokens_of(wanted)
        for before, now in ((decode(tokens[:k]), decode(tokens[: k + 1])) for k in range(4, 10))
        if now.startswith(before) and len(now) > len(before)
    ]
    strings = [next(pair for pair in pairs if pair.isalpha() and pair.isascii()), "not in any of them"]
    changed = [*settings, f"rollout.stop={json.dumps(strings)}", f"rollout.min_new_tokens={least}"]
    stopped = 0
    for layout, as_on_cuda in (((1, 1, 1), False), ((1, 1, 1), True), ((2, 1, 1), False), ((1, 1, 2), False)):
        for (tokens, _, finished), (free, _, free_finished) in zip(
            generate(worlds, changed, layout, as_on_cuda=as_on_cuda), wanted, strict=True
        ):
            ends = [
                n
                for n in range(max(1, least), len(free) + 1)
                if decode(free[:n]).count(strings[0]) > decode(free[: n - 1]).count(strings[0])
            ]
            assert tokens == free[: ends[0] if ends else None] and finished == (bool(ends) or free_finished)
            stopped += bool(ends)
    assert stopped >= 4  # once each time


def test_fewer_prompts_than_replicas(worlds, settings, sampled):
    assert tokens_of(generate(worlds, settings, (1, 1, 2), PROMPTS[:1], [0])) == [sampled[0][0]]
    for layout in ((1, 1, 1), (1, 1, 2)):
        assert generate(worlds, settings, layout, [], []) == []


def test_a_prompt_longer_than_the_context_is_refused(worlds, settings):
    with pytest.raises(AssertionError, match="prompt 0 has 600 tokens; the model's context takes 1 to 511"):
        generate(worlds, settings, prompts=[[5] * 600], ids=[0])
    # and one that nearly fills it gets what room there is
    found = generate(worlds, settings, prompts=[[5] * 507, [6, 7]], ids=[0, 1])
    assert len(found[0][0]) <= 5 and found[0][2] == (found[0][0][-1] == 2)


def test_a_cache_too_small_for_a_sequence_is_refused(worlds, settings):
    with pytest.raises(AssertionError, match=r"rollout\.kv_tokens=15 has no room for a sequence of 16 tokens"):
        generate(worlds, [*settings, "rollout.kv_tokens=15"], prompts=PROMPTS[:4], ids=IDS[:4])


@pytest.mark.parametrize(
    ("layout", "as_on_cuda"),
    [((1, 1, 1), False), ((1, 1, 1), True), ((2, 1, 1), False), ((1, 1, 2), False)],
    ids=str,
)
@pytest.mark.parametrize("greedy", [True, False])
def test_a_logit_that_is_not_finite_names_the_sample(worlds, settings, layout, as_on_cuda, greedy):
    """On every rank, so that none waits for one that is gone."""
    options = [*settings, "model.tie_word_embeddings=false", f"rollout.greedy={str(greedy).lower()}"]
    prompts = [*PROMPTS, [1, 511, 9]]
    with pytest.raises(AssertionError, match=r"FloatingPointError: logits of sample 11 are not finite \(rank \d\)"):
        generate(worlds, options, layout, prompts, [*IDS, 11], poison=511, as_on_cuda=as_on_cuda)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["rollout.temperature=0.7"],
        ["rollout.top_k=3"],
        ["rollout.top_p=0.8"],
        ["rollout.min_p=0.3"],
        ["rollout.min_p=0.2", "rollout.top_p=0.7"],
    ],
    ids=lambda o: "".join(o),
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
        p[order[before >= (0.7 if "min_p" in "".join(options) else 0.8)]] = 0
    if "min_p" in "".join(options):
        p[p < (0.2 if "top_p" in "".join(options) else 0.3) * p.max()] = 0
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
