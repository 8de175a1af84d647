"""Checkpoints through megatron's dist_checkpointing: written by any mesh, read by any other.

A phase keeps folders `checkpoints/iteration_N` and a file `latest` that names the newest. A folder has that name only
once everything in it is on the disk, with a manifest of sizes and checksums; `latest` is replaced behind it, and older
ones are removed behind that; with `checkpoint.best` a `best.json` in a folder says that it was better than all before,
and the last such folder stays. So a run killed at any moment finds a whole checkpoint, and one that was damaged since
is found out before it is used.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import math
import pickle
import queue
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..config import CheckpointConfig, ConfigError
from ..mesh import ParallelMesh
from ..surviving import durable, manifest
from . import readers, shards
from .optim import load_optimizer
from .residency import Presence, host_memory
from .role import RoleModel

# Megatron passes the results of a write through a server process, for writers in other processes. Ours is in this one;
# the server would cost seconds to start and outlive a rank that is killed.
filesystem_async._results_queue = queue.Queue()
# "nvrx", the default where it exists, writes in a process of its own
_HAS_STRATEGIES = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
_STRATEGY = {"async_strategy": "mcore"} if _HAS_STRATEGIES else {}

readers.install()

IMPORTED = "model"  # prefix of the keys of a converted HF folder, where a trained checkpoint has its roles
_BEST = "best.json"  # file of a checkpoint that was better than all before: the figure's name and value
_ALIGNED = 64  # bytes that a tensor's copy begins at a multiple of


class Checkpoints:
    """The checkpoints of a phase. One save at a time is under way, written by a thread while training goes on.

    Args:
        folder: where they are, of all ranks.
    """

    def __init__(self, folder: Path, mesh: ParallelMesh, config: CheckpointConfig):
        self.folder, self.mesh, self.config = folder, mesh, config
        self._line: list[str] = []  # those that this run builds on, oldest first; whatever else there is will go
        self.best: tuple[str, float] | None = None  # of these, and its figure
        self._writing: _Writing | None = None
        self._is_saved = True
        self._memory: dict[str, Tensor] = {}

    def newest(self, is_finished: bool = False) -> Path | None:
        """The newest whole checkpoint: what `latest` names, or the nearest before it. None where there was never one.

        Args:
            is_finished: nothing but the last one will do, because the phase is finished.

        Raises:
            ConfigError: there are some and none is whole, or a finished phase's is not there.
        """
        names = self.mesh.from_main(_names(self.folder) if self.mesh.is_main else None)
        for i, name in enumerate(names[: 1 if is_finished else None]):
            damage = self._damage(name)
            if damage is None:
                self._line = names[i:][::-1]
                self.best = self.mesh.from_main(self._marked() if self.mesh.is_main else None)
                return self.folder / name
            if self.mesh.is_main:
                print(f"checkpoint {self.folder / name} is damaged: {damage}", flush=True)
        if is_finished:
            what = f"{self.folder / names[0]}, which is damaged" if names else f"no checkpoint in {self.folder}"
            raise ConfigError(f"a finished phase has left {what}: put it back, or run the phase again (rerun=true)")
        if names:
            raise ConfigError(f"no checkpoint in {self.folder} is whole: remove it to begin the phase again")
        return None

    def _damage(self, name: str) -> str | None:
        """What is wrong with a checkpoint. Every rank reads a part of its files: all of them are as much as a save."""
        found = manifest.damage(self.folder / name, self.mesh.rank, self.mesh.world_size)
        return next((line for line in self.mesh.all_gather_object(found) if line), None)

    def chosen(self) -> Path | None:
        """Of a finished phase the one that `checkpoint.build_on` asks for; None where there was never one.

        Raises:
            ConfigError: it is not there, or it is damaged.
        """
        last = self.newest(is_finished=True)
        if last is None or self.config.build_on == "last" or self.best is None:
            return last
        best = self.folder / self.best[0]
        if damage := self._damage(self.best[0]):
            raise ConfigError(f"checkpoint.build_on=best: {best} is damaged: {damage}")
        return best

    def improves(self, figures: Mapping[str, float]) -> float | None:
        """The figure of `checkpoint.best`, if it is there and better than that of any before; a save under way is
        waited for. Every rank calls it at the same point."""
        value = figures.get(self.config.best or "", math.nan)
        if not math.isfinite(value):
            return None
        self.finish()
        sign = 1 if self.config.best_is == "max" else -1
        return value if self.best is None or sign * value > sign * self.best[1] else None

    def mark(self, value: float) -> None:
        """The last one, if there is any, is the best, with this figure."""
        if not self._line:
            return
        self.best = (self._line[-1], value)
        if self.mesh.is_main:
            durable.write(self.folder / self.best[0] / _BEST, json.dumps({self.config.best: value}))
        self._prune()

    def _marked(self) -> tuple[str, float] | None:
        """The best of the line: what is marked is better than all before it."""
        for name in reversed(self._line):
            value = (durable.read(self.folder / name / _BEST) or {}).get(self.config.best or "")
            if value is not None:
                return name, float(value)
        return None

    def clear(self) -> None:
        """Removes all of them, wherever links lead. The main rank calls it, before there is any save.

        Raises:
            OSError: one cannot be removed.
        """
        (self.folder / "latest").unlink(missing_ok=True)
        for path in (self.folder / name for name in _names(self.folder)):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._writing is not None and self._writing.thread.is_alive()

    def save(
        self, iteration: int, roles: Mapping[str, RoleModel], state: Mapping[str, Any], best: float | None = None
    ) -> None:
        """Copies the trained roles and `state` and has them written, once an earlier save is finished.

        Args:
            best: its figure, where that is better than any before.
        """
        self.finish()
        self._writing = _Writing(self.folder, iteration, roles, state, self.mesh, self._memory_for)
        self._writing.best = best
        if not self.config.async_save:
            self.finish()

    def _memory_for(self, role: str, size: int) -> Tensor:
        """Host memory for a role's copy, the same at every save: it takes longer to get than to fill."""
        memory = self._memory.get(role)
        if memory is None or memory.nbytes != size:
            memory = host_memory(size, self.mesh.device)
            if self.config.async_save:
                self._memory[role] = memory
        return memory

    def finish(self) -> bool:
        """Waits for the save under way, if any, and makes it the latest. Every rank calls it at the same point.

        Returns:
            Whether the last save succeeded. If not, the reason is printed and nothing is left of it.
        """
        if self._writing is None:
            return self._is_saved
        writing, self._writing = self._writing, None
        reports = self.mesh.to_main(writing.report())
        error = next((f"{said} (rank {rank})" for rank, (said, _, _) in enumerate(reports) if said), None)
        name = None
        if self.mesh.is_main:
            try:
                name = self._complete(writing, reports) if error is None else None
            except (OSError, RuntimeError) as failure:
                error = durable.reason(failure)
            if name is None:
                shutil.rmtree(writing.target, ignore_errors=True)
                kept = self._line[-1] if self._line else "nothing"
                print(f"checkpoint of iteration {writing.iteration} not saved: {error}; {kept} is kept", flush=True)
        name = self.mesh.from_main(name)
        self._is_saved = name is not None
        if name is not None:
            self.best = self.best if writing.best is None else (name, writing.best)
            self._line.append(name)
            self._prune()
        return self._is_saved

    def _prune(self) -> None:
        self._line = self._kept(self._line)
        if self.mesh.is_main:
            for other in set(_saved(self.folder)) - set(self._line):
                shutil.rmtree(self.folder / other, ignore_errors=True)

    def _complete(self, writing: _Writing, reports: Sequence[_Report]) -> str:
        """Index and manifest of what all ranks have written, then its name and `latest`."""
        target = writing.target
        writing.plan.writer.finish(writing.plan.metadata, [results for _, results, _ in reports])
        save_config(CheckpointingConfig("torch_dist", 1), str(target))
        if writing.best is not None:
            (target / _BEST).write_text(json.dumps({self.config.best: writing.best}))
        own = [path for path in target.iterdir() if path.suffix != ".distcp"]
        for path in own:  # the ranks have synced theirs
            durable.sync(path)
        entries = {path.name: manifest.entry(path) for path in own}
        for rank, (_, _, written) in enumerate(reports):
            for file, (size, _) in written.items():
                found = (target / file).stat().st_size if (target / file).is_file() else 0
                if found != size:
                    raise OSError(f"{found} of {size} bytes are there of {file}, which rank {rank} has written")
            entries |= written
        manifest.write(target, entries)
        name = f"iteration_{writing.iteration}"
        if (self.folder / name).exists():
            name += f".{1 + max(_number(path.name)[1] for path in self.folder.glob(name + '*'))}"
        pointer = durable.aside(self.folder / "latest", name)
        durable.move(target, self.folder / name)
        durable.move(pointer, self.folder / "latest")
        return name

    def _kept(self, line: list[str]) -> list[str]:
        """The last `keep_last` and one in `keep_every` iterations, of two of one iteration the later; and the best."""
        newest = list({_number(name)[0]: name for name in line}.values())
        every = self.config.keep_every
        kept = {*newest[-self.config.keep_last :], *([self.best[0]] if self.best else [])}
        kept |= {name for name in newest if every is not None and _number(name)[0] % every == 0}
        return [name for name in line if name in kept]


