"""Functions that score responses: what they are called with, the built-in ones, and what they cannot do to a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cases
import graders
import pytest
from conftest import SMALL

from rlhf_engine.config import CodeConfig, ConfigError, JudgeConfig, RewardConfig, RunConfig
from rlhf_engine.data import hh_mini
from rlhf_engine.rewards import judge as judging
from rlhf_engine.rewards import programs
from rlhf_engine.rewards.functions import Sample, check_rows, load
from rlhf_engine.rewards.scoring import Rewards
from rlhf_engine.rollout import engine
from rlhf_engine.signals import RunError


def config(*fns: str, **settings) -> RunConfig:
    return RunConfig(reward=RewardConfig(fns=list(fns), **settings))


def sample(response: str = "b", tokens: tuple[int, ...] = (3, 4), **fields) -> Sample:
    return Sample("a", response, (1, 2), tokens, json.dumps(fields))


def scores(fn: str, *samples: Sample, **settings) -> list[float]:
    """What one function gives, called here."""
    (part,) = load(config(fn, **settings))
    return list(part(list(samples)))


# -- what a function is called with ------------------------------------------------------------------------------


def test_arguments():
    """In this engine's words and in TRL's; a field that a row lacks is None, and one that no row has is not given."""
    samples = [sample("the cat", answer="cat"), sample("a dog", (5,), answer="cat", more=1)]
    assert scores("graders:right", *samples) == [3.02, 3.01]
    assert scores("graders:right", sample()) == [1.02]
    assert scores("graders:as_in_trl", *samples) == [1.0, 0.0]
    assert scores("graders:as_in_trl[answer=more]", sample("1", more="1")) == [1.0]
    verl = [sample("1", reward_model={"ground_truth": "1"}), sample("1", reward_model=None), sample("1")]
    assert scores("exact[answer=reward_model.ground_truth]", *verl) == [1.0, 0.0, 0.0]
    assert scores("graders:as_trls_own[solution=answer]", sample("cat", answer="cat"), *samples) == [1.0, 0.0, 0.0]
    assert scores("graders:of_tokens", *samples) == [7.0, 5.0]
    assert scores("graders:by_place", *samples) == [4.0, 4.0]
    assert scores("graders:by_place_and_name", *samples) == [33.0, 33.0]


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        ("nowhere:f", ["nowhere:f: ModuleNotFoundError"]),
        ("graders:nothing", ["graders:nothing: AttributeError"]),
        ("graders:NoFunction", ["takes ()", "prompts, responses, prompt_tokens, response_tokens, **fields"]),
        ("graders:wrong", ["takes (prompts, answers)", "(prompts, completions, **fields)"]),
        ("math:sqrt", ["math:sqrt takes (x, /)"]),
        ("builtins:dict", ["builtins:dict does not say what it takes"]),
        ("mth", ["mth", "did you mean math?", "package.module:name"]),
        ("exact::heavy", ["exact::heavy", "'heavy' is not a finite number"]),
        ("exact::nan", ["'nan'"]),
        ("exact[answer]", ["NAME::WEIGHT[ARGUMENT=FIELD]"]),
        ("exact[anwser=x]", ["exact[anwser=…]", "did you mean answer?"]),
        ("judge", ["reward.judge.url", "reward.judge.model"]),
    ],
)
def test_refused_before_a_run(fn, words):
    with pytest.raises(ConfigError) as refused:
        load(config(fn))
    assert all(word in str(refused.value) for word in words), str(refused.value)


@pytest.mark.parametrize("key", ["regex", "format"])
def test_a_pattern_that_is_none(key):
    for pattern, words in (("(", "not a regular expression"), (r"Score: \d", "needs one group")):
        with pytest.raises(ConfigError, match=words):
            load(config("judge", judge=JudgeConfig("http://x", "m", pattern=pattern)))
    with pytest.raises(ConfigError, match=rf"reward.{key}=\( is not a regular expression"):
        load(config(key, **{key: "("}))


def test_rows_without_what_a_function_needs():
    rows = [("f:1", {"answer": "1"}), ("f:2", {"solution": "2", "answer": None})]
    check_rows(load(config("graders:right", "length", "graders:as_in_trl")), rows[:1])
    check_rows(load(config("graders:right")), rows)  # which has a value for it
    for fn in ("exact", "graders:as_in_trl"):
        with pytest.raises(
            ConfigError, match=rf"{fn} needs 'answer' of each row, and f:2 has \['answer', 'solution'\]"
        ):
            check_rows(load(config(fn)), rows)
    with pytest.raises(ConfigError, match="needs 'trainer_state'"):
        check_rows(load(config("graders:wants_a_trainer")), rows)
    with pytest.raises(ConfigError, match="judge needs 'rubric'"):
        check_rows(load(config("judge", judge=JudgeConfig("http://x", "m", "{prompt} {rubric} {response}"))), rows)


def scored(overrides: list[str], layout: tuple, is_early: bool) -> tuple[list[int], dict]:
    """The first iteration of PPO, and how many samples were given to functions at a time before they were asked for."""
    begun: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        start = Rewards.start
        patch.setattr(Rewards, "start", lambda self, samples: begun.append(len(samples)) or start(self, samples))
        patch.setattr(engine, "_SECONDS_BETWEEN_REPORTS", -1 if is_early else 1e9)
        found = cases.first_iteration(overrides, layout, "ppo")
    return begun, {key: found[key] for key in ("tokens", "figures", "weights")}


def test_scores_of_rows_begun_early(worlds, tmp_path):
    """Fields of the rows reach a function, and nothing changes where it begins while others are decoded."""
    rows = [{**row, "answer": "x" * (i % 5)} for i, row in enumerate(hh_mini.pairs("helpful-base", "train", 64, 1))]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [*SMALL, "phases=[ppo]", f"data.sources=[{file}]", "rollout.slots=4"]
    settings += [f"output_dir={tmp_path}", "reward.fns=[graders:right::2,length::-0.01]"]
    (none, whole), *_ = worlds(2).run(scored, settings, (1, 1, 2), False)
    (late, same), *_ = worlds(2).run(scored, [*settings, "reward.processes=2"], (1, 1, 2), False)
    (early, again), *_ = worlds(2).run(scored, [*settings, "reward.processes=2"], (1, 1, 2), True)
    assert none == [] and late == [16] and sum(early) == 16 and sum(early[:-1]) > 0
    assert whole == same == again
    figures = whole["figures"]
    assert figures["score/mean"] == pytest.approx(2 * figures["score/right"] - 0.01 * figures["score/length"])
    assert figures["score/length"] == figures["rollout/response_length"]
    answers = figures["score/right"] - figures["score/length"] / 100
    assert 16 * answers == pytest.approx(round(16 * answers), abs=1e-4) and 16 < 16 * answers < 48


# -- the score ---------------------------------------------------------------------------------------------------


def test_the_score_is_a_weighted_sum():
    """Of what has something to say; the figures are means of each function, and tell two of one name apart."""
    called = Rewards(config("length::-0.5", "graders:sometimes::3", "graders:slowly", "graders:right::0"))
    assert called([sample("x", (1, 2, 3), answer="y"), sample("", (1,), answer="yyy")]) == (
        [-1.5 + 3 + 2, -0.5 + 2],
        {"length": 2.0, "sometimes": 1.0, "slowly": 2.0, "right": 2.02},
    )
    with pytest.raises(RunError, match=r"no function of reward\.fns has a number for response 1: ''"):
        Rewards(config("graders:sometimes"))([sample("x"), sample("")])
    assert [p.label for p in load(config("graders:right", "test_rewards:right", "test_rewards:mean"))] == [
        "graders:right", "test_rewards:right", "test_rewards:mean",
    ]  # fmt: skip


def right(responses):
    return [0.0 for _ in responses]


mean = right


def test_processes(tmp_path):
    """They have a sample each, begin early with some, and give what a call of all gives."""
    samples = [sample("x" * i, tuple(range(i)), answer="y" * i) for i in range(6)]
    expected = Rewards(config("graders:right"))(samples)
    early = Rewards(config("graders:right", processes=2))
    early.start([samples[4], samples[1]])
    early.start([sample("never asked for")])
    assert early(samples) == expected and not early._started
    assert early(samples) == expected
    found = Rewards(config("graders:who", processes=3))([sample()] * 12)[0]
    assert os.getpid() not in found and 1 <= len(set(found)) <= 3
    assert Rewards(config("graders:slowly", processes=1))([sample()])[0] == [2.0]


def test_processes_import_what_they_call(isolated, monkeypatch):
    """And not a module of this process alone, which may hold a model."""
    monkeypatch.setitem(sys.modules, "only_here", graders)
    called = Rewards(config("only_here:sometimes::2", "code"))
    assert called([sample("x = 1", tests=["x"])])[0] == [3.0]


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ("exit", RunError, "reward.fns=graders:strange asked for the end of the run: SystemExit\\('no'\\)"),
        ("text", RunError, "graders:strange gave 'one' instead of a number for response 0: 'text'"),
        ("two", RunError, "graders:strange gave 2 scores for 1 responses"),
        ("raise", Exception, "of one response"),
    ],
)
def test_what_a_function_does_wrong(said, error, words, processes):
    called = Rewards(config("graders:strange", processes=processes))
    with pytest.raises(error, match=words) as raised:
        called([sample(said)])
    if said == "raise":
        whole = [str(raised.value), *getattr(raised.value, "__notes__", [])]
        assert "reward.fns=graders:strange raised it for response 0: 'raise'" in "\n".join(whole)
    assert called([sample("well")])[0] == [1.0]


def test_a_process_that_ends_or_hangs(tmp_path):
    """It is said of which response; what hangs is ended, with what it has started, and the others go on."""
    called = Rewards(config("graders:strange", processes=1, timeout=5.0))
    with pytest.raises(RunError, match=r"graders:strange ended its process \(exit code 3\) for the response 'die'"):
        called([sample("die")])
    with pytest.raises(RunError, match=r"took longer than reward.timeout=5 s for the response 'hang "):
        called([sample(f"hang {tmp_path / 'pids'}")])
    assert_ended(tmp_path / "pids")
    assert called([sample("well")])[0] == [1.0]


def assert_ended(file: Path) -> None:
    """The processes whose numbers are in a file end, if not at once then soon."""
    for pid in file.read_text().split():
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
            assert time.monotonic() < deadline, f"process {pid} is still there"
            time.sleep(0.05)


def test_processes_end_with_their_run(tmp_path):
    """However it ends; what a program of a response does not keep it from that, either."""
    program = "import ctypes, os, time\nos.setsid()\nctypes.CDLL(None).prctl(1, 0)\ntime.sleep(1000)"
    code = f"""
