"""Scores of responses by the functions of a run, none of which can hold it up for ever."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future

from ..config import RunConfig
from ..signals import RunError
from .functions import Numbers, Part, Sample, load
from .pool import Pool


class Rewards:
    """The functions of `reward.fns`. The main rank calls them."""

    def __init__(self, config: RunConfig):
        self.config, self.parts = config, load(config)
        self.apart = [part for part in self.parts if part.apart]  # which need not wait for all responses
        self._started: dict[Sample, list[dict[str, Future[Numbers]]]] = {}

    @functools.cached_property
    def _pool(self) -> Pool:
        return Pool(self.config, self.parts)

    def start(self, samples: Sequence[Sample]) -> None:
        """Begins with samples that the next call has among others."""
        for sample in samples:
            self._started.setdefault(sample, []).append(self._submitted(sample))

    def forget(self) -> None:
        """What was started and has not been asked for."""
        for futures in itertools.chain(*self._started.values()):
            for future in futures.values():
                future.cancel()
        self._started = {}

    def _submitted(self, sample: Sample) -> dict[str, Future[Numbers]]:
        return {part.label: self._pool.submit(i, sample) for i, part in enumerate(self.apart)}

    def __call__(self, samples: Sequence[Sample]) -> tuple[list[float], dict[str, float]]:
        """The weighted sum of what the functions give for each sample, which may be not finite; and the mean of each
        function over the samples that it has a number for, by its label, where it is finite.

        Raises:
            RunError: a function took too long, did not give a number for each response, or called sys.exit(); or none
                has a number for a response.
            Exception: what one raised itself, with a note of the function and the response.
        """
        started = [self._started[s].pop() if self._started.get(s) else self._submitted(s) for s in samples]
        self.forget()
        timeout, found = self.config.reward.timeout, dict[str, Numbers]()
        for part in sorted(self.parts, key=lambda part: part.apart):  # those have begun
            if part.apart:
                found[part.label] = [futures[part.label].result()[0] for futures in started]
            else:
                found[part.label] = _Call(part, samples).result(timeout)
        scores = [self._sum(found, i, sample) for i, sample in enumerate(samples)]
        return scores, {label: mean for label, given in found.items() if math.isfinite(mean := _mean(given))}

    def _sum(self, found: dict[str, Numbers], i: int, sample: Sample) -> float:
        terms = [(part.weight, number) for part in self.parts if (number := found[part.label][i]) is not None]
        if not terms:
            raise RunError(f"no function of reward.fns has a number for response {i}: {sample.response!r:.80}")
        return sum(weight * number for weight, number in terms)


def _mean(numbers: Numbers) -> float:
    given = [number for number in numbers if number is not None]
    return sum(given) / len(given) if given else math.nan


class _Call(threading.Thread):
    """In a thread, because what hangs in C or in a network cannot be broken off: the run ends beside it."""

    def __init__(self, part: Part, samples: Sequence[Sample]):
        super().__init__(daemon=True)
        self.part, self.samples, self.future = part, samples, Future[Numbers]()
        self.start()

    def run(self) -> None:
        try:
            self.future.set_result(self.part(self.samples))
        except Exception as error:
            self.future.set_exception(error)

    def result(self, timeout: float) -> Numbers:
        self.join(timeout)
        if self.is_alive():
            frame = traceback.extract_stack(sys._current_frames()[self.ident or 0])[-1]
            raise RunError(
                f"reward.fns={self.part.name} took longer than reward.timeout={timeout:g} s for {len(self.samples)}"
                f" responses: it is at {frame.filename}:{frame.lineno}"
            )
        return self.future.result()
