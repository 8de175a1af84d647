"""Every setting of a run: its name, its type, its default and its checks. Standard library alone.

YAML files and command lines hold differences from these defaults. `from_dict` is strict: an unknown key, a wrong
type or an impossible combination is a `ConfigError`, one line that names the key and what would be right.
"""

from .algorithms import (
    CodeConfig,
    DistillConfig,
    DPOConfig,
    GroupConfig,
    GRPOConfig,
    JudgeConfig,
    KTOConfig,
    OptimizerConfig,
    PPOConfig,
    PTXConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
    TeacherConfig,
)
from .data import DataConfig, TokenizerConfig
from .environments import EnvConfig, UserConfig
from .evaluating import EvalConfig
from .mesh import MeshConfig, resolve_mesh
from .model import FP8_UNIT, Base, ModelConfig, PolicyConfig, RopeScaling, check_model
from .observing import LogConfig, WandBConfig
from .planning import DeviceName, PlanConfig, RehearseConfig
from .reading import NEEDED, ConfigError, from_dict, keys, nearest
from .rollout import RolloutConfig
from .run import ASKING, BUILDS_ON, JOBS, LABELLED, PAIRED, SAMPLING, TAUGHT, Phase, RunConfig, check
from .schedule import ROLES, Recompute, ScheduleConfig
from .surviving import CheckpointConfig, GuardConfig, TimeoutConfig

__all__ = [
    "ASKING", "BUILDS_ON", "FP8_UNIT", "JOBS", "LABELLED", "NEEDED", "PAIRED", "ROLES", "SAMPLING", "TAUGHT", "Base",
    "CheckpointConfig", "CodeConfig", "ConfigError", "DPOConfig", "DataConfig", "DeviceName", "DistillConfig",
    "EnvConfig", "EvalConfig", "GRPOConfig", "GroupConfig", "GuardConfig", "JudgeConfig", "KTOConfig", "LogConfig",
    "MeshConfig", "ModelConfig", "OptimizerConfig", "PPOConfig", "PTXConfig", "Phase", "PlanConfig", "PolicyConfig",
    "Recompute", "RehearseConfig", "RewardConfig", "RolloutConfig", "RopeScaling", "RunConfig", "SFTConfig",
    "SamplingConfig", "ScheduleConfig", "TeacherConfig", "TimeoutConfig", "TokenizerConfig", "UserConfig",
    "WandBConfig", "check", "check_model", "from_dict", "keys", "nearest", "resolve_mesh",
]  # fmt: skip
