"""model=hf: the model has the shape and the tokenizer of the one in `init_from`."""

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
    """Set the options of the model, and the tokenizer unless another is typed, to those of
    `init_from`. So the run's config.yaml has them, and a resumed run needs no model=hf.

    Raises ConfigError if there is none, or if it has no model that fedgpt can read.
    """
    if options.init_from is None:
        raise ConfigError(
            "model=hf: the model has the shape of the one in init_from, which is not set; name a"
            " Hugging Face folder with init_from=FOLDER"
        )
    own = options.tokenizer.name == "hf" and options.tokenizer.path is None
    if own:  # also if the folder is refused below, so that this is no other problem
        options.tokenizer.path = options.init_from
    found = read_start(options.init_from)
    if own:
        options.tokenizer.path = str(found.path)
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
