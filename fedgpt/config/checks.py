"""Problems of options that their groups do not check: options without effect, and values that a
component or this machine does not support.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from operator import attrgetter
from pathlib import Path

from fedgpt.core.device import may_have_gpu, memory
from fedgpt.core.errors import ConfigError
from fedgpt.core.files import typed_path
from fedgpt.core.options import OPTIONS, RunOptions
from fedgpt.core.options.option import Group, is_a, no_effect
from fedgpt.data.corpus import CORPORA
from fedgpt.data.partition import PARTITIONS
from fedgpt.data.tokenizer import make_tokenizer
from fedgpt.model.shape import (
    count_activations,
    count_parameters,
    count_trainable,
    trainable_problems,
)
from fedgpt.simulate.fleet import fleet_problems
from fedgpt.storage.init_from import init_from_problems, known_tokenizer
from fedgpt.update.compress import CODECS

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# (group, option) whose value is a path
PATHS = (
    ("", "run_dir"),
    ("", "cache_dir"),
    ("", "init_from"),
    ("fleet", "path"),
    ("tokenizer", "path"),
    ("corpus", "path"),
    ("corpus", "public_path"),
    ("corpus", "held_out_path"),
)


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
    """Problems of a model or a micro-batch that does not fit into the memory of this machine."""
    if (vocabulary := o.model.vocab_size or _vocabulary(o)) is None:
        return
    parameters = count_parameters(o.model, vocabulary)
    # float32 weights, and for each trained parameter a sum of updates in 64 bits
    needed = 4 * parameters + 8 * count_trainable(o.model, vocabulary)
    if 0 < memory() < needed:
        yield (
            f"model.n_embd={o.model.n_embd} and model.n_layer={o.model.n_layer}: {parameters:.3g}"
            f" parameters need at least {needed / 1e9:,.1f} GB, and this machine has"
            f" {memory() / 1e9:,.1f} GB; lower one of them"
        )
        return
    if o.task.name != "lm" or o.privacy.unit == "example":
        return  # their micro-batches may be smaller
    if o.runtime.device != "cpu" and may_have_gpu():
        return
    # two bytes each: in bf16
    sequence = 2 * o.model.block_size * count_activations(o.model, vocabulary)
    if 0 < memory() < (needed := o.local.batch_size * sequence):
        fits = memory() // (2 * sequence)
        remedy = f"lower it to {fits} or less, and raise local.accumulate instead"
        yield (
            f"local.batch_size={o.local.batch_size}: a micro-batch of so many sequences of"
            f" model.block_size={o.model.block_size} tokens needs at least {needed / 1e9:,.1f} GB,"
            f" and this machine has {memory() / 1e9:,.1f} GB;"
            f" {remedy if fits else 'lower model.block_size'}"
        )


def _vocabulary(o: RunOptions) -> int | None:
    """Tokens of the run's tokenizer, at most; None if its folder has none that can be read."""
    if o.tokenizer.name == "bpe":
        return o.tokenizer.vocab_size + 1
    known = known_tokenizer(o)
    return known.vocab_size if known else None


def make_absolute(options: RunOptions) -> Iterator[str]:
    """Make the paths of the options absolute; yields a problem for each one that is no path."""
    for group, name in PATHS:
        place = getattr(options, group) if group else options
        if not (path := getattr(place, name)) or "\0" in path:  # which is a problem of any text
            continue
        key = f"{group}.{name}" if group else name
        if ADDRESS.match(path):
            yield (
                f"{key}={path}: is an address, and fedgpt fetches nothing; copy what is there to"
                " this machine first, and type its path here"
            )
            continue
        try:
            setattr(place, name, str(typed_path(path).resolve()))
        except (OSError, RuntimeError) as error:
            home = "there is no such home folder; type ./~ for a folder whose name begins so"
            yield f"{key}={path}: {home if path.startswith('~') else error}"


def wrong_lists(options: RunOptions) -> Iterator[str]:
    """A problem for each list with an element of another type, such as another list."""
    for key, one in OPTIONS.items():
        if {list[str], list[float]}.isdisjoint(one.kinds):
            continue
        value = attrgetter(key)(options)
        if not any(is_a(value, kind) for kind in one.kinds):
            yield one.problem(value)


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
    if o.tokenizer.name == "hf" and not list(o.tokenizer.problems()):
        try:
            make_tokenizer(o.tokenizer, ())
        except ConfigError as error:
            yield from error.problems
    yield from init_from_problems(o)
