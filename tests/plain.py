"""What apex's and transformer-engine's fused kernels compute, in plain torch; their stand-ins have their signatures."""

from __future__ import annotations

import torch


class Adam(torch.optim.Optimizer):
    """Makes its state in the first step and counts steps in the group."""

    def __init__(self, params, lr, weight_decay, betas, eps):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                square = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))


def multi_tensor_applier(op, buffer, lists, *args):
    return op(2048 * 32, buffer, lists, *args)


def multi_tensor_l2norm(chunk, buffer, lists, per_parameter):
    return torch.stack([tensor.norm() for tensor in lists[0]]).norm().view(1), None


def multi_tensor_scale(chunk, buffer, lists, scale):
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
