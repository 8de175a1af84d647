"""Check of what an export holds besides weights."""

from __future__ import annotations

from pathlib import Path

from ..context import Context
from ..converting.export import RunExport
from ..data.dataset import dialogues
from ..hf.config import Head
from ..hf.files import write_json
from .findings import Finding


def tokenizer(ctx: Context, phase: str, folder: Path) -> Finding:
    """The files that exports of the run would have: whether our reader and transformers' make the same tokens of them,
    of some of a phase's prompts."""
    prompts = dialogues(ctx.datasets[phase])
    lines: list[str] = []
    notes: list[str] = []
    heads: dict[str, Head] = {"policy": "lm", "reward": "scalar"}
    for name, head in heads.items() if ctx.mesh.is_main else ():
        base = ctx.bases[name]
        about = RunExport(base.model, head, Path(base.path) if base.path else None, ctx.tokenizer, prompts)
        (target := folder / f"{name}_files").mkdir(parents=True)
        write_json(target / "config.json", about.config)
        lines += about.write(target)
        notes += about.notes
    return Finding(len(lines), 0, [*lines, *notes, f"{len(prompts)} prompts"][0])
