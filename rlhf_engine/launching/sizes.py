"""Sizes that an experiment leaves open (`null`): lengths by the model's context, batches by the machine.

Lengths and batches do not depend on the mesh, so the experiment does not; a micro-batch is what memory holds of them.
"""

from __future__ import annotations

import dataclasses

import psutil

from ..config import BUILDS_ON, PAIRED, SAMPLING, MeshConfig, ModelConfig, RunConfig
from ..config.devices import GPUS, gpu_here

_LONGEST = {"cpu": 512, "cuda": 2048}  # tokens of a dialogue
_BATCH = {"cpu": 16, "cuda": 64}  # rows of an optimizer step
_SHARE = 0.1  # of a device's memory, for the activations of a micro-batch
_BYTES = {"cpu": 68, "cuda": 34}  # of activations, for each token, layer and hidden unit (arXiv:2205.05198, section 4)
_MOST_ROWS = 16  # of a micro-batch: more make it no faster
_LEAST_MEMORY = 16e9  # bytes, of a GPU that the table of devices does not have


def settle(config: RunConfig, mesh: MeshConfig, model: ModelConfig, context: int, device: str) -> dict[str, int]:
    """Fills in what is open.

    Args:
        model: the policy's.
        context: tokens that the policy and the reward model read.
        device: "cpu" or "cuda".

    Returns:
        What was filled in, by key.
    """
    is_open = set(open_sizes(config))
    found: dict[str, int] = {}

    def fill(value: int, *keys: str) -> None:
        for key in is_open.intersection(keys):
            section, name = key.split(".")
            setattr(getattr(config, section), name, value)
            found[key] = value

    data, rollout = config.data, config.rollout
    fill(min(context, _LONGEST[device]), "data.max_seq_len")
    if "data.max_prompt_len" in is_open:
        answer = data.max_seq_len // 2 if "rollout.max_new_tokens" in is_open else rollout.max_new_tokens
        fill(max(1, data.max_seq_len - answer), "data.max_prompt_len")
    fill(max(1, data.max_seq_len - data.max_prompt_len), "rollout.max_new_tokens")
    fill(_BATCH[device], *(f"{phase}.batch_size" for phase in BUILDS_ON.keys() - SAMPLING))
    for phase in SAMPLING:
        fill(max(1, 2 * _BATCH[device] // getattr(config, phase).samples_per_prompt), f"{phase}.prompts_per_iteration")
    row = _BYTES[device] * data.max_seq_len * model.hidden_size * model.num_layers / (mesh.tp * mesh.pp)
    rows = min(_MOST_ROWS, max(1, int(_SHARE * _memory(config, mesh, device) / row)))
    fill(rows, *(f"{phase}.micro_batch_size" for phase in BUILDS_ON.keys() - PAIRED))
    fill(max(1, rows // 2), *(f"{phase}.micro_batch_size" for phase in PAIRED))  # of pairs
    return {key: found[key] for key in sorted(found)}


def open_sizes(config: RunConfig) -> list[str]:
    """Keys of sizes that are null."""
    return [
        f"{section.name}.{size.name}"
        for section in dataclasses.fields(config)
        if dataclasses.is_dataclass(part := getattr(config, section.name))
        for size in dataclasses.fields(part)
        if size.metadata.get("is_size") and getattr(part, size.name) is None
    ]


def _memory(config: RunConfig, mesh: MeshConfig, device: str) -> float:
    """Bytes of a rank's device."""
    if config.plan.memory is not None:
        return config.plan.memory * 1e9
    if device == "cpu":
        return psutil.virtual_memory().total / (mesh.tp * mesh.pp * (mesh.dp or 1))
    name = config.plan.device or gpu_here()
    return GPUS[name].memory if name in GPUS else _LEAST_MEMORY
