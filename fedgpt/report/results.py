"""Writes the results of a finished run: the model, the samples, the figures, the page."""

from __future__ import annotations

import json
from typing import Any

from fedgpt.core.files import write_text
from fedgpt.core.options import RunOptions
from fedgpt.data.prepare import Prepared
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import export_model
from fedgpt.report.figures import loss_figure
from fedgpt.report.model_card import model_card
from fedgpt.report.page import report_page
from fedgpt.report.published import published, published_summary
from fedgpt.report.run_report import samples_page
from fedgpt.report.scores import names, score_of
from fedgpt.report.timeline import timeline_figure
from fedgpt.report.updates import updates_figure
from fedgpt.storage.run_folder import RunFolder


def write_results(
    folder: RunFolder,
    options: RunOptions,
    prepared: Prepared,
    model: GPT,
    summary: dict[str, Any],
    statement: dict[str, Any],
) -> None:
    """Write the results at the end of a run.

    `model` has the last version's weights. `statement` is the privacy statement of a private run,
    otherwise empty. summary.json is written last, so a run with summary.json is complete. With
    privacy=client the files that may be published get published fields only (published.py), and
    the figures of events and updates are for the owner of the folder.
    """
    path, private, score = folder.path, folder.metrics.read(), score_of(summary)
    lines = private
    if options.privacy.unit == "client":
        lines = [published(line, names(summary["final"])) for line in private]
        summary = published_summary(summary)
    card = model_card(options, summary, statement)
    prepared.tokenizer.save(path / "model", options.model.block_size)
    export_model(path / "model", model, card)  # last, because it makes the folder a model
    write_text(path / "samples.md", samples_page(lines, score))
    loss_figure(lines, path / "figures" / "loss.png", score)
    timeline_figure(folder.events.read(), path / "figures" / "timeline.png")
    updates_figure(private, path / "figures" / "updates.png")
    write_text(path / "report.html", report_page(summary, lines, path))
    write_text(path / "summary.json", json.dumps(summary, indent=2) + "\n")
