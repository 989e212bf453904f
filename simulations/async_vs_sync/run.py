"""When does asynchrony pay? Loss against virtual time, tokens and bytes, for four clients.

    python simulations/async_vs_sync/run.py            # about 20 minutes on 2 cores
    python simulations/async_vs_sync/run.py --quick    # a smoke run

All runs are `experiment=fleet`: the State of the Union addresses, 4 iid clients of 0.58, 0.75, 1.51
and 3.33 seconds a step, 10 local steps, equal tokens. Synchronous FedAvg is tuned first (client and
server learning rate, seed 0); the other arms use the learning rate that is best for FedAvg, so that
tuning gives them no advantage. Over-selection (a round closes at 3 of 4 updates) and DyLU (slower
clients take fewer steps) are fair synchronous baselines. Two arms have equal speeds, where
asynchrony should gain nothing. The central twins train the same tokens on one client with all text:
with 4 times the batch in as many steps as FedAvg, or with the same batch in 4 times as many steps.
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
    scored,
    seconds_to,
    spread,
    table,
    write_results,
)

COMMON = ["experiment=fleet"]
QUICK = [*SMALL, "tokens=20480", "model.n_embd=32"]
LEARNING_RATES, SERVER_RATES = (3e-3, 4.5e-3, 6e-3, 8e-3, 1.2e-2), (0.7, 1.0, 1.4)
GRID = {f"lr{lr}-eta{eta}": (lr, eta) for lr in LEARNING_RATES for eta in SERVER_RATES}
SYNC, ASYNC = ["pace=cohort", "strategy=fedavg"], ["pace=buffer"]
TWIN = ["pace=cohort", "strategy=fedavg", "partition.clients=1", "pace.clients=1"]
ARMS = {
    "sync FedAvg": SYNC,
    "sync, over-selection 3 of 4": [*SYNC, "pace.goal=3"],
    "sync, DyLU": [*SYNC, "pace.dylu=true"],
    "async delta-SGD": ASYNC,
    "async delta-SGD, DyLU": [*ASYNC, "pace.dylu=true"],
    "async FedBuff, K=4": [*ASYNC, "strategy=fedbuff", "pace.goal=4"],
    "async FedAsync": [*ASYNC, "strategy=fedasync"],
    "async Delayed Nesterov": [*ASYNC, "strategy=delayed_nesterov", "strategy.mu=0.5"],
    "auto": ["strategy=auto"],
    "equal speeds, sync": [*SYNC, "fleet=constant"],
    "equal speeds, async": [*ASYNC, "fleet=constant"],
    "lognormal speeds, sync": [*SYNC, "fleet=lognormal"],
    "lognormal speeds, async": [*ASYNC, "fleet=lognormal"],
    "central twin, equal steps": [*TWIN, "local.batch_size=32"],
    "central twin, equal batch": [*TWIN, "local.steps=40"],
}


def main() -> None:
    chosen = arguments(__doc__ or "")
    seeds = [0] if chosen.quick else [0, 1, 2]
    common = [*COMMON, *(QUICK if chosen.quick else [])]
    folder = runs_folder(chosen.runs)
    grid = tune(folder, common, dict(list(GRID.items())[:1]) if chosen.quick else GRID)
    lr, eta = GRID[min(grid, key=lambda name: grid[name])]
    tuned = [f"local.lr={lr}", f"local.min_lr={lr / 10:g}"]
    arms = dict(ARMS)
    if chosen.quick:
        kept = ("sync FedAvg", "async delta-SGD", "auto", "central twin, equal steps")
        arms = {name: ARMS[name] for name in kept}
    for name, overrides in arms.items():
        if "strategy=fedavg" in overrides and "twin" not in name:
            arms[name] = [*overrides, f"strategy.eta={eta}"]
    runs = run_arms(folder, arms, seeds, [*common, *tuned])
    figures = {name: figures_of(of, runs["sync FedAvg"]) for name, of in runs.items()}
    head = ("arm", "loss", "[min, max]", "virtual s", "speed-up to sync loss", "up + down MB")
    print(table(head, rows(figures)))
    candidates = [n for n in ("async delta-SGD", "async delta-SGD, DyLU") if n in figures]
    best = max(candidates, key=lambda name: speedup(figures, name))
    print(f"speed-up of {best}: {speedup(figures, best):.2f}")
    if not chosen.quick:
        draw(runs, STUDY / "loss.png")
        ratio = figures[best]["loss"]["mean"] / figures["sync FedAvg"]["loss"]["mean"]
        results = {
            "speedup_to_sync_loss": speedup(figures, best),
            "best_asynchronous": best,
            "loss_over_sync_at_equal_tokens": ratio - 1,
            "tuned": {"local.lr": lr, "strategy.eta": eta},
            "grid": grid,
            "arms": figures,
            "options": {name: [*COMMON, *tuned, *arm] for name, arm in arms.items()},
        }
        write_results(STUDY, seeds, results)


def tune(folder: Path, common: list[str], grid: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The final held-out loss of synchronous FedAvg for every setting, with seed 0."""
    arms = {
        name: [*SYNC, f"local.lr={lr}", f"local.min_lr={lr / 10:g}", f"strategy.eta={eta}"]
        for name, (lr, eta) in grid.items()
    }
    runs = run_arms(folder, arms, [0], common)
    losses = {name: of[0].summary["final"]["loss"] for name, of in runs.items()}
    print(table(("setting", "loss"), [(name, f"{loss:.4f}") for name, loss in losses.items()]))
    return losses


