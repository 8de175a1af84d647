"""One token more for every row: a step on the device, in which neither side waits for the other.

A step decodes each row's newest token, draws the next one, and writes it down where the next step finds it. What the
host has to know of it is on its way while the next step runs: so a row that has ended is computed once more, and what
comes of that stands behind its response, where nobody looks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import BlockReading
from .cache import Ints, KVCache, on_device, pinned
from .decoder import Decoder
from .graphs import StepGraphs, sizes
from .progress import Response
from .sampling import Sampler

END, NOT_FINITE = 1, 2  # what is said of a token, added up


class Found:
    """A device tensor on its way to the host."""

    def __init__(self, tensor: Tensor):
        self.copy = tensor.to("cpu", non_blocking=True, copy=True)
        self.event = torch.cuda.Event() if tensor.is_cuda else None
        if self.event is not None:
            self.event.record()

    def read(self) -> Ints:
        """Waits until it is there."""
        if self.event is not None:
            self.event.synchronize()
        return self.copy.numpy()


class Steps:
    """
    Args:
        keys: `(N,)`, of the samples' noise.
        lengths: `(N,)`, of their prompts.
        limit: the most tokens that any of them may be given.
        most: rows that there can be at once.
        columns: of their table.
        by_row: attention reads the cache row by row, so that a step may be replayed, and not all blocks at once.

    Attributes:
        tokens, log_probs: `(N + 1, limit + 1)`, what each sample has been given, and behind them one that is nobody's.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, sampler: Sampler, keys: Tensor, lengths: Ints, limit: int, most: int,
        columns: int, by_row: bool,
    ):  # fmt: skip
        self.decoder, self.cache, self.sampler, self.by_row = decoder, cache, sampler, by_row
        self.device = device = cache.store.device
        self.nobody = len(lengths)
        self.keys = F.pad(keys.to(device), (0, 1))
        self.before = on_device(device, np.append(lengths, 0) - 1)[0]  # the position before the first that it is given
        self.is_end = torch.zeros(len(decoder.head) * sampler.size, dtype=torch.bool, device=device)
        self.is_end[list(sampler.end_ids)] = True
        self.tokens = torch.zeros(len(lengths) + 1, limit + 1, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(self.tokens.shape, device=device)
        self.sizes = sizes(most)
        self.inputs = torch.zeros(most if by_row else 0, 2 + columns, dtype=torch.int64, device=device)
        self.graphs: StepGraphs | None = None
        if by_row and decoder.is_static and sampler.config.cuda_graphs:
            self.graphs = StepGraphs(self._step)

    def begin(self, sample: int, response: Response) -> None:
        """What a sample has been given before."""
        self.put(sample, 0, response.tokens, response.log_probs)

    def put(self, sample: int, start: int, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """What a sample is given from elsewhere, as its tokens from `start` on."""
        place = slice(start, start + len(tokens))
        self.tokens[sample, place] = torch.tensor(tokens, device=self.device)
        self.log_probs[sample, place] = torch.tensor(log_probs, device=self.device)

    def load(self, samples: Ints, lengths: Ints, table: Ints) -> None:
        """The rows of the next steps: of each its sample, its positions in the cache, its blocks."""
        if not self.by_row:
            table, self.reading = self._reading(table)
            self.rows = torch.tensor(np.column_stack([samples, lengths, table]))
            return
        # filled up with rows of nobody, which read and write a spare block of the cache
        rows = np.zeros((next(size for size in self.sizes if size >= len(samples)), 2 + table.shape[1]), np.int64)
        rows[:, 0] = self.nobody
        rows[: len(samples)] = np.column_stack([samples, lengths, table])
        self.rows, self.reading = self.inputs[: len(rows)], None
        self.rows.copy_(pinned(rows, self.device), non_blocking=True)

    def __call__(self) -> Tensor:
        """The rows' next tokens, and what is said of them: `(2, B)`, which hold until the next call."""
        return self._step(self.rows) if self.graphs is None else self.graphs(self.rows)

    def _step(self, rows: Tensor) -> Tensor:
        samples, positions, table = rows[:, 0], rows[:, 1], rows[:, 2:]
        given = positions - self.before[samples]
        logits = self.decoder.decode(self.tokens[samples, given - 1], positions, table, self.cache, self.reading)
        both = self.give(logits, samples, given)
        positions += samples < self.nobody
        return both

    def give(self, logits: Tensor, samples: Tensor, given: Tensor) -> Tensor:
        """A token to each of the samples, `(B,)`, which have been given so many: `(2, B)`, as a step."""
        tokens, log_probs = self.sampler(logits, self.keys[samples], given)
        self.tokens[samples, given], self.log_probs[samples, given] = tokens, log_probs
        return torch.stack([tokens, END * self.is_end[tokens] + NOT_FINITE * ~log_probs.isfinite()])

    def replay(self, samples: Ints, begins: Ints, given: Ints, lengths: Ints, table: Ints) -> Tensor:
        """Tokens that rows have been given into the cache, all at once and otherwise as they were decoded: logits
        `(B, V / tp)` after the last of each.

        Args:
            begins: how many of them are there already, fewer than `given`.
            lengths: of their prompts.
        """
        counts = given - begins
        rows, nth = np.repeat(np.arange(len(given)), counts), np.concatenate([*map(np.arange, begins, given)])
        table, reading = self._reading(table[rows])
        arrays = samples[rows], nth, lengths[rows] + nth, table, counts.cumsum() - 1
        which, places, positions, blocks, last = on_device(self.device, *arrays)
        return self.decoder.decode(self.tokens[which, places], positions, blocks, self.cache, reading, last)

    def _reading(self, table: Ints) -> tuple[Ints, BlockReading | None]:
        """How a CPU reads by a table, without columns that are empty."""
        if self.by_row:
            return table, None
        table = table[:, : np.count_nonzero(table, 1).max()]
        return table, BlockReading(table, self.decoder.num_groups, self.decoder.num_queries)
