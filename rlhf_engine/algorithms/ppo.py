"""Proximal policy optimisation for language models (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

| stage         | role      | kind    | reads                                          | writes                      |
|---------------|-----------|---------|------------------------------------------------|-----------------------------|
| rollout       | policy    | rollout | prompts, sample_ids                            | tokens, lengths, finished,  |
|               |           |         |                                                | response_mask, sampler_...  |
| log_probs     | policy    | infer   | tokens, lengths, response_mask, sampler_...    | log_probs                   |
| ref_log_probs | reference | infer   | tokens, lengths, response_mask                 | ref_log_probs               |
| score         | reward    | infer   | prompts, reward_prompts, tokens, lengths       | scores                      |
| values        | critic    | infer   | tokens, lengths, response_mask                 | values                      |
| advantage     | -         | local   | log_probs, ref_log_probs, values, scores, ...  | rewards, advantages, ...    |
| train_critic  | critic    | train   | tokens, ..., values, returns                   | -                           |
| train_policy  | policy    | train   | tokens, ..., log_probs, advantages, ...        | -                           |
| gold          | -         | local   | prompts, tokens, lengths                       | golds                       |
| write         | -         | local   | prompts, tokens, scores, golds, log_probs, ... | -                           |
| write_arrays  | -         | local   | tokens, ..., advantages, returns               | -                           |

With a reward function, score is a local stage. Gold is measured where the true preference is known, and never
learned from. The last stages are there with `ppo.write_rollouts=true` and `ppo.write_arrays=true`.

Where it deviates from the papers:
1. Old log-probs come from the trainer's forward, so the first ratio of an iteration is exactly 1; the sampler's are
   taken on request (`ppo.old_log_probs`), as long as the two agree.
2. The KL to the reference is in the reward, per token (k1), and nowhere else.
3. Losses are means over the response tokens of a minibatch, not over sequences.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rlhf_kernels import Advantages, clipped_policy_loss, clipped_value_loss, kl_advantages, kl_estimate

from ..config import RunConfig
from ..context import Context
from ..experience import Experience, pad_rows, spans
from ..models.role import RoleModel
from ..models.stream import infer
from ..models.work import Batch, Work
from ..rollout.engine import Progress
from ..rollout.generate import rollout as generate
from ..rollout.sampling import sample_keys
from ..schedule import Stage, Works
from . import reward_function
from .algorithm import Evaluation, RoleSpec
from .heads import choose, last_scores, policy_log_probs, score_batch, token_values
from .samples import NUM_CARDS, sample_dialogues
from .sft import cross_entropy, supervised, text_work

# What sampler and trainer may differ by, nats, for one's log-probs to stand for the other's, where nothing is said: the
# rounding of hidden states by kernels that add up in different orders.
_MAX_LOG_PROB_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.5}

# -- the stages ----------------------------------------------------------------------------------------------


def rollout(ctx: Context, policy: RoleModel, x):
    """Samples a response to every prompt from the training weights."""
    started = time.perf_counter()
    keys = sample_keys(ctx.config.seed, ctx.state.iteration, x.sample_ids)
    progress = Progress()

    def report(now: Progress) -> None:
        nonlocal progress
        progress = now
        if ctx.mesh.is_main and now.rows_done < now.num_rows:
            print(
                f"ppo {ctx.state.iteration + 1}/{ctx.config.ppo.iterations}  rollout {now.rows_done}/{now.num_rows}"
                f"  {now.tokens / now.seconds:.4g} tokens/s  {now.slot_occupancy:.0%} of slots busy",
                flush=True,
            )

    responses = generate(
        policy,
        x.prompts,
        keys,
        ctx.config.rollout,
        ctx.tokenizer.end_ids,
        decode=ctx.tokenizer.decode,
        report=report,
    )
    seconds = time.perf_counter() - started
    tokens, lengths = pad_rows([p + r.tokens for p, r in zip(x.prompts, responses, strict=True)], ctx.mesh.tp)
    starts = torch.tensor([len(p) for p in x.prompts])
    response_mask = spans(starts, lengths, tokens.shape[1])
    flat = torch.tensor([log_prob for r in responses for log_prob in r.log_probs])
    finished = torch.tensor([r.finished for r in responses])
    num_tokens = response_mask.sum()
    ctx.metrics.record("rollout/response_length", num_tokens / len(responses))
    ctx.metrics.record("rollout/finished", finished.float().mean())
    ctx.metrics.record("throughput/slot_occupancy", progress.slot_occupancy)
    ctx.metrics.record("throughput/prefill_share", progress.prefill_share)
    ctx.metrics.record("idle/rollout", progress.idle_share)
    ctx.metrics.record("throughput/generated_tokens_per_second", num_tokens / seconds)
    return {
        "tokens": tokens,
        "lengths": lengths,
        "response_mask": response_mask,
        "finished": finished,
        "sampler_log_probs": torch.zeros(tokens.shape).masked_scatter(response_mask, flat),
    }


def log_probs(ctx: Context, policy: RoleModel, x) -> Works:
    """The policy's own view of its rollout: by the forward that training uses, or as the sampler had it."""
    config, state = ctx.config.ppo, ctx.state
    last, is_due = state.log_prob_gap, state.iteration % config.measure_gap_every == 0
    most = config.max_log_prob_gap if config.max_log_prob_gap is not None else _MAX_LOG_PROB_GAP[policy.dtype]
    if config.old_log_probs == "sampler" and not is_due and last is not None and last <= most:
        return {"log_probs": x.sampler_log_probs}
    both = yield _log_probs(ctx, policy, x)
    log_probs, entropy = both.unbind(1)
    state.log_prob_gap = float((log_probs - x.sampler_log_probs).abs().max())
    ctx.metrics.record("rollout/log_prob_gap", state.log_prob_gap)
    if config.old_log_probs == "sampler" and ctx.mesh.is_main:
        suffices = state.log_prob_gap <= most
        print(
            f"ppo {state.iteration + 1}/{config.iterations}  log-probs of sampler and trainer differ by"
            f" {state.log_prob_gap:.1e} at most: the {'sampler' if suffices else 'trainer'}'s are taken",
            flush=True,
        )
    ctx.metrics.mean("policy/entropy", entropy, x.response_mask)
    return {"log_probs": log_probs}