import json, os, threading, time
from pathlib import Path
from test_rewards import config, sample
from rlhf_engine.rewards.scoring import Rewards
called = Rewards(config("code", "graders:strange", processes=2))
called.start([sample({program!r}, tests=["1"]), sample("hang {tmp_path}/pids", tests=["1"])])
while not Path("{tmp_path}/pids").exists() or not (found := sandboxes(os.getpid())):
    time.sleep(0.05)
Path("{tmp_path}/sandboxes").write_text(" ".join(found))
os.kill(os.getpid(), 9)
"""
    helper = """
import os
def sandboxes(root):
    import psutil
    return [str(p.pid) for p in psutil.Process(root).children(recursive=True) if "program.py" in p.cmdline()]
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", helper + code], env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == -9
    worker = tmp_path / "worker"
    worker.write_text((tmp_path / "pids").read_text().split()[0])
    assert_ended(worker)
    assert_ended(tmp_path / "sandboxes")
    os.kill(int((tmp_path / "pids").read_text().split()[1]), 9)  # of the function itself, whose concern it is


# -- the built-in ones -------------------------------------------------------------------------------------------


def test_exact():
    found = scores("exact", *(sample(said, answer="72") for said in ("72", " 72\n", "72.", "The answer is 72", "")))
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert scores("exact", sample("5", answer=5), sample("5", answer=5.0)) == [1.0, 0.0]


