"""Does the server choose its pacing as well as hindsight? strategy=auto against rounds and
asynchrony, three fleets.

    python simulations/auto/run.py            # about 25 minutes on 2 cores
    python simulations/auto/run.py --quick    # a smoke run

All runs are `experiment=fleet` with the same tokens and learning rate: 4 iid clients on the virtual
clock, with the published speeds (0.58 to 3.33 seconds a step), equal ones, or log-normal ones,
which differ by seed. The fixed choices are the arithmetic of auto (delta-SGD) under pace=cohort and
pace=buffer. What counts is the virtual time to a held-out loss; times to three losses are averaged,
as one evaluation is noisy. `over_better` is the mean over seeds of auto's time over that of
whichever fixed choice is faster on that fleet, less one, with its standard error. Twice the
learning rate is a little faster and three times as chaotic: from seed to seed a time varies by 6 %
and not by 2 %.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import arguments, run_arms, runs_folder, seconds_to, table, write_results  # noqa: E402

COMMON = ["experiment=fleet", "local.lr=3e-3", "local.min_lr=3e-4"]
QUICK = [
    "tokens=20480",
    "evaluate.tokens=2048",
    "corpus=stdlib",
    "tokenizer=bytes",
    "model.n_embd=32",
]
FLEETS = ("published", "constant", "lognormal")
CHOICES = {
    "sync": ["pace=cohort", "strategy=delta_sgd"],
    "async": ["pace=buffer", "strategy=delta_sgd"],
    "auto": ["strategy=auto"],
}
TARGETS = (5.0, 4.85, 4.7)  # nats a token; all runs get there
# seeds after which the slower fixed choice of a fleet is known, unless fleets differ by seed
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
        arms = {
            name: arms[name] for name in ("published sync", "published async", "published auto")
        }
    folder, common = runs_folder(chosen.runs), [*COMMON, *(QUICK if chosen.quick else [])]
    runs = run_arms(folder, arms, seeds[:FIRST], common)
    seconds = {name: [mean_time(one, targets) for one in of] for name, of in runs.items()}
    studied = [fleet for fleet in FLEETS if f"{fleet} auto" in runs]
    behind = {f"{fleet} {worse(fleet, seconds)}" for fleet in studied if fleet != "lognormal"}
    more = run_arms(
        folder,
        {name: arm for name, arm in arms.items() if name not in behind},
        seeds[FIRST:],
        common,
    )
    for name, of in more.items():
        seconds[name] += [mean_time(one, targets) for one in of]
    fleets = {fleet: figures_of(fleet, seconds) for fleet in studied}
    head = (
        "fleet",
        "sync, s",
        "async, s",
        "auto, s",
        "better in seeds",
        "auto over the better",
        "standard error",
    )
    print(table(head, [row(fleet, f) for fleet, f in fleets.items()]))
    if not chosen.quick:
        options = {name: [*COMMON, *arm] for name, arm in arms.items()}
        write_results(STUDY, seeds, {"fleets": fleets, "targets": TARGETS, "options": options})


def mean_time(one, targets: tuple[float, ...]) -> float:
    """Virtual seconds to the losses, on average; raises SystemExit where one is never reached."""
    found = [seconds_to(one, loss) for loss in targets]
    if None in found:
        sys.exit(f"{one.folder} never gets to a loss of {targets[found.index(None)]}")
    return statistics.mean(found)


def worse(fleet: str, seconds: dict[str, list[float]]) -> str:
    """The fixed choice that takes longer on a fleet."""
    return max(
        ("sync", "async"), key=lambda name: statistics.mean(seconds[f"{fleet} {name}"][:FIRST])
    )


def figures_of(fleet: str, seconds: dict[str, list[float]]) -> dict:
    """Mean times of the three, and auto's over the better of the fixed ones, seed by seed."""
    by_seed = {name: seconds[f"{fleet} {name}"] for name in CHOICES}
    fixed = [{name: of[seed] for name, of in by_seed.items() if name != "auto" and seed < len(of)}
             for seed in range(len(by_seed["auto"]))]  # fmt: skip
    ratios = [
        auto / min(times.values()) for auto, times in zip(by_seed["auto"], fixed, strict=True)
    ]
    better = [min(times, key=lambda name: times[name]) for times in fixed]
    return {
        "better": {name: better.count(name) for name in sorted(set(better))},
        "seconds": {name: statistics.mean(of) for name, of in by_seed.items()},
        "over_better": statistics.mean(ratios) - 1,
        "standard_error": statistics.stdev(ratios) / len(ratios) ** 0.5
        if len(ratios) > 1
        else None,
        "over_better_by_seed": [ratio - 1 for ratio in ratios],
        "seconds_by_seed": by_seed,
    }


def row(fleet: str, f: dict) -> tuple[str, ...]:
    """A line of the table."""
    error = "" if f["standard_error"] is None else f"{f['standard_error']:.1%}"
    better = ", ".join(f"{name} {count}" for name, count in f["better"].items())
    return (
        fleet,
        *(f"{f['seconds'][name]:.1f}" for name in CHOICES),
        better,
        f"{f['over_better']:+.1%}",
        error,
    )


if __name__ == "__main__":
    main()
