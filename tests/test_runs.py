"""Whole runs by the commands that users type: phases, resume after a kill, reward functions, real data and weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import cases
import numpy as np
import psutil
import pytest
import rewards
import warm
from clusters import PATIENCE, wait_until
from conftest import ROOT, SMALL, launch

from rlhf_engine.config import PPOConfig


def figures(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without what a clock measured, and what is named after a function of tests/rewards."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left_out = (*cases.MEASURED, *(f"score/{name}" for name in vars(rewards)))
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows]


def assert_close(found: list[dict], wanted: list[dict], tolerance: float) -> None:
    assert [row["iteration"] for row in found] == [row["iteration"] for row in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (mine["iteration"], name)


@pytest.fixture(scope="module")
def phases(small_run, tmp_path_factory) -> Path:
    """A copy of the small run's finished SFT and reward phases."""
    folder = tmp_path_factory.mktemp("phases") / "run"
    shutil.copytree(small_run, folder)
    return folder


LONG = [*SMALL, "ppo.iterations=6", "ppo.save_every=2"]


@pytest.fixture(scope="module")
def whole(phases, tmp_path_factory) -> Path:
    """PPO of six iterations, never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(phases, folder)
    result = launch(*LONG, f"output_dir={folder}")
    assert "sft: finished before" in result.stdout and "reward: finished before" in result.stdout
    return folder


def test_what_a_run_leaves(whole):
    for phase in ("sft", "reward", "ppo"):
        names = {path.name for path in (whole / phase).iterdir()}
        assert {"config.yaml", "metrics.jsonl", "checkpoints", "report.html", "summary.json"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
    assert (whole / "ppo" / "checkpoints" / "latest").read_text() == "iteration_6"
    assert len(list((whole / "ppo" / "checkpoints").glob("iteration_*"))) == 2  # checkpoint.keep_last
    rows = [json.loads(line) for line in (whole / "ppo" / "metrics.jsonl").read_text().splitlines()]
    wanted = {
        "iteration", "score/mean", "gold/mean", "kl/mean", "policy/loss", "policy/ratio_first", "policy/clip_fraction",
        "policy/entropy", "policy/grad_norm", "critic/loss", "rollout/log_prob_gap", "rollout/response_length",
        "rollout/preempted", "throughput/generated_tokens_per_second", "time/rollout", "time/train_policy",
        "mfu/train_policy",
    }  # fmt: skip
    assert all(wanted <= row.keys() for row in rows)
    assert abs(rows[0]["kl/mean"]) <= 1e-6
    assert all(abs(row["policy/ratio_first"] - 1) <= 1e-6 and row["rollout/log_prob_gap"] <= 1e-5 for row in rows)
    assert any(abs(row["kl/mean"]) > 1e-6 for row in rows[1:])


def test_a_phase_begins_without_figures_of_the_one_before(small_run):
    rows = [json.loads(line) for line in (small_run / "reward" / "metrics.jsonl").read_text().splitlines()]
    assert "time/iteration" in rows[0] and "time/save" not in rows[0] and "time/save" in rows[1]


def test_killed_and_started_again(phases, whole, tmp_path):
    """kill -9 of the launcher in the middle of PPO; the same command goes on, and nothing tells."""
    folder = tmp_path / "run"
    shutil.copytree(phases, folder)
    settings = [*LONG, f"output_dir={folder}", "ppo.write_rollouts=true"]
    metrics, latest = folder / "ppo" / "metrics.jsonl", folder / "ppo" / "checkpoints" / "latest"
    holds = folder / "ppo" / "rollouts" / "3.jsonl.tmp"
    holds.parent.mkdir(parents=True)
    os.mkfifo(holds)  # nobody reads what the fourth iteration would write, so the run stands still there
    process = warm.Command([sys.executable, str(ROOT / "launch" / "run.py"), *settings])
    wait_until(lambda: latest.is_file() and metrics.read_text().count("\n") == 3, "three iterations and a checkpoint")
    ranks = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE)
    assert len(ranks) == 2 and not alive, "ranks outlived their launcher"
    holds.unlink()
    with metrics.open("a") as file:
        file.write('{"iteration": 3, "policy/lo')  # a line that was being written
    result = launch(*settings)
    assert "ppo: resuming at iteration 2 of 6" in result.stdout
    assert_close(figures(folder / "ppo"), figures(whole / "ppo"), 1e-6)


@pytest.mark.parametrize(("layout", "distributed"), [((2, 1, 1), True), ((1, 2, 1), False)], ids=str)
def test_resumes_on_another_mesh(phases, whole, tmp_path, layout, distributed):
    """From two replicas to TP 2 and to PP 2, with and without the distributed optimizer."""
    folder = tmp_path / "run"
    shutil.copytree(phases, folder)
    flag = str(distributed).lower()
    settings = [*LONG, f"output_dir={folder}", f"ppo.optimizer.distributed={flag}"]
    settings.append(f"ppo.critic_optimizer.distributed={flag}")
    launch(*settings, "ppo.iterations=2")
    tp, pp, dp = layout
    result = launch(*settings, f"mesh.tp={tp}", f"mesh.pp={pp}", f"mesh.dp={dp}")
    assert "ppo: resuming at iteration 2 of 6" in result.stdout
    assert_close(figures(folder / "ppo")[:4], figures(whole / "ppo")[:4], 1e-4)


def test_chunks_of_layers_resume_and_leave(tmp_path):
    """From two chunks a stage to one and back."""
    settings = [*SMALL, "phases=[sft]", "model.num_layers=5"]
    launch(*settings, "mesh.dp=1", f"output_dir={tmp_path / 'whole'}")
    for i, virtual_pp in enumerate((2, 1, 2)):
        mesh = ["mesh.pp=2", f"mesh.virtual_pp={virtual_pp}", "mesh.dp=1"]
        (tmp_path / "run" / "sft" / "summary.json").unlink(missing_ok=True)  # as if it had been stopped
        result = launch(*settings, *mesh, f"sft.iterations={i + 1}", f"output_dir={tmp_path / 'run'}")
        assert i == 0 or f"sft: resuming at iteration {i} of {i + 1}" in result.stdout
    assert_close(figures(tmp_path / "run" / "sft"), figures(tmp_path / "whole" / "sft"), 1e-4)


def test_experts_resume_on_another_mesh(tmp_path):
    """From experts shared out over two replicas to all of them on one rank."""
    settings = [*SMALL, "phases=[sft]", "model.architecture=mixtral", "model.num_experts=4"]
    launch(*settings, "mesh.dp=1", f"output_dir={tmp_path / 'whole'}")
    launch(*settings, "mesh.dp=2", "mesh.ep=2", "sft.iterations=1", f"output_dir={tmp_path / 'run'}")
    result = launch(*settings, "mesh.dp=1", f"output_dir={tmp_path / 'run'}")
    assert "sft: resuming at iteration 1 of 3" in result.stdout
    assert_close(figures(tmp_path / "run" / "sft"), figures(tmp_path / "whole" / "sft"), 1e-4)


def test_a_finished_phase_is_run_again_when_asked(phases, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(phases, folder)
    before = figures(folder / "sft")
    (folder / "sft" / "metrics.jsonl").unlink()
    launch(*SMALL, "phases=[sft]", "rerun=true", f"output_dir={folder}", "mesh.dp=1")
    assert figures(folder / "sft") == before


def test_more_iterations_go_on_and_fewer_are_refused(phases, tmp_path):
    """A learning rate that had reached its end comes back with the longer horizon."""
    folder = tmp_path / "run"
    shutil.copytree(phases, folder)
    launch(*SMALL, "phases=[sft]", "sft.iterations=5", "sft.optimizer.warmup_steps=0", f"output_dir={folder}")
    rows = figures(folder / "sft")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[3]["policy/learning_rate"] > 1e-4
    (folder / "sft" / "summary.json").unlink()  # as if it had been killed before it was finished
    refused = launch(*SMALL, "phases=[sft]", "sft.iterations=4", f"output_dir={folder}", check=False)
    assert refused.returncode == 2 and "sft.iterations=4" in refused.stderr and "Traceback" not in refused.stderr


def test_another_model_in_the_same_folder_is_refused(phases):
    refused = launch(*SMALL, "model.hidden_size=64", f"output_dir={phases}", check=False)
    assert refused.returncode == 2 and "model.hidden_size=64" in refused.stderr and "32" in refused.stderr


def test_reward_function(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
    settings = [*SMALL, "phases=[ppo]", "ppo.iterations=2", f"output_dir={tmp_path}"]
    launch(*settings, "reward.fns=[rewards:short_and_polite]")
    rows = figures(tmp_path / "ppo")
    # untrained text holds no "please", so the score is the length's alone
    assert all(row["score/mean"] == pytest.approx(-0.01 * row["rollout/response_length"], abs=1e-4) for row in rows)
    failed = launch(*settings, "reward.fns=[rewards:too_few]", "rerun=true", check=False)
    assert failed.returncode != 0 and "gave 1 scores for 16 responses" in failed.stderr


def test_groups_scored_by_a_function(tmp_path, monkeypatch):
    """GRPO of a policy alone; what it writes, its figures, and another mesh it goes on with."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
    settings = [*SMALL, "phases=[grpo]", "reward.fns=[rewards:short_and_polite]", "grpo.kl_coef=0"]
    settings += ["grpo.save_every=1", "grpo.write_rollouts=true", "grpo.write_arrays=true", "rollout.max_new_tokens=30"]
    settings += ["rollout.min_new_tokens=1", f"output_dir={tmp_path}"]
    launch(*settings, "mesh.dp=1", "grpo.iterations=1")
    result = launch(*settings, "mesh.tp=2", "mesh.dp=1")
    assert "grpo: resuming at iteration 1 of 2" in result.stdout
    folder, rows = tmp_path / "grpo", figures(tmp_path / "grpo")
    names = {"score/mean", "score/equal_groups", "policy/loss", "policy/ratio_first", "rollout/log_prob_gap"}
    assert len(rows) == 2 and all(names <= row.keys() and "kl/mean" not in row for row in rows)
    assert all(abs(row["policy/ratio_first"] - 1) <= 1e-6 for row in rows)
    for i, row in enumerate(rows):
        x = np.load(folder / "rollouts" / f"{i}.npz")
        written = [json.loads(line) for line in (folder / "rollouts" / f"{i}.jsonl").read_text().splitlines()]
        assert [found["score"] for found in written] == pytest.approx(x["scores"].tolist(), abs=1e-6)
        assert all(found["kl"] is None for found in written) and "ref_log_probs" not in x and "values" not in x
        scores = (x["scores"] - ~x["finished"]).reshape(4, 4).astype(np.float64)
        std = scores.std(axis=1, ddof=1, keepdims=True)
        wanted = ((scores - scores.mean(axis=1, keepdims=True)) / (std + 1e-6)).reshape(16, 1) * x["response_mask"]
        assert x["advantages"] == pytest.approx(wanted, abs=1e-4)
        assert row["score/mean"] == pytest.approx(x["scores"].mean(), abs=1e-6)
        assert row["score/equal_groups"] == pytest.approx((scores.std(axis=1) == 0).mean())
    summary = json.loads((folder / "summary.json").read_text())
    assert "eval/score_after" in summary and "eval/score_before" not in summary and "eval/kl" not in summary
    assert (folder / "hf" / "model.safetensors").is_file()


