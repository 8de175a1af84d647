"""Faults for rehearsed ranks: each function spoils the engine in the process of a rank, called with its number."""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rlhf_engine import mesh
from rlhf_engine.models import build, layers, residency, role, stream
from rlhf_engine.rollout import engine
from rlhf_engine.signals import RunError


def host_tensor(rank: int) -> None:
    """A mask made on the host, in a layer."""
    norm = layers.RMSNorm.forward

    def forward(self, x: Tensor) -> Tensor:
        return norm(self, x) * torch.ones(x.shape[-1])

    layers.RMSNorm.forward = forward


def host_collective(rank: int) -> None:
    """Flags of the host in a collective of NCCL's."""

    def any_rank(self, flags: Tensor) -> list[bool]:
        raised = flags.to(torch.int32).cpu()
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return raised.bool().tolist()

    mesh.ParallelMesh.any_rank = any_rank


def host_parameter(rank: int) -> None:
    """A norm that is not moved."""
    built = build.build_model

    def build_model(*args, **kwargs):
        gpt = built(*args, **kwargs)
        gpt.decoder.layers[0].input_layernorm.weight = torch.nn.Parameter(torch.ones(gpt.config.hidden_size))
        return gpt

    role.build_model = build_model


def stays(rank: int) -> None:
    """A role that does not leave the device."""
    residency.Parcel.leave = lambda self: None
    residency.Parcel.arrive = lambda self: None


def item_in_capture(rank: int) -> None:
    """A number read in every decode step, and so within the capture of one."""
    step = engine.Decoder.decode

    def decode(self, tokens: Tensor, *args):
        tokens.max().item()
        return step(self, tokens, *args)

    engine.Decoder.decode = decode


def noted_layers(rank: int) -> None:
    """No fault: says how many kernels a layer takes, from one to the next, in a decode step and in a forward."""
    step, heads, gate = engine.Decoder.decode, engine.Decoder._heads, layers.SwiGLU.forward
    found: dict[str, list[int]] = {}

    def note(kind: str) -> None:
        kernels = _get_current_dispatch_mode().stage.kernels
        found.setdefault(kind, []).append(kernels)

    def decode(self, *args):
        found["decode"] = []
        return step(self, *args)

    def heads_noted(self, *args):
        note("decode")
        return heads(self, *args)

    def forward(self, *args, **kwargs):
        note("forward")
        return gate(self, *args, **kwargs)

    generate = engine.Engine.run

    def said(self):
        generate(self)
        between = {kind: at[-1] - at[-2] for kind, at in found.items()}
        raise RunError(f"kernels of a layer: {between}")

    engine.Decoder.decode, engine.Decoder._heads, layers.SwiGLU.forward = decode, heads_noted, forward
    engine.Engine.run = said


def other_order(rank: int) -> None:
    """Groups made in another order on one rank."""
    made = mesh.ParallelMesh.__init__

    def init(self, *args, **kwargs) -> None:
        made(self, *args, **kwargs)
        for ranks in [[0], [0, 1]] if rank else [[0, 1], [0]]:
            dist.new_group(ranks)

    mesh.ParallelMesh.__init__ = init


def missing(rank: int) -> None:
    """An all-reduce that one rank leaves out."""
    any_rank = mesh.ParallelMesh.any_rank

    def forgotten(self, flags: Tensor) -> list[bool]:
        return flags.tolist() if rank == 1 else any_rank(self, flags)

    mesh.ParallelMesh.any_rank = forgotten


def other_size(rank: int) -> None:
    """A collective of other sizes on one rank."""
    any_rank = mesh.ParallelMesh.any_rank
    mesh.ParallelMesh.any_rank = lambda self, flags: any_rank(self, torch.cat([flags] * (1 + rank)))


def too_many_rows(rank: int) -> None:
    """A grid that CUDA does not have."""
    from rlhf_kernels import log_prob_triton

    kernel = log_prob_triton.combine_kernel
    get = type(kernel).__getitem__

    def wide(self, grid):
        return get(self, (1, 1 << 16) if self is kernel else grid)

    type(kernel).__getitem__ = wide


@triton.jit
def _count(out, n):
    tl.store(out, n.to(tl.int64))  # Triton takes an integer of 1 for a constant, which has no `to`


def specialised(rank: int) -> None:
    """A kernel that compiles for any integer but 1."""
    norm = layers.RMSNorm.forward

    def forward(self, x: Tensor) -> Tensor:
        _count[(1,)](torch.zeros(1, dtype=torch.int64, device=x.device), 1)
        return norm(self, x)

    layers.RMSNorm.forward = forward


def not_contiguous(rank: int) -> None:
    """A view with gaps in a collective."""
    any_rank = mesh.ParallelMesh.any_rank

    def spread(self, flags: Tensor) -> list[bool]:
        wide = torch.stack([flags.to(torch.int32)] * 2, 1)
        dist.all_reduce(wide[:, 0].expand(2, -1).t(), dist.ReduceOp.MAX)
        return any_rank(self, flags)

    mesh.ParallelMesh.any_rank = spread


def much(rank: int) -> None:
    """A buffer that no plan knows."""
    step = stream.train_step

    def train_step(*args):
        kept = torch.empty(90 * 10**9, dtype=torch.uint8, device="cuda")
        found = step(*args)
        del kept
        return found

    stream.train_step = train_step


def needs_apex(rank: int) -> None:
    """No fault: megatron must have found the stand-in for apex."""
    from apex.optimizers import FusedAdam
    from megatron.core.optimizer import Adam

    assert Adam is FusedAdam


def needs_transformer_engine(rank: int) -> None:
    """No fault: megatron must have found the stand-in for transformer-engine."""
    from megatron.core.optimizer import Adam
    from transformer_engine.pytorch import FusedAdam

    assert Adam is FusedAdam
