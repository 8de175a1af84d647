"""python tests/chaos.py [--runs N] [--seed N]

Runs that are killed at random moments by random signals and started again until they are done. What each leaves is
held to what a run leaves that was never killed: figures to the last digit, no line of them doubled or missing, weights
to the last bit. A run's seed and number say all that is random about it: `--seed 7 --first 12 --runs 1` repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import warm
from cases import MEASURED
from clusters import PATIENCE
from conftest import ROOT, SMALL

from rlhf_engine.signals import STOPPED

PHASES = {"sft": 3, "reward": 3, "ppo": 4, "grpo": 3, "dpo": 3, "kto": 3, "distill": 3}  # and their iterations
SHORT = {name: PHASES[name] for name in ("sft", "reward", "ppo")}
RUN = [str(ROOT / "launch" / "run.py"), *SMALL, "distill.prompts_per_iteration=8", "distill.micro_batch_size=4"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
LAUNCHERS = {
    "run.py": [sys.executable],
    "torchrun": [sys.executable, "-c", "from torch.distributed.run import main; main()", "--nproc-per-node=2"],
}
MESHES = (["mesh.dp=2"], ["mesh.tp=2", "mesh.dp=1"])


@dataclass(frozen=True)
class Kill:
    """When, whom, and by what."""

    signum: signal.Signals
    target: str  # one rank, all ranks, or the launcher
    phase: str | None  # in the middle of a save of this phase; None: by the clock
    save: int  # which of its saves; 0: between its last one and its summary
    seconds: float  # after the start of the run, or of the save

    def __str__(self) -> str:
        save = f"in save {self.save}" if self.save else "behind the last save"
        when = f"{save} of {self.phase}" if self.phase else "from the start"
        return f"{self.signum.name} to {self.target} {self.seconds:.3f} s {when}"


def draw(chance: random.Random, duration: float, phases: dict[str, int]) -> Kill:
    """A kill at any time of a run that lasts so many seconds, or, as often, in the middle of a save or behind the last
    one."""
    phase = chance.choice([None, None, None, *phases])
    target = chance.choice(["one rank", "all ranks", "the launcher"])
    save = chance.randint(0, phases[phase]) if phase else 0
    longest = duration if phase is None else 0.05 if save else 0.5
    return Kill(chance.choice(SIGNALS), target, phase, save, chance.uniform(0, longest))


class Run:
    """A run that is being started and killed.

    Args:
        folder: that it writes to.
        phases: and their iterations.
    """

    def __init__(self, folder: Path, mesh: list[str], launcher: str, phases: dict[str, int]):
        self.folder, self.launcher, self.phases = folder, launcher, phases
        self.command = [*LAUNCHERS[launcher], *RUN, *mesh, f"phases=[{','.join(phases)}]", f"output_dir={folder}"]
        self.command += [f"{name}.{key}" for name, n in phases.items() for key in (f"iterations={n}", "save_every=1")]
        if "distill" in phases:
            teacher = folder.parent / "teacher" / "sft" / "hf"
            self.command += [f"teacher.path={teacher}", f"tokenizer.path={teacher}"]

    def start(self, kill: Kill | None = None, chance: random.Random | None = None) -> int:
        """Starts it, kills it where it gets that far, and gives the launcher's exit code when nothing of it is left."""
        with tempfile.NamedTemporaryFile("r") as output:
            process = warm.Command(self.command, output.name, output.name)
            family: list[psutil.Process] = []
            if kill is not None and chance is not None:
                self._wait(kill, lambda: process.poll() is None)
                with contextlib.suppress(psutil.NoSuchProcess):
                    family = psutil.Process(process.pid).children()
                    struck = [psutil.Process(process.pid)]
                    if family and kill.target != "the launcher":
                        struck = family if kill.target == "all ranks" else [chance.choice(family)]
                    for each in struck:
                        each.send_signal(kill.signum)
            try:
                code = process.wait(PATIENCE)
                _, alive = psutil.wait_procs(family, timeout=PATIENCE)
                assert not alive, f"still there: {alive}"
            except (subprocess.TimeoutExpired, AssertionError) as error:
                for each in (process, *family):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                raise AssertionError(f"{error}\n{output.read()}") from None
            said = output.read()
        # asked to stop, or ended by the signal, itself or a rank of it; and never in a way that needs explaining
        expected = {0, STOPPED, -kill.signum, 128 + kill.signum} if kill else {0}
        is_explained = "Traceback" in said
        if kill and self.launcher == "torchrun":  # whose own code is 1, with a traceback of its own
            expected, is_explained = {0, 1, -kill.signum}, False
        assert code in expected and not is_explained, f"exit code {code}\n{said}"
        return code

    def _wait(self, kill: Kill, is_running: Callable[[], bool]) -> None:
        """For the moment of a kill, or the end of the run."""
        until = time.monotonic() + kill.seconds
        if kill.phase:
            folder = self.folder / kill.phase / "checkpoints"
            before = seen = set(folder.glob("saving.*"))  # which one that was killed before may have left
            while is_running() and (
                len(seen - before) < kill.save if kill.save else not self._is_all_but_done(kill.phase)
            ):
                seen = seen | set(folder.glob("saving.*"))
                time.sleep(0.001)
            until = time.monotonic() + kill.seconds
        while is_running() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))

    def _is_all_but_done(self, phase: str) -> bool:
        folder = self.folder / phase
        last, latest = f"iteration_{self.phases[phase]}", folder / "checkpoints" / "latest"
        return latest.is_file() and latest.read_text().startswith(last) and not (folder / "summary.json").exists()

    def left(self) -> dict[str, object]:
        """What it leaves of which nothing may depend on kills."""
        found: dict[str, object] = {}
        for phase in self.phases:
            folder = self.folder / phase
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            found[f"{phase}/metrics.jsonl"] = [
                {k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows
            ]
            found[f"{phase}/TensorBoard"] = scalars(folder)
            found[f"{phase}/summary.json"] = json.loads((folder / "summary.json").read_text())
            for weights in folder.glob("hf*/*.safetensors"):
                found[str(weights.relative_to(self.folder))] = hashlib.sha256(weights.read_bytes()).hexdigest()
        return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(MEASURED)
    }


