"""What every study does around its runs: configurations in, results.json with its circumstances out."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fedgpt
from fedgpt.core.device import cores

REPOSITORY = Path(__file__).parent.parent


def arguments(description: str) -> argparse.Namespace:
    """`--quick` (a smoke run that leaves results.json alone) and `--runs FOLDER`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smoke run of less than a minute; results.json stays")
    parser.add_argument("--runs", type=Path, help="keep the run folders here (default: a temporary folder)")
    return parser.parse_args()


def run(folder: Path, *overrides: str) -> fedgpt.Run:
    """One run into `folder`, in a process of its own, so that runs do not share memory or threads."""
    command = [sys.executable, "-m", "fedgpt", "run", *overrides, f"run_dir={folder}"]
    print("$ fedgpt", shlex.join(command[3:]), flush=True)
    subprocess.run(command, check=True)
    return fedgpt.open_run(folder)


def runs_folder(chosen: Path | None) -> Path:
    """Where a study's runs go."""
    return chosen if chosen is not None else Path(tempfile.mkdtemp(prefix="fedgpt-study-"))


def write_results(study: Path, seeds: list[int], figures: dict[str, Any]) -> None:
    """results.json: the figures with command, seeds, machine and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    circumstances = {
        "command": f"python simulations/{study.name}/run.py",
        "seeds": seeds,
        "machine": f"{cores()} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "commit": commit,
        "date": date.today().isoformat(),
    }
    (study / "results.json").write_text(json.dumps({**figures, **circumstances}, indent=2) + "\n")
