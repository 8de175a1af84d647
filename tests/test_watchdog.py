"""A rank that is stopped in the middle of a run is named, with the stage and where it was, and the run ends."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from clusters import wait_until
from test_launching import RUN, SLOWLY, num_iterations, reward_functions_are_found, started  # noqa: F401

from rlhf_engine.watchdog import HUNG


@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_rank(tmp_path, rank):
    """Rank 0 is the one that the others meet at."""
    limit = 5
    command = [*RUN, *SLOWLY, f"timeout.stage={limit}", "ppo.iterations=1000", f"output_dir={tmp_path}"]
    with started(command, tmp_path) as launcher:
        wait_until(lambda: num_iterations(tmp_path) >= 2, 60, "two iterations")
        ranks = psutil.Process(launcher.pid).children()
        stopped = next(process for process in ranks if process.environ()["RANK"] == str(rank))
        os.kill(stopped.pid, signal.SIGSTOP)
        then = time.monotonic()
        assert launcher.wait(limit + 10) == HUNG, launcher.output()
        assert limit - 1 < time.monotonic() - then < limit + 3
        assert not any(process.is_running() for process in ranks)
        said = launcher.output()
    assert f"error: rank {1 - rank} has been in stage " in said and " of iteration " in said
    assert f"missing: rank {rank} (silent for " in said
    own, others = said.split(f"\nrank {rank} in stage ")[1], said.split(f"\nrank {1 - rank} in stage ")[1]
    assert ", as last heard:" in own.splitlines()[0] and "trainer.py" in own and "trainer.py" in others
    assert said.count("error: ") == 1 and "Traceback" not in said


def test_a_run_that_is_slow_but_moves_is_left_alone(tmp_path):
    command = [*RUN, *SLOWLY, "timeout.stage=3", "ppo.iterations=8", f"output_dir={tmp_path}"]
    with started(command, tmp_path) as launcher:
        assert launcher.wait(100) == 0, launcher.output()
        assert "missing" not in launcher.output()
