"""What benchmarks/kernels.py compares: each operation by our kernel, plain torch and public implementations."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F

import rlhf_kernels as kernels
from rlhf_engine.launching.ranks import environment, free_port

Run = Callable[[bool], None]  # with backward or without
# how to make each candidate, bytes of the gradients returned, and the bytes that forward, and both, must move at least
Cases = tuple[dict[str, Callable[[], Run]], int, tuple[int, int]]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=device(), dtype=dtype)


def plain(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def call(fn: Callable, inputs: list[torch.Tensor], *incoming: torch.Tensor) -> Run:
    """Runs `fn` of fresh leaves; its first results take the incoming gradients."""

    def run(backward: bool) -> None:
        leaves = [x.detach().requires_grad_(backward) for x in inputs]
        with torch.set_grad_enabled(backward):
            result = fn(*leaves)
        if backward:
            results = result if isinstance(result, tuple) else (result,)
            torch.autograd.backward(results[: len(incoming)], incoming)

    return run


def log_probs(dtype: torch.dtype, rows: int, vocab: int) -> Cases:
    """Each makes its own inputs: megatron writes over the logits."""
    tokens, incoming = torch.randint(0, vocab, (rows,), device=device()), random(rows)

    def make(fn: Callable, num_incoming: int = 1) -> Callable[[], Run]:
        return lambda: call(fn, [random(rows, vocab, dtype=dtype)], *[incoming] * num_incoming)

    def megatron(fused: bool) -> Callable[[], Run]:
        def start() -> Run:
            group = tensor_parallel_mesh().tp_group
            from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
            from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

            def fn(x):
                x, y = x.unsqueeze(1), tokens.unsqueeze(1)
                loss = fused_vocab_parallel_cross_entropy(x, y, group) if fused else vocab_parallel_cross_entropy(x, y)
                return loss.squeeze(1)

            return make(fn)()

        return start

    def trl() -> Run:
        from trl.trainer.utils import selective_log_softmax

        return make(lambda x: selective_log_softmax(x, tokens))()

    def liger() -> Run:
        group = tensor_parallel_mesh().tp_group
        from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

        loss = LigerVocabParallelCrossEntropy(reduction="none", label_smoothing_formula="megatron")
        return make(lambda x: loss(x.unsqueeze(1), tokens.unsqueeze(1), group).squeeze(1))()

    def ours(x):
        return kernels.token_log_probs(x, tokens)

    found = {
        "plain": make(lambda x: plain(x, tokens)), "ours": make(ours),
        "ours-in-place": make(lambda x: kernels.token_log_probs(x, tokens, inplace_grad=True)),
        "ours-entropy-grad": make(ours, 2), "megatron": megatron(False), "megatron-fused": megatron(True), "trl": trl,
    }  # fmt: skip
    logits = rows * vocab * dtype.itemsize
    return found | ({"liger": liger} if device() == "cuda" else {}), logits, (logits, 3 * logits)


def linear_log_probs(dtype: torch.dtype, rows: int, vocab: int, hidden: int) -> Cases:
    tokens, incoming = torch.randint(0, vocab, (rows,), device=device()), random(rows)

    def make(fn: Callable) -> Callable[[], Run]:
        return lambda: call(
            fn, [random(rows, hidden, dtype=dtype), random(vocab, hidden, dtype=dtype) * hidden**-0.5], incoming
        )

    def products() -> Run:
        """The three matrix products alone, and nothing in between."""
        x, weight = random(rows, hidden, dtype=dtype), random(vocab, hidden, dtype=dtype)
        logits = x @ weight.T

        def run(backward: bool) -> None:
            torch.mm(x, weight.T, out=logits)
            if backward:
                _ = logits @ weight, logits.T @ x

        return run

    found = {
        "plain": make(lambda x, w: plain(F.linear(x, w), tokens)),
        "ours": make(lambda x, w: kernels.linear_log_probs(x, w, tokens)),
        "ours-keeps-nothing": make(lambda x, w: kernels.linear_log_probs(x, w, tokens, keep_bytes=0)),
        "products-alone": products,
    }
    inputs = (rows + vocab) * hidden * dtype.itemsize
    return found, inputs, (inputs, 3 * inputs)


def advantages(dtype: torch.dtype, rows: int, num_tokens: int) -> Cases:
    log_probs, ref, values, scores = (*random(3, rows, num_tokens), random(rows))
    lengths = torch.randint(num_tokens // 2, num_tokens, (rows, 1), device=device())
    mask = torch.arange(num_tokens, device=device()) < lengths

    def plain_gae(backward: bool) -> None:
        """As most trainers have it: a loop over tokens, then whitening."""
        rewards = -0.1 * (log_probs - ref) * mask
        rewards[torch.arange(rows, device=device()), lengths.squeeze(1) - 1] += scores
        masked, last, out = values * mask, 0, []
        for t in range(num_tokens - 1, -1, -1):
            following = masked[:, t + 1] if t + 1 < num_tokens else 0.0
            last = rewards[:, t] + following - masked[:, t] + 0.95 * last
            out.append(last)
        advantages = torch.stack(out[::-1], 1)
        _ = advantages + masked
        mean = (advantages * mask).sum() / mask.sum()
        _ = ((advantages - mean).square() * mask).sum() / mask.sum()

    def ours(backward: bool) -> None:
        kernels.kl_advantages(log_probs, ref, values, scores, mask, kl_coef=0.1)

    return {"plain": lambda: plain_gae, "ours": lambda: ours}, 0, (21 * rows * num_tokens,) * 2


def policy_loss(dtype: torch.dtype, rows: int, num_tokens: int) -> Cases:
    new, old, advantages = random(3, rows, num_tokens)
    mask = torch.rand(rows, num_tokens, device=device()) < 0.7

    def plain_loss(x):
        ratio = (x - old).exp()
        clipped = ratio.clamp(0.8, 1.2) * advantages
        loss = -(torch.minimum(ratio * advantages, clipped) * mask).sum()
        return loss, (clipped < ratio * advantages).sum(), ((ratio - 1 - (x - old)) * mask).sum()

    one = torch.ones((), device=device())
    found = {
        "plain": lambda: call(plain_loss, [new], one),
        "ours": lambda: call(lambda x: kernels.clipped_policy_loss(x, old, advantages, mask), [new], one),
    }
    return found, 4 * new.numel(), (13 * new.numel(), 25 * new.numel())


def of_layers(fns: dict[str, Callable], inputs: list[torch.Tensor], width: int, moved: tuple) -> Cases:
    """Liger's, which run on a GPU alone, take and give what ours do.

    Args:
        width: of a row of the result.
        moved: bytes that forward, and both, must move at least.
    """
    incoming = random(*inputs[0].shape[:-1], width, dtype=inputs[0].dtype)

    def liger() -> Run:
        from liger_kernel.transformers import functional

        fn = fns["liger"]
        return call(lambda *xs: fn(functional, *xs), inputs, incoming)

    found = {key: functools.partial(call, fn, inputs, incoming) for key, fn in fns.items() if key != "liger"}
    gradients = sum(x.nbytes for x in inputs)
    return found | ({"liger": liger} if device() == "cuda" else {}), gradients, moved


def norm(dtype: torch.dtype, rows: int, hidden: int) -> Cases:
    x, weight = random(rows, hidden, dtype=dtype), random(hidden, dtype=dtype)

    def plain_norm(x, w):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * w.float()).to(dtype)

    fns = {
        "plain": plain_norm, "torch": lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
        "ours": lambda x, w: kernels.rms_norm(x, w, 1e-5),
        "liger": lambda liger, x, w: liger.liger_rms_norm(x, w, 1e-5, in_place=False),
    }  # fmt: skip
    return of_layers(fns, [x, weight], hidden, (2 * x.nbytes, 5 * x.nbytes))


def gate(dtype: torch.dtype, rows: int, inner: int) -> Cases:
    x = random(rows, 2 * inner, dtype=dtype)

    def plain_gate(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    fns = {
        "plain": plain_gate, "ours": kernels.swiglu,
        "liger": lambda liger, x: liger.liger_swiglu(*(part.contiguous() for part in x.chunk(2, -1))),
    }  # fmt: skip
    return of_layers(fns, [x], inner, (3 * x.nbytes // 2, 4 * x.nbytes))


def rotary(dtype: torch.dtype, length: int, heads: int, dim: int) -> Cases:
    """Of one sequence; Liger's turns queries and keys together, here half of the heads each."""
    x = random(length, 1, heads, dim, dtype=dtype)
    angles = torch.outer(torch.arange(length), 1e4 ** -(torch.arange(0, dim, 2) / dim)).repeat(1, 2).to(device())
    cos, sin = (part.to(dtype)[:, None, None] for part in (angles.cos(), angles.sin()))

    def plain_rotary(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def liger_rotary(liger, x):
        halves = (part.permute(1, 2, 0, 3) for part in x.chunk(2, 2))
        turned = liger.liger_rope(*halves, *(part.view(1, length, dim) for part in (cos, sin)))
        return torch.cat([part.permute(2, 0, 1, 3) for part in turned], 2)

    fns = {"plain": plain_rotary, "ours": lambda x: kernels.rotate(x, cos, sin), "liger": liger_rotary}
    return of_layers(fns, [x], dim, (2 * x.nbytes, 4 * x.nbytes))


@functools.cache
def tensor_parallel_mesh():
    """Megatron's groups, in a world of this process alone."""
    from rlhf_engine.config import MeshConfig
    from rlhf_engine.mesh import ParallelMesh

    os.environ |= environment(0, 1, 0, 1, "127.0.0.1", free_port())
    return ParallelMesh(MeshConfig(1, 1, 1), device())


OPS: dict[str, Callable[..., Cases]] = {
    "token_log_probs": log_probs, "linear_log_probs": linear_log_probs, "kl_advantages": advantages,
    "clipped_policy_loss": policy_loss, "rms_norm": norm, "swiglu": gate, "rotate": rotary,
}  # fmt: skip


class Op:
    """An operation at a shape: candidates by name, bytes of the gradients, and those that forward and both move."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype):
        self.name, self.shape, self.dtype = name, shape, dtype
        self.cases, self.gradient, self.floor = OPS[name](dtype, *shape)
