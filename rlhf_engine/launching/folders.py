"""Folders that a run begins with: models and tokenizers, and what in them is not used or does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import TAUGHT, Base, ConfigError, RunConfig
from ..data.tokenizer import Tokenizer
from ..data.vocabulary import has_tokenizer, read_vocabulary
from ..hf.config import ARCHITECTURES, family, read_json, read_model_config
from ..hf.index import check_adapter, index, is_checkpoint, unread_files
from ..hf.pickles import read_index
from .earlier import SUMMARY, kept_date


def read_base(path: str, section: str = "policy", ignore_keys: Sequence[str] = ()) -> Base:
    """A folder that weights begin from, in HF format or converted.

    Args:
        section: of the configuration that names it.
        ignore_keys: see `hf.config.parse`.
    """
    check_adapter(path)
    model = read_model_config(path, ignore_keys, f"{section}.ignore_keys")
    if section != "reward" and has_score(path):
        raise ConfigError(f"{section}.path={path} is a reward model: reward.path={path} scores with it, or trains it")
    if is_checkpoint(path):
        read_index(path, is_wanted=False)
    else:
        index(path)
    return Base(path, model)


def has_score(path: str) -> bool:
    """Whether the folder's model is one that scores."""
    where = Path(path) / "config.json"
    return family(read_json(where), str(where))[1] == "scalar"


def folder_notes(config: RunConfig, policy: Base, reward: Base, tokenizer: Tokenizer | None) -> list[str]:
    """What the folders of weights hold that is not used, or is used in a way of its own."""
    notes = []
    for section, base in {"policy": policy, "reward": reward}.items():
        if base.path is None or is_checkpoint(base.path) or (section == "reward" and base is policy):
            continue
        if unread := [path.name for path in unread_files(base.path)]:
            notes.append(f"{section}.path={base.path}: not read: {', '.join(unread)}")
        score = index(base.path).get(ARCHITECTURES[base.model.architecture].score)
        if section == "policy" and score is not None:
            notes.append(
                f"policy.path={base.path}: {score.name} in {score.path.name} is a score's head, not the policy's"
            )
        if section == "reward" and score is None and "reward" in config.phases:
            notes.append(f"reward.path={base.path} has no score's head: the reward phase starts with one of zeros")
    if tokenizer is not None and reward.model.score_pad in tokenizer.end_ids:
        notes.append(
            f"reward.path={reward.path}: pad_token_id={reward.model.score_pad} of its config.json ends rows: its score"
            " is read at the token before, as by transformers"
        )
    return notes


def check_reward(config: RunConfig, reward: Base) -> None:
    """What scores responses.

    Raises:
        ConfigError: there is no reward model, or it gives no scores.
    """
    trained = "reward" in config.phases or (Path(config.output_dir) / "reward" / SUMMARY).is_file()
    scored = [phase for phase, section in config.sampling.items() if section.is_scored]
    if not scored or config.reward.fns or config.env.fn is not None or trained:
        return
    phase = scored[0]
    if config.reward.path is None:
        raise ConfigError(
            f"{phase} needs a reward model, and no reward phase is finished in {config.output_dir}:"
            f" use phases=[reward,{phase}], reward.path=DIR, or reward.fns=[package.module:name]"
        )
    head = ARCHITECTURES[reward.model.architecture].score
    path = config.reward.path
    if not (has_score(path) if is_checkpoint(path) else head in index(path)):
        raise ConfigError(
            f"reward.path={config.reward.path} has no tensor {head}, so all its scores would be 0:"
            f" phases=[reward,{phase}] makes a reward model of it"
        )


