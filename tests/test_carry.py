"""Responses that one iteration begins and another ends: which are learned from, and what is kept of them."""

from __future__ import annotations

import itertools
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_runs import assert_close, figures
from test_stops import train

from rlhf_engine.algorithms import carry, responding, rollouts
from rlhf_engine.config import ConfigError, PPOConfig, RewardConfig, RolloutConfig, RunConfig
from rlhf_engine.config.algorithms import GRPOConfig
from rlhf_engine.context import TrainState
from rlhf_engine.observing.metrics import Metrics
from rlhf_engine.plan.rows import rows_of
from rlhf_engine.rollout.progress import Progress, Response

# -- iterations of a policy whose n-th version says n, with the log-prob -n ----------------------------------------


def say(policy, prompts, keys, config, end_ids, *, limits, begun, report, finished, **_):
    """To prompts [n] responses of n tokens, ended where they are not the longest that there can be."""
    found = []
    for prompt, limit, response in zip(prompts, limits, begun, strict=True):
        more = [policy] * max(0, min(prompt[0], limit) - len(response.tokens))
        tokens = response.tokens + more
        ended = len(tokens) == prompt[0] < config.max_new_tokens
        found.append(Response(tokens, response.log_probs + [-1.0 * n for n in more], ended))
    report(Progress(len(prompts), tokens=sum(len(r.tokens) for r in found), seconds=1.0))
    return found


@pytest.fixture
def iterate(monkeypatch):
    """`iterate(lengths, samples)` gives, one after the other, the fields and figures of iterations that learn from two
    prompts, of four under way, of these lengths, and what is carried."""
    monkeypatch.setattr(responding, "rollout", say)

    def get(lengths, samples=1):
        source, config = (
            iter(lengths),
            RunConfig(rollout=RolloutConfig(max_new_tokens=20, tail="carry", done_share=0.5)),
        )
        settings = PPOConfig(prompts_per_iteration=2, samples_per_prompt=samples, importance="truncated")
        ctx = SimpleNamespace(config=config, settings=settings, state=TrainState(), metrics=Metrics(), rewards=None)
        ctx.phase, ctx.mesh = "ppo", SimpleNamespace(tp=1, is_main=False)
        ctx.tokenizer = SimpleNamespace(end_ids=(0,), decode=str)
        ctx.draw = lambda phase, count: [
            SimpleNamespace(prompt=[n], reward_prompt=[n, n], fields={"n": n}) for n in itertools.islice(source, count)
        ]
        for version in itertools.count(1):
            x = carry.rollout(ctx, version, rollouts.draw(ctx, carry.num_new_prompts(ctx)))
            kept, ctx.metrics._whole = ctx.metrics._whole, {}
            yield SimpleNamespace(ctx=ctx, **x), kept, ctx.state.carried
            ctx.state = TrainState.from_dict(ctx.state.to_dict())  # as a run that was stopped here has it
            ctx.state.iteration += 1

    return get


def test_three_iterations(iterate):
    """New tokens at most: 5, a quarter of 20; 5 and, as one prompt alone is done then, 7; 6, which would have done."""
    found = iterate([3, 12, 5, 20, 4, 6, 1, 9])
    x, kept, carried = next(found)
    assert x.prompts == [[3], [5]] and x.reward_prompts == [[3, 3], [5, 5]] and x.row_fields == ['{"n": 3}', '{"n": 5}']
    assert x.tokens.tolist() == [[3, 1, 1, 1, 0, 0], [5, 1, 1, 1, 1, 1]] and not x.older.any()
    assert carried.prompts == [[12], [20]] and carried.tokens.tolist() == [[12] + [1] * 5, [20] + [1] * 5]
    assert kept["rollout/carried"] == 2 and kept["rollout/rounds"] == 1 and kept["rollout/older_tokens"] == 0
    keys = carried.noise_keys
    x, kept, carried = next(found)
    assert x.prompts == [[12], [4]] and x.lengths.tolist() == [13, 5] and x.finished.tolist() == [True, True]
    assert x.tokens[0].tolist() == [12] + [1] * 5 + [2] * 7 and x.tokens[1, :5].tolist() == [4] + [2] * 4
    assert x.sampler_log_probs[0].tolist() == [0] + [-1] * 5 + [-2] * 7
    assert x.older.tolist() == [[False] + [True] * 5 + [False] * 7, [False] * 13]
    assert carried.prompts == [[20], [6]] and carried.tokens[0].tolist() == [20] + [1] * 5 + [2] * 7
    assert carried.finished.tolist() == [False, True] and carried.noise_keys[0] == keys[1]
    assert kept["rollout/rounds"] == 2 and kept["rollout/older_tokens"] == 5 / 16
    x, kept, carried = next(found)
    assert x.prompts == [[6], [1]] and x.older.sum() == 6 and x.sampler_log_probs[0].tolist() == [0] + [-2] * 6
    assert carried.prompts == [[20], [9]] and carried.lengths.tolist() == [1 + 18, 1 + 6]
    assert kept["rollout/rounds"] == 1 and kept["rollout/response_length"] == 3.5
    assert x.sample_ids.tolist() == [0, 1] and len({*carried.noise_keys.tolist(), *keys.tolist()}) == 3


