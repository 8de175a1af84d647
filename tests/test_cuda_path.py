"""What the engine asks of a GPU, with stand-ins for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import layers as megatron_layers
from torch.overrides import TorchFunctionMode

from rlhf_engine.config import ConfigError, MeshConfig, ModelConfig
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.mesh import ParallelMesh
from rlhf_engine.models import layers
from rlhf_engine.models.build import build_model
from rlhf_engine.rollout import generate

SIZES = dict(num_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
MODELS = {
    "experts": ModelConfig(**SIZES, vocab_size=32, num_experts=4, experts_per_token=2),
    "positions": ModelConfig(**SIZES, vocab_size=32, positions="learned"),
}


class Moves(TorchFunctionMode):
    """Notes tensors whose memory is replaced by that of another device, which torch does not do from a CPU to meta."""

    def __init__(self):
        super().__init__()
        self.moved: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.data.__set__ and args[0].device != args[1].device:
            self.moved.add(id(args[0]))
            return None
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_all_of_a_model_is_on_its_device(monkeypatch, model):
    """The meta device stands for a GPU: megatron allocates there what it asks of the current device."""
    meta = torch.device("meta")
    with one_rank() as mesh, Moves() as moves:
        mesh.device = meta
        monkeypatch.setattr(
            megatron_layers.torch.cuda, "current_device", lambda: meta
        )  # the stand-in of all of megatron
        monkeypatch.setattr(layers, "parameter_device", lambda: meta)
        gpt = build_model(model, mesh, "lm", torch.bfloat16)
        mesh.device = torch.device("cpu")
    left = [name for name, p in gpt.named_parameters() if p.device != meta and id(p) not in moves.moved]
    assert not left and moves.moved
    assert {p.dtype for p in gpt.parameters()} == {torch.bfloat16}


class Allocator:
    """torch's, of a device of 80 GB: of 75 that it has from the driver 55 are free blocks."""

    total, reserved, allocated = 80 * 10**9, 75 * 10**9, 20 * 10**9

    def empty_cache(self):
        self.reserved = self.allocated

    def mem_get_info(self, device):
        return self.total - self.reserved, self.total


def test_a_cache_takes_what_torch_keeps_and_nobody_uses(monkeypatch):
    """Llama 7B has half a MiB a token: half of 60 GB are 57220, and of the 5 GB that the driver calls free 4768."""
    allocator = Allocator()
    for name in ("empty_cache", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, getattr(allocator, name))
    mesh = SimpleNamespace(device=torch.device("cuda"), tp=1, all_gather_object=lambda mine: [mine])
    model = ModelConfig(num_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=32)
    role = SimpleNamespace(mesh=mesh, model=model, dtype=torch.bfloat16)
    assert generate.free_tokens(role, 0.5) == 30 * 10**9 // 2**19 == 57220


@pytest.mark.parametrize(
    ("count", "ranks", "words"),
    [(0, 1, ["sees no GPU", "build is for CPUs", "device=cpu"]), (2, 4, ["4 ranks", "2 GPUs"])],
    ids=["none", "fewer"],
)
def test_a_rank_without_a_gpu_of_its_own(monkeypatch, count, ranks, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail(f"it took {device}"))
    monkeypatch.setenv("LOCAL_RANK", str(ranks - 1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    with pytest.raises(ConfigError) as error:
        ParallelMesh(MeshConfig(1, 1, 1), "cuda")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(("count", "taken"), [(4, 3), (1, 0)], ids=["all are shown", "its own is shown"])
def test_the_gpu_of_a_rank(monkeypatch, count, taken):
    class Taken(Exception): ...

    def take(device):
        raise Taken(device.index)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(Taken, match=str(taken)):
        ParallelMesh(MeshConfig(1, 1, 1), "cuda")
