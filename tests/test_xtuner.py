"""XTuner-RLHF's configurations: read as data, each key set, refused or said to change nothing, and one run whole."""

from __future__ import annotations

import json

import pytest
import worlds
from conftest import ROOT, launch

from rlhf_engine.config import ConfigError, RunConfig, keys
from rlhf_engine.data import hh_mini
from rlhf_engine.data.formats import read_row
from rlhf_engine.launching.compose import compose
from rlhf_engine.launching.reference import every_key
from rlhf_engine.xtuner.read import read
from rlhf_engine.xtuner.rules import FIXED, REQUIRED, RULES, Refused

QUICK_START = str(ROOT / "docs" / "examples" / "xtuner_quick_start.py")
TINY = ROOT / "docs" / "examples" / "xtuner_tiny.py"
WHOLE = ["rollout.top_p=1", "ppo.iterations=400"]  # what the quick start's own file needs here

# as little as a file may say
LEAST = """
model_configs = dict(actor=dict(model_path="p"), reward=dict(model_path="r"))
dataset_config = {"ppo_datas": ["a.jsonl::1.0"]}
train_config = dict(max_train_step=3)
"""


@pytest.fixture
def file(tmp_path):
    """Writes a configuration; gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "config.py"
        path.write_text(text)
        return str(path)

    return write


# -- as data -------------------------------------------------------------------------------------------------


def test_values_are_worked_out_and_nothing_is_run(file):
    text = """
