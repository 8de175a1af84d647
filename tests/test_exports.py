"""What a run exports, of every architecture and head: transformers gives the run's scores, stops and prompts, and so do
we when we read it back."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path

import cases
import pytest
import torch
import yaml
from test_chat import CHATML, DIALOGUE, write_tokenizer
from test_hf_architectures import EXPERTS, GPT2, SIZES, internlm2, make, reference, transformers
from test_hf_folders import configure, copied, role_of

from rlhf_engine.algorithms.heads import last_scores, score_batch
from rlhf_engine.config import ConfigError, RunConfig
from rlhf_engine.converting.convert import Checkpoint, export_folder
from rlhf_engine.converting.export import RunExport, export_role
from rlhf_engine.converting.importer import import_folder
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.data.tokenizer import Tokenizer, train_tokenizer
from rlhf_engine.experience import pad_rows
from rlhf_engine.hf.config import ARCHITECTURES
from rlhf_engine.models.stream import forward

OPTIONS = {
    "llama": dict(head_dim=10),
    "mistral": dict(head_dim=10, sliding_window=5),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=10),
    "gpt2": {},
    "mixtral": dict(head_dim=10, num_local_experts=5, num_experts_per_tok=2),
    "qwen3_moe": EXPERTS,
    "internlm2": dict(head_dim=10),
}
VOCABULARY = 448  # a few ids more than either tokenizer has
PROMPTS = [DIALOGUE[:1], DIALOGUE[:3], [{"role": "user", "content": " <b>naïve</b> 漢  \n"}]]
FOREIGN = dict(pad_token_id=None, bos_token_id=7, eos_token_id=9)  # special tokens of nobody's tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(architecture, kind)`: a folder with a model of the architecture's class of that kind, made once. It has a
    tokenizer of transformers, whose own pad token ends responses."""

    @functools.cache
    def get(name: str, kind: str) -> Path:
        if name == "internlm2":
            folder = internlm2(get("llama", kind), tmp_path_factory.mktemp(name), score=kind == "scalar")
        else:
            options = {key: value for key, value in (GPT2 if name == "gpt2" else SIZES).items() if "layer" not in key}
            options |= {"n_layer" if name == "gpt2" else "num_hidden_layers": 2}
            options |= OPTIONS[name] | FOREIGN | dict(vocab_size=VOCABULARY, num_labels=1)
            folder = make(tmp_path_factory.mktemp(name), getattr(ARCHITECTURES[name], kind), options)
        write_tokenizer(folder, "bytes", {"chat_template": CHATML, "pad_token": "<|eos|>"})
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11], "top_k": 5}))
        return folder

    return get


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Tokenizer:
    """A sentencepiece model, as a run trains it."""
    file = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    said = [speaker + turn["content"] for turn in DIALOGUE for speaker in ("\n\nHuman: ", "\n\nAssistant: ")]
    train_tokenizer(said * 9, file, 300)
    return Tokenizer(str(file))


def rows_of(tokenizer: Tokenizer) -> list[list[int]]:
    """Of several lengths; each token that ends a response ends some, and one stands within a row too."""
    ids = torch.randint(20, 250, (4, 17), generator=torch.Generator().manual_seed(1)).tolist()
    ends = tokenizer.end_ids
    return [[*ids[i][: 5 + 4 * i], *ids[i][:2], ends[i % len(ends)]] for i in range(3)] + [
        [9, ends[0], *ids[3], ends[-1]]
    ]


def own_scores(role, rows: list[list[int]]) -> torch.Tensor:
    return forward(role, score_batch(role, *pad_rows(rows, 1)), last_scores, 4)


