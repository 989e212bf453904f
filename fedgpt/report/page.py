"""report.html: a finished run on one page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedgpt.report.progress import count, size
from fedgpt.report.run_report import summary_text

MOST_ROWS = 40  # of the table: evenly spaced, first and last among them
STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0"
    " 1em}pre{white-space:pre-wrap;"
)
STYLE += "background:#f4f4f4;padding:1em}td,th{text-align:right;padding:0 1em}img{max-width:100%}"
HEAD = ("version", "tokens", "held-out loss", "bits per byte", "up", "down")


def report_page(summary: dict[str, Any], records: Sequence[dict[str, Any]], folder: Path) -> str:
    """The summary, the figures that lie in `folder`, the scores of versions, the command and the
    configuration.

    Of a private run no figure of who took part when: the page is for others, and that is nobody's
    business.
    """
    scored = [record for record in records if "loss" in record]
    step = max(1, -(-len(scored) // MOST_ROWS))
    shown = [record for i, record in enumerate(scored) if i % step == 0 or i == len(scored) - 1]
    figures = "*.png" if summary.get("epsilon") is None else "loss.png"
    parts = [
        (
            '<!doctype html><html lang="en"><meta'
            f' charset="utf-8"><title>{escape(folder.name)}</title>'
        ),
        f"<style>{STYLE}</style><h1>{escape(folder.name)}</h1>",
        f"<pre>{escape(summary_text(summary, list(records), folder).strip())}</pre>",
        *(_picture(path) for path in sorted((folder / "figures").glob(figures))),
        "<h2>Versions that were evaluated</h2><table>",
        _row("th", HEAD),
        *(_row("td", _cells(record)) for record in shown),
        "</table>",
    ]
    for name in ("command.txt", "config.yaml"):
        text = (folder / name).read_text(encoding="utf-8")
        parts.append(f"<h2>{name}</h2><pre>{escape(text.strip())}</pre>")
    return "\n".join([*parts, "</html>", ""])


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    scores = (f"{record[name]:.4f}" for name in ("loss", "bits_per_byte"))
    traffic = (size(record[way]) for way in ("bytes_up", "bytes_down"))
    return str(record["version"]), count(record["tokens"]), *scores, *traffic


def _row(kind: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"
