"""Trajectories of several turns: what the policy says, and what its environments answer.

| stage   | role   | kind    | reads                  | writes                                                        |
|---------|--------|---------|------------------------|---------------------------------------------------------------|
| rollout | policy | rollout | row_fields, sample_ids | prompts, reward_prompts, as rollout of one turn; turn_rewards |
| score   | -      | local   | turn_rewards, ...      | scores                                                        |

Each sample has an environment of its own, made and asked by the first tensor parallel rank of the replica that
generates it. Its prompt is what the environment's reset gives; a turn is what is sampled up to an end token; what the
environment answers is rendered alone, and its tokens stand behind those that were sampled, which are never made again.
`response_mask` is 1 on sampled tokens.

Noise belongs to a sample and a position, so that where an environment answers alike, a trajectory is the same on every
mesh, in any cache, and whenever the answers come.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import RolloutConfig
from ..context import Context
from ..data.dataset import Example
from ..models.role import RoleModel
from ..rollout.generate import rollout as generate
from ..rollout.progress import Progress, Report
from ..rollout.responses import Responses
from ..rollout.sampling import sample_keys
from ..schedule import Fields
from ..signals import RunError
from .responding import as_fields, progress_lines, record_rollout
from .talk import Talk, Trajectory
from .user import SPEC, User

_SEEDS = 1 << 31
_LIMITS = ("turns", "tokens", "length")  # by which a trajectory may be cut


@dataclass
class Talked:
    """Trajectories of B samples."""

    prompts: list[list[int]]
    responses: Responses
    trajectories: list[Trajectory]
    progress: Progress

    def fields(self, ctx: Context) -> dict[str, Any]:
        """What an Experience has of them. Of one whose environment has failed no token counts as sampled, with
        `env.on_failure=drop`, or nothing is rewarded."""
        found = as_fields(ctx, self.prompts, self.responses)
        has_failed = torch.tensor([each.failure is not None for each in self.trajectories])
        ended = torch.tensor([each.end == "terminated" for each in self.trajectories])
        rewards = torch.zeros(found["tokens"].shape)
        for row, prompt, response, each in zip(rewards, self.prompts, self.responses, self.trajectories, strict=True):
            given, start = each.rewards_of(len(response.tokens)), len(prompt)
            row[start : start + len(given)] = torch.tensor(given)
        if ctx.config.env.on_failure == "drop":
            found["response_mask"] = found["response_mask"] & ~has_failed.unsqueeze(1)
            found["sampler_log_probs"] = found["sampler_log_probs"] * found["response_mask"]
        return {
            **found,
            "prompts": self.prompts,
            "reward_prompts": self.prompts,
            "finished": found["finished"] & ended,
            "failed": has_failed,
            "turn_rewards": rewards,
        }

    def records(self, ctx: Context) -> list[dict[str, Any]]:
        """An object for each: prompt, response, tokens and log_probs of the response, which of them were `sampled`,
        turns (`spoken`), score, and `failure`, null where all went well."""
        decode, found = ctx.tokenizer.decode, []
        for prompt, response, each in zip(self.prompts, self.responses, self.trajectories, strict=True):
            rewards = each.rewards_of(len(response.tokens))
            found.append(
                {
                    "prompt": decode(prompt),
                    "response": decode(response.tokens),
                    "tokens": response.tokens,
                    "log_probs": response.log_probs,
                    "sampled": response.said,
                    "turns": spoken(decode, response.tokens, response.said, rewards),
                    "score": sum(rewards),
                    "failure": each.failure,
                }
            )
        return found


def talk(
    ctx: Context,
    policy: RoleModel,
    rows: Sequence[str],
    keys: Tensor,
    config: RolloutConfig,
    shares: Sequence[Sequence[int]] | None = None,
    report: Report | None = None,
) -> Talked:
    """A trajectory for each row, the same on every rank.

    Args:
        rows: JSON objects that environments are reset with.
        keys: `(B,)`, of the samples' noise.
        shares: the samples of each replica; None: as many each, those of a prompt side by side.

    Raises:
        RunError: an environment has failed, and `env.on_failure=stop`; names the sample and its row.
    """
    mesh, count = ctx.mesh, len(rows)
    cuts = [count * i // mesh.num_replicas for i in range(mesh.num_replicas + 1)]
    shares = shares or [range(*cut) for cut in itertools.pairwise(cuts)]
    progress = Progress()

    def reported(now: Progress) -> None:
        nonlocal progress
        progress = now
        if report is not None:
            report(now)

    with contextlib.ExitStack() as stack:
        turns = Talk(ctx, {i: rows[i] for i in shares[mesh.replica]}, keys, _user(ctx, stack))
        stack.callback(turns.close)
        begun = _joined(ctx, turns, turns.start())
        turns.names = alive = [i for i in range(count) if begun[i].failure is None]
        turns.places = place = {number: i for i, number in enumerate(alive)}
        found = generate(
            policy,
            [begun[i].prompt for i in alive],
            keys[alive],
            config,
            ctx.tokenizer.end_ids,
            decode=ctx.tokenizer.decode,
            limits=[ctx.config.most_new_tokens] * len(alive),
            report=reported,
            shares=[[place[i] for i in share if i in place] for share in shares],
            turns=turns,
        )
        ended = _joined(ctx, turns, turns.trajectories if turns.leads else {})
    trajectories = [ended[i] for i in range(count)]
    if (line := next((each.rewritten for each in trajectories if each.rewritten), None)) is not None:
        ctx.has_told_rewriting = True
        if mesh.is_main:
            print(line, flush=True)
    prompts = [each.prompt or list(ctx.tokenizer.end_ids[:1]) or [0] for each in trajectories]
    return Talked(prompts, found.spread(torch.tensor(alive, dtype=torch.int64), count), trajectories, progress)


def _user(ctx: Context, stack: contextlib.ExitStack) -> User | None:
    """The model that environments may ask, on the device until the stack is left."""
    if ctx.config.user.path is None:
        return None
    if "user" not in ctx.roles:  # to evaluate, in a phase that samples nothing
        ctx.roles["user"] = ctx.build("user", SPEC)
    stack.enter_context(ctx.roles["user"].on_device())
    return User(ctx, ctx.roles["user"])


def _joined(ctx: Context, turns: Talk, mine: Mapping[int, Trajectory]) -> dict[int, Trajectory]:
    """What all replicas have."""
    parts = ctx.mesh.all_gather_object((mine, turns.error))
    for _, error in parts:
        if error is not None:
            raise RunError(error)
    return {number: each for part, _ in parts for number, each in part.items()}


# -- the stages ----------------------------------------------------------------------------------------------


def rollout(ctx: Context, policy: RoleModel, x) -> Fields:
    """A trajectory for each sample.

    Raises:
        RunError: all have failed, or one has, and `env.on_failure=stop`.
    """
    started = time.perf_counter()
    keys = sample_keys(ctx.config.seed, ctx.state.iteration, x.sample_ids)
    found = talk(ctx, policy, x.row_fields, keys, ctx.config.rollout, report=progress_lines(ctx))
    fields = found.fields(ctx)
    record_rollout(ctx, fields, found.progress, time.perf_counter() - started)
    for name, value in figures(ctx, found).items():
        ctx.metrics.record(name, value)
    return fields


def figures(ctx: Context, found: Talked) -> dict[str, float]:
    """How trajectories went, and what their environments tell; the first failure is said."""
    ends, count = Counter(each.end for each in found.trajectories), len(found.trajectories)
    failures = [each.failure for each in found.trajectories if each.failure is not None]
    if len(failures) == count:
        raise RunError(f"{ctx.phase}: all {count} trajectories have failed, the first: {failures[0]}")
    if failures and ctx.mesh.is_main:
        print(f"{ctx.phase}: {len(failures)} of {count} trajectories have failed, the first: {failures[0]}", flush=True)
    sizes = found.responses.lengths
    observed = sizes.sum() - found.responses.sampled.sum()
    told: dict[str, list[float]] = {}
    for each in found.trajectories:
        for name, value in each.info.items():
            told.setdefault(name, []).append(value)
    return {
        **{f"env/{name}": sum(values) / len(values) for name, values in told.items()},
        "env/turns": sum(len(each.rewards) for each in found.trajectories) / count,
        "env/observed_tokens": float(observed) / count,
        "env/failed": len(failures) / count,
        **{f"env/cut_by_{end}": ends[end] / count for end in _LIMITS},
        "env/idle": found.progress.away_seconds / max(1e-9, found.progress.busy_seconds),
    }


def row_fields(ctx: Context, examples: Sequence[Example], iteration: int, samples: int = 1) -> list[str]:
    """What else the rows of examples have, for `Experience.row_fields`; as text, that of what JSON does not know.

    Environments are reset with it, with the row's messages, and with a seed that the samples of one prompt share;
    `samples` of them stand side by side.
    """
    if ctx.config.env.fn is None:
        return [json.dumps(example.fields, default=str) for example in examples]
    prompts = torch.arange(len(examples)) // samples
    seeds = (sample_keys(ctx.config.seed, iteration, prompts) % _SEEDS).tolist()
    return [
        json.dumps({**example.fields, "messages": example.messages, "seed": seed}, default=str)
        for example, seed in zip(examples, seeds, strict=True)
    ]


def spoken(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], sampled: Sequence[bool], rewards: Sequence[float]
) -> list[dict[str, Any]]:
    """The turns of a trajectory, its answers between them: `by` whom, `text`, and of the policy's the `reward`.

    Args:
        tokens, sampled, rewards: of what stands behind the prompt; rewards at the turns' last tokens.
    """
    found, start = [], 0
    for is_sampled, part in itertools.groupby(sampled):
        end = start + len(list(part))
        turn: dict[str, Any] = {"by": "policy" if is_sampled else "environment", "text": decode(tokens[start:end])}
        found.append(turn | ({"reward": round(rewards[end - 1], 6)} if is_sampled else {}))
        start = end
    return found
