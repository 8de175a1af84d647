"""Roles that leave the device between their stages: the same results, and memory that is really free."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import torch
import warm
import worlds as launching
from conftest import ROOT, SMALL, launch
from test_hf_architectures import make

from rlhf_engine.models.residency import Parcel, Presence


def test_a_parcel_comes_back_as_it_left(tmp_path):
    flat = torch.arange(12.0)
    views = [flat[:5], flat[5:].view(1, 7)]
    kept = Parcel(lambda: views, torch.device("cpu"), tmp_path / "kept")
    scratch = Parcel(lambda: views, torch.device("cpu"), None)
    kept.leave()
    assert flat.untyped_storage().nbytes() == 0
    kept.arrive()
    assert torch.cat([views[0], views[1][0]]).tolist() == list(range(12))
    flat += 1
    kept.leave()  # nobody has said that they changed
    kept.arrive()
    assert views[1][0, -1] == 11
    flat += 1
    kept.is_copied = False
    kept.leave()
    kept.arrive()
    assert views[1][0, -1] == 12
    scratch.leave()
    assert flat.untyped_storage().nbytes() == 0
    scratch.arrive()
    assert flat.untyped_storage().nbytes() == 48 and [path.name for path in tmp_path.iterdir()] == ["kept.0"]


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("more", [[], ["schedule.prefetch=true", "ppo.optimizer.distributed=false"]], ids=str)
def test_offloading_changes_nothing(worlds, small_run, tmp_path, layout, more):
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    settings = [*SMALL, "phases=[ppo]", f"output_dir={tmp_path}", *more, "ppo.epochs=2"]
    world = worlds(layout[0] * layout[1] * layout[2])
    keeps = world.run(cases.first_iteration, settings, layout, "ppo")
    moves = world.run(cases.first_iteration, [*settings, "schedule.residency=offload"], layout, "ppo")
    for mine, theirs in zip(moves, keeps, strict=True):
        # at the end only the weights of the policy, which the next iteration begins with
        away = dict.fromkeys(("critic", "reference", "reward"), Presence.AWAY)
        assert mine.pop("away") == {**away, "policy": Presence.WEIGHTS} and theirs.pop("away") == {}
        assert mine.pop("times") and theirs.pop("times")
        assert mine == theirs


def gradients(overrides: list[str]) -> dict[str, list[str]]:
    """Which roles have memory for gradients in each stage of PPO's first iteration, and behind it."""
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.launching.build import begin
    from rlhf_engine.models.optim import gradient_tensors
    from rlhf_engine.schedule import Schedule

    ctx = cases.context(overrides, (1, 1, 1))
    algorithm = ALGORITHMS["ppo"](ctx.config)
    specs = algorithm.roles()
    begin(ctx, algorithm.name, specs)
    found: dict[str, list[str]] = {}

    def note(stage: str) -> None:
        trained = {name: role for name, role in ctx.roles.items() if role.is_trained}
        sizes = {name: gradient_tensors(role.modules)[0].untyped_storage().nbytes() for name, role in trained.items()}
        found[stage] = [name for name, size in sizes.items() if size]

    def noted(stage):
        def body(*args):
            note(stage.name)
            return stage.body(*args)

        return replace(stage, body=body)

    Schedule([noted(stage) for stage in algorithm.stages], algorithm.provided, specs).run(ctx, algorithm.batch(ctx))
    note("behind")
    return found


def test_gradients_are_there_for_updates_alone(worlds, small_run, tmp_path):
    """Also of roles that stay."""
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    found = worlds(1).run(gradients, [*SMALL, "phases=[ppo]", f"output_dir={tmp_path}"])[0]
    assert found.pop("train_critic") == ["critic"] and found.pop("train_policy") == ["policy"]
    assert {"rollout", "log_probs", "values", "behind"} <= found.keys() and not any(found.values())


