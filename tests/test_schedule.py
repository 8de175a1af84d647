"""A stage table is checked before anything is allocated, and a body is held to its row."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from rlhf_engine.algorithms import ALGORITHMS
from rlhf_engine.algorithms.rollouts import PROVIDED
from rlhf_engine.config import (
    BUILDS_ON,
    SAMPLING,
    DistillConfig,
    EnvConfig,
    GRPOConfig,
    RewardConfig,
    RunConfig,
    UserConfig,
)
from rlhf_engine.experience import Experience
from rlhf_engine.observing.metrics import Metrics
from rlhf_engine.observing.trace import Trace
from rlhf_engine.schedule import Schedule, ScheduleError, Stage

CTX = SimpleNamespace(
    roles={},
    metrics=Metrics(),
    trace=Trace(),
    config=RunConfig(),
    mesh=SimpleNamespace(pp=1, rank=0),
    watch=contextlib.nullcontext,
    state=SimpleNamespace(iteration=0),
    stop_if_asked=lambda: None,
)
ROLES = ("policy", "reference", "reward", "critic", "teacher", "user")


def local(name="s", reads=(), writes=(), body=lambda ctx, role, x: None) -> Stage:
    return Stage(name, "local", body, None, reads, writes)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (local(reads=("scores",)), "s reads scores before"),
        (local(reads=("scoers",)), "no field scoers"),
        (Stage("s", "infer", lambda *a: None, "crytic"), "runs on crytic"),
        (Stage("s", "infer", lambda *a: None), "infer stage has no role"),
        (Stage("s", "local", lambda *a: None, "critic"), "local stage has a role"),
    ],
)
def test_tables_that_cannot_run(stage, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule([stage], set(), ROLES)


def algorithm(phase: str, **sections):
    config = RunConfig(**sections)
    getattr(config, phase).write_rollouts = True
    return ALGORITHMS[phase](config)


@pytest.mark.parametrize("phase", sorted(SAMPLING))
def test_every_row_is_needed(phase):
    table = algorithm(phase).stages
    Schedule(table, PROVIDED, ROLES)
    for dropped in table:
        if dropped.writes:
            with pytest.raises(ScheduleError, match="before a stage writes it"):
                Schedule([stage for stage in table if stage is not dropped], PROVIDED, ROLES)


@pytest.mark.parametrize(
    ("phase", "sections", "roles"),
    [
        ("ppo", {}, "policy reference critic reward"),
        ("ppo", {"reward": RewardConfig(fns=["length"])}, "policy reference critic"),
        ("grpo", {}, "policy reference reward"),
        ("grpo", {"reward": RewardConfig(fns=["length"])}, "policy reference"),
        ("grpo", {"reward": RewardConfig(fns=["length"]), "grpo": GRPOConfig(kl_coef=0)}, "policy"),
        ("ppo", {"env": EnvConfig("user"), "user": UserConfig("m")}, "policy reference critic user"),
        ("grpo", {"env": EnvConfig("user"), "user": UserConfig("m")}, "policy reference user"),
        ("distill", {"env": EnvConfig("user"), "user": UserConfig("m")}, "policy teacher user"),
    ],
    ids=[
        "ppo",
        "ppo by a function",
        "grpo",
        "grpo by a function",
        "grpo of the policy alone",
        *("a user in ppo", "a user in grpo", "a user in distill"),
    ],
)
def test_roles_are_those_that_the_table_needs(phase, sections, roles):
    found = algorithm(phase, **sections)
    named = {role for stage in found.stages for role in (stage.role, stage.beside) if role is not None}
    assert set(found.roles()) == named == set(roles.split())
    Schedule(found.stages, found.provided, found.roles())


@pytest.mark.parametrize("phase", sorted(ALGORITHMS))
def test_a_phase_builds_on_those_that_its_roles_start_from(phase):
    """By the configuration, which is asked before any algorithm is; of distillation where responses are scored too."""
    roles = ALGORITHMS[phase](RunConfig(distill=DistillConfig(reward_coef=1.0))).roles().values()
    assert set(BUILDS_ON[phase]) == {start for role in roles for start, _ in role.weights}


def test_a_body_sees_what_it_reads_and_writes_what_it_declares():
    def body(ctx, role, x):
        assert vars(x).keys() == {"lengths"}
        return {"scores": x.lengths.float()}

    stages = [local("a", ("lengths",), ("scores",), body)]
    x = Schedule(stages, {"lengths", "tokens"}, ()).run(CTX, Experience(lengths=torch.tensor([1, 2])))
    assert x.scores.tolist() == [1.0, 2.0]
    with pytest.raises(ScheduleError, match="stage a writes scores, and its body gave nothing"):
        Schedule([local("a", (), ("scores",))], (), ()).run(CTX, Experience())
    greedy = local("a", (), (), lambda ctx, role, x: {"scores": torch.zeros(1)})
    with pytest.raises(ScheduleError, match="stage a writes nothing, and its body gave scores"):
        Schedule([greedy], (), ()).run(CTX, Experience())
