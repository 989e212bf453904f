"""Shared by the studies: running arms with seeds, tables, and results.json.

A study is a set of arms. An arm is a list of options of `fedgpt run`; every arm runs once for each
seed, and results.json records the figures together with the command, machine and commit.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fedgpt
from fedgpt.core.device import cores

REPOSITORY = Path(__file__).parent.parent
# colours of the lines of a figure, in order
COLOURS = (
    *("#1f5fa8", "#c46210", "#2e8b57", "#8b3a8b", "#b8860b"),
    *("#4d4d4d", "#c2185b", "#00838f", "#6d4c41"),
)
# options that make the runs of a smoke run short
SMALL = ("evaluate.tokens=2048", "corpus=stdlib", "tokenizer=bytes")


def arguments(description: str) -> argparse.Namespace:
    """Parse `--quick` (a smoke run that does not write results.json) and `--runs FOLDER`."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        epilog=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run of less than a minute; results.json is not written",
    )
    parser.add_argument(
        "--runs", type=Path, help="keep the run folders here, and reuse finished runs"
    )
    return parser.parse_args()


def run(folder: Path, *overrides: str) -> fedgpt.Run:
    """Run `fedgpt run` into `folder`, unless it contains a finished run.

    Every run has a process of its own, so that runs share neither memory nor threads.
    """
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "fedgpt", "run", *overrides, f"run_dir={folder}"]
        print("$ fedgpt", shlex.join(command[3:]), flush=True)
        began = time.monotonic()
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(
                f"{done.stdout[-2000:]}\n{done.stderr}\nthe run in {folder} ended with exit code"
                f" {done.returncode}"
            )
        final = fedgpt.open_run(folder).summary["final"]
        print(f"  loss {final['loss']:.4f} after {time.monotonic() - began:.0f} s", flush=True)
    return fedgpt.open_run(folder)


def run_arms(
    folder: Path,
    arms: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    common: Sequence[str] = (),
) -> dict[str, list[fedgpt.Run]]:
    """Run every arm with every seed; returns arm -> its runs in the order of the seeds.

    As many runs as cores take place at the same time, each with one worker of one thread. On the
    virtual clock that does not change the results.
    """
    one_worker = ["runtime.workers=1", "runtime.threads=1"]
    with ThreadPoolExecutor(cores()) as pool:
        waiting = {
            name: [
                pool.submit(
                    run,
                    folder / f"{_slug(name)}-seed{seed}",
                    *common,
                    *overrides,
                    *one_worker,
                    f"seed={seed}",
                )
                for seed in seeds
            ]
            for name, overrides in arms.items()
        }
        return {name: [future.result() for future in futures] for name, futures in waiting.items()}


def _slug(name: str) -> str:
    """A name as the name of a folder, without characters that a shell would interpret."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def scored(one: fedgpt.Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a held-out loss."""
    return [record for record in one.metrics if "loss" in record]


def seconds_to(one: fedgpt.Run, loss: float) -> float | None:
    """Virtual seconds until the held-out loss reaches `loss`, or None if it never does.

    Between two evaluations the loss is interpolated linearly.
    """
    before = None
    for record in scored(one):
        now = record["virtual_seconds"] or 0.0
        if record["loss"] <= loss:
            if before is None or before["loss"] == record["loss"]:
                return now
            share = (before["loss"] - loss) / (before["loss"] - record["loss"])
            earlier = before["virtual_seconds"] or 0.0
            return earlier + share * (now - earlier)
        before = record
    return None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, minimum and maximum."""
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}


def runs_folder(chosen: Path | None) -> Path:
    """The folder for a study's runs: the chosen one, or a temporary one."""
    return chosen if chosen is not None else Path(tempfile.mkdtemp(prefix="fedgpt-study-"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [head, *rows]
    ]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def write_results(
    study: Path, seeds: Sequence[int], figures: Mapping[str, Any], script: str = "run.py"
) -> None:
    """Write results.json: the figures, with command, seeds, machine, commit and date."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    circumstances = {
        "command": f"python simulations/{study.name}/{script}",
        "seeds": list(seeds),
        "machine": (
            f"{cores()} cores, {torch.backends.cpu.get_cpu_capability()}, torch"
            f" {torch.__version__}, Python {platform.python_version()}"
        ),
        "commit": commit,
        "date": date.today().isoformat(),
    }
    (study / "results.json").write_text(json.dumps({**figures, **circumstances}, indent=2) + "\n")
