"""The data of a run: the prepared corpus, and the clients' shards."""

from __future__ import annotations

from fedgpt.core.options import RunOptions
from fedgpt.data.partition import partition
from fedgpt.data.partitions.base import Shard
from fedgpt.data.prepare import Prepared, prepare


def load_shards(options: RunOptions) -> tuple[Prepared, list[Shard]]:
    """Return the prepared corpus of a run and its clients' shards, sorted by client id.

    Every process that has the same options, corpus and packages gets the same result. Raises
    ConfigError if no clients can be made from the text and options.
    """
    trusted = options.trusted_packages
    prepared = prepare(options.corpus, options.tokenizer, options.cache_dir, trusted)
    # smallest number of tokens to train on: a sequence, and the target of its last token
    window = options.model.block_size + 1
    return prepared, partition(prepared, options.partition, options.seed, window, trusted)
