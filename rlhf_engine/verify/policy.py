"""Checks of the policy as it is loaded: its weights, its log-probs, its vocabulary, and what it generates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..algorithms.context import Context
from ..algorithms.heads import policy_log_probs
from ..config import ConfigError, RolloutConfig
from ..experience import pad_rows, spans
from ..hf.export import export_role, head_config
from ..hf.files import HFFolder
from ..hf.weights import RandomWeights, Source, Table, compare, parameters, whole_tensors
from ..models.role import RoleModel, head_weight
from ..plan.partition import num_parameters, padded_vocab_size
from ..rollout.generate import rollout
from ..rollout.sampling import sample_keys
from ..trainer import base_policy
from . import plain
from .findings import TOLERANCES, Finding, Skipped, Tolerance
from .measure import MICRO_BATCH, rows_of

_GARBAGE = 100.0


class Subject:
    """The policy and a few rows of its data.

    Args:
        examples: of any phase.
        folder: for what a check has to write.
    """

    def __init__(self, ctx: Context, examples: Sequence[Any], folder: Path):
        self.ctx, self.folder = ctx, folder
        self.policy = base_policy(ctx)
        rows = rows_of(examples)
        self.prompts = [example.prompt or row[: len(row) // 2 + 1] for example, row in zip(examples, rows, strict=True)]
        self.tokens, self.lengths = pad_rows(rows, ctx.mesh.tp)
        self.mask = spans(torch.ones_like(self.lengths), self.lengths, self.tokens.shape[1])

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.policy.dtype]

    @functools.cached_property
    def sampling(self) -> RolloutConfig:
        """The run's, of the whole distribution and without text that ends a response."""
        config = self.ctx.config.rollout
        return dataclasses.replace(config, greedy=False, top_k=0, top_p=1.0, min_p=0.0, stop=[])

    @property
    def ban(self) -> tuple[Sequence[int], int]:
        return self.ctx.tokenizer.end_ids, self.sampling.min_new_tokens

    def both(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The engine's log-probs and entropies, `(B, T)` each."""
        return policy_log_probs(self.policy, hidden, batch, batch["mask"], self.sampling.temperature, self.ban)

    def stacked(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The same as `(B, 2, T)`."""
        return torch.stack(self.both(hidden, batch), 1)

    def infer(self, fn: Callable[[Tensor, Mapping[str, Tensor]], Tensor], **fields: Tensor) -> Tensor:
        """`fn` of the model's output for every row."""
        batch = {"tokens": self.tokens, "lengths": self.lengths, "mask": self.mask, **fields}
        return self.policy.infer(batch, fn, MICRO_BATCH)

    def generate(self, order: Sequence[int], slots: int | None = None) -> list[tuple[list[int], list[float]]]:
        """Responses to these of the prompts, tokens and log-probs of each."""
        sampling = self.sampling if slots is None else dataclasses.replace(self.sampling, slots=slots)
        keys = sample_keys(self.ctx.config.seed, 0, torch.tensor(order))
        prompts = [self.prompts[i] for i in order]
        found = rollout(self.policy, prompts, keys, sampling, self.ctx.tokenizer.end_ids)
        return [(response.tokens, response.log_probs) for response in found]


def round_trip(subject: Subject) -> Finding:
    """Every tensor that an export would write, against where it came from: bit for bit, in the run's type."""
    ctx, role = subject.ctx, subject.policy
    path = ctx.bases["policy"].path
    if path and (Path(path) / ".metadata").is_file():
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
    if folder is None or (Path(folder) / ".metadata").is_file():
        try:
            config = head_config(role.model, "lm", Path(folder) if folder else None)
        except ConfigError as error:
            raise Skipped(str(error)) from None
        folder = str(subject.folder / "hf")
        export_role(role, Path(folder), config)
    wanted = ctx.mesh.from_main(_of_transformers(folder, subject) if ctx.mesh.is_main else None)
    if isinstance(wanted, str):
        raise Skipped(wanted)
    found = subject.infer(functools.partial(_plain, subject, temperature=1.0, ban=((), 0)))[:, 0]
    gap = (found - wanted)[subject.mask].abs()
    return Finding(_worst(gap), subject.tolerance.forward, "nats of a token")


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


def _plain(subject: Subject, hidden: Tensor, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Log-probs and entropies by `plain`, `(B, 2, T)`."""
    options = {"temperature": subject.sampling.temperature, "ban": subject.ban, **options}
    hidden, head = plain.whole_hidden(subject.policy, hidden), plain.whole_head(subject.policy)
    return torch.stack(plain.log_probs(hidden, head, batch["tokens"], batch["mask"], **options), 1)


def log_prob_kernel(subject: Subject) -> Finding:
    """Log-probs and entropies against float64 ones from the same hidden states."""
    return Finding(_worst(_gaps(subject)), subject.tolerance.log_prob, "nats of a token, entropy included")


def alignment(subject: Subject) -> Finding:
    """Which output a token's log-prob is taken from: the one before it, and neither its own nor an earlier one."""
    means = {shift: float(_gaps(subject, shift).mean()) for shift in (1, 0, 2)}
    nearest = min(means, key=lambda shift: means[shift])
    return Finding(abs(nearest - 1), 0, f"nearest: the output {nearest} before the token")


def _gaps(subject: Subject, shift: int = 1) -> Tensor:
    ours = subject.infer(subject.stacked)
    theirs = subject.infer(functools.partial(_plain, subject, shift=shift))
    seen = subject.mask.clone()
    seen[:, :shift] = False
    return torch.where(ours == theirs, 0.0, (ours - theirs).abs()).transpose(1, 2)[seen]  # both may be -inf


def log_prob_gradient(subject: Subject) -> Finding:
    """What flows back to hidden states and LM head, against float64 autograd of the plain formula."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(subject.mask.shape, generator=generator) * subject.mask for _ in range(2))
    role = subject.policy

    def fn(hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.enable_grad():
            return torch.tensor(gaps(hidden.detach().requires_grad_(), batch)).repeat(len(hidden), 1)

    def total(both: tuple[Tensor, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return (both[0] * batch["a"]).sum() + (both[1] * batch["b"]).sum()

    def gaps(hidden: Tensor, batch: Mapping[str, Tensor]) -> list[float]:
        weight = head_weight(role.chunks[-1]).requires_grad_()
        ours = torch.autograd.grad(total(subject.both(hidden, batch), batch), [hidden, weight])
        weight.requires_grad_(role.is_trained)
        whole, head = (x.detach().requires_grad_() for x in (plain.whole_hidden(role, hidden), plain.whole_head(role)))
        options = subject.sampling.temperature, subject.ban
        both = plain.log_probs(whole, head, batch["tokens"], batch["mask"], *options)
        theirs = torch.autograd.grad(total(both, batch), [whole, head])
        # this rank's part of each
        first = role.mesh.tp_rank * hidden.shape[1] if role.mesh.config.sequence_parallel else 0
        of_hidden = theirs[0][:, first : first + hidden.shape[1]]
        of_weight = theirs[1][role.mesh.tp_rank * len(weight) :][: len(weight)]
        pairs = [(ours[0], of_hidden), (ours[1][: len(of_weight)], of_weight)]
        return [float((x - y).norm() / whole.norm()) for (x, y), whole in zip(pairs, theirs, strict=True)]

    found = subject.infer(fn, a=a, b=b)
    return Finding(_worst(found), subject.tolerance.gradient, "share of its norm")


def padding(subject: Subject) -> Finding:
    """What the padded rows of the vocabulary hold changes neither log-probs nor samples."""
    role, size = subject.policy, subject.policy.model.vocab_size or 0
    if padded_vocab_size(size, role.mesh.tp) == size:
        raise Skipped(f"a vocabulary of {size} has no padding")
    everyone = range(len(subject.prompts))
    before = subject.infer(subject.stacked), subject.generate(everyone)
    kept = []
    with role.on_device(), torch.no_grad():
        for table in _vocabularies(role):
            rows = table[max(0, size - role.mesh.tp_rank * len(table)) :]
            kept.append((rows, rows.clone()))
            rows.fill_(_GARBAGE)
        after = subject.infer(subject.stacked), subject.generate(everyone)
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
    """Responses of one batch, of its reverse in two slots, and of two halves."""
    everyone = list(range(len(subject.prompts)))
    half = len(everyone) // 2
    wanted = subject.generate(everyone)
    ways = [
        subject.generate(everyone[::-1], slots=2)[::-1],
        [*subject.generate(everyone[:half]), *subject.generate(everyone[half:])],
    ]
    apart = [x[0] != y[0] for way in ways for x, y in zip(way, wanted, strict=True)]
    return Finding(sum(apart) / len(apart), subject.tolerance.apart, f"{sum(apart)} of {len(apart)} responses differ")


def sampler(subject: Subject) -> Finding:
    """Log-probs that the sampler gave its tokens, against those of the forward that training uses."""
    responses = subject.generate(range(len(subject.prompts)))
    rows = [prompt + tokens for prompt, (tokens, _) in zip(subject.prompts, responses, strict=True)]
    tokens, lengths = pad_rows(rows, subject.ctx.mesh.tp)
    mask = spans(torch.tensor([len(prompt) for prompt in subject.prompts]), lengths, tokens.shape[1])
    fields = {"tokens": tokens, "lengths": lengths, "mask": mask}
    found = subject.infer(lambda hidden, batch: subject.both(hidden, batch)[0], **fields)
    sampled = torch.tensor([log_prob for _, log_probs in responses for log_prob in log_probs])
    return Finding(_worst((found[mask] - sampled).abs()), subject.tolerance.log_prob, "nats of a token")


def _worst(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


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
