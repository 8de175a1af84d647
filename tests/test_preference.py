"""Losses of preference optimisation against their papers, and a reference whose log-probs are kept in a file."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import cases
import numpy as np
import pytest
import torch
from conftest import SMALL, launch

from rlhf_engine.algorithms.dpo import judge_pairs
from rlhf_engine.algorithms.kto import KTO, judge_answers, of_kinds
from rlhf_engine.config import DPOConfig, KTOConfig, RunConfig
from rlhf_kernels import kto_loss, preference_loss

LOSSES = ("dpo", "ipo", "cdpo", "simpo", "orpo")


def softplus(x: np.ndarray | float):
    """-log sigmoid(-x)."""
    return np.logaddexp(0, x)


# From the papers: chosen and rejected are log-probs less the reference's, of simpo and orpo log-probs per token.
PAPERS = {
    "dpo": lambda w, r, beta, gamma, eps: softplus(-beta * (w - r)),
    "cdpo": lambda w, r, beta, gamma, eps: (1 - eps) * softplus(-beta * (w - r)) + eps * softplus(beta * (w - r)),
    "ipo": lambda w, r, beta, gamma, eps: (w - r - 1 / (2 * beta)) ** 2,
    "simpo": lambda w, r, beta, gamma, eps: softplus(gamma - beta * w + beta * r),
    "orpo": lambda w, r, beta, gamma, eps: (
        -w - beta * np.log(1 / (1 + np.exp(-np.log(np.exp(w) / (1 - np.exp(w)) / (np.exp(r) / (1 - np.exp(r)))))))
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_pairs_and_their_gradients(kind):
    draw = np.random.default_rng(1)
    chosen, rejected = -draw.exponential(2.0, 64) - 0.01, -draw.exponential(2.0, 64) - 0.01
    options = {"beta": 0.3, "margin": 0.7, "label_smoothing": 0.2}
    pair = [torch.tensor(x, requires_grad=True) for x in (chosen, rejected)]
    found = preference_loss(kind, *pair, **options)
    np.testing.assert_allclose(found.detach(), PAPERS[kind](chosen, rejected, 0.3, 0.7, 0.2), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda w, r: preference_loss(kind, w, r, **options), pair)


@pytest.mark.parametrize(
    ("kind", "chosen", "rejected", "options", "wanted"),
    [
        ("dpo", -7.0, -7.0, {"beta": 0.1}, math.log(2)),
        ("dpo", 1.0, -1.0, {"beta": 0.5}, 0.313261687518223),  # log(1 + 1/e)
        ("cdpo", 1.0, -1.0, {"beta": 0.5, "label_smoothing": 0.1}, 0.413261687518223),  # and a tenth of beta h more
        ("ipo", 1.0, -1.0, {"beta": 0.1}, 9.0),  # (2 - 5)^2
        ("simpo", 1.0, -1.0, {"beta": 2.0, "margin": 1.0}, 0.048587351573742),  # log(1 + exp(-3))
        # probabilities of 1/2 and 1/5 have odds of 1 and 1/4
        ("orpo", math.log(1 / 2), math.log(1 / 5), {"beta": 0.1}, math.log(2) + 0.1 * math.log(5 / 4)),
    ],
)
def test_losses_worked_out_by_hand(kind, chosen, rejected, options, wanted):
    pair = (torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected))
    found = preference_loss(kind, *pair, **options)
    assert found.tolist() == pytest.approx([wanted], rel=1e-12)


def test_a_certain_answer_has_finite_odds():
    """A probability of 1 has none."""
    chosen = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = preference_loss("orpo", chosen, torch.tensor([-1.0, 0.0], dtype=torch.float64), beta=0.1)
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()
    with pytest.raises(ValueError, match="'dop' is no preference loss"):
        preference_loss("dop", chosen, chosen, beta=0.1)


def test_the_loss_of_answers_one_by_one():
    """At the KL half the weight; 1 / beta from it 1 - sigmoid(1) on the right side, and sigmoid(1) on the other."""
    ratios = torch.tensor([3.0, 13.0, 3.0, 13.0, -7.0], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, True, False, False, False])
    found = kto_loss(ratios, desirable, torch.tensor(3.0), beta=0.1, desirable_weight=1.0, undesirable_weight=2.0)
    wanted = [0.5, 0.268941421369995, 1.0, 2 * 0.731058578630005, 2 * 0.268941421369995]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)
    found.sum().backward()
    assert ratios.grad.tolist() == pytest.approx([-0.025, -0.0196611933, 0.05, 0.0393223866, 0.0393223866], rel=1e-7)


@pytest.mark.parametrize(
    ("loss", "means", "beta"),
    [("dpo", False, 0.1), ("cdpo", False, 0.1), ("ipo", True, 0.1), ("simpo", True, 2.0), ("orpo", True, 0.1)],
)
def test_what_a_loss_takes_of_an_answer(loss, means, beta):
    """The sum or the mean of its tokens' log-probs, less the reference's where it has one."""
    config = DPOConfig(loss=loss, label_smoothing=0.2 if loss == "cdpo" else 0.0)
    assert (config.takes_means, config.strength, config.has_reference) == (means, beta, loss not in ("simpo", "orpo"))
    counts, log_probs = torch.tensor([2, 4, 1, 5]), torch.tensor([-3.0, -8.0, -2.0, -5.0], dtype=torch.float64)
    refs = torch.tensor([-4.0, -6.0, -2.5, -4.0], dtype=torch.float64)
    mask = torch.arange(6) < counts.unsqueeze(1)
    losses, sums = judge_pairs(config, log_probs, {"loss_mask": mask, "ref_answer_log_probs": refs})
    scores = (log_probs - refs if config.has_reference else log_probs) / (counts if means else 1)
    wanted = PAPERS[loss](*scores.view(-1, 2).T.numpy(), beta, 1.0, config.label_smoothing)
    np.testing.assert_allclose(losses, wanted, rtol=1e-12)
    ahead = (scores[::2] - scores[1::2]) * beta
    assert sums["accuracy"] == (ahead > 0).sum() and float(sums["margin"]) == pytest.approx(float(ahead.sum()))
    other = DPOConfig(loss=loss, log_probs="sum" if means else "mean")
    assert other.takes_means != means


def test_figures_of_answers_one_by_one():
    """Means over the answers of a kind, and how many are on their side of the KL."""
    desirable = torch.tensor([True, False, False, True, False])
    ratios, refs = torch.tensor([2.0, 4.0, -1.0, -6.0, 3.0]).double(), torch.zeros(10).double()
    x = SimpleNamespace(desirable=desirable, ref_answer_log_probs=refs)
    losses, sums = judge_answers(KTOConfig(beta=0.5), ratios, of_kinds(x), torch.tensor(1.0))
    figures = {name: float(total) / len(losses) for name, total in sums.items()}
    assert figures == pytest.approx({"accuracy": 0.4, "chosen": -1.0, "rejected": 1.0, "margin": -2.0})


def test_answers_behind_prompts_that_are_not_theirs():
    """Each has that of the row before, as far as there is room."""
    config = RunConfig()
    config.data.max_seq_len = 6
    rows = [([1, 2], [3, 4], None), ([5], None, [6, 7, 8]), ([9, 10, 11], [12], None)]
    examples = [SimpleNamespace(before=before, chosen=good, rejected=bad) for before, good, bad in rows]
    assert KTO(config).answers(examples) == [
        ([1, 2], [3, 4]), ([5], [6, 7, 8]), ([9, 10, 11], [12]),
        ([1, 2], [12]), ([5], [3, 4]), ([9, 10, 11], [6, 7, 8]),
    ]  # fmt: skip
    config.data.max_seq_len = 5
    assert KTO(config).answers(examples)[-1] == ([9, 10, 11], [6, 7])


# -- a reference in a file -----------------------------------------------------------------------------------------


def first(worlds, folder: Path, phase: str, *options: str, layout: tuple = (1, 1, 2)) -> dict:
    settings = [*SMALL, f"phases=[{phase}]", f"output_dir={folder}", *options]
    world = worlds(layout[0] * layout[1] * layout[2])
    return world.run(cases.first_iteration, settings, layout, phase, False, 1.0)[0]["figures"]


@pytest.fixture
def folder(small_run, tmp_path) -> Path:
    return Path(shutil.copytree(small_run, tmp_path / "run"))


@pytest.mark.parametrize("phase", ["dpo", "kto"])
def test_a_reference_in_a_file_is_that_in_memory(worlds, folder, phase):
    wanted = first(worlds, folder, phase, f"{phase}.reference=each_step")
    assert not (folder / phase / "reference.json").exists()
    if phase == "dpo":
        assert wanted["policy/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(wanted["policy/margin"]) < 1e-5
    for layout in ((1, 1, 2), (2, 1, 1)):  # computed, then read
        found = first(worlds, folder, phase, layout=layout)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            is_difference = name in ("kl/mean", "policy/margin", "policy/chosen", "policy/rejected", "policy/accuracy")
            if name != "policy/accuracy":  # of answers that are all as likely as they were
                assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5 if is_difference else 1e-6), name


def test_the_file_is_read_and_its_weights_are_looked_at(worlds, folder):
    path = folder / "dpo" / "reference.json"
    first(worlds, folder, "dpo")
    kept = json.loads(path.read_text())
    assert len(kept["log_probs"]) == 2 * (2 * 8 + 8)  # pairs of two iterations, and those held out
    shifted = {key: value - 30.0 * (i % 2) for i, (key, value) in enumerate(kept["log_probs"].items())}
    path.write_text(json.dumps(kept | {"log_probs": shifted}))
    assert first(worlds, folder, "dpo")["policy/loss"] != pytest.approx(math.log(2), abs=0.01)  # read
    path.write_text(json.dumps(kept | {"log_probs": shifted, "weights": "others"}))
    assert first(worlds, folder, "dpo")["policy/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert json.loads(path.read_text()) == kept
    few = dict(list(kept["log_probs"].items())[5:])
    path.write_text(json.dumps(kept | {"log_probs": few}))  # what is missing is computed
    first(worlds, folder, "dpo")
    assert json.loads(path.read_text())["log_probs"] == pytest.approx(kept["log_probs"])


def test_phases_end_and_go_on_with_more_iterations(folder):
    command = [*SMALL, "phases=[dpo,kto]", f"output_dir={folder}", "mesh.dp=1", "dpo.eval_every=1"]
    result = launch(*command)
    for phase in ("dpo", "kto"):
        rows = [json.loads(line) for line in (folder / phase / "metrics.jsonl").read_text().splitlines()]
        wanted = {"policy/loss", "policy/accuracy", "policy/margin", "policy/chosen", "policy/grad_norm"}
        assert wanted | ({"kl/mean"} if phase == "kto" else {"eval/accuracy"}) <= rows[0].keys()
        summary = json.loads((folder / phase / "summary.json").read_text())
        wanted = {"eval/loss", "eval/accuracy", "eval/margin", "eval/kl", "eval/win_rate", "eval/gold_after"}
        assert summary["iterations"] == 2 and wanted <= summary.keys()
        assert (folder / phase / "hf" / "config.json").is_file()
    assert result.stdout.count("are in ") == 2
    assert "dpo: finished before" in launch(*command).stdout
    longer = launch(*command, "dpo.iterations=3")
    assert "dpo: resuming at iteration 2 of 3" in longer.stdout and longer.stdout.count("are in ") == 1


def test_reference_free_losses_keep_no_file(folder):
    for loss in ("simpo", "orpo"):
        result = launch(*SMALL, "phases=[dpo]", f"dpo.loss={loss}", f"output_dir={folder}", "mesh.dp=1", "rerun=true")
        assert "dpo done" in result.stdout and not (folder / "dpo" / "reference.json").exists()


def test_a_folder_of_labelled_answers(folder, tmp_path):
    """As TRL writes them: prompt, completion, label."""
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i % 7}.", "label": i % 3 > 0} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = launch(*SMALL, "phases=[kto]", f"output_dir={folder}", f"data.sources=[{tmp_path / 'rows.jsonl'}]")
    assert "kto done" in result.stdout
    refused = launch(
        *SMALL, "phases=[dpo]", f"output_dir={folder}", f"data.sources=[{tmp_path / 'rows.jsonl'}]", check=False
    )
    assert "dpo needs two different answers to one prompt in each row" in refused.stderr
