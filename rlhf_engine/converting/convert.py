"""HF folder to a megatron checkpoint and back, in one process and one tensor at a time.

What `import_folder` writes is a `dist_checkpointing` folder like any other: laid out as TP x PP shards, loadable at
any other layout, with config.json and tokenizer files in it, so that `policy.path` may name it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from ..config import ConfigError, MeshConfig, ModelConfig, check_model
from ..data.chat import Messages
from ..data.tokenizer import Tokenizer
from ..hf.config import Head, family, parse, read_json, understood
from ..hf.files import HFFolder, HFWriter, copy_assets, whole_folder, write_json
from ..hf.rows import Vocabulary
from ..hf.weights import Difference, Table, check_leftover, compare, leftover, parameters
from ..mesh import ParallelMesh
from ..models.build import build_model, on_meta
from ..models.checkpoint import IMPORTED
from ..models.partition import padded_vocab_size, stage_layers
from ..surviving import durable
from .export import RunExport, head_config

_PIECE = 1 << 18  # bytes of a write
_PROMPTS: list[Messages] = [[{"role": "user", "content": "What is 1 + 1?\n\nSay it twice."}]]
Progress = Callable[[int], Any]  # is told of bytes as they are done


@contextlib.contextmanager
def one_rank() -> Iterator[ParallelMesh]:
    """A world of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = ParallelMesh(MeshConfig(1, 1, 1), "cpu")
    try:
        yield mesh
    finally:
        mesh.close()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Parameter:
    """A whole parameter and its places in a checkpoint: one, or one for each half of a gated MLP, along axis 0."""

    name: str
    shape: torch.Size
    places: Sequence[ShardedTensor]


def layout(model: ModelConfig, head: Head, prefix: str, mesh: ParallelMesh) -> list[Parameter]:
    """Every parameter of a model as megatron's checkpoints hold it, without any memory for it."""
    with on_meta():
        gpt = build_model(model, mesh, head, torch.float32)
        state = gpt.sharded_state_dict(prefix=f"{prefix}.")
        found = []
        for (name, parameter), local in zip(parameters([gpt]), (n for n, _ in gpt.named_parameters()), strict=True):
            entry = state[f"{prefix}.{local}"]
            places = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            found.append(Parameter(name, parameter.shape, places))
    return found


def count_parameters(model: ModelConfig, head: Head, mesh: ParallelMesh) -> int:
    """Learned numbers, those of a padded vocabulary left out and a tied embedding counted once."""
    table, total = Table(model, head), 0
    for parameter in layout(model, head, IMPORTED, mesh):
        row, numbers = table.row(parameter.name)
        shapes = {
            w.name: w.shape for w in row.windows(numbers, torch.empty(parameter.shape, device="meta"), model, 0, 1)
        }
        total += sum(math.prod(shape) for shape in shapes.values())
    return total