def test_the_longest_that_there_can_be_is_done_without_an_end(iterate):
    x, _, carried = list(itertools.islice(iterate([20, 20, 20, 20, 2, 2]), 2))[1]
    assert x.prompts == [[20], [20]] and x.lengths.tolist() == [21, 21] and not x.finished.any()
    assert x.older.sum() == 40 and carried.lengths.tolist() == [3, 3]


def test_a_prompt_waits_for_the_last_of_its_responses(iterate, monkeypatch):
    """Of two responses to a prompt the second is four times as long."""

    def say_twice(policy, prompts, keys, config, end_ids, **options):
        lengths = [[p[0] * (1 + 3 * (i % 2))] for i, p in enumerate(prompts)]
        return say(policy, lengths, keys, config, end_ids, **options)

    monkeypatch.setattr(responding, "rollout", say_twice)
    found = iterate([1, 4, 1, 3, 2, 2], samples=2)
    x, kept, carried = next(found)
    assert x.prompts == [[1]] * 4 and x.lengths.tolist() == [2, 5, 2, 5] and kept["rollout/carried"] == 4
    assert carried.lengths.tolist() == [1 + 4, 1 + 5, 1 + 3, 1 + 5] and carried.finished.tolist() == [True, False] * 2
    x, kept, carried = next(found)  # 4 new tokens would do for none of them, and at 8 three of them are done
    assert x.prompts == [[3]] * 2 + [[2]] * 2 and x.older.sum(1).tolist() == [3, 5, 0, 0]


def test_what_older_policies_have_drawn_is_weighted(iterate):
    """By min(p / p_sampler, 2), and it is no gap between this policy's sampler and trainer."""
    x = list(itertools.islice(iterate([3, 12, 5, 20, 4, 6]), 2))[1][0]
    x.log_probs = -1.5 * x.response_mask.float() - 2.5 * x.older  # -4 of what is older, drawn with -1
    x.log_probs[0, 1], x.log_probs[0, 2] = 0.0, -1.25
    weights = rollouts.importance(x.ctx, None, x)["importance"]
    older = [2.0, math.exp(-0.25)] + [math.exp(-3)] * 3
    wanted = [0.0, *older, *[math.exp(0.5)] * 7]
    assert weights[0].tolist() == pytest.approx(wanted) and weights[1, 1:5].tolist() == pytest.approx(
        [math.exp(0.5)] * 4
    )
    kept = x.ctx.metrics._whole
    assert kept["importance/older"] == pytest.approx(sum(older) / 5) and kept["importance/cut"] == 1 / 16
    x.log_probs[0, 12] = -2.25
    works = rollouts.log_probs(x.ctx, SimpleNamespace(dtype=torch.float32), x)
    next(works)
    with pytest.raises(StopIteration):
        works.send(torch.stack([x.log_probs, torch.zeros_like(x.log_probs)], 1))
    assert x.ctx.state.log_prob_gap == 0.5


def test_functions_begin_with_what_is_done(iterate, monkeypatch):
    started = []
    monkeypatch.setattr(responding, "scoring", lambda ctx, x: lambda found: started.append(sorted(found)))
    monkeypatch.setattr(carry, "scoring", responding.scoring)
    list(itertools.islice(iterate([3, 12, 5, 20, 4, 6]), 2))
    assert started == [[0, 2], [2], [0, 3]]


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (PPOConfig(), "ppo.importance=none counts them as the present one's: use ppo.importance=truncated"),
        (GRPOConfig(importance="masked", redraws=1), "ppo.redraws=1 finishes what it draws"),
        (PPOConfig(importance="truncated", old_log_probs="sampler"), "ppo.old_log_probs=trainer"),
    ],
)
def test_what_cannot_be_right_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        section.check("ppo", RewardConfig(), RolloutConfig(tail="carry"), 1)


