"""What layers are made of, against float64, forward and backward, and rounding that is the same wherever it is done.

As test_kernels.py, which has the tolerances, it is run once more under Triton's interpreter. There float16 is rounded
as on a GPU, so that bits are compared in it.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from test_kernels import DEVICES, GRADIENT, _needs_its_device, close, random  # noqa: F401

import rlhf_kernels as kernels
from rlhf_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.parametrize("device", DEVICES, scope="module")


def compare(fn, oracle, inputs, incoming):
    """Forward and backward of inputs in some type; each may be rounded a few times."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = fn(*leaves), oracle(*exact)
    assert found.dtype is inputs[0].dtype and close(found, expected, 3 * GRADIENT[found.dtype])
    found.backward(incoming.to(found.dtype))
    expected.backward(incoming.to(found.dtype).double())
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype is leaf.dtype and close(leaf.grad, wanted.grad, 3 * GRADIENT[leaf.dtype])


def norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


# -- rms_norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 17), (3, 2, 5, 64), (300, 96), (2, 5000), (0, 8)], ids=str)
def test_norm(shape, dtype, device):
    x = random(*shape, dtype=dtype, device=device, scale=3)
    weight = random(shape[-1], seed=1, dtype=dtype, device=device) + 1
    incoming = random(*shape, seed=2, device=device)
    compare(lambda *both: kernels.rms_norm(*both, 1e-5), lambda *both: norm(*both, 1e-5), [x, weight], incoming)


def test_norm_of_heads_that_do_not_lie_side_by_side(device):
    qkv, weight = random(6, 2, 3, 5, 16, device=device), random(16, seed=1, device=device)
    x = qkv[:, :, :, 1:3]
    incoming = random(*x.shape, seed=2, device=device)
    compare(lambda *both: kernels.rms_norm(*both, 1e-6), lambda *both: norm(*both, 1e-6), [x, weight], incoming)


def test_norm_of_small_numbers(device):
    """Their squares are less than eps: 1e-3 / sqrt(1e-6 + 1e-5)."""
    x = torch.full((1, 32), 1e-3, device=device)
    assert close(kernels.rms_norm(x, torch.ones_like(x[0]), 1e-5), torch.full((1, 32), 0.30151134), 1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 2000)], ids=str)
def test_norm_of_a_sum(shape, dtype, device):
    """The sum is rounded and stays; its norm has the bits of a norm of it alone, which is the trainer's."""
    x, add = (random(*shape, seed=i, dtype=dtype, device=device) for i in range(2))
    weight = random(shape[-1], seed=2, dtype=dtype, device=device)
    stream = x.clone()
    found = kernels.rms_norm(stream, weight, 1e-5, add)
    assert torch.equal(stream, x + add)
    weight.requires_grad_()
    assert torch.equal(found, kernels.rms_norm(x + add, weight, 1e-5).detach())


# -- swiglu --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (4, 3, 34), (2, 2600), (0, 8)], ids=str)
def test_swiglu(shape, dtype, device):
    x = random(*shape, dtype=dtype, device=device, scale=2)
    incoming = random(*shape[:-1], shape[-1] // 2, seed=1, device=device)

    def oracle(x):
        gate, up = x.chunk(2, -1)
        return gate / (1 + (-gate).exp()) * up

    compare(kernels.swiglu, oracle, [x], incoming)
    with torch.no_grad():
        assert close(kernels.swiglu(x), oracle(x.double()), 3 * GRADIENT[dtype])


def test_swiglu_far_out(device):
    """silu(-200) is 0 and silu(200) is 200, whose slope is 1."""
    x = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=device, requires_grad=True)
    out = kernels.swiglu(x)
    out.sum().backward()
    assert out.tolist() == [[0.0, 600.0]] and x.grad.tolist() == [[0.0, 3.0, 0.0, 200.0]]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_swiglu_rounds_as_two_operations(dtype, device):
    """silu(1.0) is 0.7310586, in bfloat16 0.73046875, and in float16 0.7310791."""
    x = torch.tensor([[1.0, 3.0]], dtype=dtype, device=device)
    active = {torch.bfloat16: 0.73046875, torch.float16: 0.73095703125}[dtype]
    assert kernels.swiglu(x).item() == torch.tensor(active * 3).to(dtype).item()


# -- rotary positions ----------------------------------------------------------------------------------------------


def tables(length, dim, dtype, device):
    """Cosines and sines `(S, 1, 1, D)`, both halves alike."""
    angles = torch.outer(torch.arange(length), 100.0 ** -(torch.arange(0, dim, 2) / dim)).repeat(1, 2)
    return (x.to(dtype)[:, None, None].contiguous().to(device) for x in (angles.cos(), angles.sin()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (5, 3, 4, 16), (3, 2, 11, 20)], ids=str)
