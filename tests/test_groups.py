"""Advantages of groups against the papers' formulas in float64, a response after the other, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import rlhf_kernels as kernels

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "none")


def standardised(values, counts, correction, eps):
    repeated = np.repeat(values, counts)
    std = math.sqrt(((repeated - repeated.mean()) ** 2).sum() / (len(repeated) - correction))
    return (values - repeated.mean()) / (std + eps)


def oracle(scores, groups, kind, counts, correction, eps):
    found = np.zeros(len(scores))
    for i, score in enumerate(scores):
        members = np.flatnonzero(groups == groups[i])
        same, others = scores[members], scores[members[members != i]]
        if kind == "grpo" and len(members) > 1:
            std = math.sqrt(((same - same.mean()) ** 2).sum() / (len(same) - correction))
            found[i] = (score - same.mean()) / (std + eps)
        elif kind in ("dr_grpo", "reinforce++_baseline"):
            found[i] = score - same.mean()
        elif kind == "rloo":
            found[i] = score - others.mean() if len(others) else 0.0
        elif kind in ("none", "reinforce++"):
            found[i] = score
    return standardised(found, counts, correction, eps) if kind.startswith("reinforce++") else found


@pytest.mark.parametrize("correction", (0, 1))
@pytest.mark.parametrize("counted", (False, True), ids=["responses", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_groups_in_any_order(kind, counted, correction):
    rng = np.random.default_rng(3)
    groups = rng.permutation(np.repeat([7, 2, 40, -1, 5], [1, 2, 8, 5, 4]))
    scores = rng.standard_normal(20).astype(np.float32).astype(np.float64)
    scores[groups == 5] = 0.1  # a group that tells nothing
    counts = rng.integers(1, 30, 20)
    found = kernels.group_advantages(
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(groups),
        kind,
        counts=torch.tensor(counts) if counted else None,
        correction=correction,
        eps=1e-4,
    )
    expected = oracle(scores, groups, kind, counts if counted else np.ones(20, dtype=int), correction, 1e-4)
    assert found.dtype is torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_by_hand():
    """Groups of (1, 0, 0, 1) and (3, 1)."""
    scores, groups = torch.tensor([1.0, 0, 0, 1, 3, 1]), torch.tensor([0, 0, 0, 0, 1, 1])

    def found(kind, **options):
        return kernels.group_advantages(scores, groups, kind, eps=0.0, **options).tolist()

    std, third = math.sqrt(1 / 3), 2 / 3
    assert found("grpo") == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std, 0.5**0.5, -(0.5**0.5)])
    assert found("grpo", correction=0) == pytest.approx([1, -1, -1, 1, 1, -1])
    assert found("dr_grpo") == pytest.approx([0.5, -0.5, -0.5, 0.5, 1, -1])
    assert found("rloo") == pytest.approx([third, -third, -third, third, 2, -2])
    # mean 1, squares 0 1 1 0 4 0; about the groups' means 1/4 four times and 1 twice
    assert found("reinforce++", correction=0) == pytest.approx([0, -1, -1, 0, 2, 0])
    std = math.sqrt(3 / 5)
    assert found("reinforce++_baseline") == pytest.approx([x / std for x in (0.5, -0.5, -0.5, 0.5, 1, -1)])
    assert found("none") == scores.tolist()
    assert found("remax", baselines=torch.tensor([1.0, 1, 1, 1, 0.5, 0.5])) == [0, -1, -1, 0, 2.5, 0.5]


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("scores", ([0.1] * 3, [0.7]), ids=["equal scores", "alone"])
def test_a_group_without_a_difference_tells_nothing(kind, scores):
    found = kernels.group_advantages(torch.tensor(scores), torch.zeros(len(scores), dtype=torch.int64), kind)
    assert found.tolist() == [0.0] * len(scores)


def test_whitening_over_the_batch_of_one_score_is_0():
    for kind in ("reinforce++", "reinforce++_baseline"):
        assert kernels.group_advantages(torch.tensor([0.3]), torch.tensor([0]), kind).tolist() == [0.0]


@pytest.mark.parametrize(
    ("kind", "of", "wanted"),
    [
        ("truncated", "tokens", [[2, 0.5, 0.0, 1.25], [0.25, 2, 2, 0]]),
        ("masked", "tokens", [[2, 0.5, 0.0, 1.25], [0, 0, 2, 0]]),
        ("truncated", "sequences", [[1.25, 1.25, 0.0, 1.25], [1.5, 1.5, 1.5, 0]]),
        ("masked", "sequences", [[1.25, 1.25, 0.0, 1.25], [1.5, 1.5, 1.5, 0]]),
        ("masked", "sequences of one", [[2, 0.0, 0.0, 0.0], [0, 0, 0, 0]]),
    ],
)
def test_importance_by_hand(kind, of, wanted):
    """Of probabilities 2, 1/2, (none), 5/4 times the sampler's, and 1/4, 3, 2 times; a row has gaps."""
    ratios = torch.tensor([[2, 0.5, math.nan, 1.25], [0.25, 3, 2, math.nan]])
    mask = ~ratios.isnan()
    if of == "sequences of one":
        mask[0, 1:], mask[1, 1:], of = False, False, "sequences"
    log_probs = torch.full_like(ratios, -1.5)
    found = kernels.importance_weights(log_probs, log_probs - ratios.log(), mask, kind, of=of, limit=2.0)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32))


@pytest.mark.parametrize(
    ("scores", "groups", "kind", "message"),
    [
        (torch.zeros(2), torch.zeros(2), "gpro", "'gpro' are unknown: grpo, dr_grpo, rloo"),
        (torch.zeros(2), torch.zeros(3), "grpo", r"scores \(2,\) and groups \(3,\) must both be \(B,\)"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "grpo", r"must both be \(B,\)"),
        (torch.zeros(2), torch.zeros(2), "remax", "remax need baselines"),
    ],
    ids=["kind", "lengths", "shape", "baselines"],
)
def test_refusals(scores, groups, kind, message):
    with pytest.raises(ValueError, match=message):
        kernels.group_advantages(scores, groups, kind)
