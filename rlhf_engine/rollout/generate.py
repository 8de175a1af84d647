"""Responses to prompts, from the training weights: the work of all replicas."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import groupby

import psutil
import torch
from torch import Tensor

from ..config import ConfigError, RolloutConfig
from ..models.residency import Presence
from ..models.role import RoleModel
from ..signals import RunError
from .engine import Engine
from .fold import whole_model
from .progress import Finished, Progress, Report, Response
from .responses import Responses, pack, unpack
from .sampling import Sampler
from .turns import Turns


def rollout(
    role: RoleModel,
    prompts: Sequence[Sequence[int]],
    keys: Tensor,
    config: RolloutConfig,
    end_ids: Sequence[int],
    *,
    decode: Callable[[Sequence[int]], str] | None = None,
    limits: Sequence[int] | None = None,
    begun: Sequence[Response] | None = None,
    report: Report | None = None,
    shares: Sequence[Sequence[int]] | None = None,
    finished: Finished | None = None,
    turns: Turns | None = None,
) -> Responses:
    """Responses to all prompts, in their order and the same on every rank; each replica generates its share.

    Args:
        prompts: token ids of each; none at all give no responses.
        keys: `(len(prompts),)`, from `sample_keys`.
        end_ids: the tokens that end a response.
        decode: text of token ids; `config.stop` needs it.
        limits: most tokens of each response, where they differ, with `turns` of all of it; the model's context bounds
            them too.
        begun: what there is of each response already, fewer tokens than its limit; these weights go on with it.
        report: called with this replica's progress every few seconds, and at the end with that of all.
        shares: the samples of each replica; None gives them equal work.
        finished: called every few seconds with this replica's finished responses, by the numbers of their prompts.
        turns: what answers this replica's samples between their turns, of `config.max_new_tokens` tokens each; None: a
            response is one turn.

    Raises:
        ValueError: a prompt is empty or leaves no room in the model's context.
        ConfigError: `config.kv_tokens` has no room for the longest sequence.
        FloatingPointError: a logit is not finite; the same on every rank, naming the sample and a rank that saw it.
        RunError: what `turns` has raised, likewise.
    """
    mesh = role.mesh
    most = _limits(prompts, limits or [config.max_new_tokens] * len(prompts), role.model.max_position_embeddings)
    need = [len(prompt) + limit for prompt, limit in zip(prompts, most, strict=True)]
    longest = max(need, default=1)
    if config.kv_tokens is not None and longest > config.kv_tokens:
        raise ConfigError(f"rollout.kv_tokens={config.kv_tokens} has no room for a sequence of {longest} tokens")
    mine = (split(prompts, need, mesh.num_replicas) if shares is None else shares)[mesh.replica]
    responses: list[Response] = []
    progress, error = Progress(), None  # of it the type and the words
    role.move(min(role.presence, Presence.STATE))  # gradients would take room from the cache, and come with an update
    with role.on_device():
        gpt = whole_model(role)
        kv_tokens = config.kv_tokens or max(longest, free_tokens(role, config.cache_share))
        if mine:
            sampler = Sampler(config, role.model.vocab_size or 0, end_ids, mesh.tp_group)
            text_ends = _text_ends(config.stop_texts, decode) if config.stop else None
            engine = Engine(
                gpt, mesh, sampler, [tuple(prompts[i]) for i in mine], keys[mine], [most[i] for i in mine], mine,
                config.slots, kv_tokens, text_ends, report, finished, begun and [begun[i] for i in mine], turns,
            )  # fmt: skip
            try:
                responses = engine.run()
            except (FloatingPointError, RunError) as raised:
                error = type(raised), str(raised)  # raised on every rank, or the others would wait for this one
            progress = engine.progress
    parts = mesh.all_gather_object((mesh.replica, progress, error))
    for *_, error in parts:
        if error is not None:
            kind, words = error
            raise kind(words)
    if report is not None:
        report(Progress.over([part[1] for part in {part[0]: part for part in parts}.values()]))
    return unpack(mesh.gather_ragged(pack(dict(zip(mine, responses, strict=False)))), len(prompts))


def _limits(prompts: Sequence[Sequence[int]], limits: Sequence[int], context: int) -> list[int]:
    """The most tokens of each response that the model's context leaves room for."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; the model's context takes 1 to {context - 1}")
    return [min(limit, context - len(prompt)) for prompt, limit in zip(prompts, limits, strict=True)]


def split(prompts: Sequence[Sequence[int]], need: Sequence[int], num_replicas: int) -> list[list[int]]:
    """The samples of each replica: the longest first, each to the replica that has the least to do.

    Samples of one prompt stay together, to share its prefill, as far as that leaves enough to balance with.
    """
    together = max(1, len(prompts) // (2 * num_replicas))
    units = []
    order = sorted(range(len(prompts)), key=lambda i: (-need[i], tuple(prompts[i]), i))
    for _, group in groupby(order, key=lambda i: tuple(prompts[i])):
        same = list(group)
        units += [same[i : i + together] for i in range(0, len(same), together)]
    shares: list[list[int]] = [[] for _ in range(num_replicas)]
    loads = [0] * num_replicas
    for unit in sorted(units, key=lambda unit: -sum(need[i] for i in unit)):
        least = loads.index(min(loads))
        shares[least] += unit
        loads[least] += sum(need[i] for i in unit)
    return [sorted(share) for share in shares]


def _text_ends(stop: Sequence[str], decode: Callable[[Sequence[int]], str] | None) -> Callable[[list[int]], bool]:
    """Whether a response's last token completes one of the strings."""
    assert decode is not None, "rollout.stop needs the tokenizer's decode"
    # a token may be one byte of a character; further back no string can begin that was not complete before
    reach = max(4 * len(text) for text in stop) + 4

    def ends(tokens: list[int]) -> bool:
        before, now = decode(tokens[-reach:-1]), decode(tokens[-reach:])
        return any(now.count(text) > before.count(text) for text in stop)

    return ends


def free_tokens(role: RoleModel, share: float) -> int:
    """Positions of cache that such a share of this rank's free memory holds; the same on all tensor parallel ranks."""
    mesh, model = role.mesh, role.model
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps and nobody uses is not free to the driver
        free = torch.cuda.mem_get_info(mesh.device)[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size))
    size = torch.finfo(role.dtype).bits // 8
    per_token = model.num_layers * 2 * model.num_key_value_heads // mesh.tp * model.head_size * size
    return min(mesh.all_gather_object(int(free * share) // per_token))
