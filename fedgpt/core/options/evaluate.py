"""Options of the group `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from fedgpt.core.options.option import Group, at_least, option


@dataclass
class EvaluateOptions(Group):
    """How the server evaluates the model on held-out text."""

    group = "evaluate"

    every: int | None = option(
        None,
        "Number of server versions from one evaluation to the next. null means one evaluation for"
        " each round (pace=buffer: for as many updates as a round would have); 0 means only the"
        " first and the last version.",
        unit="versions",
        allowed=at_least(0, zero="first and last version"),
    )
    tokens: int = option(
        0,
        "Number of held-out tokens that are used, spread evenly over the held-out text.",
        unit="tokens",
        allowed=at_least(0, zero="all"),
    )
    samples: int = option(
        3,
        "Number of versions for which the model writes a sample of text, the first and the last"
        " among them.",
        allowed=at_least(0),
    )
    sample_tokens: int = option(120, "Length of a sample.", unit="tokens", allowed=at_least(1))
    prompt: str | None = option(
        None,
        "Text that samples continue. null means a short one that fits the corpus, such as"
        ' "Fellow citizens".',
    )
    rollback: float | None = option(
        None,
        "How much worse the score may become: when it is worse than the best score by more than"
        " this share, the best weights are restored. null means never.",
        allowed=at_least(0, "(a share of the best score)"),
    )
