"""What does federation cost? Synchronous clients against a central twin of as many steps.

    python simulations/twins/run.py            # about 40 minutes on 2 cores
    python simulations/twins/run.py --quick    # a smoke run

k iid clients of equal speed (`experiment=fleet` with fleet=none) train in 128 rounds of 10 steps of
512 tokens each. The twin is one client with all text, the same number of steps (1,280) and k times
the batch, so it trains the same tokens. For k = 4 both sides are tuned on seed 0: the federation
over rules and learning rates, the twin over learning rates. For k = 8 each side tries its two best
settings of k = 4. The best setting of each side is then run with three seeds. `cost` is the mean
held-out loss of the best synchronous setting over that of the twin, minus one.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import arguments, run_arms, runs_folder, spread, table, write_results

COMMON = ["experiment=fleet", "clock=real", "fleet=none", "evaluate.every=16"]
QUICK = ["corpus=stdlib", "tokenizer=bytes", "model.n_embd=32", "evaluate.tokens=2048"]
TOKENS = 655_360  # tokens that each client trains on
RULES = {"fedavg": ["strategy=fedavg"]} | {
    f"diloco {eta}/{mu}": ["strategy=diloco", f"strategy.eta={eta}", f"strategy.mu={mu}"]
    for eta, mu in ((1.0, 0.3), (1.0, 0.5), (0.7, 0.6), (0.6, 0.8))
}
GRID = [
    *(("fedavg", lr) for lr in (3e-3, 6e-3, 9e-3, 1.2e-2, 1.6e-2)),
    ("diloco 1.0/0.3", 6e-3),
    ("diloco 1.0/0.3", 8e-3),
    ("diloco 1.0/0.5", 4.5e-3),
    ("diloco 1.0/0.5", 6e-3),
    ("diloco 0.7/0.6", 6e-3),
    ("diloco 0.7/0.6", 9e-3),
    ("diloco 0.7/0.6", 1.2e-2),
    ("diloco 0.6/0.8", 6e-3),
    ("diloco 0.6/0.8", 9e-3),
]
TWIN = [("twin", lr) for lr in (3e-3, 4.5e-3, 6e-3, 9e-3, 1.2e-2, 1.6e-2)]
Setting = tuple[str, float]  # (rule, learning rate)


def main() -> None:
    chosen = arguments(__doc__ or "")
    folder, seeds = runs_folder(chosen.runs), [0] if chosen.quick else [0, 1, 2]
    grid, twins = (GRID[1:2], TWIN[2:3]) if chosen.quick else (GRID, TWIN)
    common = [*COMMON, *(QUICK if chosen.quick else [])]
    tokens = 5120 if chosen.quick else TOKENS
    figures: dict[str, Any] = {}
    for clients in (4,) if chosen.quick else (4, 8):
        sides = {"sync": grid, "twin": twins}
        found = losses(folder, [*grid, *twins], clients, tokens, [0], common)
        ranked = {
            side: sorted(settings, key=lambda one: found[one][0])
            for side, settings in sides.items()
        }
        best = {side: settings[0] for side, settings in ranked.items()}
        final = losses(folder, list(best.values()), clients, tokens, seeds, common)
        figures[str(clients)] = {
            "cost": statistics.mean(final[best["sync"]]) / statistics.mean(final[best["twin"]]) - 1,
            "grid": {label(setting): loss[0] for setting, loss in found.items()},
            "best": {
                side: {"setting": label(one), "loss": spread(final[one])}
                for side, one in best.items()
            },
        }
        grid, twins = ranked["sync"][:2], ranked["twin"][:2]
    for clients, f in figures.items():
        rows = [(name, f"{loss:.4f}") for name, loss in f["grid"].items()]
        print(table((f"{clients} clients", "loss, seed 0"), rows))
        best = f["best"].items()
        print("  ".join(f"{side}: {b['setting']} {b['loss']['mean']:.4f}" for side, b in best))
        print(f"cost {f['cost']:+.1%}")
    if not chosen.quick:
        write_results(STUDY, seeds, {"clients": figures, "options": COMMON})


def label(setting: Setting) -> str:
    return f"{setting[0]} lr={setting[1]:g}"


def losses(
    folder: Path,
    settings: list[Setting],
    clients: int,
    tokens: int,
    seeds: list[int],
    common: list[str],
) -> dict[Setting, list[float]]:
    """The final held-out losses of every setting, in the order of the seeds."""
    arms, fixed = {}, ["pace=cohort", f"tokens={clients * tokens}"]
    for rule, lr in settings:
        rate = [f"local.lr={lr}", f"local.min_lr={lr / 10:g}"]
        if rule == "twin":
            number, options = 1, ["strategy=fedavg", f"local.batch_size={8 * clients}"]
        else:
            number, options = clients, RULES[rule]
        cohort = [f"partition.clients={number}", f"pace.clients={number}"]
        arms[f"{clients} {rule} {lr:g}"] = [*fixed, *rate, *options, *cohort]
    runs = run_arms(folder, arms, seeds, common)
    return {
        setting: [one.summary["final"]["loss"] for one in of]
        for setting, of in zip(settings, runs.values(), strict=True)
    }


if __name__ == "__main__":
    main()
