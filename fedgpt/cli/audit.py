"""`fedgpt audit`: attack the privacy guarantee of a run; exit code 1 if it is refuted."""

from __future__ import annotations

from fedgpt.cli.words import split_words
from fedgpt.core.errors import ConfigError
from fedgpt.core.notices import saying

HELP = """
  fedgpt audit privacy=example privacy.target_epsilon=4 rounds=2

Trains with artificial clients or blocks (canaries), guesses from the updates
which of them took part, and compares the guesses with the privacy guarantee of
these options. It may take minutes. The exit code is 1 if the guarantee is
refuted.
The options are those of `fedgpt run` (fedgpt help privacy).
"""


def main(arguments: list[str]) -> int:
    """Print the audit of a private run."""
    from fedgpt.audit.problems import audit_problems
    from fedgpt.config import compose
    from fedgpt.data.shards import load_shards, say

    options = compose.load(*split_words(arguments), trains=False)
    if problems := list(audit_problems(options)):
        raise ConfigError(problems)
    with saying("reading the text"):
        prepared, shards = load_shards(options, say)
    with saying("loading PyTorch"):
        from fedgpt.audit.report import audit_report
    strategy = compose.build_strategy(options.strategy, options.trusted_packages)
    text, holds = audit_report(options, strategy, prepared, shards)
    print(text)
    return 0 if holds else 1
