"""The scores of a task that are shown, and their format.

A run has one score that decides (core/score.py); its name is `score` in summary.json. For language
modelling it is `loss`, which is shown in bits per byte, because these can be compared between
tokenizers. Every other task shows the score that decides. A version that was evaluated has its
scores in its line of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN_FIRST = "bits_per_byte"  # shown instead of the score that decides, if a task has it
UNITS = {"bits_per_byte": "bits per byte"}  # scores that are shown with a unit
DIGITS = {"perplexity": 2}  # digits after the point in tables; 4 for every other score


def score_of(summary: Mapping[str, Any]) -> str:
    """Name of the score of a run; a folder without the name is of a language model.

    >>> score_of({"score": "accuracy"}), score_of({})
    ('accuracy', 'loss')
    """
    return summary.get("score", "loss")


def shown(line: Mapping[str, Any], score: str = "loss") -> str | None:
    """Name of the score that figures and summaries show; None if `line` was not evaluated.

    >>> shown({"loss": 2.0, "bits_per_byte": 0.7}), shown({"accuracy": 0.5}, "accuracy"), shown({})
    ('bits_per_byte', 'accuracy', None)
    """
    return next((name for name in (SHOWN_FIRST, score) if name in line), None)


def label(name: str) -> str:
    """A score's name in words.

    >>> label("bits_per_byte"), label("exact_match")
    ('bits per byte', 'exact match')
    """
    return UNITS.get(name, name.replace("_", " "))


def names(scores: Mapping[str, Any]) -> list[str]:
    """Names of the scores in an entry of summary.json such as `final`."""
    return [name for name in scores if name != "version"]


def columns(line: Mapping[str, Any], score: str = "loss") -> list[str]:
    """Scores in a table of versions: the one that decides, then the one that is shown.

    >>> columns({"loss": 2.0, "perplexity": 7.4, "bits_per_byte": 0.7}), columns({"f1": 1}, "f1")
    (['loss', 'bits_per_byte'], ['f1'])
    """
    return [name for name in dict.fromkeys((score, SHOWN_FIRST)) if name in line]


def cell(name: str, value: float) -> str:
    """A score in a table."""
    return f"{value:.{DIGITS.get(name, 4)}f}"


def named(name: str, value: float) -> str:
    """A score with its name or unit.

    >>> named("bits_per_byte", 2.0), named("accuracy", 0.75)
    ('2.000 bits per byte', 'accuracy 0.750')
    """
    return f"{value:.3f} {UNITS[name]}" if name in UNITS else f"{label(name)} {value:.3f}"


def in_progress(line: Mapping[str, Any], score: str = "loss") -> str | None:
    """Scores in a line of progress; None if the version was not evaluated.

    >>> in_progress({"loss": 2.0, "bits_per_byte": 0.7}), in_progress({"f1": 0.5}, "f1")
    ('held-out 2.000 = 0.700 bits/byte', 'held-out f1 0.500')
    """
    if (name := shown(line, score)) is None:
        return None
    if name == SHOWN_FIRST and "loss" in line:
        return f"held-out {line['loss']:.3f} = {line[name]:.3f} bits/byte"
    return f"held-out {named(name, line[name])}"


def first_to_last(summary: Mapping[str, Any]) -> str:
    """The scores of a run's first and last version and its best one, as one line."""
    first, last, best = summary["initial"], summary["final"], summary["best"]
    name = shown(last, score_of(summary)) or score_of(summary)
    known = {name, "loss"} if name == SHOWN_FIRST else {name}  # one is computed from the other
    others = [_change(n, first[n], last[n]) for n in names(last) if n not in known]
    others.append(f"best {best[name]:.3f} at version {best['version']}")
    title = f"{f'held-out {label(name)}':<22}"
    return f"{title}  {first[name]:.3f} -> {last[name]:.3f}   ({'; '.join(others)})"


def _change(name: str, first: float, last: float) -> str:
    if name == "perplexity":
        return f"perplexity {first:.0f} -> {last:.1f}"
    return f"{label(name)} {first:.3f} -> {last:.3f}"
