"""Options that cannot be audited; free of torch, so that they are refused before text is read."""

from __future__ import annotations

from collections.abc import Iterator

from fedgpt.core.options import RunOptions
from fedgpt.model.shape import is_trainable

PER_TOKEN = ("transformer.wte.weight", "lm_head.weight")


def audit_problems(o: RunOptions) -> Iterator[str]:
    """The options that cannot be audited; known before text is read."""
    if o.task.name != "lm":
        yield (
            f"task={o.task.name}: fedgpt audit plants text for next-token prediction and looks for"
            " it, so it attacks task=lm only; leave task out"
        )
    if o.privacy.unit == "local":
        yield (
            "privacy=local: an update is noised before it leaves the client, so there is nothing to"
            " attack; audit privacy=example or privacy=client"
        )
    if o.model.trainable and not any(is_trainable([n], o.model.trainable) for n in PER_TOKEN):
        yield (
            f"model.trainable={o.model.trainable}: fedgpt audit looks for tokens in the update of"
            " the embedding or the head; add transformer.wte.* or lm_head.*, or leave it out"
        )
