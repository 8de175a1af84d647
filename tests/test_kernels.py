"""The public operations against float64 torch, forward and backward, with an incoming gradient that is not 1.

They run in plain torch on the CPU, and compiled by Triton where there is a GPU. test_kernels_triton.py runs this file
once more under Triton's interpreter. Tolerances: a result in float32 may be off by 5e-6 of its largest magnitude (at
least 1), in float64 by 1e-12; a gradient by one rounding to the type of its logits. Inputs are exact in their type.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import mesh

import rlhf_kernels as kernels
from rlhf_kernels import reference
from rlhf_kernels.dispatch import use_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RESULT = {torch.float64: 1e-12, torch.float32: 5e-6}
GRADIENT = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
BLOCK = 1024  # tokens of an advantage that are scanned at once
if os.environ.get("TRITON_INTERPRET") == "1":
    from rlhf_kernels import advantage_triton

    GRADIENT[torch.bfloat16] *= 2  # the interpreter cuts digits off where a GPU rounds
    # and a scan goes from one element of a block to the next
    advantage_triton.LAUNCH["rows"]["BLOCK"] = BLOCK = 32
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
pytestmark = pytest.mark.parametrize("device", DEVICES, scope="module")


@pytest.fixture(autouse=True)
def _needs_its_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def random(*shape, seed=0, dtype=torch.float32, device="cpu", scale=1.0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(dtype).to(device)


def random_tokens(high, *shape, device="cpu"):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(7)).to(device)


def close(actual, expected, tolerance):
    """Off by at most `tolerance` of the largest expected magnitude (at least 1); equal where infinite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = expected[expected.isfinite()].abs()
    allowed = tolerance * max(1.0, float(finite.max()) if len(finite) else 0.0)
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=0, atol=allowed)


