"""Environments: their contract, what one can do to others and to a run, and the built-in ones."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import pytest

from rlhf_engine.config import ConfigError, EnvConfig
from rlhf_engine.environments import model, retrieve, user
from rlhf_engine.environments.calculator import Calculator, evaluate, shown
from rlhf_engine.environments.guess import Guess
from rlhf_engine.environments.load import check_environment
from rlhf_engine.environments.pool import Answer, Environments
from rlhf_engine.environments.python import Python
from rlhf_engine.environments.tools import ToolEnvironment
from rlhf_engine.signals import RunError

PROMPT = [{"role": "user", "content": "Begin?"}]


def row(**fields) -> dict:
    return {"messages": PROMPT, "seed": 1, **fields}


def said(content: str = "yes", **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def calls(*arguments: dict, name: str = "calculator") -> dict:
    made = [
        {"id": f"call{i:05}", "type": "function", "function": {"name": name, "arguments": given}}
        for i, given in enumerate(arguments)
    ]
    return said("", tool_calls=made)


def opened(fn: str, timeout: float = 20.0, **args):
    return closing(Environments(EnvConfig(fn=fn, args=args, timeout=timeout)))


def only(environments: Environments) -> Answer:
    (answer,) = environments.answers(None)
    return answer


def is_there(pid: int | str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return ") Z " not in stat.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(true, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    psutil = pytest.importorskip("psutil")
    return [process.pid for process in psutil.Process(pid).children(recursive=True) if is_there(process.pid)]


# -- the contract ------------------------------------------------------------------------------------------------


def test_turns():
    """One object for a trajectory, whose state is its own; rewards, info and the end come as they are given."""
    with opened("envs:Counter", answer="more?", last=3) as environments:
        environments.begin(7, row())
        assert only(environments) == Answer(7, PROMPT)
        environments.begin(9, row())
        assert only(environments).number == 9
        for turn in (1, 2, 3):
            environments.act(7, said())
            answer = only(environments)
            expected = [] if turn == 3 else [{"role": "user", "content": "more?"}]
            assert answer == Answer(7, expected, float(turn), turn == 3, info={"count": float(turn)})
        environments.act(9, said())
        assert only(environments).reward == 1.0
        assert environments.answers(0) == [] == environments.answers(None)


def test_coroutines_share_a_loop():
    with opened("envs:Async", last=2) as environments:
        environments.begin(0, row(style="terse"))
        assert only(environments).messages == [{"role": "system", "content": "terse"}, *PROMPT]
        environments.act(0, said())
        assert only(environments).messages == [{"role": "user", "content": "go on"}]
        environments.act(0, said())
        assert only(environments).terminated


@pytest.mark.parametrize(
    ("fn", "args", "reward"), [("length", {}, 4.0), ("length", {"most": 3}, 3.0), ("later", {}, 2.0)]
)
def test_a_function_is_one_turn(fn, args, reward):
    with opened(f"envs:{fn}", **args) as environments:
        environments.begin(0, row(most=5))
        assert only(environments) == Answer(0, PROMPT)
        environments.act(0, said("four"))
        assert only(environments) == Answer(0, reward=reward, terminated=True)


USER, TOOL, SYSTEM = ({"role": role, "content": "x"} for role in ("user", "tool", "system"))


@pytest.mark.parametrize(
    ("given", "action", "messages"),
    [
        ("'x'", said(), [USER]),
        ("'x'", said(tool_calls=[{"id": "1"}]), [TOOL]),
        ("'x'", said(error="no JSON"), [USER]),
        ("{'role': 'tool', 'content': 'x', 'tool_call_id': '1'}", said(), [TOOL | {"tool_call_id": "1"}]),
        (f"[{TOOL}, {SYSTEM}, {USER}]", said(), [TOOL, SYSTEM, USER]),
        (f"({USER},)", said(), [USER]),
        ("'\\ud800 \\0 火'", said(), [{"role": "user", "content": "? \0 火"}]),
        ("''", said(), [{"role": "user", "content": ""}]),
    ],
)
def test_observations(given, action, messages):
    with opened("envs:Says") as environments:
        environments.begin(0, row(step=f"{given}, Number(), False, False, {{'a': 1, 'b': 'c', 'd': float('nan')}}"))
        only(environments)
        environments.act(0, action)
        assert only(environments) == Answer(0, messages, 0.5, info={"a": 1.0})


def test_an_environment_ends_a_trajectory():
    with opened("envs:Says") as environments:
        environments.begin(0, row(step="'x', 1, False, True, {}"))
        only(environments)
        environments.act(0, said())
        assert only(environments) == Answer(0, [], 1.0, truncated=True)


def test_what_a_reset_gives():
    """Messages and the tools that are there from then on."""
    with opened("envs:Says") as environments:
        for number, (given, messages) in enumerate({"'x'": [USER], f"[{SYSTEM}, {USER}]": [SYSTEM, USER]}.items()):
            environments.begin(number, row(reset=given))
            assert only(environments) == Answer(number, messages)
    with opened("envs:Counter", tools=[{"name": "f"}]) as environments:
        environments.begin(0, row())
        assert only(environments).tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("where", "given", "words"),
    [
        ("reset", "throw(KeyError('door'))", "reset raised KeyError: 'door' (envs.py:"),
        ("reset", "throw(Unsaid())", "reset raised envs.Unsaid"),
        ("reset", "[]", "reset gave [] instead of text or messages"),
        ("reset", "[{'role': 'user'}]", "instead of a message, {'role': …, 'content': text}"),
        ("reset", "[{'role': 'assistant', 'content': ''}]", "ends with what the assistant says"),
        ("reset", "{'role': 'judge', 'content': ''}", "role 'judge': known: user, tool, system, assistant"),
        ("reset", "5", "reset gave 5 instead of text or messages"),
        ("reset", "setattr(self, 'tools', [throw])", "NameError"),
        ("step", "throw(ValueError('two\\nlines'))", "step raised ValueError: two lines (envs.py:"),
        ("step", "sys.exit(3)", "step raised SystemExit: 3"),
        ("step", "os._exit(3)", "step ended its process (exit code 3)"),
        ("step", "ctypes.string_at(0)", "step ended its process (SIGSEGV)"),
        ("step", "('x', 1, False, {})", "step gave 4 values instead of (observation, reward, terminated"),
        ("step", "None", "step gave NoneType instead of"),
        ("step", "('x', None, False, False, {})", "None instead of a finite number as reward"),
        ("step", "('x', '1', False, False, {})", "'1' instead of a finite number as reward"),
        ("step", "('x', float('nan'), False, False, {})", "nan instead of a finite number as reward"),
        ("step", "('x', 10**400, False, False, {})", "instead of a finite number as reward"),
        ("step", "('x', 1, 0, False, {})", "0 instead of True or False as terminated"),
        ("step", "('x', 1, False, None, {})", "None instead of True or False as truncated"),
        ("step", "('x', 1, False, False, None)", "None instead of a dict as info"),
        ("step", "(None, 1, False, False, {})", "None instead of text or messages, and the trajectory is not over"),
        ("step", "(b'x', 1, False, False, {})", "b'x' instead of text"),
        ("step", "({'role': 'assistant', 'content': ''}, 1, False, False, {})", "known: user, tool, system"),
        ("step", "({'role': 'tool', 'content': '', 'of': throw}, 1, False, False, {})", "step gave what is no JSON"),
        ("step", "scribble()", "what step gave is no answer"),
        ("step", "os.closerange(3, 99)", "step ended its process (exit code 1)"),
    ],
)  # fmt: skip
def test_failures(where, given, words):
    """Each is one line, and costs its own trajectory alone."""
    with opened("envs:Says") as environments:
        environments.begin(0, row(**{where: given}))
        environments.begin(1, row(step="'fine', 0, False, False, {}"))
        found = {answer.number: answer for answer in [*environments.answers(None), *environments.answers(5)]}
        if where == "step":
            assert found[0] == Answer(0, PROMPT)
            environments.act(0, said())
            found[0] = only(environments)
        failure = found[0].failure
        assert failure is not None and failure.startswith("env.fn=envs:Says: ") and "\n" not in failure
        assert words in failure, failure
        assert found[0] == Answer(0, failure=failure)
        environments.end(0)
        environments.act(1, said())
        assert only(environments).messages == [{"role": "user", "content": "fine"}]


def test_no_function_gives_text():
    with opened("envs:bad") as environments:
        environments.begin(0, row())
        only(environments)
        environments.act(0, said())
        assert "the function gave 'much' instead of a finite number" in only(environments).failure


def test_one_that_ends_between_its_turns():
    with opened("envs:Says") as environments:
        environments.begin(0, row(reset="__import__('threading').Timer(0.1, os._exit, (4,)).start()"))
        only(environments)
        wait_for(lambda: not descendants(environments._process.pid))
        assert environments.answers(0) == []
        environments.act(0, said())
        assert "what it has left running ended its process (exit code 4)" in only(environments).failure


# -- many, and what they cost ------------------------------------------------------------------------------------


def test_one_that_takes_too_long(tmp_path):
    """It is ended with what it has started, whether it sleeps or computes, and no other waits."""
    with opened("envs:Says", timeout=5.0) as environments:
        environments.begin(0, row(reset=f"hang({str(tmp_path / 'pids')!r})"))
        environments.begin(1, row(step="[0 for _ in iter(int, 1)]"))
        environments.begin(2, row(step="'x', 0, False, False, {}"))
        environments.wait()
        begun = time.monotonic()
        found = {answer.number for _ in range(2) for answer in environments.answers(2)}
        assert found == {1, 2}
        environments.act(1, said())
        for _ in range(20):
            environments.act(2, said())
            assert only(environments).number == 2
        assert time.monotonic() - begun < 5.0
        late = {answer.number: answer.failure for _ in range(2) for answer in environments.answers(10)}
        assert late == {
            0: "env.fn=envs:Says: reset took longer than env.timeout=5 s",
            1: "env.fn=envs:Says: step took longer than env.timeout=5 s",
        }
        numbers = (tmp_path / "pids").read_text().split()
        assert len(numbers) == 2
        wait_for(lambda: not any(map(is_there, numbers)))
        environments.act(2, said())
        assert only(environments).number == 2


ASK = [{"role": "user", "content": "who?"}]


def test_an_environment_asks_the_model():
    """As often as it likes; others are answered meanwhile, and the model's time is not its own."""
    with opened("envs:Asks", timeout=3.0) as environments:
        environments.begin(0, {"messages": ASK, "ask": ASK, "opens": True})
        environments.begin(1, {"messages": ASK, "ask": ASK})
        found = environments.answers(None)
        while len(found) < 2:  # they may come together
            found += environments.answers(None)
        first, second = sorted(found, key=lambda answer: answer.number)
        assert first.asks == ASK and first.messages == [] and second.asks is None
        assert environments.answers(None) == []  # nobody is at work
        environments.tell(0, "I am")
        assert only(environments).messages == [{"role": "user", "content": "I am"}]
        environments.act(1, {"role": "assistant", "content": "?"})
        environments.end(0)
        assert only(environments).asks == ASK
        time.sleep(3.3)
        assert environments.answers(0) == []  # it is not late
        environments.tell(1, "it is \ud800 me")
        told = only(environments)
        assert (told.messages, told.reward) == ([{"role": "user", "content": "it is ? me"}], 1.0)