def chaos(folder: Path, runs: int, seed: int, first: int = 0, phases: dict[str, int] = PHASES) -> None:
    """So many runs, from number `first` on.

    Raises:
        AssertionError: one of them ended in another way than it should, or left something else.
    """

    @functools.cache
    def never_killed(i: int, launcher: str) -> tuple[dict[str, object], float]:
        clean, started = Run(folder / f"clean_{launcher}_{i}", MESHES[i], launcher, phases), time.monotonic()
        clean.start()
        return clean.left(), time.monotonic() - started

    if "distill" in phases:
        Run(folder / "teacher", MESHES[0], "run.py", {"sft": 1}).start()
    for number in range(first, first + runs):
        chance = random.Random(f"{seed}/{number}")
        i = chance.randrange(len(MESHES))
        launcher = chance.choice(["run.py", "run.py", "run.py", "torchrun"])
        run = Run(folder / f"run{number}", MESHES[i], launcher, phases)
        wanted, duration = never_killed(i, launcher)
        kills = [draw(chance, duration, phases) for _ in range(chance.choice([1, 1, 2]))]
        print(
            f"seed {seed} run {number} ({launcher}, {MESHES[i][0]}): {', then '.join(map(str, kills))}",
            end="",
            flush=True,
        )
        started = time.monotonic()
        codes = [run.start(kill, chance) for kill in kills]
        codes.append(run.start())
        left = run.left()
        different = [name for name in wanted.keys() | left.keys() if left.get(name) != wanted.get(name)]
        assert not different, f"run {number} of seed {seed}, codes {codes}, differs in {', '.join(sorted(different))}"
        print(f": codes {', '.join(map(str, codes))}, {time.monotonic() - started:.0f} s, all equal", flush=True)
        shutil.rmtree(run.folder)


def main() -> None:
    logging.disable(logging.WARNING)  # TensorBoard says of each run that it was resumed
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chaos(Path(folder), options.runs, options.seed, options.first)


if __name__ == "__main__":
    main()
