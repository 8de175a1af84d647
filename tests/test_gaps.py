"""Rows of several turns, whose masks have gaps: they count as rows without their gaps do, and by what a turn earned."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import rlhf_kernels as kernels
from rlhf_engine.algorithms import distill, grpo, ppo, rollouts
from rlhf_engine.algorithms.heads import choose, choose_taught
from rlhf_engine.algorithms.policy import averaging, policy_works
from rlhf_engine.config import ConfigError, ModelConfig, RunConfig, check, from_dict, resolve_mesh
from rlhf_engine.context import TrainState
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.experience import last_of, packed, reach
from rlhf_engine.models.role import RoleModel, head_weight
from rlhf_engine.models.stream import infer
from rlhf_engine.observing.metrics import Metrics
from rlhf_engine.verify import plain

VOCAB = 50
# a dropped row; one turn; two; three, the last of one token; two, with the first and the last position of the row
MASK = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 1, 1, 1, 0],
        [0, 1, 1, 0, 1, 1, 1, 0, 0, 1],
        [0, 1, 0, 0, 0, 0, 0, 0, 1, 1],
    ]
).bool()


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def collapse(x, mask=MASK):
    """What a mask selects in each row, behind one position for its prompt."""
    found = x.new_zeros(len(x), 1 + int(mask.sum(1).max()))
    for row in range(len(x)):
        kept = [x[row, t] for t in range(mask.shape[1]) if mask[row, t]]
        for i, value in enumerate(kept):
            found[row, 1 + i] = value
    return found


def agree(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.detach().abs().max())))


# -- pure functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", (None, "k1", "k2", "k3", "k3+"))
@pytest.mark.parametrize("kind", ("ppo", "gspo", "cispo", "reinforce"))
def test_policy_losses(kind, kl):
    fields = [0.3 * random(*MASK.shape, seed=seed) for seed in range(4)]
    moments, weights = torch.tensor([14.0, 0.1, 0.5]), torch.linspace(0.5, 2, len(MASK), dtype=torch.float64)
    results = []
    for mask, (new, old, advantages, ref) in ((MASK, fields), (collapse(MASK), [collapse(x) for x in fields])):
        new = new.requires_grad_()
        term = dict(ref_log_probs=ref, kl=kl, kl_coef=0.2) if kl else {}
        options = dict(kind=kind, clip_ratio=0.1, dual_clip=1.5, weights=weights, moments=moments, **term)
        loss = kernels.clipped_policy_loss(new, old, advantages, mask, **options)
        loss.loss.backward()
        results.append((loss, new.grad))
    (found, grad), (wanted, wanted_grad) = results
    for one, other in zip(found, wanted, strict=True):
        agree(one, other)
    agree(collapse(grad), wanted_grad)
    assert wanted_grad.abs().max() > 0.01 and not grad[~MASK].any()


def test_the_value_loss():
    values, old, returns = (random(*MASK.shape, seed=seed) for seed in range(3))
    x, y = values.requires_grad_(), collapse(values.detach()).requires_grad_()
    found = kernels.clipped_value_loss(x, old, returns, MASK)
    wanted = kernels.clipped_value_loss(y, collapse(old), collapse(returns), collapse(MASK))
    found.loss.backward()
    wanted.loss.backward()
    for one, other in zip(found, wanted, strict=True):
        agree(one, other)
    agree(collapse(x.grad), y.grad)


@pytest.mark.parametrize("of", ("tokens", "sequences"))
@pytest.mark.parametrize("kind", ("truncated", "masked"))
def test_importance_weights(kind, of):
    new, old = (0.3 * random(*MASK.shape, seed=seed) for seed in range(2))
    found = kernels.importance_weights(new, old, MASK, kind, of=of, limit=1.5)
    wanted = kernels.importance_weights(collapse(new), collapse(old), collapse(MASK), kind, of=of, limit=1.5)
    agree(collapse(found), wanted, 1e-6)
    assert len(wanted[wanted > 0].unique()) > 2


def test_whitening_and_means():
    x = random(*MASK.shape)
    agree(collapse(kernels.whiten(x, MASK)), kernels.whiten(collapse(x), collapse(MASK)))
    for over in ("tokens", "sequences", "constant"):
        found, wanted = averaging(MASK, over, 7), averaging(collapse(MASK), over, 7)
        assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1] == (18 if over == "tokens" else 4)


def chosen(tokens, mask):
    """Of each row the tokens that are chosen, in their order, and which of them were banned from ending it."""
    role = SimpleNamespace(model=SimpleNamespace(vocab_size=VOCAB))
    batch = choose(role, {"tokens": tokens, "mask": mask}, "mask", ban=((0,), 3))
    found = [[] for _ in mask]
    each = (batch[f"chosen_{name}"].tolist() for name in ("rows", "tokens", "early"))
    for place, token, is_early in zip(*each, strict=True):
        found[place % len(mask)].append((token, is_early))
    return found


def test_the_first_tokens_that_must_not_end_a_row():
    tokens = torch.randint(1, VOCAB, MASK.shape, generator=torch.Generator().manual_seed(1))
    found = chosen(tokens, MASK)
    assert found == chosen(collapse(tokens), collapse(MASK))
    assert [sum(is_early for _, is_early in row) for row in found] == [0, 3, 3, 3, 3]


def test_what_a_teacher_says_before_each_token():
    places = torch.arange(MASK.numel()).view(MASK.shape)
    batch = {"mask": MASK, "teacher_hidden": packed(places.unsqueeze(1).float(), MASK)}
    found = choose_taught(batch, "mask")
    rows = batch["teacher_hidden"].flatten(0, 1)[found["taught_rows"], 0]
    assert rows.tolist() == places.T[MASK.T].tolist()  # in the order of `choose`, positions before rows


def test_where_a_row_ends():
    assert last_of(MASK).tolist() == [-1, 5, 8, 9, 9] and reach(MASK).tolist() == [0, 4, 7, 9, 9]


# -- what turns earn --------------------------------------------------------------------------------------------------


def context(phase, mesh=None, **options):
    config, mesh = RunConfig(), mesh or SimpleNamespace(device=torch.device("cpu"))
    settings = getattr(config, phase)
    for name, value in options.items():
        assert hasattr(settings, name)
        setattr(settings, name, value)
    state = TrainState(kl_coef=settings.kl_coef)
    return SimpleNamespace(config=config, settings=settings, state=state, metrics=Metrics(), mesh=mesh)


def of_turns(rows):
    """Rows of turns of two tokens each, with a token between them, by what the turns earned; None: dropped."""
    width = 1 + 3 * max(len(row or ()) for row in rows)
    mask, rewards = torch.zeros(len(rows), width, dtype=torch.bool), torch.full((len(rows), width), 7.0)
    for i, row in enumerate(rows):
        for k, reward in enumerate(row or ()):
            mask[i, 1 + 3 * k : 3 + 3 * k] = True
            rewards[i, 1 + 3 * k : 3 + 3 * k] = torch.tensor([0.0, reward])
    scores = torch.where(mask, rewards, 0.0).double().sum(1).float()
    zeros = torch.zeros(mask.shape)
    return SimpleNamespace(
        response_mask=mask, turn_rewards=rewards, scores=scores, finished=torch.ones(len(rows)).bool(),
        sample_ids=torch.arange(len(rows)), log_probs=zeros, ref_log_probs=zeros, values=zeros,
    )  # fmt: skip


def test_rewards_of_turns_by_hand():
    x = of_turns([[2.0, 1.0], [4.0]])
    x.scores += torch.tensor([0.5, 0.0])  # by something else
    x.finished[1] = False
    options = dict(gae_lambda=1.0, missing_eos_penalty=1.0, whiten_advantages=False)
    found = ppo.advantage(context("ppo", **options), None, x)
    assert found["rewards"].tolist() == [[0, 0, 2, 0, 0, 1.5, 0], [0, 0, 3, 0, 0, 0, 0]]
    assert found["advantages"].tolist() == [[0, 3.5, 3.5, 0, 1.5, 1.5, 0], [0, 3, 3, 0, 0, 0, 0]]
    found = ppo.advantage(context("ppo", score_max=2.0, **options), None, x)  # what is too much is taken off at the end
    assert found["rewards"].tolist() == [[0, 0, 2, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0]]


def test_a_turn_is_compared_with_the_same_turn_of_other_samples():
    x = of_turns([[1.0, 0, 2], [0.0, 1], [2.0], [5.0], [1.0, 3], [0.0, 1]])
    x.finished[1] = False
    options = dict(credit="turn", samples_per_prompt=3, advantage="dr_grpo", missing_eos_penalty=1.0, kl_coef=0.0)

    def turns(**more):
        found = grpo.advantage(context("grpo", **options | more), None, x)["advantages"]
        assert not found[~x.response_mask].any() and torch.equal(found[:, 1], found[:, 2])
        return [[found[i, 1 + 3 * k].item() for k in range(3) if x.response_mask[i, 1 + 3 * k]] for i in range(6)]

    # returns 3 2 2, 0 0 and 2; 5, 4 3 and 1 1
    first = pytest.approx([4 / 3, 1.0, 0.0]), pytest.approx([-5 / 3, -1.0]), pytest.approx([1 / 3])
    assert turns() == [*first, pytest.approx([5 / 3]), pytest.approx([2 / 3, 1]), pytest.approx([-7 / 3, -1])]
    # returns 1.5 1 2, 0 0 and 2; 5, 2.5 3 and 0.5 1
    first = pytest.approx([1 / 3, 0.5, 0.0]), pytest.approx([-7 / 6, -0.5]), pytest.approx([5 / 6])
    last = pytest.approx([7 / 3]), pytest.approx([-1 / 6, 1]), pytest.approx([-13 / 6, -1])
    assert turns(turn_discount=0.5) == [*first, *last]


KINDS = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "none")


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_of_turns_against_plain_ones(kind):
    """A dropped row among them."""
    rewards = random(9, 4, seed=3).tolist()
    x = of_turns([rewards[i][:k] if k else None for i, k in enumerate((4, 2, 3, 1, 0, 2, 3, 3, 3))])
    ctx = context("grpo", credit="turn", turn_discount=0.9, samples_per_prompt=3, advantage=kind, kl_coef=0.0)
    found = grpo.advantage(ctx, None, x)["advantages"]
    given = plain.token_rewards(x.scores, x.response_mask, x.turn_rewards)
    agree(found.double(), plain.turn_advantages(given, x.response_mask, ctx.settings), 1e-5)
    assert found.abs().max() > 0.5 and not found[4].any()


@pytest.mark.parametrize("kind", KINDS)
def test_one_turn_is_the_trajectory(kind):
    x = of_turns([[value] for value in random(6, seed=4).tolist()])
    found = [
        grpo.advantage(context("grpo", credit=credit, samples_per_prompt=3, advantage=kind), None, x)["advantages"]
        for credit in ("turn", "trajectory")
    ]
    agree(*found, 1e-6)


def test_equal_turns_tell_nothing():
    """To the last bit, where rounding would become an advantage as it is divided by its own size."""
    x = of_turns([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    ctx = context("grpo", credit="turn", samples_per_prompt=2, kl_coef=0.0)
    found = grpo.advantage(ctx, None, x)["advantages"]
    assert not found[:, 1:3].any() and found[:, 4].abs().min() > 0.7


# -- rows whose environment has failed --------------------------------------------------------------------------------


def noisy(x, rows):
    """With numbers that differ, in these rows of all of them."""
    for seed, name in enumerate(("log_probs", "ref_log_probs", "values")):
        setattr(x, name, torch.where(x.response_mask, random(*x.response_mask.shape, seed=seed).float(), 0.0))
    return SimpleNamespace(**{name: value[rows] for name, value in vars(x).items()})


def test_ppo_learns_nothing_of_a_dropped_row():
    rows = [[1.0, 2.0], [0.5], None, [3.0, -1.0, 1.0]]
    settings = dict(score_center=True, score_scale=True, kl_controller="adaptive", kl_horizon=100)
    results = []
    for kept in ([0, 1, 2, 3], [0, 1, 3]):
        x = noisy(of_turns(rows), kept)
        if len(kept) == 4:
            x.scores[2], x.finished[2] = -50.0, False
        ctx = context("ppo", **settings)
        results.append((ppo.advantage(ctx, None, x), ctx))
    (found, ctx), (wanted, other) = results
    assert ctx.metrics._whole == pytest.approx(other.metrics._whole, rel=1e-6) and len(other.metrics._whole) > 6
    assert vars(ctx.state) == vars(other.state) and other.state.kl_coef != ctx.settings.kl_coef
    for name in ("rewards", "advantages", "returns"):
        assert torch.equal(found[name][[0, 1, 3]], wanted[name]) and not found[name][2].any()
    agree(found["advantage_moments"], wanted["advantage_moments"], 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_know_nothing_of_a_dropped_row(kind):
    x = noisy(of_turns([[1.0, 2.0], None, [0.5], [3.0], [2.0, 2.0], [1.0]]), slice(None))
    x.scores[1], x.finished[1] = -50.0, False
    ctx = context("grpo", samples_per_prompt=3, advantage=kind, kl="reward", score_center=True)
    found = grpo.advantage(ctx, None, x)["advantages"]
    said, mask = torch.tensor([0, 2, 3, 4, 5]), x.response_mask
    kl = ((x.log_probs - x.ref_log_probs) * mask).sum(1)[said]
    scores = x.scores[said] - x.scores[said].mean() - ctx.settings.kl_coef * kl
    wanted = kernels.group_advantages(scores, torch.tensor([0, 0, 1, 1, 1]), kind, counts=mask.sum(1)[said])
    agree(found[said], wanted.unsqueeze(1) * mask[said], 1e-6)
    assert not found[1].any() and ctx.metrics._whole["score/mean"] == pytest.approx(float(x.scores[said].mean()))
    assert ctx.state.scores.count == 5


def test_groups_without_dropped_rows_tell_something_or_nothing():
    x = of_turns([[1.0], None, [1.0], [1.0], None, [2.0], None, None, None])
    assert rollouts.equal_groups(x.scores, x.response_mask, 3).tolist() == [True, False, True]


@pytest.mark.parametrize("credit", ("trajectory", "turn"))
def test_nothing_but_dropped_rows(credit):
    x = noisy(of_turns([[1.0], None, None]), [1, 2])
    ctx = context("ppo", kl_controller="adaptive")
    found = ppo.advantage(ctx, None, x)
    assert all(value.isfinite().all() for value in found.values()) and not found["advantages"].any()
    figures = dict(ctx.metrics._whole)
    ctx = context("grpo", samples_per_prompt=2, credit=credit)
    assert not grpo.advantage(ctx, None, x)["advantages"].any()
    assert all(map(math.isfinite, (figures | ctx.metrics._whole).values())) and len(figures) > 3


# -- configurations and tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "env", "message"),
    [
        ({"credit": "turn"}, None, "grpo.credit=turn compares the turns of an environment, and env.fn=null has none"),
        ({"advantage": "remax"}, "a:B", "grpo.advantage=remax compares with the likeliest response of one turn"),
        ({"redraws": 1}, "a:B", "grpo.redraws=1 draws single turns again: use 0 with env.fn=a:B"),
        ({"credit": "turn", "turn_discount": 1.5}, "a:B", "grpo.turn_discount=1.5 must lie between 0 and 1"),
        ({"turn_discount": 0.5}, "a:B", "grpo.turn_discount=0.5 has no use with grpo.credit=trajectory"),
    ],
)
def test_refusals(settings, env, message):
    config = from_dict(RunConfig, {"phases": ["grpo"], "grpo": settings, "env": {"fn": env}})
    with pytest.raises(ConfigError, match=message):
        check(config, resolve_mesh(config.mesh, 1), config.model)


@pytest.mark.parametrize(("algorithm", "credit"), [(ppo, "trajectory"), (grpo, "turn"), (grpo, "trajectory")])
def test_who_reads_what_turns_earned(algorithm, credit):
    for env in (None, "package.module:Class"):
        config = from_dict(RunConfig, {"env": {"fn": env}, "grpo": {"credit": credit if env else "trajectory"}})
        (stage,) = (stage for stage in algorithm.stage_table(config) if stage.name == "advantage")
        expects = env is not None and (algorithm is ppo or credit == "turn")
        assert ("turn_rewards" in stage.reads) == expects


# -- a model ----------------------------------------------------------------------------------------------------------

SIZES = dict(num_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
MIN_NEW, TEMPERATURE, END = 3, 0.8, 0


@pytest.fixture(scope="module")
def mesh():
    with one_rank() as found:
        yield found


def model(mesh, name, head, seed):
    role = RoleModel(name, ModelConfig(**SIZES, vocab_size=VOCAB), mesh, head, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in role.chunks.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (0.9 if "norm" in key else 0))
    role.chunks.requires_grad_(True)
    return role


@pytest.fixture
def iteration(mesh):
    """`iteration(phase, ...)`: a context and an Experience of rows with gaps, of which the first was dropped."""

    def get(phase, **options):
        ctx = context(phase, mesh, num_minibatches=1, epochs=1, micro_batch_size=1, **options)
        ctx.config.rollout.min_new_tokens, ctx.config.rollout.temperature = MIN_NEW, TEMPERATURE
        ctx.config.env.fn = "package.module:Class"
        ctx.tokenizer = SimpleNamespace(end_ids=[END])
        names = {"policy": "lm", "reference": "lm", "critic": "scalar", "teacher": "lm"}
        ctx.roles = {name: model(mesh, name, head, seed) for seed, (name, head) in enumerate(names.items())}
        tokens = torch.randint(1, VOCAB, MASK.shape, generator=torch.Generator().manual_seed(5))
        lengths = torch.tensor([4, 6, 10, 10, 10])  # row 2 ends with what its environment said
        rewards = random(*MASK.shape, seed=6, dtype=torch.float32) * (MASK & ~MASK.roll(-1, 1))
        rewards[:, -1] = MASK[:, -1] * 0.7
        x = SimpleNamespace(
            tokens=tokens * (torch.arange(10) < lengths[:, None]), lengths=lengths, response_mask=MASK,
            finished=MASK.any(1), sampler_log_probs=torch.zeros(MASK.shape), turn_rewards=rewards,
            scores=rewards.sum(1) + torch.tensor([9.0, 0.3, 0, 0, -0.2]), sample_ids=torch.arange(5),
        )  # fmt: skip
        return ctx, x

    return get


def ask(body, x):
    """Has a body's work done, and its fields written."""
    work = next(body)
    with pytest.raises(StopIteration) as done:
        body.send(infer([work])[0])
    vars(x).update(done.value.value)


