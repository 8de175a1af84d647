"""One experiment under every launcher: equal figures, a stop that saves, an end within seconds when a rank fails.

Slurm's and Ray's clusters are real ones of two nodes on this machine (tests/clusters.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import clusters
import psutil
import pytest
import warm
import worlds
from clusters import PATIENCE, wait_until
from conftest import ROOT, SMALL
from test_runs import assert_close, figures

from rlhf_engine import signals
from rlhf_engine.launching import ranks
from rlhf_engine.launching.compose import compose
from rlhf_engine.launching.ranks import PARENT, end_with_parent
from rlhf_engine.signals import STOPPED, answer

RUN = [sys.executable, "launch/run.py"]
PPO = [*SMALL, "phases=[ppo]", "ppo.iterations=4", "ppo.save_every=4", "mesh.dp=2"]
# figures are those of the function that does not wait
HELD = [*PPO, "reward.fns=[rewards:held]"]


def find_reward_functions(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Of tests/rewards.py, in the processes that are started from now on; their files are in the folder."""
    patch.chdir(ROOT)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
    patch.setenv("HELD", str(folder / "held"))


@pytest.fixture(autouse=True)
def reward_functions_are_found(monkeypatch, tmp_path):
    find_reward_functions(monkeypatch, tmp_path)


@contextlib.contextmanager
def started(command: list, folder: Path, terminal: str | None = None):
    """A command that runs, its output in a file or on a terminal; ended with the test."""
    path = folder / "output"
    process = warm.Command(command, terminal or path, terminal or path)
    process.output = path.read_text  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        clusters.end([process])


def ranks_of(launcher: warm.Command) -> list[psutil.Process]:
    return sorted(psutil.Process(launcher.pid).children(), key=psutil.Process.name)


def num_iterations(folder: Path) -> int:
    path = folder / "ppo" / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[dict]:
    """Figures of PPO by `python launch/run.py` on two ranks, never interrupted."""
    folder = tmp_path_factory.mktemp("plain")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    command = [*RUN, *PPO, "reward.fns=[rewards:short_and_polite]", f"output_dir={folder}"]
    warm.run(command, env=environment, cwd=ROOT, check=True)
    return figures(folder / "ppo")


# -- one node ------------------------------------------------------------------------------------------------


TORCHRUN = [sys.executable, "-c", "from torch.distributed.run import main; main()"]


def test_torchrun(plain, tmp_path, monkeypatch):
    """Killed, which ends its ranks too; and the same command once more."""
    monkeypatch.setenv("HELD_AT", "1")
    command = [*TORCHRUN, "--nproc-per-node=2", "launch/run.py", *HELD, f"output_dir={tmp_path}"]
    with started(command, tmp_path) as torchrun:
        wait_until((tmp_path / "held").exists, "the first iteration")
        started_ranks = ranks_of(torchrun)
        torchrun.kill()
        _, alive = psutil.wait_procs(started_ranks, timeout=PATIENCE / 10)
        for rank in alive:
            rank.kill()
        assert len(started_ranks) == 2 and not alive, "ranks outlived their launcher"
    (tmp_path / "held.go").touch()
    assert warm.run(command).returncode == 0
    assert figures(tmp_path / "ppo") == plain


