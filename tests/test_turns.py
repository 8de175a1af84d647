"""Rollouts of several turns: the same tokens on every mesh, in any cache, and whenever the answers come."""

from __future__ import annotations

import functools
import json
import re

import cases
import pytest
from conftest import ROOT, SMALL, launch

from rlhf_engine.config import ConfigError, RunConfig, from_dict
from rlhf_engine.config.algorithms import check_turns
from rlhf_engine.config.environments import check_env
from rlhf_engine.environments import model
from rlhf_engine.environments.contract import Trajectory

PROMPTS = [[1, *[(7 * (i // 2) + 3 * j) % 500 + 3 for j in range((5, 20, 40)[i // 2 % 3])]] for i in range(24)]
IDS = list(range(len(PROMPTS)))
ENDS = tuple(range(40, 70))  # so many that turns end long before they have to
LIMIT = 130


@pytest.fixture(scope="module")
def settings(small_run) -> list[str]:
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    own = [f"tokenizer.path={tokenizer}", f"output_dir={small_run}/nowhere", "model.init_std=0.3"]
    return [*SMALL, "phases=[sft]", "rollout.max_new_tokens=30", *own]


@pytest.fixture(scope="module")
def expected(worlds, settings) -> list[tuple]:
    """Turn by turn: each a response that goes on where the last answer was left."""
    begun = [([], [], False) for _ in PROMPTS]
    said: list[list[bool]] = [[] for _ in PROMPTS]
    left, turn = IDS, 0
    while left:
        turn += 1
        limits = [min(LIMIT, len(begun[i][0]) + 30) for i in left]
        run = functools.partial(cases.generate, ends=ENDS, limits=limits, begun=[begun[i] for i in left])
        found, _ = worlds(1).run(run, settings, (1, 1, 1), [PROMPTS[i] for i in left], left)[0]
        rest = []
        for i, (tokens, log_probs, finished) in zip(left, found, strict=True):
            new = len(tokens) - len(said[i])
            answer = cases.echo(i, turn, tokens[-new:])
            said[i] += [True] * new
            begun[i] = tokens, log_probs, finished
            if answer is not None and len(answer) < LIMIT - len(tokens):
                said[i] += [False] * len(answer)
                begun[i] = tokens + answer, log_probs + [0.0] * len(answer), False
                rest.append(i)
        left = rest
    return [(*each, mask) for each, mask in zip(begun, said, strict=True)]


def talk(worlds, settings, layout=(1, 1, 1), **options):
    run = functools.partial(cases.generate, ends=ENDS, limits=[LIMIT] * len(PROMPTS), **options)
    found = worlds(layout[0] * layout[1] * layout[2]).run(run, settings, layout, PROMPTS, IDS)
    assert all(responses == found[0][0] for responses, _ in found)
    return found[0]


def sampled(response) -> list[bool]:
    tokens, _, _, mask = response
    return mask or [True] * len(tokens)  # None: all


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
@pytest.mark.parametrize(
    ("delay", "options"),
    [(0, []), (3, ["slots=5"]), (30, []), (7, ["kv_tokens=300"])],
    ids=["at_once", "slots", "late", "small"],
)
def test_turns_are_what_they_are_one_by_one(worlds, settings, expected, layout, delay, options):
    found, progress = talk(worlds, [*settings, *(f"rollout.{each}" for each in options)], layout, delay=delay)
    assert [each[0] for each in found] == [each[0] for each in expected]
    assert [sampled(each) for each in found] == [each[3] for each in expected]
    assert [each[2] for each in found] == [each[2] for each in expected]
    assert len({sampled(each).count(False) for each in found}) > 5
    for (_, log_probs, *_), (_, theirs, *_) in zip(found, expected, strict=True):
        assert log_probs == (theirs if layout[0] == 1 else pytest.approx(theirs, rel=3e-6, abs=1e-5))  # to the bit
    assert progress.rows_done == len(PROMPTS)
    assert progress.tokens == sum(mask.count(True) for *_, mask in expected)
    assert (progress.preempted > 0) == ("kv_tokens=300" in options)


@pytest.mark.parametrize("delay", [0, 5])
@pytest.mark.parametrize("options", [[], ["kv_tokens=300"]], ids=["whole", "small"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1)], ids=str)
def test_turns_as_on_cuda(worlds, settings, expected, layout, delay, options):
    """In steps of fixed sizes whose ends are known one step late."""
    settings = [*settings, *(f"rollout.{each}" for each in options)]
    found, progress = talk(worlds, settings, layout, delay=delay, as_on_cuda=True)
    assert [each[0] for each in found] == [each[0] for each in expected]
    assert [sampled(each) for each in found] == [each[3] for each in expected]
    for (_, log_probs, *_), (_, theirs, *_) in zip(found, expected, strict=True):
        assert log_probs == pytest.approx(theirs, rel=3e-6, abs=1e-5)
    assert progress.tokens == sum(mask.count(True) for *_, mask in expected)


# -- with environments -----------------------------------------------------------------------------------------

OPTIONS = [
    *SMALL, "env.fn=talkers:Teller", "rollout.max_new_tokens=20", "rollout.stop=[e,o]", "env.max_tokens=100",
    "data.max_seq_len=256", "data.max_prompt_len=128", "model.init_std=0.3",
]  # fmt: skip
PHASES = ["ppo", "grpo"]


def iteration(worlds, small_run, phase, layout=(1, 1, 1), *options):
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    place = [f"tokenizer.path={tokenizer}", f"output_dir={small_run}/nowhere", f"phases=[{phase}]"]
    found = worlds(layout[0] * layout[1] * layout[2]).run(
        cases.first_iteration, [*OPTIONS, *place, *options], layout, phase
    )
    assert all(each["tokens"] == found[0]["tokens"] for each in found)
    return found[0]


@pytest.fixture(scope="module")
def talked(worlds, small_run):
    return {phase: iteration(worlds, small_run, phase) for phase in PHASES}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_an_iteration_is_the_same_on_every_mesh_and_whenever_answers_come(worlds, small_run, talked, phase, layout):
    wanted = talked[phase]
    found = iteration(worlds, small_run, phase, layout, "env.args={delay: 0.1}", "rollout.slots=5")
    assert found["tokens"] == wanted["tokens"]
    assert wanted["figures"]["env/turns"] > 1.5 and wanted["figures"]["env/observed_tokens"] > 5
    for name, value in wanted["figures"].items():
        if name not in ("env/idle", "rollout/preempted"):  # of the clock and the cache
            assert found["figures"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_what_fails_costs_its_own_trajectory(worlds, small_run):
    wanted = iteration(worlds, small_run, "grpo", (1, 1, 1), "env.args={fails: 4}")
    figures = wanted["figures"]
    assert 0 < figures["env/failed"] < 0.7 and figures["policy/loss"] == figures["policy/loss"]
    found = iteration(worlds, small_run, "grpo", (1, 1, 2), "env.args={fails: 4, delay: 0.1}")
    assert found["tokens"] == wanted["tokens"]
    assert found["figures"]["policy/grad_norm"] == pytest.approx(figures["policy/grad_norm"], rel=1e-4)
    kept = iteration(worlds, small_run, "grpo", (1, 1, 1), "env.args={fails: 4}", "env.on_failure=zero")
    assert kept["tokens"] == wanted["tokens"]
    assert kept["figures"]["rollout/response_length"] > figures["rollout/response_length"]


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1)], ids=str)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["env.args={fails: 4}", "env.on_failure=stop"], r"sample \d+: env.fn=talkers:Teller: step raised RuntimeE"),
        (["env.args={fails: 1}"], "grpo: all 16 trajectories have failed, the first: sample 0: env.fn=talkers:Teller"),
    ],
    ids=["stop", "all"],
)  # fmt: skip
def test_a_failure_that_ends_the_run_names_its_row(worlds, small_run, layout, options, says):
    with pytest.raises(AssertionError, match=says):
        iteration(worlds, small_run, "grpo", layout, *options)