def positions(tokens):
    return torch.arange(tokens.shape[1]).expand_as(tokens)


def step(work):
    """Loss and gradients of a work, from micro-batches of one row, one of which has nothing to learn."""
    work.role.chunks.zero_grad()
    total, count = 0.0, 0
    for part in work.parts:
        batch = work.cut(*part)
        loss, number, _ = work.fn(work.role.chunks[0](batch["tokens"], positions(batch["tokens"]), None), batch)
        total, count = total + loss, count + number
    assert len(work.parts) == len(MASK)
    (total / count).backward()
    return float(total / count), gradients(work.role)


def gradients(role):
    return {name: p.grad.clone() for name, p in role.chunks.named_parameters() if p.grad is not None}


def same(work, loss):
    """The same of a loss that was computed otherwise."""
    found = step(work)
    work.role.chunks.zero_grad()
    loss.backward()
    assert found[0] == pytest.approx(float(loss), rel=1e-5)
    wanted = gradients(work.role)
    assert found[1].keys() == wanted.keys() and len(wanted) > 8
    for name, value in wanted.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=3e-5 * float(value.abs().max()), msg=name)


def said(row):
    return [t for t in range(MASK.shape[1]) if MASK[row, t]]


def distributions(role, x):
    """{(row, t): log-probs of all tokens at t} in float64, for tokens that were sampled."""
    hidden = role.chunks[0](x.tokens, positions(x.tokens), None)
    logits = hidden.double() @ head_weight(role.chunks[0])[:VOCAB].double().T
    found = {}
    for row in range(len(MASK)):
        for k, t in enumerate(said(row)):
            keep = torch.arange(VOCAB) != END if k < MIN_NEW else torch.ones(VOCAB, dtype=torch.bool)
            found[row, t] = (logits[row, t - 1] / TEMPERATURE).masked_fill(~keep, -1e30).log_softmax(0)
    return found


