"""Blocks of the KV cache: who has them, how attention reads them, and how many rows will come to hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_engine.rollout.admission import expected_blocks
from rlhf_engine.rollout.attention import BlockReading
from rlhf_engine.rollout.cache import BLOCK, KVCache, Rows, num_blocks
from rlhf_engine.rollout.prefill import batches, padded_width
from rlhf_kernels import reference

NONE = np.zeros(0, np.int64)


def rows(count: int, columns: int = 4, groups: int = 2, dim: int = 8) -> Rows:
    return Rows(KVCache(2, groups, dim, count, torch.float32, torch.device("cpu")), columns)


def test_rows_get_blocks_as_they_grow_and_give_them_back():
    found = rows(7)
    assert num_blocks(0) == 0 and num_blocks(1) == num_blocks(32) == 1 and num_blocks(33) == 2
    found.add(8, 33, NONE)
    found.add(9, 32, NONE)
    assert found.table.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]] and found.counts.tolist() == [2, 1]
    found.extend(np.array([2, 1]))
    assert found.table.tolist() == [[1, 2, 4, 5], [3, 6, 0, 0]] and found.cache.num_free == 1
    found.remove([0])
    assert found.samples.tolist() == [9] and found.lengths.tolist() == [32] and found.cache.num_free == 5
    found.add(7, 70, NONE)
    assert found.table[1].tolist() == [1, 2, 4, 0]


def test_blocks_that_a_prompt_fills_are_kept_once():
    """Three samples of a prompt of 70 tokens: two blocks for all of them, and one for the rest of each."""
    found = rows(9)
    found.add(0, 70, NONE)
    found.add(1, 70, found.table[0, :2])
    found.add(2, 70, found.table[0, :2])
    assert found.table.tolist() == [[1, 2, 3, 0], [1, 2, 4, 0], [1, 2, 5, 0]]
    assert found.cache.num_free == 9 - 5
    assert found.shares == pytest.approx([5 / 3] * 3)
    found.remove([0, 2])
    assert found.cache.num_free == 9 - 3 and found.shares.tolist() == [3]
    found.remove([0])
    assert found.cache.num_free == 9


def test_blocks_move_together():
    found = rows(9)
    for sample in range(4):
        found.add(sample, 60, NONE)
    cache = found.cache
    cache.store += torch.arange(10).view(1, 1, -1, 1, 1, 1)
    found.remove([0, 1])
    assert found.table.tolist() == [[5, 6, 0, 0], [7, 8, 0, 0]]
    cache.close_up(np.unique(found.table[:, :2]), found.table)
    assert sorted(found.table[:, :2].flatten()) == [1, 2, 3, 4] and not found.table[:, 2:].any()
    assert cache.store[1, 1, found.table[:, :2], 0, 0, 0].tolist() == [[5, 6], [7, 8]]
    assert cache.readers.tolist() == [1] * 5 + [0] * 5


def test_blocks_of_rows_that_are_away_make_room():
    """A free block, one of another's own and one of three readers stand where the rows' blocks are to be."""
    found = rows(9)
    for sample in range(2):
        found.add(sample, 40, NONE)
    found.add(2, 40, found.table[0, :1])
    found.add(3, 40, found.table[0, :1])
    found.remove([1])
    away = Rows(found.cache, 4)
    found.move([0], away)
    found.add(4, 120, NONE)
    cache = found.cache
    cache.store += torch.arange(10).view(1, 1, -1, 1, 1, 1)
    before, readers = [rows.table.copy() for rows in (found, away)], cache.readers.copy()
    used = np.unique(found.table[found.table > 0])
    assert used.max() > len(used)
    cache.close_up(used, found.table, away.table)
    assert np.unique(found.table).tolist() == list(range(len(used) + 1))
    for rows_now, table in zip((found, away), before, strict=True):
        assert (cache.store[0, 1, rows_now.table, 0, 0, 0].numpy() == table).all()
        assert (cache.readers[rows_now.table] == readers[table]).all()
    assert sorted(cache.readers) == sorted(readers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_all_blocks_are_read_at_once(window, dtype):
    """Of rows of their own, rows that share, and blocks that nobody has."""
    found = rows(24)
    for sample, length in enumerate((5, 97, 64)):
        found.add(sample, length, NONE)
    found.remove([0])
    for sample, others in ((3, NONE), (4, [2, 2]), (5, [2, 2]), (6, [1, 1]), (7, NONE)):
        found.add(sample, 75, found.table[others[0], : len(others)] if len(others) else NONE)
    torch.manual_seed(0)
    store = torch.randn(found.cache.store[0].shape).to(dtype)
    q = torch.randn(len(found), 2, 3, 8).to(dtype)
    lengths, table = torch.tensor(found.lengths), torch.tensor(found.table)
    reading = BlockReading(found.table, 2, 3)
    assert len(reading.shared) == 4 and reading.most == 3
    expected = reference.cached_attention(q.double(), store.double(), table, lengths, window)
    fill = len(reading.pieces) - len(found)
    assert fill == 1
    filled, positions = torch.cat([q, q[:fill]]), torch.cat([lengths - 1, torch.zeros(fill, dtype=torch.int64)])
    out = reading(filled, store, reading.mask(positions, window))[:-fill]
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6 if dtype is torch.float32 else 1e-2)


def test_keys_and_values_go_where_the_table_says():
    found = rows(5, groups=3)
    found.add(0, 40, NONE)
    cache, both = found.cache, torch.randn(2, 3, 2, 8)
    places = cache.places(torch.tensor(found.table[0, [1, 0]]), torch.tensor([7, 31]))
    cache.write(1, places, both)
    assert torch.equal(cache.store[1, :, 2, :, 7], both[0].transpose(0, 1))
    assert torch.equal(cache.store[1, :, 1, :, 31], both[1].transpose(0, 1))
    assert cache.store.count_nonzero() == both.numel()


def test_blocks_that_rows_will_hold():
    """A row of 2 blocks that may come to 5, with 70 tokens left; one of 3 that gets none more, with 20 left."""
    args = np.array([2, 3]), np.array([3, 0]), np.array([70, 20])
    assert expected_blocks(*args, 0.0, 4).tolist() == [[2, 3, 4, 5, 0], [3, 3, 0, 0, 0]]
    half = 1 - 0.5 ** (1 / BLOCK)  # of the rows live on for so many tokens
    assert expected_blocks(*args, half, 4).sum(0) == pytest.approx([5, 3, 1, 5 / 8, 0])


def test_prompts_that_are_prefilled_together():
    def of(*lengths: int) -> list[list[int]]:
        return [[i] * length for i, length in enumerate(lengths)]

    lengths = (1, 16, 17, 64, 65, 128, 129, 257, 513, 1024, 1025)
    assert [padded_width(n) for n in lengths] == [16, 16, 32, 64, 80, 128, 160, 320, 640, 1024, 1280]
    assert list(batches(of(9000, 9000, 8000, 100), 1 << 14)) == [(0, 1), (1, 2), (2, 4)]
    assert list(batches([[1] * 8000] * 5 + [[2] * 8000] * 2 + [[3] * 8000], 1 << 14)) == [(0, 7), (7, 8)]
