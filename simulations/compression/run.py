"""What do compressed updates cost in loss, and how many bytes do they save?

    python simulations/compression/run.py            # about 12 minutes on 2 cores
    python simulations/compression/run.py --quick    # a smoke run

All runs are `experiment=fleet` with rounds (pace=cohort, strategy=fedavg): 4 iid clients, 32 rounds
of 10 local steps, three seeds. Bytes are those of the encoded messages, headers included. The
sparse codecs send 1/64 of the elements; with error feedback, a client adds what it left out to its
next update. For one arm of `sparse_loco` the decay of the error feedback and the server's learning
rate are tuned on seed 0 first (the grid is in results.json); all other arms have the defaults.
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
    SMALL,
    arguments,
    run_arms,
    runs_folder,
    spread,
    table,
    write_results,
)

COMMON = ["experiment=fleet", "pace=cohort", "strategy=fedavg"]
QUICK = [*SMALL, "tokens=20480", "model.n_embd=32"]
GRID = {
    f"decay {decay}, eta {eta}": (decay, eta)
    for decay in (0.9, 0.95, 1.0)
    for eta in (1.0, 1.5, 2.0, 3.0, 4.0)
}
CODECS = {
    "none": ["update=none"],
    "bf16": ["update=bf16"],
    "int8": ["update=int8"],
    "int4": ["update=int4"],
    "int4, error feedback": ["update=int4", "update.error_feedback=true"],
    "e3m0": ["update=e3m0"],
    "topk": ["update=topk"],
    "topk, no feedback": ["update=topk", "update.error_feedback=false"],
    "sparse_loco": ["update=sparse_loco"],
    "sparse_loco, no feedback": ["update=sparse_loco", "update.error_feedback=false"],
}
TUNED = "sparse_loco, tuned"


def main() -> None:
    chosen = arguments(__doc__ or "")
    folder, common = runs_folder(chosen.runs), [*COMMON, *(QUICK if chosen.quick else [])]
    seeds = [0] if chosen.quick else [0, 1, 2]
    grid = tune(folder, common, dict(list(GRID.items())[:1]) if chosen.quick else GRID)
    codecs = {name: CODECS[name] for name in ("none", "int8")} if chosen.quick else CODECS
    arms = {**codecs, TUNED: loco(*GRID[min(grid, key=lambda name: grid[name])])}
    runs = run_arms(folder, arms, seeds, common)
    figures = {name: figures_of(of, runs["none"]) for name, of in runs.items()}
    head = ("codec", "held-out loss", "[min, max]", "over none", "bytes up", "times fewer")
    print(table(head, [row(name, f) for name, f in figures.items()]))
    draw(figures, (folder if chosen.quick else STUDY) / "figure.png")
    if not chosen.quick:
        options = {name: [*common, *arm] for name, arm in arms.items()}
        write_results(STUDY, seeds, {"codecs": figures, "grid": grid, "options": options})


def loco(decay: float, eta: float) -> list[str]:
    return ["update=sparse_loco", f"update.decay={decay}", f"strategy.eta={eta}"]


def tune(folder: Path, common: list[str], grid: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The final held-out loss of sparse_loco for every setting, with seed 0."""
    arms = {f"loco {name}": loco(*setting) for name, setting in grid.items()}
    runs = run_arms(folder, arms, [0], common)
    losses = {name: runs[f"loco {name}"][0].summary["final"]["loss"] for name in grid}
    print(table(("sparse_loco", "loss"), [(name, f"{loss:.4f}") for name, loss in losses.items()]))
    return losses


def figures_of(runs: list, plain: list) -> dict:
    """The figures of a codec; `over_none` compares runs with the same seed."""
    ratios = [
        one.summary["final"]["loss"] / base.summary["final"]["loss"] - 1
        for one, base in zip(runs, plain, strict=True)
    ]
    up = spread([one.summary["bytes_up"] for one in runs])["mean"]
    return {
        "loss": spread([one.summary["final"]["loss"] for one in runs]),
        "over_none": spread(ratios),
        "bytes_up": up,
        "times_fewer": spread([base.summary["bytes_up"] for base in plain])["mean"] / up,
        "tokens": runs[0].summary["tokens"],
    }


def row(name: str, f: dict) -> tuple[str, ...]:
    loss, over = f["loss"], f["over_none"]["mean"]
    losses = f"{loss['mean']:.3f}", f"[{loss['min']:.3f}, {loss['max']:.3f}]"
    return name, *losses, f"{over:+.2%}", f"{f['bytes_up']:,.0f}", f"{f['times_fewer']:.1f}"


def draw(figures: dict, path: Path) -> None:
    """Draw loss against bytes: for each codec a point, and a line from minimum to maximum."""
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, f) in enumerate(figures.items()):
        loss, colour = f["loss"], COLOURS[number % len(COLOURS)]
        axis.plot([f["bytes_up"]] * 2, [loss["min"], loss["max"]], color=colour, linewidth=1)
        mark = "s" if "no feedback" in name else "o"
        axis.plot(f["bytes_up"], loss["mean"], mark, color=colour, markersize=6, label=name)
    axis.set_xscale("log")
    axis.set_xlabel("bytes from the clients, a run")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
