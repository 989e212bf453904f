"""The privacy guarantee of a run, in words.

The statement is printed at the start of a run, saved with its checkpoints, and part of its model
card. It states what is protected, the epsilon, against whom, and what is not covered.
"""

from __future__ import annotations

from typing import Any

from fedgpt.core.options import RunOptions
from fedgpt.privacy.accounting import accountant_of
from fedgpt.privacy.plan import PrivacyPlan

WEAK_DELTA = 0.01  # delta above which a guarantee promises next to nothing
FEW = 100  # number of clients below which privacy=client gains little from sampling

UNIT = {
    "example": "one block of {block} tokens of a client's text, cut once",
    "client": "all text of one client",
    "local": "all text of one client, also against the server",
}
UNITS = {"example": "blocks of text", "client": "clients", "local": "clients"}
ADJACENCY = {
    ("example", "poisson"): "compared with a run without its gradients",
    ("client", "poisson"): "compared with a run without its updates",
    ("client", "bounded"): "compared with a run with the same participation and updates of zero",
    ("client", "correlated"): "compared with a run with the same participation and updates of zero",
    ("local", "bounded"): "compared with any other updates of the client",
}
TRUST = {
    "example": "the client and whoever sets its options; its updates already contain the noise",
    "client": "the server, which sees single updates and adds the noise",
    "local": "the client and whoever sets its options",
}
PARTICIPATION = (
    "a client's name, how much text it has, when and how often it takes part, how long its jobs"
    " take, the kinds of its errors, and a digest of all prepared text"
)
OF_SITE = (
    "a client's name, how much text it has down to a power of two, when and how often it takes"
    " part, how long its jobs take, and the kinds of its errors"
)
NOT_COVERED = {
    "example": (
        "a document or an author that fills many blocks (the blocks' guarantees add up)",
        PARTICIPATION,
    ),
    "client": (
        "the server, and whoever can read its folder or what it prints: publish only model/,"
        " samples.md, summary.json and report.html of it",
        "the number of clients, and the times at which versions appear",
    ),
    "local": (PARTICIPATION,),
}
BOUNDED = "when and how often a client takes part"
OTHER_PARTS = "the public part{trained} and the held-out part, on which the model is scored"
TRAINED = ", which trained the tokenizer,"
OTHER_RUNS = "other runs on the same text: their epsilons add to this one"


def statement(o: RunOptions, plan: PrivacyPlan, clients: int) -> dict[str, Any]:
    """The guarantee as plain JSON values."""
    return {
        "private": o.privacy.rng == "secure",
        "unit": plan.unit,
        "protects": UNIT[plan.unit].format(block=o.model.block_size + 1),
        "adjacency": ADJACENCY[plan.unit, plan.sampling],
        "planned_epsilon": plan.epsilon,
        "target_epsilon": plan.budget,
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "clip": o.privacy.clip,
        "sampling": _sampling(o, plan, clients),
        "accountant": accountant_of((plan.planned,), plan.delta),
        "trust": TRUST[plan.unit],
        "not_covered": _open(o, plan),
    }


def rows(promise: dict[str, Any]) -> list[tuple[str, str]]:
    """The statement as (label, text) rows, for a person."""
    budget = ""
    if promise["target_epsilon"] is not None:
        fits = promise["planned_epsilon"] <= promise["target_epsilon"]
        budget = (
            f", {'never' if fits else 'but the run ends before it is'} above"
            f" {promise['target_epsilon']:g}"
        )
    mark = (
        []
        if promise["private"]
        else [("NOT PRIVATE", "privacy.rng=seeded: whoever knows the seed can subtract the noise")]
    )
    weak = []
    if (delta := promise["delta"]) > WEAK_DELTA:
        text = (
            f"delta is {delta:.2g}: with this probability the bound on epsilon may fail, so the"
            " guarantee promises next to nothing; set privacy.delta=0.001 or less, which needs"
            f" more noise, or take many more {UNITS[promise['unit']]}"
        )
        weak = [("WEAK", text)]
    return [
        *mark,
        *weak,
        ("protects", f"{promise['protects']} ({promise['adjacency']})"),
        (
            "epsilon",
            f"{promise['planned_epsilon']:.3g} as planned{budget}, at delta {promise['delta']:.2g}",
        ),
        (
            "noise",
            f"{promise['noise_multiplier']:.4g} x clip {promise['clip']:g}, {promise['sampling']}",
        ),
        ("accountant", promise["accountant"]),
        ("trusts", promise["trust"]),
        *(("not covered", text) for text in promise["not_covered"]),
    ]


def _open(o: RunOptions, plan: PrivacyPlan) -> list[str]:
    """The exceptions from the guarantee."""
    known = [BOUNDED] if plan.unit == "client" and plan.sampling != "poisson" else []
    start = (
        [] if o.init_from is None else [f"the weights that it starts from, init_from={o.init_from}"]
    )
    exceptions = [
        OF_SITE if text == PARTICIPATION and o.corpus.at_sites else text
        for text in NOT_COVERED[plan.unit]
    ]
    parts = OTHER_PARTS.format(trained=TRAINED if o.tokenizer.name == "bpe" else "")
    return [*exceptions, *known, parts, OTHER_RUNS, *start]


def _sampling(o: RunOptions, plan: PrivacyPlan, clients: int) -> str:
    q, count = plan.planned.sampling_probability, plan.planned.count
    if plan.unit == "example":
        return (
            f"{count} steps, each block of the smallest shard in a batch with p = {q:.3g} by a"
            " secret coin; larger shards have a smaller epsilon"
        )
    if plan.unit == "local":
        return (
            "doubled, because an update may be replaced by any other; at most"
            f" {count} updates of a client"
        )
    if plan.sampling == "poisson":
        few = (
            f"; few clients ({clients}): privacy=example may serve better" if clients < FEW else ""
        )
        return f"{count} releases, each client in one with p = {q:.3g} by a secret coin{few}"
    what = f"no amplification by sampling; a client is in at most {plan.participations} releases"
    if plan.sampling == "correlated":
        bands = f"noise correlated over {o.privacy.bands} (x {plan.scale:.3g})"
        return f"{what}, {o.privacy.separation} versions apart; {bands}"
    return what
