"""Rehearsals: GPU runs on devices that are not there. What would not run is refused by name."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

import collectives
from test_hf_architectures import SIZES, make

from rlhf_engine.config import ConfigError, RunConfig
from rlhf_engine.data.tokenizer import Tokenizer
from rlhf_engine.rehearse import rehearsal
from rlhf_engine.rehearse.exchange import Exchange, Post
from rlhf_engine.rehearse.part import chosen, is_small, settle
from rlhf_engine.rehearse.report import lines, show, write

PHASES = ("sft", "reward", "ppo", "grpo", "dpo", "kto")
SMALL = [
    "+exp=hh_rlhf", "model.num_layers=2", "model.hidden_size=64", "model.intermediate_size=64", "data.num_rows=64",
    "data.num_eval_rows=8", "data.max_seq_len=96", "data.max_prompt_len=64", "rollout.max_new_tokens=8",
    "sft.batch_size=8", "sft.micro_batch_size=4", "reward.batch_size=8", "reward.micro_batch_size=2",
    "ppo.prompts_per_iteration=8", "ppo.micro_batch_size=2", "ppo.epochs=1", "ppo.num_minibatches=2",
    "ppo.eval_prompts=4", "grpo.prompts_per_iteration=2", "grpo.samples_per_prompt=4", "grpo.micro_batch_size=2",
    "grpo.eval_prompts=4", "dpo.batch_size=8", "dpo.micro_batch_size=2", "dpo.eval_prompts=4", "kto.batch_size=8",
    "kto.micro_batch_size=4", "kto.eval_prompts=4", "phases=[sft,reward,dpo,kto,ppo]",
]  # fmt: skip


@contextlib.contextmanager
def started(*places: str):
    """Ranks that find modules in these folders as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]))
        ranks = rehearsal.Ranks()
    yield ranks
    ranks.close()


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks():
    with started(str(HERE)) as ranks:
        yield ranks


def run(ranks, tmp_path, *overrides: str, before: str | None = None) -> rehearsal.Found:
    return rehearsal.rehearse([*SMALL, f"output_dir={tmp_path / 'run'}", *overrides], before, ranks)


# Waits of the host for the device, which may only fall: of an update four and of its micro-batches none, of a pass the
# one for its results, of a decode step the two for what has ended; and behind each stage one, for whether to stop.
WAITS = {
    ("sft", "train_policy"): 5, ("reward", "train_reward"): 5, ("ppo", "train_critic"): 9, ("ppo", "train_policy"): 9,
    ("ppo", "log_probs"): 2, ("ppo", "ref_log_probs"): 2, ("ppo", "score"): 2, ("ppo", "values"): 2,
    ("ppo", "advantage"): 5, ("ppo", "rollout"): 36, ("ppo", "the save"): 12, ("dpo", "train_policy"): 5,
    ("kto", "mismatched"): 2, ("kto", "train_policy"): 5,
}  # fmt: skip

