"""`fedgpt data`: show the text and the clients of a run."""

from __future__ import annotations

from fedgpt.cli.words import split_words

HELP = """
  fedgpt data
  fedgpt data corpus=files corpus.path=FOLDER partition=iid partition.clients=4

Prints the source of the text, how it is divided into a public part, the
clients' part and a held-out part, and the number of tokens of each client.
Nothing is trained. The options are those of `fedgpt run`; corpus, tokenizer and
partition matter most (fedgpt help corpus).
"""


def main(arguments: list[str]) -> int:
    """Print the shards of a run, without running it."""
    from rich.console import Console

    from fedgpt.config import compose
    from fedgpt.core.notices import saying
    from fedgpt.data.shards import load_shards, say
    from fedgpt.report.shards import data_report

    options = compose.load(*split_words(arguments), trains=False)
    with saying("reading the text"):
        prepared, shards = load_shards(options, say)
    data_report(prepared, shards, Console(highlight=False))
    return 0
