"""What was converted, and what was trained: read as HF tensors, exported, and compared with an HF folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..config import ConfigError, ModelConfig
from ..data.chat import Messages
from ..data.tokenizer import Tokenizer
from ..hf.config import Head, parse, read_json
from ..hf.files import HFFolder, complete, copy_assets, cut, file_names, whole_folder, write_files
from ..hf.index import SCORE_BIAS, is_checkpoint
from ..hf.pickles import read_index
from ..hf.weights import Difference, Table, compare, leftover
from ..surviving import durable
from .export import RunExport, head_config
from .layout import Parameter, Progress, layout, one_rank
from .workers import spread

_PROMPTS: list[Messages] = [[{"role": "user", "content": "What is 1 + 1?\n\nSay it twice."}]]


@dataclass(frozen=True)
class Held:
    """A whole parameter of a checkpoint, and the type that it is stored as."""

    parameter: Parameter
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.parameter.shape.numel() * self.dtype.itemsize


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

    def held(self) -> dict[str, Held]:
        """Its parameters, by name.

        Raises:
            ConfigError: it lacks one.
        """
        model, head, prefix = self.model()
        metadata = FileSystemReader(self.folder).read_metadata().state_dict_metadata
        with one_rank() as mesh:
            found = layout(model, head, prefix, mesh)
        for place in (place for parameter in found for place in parameter.places):
            if place.key not in metadata:
                raise ConfigError(f"{self.folder} has no tensor {place.key}: config.json describes another model")
        dtypes = [metadata[parameter.places[0].key].properties.dtype for parameter in found]  # type: ignore[union-attr]
        return {parameter.name: Held(parameter, dtype) for parameter, dtype in zip(found, dtypes, strict=True)}

    def read(self, held: Iterable[Held], advance: Progress) -> Iterator[tuple[str, Tensor]]:
        """HF tensors of parameters, one parameter's at a time."""
        model, head, _ = self.model()
        table = Table(model, head)
        reader = FileSystemReader(self.folder)
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, True)
        for each in held:
            parts = []
            for place in each.parameter.places:
                planner = _Place(place, each.dtype)
                stored = metadata.state_dict_metadata[place.key]
                chunk = ChunkStorageMetadata(torch.Size(place.global_offset), planner.tensor.shape)
                plan = LoadPlan(create_read_items_for_chunk_list(place.key, stored, [chunk]))  # type: ignore[arg-type]
                reader.read_data(plan, planner).wait()
                parts.append(planner.tensor.reshape(place.local_shape))
            shard = parts[0] if len(parts) == 1 else torch.cat(parts)
            advance(each.num_bytes)
            yield from table.export(each.parameter.name, [shard]).items()

    def model(self) -> tuple[ModelConfig, Head, str]:
        """Its configuration, its head, and the prefix of its keys."""
        if not is_checkpoint(self.folder):
            raise ConfigError(f"{self.folder} is not a megatron checkpoint")
        config_path = self.described / "config.json"
        if not config_path.is_file():
            raise ConfigError(f"{self.folder} has no config.json: --hf DIR names a folder that describes the model")
        model = parse(read_json(config_path), str(config_path), self.ignore_keys, "--ignore-keys")
        held = read_index(self.folder).state_dict_metadata
        roles = [
            key.split(".")[0] for key in held if key.count(".") == 3 and key.endswith(".decoder.final_layernorm.weight")
        ]
        role = self.role or (roles[0] if len(roles) == 1 else "")
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


def export_folder(
    checkpoint: Checkpoint,
    out: Path,
    max_bytes: int,
    start: Callable[[int], Progress],
    processes: int | None = None,
) -> list[str]:
    """Writes the HF folder `out` from a megatron checkpoint, each process files of its own; what one should know of
    it.

    Args:
        max_bytes: of a file.
        processes: see `spread`.
    """
    model, head, _ = checkpoint.model()
    checkpoint.check_score()
    tokenizer = checkpoint.tokenizer()
    run = RunExport(model, head, checkpoint.described, tokenizer, _PROMPTS) if tokenizer is not None else None
    held, table = checkpoint.held(), Table(model, head)
    config = run.config if run is not None else head_config(model, head, checkpoint.described)
    biases = [held.pop(name) for name in list(held) if table.row(name)[0].hf == SCORE_BIAS]
    for _, bias in checkpoint.read(biases, lambda num_bytes: None):
        config = config | ({"score_bias": float(bias)} if bias else {})
    parts = cut({name: each.num_bytes for name, each in held.items()}, max_bytes)
    files = [_File(name, [held[x] for x in part]) for name, part in zip(file_names(len(parts)), parts, strict=True)]
    sizes = {file: sum(each.num_bytes for each in file.held) for file in files}
    with whole_folder(out) as folder:
        work = functools.partial(_write_file, checkpoint, folder)
        for _ in spread(work, sizes, start(sum(sizes.values())), processes):
            pass
        complete(folder, [file.name for file in files], config)
        if run is not None:
            run.write(folder)
        else:
            copy_assets(checkpoint.described, folder)
    return run.notes if run is not None else []


@dataclass(frozen=True, eq=False)
class _File:
    """Of an HF folder, and the parameters whose tensors it has."""

    name: str
    held: list[Held]


def _write_file(checkpoint: Checkpoint, folder: Path, file: _File, advance: Progress) -> None:
    model, head, _ = checkpoint.model()
    table, tensors = Table(model, head), dict[str, Tensor]()
    for each in file.held:
        shape = torch.empty(each.parameter.shape, dtype=each.dtype, device="meta")
        tensors |= table.export(each.parameter.name, [shape])
    write_files(folder, {file.name: tensors}, checkpoint.read(file.held, advance))


def verify(checkpoint: Checkpoint, hf: Path, start: Callable[[int], Progress]) -> tuple[int, list[Difference]]:
    """How many tensors of a checkpoint equal those of an HF folder bit for bit, and which of either do not."""
    source, used = HFFolder(hf), set[str]()
    held = checkpoint.held()
    advance = start(sum(each.num_bytes for each in held.values()))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in checkpoint.read(held.values(), advance):
            used.add(name)
            yield name, tensor

    equal, found = compare(tensors(), source)
    unused = leftover(source, checkpoint.model()[0], used)
    return equal, [*found, *(Difference(entry.name, "is in the HF folder alone") for entry in unused)]