def their_scores(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """Of one batch, padded on the right as its own tokenizer pads."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    assert (batch["input_ids"] == tokenizer.pad_token_id).any()
    with torch.no_grad():
        return reference(folder, transformers.AutoModelForSequenceClassification)(**batch).logits.squeeze(1)


def assert_same_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Ends, special tokens and prompts, for our reader and transformers'."""
    config = json.loads((folder / "config.json").read_text())
    ends, pad = config["eos_token_id"], config["pad_token_id"]
    assert (ends if isinstance(ends, list) else [ends]) == list(tokenizer.end_ids)
    hf, back = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(str(folder))
    assert (hf.pad_token_id, hf.bos_token_id) == (pad, config["bos_token_id"])
    assert back.end_ids == tokenizer.end_ids
    for messages in PROMPTS:
        wanted = tokenizer.render_prompt(messages)
        assert back.render_prompt(messages) == wanted
        assert hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == wanted


CASES = [(name, "own") for name in OPTIONS] + [(name, "pieces") for name in ("llama", "gpt2", "internlm2")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_language_model(made, pieces, tmp_path, name, kind):
    """Its logits, and what its `generate` stops at."""
    source, out = made(name, "lm"), tmp_path / "hf"
    tokenizer = pieces if kind == "pieces" else Tokenizer(str(source))
    rows = rows_of(tokenizer)[3:]
    with one_rank() as mesh:
        role = role_of(source, mesh)
        about = RunExport(role.model, "lm", source, tokenizer, PROMPTS)
        export_role(role, out, about.config, about.write)
        wanted = forward(role, {"tokens": torch.tensor(rows)}, functools.partial(cases.whole_logits, role), 4)
        back = forward(
            role_of(out, mesh), {"tokens": torch.tensor(rows)}, functools.partial(cases.whole_logits, role), 4
        )
    assert about.notes == [] and wanted.std() > 0.3 and torch.equal(back, wanted)
    assert_same_tokens(out, tokenizer)
    if name == "internlm2":
        return
    model = reference(out)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor(rows)).logits, wanted, atol=1e-4, rtol=0)
    ends = list(tokenizer.end_ids)
    prompt = torch.tensor(rows)[:, :6].repeat(len(ends), 1)
    found = model.generate(prompt, max_new_tokens=9, do_sample=False, logits_processor=[ends_at(prompt, ends)])
    for i, row in enumerate(found[:, 6:].tolist()):
        assert row[i + 1 :] == [ends[i]] + [model.config.pad_token_id] * (len(ends) - 1 - i)


def ends_at(prompt: torch.Tensor, ends: list[int]):
    """A logits processor: row i says `ends[i]` as its token i + 1 and other tokens before."""

    def process(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, ends] = -torch.inf
        for i, end in enumerate(ends):
            if tokens.shape[1] - prompt.shape[1] == i + 1:
                scores[i, end] = torch.inf
        return scores

    return process


