"""launch/verify.py passes where nothing is wrong, on every mesh of four ranks, and names what is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch
import warm
from conftest import ROOT, SMALL
from mixed import read

from rlhf_engine.data.sources import HH_MINI
from rlhf_engine.data.tokenizer import train_tokenizer
from rlhf_engine.verify.findings import Finding, worst
from rlhf_engine.verify.measure import Gradient, Rounding
from rlhf_engine.verify.policy import batch_independence
from rlhf_engine.verify.rounding import moved
from rlhf_engine.verify.subject import Sampled

PHASES = ("sft", "reward", "ppo", "grpo", "dpo", "kto")


def lines(folder: Path) -> dict[str, dict]:
    return {line["name"]: line for line in json.loads((folder / "verify.json").read_text())["checks"]}


def failed(folder: Path) -> dict[str, str]:
    return {name: line["detail"] for name, line in lines(folder).items() if line["outcome"] == "FAIL"}


@pytest.fixture(scope="module")
def embedded(worlds, tmp_path_factory) -> Path:
    """The output folder of checks of the embedded experiment, on a mesh that is parallel in several ways at once."""
    folder = tmp_path_factory.mktemp("embedded")
    settings = [*SMALL, "tokenizer.vocab_size=700", f"output_dir={folder}", "mesh.tp=2", "mesh.pp=2"]
    settings.append(f"phases=[{','.join(PHASES)}]")
    assert worlds(4).run(cases.verify, [*settings, "mesh.sequence_parallel=true"]) == [0] * 4
    return folder


def test_every_mesh_of_four_ranks(embedded):
    found = lines(embedded)
    assert {line["outcome"] for line in found.values()} == {"pass"}
    assert all(line["figure"] <= line["limit"] for line in found.values())
    meshes = ["1 x pp 1 x dp 4", "1 x pp 2 x dp 2", "2 x pp 1 x dp 2", "2 x pp 2 x dp 1"]
    wanted = {f"{phase} on tp {mesh}" for phase in PHASES for mesh in meshes}
    wanted |= {f"{phase} on tp 2 x pp 1 x dp 2, sequence parallel" for phase in PHASES}
    assert {name for name in found if " on tp " in name} == wanted
    assert [path.name for path in embedded.glob("verify*")] == ["verify.json"]


def test_real_weights_on_every_mesh_of_four_ranks(worlds, shared, tmp_path):
    model = shared / "models" / "stories260K_hf"
    settings = [*SMALL, "phases=[sft]", f"output_dir={tmp_path}", f"policy.path={model}"]
    # its tokenizer cuts more finely; and an update may change nothing
    settings += ["data.max_seq_len=512", "data.max_prompt_len=400", "sft.optimizer.lr=0"]
    assert worlds(4).run(cases.verify, settings) == [0] * 4
    found = lines(tmp_path)
    assert len([name for name in found if " on tp " in name]) == 8
    assert found["model: logits against transformers"]["outcome"] == "pass"


@pytest.fixture(scope="module")
def biased(tmp_path_factory) -> list[str]:
    """Settings of a model in HF format whose biases are not 0, and whose vocabulary is padded."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + float("norm" in name))
        embeddings = model.get_input_embeddings().weight
        embeddings[1::2] = embeddings[::2]  # each token has an equal, as those that no text had
    folder = tmp_path_factory.mktemp("biased")
    model.save_pretrained(folder)
    texts = [row.chosen for source in read(*HH_MINI, num_rows=200, num_eval_rows=8) for row in source.train]
    train_tokenizer([f"\n\nHuman: {text}" for text in texts if text], folder / "tokenizer.model", 700)
    return [*SMALL, f"policy.path={folder}", "phases=[sft]"]


