"""Numbers gone bad: named, skipped, counted, and at last the end of the run; and reward functions that misbehave."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
import warm
from conftest import ROOT, SMALL

from rlhf_engine.config import GuardConfig, OptimizerConfig
from rlhf_engine.surviving.guard import Guard, Skipped

# -- on the ranks --------------------------------------------------------------------------------------------


def poisoned_step(overrides: list[str], layout: tuple, poison: str):
    """Three steps of a policy, the second with a number in it that is not finite. Gives what was found of each, whether
    the weights changed in it, and the names of the figures of the second."""
    from rlhf_engine.algorithms.algorithm import RoleSpec
    from rlhf_engine.algorithms.heads import choose
    from rlhf_engine.algorithms.sft import cross_entropy
    from rlhf_engine.launching.build import build_role
    from rlhf_engine.models.stream import train_step
    from rlhf_engine.models.work import Work

    ctx = cases.context(overrides, layout)
    role = build_role(ctx, "policy", RoleSpec("lm", optimizer=OptimizerConfig()))
    tokens = torch.arange(8 * 12).view(8, 12) % 64 + 1
    batch = {"tokens": tokens, "lengths": torch.full((8,), 12), "loss_mask": torch.ones(8, 12, dtype=torch.bool)}
    found, changed, figures = [], [], {}
    for step in range(3):
        weights = torch.ones(8)
        if step == 1 and poison == "loss":
            weights[5] = torch.inf

        def loss(output, batch):
            total, count, _ = cross_entropy(role)(output, batch)
            return total * batch["weights"].sum(), count, {}

        if step == 1 and poison == "gradient":
            parameter = next(p for name, p in role.chunks.named_parameters() if "linear_fc2" in name)
            hook = parameter.register_hook(lambda grad: grad * torch.inf)
        before = [p.detach().clone() for p in role.chunks.parameters()]
        # numbers that are not those of the rows, as a minibatch of a permutation has
        fields = {**batch, "weights": weights, "samples": torch.arange(100, 108)}
        work = Work(role, fields, loss, 2, prepare=functools.partial(choose, role, mask="loss_mask"))
        problem = train_step([work], ctx.metrics, ctx.trace)["policy"]
        found.append(problem)
        changed.append(not all(torch.equal(a, b) for a, b in zip(before, role.chunks.parameters(), strict=True)))
        row, _ = ctx.metrics.reduce(ctx.mesh)
        if step == 1:
            figures = row
            if poison == "gradient":
                hook.remove()
    return found, changed, figures


# -- the tests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [(1, 1, 2), (2, 1, 1), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_an_update_with_a_bad_number_is_skipped(worlds, tmp_path_factory, layout, poison):
    """Every rank knows which sample or parameter it was, the weights stay, and the next update is made."""
    overrides = [*SMALL, "phases=[sft]", f"output_dir={tmp_path_factory.getbasetemp() / 'guard'}"]
    for found, changed, figures in worlds(2).run(poisoned_step, overrides, layout, poison):
        assert found[0] is None and found[2] is None
        if poison == "loss":
            assert found[1] == "the loss of policy is not finite at sample 105"
        else:
            assert "gradient of policy is not finite in" in found[1] and "linear_fc2" in found[1]
        assert changed == [True, False, True]
        assert "policy/loss" not in figures and "policy/learning_rate" in figures


def test_counting():
    guard = Guard(GuardConfig(max_bad_steps=2, max_kl=3.0), True, Skipped())
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        guard.stepped("policy", "one")
        guard.stepped("critic")
        assert guard.look({}) == ({"skipped/policy": 1.0}, None)
        guard.stepped("policy")
        guard.stepped("policy", "two")
        assert guard.look({"kl/mean": 4.0}) == ({"skipped/policy": 1.0}, None)
        guard.stepped("policy", "three")
        skipped, reason = guard.look({"kl/mean": 2.0})
    assert skipped == {"skipped/policy": 1.0} and "policy: 2 updates in a row" in reason
    lines = said.getvalue().splitlines()
    assert lines[0] == "one; update skipped, 1 in a row" and lines[2] == "warning: kl/mean is 4, above guard.max_kl=3"
    assert len(lines) == 4
    assert "kl/mean is 4" in Guard(GuardConfig(max_kl=3.0, stop=True), False, Skipped()).look({"kl/mean": 4.0})[1]


def run(*overrides: str, **environment: str) -> subprocess.CompletedProcess:
    """PPO of three iterations with a reward function of tests/rewards.py, on one rank."""
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    settings = [*SMALL, "phases=[ppo]", "ppo.iterations=3", "ppo.save_every=3", "mesh.dp=1"]
    command = [sys.executable, str(ROOT / "launch" / "run.py"), *settings, *overrides]
    return warm.run(command, os.environ | {"PYTHONPATH": paths} | environment)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()]


def test_a_score_that_is_not_a_number(tmp_path):
    """It costs its iteration; two in a row end the run, saved, and the same command goes on from there."""
    settings = ["reward.fns=[rewards:not_a_number]", "guard.max_bad_steps=2", "ppo.iterations=4"]
    settings.append(f"output_dir={tmp_path}")
    result = run(*settings, BAD_CALLS="1,2")
    assert result.returncode == 65 and "Traceback" not in result.stderr, result.stderr
    assert "stage score: scores not finite for sample 3; update skipped, 1 in a row" in result.stdout
    assert "2 updates in a row were skipped (guard.max_bad_steps=2)" in result.stderr
    assert [row.get("skipped/policy") for row in rows(tmp_path)] == [None, 1.0, 1.0]
    assert (tmp_path / "ppo" / "checkpoints" / "latest").read_text() == "iteration_3"
    result = run(*settings, BAD_CALLS="")
    assert result.returncode == 0 and "ppo: resuming at iteration 3 of 4" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("too_few", 69, ["gave 1 scores for 16 responses"]),
        ("a_number", 69, ["gave float instead of a list of scores"]),
        ("a_matrix", 69, ["instead of a number for response 0: "]),
        ("hangs", 69, ["took longer than reward.timeout=1 s for 16 responses: it is at ", "rewards.py:"]),
        (
            "fails_for_one",
            1,
            ["ValueError: of one response", "reward.fns=rewards:fails_for_one raised it for response 2: "],
        ),
    ],
)
def test_a_reward_function_that_misbehaves(tmp_path, name, code, words):
    result = run(f"reward.fns=[rewards:{name}]", "reward.timeout=1", f"output_dir={tmp_path}")
    assert result.returncode == code
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stderr.count("Traceback") == (name == "fails_for_one")
    assert name == "fails_for_one" or result.stderr.splitlines()[-1].startswith("error: reward.fns=")


def test_a_kl_beyond_its_limit(tmp_path):
    result = run(
        "reward.fns=[rewards:short_and_polite]", "guard.max_kl=1e-9", "guard.stop=true", f"output_dir={tmp_path}"
    )
    assert result.returncode == 65 and "kl/mean is " in result.stderr and "guard.max_kl=1e-09" in result.stderr
    assert (tmp_path / "ppo" / "checkpoints" / "latest").read_text() == f"iteration_{len(rows(tmp_path))}"
