"""What makes a host wait for its device: operations whose result has a shape, or is a number, that only the device
knows. On a CPU they cost nothing; a GPU works off its whole queue before the host can go on."""

from __future__ import annotations

import sys
from pathlib import Path

import cases
import pytest
import torch
from conftest import SMALL
from megatron.core.optimizer import clip_grads
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_engine.config import ModelConfig
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.models.role import RoleModel
from rlhf_engine.rollout import graphs
from rlhf_engine.rollout.decoder import Decoder

aten = torch.ops.aten
WAITING = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.masked_scatter_backward.default,
    aten._local_scalar_dense.default,
    aten.equal.default,
}
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
OURS = {"kernels", "rlhf_kernels", "models", "algorithms", "rollout"}  # folders


class Waits(TorchDispatchMode):
    """Within it, `places` collects the lines of the project at which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.lists = Lists(self)

    def __enter__(self):
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.lists.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in BY_INDEX and any(x is not None and x.dtype is torch.bool for x in args[1])
        if function in WAITING or by_mask:
            self.note()
        return function(*args, **(kwargs or {}))

    def note(self) -> None:
        frame, lines = sys._getframe(2), []
        while frame is not None:
            lines.append((Path(frame.f_code.co_filename), frame.f_lineno))
            frame = frame.f_back
        if any(path.name == "reference.py" for path, _ in lines):
            return  # plain torch where a GPU runs Triton
        ours = (f"{path.name}:{line}" for path, line in lines if path.parent.name in OURS)
        self.places.append(next(ours, "backward"))


class Lists(TorchFunctionMode):
    """Has lists made of tensors noted, which on a CPU is no operation."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.tolist:
            self.waits.note()
        return function(*args, **(kwargs or {}))


def waits_of_streams(overrides: list[str], phase: str) -> tuple[int, list[str]]:
    """Streams of a phase's first iteration on one rank, and where in them a number is asked of the device."""
    from rlhf_engine.models import stream

    original, waits, runs = stream.get_forward_backward_func, Waits(), []

    def watched():
        def run(**arguments):
            runs.append(arguments["num_microbatches"])
            with waits:
                return original()(**arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "get_forward_backward_func", watched)
        cases.first_iteration(overrides, (1, 1, 1), phase)
    return len(runs), waits.places


@pytest.mark.parametrize(("phase", "streams"), [("sft", 1), ("reward", 1), ("ppo", 12)])
def test_no_micro_batch_is_waited_for(worlds, small_run, phase, streams):
    """Neither forward nor backward, of any role, response tokens with and without a ban: what there is to choose is
    known when the micro-batches are cut, on the CPU."""
    overrides = [*SMALL, f"output_dir={small_run}", "rollout.min_new_tokens=2"]
    assert worlds(1).run(waits_of_streams, overrides, phase) == [(streams, [])]


EXPERTS = ["model.architecture=mixtral", "model.num_experts=4", "policy.router_aux_loss_coef=0.01"]


def test_no_expert_is_waited_for(worlds, small_run):
    """How many rows each has is counted where they are; the forward that does so for the loss is one more stream."""
    overrides = [*SMALL, *EXPERTS, f"output_dir={small_run}/experts"]
    overrides.append(f"tokenizer.path={small_run}/tokenizer/tokenizer.model")
    assert worlds(1).run(waits_of_streams, overrides, "sft") == [(2, [])]


@pytest.mark.parametrize("num_experts", [None, 8])
def test_a_decode_step_is_not_waited_for(monkeypatch, num_experts):
    """With experts neither, as on a GPU, where their rows are not filled up."""
    monkeypatch.setattr("rlhf_engine.rollout.decoder.LEAST", 1)
    sizes = dict(num_layers=3, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
    with one_rank() as mesh:
        model = ModelConfig(**sizes, vocab_size=32, num_experts=num_experts)
        role = RoleModel("policy", model, mesh, "lm", torch.float32)
        decoder = Decoder(role.chunks[0], mesh.tp_group, 16)
        cache, rows = decoder.new_cache(5), torch.arange(5)
        with torch.no_grad(), Waits() as waits:
            decoder.decode(rows, rows, rows.unsqueeze(1) + 1, cache)
        assert waits.places == []


def test_the_norm_of_gradients_is_waited_for_once():
    """Not once for each parameter, as by megatron's stand-in for apex's kernel."""
    with one_rank() as mesh:
        gradients = [torch.full((n,), 2.0) for n in range(1, 30)]
        with Waits() as waits:
            norm = clip_grads.get_grad_norm_fp32(gradients, grad_stats_parallel_group=mesh.tp_group)
        assert norm == pytest.approx(2 * 435**0.5) and len(waits.places) == 1
        overflow = torch.zeros(1, dtype=torch.int)
        clip_grads.multi_tensor_scale_impl(65536, overflow, [gradients, gradients], 0.25)
        assert all(x.eq(0.5).all() for x in gradients)


@pytest.mark.parametrize(
    ("most", "sizes"), [(256, [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]), (20, [8, 12, 16, 20]), (5, [5])]
)
def test_steps_are_captured_in_few_sizes(most, sizes):
    """Each capture waits for the device and empties its cache of free memory."""
    assert graphs.sizes(most) == sizes
