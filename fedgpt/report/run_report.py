"""The texts before and after a run: its choices, privacy statement, summary and samples."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgpt.core.errors import amount
from fedgpt.core.messages import ClientInfo
from fedgpt.core.options import RunOptions
from fedgpt.data.prepare import Prepared
from fedgpt.model.shape import count_parameters
from fedgpt.privacy.statement import rows
from fedgpt.report.progress import clock, count, rule, size
from fedgpt.report.scores import first_to_last, named, shown
from fedgpt.storage.checkpoint import Snapshot


def opening(
    options: RunOptions,
    prepared: Prepared,
    clients: Sequence[ClientInfo],
    snapshot: Snapshot,
    compute: str,
    held_out_tokens: int,
) -> str:
    """Return every automatic choice with its reason, and the numbers computed from the options.

    `compute` describes device, dtype and processes in words.
    """
    o = options
    parameters, version = snapshot.state.params.size, snapshot.state.version
    origin = {"bpe": ", trained on the public part only", "hf": f", of {o.tokenizer.path}"}
    tokenizer = f"{o.tokenizer.name}, {prepared.tokenizer.vocab_size} entries"
    choices = [
        ("run", o.run_dir),
        (
            "text",
            (
                f"{o.corpus.name}: {count(sum(client.tokens for client in clients))} tokens at"
                f" {amount(len(clients), 'client')}, {held_out_tokens:,} held-out tokens"
            ),
        ),
        (
            "tokenizer",
            tokenizer + origin.get(o.tokenizer.name, ""),
        ),
        (
            "model",
            (
                f"{_counted(o, parameters, prepared)}: {amount(o.model.n_layer, 'layer')},"
                f" width {o.model.n_embd}, context {o.model.block_size}"
            ),
        ),
        _pacing_row(o, len(clients), parameters),
        ("compute", compute),
    ]
    if o.attack.clients:
        choices.append(
            (
                "attack",
                (
                    f"{o.attack.name} of strength {o.attack.strength:g} by {o.attack.clients} of"
                    f" {amount(len(clients), 'client')}, for research only"
                ),
            )
        )
    if version:
        end = "" if o.tokens else f" of {o.rounds}"
        choices.append(("resume", f"from version {version}{end}"))
    return "\n".join(f"{name:>10}  {text}" for name, text in choices)


def longer_text(before: Mapping[str, Any], o: RunOptions) -> str:
    """Return what a raised length changes in a run that began with the options `before`; empty if
    it is not longer.
    """
    for name in ("rounds", "tokens"):
        old, new = before.get(name) or 0, getattr(o, name)
        if not 0 < old < new:
            continue
        text = f"the run goes on to {name}={new} instead of {old}"
        if o.local.warmup == 0 and o.local.min_lr == o.local.lr:
            return text
        return (
            f"{text}. Its learning rate is from here on that of a run of {new} {name}, because"
            " warm-up and cosine follow the length of the run. Only with local.warmup=0 and"
            " local.min_lr equal to local.lr does it get the bits of such a run"
        )
    return ""


def privacy_text(statement: dict[str, Any]) -> str:
    """Return the statement of a private run (privacy/statement.py) as lines."""
    return "\n".join(f"{name:>12}  {text}" for name, text in rows(statement))


def _counted(o: RunOptions, trained: int, prepared: Prepared) -> str:
    """Return the number of parameters, and the number of trained parameters."""
    if not o.model.trainable:
        return f"{count(trained)} parameters"
    every = count_parameters(o.model, prepared.tokenizer.vocab_size)
    return f"{count(trained)} of {count(every)} parameters are trained"


def _pacing_row(o: RunOptions, clients: int, parameters: int) -> tuple[str, str]:
    """Return the pacing in words, with the sizes of jobs and server steps."""
    cohort = min(o.pace.clients or clients, clients)
    chosen = f"{cohort} of {amount(clients, 'client')}"
    if o.pace.rate is not None:
        cohort = max(1, round(o.pace.rate * clients))  # on average
        chosen = f"each of {clients} with p={o.pace.rate}"
    jobs = f"{rule(o)}: {chosen}"
    steps = amount(o.local.steps, "step") + (" at most (DyLU)" if o.pace.dylu else "")
    fleet = f"; virtual clock, fleet {o.fleet.name}" if o.clock == "virtual" else ""
    if o.pace.name == "buffer":
        goal = o.pace.goal or 1
        every = "every arrival" if goal == 1 else f"every {goal} arrivals"
        return "async", f"{jobs} always in flight x {steps}, a server step at {every}{fleet}"
    job_tokens = o.local.steps * o.local.accumulate * o.local.batch_size * o.model.block_size
    each_way = size(cohort * parameters * 4)
    return (
        "round",
        f"{jobs} x {steps} = {count(cohort * job_tokens)} tokens, {each_way} each way{fleet}",
    )


def summary_text(
    summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], folder: Path
) -> str:
    """Return the summary of a run in a few lines, with the newest sample.

    Numbers that are withheld (None, see published.py) are left out.
    """
    lines = ["", first_to_last(summary), *_effort(summary)]
    if summary.get("epsilon") is not None:
        lines.append(_privacy_line(summary))
    lines.append(f"weights                 sha256 {summary['weights_sha256'][:16]}")
    if sample := next((line for line in reversed(metrics) if "sample" in line), None):
        lines += ["", _written_text(sample).strip(), ""]
    return "\n".join(
        [
            *lines,
            f"results are in {folder}: report.html, samples.md, figures/, metrics.jsonl, model/",
            f'more text: fedgpt generate {shlex.quote(str(folder))} --prompt "..."',
        ]
    )


def _effort(summary: Mapping[str, Any]) -> list[str]:
    """Return tokens, times and traffic of a run as lines."""
    trained, seconds = f"trained                 {count(summary['tokens'])} tokens", "wall_seconds"
    if summary[seconds] is None:
        return [
            trained,
            "withheld                times, traffic and rejected updates, which depend on the"
            " clients that took part",
        ]
    speed = summary["tokens"] / summary[seconds] if summary[seconds] else 0.0
    lines = [f"{trained} in {clock(summary[seconds])} = {count(speed)} tok/s"]
    if summary["virtual_seconds"]:
        lines.append(f"virtual time            {clock(summary['virtual_seconds'])}")
    rejected = sum(summary["rejected"].values())
    return [
        *lines,
        f"traffic                 {size(summary['bytes_up'])} up, {size(summary['bytes_down'])}"
        f" down, {rejected} updates rejected",
    ]


def _privacy_line(summary: Mapping[str, Any]) -> str:
    mark = "" if summary["private"] else "NOT PRIVATE (privacy.rng=seeded): with secret noise "
    return (
        f"privacy                 {mark}epsilon {summary['epsilon']:.4g} at delta"
        f" {summary['delta']:.2g} (ledger.json)"
    )


def samples_page(metrics: Sequence[Mapping[str, Any]], score: str = "loss") -> str:
    """Return samples.md: the samples of several versions.

    `score` is the name of the run's score.
    """
    lines = ["# Samples", ""]
    for line in metrics:
        if "sample" not in line:
            continue
        name = shown(line, score)
        value = f": {named(name, line[name])}" if name else ""
        text = _written_text(line).replace("```", "` ` `")
        lines += [f"## Version {line['version']}{value}", "", "```text", text, "```", ""]
    return "\n".join(lines)


def _written_text(line: Mapping[str, Any]) -> str:
    """Return prompt and sample without control codes.

    A byte model with little training generates control codes, which must not reach a terminal.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", f"{line['prompt']}{line['sample']}")
