"""Worlds of ranks for tests: each is started once, warm, and sent work."""

from __future__ import annotations

import functools
import importlib.util
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import warm

TIMEOUT_SECONDS = 300
MOST_CALLS = 20  # of one set of processes: caches of megatron hold some of a mesh's groups, and so their threads
ROOT = Path(__file__).resolve().parent.parent


def load_launcher():
    """launch/run.py as a module; its folder is no package. Its `main` leaves the process that calls it here as it is:
    the next tests run in it."""
    spec = importlib.util.spec_from_file_location("launch_run", ROOT / "launch" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.end_with_parent = module.leave_at_once = lambda: None  # type: ignore[attr-defined]
    return module


launcher = load_launcher()


class World:
    """`size` rank processes with a process group between them; `run` calls a function on all of them."""

    def __init__(self, size: int):
        self.size = size
        self._start()

    def _start(self) -> None:
        port = launcher.free_port()
        self.pipes, self.processes, self.calls = [], [], 0
        for rank in range(self.size):
            ours, theirs = warm.CONTEXT.Pipe()
            process = warm.process(_serve, (rank, self.size, port, theirs), daemon=True)
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """The function's result on each rank. An exception on any rank is raised here, with its traceback."""
        if self.calls == MOST_CALLS:
            self.close()
            self._start()
        self.calls += 1
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(TIMEOUT_SECONDS), f"rank {rank} did not answer in {TIMEOUT_SECONDS} s"
            answers.append(pipe.recv())  # all of them, or the next call would read this one's
        for rank, (ok, value) in enumerate(answers):
            assert ok, f"rank {rank}:\n{value}"
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank: int, size: int, port: int, pipe) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import warnings

    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


@functools.cache
def mesh(tp: int, pp: int, dp: int, sequence_parallel: bool = False, ep: int = 1, virtual_pp: int = 1):
    """In a rank process: the mesh, the one before it closed (a world has one at a time)."""
    from rlhf_engine.config import MeshConfig
    from rlhf_engine.mesh import ParallelMesh

    close_mesh()
    _current.append(ParallelMesh(MeshConfig(tp, pp, dp, ep, sequence_parallel, virtual_pp), "cpu"))
    return _current[0]


def close_mesh() -> None:
    """In a rank process: makes room for another mesh."""
    if _current:
        _current.pop().close()
        mesh.cache_clear()


_current: list = []
