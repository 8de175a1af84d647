"""Continuous batching: sequences enter lanes of the cache, leave when they end, and every decode step is dense.

The longest sequences are admitted first. Of the lanes of a rollout the emptiest gives its rows to the others as soon
as they have room, and the region that it leaves takes the next prompts, prefilled together. What a sequence becomes
depends on none of this: its noise is its own, and rows do not see each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from rlhf_kernels.dispatch import use_triton

from ..mesh import ParallelMesh
from .cache import Lane, Row, round_up
from .decoder import Decoder
from .graphs import DecodeGraphs
from .sampling import Sampler

LANES = 4  # fewer read too far, more cost too many calls
PREFILL_TOKENS = 1 << 14  # of one forward, padding included
_PADDING = 512  # positions read in vain at each step that a lane less is worth
_SECONDS_BETWEEN_REPORTS = 5.0


@dataclass
class Response:
    """What was generated for one prompt: `tokens` with their `log_probs`; `finished` by its own end, or cut."""

    tokens: list[int]
    log_probs: list[float]
    finished: bool


@dataclass
class Progress:
    """How far a rollout is, on one replica while it runs and over all of them at its end."""

    num_rows: int = 0
    rows_done: int = 0
    tokens: int = 0  # generated
    seconds: float = 0.0  # of the slowest replica
    prefill_seconds: float = 0.0  # of all replicas, as are the sums below
    busy_seconds: float = 0.0
    rows_decoded: int = 0  # over all steps
    slots_offered: int = 0  # over all steps
    idle_share: float = 0.0  # of the replicas' time: waiting for the slowest

    @property
    def slot_occupancy(self) -> float:
        """Share of slots that decoded a sequence."""
        return self.rows_decoded / max(1, self.slots_offered)

    @property
    def prefill_share(self) -> float:
        """Share of the seconds that went into prompts."""
        return self.prefill_seconds / max(1e-9, self.busy_seconds)

    @classmethod
    def over(cls, parts: Sequence[Progress]) -> Progress:
        """The progress of all replicas together."""
        whole = cls(*(sum(getattr(part, name) for part in parts) for name in cls.__dataclass_fields__))
        whole.seconds = max(part.seconds for part in parts)
        whole.idle_share = 1 - whole.busy_seconds / max(1e-9, whole.seconds * len(parts))
        return whole


Report = Callable[[Progress], None]
Finished = Callable[[Mapping[int, Response]], None]


def reads_by_row(cache: Tensor) -> bool:
    """Whether attention reads the cache row by row, in one launch, and not lane by lane as dense blocks."""
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
        self.need = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
        self.longest = longest = min(round_up(max(self.need)), kv_tokens)
        self.slots = min(slots, len(prompts))
        num_lanes = min(LANES, self.slots, kv_tokens // longest)
        self.rows_per_lane = -(-self.slots // num_lanes)
        self.decoder = Decoder(gpt, mesh.tp_group, longest)
        self.cache = self.decoder.new_cache(num_lanes, min(kv_tokens // num_lanes, self.rows_per_lane * longest))
        self.by_row = reads_by_row(self.cache.flat)
        self.graphs: DecodeGraphs | None = None
        if self.by_row and self.decoder.is_static and sampler.config.cuda_graphs:
            self.graphs = DecodeGraphs(self.decoder, self.cache, self.slots)
        self.is_end = torch.zeros(len(self.decoder.head) * mesh.tp, dtype=torch.bool, device=self.device)
        self.is_end[list(sampler.end_ids)] = True
        # samples of one prompt stand side by side
        self.waiting = sorted(range(len(prompts)), key=lambda i: (-self.need[i], prompts[i], i))
        self.lanes: list[Lane] = []
        self.last = torch.zeros(0, dtype=torch.int64, device=self.device)  # each row's newest token, not yet in a lane
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []  # samples, tokens, log-probs
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
        while self.waiting or self.lanes:
            before = time.perf_counter()
            while self.waiting and self._num_rows < self.slots and self.cache.free:
                self._admit()
            now = time.perf_counter()
            progress.prefill_seconds += now - before
            progress.seconds = progress.busy_seconds = now - started
            if now - reported > _SECONDS_BETWEEN_REPORTS:
                if self.report is not None:
                    self.report(progress)
                if self.tell is not None:
                    found = self._responses()
                    self.tell({self.names[i]: found[i] for i in self.finished})
                reported = now
            if self.lanes:
                self._decode()
        responses = self._responses()
        progress.seconds = progress.busy_seconds = time.perf_counter() - started
        return [responses[i] for i in range(len(self.prompts))]

    @property
    def _num_rows(self) -> int:
        return sum(len(lane.rows) for lane in self.lanes)

    # -- what happens to rows --------------------------------------------------------------------------------

    def _admit(self) -> None:
        """The longest waiting prompts into a new lane, and their first tokens."""
        capacity = min(round_up(self.need[self.waiting[0]]), self.longest)
        lane = self.cache.open(capacity, self.rows_per_lane)
        room = min(lane.size, self.slots - self._num_rows)
        samples, self.waiting = self.waiting[:room], self.waiting[room:]
        logits = []
        for batch, unique in self._prefills(samples):
            width, first = max(map(len, unique)), len(lane.rows)
            tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in unique], device=self.device)
            lengths = torch.tensor([len(prompt) for prompt in unique], device=self.device)
            number = {tuple(prompt): i for i, prompt in enumerate(unique)}
            source = torch.tensor([number[tuple(self.prompts[i])] for i in batch], device=self.device)
            logits.append(self.decoder.prefill(tokens, lengths, lane, first, source)[source])
            places = range(len(self.last) + first, len(self.last) + first + len(batch))
            lane.add([Row(i, len(self.prompts[i]), place) for i, place in zip(batch, places, strict=True)])
        self.lanes.append(lane)
        before = len(self.last)
        index = torch.tensor(samples, device=self.device)
        tokens, done = self._sample(torch.cat(logits), index, torch.zeros_like(index))
        self.last = torch.cat([self.last, tokens])
        self._settle({before + i for i in done})

    def _prefills(self, samples: list[int]) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
        """The samples of a lane in batches of bounded size, each with its prompts, every one once."""
        batch: list[int] = []
        unique: list[Sequence[int]] = []
        for prompt, group in groupby(samples, key=lambda i: self.prompts[i]):
            if unique and max(map(len, [prompt, *unique])) * (len(unique) + 1) > PREFILL_TOKENS:
                yield batch, unique
                batch, unique = [], []
            batch, unique = [*batch, *group], [*unique, prompt]
        yield batch, unique

    def _decode(self) -> None:
        """One more token for every row."""
        rows = (self.last, self.positions, self.starts, self.strides)
        if self.graphs is not None:
            logits = self.graphs(*rows)
        else:
            logits = self.decoder.decode(*rows, self.cache, None if self.by_row else self.lanes)
        for lane in self.lanes:
            lane.advance()
        self.progress.rows_decoded += len(self.last)
        self.progress.slots_offered += self.slots
        self.last, done = self._sample(logits, self.samples, self.steps)
        if done:
            self._settle(set(done))
        else:
            self.positions += 1
            self.steps += 1

    def _sample(self, logits: Tensor, samples: Tensor, steps: Tensor) -> tuple[Tensor, list[int]]:
        """The next token of each row, and which rows end with it."""
        tokens, log_probs = self.sampler(logits, self.keys[samples], steps)
        self.history.append((samples, tokens, log_probs))
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
        return tokens, sorted({*done, *(row for row, _ in by_text)})

    def _ended_by_text(self, samples: Tensor, tokens: Tensor) -> list[tuple[int, int]]:
        """(row, sample) of those whose text ends their response."""
        assert self.text_ends is not None
        found = []
        for row, (sample, token) in enumerate(zip(samples.tolist(), tokens.tolist(), strict=True)):
            self.texts[sample].append(token)
            if len(self.texts[sample]) >= self.sampler.config.min_new_tokens and self.text_ends(self.texts[sample]):
                found.append((row, sample))
        return found

    def _settle(self, ended: set[int]) -> None:
        """Takes out the rows at these places of the batch, closes lanes that others have room for, renumbers."""
        for lane in self.lanes:
            for i in reversed(range(len(lane.rows))):
                if lane.rows[i].place in ended:
                    lane.remove(i)
        while self._dissolve():
            pass
        rows = [(lane, i, row) for lane in self.lanes for i, row in enumerate(lane.rows)]
        places = [row.place for _, _, row in rows]
        if places != list(range(len(self.last))):
            self.last = self.last[torch.tensor(places, dtype=torch.int64, device=self.device)]
        for place, (_, _, row) in enumerate(rows):
            row.place = place
        table = torch.tensor(
            [
                (row.sample, row.length, row.length - len(self.prompts[row.sample]) + 1, lane.start(i), lane.capacity)
                for lane, i, row in rows
            ],
            dtype=torch.int64,
            device=self.device,
        )
        columns = (column.clone() for column in table.view(-1, 5).t())
        self.samples, self.positions, self.steps, self.starts, self.strides = columns

    def _dissolve(self) -> bool:
        """Closes an empty lane, or moves the rows of a small one to where they lengthen the reading least.

        While prompts wait for a region that is reason enough; later it has to pay.
        """
        most = math.inf if self.waiting and not self.cache.free else 0 if self.by_row else _PADDING
        for lane in sorted(self.lanes, key=lambda lane: len(lane.rows)):
            room = {other.region: other.size - len(other.rows) for other in self.lanes if other is not lane}
            if sum(room.values()) < len(lane.rows) or (lane.rows and not most):
                return False  # nor is there any for the larger ones
            targets, cost = [], 0
            for row in lane.rows:
                fits = [o for o in self.lanes if room.get(o.region) and o.capacity >= self.need[row.sample]]
                if not fits or cost > most:
                    break
                targets.append(min(fits, key=lambda other: _padding(other, row)))
                room[targets[-1].region] -= 1
                cost += _padding(targets[-1], row)
            if len(targets) == len(lane.rows) and cost <= most:
                for i, target in enumerate(targets):
                    target.take(lane, i)
                self.lanes.remove(lane)
                self.cache.close(lane)
                return True
        return False

    def _responses(self) -> dict[int, Response]:
        """Of the samples that are finished."""
        samples, tokens, log_probs = (torch.cat(parts) for parts in zip(*self.history, strict=True))
        order = samples.argsort(stable=True)  # within a sample they stand as they came
        counts = samples.bincount(minlength=len(self.prompts)).tolist()
        parts = zip(tokens[order].cpu().split(counts), log_probs[order].cpu().split(counts), strict=True)
        found = ((i, part) for i, part in enumerate(parts) if i in self.finished)
        return {i: Response(t.tolist(), p.tolist(), self.finished[i]) for i, (t, p) in found}


def _padding(lane: Lane, row: Row) -> int:
    """Positions that each step would read in vain with the row in this lane."""
    window = lane.window
    return max(0, row.length - window) * len(lane.rows) + max(0, window - row.length)
