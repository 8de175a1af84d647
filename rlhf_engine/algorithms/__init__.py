"""Each phase of training is a stage table in a module of its own."""

from collections.abc import Callable

from ..config import RunConfig
from .algorithm import Algorithm
from .distill import Distill
from .dpo import DPO
from .grpo import GRPO
from .kto import KTO
from .ppo import PPO
from .reward import Reward
from .sft import SFT

ALGORITHMS: dict[str, Callable[[RunConfig], Algorithm]] = {
    "sft": SFT,
    "reward": Reward,
    "ppo": PPO,
    "grpo": GRPO,
    "distill": Distill,
    "dpo": DPO,
    "kto": KTO,
}

__all__ = ["ALGORITHMS", "Algorithm"]
