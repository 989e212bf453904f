"""Problems of options that their groups do not check: options without effect, and values that a
component or this machine does not support.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from fedgpt.core.device import memory
from fedgpt.core.options import OPTIONS, RunOptions
from fedgpt.core.options.option import Group, no_effect
from fedgpt.data.corpus import CORPORA
from fedgpt.data.partition import PARTITIONS
from fedgpt.model.shape import count_parameters, count_trainable, trainable_problems
from fedgpt.simulate.fleet import fleet_problems
from fedgpt.storage.init_from import init_from_problems
from fedgpt.update.compress import CODECS


def unused_options(typed: Mapping[str, str], o: RunOptions) -> Iterator[str]:
    """Typed options (option -> text) that have no effect with the chosen groups."""
    for option, text in typed.items():
        if option not in OPTIONS or not (only_with := OPTIONS[option].facts.only_with):
            continue
        group: Group = getattr(o, OPTIONS[option].group)
        if group.chosen not in only_with and not group.reports_unused:
            yield no_effect(text, group.chosen, only_with)
    groups = [value for one in fields(o) if isinstance(value := getattr(o, one.name), Group)]
    for group in (o, *groups):
        for name, why in group.without_effect():
            if (key := group.key(name)) in typed:
                yield f"{typed[key]}: has no effect with {why}, or leave it out"


def problems(o: RunOptions) -> Iterator[str]:
    """Problems of single values and of combinations that need no strategy to find them."""
    wrong = list(o.problems())
    yield from wrong
    if not any(problem.startswith("model.") for problem in wrong):  # such as 10**18 layers
        yield from trainable_problems(o.model)
    yield from CORPORA.problems(o.corpus, o.trusted_packages)
    yield from PARTITIONS.problems(o.partition, o.trusted_packages)
    yield from CODECS.problems(o.update, o.trusted_packages)
    yield from fleet_problems(o)


def memory_problems(o: RunOptions) -> Iterator[str]:
    """The problem of a model that does not fit into the memory of this machine."""
    vocabulary = 257 if o.tokenizer.name == "bytes" else o.tokenizer.vocab_size + 1
    parameters = count_parameters(o.model, vocabulary)
    # float32 weights, and for each trained parameter a sum of updates in 64 bits
    needed = 4 * parameters + 8 * count_trainable(o.model, vocabulary)
    if 0 < memory() < needed:
        yield (
            f"model.n_embd={o.model.n_embd} and model.n_layer={o.model.n_layer}: {parameters:.3g}"
            f" parameters need at least {needed / 1e9:,.1f} GB, and this machine has"
            f" {memory() / 1e9:,.1f} GB; lower one of them"
        )


def folder_problems(o: RunOptions, trains: bool) -> Iterator[str]:
    """Problems of folders that a run on this machine cannot write or read; paths are absolute.

    The run folder is of no importance to a command that does not train.
    """
    for option in ("run_dir", "cache_dir") if trains else ("cache_dir",):
        path = Path(getattr(o, option))
        try:
            existing = next(p for p in (path, *path.parents) if p.exists())
        except OSError as error:  # such as a name that is too long
            yield f"{option}={path}: {error.strerror}; name another folder"
            continue
        if not existing.is_dir():
            yield f"{option}={path}: {existing} is a file; name a folder"
        elif not os.access(existing, os.W_OK):
            yield f"{option}={path}: {existing} is not writable; name another folder"
    yield from init_from_problems(o)