def figures_of(runs: list, sync: list) -> dict:
    """The figures of an arm; the speed-up is over the synchronous run with the same seed."""
    ratios = []
    for one, base in zip(runs, sync, strict=True):
        reached = seconds_to(one, base.summary["final"]["loss"])
        ratios.append(base.summary["virtual_seconds"] / reached if reached else None)
    known = [ratio for ratio in ratios if ratio is not None]
    return {
        "loss": spread([one.summary["final"]["loss"] for one in runs]),
        "bits_per_byte": spread([one.summary["final"]["bits_per_byte"] for one in runs]),
        "virtual_seconds": spread([one.summary["virtual_seconds"] for one in runs]),
        "speedup_to_sync_loss": spread(known) if len(known) == len(ratios) else None,
        "megabytes": sum(runs[0].summary[way] for way in ("bytes_up", "bytes_down")) / 1e6,
        "tokens": runs[0].summary["tokens"],
        "versions": runs[0].summary["versions"],
    }


def speedup(figures: dict, name: str) -> float:
    """The mean speed-up over seeds; 0 if a seed never reached the synchronous loss."""
    reached = figures[name]["speedup_to_sync_loss"]
    return reached["mean"] if reached else 0.0


def rows(figures: dict) -> list[tuple[str, ...]]:
    def of(name: str, f: dict) -> tuple[str, ...]:
        loss, fast = f["loss"], f["speedup_to_sync_loss"]
        reached = "never"
        if name.startswith(("equal", "lognormal", "central")):
            reached = ""  # the arm has another fleet than sync FedAvg, or none
        elif fast is not None:
            reached = f"{fast['mean']:.2f} [{fast['min']:.2f}, {fast['max']:.2f}]"
        seconds = f"{f['virtual_seconds']['mean']:.0f}"
        between = f"[{loss['min']:.3f}, {loss['max']:.3f}]"
        return name, f"{loss['mean']:.3f}", between, seconds, reached, f"{f['megabytes']:.0f}"

    return [of(name, f) for name, f in figures.items()]


def draw(runs: dict, path: Path) -> None:
    """Held-out loss of seed 0 against virtual time, tokens and bytes."""
    names = ["sync FedAvg", "sync, DyLU", "async delta-SGD", "async delta-SGD, DyLU"]
    names += ["async FedBuff, K=4", "auto"]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for name, colour in zip(names, COLOURS, strict=False):
        records = [r for r in scored(runs[name][0]) if r["version"]]
        loss = [r["loss"] for r in records]
        across = [
            [r["virtual_seconds"] for r in records],
            [r["tokens"] / 1e6 for r in records],
            [(r["bytes_up"] + r["bytes_down"]) / 1e6 for r in records],
        ]
        for axis, xs in zip(axes, across, strict=True):
            axis.plot(xs, loss, color=colour, label=name, linewidth=1.3)
    labels = ("virtual seconds", "tokens (millions)", "bytes up and down (MB)")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss (nats a token)")
    axes[2].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
