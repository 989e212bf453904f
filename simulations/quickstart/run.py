"""The demo and its central twin: what does federation cost in two minutes on a laptop?

    python simulations/quickstart/run.py            # about 15 minutes on 2 cores
    python simulations/quickstart/run.py --quick    # a smoke run

The federated side is `fedgpt run experiment=demo`. The central twin is one client that has the same
text and trains the same tokens in as many steps, with batches as large as those of all sampled
clients together. Both sides have three seeds.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import arguments, run, run_arms, runs_folder, spread, table, write_results

QUICK = ["rounds=2", "local.steps=2", "evaluate.tokens=4096", "corpus=stdlib", "tokenizer=bytes"]


def main() -> None:
    chosen = arguments(__doc__ or "")
    seeds = [0] if chosen.quick else [0, 1, 2]
    extra = QUICK if chosen.quick else []
    folder = runs_folder(chosen.runs)
    federated = [
        run(folder / f"federated-{seed}", "experiment=demo", f"seed={seed}", *extra)
        for seed in seeds
    ]
    runs = {
        "federated": federated,
        **run_arms(folder, {"central_twin": ["experiment=central_twin"]}, seeds, extra),
    }
    figures = {side: figures_of([r.summary for r in of]) for side, of in runs.items()}
    figures["gap"] = figures["federated"]["loss"] / figures["central_twin"]["loss"] - 1
    print_table(figures)
    if not chosen.quick:
        draw({side: of[0].metrics for side, of in runs.items()}, STUDY / "loss.png")
        write_results(STUDY, seeds, figures)


def figures_of(summaries: list[dict]) -> dict:
    """The figures of a side: means over seeds, and the spread of the bits per byte."""
    final = [s["final"] for s in summaries]
    return {
        "bits_per_byte": spread([f["bits_per_byte"] for f in final]),
        "bits_per_byte_start": summaries[0]["initial"]["bits_per_byte"],
        "loss": statistics.mean(f["loss"] for f in final),
        "perplexity": statistics.mean(f["perplexity"] for f in final),
        "tokens": summaries[0]["tokens"],
        "bytes_up": summaries[0]["bytes_up"],
        "bytes_down": summaries[0]["bytes_down"],
        "wall_seconds": [s["wall_seconds"] for s in summaries],
    }


def print_table(figures: dict) -> None:
    def row(side: str, f: dict) -> tuple[str, ...]:
        bits, traffic = f["bits_per_byte"], (f["bytes_up"] + f["bytes_down"]) / 1e6
        loss = (
            f"{bits['mean']:.3f}",
            f"[{bits['min']:.3f}, {bits['max']:.3f}]",
            f"{f['perplexity']:.1f}",
        )
        return side, *loss, f"{f['tokens'] / 1e6:.2f} M", f"{traffic:,.0f}"

    rows = [row(side, figures[side]) for side in ("federated", "central_twin")]
    print(table(("", "bits per byte", "[min, max]", "perplexity", "tokens", "MB up + down"), rows))
    print(f"loss of the federated run over the twin's: {figures['gap']:+.1%}")


def draw(metrics: dict[str, list[dict]], path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    for (side, records), colour in zip(metrics.items(), ("#1f5fa8", "#c46210"), strict=True):
        scored = [r for r in records if "bits_per_byte" in r and r["version"]]
        label = f"{side.replace('_', ' ')}: {scored[-1]['bits_per_byte']:.3f}"
        tokens = [r["tokens"] / 1e6 for r in scored]
        axis.plot(
            tokens,
            [r["bits_per_byte"] for r in scored],
            marker="o",
            markersize=3,
            color=colour,
            label=label,
        )
    axis.set_xlabel("tokens trained (millions)")
    axis.set_ylabel("held-out bits per byte")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
