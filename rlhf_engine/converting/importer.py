"""HF folder to a megatron checkpoint, one tensor at a time: torch's checkpoint writer asks for each in its turn. The
shards of a rank are written by one process."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ..config import ConfigError, MeshConfig, ModelConfig, check_model
from ..hf.config import Head, family, parse, read_json, understood
from ..hf.files import HFFolder, PieceFile, copy_assets, whole_folder, write_json
from ..hf.rows import Vocabulary
from ..hf.weights import Table, check_leftover
from ..models.checkpoint import IMPORTED
from ..models.partition import padded_vocab_size, stage_layers
from ..surviving import durable
from .export import head_config
from .layout import Progress, layout, one_rank
from .workers import spread


@dataclass(frozen=True)
class _Part:
    """What an item of a plan is made of: of a shard of a parameter all, or one of as many parts as it has places."""

    name: str
    shape: torch.Size
    rank: int
    place: int
    num_places: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class _Shards:
    """Those of one rank."""

    rank: int
    plan: SavePlan
    parts: dict[MetadataIndex, _Part]


@dataclass(frozen=True)
class _Import:
    """A folder as the shards of a TP x PP mesh."""

    hf: Path
    model: ModelConfig
    head: Head
    tp: int
    pp: int

    def plans(self, source: HFFolder, dtype: torch.dtype | None) -> list[list[tuple[WriteItem, _Part]]]:
        """What each rank writes. Every HF tensor is looked at, and none is read."""
        table = Table(self.model, self.head)
        with one_rank() as mesh:
            parameters = layout(self.model, self.head, IMPORTED, mesh)
        items: list[list[tuple[WriteItem, _Part]]] = [[] for _ in range(self.tp * self.pp)]
        used: set[str] = set()
        for parameter in parameters:
            row, numbers = table.row(parameter.name)
            shape = list(parameter.shape)
            if isinstance(row, Vocabulary):
                assert self.model.vocab_size is not None
                shape[0] = padded_vocab_size(self.model.vocab_size, self.tp)
            if row.dim is not None:
                shape[row.dim] //= self.tp
            shard = torch.empty(shape, device="meta")
            windows = row.windows(numbers, shard, self.model, 0, self.tp)
            # an empty part of each tells whether it is there, its shape and its type
            kinds = [source.read(replace(window, stop=window.start)).dtype for window in windows]
            kind = functools.reduce(torch.promote_types, kinds)
            used |= {window.name for window in windows}
            for rank in range(self.tp if row.dim is not None else 1):
                for i, place in enumerate(parameter.places):
                    item = self._item(place, shard, len(parameter.places), row.dim, rank, dtype or kind)
                    part = _Part(parameter.name, shard.shape, rank, i, len(parameter.places), dtype or kind)
                    items[self._stage(parameter.name) * self.tp + rank].append((item, part))
        check_leftover(source, self.model, used)
        return items

    def _item(
        self, place: ShardedTensor, shard: Tensor, num_places: int, dim: int | None, rank: int, dtype: torch.dtype
    ) -> WriteItem:
        before = place.prepend_axis_num
        sizes = list(shard.shape)
        sizes[0] //= num_places
        offset, whole = list(place.global_offset), list(place.global_shape)
        if dim is not None:
            offset[before + dim] += rank * sizes[dim]
            whole[before + dim] = sizes[dim] * self.tp * num_places if dim == 0 else sizes[dim] * self.tp
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size([1] * before + sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(whole))
        return WriteItem(MetadataIndex(place.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def _stage(self, name: str) -> int:
        """The pipeline stage that has a parameter."""
        if not name.startswith("decoder.layers."):
            return 0 if name.startswith("embedding") else self.pp - 1
        stages = [stage for stage, n in enumerate(stage_layers(self.model.num_layers, self.pp)) for _ in range(n)]
        return stages[int(name.split(".")[2])]


class _Planner(DefaultSavePlanner):
    """A save planner whose tensors are read shortly before their turn to be written comes.

    A thread reads the next one while the writer writes; both let go of the interpreter for most of that.
    """

    def __init__(self, job: _Import, shards: _Shards, reader: Executor, advance: Progress):
        super().__init__()
        self.job, self.parts, self.reader, self.advance = job, shards.parts, reader, advance
        self.source, self.table = HFFolder(job.hf), Table(job.model, job.head)
        self.coming = self._futures(shards.plan)

    def _futures(self, plan: SavePlan) -> Iterator[Future[Tensor]]:
        before: Future[Tensor] | None = None
        for item in plan.items:
            now = self.reader.submit(self._read, item)
            if before is not None:
                yield before
            before = now
        if before is not None:
            yield before

    def resolve_data(self, write_item: WriteItem) -> Tensor:  # type: ignore[override]
        data = next(self.coming).result()
        self.advance(data.nbytes)
        return data

    def _read(self, item: WriteItem) -> Tensor:
        part, model, tp = self.parts[MetadataIndex(item.index.fqn, item.index.offset)], self.job.model, self.job.tp
        if part.num_places > 1:  # of a gated MLP: each half is an HF tensor of its own
            row, numbers = self.table.row(part.name)
            windows = row.windows(numbers, torch.empty(part.shape, device="meta"), model, part.rank, tp)
            data = self.source.read(windows[part.place])
        else:
            whole = self.table.load(part.name, part.shape, self.source, part.rank, tp)
            assert whole is not None
            data = whole
        assert item.tensor_data is not None
        data = data.to(part.dtype).reshape(item.tensor_data.chunk.sizes).contiguous()
        # a tensor is saved with all of its storage, which here may be a whole file that is mapped to memory
        start = data.storage_offset() * data.itemsize
        storage: Any = data.untyped_storage()[start : start + data.nbytes]
        return data.new_empty(0).set_(storage, 0, data.shape, data.stride())


class _FileSystem(FileSystem):
    @contextlib.contextmanager
    def create_stream(self, path, mode):
        with PieceFile(path, mode) as stream:
            yield stream


def import_folder(
    hf: Path,
    out: Path,
    tp: int,
    pp: int,
    dtype: torch.dtype | None,
    start: Callable[[int], Progress],
    ignore_keys: Sequence[str] = (),
    head: Head | None = None,
    processes: int | None = None,
) -> None:
    """Writes `out` as the shards of a TP x PP mesh, each process shards of its own; a run that was killed goes on with
    those that are not finished, unless the HF folder's files have changed since.

    Args:
        dtype: None keeps that of each tensor.
        start: is given the total of bytes, and returns what is told of those done.
        ignore_keys: see `parse`.
        head: None takes that of config.json.
        processes: see `spread`.

    Raises:
        ConfigError: the folder is not one that can be imported; nothing is left behind.
    """
    where = str(hf / "config.json")
    model = parse(read_json(hf / "config.json"), where, ignore_keys, "--ignore-keys")
    source = HFFolder(hf)
    usual = _head(source, where, head)
    head = head or usual
    check_model(MeshConfig(tp, pp, 1), model)
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(hf.iterdir())]
    manifest = {
        "source": str(hf.resolve()), "files": files, "tp": tp, "pp": pp, "dtype": str(dtype), "head": head,
        "ignore_keys": list(ignore_keys),
    }  # fmt: skip
    job = _Import(hf, model, head, tp, pp)
    with whole_folder(out, manifest) as folder:
        items = job.plans(source, dtype)
        plans, metadata = create_default_global_save_plan([SavePlan([item for item, _ in each]) for each in items])
        writer = _writer(folder)
        plans = writer.prepare_global_plan(plans)
        sizes = {
            _Shards(rank, plan, {item.index: part for item, part in each}): sum(map(_num_bytes, plan.items))
            for rank, (plan, each) in enumerate(zip(plans, items, strict=True))
        }
        marks = [folder / f"rank_{rank}.json" for rank in range(len(plans))]
        left = {shards: size for shards, size in sizes.items() if not marks[shards.rank].is_file()}
        advance = start(sum(sizes.values()))
        advance(sum(sizes.values()) - sum(left.values()))
        for shards, found in spread(functools.partial(_write, job, folder), left, advance, processes):
            _write_results(marks[shards.rank], found)
        writer.finish(metadata, [_read_results(done) for done in marks])
        torch.save({}, folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        config = understood(source.config, where) if head == usual else head_config(model, head, hf)
        if dtype is not None:
            config = config | {"dtype" if "dtype" in config else "torch_dtype": str(dtype).removeprefix("torch.")}
        write_json(folder / "config.json", config)
        copy_assets(hf, folder)
        for done in folder.glob("rank_*.json"):
            done.unlink()


def _head(source: HFFolder, where: str, asked: Head | None) -> Head:
    """What the folder's config.json says that its model has."""
    architecture, head = family(source.config, where)
    if asked is None and head == "lm" and (score := source.tensors.get(architecture.score)) is not None:
        raise ConfigError(
            f"{score.path} has a score's head, {score.name}, beside a language model's: choose --head lm or scalar"
        )
    return head


def _writer(folder: Path) -> FileSystemWriter:
    torch.serialization.set_crc32_options(False)  # nothing reads the sums, and they take longer than the writing
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    writer.fs = _FileSystem()
    return writer


def _write(job: _Import, folder: Path, shards: _Shards, advance: Progress) -> list[WriteResult]:
    with ThreadPoolExecutor(1) as reader:
        return _writer(folder).write_data(shards.plan, _Planner(job, shards, reader, advance)).wait()


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _write_results(path: Path, results: list[WriteResult]) -> None:
    rows = []
    for r in results:
        where = r.storage_data
        place = (where.relative_path, where.offset, where.length)
        rows.append([r.index.fqn, list(r.index.offset or ()), r.index.index, r.size_in_bytes, *place])
    durable.write(path, json.dumps(rows))


def _read_results(path: Path) -> list[WriteResult]:
    return [
        WriteResult(MetadataIndex(fqn, offset, index), size, _StorageInfo(*where))
        for fqn, offset, index, size, *where in json.loads(path.read_text())
    ]
