"""The plan's arithmetic against what is built, allocated and saved, and what `plan=true` says."""

from __future__ import annotations

import re
from dataclasses import replace

import cases
import pytest
import worlds as launching

from rlhf_engine.config import DeviceName, MeshConfig, ModelConfig, OptimizerConfig, RolloutConfig, UserConfig
from rlhf_engine.config.devices import GPUS, data_sheet_flops
from rlhf_engine.launching import preflight
from rlhf_engine.launching.compose import compose
from rlhf_engine.models.flops import attended, forward_flops, head_flops
from rlhf_engine.models.partition import rank_parameters
from rlhf_engine.models.pipeline import ahead, chunk_group, orders, simulate
from rlhf_engine.plan.forecast import Forecaster
from rlhf_engine.plan.memory import Numbers, kv_bytes_per_token, kv_positions, layer_activations, resident
from rlhf_engine.plan.rows import rows_of
from rlhf_engine.plan.show import si

SIZES = dict(
    num_layers=3, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, vocab_size=200,
    max_position_embeddings=64,
)  # fmt: skip
BIASES = dict(qkv_bias=True, proj_bias=True, mlp_bias=True)
MODELS = {
    "llama": SIZES,
    "untied": SIZES | dict(tie_word_embeddings=False, head_dim=20),
    "qwen3": SIZES | dict(architecture="qwen3", qk_norm=True),
    "qwen2": SIZES | dict(architecture="qwen2", qkv_bias=True),
    "gpt2": SIZES | BIASES | dict(
        architecture="gpt2", num_key_value_heads=4, norm="layer", positions="learned", gated_mlp=False,
        activation="gelu_tanh",
    ),
    "mixtral": SIZES | dict(architecture="mixtral", num_experts=4, tie_word_embeddings=False),
}  # fmt: skip
LAYOUTS: list[tuple] = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 1, 2, False, 2)]
LAYOUTS += [(1, 2, 1, False, 1, 2), (1, 4, 1, False, 1, 3)]  # chunks of layers
CPU = Numbers(4, "cpu")


def mesh(layout: tuple) -> MeshConfig:
    tp, pp, dp, sequence_parallel, ep, virtual_pp = (*layout, *(False, 1, 1)[len(layout) - 3 :])
    return MeshConfig(tp, pp, dp, ep, sequence_parallel, virtual_pp)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parameters_of_each_rank(worlds, layout):
    for name, sizes in MODELS.items():
        if layout[4:5] == (2,) and "num_experts" not in sizes:
            continue
        if layout[1] > 1:
            sizes = sizes | dict(num_layers=14)  # 4 stages have 3, 4, 4 and 3
        for head in ("lm", "scalar"):
            for stage, total, experts in worlds(layout[0] * layout[1] * layout[2]).run(cases.held, sizes, head, layout):
                found = rank_parameters(ModelConfig(**sizes), head, mesh(layout), stage)
                assert (found.total, found.experts) == (total, experts), (name, head, stage)


