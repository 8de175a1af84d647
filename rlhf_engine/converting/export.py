"""Models in HF format: from a model on the mesh, as folders that transformers and vLLM load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError, ModelConfig
from ..data.chat import Messages
from ..data.saved import Special, read_back, save_tokenizer, special
from ..data.templates import read_json as read_json_if_there
from ..data.tokenizer import Tokenizer
from ..hf.config import ARCHITECTURES, Head, read_json, understood, write_model_config
from ..hf.files import complete, whole_folder, write_json
from ..hf.shares import save_weights
from ..models.role import RoleModel


def export_role(
    role: RoleModel, target: Path, config: dict[str, Any], add: Callable[[Path], Any] = lambda folder: None
) -> None:
    """Writes `target`, each rank files of its own; replaces what was there once all of it is on the disk.

    Args:
        config: its config.json, from `head_config`.
        add: writes what belongs to the model besides into a folder, on the main rank.
    """
    mesh = role.mesh
    with contextlib.ExitStack() as stack:
        folder = mesh.from_main(stack.enter_context(whole_folder(target)) if mesh.is_main else None)
        stack.enter_context(role.on_device())
        files, bias = save_weights(role.chunks, role.model, role.head, mesh, folder)
        if mesh.is_main:
            complete(folder, files, config | ({"score_bias": bias} if bias else {}))
            add(folder)
    mesh.barrier()


def head_config(model: ModelConfig, head: Head, source: Path | None) -> dict[str, Any]:
    """config.json of a model with this head, the rest as in the `source` folder as far as it was understood."""
    where = source / "config.json" if source is not None else None
    config = understood(read_json(where), str(where)) if where is not None else write_model_config(model)
    architecture = ARCHITECTURES[model.architecture]
    for key in ("score_bias", "id2label", "label2id", "num_labels"):  # of a head, which may be another one
        config.pop(key, None)
    if head == "scalar":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config | {"architectures": [architecture.lm if head == "lm" else architecture.scalar]}


class RunExport:
    """What a run knows of a model that it exports, besides the weights.

    Args:
        source: folder that the model came from.
        tokenizer: that the run used.
        prompts: dialogues of the run, which are tokenised once more with the files that were written.

    Attributes:
        config: its config.json. The special tokens are those of the run, and not of the source.
        notes: what one should know of the files, for the main rank once they are written.
    """

    def __init__(
        self, model: ModelConfig, head: Head, source: Path | None, tokenizer: Tokenizer, prompts: Sequence[Messages]
    ):
        assert model.vocab_size is not None
        self.head, self.source, self.tokenizer, self.prompts = head, source, tokenizer, prompts
        is_padded = head == "scalar" and model.score_token is None
        self.tokens: Special = special(tokenizer, model.vocab_size, is_padded, model.score_pad)
        self.config = head_config(model, head, source) | self.tokens.ids
        self.notes: list[str] = []
        if is_padded and (self.tokens.pad is None or self.tokens.pad[0] is None):
            self.notes.append("no control token can be its pad token, so transformers scores one dialogue at a time")

    def write(self, folder: Path) -> list[str]:
        """Everything but the weights, in a folder with its config.json; what `read_back` finds wrong with it."""
        save_tokenizer(self.tokenizer, folder, self.tokens)
        if self.head == "lm":
            about: dict[str, Any] = {}
            if self.source is not None:
                try:
                    about = read_json_if_there(self.source / "generation_config.json")
                except ConfigError as error:  # too late to refuse it: the model is trained
                    self.notes.append(f"{error}: its settings are left out")
            found = {key: value for key, value in (about | self.tokens.ids).items() if value is not None}
            write_json(folder / "generation_config.json", found)
        elif bias := read_json(folder / "config.json").get("score_bias"):
            self.notes.append(f"transformers leaves out score_bias of config.json: its scores are ours less {bias:.4g}")
        differences = read_back(self.tokenizer, folder, self.prompts)
        self.notes += map(str, differences)
        return [str(difference) for difference in differences if not difference.has_way]
