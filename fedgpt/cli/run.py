"""`fedgpt run`: Hydra's command line (overrides, -m, --cfg job, --config-dir) over conf/."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from fedgpt.cli.words import FLAGS_OF_RUN, split_words, value_of
from fedgpt.core.errors import ConfigError, FedGPTError, Interrupted

HELP = """
  fedgpt run                        a run with all defaults
  fedgpt run model=mini rounds=50   another model, and a longer run
  fedgpt run experiment=demo        options for a first complete run
  fedgpt run -m seed=0,1,2          a sweep: one run for each value
  fedgpt run resume=FOLDER          continue a stopped run
  fedgpt run resume=FOLDER rounds=60
                                    make a run longer
  fedgpt run --cfg job model=mini   print the configuration only
  fedgpt run --config-dir=DIR model=mine
                                    choices of your own: DIR/model/mine.yaml

OPTION=VALUE sets one option. GROUP=CHOICE sets several options of a group at
once; single options of the group can be set in addition. Each option is listed
as OPTION=DEFAULT, with its allowed values. null means no value.
An option that is a text gets the characters as they are typed. ${OPTION} in it
stands for the value of another option, except in evaluate.prompt. In a sweep,
a text with a comma is typed in quotes within the shell's: name='"a,b",c'.
"""


def main(arguments: list[str]) -> int:
    """Check all options, then start the run, or the runs of a sweep."""
    from fedgpt.api import resumed
    from fedgpt.config import compose
    from fedgpt.config.texts import quoted

    if found := resumed(arguments):
        from fedgpt.flower.launch import launch

        options, more = found
        launch(options, more=more)
        return 0
    words, config_dir = split_words(arguments, FLAGS_OF_RUN)
    sweep = "-m" in arguments or "--multirun" in arguments
    if sweep and value_of(arguments, "--cfg", "-c"):
        raise ConfigError(
            "--cfg: prints one configuration, but -m makes several; leave one of them out"
        )
    if sweep:
        compose.check_sweep(words, config_dir)
    else:
        compose.load(words, config_dir)
    # options first, as Hydra's parser takes them from one side of a flag only
    flags = [a for a in arguments if a not in words]
    return _hydra(arguments, [*(quoted(word, sweep) for word in words), *flags])


def _hydra(arguments: list[str], of_hydra: list[str]) -> int:
    """Call Hydra with `of_hydra`; it composes, sweeps and prints, and calls `job` for each job."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from fedgpt.config import compose
    from fedgpt.config.choices import CONF

    failures: list[FedGPTError] = []

    def job(cfg: DictConfig) -> float | None:
        sys.argv = ["fedgpt", "run", *arguments]  # content of command.txt
        settings = HydraConfig.get()
        # hydra.job.chdir has no effect: paths are those of the folder where they were typed
        os.chdir(settings.runtime.cwd)
        dated = not any(o.startswith("run_dir=") for o in settings.overrides.task)
        if settings.mode == RunMode.MULTIRUN and dated:
            cfg.run_dir, dated = settings.runtime.output_dir, False
        if any(isinstance(error, Interrupted) for error in failures):
            return None
        try:
            return _start(compose.to_options(cfg), dated)
        except FedGPTError as error:
            # Hydra would print a traceback, and a sweep continues after a failed job
            print(f"fedgpt: {error}", file=sys.stderr)
            failures.append(error)
            return None

    sys.argv = ["fedgpt run", *of_hydra]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="run")(job)()
    return failures[-1].exit_code if failures else 0


def _start(options: Any, dated: bool) -> float:
    """Run one configuration; returns the value that Hydra's sweepers minimise."""
    from fedgpt.flower.launch import launch

    launch(options, dated)
    return sweep_score(Path(options.run_dir))


def sweep_score(folder: Path) -> float:
    """The score of a finished run's last version, for a sweeper, which minimises it.

    If a higher score is better, it is returned with a minus sign.
    """
    import json

    from fedgpt.core.score import Score

    summary = json.loads((folder / "summary.json").read_text())
    score = Score(summary["score"], summary["higher_is_better"])
    return score.to_minimise(summary["final"][score.name])
