"""README.md of an exported model: how it was trained, its scores, and its privacy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedgpt.core.errors import amount
from fedgpt.core.options import RunOptions
from fedgpt.privacy.statement import rows
from fedgpt.report.progress import count, rule
from fedgpt.report.scores import cell, label, names


def model_card(o: RunOptions, summary: Mapping[str, Any], statement: dict[str, Any]) -> str:
    """Return Markdown with the front matter that model hubs read.

    `statement` is the privacy statement of a private run (privacy/statement.py), otherwise empty.
    """
    final = summary["final"]
    scores = {label(name): cell(name, final[name]) for name in names(final)}
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [fedgpt, federated-learning]",
        "---",
        "",
        f"# {o.name}",
        "",
        (
            f"A GPT of {amount(o.model.n_layer, 'layer')} and width {o.model.n_embd}, trained by"
            f" federated learning with fedgpt: {amount(summary['versions'], 'server version')} of"
            f" {rule(o)} ({o.pace.name} pacing), {count(summary['tokens'])} tokens of the corpus"
            f" `{o.corpus.name}` at its clients."
        ),
        "",
        f"| held-out text | {' | '.join(scores)} |",
        f"|---|{'---|' * len(scores)}",
        f"| last version | {' | '.join(scores.values())} |",
        "",
        f"The context is {amount(o.model.block_size, 'token')} long; longer texts must be cut.",
        "",
        f"sha256 of the flat float32 weights: `{summary['weights_sha256']}`",
        "",
        "## Privacy",
        "",
    ]
    if not statement:
        return "\n".join([*lines, "None: the model may repeat texts that it was trained on.", ""])
    mark = (
        ""
        if statement["private"]
        else "NOT PRIVATE, as its noise can be made again. With secret noise, "
    )
    spent = f"{mark}epsilon {summary['epsilon']:.4g} at delta {summary['delta']:.3g} was spent."
    return "\n".join(
        [*lines, spent, "", *(f"- {name}: {text}" for name, text in rows(statement)), ""]
    )
