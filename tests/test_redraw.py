"""Rows of a table about prompts that are drawn anew, and about their likeliest responses, in one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_schedule import CTX

from rlhf_engine.algorithms import greedy, redraw
from rlhf_engine.algorithms.rollouts import PROVIDED, draw
from rlhf_engine.config import RolloutConfig
from rlhf_engine.context import TrainState
from rlhf_engine.experience import pad_rows, spans
from rlhf_engine.models.residency import Presence
from rlhf_engine.observing.metrics import Metrics
from rlhf_engine.rollout.progress import Response
from rlhf_engine.rollout.responses import Responses
from rlhf_engine.rollout.sampling import sample_keys
from rlhf_engine.schedule import Schedule, Stage

ROLES = ("policy",)


def respond(ctx, policy, x):
    """To prompt [n] as many tokens as n says, each the id of its sample."""
    rows = [[*p, *[int(i)] * p[0]] for p, i in zip(x.prompts, x.sample_ids, strict=True)]
    tokens, lengths = pad_rows(rows)
    mask = spans(torch.ones_like(lengths), lengths, tokens.shape[1])
    ctx.responded.append([p[0] for p in x.prompts])
    return dict(
        tokens=tokens, lengths=lengths, response_mask=mask, finished=lengths > 2, sampler_log_probs=-1.0 * tokens * mask
    )


def grade(ctx, _, x):
    """Responses to prompts below 4 are all wrong."""
    return {
        "scores": torch.tensor([0.0 if p[0] < 4 else float(t[1] % 2) for p, t in zip(x.prompts, x.tokens, strict=True)])
    }


ROLLOUT = Stage(
    "rollout", "rollout", respond, "policy", ("prompts", "sample_ids"),
    ("tokens", "lengths", "response_mask", "finished", "sampler_log_probs"),
)  # fmt: skip
SCORE = Stage("score", "local", grade, None, ("prompts", "tokens"), ("scores",))


@pytest.fixture
def run(monkeypatch):
    """`run(rounds)` of prompts [1], [5] and [2], two samples each: the experience, figures, prompts that were sampled,
    and the next one."""
    monkeypatch.setattr(redraw.responding, "record_responses", lambda *args: None)

    def get(rounds: int):
        prompts = iter([1, 5, 2, 3, 6, 7, 8])
        ctx = SimpleNamespace(**vars(CTX) | {"metrics": Metrics(), "responded": []})
        ctx.phase, ctx.settings = "grpo", SimpleNamespace(prompts_per_iteration=3, samples_per_prompt=2)
        ctx.draw = lambda phase, count: [
            SimpleNamespace(prompt=[n], reward_prompt=[n, n], fields={}) for n in (next(prompts) for _ in range(count))
        ]
        stays = dict(is_offloaded=False, presence=Presence.STATE, move=lambda presence: None)
        ctx.roles = {"policy": SimpleNamespace(**stays, on_device=lambda *args: CTX.watch())}
        table = [ROLLOUT, SCORE, *redraw.stages(rounds, ROLLOUT, SCORE)]
        x = Schedule(table, PROVIDED, ROLES).run(ctx, draw(ctx))
        return x, ctx.metrics._whole, ctx.responded, next(prompts)

    return get


def test_no_round(run):
    x, _, responded, following = run(0)
    assert x.prompts == [[1], [1], [5], [5], [2], [2]] and following == 3
    assert responded == [[1, 1, 5, 5, 2, 2]]


def test_rounds_until_every_group_tells_something(run):
    """The first takes [3] and [6] for [1] and [2], the second [7] for [3], and the third has nothing to do."""
    x, figures, responded, following = run(3)
    assert responded == [[1, 1, 5, 5, 2, 2], [3, 3, 6, 6], [7, 7]] and following == 8
    assert [figures[f"rollout/redrawn_{i}"] for i in (1, 2, 3)] == [2, 1, 0]
    assert x.prompts == [[7], [7], [5], [5], [6], [6]] and x.reward_prompts[0] == [7, 7]
    assert x.sample_ids.tolist() == [12, 13, 2, 3, 10, 11]  # numbers that no sample has had
    assert x.lengths.tolist() == [8, 8, 6, 6, 7, 7] and x.tokens.shape == (6, 8)
    assert x.tokens[1].tolist() == [7] + [13] * 7 and x.tokens[3].tolist() == [5] + [3] * 5 + [0, 0]
    assert torch.equal(x.response_mask, spans(torch.ones(6), x.lengths, 8)) and x.finished.all()
    assert torch.equal(x.sampler_log_probs, -1.0 * x.tokens * x.response_mask)
    assert x.scores.tolist() == [0, 1, 0, 1, 0, 1] and not x.redrawn.any()


def test_what_is_left_after_the_last_round_stays(run):
    x, _, _, following = run(1)
    assert x.prompts == [[3], [3], [5], [5], [6], [6]] and following == 7
    assert x.scores.tolist() == [0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("kind", ["local", "infer"])
def test_the_likeliest_responses_are_scored_once_for_each_prompt(monkeypatch, kind):
    """With the stage that scores the samples, of which one asks a model and yields what it is asked."""
    asked = []

    ids = {int(key): i for i, key in enumerate(sample_keys(1, 0, torch.arange(10)))}

    def respond_greedily(ctx, policy, prompts, keys, config):
        asked.append((prompts, config.greedy))
        rows = zip(prompts, keys.tolist(), strict=True)
        return Responses.of([Response([ids[key]] * p[0], [-1.0] * p[0], True) for p, key in rows]), None

    def by_model(ctx, role, x):
        yield "work"
        return grade(ctx, role, x)

    monkeypatch.setattr(greedy, "respond", respond_greedily)
    score = Stage("score", kind, grade if kind == "local" else by_model, "reward", SCORE.reads, SCORE.writes)
    settings, config = SimpleNamespace(samples_per_prompt=2), SimpleNamespace(rollout=RolloutConfig(), seed=1)
    ctx = SimpleNamespace(settings=settings, config=config, state=TrainState(), mesh=SimpleNamespace(tp=1))
    generation, scoring = greedy.stages(score)
    x = SimpleNamespace(prompts=[[5], [5], [2], [2]], sample_ids=torch.tensor([5, 6, 8, 9]))
    for name, value in generation.body(ctx, None, x).items():
        setattr(x, name, value)
    assert asked == [([[5], [2]], True)] and x.greedy_tokens.tolist() == [[5] + [5] * 5, [2, 8, 8, 0, 0, 0]]
    found = scoring.body(ctx, None, x)
    if kind == "infer":
        assert next(found) == "work"
        with pytest.raises(StopIteration) as stop:
            next(found)
        found = stop.value.value
    assert found["baselines"].tolist() == [1.0, 0.0]
    assert (scoring.kind, scoring.role, scoring.writes) == (kind, "reward", ("baselines",))
