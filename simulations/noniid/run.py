"""What do clients with different texts cost? Four strategies on five partitions of the same presidents' addresses.

    python simulations/noniid/run.py            # about 20 minutes on 2 cores
    python simulations/noniid/run.py --quick    # a smoke run

All runs are `experiment=fleet` with 8 clients, all of them in every round (asynchronous: 8 in flight), and equal
tokens. iid deals shuffled pieces; dirichlet skews who holds which party's text, and how much; grouped deals whole
presidents; natural keeps the 8 presidents with most text, so it also has less text than the held-out part is drawn
from. FedAvg has three seeds, the others one.
"""

from __future__ import annotations

import sys
from pathlib import Path

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import arguments, run_arms, runs_folder, spread, table, write_results  # noqa: E402
from dots import draw_dots  # noqa: E402

COMMON = ["experiment=fleet", "partition.clients=8", "pace.clients=8"]
EQUAL = ["tokens=491520"]  # 12 rounds of 8 clients x 10 steps x 512 tokens
QUICK = ["tokens=8192", "local.steps=2", "evaluate.tokens=2048", "tokenizer=bytes"]
PARTITIONS = {
    "iid": ["partition=iid"],
    "dirichlet, alpha 1": ["partition=dirichlet", "partition.alpha=1"],
    "dirichlet, alpha 0.1": ["partition=dirichlet", "partition.alpha=0.1"],
    "grouped": ["partition=grouped"],
    "natural": ["partition=natural"],
}
STRATEGIES = {
    "fedavg": ["strategy=fedavg"],
    "fedprox": ["strategy=fedprox"],
    "diloco, mu 0.5": ["strategy=diloco", "strategy.mu=0.5"],
    "delta_sgd, async": ["pace=buffer"],
}
SEEDS = {"fedavg": [0, 1, 2]}  # the others: seed 0


def main() -> None:
    chosen = arguments(__doc__ or "")
    strategies, partitions = list(STRATEGIES), list(PARTITIONS)
    if chosen.quick:
        strategies, partitions = ["delta_sgd, async"], ["iid", "natural"]
    folder, common = runs_folder(chosen.runs), [*COMMON, *(QUICK if chosen.quick else EQUAL)]
    losses = {}
    for strategy in strategies:
        arms = {f"{strategy} on {p}": [*STRATEGIES[strategy], *PARTITIONS[p]] for p in partitions}
        seeds = [0] if chosen.quick else SEEDS.get(strategy, [0])
        runs = run_arms(folder, arms, seeds, common)
        losses[strategy] = {
            partition: spread([one.summary["final"]["loss"] for one in runs[f"{strategy} on {partition}"]])
            for partition in partitions
        }
    print(table(("held-out loss", *partitions), [(s, *map(cell, of.values())) for s, of in losses.items()]))
    draw_dots(losses, "held-out loss (nats a token)", (folder if chosen.quick else STUDY) / "figure.png")
    if not chosen.quick:
        over_iid = {s: {p: of[p]["mean"] / of["iid"]["mean"] - 1 for p in partitions} for s, of in losses.items()}
        options = {"common": common, "partitions": PARTITIONS, "strategies": STRATEGIES}
        seeds = {strategy: SEEDS.get(strategy, [0]) for strategy in strategies}
        write_results(STUDY, [0, 1, 2], {
            "loss": losses, "loss_over_iid": over_iid, "seeds_of": seeds, "options": options,
        })  # fmt: skip


def cell(loss: dict[str, float]) -> str:
    """The mean, and the spread where there are several seeds."""
    between = f" [{loss['min']:.3f}, {loss['max']:.3f}]" if loss["max"] > loss["min"] else ""
    return f"{loss['mean']:.3f}{between}"


if __name__ == "__main__":
    main()
