"""Rows and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .reading import size


@dataclass
class TokenizerConfig:
    path: str | None = None  # HF folder or sentencepiece model; null: the policy's, or one trained on the data
    vocab_size: int = 768  # of a tokenizer trained on the data
    # how messages become text: the name of one of the tokenizer's own chat templates or of ours (hh, internlm2, llama3,
    # chatml), or a Jinja program; null: the tokenizer's only one or its default, hh where it has none
    template: str | None = None
    date: str | None = None  # YYYY-MM-DD, for templates that write the date; null: the day on which the run began
    # how the model writes calls of tools; null: as the template does
    tool_calls: Literal["hermes", "llama3", "mistral"] | None = None
    end_id: int | None = None  # the one token that ends a response; null: all that template and tokenizer say


@dataclass
class DataConfig:
    # name::weight[system=PRESET][reward=PRESET] each, see docs/data.md; none: the embedded hh_mini, both its subsets
    sources: list[str] = field(default_factory=list)
    # each batch has the shares of the mixture, or only the data as a whole
    strategy: Literal["in_batch", "in_data"] = "in_batch"
    cache_dir: str | None = None  # where rows are kept as token ids; null: the folder `prepared` beside output_dir
    num_rows: int = 3000  # rows generated over all embedded sources (hh_mini, sums, tool_sums)
    # held out: embedded sources' test split, or the last rows of each source; null: 256, but of no source more than a
    # tenth
    num_eval_rows: int | None = None
    max_seq_len: int = size(192)  # tokens; longer dialogues are left out and counted
    max_prompt_len: int = size(128)  # tokens; rows whose prompt is longer are left out and counted, in every phase
    min_prompt_len: int = 1  # tokens; and shorter
