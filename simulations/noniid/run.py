"""What do clients with different texts cost? Four strategies on five partitions of one corpus.

    python simulations/noniid/run.py            # about 15 minutes on 2 cores
    python simulations/noniid/run.py --quick    # a smoke run

All runs are `experiment=fleet` with 8 clients, all of them in every round (asynchronous: 8 in
flight), and equal tokens. The text is the State of the Union addresses. iid deals shuffled pieces;
dirichlet skews how much text a client has, and of which party; grouped gives all addresses of a
president to one client; natural keeps the 8 presidents with most text, so it has less text than the
others. Every cell has three seeds; the cost of a partition is computed seed by seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import arguments, run_arms, runs_folder, spread, table, write_results
from dots import draw_dots

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


def main() -> None:
    chosen = arguments(__doc__ or "")
    strategies, partitions = list(STRATEGIES), list(PARTITIONS)
    if chosen.quick:
        strategies, partitions = ["delta_sgd, async"], ["iid", "natural"]
    folder, common = runs_folder(chosen.runs), [*COMMON, *(QUICK if chosen.quick else EQUAL)]
    seeds, losses, ratios = [0] if chosen.quick else [0, 1, 2], {}, {}
    for strategy in strategies:
        arms = {f"{strategy} on {p}": [*STRATEGIES[strategy], *PARTITIONS[p]] for p in partitions}
        runs = run_arms(folder, arms, seeds, common)
        found = {
            p: [one.summary["final"]["loss"] for one in runs[f"{strategy} on {p}"]]
            for p in partitions
        }
        losses[strategy] = {partition: spread(of) for partition, of in found.items()}
        iid = found.pop("iid")
        ratios[strategy] = {
            partition: spread([loss / base - 1 for loss, base in zip(of, iid, strict=True)])
            for partition, of in found.items()
        }
    rows = [(s, *map(cell, of.values())) for s, of in losses.items()]
    print(table(("held-out loss", *partitions), rows))
    rows = [(s, *map(percent, of.values())) for s, of in ratios.items()]
    print(table(("over iid", *partitions[1:]), rows))
    path = (folder if chosen.quick else STUDY) / "figure.png"
    draw_dots(losses, "held-out loss (nats a token)", path)
    if not chosen.quick:
        options = {"common": common, "partitions": PARTITIONS, "strategies": STRATEGIES}
        write_results(STUDY, seeds, {"loss": losses, "loss_over_iid": ratios, "options": options})


def cell(loss: dict[str, float]) -> str:
    """A loss: mean [min, max]."""
    return f"{loss['mean']:.3f} [{loss['min']:.3f}, {loss['max']:.3f}]"


def percent(ratio: dict[str, float]) -> str:
    """The cost of a partition: mean [min, max]."""
    return f"{ratio['mean']:+.1%} [{ratio['min']:+.1%}, {ratio['max']:+.1%}]"


if __name__ == "__main__":
    main()
