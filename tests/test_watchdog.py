"""A rank that is stopped in the middle of a run is named, with the stage and where it was, and the run ends."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator

import psutil
import pytest
import warm
from clusters import PATIENCE, wait_until
from test_launching import PPO, RUN, find_reward_functions, num_iterations, ranks_of, started
from test_launching import reward_functions_are_found as reward_functions_are_found

from rlhf_engine.surviving.watchdog import HUNG

LIMIT = 10  # seconds: a hundred times what a stage takes
ENDLESS = [*RUN, *PPO, "reward.fns=[rewards:short_and_polite]", f"timeout.stage={LIMIT}", "ppo.iterations=100000"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[int, tuple[warm.Command, list[psutil.Process]]]]:
    """For each rank, a run of which that rank was stopped, and its ranks. They are waited for together."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        find_reward_functions(patch, tmp_path_factory.mktemp("held"))
        found = {}
        for rank in (0, 1):
            folder = tmp_path_factory.mktemp("stopped")
            launcher = stack.enter_context(started([*ENDLESS, f"output_dir={folder}"], folder))
            wait_until(lambda folder=folder: num_iterations(folder) >= 2, "two iterations")
            found[rank] = launcher, ranks_of(launcher)
            found[rank][1][rank].send_signal(signal.SIGSTOP)
        yield found


@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_rank(runs, rank):
    """Rank 0 is the one that the others meet at."""
    launcher, ranks = runs[rank]
    assert launcher.wait(PATIENCE) == HUNG, launcher.output()
    assert not any(process.is_running() for process in ranks)
    said = launcher.output()
    told = re.search(rf"error: rank {1 - rank} has been in stage .* iteration \d+ for (\d+) s, and", said)
    assert told and int(told[1]) >= LIMIT, said
    assert f"missing: rank {rank} (silent for " in said, said
    own, others = said.split(f"\nrank {rank} in stage ")[1], said.split(f"\nrank {1 - rank} in stage ")[1]
    assert ", as last heard:" in own.splitlines()[0] and "trainer.py" in own and "trainer.py" in others
    assert said.count("error: ") == 1 and "Traceback" not in said


def test_a_run_that_is_slow_but_moves_is_left_alone(tmp_path):
    """By the watchdog's clock each call of the reward function takes 40 of the 100 seconds that a stage may take."""
    command = [*RUN, *PPO, "reward.fns=[rewards:seems_slow]", "timeout.stage=100", f"output_dir={tmp_path}"]
    result = warm.run(command)
    assert result.returncode == 0 and "missing" not in result.stdout + result.stderr, result.stdout + result.stderr
