"""What launchers, clusters and users say in environment variables, read before a library reads them: a variable that
makes no sense is refused in one line. An empty one counts as not set."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess

import psutil

from ..config import ConfigError
from .ranks import environment, free_port

_READ = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
    "SLURM_STEP_NUM_TASKS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_DISTRIBUTED_DEBUG", "RLHF_KERNELS",
    "SLURM_CPUS_PER_TASK", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_GRAPH_REGISTER",
    "CUDA_DEVICE_MAX_CONNECTIONS",
)  # fmt: skip
_ONE_OF = {"TORCH_DISTRIBUTED_DEBUG": ("OFF", "INFO", "DETAIL"), "RLHF_KERNELS": ("reference", "triton")}
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch's older name and its newer one
_AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun has a store already, at MASTER_ADDR and MASTER_PORT


def number(name: str, least: int = 0, default: int | None = None) -> int:
    """The value of a variable.

    Raises:
        ConfigError: it is no whole number of at least `least`, or is not set and has no default.
    """
    value = os.environ.get(name, "").strip()
    if not value and default is not None:
        return default
    if not value:
        raise ConfigError(f"the environment has no {name}, which the launcher should have set")
    if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) < least:
        raise ConfigError(f"{name}={value} in the environment is not a whole number of at least {least}")
    return int(value)


def num_threads() -> int:
    """Threads of this process: OMP_NUM_THREADS, or the first of its list, which is for nested regions; 1 without it."""
    value = os.environ.get("OMP_NUM_THREADS") or "1"
    numbers = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and 0 < int(part) < 2**15 for part in numbers):
        raise ConfigError(f"OMP_NUM_THREADS={value} in the environment is not a number of threads, such as 1")
    return int(numbers[0])


def cores() -> int:
    """That this rank has: of a Slurm task those that Slurm gave it, else its share of what all ranks here run on."""
    if number("SLURM_STEP_NUM_TASKS", 1, 1) > 1 and "SLURM_CPUS_PER_TASK" in os.environ:
        return number("SLURM_CPUS_PER_TASK", 1)
    return max(1, len(os.sched_getaffinity(0)) // number("LOCAL_WORLD_SIZE", 1, 1))


def set_defaults(device: str, tp: int) -> None:
    """What a rank's libraries read when they are imported, where nobody has said it.

    Args:
        tp: tensor parallel ranks.
    """
    env = os.environ
    if device != "cuda":
        env.setdefault("OMP_NUM_THREADS", "1")
        return
    env.setdefault("OMP_NUM_THREADS", str(cores()))  # torch copies between places of the host with them
    if tp > 1:  # for megatron's backward, whose collectives else may begin behind what they are to overlap with
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Buffers of many GB come and go between small ones that stay. NCCL's registration of the buffers of captured graphs
    # hangs with such segments (pytorch#158029).
    if not any(name in env for name in _ALLOCATOR) and env.get("NCCL_GRAPH_REGISTER", "0") == "0":
        env[_ALLOCATOR[0]] = "expandable_segments:True"
    if has_expandable_segments():
        env.setdefault("NCCL_GRAPH_REGISTER", "0")


def has_expandable_segments() -> bool:
    """Whether torch is asked for them."""
    return any("expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", "") for name in _ALLOCATOR)


def check_graphs(tp: int) -> None:
    """Of a run on GPUs that captures graphs.

    Raises:
        ConfigError: they would hang.
    """
    register = os.environ.get("NCCL_GRAPH_REGISTER", "0")
    if tp > 1 and register != "0" and has_expandable_segments():
        raise ConfigError(
            f"NCCL_GRAPH_REGISTER={register} and expandable_segments:True in the environment: decoding with"
            f" mesh.tp={tp} would hang: unset the first, or use rollout.cuda_graphs=false"
        )


def launched_world() -> int | None:
    """Ranks that a launcher started, this one's `ranks.environment` in place; None where there was no launcher.

    Raises:
        ConfigError: a variable makes no sense.
    """
    env = os.environ
    for name in _READ:
        if name in env and not env[name].strip():
            del env[name]
    num_threads()
    _check_libraries()
    if "RANK" not in env and number("SLURM_STEP_NUM_TASKS", 1, 1) > 1:
        _read_slurm()
    world_size = number("WORLD_SIZE", 1, 1)
    if "RANK" not in env:
        if world_size > 1:
            raise ConfigError(f"WORLD_SIZE={world_size} in the environment, and no RANK: set both, or unset WORLD_SIZE")
        return None
    rank = number("RANK")
    if "WORLD_SIZE" not in env:
        raise ConfigError(f"RANK={rank} in the environment, and no WORLD_SIZE: set both, or unset RANK")
    if rank >= world_size:
        raise ConfigError(f"RANK={rank} in the environment is not below WORLD_SIZE={world_size}")
    local, local_size = number("LOCAL_RANK", 0, 0), number("LOCAL_WORLD_SIZE", 1, world_size)
    if local >= local_size:
        raise ConfigError(f"LOCAL_RANK={local} in the environment is not below the {local_size} ranks of a machine")
    return world_size


def check_meeting() -> None:
    """Of a launched rank: that it knows where the ranks meet, and that the first of them can wait there.

    Raises:
        ConfigError: there is no such place, or another program has it.
    """
    env = os.environ
    if number("WORLD_SIZE", 1) == 1:  # meets nobody
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(free_port()))
    for name, what in (("MASTER_ADDR", "the address of rank 0's machine"), ("MASTER_PORT", "a free port there")):
        if name not in env:
            raise ConfigError(f"{name} is not set in the environment of a rank: it is {what}, the same for all ranks")
    address, port = env["MASTER_ADDR"].strip(), number("MASTER_PORT", 1)
    if port > 65535:
        raise ConfigError(f"MASTER_PORT={port} in the environment is not a port: 1 to 65535")
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(
            f"MASTER_ADDR={address}, where the ranks are to meet, is not known on {socket.gethostname()} ({reason}):"
            " set it to the address of rank 0's machine"
        ) from None
    if env["RANK"] != "0" or _AGENT in env:
        return
    for family, kind, _, _, place in found:
        try:
            with socket.socket(family, kind) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(place)
                listener.listen()
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):  # others: the machine has the address elsewhere
                raise ConfigError(
                    f"MASTER_PORT={port}: the ranks cannot meet there ({error.strerror}): set another port"
                ) from None


def _read_slurm() -> None:
    """This task of a Slurm step as a rank."""
    env = os.environ
    place = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS"), number("SLURM_LOCALID")
    per_node = []  # "8(x2),4"
    name = next((n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if env.get(n)), None)
    for part in env[name].split(",") if name else ():
        found = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,6})\))?", part.strip())
        per_node += [int(found[1])] * int(found[2] or 1) if found else []
    node = number("SLURM_NODEID", 0, 0)
    if node >= len(per_node):
        raise ConfigError(
            f"{name or 'SLURM_STEP_TASKS_PER_NODE'}={env.get(name or '', '')} in the environment does not say how many"
            f" tasks node {node} (SLURM_NODEID) has"
        )
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if len(per_node) == 1 else _first_slurm_node())
    # every task of a step finds the same port, and two steps on a node hardly ever the same
    usual = 20000 + (31 * number("SLURM_JOB_ID") + number("SLURM_STEP_ID", 0, 0)) % 12000
    env |= environment(*place, per_node[node], address, number("MASTER_PORT", 1, usual))


def _first_slurm_node() -> str:
    """Its address as Slurm has it, which is good outside Slurm too; its name where Slurm cannot be asked, as in a
    container."""
    names = next((n for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if os.environ.get(n)), None)
    if names is None:
        raise ConfigError("the environment has no SLURM_STEP_NODELIST: set MASTER_ADDR to the first node's address")
    nodes = os.environ[names]
    try:
        command = ["scontrol", "show", "--oneliner", "node", nodes]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        if found := re.search(r"NodeAddr=(\S+)", said):
            return found[1]
    except (OSError, subprocess.SubprocessError):
        pass
    return first_host(nodes)


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes them: `node[01-04,07]-ib,login` begins with node01-ib.

    Raises:
        ConfigError: it is no such list.
    """
    first = re.match(r"(?:[^,\[\]]|\[\w[^\[\]]*\])+", nodes.strip())
    if first is None:
        raise ConfigError(f"{nodes} is not a list of Slurm's nodes: set MASTER_ADDR to the address of the first one")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _check_libraries() -> None:
    """Variables that gloo, NCCL, torch and the kernels read, and fail by with a traceback or not at all."""
    for name, values in _ONE_OF.items():
        value = os.environ.get(name)
        if value is not None and value not in values and value.upper() not in values:
            raise ConfigError(f"{name}={value} in the environment is not one of {', '.join(values)}")
    here = [name for name, found in psutil.net_if_addrs().items() if _has_address(found)]
    for name in (os.environ.get("GLOO_SOCKET_IFNAME") or "").split(","):
        if name and name not in here:
            raise ConfigError(f"GLOO_SOCKET_IFNAME={name} in the environment is not one of {', '.join(here)}")
    wanted = os.environ.get("NCCL_SOCKET_IFNAME") or ""
    prefixes = () if wanted.startswith("^") else tuple(part for part in wanted.lstrip("=").split(",") if part)
    is_exact = wanted.startswith("=")
    if prefixes and not any(name in prefixes if is_exact else name.startswith(prefixes) for name in here):
        raise ConfigError(f"NCCL_SOCKET_IFNAME={wanted} in the environment is not one of {', '.join(here)}")


def _has_address(found: list) -> bool:
    return any(address.family in (socket.AF_INET, socket.AF_INET6) for address in found)
