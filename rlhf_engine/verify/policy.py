"""Checks of the policy as it is loaded: its weights, its log-probs, its vocabulary, and what it generates."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..config import ConfigError
from ..converting.export import export_role, head_config
from ..hf.files import HFFolder
from ..hf.index import is_checkpoint
from ..hf.shares import whole_tensors
from ..hf.weights import RandomWeights, Source, Table, compare, parameters
from ..models.partition import num_parameters, padded_vocab_size
from ..models.role import RoleModel, head_weight
from . import plain
from .findings import Finding, Skipped, bound, rms, worst
from .subject import Subject

_GARBAGE = 100.0


def round_trip(subject: Subject) -> Finding:
    """Every tensor that an export would write, against where it came from: bit for bit, in the run's type."""
    ctx, role = subject.ctx, subject.policy
    path = ctx.bases["policy"].path
    if path and is_checkpoint(path):
        raise Skipped("policy.path is a megatron checkpoint: tools/convert_hf/convert.py verify compares it")
    source: Source = HFFolder(path) if path else RandomWeights(role.model, ctx.config.seed)
    with role.on_device():
        tensors = whole_tensors(dict(parameters(role.chunks)), Table(role.model, role.head), ctx.mesh)
        if not ctx.mesh.is_main:
            return Finding(sum(1 for _ in tensors), 0)
        equal, differences = compare(tensors, source)
    found = [d for d in differences if not d.what.endswith("otherwise equal")]
    detail = f"{found[0].name} {found[0].what}" if found else f"{equal + len(differences)} tensors"
    return Finding(len(found), 0, detail)


def against_transformers(subject: Subject) -> Finding:
    """Log-probs of the rows by transformers' model in float32."""
    ctx, role = subject.ctx, subject.policy
    folder = ctx.bases["policy"].path
    needed = 8 * num_parameters(role.model, "lm")
    if ctx.mesh.from_main(needed > psutil.virtual_memory().available):
        raise Skipped("a copy for transformers might not fit the main rank's memory")
    if folder is None or is_checkpoint(folder):
        try:
            config = head_config(role.model, "lm", Path(folder) if folder else None)
        except ConfigError as error:
            raise Skipped(str(error)) from None
        folder = str(subject.folder / "hf")
        export_role(role, Path(folder), config)
    wanted = ctx.mesh.from_main(_of_transformers(folder, subject) if ctx.mesh.is_main else None)
    if isinstance(wanted, str):
        raise Skipped(wanted)
    fn = functools.partial(subject.plain, temperature=1.0, ban=((), 0), dtype=torch.float32)
    found, again = (x[:, 0][subject.mask] for x in subject.infer_twice(fn))
    limit = bound(rms(again - found), rms(found))
    return Finding(rms(found - wanted[subject.mask]), limit, "nats of a token")


def _of_transformers(folder: str, subject: Subject) -> Tensor | str:
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()
    except (ImportError, ValueError, KeyError, OSError) as error:
        return f"transformers cannot load it: {str(error).splitlines()[0]:.60}"
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # its grouped product takes multiples of 16 bytes only
    found = torch.zeros(subject.tokens.shape, dtype=torch.float64)
    with torch.no_grad():
        for row, length in enumerate(subject.lengths.tolist()):
            tokens = subject.tokens[row : row + 1, :length]
            logits = model(tokens).logits[0, :-1, : subject.policy.model.vocab_size].double()
            found[row, 1:length] = logits.log_softmax(1).gather(1, tokens[0, 1:, None]).squeeze(1)
    return found


def log_prob_kernel(subject: Subject) -> Finding:
    """Log-probs and entropies against float64 ones from the same hidden states."""
    ours, wanted, narrow, *_ = (x.transpose(1, 2)[subject.mask] for x in subject.views)
    limit = bound(rms(narrow - wanted), rms(wanted))
    return Finding(rms(ours - wanted), limit, "nats of a token, entropy included")


def alignment(subject: Subject) -> Finding:
    """Which output a token's log-prob is taken from: the one before it, and neither its own nor an earlier one."""
    ours, _, *shifted = (x.transpose(1, 2)[:, 2:][subject.mask[:, 2:]] for x in subject.views)
    means = {shift: float((ours - x).abs().mean()) for shift, x in zip((1, 0, 2), shifted, strict=True)}
    nearest = min(means, key=lambda shift: means[shift])
    return Finding(abs(nearest - 1), 0, f"nearest: the output {nearest} before the token")


