"""Sizes that an experiment leaves open."""

from __future__ import annotations

import pytest

from rlhf_engine.config import ConfigError, MeshConfig, ModelConfig
from rlhf_engine.launching.compose import compose
from rlhf_engine.launching.preflight import plan
from rlhf_engine.launching.sizes import open_sizes, settle

OWN = ["+exp=rlhf", "policy.path=DIR", "data.sources=[FILE.jsonl]", "plan.memory=80"]
SMALL = ModelConfig(hidden_size=576, num_layers=30)


@pytest.mark.parametrize(
    ("context", "device", "keys", "wanted"),
    [
        (8192, "cuda", [], (2048, 1024, 1024)),
        (8192, "cpu", [], (512, 256, 256)),
        (300, "cuda", [], (300, 150, 150)),
        (8192, "cuda", ["data.max_seq_len=4000"], (4000, 2000, 2000)),
        (8192, "cuda", ["rollout.max_new_tokens=100"], (2048, 1948, 100)),
        (8192, "cuda", ["data.max_prompt_len=100"], (2048, 100, 1948)),
    ],
)
def test_lengths_fit_the_context(context, device, keys, wanted):
    config = compose([*OWN, *keys])
    settle(config, MeshConfig(1, 1, 1), SMALL, context, device)
    assert (config.data.max_seq_len, config.data.max_prompt_len, config.rollout.max_new_tokens) == wanted
    assert open_sizes(config) == []


def test_a_micro_batch_is_a_tenth_of_memory_and_the_rest_is_the_same_on_every_mesh():
    large = ModelConfig(hidden_size=4096, num_layers=32)
    found = []
    for mesh in (MeshConfig(1, 1, 8), MeshConfig(4, 1, 2), MeshConfig(2, 2, 2)):
        config = compose(OWN)
        found.append(settle(config, mesh, large, 4096, "cuda"))
        rows = found[-1]["sft.micro_batch_size"]
        of_a_row = 34 * 2048 * 4096 * 32 / (mesh.tp * mesh.pp)
        assert rows * of_a_row <= 8e9 < (rows + 1) * of_a_row or rows == 1
        assert found[-1]["reward.micro_batch_size"] == max(1, rows // 2)
    assert found[0]["sft.micro_batch_size"] == 1 and found[1]["sft.micro_batch_size"] == 3
    same = [{key: value for key, value in each.items() if "micro" not in key} for each in found]
    assert same[0] == same[1] == same[2]


@pytest.mark.parametrize(("device", "samples", "prompts"), [("cpu", 8, 4), ("cuda", 8, 16), ("cuda", 200, 1)])
def test_groups_make_a_batch_of_as_many_samples(device, samples, prompts):
    config = compose([*OWN, "phases=[grpo]", f"grpo.samples_per_prompt={samples}"])
    assert settle(config, MeshConfig(1, 1, 1), SMALL, 512, device)["grpo.prompts_per_iteration"] == prompts
    assert config.ppo.prompts_per_iteration == {"cpu": 32, "cuda": 128}[device]


def test_what_is_said_stays():
    config = compose([*OWN, "sft.batch_size=6", "ppo.micro_batch_size=2"])
    found = settle(config, MeshConfig(1, 1, 1), SMALL, 512, "cpu")
    assert (config.sft.batch_size, config.ppo.micro_batch_size) == (6, 2)
    assert not {"sft.batch_size", "ppo.micro_batch_size"} & set(found)


@pytest.mark.parametrize(("given", "missing"), [([], "policy.path"), (["policy.path=DIR"], "data.sources")])
def test_what_the_experiment_needs(given, missing):
    with pytest.raises(ConfigError, match=f"^{missing} is not set, and this experiment needs it$"):
        compose(["+exp=rlhf", *given])


def test_a_size_may_be_open_and_another_number_may_not():
    with pytest.raises(ConfigError, match=r"sft\.iterations=None is not"):
        compose(["sft.iterations=null"])


def test_rates_of_a_model_from_scratch(shared, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(20 * '{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    own = [f"policy.path={shared / 'models' / 'stories260K_hf'}", f"data.sources=[{file}]", "data.num_eval_rows=2"]
    assert plan(compose(["+exp=rlhf", *own])).notes == []
    assert plan(compose(["+exp=hh_rlhf"])).notes == []
    found = plan(compose(["+exp=hh_rlhf", *own, "phases=[sft,ppo]", "reward.fns=[length]"])).notes
    assert [line.split(" is ")[0] for line in found] == [
        "sft.optimizer.lr=0.002", "ppo.optimizer.lr=0.0003", "ppo.critic_optimizer.lr=0.001",
    ]  # fmt: skip