def ref_log_probs(ctx: Context, reference: RoleModel, x) -> Works:
    """The frozen reference's view of it."""
    both = yield _log_probs(ctx, reference, x)
    return {"ref_log_probs": both[:, 0]}


def score(ctx: Context, reward: RoleModel, x) -> Works:
    """The reward model's score of each response."""
    scores = yield _scores(ctx, reward, x)
    return {"scores": scores}


def score_by_function(ctx: Context, _, x):
    """The same from a Python function, called on the main rank."""
    return {"scores": ctx.mesh.from_main(_call_reward(ctx, x) if ctx.mesh.is_main else None)}


def values(ctx: Context, critic: RoleModel, x) -> Works:
    """The critic's expectation before each response token."""
    batch = {"tokens": x.tokens, "lengths": x.lengths}
    values = yield Work(critic, batch, token_values, ctx.config.ppo.micro_batch_size)
    return {"values": values * x.response_mask}


def advantage(ctx: Context, _, x):
    """KL-shaped rewards, generalised advantages, returns; adapts the KL coefficient.

    The policy's loss whitens the advantages by the moments of the whole batch.
    """
    config, state, metrics = ctx.config.ppo, ctx.state, ctx.metrics
    mask = x.response_mask
    kl_of_tokens = kl_estimate(x.log_probs, x.ref_log_probs) * mask
    kl = kl_of_tokens.sum(1)
    metrics.mean("score/mean", x.scores)
    metrics.record("score/std", x.scores.std(correction=0))
    metrics.mean("kl/mean", kl)
    metrics.record("kl/coef", state.kl_coef)
    scores = _shape_scores(ctx, x.scores, x.finished)
    found = kl_advantages(
        *(field.to(ctx.mesh.device) for field in (x.log_probs, x.ref_log_probs, x.values, scores, mask)),
        kl_coef=state.kl_coef,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )
    result = Advantages(*(field.cpu() for field in found))
    rewards = -state.kl_coef * kl_of_tokens
    rewards[torch.arange(len(scores)), x.lengths - 1] += scores
    metrics.mean("reward/mean", result.rewards)
    metrics.mean("critic/value", x.values, mask)
    metrics.record("critic/explained_variance", _explained_variance(x.values[mask], result.returns[mask]))
    if config.kl_controller == "adaptive":
        # Ziegler et al. 2019, section 2.2
        error = max(-0.2, min(0.2, float(kl.mean()) / config.kl_target - 1))
        state.kl_coef *= 1 + error * len(kl) / config.kl_horizon
    moments = result.moments if config.whiten_advantages else torch.tensor([1.0, 0.0, 1.0])
    aims = {"advantages": result.advantages, "advantage_moments": moments, "returns": result.returns}
    return {"rewards": rewards, **aims}


