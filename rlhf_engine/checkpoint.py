"""Checkpoints through megatron's dist_checkpointing: written by any mesh, read by any other.

A phase keeps folders `checkpoints/iteration_N` and a file `latest` that names the newest whole one. A save never
touches an older folder, and `latest` is replaced when everything else is on the disk; so a run killed at any moment
finds a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from .config import ConfigError
from .cpu import cuda_calls_stay
from .mesh import ParallelMesh
from .models.optim import load_optimizer
from .models.residency import Presence
from .models.role import RoleModel

# Megatron passes the results of a write through a server process, for writers in other processes. Ours is in this one;
# the server would cost seconds to start and outlive a rank that is killed.
filesystem_async._results_queue = queue.Queue()

IMPORTED = "model"  # prefix of the keys of a converted HF folder, where a trained checkpoint has its roles
# each optimizer tensor takes the shape of its parameter, so that any mesh can cut it anew
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a phase's folder of checkpoints, None where there is none.

    Raises:
        ConfigError: `latest` names a folder that is not there.
    """
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    found = folder / pointer.read_text().strip()
    if not (found / "metadata.json").is_file():
        raise ConfigError(f"{pointer} names {found.name}, which is not a whole checkpoint")
    return found


def save(
    folder: Path,
    iteration: int,
    roles: Mapping[str, RoleModel],
    state: Mapping[str, Any],
    mesh: ParallelMesh,
    keep: int,
) -> None:
    """Writes the trained roles and `state`, points `latest` to them, and drops all but the `keep` newest."""
    name = None
    if mesh.is_main:
        names = itertools.chain([f"iteration_{iteration}"], (f"iteration_{iteration}.{i}" for i in itertools.count(1)))
        name = next(name for name in names if not (folder / name).exists())
        (folder / name).mkdir(parents=True)
    target = folder / mesh.from_main(name)
    with _present(roles), _quiet():
        tree = {"state": dict(state), **_sharded(roles, is_loading=False)}
        for name, role in roles.items():
            if role.is_trained:
                tree[name]["scheduler"] = role.scheduler.state_dict()
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save(tree, str(target), strategy)
    mesh.barrier()
    if mesh.is_main:
        temporary = folder / "latest.tmp"
        temporary.write_text(target.name)
        os.replace(temporary, folder / "latest")
        found = sorted(folder.glob("iteration_*"), key=lambda path: path.stat().st_mtime_ns)
        for path in found[:-keep]:
            shutil.rmtree(path, ignore_errors=True)


def load(checkpoint: Path, roles: Mapping[str, RoleModel]) -> dict[str, Any]:
    """Fills the trained roles, their optimizers and schedules; returns the `state` that was saved with them."""
    with _present(roles):
        with _quiet():
            loaded = dist_checkpointing.load(_sharded(roles, is_loading=True), str(checkpoint))
        for name, role in roles.items():
            if role.is_trained:
                _fill(role, name, loaded[name]["model"])
                load_optimizer(role.optimizer, loaded[name]["optimizer"])
                role.scheduler.load_state_dict(loaded[name]["scheduler"])
    return loaded["state"]


@contextlib.contextmanager
def _present(roles: Mapping[str, RoleModel]) -> Iterator[None]:
    """All trained roles on the device, whole."""
    with contextlib.ExitStack() as stack:
        for role in roles.values():
            if role.is_trained:
                stack.enter_context(role.on_device(Presence.TRAINING))
        yield


def _sharded(roles: Mapping[str, RoleModel], is_loading: bool) -> dict[str, Any]:
    """Weights and optimizers of the trained roles, as megatron describes this rank's shards of them."""
    tree: dict[str, Any] = {}
    for name, role in roles.items():
        if role.is_trained:
            model = role.gpt.sharded_state_dict(prefix=f"{name}.")
            with cuda_calls_stay(role.mesh.device):
                optimizer = role.optimizer.sharded_state_dict(model, is_loading, metadata=_OPTIMIZER_FORMAT)
            tree[name] = {"model": model, "optimizer": optimizer}
    return tree


def load_weights(checkpoint: Path, name: str, role: RoleModel) -> None:
    """Fills `role` with the weights that the checkpoint holds under `name`, a head of another kind left out."""
    model = {k: v for k, v in role.gpt.sharded_state_dict(prefix=f"{name}.").items() if "_extra_state" not in k}
    held = load_sharded_metadata(str(checkpoint))
    if f"{name}.output_layer.bias" in held or role.head == "scalar":
        same_head = (f"{name}.output_layer.bias" in held) == (role.head == "scalar")
        model = {key: part for key, part in model.items() if same_head or ".output_layer." not in key}
    with _quiet():
        _fill(role, name, dist_checkpointing.load({"model": model}, str(checkpoint))["model"])


@torch.no_grad()
def _fill(role: RoleModel, name: str, loaded: Mapping[str, Any]) -> None:
    stripped = {key.removeprefix(f"{name}."): value for key, value in loaded.items()}
    role.gpt.load_state_dict(stripped, strict=False)


@contextlib.contextmanager
def _quiet():
    """Megatron and torch warn about their own internals at every save."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
