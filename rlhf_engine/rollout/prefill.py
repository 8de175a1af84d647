"""Prompts into the cache, many in one forward, and each as it would be alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from torch import Tensor

from .cache import BLOCK, Rows, on_device
from .decoder import Decoder


def prefill(
    decoder: Decoder, rows: Rows, prompts: Sequence[tuple[int, ...]], first: int, begins: Sequence[int]
) -> Tensor:
    """Logits `(rows, V / tp)` after the last token of each prompt.

    Args:
        prompts: of the rows from `first` on.
        begins: positions of each that are in the cache.
    """
    unique = list(dict.fromkeys(prompts))
    widths = [padded_width(len(prompt)) for prompt in unique]
    starts = dict(zip(unique, np.cumsum([0, *widths]), strict=False))
    positions = [np.arange(begin, len(prompt)) for begin, prompt in zip(begins, prompts, strict=True)]
    source = np.concatenate([starts[prompt] + t for prompt, t in zip(prompts, positions, strict=True)])
    blocks = np.concatenate([rows.table[first + i, t // BLOCK] for i, t in enumerate(positions)])
    last = np.array([starts[prompt] + len(prompt) - 1 for prompt in prompts])
    padded = [(*prompt, *[0] * (width - len(prompt))) for prompt, width in zip(unique, widths, strict=True)]
    arrays = np.array(list(chain(*padded))), source, blocks, np.concatenate(positions) % BLOCK, last
    tokens, of, into, at, ends = on_device(rows.cache.store.device, *arrays)
    shapes = [(count, width) for width, count in Counter(widths).items()]
    return decoder.prefill(tokens, shapes, ends, of, rows.cache.places(into, at), rows.cache)


def padded_width(length: int) -> int:
    """What a prompt is padded to: itself alone decides, as attention over another width rounds another way."""
    unit = max(16, 1 << (length - 1).bit_length() >> 3)
    return -(-length // unit) * unit


def batches(prompts: Sequence[Sequence[int]], most: int) -> Iterator[tuple[int, int]]:
    """First row and the one behind the last of each forward, of so many tokens at most; of equal prompts, which stand
    side by side, one is computed."""
    start, tokens = 0, 0
    for i, prompt in enumerate(prompts):
        if i > start and prompt == prompts[i - 1]:
            continue
        width = padded_width(len(prompt))
        if tokens and tokens + width > most:
            yield start, i
            start, tokens = i, 0
        tokens += width
    yield start, len(prompts)
