"""An iteration learns from recorded responses: `rollout.replay=DIR`, what `write_arrays=true` has left of another run.

| stage   | role   | kind    | reads                               | writes                                            |
|---------|--------|---------|-------------------------------------|---------------------------------------------------|
| rollout | policy | rollout | prompts, reward_prompts, row_fields | as rollout; with env.fn the prompts, turn_rewards |

Everything behind the rollout is computed again, so that with the same weights, rows and settings its figures are those
that were recorded; and with others it tells what they change.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..context import Context
from ..models.role import RoleModel
from ..schedule import Fields
from ..signals import RunError
from .responding import record_responses

_FIELDS = ("tokens", "lengths", "response_mask", "finished", "sampler_log_probs", "failed", "turn_rewards")


def rollout(ctx: Context, policy: RoleModel, x) -> Fields:
    """The responses of the same iteration of another run.

    Raises:
        RunError: they are not there, or answer other prompts.
    """
    path, config = Path(ctx.config.rollout.replay or "") / f"{ctx.state.iteration}.npz", ctx.config
    content = path.read_bytes() if ctx.mesh.is_main and path.is_file() else None
    if (content := ctx.mesh.from_main(content)) is None:
        raise RunError(f"rollout.replay: {path} is not there; {ctx.phase}.write_arrays=true writes it")
    with np.load(io.BytesIO(content)) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in _FIELDS if name in arrays.files}
        rows = arrays["rows"] if "rows" in arrays.files else None
    found["tokens"] = found["tokens"].long()
    if wrong := _difference(ctx, found, rows, x):
        raise RunError(f"rollout.replay: {path} {wrong}: the seed, the data and {ctx.phase} must be as they were")
    missing = -found["tokens"].shape[1] % ctx.mesh.tp
    fields: dict[str, Any] = {name: F.pad(v, (0, missing)) if v.dim() == 2 else v for name, v in found.items()}
    if config.env.fn is not None:
        fields |= dict.fromkeys(("prompts", "reward_prompts"), prompts_of(found))
    record_responses(ctx, found["response_mask"], found["finished"])
    return fields


def _difference(ctx: Context, found: dict[str, Tensor], rows: np.ndarray | None, x) -> str | None:
    """Why these are not this iteration's responses."""
    if (count := len(found["tokens"])) != len(x.prompts):
        return f"has {count} responses, and an iteration {len(x.prompts)}"
    if ("turn_rewards" in found) != (ctx.config.env.fn is not None):
        return f"was written {'with' if 'turn_rewards' in found else 'without'} env.fn"
    if rows is not None and (rows != checksums(x.row_fields)).any():
        return "was written for other rows"
    if ctx.config.env.fn is None and prompts_of(found) != x.prompts:
        return "answers other prompts"
    return None


def checksums(row_fields: Sequence[str]) -> np.ndarray:
    """`(B,)`, by which rows are known again."""
    return np.array([zlib.crc32(fields.encode()) for fields in row_fields], np.uint32)


def prompts_of(found: dict[str, Tensor]) -> list[list[int]]:
    """What stands before the first sampled token of each row."""
    mask = found["response_mask"]
    starts = torch.where(mask.any(1), mask.int().argmax(1), found["lengths"])
    return [row[:n] for row, n in zip(found["tokens"].tolist(), starts.tolist(), strict=True)]
