"""Continuous batching: sequences enter the cache while it has room, leave when they end, and every step is dense.

The longest are admitted first, as many as the cache will probably hold (`admission.py`). Where that was too many, the
rows that have come least far step back: they keep their tokens, and are computed with them again later. What a sequence
becomes depends on none of this: its noise is its own, rows do not see each other, and on a CPU products round each row
alike whatever stands beside it (`attention.py`).

On a GPU the host says what comes next while the device computes, and knows one step late which rows have ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ..mesh import ParallelMesh
from .admission import expected_blocks
from .cache import BLOCK, Ints, Rows, num_blocks, on_device
from .decoder import Decoder
from .prefill import batches, padded_width, prefill
from .progress import Finished, Progress, Report, Response
from .sampling import Sampler
from .steps import END, NOT_FINITE, Found, Steps

PREFILL_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 14}  # of one forward, padding included
_AHEAD = 8  # steps for which rows have their blocks, so that tables stay as they are for so long
_SPARE_SHARE = 16  # of the blocks, one in so many is not counted on, as fewer rows may end than is expected
_LEAST_SHARE = 8  # of the rows that there are, one in so many is worth the forward that admits it
_SECONDS_BETWEEN_REPORTS = 5.0


def reads_by_row(cache: Tensor) -> bool:
    """Whether attention reads the cache row by row, in one launch, and not all blocks at once."""
    return cache.is_cuda


class Engine:
    """Generates for one replica.

    Args:
        gpt: whole but for TP.
        prompts: token ids of each sample.
        keys: `(N,)`, of their noise.
        limits: most tokens of each response.
        names: by which errors call the samples.
        slots: sequences decoded at once, at most.
        kv_tokens: positions of the cache, at least as many as the longest sequence may come to have.
        ends: whether a response, given by its tokens, is complete by its text; None never asks.
        report: called every few seconds.
        tell: called as often, with all responses that are finished by their samples' names.
        begun: what each response has already, which counts among its tokens; None: nothing.
    """

    def __init__(
        self,
        gpt: GPTModel,
        mesh: ParallelMesh,
        sampler: Sampler,
        prompts: Sequence[Sequence[int]],
        keys: Tensor,
        limits: Sequence[int],
        names: Sequence[int],
        slots: int,
        kv_tokens: int,
        ends: Callable[[list[int]], bool] | None = None,
        report: Report | None = None,
        tell: Finished | None = None,
        begun: Sequence[Response] | None = None,
    ):
        self.mesh, self.sampler, self.prompts, self.names = mesh, sampler, prompts, names
        self.text_ends, self.report, self.tell, self.device = ends, report, tell, mesh.device
        self.limits = np.array(limits)
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.need = self.lengths + self.limits
        numbers: dict[tuple[int, ...], int] = {}
        self.prompt_of = np.array([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts])
        longest = int(self.need.max())
        self.slots = min(slots, len(prompts))
        self.decoder = Decoder(gpt, mesh.tp_group, longest)
        self.cache = self.decoder.new_cache(min(num_blocks(kv_tokens), self.slots * num_blocks(longest)))
        self.rows = Rows(self.cache, num_blocks(longest))
        self.by_row = reads_by_row(self.cache.store)
        most = (max(limits), self.slots, self.rows.columns)
        self.steps = Steps(self.decoder, self.cache, sampler, keys, self.lengths, *most, self.by_row)
        # samples of one prompt stand side by side
        self.waiting = sorted(range(len(prompts)), key=lambda i: (-self.need[i], prompts[i], i))
        # how many tokens each sample has been given, of those that are not in the cache
        self.given = np.zeros(len(prompts), np.int64)
        self.texts: list[list[int]] = [[] for _ in prompts]  # tokens so far, where `ends` wants them
        for i, response in enumerate(begun or ()):
            self.given[i], self.texts[i] = len(response.tokens), list(response.tokens)
            self.steps.begin(i, response)
        # what is not known yet: samples, how many tokens each then has, whether it was a step, and what it gave
        self.pending: deque[tuple[Ints, Ints, bool, Found]] = deque()
        self.late = int(self.by_row)  # steps that are not waited for
        self.known_at = time.perf_counter()  # when the last was
        self.is_over = np.zeros(len(prompts), bool)
        self.finished: dict[int, bool] = {}
        self.progress = Progress(num_rows=len(prompts))

    @torch.no_grad()
    def run(self) -> list[Response]:
        """Responses to all prompts, in their order.

        Raises:
            FloatingPointError: a logit is not finite; names the sample and the rank.
        """
        started = reported = self.known_at = time.perf_counter()
        progress = self.progress
        while self.waiting or len(self.rows):
            self._admit()
            now = time.perf_counter()
            progress.seconds = progress.busy_seconds = now - started
            if now - reported > _SECONDS_BETWEEN_REPORTS:
                if self.report is not None:
                    self.report(progress)
                if self.tell is not None:
                    self.tell({self.names[i]: response for i, response in self._responses().items()})
                reported = now
            self._extend()
            if len(self.rows):
                self._decode()
        self._read(0)
        responses = self._responses()
        progress.seconds = progress.busy_seconds = time.perf_counter() - started
        return [responses[i] for i in range(len(self.prompts))]

    # -- who is in the cache ---------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Waiting sequences into the cache, and their next tokens."""
        count = self._admitted()
        samples, self.waiting = self.waiting[:count], self.waiting[count:]
        if not samples:
            return
        samples.sort(key=lambda i: (-padded_width(len(self.prompts[i])), self.prompts[i], i))
        first, begins = len(self.rows), []  # what others have of a prompt, they have written
        for i in samples:
            shared = self._shared(i)
            self.rows.add(i, self.lengths[i] + self.given[i], shared)
            begins.append(len(shared) * BLOCK)
        most, prompts = PREFILL_TOKENS[self.device.type], [tuple(self.prompts[i]) for i in samples]
        cuts = [(start, slice(start, stop)) for start, stop in batches(prompts, most)]
        parts = [prefill(self.decoder, self.rows, prompts[cut], first + start, begins[cut]) for start, cut in cuts]
        logits, index, given = torch.cat(parts), np.array(samples), self.given[samples]
        parts_of = given.cumsum() // most
        for part in np.unique(parts_of):
            back = np.flatnonzero((given > 0) & (parts_of == part))
            if len(back):
                rows = index[back], given[back], self.lengths[index[back]], self.rows.table[first + back]
                logits[back] = self.steps.replay(*rows)
        self._note(index, given + 1, False, self.steps.give(logits, *on_device(self.device, index, given)))

    def _admitted(self) -> int:
        """How many of those that wait, the first ones."""
        rows, cache = self.rows, self.cache
        room, least = self.slots - len(rows), min(len(self.waiting), -(-len(rows) // _LEAST_SHARE))
        if room < least or not self.waiting:
            return 0
        ends = sum(self.finished.values()) / max(1, self.progress.tokens)
        need, held = self.need[rows.samples], rows.shares
        more = num_blocks(need) - rows.counts
        expected, worst = (
            expected_blocks(held, more, need - rows.lengths, ends, rows.columns).sum(0),
            (held + more).sum(),
        )
        samples = np.array(self.waiting[:room])
        lengths, need = self.lengths[samples] + self.given[samples], self.need[samples]
        now, prompts = num_blocks(np.minimum(lengths + _AHEAD, need)), self.prompt_of[samples]
        new = now.copy()  # but for what others have of a prompt
        is_first = np.diff(prompts, prepend=-1) != 0
        is_held = np.isin(prompts, self.prompt_of[rows.samples]) | ~is_first
        new -= is_held * (self.lengths[samples] // BLOCK)
        more = num_blocks(need) - now
        expected = expected + expected_blocks(new, more, need - lengths, ends, rows.columns).cumsum(0)
        worst = worst + (new + more).cumsum()
        spare = cache.num_blocks // _SPARE_SHARE
        fits = (expected.max(1) <= cache.num_blocks - spare) | (worst <= cache.num_blocks + 1e-6)
        fits &= new.cumsum() <= cache.num_free
        count = int(fits.argmin()) if not fits.all() else len(fits)
        return count if count >= least else 0

    def _shared(self, sample: int) -> np.ndarray:
        """The blocks that its prompt fills, where another row has them."""
        others = np.flatnonzero(self.prompt_of[self.rows.samples] == self.prompt_of[sample])[:1]
        return self.rows.table[others, : self.lengths[sample] // BLOCK].flatten()

    def _extend(self) -> None:
        """Blocks for the next steps; where there are too few, those who have come least far step back."""
        rows = self.rows
        while (missing := self._missing()).sum() > self.cache.num_free:
            if self.pending:  # rows may have ended
                self._read(0)
                continue
            came = rows.lengths - self.lengths[rows.samples]
            last = len(rows) - 1 - int(came[::-1].argmin())
            sample = int(rows.samples[last])
            self.given[sample] = came[last] + 1
            self.waiting.insert(0, sample)
            self.progress.preempted += 1
            rows.remove([last])
        rows.extend(missing)
        used = self.cache.num_blocks - self.cache.num_free
        if not self.by_row and 4 * used < 3 * rows.table.max(initial=0):
            self.cache.close_up(rows.table)

    def _missing(self) -> Ints:
        """Blocks that each row needs for the next steps. In one that comes too late it is within the last of them."""
        rows = self.rows
        return num_blocks(np.minimum(rows.lengths + _AHEAD, self.need[rows.samples])) - rows.counts

    # -- a token for everyone --------------------------------------------------------------------------------

    def _decode(self) -> None:
        """More tokens for every row, until one is known to have ended or blocks are used up."""
        self.steps.load(self.rows.samples, self.rows.lengths, self.rows.table)
        for _ in range(_AHEAD):
            if self._step():
                break

    def _step(self) -> bool:
        rows = self.rows
        rows.lengths += 1
        return self._note(rows.samples, rows.lengths - self.lengths[rows.samples] + 1, True, self.steps())

    def _note(self, samples: Ints, given: Ints, is_step: bool, both: Tensor) -> bool:
        """Samples have been given so many tokens by now, the last of which `both` tells. Whether rows have left."""
        self.pending.append((samples, given, is_step, Found(both)))
        return self._read(self.late)

    def _read(self, late: int) -> bool:
        """Takes note of all tokens but those of the last steps; rows that ended leave. Whether any has."""
        before = len(self.finished)
        while len(self.pending) > late:
            self._settle(*self.pending.popleft())
        if len(self.finished) == before:
            return False
        self.rows.remove(np.flatnonzero(self.is_over[self.rows.samples]).tolist())
        return True

    def _settle(self, samples: Ints, given: Ints, is_step: bool, found: Found) -> None:
        tokens, said = found.read()[:, : len(samples)]
        now, progress = time.perf_counter(), self.progress
        live = ~self.is_over[samples]  # others ended before, and this is one token too many
        count = int(live.sum())
        progress.tokens += count
        if is_step:
            progress.rows_decoded += count
            progress.slots_offered += self.slots
        else:
            progress.prefill_seconds += now - self.known_at
        self.known_at = now
        if self.text_ends is not None:
            for row in np.flatnonzero(live):
                said[row] |= END * self._ends_by_text(samples[row], tokens[row])
        over = np.flatnonzero(live & ((said > 0) | (given >= self.limits[samples])))
        for sample, length, how in zip(samples[over].tolist(), given[over], said[over].tolist(), strict=True):
            if how & NOT_FINITE:
                raise FloatingPointError(
                    f"logits of sample {self.names[sample]} are not finite (rank {self.mesh.rank})"
                )
            self.given[sample], self.finished[sample], self.is_over[sample] = length, bool(how & END), True
        progress.rows_done = len(self.finished)

    def _ends_by_text(self, sample: int, token: int) -> bool:
        assert self.text_ends is not None
        text = self.texts[sample]
        text.append(int(token))
        return len(text) >= self.sampler.config.min_new_tokens and self.text_ends(text)

    def _responses(self) -> dict[int, Response]:
        """Of the samples that are finished."""
        done = list(self.finished)
        tokens, log_probs = self.steps.tokens[done].tolist(), self.steps.log_probs[done].tolist()
        parts = zip(done, tokens, log_probs, strict=True)
        return {i: Response(t[: self.given[i]], p[: self.given[i]], self.finished[i]) for i, t, p in parts}
