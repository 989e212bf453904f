"""fedgpt in Python: run a configuration, open a run's folder, use its model.

import fedgpt

run = fedgpt.run("model=nano", "rounds=5")        # the options of `fedgpt run`, one text each
run.summary["final"]                              # scores of the last version
run.generate("Fellow citizens", tokens=50)

old = fedgpt.open_run("runs/2026-01-31_12-00-00-run", best=True)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgpt.core.errors import ConfigError, FedGPTError, resume_command
from fedgpt.core.files import read_json, typed_path
from fedgpt.report.scores import named, score_of, shown

if TYPE_CHECKING:
    from torch import Tensor

    from fedgpt.core.options import RunOptions
    from fedgpt.data.tokenizer import Tokenizer
    from fedgpt.model.gpt import GPT


log = logging.getLogger(__name__)


def run(*overrides: str) -> Run:
    """Train to the end and return the finished run; options are written as for `fedgpt run`.

    `resume=FOLDER` alone continues the run in that folder. Progress is printed. Raises ConfigError,
    with every problem that was found, for options that `fedgpt run` would refuse.

    >>> run("rounds=5", "partition.clients=4")  # doctest: +SKIP
    <Run runs/2026-01-31_12-00-00-run: finished at version 5, 2.098 bits per byte>
    >>> run("rounds=5", "model=huge")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedgpt.core.errors.ConfigError: 1 problem in the configuration:
      - model=huge: ...
    """
    from fedgpt.config import compose
    from fedgpt.flower.launch import launch

    if wrong := [o for o in overrides if not isinstance(o, str) or o.startswith("-")]:
        raise ConfigError(
            f"fedgpt.run({wrong[0]!r}): takes options as on the command line, as in run('rounds=5')"
        )
    if found := resumed(overrides):
        options, more = found
        launch(options, more=more)
    else:
        options = compose.load(overrides)
        launch(options, dated=not any(o.startswith("run_dir=") for o in overrides))
    return Run(options.run_dir)


def resumed(arguments: Sequence[str]) -> tuple[RunOptions, dict[str, int]] | None:
    """Return the options of the run that `resume=FOLDER` names, or None without `resume`.

    Also returns which of them were raised (`rounds=` or `tokens=`). Raises ConfigError if there are
    other options, or if FOLDER is not a run's folder.
    """
    from fedgpt.config import compose

    resume = next((a for a in arguments if a.startswith("resume=")), None)
    if resume is None:
        return None
    folder = resume.removeprefix("resume=")
    if flag := next((a for a in arguments if a.startswith("-")), None):
        raise ConfigError(
            f"{flag}: cannot be typed with {resume}, as config.yaml in that folder has the run's"
            f" options; leave out {flag.partition('=')[0]}"
        )
    parts = [a.partition("=") for a in arguments if a != resume]
    typed = {name: value for name, _, value in parts}
    if not typed.keys() <= set(compose.LENGTH):
        raise ConfigError(
            f"{resume}: stands alone, because the folder contains the run's options, of which only"
            " rounds= or tokens= can be raised; to train a finished run further with other options,"
            f" start another from its weights: init_from={folder or 'FOLDER'} run_dir=NEW"
        )
    options = compose.of_run(_found(folder, resume))
    more = {
        name: number
        for name, number in compose.raised(options, typed).items()
        if number > getattr(options, name)
    }
    for name, number in more.items():
        setattr(options, name, number)
    return options, more


def open_run(folder: str | Path, best: bool = False) -> Run:
    """Open the folder of a run, which may be finished, stopped or still training.

    The run's model is that of the newest checkpoint, or with `best` the one with the best held-out
    score. Raises ConfigError if `folder` is not the folder of a run.

    >>> open_run("runs/2026-01-31_12-00-00-run").summary["versions"]  # doctest: +SKIP
    50
    """
    return Run(_found(folder, str(folder)), best)


def _found(folder: str | Path, typed: str) -> Path:
    """Return the path of a run's folder; the ConfigError for any other folder names it as `typed`.

    An empty name is refused: as a path it would mean the current folder.
    """
    try:
        path = typed_path(folder)
        is_run = bool(str(folder)) and (path / "config.yaml").is_file()
    except OSError as error:  # such as a folder of another user
        raise ConfigError(f"{typed}: cannot be read ({error.strerror})") from error
    except RuntimeError as error:
        raise ConfigError(f"{typed}: there is no such home folder; name one in runs/") from error
    if not is_run:
        raise ConfigError(f"{typed}: is not a run's folder (no config.yaml); name one in runs/")
    return path


class Run:
    """A run's folder: its metrics, its summary and its model.

    `folder` is its absolute path. With `best`, the model is the one with the best held-out score.
    """

    def __init__(self, folder: str | Path, best: bool = False):
        self.folder, self.best = Path(folder).resolve(), best

    def __repr__(self) -> str:
        """Folder, state and newest score, read from files; does not raise."""
        summary: dict[str, Any] = {}
        metrics: list[dict[str, Any]] = []
        with suppress(FedGPTError):  # damaged
            metrics = self.metrics
        with suppress(FedGPTError):  # not finished, or damaged
            summary = self.summary
        if not metrics:
            return f"<Run {self.folder}: no version yet>"
        version = metrics[-1]["version"]
        finished = "finished at" if summary.get("versions") == version else "at"
        scored = next((line for line in reversed(metrics) if shown(line, score_of(summary))), {})
        name = shown(scored, score_of(summary))
        score = f", {named(name, scored[name])}" if name else ""
        return f"<Run {self.folder}: {finished} version {version}{score}>"

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json: `final` and `best` scores, totals.

        Raises FedGPTError if the run is not finished, or the file is damaged.
        """
        path = self.folder / "summary.json"
        if not path.exists():
            raise FedGPTError(
                f"{self.folder} has no summary yet; finish it with: {resume_command(self.folder)}"
            )
        try:
            return read_json(path)
        except FedGPTError as error:
            again = resume_command(self.folder)
            raise FedGPTError(f"{error}; write it again: {again}") from None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dictionary for each server version, as in metrics.jsonl; version 0 is the start.

        Versions that were evaluated have scores in it, such as `loss` and `bits_per_byte`. A
        warning says how many versions have none, because the file has lost lines.
        """
        from fedgpt.storage.run_folder import read_lines

        lines = list(read_lines(self.folder / "metrics.jsonl", "version"))
        versions = [line["version"] for line in lines]
        with suppress(FedGPTError):  # not finished, or damaged
            versions.append(self.summary["versions"])
        if (wanted := max(versions, default=-1) + 1) > len(lines):
            log.warning(
                "%s has %d of the %d lines up to version %d",
                *(self.folder / "metrics.jsonl", len(lines), wanted, wanted - 1),
            )
        return lines

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer: `encode(text)` gives ids, `decode(ids)` text.

        Needs no text, except for a run that began with a version of fedgpt that did not keep the
        tokenizer in the run's folder. Raises FedGPTError if it is not the one that the run began
        with.
        """
        from fedgpt.config import compose
        from fedgpt.storage.checkpoint import Checkpoints
        from fedgpt.storage.content import run_tokenizer

        options = compose.of_run(self.folder, reading=True)
        folder = self.folder / "checkpoints"
        identity = Checkpoints(folder, options.checkpoint.keep).identity()
        return run_tokenizer(options, {} if identity is None else identity.environment)

    @cached_property
    def model(self) -> GPT:
        """The run's model as a torch module in float32, in evaluation mode.

        It is the model of the newest intact checkpoint, or the best one with `best`. Raises
        FedGPTError if there is none.
        """
        import numpy as np

        from fedgpt.config import compose
        from fedgpt.core.flat import flatten
        from fedgpt.model.build import build_model
        from fedgpt.storage.checkpoint import Checkpoints

        options = compose.of_run(self.folder, reading=True)
        checkpoints = Checkpoints(self.folder / "checkpoints", options.checkpoint.keep)
        identity = checkpoints.identity()
        if self.best:
            if (kept := checkpoints.load_best(identity.run if identity else None)) is None:
                why = "checkpoint.best is off, nothing is scored yet, or best.safetensors is"
                why += " damaged or of another run"
                raise FedGPTError(f"{self.folder} has no best weights: {why}")
            params = kept[0]
        elif (snapshot := checkpoints.load()) is not None:
            params = snapshot.state.params
        else:
            raise FedGPTError(
                f"{self.folder} has no intact checkpoint; continue it with:"
                f" {resume_command(self.folder)}"
            )
        model = build_model(options.model, self.tokenizer.vocab_size, self._base(options)).eval()
        vector = flatten(model)[1].numpy()
        before = {} if identity is None else identity.options
        # the heads, for example, do not change the number of parameters
        changed = compose.changed_options(before, options, "model.") if before else ""
        if changed or vector.shape != params.shape:
            sizes = f"{vector.size} parameters instead of {params.size}"
            raise FedGPTError(
                f"{self.folder}/config.yaml: describes another model than the checkpoints contain"
                f" ({changed or sizes}); restore that file"
            )
        np.copyto(vector, params)
        return model

    def _base(self, options: RunOptions) -> dict[str, Tensor]:
        """The run's frozen weights, computed again or read from its exported model."""
        from fedgpt.core.flat import base_digest
        from fedgpt.storage.checkpoint import Checkpoints
        from fedgpt.storage.initial_weights import base_weights

        if not options.model.trainable:
            return {}
        checkpoints = Checkpoints(self.folder / "checkpoints", options.checkpoint.keep)
        snapshot = checkpoints.load()
        expected = None if snapshot is None else snapshot.identity.environment.get("base")
        # a finished run has its complete model in model/, which is read as an init_from
        for start in (options, replace(options, init_from=str(self.folder))):
            with suppress(FedGPTError):
                base = base_weights(start, self.tokenizer)
                if base_digest(base) == expected:
                    return base
        raise FedGPTError(
            f"{self.folder}: base weights differ from those that the run began with, and it has no"
            f" exported model; restore init_from={options.init_from}"
        )

    def generate(
        self, prompt: str, tokens: int = 200, samples: int = 1, seed: int = 0, **sampling: Any
    ) -> list[str]:
        """Return `samples` continuations of `prompt`, of at most `tokens` tokens each.

        `sampling` takes `temperature` (default 0.8), `top_k` (default 50) and `top_p`. The same
        seed gives the same texts. Raises ConfigError for values out of range.

        >>> run = open_run("runs/2026-01-31_12-00-00-run")  # doctest: +SKIP
        >>> run.generate("Fellow citizens", tokens=40, samples=2, top_p=0.9)  # doctest: +SKIP
        """
        from fedgpt.model.generate import generate

        ids = list(self.tokenizer.encode(prompt)) or [self.tokenizer.end]
        options = {"temperature": 0.8, "top_k": 50, **sampling}
        try:
            new = generate(
                self.model,
                ids,
                tokens,
                samples=samples,
                stop=self.tokenizer.end,
                seed=seed,
                **options,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return [self.tokenizer.decode([i for i in row if i != self.tokenizer.end]) for row in new]