def test_one_that_asks_and_fails():
    with opened("envs:Asks", timeout=2.5) as environments:
        asked = {"messages": ASK, "ask": ASK, "times": 2}
        others = {"ask": "who?"}, {"ask": []}, {"sleeps": 60}, {"ask": [{"role": "user"}]}, {"sleeps": 1.5}
        for i, other in enumerate(({}, *others)):
            environments.begin(i, asked | other)
        began = 0
        while began < 6:
            began += len(environments.answers(5))
        for i in range(6):
            environments.act(i, {"role": "assistant", "content": "?"})
        found = {}
        while len(found) < 6:
            for answer in environments.answers(5):
                if answer.asks is None:
                    found[answer.number] = answer.failure
                else:
                    environments.tell(answer.number, "yes")
        assert found[0] is None and found[5] is None  # what it works before and after has its time each
        assert "TypeError: the model is asked with messages, {'role'" in found[1] and "'w'" in found[1]
        assert "end with what another has said" in found[2]
        assert found[3].endswith("step took longer than env.timeout=2.5 s")
        assert "not {'role': 'user'}" in found[4]


def test_one_that_ends_while_it_asks():
    with opened("envs:Asks") as environments:
        environments.begin(0, {"messages": ASK, "ask": ASK, "opens": True})
        assert only(environments).asks == ASK
        environments.end(0)
        environments.begin(0, {"messages": ASK, "ask": ASK})
        assert only(environments).messages == ASK


