"""The folder that `init_from` names: what it contains, and in what it differs from the run.

Free of torch and of the folder's weights, so that a wrong folder is refused with the other options.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import is_there
from fedgpt.core.gguf_file import is_gguf
from fedgpt.core.options import RunOptions
from fedgpt.core.options.option import typed
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from fedgpt.model.hf_folder import ModelFolder, read_folder

# options that may differ from the model of `init_from`, because they do not change its parameters;
# vocab_size is compared below, with the tokenizer
MAY_DIFFER = {"dropout", "trainable", "from_init", "vocab_size"}
# files of tokenizers of all kinds; a folder with one of them has a tokenizer
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.txt", "encoder.json", "vocab.bpe", "added_tokens.json"),
)


def init_from_problems(o: RunOptions) -> Iterator[str]:
    """What is wrong with `init_from` as far as it is known before any text is read."""
    if o.init_from is None:
        return
    try:
        found = read_start(o.init_from)
        yield from differences(o, found, known_tokenizer(o))
    except ConfigError as error:
        yield from error.problems


def known_tokenizer(o: RunOptions) -> Tokenizer | None:
    """The run's tokenizer if it is known before any text is read; None also for wrong options."""
    if o.tokenizer.name == "bpe":
        return None
    try:
        return make_tokenizer(o.tokenizer, ())
    except ConfigError:  # reported with the options of the tokenizer
        return None


def read_start(init_from: str) -> ModelFolder:
    """The model that `init_from` names: a run's folder, a Hugging Face folder or a GGUF file.

    Raises ConfigError, naming `init_from`, file and reason, if it is damaged or not supported.
    """
    folder = Path(init_from)
    with naming(init_from):
        if is_gguf(folder):
            return read_folder(folder)
        inside = is_there(folder / "model" / "config.json")
        if not inside and not is_there(folder / "config.json"):
            what = "is not a folder"
            if is_there(folder / "config.yaml"):
                what = "is the folder of a run that has not finished, so it has no model/ yet"
            elif folder.is_dir():
                what = "has no config.json, nor model/config.json"
            raise FedGPTError(
                f"{what}; name the folder of a finished run, or of a Hugging Face model, or a GGUF"
                " file"
            )
        return read_folder(folder / "model" if inside else folder)


def differences(o: RunOptions, found: ModelFolder, tokenizer: Tokenizer | None) -> list[str]:
    """Each difference between the model of `init_from` and the run's, with what to change.

    `tokenizer` is the run's, or None while it is not known.
    """
    where = f"init_from={o.init_from}"
    theirs, ours = asdict(found.options), asdict(o.model)
    # two models are equal where one says null and the other what null means
    meant = asdict(found.options.explicit()), asdict(o.model.explicit())
    problems = [
        f"{where}: its model.{name} is {typed(theirs[name])}, this run's is {typed(ours[name])};"
        f" set model.{name}={typed(theirs[name])}"
        for name in ours
        if name not in MAY_DIFFER
        and theirs[name] != ours[name]
        and meant[0][name] != meant[1][name]
    ]
    if len(problems) > 1:
        problems[-1] += ", or take model=hf, which has the shape of that model"
    try:
        if problem := _tokenizer_problem(found, o, tokenizer):
            problems.append(f"{where}: {problem}")
    except FedGPTError as error:
        problems.append(f"{where}: {_inside(error, where)}")
    return problems


def _tokenizer_problem(found: ModelFolder, o: RunOptions, tokenizer: Tokenizer | None) -> str:
    inside = is_gguf(found.path) or any(is_there(found.path / name) for name in TOKENIZER_FILES)
    if inside:
        theirs = load_tokenizer(found.path)
        if theirs.name == "bytes" and o.tokenizer.name == "bpe":
            return "its tokenizer is bytes, this run's is bpe; set tokenizer=bytes"
        if tokenizer is not None and theirs.digest != tokenizer.digest:
            return f"has another tokenizer; set tokenizer=hf tokenizer.path={found.path}"
    elif o.tokenizer.name != "bytes":
        return (
            "has no tokenizer, so its token ids may have other meanings than this run's; copy the"
            " tokenizer.json that it was trained with into the folder"
        )
    return _size_problem(found, o, tokenizer) if tokenizer is not None else ""


def _size_problem(found: ModelFolder, o: RunOptions, tokenizer: Tokenizer) -> str:
    tokens, rows = tokenizer.vocab_size, o.model.rows(tokenizer.vocab_size)
    if found.vocab_size < tokens:
        return (
            f"its vocab_size is {found.vocab_size}, this run's tokenizer has {tokens} tokens; take"
            " a model of at least this size"
        )
    if found.vocab_size != rows:
        return (
            f"its vocab_size is {found.vocab_size}, this run's is {rows}; set"
            f" model.vocab_size={found.vocab_size}"
        )
    return ""


def check_tokenizer(o: RunOptions, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if the model of `init_from`, if there is one, has another tokenizer."""
    if o.init_from is not None:
        found = read_start(o.init_from)
        if problems := differences(o, found, tokenizer):
            raise ConfigError(problems)


@contextmanager
def naming(init_from: str) -> Iterator[None]:
    """Turn a FedGPTError into a ConfigError that begins with `init_from`, and names paths in it
    from there.
    """
    where = f"init_from={init_from}"
    try:
        yield
    except FedGPTError as error:
        raise ConfigError(f"{where}: {_inside(error, where)}") from error


def _inside(error: FedGPTError, where: str) -> str:
    folder = where.removeprefix("init_from=").rstrip("/")
    text = str(error).replace(f"{folder}/", "")
    return text.removeprefix(f"{folder}: ").removeprefix(f"{folder} ")
