"""What was converted, and what was trained: read as HF tensors, exported, and compared with an HF folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from ..hf.files import HFFolder, HFWriter, copy_assets, whole_folder
from ..hf.index import is_checkpoint
from ..hf.pickles import read_index
from ..hf.weights import Difference, Table, compare, leftover
from ..mesh import ParallelMesh
from ..surviving import durable
from .export import RunExport, head_config
from .layout import Progress, layout, one_rank

_PROMPTS: list[Messages] = [[{"role": "user", "content": "What is 1 + 1?\n\nSay it twice."}]]


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
