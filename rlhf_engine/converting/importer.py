"""HF folder to a megatron checkpoint, one tensor at a time: torch's checkpoint writer asks for each in its turn."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
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
from ..hf.files import HFFolder, copy_assets, whole_folder, write_json
from ..hf.rows import Vocabulary
from ..hf.weights import Table, check_leftover
from ..mesh import ParallelMesh
from ..models.checkpoint import IMPORTED
from ..models.partition import padded_vocab_size, stage_layers
from ..surviving import durable
from .export import head_config
from .layout import Progress, layout, one_rank

_PIECE = 1 << 18  # bytes of a write


class _Importer(DefaultSavePlanner):
    """A save planner whose tensors are read shortly before their turn to be written comes.

    A thread reads the next one while the writer writes; both let go of the interpreter for most of that.
    """

    def __init__(self, source: HFFolder, model: ModelConfig, head: Head, tp: int, pp: int, mesh: ParallelMesh):
        super().__init__()
        self.source, self.model, self.tp, self.pp = source, model, tp, pp
        self.table = Table(model, head)
        self.parameters = layout(model, head, IMPORTED, mesh)
        self.resolvers: dict[MetadataIndex, tuple[str, torch.Size, int, int, int, torch.dtype]] = {}
        self.progress: Progress = lambda num_bytes: None
        self.reader = ThreadPoolExecutor(1)
        self.coming: Iterator[Future[Tensor]] = iter(())

    def plans(self, dtype: torch.dtype | None) -> list[SavePlan]:
        """What each rank of a TP x PP mesh would write. Every HF tensor is looked at, and none is read."""
        items: list[list[WriteItem]] = [[] for _ in range(self.tp * self.pp)]
        used: set[str] = set()
        for parameter in self.parameters:
            row, numbers = self.table.row(parameter.name)
            shape = list(parameter.shape)
            if isinstance(row, Vocabulary):
                assert self.model.vocab_size is not None
                shape[0] = padded_vocab_size(self.model.vocab_size, self.tp)
            if row.dim is not None:
                shape[row.dim] //= self.tp
            shard = torch.empty(shape, device="meta")
            windows = row.windows(numbers, shard, self.model, 0, self.tp)
            # an empty part of each tells whether it is there, its shape and its type
            kinds = [self.source.read(replace(window, stop=window.start)).dtype for window in windows]
            kind = functools.reduce(torch.promote_types, kinds)
            used |= {window.name for window in windows}
            for rank in range(self.tp if row.dim is not None else 1):
                for i, place in enumerate(parameter.places):
                    item = self._item(place, shard, len(parameter.places), row.dim, rank, dtype or kind)
                    self.resolvers[item.index] = (
                        parameter.name, shard.shape, rank, i, len(parameter.places), dtype or kind
                    )  # fmt: skip
                    items[self._stage(parameter.name) * self.tp + rank].append(item)
        check_leftover(self.source, self.model, used)
        return [SavePlan(part) for part in items]

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

    def read_ahead(self, plan: SavePlan) -> None:
        """To be called before the items of `plan` are written, in their order."""
        self.coming = self._futures(plan)

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
        self.progress(data.nbytes)
        return data

    def _read(self, item: WriteItem) -> Tensor:
        name, shape, rank, i, num_places, dtype = self.resolvers[MetadataIndex(item.index.fqn, item.index.offset)]
        if num_places > 1:  # of a gated MLP: each half is an HF tensor of its own
            row, numbers = self.table.row(name)
            windows = row.windows(numbers, torch.empty(shape, device="meta"), self.model, rank, self.tp)
            part = self.source.read(windows[i])
        else:
            whole = self.table.load(name, shape, self.source, rank, self.tp)
            assert whole is not None
            part = whole
        assert item.tensor_data is not None
        part = part.to(dtype).reshape(item.tensor_data.chunk.sizes).contiguous()
        # a tensor is saved with all of its storage, which here may be a whole file that is mapped to memory
        start = part.storage_offset() * part.itemsize
        storage: Any = part.untyped_storage()[start : start + part.nbytes]
        return part.new_empty(0).set_(storage, 0, part.shape, part.stride())


class _File(io.FileIO):
    """Written in small pieces. A whole tensor at once would ask the page cache for huge pages, which in a virtual
    machine take three times as long to come by."""

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        for i in range(0, len(view), _PIECE):
            piece = view[i : i + _PIECE]
            while len(piece):
                piece = piece[super().write(piece) :]
        return len(view)


class _FileSystem(FileSystem):
    @contextlib.contextmanager
    def create_stream(self, path, mode):
        with _File(path, mode) as stream:
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
) -> None:
    """Writes `out` as the shards of a TP x PP mesh; a run that was killed goes on at the first shard not finished,
    unless the HF folder's files have changed since.

    Args:
        dtype: None keeps that of each tensor.
        start: is given the total of bytes, and returns what is told of those done.
        ignore_keys: see `parse`.
        head: None takes that of config.json.

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
    with one_rank() as mesh, whole_folder(out, manifest) as folder:
        planner = _Importer(source, model, head, tp, pp, mesh)
        plans, metadata = create_default_global_save_plan(planner.plans(dtype))
        sizes = [sum(_num_bytes(item) for item in plan.items) for plan in plans]
        planner.progress = start(sum(sizes))
        torch.serialization.set_crc32_options(False)  # nothing reads the sums, and they take longer than the writing
        writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
        writer.fs = _FileSystem()
        results = []
        for rank, plan in enumerate(writer.prepare_global_plan(plans)):
            done = folder / f"rank_{rank}.json"
            if done.is_file():
                results.append(_read_results(done))
                planner.progress(sizes[rank])
                continue
            planner.read_ahead(plan)
            results.append(writer.write_data(plan, planner).wait())
            _write_results(done, results[-1])
        writer.finish(metadata, results)
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
