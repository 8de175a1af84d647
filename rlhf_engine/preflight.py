"""Everything that can be refused before a process group exists, in one line. Imports neither torch nor megatron."""

from __future__ import annotations

import glob
import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from .config import ConfigError, MeshConfig, ModelConfig, RunConfig, check, resolve_mesh
from .data.sources import parse_weight, read_json_rows, read_sources
from .hf.config import read_model_config
from .hf.index import index

JOBS = {"score", "generate"}  # phases that read a file and write a file


@dataclass(frozen=True)
class Plan:
    """A run that may start."""

    config: RunConfig
    mesh: MeshConfig
    model: ModelConfig
    device: str

    @property
    def world_size(self) -> int:
        assert self.mesh.dp is not None
        return self.mesh.tp * self.mesh.pp * self.mesh.dp


def num_gpus() -> int:
    """CUDA devices that this process may use, without asking CUDA."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([v for v in visible.split(",") if v.strip() and v.strip() != "-1"])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def plan(config: RunConfig, world_size: int | None = None) -> Plan:
    """Checks a run as a whole.

    Args:
        world_size: ranks that a launcher started; None where we start them ourselves.

    Raises:
        ConfigError: what is wrong and what would be right.
    """
    device = config.device if config.device != "auto" else ("cuda" if num_gpus() else "cpu")
    if device == "cuda" and not num_gpus():
        raise ConfigError("device=cuda, and there is no GPU: use device=cpu or device=auto")
    if world_size is None:
        model_ranks = max(1, config.mesh.tp) * max(1, config.mesh.pp)
        if config.mesh.dp is not None:
            world_size = model_ranks * max(1, config.mesh.dp)
        else:
            # on a CPU two ranks with a thread each, the least that shows every kind of parallelism
            world_size = max(1, (num_gpus() if device == "cuda" else 2) // model_ranks) * model_ranks
        if device == "cuda" and world_size > num_gpus():
            raise ConfigError(f"mesh needs {world_size} GPUs and {num_gpus()} are here: use a cluster launcher")
    mesh = resolve_mesh(config, world_size)
    if config.keep_checkpoints < 1:
        raise ConfigError(f"keep_checkpoints={config.keep_checkpoints} must be at least 1")
    jobs = set(config.phases) & JOBS
    if jobs and len(config.phases) > 1:
        raise ConfigError(f"phases={config.phases}: {sorted(jobs)[0]} runs alone")
    model = read_model_config(config.policy.path) if config.policy.path else config.model
    if config.policy.path and not (Path(config.policy.path) / ".metadata").is_file():
        index(config.policy.path)
    check(config, mesh, model)
    if jobs:
        for source in config.data.sources:
            for where, row in read_json_rows(parse_weight(source)[0]):
                check_job_row(row, where, config.phases[0])
    else:
        read_sources(config.data, config.seed)
    if config.reward.kind == "function" and "ppo" in config.phases:
        load_function(config.reward.fn or "")
    return Plan(config, mesh, model, device)


def check_job_row(row: dict, where: str, job: str) -> None:
    """A row of a score or generate job.

    Raises:
        ConfigError: it has neither text nor messages.
    """
    key = {"score": "text", "generate": "prompt"}[job]
    if key in row:
        if not isinstance(row[key], str):
            raise ConfigError(f"{where}: {key!r} must be text")
        return
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: a row of the {job} job has {key!r} or 'messages', this one {sorted(row)}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ConfigError(f"{where}: each message is {{'role': …, 'content': text}}")
        if message.get("role") not in (roles := ("system", "user", "assistant")):
            raise ConfigError(f"{where}: role {message.get('role')!r} is not one of {', '.join(roles)}")


def load_function(name: str):
    """The function `package.module:name`.

    Raises:
        ConfigError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward.fn={name}: {error}") from None
    if not callable(function):
        raise ConfigError(f"reward.fn={name} is not a function")
    return function
