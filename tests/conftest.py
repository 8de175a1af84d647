"""Fixtures shared by the tests: worlds of ranks, a finished SFT and reward phase, the real data where it is."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers would wait for each other's threads

import pytest
import warm
from hypothesis import HealthCheck, settings
from worlds import World

from rlhf_engine.config import CodeConfig, ConfigError
from rlhf_engine.rewards import programs

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# A run small enough for a test, its sizes divisible by every mesh that the tests use.
SMALL = [
    "+exp=hh_rlhf", "model.num_layers=2", "model.hidden_size=32", "model.intermediate_size=64",
    "data.num_rows=64", "data.num_eval_rows=8", "rollout.max_new_tokens=12", "sft.iterations=3", "sft.batch_size=16",
    "sft.micro_batch_size=4", "reward.iterations=3", "reward.batch_size=8", "reward.micro_batch_size=2",
    "ppo.iterations=2", "ppo.prompts_per_iteration=16", "ppo.micro_batch_size=4", "ppo.eval_prompts=8",
    "ppo.save_every=2", "grpo.iterations=2", "grpo.prompts_per_iteration=4", "grpo.samples_per_prompt=4",
    "grpo.micro_batch_size=4", "grpo.eval_prompts=8", "grpo.save_every=2", "dpo.iterations=2", "dpo.batch_size=8",
    "dpo.micro_batch_size=2", "dpo.eval_prompts=8", "kto.iterations=2", "kto.batch_size=16", "kto.micro_batch_size=4",
    "kto.eval_prompts=8",
]  # fmt: skip


def launch(*overrides: str, check: bool = True) -> subprocess.CompletedProcess:
    """`python launch/run.py` as a user types it, started warm."""
    return warm.run([sys.executable, str(ROOT / "launch" / "run.py"), *overrides], check=check)


# Examples that are the same in every run, on a machine of any speed.
settings.register_profile(
    "tests", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


def pytest_make_parametrize_id(val) -> str | None:
    """Bytes show in no id: compressors write the time of day into them, and workers would collect different tests."""
    return "bytes" if isinstance(val, bytes) else None


def pytest_configure() -> None:
    """What would end this process without a word says first where it was."""
    out = os.fdopen(os.dup(2), "w")
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU):
        faulthandler.register(signum, out, chain=True)

    def leave(code: int, leave=os._exit) -> None:
        faulthandler.dump_traceback(out)
        leave(code)

    os._exit = leave  # type: ignore[assignment]


# Files that take longest, in this order, so that no worker begins one of them when the others are done.
LONGEST = [
    "test_rehearse", "test_launching", "test_stops", "test_runs", "test_verify", "test_kernels_triton", "test_chaos",
    "test_residency", "test_streams", "test_convert_hf", "test_saves", "test_rewards", "test_reward_path",
    "test_rollout", "test_layout_invariance", "test_hf_architectures", "test_any_config", "test_watchdog", "test_plan",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module")
def worlds():
    """`worlds(n)`: the module's world of n ranks. The threads of gloo's groups wake a hundred times a second each, so
    that worlds which nobody uses would slow the others down."""
    started: dict[int, World] = {}

    def get(size: int) -> World:
        if size not in started:
            started[size] = World(size)
        return started[size]

    yield get
    for world in started.values():
        world.close()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """Output folder of a small run whose SFT and reward phases are done, on one rank."""
    folder = tmp_path_factory.mktemp("small")
    launch(*SMALL, "phases=[sft,reward]", "mesh.dp=1", f"output_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def isolated() -> None:
    """Programs run in the sandbox of the reward `code` here."""
    try:
        programs.try_out(CodeConfig())
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real data is not here")
    return SHARED
