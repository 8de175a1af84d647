"""Each phase of training is a stage table in a module of its own."""

from .context import Algorithm
from .ppo import PPO
from .reward import Reward
from .sft import SFT

ALGORITHMS = {"sft": SFT, "reward": Reward, "ppo": PPO}

__all__ = ["ALGORITHMS", "Algorithm"]