def of_tokens(distributions, x):
    return {(row, t): found[x.tokens[row, t]] for (row, t), found in distributions.items()}


def clipped(new, old, advantage, clip=0.2):
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def learned(algorithm, ctx, x):
    """What the policy's update reads."""
    (stage,) = (stage for stage in algorithm.stage_table(ctx.config) if stage.name == "train_policy")
    return SimpleNamespace(**{name: getattr(x, name) for name in stage.reads})


def later(x):
    """As if the policy had moved since."""
    x.log_probs = torch.where(MASK, x.log_probs + 0.2 * random(*MASK.shape, seed=8).float(), 0.0)


def test_losses_of_ppo(iteration):
    ctx, x = iteration("ppo", gamma=0.97, gae_lambda=0.9, entropy_coef=0.01, kl_coef=0.1)
    policy, critic = ctx.roles["policy"], ctx.roles["critic"]
    ask(rollouts.log_probs(ctx, policy, x), x)
    ask(rollouts.ref_log_probs(ctx, ctx.roles["reference"], x), x)
    ask(ppo.values(ctx, critic, x), x)
    vars(x).update(ppo.advantage(ctx, None, x))
    later(x)

    own = distributions(policy, x)
    before = {key: float(value) for key, value in of_tokens(own, x).items()}
    ref = {key: float(value) for key, value in of_tokens(distributions(ctx.roles["reference"], x), x).items()}
    outputs = critic.chunks[0](x.tokens, positions(x.tokens), None).squeeze(2).double()
    values = {(row, t): outputs[row, t - 1] for row, t in own}
    advantages, returns = {}, {}
    for row in range(len(MASK)):
        after, following = 0.0, 0.0
        for t in reversed(said(row)):
            reward = -0.1 * (before[row, t] - ref[row, t]) + float(x.turn_rewards[row, t])
            reward += float(x.scores[row] - x.turn_rewards[row].sum()) if t == said(row)[-1] else 0.0
            value = float(values[row, t])
            after, following = reward + 0.97 * following - value + 0.97 * 0.9 * after, value
            advantages[row, t], returns[row, t] = after, after + value
    each = torch.tensor(list(advantages.values())).double()
    white = {key: (value - each.mean()) / (each.var(correction=0) + 1e-8).sqrt() for key, value in advantages.items()}
    new = of_tokens(own, x)
    terms = [
        clipped(new[key], float(x.log_probs[key]), white[key]) + 0.01 * (own[key].exp() * own[key]).sum() for key in own
    ]
    ((_, work, _),) = policy_works(ctx, policy, learned(ppo, ctx, x))
    same(work, sum(terms) / len(terms))
    (work,) = ppo.train_critic(ctx, critic, x)
    same(work, sum(0.5 * (values[key] - returns[key]) ** 2 for key in own) / len(own))