def test_regex():
    """Of several matches the last one counts; without a group a match is enough."""
    said = ["so #### 72", "#### 1 and #### 72", "#### 72 or #### 1", "72", "####72 apples"]
    assert scores("regex", *(sample(text, answer="72") for text in said)) == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert scores("regex", sample("yes, please"), sample("no"), regex="please|thanks") == [1.0, 0.0]


def test_format():
    good = "<think>\nWell.\n</think>\n<answer>4</answer>\n"
    said = [good, f"So: {good}", good + "!", "<answer>4</answer>", "<think></think><answer></answer>"]
    assert scores("format", *map(sample, said)) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert scores("format", sample("42"), sample("a42"), format=r"\d+") == [1.0, 0.0]


def test_length():
    assert scores("length", sample("x", (1, 2, 3)), sample("x", ())) == [3.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (
            "72",
            ["72", "the answer is 72", r"Thus \boxed{72}.", "72.0", "It is 70 + 2 = 72", "#### 72"],
            ["71", "", "no"],
        ),
        ("1/2", ["0.5", r"so $\frac{1}{2}$", r"\boxed{\dfrac12}"], ["0.51", "2"]),
        ("0.5", ["1/2"], ["1/3"]),
        (r"\frac{1}{2}", [r"\boxed{1/2}"], [r"\boxed{1/3}"]),
        ("She has 6 * 12 = 72.\n#### 1,072", ["1072", "The answer is $1,072$"], ["72"]),
        (r"The roots add to $\boxed{2\sqrt{3}}$.", [r"$\sqrt{12}$"], [r"$\sqrt{13}$"]),
        ("$x^2 - 1$", ["$(x-1)(x+1)$"], ["$x^2$"]),
        (r"\{1,2\}", [r"\boxed{\{2, 1\}}"], [r"\boxed{\{2, 3\}}"]),
        ("50%", [r"\boxed{50\%}"], ["0.6", "5"]),
        (72, ["72"], ["73"]),
    ],
)
def test_math(answer, right, wrong):
    pytest.importorskip("math_verify")
    found = scores("math", *(sample(said, answer=answer) for said in right + wrong))
    assert found == [1.0] * len(right) + [0.0] * len(wrong)


