"""What the text of a run is: the prepared corpus, and which client holds which part of it."""

from __future__ import annotations

from fedgpt.core.options import RunOptions
from fedgpt.data.partition import Shard, partition
from fedgpt.data.prepare import Prepared, prepare


def shards_of(options: RunOptions) -> tuple[Prepared, list[Shard]]:
    """The prepared corpus of a run and the shards of its clients, in the order of their ids.

    The same in every process that has the same options, corpus and packages. Raises ConfigError for
    text or options from which no clients can be made.
    """
    prepared = prepare(options.corpus, options.tokenizer, options.cache_dir)
    # the fewest tokens to train on: a sequence and, for its last token, the one that follows
    window = options.model.block_size + 1
    return prepared, partition(prepared, options.partition, options.seed, window)