@pytest.mark.parametrize("layout", [(1, 1, 2), (1, 2, 1), (1, 1, 2, False, 2), (1, 2, 1, False, 1, 2)], ids=str)
def test_bytes_of_training(worlds, layout):
    sizes = MODELS["mixtral"] if layout[4:5] == (2,) else MODELS["llama"] | dict(num_layers=5)
    ranks = worlds(2).run(cases.training_bytes, sizes, layout)
    planned = [
        resident(
            rank_parameters(ModelConfig(**sizes), "lm", mesh(layout), rank if layout[1] > 1 else 0), OptimizerConfig(),
            mesh(layout), CPU,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [weights for weights, _, _ in ranks] == [memory.weights for memory in planned]
    # the distributed optimizer cuts the buffer, not each parameter: shares differ by its padding, their sum does not
    assert sum(optimizer for _, _, optimizer in ranks) == sum(memory.optimizer for memory in planned)
    for (_, gradients, _), memory in zip(ranks, planned, strict=True):
        assert (
            memory.gradients <= gradients <= memory.gradients + 4 * 64 * 64
        )  # each parameter starts at a multiple of 64


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (2, 1, 1, True)], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
def test_activations(worlds, name, layout):
    if name == "mixtral" and layout == (2, 1, 1):
        pytest.skip("experts train under tp with sequence parallelism alone")
    rows, length = 3, 40
    for recompute in ("none", "selective", "full"):
        kept = [
            worlds(layout[0]).run(cases.saved_bytes, MODELS[name] | {"num_layers": n}, layout, rows, length, recompute)[
                0
            ]
            for n in (1, 2)
        ]
        planned = layer_activations(ModelConfig(**MODELS[name]), rows, length, mesh(layout), CPU, recompute)
        # the tensors of a router are left out, and a number that megatron's checkpoint keeps in a mask's place
        assert kept[1] - kept[0] == pytest.approx(planned, rel=0.05 if name == "mixtral" else 0, abs=4), recompute


@pytest.mark.parametrize(
    ("config", "num_prompts"),
    [({}, 5), ({"slots": 3}, 20), ({"slots": 64}, 50), ({"kv_tokens": 150, "slots": 8}, 9), ({"kv_tokens": 33}, 2)],
    ids=str,
)
@pytest.mark.parametrize("tp", [1, 2])
def test_bytes_of_the_cache(worlds, config, num_prompts, tp):
    found = worlds(tp).run(cases.cache_bytes, SIZES, (tp, 1, 1), [[1] * 21] * num_prompts, 12, config)
    positions = kv_positions(RolloutConfig(**config), num_prompts, 33, 1 << 20)
    assert found == [positions * kv_bytes_per_token(ModelConfig(**SIZES), tp, 4)] * tp


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_flops_of_linear_layers(worlds, name):
    rows, length = 3, 40
    model = ModelConfig(**MODELS[name])
    attention = rows * model.num_layers * 4 * attended(length, None) * model.num_attention_heads * model.head_size
    counted = worlds(1).run(cases.matmul_flops, MODELS[name], (1, 1, 1), rows, length)[0]
    assert forward_flops(model, "lm", [length] * rows, 0) - attention == counted
    assert head_flops(model, "lm", 7) == 2 * 48 * 200 * 7


def test_pairs_that_attention_looks_at():
    for length, window in ((7, None), (7, 3), (3, 7), (1, 1)):
        pairs = sum(1 for t in range(length) for s in range(t + 1) if window is None or t - s < window)
        assert attended(length, window) == pairs


@pytest.mark.parametrize("stages", [2, 3, 16])
@pytest.mark.parametrize("micro_batches", [1, 4, 40])
def test_equal_stages_idle_by_the_formula(stages, micro_batches):
    forward, backward = [[1.0] * stages] * micro_batches, [[2.0] * stages] * micro_batches
    share = (stages - 1) / (micro_batches + stages - 1)
    assert simulate(forward) == pytest.approx((micro_batches + stages - 1, share))
    assert simulate(forward, backward) == pytest.approx((3 * (micro_batches + stages - 1), share))


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("chunks", [2, 3])
def test_chunks_of_stages_shorten_what_they_idle(stages, chunks):
    for micro_batches in (stages, stages + 1, 4 * stages + 1):
        forward, backward = [[1.0] * stages] * micro_batches, [[2.0] * stages] * micro_batches
        share = (stages - 1) / (chunks * micro_batches + stages - 1)
        assert simulate(forward, chunks=chunks)[1] == pytest.approx(share)
        assert simulate(forward, backward, chunks=chunks)[1] == pytest.approx(share)


@pytest.mark.parametrize("layout", [(1, 2, 1, False, 1, 2), (1, 4, 1, False, 1, 3)], ids=str)
def test_order_of_chunks(worlds, layout):
    """As megatron has it: what each stage computes, and how far its forwards are ahead of its backwards."""
    stages, chunks = layout[1], layout[5]
    for micro_batches in (stages, stages + 1, 2 * stages + 1, 12):
        size = chunk_group(stages, micro_batches)
        planned = orders(stages, micro_batches, True, chunks)
        for stage, warmup, table in worlds(stages).run(cases.chunk_order, layout, micro_batches, size):
            does = [what for kind, *what in planned[stage] if kind == "forward"]
            assert does == [list(entry) for entry in table]
            assert ahead(stages, stage, micro_batches, chunks) == min(warmup + 1, chunks * micro_batches)


def test_unequal_stages_wait_for_the_slowest():
    assert simulate([[1.0, 3.0]] * 4) == pytest.approx((13.0, 1 - 16 / 26))
    assert simulate([[1.0, 3.0]] * 4, transfer=0.5)[0] == pytest.approx(13.5)
    assert simulate([[1.0], [2.0]], [[2.0], [4.0]]) == (9.0, 0.0)


def test_devices():
    assert {"cpu", *GPUS} == set(DeviceName.__args__)
    assert data_sheet_flops("NVIDIA H100 80GB HBM3") == pytest.approx(989e12)
    assert data_sheet_flops("GeForce") is None


# -- the command ---------------------------------------------------------------------------------------------

OFFLOADED = ["schedule.residency=offload", "schedule.offload=[reward]"]
LARGE = ["+exp=ppo_large", "phases=[sft,reward,ppo]", "plan.device=h100"]


@pytest.fixture
def planned(capsys, monkeypatch, tmp_path):
    """What a command line prints, and its exit status; no rank may start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching.launcher, "start_ranks", lambda *args: pytest.fail("a rank was started"))

    def get(*overrides: str) -> tuple[int, str, str]:
        status = launching.launcher.main([*LARGE, *overrides])
        return status, *capsys.readouterr()

    return get


def test_a_plan(planned):
    status, out, err = planned("model=llama_7b", "mesh.tp=4", "mesh.dp=2", "plan=true")
    assert status == 0 and not err and "6.74G" in out and out.count("fits") == 3
    assert all(stage in out for stage in ("rollout", "ref_log_probs", "train_critic", "train_policy"))
    _, out, _ = planned("model=llama_7b", "mesh.pp=4", "mesh.dp=2", "plan=true", "schedule.recompute=full")
    assert "train_critic + train_policy" in out and "peak of a rank, by pipeline stage" in out


def test_a_plan_of_experts(planned):
    """What is sent to experts of other ranks, and the forward that counts for the load-balancing loss."""
    command = ["model=llama_7b", "model.architecture=mixtral", "model.num_experts=8", "phases=[sft]", "mesh.dp=8"]
    command += ["plan=true", "plan.memory=1000"]

    def row(*overrides: str) -> list[str]:
        _, out, err = planned(*command, *overrides)
        assert not err and ("ep sent" in out) == ("mesh.ep=4" in overrides)
        return re.search(r"^train_policy +(.*)$", out, re.M)[1].split()

    alone, apart, counted = row(), row("mesh.ep=4"), row("mesh.ep=4", "policy.router_aux_loss_coef=0.01")
    assert alone[1] == apart[1] == counted[1]  # FLOPs, of which the count is no use to the model
    config = compose([*LARGE, *command])
    rows = rows_of("sft", config)
    tokens = rows.usual[0] * rows.usual[1] * -(-rows.minibatch // (8 * rows.usual[0])) * rows.steps
    # two experts a token, three quarters of them elsewhere; there and back, forward and backward, 2 bytes a number
    sent = 32 * tokens * 2 * 3 / 4 * 2 * 4096 * 2
    assert apart[5] == si(2 * sent) and counted[5] == si(3 * sent)
    assert 1.2 < float(counted[0]) / float(apart[0]) < 1.34


def test_a_plan_of_groups(planned):
    """One policy alone, with a reward function; its rows are the samples of all groups."""
    command = ["model=llama_7b", "mesh.tp=4", "mesh.dp=2", "phases=[grpo]", "reward.fns=[length]"]
    command += ["plan=true", "grpo.prompts_per_iteration=64", "grpo.samples_per_prompt=8", "grpo.micro_batch_size=1"]
    status, out, err = planned(*command, "grpo.kl_coef=0", "grpo.num_minibatches=4")
    assert status == 0 and not err and out.count("fits") == 1
    assert not any(word in out for word in ("ref_log_probs", "critic", "values", "reference"))
    rows = rows_of("grpo", compose([*LARGE, *command, "grpo.num_minibatches=4"]))
    assert (rows.total, rows.minibatch, rows.steps, rows.distinct) == (512, 128, 4, 64)
    assert "ref_log_probs" in planned(*command)[1]


def test_a_plan_of_carried_rows(tmp_path, monkeypatch):
    """A quarter of 512 rows more are under way, and computed again when they are in the middle of their responses."""
    monkeypatch.chdir(tmp_path)
    command = ["model=llama_7b", "mesh.tp=4", "mesh.dp=2", "phases=[ppo]", "reward.fns=[length]", "plan=true"]
    found = []
    for options in ([], ["rollout.tail=carry", "ppo.importance=truncated"]):
        run = preflight.plan(compose([*LARGE, *command, *options]))
        forecaster = Forecaster("ppo", run.config, run.mesh, run.models, GPUS["h200"])
        found.append((forecaster.rows, forecaster.run().stages[0]))
    (rows, plain), (more, carried) = found
    assert (rows.total, rows.carried, more.total, more.carried) == (512, 0, 512, 128)
    again = forward_flops(run.models["policy"], "lm", [1024 + 512] * 128, 0)
    assert carried.flops - plain.flops == pytest.approx(again)


def test_a_plan_of_a_second_model(tmp_path, monkeypatch):
    """It is there with the policy while that samples, and takes its time; its weights come and go with the rollout."""
    monkeypatch.chdir(tmp_path)
    command = [
        "model=llama_7b",
        "mesh.tp=4",
        "mesh.dp=2",
        "phases=[grpo]",
        "env.fn=guess",
        "rollout.max_new_tokens=128",
    ]
    run = preflight.plan(compose([*LARGE, *command, "schedule.residency=offload", "plan=true"]))
    models = run.models | {"user": replace(run.models["policy"], num_layers=8)}
    answered = replace(run.config, user=UserConfig(path="m", max_new_tokens=128))
    alone, both = (
        Forecaster("grpo", config, run.mesh, models, GPUS["h200"]).run() for config in (run.config, answered)
    )
    assert [role.name for role in both.roles] == [*(role.name for role in alone.roles), "user"]
    weights = both.roles[-1].memory.weights
    rollout, *others = zip(alone.stages, both.stages, strict=True)
    assert rollout[1].memory[0].weights == rollout[0].memory[0].weights + weights > weights > 0
    assert rollout[1].moved == rollout[0].moved + weights
    # four turns of the policy's and the model's 128 tokens fill 1,024, by a model of a quarter of the layers
    assert 0.5 < (rollout[1].seconds - rollout[0].seconds) / (rollout[0].seconds / 4) < 1.5
    assert all(ours.memory[0].weights == theirs.memory[0].weights for ours, theirs in others)


def test_a_save(planned):
    """Beside the policy's weights, there behind an iteration, the critic's and an eighth of its optimizer."""
    _, out, _ = planned(
        "model=llama_7b", "mesh.dp=8", "plan=true", "schedule.residency=offload", "ppo.micro_batch_size=1"
    )
    moved, *row = re.findall(r"^save or load +[\d.]+ +- +- +- +- +(.*)$", out, re.M)[-1].split()
    gradients, activations, cache = row[1], *row[3:5]
    assert gradients == activations == cache == "-"
    policy, critic = 6.738e9, 6.607e9
    assert [row[0], row[2], row[5]] == [f"{x / 1e9:.3g}G" for x in (
        2 * (policy + critic), 12 * critic / 8, 2 * (policy + critic) + 12 * critic / 8
    )]  # fmt: skip
    # weights, float32 ones and two moments of both, an eighth for each rank
    copied = 14 * (policy + critic) / 8 / 1e9
    assert moved == f"{copied + (2 + 12 / 8) * (policy + critic) / 1e9:.3g}G"
    assert f"fills {copied:.3g}GB of host memory for a rank, {8 * copied:.3g}GB for the 8 of a node" in out


def test_what_does_not_fit_is_refused_with_what_would(planned):
    command = ["model=llama_7b", "mesh.tp=4", "mesh.dp=2", "phases=[ppo]", "reward.path=null"]
    command += ["reward.fns=[length]", "plan=true", "plan.memory=50", "ppo.micro_batch_size=32"]
    status, out, err = planned(*command)
    assert status == 2 and "does not fit" in out and err.startswith("error: ppo needs") and err.count("\n") == 1
    changes = re.search(r"it fits with (.*)", err)[1].split()
    assert changes and planned(*command, *changes)[0] == 0


def test_more_ranks_or_another_device_may_be_needed(planned):
    command = ["model=llama_70b", "mesh.tp=8", "phases=[sft]", "plan=true"]
    status, _, err = planned(*command)
    ranks = int(re.search(r"plan.world=(\d+)", err)[1])
    assert status == 2 and ranks > 8
    # a rollout of 405B needs a copy on each tensor parallel group of eight, whatever the number of groups
    command = ["model=llama_405b", "mesh.tp=8", "mesh.pp=64", "phases=[ppo]", "plan=true"]
    status, _, err = planned(*command, "reward.fns=[length]", "mesh.sequence_parallel=true")
    assert status == 2 and "plan.device=" in err


def test_a_search_names_settings_that_fit(planned):
    status, out, _ = planned("model=llama_7b", "plan.search=true", "plan.world=16")
    rows = re.findall(r"^ *([\d.]+) +[\d.]+GB +(mesh.*)$", out, re.M)
    assert status == 0 and len(rows) == 5
    assert [float(seconds) for seconds, _ in rows] == sorted(float(seconds) for seconds, _ in rows)
    assert any(re.search(r"schedule\.offload=\[\w+", overrides) for _, overrides in rows)
    for _, overrides in rows[:2]:
        assert planned("model=llama_7b", "plan=true", *overrides.split())[0] == 0


def test_auto_says_what_it_is(planned):
    command = ["model=llama_7b", "mesh.tp=2", "mesh.dp=4", "plan=true", "schedule.residency=auto"]
    status, out, _ = planned(*command, "ppo.micro_batch_size=4", "mesh.sequence_parallel=true")
    assert status == 0 and "moved" in out
    auto = "schedule.residency=offload schedule.offload=[policy,critic,reference,reward] rollout.cache_share=0.9"
    assert f"schedule.residency=auto is {auto}\n" in out
    assert re.findall(r"^iteration +([\d.]+) ", out, re.M)[-1] == "67.2"


def test_explain(planned):
    status, out, _ = planned("model=llama_7b", "mesh.pp=2", "mesh.virtual_pp=2", "schedule=explain", *OFFLOADED)
    assert status == 0 and "pp 2 (2 chunks a stage)" in out
    assert "log_probs + ref_log_probs" in out and "train_critic + train_policy" in out
    assert re.search(r"^score +infer +reward +policy, reference, critic +reward", out, re.M)


def test_offline_phases(planned):
    """A reference that is known beforehand is no role, one that is asked in each step is. Pairs are two rows."""
    command = ["model=llama_7b", "mesh.tp=4", "mesh.dp=2", "plan=true"]
    pairs = [*command, "phases=[dpo]", "dpo.batch_size=32", "dpo.micro_batch_size=1"]
    status, cached, err = planned(*pairs)
    assert status == 0 and not err and "64 rows an iteration" in cached and "ref_log_probs" not in cached
    _, each_step, _ = planned(*pairs, "dpo.reference=each_step")
    assert "ref_log_probs" in each_step and "reference" in each_step
    _, kto, _ = planned(*command, "phases=[kto]", "kto.batch_size=64", "kto.micro_batch_size=1")
    assert "mismatched" in kto and "128 rows an iteration" in kto
    _, found, _ = planned("model=llama_7b", "plan.search=true", "plan.world=16", "phases=[dpo]")
    assert re.search(r"dpo\.micro_batch_size=\d+", found)
