"""What a frozen reference says of answers that are there beforehand: computed once, and kept in a file of the phase.

The file is that of one reference, known by the files of its weights, or by the seed of random ones, and by their type;
within it an answer is known by its tokens and those before it. The reference is built when an answer is missing, and
let go of.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..context import Context
from ..experience import Experience, pad_rows, spans
from ..models.role import RoleModel
from ..models.stream import infer
from ..models.work import Batch, InferFn, Work
from ..signals import RunError
from ..surviving import durable
from ..surviving.parts import folder_digest
from .algorithm import RoleSpec
from .heads import policy_log_probs
from .sft import text_work

Answer = tuple[list[int], list[int]]  # token ids: what stands before an answer, and the answer

_PART = 8192  # answers that are computed between two writes


def answered(answers: Sequence[Answer], multiple: int) -> Experience:
    """Rows of answers behind what stands before them, right-padded, with a mask of the answers' tokens."""
    tokens, lengths = pad_rows([before + answer for before, answer in answers], multiple)
    starts = torch.tensor([len(before) for before, _ in answers])
    return Experience(tokens=tokens, lengths=lengths, loss_mask=spans(starts, lengths, tokens.shape[1]))


def answer_log_probs(role: RoleModel) -> InferFn:
    """Log-prob of each row's answer, `(B,)` float64: the sum over its tokens, in which float32 would lose digits."""

    def fn(hidden: Tensor, batch: Batch) -> Tensor:
        return policy_log_probs(role, hidden, batch)[0].double().sum(1)

    return fn


def answer_work(role: RoleModel, x, micro_batch_size: int) -> Work:
    """The same of rows, without a step."""
    return text_work(role, x, answer_log_probs(role), micro_batch_size)


class KnownReference:
    """Log-probs of answers by the reference of `spec`, as far as they are known."""

    def __init__(self, ctx: Context, spec: RoleSpec):
        self.ctx, self.spec = ctx, spec
        self.path = Path(ctx.config.output_dir) / ctx.phase / "reference.json"
        self.weights = ""
        self.known: dict[str, float] = {}
        if ctx.mesh.is_main:
            self.weights, found = self._weights(), durable.read(self.path) or {}
            self.known = found["log_probs"] if found.get("weights") == self.weights else {}
        self.known = ctx.mesh.from_main(self.known)

    def _weights(self) -> str:
        """What the reference's weights are known by."""
        ctx, finished = self.ctx, [self.ctx.finished.get(phase) for phase, _ in self.spec.weights]
        start = next(filter(None, finished), ctx.bases[self.spec.base].path)
        random = json.dumps([ctx.config.seed, asdict(ctx.bases[self.spec.base].model)])
        return f"{folder_digest(str(start)) if start else random} {ctx.roles['policy'].dtype}"

    def learn(self, batches: Iterable[Sequence[Answer]]) -> None:
        """Computes and writes what is missing of all these answers.

        Raises:
            RunError: the reference gives no number for one.
            Stop: the run was asked to stop; what is computed is written.
        """
        missing: dict[str, Answer] = {}
        reference = None
        for answers in itertools.chain(batches, [None]):
            missing |= {key: a for a in answers or () if (key := _key(a)) not in self.known}
            if missing and (answers is None or len(missing) >= _PART):
                reference = reference or self.ctx.build("reference", self.spec)
                self._compute(reference, missing)
                missing = {}
        del reference
        gc.collect()

    def _compute(self, reference: RoleModel, answers: dict[str, Answer]) -> None:
        ctx = self.ctx
        with ctx.watch(f"the reference's log-probs of {len(answers)} answers"):
            x = answered(list(answers.values()), ctx.mesh.tp)
            (found,) = infer([answer_work(reference, x, ctx.settings.micro_batch_size)])
        if not found.isfinite().all():
            raise RunError(f"{ctx.phase}: the reference's log-probs are not finite: look at the weights that it has")
        self.known |= dict(zip(answers, found.tolist(), strict=True))
        if ctx.mesh.is_main:
            print(f"{ctx.phase}: the reference's log-probs of {len(self.known)} answers are in {self.path}", flush=True)
            durable.make_folder(self.path.parent)
            durable.write(self.path, json.dumps({"weights": self.weights, "log_probs": self.known}))
        ctx.stop_if_asked()

    def of(self, answers: Sequence[Answer]) -> Tensor:
        """`(B,)` float64, of answers that `learn` has been given."""
        return torch.tensor([self.known[_key(answer)] for answer in answers], dtype=torch.float64)


def _key(answer: Answer) -> str:
    parts = (array("q", tokens).tobytes() for tokens in answer)
    return hashlib.blake2b(b"|".join(parts), digest_size=16).hexdigest()