def _number(name: str) -> tuple[int, int]:
    """Iteration, and which of its checkpoints: the later ones are `iteration_N.1` and so on. (-1, 0) of other names."""
    found = re.fullmatch(r"iteration_(0|[1-9][0-9]*)(?:\.([1-9][0-9]*))?", name)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)


def _saved(folder: Path) -> list[str]:
    """Those that were saved, oldest first; a name of another form is somebody else's."""
    return sorted((path.name for path in folder.glob("iteration_*") if _number(path.name)[0] >= 0), key=_number)


def _names(folder: Path) -> list[str]:
    """What `latest` names and what comes before it, newest first; all of them where it names none."""
    found = _saved(folder)
    pointer = folder / "latest"
    named = pointer.read_text().strip() if pointer.is_file() else ""
    if _number(named)[0] < 0:
        return found[::-1]
    return [named, *(name for name in reversed(found) if _number(name) < _number(named))]


def _new_folder(folder: Path) -> tuple[Path, str | None]:
    """For a save, and what is in the way of it. No other save had its name: a client of a shared file system may know
    what a name led to before, which is the last good checkpoint by now."""
    target = folder / f"saving.{secrets.token_hex(8)}"
    try:
        durable.make_folder(folder)
        for path in folder.iterdir():
            if re.fullmatch(r"saving(\.[0-9a-f]{16})?", path.name):  # of a run that was killed while it saved
                shutil.rmtree(path, ignore_errors=True)
        durable.make_folder(target)
    except OSError as error:
        return target, durable.reason(error)
    return target, None


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's plan of a save, in `writer` and `metadata`; carrying it out is left to others."""

    def _get_save_and_finalize_callbacks(self, writer, planned, *strategy):
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


