"""Has torch's readers of checkpoints, which megatron's are built on, run no code from a folder (docs/security.md)."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, default_planner, filesystem

from ..hf import pickles


def load_bytes(planner: DefaultLoadPlanner, item: Any, value: Any) -> None:
    """`DefaultLoadPlanner.load_bytes`, of an object that is no tensor; torch's own would unpickle anything."""
    name, found = item.dest_index.fqn, torch.load(value, weights_only=True)
    if planner.flatten_state_dict:
        default_planner.set_element(planner.original_state_dict, planner.mappings[name], found)
    else:
        planner.state_dict[name] = found


def install() -> None:
    """In this process, for every reader."""
    vars(filesystem)["pickle"] = SimpleNamespace(load=pickles.load_index, dump=pickle.dump)
    setattr(DefaultLoadPlanner, "load_bytes", load_bytes)  # noqa: B010
