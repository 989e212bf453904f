"""What a run depends on besides its options: text, tokenizer, shards and frozen weights.

Their digests are part of every checkpoint. A run goes on only with the content that it began with,
so each process that prepares the text again compares it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgpt.core.errors import FedGPTError
from fedgpt.core.options import RunOptions
from fedgpt.core.targets import source_digest
from fedgpt.data.partitions.base import Shard
from fedgpt.data.prepare import Prepared, prepare
from fedgpt.data.shards import code_digest, partition_source, shards_digest, source_of, text_digest
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

TOKENIZER = "tokenizer"  # folder of a run's tokenizer inside the run's folder
log = logging.getLogger(__name__)
# names in the environment of RunIdentity; a difference in the first ones causes one in the next
CONTENT = ("text", "tokenizer", "shards", "base")


def content_of(options: RunOptions, prepared: Prepared, shards: Sequence[Shard]) -> dict[str, str]:
    """The digests of text, tokenizer and shards, and of the files with the user's own classes."""
    return {
        "text": text_digest(prepared),
        "tokenizer": prepared.tokenizer.digest,
        **({} if options.corpus.at_sites else {"shards": shards_digest(shards)}),
        **{f"code of {target}": source_digest(target) for target in options.own_classes()},
        **({"code": code} if (code := code_digest(options)) else {}),
    }


def refuse_other_content(
    options: RunOptions, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raise FedGPTError if text, tokenizer, shards or frozen weights are not those of the run.

    Only what is both in `before` (from a checkpoint) and in `now` is compared, because checkpoints
    of earlier versions of fedgpt have fewer digests.
    """
    for name in CONTENT:
        if name not in before or name not in now or before[name] == now[name]:
            continue
        what, remedy = _difference(name, options)
        raise FedGPTError(
            f"{options.run_dir} cannot be continued: {what}; {remedy}, or start again with another"
            " run_dir"
        )


def run_tokenizer(options: RunOptions, environment: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of the run in `run_dir`, whose digest `environment` of a checkpoint has.

    It is read from the run's folder, or made from the text by a run of an earlier version. Raises
    FedGPTError if it is not the tokenizer that the run began with.
    """
    expected = environment.get("tokenizer")
    if options.tokenizer.name == "bytes":  # the same for every text
        return make_tokenizer(options.tokenizer, ())
    kept = kept_tokenizer(Path(options.run_dir))
    if kept is None and (Path(options.run_dir) / "model" / "tokenizer.json").is_file():
        kept = load_tokenizer(Path(options.run_dir) / "model")
    if kept is None and options.tokenizer.name == "hf":
        kept = make_tokenizer(options.tokenizer, ())
    if kept is None:
        trusted = options.trusted_packages
        kept = prepare(options.corpus, options.tokenizer, options.cache_dir, trusted).tokenizer
    if expected not in (None, kept.digest):
        raise FedGPTError(
            f"{options.run_dir}: its tokenizer ({TOKENIZER}/tokenizer.json, or else that of"
            f" {_tokenizer_source(options)}) is not the one that the run began with; restore that"
            " file, or the text"
        )
    return kept


def kept_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a run's folder; None if it is missing or damaged, with a warning."""
    if not (folder / TOKENIZER).exists():
        return None
    try:
        return load_tokenizer(folder / TOKENIZER)
    except FedGPTError as error:
        log.warning("%s; the tokenizer is made again", error)
        return None


def _tokenizer_source(options: RunOptions) -> str:
    path = options.tokenizer.path
    return source_of(options) if path is None else f"tokenizer.path={path}"


def _difference(name: str, options: RunOptions) -> tuple[str, str]:
    """What differs, and what to do about it."""
    source = source_of(options)
    if name == "text":
        return f"the text of {source} has changed since the run began", "put the earlier text back"
    if name == "tokenizer" and options.tokenizer.name == "hf":
        return (
            f"tokenizer.path={options.tokenizer.path} has another tokenizer than at the start",
            "restore that folder",
        )
    if name == "tokenizer":
        return (
            f"tokenizer={options.tokenizer.name} makes another tokenizer of {source} than at the"
            " start of the run, although the text is the same",
            "install the version of the package tokenizers that the run began with",
        )
    if name == "shards":
        own = options.partition._target_
        return (
            f"{partition_source(options)} makes other clients or shards than at the start of the"
            " run, although the text is the same",
            f"restore the code of {own}"
            if own
            else "install the versions of fedgpt and numpy that the run began with",
        )
    return (
        "its base weights differ, as the model of init_from has changed",
        "restore that folder",
    )
