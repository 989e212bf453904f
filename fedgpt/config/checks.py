"""What is wrong with the options of a run, in words: ranges of values, and values that contradict
each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from fedgpt.client import attack
from fedgpt.core.options import RunOptions
from fedgpt.core.runtimes import RUNTIMES
from fedgpt.core.targets import CUSTOM
from fedgpt.data.corpus import corpus_problems
from fedgpt.data.partition import partition_problems
from fedgpt.data.tokenizer import tokenizer_problems
from fedgpt.model.shape import check_model
from fedgpt.privacy import problems as privacy
from fedgpt.server import limits
from fedgpt.simulate import fleet
from fedgpt.update.compress import update_problems

RUNTIME_NAMES = (*RUNTIMES.names(), CUSTOM)

# option -> (what is allowed, test), of finite numbers; one that a user could get wrong has its line
# here
RANGES: dict[str, tuple[str, Any]] = {
    "name": ("a name without a slash", lambda v: v != "" and "/" not in v),
    "run_dir": ("a folder", lambda v: v != ""),
    "cache_dir": ("a folder", lambda v: v != ""),
    "seed": ("a whole number from 0", lambda v: v >= 0),
    "rounds": ("at least 1", lambda v: v >= 1),
    "local.steps": ("at least 1", lambda v: v >= 1),
    "local.batch_size": ("at least 1", lambda v: v >= 1),
    "local.accumulate": ("at least 1", lambda v: v >= 1),
    "local.lr": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "local.min_lr": ("from 0 to 1", lambda v: v is None or 0 <= v <= 1),
    "local.warmup": ("from 0 to below 1 (a share of the run's tokens)", lambda v: 0 <= v < 1),
    "local.beta1": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "local.beta2": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "local.weight_decay": ("at least 0", lambda v: v >= 0),
    "local.grad_clip": ("at least 0 (0 = off)", lambda v: v >= 0),
    "local.moments": ("keep or reset", ("keep", "reset").__contains__),
    "local.precision": ("auto, fp32 or bf16", ("auto", "fp32", "bf16").__contains__),
    "tokens": ("at least 0 (0 = end after `rounds`)", lambda v: v >= 0),
    "clock": ("real or virtual", ("real", "virtual").__contains__),
    "pace.name": ("cohort or buffer", ("cohort", "buffer").__contains__),
    "pace.clients": ("at least 0 (0 = all)", lambda v: v >= 0),
    "pace.rate": ("above 0 and at most 1", lambda v: v is None or 0 < v <= 1),
    "pace.goal": ("at least 1", lambda v: v is None or v >= 1),
    "pace.deadline": ("above 0 seconds", lambda v: v is None or v > 0),
    "pace.minimum": ("at least 0", lambda v: v >= 0),
    "pace.grace": ("at least 0 seconds", lambda v: v is None or v >= 0),
    "pace.max_staleness": ("at least 0 versions", lambda v: v is None or v >= 0),
    "fleet.name": (", ".join(fleet.NAMES), fleet.NAMES.__contains__),
    "fleet.median": ("above 0 seconds", lambda v: v > 0),
    "fleet.spread": ("from 0 to 10", lambda v: 0 <= v <= 10),
    "fleet.down": ("at least 0 seconds per megabyte", lambda v: v >= 0),
    "fleet.up": ("at least 0 seconds per megabyte", lambda v: v >= 0),
    "fleet.jitter": ("from 0 to 10", lambda v: 0 <= v <= 10),
    "fleet.dropout": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "validate.norm": ("at least 1, or 0 (off)", lambda v: v == 0 or v >= 1),
    "validate.clip": ("above 0, or 0 (off)", lambda v: v >= 0),
    "validate.strikes": ("at least 0 (0 = never)", lambda v: v >= 0),
    "validate.rest": ("at least 1 round", lambda v: v >= 1),
    "attack.name": (", ".join(attack.NAMES), attack.NAMES.__contains__),
    "attack.clients": ("at least 0", lambda v: v >= 0),
    "attack.strength": ("above 0", lambda v: v > 0),
    "runtime.name": (", ".join(RUNTIME_NAMES), RUNTIME_NAMES.__contains__),
    "runtime.workers": ("at least 0 (0 = choose)", lambda v: v >= 0),
    "runtime.threads": ("at least 0 (0 = choose)", lambda v: v >= 0),
    "runtime.device": ("auto, cpu or cuda", ("auto", "cpu", "cuda").__contains__),
    "runtime.watchdog": ("at least 0 seconds (0 = off)", lambda v: v >= 0),
    "evaluate.rollback": ("at least 0 (a share of the best loss)", lambda v: v is None or v >= 0),
    "evaluate.every": ("at least 0 (0 = first and last version)", lambda v: v is None or v >= 0),
    "evaluate.tokens": ("at least 0 (0 = all)", lambda v: v >= 0),
    "evaluate.samples": ("at least 0", lambda v: v >= 0),
    "evaluate.sample_tokens": ("at least 1", lambda v: v >= 1),
    "checkpoint.every": ("at least 0 (0 = only the last)", lambda v: v is None or v >= 0),
    "checkpoint.keep": ("at least 1", lambda v: v >= 1),
    **privacy.RANGES,
}


# option -> the group and its choices that it belongs to; typed beside another choice it would do
# nothing
BELONGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "corpus.client": ("corpus", ("sotu", "stdlib", "files")),
    "corpus._target_": ("corpus", ("custom",)),
    "corpus.text_field": ("corpus", ("files",)),
    "corpus.label_field": ("corpus", ("files",)),
    "corpus.document_bytes": ("corpus", ("files",)),
    "tokenizer.vocab_size": ("tokenizer", ("bpe",)),
    "partition.clients": ("partition", ("natural", "grouped", "iid", "dirichlet", "quantity")),
    "partition._target_": ("partition", ("custom",)),
    "partition.alpha": ("partition", ("dirichlet",)),
    "partition.exponent": ("partition", ("quantity",)),
    "partition.piece": ("partition", ("iid", "dirichlet", "quantity")),
    "attack.strength": ("attack", attack.NAMES[1:]),
    "fleet.step_seconds": ("fleet", ("constant",)),
    "fleet.median": ("fleet", ("lognormal",)),
    "fleet.spread": ("fleet", ("lognormal",)),
    "fleet.path": ("fleet", ("trace", "replay")),
    **{
        f"fleet.{name}": ("fleet", fleet.NAMES[1:5])
        for name in ("down", "up", "jitter", "dropout", "window")
    },
}


def unused_options(typed: Mapping[str, str], o: RunOptions) -> Iterator[str]:
    """What was typed (option -> as typed) and has no effect beside the choices that were made."""
    for option, text in typed.items():
        group, choices = BELONGS.get(option, ("", ()))
        if group and getattr(o, group).name not in choices:
            takes = " or ".join(f"{group}={choice}" for choice in choices)
            yield (
                f"{text}: does nothing with {group}={getattr(o, group).name}; add {takes}, or leave"
                " it out"
            )
    if "rounds" in typed and o.tokens:
        yield (
            f"{typed['rounds']}: tokens={o.tokens} decides where the run ends; add tokens=0, or"
            " leave rounds out"
        )


def problems(o: RunOptions) -> Iterator[str]:
    """What is wrong with single values, and with values together where no strategy has to be
    asked.
    """
    for option, (allowed, test) in RANGES.items():
        value: Any = o
        for part in option.split("."):
            value = getattr(value, part)
        if isinstance(value, float) and not isfinite(value):
            yield f"{option}={value}: must be a finite number, {allowed}"
        elif not test(value):
            yield f"{option}={value}: must be {allowed}"
    yield from check_model(o.model)
    yield from corpus_problems(o.corpus, o.trusted_packages)
    yield from tokenizer_problems(o.tokenizer)
    yield from partition_problems(o.partition, o.trusted_packages)
    if o.corpus.public == 0 and o.tokenizer.name == "bpe":
        yield (
            "corpus.public=0: tokenizer=bpe is trained on the public part; raise it or take"
            " tokenizer=bytes"
        )
    if o.local.min_lr is not None and o.local.min_lr > o.local.lr > 0:
        yield (
            f"local.min_lr={o.local.min_lr}: must not be above local.lr={o.local.lr}; lower it, or"
            " leave it out"
        )
    yield from fleet.fleet_problems(o)
    yield from attack.attack_problems(o)
    yield from update_problems(o.update, o.trusted_packages)
    yield from limits.validate_problems(o)
    if o.checkpoint.journal and o.clock == "virtual":
        yield (
            "checkpoint.journal=true: clock=virtual repeats a run to the same bits without one;"
            " leave it out"
        )
    if o.resume is not None:
        yield (
            f"resume={o.resume}: stands alone (fedgpt run resume=<folder>); the folder holds its"
            " own options"
        )


def folder_problems(o: RunOptions) -> Iterator[str]:
    """Folders that a run on this machine could not write to, or start from; paths are absolute."""
    for option in ("run_dir", "cache_dir"):
        path = Path(getattr(o, option))
        there = next(p for p in (path, *path.parents) if p.exists())
        if not there.is_dir():
            yield f"{option}={path}: {there} is a file; name a folder"
        elif not os.access(there, os.W_OK):
            yield f"{option}={path}: nothing can be written in {there}; name another folder"
    if o.init_from and not any(
        (Path(o.init_from) / f"{at}config.json").is_file() for at in ("", "model/")
    ):
        what = (
            "has no config.json, nor model/config.json"
            if Path(o.init_from).is_dir()
            else "is no folder"
        )
        yield (
            f"init_from={o.init_from}: {what}; name the folder of a finished run, or of a Hugging"
            " Face model"
        )
