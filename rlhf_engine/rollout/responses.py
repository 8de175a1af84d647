"""Responses as ranks send them to each other: a few flat tensors, whatever their number and lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experience import pad_rows, spans
from .progress import Response

_HEADER = 3  # numbers before each response: which it is, its length, whether it came to its end


@dataclass(frozen=True, eq=False)
class Responses:
    """Responses to B prompts, of N tokens together.

    Attributes:
        tokens: `(N,)` int64, one response behind the other.
        log_probs: `(N,)` float32.
        lengths: `(B,)` int64.
        finished: `(B,)` bool.
        sampled: `(N,)` bool, tokens that the model has said; the others it was told between its turns.
    """

    tokens: Tensor
    log_probs: Tensor
    lengths: Tensor
    finished: Tensor
    sampled: Tensor

    @classmethod
    def of(cls, rows: Sequence[Response]) -> Responses:
        """Those of a list."""
        return cls(
            torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int64),
            torch.tensor([log_prob for row in rows for log_prob in row.log_probs], dtype=torch.float32),
            torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64),
            torch.tensor([row.finished for row in rows], dtype=torch.bool),
            torch.tensor([is_said for row in rows for is_said in row.said], dtype=torch.bool),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Response]:
        sizes = self.lengths.tolist()
        parts = (field.split(sizes) for field in (self.tokens, self.log_probs, self.sampled))
        return (
            Response(tokens.tolist(), log_probs.tolist(), finished, None if sampled.all() else sampled.tolist())
            for tokens, log_probs, sampled, finished in zip(*parts, self.finished.tolist(), strict=True)
        )

    def take(self, rows: Tensor) -> Responses:
        """Those of these numbers, `(any,)` int64, in their order."""
        starts, lengths = (self.lengths.cumsum(0) - self.lengths)[rows], self.lengths[rows]
        shifts = starts - (lengths.cumsum(0) - lengths)
        order = shifts.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))
        return Responses(self.tokens[order], self.log_probs[order], lengths, self.finished[rows], self.sampled[order])

    def spread(self, rows: Tensor, count: int) -> Responses:
        """These as the ones of so many whose numbers are `rows`, ascending; the others are empty."""
        lengths, finished = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
        lengths[rows], finished[rows] = self.lengths, self.finished
        return Responses(self.tokens, self.log_probs, lengths, finished, self.sampled)

    def behind(self, prompts: Sequence[Sequence[int]], multiple: int) -> tuple[Tensor, Tensor, Tensor]:
        """Behind their prompts, right-padded: tokens `(B, T)`, lengths `(B,)` and which tokens were sampled, `(B, T)`.

        Args:
            multiple: see `pad_rows`.
        """
        before, starts = pad_rows(prompts)
        lengths = starts + self.lengths
        width = -(-int(lengths.max()) // multiple) * multiple
        mask = spans(starts, lengths, width)
        tokens = F.pad(before, (0, width - before.shape[1])).masked_scatter(mask, self.tokens)
        return tokens, lengths, mask.masked_scatter(mask, self.sampled)


def pack(responses: Mapping[int, Response]) -> Tensor:
    """Responses by the numbers of their prompts as int32, the log-probs bit for bit, tokens that were not sampled by
    their complement."""
    flat = Responses.of(list(responses.values()))
    headers = torch.stack([torch.tensor(list(responses), dtype=torch.int64), flat.lengths, flat.finished.long()], 1)
    tokens = torch.where(flat.sampled, flat.tokens, ~flat.tokens)
    whole = torch.cat([torch.tensor([len(flat)]), headers.flatten(), tokens])
    return torch.cat([whole.int(), flat.log_probs.view(torch.int32)])


def unpack(parts: Iterable[Tensor], count: int) -> Responses:
    """Responses to `count` prompts, each in one of the parts at least, of what `pack` gives and anything behind it."""
    columns: list[tuple[Tensor, ...]] = []
    for part in parts:
        begin = 1 + _HEADER * int(part[0])
        number, lengths, finished = part[1:begin].view(-1, _HEADER).long().unbind(1)
        tokens, log_probs = part[begin : begin + 2 * int(lengths.sum())].chunk(2)
        columns.append((number, lengths, finished.bool(), tokens.long(), log_probs.view(torch.float32)))
    number, lengths, finished, tokens, log_probs = (torch.cat(column) for column in zip(*columns, strict=True))
    places = {i: place for place, i in enumerate(number.tolist())}
    rows = torch.tensor([places[i] for i in range(count)], dtype=torch.int64)
    is_said = tokens >= 0
    return Responses(torch.where(is_said, tokens, ~tokens), log_probs, lengths, finished, is_said).take(rows)
