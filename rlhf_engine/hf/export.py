"""Models in HF format: from a model on the mesh, as folders that transformers and vLLM load."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..models.role import RoleModel
from .config import ARCHITECTURES, Head, read_json, understood, write_model_config
from .files import HFWriter, whole_folder
from .weights import save_weights


def export_role(role: RoleModel, target: Path, config: dict[str, Any], assets: Sequence[Path]) -> None:
    """Writes `target` from every rank's part of a model; replaces what was there once all of it is on the disk.

    Args:
        config: its config.json, from `head_config`.
        assets: folders whose tokenizer and generation config go with it, or a tokenizer's file.
    """
    with contextlib.ExitStack() as stack:
        writer = HFWriter(stack.enter_context(whole_folder(target))) if role.mesh.is_main else None
        stack.enter_context(role.on_device())
        save_weights(role.chunks, role.model, role.head, role.mesh, writer)
        if writer is not None:
            writer.close(config, assets)
    role.mesh.barrier()


def head_config(model: ModelConfig, head: Head, source: Path | None) -> dict[str, Any]:
    """config.json of a model with this head, the rest as in the `source` folder as far as it was understood."""
    where = source / "config.json" if source is not None else None
    config = understood(read_json(where), str(where)) if where is not None else write_model_config(model)
    architecture = ARCHITECTURES[model.architecture]
    config.pop("score_bias", None)
    if head == "scalar":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config | {"architectures": [architecture.lm if head == "lm" else architecture.scalar]}
