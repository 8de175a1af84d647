"""How many rows a phase runs on, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import LABELLED, PAIRED, SAMPLING, RunConfig


@dataclass(frozen=True)
class Rows:
    """What the stages of an iteration run on: rows of a prompt and a response.

    Args:
        total: rows of an iteration, which infer stages pass through.
        minibatch: rows of an optimizer step, over all replicas.
        steps: optimizer steps of an iteration.
        usual, largest: rows and tokens of a micro-batch on one replica, padding included.
        distinct: different prompts.
        response: tokens of the longest.
        expected: tokens of a usual prompt, and of its response.
        other_text: rows that join each step of the policy (PPO-ptx).
        carried: rows that are under way besides, and go on in the next iteration.
    """

    total: int
    minibatch: int
    steps: int
    usual: tuple[int, int]
    largest: tuple[int, int]
    distinct: int
    response: int
    expected: tuple[int, int]
    other_text: int = 0
    carried: int = 0


def rows_of(phase: str, config: RunConfig) -> Rows:
    """Of a training phase. The rows of pairs are their two sides."""
    plan, data = config.plan, config.data
    new = config.most_new_tokens
    prompt, response = plan.prompt_tokens or data.max_prompt_len, plan.response_tokens or new
    if phase in SAMPLING:
        part = getattr(config, phase)
        sizes = part.samples, part.samples // part.num_minibatches, part.epochs * part.num_minibatches
        shapes = _shapes(config, part.micro_batch_size, data.max_prompt_len + new, prompt + response)
        other_text = part.ptx.rows if part.other_text else 0
        carried = part.prompts_under_way(config.rollout) * part.samples_per_prompt - part.samples
        return Rows(*sizes, *shapes, part.prompts_per_iteration, new, (prompt, response), other_text, carried)
    answer = plan.response_tokens or data.max_seq_len - min(prompt, data.max_seq_len - 1)
    sides, section = 2 if phase in PAIRED else 1, getattr(config, phase)
    size, longest = sides * section.batch_size, data.max_seq_len
    shapes = _shapes(config, section.micro_batch_size, longest, prompt + answer, sides)
    passed = 2 * size if phase in LABELLED else size  # the reference's, which reads each prompt with two answers
    return Rows(passed, size, 1, *shapes, size, longest, (prompt, answer))


def _shapes(
    config: RunConfig, micro_batch_size: int, longest: int, expected: int, sides: int = 1
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The usual and the largest micro-batch; in both, rows of like length."""
    budget = config.schedule.micro_batch_tokens or sides * micro_batch_size * longest
    usual, largest = (sides * max(1, budget // (sides * length)) for length in (expected, longest))
    return (usual, expected), (largest, longest)