def test_the_user_is_a_model(monkeypatch):
    """What it reads, with whose words are whose, and when the dialogue is over."""
    heard, said = [], iter(["A nut.", "No.", "Fine [END]", "Hi.", "Bye [END]"])
    monkeypatch.setattr(user, "ask", lambda messages: heard.append([dict(each) for each in messages]) or next(said))
    row = {
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}],
        "goal": "a nut",
    }
    one = user.User("You want {goal}; say {ends}. {", scored=True)
    assert one.reset(row) == row["messages"] and heard == []
    assert one.step({"role": "assistant", "content": "Yes?"}) == ("A nut.", 0.0, False, False, {})
    assert heard[-1] == [
        {"role": "system", "content": "You want a nut; say [END]. {"},
        {"role": "user", "content": user._FIRST},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Yes?"},
    ]
    assert one.step({"role": "assistant", "content": "A bolt?"})[:3] == ("No.", 0.0, False)
    assert [each["content"] for each in heard[-1][4:]] == ["A nut.", "A bolt?"]
    assert one.step({"role": "assistant", "content": "A nut!"}) == (None, 1.0, True, False, {})
    other = user.User(opens=True)
    assert other.reset(row) == [row["messages"][0], {"role": "user", "content": "Hi."}]
    assert other.step({"role": "assistant", "content": "Bye"})[1:3] == (0.0, True)
    with pytest.raises(ValueError, match=r"role names \{where\}, and the row has no 'where'"):
        user.User("Go {where}").reset(row)
    with pytest.raises(ValueError, match="would end every dialogue at once"):
        user.User(ends=" ")
    with pytest.raises(RuntimeError, match="for the reset and the step of an environment"):
        model.ask(ASK)


