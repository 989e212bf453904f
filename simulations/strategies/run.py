"""How do the strategies compare at equal tokens?

    python simulations/strategies/run.py            # about 15 minutes on 2 cores
    python simulations/strategies/run.py --quick    # a smoke run

Seven synchronous rules, six robust ones, five asynchronous ones and auto, with three seeds each.
All runs are `experiment=fleet`: 4 iid clients of 0.58, 0.75, 1.51 and 3.33 seconds a step on the
virtual clock. Every rule has the defaults of conf/strategy/, except for the numbers in its name;
none is tuned for this setting. Krum is not included, because it needs at least five clients:
simulations/robust compares it, with attackers.
"""

from __future__ import annotations

import sys
from pathlib import Path

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import SMALL, arguments, run_arms, runs_folder, spread, table, write_results
from dots import draw_dots

COMMON = ["experiment=fleet", "tokens=327680"]  # 16 rounds of 4 clients x 10 steps x 512 tokens
QUICK = [*SMALL, "tokens=8192", "local.steps=2"]
SYNCHRONOUS = {
    "fedavg": ["strategy=fedavg"],
    "fedprox": ["strategy=fedprox"],
    "fedavgm, mu 0.5": ["strategy=fedavgm"],
    "diloco, mu 0.5": ["strategy=diloco", "strategy.mu=0.5"],
    "diloco, mu 0.9": ["strategy=diloco", "strategy.mu=0.9"],
    "fedadam": ["strategy=fedadam"],
    "fedyogi": ["strategy=fedyogi"],
}
ROBUST = {
    "median": ["strategy=median"],
    "trimmed_mean, trim 1": ["strategy=trimmed_mean", "strategy.trim=1"],
    "geometric_median": ["strategy=geometric_median"],
    "norm_clip": ["strategy=norm_clip"],
    "centred_clip": ["strategy=centred_clip"],
    "fltrust": ["strategy=fltrust"],
}
ASYNCHRONOUS = {
    "delta_sgd": ["strategy=delta_sgd"],
    "delta_sgd, dylu": ["strategy=delta_sgd", "pace.dylu=true"],
    "fedbuff, goal 4": ["strategy=fedbuff", "pace.goal=4"],
    "fedasync": ["strategy=fedasync"],
    "delayed_nesterov, mu 0.5": [
        "strategy=delayed_nesterov",
        "strategy.mu=0.5",
        "strategy.period=8",
    ],
}
AUTO = ["strategy=auto"]  # starts with pace=cohort


def main() -> None:
    chosen = arguments(__doc__ or "")
    kinds = {
        "synchronous": SYNCHRONOUS,
        "robust": ROBUST,
        "asynchronous": ASYNCHRONOUS,
        "by the server": {"auto": AUTO},
    }
    if chosen.quick:
        kinds = {kind: dict(list(rules.items())[:1]) for kind, rules in kinds.items()}
    seeds = [0] if chosen.quick else [0, 1, 2]
    folder, common = runs_folder(chosen.runs), [*COMMON, *(QUICK if chosen.quick else [])]
    arms = {}
    for kind, rules in kinds.items():
        pace = "pace=buffer" if kind == "asynchronous" else "pace=cohort"
        arms |= {name: [pace, *rule] for name, rule in rules.items()}
    figures = {
        name: figures_of(runs) for name, runs in run_arms(folder, arms, seeds, common).items()
    }
    head = ("strategy", "pacing", "held-out loss", "[min, max]", "virtual s", "MB up", "MB down")
    rows = [row(kind, name, figures[name]) for kind, rules in kinds.items() for name in rules]
    print(table(head, rows))
    series = {kind: {n: figures[n]["loss"] for n in rules} for kind, rules in kinds.items()}
    path = (folder if chosen.quick else STUDY) / "figure.png"
    draw_dots(series, "held-out loss (nats a token)", path)
    if not chosen.quick:
        options = {name: [*common, *arm] for name, arm in arms.items()}
        write_results(STUDY, seeds, {"arms": figures, "options": options})


def figures_of(runs: list) -> dict:
    """The figures of a rule; bytes are the mean over seeds."""
    summaries = [one.summary for one in runs]
    return {
        "loss": spread([s["final"]["loss"] for s in summaries]),
        "virtual_seconds": spread([s["virtual_seconds"] for s in summaries]),
        "bytes_up": spread([s["bytes_up"] for s in summaries])["mean"],
        "bytes_down": spread([s["bytes_down"] for s in summaries])["mean"],
        "tokens": summaries[0]["tokens"],
        "versions": summaries[0]["versions"],
    }


def row(kind: str, name: str, f: dict) -> tuple[str, ...]:
    loss, seconds = f["loss"], f"{f['virtual_seconds']['mean']:.0f}"
    losses = f"{loss['mean']:.3f}", f"[{loss['min']:.3f}, {loss['max']:.3f}]"
    megabytes = (f"{f[way] / 1e6:.0f}" for way in ("bytes_up", "bytes_down"))
    return name, kind, *losses, seconds, *megabytes


if __name__ == "__main__":
    main()
