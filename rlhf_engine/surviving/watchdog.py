"""A hang explained: when a stage takes too long, what every rank is doing, and who is missing.

Each rank says every few seconds where it is, with the stack of its main thread, at the store where the ranks have met.
No collective is involved, and a rank that cannot speak any more is known by what it said last.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import TCPStore

HUNG = os.EX_SOFTWARE  # 70, of sysexits.h
_SECONDS_OF_PRECEDENCE = 0.5  # that a rank waits for each lower one, so that one of them speaks
_MOST_WAITED_FOR = 20
_INTERVALS_OF_SILENCE = 3  # after which a rank is taken to be silent


@dataclass
class Post:
    """Where a rank is."""

    number: int  # stages that it has entered so far, the same on ranks that are equally far
    stage: str
    seconds: float  # that it has been in it
    stack: str
    beat: int = 0


class Watchdog:
    """Ends this rank with `HUNG` when a stage takes longer than `limit` seconds, and says why.

    Two threads: one exchanges posts and may itself get stuck when the store's host does not answer; the other watches
    the clock and says what is known.
    """

    def __init__(self, limit: float, rank: int, world_size: int):
        self.limit, self.rank, self.world_size = limit, rank, world_size
        self._interval = min(10.0, limit / 12)
        self._at: tuple[int, str, float] | None = None  # stage's number, name, and when it began
        self._number = 0
        self._heard: dict[int, tuple[float, Post]] = {}  # when a rank's post was new, and the post
        self._asked = 0  # times that every rank's post was asked for within the stage
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens within is given `limit` seconds. Every rank enters the same stages."""
        before = self._at
        self._number += 1
        self._at = self._number, name, time.monotonic()
        try:
            yield
        finally:
            self._at = before and (*before[:2], time.monotonic())

    def close(self) -> None:
        """Stops watching. The store may go away when all ranks have done so."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _post(self) -> Post:
        number, stage, since = self._at or (self._number, "", time.monotonic())
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return Post(number, stage, time.monotonic() - since, "".join(traceback.format_stack(frame)))

    def _exchange(self) -> None:
        # a connection of its own: the process group's waits while a request of the main thread is under way
        wait = timedelta(seconds=max(1.0, self._interval))
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
        store.set_timeout(wait)
        beat = 0
        while not self._closed.is_set():
            post, beat = self._post(), beat + 1
            post.beat = beat
            # A thousand ranks need not read each other all the time. The first hosts the store, and once it is stopped
            # it is too late to ask what it said.
            asks = post.seconds > self.limit / 2
            ranks = range(self.world_size) if asks else [0]
            with contextlib.suppress(RuntimeError):  # nobody answers, or a rank has said nothing yet
                store.set(f"watchdog/{self.rank}", json.dumps(asdict(post)))
                for rank in ranks:
                    found = Post(**json.loads(store.get(f"watchdog/{rank}")))
                    if rank not in self._heard or self._heard[rank][1].beat != found.beat:
                        self._heard[rank] = time.monotonic(), found
            self._asked = self._asked + 1 if asks else 0
            self._closed.wait(self._interval)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._interval)):
            if (at := self._at) is None or (waited := time.monotonic() - at[2]) < self.limit:
                continue
            # on a busy machine too, who is silent is known only by asking more than once
            if self._asked <= _INTERVALS_OF_SILENCE and waited < 1.5 * self.limit:
                continue
            time.sleep(_SECONDS_OF_PRECEDENCE * min(self.rank, _MOST_WAITED_FOR))
            if self._at == at and not self._closed.is_set():
                # past Python's buffers and their locks, which the main thread may hold
                os.write(2, self.report().encode())
                os._exit(HUNG)

    def report(self) -> str:
        """This rank's stage, who is missing from it, and everybody's stack; ranks with the same one share it."""
        mine, now = self._post(), time.monotonic()
        posts = {rank: post for rank, (_, post) in self._heard.items()} | {self.rank: mine}
        silent = {
            r: now - t
            for r, (t, _) in self._heard.items()
            if r != self.rank and now - t > _INTERVALS_OF_SILENCE * self._interval
        }
        missing = []
        for rank in range(self.world_size):
            if rank not in posts:
                missing.append(f"rank {rank} (never heard of)")
            elif rank in silent:
                missing.append(f"rank {rank} (silent for {silent[rank]:.0f} s)")
            elif posts[rank].number < mine.number:
                missing.append(f"rank {rank} (still in stage {posts[rank].stage or 'none'})")
        lines = [
            f"error: rank {self.rank} has been in stage {mine.stage} for {mine.seconds:.0f} s,"
            f" and timeout.stage={self.limit:g}",
            f"missing: {', '.join(missing) or 'none, all ranks are in it and answer'}",
        ]
        alike: dict[tuple[str, str, bool], list[int]] = {}
        for rank, post in sorted(posts.items()):
            alike.setdefault((post.stage, post.stack, rank in silent), []).append(rank)
        for (stage, stack, is_silent), ranks in alike.items():
            names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
            heard = ", as last heard" if is_silent else ""
            lines.append(f"{names} in stage {stage or 'none'}{heard}:\n{stack.rstrip()}")
        return "\n".join(lines) + "\n"
