"""The data of a run: the prepared corpus, and the clients' shards."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from fedgpt.core.errors import FedGPTError, TextChanged, resume_command
from fedgpt.core.options import RunOptions, TokenizerOptions
from fedgpt.core.targets import source_digest
from fedgpt.data.partition import partition
from fedgpt.data.partitions.base import Shard
from fedgpt.data.prepare import Prepared, prepare
from fedgpt.data.tokenizer import Tokenizer


@cache
def say(note: str) -> None:
    """Print a line about the text to stderr, once in this process."""
    print(f"fedgpt: {note}", file=sys.stderr)


def load_shards(
    options: RunOptions, tell: Callable[[str], Any] = lambda note: None
) -> tuple[Prepared, list[Shard]]:
    """Return the prepared corpus of a run and its clients' shards, sorted by client id; none if
    each client has its own text.

    `tell` gets lines about what was left out of the text, and about a tokenizer that is smaller
    than asked for, or lacks bytes; of the processes of a run only the first one prints them, with
    `say`. Every process that has the same options, corpus and packages gets the same result. Raises
    ConfigError if no clients can be made from the text and options.
    """
    trusted = options.trusted_packages
    prepared = prepare(options.corpus, options.tokenizer, options.cache_dir, trusted, tell)
    for note in _tokenizer_notes(options.tokenizer, prepared.tokenizer):
        tell(note)
    if options.corpus.at_sites:  # each client makes its own shard
        return prepared, []
    # smallest number of tokens to train on: a sequence, and the target of its last token
    window = options.model.block_size + 1
    return prepared, partition(prepared, options.partition, options.seed, window, trusted)


def _tokenizer_notes(options: TokenizerOptions, tokenizer: Tokenizer) -> Iterator[str]:
    entries = tokenizer.vocab_size - 1  # the end token is not counted
    if options.name == "bpe" and entries != options.vocab_size:
        yield (
            f"tokenizer.vocab_size={options.vocab_size}: the tokenizer has {entries} entries, as no"
            " other pair of tokens occurs twice in the public text"
        )
    if lost := tokenizer.lost:
        yield (
            f"tokenizer.path={options.path}: the tokenizer has no token for the bytes"
            f" {lost.hex(' ')} of UTF-8 (rare control characters and letters); a text loses them"
        )


def text_digest(prepared: Prepared) -> str:
    """Hexadecimal sha256 of owner, id, label and text of all documents."""
    return str(prepared.manifest["sha256"])


def classes_of_clients(options: RunOptions) -> list[str]:
    """The user's own task and codec, if they are classes of trusted packages: clients use them."""
    used = options.task._target_, options.update._target_
    return [target for target in options.own_classes() if target in used]


def code_digest(options: RunOptions) -> str:
    """The digests of the files with the own classes that clients use; empty if there are none."""
    return " ".join(map(source_digest, classes_of_clients(options)))


def shards_digest(shards: Sequence[Shard]) -> str:
    """Hexadecimal sha256 of the names and the spans of all clients."""
    names = [[shard.client, len(shard.spans)] for shard in shards]
    spans = np.concatenate([shard.spans for shard in shards]).astype("<i8")
    return hashlib.sha256(json.dumps(names).encode() + spans.tobytes()).hexdigest()


def check_text(options: RunOptions, expected: str) -> None:
    """Prepare the server's text again; raises TextChanged unless its digest is `expected`."""
    try:
        found = text_digest(load_shards(options)[0])
    except FedGPTError as error:
        raise text_changed(options, str(error)) from error
    if found != expected:
        raise text_changed(options)


def text_changed(options: RunOptions, why: str = "") -> TextChanged:
    """The error for the server's text, which has changed since the run began.

    It has no digest: whoever reads it could confirm a guess of the text.
    """
    return TextChanged(
        f"{source_of(options)}: the text has changed since the run began{f' ({why})' * bool(why)};"
        f" put the earlier text back and continue with: {resume_command(options.run_dir)}"
    )


def partition_source(options: RunOptions) -> str:
    """The option that names the partition."""
    target = options.partition._target_
    return f"partition._target_={target}" if target else f"partition={options.partition.name}"


def source_of(options: RunOptions) -> str:
    """The option that names the text."""
    path = options.corpus.path or options.corpus.held_out_path
    return f"corpus.path={path}" if path else f"corpus={options.corpus.name}"
