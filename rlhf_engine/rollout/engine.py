"""Continuous batching: sequences enter the cache while it has room, leave when they end, and every step is dense.

The longest are admitted first, as many as the cache will probably hold (`admission.py`). Where that was too many, the
rows that have come least far step back: they keep their tokens, and are computed with them again later. What a sequence
becomes depends on none of this: its noise is its own, rows do not see each other, and on a CPU the products of a dense
model round each row alike whatever stands beside it (`attention.py`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from rlhf_kernels.dispatch import use_triton

from ..mesh import ParallelMesh
from .admission import expected_blocks
from .attention import BlockReading
from .cache import BLOCK, Rows, num_blocks
from .decoder import Decoder
from .graphs import DecodeGraphs
from .progress import Finished, Progress, Report, Response
from .sampling import Sampler

PREFILL_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 14}  # of one forward, padding included
_AHEAD = 8  # steps for which rows have their blocks, so that tables stay as they are for so long
_SPARE_SHARE = 16  # of the blocks, one in so many is not counted on, as fewer rows may end than is expected
_LEAST_SHARE = 8  # of the rows that there are, one in so many is worth the forward that admits it
_SECONDS_BETWEEN_REPORTS = 5.0


def reads_by_row(cache: Tensor) -> bool:
    """Whether attention reads the cache row by row, in one launch, and not all blocks at once."""
    return cache.is_cuda and use_triton(cache)


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
    ):
        self.mesh, self.sampler, self.prompts, self.names = mesh, sampler, prompts, names
        self.text_ends, self.report, self.tell, self.device = ends, report, tell, mesh.device
        self.keys, self.limits = keys.to(self.device), torch.tensor(limits, device=self.device)
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.need = self.lengths + limits
        numbers: dict[tuple[int, ...], int] = {}
        self.prompt_of = np.array([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts])
        longest = int(self.need.max())
        self.slots = min(slots, len(prompts))
        self.decoder = Decoder(gpt, mesh.tp_group, longest)
        self.cache = self.decoder.new_cache(min(num_blocks(kv_tokens), self.slots * num_blocks(longest)))
        self.rows = Rows(self.cache, num_blocks(longest))
        self.by_row = reads_by_row(self.cache.store)
        self.graphs: DecodeGraphs | None = None
        if self.by_row and self.decoder.is_static and sampler.config.cuda_graphs:
            self.graphs = DecodeGraphs(self.decoder, self.cache, self.slots, self.rows.columns)
        self.is_end = torch.zeros(len(self.decoder.head) * mesh.tp, dtype=torch.bool, device=self.device)
        self.is_end[list(sampler.end_ids)] = True
        # samples of one prompt stand side by side
        self.waiting = sorted(range(len(prompts)), key=lambda i: (-self.need[i], prompts[i], i))
        # what each sample has been given, and how many tokens that is, of those that are not in the cache
        self.tokens = torch.zeros(len(prompts), max(limits), dtype=torch.int64, device=self.device)
        self.log_probs = torch.zeros(self.tokens.shape, device=self.device)
        self.given = np.zeros(len(prompts), np.int64)
        self.texts: list[list[int]] = [[] for _ in prompts]  # tokens so far, where `ends` wants them
        self.finished: dict[int, bool] = {}
        self.progress = Progress(num_rows=len(prompts))

    @torch.no_grad()
    def run(self) -> list[Response]:
        """Responses to all prompts, in their order.

        Raises:
            FloatingPointError: a logit is not finite; names the sample and the rank.
        """
        started = reported = time.perf_counter()
        progress = self.progress
        while self.waiting or len(self.rows):
            before = time.perf_counter()
            self._admit()
            now = time.perf_counter()
            progress.prefill_seconds += now - before
            progress.seconds = progress.busy_seconds = now - started
            if now - reported > _SECONDS_BETWEEN_REPORTS:
                if self.report is not None:
                    self.report(progress)
                if self.tell is not None:
                    self.tell({self.names[i]: response for i, response in self._responses().items()})
                reported = now
            if len(self.rows):
                self._extend()
                self._decode()
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
        samples.sort(key=lambda i: (-_width(len(self.prompts[i])), self.prompts[i], i))
        first, begins = len(self.rows), []  # what others have of a prompt, they have written
        for i in samples:
            shared = self._shared(i)
            self.rows.add(i, self.lengths[i] + self.given[i], shared)
            begins.append(len(shared) * BLOCK)
        most = PREFILL_TOKENS[self.device.type]
        batches = _batches([self.prompts[i] for i in samples], most)
        logits = torch.cat([self._prefill(first + start, begins[start:stop]) for start, stop in batches])
        given = self.given[samples]
        for part in np.unique(given.cumsum() // most):
            back = np.flatnonzero((given > 0) & (given.cumsum() // most == part))
            if len(back):
                logits[back] = self._replay(first + back)
        index, steps = self._on_device(np.array(samples), given)
        self._remove(self._sample(logits, index, steps, first)[1])

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

    def _prefill(self, first: int, begins: list[int]) -> Tensor:
        """Prompts of new rows, those from `first` on, into the cache: logits `(rows, V / tp)` after the last token.

        Args:
            begins: positions of each that are in the cache.
        """
        rows = self.rows
        prompts = [tuple(self.prompts[i]) for i in rows.samples[first : first + len(begins)]]
        unique = list(dict.fromkeys(prompts))
        widths = [_width(len(prompt)) for prompt in unique]
        starts = dict(zip(unique, np.cumsum([0, *widths]), strict=False))
        positions = [np.arange(begin, len(prompt)) for begin, prompt in zip(begins, prompts, strict=True)]
        source = np.concatenate([starts[prompt] + t for prompt, t in zip(prompts, positions, strict=True)])
        blocks = np.concatenate([rows.table[first + i, t // BLOCK] for i, t in enumerate(positions)])
        last = np.array([starts[prompt] + len(prompt) - 1 for prompt in prompts])
        offsets = np.concatenate(positions) % BLOCK
        of, into, at, ends = self._on_device(source, blocks, offsets, last)
        padded = [(*prompt, *[0] * (width - len(prompt))) for prompt, width in zip(unique, widths, strict=True)]
        tokens = torch.tensor(list(chain(*padded)), device=self.device)
        shapes = [(count, width) for width, count in Counter(widths).items()]
        return self.decoder.prefill(tokens, shapes, ends, of, self.cache.places(into, at), self.cache)

    def _replay(self, back: np.ndarray) -> Tensor:
        """Tokens that rows have been given into the cache, all at once and otherwise as they were decoded: logits
        `(rows, V / tp)` after the last of each."""
        rows = self.rows
        given = self.given[rows.samples[back]]
        which, steps = np.repeat(back, given), np.concatenate([np.arange(count) for count in given])
        places = self.lengths[rows.samples[which]] + steps
        table, reading = self._tables(rows.table[which])
        samples, nth, positions, last = self._on_device(rows.samples[which], steps, places, given.cumsum() - 1)
        return self.decoder.decode(self.tokens[samples, nth], positions, table, self.cache, reading, last)

    def _tables(self, table: np.ndarray) -> tuple[Tensor, BlockReading | None]:
        """On the device, and how a CPU reads by it, which needs no columns that are empty."""
        if self.by_row:
            return self._on_device(table)[0], None
        table = table[:, : np.count_nonzero(table, 1).max()]
        return self._on_device(table)[0], BlockReading(table, self.decoder.num_groups, self.decoder.num_queries)

    def _extend(self) -> None:
        """Blocks for the next steps; where there are too few, those who have come least far step back."""
        rows = self.rows
        while True:
            missing = num_blocks(np.minimum(rows.lengths + _AHEAD, self.need[rows.samples])) - rows.counts
            if missing.sum() <= self.cache.num_free:
                break
            came = rows.lengths - self.lengths[rows.samples]
            last = len(rows) - 1 - int(came[::-1].argmin())
            self.waiting.insert(0, int(rows.samples[last]))
            self.progress.preempted += 1
            self._remove([last])
        rows.extend(missing)
        used = self.cache.num_blocks - self.cache.num_free
        if not self.by_row and 4 * used < 3 * rows.table.max():
            self.cache.close_up(rows.table)

    def _remove(self, places: list[int]) -> None:
        self.given[self.rows.samples] = self.rows.lengths - self.lengths[self.rows.samples] + 1
        self.rows.remove(places)

    def _on_device(self, *arrays: np.ndarray) -> Sequence[Tensor]:
        return [torch.tensor(array, device=self.device) for array in arrays]

    # -- a token for everyone --------------------------------------------------------------------------------

    def _decode(self) -> None:
        """More tokens for every row, until one ends or blocks are used up."""
        rows = self.rows
        given = rows.lengths - self.lengths[rows.samples] + 1
        samples, positions, steps = self._on_device(rows.samples, rows.lengths, given)
        table, reading = self._tables(rows.table)
        tokens = self.tokens[samples, steps - 1]
        done: list[int] = []
        for _ in range(_AHEAD):
            if self.graphs is not None:
                logits = self.graphs(tokens, positions, table)
            else:
                logits = self.decoder.decode(tokens, positions, table, self.cache, reading)
            rows.lengths += 1
            self.progress.rows_decoded += len(rows)
            self.progress.slots_offered += self.slots
            tokens, done = self._sample(logits, samples, steps)
            if done:
                break
            positions, steps = positions + 1, steps + 1
        self._remove(done)

    def _sample(self, logits: Tensor, samples: Tensor, steps: Tensor, first: int = 0) -> tuple[Tensor, list[int]]:
        """The next token of each row, those from `first` on, and which rows end with it."""
        tokens, log_probs = self.sampler(logits, self.keys[samples], steps)
        self.tokens[samples, steps], self.log_probs[samples, steps] = tokens, log_probs
        self.progress.tokens += len(tokens)
        ends = self.is_end[tokens]
        # of the whole step this alone waits for the device
        done = (ends | (steps + 1 >= self.limits[samples]) | ~log_probs.isfinite()).nonzero().flatten().tolist()
        by_text = self._ended_by_text(samples, tokens) if self.text_ends is not None else []
        if done:
            columns = (samples[done].tolist(), log_probs[done].tolist(), ends[done].tolist())
            for sample, log_prob, is_end in zip(*columns, strict=True):
                if not math.isfinite(log_prob):
                    name = self.names[sample]
                    raise FloatingPointError(f"logits of sample {name} are not finite (rank {self.mesh.rank})")
                self.finished[sample] = is_end
        for _, sample in by_text:
            self.finished[sample] = True
        self.progress.rows_done = len(self.finished)
        return tokens, sorted({first + row for row in (*done, *(row for row, _ in by_text))})

    def _ended_by_text(self, samples: Tensor, tokens: Tensor) -> list[tuple[int, int]]:
        """(row, sample) of those whose text ends their response."""
        assert self.text_ends is not None
        found = []
        for row, (sample, token) in enumerate(zip(samples.tolist(), tokens.tolist(), strict=True)):
            self.texts[sample].append(token)
            if len(self.texts[sample]) >= self.sampler.config.min_new_tokens and self.text_ends(self.texts[sample]):
                found.append((row, sample))
        return found

    def _responses(self) -> dict[int, Response]:
        """Of the samples that are finished."""
        done = list(self.finished)
        parts = zip(done, self.tokens[done].tolist(), self.log_probs[done].tolist(), strict=True)
        return {i: Response(t[: self.given[i]], p[: self.given[i]], self.finished[i]) for i, t, p in parts}


def _width(length: int) -> int:
    """What a prompt is padded to: itself alone decides, as attention over another width rounds another way."""
    unit = max(16, 1 << (length - 1).bit_length() >> 3)
    return -(-length // unit) * unit


def _batches(prompts: list[Sequence[int]], most: int) -> Iterator[tuple[int, int]]:
    """First row and the one behind the last of each forward, of so many tokens at most; of equal prompts, which stand
    side by side, one is computed."""
    start, tokens = 0, 0
    for i, prompt in enumerate(prompts):
        if i > start and prompt == prompts[i - 1]:
            continue
        width = _width(len(prompt))
        if tokens and tokens + width > most:
            yield start, i
            start, tokens = i, 0
        tokens += width
    yield start, len(prompts)
