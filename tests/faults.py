"""Faults that tests plant in the engine, each by a function that takes pytest's monkeypatch."""

from __future__ import annotations

from types import SimpleNamespace

import torch


def wrap(patch, owner, name: str, change) -> None:
    """Replaces a function by `change(original, *args, **kwargs)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def wrong_kernel(patch) -> None:
    """The sum of exponentials is 1% too large."""
    from rlhf_kernels import reference

    def change(original, *args):
        parts = original(*args)
        parts[:, 1] *= 1.01
        return parts

    wrap(patch, reference, "token_stats", change)


def wrong_backward(patch) -> None:
    """The kernel's gradient is 1% too large."""
    from rlhf_kernels import reference

    def change(original, *args, out):
        original(*args, out=out)
        out *= 1.01

    wrap(patch, reference, "token_gradient", change)


def wrong_clipping(patch) -> None:
    """PPO's ratio is never far above 1, and so never clipped there."""
    from rlhf_kernels import reference

    def change(original, log_probs, old, *args):
        return original(log_probs, torch.maximum(old, log_probs.detach() - 0.1), *args)

    wrap(patch, reference, "policy_sums", change)


def groups_mixed(patch) -> None:
    """Each response is compared with another prompt's."""
    from rlhf_engine.algorithms import grpo

    def change(original, scores, groups, *args, **options):
        return original(scores, groups.roll(1), *args, **options)

    wrap(patch, grpo, "group_advantages", change)


def teacher_a_token_late(patch) -> None:
    """What is kept of a teacher is its output at each token, and not before it."""
    from rlhf_engine.algorithms import distill

    wrap(patch, distill, "outputs_before", lambda original, *args: original(*args).roll(-1, 2))


def teacher_unheard(patch) -> None:
    """The teacher's log-probs are the policy's own, up to a hundredth."""
    from rlhf_engine.algorithms import distill

    wrap(patch, distill, "kl_estimate", lambda original, ours, theirs: 0.01 * original(ours, theirs))


def forward_kl(patch) -> None:
    """The KL's slices weigh differences by the teacher's probabilities."""
    from rlhf_kernels import divergence

    wrap(patch, divergence, "_logits", lambda original, *args: original(*args)[::-1])


def bias_lost_while_loading(patch) -> None:
    """Biases of queries, keys and values stay 0."""
    from rlhf_engine.hf.weights import Table

    def change(original, self, name, *args):
        tensor = original(self, name, *args)
        return torch.zeros_like(tensor) if name.endswith("linear_qkv.bias") else tensor

    wrap(patch, Table, "load", change)


def bias_lost_in_training(patch) -> None:
    """The forward of training does not add them."""
    from megatron.core.transformer.attention import SelfAttention

    def change(original, self, *args, **kwargs):
        bias, self.linear_qkv.bias = self.linear_qkv.bias, None
        try:
            return original(self, *args, **kwargs)
        finally:
            self.linear_qkv.bias = bias

    wrap(patch, SelfAttention, "get_query_key_value_tensors", change)


def doubled_gradients(patch) -> None:
    """The sum of gradients is divided by half the number of tokens."""
    from rlhf_engine.models import stream

    wrap(patch, stream, "finalize_model_grads", lambda original, modules, count: original(modules, count / 2))


def doubled_loss(patch) -> None:
    """The loss itself is twice as large, as it is reported and as it is learned from."""
    from rlhf_engine.algorithms import sft

    def change(original, role):
        def loss(hidden, batch):
            total, count, statistics = original(role)(hidden, batch)
            return 2 * total, count, statistics

        return loss

    wrap(patch, sft, "cross_entropy", change)


def off_by_one(patch) -> None:
    """A token's log-prob is taken from the output that has seen it."""
    from rlhf_engine.algorithms import heads

    def change(original, hidden, *args, rows, **kwargs):
        return original(hidden, *args, rows=rows + hidden.shape[1], **kwargs)

    wrap(patch, heads, "linear_log_probs", change)


def values_off_by_one(patch) -> None:
    """So are the critic's values."""
    from rlhf_engine.algorithms import heads

    patch.setattr(heads, "to_next_token", lambda outputs: outputs)


def unmasked_prompt(patch) -> None:
    """The loss is over whole dialogues."""
    from rlhf_engine.algorithms import sft
    from rlhf_engine.experience import spans

    def change(original, *args):
        x = original(*args)
        x.loss_mask = spans(torch.zeros_like(x.lengths), x.lengths, x.tokens.shape[1])
        return x

    wrap(patch, sft, "supervised", change)


def prompts_in_the_sum(patch) -> None:
    """An answer's log-prob has its prompt's in it."""
    from rlhf_engine.algorithms import dpo
    from rlhf_engine.experience import spans

    def change(original, *args):
        x = original(*args)
        x.loss_mask = spans(torch.zeros_like(x.lengths), x.lengths, x.tokens.shape[1])
        return x

    wrap(patch, dpo, "answered", change)


def pairs_swapped(patch) -> None:
    """The rejected answer is taken for the chosen one."""
    from rlhf_engine.algorithms import dpo

    wrap(
        patch,
        dpo,
        "preference_loss",
        lambda original, kind, chosen, rejected, **kw: original(kind, rejected, chosen, **kw),
    )


def kl_of_a_micro_batch(patch) -> None:
    """KTO's KL is that of the rows at hand."""
    from rlhf_engine.algorithms import kto

    wrap(patch, kto, "kto_loss", lambda original, x, desirable, kl, **kw: original(x, desirable, x.mean(), **kw))


def unheard_token(patch) -> None:
    """Of each answer one token in the middle is not learned from."""
    from rlhf_engine.algorithms import sft

    def change(original, examples, multiple):
        x = original(examples, multiple)
        for mask, example in zip(x.loss_mask, examples, strict=True):
            mask[len(example.prompt) + len(example.chosen) // 2] = False
        return x

    wrap(patch, sft, "supervised", change)


def padding_counted(patch) -> None:
    """The padded part of the vocabulary takes part in the softmax."""
    from rlhf_engine.algorithms import heads

    wrap(patch, heads, "linear_log_probs", lambda original, *args, **kw: original(*args, **kw | {"vocab_size": None}))


def noise_of_the_batch(patch) -> None:
    """A sample's noise comes from its place in the batch."""
    from rlhf_engine.rollout import generate
    from rlhf_engine.rollout.sampling import sample_keys

    def change(original, gpt, mesh, sampler, prompts, keys, *args):
        return original(gpt, mesh, sampler, prompts, sample_keys(1, 0, torch.arange(len(prompts))), *args)

    wrap(patch, generate, "Engine", change)


def forgotten_optimizer(patch) -> None:
    """A resumed run begins with an optimizer that has seen nothing."""
    from rlhf_engine.models import checkpoint

    patch.setattr(checkpoint, "load_optimizer", lambda optimizer, state: None)


def norms_not_reduced(patch) -> None:
    """Under sequence parallelism a norm learns from this rank's part of the positions alone."""
    from rlhf_engine.models.layers import RMSNorm

    def change(original, self, config, *args, **kwargs):
        original(self, SimpleNamespace(**vars(config) | {"sequence_parallel": False}), *args, **kwargs)

    wrap(patch, RMSNorm, "__init__", change)
