"""`fedgpt` and `python -m fedgpt`: help is answered before anything heavy is imported."""

from __future__ import annotations

import sys

HELP = """fedgpt: federated training of small GPTs

  fedgpt run [key=value ...]          train; options are Hydra's: groups (model=mini), values (rounds=20),
                                      sweeps (-m seed=0,1,2), --cfg job to print without running
  fedgpt run resume=FOLDER            continue a run that was stopped
  fedgpt data [key=value ...]         show the text, tokens, clients and split that a run would use
  fedgpt privacy plan [key=value ...] what a private run would cost, before anything runs
  fedgpt audit [key=value ...]        attack the privacy that these options promise, and measure what leaks
  fedgpt generate FOLDER --prompt T   write text with a run's model (fedgpt generate --help)
  fedgpt --version

Groups and their choices:
{groups}

Every option with its meaning: fedgpt/core/options.py; examples: README.md
"""


def main() -> int:
    """Entry point of the command line; returns the exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(groups=_groups()), end="")
        return 0
    if arguments[0] == "--version":
        from fedgpt import __version__

        print(__version__)
        return 0
    # `generate` has flags of its own, and a help that lists them
    if arguments[0] in ("run", "data", "privacy", "audit") and {"-h", "--help"} & set(
        arguments[1:]
    ):
        print(HELP.format(groups=_groups()), end="")
        return 0
    from fedgpt.cli import dispatch

    return dispatch(arguments[0], arguments[1:])


def _groups() -> str:
    """The groups of conf/, read from the folder names: importing Hydra to list them would take
    longer.
    """
    from pathlib import Path

    package = Path(__file__).parent
    conf = package / "conf" if (package / "conf").is_dir() else package.parent / "conf"
    lines = []
    for folder in sorted(p for p in conf.iterdir() if p.is_dir()):
        choices = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        lines.append(f"  {folder.name:<11} {choices}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