@pytest.mark.parametrize("phase", PHASES)
def test_a_model_answers_the_same_on_every_mesh(worlds, small_run, phase):
    """The first words too, several times in a turn, in rollouts that wait for some of the answers."""
    own = ["env.fn=talkers:Asker", f"user.path={small_run}/sft/hf", "user.max_new_tokens=12"]
    wanted = iteration(worlds, small_run, phase, (1, 1, 1), *own)
    assert wanted["figures"]["env/turns"] > 1.5 and wanted["figures"]["env/asked"] > 2
    assert wanted["figures"]["env/failed"] == 0
    assert len({tuple(row) for row in wanted["tokens"]}) == len(wanted["tokens"])
    hot = iteration(worlds, small_run, phase, (1, 1, 1), *own, "user.temperature=0.5")
    assert hot["tokens"] != wanted["tokens"]
    for layout, more in (
        ((2, 1, 1), ["rollout.slots=5"]),
        ((1, 2, 1), ["schedule.residency=offload"]),
        ((1, 1, 2), ["rollout.kv_tokens=400"]),
    ):
        found = iteration(worlds, small_run, phase, layout, *own, "env.args={delay: 0.1}", *more)
        assert found["tokens"] == wanted["tokens"]
        for name, value in wanted["figures"].items():
            if name not in ("env/idle", "rollout/preempted"):
                assert found["figures"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_recorded_trajectories_give_the_same_figures(worlds, small_run):
    wanted = iteration(worlds, small_run, "ppo", (1, 1, 1), "ppo.write_arrays=true")
    folder = small_run / "nowhere" / "ppo" / "rollouts"
    for layout in ((1, 1, 1), (2, 1, 1)):
        found = iteration(worlds, small_run, "ppo", layout, f"rollout.replay={folder}")
        assert found["tokens"] == wanted["tokens"]
        for name, value in found["figures"].items():
            assert value == pytest.approx(wanted["figures"][name], rel=1e-4, abs=1e-5), name
            assert value == wanted["figures"][name] or layout[0] == 2
    with pytest.raises(AssertionError, match="has 16 responses, and an iteration 8"):
        iteration(worlds, small_run, "ppo", (1, 1, 1), f"rollout.replay={folder}", "ppo.prompts_per_iteration=8")
    with pytest.raises(AssertionError, match=r"was written with env\.fn"):
        iteration(worlds, small_run, "ppo", (1, 1, 1), f"rollout.replay={folder}", "env.fn=null", "reward.fns=[length]")


def test_environments_run_without_training(small_run, tmp_path):
    """As a job, whose rows have all turns."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    said = ["How are you?", "Again.", "And you?"]
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in said))
    launch(
        "+exp=generate", f"policy.path={small_run}/sft/hf", f"data.sources=[{rows}]", f"output={out}", "mesh.dp=1",
        "env.fn=talkers:Teller", "rollout.stop=[e,o]", "rollout.max_new_tokens=20", "env.max_tokens=100",
    )  # fmt: skip
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [text in row["prompt"] for text, row in zip(said, found, strict=True)] == [True] * 3
    for row in found:
        assert row["failure"] is None and len(row["tokens"]) == len(row["sampled"]) == len(row["log_probs"])
        assert "".join(turn["text"] for turn in row["turns"]) == row["response"]
        assert [turn["by"] for turn in row["turns"]][::2] == ["policy"] * (len(row["turns"]) // 2 + 1)
        assert row["score"] == pytest.approx(sum(turn.get("reward", 0) for turn in row["turns"]), abs=1e-5)
    assert sum("<|im_end|> you" in row["response"] for row in found) > 0  # control tokens in text stay text


def test_a_second_model_speaks_as_the_user(small_run, tmp_path):
    """As a job, in which it has the first word too; of a folder that is not there, and with rows that lack a field."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "Hello", "goal": each}) + "\n" for each in ("a nut", "a bolt")))
    own = [
        "+exp=generate", f"policy.path={small_run}/sft/hf", f"data.sources=[{rows}]", f"output={out}", "mesh.dp=1",
        "env.fn=user", "rollout.max_new_tokens=12", "env.max_tokens=80", "env.max_turns=3", "user.max_new_tokens=8",
        "rollout.stop=[e,o]",
    ]  # fmt: skip
    args = 'env.args={role: "You want {goal}", opens: true}'
    launch(*own, f"user.path={small_run}/sft/hf", args)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == 2 and not any(row["failure"] for row in found)
    assert all({turn["by"] for turn in row["turns"]} == {"policy", "environment"} for row in found)
    assert not any("Hello" in row["prompt"] for row in found) and found[0]["prompt"] != found[1]["prompt"]
    refused = launch(*own, f"user.path={tmp_path}", args, "rerun=true", check=False)
    assert refused.returncode and f"{tmp_path}/config.json" in refused.stderr
    refused = launch(*own, f"user.path={small_run}/sft/hf", args.replace("goal", "aim"), "rerun=true", check=False)
    assert refused.returncode and "role names {aim}, and the row has no 'aim'" in refused.stderr


def test_the_examples_of_the_page_play(monkeypatch):
    """The environments that docs/environments.md shows."""
    page = (ROOT / "docs" / "environments.md").read_text()
    code, judge = re.findall(r"```python\n(.*?)```", page, re.S)
    assert 15 < len(code.splitlines()) <= 30
    names: dict = {}
    exec(code, names)
    game = Trajectory(names["Guess"], {"most": 20})
    assert "from 1 to 20" in json.loads(game.reset({"messages": [], "seed": 6}))["messages"][0]["content"]
    said = [json.loads(game.step({"role": "assistant", "content": text})) for text in ("a lot", "3", "19", "7")]
    assert [each["messages"][0]["content"] for each in said[:3]] == [
        "A number, please.",
        "It is higher.",
        "It is lower.",
    ]
    assert said[3]["terminated"] and said[3]["reward"] == 1.0 and said[3]["info"] == {"turns_to_win": 4.0}
    monkeypatch.setattr(model, "ask", lambda messages: "Yes." if "2 and 2" in messages[0]["content"] else "No.")
    exec(judge, names)
    for question, reward in {"2 and 2?": 1.0, "2 and 3?": 0.0}.items():
        trial = Trajectory(names["Judged"], {})
        trial.reset({"messages": [{"role": "user", "content": question}]})
        assert json.loads(trial.step({"role": "assistant", "content": "4"}))["reward"] == reward


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"env": {"args": {"a": 1}}}, "env.args={'a': 1} belongs to env.fn, which is not set"),
        ({"phases": ["sft", "reward", "ppo"], "env": {"fn": "guess"}}, "phases has reward, whose model would score"),
        ({"env": {"fn": "guess"}, "rollout": {"tail": "carry"}}, "rollout.tail=carry goes on with single turns"),
        ({"env": {"fn": "guess", "max_tokens": 8}}, "env.max_tokens=8 is less than one turn may have"),
        ({"env": {"fn": "guess", "max_turns": 0}}, "env.max_turns=0 must be at least 1"),
        ({"env": {"fn": "guess", "args": 3}}, "env.args=3 is not a mapping"),
        ({"env": {"fn": "user"}}, "env.fn=user has no model to ask: user.path=DIR names an HF folder"),
        ({"user": {"path": "m"}}, "user.path=m answers for an environment, and env.fn is not set"),
        ({"env": {"fn": "user"}, "user": {"path": "m", "top_p": 2.0}}, "user.top_p=2.0 must lie in"),
        (
            {"env": {"fn": "user"}, "user": {"path": "m", "max_new_tokens": 0}},
            "user.max_new_tokens=0 must be at least 1",
        ),
        (
            {"env": {"fn": "guess"}, "grpo": {"score_scale": True, "credit": "turn"}},
            "grpo.score_scale=True changes scores",
        ),
    ],
)
def test_refusals(settings, says):
    with pytest.raises(ConfigError, match=says):
        config = from_dict(RunConfig, {"phases": ["grpo"], **settings})
        check_env(config.env, config.user, config.rollout, config.phases)
        check_turns("grpo", config.grpo, config.env)


def test_a_template_that_cannot_go_on_is_refused_before_the_run(small_run):
    """One that shows no tools, with an environment that has some."""
    said = launch(
        "+exp=hh_rlhf", "phases=[grpo]", f"policy.path={small_run}/sft/hf", f"output_dir={small_run}/nowhere",
        "env.fn=calculator", "data.num_rows=64", "data.num_eval_rows=8", check=False,
    )  # fmt: skip
    assert said.returncode and "does not show how tools are called: set tokenizer.tool_calls" in said.stderr


@pytest.mark.parametrize(
    ("options", "args"),
    [
        (["env.args={most: 9}"], {"most": 9}),
        (["env.args.most=9", "env.args.few=[1,2]"], {"most": 9, "few": [1, 2]}),
        (["+exp=tool_sums", "env.fn=a:B", "env.args={most: 9}"], {"most": 9}),
        (["+exp=tool_sums", "env.args={}"], {}),
    ],
)
def test_arguments_of_an_environment_are_the_users(options, args):
    assert cases.compose(options).env.args == args
