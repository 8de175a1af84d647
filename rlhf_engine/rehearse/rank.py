"""One rehearsed rank, in which the run's own code finds a GPU and the ranks beside it; and the process that all of them
are copies of, because what a rank imports takes longer than a small rehearsal."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import logging
import os
import pickle
import signal
import socket
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

from ..launching.ranks import PARENT, end_with_parent, environment
from . import shim
from .part import Part

_MESSAGE = 1 << 20  # bytes of the largest
_NODE = 8  # ranks of a node
# what a run imports where it first needs it: a kernel, its compiler, the reading back of an export
_LATER = (
    "rlhf_kernels.advantage_triton", "rlhf_kernels.attention_triton", "rlhf_kernels.log_prob_triton",
    "rlhf_kernels.losses_triton", "rlhf_kernels.norm_triton", "rlhf_kernels.rotary_triton",
    "rlhf_kernels.swiglu_triton", "triton.experimental.gluon", "sentencepiece.sentencepiece_model_pb2",
    "transformers.models.auto.tokenization_auto",
)  # fmt: skip


def run_rank(part: Part, line: Connection) -> int:
    """Rehearses the rank; what it did, or what is wrong, goes to `rank_N.json`. The exit code of the run."""
    import torch

    from ..config import ConfigError
    from ..launching import preflight
    from ..plan.measure import device_of
    from ..signals import RunError
    from ..trainer import run
    from . import cuda, groups, wire
    from .device import FakeGPU
    from .part import settle
    from .stand_ins import stand_in

    torch.set_num_threads(1)
    preflight.check_reward = lambda *args: None  # who started this has looked, in the run's own folder
    checked = settle(part.overrides, part.world_size, str(Path(part.place) / "run"))
    device = device_of(checked.config, part.world_size)
    gpu = FakeGPU(device.memory, device.name, part.rank, part.writes)
    cuda.install(gpu, device)
    per_stage = part.world_size // checked.mesh.pp
    groups.install(
        wire.Wire(gpu, part.rank, part.present, lambda rank: rank // per_stage, line), part.rank, part.world_size
    )
    stand_in(gpu, part, checked)
    fault, code, is_echo = None, 1, False
    try:
        if part.before is not None:
            module, _, function = part.before.partition(":")
            getattr(importlib.import_module(module), function)(part.rank)
        with gpu:
            code = run(checked)
    except (ConfigError, RunError) as error:
        fault, is_echo = str(error), isinstance(error, wire.Unanswered)
    except BaseException:
        fault = traceback.format_exc()
    stages = [vars(stage) for stage in gpu.stages]
    found = {"rank": part.rank, "fault": fault, "is_echo": is_echo, "assumed": gpu.assumed, "stages": stages}
    Path(part.place, f"rank_{part.rank}.json").write_text(json.dumps(found))
    return code if fault is None else 1


def serve(door: socket.socket) -> None:
    """Starts a copy of this process for each message that has a part and a connection; to one without a connection it
    answers with the exit codes of all of them."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    shim.load()
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for name in ("device", "cuda", "groups", "stand_ins"):
        importlib.import_module(f"{__package__}.{name}")
    for name in _LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # collections of the copies pass over all of this
    children: list[int] = []
    while True:
        message, handles, *_ = socket.recv_fds(door, _MESSAGE, 1)
        if handles:
            if not (child := os.fork()):
                _be_rank(pickle.loads(message), Connection(handles[0]))
            os.close(handles[0])
            children.append(child)
        elif message:
            door.send(pickle.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
            children = []
        else:
            return


def _be_rank(part: Part, line: Connection) -> None:
    log = os.open(Path(part.place, f"rank_{part.rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR2)
    os.environ[PARENT] = str(os.getppid())
    end_with_parent()
    world = part.world_size
    os.environ |= environment(part.rank, world, part.rank % _NODE, min(_NODE, world), "127.0.0.1", 1)
    try:
        code = run_rank(part, line)
    except BaseException:
        traceback.print_exc()
        code = 1
    line.close()
    sys.stdout.flush()
    os._exit(code)  # past the destructors of groups that have no backend


if __name__ == "__main__":
    # the module that others import, which the parts that come through the door are of
    from rlhf_engine.rehearse import rank

    rank.serve(socket.socket(fileno=int(sys.argv[1])))
