"""What a private run promises, in words: printed at its start, kept with its checkpoints, part of
its model card.
"""

from __future__ import annotations

from typing import Any

from fedgpt.core.options import RunOptions
from fedgpt.privacy.plan import PrivacyPlan

FEW = 100  # clients below which privacy=client gains little from sampling

UNIT = {
    "example": "one block of {block} tokens of a client's text, cut once",
    "client": "all text of one client",
    "local": "all text of one client, against the server too",
}
ADJACENCY = {
    ("example", "poisson"): "against the same without its gradients",
    ("client", "poisson"): "against the same without its updates",
    ("client", "bounded"): "against the same with updates of zero, while it keeps coming",
    ("client", "correlated"): "against the same with updates of zero, while it keeps coming",
    ("local", "bounded"): "against any other updates of its own",
}
TRUST = {
    "example": "the client itself and who sets its options; what leaves it is already noised",
    "client": (
        "the server, which sees single updates and adds the noise; nobody who only has the model"
    ),
    "local": "the client itself and who sets its options",
}
NOT_COVERED = {
    "example": (
        "a document or an author that fills many blocks (the blocks' guarantees add up)",
        "how much text a client has, and when and how often it takes part",
    ),
    "client": (
        (
            "the server, and whoever reads in its folder: of it publish model/, samples.md and"
            " summary.json alone"
        ),
        "how many clients there are, and how many took part in all",
    ),
    "local": ("how much text a client has, and when and how often it takes part",),
}
BOUNDED = "when and how often a client takes part"
ALWAYS_OPEN = (
    (
        "the public part, which trained the tokenizer, and the held-out part, on which the model is"
        " scored"
    ),
    "other runs on the same text: their epsilons add to this one",
)


def statement(o: RunOptions, plan: PrivacyPlan, clients: int) -> dict[str, Any]:
    """The promise as plain values: unit, adjacency, epsilon as planned, delta, sampling,
    accountant, trust, limits.
    """
    event = plan.planned
    closed = event.sampling_probability == 1
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
        "accountant": (
            "closed form of Gaussian mechanisms"
            if closed
            else "dp-accounting, privacy loss distributions"
        ),
        "trust": TRUST[plan.unit],
        "not_covered": _open(o, plan),
    }


def rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    """The statement for a person: what, how much, how, for whom, and what not."""
    budget = ""
    if told["target_epsilon"] is not None:
        fits = told["planned_epsilon"] <= told["target_epsilon"]
        budget = (
            f", {'never' if fits else 'but the run ends before it is'} above"
            f" {told['target_epsilon']:g}"
        )
    mark = (
        []
        if told["private"]
        else [("NOT PRIVATE", "privacy.rng=seeded: whoever knows the seed can take the noise off")]
    )
    return [
        *mark,
        ("protects", f"{told['protects']} ({told['adjacency']})"),
        (
            "epsilon",
            f"{told['planned_epsilon']:.3g} as planned{budget}, at delta {told['delta']:.2g}",
        ),
        ("noise", f"{told['noise_multiplier']:.4g} x clip {told['clip']:g}, {told['sampling']}"),
        ("accountant", told["accountant"]),
        ("trusts", told["trust"]),
        *(("not covered", text) for text in told["not_covered"]),
    ]


def _open(o: RunOptions, plan: PrivacyPlan) -> list[str]:
    """What the promise does not speak of."""
    known = [BOUNDED] if plan.unit == "client" and plan.sampling != "poisson" else []
    start = (
        [] if o.init_from is None else [f"the weights that it starts from, init_from={o.init_from}"]
    )
    return [*NOT_COVERED[plan.unit], *known, *ALWAYS_OPEN, *start]


def _sampling(o: RunOptions, plan: PrivacyPlan, clients: int) -> str:
    q, count = plan.planned.sampling_probability, plan.planned.count
    if plan.unit == "example":
        return (
            f"{count} steps, each block of the smallest shard in a batch with p = {q:.3g} by a"
            " secret coin; larger shards pay less"
        )
    if plan.unit == "local":
        return f"twice, as an update may become any other; at most {count} updates of a client"
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