def test_the_kl_in_the_loss_of_ppo(phases, tmp_path):
    """It is not in the reward then, and holds the policy."""
    folder = tmp_path / "run"
    shutil.copytree(phases, folder)
    settings = [*SMALL, f"output_dir={folder}", "mesh.dp=1", "phases=[ppo]", "ppo.write_arrays=true", "ppo.kl=k2"]
    launch(*settings, "ppo.optimizer.lr=1e-3")
    x, rows = np.load(folder / "ppo" / "rollouts" / "1.npz"), figures(folder / "ppo")
    assert rows[1]["kl/mean"] != 0 and rows[1]["policy/kl"] != 0
    assert np.count_nonzero(x["rewards"]) == len(x["rewards"])  # the score, at the last token


def test_options_of_ppo(phases, tmp_path):
    """Adaptive KL, score scaling and clipping, several samples a prompt, offloaded roles, critic warm-up, presets, text
    mixed in, packed micro-batches, rollouts written."""
    folder = tmp_path / "run"
    shutil.copytree(phases, folder)
    launch(
        *SMALL, f"output_dir={folder}", "ppo.kl_controller=adaptive", "ppo.kl_target=0.001", "ppo.score_scale=true",
        "ppo.score_min=-1.5", "ppo.score_max=1.0", "ppo.samples_per_prompt=2",
        "schedule.residency=offload", "schedule.offload=[reference,reward]",
        "ppo.critic_warmup_iterations=1", "ppo.iterations=3", "rollout.temperature=0.8", "rollout.min_new_tokens=3",
        "ppo.write_rollouts=true", "ppo.write_arrays=true", "schedule.micro_batch_tokens=500", "data.strategy=in_data",
        "data.sources=['hh_mini/helpful-base::1.0[system=helpful]','hh_mini/harmless-base::0.5[reward=hhh]']",
        "ppo.ptx.sources=[hh_mini/helpful-base]", "ppo.ptx.rows=6",
    )  # fmt: skip
    rows = figures(folder / "ppo")
    assert "policy/loss" not in rows[0] and "policy/loss" in rows[1]
    assert rows[0]["kl/coef"] == 0.05 and rows[1]["kl/coef"] < 0.05  # a KL of 0 lies below its target
    assert abs(rows[1]["kl/mean"]) <= 1e-6 and rows[2]["kl/mean"] != 0
    assert all(row["rollout/log_prob_gap"] <= 1e-5 for row in rows)  # temperature and minimum length on both sides
    assert "ptx/loss" not in rows[0] and "ptx/loss" in rows[1]
    for i, row in enumerate(rows):
        written = [json.loads(line) for line in (folder / "ppo" / "rollouts" / f"{i}.jsonl").read_text().splitlines()]
        assert len(written) == 32 and all(
            found.keys() == {"prompt", "response", "score", "gold", "kl"} for found in written
        )
        for name, values in {
            "score/mean": [found["score"] for found in written],
            "gold/mean": [found["gold"] for found in written],
            "kl/mean": [sum(found["kl"]) for found in written],
            "rollout/response_length": [len(found["kl"]) for found in written],
        }.items():
            assert sum(values) / 32 == pytest.approx(row[name], abs=1e-4)
        assert all(found["prompt"].endswith("\n\nAssistant:") for found in written)
        check_arrays(dict(np.load(folder / "ppo" / "rollouts" / f"{i}.npz")), row, written)