@pytest.mark.parametrize("loss", ("ppo", "gspo"))
def test_losses_of_grpo(iteration, loss):
    """With groups of turns, rows 1 to 4 being one prompt's and the dropped one another's."""
    options = dict(samples_per_prompt=5, credit="turn", advantage="dr_grpo", kl="k2", kl_coef=0.3, loss=loss)
    ctx, x = iteration("grpo", **options)
    policy = ctx.roles["policy"]
    ask(rollouts.log_probs(ctx, policy, x), x)
    ask(rollouts.ref_log_probs(ctx, ctx.roles["reference"], x), x)
    vars(x).update(grpo.advantage(ctx, None, x))
    later(x)

    turns = {1: [[2, 3, 4, 5]], 2: [[2, 3], [6, 7, 8]], 3: [[1, 2], [4, 5, 6], [9]], 4: [[1], [8, 9]]}
    returns = {}
    for row, spans in turns.items():
        total = float(x.scores[row] - x.turn_rewards[row].sum())
        for k in reversed(range(len(spans))):
            total += float(x.turn_rewards[row, spans[k]].sum())
            returns[row, k] = total
    own = of_tokens(distributions(policy, x), x)
    ref = of_tokens(distributions(ctx.roles["reference"], x), x)
    total = 0.0
    for row, spans in turns.items():
        means = []
        changes = [own[row, t] - float(x.log_probs[row, t]) for t in said(row)]
        for k, span in enumerate(spans):
            group = [value for (_, turn), value in returns.items() if turn == k]
            for t in span:
                old = float(x.log_probs[row, t])
                new = own[row, t]
                if loss == "gspo":  # each token has the row's ratio, and of its gradient what is its own
                    new = new - new.detach() + old + (sum(changes) / len(changes)).detach()
                kl = 0.3 * 0.5 * (own[row, t] - float(ref[row, t])) ** 2
                means.append(clipped(new, old, returns[row, k] - sum(group) / len(group)) + kl)
        total = total + sum(means) / len(means)
    ((_, work, _),) = policy_works(ctx, policy, learned(grpo, ctx, x))
    assert work.is_derivative == (loss == "ppo")
    same(work, total / 4)


@pytest.mark.parametrize("form", ("token", "full"))
def test_losses_of_distillation(iteration, form):
    ctx, x = iteration("distill", kl=form, kl_coef=0.7)
    policy, teacher = ctx.roles["policy"], ctx.roles["teacher"]
    ask(rollouts.log_probs(ctx, policy, x), x)
    ask((distill.ask_teacher_all if form == "full" else distill.ask_teacher)(ctx, teacher, x), x)
    vars(x).update(distill.advantage(ctx, None, x))

    own = distributions(policy, x)
    theirs = {key: value.detach() for key, value in distributions(teacher, x).items()}
    if form == "full":
        (work,) = distill.train_full(ctx, policy, learned(distill, ctx, x))
        loss = sum(0.7 * (own[key].exp() * (own[key] - theirs[key])).sum() for key in own) / len(own)
    else:
        later(x)
        ((_, work, _),) = policy_works(ctx, policy, learned(distill, ctx, x))
        new, wanted = of_tokens(own, x), of_tokens(theirs, x)
        gaps = {key: 0.7 * float(wanted[key] - new[key]) for key in own}
        loss = sum(clipped(new[key], float(x.log_probs[key]), gaps[key]) for key in own) / len(own)
    same(work, loss)