def test_nobody_waits_for_one_that_does_not_read():
    """Neither begin nor act does, however much they say."""
    with opened("envs:Says") as environments:
        for number in range(4):
            environments.begin(number, row(step="time.sleep(100)"))
        while environments.answers(None):
            pass
        begun = time.monotonic()
        for number in range(4):
            environments.act(number, said("x" * (8 << 20)))
        environments.begin(4, row(much="x" * (8 << 20)))
        assert only(environments).number == 4 and time.monotonic() - begun < 5
        environments.end(0)
        environments.begin(0, row())  # the same number again, which hears nothing of the other
        assert only(environments) == Answer(0, PROMPT)


def test_an_environment_is_closed(tmp_path):
    """Where it waits for an action, and its process ends; with what that has started last."""
    with opened("envs:Closing") as environments:
        environments.begin(0, row(file=str(tmp_path / "a")))
        environments.begin(1, row(file=str(tmp_path / "b")))
        while environments.answers(None):
            pass
        environments.end(0)
        wait_for((tmp_path / "a").exists)
        wait_for(lambda: not any(map(is_there, (tmp_path / "a").read_text().split())))
    assert not any(map(is_there, (tmp_path / "b").read_text().split()))


def test_a_process_gets_another_trajectory():
    """Unless it has failed, or something is left in it."""
    with opened("envs:Who") as environments:
        count, seen = itertools.count(), set()

        def visited(what: str) -> int:
            number = next(count)
            environments.begin(number, row())
            assert only(environments) == Answer(number, PROMPT)
            environments.act(number, said(what))
            answer = only(environments)
            environments.end(number)
            return int(answer.reward or re.search(r"KeyError: (\d+)", answer.failure)[1])

        def is_known() -> bool:
            pid = visited("")
            return pid in seen or seen.add(pid)

        wait_for(is_known)
        for what in ("raise", "thread", "process", ""):
            pid = visited(what)
            if what == "":
                os.kill(pid, 9)
            wait_for(lambda: not is_there(pid))  # noqa: B023
            assert visited("") != pid


