"""The Python side of the command line: run a configuration, open a run's folder, write text with
its model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgpt.core.errors import ConfigError, FedGPTError

if TYPE_CHECKING:
    from torch import Tensor

    from fedgpt.core.options import RunOptions
    from fedgpt.data.tokenizer import Tokenizer
    from fedgpt.model.gpt import GPT


def run(*overrides: str) -> Run:
    """Run a configuration, typed as on the command line, to its end; `resume=FOLDER` alone
    continues that run.

    Raises ConfigError for what `fedgpt run` would refuse.

    >>> run("model=nano", "rounds=5").summary["final"]["bits_per_byte"]  # doctest: +SKIP
    """
    from fedgpt.config import compose
    from fedgpt.flower.launch import launch

    if wrong := [o for o in overrides if not isinstance(o, str) or o.startswith("-")]:
        raise ConfigError(
            f"fedgpt.run({wrong[0]!r}): takes options as on the command line, as in run('rounds=5')"
        )
    options = resumed(overrides) or compose.load(overrides)
    launch(options)
    return Run(options.run_dir)


def resumed(arguments: Sequence[str]) -> RunOptions | None:
    """Options of the run that `resume=FOLDER` names, or None; raises ConfigError where it does not
    stand alone.
    """
    from fedgpt.config import compose

    resume = next((a for a in arguments if a.startswith("resume=")), None)
    if resume is None:
        return None
    folder = resume.removeprefix("resume=")
    if len(arguments) > 1:
        raise ConfigError(
            f"{resume}: stands alone, as the folder holds the run's own options; to train a"
            f" finished run further, start another from its weights: init_from={folder or 'FOLDER'}"
            " run_dir=NEW"
        )
    return compose.of_run(_found(folder, resume))


def open_run(folder: str | Path, best: bool = False) -> Run:
    """The run in `folder`, its model the newest, or the `best`; raises ConfigError where there is
    none.
    """
    return Run(_found(folder, str(folder)), best)


def _found(folder: str | Path, typed: str) -> Path:
    """A run's folder; the error names it as `typed`. An empty name is no folder, least of all the
    present one.
    """
    path = Path(folder).expanduser()
    if not str(folder) or not (path / "config.yaml").is_file():
        raise ConfigError(
            f"{typed}: is not a run's folder, as it has no config.yaml; name one below runs/"
        )
    return path


class Run:
    """A run's folder as an object."""

    def __init__(self, folder: str | Path, best: bool = False):
        self.folder, self.best = Path(folder).resolve(), best

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: the end of a finished run."""
        path = self.folder / "summary.json"
        if not path.exists():
            raise FedGPTError(
                f"{self.folder} has no summary yet; finish it with: fedgpt run resume={self.folder}"
            )
        return json.loads(path.read_text(encoding="utf-8"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl: one record per server version."""
        from fedgpt.storage.run_folder import read_lines

        return list(read_lines(self.folder / "metrics.jsonl"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        from fedgpt.config import compose
        from fedgpt.data.prepare import prepare
        from fedgpt.data.tokenizer import load_tokenizer

        if (
            self.folder / "model" / "tokenizer.json"
        ).is_file():  # the file that an export writes last but one
            return load_tokenizer(self.folder / "model")
        options = compose.of_run(self.folder)
        return prepare(options.corpus, options.tokenizer, options.cache_dir).tokenizer

    @cached_property
    def model(self) -> GPT:
        """The run's newest model in float32, that of its newest whole checkpoint, or its best by
        held-out loss.
        """
        import numpy as np

        from fedgpt.config import compose
        from fedgpt.core.flat import flatten
        from fedgpt.model.build import build_model
        from fedgpt.storage.checkpoint import Checkpoints

        options = compose.of_run(self.folder)
        checkpoints = Checkpoints(self.folder / "checkpoints", options.checkpoint.keep)
        if self.best:
            if (kept := checkpoints.load_best()) is None:
                why = "checkpoint.best is off, nothing is scored yet, or the file is damaged"
                raise FedGPTError(f"{self.folder} has no best weights: {why}")
            params = kept[0]
        elif (snapshot := checkpoints.load()) is not None:
            params = snapshot.state.params
        else:
            raise FedGPTError(
                f"{self.folder} has no whole checkpoint; start it with: fedgpt run"
                f" resume={self.folder}"
            )
        model = build_model(options.model, self.tokenizer.vocab_size, self._base(options)).eval()
        np.copyto(flatten(model)[1].numpy(), params)
        return model

    def _base(self, options: RunOptions) -> dict[str, Tensor]:
        """The frozen weights that the run trained on, made anew or read from its own export."""
        from fedgpt.core.flat import base_digest
        from fedgpt.storage.checkpoint import Checkpoints
        from fedgpt.storage.initial_weights import base_weights

        if not options.model.trainable:
            return {}
        checkpoints = Checkpoints(self.folder / "checkpoints", options.checkpoint.keep)
        snapshot = checkpoints.load()
        expected = None if snapshot is None else snapshot.tables.environment.get("base")
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
        """Continuations of `prompt`; `sampling` is temperature, top_k and top_p of
        model/generate.py.
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
            raise FedGPTError(str(error)) from error
        return [self.tokenizer.decode([i for i in row if i != self.tokenizer.end]) for row in new]