def check_arrays(x: dict, row: dict, written: list[dict]) -> None:
    """Advantages, returns and figures of an iteration, computed again from what was written of it."""
    mask, gamma, gae_lambda = x["response_mask"], PPOConfig().gamma, PPOConfig().gae_lambda
    advantages, last, after = np.zeros_like(x["values"]), 0.0, 0.0
    for t in reversed(range(mask.shape[1])):
        delta = x["rewards"][:, t] + gamma * after - x["values"][:, t]
        advantages[:, t] = np.where(mask[:, t], delta + gamma * gae_lambda * last, 0)
        after = np.where(mask[:, t], x["values"][:, t], after)
        last = np.where(mask[:, t], advantages[:, t], last)
    assert advantages == pytest.approx(x["advantages"], abs=1e-5)
    assert x["returns"] == pytest.approx(np.where(mask, advantages + x["values"], 0), abs=1e-5)
    kl = np.where(mask, x["log_probs"] - x["ref_log_probs"], 0)
    of_scores = x["rewards"] + row["kl/coef"] * kl  # what is left is the score, at the last token alone
    end = x["lengths"] - 1
    assert np.abs(of_scores[np.arange(len(end)), end]).max() > 0.1
    of_scores[np.arange(len(end)), end] = 0
    assert np.abs(of_scores).max() < 1e-5
    assert row["reward/mean"] == pytest.approx(x["rewards"].sum(1).mean(), abs=1e-4)
    assert row["critic/value"] == pytest.approx(x["values"][mask].mean(), abs=1e-5)
    gap = np.abs(x["log_probs"] - x["sampler_log_probs"])[mask].max()
    assert row["rollout/log_prob_gap"] == pytest.approx(gap, abs=1e-7)
    assert row["rollout/finished"] == pytest.approx(x["finished"].mean())
    assert [len(found["kl"]) for found in written] == mask.sum(1).tolist()
    assert [found["score"] for found in written] == pytest.approx(x["scores"].tolist(), abs=1e-6)
    assert (x["tokens"] * (np.arange(mask.shape[1]) >= x["lengths"][:, None]) == 0).all()