# -- import ----------------------------------------------------------------------------------------------------


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
    """Writes `out` as the shards of a TP x PP mesh; a run that was killed goes on at the first shard not finished.

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
    architecture, usual = family(source.config, where)
    if head is None and usual == "lm" and (score := source.tensors.get(architecture.score)) is not None:
        raise ConfigError(
            f"{score.path} has a score's head, {score.name}, beside a language model's: choose --head lm or scalar"
        )
    head = head or usual
    check_model(MeshConfig(tp, pp, 1), model)
    manifest = {"source": str(hf.resolve()), "tp": tp, "pp": pp, "dtype": str(dtype), "head": head}
    with one_rank() as mesh, whole_folder(out, manifest) as folder:
        planner = _Importer(source, model, head, tp, pp, mesh)
        plans, metadata = create_default_global_save_plan(planner.plans(dtype))
        sizes = [sum(_num_bytes(item) for item in plan.items) for plan in plans]
        planner.progress = start(sum(sizes))
        torch.serialization.set_crc32_options(False)  # nothing reads the sums, and they take longer than the writing
        writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
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


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _write_results(path: Path, results: list[WriteResult]) -> None:
    rows = []
    for r in results:
        where = r.storage_data
        place = (where.relative_path, where.offset, where.length)
        rows.append([r.index.fqn, list(r.index.offset or ()), r.index.index, r.size_in_bytes, *place])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows))
    temporary.replace(path)


def _read_results(path: Path) -> list[WriteResult]:
    return [
        WriteResult(MetadataIndex(fqn, offset, index), size, _StorageInfo(*where))
        for fqn, offset, index, size, *where in json.loads(path.read_text())
    ]


# -- export ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A model in a megatron checkpoint.

    Args:
        source: folder whose config.json describes it; None where the checkpoint's own folder does.
        role: of a trained checkpoint that holds several.
        ignore_keys: see `parse`.
    """

    folder: Path
    source: Path | None = None
    role: str | None = None
    ignore_keys: Sequence[str] = ()

    @property
    def described(self) -> Path:
        return self.source or self.folder

    def read(self, mesh: ParallelMesh, progress: Callable[[int], Progress]) -> Iterator[tuple[str, Tensor]]:
        """Its HF tensors, one parameter's at a time."""
        model, head, prefix = self.model()
        reader = FileSystemReader(self.folder)
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, True)
        table = Table(model, head)
        found = layout(model, head, prefix, mesh)
        for place in (place for parameter in found for place in parameter.places):
            if place.key not in metadata.state_dict_metadata:
                raise ConfigError(f"{self.folder} has no tensor {place.key}: config.json describes another model")
        dtypes = [metadata.state_dict_metadata[p.places[0].key].properties.dtype for p in found]  # type: ignore[union-attr]
        advance = progress(sum(p.shape.numel() * d.itemsize for p, d in zip(found, dtypes, strict=True)))
        for parameter, dtype in zip(found, dtypes, strict=True):
            parts = []
            for place in parameter.places:
                planner = _Place(place, dtype)
                stored = metadata.state_dict_metadata[place.key]
                chunk = ChunkStorageMetadata(torch.Size(place.global_offset), planner.tensor.shape)
                plan = LoadPlan(create_read_items_for_chunk_list(place.key, stored, [chunk]))  # type: ignore[arg-type]
                reader.read_data(plan, planner).wait()
                parts.append(planner.tensor.reshape(place.local_shape))
            shard = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield from table.export(parameter.name, [shard]).items()
            advance(shard.nbytes)

    def model(self) -> tuple[ModelConfig, Head, str]:
        """Its configuration, its head, and the prefix of its keys."""
        if not (self.folder / ".metadata").is_file():
            raise ConfigError(f"{self.folder} is not a megatron checkpoint")
        config_path = self.described / "config.json"
        if not config_path.is_file():
            raise ConfigError(f"{self.folder} has no config.json: --hf DIR names a folder that describes the model")
        model = parse(read_json(config_path), str(config_path), self.ignore_keys, "--ignore-keys")
        held = FileSystemReader(self.folder).read_metadata().state_dict_metadata
        roles = [
            key.split(".")[0] for key in held if key.count(".") == 3 and key.endswith(".decoder.final_layernorm.weight")
        ]
        role = self.role or (roles[0] if len(roles) == 1 else None)
        if role not in roles:
            raise ConfigError(f"{self.folder} holds {', '.join(roles)}: --role names one of them")
        return model, "scalar" if f"{role}.output_layer.bias" in held else "lm", role

    def run(self) -> dict[str, Any] | None:
        """Configuration of the run that the checkpoint is of; None where it was converted and not trained."""
        checkpoints = self.folder.resolve().parent
        file = checkpoints.parent / "config.yaml"
        return durable.read(file) if checkpoints.name == "checkpoints" else None

    def tokenizer(self) -> Tokenizer | None:
        """Of the run.

        Raises:
            ConfigError: it is no longer where it was.
        """
        if (run := self.run()) is None:
            return None
        settings, phase = run["tokenizer"], self.folder.resolve().parent.parent
        path = settings["path"] or run["policy"]["path"] or phase.parent / "tokenizer" / "tokenizer.model"
        if not Path(path).exists():
            raise ConfigError(f"{path}, the tokenizer of the run in {phase.parent}, is not there")
        return Tokenizer(str(path), settings["template"], settings["end_id"], settings.get("date"))

    def check_score(self) -> None:
        """Raises:
        ConfigError: the folder that describes a model with a score puts it elsewhere than the run did.
        """
        model, head, _ = self.model()
        if head == "lm" or (run := self.run()) is None:
            return
        base = run["reward"] if run["reward"]["path"] else run["policy"]
        if base["path"] is None or not (where := Path(path := base["path"]) / "config.json").is_file():
            return
        began = parse(read_json(where), str(where), base.get("ignore_keys", ()))
        if began.score_token != model.score_token or began.score_pad not in (None, model.score_pad):
            raise ConfigError(f"{self.described} has the score at another token than the run had it: --hf {path}")


class _Place(DefaultLoadPlanner):
    """A load planner for one tensor; zero where the checkpoint has less, which is only a vocabulary's padding."""

    def __init__(self, place: ShardedTensor, dtype: torch.dtype):
        super().__init__()
        self.tensor = torch.zeros((1,) * place.prepend_axis_num + tuple(place.local_shape), dtype=dtype)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self.tensor, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


def export_folder(checkpoint: Checkpoint, out: Path, max_bytes: int, start: Callable[[int], Progress]) -> list[str]:
    """Writes the HF folder `out` from a megatron checkpoint; what one should know of it."""
    model, head, _ = checkpoint.model()
    checkpoint.check_score()
    tokenizer = checkpoint.tokenizer()
    run = RunExport(model, head, checkpoint.described, tokenizer, _PROMPTS) if tokenizer is not None else None
    with one_rank() as mesh, whole_folder(out) as folder:
        writer = HFWriter(folder, max_bytes)
        for name, tensor in checkpoint.read(mesh, start):
            writer.add(name, tensor)
        if run is not None:
            writer.close(run.config)
            run.write(folder)
        else:
            writer.close(head_config(model, head, checkpoint.described))
            copy_assets(checkpoint.described, folder)
    return run.notes if run is not None else []


def verify(checkpoint: Checkpoint, hf: Path, start: Callable[[int], Progress]) -> tuple[int, list[Difference]]:
    """How many tensors of a checkpoint equal those of an HF folder bit for bit, and which of either do not."""
    with one_rank() as mesh:
        source, used = HFFolder(hf), set[str]()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in checkpoint.read(mesh, start):
                used.add(name)
                yield name, tensor

        equal, found = compare(tensors(), source)
        unused = leftover(source, checkpoint.model()[0], used)
        return equal, [*found, *(Difference(entry.name, "is in the HF folder alone") for entry in unused)]