import torch, this_module_is_not_there
A = 8
B = -A + 2 * A // 3 % 4  # -7
assert A > B
NAME = 'models/' + f'{A}b'
DTYPE = torch.bfloat16
SIZES: dict = dict(size=A if A != 8 else A // 2)
dataset_config = {'ppo_datas': ['x::1.0'], 'random_seed': -B}
model_configs = dict(actor=dict(model_path=NAME, torch_dtype=DTYPE, trainer_config=dict(parallel=dict(data=SIZES))))
train_config = dict(max_train_step=3, save_interval=not DTYPE == torch.float16)
"""
    values = read(file(text)).values
    assert values["seed"] == 7 and values["policy.path"] == "models/8b" and values["dtype"] == "bfloat16"
    assert values["mesh.dp"] == 4 and values["ppo.save_every"] is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ny = open('/etc/passwd')", [":2:", "open", "not data"]),
        ("x = __import__('os').system('true')", [":1:", "not data"]),
        ("x = dict([('a', 1)])", [":1:", "not data"]),
        ("x = dict(**y)", [":1:", "not data"]),
        ("for x in [1]:\n    y = x", [":1:", "not data"]),
        ("x = [y for y in (1, 2)]", [":1:", "not data"]),
        ("x = 'a' * 10 ** 9", [":1:", "not data"]),
        ("x = 'a' * 1000000000", [":1:", "not data"]),
        ("x = f'{1:>1000000000}'", [":1:", "not data"]),
        ("x = y", [":1:", "`y`"]),
        ("x = 1 + 'a'", [":1:", "unsupported"]),
        ("x = 1 // 0", [":1:", "zero"]),
        ("x = 7\nassert x % 2 == 0", [":2:", "x % 2 == 0", "does not hold"]),
        ("x = (", [":1", "not Python"]),
    ],
)
def test_a_file_that_is_more_than_data(file, text, words):
    path = file(text)
    with pytest.raises(ConfigError) as error:
        read(path)
    assert path in str(error.value) and all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


# -- the rules -----------------------------------------------------------------------------------------------


def test_rules_set_keys_that_there_are():
    known = {key.name for key in every_key()}
    named = {rule.ours for rule in RULES.values() if rule.ours} | FIXED.keys() | REQUIRED.keys()
    assert named <= known and known <= set(keys(RunConfig))
    for key, rule in RULES.items():
        if rule.ours is None and not rule.why:  # then there are values that it refuses
            with pytest.raises(Refused):
                rule.convert("never", {})
                pytest.fail(key)


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("dataset_config['max_seq_len'] = 100", None),
        ("rollout_config = dict(max_new_tokens=50)", {"data.max_prompt_len": 4096, "data.max_seq_len": 4146}),
        ("rollout_config = dict(actor_micro_bs=4, write_to_file=False, clip_reward_min=-2)",
         {"rollout.slots": 4, "ppo.write_rollouts": False, "ppo.score_min": -2, "ppo.score_max": 5}),
        ("repeater_config = dict(clip_reward_min=-3, clip_reward_max=3)", {"ppo.score_min": -3, "ppo.score_max": 3}),
        ("repeater_config = dict(norm_rewards=False, norm_adv=True, kl_coeff=-1, gamma=0.9, gae_lambda=0.8)",
         {"ppo.score_scale": False, "ppo.score_center": False, "ppo.whiten_advantages": True, "ppo.kl_coef": 0,
          "ppo.gamma": 0.9, "ppo.gae_lambda": 0.8}),
        ("train_config = dict(max_train_step=9, ppo_minibatch=16, value_minibatch=16, policy_learn_time=2,"
         " critic_warmup_step=5, actor_micro_bs=4, pretrain_loss_weight=0.5)",
         {"ppo.iterations": 9, "ppo.num_minibatches": 4, "ppo.epochs": 2, "ppo.critic_warmup_iterations": 5,
          "ppo.micro_batch_size": 4, "ppo.ptx.coef": 0.5}),
        ("train_config = dict(max_train_step=9, ppo_minibatch=16)\n"
         "dataset_config = {'ppo_datas': ['a'], 'pt_datas': ['[HF]b/c::0.5'], 'num_samples_each_epoch': 96,"
         " 'pt_data_samples': 32, 'sample_strategy': 'in_data'}",
         {"ppo.prompts_per_iteration": 64, "ppo.num_minibatches": 4, "ppo.ptx.rows": 8,
          "ppo.ptx.sources": ["b/c::0.5"], "data.strategy": "in_data"}),
        ("dataset_config = {'ppo_datas': ['a'], 'pt_datas': ['b'], 'pt_data_samples': 0}", {"data.sources": ["a"]}),
        ("tokenizer_config = dict(eos_token_id=7, chat_template='{{ x }}', padding_side='left')",
         {"tokenizer.end_id": 7, "tokenizer.template": "{{ x }}"}),
    ],
)  # fmt: skip
def test_keys(file, text, ours):
    if ours is None:
        with pytest.raises(ConfigError, match="not data"):  # an assignment to a part of a name
            read(file(LEAST + text))
    else:
        found = read(file(LEAST + text)).values
        assert {key: found[key] for key in ours} == ours
        assert "ppo.ptx.sources" in ours or "ppo.ptx.sources" not in found


def model(role: str, **settings) -> str:
    """A line that gives `LEAST` another setting of a role."""
    paths = {"actor": {"model_path": "p"}, "reward": {"model_path": "r"}}
    return f"model_configs = {paths | {role: paths.get(role, {}) | settings}!r}"


def trainer(role: str, **settings) -> str:
    return model(role, trainer_config=settings)


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        (trainer("actor", train_kwargs={"lr": 1e-6, "clip_grad_norm": 0.5, "lr_scheduler": "linear"}),
         {"ppo.optimizer.lr": 1e-6, "ppo.optimizer.clip_grad": 0.5, "ppo.optimizer.schedule": "constant"}),
        (trainer("critic", train_kwargs={"lr": 2e-6}), {"ppo.critic_optimizer.lr": 2e-6}),
        (trainer("actor", train_kwargs={
            "lr_scheduler": "cosine", "lr_scheduler_kwargs": {"num_warmup_steps": 1, "num_training_steps": 3}}),
         {"ppo.optimizer.schedule": "cosine", "ppo.optimizer.warmup_steps": 1}),
        (trainer("actor", parallel={"data": {"size": 4, "mode": "deepspeed"}, "tensor": {"size": 2},
                                    "pipeline": {"size": 3}, "sequence": True}),
         {"mesh.dp": 4, "mesh.tp": 2, "mesh.pp": 3, "mesh.sequence_parallel": True,
          "ppo.optimizer.distributed": True}),
        (trainer("reference", parallel={"data": {"size": 4}, "tensor": {"size": 2}}), {"mesh.tp": 2}),
        (trainer("actor", deepspeed_config={"gradient_clipping": 0.3, "bf16": {"enabled": True}}),
         {"ppo.optimizer.clip_grad": 0.3, "dtype": "bfloat16"}),
        (model("actor", gradient_checkpointing=True, torch_dtype="auto", use_flash_attn=True, tokenizer_path="t"),
         {"schedule.recompute": "full", "tokenizer.path": "t"}),
        (model("critic", model_path="r", model_type="critic", head_name="v_head"), {"reward.path": "r"}),
    ],
)  # fmt: skip
def test_keys_of_models(file, text, ours):
    found = read(file(LEAST + text)).values
    assert {key: found[key] for key in ours} == ours


def test_the_later_examples_say_policy_and_have_two_sections_of_data(file):
    found = read(
        file("""
model_configs = dict(policy=dict(model_path="p", model_type="policy"))
prompt_dataset_config = dict(samples_each_epoch=256, max_len=1024, message_type="prompt",
                             message_datasets=["[HF]a/b::0.5[RM_PROMPT]:default"])
pretrain_dataset_config = dict(samples_each_epoch=32, max_len=8192, message_type="pretrain",
                               message_datasets=["c.json::0.01"])
rollout_config = dict(policy_micro_bs=16)
train_config = dict(max_train_step=400, policy_micro_bs=1, critic_micro_bs=1)
""")
    ).values
    assert found["data.sources"] == ["a/b::0.5[RM_PROMPT]:default"] and found["ppo.ptx.sources"] == ["c.json::0.01"]
    assert found["ppo.prompts_per_iteration"] == 256 and found["ppo.ptx.rows"] == 32
    assert found["data.max_seq_len"] == 8192 and found["data.max_prompt_len"] == 1024
    assert found["rollout.slots"] == 16 and found["ppo.micro_batch_size"] == 1


REFUSALS = [
    ("rollout_confg = dict(max_new_tokens=5)", ["rollout_confg", "rollout_config?"]),
    ("rollout_config = dict(max_new_token=5)", ["rollout_config.max_new_token:", "max_new_tokens?"]),
    ("rollout_config = 3", ["rollout_config"]),
    ("rollout_config = dict(actor_micro_bs=1, policy_micro_bs=2)", ["actor_micro_bs", "policy_micro_bs", "same key"]),
    ("rollout_config = dict(generate_kwargs=dict(top_p=0.9))", ["generate_kwargs.top_p=0.9", "rollout.top_p="]),
    ("rollout_config = dict(generate_kwargs=dict(top_k=50))", ["generate_kwargs.top_k=50", "log-probs"]),
    ("rollout_config = dict(generate_kwargs=dict(do_sample=False))", ["do_sample=false"]),
    ("rollout_config = dict(generate_kwargs=dict(num_beams=4))", ["num_beams=4", "beams"]),
    ("rollout_config = dict(resume_step=40)", ["rollout_config.resume_step=40", "last checkpoint"]),
    ("rollout_config = dict(max_new_tokens='many')", ["max_new_tokens"]),
    ("repeater_config = dict(value_ema=True)", ["value_ema=true"]),
    ("train_config = dict(save_interval=3)", ["max_train_step", "ppo.iterations="]),
    ("train_config = dict(max_train_step=3, ppo_minibatch=10)", ["ppo_minibatch=10", "64 samples"]),
    ("train_config = dict(max_train_step=3, ppo_minibatch='x')", ["ppo_minibatch=x", "kind"]),
    ("train_config = dict(max_train_step=3, ppo_minibatch=16, value_minibatch=32)", ["value_minibatch=32", "differ"]),
    ("train_config = dict(max_train_step=3, policy_learn_time=1, value_learn_time=2)", ["ppo.epochs", "differ"]),
    ("train_config = dict(max_train_step=3, ppo_loss_weight=0.5)", ["ppo_loss_weight=0.5", "pretrain_loss_weight"]),
    ("dataset_config = dict(random_seed=1)", ["dataset_config.ppo_datas"]),
    ("dataset_config = dict(ppo_datas='a::1')", ["ppo_datas=a::1", "kind"]),
    ("dataset_config = dict(ppo_datas=['a'], ratio_within_datas=False)", ["ratio_within_datas=false", "shares"]),
    ("dataset_config = dict(ppo_datas=['a'], pt_datas=['b'], num_samples_each_epoch=68, pt_data_samples=4)\n"
     "train_config = dict(max_train_step=3, ppo_minibatch=8)", ["pt_data_samples=4", "8 minibatches"]),
    ("model_configs = dict(reward=dict(model_path='r'))", ["model_configs.actor.model_path"]),
    (model("reference", model_path="q"), ["actor.model_path=p", "reference.model_path=q", "policy.path"]),
    (model("critic", model_path="q"), ["critic.model_path", "reward.path"]),
    (model("actor", model_type="critic"), ["model_type=critic", "actor"]),
    (model("actor", torch_dtype="torch.float16"), ["torch_dtype=torch.float16", "dtype="]),
    (model("reward", model_path="r", head_name="value_head"), ["head_name=value_head", "score.weight"]),
    (model("rewrd", model_path="r"), ["model_configs.rewrd.model_path", "model_configs.reward.model_path?"]),
    (trainer("reference", parallel={"tensor": {"size": 2, "mode": "2d"}}), ["tensor.mode=2d"]),
    (trainer("actor", parallel={"pipeline": {"interleaved_overlap": True}}), ["interleaved_overlap=true"]),
    (trainer("actor", parallel={"data": {"mode": "dpp"}}), ["data.mode=dpp", "ddp"]),
    (trainer("actor", train_kwargs={"lr_scheduler": "polynomial"}), ["lr_scheduler=polynomial", "cosine"]),
    (trainer("critic", train_kwargs={"lr_scheduler_kwargs": {"num_training_steps": 50}}),
     ["critic.trainer_config.train_kwargs.lr_scheduler (default)=linear", "3 steps"]),
    (trainer("actor", train_kwargs={"lr_decay_rate": 0.9}), ["lr_decay_rate=0.9", "lr_scheduler"]),
    (trainer("actor", train_kwargs={"loss_type": "per_token"}), ["loss_type=per_token"]),
    (trainer("actor", train_kwargs={"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"num_training_steps": 50}}),
     ["lr_scheduler=cosine", "3 steps"]),
    (trainer("actor", deepspeed_config={"bf16": {"enable": False}}), ["bf16.enable:", "bf16.enabled?"]),
    (trainer("actor", deepspeed_config={"zero_optimization": {"offload_param": {"device": "cpu"}}}),
     ["device=cpu", "schedule.residency"]),
    # the end of text of another model, as the LLaMA-2 example has it
    ("tokenizer_config = dict(eos_token_id=2)\nrollout_config = dict(generate_kwargs=dict(eos_token_id=92542))",
     ["tokenizer_config.eos_token_id=2", "generate_kwargs.eos_token_id=92542", "tokenizer.end_id"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_refusals(file, text, words):
    path = file(LEAST + text)
    with pytest.raises(ConfigError) as error:
        compose([f"xtuner_config={path}"])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_the_command_line_has_the_last_word(file):
    path = file(LEAST + model("reference", model_path="q", torch_dtype="torch.float16"))
    found = compose(["policy.path=mine", f"xtuner_config={path}", "dtype=bfloat16", "mesh=2x8", "ppo.gamma=0.5"])
    longer = compose([f"xtuner_config={path}", "policy.path=mine", "dtype=float32", "rollout.max_new_tokens=9"])
    assert longer.data.max_seq_len == longer.data.max_prompt_len + 9 == 4105
    assert (found.policy.path, found.dtype, found.mesh.dp, found.ppo.gamma) == ("mine", "bfloat16", 16, 0.5)
    with pytest.raises(ConfigError, match="one already"):
        compose([f"xtuner_config={path}", "xtuner_config=other.py"])
    with pytest.raises(ConfigError, match=r"nowhere\.py: No such file"):
        compose(["xtuner_config=nowhere.py"])


def test_quick_start_is_the_experiment_of_that_name():
    """conf/exp/hh_rlhf_full.yaml has the settings of the file, but for folders, ranks and what figures do not feel."""
    theirs, ours = compose([f"xtuner_config={QUICK_START}", *WHOLE]), compose(["+exp=hh_rlhf_full"])
    for config in (theirs, ours):
        config.mesh, config.dtype, config.output_dir, config.rollout.slots = RunConfig().mesh, "auto", "", 1
        config.policy.path = config.policy.path.removeprefix("internlm/").removeprefix("models/")
        config.reward.path = config.reward.path.removeprefix("internlm/").removeprefix("models/")
        config.ppo.optimizer.distributed = config.ppo.critic_optimizer.distributed = True
    assert theirs == ours


# -- a run ---------------------------------------------------------------------------------------------------


def test_tiny_example_runs_whole(small_run, tmp_path):
    """From the data format of the quick start, with weights of the engine's own first two phases."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [read_row(row, "") for row in hh_mini.pairs("helpful-base", "train", 60, 1)]
    prompts.write_text("".join(json.dumps(row.prompt) + "\n" for row in rows))
    given = [f"policy.path={small_run}/sft/hf", f"reward.path={small_run}/reward/hf", f"output_dir={tmp_path}/run"]
    given += [f"data.sources=['{prompts}::1.0','hh_mini/harmless-base::0.5']", "data.num_rows=60"]
    given += ["data.num_eval_rows=8", "rollout.max_new_tokens=12", "ppo.iterations=2", "ppo.save_every=2"]
    result = launch(f"xtuner_config={TINY}", *given)
    assert result.stdout.count("repeater_config.kl_coeff ") == 1  # the table, once for both ranks
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["repeater_config.kl_coeff", "0.02", "ppo.kl_coef", "=", "0.02"] in lines
    assert "ppo.iterations is said on the command line" in result.stdout
    figures = [json.loads(line) for line in (tmp_path / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert len(figures) == 2 and "policy/loss" not in figures[0] and "policy/loss" in figures[1]  # critic_warmup_step
    rollouts = (tmp_path / "run" / "ppo" / "rollouts" / "1.jsonl").read_text().splitlines()
    assert len(rollouts) == 32 and {"prompt", "response", "score", "kl"} <= json.loads(rollouts[0]).keys()


def test_an_end_that_the_tokenizer_does_not_have(small_run, capsys):
    given = [f"policy.path={small_run}/sft/hf", f"reward.path={small_run}/reward/hf", "tokenizer.end_id=5"]
    assert worlds.launcher.main([f"xtuner_config={TINY}", *given]) == 2
    found = capsys.readouterr().err
    assert "tokenizer.end_id=5: by the chat template of" in found and "sft/hf ends a response with 2" in found
