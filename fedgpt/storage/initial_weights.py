"""The initial weights of a run: of a new model, of an earlier run, or of another model.

They have two parts. The trainable weights are version 0 of the vector that the server averages. The
base weights are frozen, because `model.trainable` does not select them. Server and clients compute
them separately from the same `init_from` or seed, and compare their digest.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.flat import FlatParams, flatten, frozen_weights
from fedgpt.core.options import RunOptions
from fedgpt.core.seeds import derive_seed
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer
from fedgpt.model.build import freeze
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import import_model

# options that may differ from the model of `init_from`, because they do not change its parameters
MAY_DIFFER = {"dropout", "bias", "trainable"}


def initial_weights(o: RunOptions, tokenizer: Tokenizer) -> np.ndarray:
    """The run's vector at version 0, (parameters,) float32: the trainable weights.

    Raises ConfigError if the model or the tokenizer of `init_from` differs.
    """
    return flatten(_initial_model(o, tokenizer))[1].numpy()


def base_weights(o: RunOptions, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The run's frozen weights by name, float32; returns an empty mapping at once if all are
    trained.

    Raises ConfigError as `initial_weights` does.
    """
    return frozen_weights(_initial_model(o, tokenizer)) if o.model.trainable else {}


def _initial_model(o: RunOptions, tokenizer: Tokenizer) -> GPT:
    """The complete model before the first round, from `init_from` or from the run's seed."""
    model = GPT(o.model, tokenizer.vocab_size)
    if o.init_from is None:
        model.init_weights(derive_seed(o.seed, "init"))
    else:
        model = _imported(o.init_from, model, tokenizer)
    freeze(model, o.model.trainable)
    return model


def _imported(init_from: str, model: GPT, tokenizer: Tokenizer) -> GPT:
    """The model in a run's folder or a Hugging Face folder, which must fit `model`."""
    folder = Path(init_from)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    try:
        found = import_model(folder)
    except FedGPTError as error:
        # which names the folder, as it does where nothing else names it
        problem = str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
        raise ConfigError(f"init_from={init_from}: {problem}") from error
    if problems := _differences(init_from, found, model, folder, tokenizer):
        raise ConfigError(problems)
    return found.float()


def _differences(
    init_from: str, found: GPT, model: GPT, folder: Path, tokenizer: Tokenizer
) -> list[str]:
    where = f"init_from={init_from}"
    theirs, ours = asdict(found.options), asdict(model.options)
    problems = [
        f"{where}: its model.{name} is {theirs[name]}, this run's is {ours[name]}; set"
        f" model.{name}={theirs[name]}"
        for name in ours
        if name not in MAY_DIFFER and theirs[name] != ours[name]
    ]
    if (folder / "tokenizer.json").is_file():
        if load_tokenizer(folder).digest != tokenizer.digest:
            problems.append(
                f"{where}: has another tokenizer; train both with tokenizer=bytes, which all runs"
                " share"
            )
    elif found.vocab_size != model.vocab_size:
        problems.append(
            f"{where}: has {found.vocab_size} tokens, this run's tokenizer has {model.vocab_size}"
        )
    # neither model has frozen parameters yet, so these layouts contain all parameters
    if not problems and FlatParams.of(found) != FlatParams.of(model):
        problems.append(
            f"{where}: has other parameters (model.bias, model.tie); set them as that model has"
            " them"
        )
    return problems