@pytest.mark.parametrize("base", ["lm", "scalar"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_model_that_scores(made, pieces, tmp_path, name, kind, base):
    """A reward model, or a critic, that began as one of its own class or as a language model."""
    source, out = made(name, base), tmp_path / "hf"
    tokenizer = pieces if kind == "pieces" else Tokenizer(str(source))
    rows = rows_of(tokenizer)
    with one_rank() as mesh:
        role = role_of(source, mesh, "scalar")
        head = role.chunks[-1].output_layer
        head.weight.data.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(2))
        head.bias.data.fill_(-0.3125)
        about = RunExport(role.model, "scalar", source, tokenizer, PROMPTS)
        export_role(role, out, about.config, about.write)
        wanted = own_scores(role, rows)
        assert torch.equal(own_scores(role_of(out, mesh, "scalar"), rows), wanted)
    assert wanted.std() > 0.3
    assert_same_tokens(out, tokenizer)
    assert about.notes == ["transformers leaves out score_bias of config.json: its scores are ours less -0.3125"]
    config = json.loads((out / "config.json").read_text())
    assert config["pad_token_id"] not in tokenizer.end_ids and 0 <= config["pad_token_id"] < VOCABULARY
    if name != "internlm2":
        torch.testing.assert_close(their_scores(out, rows), wanted + 0.3125, atol=1e-4, rtol=0)


OF_TEXT = (9, 11)


@pytest.mark.parametrize("pad", [-1, VOCABULARY - 1, "<|eos|>", "[INST]", *OF_TEXT])
def test_a_score_that_is_read_elsewhere(made, tmp_path, pad):
    """By the pad token of the model that the run began from: of no row, of some within, of ends. One that is text stays
    text, and transformers does not pad with it."""
    source, out = copied(made("llama", "scalar"), tmp_path / "source"), tmp_path / "hf"
    tokenizer = Tokenizer(str(source))
    controls = tokenizer.vocabulary.controls
    configure(source, pad_token_id=controls.get(pad, pad))
    rows = [[30, 9, 41, controls["<|eos|>"]], [9, 21, 22, 23, 24, 9], [50, 11], [20, 30, controls["<|eos|>"]] * 3]
    with one_rank() as mesh:
        role = role_of(source, mesh, "scalar")
        about = RunExport(role.model, "scalar", source, tokenizer, PROMPTS)
        export_role(role, out, about.config, about.write)
        wanted = own_scores(role, rows)
        assert torch.equal(own_scores(role_of(out, mesh, "scalar"), rows), wanted)
    model = reference(out, transformers.AutoModelForSequenceClassification)
    with torch.no_grad():
        each = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(each, wanted, atol=1e-4, rtol=0)
    found = json.loads((out / "config.json").read_text())["pad_token_id"]
    if pad in OF_TEXT:
        assert about.notes == ["no control token can be its pad token, so transformers scores one dialogue at a time"]
        hf = transformers.AutoTokenizer.from_pretrained(out)
        assert found == pad and hf.pad_token_id is None
        assert [hf.encode(text) for text in ("*,", "Tell")] == [tokenizer.encode(text) for text in ("*,", "Tell")]
    else:
        assert about.notes == []
        assert found == controls.get(pad, tokenizer.vocab_size)  # the first id that the tokenizer has no name for
        assert_same_tokens(out, tokenizer)
        torch.testing.assert_close(their_scores(out, rows), wanted, atol=1e-4, rtol=0)


def test_a_broken_generation_config(made, tmp_path):
    source = copied(made("llama", "lm"), tmp_path / "source")
    tokenizer, broken = Tokenizer(str(source)), source / "generation_config.json"
    broken.write_text("{")
    out = tmp_path / "hf"
    with one_rank() as mesh:
        role = role_of(source, mesh)
        about = RunExport(role.model, "lm", source, tokenizer, PROMPTS)
        export_role(role, out, about.config, about.write)
    assert len(about.notes) == 1 and about.notes[0].startswith(f"{broken} is not JSON"), about.notes
    found = json.loads((out / "generation_config.json").read_text())
    assert found["eos_token_id"] == list(tokenizer.end_ids) and "top_k" not in found


@pytest.mark.parametrize("kind", ["own", "pieces"])
def test_a_tokenizer_of_another_model(made, pieces, tmp_path, kind):
    """transformers reads every Qwen2 folder as Qwen2's own, and how it reads this one is said; we read what was."""
    source, out = made("qwen2", "lm"), tmp_path / "hf"
    tokenizer = pieces if kind == "pieces" else Tokenizer(str(made("llama", "lm")))
    with one_rank() as mesh:
        role = role_of(source, mesh)
        about = RunExport(role.model, "lm", source, tokenizer, PROMPTS)
        export_role(role, out, about.config, about.write)
    (line,) = about.notes
    assert line.startswith("transformers: other tokens than the run's"), line
    assert "AutoTokenizer takes Qwen2Tokenizer for such a model, PreTrainedTokenizerFast.from_pretrained reads" in line
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    for messages in PROMPTS:
        wanted = tokenizer.render_prompt(messages)
        assert hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == wanted
        assert Tokenizer(str(out)).render_prompt(messages) == wanted


def test_a_checkpoint_described_by_a_folder_with_its_score_elsewhere(made, tmp_path):
    """By the policy's, which knows nothing of where the reward model has it; and a tokenizer that is gone."""
    base, policy = copied(made("llama", "scalar"), tmp_path / "reward"), made("llama", "lm")
    eos = Tokenizer(str(base)).vocabulary.controls["<|eos|>"]
    configure(base, pad_token_id=eos)
    folder = tmp_path / "run" / "ppo" / "checkpoints" / "iteration_1"
    folder.parent.mkdir(parents=True)
    import_folder(base, folder, 1, 1, None, progress)
    config = RunConfig()
    config.policy.path, config.reward.path = str(policy), str(base)
    (folder.parent.parent / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    with pytest.raises(ConfigError, match=f"has the score at another token than the run had it: --hf {base}"):
        export_folder(Checkpoint(folder, policy), tmp_path / "hf", 10**9, progress)
    assert export_folder(Checkpoint(folder, base), tmp_path / "hf", 10**9, progress) == []
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["pad_token_id"] == eos
    config.tokenizer.path = str(tmp_path / "gone")
    (folder.parent.parent / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    with pytest.raises(ConfigError, match=r"gone, the tokenizer of the run in .*run, is not there"):
        export_folder(Checkpoint(folder, base), tmp_path / "other", 10**9, progress)


def progress(total: int):
    return lambda num_bytes: None