def test_math_of_a_row_without_mathematics():
    pytest.importorskip("math_verify")
    with pytest.raises(RunError, match=r"response 0: '72': ValueError: the row's answer is no mathematics: ''"):
        Rewards(config("math"))([sample("72", answer="")])


def test_math_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"math needs math-verify: pip install -e '.\[math\]'"):
        load(config("math"))


# -- code --------------------------------------------------------------------------------------------------------


def code(said: str, tests, **limits) -> float:
    return scores("code", sample(said, tests=tests), code=CodeConfig(**limits))[0]


DOUBLE = "Think.\n```python\ndef f(x):\n    return 1\n```\nNo:\n```python\ndef f(x):\n    return 2 * x\n```\nDone."


def test_tests(isolated):
    """Assertions and pairs of input and output; the last block counts; a share of them may pass."""
    assert code(DOUBLE, ["assert f(2) == 4", "assert f(0) == 1", "assert f('a') == 'aa'", "f(f)"]) == 0.5
    assert code("def f(x):\n    return 2 * x", "assert f(2) == 4") == 1.0
    twice = "if __name__ == '__main__':\n    print(2 * int(input()), end=' \\n')"
    pairs = {"inputs": ["2\n", "0\n", "x"], "outputs": ["4", "1", ""]}
    assert code(twice, pairs) == pytest.approx(1 / 3) and code(twice, json.dumps(pairs)) == pytest.approx(1 / 3)
    assert code("no program", ["1"]) == 0.0 and code("", ["1"]) == 1.0