def test_losses_from_what_was_written(phases, tmp_path):
    """Of an iteration's first update, before which nothing has moved: docs/data.md."""
    folder = tmp_path / "run"
    shutil.copytree(phases, folder)
    once = ["ppo.iterations=1", "ppo.epochs=1", "ppo.num_minibatches=1", "ppo.whiten_advantages=false"]
    launch(*SMALL, f"output_dir={folder}", "mesh.dp=1", "ppo.write_arrays=true", *once)
    (row,) = figures(folder / "ppo")
    x = np.load(folder / "ppo" / "rollouts" / "0.npz")
    mask = x["response_mask"]
    assert row["policy/loss"] == pytest.approx(-x["advantages"][mask].mean(), rel=1e-4)
    assert row["critic/loss"] == pytest.approx(0.5 * ((x["values"] - x["returns"])[mask] ** 2).mean(), rel=1e-4)
    assert row["policy/grad_norm"] == row["policy/grad_norm_max"] > 0


def test_old_log_probs_of_the_sampler(phases, tmp_path):
    """The forward is skipped where the last measured gap allows it, and is not where it does not."""
    found = {}
    for name, options in {
        "trainer": [],
        "sampler": ["ppo.old_log_probs=sampler"],
        "strict": ["ppo.old_log_probs=sampler", "ppo.max_log_prob_gap=1e-12"],
    }.items():
        folder = tmp_path / name
        shutil.copytree(phases, folder)
        settings = [*SMALL, f"output_dir={folder}", "ppo.iterations=4", "ppo.measure_gap_every=2"]
        said = launch(*settings, "mesh.dp=1", *options).stdout
        found[name] = figures(folder / "ppo")
        assert said.count("the sampler's are taken") == (2 if name == "sampler" else 0)
    assert ["rollout/log_prob_gap" in row for row in found["sampler"]] == [True, False, True, False]
    assert all("rollout/log_prob_gap" in row for row in found["trainer"] + found["strict"])
    for mine, theirs in zip(found["sampler"], found["trainer"], strict=True):
        assert mine["policy/loss"] == pytest.approx(theirs["policy/loss"], abs=1e-4)
        assert mine["policy/ratio_first"] == pytest.approx(1, abs=1e-4) and theirs["policy/ratio_first"] == 1
    assert [row["policy/loss"] for row in found["strict"]] == [row["policy/loss"] for row in found["trainer"]]


