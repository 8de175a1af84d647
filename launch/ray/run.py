"""python launch/ray/run.py [--address HOST:PORT] +exp=NAME [key=value ...]

Runs launch/run.py on the nodes of a Ray cluster, a rank for each GPU, or for each CPU where there is no GPU. The
folder that this is started in and the paths that the run names have to be the same on every node.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ModuleNotFoundError:
    print("error: Ray is not installed here: pip install -e '.[ray]'", file=sys.stderr)
    sys.exit(2)

from rlhf_engine.config import ConfigError, MeshConfig, RunConfig, check, resolve_mesh
from rlhf_engine.launching.compose import compose
from rlhf_engine.launching.folders import read_base
from rlhf_engine.launching.ranks import FINAL, Ranks, free_port
from rlhf_engine.signals import STOPPED, Stop, answer
from rlhf_engine.surviving.places import ATTEMPT, LAUNCH

RUN = str(Path(__file__).resolve().parent.parent / "run.py")
_SECONDS_TO_START = 300.0  # of the nodes that have room
_SECONDS_TO_ANSWER = 40.0  # of the nodes that are left, when a run ends, and of the cluster, when a node is lost


def join_cluster(address: str) -> None:
    """Makes this process a driver of the cluster.

    Raises:
        ConfigError: there is none at the address.
    """
    try:
        if address != "auto":  # Ray itself would try for ever
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--address={address}: no Ray cluster there ({error})") from None


def ranks_per_node(slots: Sequence[int], mesh: MeshConfig) -> list[int]:
    """How many ranks each of the first nodes gets, so that no tensor parallel group crosses nodes.

    Args:
        slots: ranks that each node has room for, the roomiest first.

    Raises:
        ConfigError: the cluster is too small.
    """
    groups = [count // mesh.tp for count in slots]
    wanted = mesh.pp * (mesh.dp if mesh.dp is not None else max(1, sum(groups) // mesh.pp))
    if sum(groups) < wanted:
        raise ConfigError(
            f"mesh.tp={mesh.tp} x mesh.pp={mesh.pp} x mesh.dp={wanted // mesh.pp} needs {wanted} groups of"
            f" {mesh.tp} ranks, each on one node, and the Ray cluster has room for {sum(groups)}"
        )
    counts: list[int] = []
    for available in groups:
        counts.append(min(available, wanted - sum(counts)))
    return [count * mesh.tp for count in counts if count]


def slots(device: str) -> tuple[str, list[int]]:
    """What a rank takes in this cluster, "GPU" or "CPU", and how many of them each node has, the roomiest first."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind = "GPU" if device != "cpu" and any("GPU" in resources for resources in found) else "CPU"
    return kind, sorted((int(resources.get(kind, 0)) for resources in found), reverse=True)


def replicas_left(config: RunConfig, slots: Sequence[int]) -> int:
    """The most data parallel replicas, no more than before, that have room and that batches can be divided among.

    Raises:
        ConfigError: there are none.
    """
    policy = config.policy
    model = read_base(policy.path, "policy", policy.ignore_keys).model if policy.path else config.model
    reason = ConfigError("no node is left")
    for dp in range(config.mesh.dp or sum(slots), 0, -1):
        mesh = replace(config.mesh, dp=dp)
        try:
            check(config, resolve_mesh(mesh, sum(ranks_per_node(slots, mesh))), model, model)
            return dp
        except ConfigError as error:
            reason = error
    raise reason


class Node:
    """The ranks of one node, in an actor. Its methods return soon, or a signal would wait for the end of the run."""

    def __init__(self, environment: dict[str, str], folder: str):
        os.environ |= environment
        os.chdir(folder)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self.read = 0

    def place(self) -> tuple[str, int]:
        """Address of this node, and a port that is free."""
        return ray.util.get_node_ip_address(), free_port()

    def start(self, argv: list[str], first: int, count: int, world_size: int, address: str, port: int) -> None:
        """Starts so many ranks, from number `first` on."""
        command = [sys.executable, RUN, *argv]
        self.ranks = Ranks(command, first, count, world_size, address, port, self.output.fileno())

    def poll(self) -> tuple[bytes, int | None]:
        """What the ranks have written since the last call, and their exit code, None while they run."""
        time.sleep(0.2)
        code = self.ranks.poll()
        written = os.pread(self.output.fileno(), os.fstat(self.output.fileno()).st_size - self.read, self.read)
        self.read += len(written)
        return written, code

    def send(self, signum: int) -> None:
        """A signal to each rank."""
        self.ranks.send(signum)

    def end(self, code: int) -> None:
        """`Ranks.end` of this node."""
        self.ranks.end(code)


