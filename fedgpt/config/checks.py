"""Problems of options that their groups do not check: options without effect, and values that a
component or this machine does not support.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedgpt.core.options import OPTIONS, RunOptions
from fedgpt.core.options.option import Group, no_effect
from fedgpt.data.corpus import CORPORA
from fedgpt.data.partition import PARTITIONS
from fedgpt.model.shape import trainable_problems
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
    if "rounds" in typed and o.tokens:
        yield (
            f"{typed['rounds']}: tokens={o.tokens} decides where the run ends; add tokens=0, or"
            " leave rounds out"
        )


def problems(o: RunOptions) -> Iterator[str]:
    """Problems of single values and of combinations that need no strategy to find them."""
    yield from o.problems()
    yield from trainable_problems(o.model)
    yield from CORPORA.problems(o.corpus, o.trusted_packages)
    yield from PARTITIONS.problems(o.partition, o.trusted_packages)
    yield from CODECS.problems(o.update, o.trusted_packages)
    yield from fleet_problems(o)


def folder_problems(o: RunOptions) -> Iterator[str]:
    """Problems of folders that a run on this machine cannot write or read; paths are absolute."""
    for option in ("run_dir", "cache_dir"):
        path = Path(getattr(o, option))
        existing = next(p for p in (path, *path.parents) if p.exists())
        if not existing.is_dir():
            yield f"{option}={path}: {existing} is a file; name a folder"
        elif not os.access(existing, os.W_OK):
            yield f"{option}={path}: {existing} is not writable; name another folder"
    yield from init_from_problems(o)