@pytest.fixture(scope="module")
def outcomes(worlds, biased, tmp_path_factory):
    """`outcomes(fault)`: the checks that fail with it, and what they say."""
    known: dict[str, dict[str, str]] = {}

    def get(fault: str) -> dict[str, str]:
        if fault not in known:
            folder = tmp_path_factory.mktemp(fault)
            assert worlds(1).run(cases.verify, [*biased, f"output_dir={folder}"], fault) == [1]
            known[fault] = failed(folder)
        return known[fault]

    return get


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("wrong_kernel", "log-probs: against float64", ""),
        ("wrong_backward", "log-probs: gradients against float64", ""),
        ("off_by_one", "log-probs: shift of outputs to tokens", "the output 0 before"),
        ("padding_counted", "vocabulary: padding has no probability", ""),
        ("noise_of_the_batch", "generation: independent of the batch", ""),
        ("bias_lost_while_loading", "weights: HF to Megatron to HF", "q_proj.bias"),
        ("bias_lost_while_loading", "model: logits against transformers", ""),
        ("bias_lost_in_training", "sft: every parameter has a gradient", "q_proj.bias"),
        ("bias_lost_in_training", "generation: sampler against trainer", ""),
        ("doubled_gradients", "sft: gradients against the loss's change", "is 2 times"),
        ("doubled_loss", "sft: loss against plain", "2 times as large"),
        ("unmasked_prompt", "sft: prompts carry no loss", ""),
        ("unheard_token", "sft: prompts carry no loss", "tokens of answers count, and 0 others"),
        ("forgotten_optimizer", "sft: interrupted against uninterrupted", ""),
    ],
)
def test_a_fault_is_caught_by_name(outcomes, fault, check, words):
    found = outcomes(fault)
    assert check in found and words in found[check]


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("values_off_by_one", "ppo: values at their tokens"),
        ("wrong_clipping", "ppo: policy loss against plain"),
        ("wrong_clipping", "grpo: policy loss against plain"),
        ("groups_mixed", "grpo: advantages against plain"),
    ],
)
def test_a_fault_of_sampling_is_caught_by_name(worlds, tmp_path, fault, check):
    phase, _, _ = check.partition(":")
    settings = [*SMALL, f"phases=[{phase}]", "reward.fns=[rewards:short_and_polite]"]
    settings += ["schedule.residency=offload"]  # roles that are away between stages
    assert worlds(1).run(cases.verify, [*settings, f"output_dir={tmp_path}"], fault) == [1]
    assert check in failed(tmp_path)


@pytest.mark.parametrize(
    "choices",
    [
        ["loss=gspo", "kl=k1", "advantage=rloo", "clip_ratio_high=0.3"],
        ["loss=cispo", "kl=reward", "advantage=reinforce++_baseline", "loss_mean=constant"],
        ["loss=reinforce", "kl_coef=0", "advantage=reinforce++", "loss_mean=tokens", "entropy_coef=0.01"],
        ["kl=k3+", "advantage=dr_grpo", "dual_clip=1.1", "std_correction=0", "loss_mean=constant"],
        ["advantage=remax", "loss=reinforce", "overlong_buffer=4", "score_max=0.5", "score_scale=true"],
        ["importance=masked", "importance_of=sequences", "importance_low=0.4", "overlong_buffer=8", "score_max=0.5"],
    ],
    ids=lambda choices: choices[0],
)
def test_choices_of_a_phase_that_samples_pass(worlds, tmp_path, choices):
    settings = [*SMALL, "phases=[grpo]", "reward.fns=[rewards:all_alike]", f"output_dir={tmp_path}"]
    assert worlds(1).run(cases.verify, [*settings, *(f"grpo.{choice}" for choice in choices)]) == [0], failed(tmp_path)


@pytest.mark.parametrize(
    ("fault", "phase", "check"),
    [
        ("pairs_swapped", "dpo", "loss against plain"),
        ("prompts_in_the_sum", "dpo", "prompts carry no loss"),
        ("kl_of_a_micro_batch", "kto", "loss against plain"),
    ],
)
def test_a_fault_of_preference_optimisation_is_caught_by_name(worlds, tmp_path, fault, phase, check):
    settings = [*SMALL, f"phases=[{phase}]", f"output_dir={tmp_path}"]
    assert worlds(1).run(cases.verify, settings, fault) == [1]
    assert f"{phase}: {check}" in failed(tmp_path)


def test_a_layout_that_learns_something_else_is_caught(worlds, tmp_path):
    settings = [*SMALL, "phases=[sft]", f"output_dir={tmp_path}"]
    assert worlds(4).run(cases.verify, settings, "norms_not_reduced") == [1] * 4
    found = failed(tmp_path)
    assert found and all(name.endswith("sequence parallel") and "norm" in detail for name, detail in found.items())


