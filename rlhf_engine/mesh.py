"""The TP x PP x DP mesh of ranks. The only module that knows megatron's parallel_state.

Between stages every rank holds the whole Experience on its CPU. A stage takes its data-parallel part of the rows
(`take`), and what the last pipeline stage computed for them comes back to everyone (`gather`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from .config import ConfigError, MeshConfig
from .cpu import one_listener, use_cpu
from .signals import RunError


class ParallelMesh:
    """This rank's place in the mesh, and the collectives of the engine.

    Args:
        config: resolved, so that tp x pp x dp is the world.
        device: "cpu" (gloo) or "cuda" (NCCL).
        timeout: seconds that a collective may take, in any group.

    Raises:
        ConfigError: this rank has no GPU of its own.
    """

    @one_listener()
    def __init__(self, config: MeshConfig, device: str, timeout: float = 3600.0):
        self.config = config
        if device == "cuda":
            self.device = torch.device("cuda", own_gpu())
            torch.cuda.set_device(self.device)
        else:
            use_cpu()
            self.device = torch.device("cpu")
        limit = timedelta(seconds=timeout)
        if not dist.is_initialized():
            found = {} if "TORCHELASTIC_USE_AGENT_STORE" in os.environ else meeting_place(limit)
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=limit, **found)
        parallel_state.initialize_model_parallel(
            config.tp,
            config.pp,
            config.virtual_pp if config.virtual_pp > 1 else None,
            expert_model_parallel_size=config.ep,
            expert_tensor_parallel_size=config.tp,
            distributed_timeout_minutes=timeout / 60,  # type: ignore[arg-type]
            create_gloo_process_groups=False,  # nothing is sent from CPUs beside NCCL
        )
        if device == "cuda":  # megatron asks for its states around dropout, of which no role has any
            model_parallel_cuda_manual_seed(1)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.tp, self.pp, self.ep, self.virtual_pp = config.tp, config.pp, config.ep, config.virtual_pp
        self.dp = parallel_state.get_data_parallel_world_size()
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.ep_rank = parallel_state.get_expert_model_parallel_rank()
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.pp_group = parallel_state.get_pipeline_model_parallel_group()
        self.dp_group = parallel_state.get_data_parallel_group()
        self.ep_group = parallel_state.get_expert_model_parallel_group()
        # every rank takes part in making each group; these are for the copies that generate
        alone = range(self.world_size) if self.is_folded_to_generate else ()
        self._alone = [dist.new_group([rank], limit) for rank in alone]
        self.self_group = self._alone[self.rank] if self._alone else self.pp_group
        # Two stages with several chunks each are both before and behind each other, and messages bear no names: those
        # that go back take groups of their own.
        apart, is_both = self.world_size // self.pp, self.pp == 2 and self.virtual_pp > 1
        self._back = [dist.new_group([i, i + apart], limit) for i in range(apart)] if is_both else []
        self.pp_back_group = self._back[self.rank % apart] if is_both else None

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head."""
        return self.pp_rank == self.pp - 1

    @property
    def is_main(self) -> bool:
        """The rank that prints and writes."""
        return self.rank == 0

    def close(self) -> None:
        """Ends the mesh's groups, whose threads megatron would leave running; the world stays."""
        gc.collect()  # models that are done with hold the groups in circles of references, and so their threads
        dist.barrier()  # a rank that is still in a collective must not see its peers hang up
        # in the order in which they were made, which is the same on every rank: NCCL's destroy waits for the others
        for group in dict.fromkeys([*(parallel_state._global_process_group_list or ()), *self._alone, *self._back]):
            if isinstance(group, dist.ProcessGroup):
                dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()

    # -- rows of a batch, split over data parallel replicas --------------------------------------------------

    def gather(self, rows: Tensor | None) -> Tensor:
        """Rows of each replica, one replica after the other: `(B / dp, ...)` held by the last pipeline stage becomes
        `(B, ...)` on every CPU.

        Args:
            rows: on any device; None on stages that are not the last.
        """
        if self.is_last_stage:
            assert rows is not None
            rows = rows.to(self.device).contiguous()
            parts = [torch.empty_like(rows) for _ in range(self.dp)]
            dist.all_gather(parts, rows, group=self.dp_group)
            whole = torch.cat(parts)
        if self.pp > 1:
            meta = [(whole.shape, whole.dtype) if self.is_last_stage else None]
            source = dist.get_global_rank(self.pp_group, self.pp - 1)
            dist.broadcast_object_list(meta, source, group=self.pp_group, device=self.device)
            if not self.is_last_stage:
                shape, dtype = meta[0]  # type: ignore[misc]
                whole = torch.empty(shape, dtype=dtype, device=self.device)
            dist.broadcast(whole, source, group=self.pp_group)
        return whole.cpu()

    # -- generation, where pipeline stages serve as further replicas ------------------------------------------

    @property
    def is_folded_to_generate(self) -> bool:
        """Whether a rank holds less than the whole of its tensor parallel shard, which decoding step by step needs."""
        return self.pp > 1 or self.ep > 1

    @property
    def num_replicas(self) -> int:
        """Replicas that generate: pipeline stages fold into data parallelism."""
        return self.dp * self.pp

    @property
    def replica(self) -> int:
        """Number of the replica that this rank generates with."""
        return self.pp_rank * self.dp + self.dp_rank

    def gather_ragged(self, values: Tensor) -> Tensor:
        """`(replicas, longest)` on every CPU: 1-d values of each replica that generates, by its number, and 0 behind
        what is shorter.

        Args:
            values: on any device, of any length; the same on tensor parallel ranks.
        """
        longest = torch.tensor([len(values)], device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        whole = torch.zeros(int(longest), dtype=values.dtype, device=self.device)
        whole[: len(values)] = values.to(self.device)
        for group, size in ((self.dp_group, self.dp), (self.pp_group, self.pp)):
            parts = [torch.empty_like(whole) for _ in range(size)]
            dist.all_gather(parts, whole, group=group)
            whole = torch.stack(parts)
        return whole.flatten(0, 1).cpu()

    # -- parameters whole, for exports -------------------------------------------------------------------------

    def shards_to(
        self, target: int, tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, source: int, is_split: bool
    ) -> list[Tensor]:
        """A parameter's shard of every tensor parallel rank, or the one copy where it is not split, on rank `target`;
        nothing on the others.

        Args:
            tensor: this rank's; None on ranks that need not have it.
            source: the first of tensor parallel ranks that have it, `target` among them if it has it.
        """
        group = range(source, source + self.tp)
        root = target if target in group else source
        num_shards = self.tp if is_split else 1
        is_end = self.rank in (root, target)
        shards = [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(num_shards if is_end else 0)]
        if self.rank == root and num_shards == 1:
            assert tensor is not None
            shards = [tensor.detach().contiguous()]
        elif self.rank in group and num_shards > 1:
            assert tensor is not None
            dist.gather(tensor.detach().contiguous(), shards or None, root, self.tp_group)
        if root != target:
            for shard in shards:
                if self.rank == target:
                    dist.recv(shard, root)
                else:
                    dist.send(shard, target)
        return shards if self.rank == target else []

    # -- small things --------------------------------------------------------------------------------------

    def all_gather_object(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, value)
        return parts

    def to_main(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank, on the main rank; nothing on the others."""
        parts: list[Any] = [None] * self.world_size if self.is_main else []
        dist.gather_object(value, parts if self.is_main else None, 0)
        return parts

    def any_rank(self, flags: Tensor) -> list[bool]:
        """Of each flag `(N,)` whether any rank raised it."""
        raised = flags.to(torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return raised.bool().tolist()

    def from_main(self, value: Any) -> Any:
        """The main rank's `value` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def from_first_of_tp(self, value: Any) -> Any:
        """The `value` of the first of this rank's tensor parallel ranks on all of them."""
        if self.tp == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, dist.get_global_rank(self.tp_group, 0), self.tp_group, self.device)
        return box[0]

    def tensor_from_main(self, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The main rank's `value`, of a shape and type that all know, on every CPU.

        Args:
            value: None on the others.
        """
        found = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        if self.is_main:
            assert value is not None
            found.copy_(value)
        dist.broadcast(found, 0)
        return found.cpu()

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()


def own_gpu() -> int:
    """The number of this rank's device. A launcher may show each rank its own alone.

    Raises:
        ConfigError: torch sees none, or fewer than there are ranks on this machine.
    """
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count == 0:
        why = (
            "its build is for CPUs" if torch.version.cuda is None else "its CUDA needs another driver, or has no device"
        )
        raise ConfigError(
            f"device=cuda, and torch {torch.__version__} sees no GPU ({why}): install torch for the driver that"
            " nvidia-smi shows, or use device=cpu"
        )
    if ranks > count > 1:
        raise ConfigError(f"{ranks} ranks on a machine with {count} GPUs: start one rank for each GPU, {count} at most")
    return rank % count


def meeting_place(timeout: timedelta) -> dict[str, Any]:
    """The store where the ranks meet, hosted by rank 0, and this rank's place. It listens at `MASTER_ADDR` alone, where
    torch's own would listen on all interfaces; at all of them only where the address is not one of this machine, or no
    other machine can reach it: Debian has a machine's own name mean 127.0.1.1 there."""
    address, port = os.environ["MASTER_ADDR"].strip(), int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host: dict[str, Any] = {"is_master": rank == 0}
    if rank == 0:
        with contextlib.suppress(OSError):
            family, *_, place = min(socket.getaddrinfo(address, port, type=socket.SOCK_STREAM))
            found = str(place[0])
            is_named = address not in ("localhost", found) and found.startswith("127.")
            if not is_named or os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                listener = socket.create_server(place, family=family, backlog=world_size)
                host["master_listen_fd"] = listener.detach()
    try:
        store = dist.TCPStore(address, port, world_size, timeout=timeout, **host)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"rank {rank} of {world_size} has not met the others at {address}:{port}: {reason}") from None
    return {"store": store, "rank": rank, "world_size": world_size}
