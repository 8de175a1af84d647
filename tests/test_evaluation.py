"""Answers that pass, counted while a phase trains, and the checkpoint that was best by a figure of that."""

from __future__ import annotations

import json
import math
import shutil
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import cases
import numpy as np
import pytest
import torch
from conftest import SMALL, launch
from test_stops import train

from rlhf_engine.algorithms import passing
from rlhf_engine.algorithms.algorithm import Evaluation
from rlhf_engine.algorithms.passing import evaluate, pass_at_k
from rlhf_engine.config import ConfigError, EvalConfig, RewardConfig, RunConfig
from rlhf_engine.data import sums, tool_sums
from rlhf_engine.data.sources import held_out_sets
from rlhf_engine.environments.calculator import Calculator
from rlhf_engine.rewards.functions import Sample, load

# -- the estimator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "wanted"),
    [(5, 2, 1, 0.4), (5, 2, 2, 0.7), (10, 3, 5, 11 / 12), (4, 0, 4, 0.0), (4, 1, 4, 1.0), (200, 1, 100, 0.5),
     (8, 8, 1, 1.0), (3, 0, 0, 0.0)],
)  # fmt: skip
def test_pass_at_k(n, c, k, wanted):
    assert pass_at_k(n, c, k) == pytest.approx(wanted, abs=1e-15)


def test_pass_at_k_is_the_share_of_subsets_that_have_one():
    for n in range(1, 8):
        for c, k in product(range(n + 1), range(1, n + 1)):
            share = np.mean([min(chosen) < c for chosen in combinations(range(n), k)])
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
    with pytest.raises(ValueError, match="6 of 5"):
        pass_at_k(5, 2, 6)


# -- figures of an evaluation --------------------------------------------------------------------------------


def part(name: str, rows: int):
    examples = [SimpleNamespace(prompt=[i]) for i in range(rows)]
    return SimpleNamespace(source=SimpleNamespace(spec=SimpleNamespace(name=name)), train=examples, held_out=examples)


