"""`fedgpt privacy plan`: show the noise and epsilon of a private run without training."""

from __future__ import annotations

from fedgpt.cli.words import split_words
from fedgpt.core.errors import ConfigError
from fedgpt.core.notices import saying

HELP = """
  fedgpt privacy plan privacy=client privacy.target_epsilon=4 rounds=100

Prints the noise that a run with these options would add, the text that it
protects, its epsilon, and the text that it does not protect. Nothing is
trained. The options are those of `fedgpt run`; the group privacy follows.
"""


def main(arguments: list[str]) -> int:
    """Print the plan of a private run."""
    from fedgpt.config import compose
    from fedgpt.data.shards import load_shards, say
    from fedgpt.report.privacy_plan import plan_text, refuse_no_privacy

    if not arguments or arguments[0] != "plan":
        raise ConfigError(
            f"{' '.join(['fedgpt privacy', *arguments])}: the command is `fedgpt privacy plan"
            " [key=value ...]`"
        )
    options = compose.load(*split_words(arguments[1:]), trains=False)
    refuse_no_privacy(options)
    with saying("reading the text"):
        prepared, shards = load_shards(options, say)
    with saying("computing the noise and its cost"):
        text = plan_text(options, [shard.size for shard in shards], prepared.tokenizer.vocab_size)
    print(text)
    return 0
