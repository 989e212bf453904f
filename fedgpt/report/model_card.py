"""README.md of an exported model: how it was made, what it scores, what is private about it."""

from __future__ import annotations

from typing import Any

from fedgpt.core.options import RunOptions
from fedgpt.privacy.statement import rows
from fedgpt.report.progress import count, rule


def _scores(final: dict[str, Any]) -> list[str]:
    if "bits_per_byte" not in final:
        scores = {name: value for name, value in final.items() if name != "version"}
        cells = " | ".join(f"{value:.4f}" for value in scores.values())
        head = ["| held-out text | " + " | ".join(scores) + " |", "|---|" + "---|" * len(scores)]
        return [*head, f"| last version | {cells} |"]
    return [
        "| held-out text | loss | perplexity | bits per byte |",
        "|---|---|---|---|",
        f"| last version | {final['loss']:.4f} | {final['perplexity']:.2f} |"
        f" {final['bits_per_byte']:.4f} |",
    ]


def model_card(o: RunOptions, summary: dict[str, Any], statement: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read; `statement` is empty for a run without
    privacy.
    """
    final = summary["final"]
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
            f"A GPT of {o.model.n_layer} layers and width {o.model.n_embd}, trained by federated"
            f" learning with fedgpt: {summary['versions']} server versions of {rule(o)}"
            f" ({o.pace.name} pacing), {count(summary['tokens'])} tokens of the corpus"
            f" `{o.corpus.name}` at its clients."
        ),
        "",
        *_scores(final),
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
