"""Options of the group `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import Group, at_least, option


@dataclass
class EvaluateOptions(Group):
    """Evaluation of the model on held-out text at the server."""

    group = "evaluate"

    every: int | None = option(
        None,
        "Number of versions between two evaluations. null means one evaluation for each round"
        " (with pace=buffer, after pace.clients updates). 0 means only the first and the last"
        " version.",
        unit="versions",
        allowed=at_least(0, zero="first and last version"),
    )
    tokens: int = option(
        0,
        "Number of held-out tokens in an evaluation, spread evenly over the held-out text.",
        unit="tokens",
        allowed=at_least(0, end=10**15, zero="all"),
    )
    samples: int = option(
        3,
        "Number of versions that generate a sample of text, including the first and the last"
        " version. With 1 it is only the last version.",
        allowed=at_least(0, zero="none"),
    )
    sample_tokens: int = option(
        120, "Length of a sample.", unit="tokens", allowed=at_least(1, end=10**6)
    )
    prompt: str | None = option(
        None,
        'Text that samples continue. null means a short prompt of the corpus, such as "Fellow'
        ' citizens".',
    )
    rollback: float | None = option(
        None,
        "Rollback: the best weights are restored if the score is worse than the best score by more"
        " than this share. null means no rollback.",
        allowed=at_least(0, "(a share of the best score)"),
    )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Without samples nothing is generated."""
        if self.samples == 0:
            for name in ("prompt", "sample_tokens"):
                yield name, "evaluate.samples=0; add evaluate.samples=2"
