"""What does privacy cost in loss? Epsilon 8, 4, 2 and none, for two units of privacy.

    python simulations/privacy/run.py            # about 40 minutes on 2 cores
    python simulations/privacy/run.py --quick    # a smoke run

The text is the State of the Union addresses as bytes, dealt evenly; the model has 33,000
parameters. Runs are synchronous or asynchronous, and start from scratch or from weights trained on
public text: the source of Python's standard library.

privacy=example: 50 clients, of which 10 train at a time, with 4 steps of 128 blocks on average
(from scratch 16 of 32). privacy=client: 200 clients with 4 steps of 8 windows; sums of 50 updates,
which are chosen by secret coins or, asynchronously, come from a buffer to which each client sends
at most 8 updates. Asynchronous runs are on the virtual clock with log-normal speeds. The runs
without privacy have the same clients and tokens, but their own number of steps and learning rate.
Learning rates and clips were chosen on seed 0 at epsilon 8. Synchronous runs at none, 8 and 2 have
three seeds, the others one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import (
    COLOURS,
    arguments,
    run,
    run_arms,
    runs_folder,
    spread,
    table,
    write_results,
)

MODEL = [
    *("tokenizer=bytes", "model.n_layer=2", "model.n_head=2", "model.n_embd=32"),
    *("model.block_size=64", "local.precision=fp32", "checkpoint.every=0"),
    *("evaluate=ends", "evaluate.tokens=16384", "evaluate.samples=0"),
]
# the run that trains the public weights
PUBLIC = [
    *("corpus=stdlib", "partition=iid", "partition.clients=1", "pace.clients=1", "seed=0"),
    *("local.steps=100", "local.batch_size=64", "local.lr=5e-3", "rounds=15"),
]
TEXT = ["corpus=sotu_addresses", "partition=iid"]
ASYNC = ["pace=buffer", "clock=virtual", "fleet=lognormal"]
UNITS = {
    "example": ["partition.clients=50", "local.steps=4", "local.batch_size=128"],
    "client": [
        *("partition.clients=200", "local=reset", "local.warmup=0"),
        *("local.steps=4", "local.batch_size=8"),
    ],
}
PACES = {
    ("example", "sync"): ["pace.clients=10", "rounds=8"],
    ("example", "async"): [*ASYNC, "pace.clients=10", "rounds=80"],
    ("client", "sync"): ["pace.rate=0.25", "rounds=24"],
    ("client", "async"): [
        *(*ASYNC, "strategy=fedbuff"),
        *("pace.clients=50", "pace.goal=50", "rounds=24"),
    ],
}
PRIVATE = {
    ("example", "sync"): ["privacy=example"],
    ("example", "async"): ["privacy=example"],
    ("client", "sync"): ["privacy=client"],
    ("client", "async"): ["privacy=client", "privacy.participations=8"],
}
TUNED = {  # (unit, start): (options without privacy, options with privacy)
    ("example", "scratch"): (
        ["local.steps=32", "local.batch_size=16", "local.lr=4e-3"],
        ["local.steps=16", "local.batch_size=32", "local.lr=1e-2"],
    ),
    ("example", "public"): (["local.lr=5e-3"], ["local.lr=1e-2"]),
    ("client", "scratch"): (["local.lr=6e-3"], ["local.lr=6e-3", "privacy.clip=0.4"]),
    ("client", "public"): (["local.lr=3e-3"], ["local.lr=3e-3", "privacy.clip=0.2"]),
}
EPSILONS = (None, 8, 4, 2)
SHORT = ["local.batch_size=4", "local.steps=1", "rounds=2"]
QUICK = ["model.n_embd=16", "model.block_size=16", *SHORT]


def main() -> None:
    chosen = arguments(__doc__ or "")
    folder, seeds = runs_folder(chosen.runs), [0] if chosen.quick else [0, 1, 2]
    quick = QUICK if chosen.quick else []
    one_core = ["runtime.workers=1", "runtime.threads=1"]
    public = run(folder / "public", *MODEL, *PUBLIC, *quick, *one_core).folder
    starts = {"scratch": [], "public": [f"init_from={public}"]}
    arms = {
        f"{unit} {pace} {start} {epsilon or 'none'}": [
            *federation(unit, pace, start, epsilon),
            *starts[start],
            *quick,
        ]
        for unit, pace in PACES
        for start in starts
        for epsilon in EPSILONS
    }
    if chosen.quick:
        kept = ("example sync public none", "example sync public 8", "client async scratch 2")
        arms = {name: arms[name] for name in kept}
    repeated = {n: arm for n, arm in arms.items() if " sync " in n and not n.endswith(" 4")}
    first = run_arms(folder, arms, seeds[:1], MODEL)
    more = run_arms(folder, repeated, seeds[1:], MODEL)
    runs = {name: of + more.get(name, []) for name, of in first.items()}
    figures = {
        name: figures_of(of, runs.get(f"{name.rsplit(' ', 1)[0]} none"))
        for name, of in runs.items()
    }
    arm = ("unit", "pace", "start", "epsilon")
    print(table((*arm, "held-out loss", "[min, max]", "over none"), rows(figures)))
    if not chosen.quick:
        draw(figures, STUDY / "figure.png")
        before = runs["example sync public none"][0].summary["initial"]["loss"]
        options = {
            name: [*MODEL, *(option for option in arm if not option.startswith("init_from"))]
            for name, arm in arms.items()
        }
        results = {"arms": figures, "public": {"loss_before": before}, "options": options}
        write_results(STUDY, seeds, results)


def federation(unit: str, pace: str, start: str, epsilon: int | None) -> list[str]:
    """The options of an arm, without its initial weights."""
    tuned, private = TUNED[unit, start]
    if epsilon is not None:
        tuned = [*PRIVATE[unit, pace], *private, f"privacy.target_epsilon={epsilon}"]
    return [*TEXT, *UNITS[unit], *PACES[unit, pace], *tuned]


def figures_of(runs: list, plain: list | None) -> dict:
    """The figures of an arm, in nats a byte; `over_none` compares runs with the same seed."""
    losses = [one.summary["final"]["loss"] for one in runs]
    ratios = [a / b.summary["final"]["loss"] - 1 for a, b in zip(losses, plain or [], strict=False)]
    spent = [one.summary["epsilon"] for one in runs]
    return {
        "loss": spread(losses),
        "over_none": spread(ratios) if ratios else None,
        "epsilon_spent": None if None in spent else spread(spent),
        "delta": runs[0].summary["delta"],
        "tokens": runs[0].summary["tokens"],
        "seeds": len(runs),
    }


def rows(figures: dict) -> list[tuple[str, ...]]:
    def of(name: str, f: dict) -> tuple[str, ...]:
        loss, over = f["loss"], f["over_none"]
        between = f"[{loss['min']:.3f}, {loss['max']:.3f}]"
        return *name.split(), f"{loss['mean']:.3f}", between, f"{over['mean']:+.1%}" if over else ""

    return [of(name, f) for name, f in figures.items()]


def draw(figures: dict, path: Path) -> None:
    """Draw loss against epsilon: a panel for each unit, a line for each pacing and start."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    places = {"none": 3, "8": 2, "4": 1, "2": 0}
    for axis, unit in zip(axes, UNITS, strict=True):
        lines = [(pace, start) for start in ("scratch", "public") for pace in ("sync", "async")]
        for colour, (pace, start) in zip(COLOURS, lines, strict=False):
            found = {words: figures[f"{unit} {pace} {start} {words}"]["loss"] for words in places}
            at, mean = [places[w] for w in found], [f["mean"] for f in found.values()]
            off = [
                [f["mean"] - f["min"] for f in found.values()],
                [f["max"] - f["mean"] for f in found.values()],
            ]
            style = {"color": colour, "marker": "o", "markersize": 4, "capsize": 3}
            axis.errorbar(at, mean, yerr=off, label=f"{pace}, {start}", **style)
        axis.set_xticks(list(places.values()), list(places))
        axis.set_xlabel("epsilon")
        axis.set_title(f"privacy={unit}", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss (nats a byte)")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
