"""Stages that share a pipeline give what they give one after the other, to the bit."""

from __future__ import annotations

from dataclasses import replace

import cases
import pytest
from conftest import SMALL
from test_hf_architectures import SIZES, make

from rlhf_engine.algorithms.ppo import PPO, stage_table
from rlhf_engine.config import RunConfig, ScheduleConfig
from rlhf_engine.schedule import Schedule

TOGETHER = ["time/log_probs+ref_log_probs+score+values", "time/train_critic+train_policy"]


@pytest.fixture(scope="module")
def settings(small_run, tmp_path_factory) -> list[str]:
    """PPO whose critic and reward model have another depth and width than the policy, and one token more a row."""
    sizes = SIZES | dict(head_dim=10, hidden_size=24, num_hidden_layers=5, max_position_embeddings=256, num_labels=1)
    reward = make(tmp_path_factory.mktemp("reward"), "LlamaForSequenceClassification", sizes | dict(vocab_size=700))
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    return [
        *SMALL, "model.num_layers=4", f"tokenizer.path={tokenizer}", f"reward.path={reward}", "phases=[ppo]",
        "output_dir=nowhere", "ppo.epochs=2", "ppo.num_minibatches=2",
    ]  # fmt: skip


@pytest.mark.parametrize("layout", [(1, 2, 1), (2, 2, 1), (2, 2, 1, True), (1, 4, 1)], ids=str)
def test_streams_change_nothing(worlds, settings, layout):
    world = worlds(layout[0] * layout[1])
    together = world.run(cases.first_iteration, settings, layout, "ppo")
    off = ["schedule.infer_stream=false", "schedule.train_stream=false"]
    apart = world.run(cases.first_iteration, [*settings, *off], layout, "ppo")
    for mine, theirs in zip(together, apart, strict=True):
        assert set(TOGETHER) <= set(mine.pop("times")) and not set(TOGETHER) & set(theirs.pop("times"))
        assert mine == theirs
    assert together[0]["figures"]["policy/grad_norm"] > 0 and together[0]["figures"]["critic/grad_norm"] > 0


ROLES = ("policy", "reference", "reward", "critic")


def names(config: ScheduleConfig, pp: int = 2, offloaded=(), table=None) -> list[list[str]]:
    schedule = Schedule(table or stage_table(RunConfig()), PPO.provided, ROLES)
    return [[stage.name for stage in group] for group in schedule.groups(config, pp, offloaded)]


def test_what_runs_together():
    inferred, trained = ["log_probs", "ref_log_probs", "score", "values"], ["train_critic", "train_policy"]
    found, half = names(ScheduleConfig()), names(ScheduleConfig(infer_stream=False))
    assert inferred in found and trained in found
    assert inferred not in half and trained in half
    assert all(len(group) == 1 for group in names(ScheduleConfig(), pp=1))
    # a role that is kept off the device is not brought there with others
    found = names(ScheduleConfig(), offloaded=("reference",))
    assert found[1:5] == [["log_probs"], ["ref_log_probs"], ["score", "values"], ["advantage"]]


def test_a_stage_does_not_run_with_one_that_it_reads_from():
    table = [
        replace(stage, reads=("tokens", "scores")) if stage.name == "values" else stage
        for stage in stage_table(RunConfig())
    ]
    found = names(ScheduleConfig(), table=table)
    assert ["log_probs", "ref_log_probs", "score"] in found and ["values"] in found
