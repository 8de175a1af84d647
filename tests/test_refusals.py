"""Bad input is refused in one line that names what is wrong, before a process group exists."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
import sys

import pytest
import worlds
from conftest import ROOT, launch

from rlhf_engine.config import ConfigError
from rlhf_engine.launching import preflight
from rlhf_engine.launching.compose import compose

GOOD = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}

ASKED = ["data.sources=[sums]", "phases=[sft,grpo]", "reward.fns=[exact]", "eval.samples=4"]


@pytest.fixture(scope="module")
def run():
    return worlds.launcher


@pytest.fixture
def refused(run, capsys, monkeypatch):
    """The one line that refuses a command line."""
    monkeypatch.setattr(run, "start_ranks", lambda *args: pytest.fail("a rank was started"))

    def get(*overrides: str) -> str:
        assert run.main(["+exp=hh_rlhf", "device=cpu", *overrides]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1, out + err
        return err

    return get


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ppo.iteratoins=3"], ["ppo.iteratoins", "ppo.iterations"]),
        (["mesh.tpp=2"], ["mesh.tpp", "mesh.tp"]),
        (["modle=tiny"], ["modle", "model"]),
        (["model=tyni"], ["model=tyni", "tiny"]),
        (["+exp=hh_rlfh"], ["exp=hh_rlfh", "hh_rlhf"]),
        (["ppo.iterations=many"], ["ppo.iterations='many'", "whole number"]),
        (["ppo.kl_coef=true"], ["ppo.kl_coef", "number"]),
        (["ppo.kl_controller=adaptve"], ["ppo.kl_controller=adaptve", "adaptive"]),
        (["model=0"], ["model=0", "llama_7b"]),
        (["model=null"], ["model=None", "llama_7b"]),
        (["phases=[sft,rl]"], ["rl", "ppo"]),
        (["rollout.tail=carry"], ["rollout.tail=carry", "ppo.importance=none", "ppo.importance=truncated"]),
        (["rollout.done_share=1.5"], ["rollout.done_share=1.5", "(0, 1]"]),
        (["rollout.done_share=0"], ["rollout.done_share=0", "must be positive"]),
        (["phases=[]"], ["phases"]),
        (["phases=sft"], ["phases", "phases=[sft]"]),
        (["model.layers=te"], ["model.layers=te needs a GPU", "model.layers=own"]),
        (["dtype=fp8", "model.layers=te"], ["dtype=fp8 needs a GPU"]),
        (["mesh.tp=3"], ["mesh.tp=3", "num_attention_heads=4", "[1, 2]"]),
        (["mesh.tp=0"], ["mesh.tp=0", "at least 1"]),
        (["mesh.tp=4"], ["mesh.tp=4", "num_key_value_heads=2"]),
        (["mesh.ep=2", "mesh.dp=3"], ["mesh.ep=2", "3 data parallel"]),
        (["mesh.ep=2"], ["mesh.ep=2", "num_experts=0"]),
        (["policy.router_aux_loss_coef=0.01"], ["router_aux_loss_coef=0.01", "num_experts=null"]),
        (["policy.router_aux_loss_coef=-1"], ["policy.router_aux_loss_coef=-1", "at least 0"]),
        (["mesh.ep=2", "model.num_experts=3"], ["mesh.ep=2", "num_experts=3"]),
        (["mesh.pp=5"], ["mesh.pp=5", "num_layers=4"]),
        (["mesh.virtual_pp=2"], ["mesh.virtual_pp=2", "use mesh.pp=2"]),
        (["mesh.pp=2", "mesh.virtual_pp=3"], ["mesh.virtual_pp=3", "num_layers=4", "use mesh.virtual_pp=2"]),
        (["sft.batch_size=61"], ["sft.batch_size=61", "60 or 62"]),
        (["dpo.batch_size=33", "phases=[dpo]"], ["dpo.batch_size=33", "32 or 34"]),
        (["kto.batch_size=1", "mesh.dp=1", "phases=[kto]"], ["kto.batch_size=1", "2 at least"]),
        (["dpo.loss=kto"], ["dpo.loss=kto", "simpo"]),
        (["dpo.beta=0"], ["dpo.beta=0", "positive"]),
        (["dpo.loss=cdpo", "phases=[dpo]"], ["dpo.label_smoothing=0.0", "between 0 and 0.5"]),
        (["dpo.label_smoothing=0.1", "phases=[dpo]"], ["dpo.label_smoothing=0.1", "dpo.loss=dpo", "dpo.loss=cdpo"]),
        (["ppo.num_minibatches=3"], ["ppo.num_minibatches=3", "64"]),
        (["phases=[grpo]", "grpo.samples_per_prompt=1"], ["grpo.samples_per_prompt=1", "grpo.advantage=reinforce++"]),
        (["phases=[grpo]", "grpo.num_minibatches=3"], ["grpo.num_minibatches=3", "512 samples"]),
        (["phases=[grpo]", "grpo.std_correction=2"], ["grpo.std_correction=2", "0 or 1"]),
        (["phases=[grpo]", "output_dir=nowhere"], ["reward model", "phases=[reward,grpo]"]),
        (["eval.samples=4"], ["eval.samples=4 needs reward.fns"]),
        (["eval.sources=[sums]"], ["eval.sources=['sums']", "eval.samples=N"]),
        ([*ASKED, "eval.k=[1,8]"], ["eval.k=8", "between 1 and eval.samples=4"]),
        ([*ASKED, "eval.k=[0]"], ["eval.k=0"]),
        ([*ASKED, "eval.top_p=2"], ["eval.top_p=2"]),
        ([*ASKED, "eval.temperature=0"], ["eval.temperature=0", "positive"]),
        ([*ASKED, "eval.sources=[sums::2]"], ["eval.sources=sums::2", "weight"]),
        ([*ASKED, "eval.sources=[hh_mini/harmless-base]"], ["exact needs 'answer'", "hh_mini/harmless-base:1"]),
        ([*ASKED, "eval.sources=[a/b.jsonl]", "data.sources=[a/b.jsonl::2]"], ["eval.sources=a/b.jsonl", "trained on"]),
        (["checkpoint.best=eval/loss", "phases=[grpo]"], ["checkpoint.best=eval/loss: no phase", "eval.samples=N"]),
        ([*ASKED, "checkpoint.best=eval/pas@1"], ["checkpoint.best=eval/pas@1", "did you mean eval/pass@1?"]),
        ([*ASKED, "checkpoint.best=eval/pass@1", "phases=[grpo]"], ["at the end alone", "grpo.eval_every"]),
        (["checkpoint.build_on=best"], ["checkpoint.build_on=best needs checkpoint.best=FIGURE"]),
        (["tokenizer.template=chatml"], ["tokenizer.template=chatml", "tokenizer.path"]),
        (["grpo.advantage=gpro"], ["grpo.advantage=gpro", "grpo, dr_grpo, rloo, reinforce++"]),
        (["grpo.gae_lambda=1"], ["unknown key grpo.gae_lambda"]),
        (["ppo.loss=gppo"], ["ppo.loss=gppo", "ppo, gspo, cispo, reinforce"]),
        (["ppo.kl=k4"], ["ppo.kl=k4", "reward, k1, k2, k3, k3+"]),
        (["ppo.kl=k3", "ppo.kl_controller=adaptive"], ["ppo.kl_controller=adaptive", "ppo.kl=reward"]),
        (["ppo.dual_clip=1"], ["ppo.dual_clip=1", "above 1"]),
        (["ppo.importance=masked", "ppo.old_log_probs=sampler"], ["ppo.importance=masked", "old_log_probs=trainer"]),
        (["ppo.importance_limit=0.5"], ["ppo.importance_limit=0.5", "above 1"]),
        (["ppo.importance_low=2"], ["ppo.importance_low=2", "between 0 and 1"]),
        (["ppo.overlong_buffer=80"], ["ppo.overlong_buffer=80", "rollout.max_new_tokens=80"]),
        (["data.max_seq_len=4096"], ["data.max_seq_len=4096", "512"]),
        (["rollout.max_new_tokens=500"], ["rollout.max_new_tokens=500", "512"]),
        (["rollout.top_k=5"], ["rollout.top_k=0"]),
        (["rollout.min_p=0.1"], ["rollout.min_p=0"]),
        (["rollout.min_p=1.5", "phases=[sft]"], ["rollout.min_p=1.5", "[0, 1]"]),
        (["rollout.min_p=-1"], ["rollout.min_p=-1", "at least 0"]),
        (["rollout.cache_share=1"], ["rollout.cache_share=1.0", "(0, 1)"]),
        (["rollout.cache_share=0"], ["rollout.cache_share=0", "positive"]),
        (["rollout.kv_tokens=0"], ["rollout.kv_tokens=0", "at least 1"]),
        (["rollout.kv_tokens=100"], ["rollout.kv_tokens=100", "208"]),
        (["rollout.stop=[a,'']"], ["rollout.stop", "empty"]),
        (["rollout.stop=a"], ["rollout.stop", "[a]"]),
        (["rollout.temperature=0"], ["rollout.temperature"]),
        (["ppo.score_min=1", "ppo.score_max=-1"], ["ppo.score_min=1", "ppo.score_max=-1"]),
        (["ppo.critic_warmup_iterations=30", "ppo.iterations=30"], ["ppo.critic_warmup_iterations=30", "none"]),
        (["ppo.ptx.rows=5", "ppo.ptx.sources=[hh_mini/helpful-base]"], ["ppo.ptx.rows=5", "4 or 6"]),
        (["ppo.ptx.sources=[nowhere.jsonl]"], ["ppo.ptx.sources", "nowhere.jsonl", "not there"]),
        (["schedule.micro_batch_tokens=0"], ["schedule.micro_batch_tokens=0", "at least 1"]),
        (["ppo.num_minibatches=64"], ["rows per minibatch=1", "mesh.dp=2", "use 2"]),
        (["data.strategy=in_bach"], ["data.strategy=in_bach", "in_batch"]),
        (["data.sources=['hh_mini/helpful-base[system=hepful]']"], ["hepful", "helpful"]),
        (["schedule.offload=[critics]"], ["schedule.offload=critics", "critic?"]),
        (["data=hh_rlhf", "data.sources=[nowhere.jsonl]"], ["nowhere.jsonl", "not there"]),
        (["data.sources=[hh_mini/helpful]"], ["hh_mini/helpful", "hh_mini/helpful-base"]),
        (["data.sources=['hh_mini/helpful-base::-1']"], ["helpful-base::-1", "positive"]),
        (["data.sources=['hh_mini/helpful-base::x']"], ["'x'", "number"]),
        (["policy.path=nowhere"], ["nowhere", "config.json"]),
        (["reward.fns=[nowhere:f]"], ["reward.fns=nowhere:f", "nowhere"]),
        (["reward.fns=[math:nothing]"], ["reward.fns=math:nothing", "nothing"]),
        (["phases=[score]", "output=o.jsonl"], ["data.sources"]),
        (["phases=[generate]", "data.sources=[x.jsonl]"], ["output"]),
        (["data.sources=[hh_mini]"], ["hh_mini/helpful-base"]),
        (["checkpoint.keep_last=0"], ["checkpoint.keep_last=0"]),
        (["checkpoint.keep_every=0"], ["checkpoint.keep_every=0", "at least 1"]),
        (["sft.micro_batch_size=0"], ["sft.micro_batch_size=0", "at least 1"]),
        (["model.num_key_value_heads=0"], ["model.num_key_value_heads=0", "at least 1"]),
        (["rollout.slots=0"], ["rollout.slots=0", "at least 1"]),
        (["ppo.kl_coef=nan"], ["ppo.kl_coef=nan", "finite"]),
        (["seed=4294967296"], ["seed=4294967296", "at most 4294967295"]),
        (["reward.timeout=1e10"], ["reward.timeout=1", "at most 1000000000"]),
        (["timeout.stage=1e10"], ["timeout.stage=1", "at most 1000000000"]),
        (["ppo.kl_controller=adaptive", "ppo.kl_horizon=12"], ["ppo.kl_horizon=12", "64 samples", "more than 12"]),
        (["ppo.kl_target=0"], ["ppo.kl_target=0", "positive"]),
        (["sft.optimizer.min_lr=1"], ["sft.optimizer.min_lr", "exceeds"]),
        (["dtype=bfloat16"], ["dtype=bfloat16", "GPU"]),
        (["reward.fn=math:f"], ["reward.fn", "reward.fns"]),
        (["reward.fns=[:f]"], ["reward.fns=:f", "package.module:name"]),
        (["plan=true", "plan.device=h10"], ["plan.device=h10", "h100"]),
        (["plan=true", "plan.memory=0"], ["plan.memory=0", "positive"]),
        (["plan=true", "plan.device=cpu", "mesh.tp=2", "plan.world=3"], ["mesh.tp=2", "3 are there"]),
        (["plan=yes"], ["plan"]),
        (["tokenizer.path=nowhere"], ["tokenizer.path=nowhere", "tokenizer.model"]),
        (["phases=[ppo]", "output_dir=nowhere"], ["reward model", "phases=[reward,ppo]"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_overrides(refused, overrides, words):
    message = refused(*overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["output_dir=/a/x=y"], ["output_dir=/a/x=y: ", "quotes: 'output_dir=\"/a/x=y\"'"]),
        (["policy.path=~/m"], ["policy.path=~/m: ", "home folder", "policy.path=/home/me/m\n"]),
        (["data.sources=[~/a,~/b]"], ["'data.sources=[/home/me/a,/home/me/b]'"]),
        (["/a/x=y"], ["/a/x=y: '/a/x' is not a key"]),
        (["~/m"], ["'~/m' is not key=value", "policy.path=/home/me/m"]),
        (["seed=1,2"], ["seed=1,2 is several values", "'seed=[1,2]'", "'seed=\"1,2\"'", "several commands"]),
        (["phases=sft,ppo"], ["'phases=[sft,ppo]'"]),
        (["seed=range(1,3)"], ["seed=range(1,3) is several values"]),
        (["-m"], ["-m is not an option", "several runs"]),
        (["--multirun", "seed=1,2"], ["--multirun is not an option"]),
        (["--config-name=x"], ["--config-name=x is not an option"]),
        (["a b=c"], ["'a b=c'", "argument with a space"]),
        (["mesh.tp=2 mesh.pp=2"], ["'mesh.tp=2 mesh.pp=2'", "one of its own"]),
        (["=x"], ["=x: '' is not a key"]),
        (["seed"], ["'seed' is not key=value"]),
        ([""], ["'' is not key=value"]),
        (["seed", "=", "1"], ["seed = 1: no spaces", ": seed=1\n"]),
        (["seed", "=1"], ["seed =1: no spaces", ": seed=1\n"]),
        (["seed=", "1"], ["seed= 1: no spaces", ": seed=1\n"]),
        (["seed =1"], ["seed =1: no spaces", ": seed=1\n"]),
        (["data.sources=[a.jsonl,", "b.jsonl]"], ["'data.sources=[a.jsonl, b.jsonl]'"]),
        (["data.sources=[a.jsonl"], ["data.sources=[a.jsonl: ", "'data.sources=[a.jsonl]'"]),
        (["data.sources=[a[system=x,reward=y],b]"], ["""'data.sources=["a[system=x,reward=y]","b"]'"""]),
        (['rollout.stop=["Human:]'], ["""'rollout.stop=["Human:"]'"""]),
        (["output_dir=it's"], ["output_dir=it's: ", """'output_dir="it'"'"'s"'"""]),
        (["output_dir='a"], ["""'output_dir="a"'"""]),
        (["output_dir=ä"], ["""'output_dir="ä"'"""]),
        (["tokenizer.template={{ x }}"], ["""'tokenizer.template="{{ x }}"'"""]),
        (["output_dir=${nothing}"], ["output_dir: ", "'nothing'"]),
        (["exp=hh_rlhf"], ["exp=hh_rlhf: ", "+exp=hh_rlhf"]),
    ],
    ids=str,
)
def test_arguments_that_hydra_cannot_read(refused, monkeypatch, arguments, words):
    """Name the argument, and a spelling that works in a shell."""
    monkeypatch.setenv("HOME", "/home/me")
    message = refused(*arguments)
    assert all(word in message for word in words) and "hydra.cc" not in message, message
    if "quotes: " in message:
        (argument,) = shlex.split(message.partition("quotes: ")[2])
        assert is_read(argument)


def is_read(argument: str) -> bool:
    """Whether Hydra reads it, whatever the engine makes of it."""
    try:
        compose([argument])
    except ConfigError as error:
        return "quotes: " not in str(error)
    return True


@pytest.mark.parametrize(("phases", "begun"), [("ppo", "sft"), ("reward,ppo", "sft"), ("ppo", "reward")])
def test_what_is_built_on_a_phase_that_was_stopped(refused, run, monkeypatch, tmp_path, phases, begun):
    """Would be built on its beginning; a phase that is finished, or goes on first, is taken."""
    checkpoints = tmp_path / begun / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("iteration_2")
    monkeypatch.setattr(preflight, "check_reward", lambda *args: None)  # which would miss a reward model
    message = refused(f"phases=[{phases}]", f"output_dir={tmp_path}")
    assert f"{tmp_path / begun}, which was stopped" in message and f"use phases=[{begun},{phases}]" in message
    monkeypatch.setattr(run, "start_ranks", lambda *args: 0)
    settings = ["+exp=hh_rlhf", "device=cpu", f"output_dir={tmp_path}"]
    assert run.main([*settings, f"phases=[{begun},{phases}]"]) == 0
    (tmp_path / begun / "summary.json").write_text('{"iterations": 2}')
    assert run.main([*settings, f"phases=[{phases}]"]) == 0


def test_a_hub_data_set_without_its_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    message = refused("data=hh_rlhf")
    assert "data.sources: Anthropic/hh-rlhf/helpful-base" in message and "pip install -e '.[data]'" in message


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["no rows"]),
        ([json.dumps(GOOD), "{broken"], [":2:"]),
        ([json.dumps(GOOD), "[1, 2]"], [":2:", "object"]),
        ([json.dumps(GOOD), "", json.dumps({"chosen": "x"})], [":3:", "'chosen'"]),
        ([json.dumps({**GOOD, "rejected": 3})], [":1:", "'rejected' must be text"]),
        ([json.dumps({**GOOD, "chosen": "Hello"})], [":1:", "'chosen'", "Human"]),
        ([json.dumps(GOOD)], ["1 rows", "held out", "data.num_eval_rows"]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_files(refused, tmp_path, lines, words, suffix):
    path = tmp_path / f"rows{suffix}"
    text = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if suffix == ".jsonl.gz" else text)
    message = refused("data=hh_rlhf", f"data.sources=[{path}]")
    assert str(path) in message and all(word in message for word in words), message


def test_a_truncated_archive(refused, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(GOOD) + "\n").encode() * 500)[:-20])
    assert str(path) in refused("data=hh_rlhf", f"data.sources=[{path}]")


def test_an_unknown_architecture_and_setting(refused, tmp_path):
    config = {"architectures": ["LlamaForCausalML"], "hidden_act": "silu", "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "LlamaForCausalLM" in refused(f"policy.path={tmp_path}")
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"], "hidden_act": "gelu"})
    )
    assert "hidden_act='gelu'" in refused(f"policy.path={tmp_path}")


def test_a_world_that_does_not_divide(run, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run.main(["+exp=hh_rlhf", "device=cpu", "mesh.tp=2"]) == 2
    message = capsys.readouterr().err
    assert "mesh.tp=2" in message and "3 are there" in message


def test_from_the_command_line_without_importing_torch():
    result = launch("+exp=hh_rlhf", "ppo.iteratoins=3", check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    code = (
        "import sys; import run; assert run.main(['mesh.tp=3', 'device=cpu']) == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT / "launch")