# -- what is taken for rounding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["float32", "bfloat16", "bfloat16 in float32"])
def test_weights_move_by_a_last_bit_and_back(values):
    dtype = torch.bfloat16 if values == "bfloat16" else torch.float32
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    weights = weights.to(torch.bfloat16).to(dtype) if "bfloat16" in values else weights
    weights[0, :2] = torch.tensor([0.0, -0.0])
    module = torch.nn.Linear(64, 64, bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(weights)
    with moved(SimpleNamespace(chunks=module)):
        change = (module.weight.detach().double() / weights.double() - 1).flatten()[2:]
        assert change.abs().min() > 0 and change.abs().max() < 2.1 * torch.finfo(dtype).eps
        assert 0.4 < float((change > 0).float().mean()) < 0.6
        assert not module.weight[0, :2].any()
    assert torch.equal(module.weight, weights)


def test_the_worst_finding_is_the_one_furthest_beyond_its_limit():
    near, nothing, beyond = Finding(9.0, 10.0), Finding(0.0, 0.0), Finding(1e-4, 1e-5)
    assert worst([near, nothing, beyond]) is beyond and worst([near, nothing]) is near
    for finding in (Finding(math.nan, 1.0), Finding(1.0, math.nan), Finding(1e-9, 0.0)):
        assert worst([beyond, finding]) is finding and finding.excess == math.inf


def test_a_small_gradient_is_measured_by_its_own_rounding():
    """Tensors of 1 and of 1e-2, each with rounding of its own, and some of the other's: what is nothing in the first is
    too much in the second."""
    ones = torch.ones(10)
    own = Gradient({}, {"large": ones, "small": 1e-2 * ones})
    rounded = Gradient({}, {"large": ones + 1e-6, "small": 1e-2 * ones + 1e-9})
    rounding = Rounding(0.0, 1.0, 0.0, [rounded])
    sound = Gradient({}, {"large": ones + 3e-6, "small": 1e-2 * ones + 3e-9})
    assert own.finding(sound, rounding, "").excess < 1
    wrong = Gradient({}, {"large": ones, "small": 1e-2 * ones + 3e-6})
    assert own.finding(wrong, rounding, "sft").detail == "sft, small" and own.finding(wrong, rounding, "").excess > 1
    lucky = Rounding(0.0, 1.0, 0.0, [rounded, Gradient({}, {"large": ones + 1e-6, "small": 1e-2 * ones})])
    assert own.finding(sound, lucky, "").excess < 1 < own.finding(wrong, lucky, "").excess


def apart(miss: float, other: list[int]) -> Finding:
    """What is found where one of the two responses is another one in one of the ways."""
    same, one = ([1, 2, 3], [-1.0, -1.0, -1.0]), [-1.0] * len(other)
    sampled = Sampled(torch.zeros(1), torch.tensor([miss]), 1.0, [1e-6, 1e-6, 1e-6])
    return batch_independence(SimpleNamespace(responses=[[same, same], [same, (other, one)]], sampled=sampled))


def test_responses_part_where_noise_lies_on_a_border():
    tie = apart(2e-6, [1, 3, 3])  # by which rounding moves the border
    assert tie.excess < 1 and tie.detail == "1 of 2 responses differ"
    assert apart(0.01, [1, 3, 3]).excess > 1
    assert apart(0.0, [1, 2]).excess == math.inf  # it just stops


def script(*overrides: str) -> subprocess.CompletedProcess:
    """`python launch/verify.py` as a user types it, started warm."""
    return warm.run([sys.executable, str(ROOT / "launch" / "verify.py"), *overrides])


def test_the_command(biased, tmp_path):
    result = script(*biased, f"output_dir={tmp_path}", "mesh.dp=1")
    assert result.returncode == 0, result.stdout + result.stderr
    table = result.stdout.splitlines()
    assert table[-1].startswith(f"{len(lines(tmp_path))} passed, 0 failed, 0 skipped")
    assert sum(line.startswith("pass ") for line in table) == len(lines(tmp_path))


def test_what_trains_nothing_is_refused(biased, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi"}\n')
    path = next(setting for setting in biased if setting.startswith("policy.path"))
    result = script("+exp=generate", path, f"data.sources=[{rows}]", f"output={tmp_path / 'out.jsonl'}")
    assert result.returncode == 2 and result.stderr.startswith("error: phases=['generate'] trains nothing")