@pytest.mark.parametrize(
    ("launcher", "hangup", "parents"),
    [(None, signal.SIG_DFL, [5, 5, 5, 1]), (None, signal.SIG_IGN, []), ("5", signal.SIG_IGN, [5, 5, 1]),
     ("7", signal.SIG_DFL, [1, 1])],
    ids=["torchrun", "nohup", "ours under nohup", "ours has ended before"],
)  # fmt: skip
def test_a_rank_ends_with_its_parent(monkeypatch, launcher, hangup, parents):
    """`parents`: what it finds each time that it looks, to the last."""
    ended, whole = [], bool(parents)
    monkeypatch.setenv(PARENT, launcher) if launcher else monkeypatch.delenv(PARENT, raising=False)
    monkeypatch.setattr(signal, "getsignal", lambda signum: hangup)
    monkeypatch.setattr(os, "getppid", lambda: parents.pop(0))
    monkeypatch.setattr(os, "write", lambda *args: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(signals.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(signals.threading, "Thread", lambda target, daemon: SimpleNamespace(start=target))
    end_with_parent()
    assert not parents and ended == [1] * whole


def test_under_nohup_a_lost_connection_is_nothing(monkeypatch):
    given: dict = {}
    monkeypatch.setattr(signal, "signal", given.__setitem__)
    monkeypatch.setattr(signal, "getsignal", lambda signum: signal.SIG_IGN)
    answer(lambda signum, frame: None)
    assert given.keys() == {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


@pytest.mark.parametrize("case", ["SIGTERM to the launcher", "SIGUSR1 to one rank", "Ctrl-C", "a lost connection"])
def test_stopped_and_started_again(plain, tmp_path, case):
    """The stage is finished and the state saved, the exit code says so, and the same command makes the run whole."""
    command = [*RUN, *HELD, f"output_dir={tmp_path}"]
    ours, theirs = os.openpty()
    is_remote = case == "a lost connection"
    with started(command, tmp_path, os.ttyname(theirs) if is_remote else None) as launcher:
        wait_until((tmp_path / "held").exists, "the third iteration")
        os.close(theirs)
        if is_remote:
            os.close(ours)  # what comes up now cannot be written any more
        elif case == "SIGTERM to the launcher":
            launcher.terminate()
        elif case == "SIGUSR1 to one rank":
            ranks_of(launcher)[1].send_signal(signal.SIGUSR1)
            (tmp_path / "held.go").touch()  # no other rank was told
        else:
            os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
        assert launcher.wait(PATIENCE) == STOPPED, is_remote or launcher.output()
        if not is_remote:
            assert "start the same again" in launcher.output() and "Traceback" not in launcher.output()
            os.close(ours)
    done = num_iterations(tmp_path)
    assert 2 <= done < 4
    assert (tmp_path / "ppo" / "checkpoints" / "latest").read_text() == f"iteration_{done}"
    result = warm.run(command)
    places = f"at iteration {done} of 4", f"within iteration {done + 1} of 4"
    assert result.returncode == 0 and any(f"ppo: resuming {place}" in result.stdout for place in places)
    assert figures(tmp_path / "ppo") == plain


def addresses_of_the_store() -> set[str]:
    """In a rank: where this process listens at the port where the ranks have met."""
    worlds.mesh(1, 1, 2)
    found = psutil.Process().net_connections("inet")
    port = int(os.environ["MASTER_PORT"])
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


def test_ranks_meet_at_one_address(worlds):
    assert worlds(2).run(addresses_of_the_store) == [{"127.0.0.1"}, set()]


def test_stopped_before_it_trains(tmp_path):
    """While it imports: this one starts cold."""
    with (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen([*RUN, *HELD, f"output_dir={tmp_path}"], stdout=output, stderr=output)
    ranks = psutil.Process(launcher.pid).children

    def is_importing() -> bool:
        return len(ranks()) == 2 and all("libtorch" in str(rank.memory_maps()) for rank in ranks())

    try:
        wait_until(is_importing, "the import of torch")
        launcher.terminate()
        assert launcher.wait(PATIENCE) == STOPPED and not (tmp_path / "output").read_text()
    finally:
        clusters.end([launcher])


def test_second_interrupt_ends_at_once(tmp_path):
    """In a stage that would never end, so that nothing is saved behind it."""
    with started([*RUN, *PPO, "reward.fns=[rewards:hangs]", f"output_dir={tmp_path}"], tmp_path) as launcher:
        wait_until((tmp_path / "held").exists, "the reward function")
        ranks = ranks_of(launcher)
        launcher.send_signal(signal.SIGINT)
        wait_until(lambda: not is_caught(signal.SIGINT, ranks[0].pid), "the note of the first")
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(PATIENCE) == 128 + signal.SIGINT
        assert not any(rank.is_running() for rank in ranks)
    assert not (tmp_path / "ppo" / "checkpoints" / "latest").exists()


def is_caught(signum: int, pid: int) -> bool:
    """Whether a process has a handler for a signal."""
    caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught[1], 16) >> (signum - 1) & 1)


@pytest.mark.parametrize("by_signal", [False, True], ids=["error", "killed"])
def test_a_rank_that_dies_is_heard_first(tmp_path, monkeypatch, by_signal):
    """Its own traceback, or how it was ended, and not what the others make of it."""
    if by_signal:
        monkeypatch.setenv("DIES_BY_SIGNAL", "1")
    result = warm.run([*RUN, *PPO, "reward.fns=[rewards:dies]", f"output_dir={tmp_path}"])
    if by_signal:
        assert result.returncode == 128 + signal.SIGKILL and result.stderr == "rank 0 was ended by SIGKILL\n"
    else:
        assert result.returncode == 1 and result.stderr.count("Traceback") == 1
        assert "ZeroDivisionError: of the reward function" in result.stderr
        assert "in stage score of iteration 0, on rank 0" in result.stderr


def test_a_signal_without_a_name(capfd):
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 40)"]
    started_ranks = ranks.Ranks(command, 3, 1, 4, "127.0.0.1", 1)
    wait_until(lambda: started_ranks.poll() is not None, "its end")
    assert started_ranks.poll() == 128 + 40 and capfd.readouterr().err == "rank 3 was ended by signal 40\n"


def test_a_rank_that_dies_is_started_again(plain, tmp_path, monkeypatch):
    """From the last checkpoint; and not more often than allowed."""
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    command = [*RUN, *PPO, "reward.fns=[rewards:dies_at_times]", "ppo.save_every=1", f"output_dir={tmp_path}"]
    result = warm.run([*command, "max_restarts=1"])
    assert result.returncode == 128 + signal.SIGKILL
    assert "exit code 137: starting again, 0 of max_restarts=1 left" in result.stdout
    result = warm.run([*command, "max_restarts=1"])
    assert result.returncode == 0 and "ppo: resuming at iteration " in result.stdout, result.stderr
    assert "starting again" not in result.stdout and figures(tmp_path / "ppo") == plain


# -- Slurm ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """`sbatch(*arguments)` on a cluster of two nodes: gives the job's id."""
    if not clusters.has_slurm():
        pytest.skip("no Slurm here (Debian: slurmctld slurmd slurm-client munge), or not root")
    with clusters.slurm(tmp_path_factory.mktemp("slurm")) as environment:

        def run(*command: str, python: str = sys.executable) -> str:
            env = environment | {"PYTHON": python} | {name: os.environ[name] for name in ("PYTHONPATH", "HELD")}
            return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()

        yield run


def state(slurm, job: str) -> str:
    return slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def submit(slurm, folder: Path, *arguments: str, **options: str) -> str:
    return slurm("sbatch", "--parsable", f"--output={folder}/output.%a", *arguments, **options)


def interpreter(folder: Path, script: str) -> str:
    """A program that a job runs in place of Python."""
    path = folder / "interpreter"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "launch/slurm/train.sbatch"]