@pytest.mark.parametrize("tests", [[], {}, [1], 5, '{"fn": 1}', {"inputs": ["1"], "outputs": []}], ids=repr)
def test_tests_that_are_none(tests):
    with pytest.raises(ValueError):
        programs.read_tests(tests)


@pytest.mark.parametrize(
    "said", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "print('passed')", "exit()"]
)
def test_a_program_that_only_leaves_has_not_passed(isolated, said):
    assert code(said, ["assert False"]) == 0.0


ESCAPES = {
    "a file of the system": "open('/etc/passwd')",
    "a folder of the user's": f"import os\nos.listdir({str(Path(__file__).parent.parent / 'docs')!r})",
    "what others run": "import os\nos.listdir('/proc/1')",
    "a file beside the program's libraries": "open('/usr/x', 'w')",
    "a file in its root": "open('/x', 'w')",
    "a network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 5)",
    "a datagram": "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "a process": "import os\nos.fork()",
    "a command": "import subprocess\nsubprocess.run(['true'])",
    "the run that has started it": "import os\nos.kill(PARENT, 9)",
    "more memory": "bytearray(1 << 30)",
    "more disk": "open('/tmp/x', 'wb').write(bytes(1 << 25))",
    "many files": "for i in range(2000): open(f'/tmp/{i}', 'w').close()",
    "more rights": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "another root": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "memory that is not counted": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_what_a_program_cannot_reach(isolated, escape):
    """It fails there, and not before: the same program without its last line passes."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as listening:
        text = ESCAPES[escape].replace("PORT", str(listening.server_port)).replace("PARENT", str(os.getpid()))
        lines = text.splitlines()
        assert code("\n".join(lines[:-1]), ["1"], memory=0.5) == 1.0
        assert code(text, ["1"], memory=0.5) == 0.0


def test_what_a_program_can_use(isolated):
    """Threads, its own files in /tmp, and libraries."""
    said = "import threading, tempfile, json, ctypes\nt = threading.Thread(target=print)\nt.start()\nt.join()\n"
    assert code(said + "open('/tmp/x', 'w').write('x')\nassert open('/tmp/x').read() == 'x'", ["1"]) == 1.0


def test_a_program_that_does_not_end(isolated):
    """The tests behind it have failed too, and are not waited for."""
    assert code("n = 0", ["n", "while True: pass", "n"], timeout=5.0) == pytest.approx(1 / 3)
    assert code("import time", ["time.sleep(1000)", "n"], timeout=1.0) == 0.0
    assert code("while True: print('x' * 1000)", ["1"], timeout=1.0) == 0.0


def test_limits_alone():
    limits = {"isolated": False}
    assert code("import os\nassert os.path.exists('/proc/1')", ["1"], **limits) == 1.0
    assert code("bytearray(1 << 30)", ["1"], memory=0.5, **limits) == 0.0
    assert code("while True: pass", ["1"], timeout=1.0, **limits) == 0.0


def test_a_system_without_namespaces(monkeypatch):
    monkeypatch.setattr(programs, "run", lambda *job: (98, "unshare: Operation not permitted\n"))
    with pytest.raises(
        ConfigError, match=r"not run isolated here \(unshare: Operation not permitted\): allow namespaces"
    ):
        programs.try_out(CodeConfig())


# -- the judge ---------------------------------------------------------------------------------------------------


@contextmanager
def endpoint(*statuses: int, reply="I think so. Score: 1\nScore: {length}", headers=None):
    """An OpenAI-compatible server: its first answers have these statuses, the others a reply. Gives its address, the
    requests that it has had, and how many it had at once, at most."""
    left, had, lock, at_once = list(statuses), [], threading.Lock(), [0, 0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                had.append((self.path, self.headers.get("Authorization"), body))
                status = left.pop(0) if left else 200
                at_once[0] += 1
                at_once[1] = max(at_once)
            said = reply.format(length=len(body["messages"][0]["content"]))
            answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            with lock:
                at_once[0] -= 1
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(answer))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", had, at_once
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def pauses(monkeypatch):
    """Those between two tries, which nobody waits for."""
    found: list[float] = []
    monkeypatch.setattr(judging.time, "sleep", found.append)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return found


def judge(url: str, folder: Path, **settings) -> Rewards:
    settings = {"prompt": "{response}{answer}", "cache": str(folder / "judge" / "known.jsonl")} | settings
    return Rewards(config("judge", judge=JudgeConfig(url, "m", **settings)))


def test_judge(tmp_path, pauses, monkeypatch):
    """The last number counts; what was asked once is not asked again, in this run or another."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    samples = [sample("x" * i, answer="y") for i in (1, 2, 3, 2)]
    with endpoint() as (url, had, _):
        called = judge(url, tmp_path)
        assert called(samples) == ([2.0, 3.0, 4.0, 3.0], {"judge": 3.0})
        assert called(samples)[0] == [2.0, 3.0, 4.0, 3.0] and len(had) == 3
        assert judge(url, tmp_path)([*samples, sample("xxxx", answer="y")])[0] == [2.0, 3.0, 4.0, 3.0, 5.0]
        assert len(had) == 4 and not pauses
        path, key, body = had[0]
        assert (path, key) == ("/v1/chat/completions", "Bearer secret")
        assert body["model"] == "m" and body["temperature"] == 0 and body["max_tokens"] == 512
        assert judge(url, tmp_path, max_tokens=9)(samples[:1])[0] == [2.0] and len(had) == 5  # another request
    lines = (tmp_path / "judge" / "known.jsonl").read_text().splitlines()
    assert len(lines) == 5 and "secret" not in "".join(lines)
    assert json.loads(lines[-1])["reply"] == "I think so. Score: 1\nScore: 2"
    assert judge(url, tmp_path, pattern=r"so\. Score: (\d)")(samples)[0] == [1.0] * 4  # of the replies that are known
    (tmp_path / "judge" / "known.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    assert len(judge("http://nowhere", tmp_path).parts[0].fn._known) == 1


def test_a_judge_that_is_busy(tmp_path, pauses):
    with endpoint(500, 429, 503, headers={"Retry-After": "9"}) as (url, had, _):
        assert judge(url, tmp_path)([sample("x", answer="y")])[0] == [2.0]
    assert len(had) == 4 and pauses == [9.0, 18.0, 36.0]
    with endpoint(500, 429, headers={"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}) as (url, had, _):
        assert judge(url, tmp_path)([sample("xx", answer="y")])[0] == [3.0]
    assert len(had) == 3 and pauses[3:] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("statuses", "reply", "tries", "words"),
    [
        ([500] * 9, "", 3, "HTTP 500"),
        ([401], "", 1, "HTTP 401 Unauthorized, for the response 'x'"),
        ([], "It is good.", 3, "IndexError"),
        ([], "", 3, "IndexError"),
    ],
)
def test_a_judge_in_vain(tmp_path, pauses, statuses, reply, tries, words):
    with endpoint(*statuses, reply=reply) as (url, had, _), pytest.raises(RunError, match=words) as raised:
        judge(url, tmp_path, retries=2)([sample("x", answer="y")])
    assert len(had) == tries and str(raised.value).startswith(f"reward.fns=judge: {url}/chat/completions: ")


def test_a_judge_that_is_not_there(tmp_path, pauses):
    with pytest.raises(RunError, match="Connection refused"):
        judge("http://127.0.0.1:1", tmp_path, retries=1)([sample("x", answer="y")])
    assert pauses == [1.0]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_requests_at_once(tmp_path, pauses, monkeypatch, concurrency):
    """As many as are allowed, and no more: each waits until that many are there."""
    together, lock, most, now = threading.Barrier(concurrency), threading.Lock(), [0], [0]

    def post(self, request):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait(60)
        with lock:
            now[0] -= 1
        return "Score: 1"

    monkeypatch.setattr(judging.Judge, "_post", post)
    called = judge("http://nowhere", tmp_path, concurrency=concurrency)
    assert called([sample("x" * i, answer="y") for i in range(3 * concurrency)])[0] == [1.0] * 3 * concurrency
    assert most == [concurrency]
