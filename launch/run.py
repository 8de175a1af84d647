"""python launch/run.py +exp=NAME [key=value ...]

Hydra composes the configuration; the engine checks it, and this script starts one process per rank unless a
launcher (torchrun, srun) already did.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from rlhf_engine.config import ConfigError, RunConfig, from_dict, keys, nearest
from rlhf_engine.preflight import Plan, plan

PARENT = "RLHF_ENGINE_PARENT"  # process id of the launcher, in the environment of ranks that this script started
CONF = Path(__file__).resolve().parent.parent / "conf"


def config_groups() -> dict[str, list[str]]:
    """Groups of conf/ and the options of each."""
    return {folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()}


def show_help() -> None:
    """What can be said on the command line: groups, their options, keys and defaults."""
    print(__doc__)
    for group, options in sorted(config_groups().items()):
        print(f"  {'+' if group == 'exp' else ' '}{group}={' | '.join(options)}")
    print("\nkeys and their defaults (rlhf_engine/config.py says what each is):")

    def show(section: dict, prefix: str = "") -> None:
        for name, value in section.items():
            if isinstance(value, dict):
                show(value, f"{prefix}{name}.")
            else:
                print(f"  {prefix}{name}={json.dumps(value) if not isinstance(value, str) else value}")

    show(asdict(RunConfig()))


def compose(overrides: list[str]) -> RunConfig:
    """Hydra's composition of conf/ and the command line, as the engine's dataclass.

    Raises:
        ConfigError: an override names a key, a group or an option that is not there.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()
    }
    known = keys(RunConfig)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        for override in parsed:
            key, value = override.key_or_group.split("@")[0], override.value()
            if key in groups and isinstance(value, str):
                if value not in groups[key]:
                    raise ConfigError(f"{key}={value}: {nearest(value, groups[key])}")
            elif key not in known:
                raise ConfigError(f"unknown key {key}: {nearest(key, [*known, *groups])}")
        ConfigStore.instance().store("defaults", asdict(RunConfig()))
        with initialize_config_dir(str(CONF), version_base=None):
            composed = compose("config", overrides=overrides)
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return from_dict(RunConfig, values)  # type: ignore[arg-type]


def launched_world() -> int | None:
    """Ranks that a launcher started, torch's variables set for this one; None where there was no launcher."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
        )
        env.setdefault("MASTER_ADDR", nodes.stdout.split()[0])
        # every task of a job finds the same port, and two jobs on a node hardly ever the same
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    return int(env["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= env.keys() else None


def free_port() -> int:
    """A port for the rendezvous. Below the range that the system deals to outgoing connections, one of which could
    take it while the ranks are still importing."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def start_ranks(world_size: int, argv: list[str]) -> int:
    """Runs this script once per rank on this machine; the first rank that fails takes the others down."""
    port = free_port()
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {
        PARENT: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONWARNINGS": "ignore",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *argv],
            env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(world_size)
    ]

    def stop(signum, frame) -> None:
        for rank in ranks:
            rank.send_signal(signum)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    failed = 0
    while any(rank.poll() is None for rank in ranks):
        if not failed and (failed := next((r.returncode for r in ranks if r.returncode), 0)):
            for rank in ranks:
                rank.terminate()
            deadline = time.monotonic() + 10
            while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
                time.sleep(0.1)
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)
    code = failed or next((r.returncode for r in ranks if r.returncode), 0)
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """Asks Linux to end this rank when the process that started it ends, however that happens."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ[PARENT]):
        sys.exit("the process that started this rank has ended")


def run_rank(checked: Plan) -> None:
    """This process as one rank of the run."""
    import logging
    import warnings

    warnings.simplefilter("ignore")  # megatron's, about packages that are optional here
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import torch

    from rlhf_engine.trainer import run

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        run(checked)
    except ConfigError as error:
        if os.environ["RANK"] != "0":
            time.sleep(3)  # where every rank found the same, the first to say it ends the others
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except BaseException:
        # at once, and past every destructor: the other ranks may be waiting for this one in a collective
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    torch.distributed.destroy_process_group()


def main(argv: list[str]) -> int:
    if {"--help", "-h"} & set(argv):
        show_help()
        return 0
    if PARENT in os.environ:
        end_with_parent()
    world_size = launched_world()
    try:
        checked = plan(compose(argv), world_size)
    except ConfigError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if world_size is None:
        return start_ranks(checked.world_size, argv)
    run_rank(checked)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