def test_slurm_job_is_preempted_and_goes_on(slurm, plain, tmp_path):
    """On two nodes, which a job of higher priority takes for a while."""
    folder = tmp_path / "a run"
    job = submit(slurm, tmp_path, *TWO_NODES, *HELD, f"output_dir={folder}")
    wait_until((tmp_path / "held").exists, "the third iteration")
    look = f"cp '{folder / 'ppo' / 'metrics.jsonl'}' '{tmp_path / 'seen'}'"  # while the job has no node to go on with
    slurm("sbatch", "--wait", "--partition=urgent", "--nodes=2", "--output=/dev/null", f"--wrap={look}")
    assert 2 <= (tmp_path / "seen").read_text().count("\n") < 4
    wait_until(lambda: state(slurm, job) == "COMPLETED", "the end of the job")
    output = next(tmp_path.glob("output.*")).read_text()
    assert "start the same again" in output and "ppo: resuming " in output
    assert figures(folder / "ppo") == plain


def test_cancelled_slurm_job_stays_cancelled(slurm, tmp_path):
    """Also where all ranks have saved, as when they are preempted."""
    ranks = """
trap 'touch "$HELD.saved.$SLURM_PROCID"; exit 75' TERM
touch "$HELD.$SLURM_PROCID"
while true; do sleep 0.02; done"""
    job = submit(slurm, tmp_path, *TWO_NODES, python=interpreter(tmp_path, ranks))
    wait_until(lambda: all((tmp_path / f"held.{rank}").exists() for rank in (0, 1)), "both ranks")
    slurm("scancel", job)
    wait_until(lambda: state(slurm, job) == "CANCELLED", "the end of the job")
    assert all((tmp_path / f"held.saved.{rank}").exists() for rank in (0, 1))


