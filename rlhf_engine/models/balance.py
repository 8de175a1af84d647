"""The load-balancing loss of transformers' mixtures of experts, whatever the mesh and the micro-batches.

With f_e the times that expert e was chosen and P_e its mean probability, over all tokens and layers, padding left out,
it is E sum_e f_e P_e (Switch Transformer, arXiv:2101.03961, equations 4 to 6, which have it of each layer alone; as in
transformers' `load_balancing_loss_func` f adds up to the experts per token). f is a count, and has no derivative.

Both are those of all rows of an update, as if one forward had seen them: neither the micro-batch size nor DP can change
the loss. The derivative by a probability is f, so f must be known before the first backward, and a forward without
gradients counts it (`stream.train_step`). Megatron's loss is another, of each layer and each micro-batch of each rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Balance:
    """What the routers of a trained role count, and the gradient that they add. Legend: L layers, E experts.

    Attributes:
        counts: `(2, L, E)` float64, how often each expert was chosen, and the sum of its probabilities; of this rank's
            layers and tokens.

    Args:
        coefficient: of the loss; 0: it is reported and not learned from.
    """

    def __init__(self, num_layers: int, num_experts: int, top: int, coefficient: float, device: torch.device):
        self.top, self.coefficient = top, coefficient
        self.counts = torch.zeros(2, num_layers, num_experts, dtype=torch.float64, device=device)
        self.is_counting = False
        self.gradient: Tensor | None = None  # `(E,)`, by each token's probability of each expert, in each layer

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Within it forwards without gradients count."""
        self.is_counting, self.gradient = True, None
        self.counts.zero_()
        try:
            yield
        finally:
            self.is_counting = False

    def see(self, layer: int, logits: Tensor, chosen: Tensor, is_padding: Tensor, weights: Tensor) -> Tensor:
        """Counts what a router has decided.

        Args:
            logits, chosen, weights: `(T, E)`, the router's, all but `chosen`, which is bool, float32.
            is_padding: `(T,)`.

        Returns:
            `weights`, whose backward adds the loss's gradient to that of `logits`.
        """
        if not (self.is_counting or torch.is_grad_enabled()):
            return weights  # activations that backward will compute again
        is_real = ~is_padding.unsqueeze(1)
        scores = logits.softmax(-1) * is_real
        with torch.no_grad():
            self.counts[0, layer] += (chosen & is_real).sum(0)
            self.counts[1, layer] += scores.sum(0, dtype=torch.float64)
        if self.gradient is None:
            return weights
        return _Beside.apply(weights, (scores * self.gradient).sum())

    def settle(self, total: Tensor) -> None:
        """Behind a forward that has counted: the gradient of the loss of all that was seen.

        Args:
            total: that all gradients will be divided by, this rank's part of it.
        """
        flat = torch.cat([self.counts[0].flatten(), total.double().view(1)])
        dist.all_reduce(flat)
        chosen, tokens = _over_layers(flat[:-1].view_as(self.counts[0]), self.top)
        self.gradient = (self.coefficient * flat[-1] * len(chosen) * chosen / tokens**2).float()
        self.counts.zero_()

    def figures(self) -> dict[str, float]:
        """Of all that was seen, the same on every rank: the loss without its coefficient, the share of each expert over
        all layers, and the largest share of any expert in any layer. Begins anew."""
        dist.all_reduce(self.counts)
        (chosen, tokens), scores = _over_layers(self.counts[0], self.top), self.counts[1].sum(0)
        loss = len(chosen) * (chosen * scores).sum() / tokens**2
        shares = self.counts[0] / self.counts[0].sum(1, keepdim=True)
        loss, most, *each = torch.stack([loss, shares.max(), *shares.mean(0)]).tolist()
        self.counts.zero_()
        self.gradient = None
        found = {"router_aux_loss": loss, "expert_share_max": most}
        return found | {f"expert_share/{i}": share for i, share in enumerate(each)}


class _Beside(torch.autograd.Function):
    """A tensor as it is; its backward is that of `loss` too, with a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones([])


def _over_layers(chosen: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """How often each expert was chosen in any layer, and how many tokens there were, counted once a layer."""
    return chosen.sum(0), chosen.sum() / top


class Router(TopKRouter):
    """Megatron's, which tells `balance` of its decisions where that is set and the forward says what is padding."""

    balance: Balance | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`(S, B, E)` and True for padding, `(S, B)`, to weights `(S B, E)` and which are chosen, bool."""
        weights, chosen = super().routing(logits)
        if self.balance is not None and padding_mask is not None:
            is_padding, logits = padding_mask.flatten(), logits.view(-1, logits.shape[-1])
            if len(is_padding) > len(logits):  # the first pipeline stage alone splits it as it does the sequence
                is_padding = is_padding.chunk(self.tp_group.size())[self.tp_group.rank()]
            weights = self.balance.see(self.layer_number - 1, logits, chosen, is_padding, weights)
        return weights, chosen