@pytest.mark.parametrize(
    ("parts", "prompts", "wanted"),
    [
        ([part("a.jsonl", 3)], None, {"pass@1": 5 / 12, "pass@2": (1 + 5 / 6) / 3, "avg@4": 0.5}),
        ([part("a.jsonl", 3)], 2, {"pass@1": 0.25, "pass@2": 0.5 * 5 / 6, "avg@4": 0.375}),
        (
            [part("x/a.jsonl", 2), part("x/b.jsonl", 1)], None,
            {"pass@1": 5 / 12, "pass@2": (1 + 5 / 6) / 3, "avg@4": 0.5, "pass@1/a": 0.25, "pass@2/a": 0.5 * 5 / 6,
             "avg@4/a": 0.375, "pass@1/b": 0.75, "pass@2/b": 1.0, "avg@4/b": 0.75},
        ),
        ([part("x/a.jsonl", 2), part("y/a.jsonl", 1)], 1,
         {"pass@1": 0.625, "pass@1/x/a.jsonl": 0.5, "pass@1/y/a.jsonl": 0.75}),
    ],
    ids=["one", "some", "two", "alike"],
)  # fmt: skip
def test_figures(monkeypatch, parts, prompts, wanted):
    """Of three prompts: 2 of 4 pass with scores of 1 and 1/2, none, and 3 of 4."""
    scores = torch.tensor([[1.0, 1.0, 0.5, 0.0], [0.5, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    if prompts == 1:
        scores = scores[[0, 2]]
    monkeypatch.setattr(passing, "answers_scores", lambda ctx, examples: scores[: len(examples)])
    config = SimpleNamespace(eval=EvalConfig(samples=4, k=[1, 2], prompts=prompts))
    ctx = SimpleNamespace(config=config, phase="grpo", datasets={"grpo": SimpleNamespace(parts=parts)})
    found = passing.passing(ctx)
    for name, value in wanted.items():
        assert found[f"eval/{name}"] == pytest.approx(value, abs=1e-12), name
    assert prompts == 1 or len(found) == len(wanted)
    ctx.datasets = {"grpo": None, "eval": SimpleNamespace(parts=parts)}  # sets of their own
    assert passing.passing(ctx) == found


def test_whose_policy_is_asked(monkeypatch):
    """One that is trained, with eval.samples."""
    monkeypatch.setattr(passing, "passing", lambda ctx: {"eval/pass@1": 0.5})
    algorithm = SimpleNamespace(evaluate=lambda ctx, final: Evaluation({"eval/loss": 1.0}))
    for samples, is_trained in product((0, 4), (False, True)):
        roles = {"policy": SimpleNamespace(is_trained=is_trained)}
        ctx = SimpleNamespace(config=SimpleNamespace(eval=EvalConfig(samples=samples)), roles=roles)
        asked = {"eval/pass@1": 0.5} if samples and is_trained else {}
        assert evaluate(ctx, algorithm, False).figures == {"eval/loss": 1.0, **asked}


# -- sums ----------------------------------------------------------------------------------------------------


def test_sums():
    rows = list(sums.rows("train", 4000, 1))
    assert rows[0] == {"prompt": "52+15=", "completion": "067", "answer": "067"}
    assert rows[:9] == list(sums.rows("train", 9, 1)) and rows[:9] != list(sums.rows("train", 9, 2))
    carried = []
    for row in rows:
        a, b = int(row["prompt"][:2]), int(row["prompt"][3:5])
        assert row["prompt"] == f"{a:02}+{b:02}=" and row["answer"] == f"{a + b:03}" and not sums.is_held_out(a, b)
        assert row["completion"] in (row["answer"], f"{sums.without_carry(a, b):03}")
        carried += [row["completion"] == row["answer"]] if sums.without_carry(a, b) != a + b else []
    assert np.mean(carried) == pytest.approx(1 - sums.FORGETS, abs=0.03) and 0.65 < len(carried) / len(rows) < 0.75
    assert (sums.without_carry(17, 25), sums.without_carry(95, 95), sums.without_carry(12, 34)) == (32, 80, 46)


def test_sums_with_a_calculator():
    """Calls are right, and guesses wrong; what is called is what is asked."""
    rows = list(tool_sums.rows("train", 2000, 1))
    assert rows[:9] == list(tool_sums.rows("train", 9, 1)) != list(tool_sums.rows("train", 9, 2))
    called = 0
    for row in rows:
        asked, *calls, last = row["messages"]
        a, b = map(int, asked["content"].removesuffix("=").split("+"))
        assert row["answer"] == str(a + b) and not sums.is_held_out(a, b) and min(a, b) >= 10_000
        if calls:
            ((call,), result), called = (calls[0]["tool_calls"], calls[1]["content"]), called + 1
            assert call["function"] == {"name": "calculator", "arguments": {"expression": f"{a}+{b}"}}
            assert Calculator().calculator(f"{a}+{b}") == result == last["content"] == row["answer"]
        else:
            assert last["content"] != row["answer"]
    assert called / len(rows) == pytest.approx(tool_sums.CALLS, abs=0.03)
    test = list(tool_sums.rows("test", 50, 1))
    assert all(sums.is_held_out(*map(int, row["messages"][0]["content"][:-1].split("+"))) for row in test)


def test_sums_that_are_held_out():
    """An eighth of all problems, in the test split alone, whatever the seed; what is shown there is right."""
    held_out = {f"{a:02}+{b:02}=" for a in range(100) for b in range(100) if sums.is_held_out(a, b)}
    assert len(held_out) == 1270
    for seed in (1, 2):
        rows = list(sums.rows("test", 500, seed))
        assert {row["prompt"] for row in rows} <= held_out
        assert all(row["completion"] == row["answer"] for row in rows)


def test_sets_of_their_own():
    """Of the embedded ones the test split."""
    (source,) = held_out_sets(["sums"], 5, 1)
    assert [row for _, row in source.raw_rows()] == list(sums.rows("test", 5, 1)) and source.held_out == 0
    with pytest.raises(ConfigError, match="a weight says nothing"):
        held_out_sets(["sums::2"], 5, 1)
    with pytest.raises(ConfigError, match=r"eval\.sources=hh_mini/helpful: did you mean hh_mini/helpful-base"):
        held_out_sets(["hh_mini/helpful"], 5, 1)


# -- on any mesh ---------------------------------------------------------------------------------------------

ASKED = [
    "phases=[grpo]", "reward.fns=[graders:of_tokens]", "eval.samples=3", "eval.k=[1,2]", "eval.passed_at=4000",
    "eval.top_p=0.9",
    "eval.sources=[hh_mini/harmless-base,hh_mini/helpful-base]", "eval.prompts=5",
]  # fmt: skip


def asked(overrides: list[str], layout: tuple) -> dict[str, float]:
    """In a rank: the figures of a policy that has not begun to train."""
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.launching.build import begin

    ctx = cases.context(overrides, layout)
    algorithm = ALGORITHMS["grpo"](ctx.config)
    begin(ctx, "grpo", algorithm.roles())
    return passing.passing(ctx)


def test_the_same_on_every_mesh(worlds, small_run):
    settings = [*SMALL, *ASKED, f"output_dir={small_run}"]
    (wanted,) = worlds(1).run(asked, settings, (1, 1, 1))
    assert 0 < wanted["eval/pass@1"] < wanted["eval/pass@2"] < 1 and len(wanted) == 9
    assert wanted["eval/avg@3"] == (wanted["eval/avg@3/helpful-base"] + wanted["eval/avg@3/harmless-base"]) / 2
    for layout in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        assert worlds(2).run(asked, settings, layout) == [wanted, wanted], layout


# -- the best checkpoint -------------------------------------------------------------------------------------

BEST = ["reward.fns=[graders:letters]", "grpo.redraws=0", "eval.samples=2", "grpo.eval_every=1", "grpo.save_every=2",
        "checkpoint.best=eval/pass@1", "checkpoint.keep_last=1"]  # fmt: skip


def train_with(folder: Path, figures: list[float], stop_at: int | None, iterations: int, options: list[str]) -> bool:
    """In a rank: `train`, and eval/pass@1 is behind each iteration as it is said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passing, "passing", lambda ctx: {"eval/pass@1": figures[ctx.state.iteration - 1]})
        return train(folder, (1, 1, 2), stop_at, iterations, [*BEST, *options], "grpo")


def kept(folder: Path) -> tuple[list[str], dict | None]:
    """Checkpoints that are there, and what is said of the best."""
    found = sorted(path.name for path in (folder / "grpo" / "checkpoints").glob("iteration_*"))
    summary = folder / "grpo" / "summary.json"
    return found, json.loads(summary.read_text()).get("best") if summary.is_file() else None


@pytest.fixture
def run(worlds, small_run, tmp_path):
    """`run(figures, ...)`: what is kept behind a phase of so many iterations."""
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)

    def get(figures: list[float], stop_at: int | None = None, *options: str):
        worlds(2).run(train_with, folder, figures, stop_at, len(figures), list(options))
        return kept(folder)

    get.folder = folder  # type: ignore[attr-defined]
    return get


@pytest.mark.parametrize(
    ("figures", "option", "best"),
    [
        ([0.2, 0.4, 0.5, 0.5, 0.1], "checkpoint.best_is=max", 3),
        ([0.2, 0.4, 0.5, 0.1, 0.9], "checkpoint.best_is=max", 5),
        ([0.2, 0.4, 0.5, 0.1, 0.9], "checkpoint.best_is=min", 4),
        ([math.nan, 0.4, math.nan, 0.1, math.nan], "checkpoint.best_is=max", 2),
    ],
    ids=["within", "last", "min", "nan"],
)
def test_the_best_stays(run, figures, option, best):
    """Whether or not it is one that is saved anyway; of two that are alike the first."""
    names, said = run(figures, None, option)
    assert names == sorted({f"iteration_{best}", "iteration_5"})
    assert said == {"checkpoint": f"iteration_{best}", "eval/pass@1": figures[best - 1]}


def test_the_best_of_a_phase_that_was_stopped(run):
    """Within the iteration behind the best, and later: what it left then is not taken for the best."""
    figures = [0.2, 0.7, 0.3, 0.6]
    assert run([0.2])[0] == ["iteration_1"]
    assert run(figures, 13) == (["iteration_2", "iteration_2.1"], None)  # there are about ten places to stop at
    assert run(figures, 12) == (["iteration_2", "iteration_3"], None)
    assert run(figures) == (["iteration_2", "iteration_4"], {"checkpoint": "iteration_2", "eval/pass@1": 0.7})
    assert run([*figures, 0.8])[1] == {"checkpoint": "iteration_5", "eval/pass@1": 0.8}


def policy_of(folder: Path, options: list[str]) -> float:
    """In a rank: a weight of the policy with which a later phase begins."""
    from rlhf_engine.algorithms.algorithm import RoleSpec
    from rlhf_engine.launching.build import build_role

    ctx = cases.context([*SMALL, "phases=[grpo]", *BEST, f"output_dir={folder}", *options], (1, 1, 1))
    role = build_role(ctx, "policy", RoleSpec("lm", (("grpo", "policy"),)))
    return float(next(role.chunks.parameters()).double().sum())


def test_what_is_built_on(run, worlds):
    """The last one, or the best where that is asked for; if it is damaged that is said."""
    run([0.2, 0.9, 0.3, 0.4])
    last, best = (
        worlds(1).run(policy_of, run.folder, [f"checkpoint.build_on={which}"])[0] for which in ("last", "best")
    )
    assert last != best
    (run.folder / "grpo" / "checkpoints" / "latest").write_text("iteration_2")
    assert worlds(1).run(policy_of, run.folder, ["checkpoint.build_on=last"])[0] == best
    (run.folder / "grpo" / "checkpoints" / "latest").write_text("iteration_4")
    next((run.folder / "grpo" / "checkpoints" / "iteration_2").glob("*.distcp")).unlink()
    with pytest.raises(Exception, match=r"checkpoint\.build_on=best: \S*iteration_2 is damaged"):
        worlds(1).run(policy_of, run.folder, ["checkpoint.build_on=best"])


def test_what_is_exported(run):
    """The same: a third iteration that makes nothing better leaves what the second one did."""
    exported = run.folder / "grpo" / "hf" / "model.safetensors"
    contents = []
    for figures, which in (([0.2, 0.9], "last"), ([0.2, 0.9, 0.3], "best"), ([0.2, 0.9, 0.3, 0.4], "last")):
        run(figures, None, f"checkpoint.build_on={which}", "export_hf=true")
        contents.append(exported.read_bytes())
    assert contents[0] == contents[1] != contents[2]


# -- experiments ---------------------------------------------------------------------------------------------


def test_gsm8k(shared, tmp_path):
    """Its rows as they are, and the settings but for their sizes."""
    sizes = ["data.max_seq_len=512", "data.max_prompt_len=256", "rollout.max_new_tokens=8", "grpo.iterations=2"]
    sizes += [
        "grpo.prompts_per_iteration=8",
        "grpo.samples_per_prompt=2",
        "grpo.num_minibatches=2",
        "grpo.eval_every=1",
    ]
    sizes += ["grpo.eval_prompts=4", "eval.prompts=4", "eval.samples=2", "eval.k=[1,2]", "reward.fns=[regex]"]
    data = shared / "data" / "gsm8k_train.jsonl"
    places = [f"policy.path={shared / 'models' / 'stories260K_hf'}", f"data.sources=[{data}]", f"output_dir={tmp_path}"]
    launch("+exp=gsm8k_grpo", *places, *sizes, "mesh.dp=1", "export_hf=false")
    first, second = map(json.loads, (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines())
    assert first["eval/pass@1"] == first["eval/pass@2"] == first["eval/avg@2"] == first["score/mean"] == 0
    assert second["policy/ratio_first"] == pytest.approx(1, abs=1e-6) and second["score/equal_groups"] == 1
    summary = json.loads((tmp_path / "grpo" / "summary.json").read_text())
    assert summary["best"] == {"checkpoint": "iteration_1", "eval/pass@1": 0.0}


def test_answers_of_gsm8k(shared):
    """A solution is compared by what stands behind its ####."""
    lines = (shared / "data" / "gsm8k_train.jsonl").read_text().splitlines()[:200]
    answers = [json.loads(line)["answer"] for line in lines]
    (part,) = load(RunConfig(reward=RewardConfig(fns=["regex"])))

    def scores(said: list[str]) -> list[float]:
        rows = zip(said, answers, strict=True)
        return part([Sample("", text, (), (), json.dumps({"answer": answer})) for text, answer in rows])

    assert scores(answers) == scores([f"#### {a.rpartition('####')[2].strip()}" for a in answers]) == [1.0] * 200
    assert scores([f"{a}1" for a in answers]) == scores(["#### 1234567"] * 200) == [0.0] * 200
