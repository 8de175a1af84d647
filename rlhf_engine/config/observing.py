"""Where figures go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class WandBConfig:
    """Weights & Biases: a run for each phase."""

    project: str | None = None  # null: none is written
    entity: str | None = None  # null: the user's own
    group: str | None = None  # of the phases' runs; null: the last part of output_dir
    name: str | None = None  # null: the last part of output_dir, and the phase
    tags: list[str] = field(default_factory=list)
    mode: Literal["online", "offline"] | None = None  # null: what WANDB_MODE says, online where it says nothing


@dataclass
class LogConfig:
    """Where figures go beside OUTPUT_DIR/PHASE/metrics.jsonl. What fails there is said once and ends no run."""

    tensorboard: bool = True  # events in OUTPUT_DIR/PHASE
    wandb: WandBConfig = field(default_factory=WandBConfig)
