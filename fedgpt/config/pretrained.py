"""model=hf: the model has the shape of the one in `init_from`, so that nothing of it is typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace

from omegaconf import DictConfig

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import ModelOptions, RunOptions
from fedgpt.storage.init_from import read_start

# options of the model that are not its shape
FREE = ("dropout", "trainable")


def take_shape(options: RunOptions) -> None:
    """Replace `options.model` by what the folder of `init_from` says, in words that need no folder.

    Raises ConfigError if there is none, or if it has no model that fedgpt can read.
    """
    if options.init_from is None:
        raise ConfigError(
            "model=hf: the model has the shape of the one in init_from, which is not set; name a"
            " Hugging Face folder with init_from=FOLDER"
        )
    found = read_start(options.init_from)
    kept = {name: getattr(options.model, name) for name in FREE}
    options.model = replace(found.options, vocab_size=found.vocab_size, **kept)


def replaced(typed: Mapping[str, str], cfg: DictConfig) -> Iterator[str]:
    """A problem for each typed option (option -> text) that the folder decides."""
    if not cfg.model.from_init:
        return
    for one in fields(ModelOptions):
        if one.name not in FREE and (text := typed.get(f"model.{one.name}")) is not None:
            yield (
                f"{text}: has no effect with model=hf, whose shape is that of the model in"
                " init_from; leave it out"
            )
