"""What is wrong with the options of a run, in words: ranges of values, and values that contradict each other."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from math import inf
from typing import Any

from fedgpt.core.options import RunOptions
from fedgpt.data.corpora import corpus_problems
from fedgpt.data.partition import partition_problems
from fedgpt.data.tokenizer import tokenizer_problems
from fedgpt.engine import attack, fleet, trust
from fedgpt.model.shape import check_model
from fedgpt.privacy import problems as privacy
from fedgpt.update.compress import update_problems

MOST_NODES = 16  # one SuperNode is two Python processes of some 340 MB while it trains

# option -> (what is allowed, test); a number that a user could get wrong has its line here
RANGES: dict[str, tuple[str, Any]] = {
    "seed": ("a whole number from 0", lambda v: v >= 0),
    "rounds": ("at least 1", lambda v: v >= 1),
    "local.steps": ("at least 1", lambda v: v >= 1),
    "local.batch_size": ("at least 1", lambda v: v >= 1),
    "local.accumulate": ("at least 1", lambda v: v >= 1),
    "local.lr": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "local.min_lr": ("from 0 to 1", lambda v: 0 <= v <= 1),
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
    "fleet.spread": ("at least 0", lambda v: v >= 0),
    "fleet.down": ("at least 0 seconds per megabyte", lambda v: v >= 0),
    "fleet.up": ("at least 0 seconds per megabyte", lambda v: v >= 0),
    "fleet.jitter": ("at least 0", lambda v: v >= 0),
    "fleet.dropout": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "validate.norm": ("at least 1, or 0 (off)", lambda v: v == 0 or 1 <= v < inf),
    "validate.clip": ("above 0, or 0 (off)", lambda v: 0 <= v < inf),
    "validate.strikes": ("at least 0 (0 = never)", lambda v: v >= 0),
    "validate.rest": ("at least 1 round", lambda v: v >= 1),
    "attack.name": (", ".join(attack.NAMES), attack.NAMES.__contains__),
    "attack.clients": ("at least 0", lambda v: v >= 0),
    "attack.strength": ("above 0 and finite", lambda v: 0 < v < inf),
    "runtime.name": ("pool, ray or superlink", ("pool", "ray", "superlink").__contains__),
    "runtime.workers": ("at least 0 (0 = choose)", lambda v: v >= 0),
    "runtime.threads": ("at least 0 (0 = choose)", lambda v: v >= 0),
    "runtime.device": ("auto, cpu or cuda", ("auto", "cpu", "cuda").__contains__),
    "runtime.watchdog": ("at least 0 seconds (0 = off)", lambda v: 0 <= v < inf),
    "evaluate.rollback": ("at least 0 (a share of the best loss)", lambda v: v is None or 0 <= v < inf),
    "evaluate.every": ("at least 0 (0 = first and last version)", lambda v: v is None or v >= 0),
    "evaluate.tokens": ("at least 0 (0 = all)", lambda v: v >= 0),
    "evaluate.samples": ("at least 0", lambda v: v >= 0),
    "evaluate.sample_tokens": ("at least 1", lambda v: v >= 1),
    "checkpoint.every": ("at least 0 (0 = only the last)", lambda v: v is None or v >= 0),
    "checkpoint.keep": ("at least 1", lambda v: v >= 1),
    **privacy.RANGES,
}


def problems(o: RunOptions) -> Iterator[str]:
    """What is wrong with single values, and with values together where no strategy has to be asked."""
    for option, (allowed, test) in RANGES.items():
        value: Any = o
        for part in option.split("."):
            value = getattr(value, part)
        if not test(value):
            yield f"{option}={value}: must be {allowed}"
    yield from check_model(o.model)
    yield from corpus_problems(o.corpus)
    yield from tokenizer_problems(o.tokenizer)
    yield from partition_problems(o.partition)
    if o.corpus.public == 0 and o.tokenizer.name == "bpe":
        yield "corpus.public=0: tokenizer=bpe is trained on the public part; raise it or take tokenizer=bytes"
    if o.local.min_lr > o.local.lr > 0:
        yield f"local.min_lr={o.local.min_lr}: must not be above local.lr={o.local.lr}; lower it"
    yield from fleet.fleet_problems(o)
    yield from attack.attack_problems(o)
    yield from update_problems(o.update)
    yield from trust.validate_problems(o)
    if o.checkpoint.journal and o.clock == "virtual":
        yield "checkpoint.journal=true: clock=virtual repeats a run to the same bits without one; leave it out"
    if o.resume is not None:
        yield f"resume={o.resume}: stands alone (fedgpt run resume=<folder>); the folder holds its own options"


def runtime_problems(runtime: str, clients: int) -> Iterator[str]:
    """Why a run with so many clients (0: not known yet) cannot start on this machine with this runtime."""
    if runtime == "ray" and importlib.util.find_spec("ray") is None:
        yield 'runtime=ray: Ray is not installed; pip install ".[ray]" in a clone, or take runtime=pool'
    if runtime == "superlink" and clients > MOST_NODES:
        yield (
            f"runtime=superlink: starts one SuperNode per client, and there are {clients} clients; "
            f"take at most {MOST_NODES} (partition.clients=2), or runtime=pool"
        )