FEW_ROWS = ["data.num_eval_rows=4", *(f"{phase}.eval_prompts=2" for phase in ("ppo", "grpo", "dpo", "kto"))]
ONE_ITERATION = [f"{phase}.iterations=1" for phase in ("sft", "reward", "dpo", "kto")]
LAYOUTS = {
    "one": [],
    "sequence": ["mesh.tp=2", "mesh.sequence_parallel=true", "schedule.recompute=selective"],
    "chunks": ["mesh.pp=2", "mesh.virtual_pp=2", "model.num_layers=4"],
    "experts": ["mesh.dp=2", "mesh.ep=2", "model.num_experts=4", "model.architecture=mixtral"],
    "offload": ["schedule.residency=offload", "schedule.recompute=full", "schedule.micro_batch_tokens=512",
                "rollout.cuda_graphs=false"],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_starts_saves_stops_and_resumes(ranks, tmp_path, layout):
    found = run(ranks, tmp_path, *LAYOUTS[layout], *([] if layout == "one" else [*FEW_ROWS, *ONE_ITERATION]))
    assert found.faults == []
    stopped, resumed = found.attempts
    assert len(stopped) == len(resumed) == found.plan.world_size
    names = [stage["name"] for stage in resumed[0]["stages"] if stage["phase"] == "ppo"]
    assert "the save within iteration 0" in [stage["name"] for stage in stopped[0]["stages"]]
    assert {"the loading of ppo", "rollout of iteration 1", "the export of ppo"} <= set(names)
    by_name = {(line.phase, line.stage): line for line in lines(found)}
    policy = by_name["sft", "train_policy"]
    assert policy.peak["weights"] and 1.9 < policy.peak["gradients"] / policy.peak["weights"] < 2.1
    rollout = by_name["ppo", "rollout"]
    assert rollout.peak["gradients"] == 0
    # what comes and goes is what the plan says, but for the padding of flat buffers
    moved = {stage["name"]: stage["moved"] for stage in resumed[0]["stages"] if stage["phase"] == "ppo"}
    planned = {name: line.planned_moved for (phase, name), line in by_name.items() if phase == "ppo"}
    del planned["the save"]
    assert sum(size > 0 for size in planned.values()) == (6 if layout == "offload" else 0)
    for name, size in planned.items():
        if f"{name} of iteration 1" in moved:
            assert moved[f"{name} of iteration 1"] == pytest.approx(size, rel=0.02, abs=10_000), name
    # messages between stages wait for nothing
    assert not [place for place in policy.waits if "p2p_communication" in place or "models/stream.py" in place]
    if layout == "one":
        found_waits = {key: sum(by_name[key].waits.values()) for key in WAITS}
        assert all(found_waits[key] <= most for key, most in WAITS.items()), found_waits
        assert rollout.captures and rollout.replays
        # the graph, and its tokens to the host, which waits for the step before; changed rows would be a third
        assert rollout.step == {"launches": 2, "waits": 1}
        print(found_waits)
    show(found, [])
    write(found, [], tmp_path / "rehearsal.json")
    assert json.loads((tmp_path / "rehearsal.json").read_text())["faults"] == []


@pytest.mark.parametrize(("layout", "steps"), [((1, 2, 2), ()), ((2, 1, 2, True), ("rollout", "evaluation"))])
def test_its_stages_and_collectives_are_those_of_a_run(ranks, worlds, tmp_path, layout, steps):
    """Of the same experiment on a CPU, on every rank. A GPU generates in other steps."""
    options = [*FEW_ROWS, *(f"{phase}.iterations=1" for phase in PHASES), f"phases=[{','.join(PHASES)}]"]
    options += [f"{name}.overlap=true" for name in RunConfig().optimizers]
    counted = worlds(4).run(collectives.count, [*SMALL, *options], layout, PHASES, tmp_path / "cpu")
    tp, pp, dp, sequence_parallel = (*layout, False)[:4]
    mesh = [
        f"mesh.tp={tp}",
        f"mesh.pp={pp}",
        f"mesh.dp={dp}",
        f"mesh.sequence_parallel={str(sequence_parallel).lower()}",
    ]
    found = run(ranks, tmp_path, *options, *mesh, "rehearse.iterations=1")
    assert found.faults == []
    for rank, on_cpu in enumerate(counted):
        rehearsed = {
            f"{stage['phase']} {stage['name']}": stage["collectives"]
            for attempt in reversed(found.attempts)
            for stage in attempt[rank]["stages"]
            # one that is resumed has to look at once more what the phases before it have left
            if stage["phase"] and not stage["name"].startswith(("the save within", "the check of"))
        }
        assert rehearsed.keys() == {stage for stage in on_cpu if "the check of" not in stage} and len(rehearsed) > 20
        for stage, counts in rehearsed.items():
            assert counts == on_cpu[stage] or any(name in stage for name in steps), (rank, stage)


def test_folders_need_no_weights(ranks, tmp_path, small_run):
    """Those of a model that is yet to be fetched: its configurations and the tokenizer are."""
    sizes = SIZES | dict(vocab_size=768, max_position_embeddings=256)
    policy = make(tmp_path / "policy", "LlamaForCausalLM", sizes)
    reward = make(tmp_path / "reward", "LlamaForSequenceClassification", sizes | dict(num_labels=1))
    for weights in [*policy.glob("*.safetensors"), *reward.glob("*.safetensors")]:
        weights.unlink()
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    paths = [f"policy.path={policy}", f"reward.path={reward}", f"tokenizer.path={tokenizer}"]
    found = run(ranks, tmp_path, *paths, "phases=[ppo]", "ppo.iterations=1")
    assert found.faults == [] and len(found.attempts) == 2


@pytest.mark.parametrize("layout", ["one", "sequence", "chunks", "offload"])
def test_a_teacher_of_another_size(ranks, tmp_path, small_run, layout):
    """Its states and its head are where the policy's loss is, also as the role comes and goes; stopped and resumed."""
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    sizes = SIZES | dict(vocab_size=Tokenizer(str(tokenizer)).vocab_size, max_position_embeddings=256)
    teacher = make(tmp_path / "teacher", "LlamaForCausalLM", sizes)
    options = [f"teacher.path={teacher}", f"tokenizer.path={tokenizer}", "phases=[distill]", "distill.kl=full"]
    options += ["distill.prompts_per_iteration=8", "distill.micro_batch_size=2", "distill.eval_prompts=4"]
    options += ["distill.iterations=1"] if layout != "offload" else []
    found = run(ranks, tmp_path, *LAYOUTS[layout], *options)
    assert found.faults == [] and len(found.attempts) == 2
    waits = {line.stage: sum(line.waits.values()) for line in lines(found)}
    if layout == "one":
        assert waits["train_policy"] <= 9, waits  # of two updates, and behind the stage


@pytest.mark.parametrize("layout", ["one", "chunks", "offload"])
def test_a_model_that_environments_ask(ranks, tmp_path, small_run, layout):
    """Whole beside the policy, which it speaks with on every replica; stopped and resumed."""
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    sizes = SIZES | dict(vocab_size=Tokenizer(str(tokenizer)).vocab_size, max_position_embeddings=256)
    user = make(tmp_path / "user", "LlamaForCausalLM", sizes)
    options = [f"user.path={user}", "user.max_new_tokens=4", f"tokenizer.path={tokenizer}", "phases=[grpo]"]
    options += ["env.fn=user", "env.max_turns=3", "env.max_tokens=32", "data.max_seq_len=128"]
    options += ["grpo.iterations=1"] if layout != "offload" else []
    found = run(ranks, tmp_path, *LAYOUTS[layout], *options)
    assert found.faults == [] and len(found.attempts) == 2


def test_eight_ranks(ranks, tmp_path):
    mesh = ["mesh.tp=2", "mesh.pp=2", "mesh.dp=2", "mesh.sequence_parallel=true"]
    found = run(ranks, tmp_path, *mesh, "phases=[sft]", "sft.iterations=1")
    assert found.faults == [] and found.ranks == list(range(8))
    assert all(report["stages"] for attempt in found.attempts for report in attempt)


def test_kernels_of_a_layer(ranks, tmp_path):
    """Of a decode step four products, attention, two norms that add what was made before, heads and gate; of a forward
    in training the additions and both rotations besides, and queries of groups are copied to lie side by side."""
    options = [*FEW_ROWS, "mesh.dp=1", "phases=[sft]", "sft.iterations=1"]
    found = run(ranks, tmp_path, *options, before="planted:noted_layers")
    assert found.faults == ["kernels of a layer: {'forward': 13, 'decode': 9}"]


def test_many_replicas(ranks, tmp_path):
    found = run(ranks, tmp_path, "mesh.dp=8", "phases=[sft]", "sft.micro_batch_size=1", "sft.iterations=1")
    assert found.faults == [] and found.ranks == list(range(8))


def test_with_apex(tmp_path):
    """Whose Adam has no state before its first step."""
    with started(str(HERE), str(HERE / "fused")) as ranks:
        found = run(ranks, tmp_path, "mesh.dp=2", "phases=[sft]", "sft.iterations=1", before="planted:needs_apex")
    assert found.faults == [] and len(found.attempts) == 2
    assert "the save within iteration 0" in [stage["name"] for stage in found.attempts[0][0]["stages"]]


def test_with_transformer_engine(tmp_path, monkeypatch):
    """Its layers, in products of 8 bits, which a stand-in holds to the sizes that they come in."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE / "te"), str(HERE), os.environ.get("PYTHONPATH", "")]))
    with started(str(HERE), str(HERE / "te")) as ranks:
        found = run(
            ranks, tmp_path, "mesh.tp=2", "mesh.sequence_parallel=true", "model.layers=te", "dtype=fp8",
            "phases=[sft,grpo]", "sft.iterations=1", "grpo.iterations=1", "data.sources=[sums]", "reward.fns=[exact]",
            before="planted:needs_transformer_engine",
        )  # fmt: skip
    assert found.faults == [] and len(found.attempts) == 2
    names = {stage["name"] for attempt in found.attempts for report in attempt for stage in report["stages"]}
    assert names >= {f"{stage} of iteration 0" for stage in ("rollout", "log_probs", "train_policy")}, names


def test_a_rank_of_each_stage_of_many(ranks, tmp_path):
    found = run(
        ranks, tmp_path, "mesh.tp=2", "mesh.pp=8", "mesh.dp=4", "mesh.sequence_parallel=true", "model.num_layers=16",
        "phases=[sft,reward]", "sft.batch_size=64", "sft.micro_batch_size=1", "reward.batch_size=64",
        "reward.micro_batch_size=1", "rehearse.micro_batches=2",
    )  # fmt: skip
    assert found.faults == []
    assert found.ranks == [0, 8, 48, 63] and len(found.attempts) == 1


FAULTS = {
    "host_tensor": "planted.py:\\d+: mul of tensors on two devices: .* on cuda:0, .* on cpu",
    "host_collective": "planted.py:\\d+: all_reduce MAX of a tensor .* on cpu through nccl",
    "host_parameter": "input_layernorm.weight of policy is left on the host",
    "item_in_capture": "the host waits within the capture",
    "other_order": "new_group of",
    "missing": "all_reduce MAX",
    "other_size": "is all_reduce MAX of [12] int32 on rank ([01]) .* all_reduce MAX of [12] int32 on rank (?!\\1)[01]",
    "too_many_rows": "combine_kernel on a grid of .*65536",
    "specialised": "planted.py:\\d+: _count does not compile for h100: ",
    "not_contiguous": "is not contiguous",
    "much": "needs more than the 80 GB of h100 in train_policy of iteration 0, at .*planted.py",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(ranks, tmp_path, fault):
    many = fault in ("other_order", "missing", "other_size")
    layout = ["mesh.dp=2"] if many else ["mesh.dp=1"]
    found = run(ranks, tmp_path, "phases=[sft]", *layout, before=f"planted:{fault}")
    assert re.search(FAULTS[fault], " ".join(found.faults)), found.faults


def test_a_role_that_stays_needs_room(ranks, tmp_path):
    """Where it leaves, the fullest moment has the memory of fewer roles."""
    options = [*FEW_ROWS, "mesh.dp=1", "schedule.residency=offload", "phases=[sft,reward,ppo]", "rehearse.iterations=1"]
    leaves = run(ranks, tmp_path, *options)
    stays = run(ranks, tmp_path, *options, before="planted:stays")
    assert leaves.faults == []
    peaks = [max(line.total for line in lines(each) if line.phase == "ppo") for each in (leaves, stays)]
    assert peaks[1] > 1.1 * peaks[0]


def test_what_is_refused_before_it_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"rehearse.ranks=\[9\]: the world has ranks 0 to 1"):
        rehearsal.rehearse([*SMALL, f"output_dir={tmp_path}", "mesh.dp=2", "rehearse.ranks=[9]"])
    with pytest.raises(ConfigError, match="two are of one pipeline stage of 4 ranks"):
        rehearsal.rehearse([*SMALL, f"output_dir={tmp_path}", "mesh.pp=2", "mesh.dp=4", "rehearse.ranks=[1,7]"])
    with pytest.raises(ConfigError, match="trains nothing"):
        rehearsal.rehearse(["+exp=score", "policy.path=x", "data.sources=[x]", "output=x"])


def test_ranks_of_a_larger_world(tmp_path):
    config = ["+exp=ppo_large", "model=llama_70b", "mesh.tp=8", "mesh.pp=8", "plan.device=h100"]
    plan = settle(config, 64, str(tmp_path))
    assert chosen(plan) == [0, 8, 48, 63] and not is_small(plan)


class Line:
    """A rank's end of a connection to the exchange."""

    def __init__(self) -> None:
        self.got: list = []

    def send(self, value) -> None:
        self.got.append(value)


def test_the_exchange_knows_a_hang():
    exchange, one, other = Exchange([0, 1]), Line(), Line()
    world, tp = ((0, 1), ("world", 2, 1)), ((0, 1), ("tp", 2, 1))
    exchange._take(0, Post(world, 1, "barrier", "a.py:1", waits=True), one)
    exchange._take(1, Post(tp, 1, "all_reduce", "b.py:2", waits=True), other)
    assert exchange.fault == (
        "rank 0 waits in barrier, call 1 of world [0, 1], at a.py:1, and rank 1 waits in all_reduce, call 1 of"
        " tp [0, 1], at b.py:2"
    )
    assert one.got == other.got == [None]


def test_the_exchange_knows_what_is_left_over():
    exchange = Exchange([0, 1])
    exchange._take(0, Post(((0, 1), ("dp", 2, 1)), 1, "all_reduce", "a.py:1"), Line())
    assert exchange.left_over() == "call 1 of dp [0, 1] is all_reduce on rank 0 at a.py:1, and rank 1 never makes it"
