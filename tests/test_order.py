"""The order of rows: permutations and shares by arithmetic."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_engine.data.order import Shuffle, deal


@settings(max_examples=80)
@given(st.integers(1, 1000), st.text(max_size=8))
def test_a_shuffle_has_every_number_once(size, key):
    shuffle = Shuffle(size, key)
    found = [shuffle[i] for i in range(size)]
    assert sorted(found) == list(range(size)) and found == list(Shuffle(size, key))


def test_a_shuffle_of_more_rows_than_fit_in_memory_is_there_at_once():
    shuffle = Shuffle(10**15, "1")
    places = [0, 1, 10**7, 10**15 - 1]
    assert [shuffle[i] for i in places] == [shuffle[i] for i in places]
    assert len({shuffle[i] for i in range(10_000)}) == 10_000
    for place in (-1, 10**15):
        with pytest.raises(IndexError):
            shuffle[place]


@pytest.mark.parametrize("size", [2, 3, 10, 64, 100])
def test_every_place_gets_every_number_equally_often(size):
    """Chi-square of where number 0, and the last, come to stand under 4000 keys: five standard deviations at most."""
    for place in (0, size - 1):
        counts = Counter(Shuffle(size, f"{key}")[place] for key in range(4000))
        expected = 4000 / size
        chi = sum((counts[i] - expected) ** 2 / expected for i in range(size))
        assert chi < (size - 1) + 5 * (2 * (size - 1)) ** 0.5


def test_neighbours_part():
    """What stands beside a number is another one under another key."""
    followers = Counter()
    for key in range(2000):
        order = list(Shuffle(16, str(key)))
        followers[order[(order.index(3) + 1) % 16]] += 1
    assert len(followers) == 15 and max(followers.values()) < 2.0 * 2000 / 15


SHARES = st.lists(st.fractions(Fraction(1, 1000), 1000, max_denominator=1000), min_size=1, max_size=9)


@settings(max_examples=80)
@given(SHARES, st.integers(1, 200))
def test_shares_are_exact_and_each_source_deals_its_rows_in_turn(shares, count):
    total, dealt = sum(shares), Counter()
    halvings = (len(shares) - 1).bit_length()
    for position in range(count):
        source, index = deal(position, shares)
        assert index == dealt[source]  # none is left out, and none is dealt twice
        dealt[source] += 1
        for i, share in enumerate(shares):
            assert abs(dealt[i] - (position + 1) * share / total) <= Fraction(halvings, 2)


def test_any_position_is_there_at_once():
    shares = [Fraction(3), Fraction(1, 3), Fraction(0.1)]
    position = 10**12
    found = Counter(deal(i, shares)[0] for i in range(position, position + 1000))
    total = sum(shares)
    assert all(abs(found[i] - 1000 * share / total) <= 2 for i, share in enumerate(shares))
    assert deal(position, shares)[1] == pytest.approx(
        position * float(shares[deal(position, shares)[0]] / total), abs=2
    )


def test_known_values():
    """The order of a run must not change between versions: a resumed one would go on with other rows."""
    assert list(Shuffle(10, "1/0/0")) == [3, 8, 7, 6, 1, 5, 4, 2, 0, 9]
    assert [deal(i, [Fraction(1), Fraction(1, 2)]) for i in range(6)] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (0, 2),
        (1, 1),
        (0, 3),
    ]