def test_a_thousand_wild_ones():
    """Of each comes an answer to all that it was asked, until it is over; and nothing is left of them."""
    limit, total, seed = 64, 1000, 5
    rng, waiting, turns, outcomes = random.Random(seed), list(range(total)), {}, dict[str, int]()
    with opened("envs:Wild", timeout=1.0) as environments:
        server = environments._process.pid
        open_ones = set()
        while waiting or open_ones:
            while waiting and len(open_ones) < limit:
                number = waiting.pop()
                environments.begin(number, row(seed=number))
                turns[number] = 0
                open_ones.add(number)
            answers = environments.answers(None)
            assert answers
            for answer in answers:
                assert answer.number in open_ones
                is_over = answer.failure is not None or answer.terminated or turns[answer.number] == 6
                if not is_over:
                    assert answer.messages[0]["content"]
                    action = said("Hu 火 \U0001f525" * (1 + turns[answer.number]), turn=turns[answer.number])
                    environments.act(answer.number, action)
                    turns[answer.number] += 1
                    if rng.random() < 0.02:  # somebody has had enough of it
                        is_over = True
                if is_over:
                    environments.end(answer.number)
                    open_ones.remove(answer.number)
                    what = (answer.failure or "well").removeprefix("env.fn=envs:Wild: ")
                    outcomes[what[:20]] = outcomes.get(what[:20], 0) + 1
        assert sum(outcomes.values()) == total and outcomes["well"] > 200, outcomes
        kinds = ("raised KeyError", "took longer", "exit code 7", "SIGSEGV", "b'bytes'", "SystemExit", "None instead")
        assert len(outcomes) > len(kinds), outcomes
        left = descendants(server)
        assert len(left) <= limit  # which wait for more
    assert not any(map(is_there, [server, *left]))


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "sys.exit()", "environments.close()", "os._exit(0)"])
def test_nothing_is_left_of_a_run(tmp_path, how):
    """However it ends, and whatever its environments do then."""
    code = f"""
import os, sys, time
from rlhf_engine.config import EnvConfig
from rlhf_engine.environments.pool import Environments
environments = Environments(EnvConfig(fn="envs:Says"))
for number in range(3):
    environments.begin(number, dict(messages=[], reset=f"hang('{tmp_path}/{{number}}')" if number else "None"))
while not all(os.path.exists(f"{tmp_path}/{{number}}") for number in (1, 2)):
    time.sleep(0.02)
open("{tmp_path}/server", "w").write(str(environments._process.pid))
{how}
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, timeout=60)
    numbers = " ".join((tmp_path / name).read_text() for name in ("1", "2", "server")).split()
    assert len(numbers) == 5
    wait_for(lambda: not any(map(is_there, numbers)))


def test_the_process_of_all_ends(tmp_path):
    with opened("envs:Counter") as environments:
        environments.begin(0, row())
        only(environments)
        os.kill(environments._process.pid, 9)
        environments.act(0, said())
        with pytest.raises(
            RunError, match=r"process that starts env.fn=envs:Counter for all has ended \(exit code -9\)"
        ):
            environments.answers(None)


def test_what_is_shared_is_made_once(tmp_path):
    with opened("envs:Shared", file=str(tmp_path / "f")) as environments:
        for number in range(3):
            environments.begin(number, row())
        found = [answer.messages for _ in range(3) for answer in environments.answers(1)]
    assert found == [[{"role": "user", "content": "by prepare"}]] * 3
    assert (tmp_path / "f").read_text() == "prepared\n"


# -- before a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "args", "words"),
    [
        ("calcluator", {}, "env.fn=calcluator is neither package.module:name nor built in: did you mean calculator?"),
        ("envs:", {}, "env.fn=envs: is neither package.module:name"),
        ("nowhere:Env", {}, "env.fn=nowhere:Env: ModuleNotFoundError"),
        ("envs:Cuonter", {}, "env.fn=envs:Cuonter: there is no Cuonter in envs: did you mean Counter?"),
        ("envs:nothing", {}, "env.fn=envs:nothing is neither a class nor a function"),
        ("envs:NoStep", {}, "env.fn=envs:NoStep has no step(action): an environment has reset(row) and step(action)"),
        ("envs:Counter", {"lst": 3}, "and env.args={'lst': 3}: got an unexpected keyword argument 'lst'"),
        ("envs:Shared", {}, "missing a required argument: 'file'"),
        ("envs:length", {"least": 3}, "as fn(action, row, **env.args): got an unexpected keyword argument 'least'"),
        ("envs:hang", {}, "env.fn=envs:hang takes (file), and env.args={} as fn(action, row, **env.args): too many"),
        ("envs:Unprepared", {}, "env.fn=envs:Unprepared: OSError: no disk"),
        ("envs:Closing", {}, "env.fn=envs:Closing: reset raised KeyError: 'file' (envs.py:"),
        ("guess", {"low": 5, "high": 1}, "env.fn=guess: reset raised ValueError: low=5 is greater than high=1"),
        ("calculator", {"scored": True}, "env.args.scored=true needs 'answer' of each row"),
        ("retrieve", {"file": "/nowhere.txt"}, "env.fn=retrieve: "),
    ],
)  # fmt: skip
def test_refused_before_a_run(fn, args, words):
    with pytest.raises(ConfigError) as refused:
        check_environment(EnvConfig(fn=fn, args=args), [row()])
    assert words in str(refused.value)


@pytest.mark.parametrize("fn", ["calculator", "guess", "envs:Counter", "envs:length", "envs:Deaf"])
def test_what_may_run(fn):
    check_environment(EnvConfig(fn=fn), [row(), row()])
    check_environment(EnvConfig(fn=fn), [])


# -- tools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17+25", "42"), (" 2 * (3 + 4) ", "14"), ("-2**2", "-4"), ("(-2)**3", "-8"), ("7//2", "3"), ("-7 % 3", "2"),
        ("1/3", "0.333333333333"), ("-2/3", "-0.666666666667"), ("1/8", "0.125"), ("-1/40", "-0.025"),
        ("0.1+0.2", "0.3"), ("1e3", "1000"), ("1.50", "1.5"), (".5", "0.5"), ("2**-2", "0.25"),
        ("1,234,567 + 1", "1234568"), ("6×7÷2", "21"),
        ("2^10", "1024"), ("5 − 8", "-3"), ("123456789012345678901234567890*10", "1234567890123456789012345678900"),
        ("0**0", "1"), ("1**999999999999", "1"), ("0.1000000000000000055", "0.1000000000000000055"), ("0/5", "0"),
        ("+ 3", "3"), ("-(1/2)", "-0.5"),
        ("007 + 00", "7"), ("1.005", "1.005"), ("0.50*10", "5"), ("100*1.00", "100"),
    ],
)  # fmt: skip
def test_arithmetic(expression, value):
    assert Calculator().calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("9**9**9", "too large"), ("9**99999", "too large"), ("2**-99999", "too large"), ("(1/3)**99999", "too large"),
        ("(9**2000)*(9**2000)*(9**2000)", "too large"), ("1e9999", "too large"),
        ("1e999999999", "is not a number"), ("1/0", "division by zero"), ("5%0", "division by zero"), ("0**-1", "zero"),
        ("2**0.5", "whole numbers"), ("", "is not an arithmetic expression"), ("2 +", "is not an arithmetic"),
        ("__import__('os')", "is not arithmetic"), ("x", "is not arithmetic"), ("'a'*9", "is not a number"),
        ("True", "is not a number"), ("3j", "is not a number"), ("1,2", "is not arithmetic"),
        ("1 < 2", "is not arithmetic"),
        ("(" * 300 + ")" * 300, "is not an arithmetic"), ("-" * 999 + "1", None), ("+1" * 501, "1002 characters"),
        ("1\0", "is not an arithmetic"), ("~1", "is not arithmetic"), ("1 if 1 else 2", "is not arithmetic"),
    ],
)  # fmt: skip
def test_what_is_no_arithmetic(expression, words):
    begun = time.monotonic()
    answer, _, terminated, _, info = _step(Calculator(), calls({"expression": expression}))
    assert time.monotonic() - begun < 1 and not terminated
    (text,) = [message["content"] for message in answer]
    assert words is None or (text.startswith("error: ") and words in text and info["failed_calls"] == 1.0), text


def test_numbers_are_exact():
    rng = random.Random(0)
    for _ in range(300):
        a, b = (Fraction(rng.randrange(-(10**6), 10**6), 10 ** rng.randrange(5)) for _ in range(2))
        assert Fraction(shown(a)) == a
        sign = rng.choice("+-*")
        expected = {"+": a + b, "-": a - b, "*": a * b}[sign]
        assert evaluate(f"({shown(a)}) {sign} ({shown(b)})") == expected == Fraction(shown(expected))


def _step(environment: ToolEnvironment, action: dict):
    environment.reset(row(answer="5"))
    return environment.step(action)


def test_tools_answer_each_call():
    """What cannot be called is an observation too; a turn that calls nothing is the last."""
    environment = Calculator()
    assert _step(environment, calls({"expression": "1+1"}, {"expression": "2+2"})) == (
        [{"role": "tool", "content": "2"}, {"role": "tool", "content": "4"}],
        0.0, False, False, {"calls": 2.0, "failed_calls": 0.0},
    )  # fmt: skip
    for action, words in {
        "wrong name": (calls({"expression": "1"}, name="calc"), "error: there is no tool calc: there is calculator"),
        "wrong argument": (calls({"text": "1"}), "error: calculator: missing a required argument: 'expression'"),
        "not text": (calls({"expression": 5}), "5"),
    }.values():
        assert environment.step(action)[0] == [{"role": "tool", "content": words}]
    info = {"calls": 1.0, "failed_calls": 1.0}
    assert environment.step(said("x", error="no JSON")) == ("error: no JSON", 0.0, False, False, info)
    info = {"calls": 0.0, "failed_calls": 0.0}
    assert environment.step(said("It is 5.")) == (None, 0.0, True, False, info)


def test_prompts_of_tools():
    """Of a row that demonstrates calls, up to these."""
    earlier = [USER, said("yes"), USER]
    environment = Calculator()
    assert environment.reset({"messages": [*earlier, calls({"expression": "1"}), TOOL]}) == earlier
    assert environment.reset({"messages": earlier}) == earlier
    assert environment.reset({"messages": [said("Hello?")]}) == [said("Hello?")]


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [("5", "2 + 3 = 5.", 1.0), ("5", "5 or 6", 0.0), (1072, "It is 1,072", 1.0), ("so #### 72", "72.0", 1.0),
     ("-3", "-3", 1.0), ("5", "", 0.0), ("none", "none", 0.0)],
)  # fmt: skip
def test_a_score(answer, text, reward):
    environment = Calculator(scored=True)
    environment.reset(row(answer=answer))
    assert environment.step(said(text))[:4] == (None, reward, True, False)


def test_guess():
    environment = Guess(1, 20)
    first = environment.reset(row(seed=4))
    assert first == "Guess a number from 1 to 20." == Guess(1, 20).reset(row(seed=4))
    low, high, told = 1, 20, []
    while not told or not told[-1][2]:
        middle = (low + high) // 2
        told.append(environment.step(said(f"I say {middle}, not 50")))
        low, high = (middle + 1, high) if told[-1][0] == "higher" else (low, middle - 1)
    assert told[-1] == (None, 1.0, True, False, {"guesses": 1.0}) and len(told) <= 5
    assert environment.step(said("none"))[0] == "Say a number from 1 to 20."


def test_an_interpreter_keeps_its_state(isolated):
    with closing(Python(timeout=10.0, max_output=200)) as environment:
        told = [
            environment.python(code)
            for code in (
                *("x = 3\nx * 2", "x += 1", "print('é', x)\nx", "1/0", "def f():\n    raise KeyError(x)\nf()", "if"),
                *("input()", "exit()", "x", "print('y' * 1000)", "import sys; sys.stderr.write('warned')", "\ud800"),
            )
        ]
    assert told[:3] == ["6", "(nothing was printed)", "é 4\n4"]
    assert told[3].endswith("ZeroDivisionError: division by zero") and "1/0" in told[3]
    assert told[4].splitlines()[-2:] == ["    raise KeyError(x)", "KeyError: 4"]
    assert "SyntaxError" in told[5] and "interpreter" not in told[5] and "EOFError" in told[6]
    assert "SystemExit" in told[7] and told[8] == "4"
    assert len(told[9]) < 250 and "[… 800 characters …]" in told[9]
    assert told[10].startswith("warned") and "Error" in told[11]


def test_an_interpreter_is_isolated_and_begins_anew(isolated):
    with closing(Python(timeout=1.5, memory=0.5)) as environment:
        for code, words in {
            "x = 1\nopen('/etc/passwd')": "FileNotFoundError",
            "import os\nos.listdir('/proc/1')": "FileNotFoundError",
            "os.fork()": "PermissionError",
            "import socket\nsocket.create_connection(('127.0.0.1', 1))": "OSError",
            "bytearray(1 << 30)": "MemoryError",
            "x": "1",
            "os._exit(3)": "error: the interpreter ended",
            "x ": "NameError",
            "while True: pass": "error: the interpreter took longer than 1.5 s",
            "os.write(1, b'no')": "NameError",
            "import os; os.write(1, b'no')": "2",
        }.items():
            assert words in environment.python(code), code
        process = environment._process
    assert process.poll() is not None


def test_an_interpreter_with_limits_alone():
    environment = Python(isolated=False)
    with closing(environment):
        folder = environment.python("import os; open('x', 'w').close(); os.getcwd()").strip("'")
        assert os.path.exists(f"{folder}/x")
    assert not os.path.exists(folder)


def test_interpreters_end_with_their_trajectory(isolated):
    with opened("python", timeout=5.0) as environments:
        for number in range(2):
            environments.begin(number, row())
        while environments.answers(None):
            pass
        environments.act(0, calls({"code": "1 + 1"}, name="python"))
        assert only(environments).messages == [{"role": "tool", "content": "2"}]
        environments.act(1, calls({"code": "while True: pass"}, name="python"))
        wait_for(lambda: len(descendants(environments._process.pid)) >= 4)
        for number in range(2):
            environments.end(number)
        wait_for(lambda: len(descendants(environments._process.pid)) <= 1)  # the first waits for another trajectory


def test_search(tmp_path):
    pytest.importorskip("bm25s")
    file = tmp_path / "facts.jsonl"
    rows = [{"title": "Owls", "text": "Owls hunt at night."}, {"text": "Cats sleep by day."}, {"text": "Rain falls."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = retrieve.Retrieve(str(file), k=1)
    assert environment.search("who hunts? owls at night") == "[1] Owls: Owls hunt at night."
    assert environment.search("cats night", 9).count("[") == 2
    assert environment.search("zebra") == environment.search("") == "nothing was found"
    text = tmp_path / "facts.txt"
    text.write_text("Owls hunt\nat night.\n\n\nCats sleep.\n")
    assert retrieve.Retrieve(str(text)).search("night") == "[1] Owls hunt at night."
    with opened("retrieve", file=str(text)) as environments:
        environments.begin(0, row())
        assert only(environments).tools == retrieve.Retrieve.tools
        environments.act(0, calls({"query": "cats", "k": 1}, name="search"))
        assert only(environments).messages == [{"role": "tool", "content": "[1] Cats sleep."}]
    for content, words in (
        ("", "has no passages"),
        ('{"text": "a"}\n5\n', "facts.jsonl:2 is not an object with 'text'"),
    ):
        file.write_text(content)
        retrieve.indexed.cache_clear()
        with pytest.raises(ConfigError, match=words):
            retrieve.Retrieve(str(file))


def test_search_without_its_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    retrieve.indexed.cache_clear()
    with pytest.raises(ConfigError, match=r"needs bm25s: pip install -e '.\[retrieve\]'"):
        retrieve.Retrieve(str(tmp_path))