@pytest.mark.parametrize(
    ("prompts", "share", "wanted"), [(64, 0.8, 80), (16, 0.5, 32), (10, 0.7, 15), (7, 1.0, 7), (49, 0.98, 50)]
)
def test_prompts_under_way(prompts, share, wanted):
    section = PPOConfig(prompts_per_iteration=prompts, samples_per_prompt=2)
    assert section.prompts_under_way(RolloutConfig(tail="carry", done_share=share)) == wanted
    assert section.prompts_under_way(RolloutConfig(done_share=share)) == prompts
    config = RunConfig(ppo=section, rollout=RolloutConfig(tail="carry", done_share=share))
    assert rows_of("ppo", config).carried == 2 * (wanted - prompts) and rows_of("ppo", config).total == 2 * prompts


# -- whole runs ----------------------------------------------------------------------------------------------------

# text ends responses at any length; the policy moves between its iterations
CARRY = [
    "rollout.tail=carry", "rollout.done_share=0.5", "rollout.stop=[a]", "rollout.max_new_tokens=24",
    "ppo.importance=truncated", "ppo.epochs=1", "ppo.num_minibatches=1", "ppo.write_arrays=true",
]  # fmt: skip
OWN = ("rollout/carried", "rollout/older_tokens", "rollout/rounds", "importance/older")


@pytest.fixture(scope="module")
def whole(small_run, worlds, tmp_path_factory):
    """Three iterations on two replicas, never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(small_run, folder)
    assert worlds(2).run(train, folder, (1, 1, 2), None, 3, CARRY) == [True, True]
    return folder / "ppo"


def test_a_run_carries(whole):
    rows = figures(whole)
    assert [row["rollout/carried"] for row in rows] == [16] * 3
    assert rows[0]["rollout/older_tokens"] == 0 and all(0 < row["rollout/older_tokens"] < 1 for row in rows[1:])
    assert abs(rows[0]["importance/mean"] - 1) < 1e-5 and rows[0]["rollout/log_prob_gap"] < 1e-4
    assert all(0 < abs(row["importance/older"] - 1) < 0.5 and row["rollout/log_prob_gap"] < 1e-4 for row in rows[1:])
    assert all(abs(row["policy/ratio_first"] - 1) < 1e-5 for row in rows)


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1)], ids=str)
def test_the_mesh_changes_nothing(small_run, worlds, whole, tmp_path, layout):
    """Nor do slots and blocks that are too few for what is under way."""
    folder, size = tmp_path / "run", layout[0] * layout[1]
    shutil.copytree(small_run, folder)
    few = ["rollout.slots=5", "rollout.kv_tokens=160"]
    assert worlds(size).run(train, folder, layout, None, 2, [*CARRY, *few]) == [True] * size
    found, wanted = figures(folder / "ppo"), figures(whole)[:2]
    for row in (*found, *wanted):
        row.pop("rollout/preempted")
    assert_close(found, wanted, 1e-4)


def test_stopped_again_and_again(small_run, worlds, whole, tmp_path):
    """Between stages, the rollout and the next one among them, and updates: what is carried is in the checkpoint."""
    folder, stops = tmp_path / "run", 0
    shutil.copytree(small_run, folder)
    while not worlds(2).run(train, folder, (1, 1, 2), 5, 3, CARRY)[0]:
        stops += 1
    assert stops >= 6 and figures(folder / "ppo") == figures(whole)


def test_what_is_carried_is_not_forgotten(small_run, worlds, tmp_path):
    """Settings that have no use for it are refused, until an iteration has finished it."""
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    plain = ["rollout.tail=finish", "rollout.done_share=1"]
    assert worlds(1).run(train, folder, (1, 1, 1), None, 1, CARRY) == [True]
    words = (
        r"ConfigError: rollout\.tail=finish, and ppo carries responses that were begun with carry: start it once more"
    )
    with pytest.raises(AssertionError, match=words):
        worlds(1).run(train, folder, (1, 1, 1), None, 2, [*CARRY, *plain])
    assert worlds(1).run(train, folder, (1, 1, 1), None, 2, [*CARRY, "rollout.done_share=1"]) == [True]
    assert worlds(1).run(train, folder, (1, 1, 1), None, 3, [*CARRY, *plain]) == [True]
    assert figures(folder / "ppo")[1]["rollout/carried"] == 0


def test_with_nothing_carried_it_is_the_plain_run(small_run, worlds, tmp_path):
    """To the bit."""
    found = []
    for tail in ("finish", "carry"):
        folder = tmp_path / tail
        shutil.copytree(small_run, folder)
        options = [*CARRY, f"rollout.tail={tail}", "rollout.done_share=1"]
        assert worlds(1).run(train, folder, (1, 1, 1), None, 2, options) == [True]
        found.append(figures(folder / "ppo"))
    assert [[row.pop(name) for name in OWN] for row in found[1]] == [[0, 0, 1, 0]] * 2
    assert found[0] == found[1]