# -- real weights and data -----------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1)], ids=str)
def test_score_and_generate_with_real_weights(shared, tmp_path, layout):
    """stories260K (5 layers, so two stages are uneven) scores like a plain Llama, and continues a story."""
    from oracle import llama_log_probs

    model = shared / "models" / "stories260K_hf"
    mesh = [f"mesh.{name}={size}" for name, size in zip(("tp", "pp", "dp"), layout, strict=True)]
    texts = ["Once upon a time, there was a little girl named Lily.", "The dog", "Tom and Sam were friends. " * 5]
    source = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    out = tmp_path / "scores.jsonl"
    launch("+exp=score", f"policy.path={model}", f"data.sources=[{source}]", f"output={out}", *mesh)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(texts)
    for row in rows:
        log_probs, entropy = llama_log_probs(model, row["tokens"])
        assert row["log_probs"][0] is None and row["entropy"][0] is None
        assert row["log_probs"][1:] == pytest.approx(log_probs, abs=2e-5)
        assert row["entropy"][1:] == pytest.approx(entropy, abs=2e-5)

    source = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Once upon a time"}, {"messages": [
        {"role": "user", "content": "Tell me a story"}]}, {"prompt": "Once \ud800"}])  # fmt: skip
    out = tmp_path / "stories.jsonl"
    settings = [f"policy.path={model}", f"data.sources=[{source}]", f"output={out}", "rollout.greedy=true"]
    launch("+exp=generate", *settings, "rollout.max_new_tokens=40", *mesh)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["prompt"] == "Once upon a time"
    assert rows[0]["response"].startswith(", there was a little girl named Lily")
    assert all(len(row["tokens"]) == len(row["log_probs"]) <= 40 for row in rows)
    assert rows[1]["prompt"].endswith("Assistant:") and rows[2]["prompt"] == "Once ?"


def test_real_hh_rlhf_from_real_weights(shared, tmp_path):
    """All three phases on Anthropic's harmless-base file, from stories260K."""
    source = shared / "data" / "hh_harmless_base_test.jsonl.gz"
    launch(
        "+exp=hh_rlhf", "data=hh_rlhf", f"data.sources=[{source}::1.0]", "data.max_prompt_len=200",
        "data.max_seq_len=256", "data.num_eval_rows=32", f"policy.path={shared / 'models' / 'stories260K_hf'}",
        "sft.iterations=2", "reward.iterations=2", "ppo.iterations=2", "rollout.max_new_tokens=16",
        "sft.batch_size=32", "reward.batch_size=16", "ppo.prompts_per_iteration=16", "ppo.micro_batch_size=4",
        "ppo.eval_prompts=8", f"output_dir={tmp_path}",
    )  # fmt: skip
    rows = figures(tmp_path / "ppo")
    assert "gold/mean" not in rows[0] and abs(rows[0]["kl/mean"]) <= 1e-6
    assert "Human:" in (tmp_path / "ppo" / "report.html").read_text()
