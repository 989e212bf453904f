"""What a person reads before and after a run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedgpt.core.device import Compute
from fedgpt.core.options import RunOptions
from fedgpt.data.partition import Shard
from fedgpt.data.prepare import Prepared
from fedgpt.model.shape import count_parameters
from fedgpt.privacy.statement import rows
from fedgpt.report.progress import clock, count, rule, size
from fedgpt.storage.checkpoint import Snapshot


def opening(
    options: RunOptions,
    prepared: Prepared,
    shards: Sequence[Shard],
    snapshot: Snapshot,
    compute: Compute,
    workers: str,
    held_out_tokens: int,
) -> str:
    """Every automatic choice with its reason, and the numbers that follow from the options."""
    o, local, model = options, options.local, options.model
    parameters = snapshot.state.params.size
    asked = min(o.pace.clients or len(shards), len(shards))
    job = local.steps * local.accumulate * local.batch_size * model.block_size
    who = (
        f"{asked} of {len(shards)} clients"
        if o.pace.rate is None
        else f"each of {len(shards)} with p={o.pace.rate}"
    )
    told = [
        ("run", o.run_dir),
        (
            "text",
            (
                f"{o.corpus.name}: {count(sum(s.size for s in shards))} tokens at {len(shards)}"
                f" clients, {held_out_tokens:,} held-out tokens"
            ),
        ),
        (
            "tokenizer",
            (
                f"{o.tokenizer.name}, {prepared.tokenizer.vocab_size} entries, trained on the"
                " public part only"
                if o.tokenizer.name == "bpe"
                else f"{o.tokenizer.name}, {prepared.tokenizer.vocab_size} entries"
            ),
        ),
        (
            "model",
            (
                f"{_counted(o, parameters, prepared)}: {model.n_layer} layers, width"
                f" {model.n_embd}, context {model.block_size}"
            ),
        ),
        _pacing_row(o, f"{rule(o)}: {who}", asked, job, parameters),
        ("compute", f"{compute.device}, {compute.dtype} ({compute.reason}), {workers}"),
    ]
    if o.attack.clients:
        liars = f"{o.attack.clients} of {len(shards)} clients"
        told.append(
            (
                "attack",
                f"{o.attack.name} of strength {o.attack.strength:g} by {liars}, for research only",
            )
        )
    if snapshot.state.version:
        told.append(
            (
                "resume",
                f"from version {snapshot.state.version}" + ("" if o.tokens else f" of {o.rounds}"),
            )
        )
    return "\n".join(f"{name:>10}  {text}" for name, text in told)


def privacy_text(told: dict[str, Any]) -> str:
    """The promise of a private run."""
    return "\n".join(f"{name:>12}  {text}" for name, text in rows(told))


def _counted(o: RunOptions, trained: int, prepared: Prepared) -> str:
    """How many parameters the model has, and how many of them are trained."""
    if not o.model.trainable:
        return f"{count(trained)} parameters"
    every = count_parameters(o.model, prepared.tokenizer.vocab_size)
    return f"{count(trained)} of {count(every)} parameters are trained"


def _pacing_row(o: RunOptions, who: str, asked: int, job: int, parameters: int) -> tuple[str, str]:
    steps = f"{o.local.steps} steps" + (" at most (DyLU)" if o.pace.dylu else "")
    clock_text = f"; virtual clock, fleet {o.fleet.name}" if o.clock == "virtual" else ""
    if o.pace.name == "buffer":
        goal = o.pace.goal or 1
        every = "every arrival" if goal == 1 else f"every {goal} arrivals"
        return "async", f"{who} always in flight x {steps}, a server step at {every}{clock_text}"
    each_way = size(asked * parameters * 4)
    return (
        "round",
        f"{who} x {steps} = {count(asked * job)} tokens, {each_way} each way{clock_text}",
    )


def summary_text(summary: dict[str, Any], records: list[dict[str, Any]], folder: Path) -> str:
    """The end of a run in a few lines, with a text that the model wrote."""
    first, last, best = summary["initial"], summary["final"], summary["best"]
    speed = summary["tokens"] / summary["wall_seconds"] if summary["wall_seconds"] else 0.0
    rejected = sum(summary["rejected"].values())
    lines = [
        "",
        (
            f"held-out bits per byte  {first['bits_per_byte']:.3f} -> {last['bits_per_byte']:.3f}"
            f"   (perplexity {first['perplexity']:.0f} -> {last['perplexity']:.1f}; "
            f"best {best['bits_per_byte']:.3f} at version {best['version']})"
        ),
        (
            f"trained                 {count(summary['tokens'])} tokens in"
            f" {clock(summary['wall_seconds'])} = {count(speed)} tok/s"
        ),
        *(
            [f"virtual time            {clock(summary['virtual_seconds'])}"]
            if summary["virtual_seconds"]
            else []
        ),
        (
            f"traffic                 {size(summary['bytes_up'])} up, {size(summary['bytes_down'])}"
            f" down, {rejected} updates rejected"
        ),
        *([_spent(summary)] if summary.get("epsilon") is not None else []),
        f"weights                 sha256 {summary['weights_sha256'][:16]}",
    ]
    sample = next((r for r in reversed(records) if "sample" in r), None)
    if sample:
        lines += ["", _text(sample).strip(), ""]
    lines.append(
        f"everything is in {folder}: report.html, samples.md, figures/, metrics.jsonl, model/"
    )
    lines.append(f'more text: fedgpt generate {shlex.quote(str(folder))} --prompt "..."')
    return "\n".join(lines)


def _spent(summary: dict[str, Any]) -> str:
    mark = "" if summary["private"] else "NOT PRIVATE (privacy.rng=seeded): with secret noise "
    return (
        f"privacy                 {mark}epsilon {summary['epsilon']:.4g} at delta"
        f" {summary['delta']:.2g} (ledger.json)"
    )


def samples_page(records: list[dict[str, Any]]) -> str:
    """samples.md: what the model wrote at several versions."""
    lines = ["# What the model wrote", ""]
    for record in records:
        if "sample" in record:
            title = f"## Version {record['version']}: {record['bits_per_byte']:.3f} bits per byte"
            lines += [title, "", "```text", _text(record).replace("```", "` ` `"), "```", ""]
    return "\n".join(lines)


def _text(record: dict[str, Any]) -> str:
    """Prompt and sample; a young byte model writes control codes, which no terminal shall
    follow.
    """
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", f"{record['prompt']}{record['sample']}"
    )
