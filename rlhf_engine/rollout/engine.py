"""Continuous batching: sequences enter the cache while it has room, leave when they end, and every step is dense.

The longest are admitted first, as many as the cache will probably hold (`admission.py`). Where that was too many, the
rows that have come least far step back: they keep their tokens, and are computed with them again later. What a sequence
becomes depends on none of this: its noise is its own, rows do not see each other, and on a CPU products round each row
alike whatever stands beside it (`attention.py`).

On a GPU the host says what comes next while the device computes, and knows one step late which rows have ended.

A sample of several turns leaves the rows at the end of each, and keeps its blocks as long as nobody needs them. What it
is answered is computed behind them, all rows that are back at once, and as that is a replay of tokens, those who have
lost their blocks do the same from their prompts on.
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
from .turns import Dialogues, Turns

PREFILL_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 14}  # of one forward, padding included
_AHEAD = 8  # steps for which rows have their blocks, so that tables stay as they are for so long
_SPARE_SHARE = 16  # of the blocks, one in so many is not counted on, as fewer rows may end than is expected
_LEAST_SHARE = 8  # of the rows that there are, one in so many is worth the forward that admits it, or takes it back
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
        limits: most tokens of each response; with `turns` of all turns and answers together.
        names: by which errors call the samples.
        slots: sequences decoded at once, at most.
        kv_tokens: positions of the cache, at least as many as the longest sequence may come to have.
        ends: whether a response, given by its tokens, is complete by its text; None never asks.
        report: called every few seconds.
        tell: called as often, with all responses that are finished by their samples' names.
        begun: what each response has already, which counts among its tokens; None: nothing.
        turns: what answers the samples; None: a response is one turn.
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
        turns: Turns | None = None,
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
        most = self.slots if turns is None else len(prompts)  # that have blocks at once
        self.cache = self.decoder.new_cache(min(num_blocks(kv_tokens), most * num_blocks(longest)))
        self.rows, self.away = (Rows(self.cache, num_blocks(longest)) for _ in range(2))
        self.by_row = reads_by_row(self.cache.store)
        sizes = (max(limits), self.slots, self.rows.columns)
        self.steps = Steps(self.decoder, self.cache, sampler, keys, self.lengths, *sizes, self.by_row)
        # samples of one prompt stand side by side
        self.waiting = sorted(range(len(prompts)), key=lambda i: (-self.need[i], prompts[i], i))
        # how many tokens each sample has been given, of those that are not in the cache
        self.given = np.zeros(len(prompts), np.int64)
        self.texts: list[list[int]] = [[] for _ in prompts]  # tokens so far, where `ends` wants them
        for i, response in enumerate(begun or ()):
            self.given[i], self.texts[i] = len(response.tokens), list(response.tokens)
            self.steps.begin(i, response)
        self.dialogues: Dialogues | None = None
        self.until, self.back = self.limits, list[int]()  # who has an answer and is not among the rows yet
        if turns is not None:
            self.dialogues = Dialogues(turns, names, self.limits, sampler.config.max_new_tokens)
            self.until = self.dialogues.until
        # what is not known yet: samples, how many tokens each then has, whether it was a step, and what it gave
        self.pending: deque[tuple[Ints, Ints, bool, Found]] = deque()
        self.late = int(self.by_row)  # steps that are not waited for
        self.known_at = time.perf_counter()  # when the last was
        self.is_over = np.zeros(len(prompts), bool)
        self.has_ended: dict[int, bool] = {}  # by itself: the last turn of each
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
        while self.waiting or len(self.rows) or self.num_asked or self.back:
            if self.dialogues is not None and self.num_asked:
                self._hear(self.dialogues)
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
        """Those who are back, and waiting sequences, into the rows, and their next tokens."""
        self._take_back()
        count = self._admitted()
        while not count and not len(self.rows) and len(self.away) and (self.waiting or self.back):
            self._forget()  # others have all the room
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
        self._go_on(first, torch.cat(parts), np.zeros(len(samples), np.int64))

    def _take_back(self) -> None:
        """Those who are back and still have their blocks, while there are slots and blocks for what comes next."""
        places, first = [], len(self.rows)
        if len(self.back) < max(1, min(len(self.back) + self.num_asked, -(-first // _LEAST_SHARE))):
            return
        for sample in self.back[: self.slots - first]:
            place = int(np.flatnonzero(self.away.samples == sample)[0])
            length = self.lengths[sample] + self.given[sample]
            blocks = num_blocks(np.minimum(length + _AHEAD, self.need[sample]))
            if blocks - self.away.counts[place] > self.cache.num_free:
                break
            missing = np.zeros(len(self.away), np.int64)
            missing[place] = blocks - self.away.counts[place]
            self.away.extend(missing)
            places.append(place)
        self.back = self.back[len(places) :]
        if not places:
            return
        begins = self.away.lengths[places] - self.lengths[self.away.samples[places]]
        self.away.move(places, self.rows)
        self.rows.lengths[first:] = (self.lengths + self.given)[self.rows.samples[first:]]
        self._go_on(first, torch.empty(len(places), len(self.decoder.head), device=self.device), begins)

    def _go_on(self, first: int, logits: Tensor, begins: Ints) -> None:
        """The next tokens of the rows from `first` on, behind what they have been given, or else their prompts.

        Args:
            logits: after their prompts.
            begins: how many of the tokens that each has been given are in the cache.
        """
        index = self.rows.samples[first:]
        given, most = self.given[index], PREFILL_TOKENS[self.device.type]
        while (left := given - begins).any():  # in pieces, of so many tokens together
            counts = np.minimum(left, (most - left.cumsum() + left).clip(0))
            at = np.flatnonzero(counts)
            rows = index[at], begins[at], (begins + counts)[at], self.lengths[index[at]], self.rows.table[first + at]
            logits[at] = self.steps.replay(*rows)
            begins = begins + counts
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
        blocks = cache.num_blocks - self.away.shares.sum()
        spare = cache.num_blocks // _SPARE_SHARE
        fits = (expected.max(1) <= blocks - spare) | (worst <= blocks + 1e-6)
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
            if len(self.away):
                self._forget()
                continue
            came = rows.lengths - self.lengths[rows.samples]
            last = len(rows) - 1 - int(came[::-1].argmin())
            sample = int(rows.samples[last])
            self.given[sample] = came[last] + 1
            self.waiting.insert(0, sample)
            self.progress.preempted += 1
            rows.remove([last])
        rows.extend(missing)
        if self.by_row:
            return
        used = np.unique(rows.table[rows.table > 0])
        if 4 * len(used) < 3 * rows.table.max(initial=0):  # attention goes through all blocks up to the last
            self.cache.close_up(used, rows.table, self.away.table)

    def _missing(self) -> Ints:
        """Blocks that each row needs for the next steps. In one that comes too late it is within the last of them."""
        rows = self.rows
        return num_blocks(np.minimum(rows.lengths + _AHEAD, self.need[rows.samples])) - rows.counts

    # -- turns -----------------------------------------------------------------------------------------------

    @property
    def num_asked(self) -> int:
        """Samples whose answer is awaited."""
        return 0 if self.dialogues is None else len(self.dialogues.asked)

    def _hear(self, dialogues: Dialogues) -> None:
        """What samples are answered, which are back with it, or over."""
        is_idle, started = not (len(self.rows) or self.waiting or self.back), time.perf_counter()
        answers = dialogues.answers(is_idle)
        if is_idle:
            self.progress.away_seconds += time.perf_counter() - started
        if answers:
            self._read(0)
        for sample, tokens in answers:
            away = np.flatnonzero(self.away.samples == sample)
            if tokens is None:
                if len(away):
                    self.away.remove(away)
                self.finished[sample] = self.has_ended[sample]
                continue
            start = int(self.given[sample])
            self.steps.put(sample, start, tokens, [0.0] * len(tokens))
            self.given[sample] = dialogues.tell(sample, start, tokens)
            self.is_over[sample], self.texts[sample] = False, []
            if len(away):
                self.back.append(sample)
            else:
                self.waiting.insert(0, sample)
        self.progress.rows_done = len(self.finished)

    def _forget(self) -> None:
        """The blocks of the one who has left last; it is computed again once it is answered."""
        sample = int(self.away.samples[-1])
        self.away.remove([len(self.away) - 1])
        self.progress.preempted += 1
        if sample in self.back:
            self.back.remove(sample)
            self.waiting.insert(0, sample)

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
        while len(self.pending) > late:
            self._settle(*self.pending.popleft())
        over = np.flatnonzero(self.is_over[self.rows.samples])
        if not len(over):
            return False
        if self.dialogues is None:
            self.rows.remove(over)
        else:  # all but the last token is in the cache
            samples, place = self.rows.samples[over], len(self.away)
            self.rows.move(over, self.away)
            self.away.lengths[place:] = self.lengths[samples] + self.given[samples] - 1
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
        if self.dialogues is not None:
            self.dialogues.note(samples[live], given[live], tokens[live])
        over = np.flatnonzero(live & ((said > 0) | (given >= self.until[samples])))
        for sample, length, how in zip(samples[over].tolist(), given[over], said[over].tolist(), strict=True):
            if how & NOT_FINITE:
                raise FloatingPointError(
                    f"logits of sample {self.names[sample]} are not finite (rank {self.mesh.rank})"
                )
            self.given[sample], self.has_ended[sample], self.is_over[sample] = length, bool(how & END), True
            if self.dialogues is None:
                self.finished[sample] = self.has_ended[sample]
            else:
                self.dialogues.ask(sample, int(length), not self.has_ended[sample])
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
        found = {}
        for i, t, p in zip(done, tokens, log_probs, strict=True):
            count = self.given[i]
            sampled = None if self.dialogues is None else self.dialogues.sampled[i, :count].tolist()
            found[i] = Response(t[:count], p[:count], self.finished[i], sampled)
        return found
