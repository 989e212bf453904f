"""The data of a run: the prepared corpus, and the clients' shards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from fedgpt.core.errors import FedGPTError, TextChanged, resume_command
from fedgpt.core.options import RunOptions
from fedgpt.data.partition import partition
from fedgpt.data.partitions.base import Shard
from fedgpt.data.prepare import Prepared, prepare


@cache
def say(note: str) -> None:
    """Print a line about the text to stderr, once in this process."""
    print(f"fedgpt: {note}", file=sys.stderr)


def load_shards(
    options: RunOptions, tell: Callable[[str], Any] = lambda note: None
) -> tuple[Prepared, list[Shard]]:
    """Return the prepared corpus of a run and its clients' shards, sorted by client id.

    `tell` gets lines about what was left out of the text; of the processes of a run only the first
    one prints them, with `say`. Every process that has the same options, corpus and packages gets
    the same result. Raises ConfigError if no clients can be made from the text and options.
    """
    trusted = options.trusted_packages
    prepared = prepare(options.corpus, options.tokenizer, options.cache_dir, trusted, tell)
    # smallest number of tokens to train on: a sequence, and the target of its last token
    window = options.model.block_size + 1
    return prepared, partition(prepared, options.partition, options.seed, window, trusted)


def text_digest(prepared: Prepared) -> str:
    """Hexadecimal sha256 of owner, id, label and text of all documents."""
    return str(prepared.manifest["sha256"])


def check_text(options: RunOptions, expected: str) -> None:
    """Prepare the text again; raises TextChanged unless its digest is `expected`."""
    try:
        found = text_digest(load_shards(options)[0])
    except FedGPTError as error:
        raise text_changed(options, str(error)) from error
    if found != expected:
        raise text_changed(options, f"digest {expected[:16]} -> {found[:16]}")


def text_changed(options: RunOptions, why: str) -> TextChanged:
    """The error for text that has changed since the run began."""
    return TextChanged(
        f"{source_of(options)}: the text has changed since the run began ({why}); put the earlier"
        f" text back and continue with: {resume_command(options.run_dir)}"
    )


def source_of(options: RunOptions) -> str:
    """The option that names the text."""
    path = options.corpus.path
    return f"corpus.path={path}" if path else f"corpus={options.corpus.name}"
