"""Does the server choose the better pacing? strategy=auto against rounds and asynchrony.

    python simulations/auto/run.py            # about 25 minutes on 2 cores
    python simulations/auto/run.py --quick    # a smoke run

All runs are `experiment=fleet` with the same tokens and learning rate: 4 iid clients on the virtual
clock, with the published speeds (0.58 to 3.33 seconds a step), equal speeds, or log-normal ones,
which differ by seed. The two fixed choices are auto's rule (delta-SGD) under pace=cohort and under
pace=buffer. The measure is the virtual time to a held-out loss, averaged over three losses, because
a single evaluation is noisy. `over_better` is auto's time over that of the faster fixed choice,
minus one: its mean over seeds, with the standard error. Twice the learning rate would be a little
faster, but then a time varies by 6 % from seed to seed instead of 2 %.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import SMALL, arguments, run_arms, runs_folder, seconds_to, table, write_results

COMMON = ["experiment=fleet", "local.lr=3e-3", "local.min_lr=3e-4"]
QUICK = [*SMALL, "tokens=20480", "model.n_embd=32"]
FLEETS = ("published", "constant", "lognormal")
CHOICES = {
    "sync": ["pace=cohort", "strategy=delta_sgd"],
    "async": ["pace=buffer", "strategy=delta_sgd"],
    "auto": ["strategy=auto"],
}
TARGETS = (5.0, 4.85, 4.7)  # held-out losses in nats a token, which all runs reach
# seeds that suffice to know the slower fixed choice of a fleet, unless its speeds differ by seed
FIRST = 2


def main() -> None:
    chosen = arguments(__doc__ or "")
    seeds = [0] if chosen.quick else list(range(12))
    targets = (5.2,) if chosen.quick else TARGETS
    arms = {
        f"{fleet} {name}": [*options, f"fleet={fleet}"]
        for fleet in FLEETS
        for name, options in CHOICES.items()
    }
    if chosen.quick:
        arms = {name: arm for name, arm in arms.items() if name.startswith("published")}
    folder, common = runs_folder(chosen.runs), [*COMMON, *(QUICK if chosen.quick else [])]
    runs = run_arms(folder, arms, seeds[:FIRST], common)
    seconds = {name: [mean_time(one, targets) for one in of] for name, of in runs.items()}
    studied = [fleet for fleet in FLEETS if f"{fleet} auto" in runs]
    behind = {f"{fleet} {worse(fleet, seconds)}" for fleet in studied if fleet != "lognormal"}
    rest = {name: arm for name, arm in arms.items() if name not in behind}
    more = run_arms(folder, rest, seeds[FIRST:], common)
    for name, of in more.items():
        seconds[name] += [mean_time(one, targets) for one in of]
    fleets = {fleet: figures_of(fleet, seconds) for fleet in studied}
    times = ("sync, s", "async, s", "auto, s")
    head = ("fleet", *times, "better in seeds", "auto over the better", "standard error")
    print(table(head, [row(fleet, f) for fleet, f in fleets.items()]))
    if not chosen.quick:
        options = {name: [*COMMON, *arm] for name, arm in arms.items()}
        write_results(STUDY, seeds, {"fleets": fleets, "targets": TARGETS, "options": options})


def mean_time(one, targets: tuple[float, ...]) -> float:
    """The mean virtual time to the losses; raises SystemExit if one is never reached."""
    found = []
    for loss in targets:
        seconds = seconds_to(one, loss)
        if seconds is None:
            sys.exit(f"{one.folder} never reaches a loss of {loss}")
        found.append(seconds)
    return statistics.mean(found)


def worse(fleet: str, seconds: dict[str, list[float]]) -> str:
    """The slower fixed choice on a fleet."""
    return max(
        ("sync", "async"), key=lambda name: statistics.mean(seconds[f"{fleet} {name}"][:FIRST])
    )


def figures_of(fleet: str, seconds: dict[str, list[float]]) -> dict:
    """Mean times of all choices, and auto's time over that of the better fixed one."""
    by_seed = {name: seconds[f"{fleet} {name}"] for name in CHOICES}
    ratios, better = [], []
    for seed, auto in enumerate(by_seed["auto"]):
        fixed = {
            name: by_seed[name][seed] for name in ("sync", "async") if seed < len(by_seed[name])
        }
        better.append(min(fixed, key=lambda name: fixed[name]))
        ratios.append(auto / fixed[better[-1]])
    several = len(ratios) > 1
    return {
        "better": {name: better.count(name) for name in sorted(set(better))},
        "seconds": {name: statistics.mean(of) for name, of in by_seed.items()},
        "over_better": statistics.mean(ratios) - 1,
        "standard_error": statistics.stdev(ratios) / len(ratios) ** 0.5 if several else None,
        "over_better_by_seed": [ratio - 1 for ratio in ratios],
        "seconds_by_seed": by_seed,
    }


def row(fleet: str, f: dict) -> tuple[str, ...]:
    """The row of a fleet in the table."""
    error = "" if f["standard_error"] is None else f"{f['standard_error']:.1%}"
    better = ", ".join(f"{name} {count}" for name, count in f["better"].items())
    seconds = (f"{f['seconds'][name]:.1f}" for name in CHOICES)
    return fleet, *seconds, better, f"{f['over_better']:+.1%}", error


if __name__ == "__main__":
    main()
