"""Models in HF format: from a model on the mesh, as folders that transformers and vLLM load."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..models.role import RoleModel
from .config import ARCHITECTURES, Head, read_json, write_model_config
from .files import HFWriter, whole_folder
from .weights import save_weights


def export_role(role: RoleModel, target: Path, source: Path | None) -> None:
    """Writes `target` from every rank's part of a model; replaces what was there once all of it is on the disk.

    Args:
        source: folder of the checkpoint that the model came from, whose config and tokenizer go with it; None for a
            model that started from random weights.
    """
    mesh = role.mesh
    config = head_config(role.model, role.head, source) if mesh.is_main else {}
    with contextlib.ExitStack() as stack:
        writer = None
        if mesh.is_main:
            writer = HFWriter(stack.enter_context(whole_folder(target)))
        save_weights(role.gpt, role.model, role.head, mesh, writer)
        if writer is not None:
            writer.close(config, source)


def head_config(model: ModelConfig, head: Head, source: Path | None) -> dict[str, Any]:
    """config.json of a model with this head, the rest as in the `source` folder."""
    config = read_json(source / "config.json") if source is not None else write_model_config(model)
    architecture = ARCHITECTURES[model.architecture]
    config.pop("score_bias", None)
    if head == "scalar":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config | {"architectures": [architecture.lm if head == "lm" else architecture.scalar]}
