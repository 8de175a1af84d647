"""What runs together, and where roles are when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .reading import ConfigError, nearest

Recompute = Literal["none", "selective", "full"]
ROLES = ("policy", "critic", "reference", "reward", "teacher", "user")


@dataclass
class ScheduleConfig:
    infer_stream: bool = True  # under pp > 1 neighbouring forward stages share one pipeline
    train_stream: bool = True  # and so do the critic's and the policy's updates
    # activations that backward computes again and need not be kept: of attention, or of whole layers
    recompute: Recompute = "none"
    # rows of like length are packed into micro-batches of at most so many tokens, padding included (a longer row goes
    # alone); null: the tokens of micro_batch_size rows that are as long as the batch's longest
    micro_batch_tokens: int | None = None
    # where weights and optimizers are while no stage needs them: on the device or off it, which for a CPU means in
    # files; auto: by the plan, whichever roles and rollout.cache_share make an iteration shortest
    residency: Literal["keep", "offload", "auto"] = "keep"
    offload: list[str] = field(default_factory=lambda: list(ROLES))  # the roles that residency=offload moves
    prefetch: bool = False  # bring roles while the stage before them works, which needs room for both
    explain: bool = False  # `schedule=explain`: say what runs together and where roles are when, and run nothing

    def moves(self, role: str) -> bool:
        """Whether a role comes and goes."""
        return self.residency == "offload" and role in self.offload


def check_offload(schedule: ScheduleConfig) -> None:
    """Refuses roles that do not exist."""
    for role in schedule.offload:
        if role not in ROLES:
            raise ConfigError(f"schedule.offload={role}: {nearest(role, ROLES)}")
