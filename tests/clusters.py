"""Clusters of two nodes on this machine, for tests: Slurm's and Ray's own daemons, one CPU a node."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import warm
from worlds import ROOT, launcher

# `urgent` takes nodes from `train`, whose jobs have half a minute to save. A job that is queued again starts when the
# credential of its first start has expired.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=train Nodes=n0,n1 Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n0,n1 PriorityTier=2 PreemptMode=OFF
"""


PATIENCE = 300.0  # seconds, far more than anything takes on a busy machine: a test fails by it only if something hangs


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, f"after {PATIENCE:g} s still waiting for {what}"
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Different ones."""
    found: set[int] = set()
    while len(found) < count:
        found.add(launcher.free_port())
    return sorted(found)


def has_slurm() -> bool:
    return os.geteuid() == 0 and all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch", "srun")))


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A Slurm cluster whose files are in `folder`; gives the environment in which its commands find it."""
    host = socket.gethostname()
    conf, key = folder / "slurm.conf", folder / "munge.key"
    conf.write_text(SLURM_CONF.format(host=host, folder=folder, ports=free_ports(3)))
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(conf)}
    munge = {"key-file": key} | {name: folder / f"munge.{name}" for name in ("pid-file", "log-file", "seed-file")}
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder / 'munge.sock'}", "--num-threads=2"]
        + [f"--{name}={value}" for name, value in munge.items()],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n0"],
        ["slurmd", "-D", "-N", "n1"],
    ]
    daemons = []

    def is_ready() -> bool:
        found = subprocess.run(["sinfo", "-h", "-p", "train", "-o", "%T %D"], env=environment, capture_output=True)
        return found.stdout.split() == [b"idle", b"2"]

    try:
        for i, command in enumerate(commands):
            with (folder / f"{i}.{command[0]}.log").open("w") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                wait_until((folder / "munge.sock").exists, "munged")
        wait_until(is_ready, f"Slurm's nodes; its logs are in {folder}")
        yield environment
    finally:
        subprocess.run(["scancel", "-u", "root"], env=environment, timeout=20)
        end(daemons)


@contextlib.contextmanager
def ray() -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """A Ray cluster, which asks its nodes often whether they are there; gives the address of its head, and the process
    of each node."""
    port = launcher.free_port()
    start = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block", "--num-cpus=1"]
    start += ["--disable-usage-stats", "--object-store-memory=100000000"]
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path[1:]])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "RAY_health_check_period_ms": "500"}
    nodes: list[subprocess.Popen] = []
    with tempfile.NamedTemporaryFile("r") as said:

        def num_started() -> int:
            return Path(said.name).read_text().count("Ray runtime started")

        try:
            for role in (
                ["--head", f"--port={port}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"],
                [f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.2"],
            ):
                with open(said.name, "a") as output:
                    nodes.append(subprocess.Popen([*start, *role], env=environment, stdout=output, stderr=output))
                wait_until(lambda: num_started() == len(nodes), "the start of a Ray node")
            wait_until(lambda: _num_ray_nodes(port) == len(nodes), "Ray's nodes")
            yield f"127.0.0.1:{port}", nodes
        finally:
            end(nodes)


def _num_ray_nodes(port: int) -> int:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return 0
    script = f"import ray; ray.init('127.0.0.1:{port}'); print(sum(node['Alive'] for node in ray.nodes()))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    return int(found.stdout or 0)


def end(daemons: Sequence[subprocess.Popen | warm.Command]) -> None:
    """Ends processes that we started, and what is left of those that they have started."""
    running = [daemon for daemon in daemons if daemon.poll() is None]
    family = [child for daemon in running for child in psutil.Process(daemon.pid).children(recursive=True)]
    for daemon in running:
        daemon.terminate()
    for daemon in running:
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