def test_slurm_array(slurm, tmp_path):
    """A seed a task, one task at a time; a line that is missing is named."""
    seeds = tmp_path / "seeds.txt"
    seeds.write_text("".join(f"seed={n} 'output_dir={tmp_path}/seed {n}'\n" for n in (1, 2)))
    says = """
printf '%s\\n' "$@"
touch "$HELD"
while [ ! -e "$HELD.go" ]; do sleep 0.02; done"""
    array = ["--array=1-3%1", "launch/slurm/train.sbatch", f"@{seeds}", *PPO]
    job = submit(slurm, tmp_path, *array, python=interpreter(tmp_path, says))
    wait_until((tmp_path / "held").exists, "the first task")
    reasons = ("squeue", "-h", "-j", job, "-o", "%T %r")
    wait_until(lambda: "PENDING JobArrayTaskLimit" in slurm(*reasons), "its turn of the second")
    assert slurm(*reasons).count("RUNNING") == 1
    (tmp_path / "held.go").touch()
    wait_until(lambda: not {"PENDING", "RUNNING", "COMPLETING"} & set(state(slurm, job).split()), "the array")
    assert sorted(state(slurm, job).split()) == ["COMPLETED", "COMPLETED", "FAILED"]
    for n in (1, 2):
        said = (tmp_path / f"output.{n}").read_text().splitlines()
        assert said == ["launch/run.py", *PPO, f"seed={n}", f"output_dir={tmp_path}/seed {n}"]
        config = compose(said[1:])
        assert (config.seed, config.output_dir) == (n, f"{tmp_path}/seed {n}")
    assert f"error: {seeds} has no line 3" in (tmp_path / "output.3").read_text()


# -- Ray -----------------------------------------------------------------------------------------------------


def runs(process: psutil.Process, program: str) -> bool:
    """Whether a process, if it is still there, is one of a program."""
    with contextlib.suppress(psutil.Error):
        return any(word.endswith(program) for word in process.cmdline()[:2])
    return False


