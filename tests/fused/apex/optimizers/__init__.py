import plain
import torch


class FusedAdam(plain.Adam):
    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode=True, capturable=False):
        super().__init__(params, lr, weight_decay, betas, eps)


class FusedSGD(torch.optim.SGD): ...
