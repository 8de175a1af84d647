"""How rows are split into micro-batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_engine.config import DataConfig, ModelConfig, RunConfig
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.data.dataset import build_datasets
from rlhf_engine.data.sources import mixture
from rlhf_engine.data.tokenizer import Tokenizer
from rlhf_engine.experience import pad_rows
from rlhf_engine.models.role import RoleModel
from rlhf_engine.models.stream import forward
from rlhf_engine.models.work import Work, pack


def work(lengths: list[int], budget: int | None, dp=1, dp_rank=0, tp=1, size=2, together=1) -> Work:
    mesh = SimpleNamespace(dp=dp, dp_rank=dp_rank, tp=tp, device="cpu")
    role = SimpleNamespace(mesh=mesh, micro_batch_tokens=budget, width_unit=tp)
    tokens, found = pad_rows([[1] * length for length in lengths], tp)
    return Work(role, {"tokens": tokens, "lengths": found}, None, size, together)


def least(widths: list[int], budget: int, cost: int) -> int:
    """What the cheapest cut into micro-batches computes, by trying all of them."""
    if not widths:
        return 0
    fits = [n for n in range(1, len(widths) + 1) if n == 1 or n * widths[0] <= budget]
    return min(n * widths[0] + cost + least(widths[n:], budget, cost) for n in fits)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(1, 200), st.integers(0, 50))
def test_nothing_computes_less(lengths, budget, cost):
    widths = sorted(lengths, reverse=True)
    ends = pack(widths, budget, cost)
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    firsts = [widths[start] for start in [0, *ends[:-1]]]
    assert sum(sizes) == len(widths) and min(sizes) > 0
    assert all(n == 1 or n * width <= budget for n, width in zip(sizes, firsts, strict=True))
    assert sum(n * width + cost for n, width in zip(sizes, firsts, strict=True)) == least(widths, budget, cost)


@settings(max_examples=200)
@given(st.data())
def test_packing(data):
    """Every row once, what belongs together on one replica, alike on all replicas, no more tokens than told."""
    dp, tp, together, size = (data.draw(st.sampled_from([1, 2, 3])) for _ in range(4))
    groups = dp * data.draw(st.integers(1, 12))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=groups * together, max_size=groups * together))
    budget = data.draw(st.one_of(st.none(), st.integers(1, 300)))
    packed = work(lengths, budget, dp, 0, tp, size * together, together=together)
    split = packed.parts
    most = budget or size * together * packed.batch["tokens"].shape[1]  # by default that of so many longest rows
    assert sorted(row for rows, _ in split for row in rows.flatten().tolist()) == list(range(len(lengths)))
    for rows, width in split:
        assert width % tp == 0 and (rows.shape[1] * width <= most or rows.shape[1] == together)
        assert max(lengths[i] for i in rows.flatten()) + tp > width >= max(lengths[i] for i in rows.flatten())
        first = rows.view(dp, -1, together)[:, :, :1]
        assert torch.equal(rows.view(dp, -1, together), first + torch.arange(together)) and not (first % together).any()
    assert [width for _, width in split] == sorted((width for _, width in split), reverse=True)
    for dp_rank in range(dp):
        mine = [work(lengths, budget, dp, dp_rank, tp, together=together).cut(*part) for part in split]
        assert sum(int(batch["tokens"].sum()) for batch in mine) == sum(int(batch["lengths"].sum()) for batch in mine)


def test_rows_are_filled_up_to_a_unit():
    """Beyond the longest too, with zeros."""
    filled = work([5, 18, 3], 32)
    filled.role.width_unit = 16
    assert [(rows.tolist(), width) for rows, width in filled.parts] == [([[1]], 32), ([[0, 2]], 16)]
    tokens = filled.cut(torch.tensor([[1]]), 32)["tokens"]
    assert tokens.shape == (1, 32) and tokens[:, 18:].eq(0).all() and tokens[:, :18].equal(filled.batch["tokens"][1:2])


def test_rows_of_every_shape_come_back_whole():
    """From micro-batches of several widths: figures of a row as they are, and those of tokens padded."""
    tokens, lengths = pad_rows([[5, 6], [7] * 90, [8] * 5, [9] * 90], 1)
    sizes = dict(num_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
    with one_rank() as mesh:
        role = RoleModel("policy", ModelConfig(**sizes, vocab_size=32), mesh, "scalar", torch.float32)
        batch = {"tokens": tokens, "lengths": lengths}
        figures = forward(role, batch, lambda output, batch: torch.stack([batch["lengths"], -batch["lengths"]], 1), 2)
        of_tokens = forward(role, batch, lambda output, batch: batch["tokens"].unsqueeze(1).repeat(1, 2, 1), 2)
        assert len(Work(role, batch, None, 2).parts) > 1
    assert figures.tolist() == [[2, -2], [90, -90], [5, -5], [90, -90]]
    assert torch.equal(of_tokens, tokens.unsqueeze(1).repeat(1, 2, 1))


@pytest.mark.parametrize(("phase", "limit"), [("sft", 0.1), ("reward", 0.15)])
def test_padding_of_real_dialogues(shared, tmp_path, phase, limit):
    """On hh-rlhf's lengths padding would be most of what is computed, and is a tenth at most. The two sides of a pair
    differ in length, which alone is a tenth."""
    sources = mixture([str(shared / "data" / "hh_harmless_base_test.jsonl.gz")], 0, 0, 1)
    tokenizer = Tokenizer(str(shared / "tokenizers" / "mistral_instruct_tokenizer_240323.model.v3"))
    config = RunConfig(data=DataConfig(max_seq_len=1024, max_prompt_len=900, cache_dir=str(tmp_path)))
    drawn = build_datasets([phase], sources, tokenizer, config)[phase].batch(0, 256)
    sides = [[e.chosen] if phase == "sft" else [e.chosen, e.rejected] for e in drawn]
    lengths = [len(e.prompt) + len(answer) for e, answers in zip(drawn, sides, strict=True) for answer in answers]

    whole = max(lengths) * len(lengths)
    split = work(lengths, None, dp=2, size=8 * len(sides[0]), together=len(sides[0])).parts
    computed = sum(rows.numel() * width for rows, width in split)
    assert 1 - sum(lengths) / whole > 0.6 and 1 - sum(lengths) / computed < limit
