"""What a finished run leaves in its folder: the model, the samples, the figures, the page."""

from __future__ import annotations

import json

import numpy as np

from fedgpt.core.files import write_text
from fedgpt.core.flat import flatten
from fedgpt.core.options import RunOptions
from fedgpt.data.prepare import Prepared
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import export_model
from fedgpt.report.figures import loss_figure
from fedgpt.report.model_card import model_card
from fedgpt.report.page import report_page
from fedgpt.report.run_report import samples_page
from fedgpt.report.scores import score_of
from fedgpt.report.timeline import timeline_figure
from fedgpt.report.updates import updates_figure
from fedgpt.storage.run_folder import RunFolder


def write_results(
    folder: RunFolder, options: RunOptions, prepared: Prepared, params: np.ndarray, end: dict
) -> None:
    """Write everything a person or a script wants at the end of a run.

    `params`: the last version's weights, (parameters,) float32; `end`: the summary, and the
    statement of a private run under "statement". summary.json comes last: a run with it is
    complete.
    """
    summary, statement = end["summary"], end["statement"]
    path, lines, score = folder.path, folder.metrics.read(), score_of(summary)
    model = GPT(options.model, prepared.tokenizer.vocab_size)
    np.copyto(flatten(model)[1].numpy(), params)
    card = model_card(options, summary, statement)
    export_model(path / "model", model, prepared.folder, card)
    write_text(path / "samples.md", samples_page(lines, score))
    loss_figure(lines, path / "figures" / "loss.png", score)
    timeline_figure(folder.events.read(), path / "figures" / "timeline.png")
    updates_figure(lines, path / "figures" / "updates.png")
    write_text(path / "report.html", report_page(summary, lines, path))
    write_text(path / "summary.json", json.dumps(summary, indent=2) + "\n")