def train_critic(ctx: Context, critic: RoleModel, x) -> Works:
    """Clipped value regression over minibatches."""

    def loss(output: Tensor, batch: Batch):
        mask = batch["response_mask"]
        result = clipped_value_loss(
            token_values(output, batch),
            batch["values"],
            batch["returns"],
            mask,
            clip_value=ctx.config.ppo.clip_value,
        )
        return result.loss, mask.sum(), {"clip_fraction": result.clip_fraction, "error": result.error}

    for _, batch in minibatches(ctx, x, "tokens", "lengths", "response_mask", "values", "returns"):
        yield Work(critic, batch, loss, ctx.config.ppo.micro_batch_size)
    return None


def train_policy(ctx: Context, policy: RoleModel, x) -> Works:
    """Clipped policy gradient over minibatches."""
    config = ctx.config.ppo
    if ctx.state.iteration < config.critic_warmup_iterations:
        return None
    moments = x.advantage_moments.to(ctx.mesh.device)

    def loss(hidden: Tensor, batch: Batch, is_first: bool):
        mask = batch["response_mask"]
        log_probs, entropy = policy_log_probs(policy, hidden, batch, ctx.config.rollout.temperature)
        result = clipped_policy_loss(
            log_probs,
            batch["log_probs"],
            batch["advantages"],
            mask,
            clip_ratio=config.clip_ratio,
            moments=moments,
        )
        statistics = {
            "clip_fraction": result.clip_fraction,
            "approx_kl": result.approx_kl,
            "ratio": result.ratio,
        }
        if is_first:  # nothing was updated yet: every ratio must be 1
            statistics["ratio_first"] = result.ratio
        return result.loss - config.entropy_coef * entropy.sum(), mask.sum(), statistics

    for i, batch in minibatches(ctx, x, "tokens", "lengths", "response_mask", "log_probs", "advantages"):
        fn = functools.partial(loss, is_first=i == 0)
        work = Work(policy, batch, fn, config.micro_batch_size, prepare=_responses(ctx, policy))
        yield [work, *pretraining(ctx, policy, i, batch["response_mask"].sum())]
    return None


def pretraining(ctx: Context, policy: RoleModel, minibatch: int, num_tokens: Tensor) -> list[Work]:
    """PPO-ptx (Ouyang et al. 2022, eq. 2): the log-likelihood of other text, in the same step as a minibatch's loss.

    Args:
        minibatch: its number in this iteration, which says which rows are next.
        num_tokens: response tokens of the minibatch, by which the step divides all losses. The text's own is to be a
            mean over its own tokens, so its sum is multiplied by the one count and divided by the other.
    """
    config = ctx.config.ppo
    if not config.ptx.sources:
        return []
    number = ctx.state.iteration * config.epochs * config.num_minibatches + minibatch
    x = supervised(ctx.datasets["ptx"].batch(number * config.ptx.rows, config.ptx.rows), ctx.mesh.tp)
    assert x.tokens is not None and x.lengths is not None and x.loss_mask is not None
    weight = float(config.ptx.coef * num_tokens / x.loss_mask[:, 1:].sum().clamp_min(1))

    def loss(hidden: Tensor, batch: Batch):
        total, count, _ = cross_entropy(policy)(hidden, batch)
        ctx.metrics.add("ptx/loss", total.detach(), count)
        return weight * total, torch.zeros_like(count), {}

    return [text_work(policy, x, loss, config.micro_batch_size)]


