"""Every environment variable that a launcher sets or a library reads: it is taken, or refused in one line."""

from __future__ import annotations

import os
import socket
import subprocess
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist
import worlds

from rlhf_engine.config import ConfigError, RunConfig
from rlhf_engine.launching import environment, preflight
from rlhf_engine.mesh import meeting_place
from rlhf_engine.signals import RunError

TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
# the second node of two, with two tasks each
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "node[01-02]",
}  # fmt: skip


@pytest.fixture
def env(monkeypatch):
    """`env(**variables)`: the environment of a process, without what this one has of launchers."""
    for name in list(os.environ):
        if name in environment._READ or name.startswith(("SLURM_", "MASTER_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)

    def put(**variables: str) -> None:
        # of monkeypatch as well where it is not to be there, for what the code itself puts there
        for name in (*environment._READ, "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.fixture
def no_scontrol(monkeypatch):
    def run(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory", "scontrol")

    monkeypatch.setattr(subprocess, "run", run)


def refusal() -> str:
    """What launch/run.py's start refuses an environment with."""
    with pytest.raises(ConfigError) as error:
        assert environment.launched_world() is not None
        environment.check_meeting()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x"}, ["RANK=x", "whole number"]),
        ({"RANK": "-1"}, ["RANK=-1", "at least 0"]),
        ({"RANK": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
        ({"RANK": "1.0"}, ["RANK=1.0", "whole number"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE=two", "whole number"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE=0", "at least 1"]),
        ({"WORLD_SIZE": ""}, ["RANK=0", "no WORLD_SIZE"]),
        ({"RANK": ""}, ["WORLD_SIZE=2", "no RANK"]),
        ({"LOCAL_RANK": "gpu0"}, ["LOCAL_RANK=gpu0"]),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, ["LOCAL_RANK=2", "2 ranks"]),
        ({"LOCAL_WORLD_SIZE": "0"}, ["LOCAL_WORLD_SIZE=0"]),
        ({"MASTER_ADDR": ""}, ["MASTER_ADDR", "rank 0's machine"]),
        ({"MASTER_PORT": ""}, ["MASTER_PORT", "free port"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT=http", "whole number"]),
        ({"MASTER_PORT": "0"}, ["MASTER_PORT=0", "at least 1"]),
        ({"MASTER_PORT": "65536"}, ["MASTER_PORT=65536", "65535"]),
        ({"MASTER_ADDR": "a..b"}, ["MASTER_ADDR=a..b", "not known"]),
        ({"OMP_NUM_THREADS": "many"}, ["OMP_NUM_THREADS=many"]),
        ({"OMP_NUM_THREADS": "0"}, ["OMP_NUM_THREADS=0"]),
        ({"OMP_NUM_THREADS": "-2"}, ["OMP_NUM_THREADS=-2"]),
        ({"OMP_NUM_THREADS": "4,"}, ["OMP_NUM_THREADS=4,"]),
        ({"GLOO_SOCKET_IFNAME": "nowhere0"}, ["GLOO_SOCKET_IFNAME=nowhere0", "one of"]),
        ({"GLOO_SOCKET_IFNAME": "lo,nowhere0"}, ["GLOO_SOCKET_IFNAME=nowhere0"]),
        ({"NCCL_SOCKET_IFNAME": "nowhere"}, ["NCCL_SOCKET_IFNAME=nowhere"]),
        ({"NCCL_SOCKET_IFNAME": "=l"}, ["NCCL_SOCKET_IFNAME==l"]),
        ({"TORCH_DISTRIBUTED_DEBUG": "yes"}, ["TORCH_DISTRIBUTED_DEBUG=yes", "DETAIL"]),
        ({"RLHF_KERNELS": "cuda"}, ["RLHF_KERNELS=cuda", "reference"]),
    ],
    ids=str,
)
def test_refused(env, monkeypatch, variables, words):
    address = SimpleNamespace(family=socket.AF_INET)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [address], "eth0": [address]})
    env(**TWO | variables)
    message = refusal()
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("variables", "world_size"),
    [
        ({}, None),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "MASTER_ADDR": "", "OMP_NUM_THREADS": ""}, None),
        ({"WORLD_SIZE": "1"}, None),  # of a shell in which something else was tried
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({**TWO, "OMP_NUM_THREADS": "4,2"}, 2),
        ({**TWO, "GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "^docker0,lo"}, 2),
        ({**TWO, "TORCH_DISTRIBUTED_DEBUG": "detail"}, 2),
        ({**TWO, "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 2),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # of a batch script, without srun
    ],
    ids=str,
)
def test_taken(env, variables, world_size):
    env(**variables)
    assert environment.launched_world() == world_size
    if world_size is not None:
        environment.check_meeting()
        assert os.environ["MASTER_ADDR"] == "127.0.0.1" and 0 < int(os.environ["MASTER_PORT"]) < 65536


def test_threads(env):
    env(OMP_NUM_THREADS="4,2")
    assert environment.num_threads() == 4
    env()
    assert environment.num_threads() == 1


ALLOCATOR, GRAPHS, QUEUES = "PYTORCH_CUDA_ALLOC_CONF", "NCCL_GRAPH_REGISTER", "CUDA_DEVICE_MAX_CONNECTIONS"
SEGMENTS = "expandable_segments:True"


@pytest.mark.parametrize(
    ("device", "tp", "variables", "added"),
    [
        ("cpu", 2, {}, {"OMP_NUM_THREADS": "1"}),
        ("cuda", 1, {}, {"OMP_NUM_THREADS": "12", ALLOCATOR: SEGMENTS, GRAPHS: "0"}),
        ("cuda", 2, {"OMP_NUM_THREADS": "3"}, {ALLOCATOR: SEGMENTS, GRAPHS: "0", QUEUES: "1"}),
        ("cuda", 1, {"LOCAL_WORLD_SIZE": "4"}, {"OMP_NUM_THREADS": "3", ALLOCATOR: SEGMENTS, GRAPHS: "0"}),
        ("cuda", 1, {**SLURM, "LOCAL_WORLD_SIZE": "4"}, {"OMP_NUM_THREADS": "3", ALLOCATOR: SEGMENTS, GRAPHS: "0"}),
        (
            "cuda", 1, {**SLURM, "LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "12"},
            {"OMP_NUM_THREADS": "12", ALLOCATOR: SEGMENTS, GRAPHS: "0"},
        ),
        # what somebody has said stays, and what it needs is added
        ("cuda", 2, {"OMP_NUM_THREADS": "3", ALLOCATOR: SEGMENTS, QUEUES: "8"}, {GRAPHS: "0"}),
        ("cuda", 1, {"OMP_NUM_THREADS": "3", "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, {}),
        ("cuda", 1, {"OMP_NUM_THREADS": "3", GRAPHS: "1"}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_what_libraries_are_told(env, monkeypatch, device, tp, variables, added):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    env(**variables)
    before = dict(os.environ)
    environment.set_defaults(device, tp)
    assert {name: value for name, value in os.environ.items() if before.get(name) != value} == added


@pytest.mark.parametrize(
    ("variables", "overrides", "is_refused"),
    [
        ({ALLOCATOR: SEGMENTS, GRAPHS: "1"}, [], True),
        ({"PYTORCH_ALLOC_CONF": f"max_split_size_mb:512, {SEGMENTS}", GRAPHS: "1"}, [], True),
        ({ALLOCATOR: SEGMENTS}, [], False),
        ({GRAPHS: "1"}, [], False),
        ({ALLOCATOR: SEGMENTS, GRAPHS: "1"}, ["rollout.cuda_graphs=false"], False),
        ({ALLOCATOR: SEGMENTS, GRAPHS: "1"}, ["mesh.tp=1"], False),
        ({ALLOCATOR: SEGMENTS, GRAPHS: "1"}, ["phases=[sft]"], False),
    ],
    ids=str,
)
def test_graphs_that_would_hang(env, monkeypatch, capsys, tmp_path, variables, overrides, is_refused):
    monkeypatch.chdir(tmp_path)  # where it leaves a tokenizer of few rows
    monkeypatch.setattr(preflight, "num_gpus", lambda: 2)
    monkeypatch.setattr(worlds.launcher, "start_ranks", lambda *args: 0)
    env(**variables)
    run = ["+exp=hh_rlhf", "device=cuda", "mesh.tp=2", "mesh.dp=1", "data.num_rows=400", *overrides]
    assert worlds.launcher.main(run) == (2 if is_refused else 0)
    words = ["NCCL_GRAPH_REGISTER=1", "expandable_segments", "mesh.tp=2", "rollout.cuda_graphs=false"]
    assert all((word in capsys.readouterr().err) == is_refused for word in words[:1])


@pytest.mark.parametrize("count", ["1", "8"])
def test_a_gpu_with_one_core_is_told(env, monkeypatch, count):
    monkeypatch.setattr(preflight, "num_gpus", lambda: 4)
    env(**SLURM | {"SLURM_CPUS_PER_TASK": count, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"})
    config = worlds.launcher.compose(["+exp=hh_rlhf", "device=cuda", "data.num_rows=400"])
    notes = preflight.plan(config, 4).notes
    assert any("--cpus-per-task" in note for note in notes) == (count == "1")


def test_srun_gives_a_task_the_cores_of_sbatch(tmp_path, monkeypatch):
    """Which it no longer does by itself."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "cores ${SRUN_CPUS_PER_TASK-none}"\n')
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for given, said in (("12", "cores 12\n"), (None, "cores none\n")):
        monkeypatch.delenv("SRUN_CPUS_PER_TASK", raising=False)
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", given) if given else monkeypatch.delenv("SLURM_CPUS_PER_TASK")
        script = [str(worlds.ROOT / "launch" / "slurm" / "train.sbatch"), "+exp=hh_rlhf"]
        found = subprocess.run(["bash", *script], capture_output=True, text=True, check=True)
        assert found.stdout == said


@pytest.mark.parametrize(
    ("count", "most", "is_queued"), [(None, None, True), ("49", None, True), ("50", None, False), ("2", "2", False)]
)
def test_a_job_that_ends_the_same_way_each_time_stays_out(tmp_path, monkeypatch, count, most, is_queued):
    for name, script in (("srun", "exit 75"), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_RESTART_COUNT", count), ("MAX_REQUEUES", most)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    script = str(worlds.ROOT / "launch" / "slurm" / "train.sbatch")
    found = subprocess.run(["bash", script, "+exp=hh_rlhf"], capture_output=True, text=True)
    assert found.returncode == 75 and found.stdout == ("requeue 7\n" if is_queued else "")
    assert ("error: job 7 is not queued again" in found.stderr) != is_queued


def test_a_host_that_does_not_resolve(env, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    env(**TWO | {"MASTER_ADDR": "node-7"})
    message = refusal()
    assert "MASTER_ADDR=node-7" in message and "(Name or service not known)" in message


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_port_in_use(env, rank):
    """Is refused where the first rank would listen; the others are to find it in use. torchrun has its store there."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        env(**TWO | {"RANK": rank, "MASTER_PORT": port})
        if rank == "0":
            message = refusal()
            assert f"MASTER_PORT={port}" in message and "in use" in message
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        assert environment.launched_world() == 2
        environment.check_meeting()
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)


@pytest.mark.parametrize(
    ("address", "means", "local", "listens"),
    [
        ("node-3", "127.0.1.1", "1", None),  # as Debian has a machine's own name: no other comes there
        ("node-3", "127.0.1.1", "2", "127.0.1.1"),
        ("node-3", "127.0.1.1", "", None),  # nobody has said that all ranks are here
        ("localhost", "127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", "1", "127.0.0.1"),
        ("::1", "::1", "2", "::1"),
    ],
)
def test_where_the_store_listens(env, monkeypatch, address, means, local, listens):
    """At one address, or (None) where torch does, on all interfaces."""
    family = socket.AF_INET6 if ":" in means else socket.AF_INET
    given: dict = {}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **kwargs: [(family, socket.SOCK_STREAM, 6, "", (means, 0))]
    )
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **kwargs: given.update(kwargs))
    env(**TWO | {"MASTER_ADDR": address, "LOCAL_WORLD_SIZE": local})
    meeting_place(timedelta(seconds=1))
    found = None
    if "master_listen_fd" in given:
        with socket.socket(fileno=given["master_listen_fd"]) as listener:
            found = listener.getsockname()[0]
    elif listens == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    assert found == listens


def test_ranks_that_do_not_meet(env):
    """One line, and the place where the others were waited for."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env(**TWO | {"RANK": "1", "MASTER_PORT": port})
    with pytest.raises(RunError, match=rf"^rank 1 of 2 has not met the others at 127\.0\.0\.1:{port}: .*") as error:
        meeting_place(timedelta(milliseconds=10))
    assert "\n" not in str(error.value)


# -- Slurm ---------------------------------------------------------------------------------------------------


def test_a_task_of_slurm_without_scontrol(env, no_scontrol):
    """As in a container: the first node's name from the list."""
    env(**SLURM)
    assert environment.launched_world() == 4
    found = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert found == {"RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node01"}
    assert os.environ["MASTER_PORT"] == str(20000 + 31 * 7 + 1)


def test_where_slurm_says_the_users_word_goes_first(env, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("Slurm was asked"))
    env(**SLURM, MASTER_ADDR="10.0.0.1", MASTER_PORT="29500", WORLD_SIZE="4")
    assert environment.launched_world() == 4
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_scontrol_knows_the_address(env, monkeypatch):
    said = SimpleNamespace(stdout="NodeName=node01 NodeAddr=10.1.2.3 NodeHostName=node01\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: said)
    env(**SLURM)
    assert environment.launched_world() == 4 and os.environ["MASTER_ADDR"] == "10.1.2.3"


def test_one_node_of_slurm_needs_no_name(env, no_scontrol):
    env(**SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"})
    assert environment.launched_world() == 4 and os.environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_STEP_NUM_TASKS": "many"}, ["SLURM_STEP_NUM_TASKS=many"]),
        ({"SLURM_PROCID": ""}, ["SLURM_PROCID"]),
        ({"SLURM_PROCID": "9"}, ["RANK=9", "WORLD_SIZE=4"]),
        ({"SLURM_LOCALID": "x"}, ["SLURM_LOCALID=x"]),
        ({"SLURM_NODEID": "x"}, ["SLURM_NODEID=x"]),
        ({"SLURM_NODEID": "2"}, ["SLURM_STEP_TASKS_PER_NODE=2(x2)", "node 2"]),
        ({"SLURM_STEP_TASKS_PER_NODE": ""}, ["SLURM_STEP_TASKS_PER_NODE"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, ["SLURM_STEP_TASKS_PER_NODE=two"]),
        ({"SLURM_JOB_ID": ""}, ["SLURM_JOB_ID"]),
        ({"SLURM_JOB_ID": "job"}, ["SLURM_JOB_ID=job"]),
        ({"SLURM_STEP_ID": "x"}, ["SLURM_STEP_ID=x"]),
        ({"SLURM_STEP_NODELIST": ""}, ["SLURM_STEP_NODELIST", "MASTER_ADDR"]),
        ({"SLURM_STEP_NODELIST": "[1-2"}, ["[1-2", "MASTER_ADDR"]),
        ({"MASTER_PORT": "x"}, ["MASTER_PORT=x"]),
    ],
    ids=str,
)
def test_a_step_that_makes_no_sense(env, no_scontrol, variables, words):
    env(**SLURM | variables)
    message = refusal()
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[01-04,07]", "node01"),
        ("node07", "node07"),
        ("login,node[1-2]", "login"),
        ("r[1-2]n[008-010]-ib,login", "r1n008-ib"),
        ("node[7,9-11],gpu[1-2]", "node7"),
        ("a-b.cluster.example[3]", "a-b.cluster.example3"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert environment.first_host(nodes) == first


# -- GPUs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "here", "count"),
    [
        (None, 0, 0),
        (None, 2, 2),
        ("0", 0, 0),
        ("NoDevFiles", 0, 0),
        ("NoDevFiles", 2, 0),
        ("", 2, 0),
        ("-1", 2, 0),
        ("0,1", 2, 2),
        ("0,2", 2, 1),  # CUDA stops at the first that is not there
        ("1,-1,0", 2, 1),
        ("0, 1", 2, 2),
        ("0,0", 2, 1),
        ("GPU-8932f937,GPU-16e9", 2, 2),
        ("GPU-8932f937", 0, 0),
        ("MIG-4b1", 1, 1),
    ],
)
def test_gpus_that_may_be_used(monkeypatch, visible, here, count):
    monkeypatch.setattr(preflight.glob, "glob", lambda pattern: [f"/dev/nvidia{i}" for i in range(here)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert preflight.num_gpus() == count
    if not count:
        with pytest.raises(ConfigError, match="device=cuda, and there is no GPU"):
            preflight.plan(RunConfig(device="cuda"))


# -- as a user sees it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["x", "7", "1"])
def test_what_is_wrong_with_one_rank_is_said_by_it(env, monkeypatch, capsys, tmp_path, rank):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worlds.launcher, "run_rank", lambda *args: pytest.fail("it was started"))
    env(**TWO | {"RANK": rank, "MASTER_ADDR": "a..b"})
    assert worlds.launcher.main(["+exp=hh_rlhf", "device=cpu", "data.num_rows=400"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
