"""report.html: a finished run on one page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedgpt.report.progress import count, size
from fedgpt.report.run_report import summary_text
from fedgpt.report.scores import cell, columns, label, score_of, shown

MOST_ROWS = 40  # largest number of rows of the table: evenly spaced versions with first and last
STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "pre{white-space:pre-wrap;background:#f4f4f4;padding:1em}"
    "td,th{text-align:right;padding:0 1em}img{max-width:100%}"
)


def report_page(
    summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], folder: Path
) -> str:
    """Return the page: summary, figures in `folder`, scores, command and configuration.

    `metrics` are the lines of metrics.jsonl. The page of a private run has only the figure of the
    score, because the other figures show which clients took part in which version. Lines without
    bytes (published.py) get no columns for them.
    """
    score = score_of(summary)
    scored = [line for line in metrics if shown(line, score)]
    step = max(1, -(-len(scored) // MOST_ROWS))
    table = [line for i, line in enumerate(scored) if i % step == 0 or i == len(scored) - 1]
    names = columns(summary["final"], score)
    first, *others = (label(name) for name in names)
    traffic = ("up", "down") if scored and "bytes_up" in scored[-1] else ()
    head = ("version", "tokens", f"held-out {first}", *others, *traffic)
    figures = "*.png" if summary.get("epsilon") is None else "loss.png"
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f"<title>{escape(folder.name)}</title>",
        f"<style>{STYLE}</style><h1>{escape(folder.name)}</h1>",
        f"<pre>{escape(summary_text(summary, metrics, folder).strip())}</pre>",
        *(_picture(path) for path in sorted((folder / "figures").glob(figures))),
        "<h2>Versions that were evaluated</h2><table>",
        _row("th", head),
        *(_row("td", _cells(line, names)) for line in table),
        "</table>",
    ]
    for name in ("command.txt", "config.yaml"):
        text = (folder / name).read_text(encoding="utf-8")
        parts.append(f"<h2>{name}</h2><pre>{escape(text.strip())}</pre>")
    return "\n".join([*parts, "</html>", ""])


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _cells(line: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    scores = (cell(name, line[name]) for name in names)
    traffic = (size(line[way]) for way in ("bytes_up", "bytes_down") if way in line)
    return str(line["version"]), count(line["tokens"]), *scores, *traffic


def _row(kind: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"