def log_prob_gradient(subject: Subject) -> Finding:
    """What flows back to hidden states and LM head, against float64 autograd of the plain formula."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(subject.mask.shape, generator=generator) * subject.mask for _ in range(2))
    role = subject.policy

    def fn(hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.enable_grad():
            return torch.tensor(gaps(hidden.detach().requires_grad_(), batch)).repeat(len(hidden), 1)

    def total(both: Sequence[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return (both[0] * batch["a"]).sum() + (both[1] * batch["b"]).sum()

    def by_plain(hidden: Tensor, batch: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
        whole = plain.whole_hidden(role, hidden), plain.whole_head(role)
        leaves = [x.detach().to(dtype).requires_grad_() for x in whole]
        options = subject.sampling.temperature, subject.ban
        both = plain.log_probs(*leaves, batch["tokens"], batch["mask"], *options, dtype=dtype)
        return [x.double() for x in torch.autograd.grad(total(both.unbind(1), batch), leaves)]

    def gaps(hidden: Tensor, batch: Mapping[str, Tensor]) -> list[float]:
        weight = head_weight(role.chunks[-1]).requires_grad_()
        ours = torch.autograd.grad(total(subject.both(hidden, batch), batch), [hidden, weight])
        weight.requires_grad_(role.is_trained)
        wanted, narrow = (by_plain(hidden, batch, dtype) for dtype in (torch.float64, role.dtype))
        # this rank's part of each
        first = role.mesh.tp_rank * hidden.shape[1] if role.mesh.config.sequence_parallel else 0
        of_hidden = wanted[0][:, first : first + hidden.shape[1]]
        of_weight = wanted[1][role.mesh.tp_rank * len(weight) :][: len(weight)]
        found = [ours[0] - of_hidden, ours[1][: len(of_weight)] - of_weight]
        found += [x - y for x, y in zip(narrow, wanted, strict=True)]
        return [float(x.norm() / y.norm().clamp_min(1e-30)) for x, y in zip(found, wanted * 2, strict=True)]

    *found, of_hidden, of_weight = subject.infer(fn, a=a, b=b).amax(0).tolist()
    limits = bound(of_hidden, 1.0), bound(of_weight, 1.0)
    return worst(Finding(*both, "share of its norm") for both in zip(found, limits, strict=True))


def padding(subject: Subject) -> Finding:
    """What the padded rows of the vocabulary hold changes neither log-probs nor samples."""
    role, size = subject.policy, subject.policy.model.vocab_size or 0
    if padded_vocab_size(size, role.mesh.tp) == size:
        raise Skipped(f"a vocabulary of {size} has no padding")
    before = subject.views[0], subject.responses[0]
    kept = []
    with role.on_device(), torch.no_grad():
        for table in _vocabularies(role):
            rows = table[max(0, size - role.mesh.tp_rank * len(table)) :]
            kept.append((rows, rows.clone()))
            rows.fill_(_GARBAGE)
        after = subject.infer(subject.stacked), subject.generate(range(len(subject.prompts)))
        for rows, values in kept:
            rows.copy_(values)
    gap = float((before[0] - after[0]).abs().max())
    differing = sum(x != y for x, y in zip(before[1], after[1], strict=True))
    return Finding(gap + differing, 0, f"{differing} responses differ")


def _vocabularies(role: RoleModel) -> Iterator[Tensor]:
    for name, parameter in parameters(role.chunks):
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            yield parameter


def batch_independence(subject: Subject) -> Finding:
    """Responses of one batch, of its reverse in two slots, and of two halves.

    They may part where a token's noise is as near to a border of the inverse CDF as rounding is large, and only there:
    each token of each way is held to its own noise, and log-probs to each other as far as tokens agree.
    """
    wanted, *ways = subject.responses
    gaps, num_apart = [], 0
    for x, y in ((x, y) for way in ways for x, y in zip(way, wanted, strict=True)):
        same = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(x[0], y[0], strict=False)))
        gaps += [a - b for a, b in zip(x[1][:same], y[1][:same], strict=True)]
        num_apart += x[0] != y[0]
        if len(x[0]) != len(y[0]) and same == min(len(x[0]), len(y[0])):  # one goes on, and no token says why
            gaps.append(math.inf)
    figure = max(rms(subject.sampled.misses), rms(torch.tensor(gaps)))
    limit = bound(max(subject.sampled.rounding), subject.sampled.size)
    return Finding(figure, limit, f"{num_apart} of {sum(map(len, ways))} responses differ")


def sampler(subject: Subject) -> Finding:
    """Log-probs that the sampler gave its tokens, against those of the forward that training uses."""
    found = subject.sampled
    return Finding(rms(found.gaps), bound(found.rounding[0], found.size), "nats of a token")


CHECKS = {
    "weights: HF to Megatron to HF": round_trip,
    "model: logits against transformers": against_transformers,
    "log-probs: against float64": log_prob_kernel,
    "log-probs: gradients against float64": log_prob_gradient,
    "log-probs: shift of outputs to tokens": alignment,
    "vocabulary: padding has no probability": padding,
    "generation: independent of the batch": batch_independence,
    "generation: sampler against trainer": sampler,
}