def oracle(logits, tokens, temperature=1.0):
    """Log-prob and entropy of float64 logits `(N, V)`."""
    log_p = torch.log_softmax(logits / temperature, -1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy


def compare(logits, tokens, *, num_valid=None, temperature=1.0, rows=None, forbidden=None, uses=(1, 1), **options):
    """Forward and backward of token_log_probs against the oracle. `uses`: which results have a gradient."""
    leaf = logits.detach().requires_grad_()
    inplace = options.get("inplace_grad", False)
    results = kernels.token_log_probs(
        leaf * 1 if inplace else leaf, tokens, vocab_size=num_valid, temperature=temperature, rows=rows, **options
    )
    exact = logits.detach().double().requires_grad_()
    chosen = exact.reshape(-1, exact.shape[-1])[..., :num_valid]
    chosen = chosen if rows is None else chosen[rows]
    # a number for -inf, of which autograd's formulas make a NaN; its exponential is 0 as well
    chosen = chosen.masked_fill((chosen == -torch.inf) | (False if forbidden is None else forbidden), -1e30)
    expected = [x.view(tokens.shape) for x in oracle(chosen, tokens.reshape(-1), temperature)]
    for x, y in zip(results, expected, strict=True):
        assert x.dtype in RESULT and close(x, y, RESULT[x.dtype]), (x, y)
    incoming = [random(*tokens.shape, seed=i, device=logits.device) for i in range(2)]
    pairs = [i for i in range(2) if uses[i]]
    torch.autograd.backward([results[i] for i in pairs], [incoming[i].to(results[0].dtype) for i in pairs])
    torch.autograd.backward([expected[i] for i in pairs], [incoming[i].double() for i in pairs])
    assert leaf.grad.dtype is logits.dtype and close(leaf.grad, exact.grad, GRADIENT[logits.dtype])
    return leaf.grad


# -- token_log_probs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", (1, 17, 1271, 50257, 92544, 128256))
def test_vocabulary_sizes(vocab, dtype, device):
    rows = 2 if vocab > 2000 else 7
    compare(random(rows, vocab, dtype=dtype, device=device, scale=3), random_tokens(vocab, rows, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace_grad", (False, True))
def test_padding_has_no_probability_and_no_gradient(inplace_grad, dtype, device):
    logits = random(9, 1408, dtype=dtype, device=device)
    logits[:, 1271:] = 50
    grad = compare(logits, random_tokens(1271, 9, device=device), num_valid=1271, inplace_grad=inplace_grad)
    assert not grad[:, 1271:].any()


@pytest.mark.parametrize("temperature", (0.1, 0.7, 10.0))
@pytest.mark.parametrize("scale", (1e-4, 1.0, 300.0))
def test_temperature_and_scale(temperature, scale, device):
    compare(random(8, 500, device=device, scale=scale), random_tokens(500, 8, device=device), temperature=temperature)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("offset", (-3e4, 1e4, 6e4))
def test_huge_logits_keep_the_digits_of_their_differences(offset, dtype, device):
    logits = (random(8, 700, device=device).double() + offset).to(dtype)
    compare(logits, random_tokens(700, 8, device=device))


@pytest.mark.parametrize("uses", ((1, 0), (0, 1), (1, 1)))
def test_gradient_of_either_result(uses, device):
    compare(random(6, 300, device=device), random_tokens(300, 6, device=device), uses=uses)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_columns_of_minus_infinity(dtype, device):
    logits, tokens = random(6, 2500, dtype=dtype, device=device), random_tokens(2500, 6, device=device)
    logits[:, ::3] = -torch.inf
    logits[4] = -torch.inf  # all but the token's
    logits[5, 1:2400] = -torch.inf
    logits[torch.arange(6), tokens] = 1.0
    compare(logits, tokens)


def test_a_token_whose_logit_is_minus_infinity(device):
    logits = random(2, 40, device=device)
    logits[0, 3] = -torch.inf
    log_probs, entropy = kernels.token_log_probs(logits, torch.tensor([3, 4], device=device))
    assert log_probs[0] == -torch.inf and log_probs[1].isfinite() and entropy.isfinite().all()


@pytest.mark.parametrize("shape", ((2, 1), (1, 5), (3, 4, 2)))
def test_leading_shapes(shape, device):
    compare(random(*shape, 33, device=device), random_tokens(33, *shape, device=device))


@pytest.mark.parametrize("inplace_grad", (False, True))
def test_strided_logits(inplace_grad, device):
    tokens = random_tokens(64, 5, device=device)
    wide = random(5, 200, device=device)
    compare(wide[:, 100:164], tokens, inplace_grad=inplace_grad)
    compare(random(64, 5, device=device).T, tokens, inplace_grad=inplace_grad)
    compare(random(2, 4, 64, device=device)[:, :-1], random_tokens(64, 2, 3, device=device), inplace_grad=inplace_grad)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("inplace_grad", (False, True))
def test_selected_rows_alone_are_read_and_have_a_gradient(inplace_grad, dtype, device):
    logits = random(4, 6, 90, dtype=dtype, device=device)
    rows = torch.tensor([0, 5, 6, 17, 23], device=device)
    compare(logits, random_tokens(90, 5, device=device), rows=rows, inplace_grad=inplace_grad)
    others = torch.ones(24, dtype=torch.bool, device=device)
    others[rows] = False
    logits.view(24, 90)[others] = torch.nan
    results = kernels.token_log_probs(logits, random_tokens(90, 5, device=device), rows=rows)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("inplace_grad", (False, True))
def test_no_rows(inplace_grad, device):
    logits = random(4, 30, device=device).requires_grad_()
    empty = torch.empty(0, dtype=torch.int64, device=device)
    log_probs, entropy = kernels.token_log_probs(logits * 1, empty, rows=empty, inplace_grad=inplace_grad)
    assert log_probs.shape == entropy.shape == (0,)
    (log_probs.sum() + entropy.sum()).backward()
    assert logits.grad.shape == logits.shape and not logits.grad.any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_banned_tokens_have_no_probability(dtype, device):
    logits, tokens = random(12, 3000, dtype=dtype, device=device), random_tokens(2000, 12, device=device)
    early, ids = torch.arange(12, device=device) % 3 == 0, torch.tensor([2001, 2999, 2500], device=device)
    logits[:, 2500] = 30
    forbidden = early.unsqueeze(1) & torch.isin(torch.arange(3000, device=device), ids)
    for inplace_grad in (False, True):
        compare(logits, tokens, forbidden=forbidden, banned=(early, ids), inplace_grad=inplace_grad)


def test_second_backward_over_a_gradient_in_place_is_refused(device):
    logits = random(3, 8, device=device).requires_grad_()
    log_probs, _ = kernels.token_log_probs(logits * 1, random_tokens(8, 3, device=device), inplace_grad=True)
    log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


def test_runs_are_bit_equal(device):
    logits, tokens = random(5, 9000, device=device), random_tokens(9000, 5, device=device)
    first, second = (kernels.token_log_probs(logits, tokens) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_long_row_split_between_programs(device):
    """One row of a large vocabulary; in Triton several programs share it."""
    logits = random(1, 200_000, device=device, scale=4)
    compare(logits, torch.tensor([199_999], device=device))


@pytest.mark.parametrize("arguments, message", (
    ({"tokens": [0, 11, 1]}, "token id 11 lies outside the vocabulary"),
    ({"tokens": [0, -1, 1]}, "token id -1 lies outside"),
    ({"tokens": [0, 2, 1], "banned": ([False, True, True], [2, 5])}, "token id 2 is banned"),
    ({"tokens": [0, 2], "rows": [2, 1]}, "rows must increase"),
    ({"tokens": [0, 2], "rows": [1, 1]}, "rows must increase"),
    ({"tokens": [0, 2], "rows": [1, 3]}, r"lie in \[0, 3\)"),
    ({"tokens": [0], "rows": [1, 2]}, "1 tokens for 2 rows"),
    ({"tokens": [0, 1]}, "do not fit"),
    ({"tokens": [0, 1, 2], "temperature": 0.0}, "must be positive"),
))  # fmt: skip
def test_refusals(arguments, message, device):
    options = {k: torch.tensor(x, device=device) if isinstance(x, list) else x for k, x in arguments.items()}
    if "banned" in options:
        options["banned"] = tuple(torch.tensor(x, device=device) for x in options["banned"])
    with pytest.raises(ValueError, match=message):
        kernels.token_log_probs(random(3, 16, device=device), options.pop("tokens"), vocab_size=11, **options)


# -- linear_log_probs ----------------------------------------------------------------------------------------------

# of gradients, whose logits' own are rounded to their type; results are those of float32 logits
LINEAR = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 2.0**-8,
    torch.bfloat16: 4 * GRADIENT[torch.bfloat16],
}


def linear_case(dtype, device, vocab=300, hidden=24):
    x = random(4, 6, hidden, dtype=dtype, device=device).requires_grad_()
    weight = random(vocab + 20, hidden, seed=1, dtype=dtype, device=device, scale=0.3).requires_grad_()
    rows = torch.tensor([0, 3, 4, 9, 10, 20, 23], device=device)
    return x, weight, rows, random_tokens(vocab, len(rows), device=device)


@pytest.mark.parametrize("chunk_bytes, keep_bytes", ((None, None), (1, 0), (6000, 0), (6000, 9000), (1 << 20, 0)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_agrees_with_the_unfused_path(dtype, chunk_bytes, keep_bytes, device):
    x, weight, rows, tokens = linear_case(dtype, device)
    early, ids = torch.arange(7, device=device) % 2 == 0, torch.tensor([299, 250], device=device)
    tokens[tokens >= 250] = 0
    results = kernels.linear_log_probs(
        x, weight, tokens, rows=rows, vocab_size=300, temperature=0.8, banned=(early, ids),
        chunk_bytes=chunk_bytes, keep_bytes=keep_bytes,
    )  # fmt: skip
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = exact_x.view(24, -1)[rows] @ exact_weight[:300].T
    forbidden = early.unsqueeze(1) & torch.isin(torch.arange(300, device=device), ids)
    expected = oracle(logits.masked_fill(forbidden, -1e30), tokens, 0.8)
    for got, want in zip(results, expected, strict=True):
        assert close(got, want, LINEAR[torch.promote_types(dtype, torch.float32)])
    incoming = [random(7, seed=i, device=device) for i in (3, 4)]
    for _ in range(2):  # the second time nothing kept is left
        for leaf in (x, weight):
            leaf.grad = None
        torch.autograd.backward(results, [g.to(results[0].dtype) for g in incoming], retain_graph=True)
        torch.autograd.backward(expected, [g.double() for g in incoming], retain_graph=True)
        for leaf, exact in ((x, exact_x), (weight, exact_weight)):
            assert leaf.grad.dtype is dtype and close(leaf.grad, exact.grad, LINEAR[dtype])
            exact.grad = None


@pytest.mark.parametrize("frozen", ("hidden", "weight", "both"))
def test_linear_with_frozen_inputs(frozen, device):
    x, weight, rows, tokens = linear_case(torch.float64, device)
    kernels.linear_log_probs(x, weight, tokens, rows=rows)[0].sum().backward()
    expected = x.grad, weight.grad
    leaves = [
        t.detach().requires_grad_(frozen not in (name, "both")) for t, name in ((x, "hidden"), (weight, "weight"))
    ]
    log_probs, entropy = kernels.linear_log_probs(*leaves, tokens, rows=rows)
    assert log_probs.requires_grad == entropy.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    log_probs.sum().backward()
    for leaf, want in zip(leaves, expected, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else close(leaf.grad, want, 1e-12)


def test_linear_without_rows_is_shaped_as_the_tokens(device):
    x, weight, _, _ = linear_case(torch.float32, device)
    tokens = random_tokens(320, 4, 6, device=device)
    got = kernels.linear_log_probs(x, weight, tokens)
    want = kernels.token_log_probs(x @ weight.T, tokens)
    for a, b in zip(got, want, strict=True):
        assert a.shape == (4, 6) and close(a, b, 1e-5)


def test_linear_of_no_rows(device):
    x, weight, _, _ = linear_case(torch.float32, device)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    log_probs, _ = kernels.linear_log_probs(x, weight, empty, rows=empty)
    log_probs.sum().backward()
    assert log_probs.shape == (0,) and not x.grad.any() and not weight.grad.any()


class _Largest(TorchDispatchMode):
    """Bytes of the largest storage that an operation of torch returns."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.num_bytes = max(self.num_bytes, x.untyped_storage().nbytes())
        return result


class _Count(TorchDispatchMode):
    """The distinct storages that matrix products write to; they are kept alive, so that none is used twice."""

    def __init__(self):
        super().__init__()
        self.products: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.mm:
            self.products[result.untyped_storage().data_ptr()] = result
        return result


def test_linear_never_holds_the_logits(device):
    tokens = random_tokens(5000, 12, device=device)
    x = random(12, 2, device=device).requires_grad_()
    weight = random(5000, 2, seed=1, device=device).requires_grad_()
    with _Largest() as largest:
        kernels.linear_log_probs(x, weight, tokens, chunk_bytes=1 << 15, keep_bytes=1 << 15)[0].sum().backward()
    assert largest.num_bytes < 100_000  # the logits take 240,000
    with _Largest() as largest:
        kernels.token_log_probs(x @ weight.T, tokens)[0].sum().backward()
    assert largest.num_bytes >= 240_000


def test_linear_keeps_nothing_where_no_gradient_is_wanted(device):
    tokens, x = random_tokens(4096, 8, device=device), random(8, 4, device=device)
    weight = random(4096, 4, seed=1, device=device).requires_grad_()
    held = {}
    for wants_grad in (False, True):
        with torch.set_grad_enabled(wants_grad), _Count() as count:
            results = kernels.linear_log_probs(x, weight, tokens, chunk_bytes=1 << 14, keep_bytes=1 << 17)
        held[wants_grad] = len(count.products)
        assert results[0].requires_grad == wants_grad
    # 8 slices into one buffer, or each into memory of its own
    assert held == {False: 1, True: 8}


def test_linear_wants_a_group_for_sequence_parallelism(device):
    x, weight, _, tokens = linear_case(torch.float32, device)
    with pytest.raises(ValueError, match="needs the group"):
        kernels.linear_log_probs(x, weight, tokens, sequence_parallel=True)


# -- linear_kl -----------------------------------------------------------------------------------------------------


def kl_case(dtype, device, vocab=300, hidden=24, teacher_hidden=40):
    """A ragged mask's rows, and those of a teacher of another width that holds them in another order."""
    x, weight, rows, _ = linear_case(dtype, device, vocab, hidden)
    y = random(3, 5, teacher_hidden, seed=5, dtype=dtype, device=device)
    teacher = random(vocab + 20, teacher_hidden, seed=6, dtype=dtype, device=device, scale=0.2)
    return x, weight, y, teacher, rows, torch.tensor([14, 0, 7, 3, 8, 1, 2], device=device)


def kl_oracle(x, weight, y, teacher, rows, teacher_rows, temperature=1.0, forbidden=None):
    """Sum of p (log p - log q) of materialised logits."""
    logits = x.view(-1, x.shape[-1])[rows] @ weight[:300].T, y.view(-1, y.shape[-1])[teacher_rows] @ teacher[:300].T
    if forbidden is not None:
        logits = tuple(z.masked_fill(forbidden, -1e30) for z in logits)
    log_p, log_q = ((z / temperature).log_softmax(-1) for z in logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("chunk_bytes, keep_bytes", ((None, None), (1, 0), (6000, 0), (6000, 9000), (1 << 20, 0)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_agrees_with_materialised_logits(dtype, chunk_bytes, keep_bytes, device):
    x, weight, y, teacher, rows, teacher_rows = kl_case(dtype, device)
    early, ids = torch.arange(7, device=device) % 2 == 0, torch.tensor([299, 250], device=device)
    kl = kernels.linear_kl(
        x, weight, y, teacher, rows=rows, teacher_rows=teacher_rows, vocab_size=300, temperature=0.8,
        banned=(early, ids), chunk_bytes=chunk_bytes, keep_bytes=keep_bytes,
    )  # fmt: skip
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, y, teacher)]
    forbidden = early.unsqueeze(1) & torch.isin(torch.arange(300, device=device), ids)
    expected = kl_oracle(*exact, rows, teacher_rows, 0.8, forbidden)
    assert expected.min() > 0.1 and kl.dtype is torch.promote_types(dtype, torch.float32)
    assert close(kl, expected, LINEAR[kl.dtype])
    incoming = random(7, seed=3, device=device)
    for _ in range(2):  # the second time nothing kept is left
        for leaf in (x, weight, *exact):
            leaf.grad = None
        kl.backward(incoming.to(kl.dtype), retain_graph=True)
        expected.backward(incoming.double(), retain_graph=True)
        for leaf, want in zip((x, weight), exact, strict=False):
            assert leaf.grad.dtype is dtype and close(leaf.grad, want.grad, LINEAR[dtype])
        assert not weight.grad[300:].any()


@pytest.mark.parametrize("offset", (0.0, 3e4))
def test_kl_of_what_is_nearly_equal_keeps_its_digits(offset, device):
    """It is of the second order in the difference, and none is lost to what all logits have in common."""
    y = torch.cat([random(5, 16, device=device), torch.ones(5, 1, device=device)], 1)
    teacher = torch.cat([random(300, 16, seed=1, device=device), torch.full((300, 1), offset, device=device)], 1)
    x = y.clone()
    x[:, 3] += 1 / 64
    every = torch.arange(5, device=device)
    kl = kernels.linear_kl(x, teacher, y, teacher, chunk_bytes=1)
    want = kl_oracle(x.double(), teacher.double(), y.double(), teacher.double(), every, every)
    assert want.max() < 2e-4
    if offset:  # logits between 16384 and 32768 are 1 / 512 apart
        assert close(kl, want, 2.0**-9)
    else:
        assert close(kl * 1e4, want * 1e4, 1e-2)
    assert close(kernels.linear_kl(y, teacher, y, teacher), torch.zeros(5), 1e-6)


def test_kl_to_a_teacher_without_a_column(device):
    """By hand: p = (1/2, 1/2), q = (1, 0), for which the log of 0 has its stand-in; and the other way about log 2."""
    states = torch.ones(1, 1, device=device)
    even, first = (torch.tensor(x, device=device).unsqueeze(1) for x in ([0.0, 0.0], [0.0, -torch.inf]))
    assert float(kernels.linear_kl(states, even, states, first)) == pytest.approx(0.5e5, rel=1e-4)
    assert float(kernels.linear_kl(states, first, states, even)) == pytest.approx(0.6931472, rel=1e-6)


def test_kl_without_rows_is_shaped_as_the_states(device):
    x, weight, _, teacher, _, _ = kl_case(torch.float32, device)
    kl = kernels.linear_kl(x, weight, random(4, 6, 40, device=device), teacher)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    none = kernels.linear_kl(x, weight, random(4, 6, 40, device=device), teacher, rows=empty, teacher_rows=empty)
    none.sum().backward()
    assert kl.shape == (4, 6) and none.shape == (0,) and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("frozen", ("hidden", "weight", "both"))
def test_kl_with_frozen_inputs(frozen, device):
    x, weight, y, teacher, rows, teacher_rows = kl_case(torch.float64, device)
    options = {"rows": rows, "teacher_rows": teacher_rows}
    kernels.linear_kl(x, weight, y.requires_grad_(), teacher.requires_grad_(), **options).sum().backward()
    assert y.grad is None and teacher.grad is None
    expected = x.grad, weight.grad
    leaves = [
        t.detach().requires_grad_(frozen not in (name, "both")) for t, name in ((x, "hidden"), (weight, "weight"))
    ]
    kl = kernels.linear_kl(*leaves, y, teacher, **options)
    assert kl.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    kl.sum().backward()
    for leaf, want in zip(leaves, expected, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else close(leaf.grad, want, 1e-12)


def test_kl_never_holds_the_logits_of_either(device):
    x = random(12, 2, device=device).requires_grad_()
    weight = random(5000, 2, seed=1, device=device).requires_grad_()
    y, teacher = random(12, 3, device=device), random(5000, 3, seed=2, device=device)
    with _Largest() as largest:
        kernels.linear_kl(x, weight, y, teacher, chunk_bytes=1 << 15, keep_bytes=1 << 16).sum().backward()
    assert largest.num_bytes < 100_000  # the logits take 240,000


def test_kl_refusals(device):
    x, weight, y, teacher, rows, teacher_rows = kl_case(torch.float32, device)
    for change, message in (
        ((x, weight, y, teacher[1:]), "320 columns .* 319"),
        ((x, weight, y.double(), teacher), "float32 .*float64 must be of one vocabulary and type"),
        ((x, weight, y, teacher), "7 rows of the policy for 15 of the teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.linear_kl(*change, rows=rows)
    with pytest.raises(ValueError, match="needs the group"):
        kernels.linear_kl(x, weight, y, teacher, rows=rows, teacher_rows=teacher_rows, sequence_parallel=True)


@pytest.mark.parametrize("seed", (0, 1))
def test_gradcheck_in_float64(seed, device):
    logits = random(3, 7, seed=seed, dtype=torch.float64, device=device).requires_grad_()
    x = random(3, 4, seed=seed, dtype=torch.float64, device=device).requires_grad_()
    weight = random(7, 4, seed=seed + 9, dtype=torch.float64, device=device).requires_grad_()
    tokens = random_tokens(6, 3, device=device)
    options = {"vocab_size": 6, "temperature": 0.8}
    assert torch.autograd.gradcheck(lambda z: kernels.token_log_probs(z, tokens, **options), logits)
    options |= {"keep_bytes": 0, "chunk_bytes": 1}
    assert torch.autograd.gradcheck(lambda a, b: kernels.linear_log_probs(a, b, tokens, **options), (x, weight))
    y, teacher = (random(n, 2, seed=seed + 5, dtype=torch.float64, device=device) for n in (3, 7))
    assert torch.autograd.gradcheck(lambda a, b: kernels.linear_kl(a, b, y, teacher, **options), (x, weight))


# -- tensor parallelism --------------------------------------------------------------------------------------------

TP_VOCAB, TP_COLUMNS = 45, 64  # with 4 ranks the last one holds padding alone


def _tensor_parallel_rank():
    rank = mesh(4, 1, 1).rank
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for tp, group, place in ((2, pairs[rank // 2], rank % 2), (4, dist.group.WORLD, rank)):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
            _check_tensor_parallel(tp, group, place, dtype, tolerance)


def _check_tensor_parallel(tp, group, place, dtype, tolerance):
    columns = slice(place * TP_COLUMNS // tp, (place + 1) * TP_COLUMNS // tp)
    sequence = slice(place * 8 // tp, (place + 1) * 8 // tp)
    rows, tokens = torch.tensor([1, 2, 5, 8, 13, 15]), torch.tensor([0, 44, 20, 3, 31, 33])
    banned = torch.tensor([1, 0, 1, 0, 0, 1]).bool(), torch.tensor([7, 40])
    common = {"rows": rows, "vocab_size": TP_VOCAB, "temperature": 0.9, "banned": banned}
    mine = {**common, "vocab_start": columns.start, "group": group}
    incoming = [random(6, seed=i, dtype=dtype) for i in range(2)]

    logits = random(8, 2, TP_COLUMNS, dtype=dtype)
    hidden, weight = random(8, 2, 12, dtype=dtype), random(TP_COLUMNS, 12, seed=1, dtype=dtype)
    linear = functools.partial(kernels.linear_log_probs, chunk_bytes=1, keep_bytes=0)
    over_sequence = functools.partial(linear, sequence_parallel=True)
    whole = slice(None)
    cases = (
        (kernels.token_log_probs, kernels.token_log_probs, (logits,), ((whole, whole, columns),)),
        (linear, linear, (hidden, weight), ((whole,), (columns,))),
        (linear, over_sequence, (hidden, weight), ((sequence,), (columns,))),
    )
    for alone, together, inputs, parts in cases:
        full = [x.clone().requires_grad_() for x in inputs]
        expected = alone(*full, tokens, **common)
        torch.autograd.backward(expected, incoming)
        shards = [x[part].clone().requires_grad_() for x, part in zip(inputs, parts, strict=True)]
        results = together(*shards, tokens, **mine)
        torch.autograd.backward(results, incoming)
        for got, want in zip(results, expected, strict=True):
            assert close(got, want, tolerance), (tp, together)
            everyone = [torch.empty_like(got) for _ in range(tp)]
            dist.all_gather(everyone, got.detach(), group=group)
            assert all(torch.equal(x, got) for x in everyone), "ranks differ"
        for shard, leaf, part in zip(shards, full, parts, strict=True):
            assert close(shard.grad, leaf.grad[part], tolerance), (tp, together)
    y, teacher = random(6, 5, seed=2, dtype=dtype), random(TP_COLUMNS, 5, seed=3, dtype=dtype)
    full = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = kernels.linear_kl(*full, y, teacher, **common, chunk_bytes=1, keep_bytes=0)
    expected.backward(incoming[0])
    for parallel, part in ((False, whole), (True, sequence)):
        shards = [hidden[part].clone().requires_grad_(), weight[columns].clone().requires_grad_()]
        kl = kernels.linear_kl(*shards, y, teacher[columns], **mine, sequence_parallel=parallel)
        kl.backward(incoming[0])
        assert close(kl, expected, tolerance), (tp, parallel)
        for shard, leaf, place_of in zip(shards, full, (part, columns), strict=True):
            assert close(shard.grad, leaf.grad[place_of], tolerance), (tp, parallel)
    # every rank refuses a token of the padding, wherever its columns are
    with pytest.raises(ValueError, match="outside the vocabulary"):
        kernels.token_log_probs(logits[..., columns], tokens + 12, **mine)


def test_ranks_that_share_a_vocabulary_agree_with_one(device, worlds):
    """TP 2 and 4, with and without sequence parallelism, in one world of four gloo ranks."""
    if device == "cuda":
        pytest.skip("gloo ranks are on the CPU")
    worlds(4).run(_tensor_parallel_rank)


# -- advantages and losses -----------------------------------------------------------------------------------------


def gae_oracle(b, given, kl_coef, gamma, gae_lambda):
    """In float64, a token at a time, from the definition: from one token that the mask selects to the next."""
    mask = b["mask"].cpu()
    log_probs, ref, values = (b[name].double().cpu() for name in ("log_probs", "ref", "values"))
    advantages, rewards = torch.zeros(mask.shape, dtype=torch.float64), torch.zeros(len(mask), dtype=torch.float64)
    for row in range(len(mask)):
        later = following = 0.0
        for i, t in enumerate(reversed([t for t in range(mask.shape[1]) if mask[row, t]])):
            reward = -kl_coef * max(-20, min(20, float(log_probs[row, t] - ref[row, t])))
            if given.dim() == 2:
                reward += float(given[row, t])
            elif i == 0:
                reward += float(given[row])
            rewards[row] += reward
            later = reward + gamma * following - float(values[row, t]) + gamma * gae_lambda * later
            advantages[row, t], following = later, float(values[row, t])
    return advantages, torch.where(mask, advantages + values, 0.0), rewards


def token_batch(num_rows, num_tokens, device, gaps=False):
    """Ragged responses; row 0 has none, row 1 is full; what the mask leaves out is not a number.

    Args:
        gaps: in all rows but 1: anywhere, around the borders of blocks, over whole blocks, and over the last ones.
    """
    generator = torch.Generator().manual_seed(num_tokens)
    mask = torch.zeros(num_rows, num_tokens, dtype=torch.bool)
    for row in range(2, num_rows):
        start, end = sorted(torch.randint(0, num_tokens + 1, (2,), generator=generator).tolist())
        mask[row, start:end] = True
    mask[1:2] = True
    if gaps:
        t = torch.arange(num_tokens)
        mask[2:] &= torch.rand(num_rows - 2, num_tokens, generator=generator) < 0.9
        mask[3:4] = (t + 1) % BLOCK > 1  # neither the last of a block nor the first of the next
        mask[4:5] = (t == 0) | (t == num_tokens - 1)
        mask[5:6] = t < num_tokens // 3
        mask[6:7] = t % BLOCK == BLOCK // 2
    b = {name: random(num_rows, num_tokens, seed=i) for i, name in enumerate(("log_probs", "ref", "values", "returns"))}
    for x in b.values():
        x[~mask] = torch.nan
    return {name: x.to(device) for name, x in (b | {"mask": mask}).items()}


@pytest.mark.parametrize("of_tokens", (False, True))
@pytest.mark.parametrize("gaps", (False, True))
@pytest.mark.parametrize("num_tokens", (1, 2, 37, BLOCK, 2 * BLOCK + 52))
def test_advantages(num_tokens, gaps, of_tokens, device):
    b = token_batch(7, num_tokens, device, gaps)
    given = random(7, num_tokens, seed=5, device=device) if of_tokens else random(7, seed=5, device=device, scale=3)
    if of_tokens:
        given[~b["mask"]] = torch.nan
    settings = {"kl_coef": 0.3, "gamma": 0.99, "gae_lambda": 0.95}
    got = kernels.kl_advantages(b["log_probs"], b["ref"], b["values"], given, b["mask"], **settings)
    advantages, returns, rewards = gae_oracle(b, given, *settings.values())
    assert close(got.advantages, advantages, 2e-6) and close(got.returns, returns, 2e-6)
    assert close(got.rewards, rewards, 2e-6)
    counted = advantages[b["mask"].cpu()]
    moments = torch.stack([torch.tensor(float(len(counted))).double(), counted.mean(), counted.var(correction=0)])
    assert close(got.moments, moments, 2e-6)
    assert not got.advantages[~b["mask"]].any() and not got.returns[~b["mask"]].any()


def test_variance_of_advantages_far_from_zero(device):
    """The mean of squares minus the square of the mean would leave no digit of it."""
    shape = (5, 3 * BLOCK)
    zeros, mask = torch.zeros(shape, device=device), torch.ones(shape, dtype=torch.bool, device=device)
    values = random(*shape, device=device, scale=0.1) - 1000
    got = kernels.kl_advantages(
        zeros, zeros, values, torch.zeros(5, device=device), mask, kl_coef=0.0, gamma=0.0, gae_lambda=0.0
    )
    assert float(got.moments[2]) == pytest.approx(float(values.double().var(correction=0)), rel=1e-4)


def test_advantages_keep_a_nan_within_the_mask(device):
    b = token_batch(3, 8, device)
    b["log_probs"][1, 3] = torch.nan
    settings = {"kl_coef": 0.3, "gamma": 1.0, "gae_lambda": 0.9}
    got = kernels.kl_advantages(
        b["log_probs"], b["ref"], b["values"], torch.zeros(3, device=device), b["mask"], **settings
    )
    assert got.advantages[1, :4].isnan().all() and got.advantages[1, 4:].isfinite().all()


@pytest.mark.parametrize("of_tokens", (False, True))
@pytest.mark.parametrize("num_tokens", (37, 2 * BLOCK + 52))
def test_a_trajectory_with_gaps_is_the_one_without_them(num_tokens, of_tokens, device):
    b = token_batch(7, num_tokens, device, gaps=True)
    mask = b["mask"].cpu()
    given = random(7, num_tokens, seed=5, device=device) if of_tokens else random(7, seed=5, device=device)
    fields = [b["log_probs"], b["ref"], b["values"], given, b["mask"]]

    def collapsed(x):
        """What the mask selects in each row, from its start."""
        found = torch.zeros(x.shape, dtype=x.dtype)
        for row in range(len(x)):
            kept = x[row].cpu()[mask[row]]
            found[row, : len(kept)] = kept
        return found.to(device)

    settings = {"kl_coef": 0.3, "gamma": 0.97, "gae_lambda": torch.linspace(0.2, 1, 7, device=device)}
    got = kernels.kl_advantages(*fields, **settings)
    want = kernels.kl_advantages(*(collapsed(x) if x.dim() == 2 else x for x in fields), **settings)
    assert want.moments[0] > 0
    for a, e in ((collapsed(got.advantages), want.advantages), (collapsed(got.returns), want.returns)):
        assert close(a, e, 1e-6)
    assert close(got.rewards, want.rewards, 1e-6) and close(got.moments, want.moments, 1e-6)


def test_rewards_of_another_shape_are_refused(device):
    x = torch.zeros(1, 6, device=device)
    with pytest.raises(ValueError, match=r"rewards \(1, 2\) must be \(B,\) or \(B, T\) of a mask \(1, 6\)"):
        kernels.kl_advantages(x, x, x, x[:, :2], x.bool(), kl_coef=0.1)


@pytest.mark.parametrize("whitened", (False, True))
@pytest.mark.parametrize("num_tokens", (1, 50, 1500))
def test_policy_loss_and_gradient(num_tokens, whitened, device):
    b = token_batch(5, num_tokens, device)
    moments = torch.tensor([9.0, 0.4, 2.5], device=device) if whitened else None
    x = b["log_probs"].clone().requires_grad_()
    got = kernels.clipped_policy_loss(x, b["ref"], b["values"], b["mask"], moments=moments)
    (got.loss * 1.7).backward()
    exact = b["log_probs"].double().requires_grad_()
    m = b["mask"]
    log_ratio = torch.where(m, exact - b["ref"].double(), 0.0)
    advantages = torch.where(m, b["values"].double(), 0.0)
    if whitened:
        advantages = torch.where(m, (advantages - 0.4) / 2.5**0.5, 0.0)
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(0.8, 1.2) * advantages
    loss = -torch.minimum(plain, clipped).sum()
    (loss * 1.7).backward()
    want = (loss, ratio[m].sum(), (clipped < plain).double().sum(), (ratio - 1 - log_ratio)[m].sum())
    for a, e in zip(got, want, strict=True):
        assert close(a, e, 2e-6), (got, want)
    assert close(x.grad, exact.grad.nan_to_num(), 2e-6) and not x.grad[~m].any()


@pytest.mark.parametrize("kl", (None, "k1", "k2", "k3", "k3+"))
@pytest.mark.parametrize("kind", ("ppo", "gspo", "cispo", "reinforce"))
@pytest.mark.parametrize("num_tokens", (37, 1500))
def test_kinds_of_policy_loss(num_tokens, kind, kl, device):
    """On a device as by the reference in float64, which test_ppo_arithmetic.py holds to the papers."""
    b = token_batch(5, num_tokens, device)
    options = dict(kind=kind, clip_ratio=0.1, clip_ratio_high=0.3, dual_clip=1.5, kl_coef=0.2) | (
        {"kl": kl} if kl else {}
    )

    def run(dtype):
        x, ref, change, advantages = (b[n].to(dtype, copy=True) for n in ("log_probs", "ref", "returns", "values"))
        old = (x + 0.4 * change).float().to(dtype)
        x.requires_grad_()
        weights = torch.linspace(0, 2, 5, device=device, dtype=dtype)
        ref = ref if kl else None
        found = kernels.clipped_policy_loss(
            x, old, advantages, b["mask"], ref_log_probs=ref, weights=weights, **options
        )
        (found.loss * 1.7).backward()
        return *found, x.grad

    for got, want in zip(run(torch.float32), run(torch.float64), strict=True):
        assert close(got, want, 2e-5), (got, want)  # sums that cancel


@pytest.mark.parametrize("num_tokens", (1, 50, 1500))
def test_value_loss_and_gradient(num_tokens, device):
    b = token_batch(5, num_tokens, device)
    x = b["values"].clone().requires_grad_()
    got = kernels.clipped_value_loss(x, b["ref"], b["returns"], b["mask"])
    (got.loss * 1.7).backward()
    exact = b["values"].double().requires_grad_()
    old, returns = b["ref"].double(), b["returns"].double()
    m = b["mask"]
    clipped = old + (exact - old).clamp(-0.2, 0.2)
    error, clipped_error = (torch.where(m, (v - returns) ** 2, 0.0) for v in (exact, clipped))
    loss = 0.5 * torch.maximum(error, clipped_error).sum()
    (loss * 1.7).backward()
    assert close(got.loss, loss, 2e-6) and close(got.error, error.sum(), 2e-6)
    is_far = (b["values"] - b["ref"]).abs() > 0.2
    assert float(got.clip_fraction) == float(((clipped_error > error) & is_far).sum())
    assert close(x.grad, exact.grad.nan_to_num(), 2e-6) and not x.grad[~m].any()


def test_a_loss_beyond_the_clamp_has_no_gradient(device):
    x = torch.tensor([[25.0, -25.0, 0.1]], device=device, requires_grad=True)
    old, minus = torch.zeros(1, 3, device=device), -torch.ones(1, 3, device=device)
    kernels.clipped_policy_loss(x, old, minus, torch.ones(1, 3, device=device)).loss.backward()
    assert x.grad[0, 0] == 0 and x.grad[0, 1] == 0 and x.grad[0, 2] > 1


# -- which implementation ------------------------------------------------------------------------------------------


def test_the_variable_chooses(device, monkeypatch):
    x = torch.zeros(2, 3, device=device)
    monkeypatch.setenv("RLHF_KERNELS", "reference")
    assert not use_triton(x)
    monkeypatch.setenv("RLHF_KERNELS", "fast")
    with pytest.raises(ValueError, match="RLHF_KERNELS='fast' is unknown"):
        use_triton(x)
    monkeypatch.setenv("RLHF_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(x) and not use_triton(x.double())
    monkeypatch.delenv("TRITON_INTERPRET")
    if device == "cuda":
        assert use_triton(x)
    else:
        with pytest.raises(RuntimeError, match="needs CUDA tensors or TRITON_INTERPRET=1"):
            use_triton(x)


def test_without_the_variable_the_device_chooses(device, monkeypatch):
    monkeypatch.delenv("RLHF_KERNELS", raising=False)
    assert use_triton(torch.zeros(1, device=device)) == (device == "cuda")


def test_cache_sized_chunks_cover_every_row(device, monkeypatch):
    """The result does not depend on how rows are cut."""
    logits, tokens = random(33, 50, device=device), random_tokens(50, 33, device=device)
    whole = reference.token_stats(logits, tokens, None, None, 1.0)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 50 * 4 * 7)
    assert torch.equal(reference.token_stats(logits, tokens, None, None, 1.0), whole)


# -- attention over a cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "groups", "queries", "dim", "window", "longest"),
    [
        (1, 1, 1, 8, None, 200), (5, 2, 4, 64, None, 200), (3, 4, 1, 80, 5, 200), (4, 2, 7, 16, 70, 200),
        (2, 1, 20, 128, 1, 200), (5, 1, 3, 16, None, 1030), (3, 2, 2, 80, 600, 1030),
    ],
)  # fmt: skip
def test_cached_attention(device, dtype, batch, groups, queries, dim, window, longest):
    """Sequences of 1 to 200 positions, their blocks anywhere in a cache that holds what is not a number where nobody
    should look; the first block is in all of them. In Triton those of more are split, and programs of short ones have
    nothing to do."""
    size = 16 if dim > 64 else 32
    lengths = torch.tensor([1, longest, 64, 65, 17][:batch])
    columns = -(-int(lengths.max()) // size)
    numbers = 1 + torch.randperm(batch * columns, generator=torch.Generator().manual_seed(2)).view(batch, columns)
    numbers[:, 0] = numbers[0, 0]
    table = torch.zeros(batch, columns + 3, dtype=torch.int64)[:, 1 : columns + 1]  # rows that do not lie side by side
    table.copy_(numbers.masked_fill(torch.arange(columns) * size >= lengths.unsqueeze(1), 0))
    cache = random(2, 1 + batch * columns, groups, size, dim, dtype=dtype)
    q = random(batch, groups, queries, dim, seed=1, dtype=dtype)
    used = torch.zeros(1 + batch * columns, size, dtype=torch.bool)
    expected = torch.empty(q.shape, dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        t = torch.arange(max(0, length - (window or length)), length)
        blocks, offsets = table[b, t // size], t % size
        used[blocks, offsets] = True
        keys, values = cache[:, blocks, :, offsets].double().unbind(1)  # (T, G, D)
        scores = torch.einsum("gnd,tgd->gnt", q[b].double(), keys) / dim**0.5
        expected[b] = torch.einsum("gnt,tgd->gnd", scores.softmax(-1), values)
    cache.masked_fill_(~used[None, :, None, :, None], torch.nan)
    on_device = (x.to(device) for x in (q, cache, table, lengths))
    found = kernels.cached_attention(*on_device, window)
    assert found.dtype is dtype
    assert close(found, expected, GRADIENT[dtype] * 2)


def test_splits_follow_from_shapes():
    """Until four programs are on each of 132 multiprocessors, and none has fewer than 256 positions of the longest."""
    splits = pytest.importorskip("rlhf_kernels.attention_triton").num_splits
    found = [splits(*shape) for shape in ((8, 8, 2048), (1, 8, 1 << 17), (8, 8, 511), (64, 8, 4096), (600, 1, 4096))]
    assert found == [8, 64, 1, 1, 1]


def test_parts_of_split_attention(device):
    """The same bits each time, and nothing of parts that nobody wrote."""
    q, lengths, table = random(2, 2, 3, 16), torch.tensor([1030, 3]), torch.arange(66).view(2, 33) % 40
    cache = random(2, 40, 2, 32, 16, seed=1)
    on_device = [x.to(device) for x in (q, cache, table, lengths)]
    found = [kernels.cached_attention(*on_device) for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and found[0].isfinite().all()