def gold(ctx: Context, _, x):
    """Where the true preference is known, how the responses fare by it. It is measured and never learned from."""
    if ctx.gold is None:
        return {"golds": None}
    rows = zip(x.prompts, x.tokens.tolist(), x.lengths.tolist(), strict=True)
    golds = [ctx.gold(ctx.tokenizer.decode(p), ctx.tokenizer.decode(row[len(p) : n])) for p, row, n in rows]
    ctx.metrics.mean("gold/mean", torch.tensor(golds))
    return {"golds": torch.tensor(golds)}


def write(ctx: Context, _, x) -> None:
    """The responses and what was found of them, OUTPUT_DIR/ppo/rollouts/ITERATION.jsonl: an object for each.

    Keys: prompt, response, score, gold (null where it is not known), kl (nats, of each response token).
    """
    if not ctx.mesh.is_main:
        return
    path = _rollouts(ctx, "jsonl")
    kl = kl_estimate(x.log_probs, x.ref_log_probs).tolist()
    golds = x.golds.tolist() if x.golds is not None else [None] * len(kl)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for i, (prompt, n) in enumerate(zip(x.prompts, x.lengths.tolist(), strict=True)):
            row = {
                "prompt": ctx.tokenizer.decode(prompt),
                "response": ctx.tokenizer.decode(x.tokens[i, len(prompt) : n].tolist()),
                "score": float(x.scores[i]),
                "gold": golds[i],
                "kl": kl[i][len(prompt) : n],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def write_arrays(ctx: Context, _, x) -> None:
    """What this iteration's updates were computed from, OUTPUT_DIR/ppo/rollouts/ITERATION.npz: an array for each field
    that the stage reads, under its name, padding zero."""
    if not ctx.mesh.is_main:
        return
    path = _rollouts(ctx, "npz")
    arrays = {name: np.asarray(value) for name, value in vars(x).items()}
    arrays["tokens"] = arrays["tokens"].astype(np.int32)
    temporary = path.with_suffix(".npz.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


# -- what they share -----------------------------------------------------------------------------------------


def minibatches(ctx: Context, x, *fields: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Minibatches of all epochs, numbered: slices of a permutation that depends on seed, iteration and epoch."""
    config = ctx.config.ppo
    num_rows = len(x.tokens)
    size = num_rows // config.num_minibatches
    for epoch in range(config.epochs):
        seed = (ctx.config.seed * 1_000_003 + ctx.state.iteration) * 1_009 + epoch
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
        for i, rows in enumerate(order.split(size)):
            batch = {name: getattr(x, name)[rows] for name in fields}
            yield epoch * config.num_minibatches + i, {"samples": rows, **batch}


def _rollouts(ctx: Context, suffix: str) -> Path:
    """The file of this iteration's rollouts."""
    path = Path(ctx.config.output_dir) / "ppo" / "rollouts" / f"{ctx.state.iteration}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _responses(ctx: Context, role: RoleModel) -> Callable[[Batch], Batch]:
    """What prepares a micro-batch for the log-probs of its response tokens under the sampler's distribution."""
    ban = (ctx.tokenizer.end_ids, ctx.config.rollout.min_new_tokens)
    return functools.partial(choose, role, mask="response_mask", ban=ban)


def _log_probs(ctx: Context, role: RoleModel, x) -> Work:
    """Log-probs and entropy stacked, `(B, 2, T)`."""

    def fn(hidden: Tensor, batch: Batch) -> Tensor:
        return torch.stack(policy_log_probs(role, hidden, batch, ctx.config.rollout.temperature), 1)

    batch = {"tokens": x.tokens, "lengths": x.lengths, "response_mask": x.response_mask}
    return Work(role, batch, fn, ctx.config.ppo.micro_batch_size, prepare=_responses(ctx, role))


def _scores(ctx: Context, reward: RoleModel, x) -> Work:
    """One score a row, `(B,)`, of the responses behind the prompts that the reward model reads."""
    rows = zip(x.reward_prompts, x.prompts, x.tokens.tolist(), x.lengths.tolist(), strict=True)
    tokens, lengths = pad_rows([own + row[len(prompt) : n] for own, prompt, row, n in rows], ctx.mesh.tp)
    return Work(reward, score_batch(reward, tokens, lengths), last_scores, ctx.config.ppo.micro_batch_size)


def _call_reward(ctx: Context, x) -> Tensor:
    """Scores of the user's function."""
    assert ctx.reward_fn is not None
    rows = [row[:n] for row, n in zip(x.tokens.tolist(), x.lengths.tolist(), strict=True)]
    prompts, responses = x.prompts, [row[len(p) :] for row, p in zip(rows, x.prompts, strict=True)]
    asked, said = ([ctx.tokenizer.decode(ids) for ids in part] for part in (prompts, responses))
    reward = ctx.config.reward
    return reward_function.call(ctx.reward_fn, reward.fn or "", reward.timeout, asked, said, prompts, responses)


def _shape_scores(ctx: Context, scores: Tensor, finished: Tensor) -> Tensor:
    """Scores as they enter the reward: clipped, standardised, and less for a response that was cut."""
    config, seen = ctx.config.ppo, ctx.state.scores
    if config.score_min is not None or config.score_max is not None:
        scores = scores.clamp(config.score_min, config.score_max)
    seen.update(scores.tolist())
    if config.score_center:
        scores = scores - seen.mean
    if config.score_scale:
        scores = scores / (seen.std + 1e-8)
    return scores - config.missing_eos_penalty * (~finished).float()


def _explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp_min(1e-8)


# -- the table -----------------------------------------------------------------------------------------------


def stage_table(config: RunConfig) -> tuple[Stage, ...]:
    """PPO's stages; a reward function takes the place of the reward model's row."""
    sequence = ("tokens", "lengths", "response_mask")
    by_function = config.reward.kind == "function"
    score_stage = (
        Stage("score", "local", score_by_function, None, ("prompts", "tokens", "lengths"), ("scores",))
        if by_function
        else Stage("score", "infer", score, "reward", ("prompts", "reward_prompts", "tokens", "lengths"), ("scores",))
    )
    measured = ("log_probs", "ref_log_probs", "values", "scores", "finished", "lengths", "response_mask")
    whitened = ("advantages", "advantage_moments")
    written = ("tokens", "lengths", "response_mask", "finished", "sampler_log_probs")
    recorded = ("prompts", "tokens", "lengths", "scores", "golds", "log_probs", "ref_log_probs")
    aims = ("rewards", "advantages", "returns")
    arrays = (*written, "log_probs", "ref_log_probs", "values", "scores", *aims)
    table = [
        Stage("rollout", "rollout", rollout, "policy", ("prompts", "sample_ids"), written),
        Stage("log_probs", "infer", log_probs, "policy", (*sequence, "sampler_log_probs"), ("log_probs",)),
        Stage("ref_log_probs", "infer", ref_log_probs, "reference", sequence, ("ref_log_probs",)),
        score_stage,
        Stage("values", "infer", values, "critic", sequence, ("values",)),
        Stage("advantage", "local", advantage, None, measured, ("rewards", "returns", *whitened)),
        Stage("train_critic", "train", train_critic, "critic", (*sequence, "values", "returns")),
        Stage("train_policy", "train", train_policy, "policy", (*sequence, "log_probs", *whitened)),
        Stage("gold", "local", gold, None, ("prompts", "tokens", "lengths"), ("golds",)),
    ]
    if config.ppo.write_rollouts:
        table.append(Stage("write", "local", write, None, recorded))
    if config.ppo.write_arrays:
        table.append(Stage("write_arrays", "local", write_arrays, None, arrays))
    return tuple(table)


class PPO:
    name = "ppo"
    provided = frozenset({"prompts", "reward_prompts", "sample_ids"})

    def __init__(self, config: RunConfig):
        self.run, self.config = config, config.ppo
        self.stages = stage_table(config)
        self.iterations = config.ppo.iterations
        self.changes_at_end = False
        self.eval_every, self.save_every = 0, config.ppo.save_every

    def roles(self) -> dict[str, RoleSpec]:
        config = self.config
        per_iteration = config.epochs * config.num_minibatches
        steps = config.iterations * per_iteration
        policy_steps = max(1, steps - config.critic_warmup_iterations * per_iteration)
        policy = (("sft", "policy"),)
        by_function = self.run.reward.kind == "function"
        critic = policy if by_function else (("reward", "reward"),)
        base: Literal["policy", "reward"] = "policy" if by_function else "reward"
        roles = {
            "policy": RoleSpec("lm", policy, config.optimizer, policy_steps),
            "reference": RoleSpec("lm", policy),
            "critic": RoleSpec("scalar", critic, config.critic_optimizer, steps, base=base),
        }
        if not by_function:
            roles["reward"] = RoleSpec("scalar", critic, base=base)
        return roles

    def batch(self, ctx: Context) -> Experience:
        config = self.config
        if ctx.state.iteration == 0:
            ctx.state.kl_coef = config.kl_coef
        drawn = ctx.draw(self.name, config.prompts_per_iteration)
        examples = [example for example in drawn for _ in range(config.samples_per_prompt)]
        return Experience(
            prompts=[example.prompt for example in examples],
            reward_prompts=[example.reward_prompt for example in examples],
            sample_ids=torch.arange(len(examples)),
        )

    def evaluate(self, ctx: Context, final: bool) -> Evaluation:
        """Before against after on held-out prompts: gold and reward model's scores, win rate, KL per response."""
        examples = ctx.datasets[self.name].held_out[: self.config.eval_prompts]
        before = sample_dialogues(ctx, ctx.roles["reference"], examples)
        after = sample_dialogues(ctx, ctx.roles["policy"], examples)
        experience = self._experience(ctx, examples, after.responses)
        kl = self._kl(ctx, experience)
        figures = {"eval/kl": float(kl.mean())}
        cards = after.cards()
        for i, card in enumerate(cards):
            card["before"] = before.texts[i].strip()
        if "reward" in ctx.roles or ctx.reward_fn is not None:
            for when, responses in (("before", before.responses), ("after", after.responses)):
                x = self._experience(ctx, examples, responses)
                if (reward := ctx.roles.get("reward")) is not None:
                    (scores,) = infer([_scores(ctx, reward, x)])
                else:
                    scores = score_by_function(ctx, None, x)["scores"]
                figures[f"eval/score_{when}"] = float(scores.mean())
                for i in range(min(NUM_CARDS, len(cards))):
                    cards[i][f"score_{when}"] = float(scores[i])
        if before.golds is not None and after.golds is not None:
            figures["eval/gold_before"] = sum(before.golds) / len(examples)
            figures["eval/gold_after"] = sum(after.golds) / len(examples)
            wins = sum(a > b for a, b in zip(after.golds, before.golds, strict=True))
            ties = sum(a == b for a, b in zip(after.golds, before.golds, strict=True))
            figures["eval/win_rate"], figures["eval/tie_rate"] = wins / len(examples), ties / len(examples)
            for i, card in enumerate(cards):
                card["gold_before"] = before.golds[i]
        return Evaluation(figures, cards)

    def _experience(self, ctx: Context, examples, responses) -> Experience:
        prompts = [example.prompt for example in examples]
        tokens, lengths = pad_rows([p + r.tokens for p, r in zip(prompts, responses, strict=True)], ctx.mesh.tp)
        mask = spans(torch.tensor([len(p) for p in prompts]), lengths, tokens.shape[1])
        reward_prompts = [example.reward_prompt for example in examples]
        return Experience(prompts, reward_prompts, tokens=tokens, lengths=lengths, response_mask=mask)

    def _kl(self, ctx: Context, x: Experience) -> Tensor:
        """Sum over each response of k1 between policy and reference, `(B,)`."""
        works = [_log_probs(ctx, ctx.roles[name], x) for name in ("policy", "reference")]
        policy, reference = (infer([work])[0][:, 0] for work in works)
        assert x.response_mask is not None
        return (kl_estimate(policy, reference) * x.response_mask).sum(1)