def read_tokenizer(config: RunConfig, policy: Base) -> Tokenizer | None:
    """The configured tokenizer or the policy's own; None where one is to be trained on the data.

    Raises:
        ConfigError: it cannot be read, lacks what the template needs, or has more ids than the model.
    """
    path, template = config.tokenizer.path or config.policy.path, config.tokenizer.template
    if path is None and config.tokenizer.end_id is not None:
        raise ConfigError(
            f"tokenizer.end_id={config.tokenizer.end_id} needs a tokenizer that has it: set tokenizer.path"
        )
    if path is None and template not in (None, "hh") and "{" not in template:
        raise ConfigError(
            f"tokenizer.template={template} needs control tokens, which a tokenizer trained on the data does not have:"
            " set tokenizer.path"
        )
    most = policy.model.vocab_size
    if path is None:
        if most is not None and (size := config.tokenizer.vocab_size) > most:
            raise ConfigError(f"the tokenizer (trained on the data) has {size} ids, and the model's vocabulary {most}")
        return None
    config.tokenizer.date = config.tokenizer.date or kept_date(config)
    tokenizer = Tokenizer(path, template, config.tokenizer.end_id, config.tokenizer.date)
    tokenizer.call_format = config.tokenizer.tool_calls or tokenizer.call_format
    if most is not None:
        tokenizer.fit(most, "the model's vocabulary")
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer | None, base: Base, section: str) -> None:
    """A reward model, or a teacher, reads the token ids that the policy writes.

    Raises:
        ConfigError: it would take them for other words.
    """
    assert base.path is not None and base.model.vocab_size is not None
    if tokenizer is None:
        raise ConfigError(
            f"{section}.path needs the tokenizer that it was trained with: set policy.path or tokenizer.path"
        )
    tokenizer.fit(base.model.vocab_size, f"the vocabulary of {section}.path={base.path}")
    if has_tokenizer(Path(base.path)):
        own, text = read_vocabulary(Path(base.path)), "Which words are these? 1, 2, 3: naïve\n\nAssistant: tokens."
        if [*own.begin, *own.encode(text)] != tokenizer.encode(text):
            raise ConfigError(f"{section}.path={base.path} has another tokenizer than the policy")


def read_teacher(config: RunConfig) -> Base | None:
    """What a phase of the run learns from; None where none does.

    Raises:
        ConfigError: there is none.
    """
    if not (taught := [phase for phase in config.phases if phase in TAUGHT]):
        return None
    if config.teacher.path is None:
        raise ConfigError(f"{taught[0]} has nobody to learn from: teacher.path=DIR names an HF folder, as RUN/PHASE/hf")
    return read_base(config.teacher.path, "teacher", config.teacher.ignore_keys)


def check_teacher(config: RunConfig, tokenizer: Tokenizer | None, policy: Base, teacher: Base) -> None:
    """A teacher knows every token that the policy may sample.

    Raises:
        ConfigError: its vocabulary is another.
    """
    check_vocabulary(tokenizer, teacher, "teacher")
    assert tokenizer is not None and teacher.model.vocab_size is not None
    size, own = teacher.model.vocab_size, policy.model.vocab_size or tokenizer.vocab_size
    if has_tokenizer(folder := Path(teacher.path)):  # type: ignore[arg-type]
        mine, theirs = tokenizer.vocabulary, read_vocabulary(folder)
        controls = {*mine.controls.values(), *theirs.controls.values()}  # which have other names in versions of a model
        for i in sorted(set(range(min(mine.size, theirs.size))) - controls):
            if mine.name(i) != theirs.name(i):
                raise ConfigError(
                    f"teacher.path={teacher.path} has another tokenizer than the policy: token {i} is"
                    f" {theirs.name(i)!r}, and {mine.name(i)!r} to the policy"
                )
    whole = [phase for phase in config.phases if phase in TAUGHT and getattr(config, phase).kl == "full"]
    if size < own or (size > own and whole):
        advice = "" if size < own else f": {whole[0]}.kl=token compares the sampled tokens alone"
        raise ConfigError(f"teacher.path={teacher.path} has {size} token ids, and the policy {own}{advice}")


def read_user_tokenizer(config: RunConfig, tokenizer: Tokenizer | None, user: Base) -> Tokenizer:
    """Of the model that environments ask: its folder's, with the chat template there, or else the policy's.

    Args:
        tokenizer: the policy's, where it is known yet.

    Raises:
        ConfigError: there is none, it is not the model's, or its template takes no such dialogue.
    """
    assert user.path is not None and user.model.vocab_size is not None
    if has_tokenizer(Path(user.path)):
        tokenizer = Tokenizer(user.path, date=config.tokenizer.date or kept_date(config))
    elif tokenizer is None:
        raise ConfigError(f"user.path={user.path} has no tokenizer, and the policy's is to be trained on the data")
    tokenizer.fit(user.model.vocab_size, f"the vocabulary of user.path={user.path}")
    told = [{"role": "system", "content": "?"}] if config.env.fn == "user" else []
    try:
        tokenizer.render_prompt([*told, {"role": "user", "content": "?"}])
    except ConfigError as error:
        raise ConfigError(f"user.path={user.path}: {error}") from None
    return tokenizer
