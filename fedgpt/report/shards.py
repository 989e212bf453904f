"""The output of `fedgpt data`: the corpus, its split, and the tokens of each client."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fedgpt.core.errors import amount
from fedgpt.data.partition import Shard, natural_owners
from fedgpt.data.prepare import Prepared

if TYPE_CHECKING:
    from rich.console import Console

BAR = 40  # length of the longest bar, in characters
NAMED = 5  # number of largest clients, and of smallest clients, that are listed by name
PART_NAMES = {"public": "public", "held_out": "held-out (evaluation)", "clients": "clients"}


def data_report(prepared: Prepared, shards: Sequence[Shard], console: Console) -> None:
    """Print the data of a run; if `console` is not a terminal, as plain ASCII text."""
    from rich.table import Table

    manifest = prepared.manifest
    kind = manifest["tokenizer"]
    per_token = manifest["bytes"] / manifest["tokens"]
    facts = {
        "corpus": f"{manifest['source']}, owner of a text = {manifest['client']}",
        "text": f"{manifest['documents']:,} documents, {manifest['bytes']:,} bytes",
        "tokenizer": f"{kind['name']}, {kind['vocab_size']:,} ids, digest {kind['digest']}",
        "tokens": f"{manifest['tokens']:,} ({per_token:.2f} bytes per token)",
        "folder": str(prepared.folder),
    }
    for name, fact in facts.items():
        _say(console, f"{name:<11}{fact}")
    _say(console)
    split = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold" if console.is_terminal else "",
    )
    split.add_column("part")
    for name in ("documents", "tokens", "bytes", "share"):
        split.add_column(name, justify="right")
    for part, row in manifest["split"].items():
        counts = [f"{row[name]:,}" for name in ("documents", "tokens", "bytes")]
        # the first versions of the manifest do not say it
        trains = manifest.get("trained_tokenizer", kind["name"] == "bpe") and part == "public"
        name = PART_NAMES[part] + " (trains the tokenizer)" * trains
        split.add_row(name, *counts, f"{row['bytes'] / manifest['bytes']:.1%}")
    console.print(split, highlight=False)
    console.print()
    _print_clients(prepared, shards, console)


def _print_clients(prepared: Prepared, shards: Sequence[Shard], console: Console) -> None:
    """Print the number of clients, a histogram of their tokens, and the largest and smallest."""
    sizes = np.array([shard.size for shard in shards])
    _say(console, f"{amount(len(shards), 'client')}, tokens per client: {_range(sizes)}")
    left = prepared.manifest["split"]["clients"]["tokens"] - int(sizes.sum())
    if left:
        owners = natural_owners(prepared) - len(shards)
        _say(console, f"left out: {amount(owners, 'client')} with {left:,} tokens in all,")
        _say(
            console,
            "below one training window or partition.min_tokens, or not among the largest"
            " partition.clients",
        )
    _say(console)
    full = "█" if console.is_terminal and console.encoding.startswith("utf") else "#"
    for line in histogram(sizes, full):
        _say(console, line)
    _say(console)
    ordered = sorted(shards, key=lambda shard: (-shard.size, shard.client))
    if len(ordered) <= 2 * NAMED:
        _say(console, "clients   " + _named(ordered))
    else:
        _say(console, "largest   " + _named(ordered[:NAMED]))
        _say(console, "smallest  " + _named(ordered[: -NAMED - 1 : -1]))


def histogram(sizes: np.ndarray, full: str = "#") -> list[str]:
    """Return one line for each range of tokens per client: range, number of clients, bar.

    `sizes` has one entry for each client. Ranges double in width if the largest client has more
    than eight times the tokens of the smallest. This is common in natural data, where equal ranges
    would show a single bar. Otherwise the ranges are equal.
    """
    low, high = int(sizes.min()), int(sizes.max())
    if low == high:
        edges = [low, high + 1]
    elif high > 8 * max(low, 1):
        edges = [2**power for power in range(max(low, 1).bit_length() - 1, high.bit_length() + 1)]
    else:
        edges = sorted({int(edge) for edge in np.linspace(low, high + 1, 9)})
    counts = [int(((sizes >= first) & (sizes < last)).sum()) for first, last in pairwise(edges)]
    counts[0] += int((sizes < edges[0]).sum())
    labels = [(f"{first:,}", f"{last - 1:,}") for first, last in pairwise(edges)]
    wide = max(len(text) for label in labels for text in label)
    number = max(len("clients"), *(len(str(count)) for count in counts))
    lines = [f"{'tokens':>{2 * wide + 3}}  {'clients':>{number}}"]
    for (first, last), count in zip(labels, counts, strict=True):
        bar = full * (max(1, round(BAR * count / max(counts))) if count else 0)
        lines.append(f"{first:>{wide}} - {last:>{wide}}  {count:>{number}}  {bar}".rstrip())
    return lines


def _say(console: Console, text: str = "") -> None:
    """Print one line; a long one is not wrapped, so that a path in it can be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _named(shards: Sequence[Shard]) -> str:
    return ", ".join(f"{shard.client} {shard.size:,}" for shard in shards)


def _range(sizes: np.ndarray) -> str:
    return (
        f"min {sizes.min():,}, median {int(np.median(sizes)):,}, max {sizes.max():,}, total"
        f" {sizes.sum():,}"
    )
