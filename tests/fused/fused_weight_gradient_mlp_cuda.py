"""Apex's kernel for the gradient of a linear layer's weight, in plain torch."""

CALLS = []


def wgrad_gemm_accum_fp32(x, gradient, total):
    CALLS.append(tuple(total.shape))
    total += gradient.t() @ x