def test_a_run_with_everything_offloaded(small_run, tmp_path):
    """Evaluations, checkpoints, exports and going on from a checkpoint bring back what they need."""
    rows = {}
    for residency in ("keep", "offload"):
        folder = tmp_path / residency
        shutil.copytree(small_run, folder)
        settings = [*SMALL, f"schedule.residency={residency}", f"output_dir={folder}", "mesh.dp=1", "ppo.save_every=1"]
        if residency == "offload":
            launch(*settings, "ppo.iterations=1", "ppo.optimizer.schedule=constant")
            (folder / "ppo" / "summary.json").unlink()
        launch(*settings)
        lines = (folder / "ppo" / "metrics.jsonl").read_text().splitlines()
        rows[residency] = [
            {k: v for k, v in json.loads(line).items() if not k.startswith(cases.MEASURED)} for line in lines
        ]
        assert (folder / "ppo" / "hf" / "model.safetensors").is_file()
        assert not (folder / "offloaded").exists()
    assert rows["offload"] == rows["keep"]


def test_what_leaves_is_decided_by_the_plan(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    settings = [*SMALL, f"output_dir={tmp_path}", "mesh.dp=1", "schedule.residency=auto", "ppo.iterations=1"]
    assert "residency: no role leaves" in launch(*settings).stdout
    said = launch(*settings, "rerun=true", "phases=[ppo]", "plan.memory=0.001").stdout
    assert "residency: policy and critic and reference and reward leave" in said


LARGE = dict(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=13, num_attention_heads=8, num_key_value_heads=8,
    vocab_size=768, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def large(small_run, tmp_path_factory) -> list[str]:
    """PPO of four models of 42 million parameters."""
    policy = make(tmp_path_factory.mktemp("policy"), "LlamaForCausalLM", LARGE)
    reward = make(tmp_path_factory.mktemp("reward"), "LlamaForSequenceClassification", LARGE | dict(num_labels=1))
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    return [
        *SMALL, f"policy.path={policy}", f"reward.path={reward}", f"tokenizer.path={tokenizer}", "phases=[ppo]",
        "mesh.dp=1", "ppo.prompts_per_iteration=4", "ppo.num_minibatches=1", "ppo.eval_prompts=2", "ppo.iterations=1",
        "rollout.max_new_tokens=4", "export_hf=false", "rollout.kv_tokens=2048", "tokenizer.template=hh",
    ]  # fmt: skip


def test_a_run_that_fits_only_because_two_roles_leave(large, tmp_path):
    """Under a limit on a rank's memory; without offloading the plan refuses the run beforehand."""
    offload = ["schedule.residency=offload", "schedule.offload=[reference,reward]"]
    needed = limited(None, *large, f"output_dir={tmp_path / 'free'}")
    limit = needed - (150 << 20)  # the two have 320 MB, and what is highest is some 200 less without them
    assert limited(limit, *large, *offload, f"output_dir={tmp_path / 'offload'}") <= limit
    with pytest.raises(AssertionError, match="memory"):
        limited(limit, *large, f"output_dir={tmp_path / 'keep'}")
    plan = [*large, "plan=true", "plan.device=cpu", f"output_dir={tmp_path / 'plan'}"]
    refused = launch(*plan, "plan.memory=0.1", check=False)
    peak = float(re.search(r"ppo needs ([\d.]+) ?GB", refused.stderr)[1])
    refused = launch(*plan, f"plan.memory={peak - 0.15}", check=False)
    assert refused.returncode == 2 and "it fits with" in refused.stderr
    launch(*plan, *offload, f"plan.memory={peak - 0.15}")


def limited(limit: int | None, *overrides: str) -> int:
    """Runs one rank under a limit on the bytes that it may allocate; gives the most that it had."""
    port = str(launching.launcher.free_port())
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.NamedTemporaryFile("r") as said:
        rank = warm.Command([sys.executable, str(ROOT / "launch" / "run.py"), *overrides], said.name, said.name, env)
        if limit is not None:
            resource.prlimit(rank.pid, resource.RLIMIT_DATA, (limit, limit))
        most = 0
        while rank.poll() is None:
            with contextlib.suppress(OSError):
                found = re.search(r"VmData:\s+(\d+)", Path(f"/proc/{rank.pid}/status").read_text())
                most = max(most, int(found[1]) << 10 if found else 0)
            time.sleep(0.02)
        assert rank.returncode == 0, said.read()
    return most
