"""`fedgpt generate RUN --prompt TEXT`: text from the newest model of a run."""

from __future__ import annotations

import argparse

from fedgpt.core.errors import ConfigError
from fedgpt.core.notices import saying
from fedgpt.core.options.option import SMALLEST, short

LARGEST_SEED = 2**63 - 1
RANGES = {
    "tokens": (0, 10**6),
    "samples": (1, 10**5),
    "temperature": (0, 10**6),
    "top_k": (0, 10**9),
    "top_p": (SMALLEST, 1),
    "seed": (0, LARGEST_SEED),
}


def main(arguments: list[str]) -> int:
    """Print generated text."""
    chosen = _parser().parse_args(arguments)
    for name, (low, high) in RANGES.items():
        value = getattr(chosen, name)
        if value is not None and not low <= value <= high:
            option = f"--{name.replace('_', '-')} {short(value)}"
            raise ConfigError(f"{option}: must be at least {low} and at most {high}")

    from fedgpt.api import open_run

    run = open_run(chosen.run, chosen.best)
    with saying("reading the model and generating text"):
        texts = run.generate(
            chosen.prompt,
            tokens=chosen.tokens,
            samples=chosen.samples,
            temperature=chosen.temperature,
            top_k=chosen.top_k or None,
            top_p=chosen.top_p,
            seed=chosen.seed,
        )
    for number, text in enumerate(texts):
        if number:
            print("-" * 40)
        print(chosen.prompt + text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fedgpt generate",
        description="Generate text with the newest model of a run.",
    )
    parser.add_argument("run", metavar="FOLDER", help="folder of a run")
    parser.add_argument("--prompt", metavar="TEXT", default="", help="text to continue")
    parser.add_argument(
        "--tokens", type=int, default=200, help="largest number of new tokens (%(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=1, help="number of continuations (%(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="sampling temperature; 0 takes the most likely token (%(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=50,
        help="sample from this many most likely tokens; 0 means all (%(default)s)",
    )
    parser.add_argument(
        "--top-p", type=float, help="sample from the most likely tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (%(default)s)")
    parser.add_argument(
        "--best", action="store_true", help="use the weights with the best held-out score"
    )
    return parser
