"""What a run writes and shows while it runs: metrics.jsonl, the sinks, progress lines."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from ..config import RunConfig
from ..surviving import durable
from .sinks import Dialogues, Sinks

# figures of a progress line, in order; those that an iteration lacks are left out
_SHOWN = {
    "policy/loss": "loss", "reward/loss": "loss", "reward/accuracy": "accuracy", "policy/accuracy": "accuracy",
    "policy/margin": "margin", "score/mean": "score",
    "gold/mean": "gold", "kl/mean": "kl", "rollout/response_length": "length", "eval/loss": "eval loss",
    "eval/accuracy": "eval accuracy", "eval/pass@1": "pass@1", "throughput/generated_tokens_per_second": "tokens/s",
}  # fmt: skip
_SECONDS_BETWEEN_LINES = 5.0


class Logbook:
    """One phase's records. On ranks that are not the main one it does nothing.

    Args:
        resumed_at: iterations done before; later lines of an earlier attempt are cut from metrics.jsonl.
        is_within: the next one has begun.
    """

    def __init__(self, config: RunConfig, phase: str, total: int, resumed_at: int, is_main: bool, is_within: bool):
        self.folder, self.phase, self.total, self.is_main = Path(config.output_dir) / phase, phase, total, is_main
        self.started, self.resumed_at = time.monotonic(), resumed_at
        self.last_line = 0.0
        if not is_main:
            return
        durable.make_folder(self.folder)
        self.path, self.lines = self.folder / "metrics.jsonl", ""  # those that there was no room for as yet
        durable.write(self.path, "".join(_lines_before(self.path, resumed_at) if resumed_at else ()))
        self.sinks = Sinks(config.log, self.folder, asdict(config), resumed_at, bool(resumed_at or is_within))
        if resumed_at or is_within:
            place = f"{'within' if is_within else 'at'} iteration {resumed_at + is_within}"
            print(f"{phase}: resuming {place} of {total}", flush=True)

    def write(self, row: dict[str, float]) -> None:
        """One iteration's figures."""
        if not self.is_main:
            return
        self.lines += json.dumps(row) + "\n"
        with durable.spared(self.path):
            durable.append(self.path, self.lines)
            self.lines = ""
        figures = {name: value for name, value in row.items() if name != "iteration"}
        self.sinks.write(int(row["iteration"]), figures)
        now, done = time.monotonic(), int(row["iteration"]) + 1
        if now - self.last_line >= _SECONDS_BETWEEN_LINES or done == self.total:
            self.last_line = now
            per_iteration = (now - self.started) / (done - self.resumed_at)
            left = per_iteration * (self.total - done)
            shown = "  ".join(f"{label} {row[name]:.4g}" for name, label in _SHOWN.items() if name in row)
            print(
                f"{self.phase} {done}/{self.total}  {shown}  {per_iteration:.2f} s/iteration"
                f"  {int(left) // 60}:{int(left) % 60:02d} left",
                flush=True,
            )

    def stop(self, done: int, is_saved: bool, is_within: bool = False) -> None:
        """The phase was asked to stop, after so many iterations or within the next one."""
        if not self.is_main:
            return
        self.sinks.close()
        saved = "and saved" if is_saved else "and could not save"
        place = f"{'within' if is_within else 'at'} iteration {done + is_within}"
        print(f"{self.phase}: stopped {place} of {self.total} {saved}: start the same again", flush=True)

    def finish(self, figures: dict[str, float], dialogues: Dialogues) -> None:
        """The held-out figures at the end of the phase, and what the model says there."""
        self.sinks.write(self.total, figures)
        self.sinks.show(dialogues)
        self.sinks.close()
        shown = "  ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in figures.items())
        print(f"{self.phase} done in {time.monotonic() - self.started:.0f} s: {shown}", flush=True)


def _lines_before(path: Path, iteration: int) -> list[str]:
    """Whole lines of metrics.jsonl of iterations before `iteration`."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.is_file() else ():
        try:
            if json.loads(line)["iteration"] < iteration:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # half a line, of a run that was killed
    return kept