def place_nodes(counts: Sequence[int], kind: str, received: Sequence[int]) -> tuple[list[Any], Any]:
    """An actor on each of as many nodes as there are `counts`, and their placement group.

    Raises:
        Stop: a signal was received before there was room.
    """
    group = placement_group([{kind: count} for count in counts], strategy="STRICT_SPREAD")
    while not group.wait(10):
        if received:
            raise Stop
        print(f"waiting for {sum(counts)} {kind}s on {len(counts)} nodes", flush=True)
    # as srun does; what belongs to the machine stays its own
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CUDA_VISIBLE_DEVICES"))}
    actor: Any = ray.remote(Node)
    nodes: list[Any] = [
        actor.options(
            num_cpus=count if kind == "CPU" else 0,
            num_gpus=count if kind == "GPU" else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
        ).remote(environment, os.getcwd())
        for i, count in enumerate(counts)
    ]
    return nodes, group


def start_ranks(nodes: Sequence[Any], argv: list[str], counts: Sequence[int]) -> None:
    """Starts them on all nodes.

    Raises:
        RayActorError: a node is lost, or cannot start any.
        GetTimeoutError: it does not answer.
    """
    address, port = ray.get(nodes[0].place.remote(), timeout=_SECONDS_TO_START)
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    started = [
        node.start.remote(argv, first, count, sum(counts), address, port)
        for node, first, count in zip(nodes, firsts, counts, strict=True)
    ]
    ray.get(started, timeout=_SECONDS_TO_START)


def watch(nodes: Sequence[Any], counts: Sequence[int], received: Sequence[int]) -> tuple[int, int]:
    """Shows what the ranks write, and passes on to them the signals that are `received`.

    Returns:
        The exit code of the first to fail, and how many nodes were lost.
    """
    polls = {node.poll.remote(): i for i, node in enumerate(nodes)}
    failed, lost, passed_on, deadline = 0, 0, 0, float("inf")
    while polls and time.monotonic() < deadline:
        while passed_on < len(received):
            for i in polls.values():
                nodes[i].send.remote(received[passed_on])
            passed_on += 1
        done, _ = ray.wait(list(polls), timeout=0.5)
        for poll in done:
            i = polls.pop(poll)
            try:
                written, code = ray.get(poll)
            except ray.exceptions.RayError as error:
                lost += 1
                first, last = sum(counts[:i]), sum(counts[: i + 1]) - 1
                written, code = f"error: the node of ranks {first} to {last}: {type(error).__name__}\n".encode(), 1
            sys.stdout.buffer.write(written)
            sys.stdout.flush()
            if code is None:
                polls[nodes[i].poll.remote()] = i
            elif code and not failed:
                failed, deadline = code, time.monotonic() + _SECONDS_TO_ANSWER
                for other in polls.values():
                    nodes[other].end.remote(code)
    return failed, lost


def run(argv: list[str]) -> int:
    """The run's exit code. When a rank or a node dies it is started again, on the nodes that are left.

    Raises:
        ConfigError: the cluster is too small.
        Stop: asked to stop before it could start.
    """
    config = compose(argv)
    kind, free = slots(config.device)
    received: list[int] = []
    answer(lambda signum, frame: received.append(signum))
    os.environ[LAUNCH] = secrets.token_hex(8)
    for left in range(config.max_restarts, -1, -1):
        os.environ[ATTEMPT] = str(config.max_restarts - left)
        counts = ranks_per_node(free, config.mesh)
        num_nodes = len(free)
        nodes, group = place_nodes(counts, kind, received)
        try:
            start_ranks(nodes, argv, counts)
            code, lost = watch(nodes, counts, received)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            reason = str(error).strip().rpartition("\n")[2]
            print(f"error: a node was lost before its ranks were started: {type(error).__name__}: {reason}", flush=True)
            code, lost = 1, 1
        if code in FINAL or received or not left:
            break
        for node in nodes:
            ray.kill(node)
        remove_placement_group(group)
        deadline = time.monotonic() + _SECONDS_TO_ANSWER
        # the cluster has not noticed yet
        while lost and len(free) == num_nodes and not received and time.monotonic() < deadline:
            time.sleep(1)
            kind, free = slots(config.device)
        config.mesh.dp = replicas_left(config, free)
        argv = [*argv, f"mesh.dp={config.mesh.dp}"]
        again = f"starting again on {config.mesh.dp} replicas, {left - 1} of max_restarts={config.max_restarts} left"
        print(f"exit code {code}: {again}", flush=True)
    return code


def main(arguments: list[str]) -> int:
    """The exit code of what a command line asks for."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--address", default="auto", help="of the cluster's head; auto: the cluster of this machine")
    options, argv = parser.parse_known_args(arguments)
    try:
        compose(argv)
        join_cluster(options.address)
        return run(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stop:
        return STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
