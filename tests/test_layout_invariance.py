"""Change the mesh, not the experiment: the first iteration of every phase on nine layouts and two micro-batch sizes.

What it does not cover: bf16, worlds of more than four ranks, and later iterations, where Adam's division by a small
second moment amplifies the rounding that is left.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import cases
import pytest
from conftest import SMALL

from rlhf_engine.config import PAIRED

GOLDEN = Path(__file__).parent / "golden" / "first_iteration.json"
LAYOUTS = {
    1: [(1, 1, 1)],
    2: [(2, 1, 1), (2, 1, 1, True), (1, 2, 1), (1, 1, 2)],
    4: [(2, 2, 1), (2, 2, 1, True), (2, 1, 2), (1, 2, 2)],
}
# One optimizer step a role: the figures of a second would be those after an Adam update. At a ratio of 1 the loss of
# whitened advantages is exactly 0; the entropy term gives it a size to compare.
PHASES = ("sft", "reward", "ppo", "grpo", "dpo", "kto")
SETTINGS = [*SMALL, f"phases=[{','.join(PHASES)}]", "ppo.epochs=1", "ppo.num_minibatches=1", "ppo.entropy_coef=0.01"]
SETTINGS += ["grpo.num_minibatches=1", "grpo.entropy_coef=0.01", "dpo.reference=each_step", "kto.reference=each_step"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference(worlds, small_run) -> dict:
    """The first iteration of each phase on one rank."""
    settings = [*SETTINGS, f"output_dir={small_run}"]
    return {phase: worlds(1).run(cases.first_iteration, settings, (1, 1, 1), phase)[0] for phase in PHASES}


def assert_same(found: dict, wanted: dict, what: str) -> None:
    assert found.keys() == wanted.keys(), what
    for name, value in wanted.items():
        # differences of what is nearly equal are near 0 and have no relative size
        is_difference = "gap" in name or "margin" in name
        close = math.isclose(found[name], value, rel_tol=TOLERANCE, abs_tol=1e-5 if is_difference else 1e-7)
        assert close, f"{what}: {name} is {found[name]!r}, not {value!r}"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("micro_batch_size", [2, 4])
@pytest.mark.parametrize("layout", [layout for group in LAYOUTS.values() for layout in group], ids=str)
def test_first_iteration(worlds, small_run, reference, phase, layout, micro_batch_size):
    size = micro_batch_size // 2 if phase in PAIRED else micro_batch_size
    settings = [*SETTINGS, f"output_dir={small_run}", f"{phase}.micro_batch_size={size}"]
    world = worlds(layout[0] * layout[1] * layout[2])
    for rank, found in enumerate(world.run(cases.first_iteration, settings, layout, phase)):
        assert found["tokens"] == reference[phase]["tokens"]
        assert_same(found["figures"], reference[phase]["figures"], f"{phase} on {layout}, rank {rank}")


@pytest.fixture(scope="module")
def deep(worlds, small_run, tmp_path_factory) -> tuple[list[str], dict]:
    """Settings of a model of five layers, and the first iteration of each phase on one rank."""
    tokenizer, folder = small_run / "tokenizer" / "tokenizer.model", tmp_path_factory.mktemp("deep")
    settings = [*SETTINGS, "model.num_layers=5", f"tokenizer.path={tokenizer}", f"output_dir={folder}"]
    return settings, {phase: worlds(1).run(cases.first_iteration, settings, (1, 1, 1), phase)[0] for phase in PHASES}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "extra",
    # the last makes one micro-batch, which is fewer than there are stages
    [[], ["schedule.residency=offload"], ["schedule.micro_batch_tokens=400"], ["schedule.micro_batch_tokens=99999"]],
    ids=str,
)
@pytest.mark.parametrize("layout", [(1, 2, 1, False, 1, 2), (2, 2, 1, True, 1, 2), (1, 4, 1)], ids=str)
def test_chunks_of_layers_change_nothing(worlds, deep, phase, extra, layout):
    """Stages with two chunks each, of which one has a layer more; and with one chunk each, likewise."""
    settings, wanted = deep
    for rank, found in enumerate(worlds(layout[0] * layout[1] * layout[2]).run(
        cases.first_iteration, [*settings, *extra], layout, phase
    )):  # fmt: skip
        assert found["tokens"] == wanted[phase]["tokens"]
        assert_same(found["figures"], wanted[phase]["figures"], f"{phase} on {layout}, rank {rank}")


def test_optimizer_without_distribution(worlds, small_run, reference):
    settings = [*SETTINGS, f"output_dir={small_run}", "sft.optimizer.distributed=false"]
    found = worlds(2).run(cases.first_iteration, settings, (1, 1, 2), "sft")[0]
    assert_same(found["figures"], reference["sft"]["figures"], "sft without the distributed optimizer")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("budget", [150, 600])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1, True), (1, 2, 1), (1, 1, 2)], ids=str)
def test_packed_micro_batches_change_nothing(worlds, small_run, reference, phase, layout, budget):
    """Rows by length in micro-batches of a token budget, some longer than it."""
    settings = [*SETTINGS, f"output_dir={small_run}", f"schedule.micro_batch_tokens={budget}"]
    for rank, found in enumerate(worlds(layout[0] * layout[1] * layout[2]).run(
        cases.first_iteration, settings, layout, phase
    )):  # fmt: skip
        assert found["tokens"] == reference[phase]["tokens"]
        assert_same(found["figures"], reference[phase]["figures"], f"{phase} on {layout}, rank {rank}")


@pytest.fixture(scope="module")
def mixture(worlds, small_run) -> tuple[list[str], dict]:
    """Settings of a model with experts that learns to share tokens out among them, and the first iteration of phases
    that train it alone, and with a critic, on one rank."""
    settings = [*SETTINGS, f"output_dir={small_run}/experts", "model.architecture=mixtral", "model.num_experts=4"]
    settings += [
        "model.num_layers=4",
        f"tokenizer.path={small_run}/tokenizer/tokenizer.model",
        "policy.router_aux_loss_coef=0.5",
    ]
    found = {phase: worlds(1).run(cases.first_iteration, settings, (1, 1, 1), phase)[0] for phase in ("sft", "ppo")}
    return settings, found


@pytest.mark.parametrize("phase", ["sft", "ppo"])
@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        ((1, 1, 2, False, 2), ["schedule.micro_batch_tokens=300"]),
        ((1, 2, 1), []),
        ((2, 1, 2, True, 2), ["schedule.recompute=full"]),
        ((2, 2, 1, True), ["sft.micro_batch_size=2", "ppo.micro_batch_size=2"]),
        ((1, 2, 1, False, 1, 2), ["schedule.micro_batch_tokens=99999"]),  # less micro-batches than stages
    ],
    ids=str,
)
def test_experts_are_shared_out_alike(worlds, mixture, phase, layout, extra):
    """Loss, load-balancing loss, gradients and each expert's share of the tokens; experts on ranks of their own, router
    and tokens split over tensor parallel ranks, layers over stages, rows over micro-batches and replicas."""
    settings, wanted = mixture
    found = worlds(layout[0] * layout[1] * layout[2]).run(cases.first_iteration, [*settings, *extra], layout, phase)
    assert {"policy/router_aux_loss", "policy/expert_share/3"} <= wanted[phase]["figures"].keys()
    for rank, each in enumerate(found):
        assert each["tokens"] == wanted[phase]["tokens"]
        assert_same(each["figures"], wanted[phase]["figures"], f"{phase} on {layout}, rank {rank}")


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1, True), (1, 2, 1)], ids=str)
def test_recomputed_activations_change_nothing(worlds, small_run, reference, recompute, layout):
    settings = [*SETTINGS, f"output_dir={small_run}", f"schedule.recompute={recompute}"]
    found = worlds(layout[0] * layout[1]).run(cases.first_iteration, settings, layout, "sft")[0]
    assert_same(found["figures"], reference["sft"]["figures"], f"{recompute} recompute on {layout}")


# of the policy's loss, each with another mean, another place of the KL and another comparison of scores
CHOICES = {
    "gspo": ["grpo.loss=gspo", "grpo.clip_ratio=0.05", "grpo.kl=k2"],
    "cispo": ["grpo.loss=cispo", "grpo.loss_mean=tokens", "grpo.kl=k1", "grpo.advantage=rloo"],
    "dapo": [
        "grpo.loss_mean=tokens",
        "grpo.clip_ratio_high=0.28",
        "grpo.dual_clip=1.2",
        "grpo.kl=k3+",
        "grpo.importance=truncated",
        "grpo.importance_limit=1.2",
        "grpo.overlong_buffer=4",
    ],
    "dr_grpo": ["grpo.loss_mean=constant", "grpo.advantage=dr_grpo", "grpo.kl=k3"],
    "remax": ["grpo.advantage=remax", "grpo.loss_mean=tokens", "grpo.kl=reward", "grpo.overlong_buffer=4"],
    "reinforce++": ["grpo.loss=reinforce", "grpo.advantage=reinforce++", "grpo.kl=reward"],
}


@pytest.fixture(scope="module")
def chosen(worlds, small_run):
    """`chosen(name)`: settings, and figures of an update on one rank."""
    known: dict[str, tuple[list[str], dict]] = {}

    def get(name: str) -> tuple[list[str], dict]:
        if name not in known:
            settings = [*SETTINGS, *CHOICES[name], f"output_dir={small_run}", "phases=[grpo]"]
            found = worlds(1).run(cases.first_iteration, settings, (1, 1, 1), "grpo", True)[0]
            known[name] = settings, found["figures"]
        return known[name]

    return get


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        ((1, 1, 1), "schedule.micro_batch_tokens=400"),
        ((2, 1, 1, True), "grpo.micro_batch_size=2"),
        ((1, 2, 1), "schedule.micro_batch_tokens=150"),
        ((1, 1, 2), "grpo.micro_batch_size=1"),
    ],
    ids=str,
)
def test_choices_of_the_policy_loss(worlds, chosen, name, layout, extra):
    """What is of a sequence does not depend on how rows are dealt, where an update lies behind the policy."""
    settings, wanted = chosen(name)
    assert abs(wanted["policy/ratio"] - 1) > 1e-3 and wanted["policy/grad_norm"] > 0
    world = worlds(layout[0] * layout[1] * layout[2])
    for found in world.run(cases.first_iteration, [*settings, extra], layout, "grpo", True):
        assert_same(found["figures"], wanted, f"{name} on {layout}")


@pytest.mark.parametrize("layout", [(2, 1, 1, True), (1, 2, 1), (1, 1, 2)], ids=str)
def test_prompts_drawn_anew(worlds, small_run, layout):
    """On every mesh the same, whoever scores them."""
    settings = [*SETTINGS, f"output_dir={small_run}", "phases=[grpo]", "grpo.redraws=2"]
    for scorer in ([], ["reward.fns=[rewards:some_alike]"]):
        wanted = worlds(1).run(cases.first_iteration, [*settings, *scorer], (1, 1, 1), "grpo")[0]
        found = worlds(2).run(cases.first_iteration, [*settings, *scorer], layout, "grpo")[0]
        assert found["tokens"] == wanted["tokens"]
        assert_same(found["figures"], wanted["figures"], f"grpo on {layout}")
        assert bool(scorer) == (wanted["figures"]["rollout/redrawn_1"] > 0)


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1, True), (1, 1, 2)], ids=str)
def test_ppo_with_a_lambda_of_its_critic_and_of_each_length(worlds, small_run, layout):
    settings = [*SETTINGS, f"output_dir={small_run}", "phases=[ppo]", "ppo.critic_lambda=1.0", "ppo.gae_alpha=0.2"]
    wanted = worlds(1).run(cases.first_iteration, settings, (1, 1, 1), "ppo", True)[0]
    settings += ["schedule.micro_batch_tokens=200"]
    found = worlds(layout[0] * layout[2]).run(cases.first_iteration, settings, layout, "ppo", True)[0]
    assert_same(found["figures"], wanted["figures"], f"ppo on {layout}")


PTX = ["ppo.ptx.sources=[hh_mini/helpful-base]", "ppo.ptx.rows=8"]


@pytest.mark.parametrize("extra", [[], ["schedule.micro_batch_tokens=400"]], ids=["rows", "packed"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_text_mixed_into_the_update(worlds, small_run, reference, layout, extra):
    """One step on the policy's gradient plus `coef` times that of the text's mean loss over its own tokens."""
    world = worlds(layout[0] * layout[1] * layout[2])
    settings = [*SETTINGS, *PTX, *extra, f"output_dir={small_run}", "phases=[ppo]"]
    squares = []
    for coef in (0, 1, 2):
        found = world.run(cases.first_iteration, [*settings, f"ppo.ptx.coef={coef}"], layout, "ppo")[0]["figures"]
        squares.append(found["policy/grad_norm"] ** 2)
        loss = reference["ppo"]["figures"]["policy/loss"] + coef * found["ptx/loss"]
        assert found["policy/loss"] == pytest.approx(loss, rel=1e-5)
    assert squares[0] == pytest.approx(reference["ppo"]["figures"]["policy/grad_norm"] ** 2, rel=1e-4)
    # |p + c t|^2 is a parabola in c, whose second difference is 2 |t|^2
    text = world.run(cases.grad_norm_of_text, settings, layout)[0]
    assert (squares[2] - 2 * squares[1] + squares[0]) / 2 == pytest.approx(text**2, rel=1e-3)


def test_golden_losses(reference):
    """A change of these figures is a change of what is computed. RLHF_WRITE_GOLDEN=1 writes them anew."""
    found = {phase: result["figures"] for phase, result in reference.items()}
    if os.environ.get("RLHF_WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    for phase, wanted in json.loads(GOLDEN.read_text()).items():
        assert_same(found[phase], wanted, f"golden {phase}")


def test_correctness_rules_of_ppo(reference):
    figures = reference["ppo"]["figures"]
    assert abs(figures["kl/mean"]) <= 1e-6
    assert abs(figures["policy/ratio_first"] - 1) <= 1e-6
    assert figures["rollout/log_prob_gap"] <= 1e-5
    assert figures["policy/grad_norm"] > 0 and figures["critic/grad_norm"] > 0


def test_a_finished_phase_keeps_no_memory(worlds, reference):
    assert worlds(1).run(cases.num_models) == [0]