_Report = tuple[str | None, list, dict[str, manifest.Entry]]  # what failed, megatron's results, files written


class _Writing:
    """A save on this rank: planned and copied when it exists, and written by a thread."""

    def __init__(
        self, folder: Path, iteration: int, roles: Mapping[str, RoleModel], state: Mapping[str, Any],
        mesh: ParallelMesh, memory: Callable[[str, int], Tensor],
    ):  # fmt: skip
        self.iteration = iteration
        self.best: float | None = None
        self._results: list = []
        self._written: dict[str, manifest.Entry] = {}
        self.target, self._error = mesh.from_main(_new_folder(folder) if mesh.is_main else None)
        buckets = self._planned(roles, state, memory) if self._error is None else []
        self.thread = threading.Thread(target=self._write, args=(buckets,), daemon=True)
        self.thread.start()

    def _planned(
        self, roles: Mapping[str, RoleModel], state: Mapping[str, Any], memory: Callable[[str, int], Tensor]
    ) -> list:
        """What this rank writes, copied."""
        self.plan = _Plan("torch_dist", 1, thread_count=1)
        tree: dict[str, Any] = {"state": dict(state)}
        with _quiet():
            for name, role in roles.items():
                if role.is_trained:
                    with role.on_device(Presence.STATE):
                        tree[name] = _on_host(shards.to_save(role, name), functools.partial(memory, name))
                        if role.mesh.device.type == "cuda":
                            torch.cuda.current_stream().synchronize()
                    tree[name]["scheduler"] = role.scheduler.state_dict()
            with _without_common_errors() as errors:
                dist_checkpointing.save(tree, str(self.target), self.plan, async_sharded_save=True, **_STRATEGY)
        buckets = self.plan.writer.write_buckets
        self.plan.writer.write_buckets = None
        self._error = next(iter(errors), None)
        return buckets

    def report(self) -> _Report:
        """Waits for the thread."""
        self.thread.join()
        return self._error, self._results, self._written

    def _write(self, buckets: list) -> None:
        try:
            for bucket in buckets:
                writer = self.plan.writer
                transforms = [writer.transforms] if hasattr(writer, "transforms") else []
                results: queue.Queue = queue.Queue()
                running: queue.Queue = queue.Queue()
                running.put(None)
                writer.write_preloaded_data(transforms, 0, bucket, results, running, True)
                _, found = results.get()
                if isinstance(found, Exception):
                    raise found
                self._results += found
                self._written[bucket[1]] = manifest.entry(Path(bucket[0]))
        except (OSError, RuntimeError) as error:
            self._error = self._error or str(error).splitlines()[0]