def test_ray(plain, tmp_path, monkeypatch):
    """On two nodes: stopped and started again; then one of the nodes is killed, and the run goes on with the other."""
    pytest.importorskip("ray")
    monkeypatch.setenv("HELD_AT", "1")
    with clusters.ray() as (address, nodes):
        command = [sys.executable, "launch/ray/run.py", "--address", address, *HELD, f"output_dir={tmp_path}"]
        command += ["ppo.save_every=1", "max_restarts=1"]
        with started(command, tmp_path) as driver:
            wait_until((tmp_path / "held").exists, "the first iteration")
            driver.terminate()
            assert driver.wait(PATIENCE) == STOPPED, driver.output()
        for name in ("held", "held.go", "output"):
            (tmp_path / name).unlink()
        with started(command, tmp_path) as driver:
            wait_until((tmp_path / "held").exists, "an iteration more")
            on_two = figures(tmp_path / "ppo")
            family = psutil.Process(nodes[1].pid).children(recursive=True)
            lost = [process for process in family if runs(process, "launch/run.py")]
            next(process for process in family if runs(process, "raylet")).kill()
            _, alive = psutil.wait_procs(lost, timeout=PATIENCE)
            assert len(lost) == 1 and not alive, "a rank outlived its node"
            (tmp_path / "held.go").touch()
            assert driver.wait(PATIENCE) == 0, driver.output()
            # which rank is on which node is Ray's choice
            assert re.search(r"error: the node of ranks ([01]) to \1: ", driver.output()), driver.output()
            assert "starting again on 1 replicas, 0 of max_restarts=1 left" in driver.output()
            assert driver.output().count("ppo: resuming ") == 2
    assert on_two and on_two == plain[: len(on_two)]
    assert_close(figures(tmp_path / "ppo"), plain, 1e-4)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_ray_node_that_is_lost_before_its_ranks_start(monkeypatch, capsys, restarts):
    """Counts like one that is lost later. Ray is played here: its second node, as long as there is one, has died."""
    ray = pytest.importorskip("ray")
    from launch.ray import run as driver

    alive, argvs = [2], []

    def start(argv, first, *others):
        argvs.append(argv)
        return ray.exceptions.ActorDiedError() if first == 1 else None

    def get(refs, timeout=None):
        found = [one() for one in refs] if isinstance(refs, list) else [refs()]
        for value in found:
            if isinstance(value, Exception):
                alive[0] = 1
                raise value
        return found if isinstance(refs, list) else found[0]

    def answers(method):
        return SimpleNamespace(remote=lambda *args: lambda: method(*args))

    node = SimpleNamespace(
        place=answers(lambda: ("127.0.0.1", 1)), start=answers(start), poll=answers(lambda: (b"done\n", 0))
    )
    actor = SimpleNamespace(options=lambda **about: SimpleNamespace(remote=lambda *args: node))
    monkeypatch.setattr(driver, "placement_group", lambda *args, **about: SimpleNamespace(wait=lambda seconds: True))
    monkeypatch.setattr(driver, "PlacementGroupSchedulingStrategy", lambda *args, **about: None)
    monkeypatch.setattr(driver, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(driver, "answer", lambda how: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1}}] * alive[0])
    monkeypatch.setattr(ray, "remote", lambda kind: actor)
    monkeypatch.setattr(ray, "kill", lambda node: None)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    for name in (driver.LAUNCH, driver.ATTEMPT):
        monkeypatch.setenv(name, "")
    argv = ["+exp=hh_rlhf", "device=cpu", "mesh.dp=2", f"max_restarts={restarts}"]
    assert driver.run(argv) == (0 if restarts else 1)
    said = capsys.readouterr().out
    assert said.startswith("error: a node was lost before its ranks were started: ActorDiedError: ")
    if restarts:
        assert argvs == [argv, argv, [*argv, "mesh.dp=1"]]
        assert said.endswith("starting again on 1 replicas, 0 of max_restarts=1 left\ndone\n")


def test_ray_that_is_not_installed():
    code = "import runpy, sys; sys.modules['ray'] = None; runpy.run_path('launch/ray/run.py', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: Ray is not installed here: pip install -e '.[ray]'\n")


def test_ray_without_a_cluster_is_refused(tmp_path):
    pytest.importorskip("ray")
    command = [sys.executable, "launch/ray/run.py", "--address=127.0.0.1:9", *PPO]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: --address=127.0.0.1:9: no Ray cluster there")


@pytest.mark.parametrize(
    ("slots", "mesh", "counts"),
    [
        ([8, 8], {}, [8, 8]),
        ([8, 8], {"tp": 4, "dp": 3}, [8, 4]),
        ([7, 6, 1], {"tp": 2}, [6, 6]),
        ([8, 8, 3], {"tp": 2, "pp": 3, "dp": 2}, [8, 4]),
        ([3, 3], {"tp": 2, "pp": 2}, [2, 2]),
    ],
)
def test_ray_keeps_tensor_parallel_groups_on_a_node(slots, mesh, counts):
    pytest.importorskip("ray")
    from launch.ray.run import ranks_per_node
    from rlhf_engine.config import ConfigError, MeshConfig

    assert ranks_per_node(slots, MeshConfig(**mesh)) == counts
    with pytest.raises(ConfigError, match=r"mesh\.tp=16 .* has room for 0"):
        ranks_per_node(slots, MeshConfig(tp=16))
