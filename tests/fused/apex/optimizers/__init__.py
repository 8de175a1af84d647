"""Adam that makes its state in the first step and counts steps in the group, as apex's and transformer-engine's do."""

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode=True, capturable=False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
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


class FusedSGD(torch.optim.SGD): ...