def _on_host(tree: dict[str, Any], memory: Callable[[int], Tensor]) -> dict[str, Any]:
    """`tree`, and of its tensors those that this rank writes as they are now, in host memory.

    Args:
        memory: so many bytes.
    """
    written = [x for x in nested_values(tree) if isinstance(x, ShardedTensor) and is_main_replica(x.replica_id)]
    sizes = [-(-x.data.nbytes // _ALIGNED) * _ALIGNED for x in written]
    for shard, place in zip(written, memory(sum(sizes)).split(sizes), strict=True):
        # a tensor with a storage of its own size: megatron copies what is a view of more
        own = torch.frombuffer(place.numpy(), dtype=shard.dtype, count=shard.data.numel()).view(shard.data.shape)
        shard.data = own.copy_(shard.data, non_blocking=True)
    return tree


def _read(checkpoint: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` filled.

    Raises:
        ConfigError: a part of it cannot be read without running code.
    """
    try:
        with _quiet():
            return dist_checkpointing.load(tree, str(checkpoint))
    except (CheckpointException, pickle.UnpicklingError) as error:
        (first, _), *_ = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
        if isinstance(first, ConfigError | pickle.UnpicklingError):
            raise ConfigError(f"{checkpoint} cannot be read without running code from it") from None
        raise


def load(checkpoint: Path, roles: Mapping[str, RoleModel]) -> dict[str, Any]:
    """Fills the trained roles, their optimizers and schedules, one role after the other; returns the `state` that was
    saved with them."""
    loaded: dict[str, Any] = {}
    for name, role in roles.items():
        if role.is_trained:
            with role.on_device(Presence.STATE, changes=True):
                loaded = _read(checkpoint, {name: shards.to_load(role, name)})
                load_optimizer(role.optimizer, loaded[name]["optimizer"])
            role.scheduler.load_state_dict(loaded[name]["scheduler"])
    return loaded["state"]


@contextlib.contextmanager
def _without_common_errors() -> Iterator[list[str]]:
    """Within it a failure to write common.pt, which the main rank of older megatrons does before all ranks plan
    together, is noted instead of raised: the others would wait for it."""
    errors: list[str] = []
    strategy = getattr(common, "TorchCommonSaveStrategy", None)
    if strategy is None:
        yield errors
        return
    original = strategy.save_common

    def save_common(*args) -> None:
        try:
            original(*args)
        except (OSError, RuntimeError) as error:
            errors.append(str(error).splitlines()[0])

    strategy.save_common = save_common
    try:
        yield errors
    finally:
        strategy.save_common = original


def load_weights(checkpoint: Path, name: str, role: RoleModel) -> None:
    """Fills `role` with the weights that the checkpoint holds under `name`, a head of another kind left out."""
    model = shards.weights(role, name)
    held = load_sharded_metadata(str(checkpoint))
    if f"{name}.output_layer.bias" in held or role.head == "scalar":
        same_head = (f"{name}.output_layer.bias" in held) == (role.head == "scalar")
        model = {key: part for key, part in model.items() if same_head or ".output_layer." not in key}
    _read(checkpoint, {"model": model})


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