def test_rotate(shape, dtype, device):
    length, _, _, dim = shape
    cos, sin = tables(length, dim, dtype, device)
    x, incoming = random(*shape, dtype=dtype, device=device), random(*shape, seed=1, device=device)

    def oracle(x):
        """As complex numbers, of which each pair is a half's and the other's."""
        pairs = torch.complex(*x.chunk(2, -1)) * torch.complex(cos.double(), sin.double())[..., : dim // 2]
        return torch.cat([pairs.real, pairs.imag], -1)

    compare(lambda x: kernels.rotate(x, cos, sin), oracle, [x], incoming)


def test_rotate_rounds_as_megatron_does(device):
    """And takes heads as they lie in a projection, with any positions and rows."""
    cos, sin = tables(7, 16, torch.float16, device)
    x = random(7, 3, 2, 5, 16, dtype=torch.float16, device=device)[:, :, :, 1:3].flatten(2, 3)[:, :, 1:]
    half = torch.cat([-x[..., 8:], x[..., :8]], -1)
    assert torch.equal(kernels.rotate(x, cos, sin), x * cos + half * sin)
    leaf = x.clone().requires_grad_()
    incoming = random(*x.shape, seed=1, dtype=torch.float16, device=device)
    kernels.rotate(leaf, cos, sin).backward(incoming)
    turned = incoming * sin
    assert torch.equal(leaf.grad, incoming * cos + torch.cat([turned[..., 8:], -turned[..., :8]], -1))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize(
    ("groups", "queries", "dim", "parts"),
    [(2, 1, 8, "rotary"), (1, 4, 20, "norm"), (2, 3, 16, "bias rotary norm"), (3, 2, 16, "bias"), (1, 2, 16, "")],
    ids=str,
)
def test_attention_heads(groups, queries, dim, parts, dtype, device):
    """As the trainer's norm and rotation of queries and keys, and the cache has the latter where it is told."""
    count, heads, size = 3, queries + 2, 4
    qkv = random(count, groups, heads, dim, dtype=dtype, device=device)
    positions = torch.tensor([5, 0, 6])
    cos, sin = tables(7, dim, dtype, device)
    norms = kernels.HeadNorms(*(random(dim, seed=i, dtype=dtype, device=device) for i in (1, 2)), 1e-6)
    bias = random(groups * heads * dim, seed=3, dtype=dtype, device=device) if "bias" in parts else None
    wanted = qkv.clone() if bias is None else qkv + bias.view(groups, heads, dim)
    if "norm" in parts:
        wanted[:, :, :queries] = kernels.rms_norm(wanted[:, :, :queries], norms.query, norms.eps)
        wanted[:, :, queries] = kernels.rms_norm(wanted[:, :, queries], norms.key, norms.eps)
    rotary = None
    if "rotary" in parts:
        each = cos[positions, 0, 0], sin[positions, 0, 0]
        rotated = reference.rotate(wanted[:, :, :-1].flatten(1, 2).unsqueeze(1), *(x[:, None, None] for x in each))
        wanted[:, :, :-1] = rotated.view(count, groups, queries + 1, dim)
        rotary = tuple(x[:, None, None].repeat(1, 1, heads, 1) for x in each)
        rotary[1][..., : dim // 2] *= -1
        rotary[0][:, :, -1], rotary[1][:, :, -1] = 1, 0
    cache = torch.full((2, 3, groups, size, dim), 7.0, dtype=dtype, device=device)
    blocks, offsets = torch.tensor([2, 1, 2]), torch.tensor([3, 0, 1])
    places = torch.tensor(
        [
            ((part * 3 + block) * groups + group) * size + offset
            for block, offset in zip(blocks, offsets, strict=True)
            for group in range(groups)
            for part in range(2)
        ]
    ).to(device)
    chosen = norms if "norm" in parts else None
    all_of_them = kernels.attention_heads(qkv.clone(), bias, rotary, chosen)
    found = kernels.attention_heads(qkv.clone(), bias, rotary, chosen, cache, places)
    tolerance = 1e-6 if dtype is torch.float32 else 0
    assert close(all_of_them, wanted, tolerance) and close(found, wanted[:, :, :queries], tolerance)
    expected = torch.full_like(cache, 7.0)
    for i, group, part in itertools.product(range(count), range(groups), range(2)):
        expected[part, blocks[i], group, offsets[i]] = wanted[i, group, queries + part]
    assert close(cache, expected, tolerance)


# -- products that are added up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_products_add_up_unrounded(dtype, device):
    """A thousandth more than 256 is nothing in bfloat16, and is there after 3 products of 1 / 1024."""
    total = torch.full((2, 3), 256.0, dtype=torch.promote_types(dtype, torch.float32), device=device)
    a, b = torch.full((2, 1), 1 / 1024, dtype=dtype, device=device), torch.ones(1, 3, dtype=dtype, device=device)
    for _ in range(3):
        kernels.wide_addmm_(total, a, b)
    assert total.unique().tolist() == [256 + 3 / 1024]
