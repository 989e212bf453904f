"""Which rules withstand malicious clients? Eight rules against attacks by 2 of 10 clients.

    python simulations/robust/run.py            # about 8 minutes on 2 cores
    python simulations/robust/run.py --quick    # a smoke run

All runs are `experiment=fleet` on the real clock with 10 iid clients, all of them in every round,
equal tokens, seed 0, without the server's limit on the norm of updates (validate=off). The
attackers train like the others, but send -3 times their update (sign_flip), noise 10 times as long
(gaussian), or 10 times the update (scale); a fourth column is without an attack. The rules with an
option for the number of attackers have the right number, 2. The time of a server step is the median
time, without an attack, from the last update of a round to the new model; FLTrust's includes the
training of the server's own update.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import fedgpt
from fedgpt.storage.run_folder import read_lines

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import SMALL, arguments, run_arms, runs_folder, spread, table, write_results
from dots import draw_dots

COMMON = [
    *("experiment=fleet", "clock=real", "fleet=none", "validate=off"),
    *("partition.clients=10", "pace.clients=10", "local.steps=5"),
    "tokens=256000",  # 10 rounds of 10 clients x 5 steps x 512 tokens
]
QUICK = [*SMALL, "tokens=20480", "local.steps=2"]
RULES = {
    "fedavg": [],
    "median": [],
    "trimmed_mean": ["strategy.trim=2"],
    "krum": ["strategy.attackers=2"],
    "geometric_median": [],
    "norm_clip": [],
    "centred_clip": [],
    "fltrust": [],
}
ATTACKS = {
    "none": ["attack=none"],
    "sign_flip": ["attack=sign_flip", "attack.clients=2", "attack.strength=3"],
    "gaussian": ["attack=gaussian", "attack.clients=2", "attack.strength=10"],
    "scale": ["attack=scale", "attack.clients=2", "attack.strength=10"],
}


def main() -> None:
    chosen = arguments(__doc__ or "")
    rules, attacks = list(RULES), list(ATTACKS)
    if chosen.quick:
        rules, attacks = ["krum"], ["none", "sign_flip"]
    folder, common = runs_folder(chosen.runs), [*COMMON, *(QUICK if chosen.quick else [])]
    arms = {
        f"{rule}, {a}": [f"strategy={rule}", *RULES[rule], *ATTACKS[a]]
        for rule in rules
        for a in attacks
    }
    runs = {name: one for name, (one,) in run_arms(folder, arms, [0], common).items()}
    losses = {
        a: {rule: spread([runs[f"{rule}, {a}"].summary["final"]["loss"]]) for rule in rules}
        for a in attacks
    }
    seconds = {rule: step_seconds(runs[f"{rule}, none"]) for rule in rules}
    counts = {name: one.summary["rejected"] for name, one in runs.items()}
    rejected = {name: count for name, count in counts.items() if count}
    means = {a: {rule: of["mean"] for rule, of in losses[a].items()} for a in attacks}
    rows = [
        (rule, *(f"{means[a][rule]:.3f}" for a in attacks), f"{1000 * seconds[rule]:.0f}")
        for rule in rules
    ]
    print(table(("held-out loss", *attacks, "server step, ms"), rows))
    print(f"updates that the server rejected before any rule saw them: {rejected or 'none'}")
    path = (folder if chosen.quick else STUDY) / "figure.png"
    draw_dots(losses, "held-out loss (nats a token)", path)
    if not chosen.quick:
        results = {
            "loss": means,
            "loss_at_start": runs["fedavg, none"].summary["initial"]["loss"],
            "step_seconds": seconds,
            "rejected": rejected,
            "options": {name: [*common, *arm] for name, arm in arms.items()},
        }
        write_results(STUDY, [0], results)


def step_seconds(one: fedgpt.Run) -> float:
    """The median time from the last accepted update of a version to the next model."""
    taken, last = [], 0.0
    for event in read_lines(one.folder / "events.jsonl"):
        if event["event"] == "accept":
            last = event["seconds"]
        elif event["event"] == "version":
            taken.append(event["seconds"] - last)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
