"""Where figures go beside metrics.jsonl: TensorBoard's events and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import queue
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..config import LogConfig
from ..surviving import durable
from .to_wandb import has_wandb

Figures = Mapping[str, float]
Dialogues = Sequence[Mapping[str, object]]
_SECONDS_TO_FINISH = 60.0


class Sink(Protocol):
    """Whatever it raises ends it, and not the run."""

    def write(self, iteration: int, figures: Figures) -> None:
        """Figures of an iteration."""
        ...

    def show(self, dialogues: Dialogues) -> None:
        """The same keys in each: `prompt`, `after`, and what else is known of it."""

    def close(self) -> None:
        """Nothing is written behind it."""
        ...


class TensorBoard:
    """Events in the phase's folder. Files are read in the order of their names, which begin with the time by some
    machine's clock: those of earlier starts get names that come before any time."""

    def __init__(self, folder: Path, resumed_at: int):
        from torch.utils.tensorboard import SummaryWriter

        for i, path in enumerate(sorted(folder.glob("events.out.tfevents.*"))):
            path.rename(folder / f"events.out.tfevents.{i:010}")
        self.writer = SummaryWriter(str(folder), purge_step=resumed_at)

    def write(self, iteration: int, figures: Figures) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, iteration)

    def show(self, dialogues: Dialogues) -> None:
        for i, dialogue in enumerate(dialogues):
            text = "\n\n".join(f"**{name}**\n\n{value}" for name, value in dialogue.items())
            self.writer.add_text(f"dialogues/{i}", text)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases for each phase, the phases of an output folder a group. A process writes it, which is
    fed without waiting for it. A phase that goes on does so in the same run, one that begins again in a new one.

    Args:
        folder: the phase's; the run's number is kept there.
        about: what `wandb.init` is told beside.
        goes_on: the phase has begun before.

    Raises:
        OSError: the process has ended, or does not end.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], goes_on: bool):
        number = folder / "wandb_id"
        if not (goes_on and number.is_file()):
            durable.write(number, uuid.uuid4().hex[:8])
        self.folder = folder
        # -P: modules of this folder are not to be taken for those of the standard library
        command = [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("to_wandb.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self._messages: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._feed, daemon=True).start()
        self._send({"id": number.read_text(), "dir": str(folder.resolve()), **about})

    def write(self, iteration: int, figures: Figures) -> None:
        self._send({"figures": {"iteration": iteration} | {n: v for n, v in figures.items() if math.isfinite(v)}})

    def show(self, dialogues: Dialogues) -> None:
        self._send({"dialogues": dialogues})

    def close(self) -> None:
        self._messages.put(None)
        try:
            self.process.wait(_SECONDS_TO_FINISH)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise OSError(
                f"not done after {_SECONDS_TO_FINISH:g} s; `wandb sync {self.folder}/wandb/*` sends it"
            ) from None

    def _send(self, message: Mapping[str, Any]) -> None:
        if self.process.poll() is not None:
            raise OSError("its process has ended")
        self._messages.put(message)

    def _feed(self) -> None:
        """In a thread of its own, which may wait for the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError), self.process.stdin as pipe:
            while (message := self._messages.get()) is not None:
                pipe.write(json.dumps(message) + "\n")
                pipe.flush()


class Sinks:
    """All of them that are asked for. One that fails is told of once and left."""

    def __init__(self, config: LogConfig, folder: Path, run: Mapping[str, Any], resumed_at: int, goes_on: bool):
        """Args: run: the whole configuration, as plain values."""
        self._sinks: dict[str, Sink] = {}
        if config.tensorboard:
            self._open("tensorboard", lambda: TensorBoard(folder, resumed_at))
        if (wandb := config.wandb).project is not None and has_wandb():
            about = {
                "project": wandb.project, "entity": wandb.entity, "tags": wandb.tags, "mode": wandb.mode,
                "group": wandb.group or folder.parent.name, "name": wandb.name or f"{folder.parent.name}/{folder.name}",
                "config": run,
            }  # fmt: skip
            self._open("wandb", lambda: WandB(folder, about, goes_on))

    def write(self, iteration: int, figures: Figures) -> None:
        """Figures of an iteration, to each sink."""
        self._each(lambda sink: sink.write(iteration, figures))

    def show(self, dialogues: Dialogues) -> None:
        """Dialogues, to each sink."""
        self._each(lambda sink: sink.show(dialogues))

    def close(self) -> None:
        """Closes each sink."""
        self._each(lambda sink: sink.close())

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        with self._guarded(name):
            self._sinks[name] = make()

    def _each(self, do: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                do(sink)

    @contextlib.contextmanager
    def _guarded(self, name: str):
        try:
            yield
        except Exception as error:
            self._sinks.pop(name, None)
            print(f"{name}: {error}: the run goes on without it", flush=True)
