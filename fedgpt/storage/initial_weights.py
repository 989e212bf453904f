"""The initial weights of a run: of a new model, of an earlier run, or of another model.

They have two parts. The trainable weights are version 0 of the vector that the server averages. The
base weights are frozen, because `model.trainable` does not select them. Server and clients compute
them separately from the same `init_from` or seed, and compare their digest.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fedgpt.core.errors import ConfigError
from fedgpt.core.flat import flatten, frozen_weights
from fedgpt.core.options import RunOptions
from fedgpt.core.seeds import derive_seed
from fedgpt.data.tokenizer import Tokenizer
from fedgpt.model.build import freeze
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import load_model
from fedgpt.storage.init_from import differences, naming, read_start


def initial_weights(o: RunOptions, tokenizer: Tokenizer) -> np.ndarray:
    """The run's vector at version 0, (parameters,) float32: the trainable weights.

    Raises ConfigError if the model or the tokenizer of `init_from` differs or is damaged.
    """
    return flatten(_initial_model(o, tokenizer))[1].numpy()


def base_weights(o: RunOptions, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The run's frozen weights by name, float32; returns an empty mapping at once if all are
    trained.

    Raises ConfigError as `initial_weights` does.
    """
    return frozen_weights(_initial_model(o, tokenizer)) if o.model.trainable else {}


def check_weights(o: RunOptions) -> None:
    """Read all weights of `init_from`; raises ConfigError if they are damaged or do not fit."""
    _imported(o, None)


def _initial_model(o: RunOptions, tokenizer: Tokenizer) -> GPT:
    """The complete model before the first round, from `init_from` or from the run's seed."""
    if o.init_from is None:
        model = GPT(o.model, tokenizer.vocab_size)
        model.init_weights(derive_seed(o.seed, "init"))
    else:
        model = _imported(o, tokenizer)
    freeze(model, o.model.trainable)
    return model


def _imported(o: RunOptions, tokenizer: Tokenizer | None) -> GPT:
    """The model in the folder that `init_from` names, which must fit the run's options."""
    assert o.init_from is not None
    found = read_start(o.init_from)
    if problems := differences(o, found, tokenizer):
        raise ConfigError(problems)
    with naming(o.init_from):
        return load_model(found)
